"""How long does one optimizer step take? RectifiedAdam against torch's RAdam, fused Adam and AdamW, and a peer.

Every optimizer steps its own copy of the same parameters with the same random gradients, set once; only ``step()`` is
timed, after every optimizer has left RAdam's unrectified phase. All of torch's arguments not named in the row are the
defaults. ``pytorch_optimizer`` is timed where it is installed (``pip install pytorch-optimizer``).

    python benchmarks/optimizer_step.py
"""

import gc
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from timing import environment, interleave, output_path, parser, write_result
from torch import Tensor, nn
from torchvision.models import resnet18, resnet50

from lightning_rectify import RectifiedAdam

NAME = "optimizer_step"
LR = 1e-3
ADVANCE = 12  # steps before timing; RAdam rectifies from step 6 on
REFERENCE = "Adam, fused"
TORCH_RADAMS = ("torch RAdam, for-loop", "torch RAdam, foreach")
PEER = "pytorch_optimizer RAdam"

OptimizerFactory = Callable[[Iterable[Tensor]], torch.optim.Optimizer]


class TransformerBase(nn.Module):
    """The parameters of Transformer base: 6+6 layers, width 512, one embedding for source, target and output."""

    def __init__(self, vocabulary: int = 37_000) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, 512)
        self.transformer = nn.Transformer(d_model=512, nhead=8, dim_feedforward=2048, batch_first=True)


class Tiny(nn.Module):
    """A few small parameters, for the quick mode."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(64, 32), nn.Linear(32, 10))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "ResNet-18": resnet18,
    "ResNet-50": resnet50,
    "Transformer base": TransformerBase,
    "tiny": Tiny,
}


def factories() -> dict[str, OptimizerFactory]:
    """Every optimizer of the comparison, by the name of its row."""
    found: dict[str, OptimizerFactory] = {
        "RectifiedAdam": partial(RectifiedAdam, lr=LR),
        "RectifiedAdam, decoupled decay": partial(RectifiedAdam, lr=LR, weight_decay=1e-2, decoupled_weight_decay=True),
        "torch RAdam, for-loop": partial(torch.optim.RAdam, lr=LR, foreach=False),
        "torch RAdam, foreach": partial(torch.optim.RAdam, lr=LR, foreach=True),
        "Adam, fused": partial(torch.optim.Adam, lr=LR, fused=True),
        "AdamW, fused": partial(torch.optim.AdamW, lr=LR, fused=True),
    }
    try:
        from pytorch_optimizer import RAdam
    except ImportError:
        return found
    return {**found, PEER: partial(RAdam, lr=LR)}


def prepare(
    shapes: Sequence[torch.Size], gradients: Sequence[Tensor], factory: OptimizerFactory
) -> torch.optim.Optimizer:
    """An optimizer over fresh parameters that share the given gradients, advanced into the rectified phase."""
    generator = torch.Generator().manual_seed(0)
    parameters = []
    for shape, gradient in zip(shapes, gradients, strict=True):
        value = 0.02 * torch.randn(shape, generator=generator)
        parameter = nn.Parameter(value.to(gradient))
        parameter.grad = gradient  # shared: no step writes to it
        parameters.append(parameter)
    optimizer = factory(parameters)
    for _ in range(ADVANCE):
        optimizer.step()
    return optimizer


def measure(model: str, rounds: int, device: torch.device, dtype: torch.dtype) -> list[dict[str, Any]]:
    """One row an optimizer for one model."""
    with torch.device("meta"):
        shapes = [parameter.shape for parameter in MODELS[model]().parameters()]
    generator = torch.Generator().manual_seed(1)
    gradients = [(0.01 * torch.randn(shape, generator=generator)).to(device, dtype) for shape in shapes]
    optimizers = {name: prepare(shapes, gradients, factory) for name, factory in factories().items()}
    timings = interleave(
        {name: optimizer.step for name, optimizer in optimizers.items()}, rounds=rounds, warmup=2, device=device
    )
    faster = timings.fastest(TORCH_RADAMS)
    size = {"model": model, "tensors": len(shapes), "parameters": sum(shape.numel() for shape in shapes)}
    rows: list[dict[str, Any]] = []
    for name in optimizers:
        to_adam, to_radam = timings.ratio(name, REFERENCE), timings.ratio(name, faster)
        rows.append(
            {
                **size,
                "optimizer": name,
                "status": "measured",
                **timings.milliseconds(name),
                "ratio_to_fused_adam": to_adam.median,
                "ratio_to_fused_adam_quartiles": [to_adam.low, to_adam.high],
                "ratio_to_faster_torch_radam": to_radam.median,
                "faster_torch_radam": faster,
            }
        )
    if PEER not in optimizers:
        rows.append({**size, "optimizer": PEER, "status": "not installed"})
    return rows


def main() -> None:
    arguments = parser(__doc__, NAME)
    arguments.add_argument("--models", nargs="+", choices=list(MODELS), help="default: all three real ones")
    arguments.add_argument("--rounds", type=int, help="samples of each optimizer (default 30; quick: 5)")
    arguments.add_argument("--device", default="cpu", help="cpu or cuda")
    arguments.add_argument("--dtype", default="float32", choices=("float32", "float64", "bfloat16", "float16"))
    arguments.add_argument("--threads", type=int, help="torch's intra-op threads (default: torch's own choice)")
    args = arguments.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    models = args.models or (["tiny"] if args.quick else [model for model in MODELS if model != "tiny"])
    rounds = args.rounds or (5 if args.quick else 30)
    device = torch.device(args.device)
    rows: list[dict[str, Any]] = []
    for model in models:
        rows += measure(model, rounds, device, getattr(torch, args.dtype))
        gc.collect()
        for row in rows:
            if row["model"] == model:
                print(describe(row), flush=True)
    path = output_path(NAME, args.out, args.quick)
    settings = {"rounds": rounds, "device": device.type, "dtype": args.dtype, "steps_before_timing": ADVANCE}
    write_result(path, NAME, settings, rows, environment=environment(device, ("torchvision", "pytorch-optimizer")))


def describe(row: dict[str, Any]) -> str:
    """One line of the console's table."""
    head = f"{row['model']:<17} {row['optimizer']:<31}"
    if row["status"] != "measured":
        return f"{head} {row['status']}"
    return (
        f"{head} {row['median_ms']:9.2f} ms ({row['min_ms']:.2f} to {row['max_ms']:.2f})"
        f"  {row['ratio_to_fused_adam']:6.2f} x fused Adam"
        f"  {row['ratio_to_faster_torch_radam']:6.2f} x {row['faster_torch_radam']}"
    )


if __name__ == "__main__":
    main()
