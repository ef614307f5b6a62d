"""What the modes of a ``ChartNet`` are made of, and what it reports."""

from dataclasses import dataclass, replace
from typing import Literal

from lightning_rectify.modules.manifold.blocks import ProductForm, Slope
from lightning_rectify.modules.manifold.gate import DistanceForm
from lightning_rectify.modules.manifold.layered import NetworkSize
from lightning_rectify.modules.manifold.local import LocalKind

Mode = Literal["paper", "lean", "p1", "telescope", "telescope_p1"]
Budget = Literal["charts", "overlap"]


@dataclass(frozen=True)
class Recipe:
    """Which form of each part a mode takes; what is not the paper's is ours.

    Attributes:
        local: "taylor" (paper), "p1" or "polynomial".
        telescope: weights by telescoping maxima; else f is multiplied by bumps before it is approximated (paper).
        clamp: pair by the exact clamp; else by the approximate product (paper).
        buffered: the bump ends inside the gate's ramp, so the gate costs no accuracy; else both end at r (paper).
        distance: "per_chart" (paper) or "shared" squares.
        slope: "bounded" (paper) or "steep" gates.
        form: "three_squares" (paper) or "two_squares".
        shared: chains of products share what they have in common; else each has its own units (paper).
        factored: one polynomial a cell, of powers that a chart computes once; else a chain a coefficient (paper).
        radius: r as a share of the reach; the theorem asks for less than 1/4.
        cover: distance to the nearest centre as a share of r, at most.
    """

    local: LocalKind = "taylor"
    telescope: bool = False
    clamp: bool = False
    buffered: bool = False
    distance: DistanceForm = "per_chart"
    slope: Slope = "bounded"
    form: ProductForm = "three_squares"
    shared: bool = False
    factored: bool = False
    radius: float = 0.24
    cover: float = 0.5


_OURS = Recipe(
    clamp=True,
    buffered=True,
    distance="shared",
    slope="steep",
    form="two_squares",
    shared=True,
    factored=True,
    radius=0.8,
)
RECIPES: dict[str, Recipe] = {
    "paper": Recipe(),
    "lean": _OURS,
    "p1": replace(_OURS, local="p1"),
    "telescope": replace(_OURS, telescope=True, clamp=False, radius=0.6, cover=0.75),
    "telescope_p1": replace(_OURS, telescope=True, clamp=False, radius=0.6, cover=0.75, local="p1"),
}


@dataclass(frozen=True)
class Guarantee:
    """Why the error is at most eps: the terms of the proof, each already times the number of charts it counts for.

    Constants of f are the largest ones on a grid, times ``safety``: certain for a function that the grid resolves.

    Attributes:
        eps: what was asked for.
        budget: "charts": terms count for all charts, as in the paper. "overlap": only for the charts that can hold one
            point, as the others give exactly 0; ours.
        count: that number.
        pairing: error of the approximate products with the gate.
        local: error of the local approximation, its products included.
        shell: loss where the gate is neither open nor shut.
        derivative: largest derivative of order degree + 1, in z.
        gradient: largest gradient, in z.
        safety: factor on both.
    """

    eps: float
    budget: Budget
    count: int
    pairing: float
    local: float
    shell: float
    derivative: float
    gradient: float
    safety: float

    @property
    def bound(self) -> float:
        """The sum of the terms: at most eps."""
        return self.pairing + self.local + self.shell


@dataclass(frozen=True)
class ChartNetReport:
    """What a network is made of and what it costs, all counted from its explicit units.

    Attributes:
        mode: of the recipe.
        charts: number of charts.
        radius: of the charts.
        dag: size with connections that skip layers: the headline.
        layered: size as strict layers, pass-through units included.
        local: weights and biases of the local networks alone.
        distance: of the distances and gates alone.
        projection: of the coordinates.
        stored: numbers that the module stores (parameters and buffers).
        guarantee: of a network built for an eps, else None.
    """

    mode: str
    charts: int
    radius: float
    dag: NetworkSize
    layered: NetworkSize
    local: int
    distance: int
    projection: int
    stored: int
    guarantee: Guarantee | None
