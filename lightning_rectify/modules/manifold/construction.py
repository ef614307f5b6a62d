"""From a function on a known manifold, or from values at points, to the parts of a ``ChartNet``."""

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_rectify.arguments import check_above, check_choice, check_least, check_types
from lightning_rectify.modules.manifold.blocks import Indicator
from lightning_rectify.modules.manifold.charts import TangentCharts
from lightning_rectify.modules.manifold.factored import FactoredTaylorNet
from lightning_rectify.modules.manifold.fitting import ChartFunction, Function, least_squares
from lightning_rectify.modules.manifold.gate import SquaredDistance
from lightning_rectify.modules.manifold.local import LocalNet, P1Net, PolynomialNet, TaylorNet
from lightning_rectify.modules.manifold.manifolds import Manifold
from lightning_rectify.modules.manifold.pairing import ClampPairing, ProductPairing
from lightning_rectify.modules.manifold.partitions import BumpPartition
from lightning_rectify.modules.manifold.recipes import RECIPES, Budget, Guarantee, Mode, Recipe

_BUFFER = 0.9  # end of a buffered bump, as a share of r
_EXACT = 24  # levels from which a sawtooth square is exact to 1e-15


@dataclass(frozen=True)
class Options:
    """The arguments of :meth:`ChartNet.from_manifold`, checked.

    Raises:
        ValueError: if one is out of its range.
    """

    mode: Mode
    grid: int | None
    degree: int | None
    eps: float | None
    budget: Budget
    radius: float | None
    cover: float | None
    levels: int | None
    pairing_levels: int | None
    distance_levels: int | None
    shell: float | None
    safety: float

    def __post_init__(self) -> None:
        """Refuse what is out of its range."""
        check_types(Options, vars(self))
        check_choice(RECIPES, mode=self.mode)
        if (self.eps is None) == (self.grid is None):
            raise ValueError(
                f"Expected argument `eps` or `grid` to be given, not both, but got eps={self.eps}, grid={self.grid}."
            )
        check_above(0, eps=self.eps)
        check_least(1, grid=self.grid, degree=self.degree, levels=self.levels, safety=self.safety)
        check_least(1, pairing_levels=self.pairing_levels, distance_levels=self.distance_levels)
        check_choice(("charts", "overlap"), budget=self.budget)
        if self.eps is not None and (self.levels or self.pairing_levels or self.shell):
            raise ValueError("Expected argument `levels`, `pairing_levels` and `shell` to be None with `eps`.")
        if RECIPES[self.mode].local == "p1" and self.degree not in (None, 1):
            raise ValueError(f"Expected argument `degree` to be 1 in mode {self.mode!r} but got {self.degree!r}.")
        for name, low, high in (("radius", 0.0, math.inf), ("cover", 0.0, 1.0), ("shell", 0.0, 1.0)):
            value = getattr(self, name)
            if value is not None and not low < value < high:
                raise ValueError(f"Expected argument `{name}` to be in ({low:g}, {high:g}) but got {value!r}.")


@dataclass
class Parts:
    """The parts of a network, see :class:`ChartNet`."""

    recipe: Recipe
    charts: TangentCharts
    distance: SquaredDistance
    gate: Indicator
    local: LocalNet
    pairing: ProductPairing | ClampPairing
    guarantee: Guarantee | None = None

    def as_arguments(self) -> dict[str, Any]:
        """All but the recipe, by name."""
        return {name: value for name, value in vars(self).items() if name != "recipe"}


def from_manifold(manifold: Manifold, f: Function, options: Options) -> Parts:
    """Steps 1 to 5 of the proof (arXiv:1908.01842), in the forms of the mode.

    Args:
        manifold: where.
        f: points (M, D) to values (M,).
        options: see there.
    """
    recipe = RECIPES[options.mode]
    radius = recipe.radius * manifold.reach if options.radius is None else options.radius
    cover = radius * (recipe.cover if options.cover is None else options.cover)
    charts = TangentCharts.from_manifold(manifold, radius, cover)
    degree = options.degree or (1 if recipe.local == "p1" else 2)
    partition = None
    if not recipe.telescope:
        # The bounds need one derivative more than the degree.
        support = radius * (_BUFFER if recipe.buffered else 1.0)
        partition = BumpPartition(charts.centers, support, power=max(4, degree + 2))
    function = ChartFunction(manifold, charts, f, partition)
    points, fill = manifold.points(0.1 * radius)
    bound = points.abs().max().item() + fill
    if options.eps is None:
        return _with_grid(function, recipe, options, degree, bound)
    overlap = int((charts.squared_distances(points) < (radius + fill) ** 2).sum(1).max())
    count = len(charts) if options.budget == "charts" else min(overlap, len(charts))
    return _with_eps(function, recipe, options, degree, bound, count)


