"""The dimension over scale as a figure."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from matplotlib.figure import Figure

if TYPE_CHECKING:
    from lightning_rectify.modules.manifold.dimension import DimensionCurve


def dimension_figure(curves: Sequence["DimensionCurve"]) -> Figure:
    """One line a curve over its length scale, with its confidence band and the number of neighbours at each point.

    Args:
        curves: at least one; of the same points, so that lengths compare.

    Raises:
        ValueError: if there is none.
    """
    if not curves:
        raise ValueError("Expected argument `curves` to hold at least one curve but got none.")
    figure = Figure(figsize=(6.0, 3.8), layout="constrained")
    axes = figure.subplots()
    for curve in curves:
        (line,) = axes.plot(curve.lengths, curve.values, marker="o", label=curve.method)
        axes.fill_between(curve.lengths, curve.low, curve.high, color=line.get_color(), alpha=0.2, linewidth=0)
        for k, length, value in zip(curve.neighbors, curve.lengths, curve.values, strict=True):
            axes.annotate(str(k), (length, value), textcoords="offset points", xytext=(0, 5), fontsize=7, ha="center")
    axes.set(xscale="log", xlabel="median distance to the k-th neighbour", ylabel="dimension")
    axes.set_title(f"intrinsic dimension over scale, {100 * curves[0].confidence:g} % bands, k beside", fontsize=10)
    axes.set_ylim(bottom=0.0)
    axes.grid(alpha=0.3)
    axes.legend()
    return figure
