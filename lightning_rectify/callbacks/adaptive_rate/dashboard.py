"""How the monitor's numbers are shown: TensorBoard's custom-scalars page, histograms, the CSV and the figure."""

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from lightning_rectify.callbacks._logs import CsvFile
from lightning_rectify.callbacks.adaptive_rate.quantities import QUANTILES, QUANTITIES, Block, Points

PREFIX = "adaptive_rate"
#: what one chart shows together, per group
CHARTS: Mapping[str, tuple[str, ...]] = {
    "variance of the adaptive rate, measured over theory": ("variance", "theory_variance"),
    "variance of its logarithm, measured over theory": ("log_variance", "theory_log_variance"),
    "rectification r_t": ("rectification",),
    "length of the average rho_t": ("rho",),
    "mean of the adaptive rate": ("mean",),
    "surprise: g^2 / v_hat over its expectation": ("update_surprise",),
    "effective learning rate lr * r_t": ("effective_lr",),
    "share of coordinates ruled by eps": ("eps_share",),
    "quantiles of |g|": tuple(QUANTILES),
}


def is_histogram_step(step: int) -> bool:
    """Whether the paper's own logging code looks at this step (1, 5, 10, 25, 50, 75, 100, 150, 200, every 300)."""
    return step in (1, 5, 10, 25, 50, 75, 100, 150, 200) or step % 300 == 0


def layout(keys: Sequence[str]) -> dict[str, dict[str, list[Any]]]:
    """TensorBoard's custom-scalars layout: a category a group, measured laid over theory.

    Args:
        keys: names of the groups.
    """
    return {
        f"Adaptive rate of {key}": {
            title: ["Multiline", [re.escape(f"{PREFIX}/{key}/{quantity}") + "$" for quantity in quantities]]
            for title, quantities in CHARTS.items()
        }
        for key in keys
    }


def write_histograms(writer: Any, key: str, block: Block, points: Points) -> None:
    """Histograms of log |g| and of the log of the adaptive rate, at the paper's iterations.

    Args:
        writer: TensorBoard's.
        key: the group.
        block: the readings.
        points: what was measured from them.
    """
    for i, step in enumerate(points.step):
        if not is_histogram_step(int(step)):
            continue
        # 1e-9 as in the authors' logging code, so that zeros have a place
        writer.add_histogram(f"{PREFIX}/{key}/log_gradient", np.log(np.nan_to_num(np.abs(block.g[i])) + 1e-9), step)
        if points.live[i].any():
            writer.add_histogram(f"{PREFIX}/{key}/log_rate", np.log(points.rate[i][points.live[i]]), step)


class CsvStore:
    """The points on disk: one row a group and step, flushed as they come.

    Args:
        path: file to append to; made, with its header, at the first point.
    """

    FIELDS = ("group", "step", *QUANTITIES)

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = CsvFile(path, self.FIELDS)

    def append(self, key: str, steps: np.ndarray, values: Mapping[str, np.ndarray]) -> None:
        """Write points of one group.

        Args:
            key: the group.
            steps: shape (S,).
            values: for each quantity an array of shape (S,).
        """
        self._file.append(
            [key, int(step), *(f"{values[name][i]:.9g}" for name in QUANTITIES)] for i, step in enumerate(steps)
        )

    def keep_until(self, steps: Mapping[str, int]) -> None:
        """Drop points that an earlier run in this folder left beyond the step from which this one goes on.

        Args:
            steps: that step for each group.
        """
        self._file.keep(lambda row: int(row[1]) <= steps.get(row[0], 0))

    def read(self) -> dict[str, dict[str, np.ndarray]]:
        """All points: per group, "step" and each quantity as an array."""
        rows: dict[str, list[list[float]]] = defaultdict(list)
        for key, *numbers in self._file.rows():
            rows[key].append([float(number) for number in numbers])
        return {key: dict(zip(self.FIELDS[1:], np.array(table).T, strict=True)) for key, table in rows.items()}


def draw(points: Mapping[str, Mapping[str, np.ndarray]], keys: Sequence[str]) -> Figure:
    """The figure that a fit ends with: one row a group.

    Args:
        points: as :meth:`CsvStore.read` gives them.
        keys: which groups, top to bottom.
    """
    keys = [key for key in keys if key in points]
    figure = Figure(figsize=(17, 3.6 * max(len(keys), 1) + 0.4), layout="constrained")
    axes = figure.subplots(max(len(keys), 1), 4, squeeze=False)
    for row, key in zip(axes, keys, strict=False):
        table = _thin(points[key])
        step = table["step"]
        early = step[table["rectification"] == 0.0]
        for ax in row:
            ax.set_xscale("log")
            ax.set_xlabel("optimizer step")
            if len(early) and early[0] < step[-1]:
                ax.axvspan(step[0], early[-1] + 0.5, color="0.92", zorder=0)
        variance, logarithm, rate, gradient = row
        variance.plot(step, table["variance"], label="measured, over coordinates")
        variance.plot(step, table["theory_variance"], "k--", label="theory, equal scales")
        variance.set(title=f"{key}: variance of the adaptive rate", yscale="log")
        logarithm.plot(step, table["log_variance"], label="measured, over coordinates")
        logarithm.plot(step, table["theory_log_variance"], "k--", label="theory, equal scales")
        logarithm.set(title=f"{key}: variance of its logarithm", yscale="log")
        rate.plot(step, np.clip(table["update_surprise"], 0, 3), "C1", lw=0.7, label="update surprise (1: as expected)")
        rate.plot(step, table["eps_share"], "C2", label="share ruled by eps")
        rate.plot(step, table["rectification"], "C0", lw=2, label="rectification $r_t$")
        rate.set(title=f"{key}: rectification, surprise, eps", ylim=(-0.05, 3.05))
        bands = {name: np.maximum(table[name], 1e-12) for name in QUANTILES}
        gradient.fill_between(
            step, bands["gradient_q05"], bands["gradient_q95"], color="C0", alpha=0.2, label="5 % to 95 %", lw=0
        )
        gradient.fill_between(
            step, bands["gradient_q25"], bands["gradient_q75"], color="C0", alpha=0.4, label="25 % to 75 %", lw=0
        )
        gradient.plot(step, bands["gradient_median"], "C0", lw=0.8, label="median")
        gradient.set(title=f"{key}: |g| over coordinates", yscale="log")
        for ax in row:
            ax.legend(fontsize=8, loc="best")
            ax.grid(alpha=0.3)
    return figure


def _thin(table: Mapping[str, np.ndarray], most: int = 2000) -> dict[str, np.ndarray]:
    """At most ``most`` points, dense where the log axis is."""
    count = len(table["step"])
    if count <= most:
        return dict(table)
    keep = np.unique(np.geomspace(1, count, most).astype(int) - 1)
    return {name: column[keep] for name, column in table.items()}