def _with_grid(function: ChartFunction, recipe: Recipe, options: Options, degree: int, bound: float) -> Parts:
    """A given grid; products as coarse as they may be without being seen in the error."""
    assert options.grid is not None
    local = _local(function, recipe, options.grid, degree, options.levels or _EXACT)
    error = _local_error(function, local)
    if isinstance(local, TaylorNet) and options.levels is None:
        for levels in range(1, _EXACT):
            local.product.square.levels = levels
            if _local_error(function, local) <= 1.1 * error + 1e-15:
                break
    pairing = _pairing(recipe, local.bound(), options.pairing_levels, 0.1 * error)
    shell = options.shell
    if shell is None and function.partition is not None:
        # On the shell the bump is at most (shell)^power: a twentieth of the error, so that it stays unseen.
        shell = min(0.5, (0.05 * error + 1e-15) ** (1.0 / function.partition.power))
    charts = function.charts
    distance, gate = _gate(recipe, charts, bound, options.distance_levels, (shell or 0.0) * charts.radius**2)
    return Parts(recipe, charts, distance, gate, local, pairing)


def _with_eps(
    function: ChartFunction, recipe: Recipe, options: Options, degree: int, bound: float, count: int
) -> Parts:
    """All sizes from the bounds of the proof."""
    assert options.eps is not None
    eps, charts, dim = options.eps, function.charts, function.charts.dim
    order = 2 if recipe.local == "p1" else degree + 1
    derivative, gradient = (options.safety * value for value in function.largest_derivatives(order))
    # Weights that sum to 1 make the local error count once.
    local_count = 1 if recipe.telescope else count
    if recipe.clamp:
        local_share, pairing_share, shell_share = eps, 0.0, 0.0
    elif recipe.telescope:
        local_share, pairing_share, shell_share = 0.8 * eps, 0.2 * eps, 0.0
    else:
        local_share, pairing_share, shell_share = eps / 3.0, eps / 3.0, eps / 3.0
    grid = 1
    while local_count * _grid_error(recipe, dim, grid, order, derivative) > local_share * (
        1.0 if recipe.local == "p1" else 0.9
    ) or function.recentred(recipe.local, grid):
        grid = max(
            grid + 1, math.ceil(0.9 * _needed_grid(recipe, dim, grid, order, derivative, local_share / local_count))
        )
        if grid > 1_000_000:
            raise ValueError(
                f"Expected argument `eps` to be reachable but got {eps}: more than 1e6 cells a coordinate."
            )
    local = _local(function, recipe, grid, degree, 1)
    if isinstance(local, TaylorNet):
        while local_count * local.error() > 0.1 * local_share:
            local.product.square.levels += 1
    pairing = _pairing(recipe, local.bound(), None, pairing_share / count)
    # |f_i| on the shell is at most this times its width Delta (proof of theorem 1, third term).
    radius, reach = charts.radius, function.manifold.reach
    slope = gradient / (2.0 * radius) * (math.pi + 1.0) / (radius * max(1.0 - radius / reach, 1e-3))
    width = min(shell_share / (count * slope), 0.5 * radius**2) if shell_share else 0.0
    distance, gate = _gate(recipe, charts, bound, options.distance_levels, width)
    guarantee = Guarantee(
        eps=eps,
        budget=options.budget,
        count=count,
        pairing=count * pairing.error,
        local=local_count
        * (
            _grid_error(recipe, dim, grid, order, derivative) + (local.error() if isinstance(local, TaylorNet) else 0.0)
        ),
        shell=count * slope * width,
        derivative=derivative,
        gradient=gradient,
        safety=options.safety,
    )
    return Parts(recipe, charts, distance, gate, local, pairing, guarantee)


def _grid_error(recipe: Recipe, dim: int, grid: int, order: int, derivative: float) -> float:
    """Error of the exact local approximation, from a bound on the partial derivatives of its order."""
    if recipe.local == "p1":
        # A Kuhn simplex lies in a ball of radius sqrt(d)/(2N); the Hessian's norm is at most d times its entries.
        return dim * dim * derivative / (8.0 * grid**2)
    return (2.0 * dim / (3.0 * grid)) ** order / math.factorial(order) * derivative


def _needed_grid(recipe: Recipe, dim: int, grid: int, order: int, derivative: float, share: float) -> float:
    return grid * (_grid_error(recipe, dim, grid, order, derivative) / share) ** (1.0 / order)


