"""The figure of ``manifold_scaling.py``: charts and error on the sphere, and error against weights."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from manifold_targets import target
from matplotlib.figure import Figure
from torch import Tensor

from lightning_rectify.modules.manifold import ChartNet

#: of the two scaling panels: label -> colour
COLOURS = {
    "paper, r = 0.8": "tab:gray",
    "telescope": "tab:cyan",
    "telescope, wide": "tab:cyan",
    "telescope_p1": "tab:blue",
    "telescope_p1, wide": "tab:blue",
    "MLP": "tab:red",
    "kernel ridge": "tab:green",
    "k-NN": "tab:olive",
    "cube, all cells": "tab:purple",
}


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Charts of the sphere, the error there, and two panels of error against weights."""
    figure = Figure(figsize=(16, 8), layout="constrained")
    problem = target("sphere", 3)
    net = ChartNet.from_manifold(problem.manifold, problem.f, grid=16, radius=0.8, cover=0.92)
    charts, error = (figure.add_subplot(2, 2, k, projection="mollweide") for k in (1, 3))
    longitude, latitude, x = _globe()
    weights = _gate_weights(net, x)
    blend = weights.amax(1).reshape(longitude.shape)
    shown = (weights.argmax(1) * 7 % 20).reshape(longitude.shape)  # neighbouring charts in different colours
    charts.pcolormesh(longitude, latitude, shown, cmap="tab20", alpha=0.15 + 0.85 * blend.numpy(), shading="nearest")
    c = net.charts.centers @ problem.manifold.frame  # type: ignore[attr-defined]  # of a Sphere
    charts.plot(torch.atan2(c[:, 1], c[:, 0]), c[:, 2].clamp(-1, 1).asin(), "k.", markersize=5)
    charts.set_title(f"{len(net.charts)} charts of the sphere: the weight of the first that holds a point", fontsize=10)
    with torch.no_grad():
        difference = (net(x) - problem.f(x)).abs().clamp(min=1e-7).log10().reshape(longitude.shape)
    shades = error.pcolormesh(longitude, latitude, difference, cmap="magma", shading="nearest")
    figure.colorbar(shades, ax=error, label="log10 of the error", shrink=0.8)
    size = net.report().dag.total
    error.set_title(f"error of the network built on them, {size:,} weights in R^3, no training", fontsize=10)
    for axes in (charts, error):
        axes.set(xticks=[], yticks=[])
    for place, name in enumerate(("circle", "sphere")):
        _scaling(figure.add_subplot(2, 2, 2 * place + 2), [row for row in rows if row["manifold"] == name], name)
    figure.savefig(path, dpi=110, metadata={"Software": None})


def _scaling(axes: Any, rows: Sequence[dict[str, Any]], name: str) -> None:
    dims = sorted({row["ambient_dim"] for row in rows})
    for label, colour in COLOURS.items():
        for dim, style in zip((dims[:1] + dims[-1:])[: len(dims)], ("-", "--"), strict=False):
            same = [row for row in rows if (row["label"], row["ambient_dim"]) == (label, dim)]
            sizes = sorted({row["size"] for row in same})
            if not sizes or (name == "sphere" and label in ("telescope", "telescope_p1")):  # the wide ones are shown
                continue
            runs = [[row for row in same if row["size"] == size] for size in sizes]
            middle = [sorted(row["sup"] for row in run)[(len(run) - 1) // 2] for run in runs]
            axes.plot([run[0]["weights"] for run in runs], middle, style, color=colour, marker=".",
                      label=f"{label}, D = {dim}")  # fmt: skip
    axes.set(xscale="log", yscale="log", xlabel="weights (kernel ridge, k-NN: stored numbers)", ylabel="largest error")
    axes.set_title(f"{name}: error against size", fontsize=10)
    axes.grid(alpha=0.3)
    if rows:
        axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))  # beside the lines, not on them


def _globe(lines: int = 200) -> tuple[Tensor, Tensor, Tensor]:
    longitude, latitude = torch.meshgrid(
        torch.linspace(-math.pi, math.pi, 2 * lines, dtype=torch.float64),
        torch.linspace(-math.pi / 2, math.pi / 2, lines, dtype=torch.float64), indexing="xy",
    )  # fmt: skip
    own = torch.stack([latitude.cos() * longitude.cos(), latitude.cos() * longitude.sin(), latitude.sin()], 2)
    return longitude, latitude, target("sphere", 3).place(own.reshape(-1, 3))


def _gate_weights(net: ChartNet, x: Tensor) -> Tensor:
    """Weights (N, C) of the partition of unity."""
    squares = net.charts.squared_distances(x)
    assert net.partition is not None
    with torch.no_grad():
        return net.partition(((net.gate.high - squares) / (net.gate.high - net.gate.low)).clamp(0.0, 1.0))
