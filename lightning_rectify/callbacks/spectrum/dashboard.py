"""How spectra are shown: TensorBoard's custom-scalars page, the CSV of all values, and the figure of their decay."""

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from lightning_rectify.callbacks._logs import CsvFile

PREFIX = "spectrum"
#: what each chart shows, one curve a layer
CHARTS: Mapping[str, str] = {
    "max": "largest singular value",
    "min": "smallest singular value",
    "mean": "mean of the singular values",
    "stable_rank": "stable rank",
    "condition_number": "condition number",
    "orthogonality_error": "distance of the factors from orthonormal",
    "deviation": "deviation of the singular values from e",
    "convolution_norm": "norm of the convolution",
}
_MOST_STEPS = 16  # even, see Records
_MOST_NAMED = 24  # layers in the legend

Spectra = Mapping[str, np.ndarray]


def layout(quantities: Mapping[str, Sequence[str]]) -> dict[str, dict[str, list[Any]]]:
    """TensorBoard's custom-scalars layout: one category, a chart a quantity, a curve a layer.

    Args:
        quantities: for each layer what is logged of it.
    """
    charts = {}
    for name, title in CHARTS.items():
        tags = [f"{PREFIX}/{layer}/{name}" for layer, names in quantities.items() if name in names]
        if tags:
            charts[title] = ["Multiline", [f"^{re.escape(tag)}$" for tag in tags]]
    return {"Spectra": charts}


class SpectrumStore:
    """All singular values on disk: one row a step, layer and value; the numbers read back bit for bit.

    Args:
        path: file to append to; made, with its header, at the first spectra.
    """

    FIELDS = ("step", "layer", "index", "value")

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = CsvFile(path, self.FIELDS)

    def append(self, step: int, spectra: Spectra) -> None:
        """Write the spectra of one step.

        Args:
            step: ``trainer.global_step``.
            spectra: layer to values, shape (r,).
        """
        self._file.append(
            [step, layer, index, repr(float(value))]
            for layer, values in spectra.items()
            for index, value in enumerate(values)
        )

    def keep_until(self, step: int) -> None:
        """Drop what an earlier run in this folder left beyond the step from which this one goes on.

        Args:
            step: that step; at 0 a run begins and all goes.
        """
        self._file.keep(lambda row: 0 < step >= int(row[0]))

    def read(self) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
        """All steps in the order in which they were written, one at a time: (step, layer to values)."""
        for step, rows in groupby(self._file.rows(), key=lambda row: row[0]):
            spectra: dict[str, list[float]] = {}
            for _, layer, _, value in rows:
                spectra.setdefault(layer, []).append(float(value))
            yield int(step), {layer: np.array(values) for layer, values in spectra.items()}


class Records:
    """The spectra of a few steps spread evenly over a run of unknown length, among them the first and the last."""

    def __init__(self) -> None:
        self._spread: dict[int, Spectra] = {}
        self._last: dict[int, Spectra] = {}
        self._count, self._stride = 0, 1

    def add(self, step: int, spectra: Spectra) -> None:
        """Take the next step."""
        if self._count % self._stride == 0:
            self._spread[step] = spectra
            if len(self._spread) > _MOST_STEPS:  # that is odd: the last one stays
                self._spread = dict(list(self._spread.items())[::2])
                self._stride *= 2
        self._last = {step: spectra}
        self._count += 1

    @property
    def last_step(self) -> int | None:
        """The step added last."""
        return next(iter(self._last), None)

    def chosen(self) -> dict[int, Spectra]:
        """The first step, the one nearest to the middle, and the last; fewer if there are no three."""
        held = self._spread | self._last
        if not held:
            return {}
        first, last = min(held), max(held)
        middle = min(held, key=lambda step: (abs(2 * step - first - last), step))
        return {step: held[step] for step in dict.fromkeys((first, middle, last))}


def draw(spectra: Mapping[int, Spectra]) -> Figure:
    """The figure of the decay: sorted singular values over index / length, a panel a step, a curve a layer.

    Args:
        spectra: step to layer to values, as :meth:`Records.chosen` gives them.
    """
    figure = Figure(figsize=(4.6 * max(len(spectra), 1) + 2.2, 4.2), layout="constrained")
    axes = figure.subplots(1, max(len(spectra), 1), squeeze=False, sharey=True)[0]
    layers = list(dict.fromkeys(layer for by_layer in spectra.values() for layer in by_layer))
    colors = dict(zip(layers, matplotlib.colormaps["viridis"](np.linspace(0.0, 0.92, len(layers))), strict=True))
    for ax, (step, by_layer) in zip(axes, spectra.items(), strict=False):
        for layer, values in by_layer.items():
            few = "." if len(values) <= 8 else ""  # one value makes no line
            ax.plot(np.arange(len(values)) / len(values), values, color=colors[layer], label=layer, lw=1.2, marker=few)
        ax.set(title=f"step {step}", xlabel="index / length", xlim=(-0.02, 1.02))
        ax.grid(alpha=0.3)
    axes[0].set(ylabel="singular value", ylim=(0.0, None))
    if layers:
        shown = layers if len(layers) <= _MOST_NAMED else [layers[0], layers[-1]]
        lines = {line.get_label(): line for ax in axes for line in ax.get_lines()}
        figure.legend([lines[layer] for layer in shown], shown, loc="outside right upper", fontsize=8)
    return figure