def _local(function: ChartFunction, recipe: Recipe, grid: int, degree: int, levels: int) -> LocalNet:
    dim = function.charts.dim
    coefficients = function.coefficients(recipe.local, grid, degree)
    if recipe.local == "p1":
        return P1Net(coefficients, dim, grid)
    if recipe.factored:
        return FactoredTaylorNet(coefficients, dim, grid, degree, levels, recipe.form)
    return TaylorNet(coefficients, dim, grid, degree, levels, recipe.form, recipe.shared)


@torch.no_grad()
def _local_error(function: ChartFunction, local: LocalNet, count: int = 60, most: int = 60) -> float:
    """Largest error of a local network inside the balls of some charts."""
    charts, dim = len(function.charts), function.charts.dim
    ids = torch.linspace(0, charts - 1, min(charts, most)).long()
    directions = torch.randn(count, dim, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    lengths = torch.linspace(0.01, 1.0, count, dtype=torch.float64) ** (1.0 / dim)
    reach = min(function.charts.radius, 0.999 * function.limit) / function.charts.radius
    y = directions / directions.norm(dim=1, keepdim=True) * lengths[:, None] * reach
    z = (0.5 + 0.5 * y).expand(len(ids), count, dim)
    values = local(z.reshape(-1, dim), ids.repeat_interleave(count)).view(len(ids), count)
    return (values - function.values(z, ids)).abs().max().item()


def _pairing(recipe: Recipe, bound: float, levels: int | None, share: float) -> ProductPairing | ClampPairing:
    if recipe.clamp:
        return ClampPairing(bound)
    pairing = ProductPairing(levels or 1, bound, recipe.form, scaled=recipe.form == "two_squares")
    while levels is None and pairing.error > share and pairing.product.square.levels < _EXACT:
        pairing.product.square.levels += 1
    return pairing


def _gate(
    recipe: Recipe, charts: TangentCharts, bound: float, levels: int | None, width: float, origin: Tensor | None = None
) -> tuple[SquaredDistance, Indicator]:
    """Distances and ramp.

    The paper's ramp has the width Delta below r², of which twice the distances' error is lost. Ours lies between what
    must be fully open and r², and takes half of that; errors are one-sided, so its upper end is r² itself.
    """
    squared, dim = charts.radius**2, charts.ambient_dim
    bound = max(bound, 0.5 * charts.radius)  # where many coordinates share a short distance
    if recipe.distance == "per_chart":
        nu = width / (16.0 * bound**2 * dim)
        levels = levels or max(math.ceil(-math.log2(nu) / 2.0) - 1, 1)
        distance = SquaredDistance(charts.centers, bound, charts.radius, levels, "per_chart")
        low, high = squared - width + distance.error, squared - distance.error
        least = 0.5 * width
    else:
        open_until = charts.radius * _BUFFER if recipe.buffered and not recipe.telescope else charts.inner_radius
        least = 0.5 * (squared - open_until**2)
        levels = levels or max(math.ceil(math.log(bound**2 * dim / least, 4.0)) - 1, 1)
        distance = SquaredDistance(charts.centers, bound, charts.radius, levels, "shared", origin)
        low, high = open_until**2 + least, squared
    if distance.error > least * (1.0 + 1e-9):
        raise ValueError(
            f"Expected argument `distance_levels` to leave an error of at most {least:.3g} but got {levels}: the error "
            f"of the squared distances is {distance.error:.3g}."
        )
    return distance, Indicator(low, high, recipe.slope)


def from_points(
    x: Tensor,
    y: Tensor,
    d: int,
    r: float | Literal["auto"],
    degree: int | Literal["auto"],
    mode: str,
    levels: int,
    charts: TangentCharts | None,
) -> Parts:
    """See :meth:`ChartNet.from_points`."""
    if mode != "telescope":
        raise ValueError(f"Expected argument `mode` to be 'telescope' for points but got {mode!r}.")
    if y.shape != x.shape[:1]:
        raise ValueError(f"Expected argument `y` to be of shape ({len(x)},) but got {tuple(y.shape)}.")
    x, y = x.detach().double(), y.detach().double()
    recipe = replace(RECIPES[mode], local="polynomial")
    charts = TangentCharts.from_points(x, d, r) if charts is None else charts
    coefficients, chosen = least_squares(charts, x, y, degree)
    local = PolynomialNet(coefficients, charts.dim, chosen, levels)
    origin = x.mean(0)
    # Fresh points may lie a little outside the sample's box.
    distance, gate = _gate(recipe, charts, 1.1 * (x - origin).abs().max().item(), None, 0.0, origin)
    return Parts(recipe, charts, distance, gate, local, ProductPairing(levels, local.bound(), recipe.form, scaled=True))
