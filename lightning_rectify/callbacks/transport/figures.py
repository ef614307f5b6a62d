"""Figures of transport plans: pairs with lines, a density as a heat map, image pairs, and curves over training."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from torch import Tensor
from torch.nn import functional as F
from torchvision.utils import make_grid

Pair = tuple[Tensor, Tensor]

_X, _Y, _TRUTH = "tab:blue", "tab:orange", "tab:green"
_LINES = 150  # more of them are a smear


def draw_pairs(pairs: Pair, data: Pair | None = None, truth: Pair | None = None, title: str = "") -> Figure:
    """Points of both sides with a line from each x to its y; beside them the truth, on the same axes.

    Points with more than two numbers are shown on the two principal axes of the data (of the pairs, without data).

    Args:
        pairs: x and y, shapes (N, D), D at least 2, on the CPU.
        data: samples of both sides, shapes (M, D), pale behind the pairs; or None.
        truth: pairs of the right plan, shapes (K, D); or None.
        title: of the figure.

    Raises:
        ValueError: for x and y with different numbers in a point, or with one.
    """
    if pairs[0].shape[1] != pairs[1].shape[1] or pairs[0].shape[1] < 2:
        shapes = [tuple(side.shape[1:]) for side in pairs]
        raise ValueError(
            f"Expected x and y of the plan to be drawn to have as many numbers, at least 2, but got shapes {shapes}."
        )
    mean, axes = _plane(torch.cat(list(data or pairs)))
    flat = [tuple((side.double() - mean) @ axes for side in each) if each else None for each in (pairs, data, truth)]
    shown, behind, right = flat
    assert shown is not None
    figure = Figure(figsize=(6.2 if right is None else 11.6, 5.6), layout="constrained")
    panels = figure.subplots(1, 1 if right is None else 2, squeeze=False, sharex=True, sharey=True)[0]
    _panel(panels[0], shown, behind, "plan")
    if right is not None:
        _panel(panels[1], right, behind, "truth")
    names = ("x_1", "x_2") if pairs[0].shape[1] == 2 else ("first principal axis", "second principal axis")
    for panel in panels:
        panel.set(xlabel=names[0], ylabel=names[1])
        panel.set_aspect("equal", adjustable="box")
    panels[0].legend(fontsize=8, loc="best")
    figure.suptitle(title)
    return figure


def _plane(points: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (D,) and axes (D, 2) to project on: the first two principal ones, or the plane itself."""
    points = points.double()
    if points.shape[1] == 2:
        return torch.zeros(2, dtype=torch.float64), torch.eye(2, dtype=torch.float64)
    mean = points.mean(dim=0)
    axes = torch.linalg.svd(points - mean, full_matrices=False).Vh[:2].T
    # The sign of a principal axis is arbitrary: fixed, so that figures of one run can be compared.
    return mean, axes * torch.sign(axes.gather(0, axes.abs().argmax(dim=0, keepdim=True)))


def _panel(ax: Axes, pairs: Sequence[Tensor], behind: Sequence[Tensor] | None, title: str) -> None:
    x, y = (side.numpy() for side in pairs)
    for side, color in zip(behind or (), (_X, _Y), strict=False):
        ax.scatter(side[:, 0].numpy(), side[:, 1].numpy(), s=4, color=color, alpha=0.15, linewidths=0)
    segments = np.stack([x[:_LINES], y[:_LINES]], axis=1)
    ax.add_collection(LineCollection(list(segments), colors="0.35", linewidths=0.5, alpha=0.5))
    ax.scatter(x[:_LINES, 0], x[:_LINES, 1], s=10, color=_X, label="x", linewidths=0, zorder=3)
    ax.scatter(y[:_LINES, 0], y[:_LINES, 1], s=10, color=_Y, label="y", linewidths=0, zorder=3)
    ax.set_title(title, fontsize=10)


def draw_plan_of_numbers(
    pairs: Pair,
    axes: tuple[Tensor, Tensor],
    density: Tensor | None = None,
    truth_density: Tensor | None = None,
    truth_map: Pair | None = None,
    data: Pair | None = None,
    title: str = "",
) -> Figure:
    """A plan between numbers: its density (else a histogram of its pairs), the truth's on the same scale, marginals.

    Args:
        pairs: x and y, shapes (N, 1), on the CPU.
        axes: values of x and of y at which the densities are known, shapes (K,).
        density: of the plan at them, x first, shape (K, K); or None.
        truth_density: the same of the right plan; or None.
        truth_map: points x and the y that the right map gives them, shapes (K, 1): a line; or None.
        data: samples of both sides, shapes (M, 1); or None.
        title: of the figure.
    """
    known = truth_density is not None
    figure = Figure(figsize=(16 if known else 11.5, 4.8), layout="constrained")
    panels = figure.subplots(1, 3 if known else 2, squeeze=False)[0]
    tops = [float(each.max()) for each in (density, truth_density) if each is not None]
    top = max(tops, default=1.0)
    if density is not None:
        shown = _heat(panels[0], axes, density, top)
        figure.colorbar(shown, ax=list(panels[: 1 + known]), label="density")
    else:
        bins = [np.linspace(float(axis[0]), float(axis[-1]), 61) for axis in axes]
        panels[0].hist2d(*(side[:, 0].numpy() for side in pairs), bins=bins, cmap="magma")
    panels[0].set_title("plan" if density is not None else "pairs of the plan, counted", fontsize=10)
    if truth_density is not None:
        _heat(panels[1], axes, truth_density, top)
        panels[1].set_title("truth", fontsize=10)
    for panel in panels[:-1]:
        if truth_map is not None:
            order = truth_map[0][:, 0].argsort()
            line = [side[order, 0].numpy() for side in truth_map]
            panel.plot(*line, color=_TRUTH, lw=1, label="right map")
            panel.legend(fontsize=8)
        panel.set(xlabel="x", ylabel="y", ylim=(float(axes[1][0]), float(axes[1][-1])))
        panel.set_xlim(float(axes[0][0]), float(axes[0][-1]))
    _marginals(panels[-1], pairs, data)
    figure.suptitle(title)
    return figure


