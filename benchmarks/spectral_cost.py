"""What does spectrum control cost a discriminator's training step, beside a plain one and beside an exact SVD?

One step of the CNN discriminator of the GAN spectrum paper (arXiv:1812.10912): D(real) and D(fake), the logistic loss,
the penalty, backward, a fused Adam step, the projection. All variants are timed in interleaved rounds. On the CPU the
clock is that of the process, with one thread: what else the machine does costs wall-clock time, but little of this.

    python benchmarks/spectral_cost.py
"""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from timing import Timings, environment, interleave, output_path, parser, write_result
from torch import Tensor, nn
from torch.nn.functional import softplus
from torch.nn.utils import parametrize

from lightning_rectify.modules.spectral_gan.networks import CNNDiscriminator
from lightning_rectify.nn import (
    matrix_layers,
    project,
    rebuilt_once,
    singular_values,
    spectral_control,
    spectral_penalty,
    weight_matrix,
)

NAME = "spectral_cost"
PLAIN, EXACT = "plain", "exact SVD"
TARGETS = {PLAIN: 1.45, EXACT: 0.75}  # what a step under control may cost of these


class ExactNormalization(nn.Module):
    """W / sigma_max by a whole singular value decomposition, with the gradient through it."""

    def forward(self, weight: Tensor) -> Tensor:
        _, s, _ = torch.linalg.svd(weight.flatten(1), full_matrices=False)
        return weight / s[0]


def exact(net: nn.Module) -> nn.Module:
    for layer in matrix_layers(net).values():
        parametrize.register_parametrization(layer, "weight", ExactNormalization())
    return net


@torch.no_grad()
def watch(net: nn.Module) -> None:
    """What a monitor of any network computes at every step."""
    for layer in matrix_layers(net).values():
        singular_values(weight_matrix(layer))


def cached(_: nn.Module) -> AbstractContextManager[None]:
    return parametrize.cached()


def once_each(_: nn.Module) -> AbstractContextManager[None]:
    return nullcontext()


Prepare = Callable[[nn.Module], nn.Module]
Context = Callable[[nn.Module], AbstractContextManager[None]]
After = Callable[[nn.Module], None]
# name -> what is done to the network, what surrounds the forward passes, what follows the optimizer's step
VARIANTS: dict[str, tuple[Prepare, Context, After]] = {
    PLAIN: (lambda net: net, once_each, project),
    "torch spectral_norm": (partial(spectral_control, control="spectral_norm"), once_each, project),
    "orthogonal penalty on W": (partial(spectral_control, control="orthogonal"), once_each, project),
    "normalization": (partial(spectral_control, control="normalization"), rebuilt_once, project),
    "d_optimal": (partial(spectral_control, control="d_optimal"), rebuilt_once, project),
    "divergence": (partial(spectral_control, control="divergence", start="spread"), rebuilt_once, project),
    "d_optimal, rebuilt at each forward": (partial(spectral_control, control="d_optimal"), once_each, project),
    "normalization, QR each step": (
        partial(spectral_control, control="normalization", retraction=1), rebuilt_once, project,
    ),
    "plain, Gram eigenvalues watched": (lambda net: net, once_each, watch),
    EXACT: (exact, cached, project),
}  # fmt: skip
CONTROLLED = ("normalization", "d_optimal", "divergence", "normalization, QR each step")


def make_step(name: str, width: int, batch: int, device: torch.device) -> tuple[Callable[[], None], int]:
    """One training step of a variant, and how many numbers it trains."""
    torch.manual_seed(0)
    prepare, context, after = VARIANTS[name]
    net = prepare(CNNDiscriminator(image_size=32, in_channels=3, width=width)).to(device)
    project(net)
    optimizer = torch.optim.Adam(net.parameters(), lr=2e-4, betas=(0.5, 0.999), fused=True)
    real, fake = (torch.rand(batch, 3, 32, 32, device=device) * 2 - 1 for _ in range(2))

    def step() -> None:
        optimizer.zero_grad()
        with context(net):
            loss = softplus(-net(real)).mean() + softplus(net(fake)).mean() + spectral_penalty(net)
            loss.backward()
        optimizer.step()
        after(net)

    return step, sum(parameter.numel() for parameter in net.parameters())


def measure(width: int, batch: int, rounds: int, device: torch.device) -> list[dict[str, Any]]:
    """One row a variant for one width."""
    made = {name: make_step(name, width, batch, device) for name in VARIANTS}
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    steps = {name: step for name, (step, _) in made.items()}
    timings = interleave(steps, rounds=rounds, warmup=1, device=device, clock=clock)
    return [
        {"width": width, "variant": name, "parameters": made[name][1], **timings.milliseconds(name),
         **ratio(timings, name, PLAIN, "plain"), **ratio(timings, name, EXACT, "exact_svd")}
        for name in VARIANTS
    ]  # fmt: skip


def ratio(timings: Timings, name: str, to: str, key: str) -> dict[str, Any]:
    found = timings.ratio(name, to)
    return {f"ratio_to_{key}": found.median, f"ratio_to_{key}_quartiles": [found.low, found.high]}


def verdict(rows: list[dict[str, Any]]) -> dict[str, bool]:
    """Whether each controlled variant meets both targets at the largest width."""
    widest = max(row["width"] for row in rows)
    return {
        row["variant"]: row["ratio_to_plain"] <= TARGETS[PLAIN] and row["ratio_to_exact_svd"] <= TARGETS[EXACT]
        for row in rows
        if row["width"] == widest and row["variant"] in CONTROLLED
    }


def describe(row: dict[str, Any]) -> str:
    """One line of the console's table."""
    return (
        f"{row['width']:>4} {row['variant']:<34} {row['median_ms']:9.1f} ms"
        f" ({row['min_ms']:.1f} to {row['max_ms']:.1f})  {row['ratio_to_plain']:5.2f} x plain"
        f"  {row['ratio_to_exact_svd']:5.2f} x exact SVD"
    )


def main() -> None:
    arguments = parser(__doc__, NAME)
    arguments.add_argument("--widths", nargs="+", type=int, help="channels of the last layer (default 512 128)")
    arguments.add_argument("--batch", type=int, help="real images a step, and as many fake ones (default 64)")
    arguments.add_argument("--rounds", type=int, help="samples of each variant (default 8; quick: 2)")
    arguments.add_argument("--device", default="cpu", help="cpu or cuda")
    args = arguments.parse_args()
    torch.set_num_threads(1)
    widths = args.widths or ([16] if args.quick else [512, 128])
    batch = args.batch or (4 if args.quick else 64)
    rounds = args.rounds or (2 if args.quick else 8)
    device = torch.device(args.device)
    rows: list[dict[str, Any]] = []
    for width in widths:
        found = measure(width, batch, rounds, device)
        rows += found
        for row in found:
            print(describe(row), flush=True)
    settings = {
        "batch": batch, "rounds": rounds, "device": device.type, "image": [3, 32, 32], "targets": TARGETS,
        "clock": "process time" if device.type == "cpu" else "wall clock, synchronized",
    }  # fmt: skip
    path = output_path(NAME, args.out, args.quick)
    write_result(path, NAME, settings, rows, environment=environment(device), meets_targets=verdict(rows))


if __name__ == "__main__":
    main()
