"""What does a step of adversarial training cost: standard, FGSM, PGD-10, TRADES-10 and the learned attacker?

One batch through ``L2LDefense`` with a ResNet-18 for 32-pixel images (3x3 stem, no pooling before the blocks), inside
the Trainer, optimizers included. The clock runs inside training batches alone. All variants are timed in interleaved
rounds and compared round by round with PGD-10. On the CPU it is the clock of the process, with one thread: what else
the machine does costs wall-clock time, but little of this.

    python benchmarks/l2l_cost.py
"""

import logging
import time
import warnings
from functools import partial
from typing import Any

import torch
from timing import Timings, environment, interleave, output_path, parser, write_result
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models import resnet18

from lightning_rectify._lightning import Callback, Trainer
from lightning_rectify.modules.l2l import L2LDefense

NAME = "l2l_cost"
PGD = "PGD-10"
EPOCH = 50_000  # images of CIFAR's training part
#: variant -> arguments of ``L2LDefense``
VARIANTS: dict[str, dict[str, Any]] = {
    "standard": {"attack": "none"},
    "FGSM": {"attack": "fgsm"},
    PGD: {"attack": "pgd", "train_steps": 10},
    "TRADES-10": {"attack": "trades", "train_steps": 10},
    "gradient L2L, joint": {},
    "2-step L2L, joint": {"steps": 2},
    "gradient L2L, alternate": {"order": "alternate"},
    "gradient L2L, joint, slim attacker": {"attacker": "slim"},
    "2-step L2L, joint, slim attacker": {"attacker": "slim", "steps": 2},
}
TARGETS = {"gradient L2L, joint": 0.35, "2-step L2L, joint": 0.5}  # of PGD-10's time


class Stopwatch(Callback):
    """Adds up the time inside training batches; called, it tells the sum."""

    def __init__(self, device: torch.device) -> None:
        self.seconds, self._begin, self.device = 0.0, 0.0, device

    def __call__(self) -> float:
        return self.seconds

    def _now(self) -> float:
        if self.device.type == "cpu":
            return time.process_time()
        torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def on_train_batch_start(self, *args: object) -> None:
        self._begin = self._now()

    def on_train_batch_end(self, *args: object) -> None:
        self.seconds += self._now() - self._begin


def classifier(width: int) -> nn.Module:
    """ResNet-18 with the stem that images of 32 pixels ask for; ``width`` 64 is the usual one."""
    network = resnet18(num_classes=10) if width == 64 else narrow(width)
    network.conv1 = nn.Conv2d(3, network.conv1.out_channels, kernel_size=3, padding=1, bias=False)
    network.maxpool = nn.Identity()  # type: ignore[assignment]
    return network


def narrow(width: int) -> Any:
    """A stand-in for the quick mode."""
    network = nn.Sequential()
    network.conv1 = nn.Conv2d(3, width, kernel_size=3, padding=1)
    network.maxpool = nn.Identity()
    network.rest = nn.Sequential(nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))
    return network


def make_fit(name: str, args: Any, watch: Stopwatch) -> tuple[Any, L2LDefense]:
    """A call that trains a variant for some steps, and its module."""
    torch.manual_seed(0)
    sgd = partial(torch.optim.SGD, lr=0.01, momentum=0.9, weight_decay=2e-4)
    module = L2LDefense(
        classifier=classifier(args.width), in_channels=3, image_size=32, epsilon=8 / 255, classifier_optimizer=sgd,
        val_attack_steps=0, **VARIANTS[name],
    )  # fmt: skip
    count = args.batch * args.steps
    data = TensorDataset(torch.rand(count, 3, 32, 32), torch.randint(10, (count,)))
    loader = DataLoader(data, batch_size=args.batch)
    silence = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)

    def fit() -> None:
        accelerator = "gpu" if watch.device.type == "cuda" else "cpu"
        Trainer(
            accelerator=accelerator, devices=1, max_steps=args.steps, max_epochs=-1, callbacks=[watch], **silence
        ).fit(module, loader)

    return fit, module


def rows_of(timings: Timings, modules: dict[str, L2LDefense], args: Any) -> list[dict[str, Any]]:
    """One row a variant; a sample of the timings is ``steps`` batches."""
    rows = []
    for name, module in modules.items():
        found, passes = timings.ratio(name, PGD), module.passes
        step = timings.median(name) / args.steps
        rows.append(
            {
                "variant": name,
                "step_ms": 1e3 * step,
                "epoch_seconds": step * EPOCH / args.batch,
                "ratio_to_pgd": found.median,
                "ratio_to_pgd_quartiles": [found.low, found.high],
                "predicted_ratio": passes.against_pgd(10),
                "attacker_ratio": passes.attacker_ratio,
            }
        )
    return rows


def describe(row: dict[str, Any]) -> str:
    """One line of the console's table."""
    low, high = row["ratio_to_pgd_quartiles"]
    return (
        f"{row['variant']:<36} {row['step_ms']:9.1f} ms a step {row['epoch_seconds']:8.0f} s an epoch"
        f"  {row['ratio_to_pgd']:.3f} x PGD-10 ({low:.3f} to {high:.3f}), {row['predicted_ratio']:.3f} in passes"
    )


def main() -> None:
    arguments = parser(__doc__, NAME)
    arguments.add_argument("--batch", type=int, help="images a step (default 32; quick: 4)")
    arguments.add_argument("--rounds", type=int, help="samples of each variant (default 5; quick: 2)")
    arguments.add_argument("--steps", type=int, help="steps a sample (default 1; quick: 2)")
    arguments.add_argument("--width", type=int, help="channels of the first stage (default 64, the real ResNet-18)")
    arguments.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    arguments.add_argument("--device", default="cpu", help="cpu or cuda")
    args = arguments.parse_args()
    args.batch = args.batch or (4 if args.quick else 32)
    args.rounds = args.rounds or (2 if args.quick else 5)
    args.steps = args.steps or (2 if args.quick else 1)
    args.width = args.width or (4 if args.quick else 64)
    names = list(dict.fromkeys([PGD, *args.variants]))
    for logger in ("lightning.pytorch", "pytorch_lightning"):
        logging.getLogger(logger).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=UserWarning)  # a Trainer a sample, each with the same advice
    torch.set_num_threads(1)
    device = torch.device(args.device)
    watch = Stopwatch(device)
    made = {name: make_fit(name, args, watch) for name in VARIANTS if name in names}
    timings = interleave({name: fit for name, (fit, _) in made.items()}, rounds=args.rounds, warmup=1, clock=watch)
    rows = rows_of(timings, {name: module for name, (_, module) in made.items()}, args)
    for row in rows:
        print(describe(row), flush=True)
    settings = {
        "batch": args.batch, "rounds": args.rounds, "steps_a_sample": args.steps, "width": args.width,
        "image": [3, 32, 32], "classifier": "ResNet-18, 3x3 stem", "device": device.type, "targets": TARGETS,
        "clock": "process time" if device.type == "cpu" else "wall clock, synchronized", "epoch": EPOCH,
    }  # fmt: skip
    ratios = {row["variant"]: row["ratio_to_pgd"] for row in rows}
    met = {name: ratios[name] <= target for name, target in TARGETS.items() if name in ratios}
    path = output_path(NAME, args.out, args.quick)
    write_result(path, NAME, settings, rows, environment=environment(device), meets_targets=met)


if __name__ == "__main__":
    main()