def _heat(ax: Axes, axes: tuple[Tensor, Tensor], density: Tensor, top: float) -> Any:
    grids = [axis.numpy() for axis in axes]
    shown = ax.pcolormesh(*grids, density.T.numpy(), cmap="magma", vmin=0.0, vmax=top, shading="nearest")
    shown.set_rasterized(True)
    peak = float(density.max())
    if peak > 0:  # contours at the same shares of the top in both panels
        ax.contour(*grids, density.T.numpy(), levels=[top * share for share in (0.05, 0.25, 0.6)], colors="w",
                   linewidths=0.5)  # fmt: skip
    return shown


def _marginals(ax: Axes, pairs: Pair, data: Pair | None) -> None:
    for name, color, place in (("x", _X, 0), ("y", _Y, 1)):
        made = pairs[place][:, 0].numpy()
        seen = data[place][:, 0].numpy() if data is not None else made
        low, high = min(made.min(), seen.min()), max(made.max(), seen.max())
        bins = np.linspace(low, high, 41).tolist()
        if data is not None:
            ax.hist(seen, bins=bins, density=True, color=color, alpha=0.25, label=f"{name}, data")
        ax.hist(made, bins=bins, density=True, histtype="step", color=color, lw=1.5, label=f"{name}, plan")
    ax.set(xlabel="x, y", ylabel="density")
    ax.set_title("marginals", fontsize=10)
    ax.legend(fontsize=8)


def image_pairs(x: Tensor, y: Tensor, columns: int, bounds: tuple[float, float]) -> Tensor:
    """A grid of pairs, each x above its y; shape (3, H, W), float32 in [0, 1].

    The smaller images are enlarged by whole pixels' nearest neighbours, grey ones become three equal channels.

    Args:
        x: shape (N, C, H, W) with C 1 or 3, on the CPU.
        y: shape (N, C', H', W').
        columns: pairs in a row.
        bounds: darkest and lightest value of a pixel; beyond them it is clipped.
    """
    low, high = bounds
    size = [max(x.shape[dim], y.shape[dim]) for dim in (2, 3)]
    both = []
    for side in (x, y):
        side = ((side.float() - low) / (high - low)).clamp(0.0, 1.0).expand(-1, 3, -1, -1)
        both.append(F.interpolate(side, size=size, mode="nearest") if list(side.shape[2:]) != size else side)
    return make_grid(torch.cat(both, dim=2), nrow=columns, pad_value=1.0)


def draw_history(steps: Sequence[int], values: Mapping[str, Sequence[float]], lines: Mapping[str, float]) -> Figure:
    """Cost against the truth, marginal gaps against their floors, and what else is known of the plan, over steps.

    Args:
        steps: shape (T,).
        values: by the metric's name without its stage, each of T numbers, NaN where it was not logged.
        lines: "truth" and "independent coupling", costs that do not change; may be empty.
    """
    judged = [name for name in ("l2_uvp", "plan_kl") if name in values]
    # Labels of a logarithmic axis are made after the layout: leave them room.
    figure = Figure(figsize=(5.4 * (2 + len(judged)), 4.2), layout=ConstrainedLayoutEngine(w_pad=0.15))
    panels = figure.subplots(1, 2 + len(judged), squeeze=False)[0]
    panels[0].plot(steps, values["cost"], marker=".", color=_X, label="plan")
    for name, style in (("truth", "-"), ("independent coupling", ":")):
        if name in lines:
            panels[0].axhline(lines[name], color=_TRUTH if name == "truth" else "0.5", ls=style, lw=1, label=name)
    panels[0].set_title("transport cost", fontsize=10)
    for side, color in (("x", _X), ("y", _Y)):
        for what, style in (("gap", "-"), ("floor", ":")):
            name = f"marginal_{what}_{side}"
            if name in values:
                label = f"{side}, {'plan' if what == 'gap' else 'two halves of the data'}"
                panels[1].plot(steps, values[name], ls=style, marker="." if what == "gap" else "", color=color,
                               label=label)  # fmt: skip
    panels[1].set_title("distance of marginals (sliced W1)", fontsize=10)
    titles = {"l2_uvp": "L2-UVP, %", "plan_kl": "KL(truth, plan), nats"}
    for panel, name in zip(panels[2:], judged, strict=True):
        panel.plot(steps, values[name], marker=".", color=_X)
        panel.set_title(titles[name], fontsize=10)
    for panel in panels[1:]:
        finite = [v for line in panel.get_lines() for v in np.asarray(line.get_ydata(), float) if np.isfinite(v)]
        if finite and min(finite) > 0:
            panel.set_yscale("log")
    for panel in panels:
        panel.set_xlabel("step")
        panel.grid(alpha=0.3)
        if panel.get_legend_handles_labels()[0]:
            panel.legend(fontsize=8)
    return figure
