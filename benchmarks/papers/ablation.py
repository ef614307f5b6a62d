"""What the RAdam paper sets side by side (section 3.1, Figures 1 to 3): the optimizers, and what is kept of a run."""

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from lightning_rectify import RectifiedAdam
from lightning_rectify._lightning import NAME as LIGHTNING
from lightning_rectify.optim import FrozenStartAdam, LinearWarmup

SHOWN = (1, 5, 10, 25, 50, 75, 100, 200, 300, 400, 800, 1600)  # the paper's iterations of Figure 2, and on
QUANTITIES = ("gradient_median", "gradient_q05", "gradient_q95", "log_variance", "variance", "theory_variance")
BETAS = (0.9, 0.999)


@dataclass(frozen=True)
class Optimizer:
    """How a run trains: the optimizer, and updates of linear warmup."""

    make: Any
    warmup: int = 0
    frozen: int = 0  # updates in which the weights stand still; they are not counted

    def schedule(self) -> Any:
        """The warmup, or None."""
        return partial(LinearWarmup, warmup_steps=self.warmup) if self.warmup else None


OPTIMIZERS = {
    "Adam": Optimizer(partial(torch.optim.Adam, betas=BETAS)),
    "Adam, warmup 400": Optimizer(partial(torch.optim.Adam, betas=BETAS), warmup=400),
    "Adam-2k": Optimizer(partial(FrozenStartAdam, betas=BETAS, frozen_steps=400), frozen=400),
    "Adam-eps": Optimizer(partial(torch.optim.Adam, betas=BETAS, eps=1e-4)),
    "RectifiedAdam": Optimizer(partial(RectifiedAdam, betas=BETAS)),
    "RectifiedAdam, beta2 .98": Optimizer(partial(RectifiedAdam, betas=(0.9, 0.98))),
}


def csv_logger(folder: str | Path) -> Any:
    """Lightning's, through the name the package uses; a run that goes on writes to the same files."""
    return import_module(f"{LIGHTNING}.loggers").CSVLogger(folder, name="", version="")


def read_points(folder: str | Path, frozen: int) -> dict[str, dict[str, float]]:
    """What ``AdaptiveRateMonitor`` measured of the group "model" after the named updates."""
    points = {}
    for path in sorted(Path(folder).rglob("adaptive_rate.csv")):
        with path.open(newline="") as file:
            for line in csv.DictReader(file):
                step = int(line["step"]) - frozen
                if line["group"] == "model" and step in SHOWN:
                    points[str(step)] = {name: float(line[name]) for name in QUANTITIES}
    return points


def draw_points(
    axes: Sequence[Any], points: dict[str, dict[str, float]], colour: Any, label: str | None, band: float = 0.1
) -> None:
    """Quantiles of abs(g) on the first axes, the variance of the logarithm of the adaptive rate on the second."""
    steps = [int(step) for step in points]
    median, low, high, spread = (
        [point[key] for point in points.values()]
        for key in ("gradient_median", "gradient_q05", "gradient_q95", "log_variance")
    )
    axes[0].plot(steps, median, color=colour, marker=".", label=label)
    axes[0].fill_between(steps, low, high, color=colour, alpha=band)
    axes[1].plot(steps, spread, color=colour, marker=".", label=label)
    axes[0].set(ylabel="abs(gradient)", xscale="log", yscale="log")
    axes[1].set(ylabel="Var[log adaptive rate]", xscale="log", xlabel="update")
