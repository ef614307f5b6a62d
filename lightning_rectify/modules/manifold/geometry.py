r"""How a sample lies in space: neighbours, reach, covering radius, fill distance, injectivity of charts.

Plain functions of points (N, D). All work in blocks: none holds a table of all pairs. Lengths are in the units of the
data.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from lightning_rectify.arguments import check_fraction, check_least, check_types
from lightning_rectify.modules.manifold.charts import TangentCharts
from lightning_rectify.modules.manifold.manifolds import Manifold
from lightning_rectify.modules.manifold.sampling import estimated_reach, nearest_gap, reach_of

#: numbers held at once by default: 32 MB in float64
MOST = 4_000_000


def nearest_neighbors(
    points: Tensor, k: int, queries: Tensor | None = None, *, most: int = MOST
) -> tuple[Tensor, Tensor]:
    r"""The k nearest other points, with distances that are right also for points much closer than they are large.

    Candidates come from a fast matrix product, whose rounding is that of :math:`|x|^2`; distances of the candidates
    come from differences.

    Args:
        points: shape (N, D), float.
        k: neighbours, in [1, N - 1].
        queries: indices, int64, shape (Q,), of the points whose neighbours are wanted; all if left out.
        most: numbers held at once, about.

    Returns:
        Distances (Q, k), ascending, and indices (Q, k). A point is not its own neighbour; an equal one is.

    Raises:
        ValueError: if an argument is out of its range.
    """
    check_types(nearest_neighbors, locals())
    check_least(1, k=k)
    points = checked_points(points)
    if k >= len(points):
        raise ValueError(f"Expected argument `k` to be less than the {len(points)} points but got {k}.")
    queries = torch.arange(len(points), device=points.device) if queries is None else queries
    centred = points - points.mean(0)
    squares = centred.square().sum(1)
    candidates = min(k + 4, len(points) - 1)  # a few more, as rounding may swap the last ones
    distances, indices = [], []
    for block in queries.split(max(most // max(len(points), candidates * points.shape[1]), 1)):
        table = squares - 2.0 * centred[block] @ centred.t()
        table[torch.arange(len(block), device=block.device), block] = math.inf
        near = table.topk(candidates, dim=1, largest=False).indices
        exact = (centred[near] - centred[block][:, None]).norm(dim=2)
        order = exact.argsort(dim=1, stable=True)[:, :k]
        distances.append(exact.gather(1, order))
        indices.append(near.gather(1, order))
    return torch.cat(distances), torch.cat(indices)


def distances_to(points: Tensor, centers: Tensor, *, most: int = MOST) -> Tensor:
    """Distance (N,) of each point (N, D) from the nearest of the centres (C, D), in blocks of about ``most`` numbers.

    Raises:
        ValueError: if the two are no points of one space.
    """
    points, centers = checked_points(points), checked_points(centers, "centers")
    if points.shape[1] != centers.shape[1]:
        raise ValueError(
            f"Expected argument `centers` to be of shape (C, {points.shape[1]}) but got {tuple(centers.shape)}."
        )
    blocks = points.split(max(most // max(len(centers), points.shape[1]), 1))
    # by differences for a few centres, where products would round; torch chooses
    return torch.cat([torch.cdist(block, centers).amin(1) for block in blocks])


def covering_radius(points: Tensor, centers: Tensor, *, most: int = MOST) -> float:
    """Smallest radius at which balls around the centres (C, D) hold all points (N, D).

    Raises:
        ValueError: as :func:`distances_to`.

    Example:
        >>> covering_radius(torch.tensor([[0.0], [1.0], [5.0]]), torch.tensor([[0.0], [4.0]]))
        1.0
    """
    check_types(covering_radius, locals())
    check_least(1, most=most)
    return distances_to(points, centers, most=most).max().item()


def fill_distance(points: Tensor, probes: Tensor | Manifold | None = None, *, most: int = MOST) -> float:
    """How far the manifold may be from the points: the supremum of the distance of its points from the nearest one.

    Args:
        points: the sample, shape (N, D).
        probes: what stands for the manifold. A :class:`Manifold`: an upper bound, as its grid's own fill distance is
            added (its spacing is a quarter of the sample's). Other points (P, D), such as ones held out: a lower
            bound. Left out: the sample's own estimate, :func:`nearest_gap`.
        most: numbers held at once, about.

    Raises:
        ValueError: as :func:`distances_to`.
    """
    check_types(fill_distance, locals())
    check_least(1, most=most)
    points = checked_points(points)
    if probes is None:
        return nearest_gap(points)
    if isinstance(probes, Manifold):
        grid, slack = probes.points(max(nearest_gap(points) / 4.0, 1e-3 * probes.reach))
        return covering_radius(grid.to(points), points, most=most) + slack
    probes = checked_points(probes, "probes")
    if probes.shape[1] != points.shape[1]:
        raise ValueError(
            f"Expected argument `probes` to be of shape (P, {points.shape[1]}) but got {tuple(probes.shape)}."
        )
    return covering_radius(probes, points, most=most)


def reach(
    points: Tensor,
    tangents: Tensor | None = None,
    *,
    d: int | None = None,
    closest: float = 0.0,
    quantile: float = 0.0,
) -> float:
    r"""The reach, :math:`\inf |y - x|^2 / (2\,\mathrm{dist}(y - x, T_x))` over the sample.

    Federer's formula (Curvature measures, 1959, theorem 4.18), as an estimator by Aamari et al. (arXiv:1705.04565):
    with exact points and tangents it is never below the reach. It is the smaller of the least radius of curvature and
    half the narrowest gap between two sheets (:func:`bottleneck`).

    Args:
        points: shape (N, D).
        tangents: orthonormal bases, shape (N, D, d); by local PCA over pairs well apart if left out.
        d: dimension of the manifold, without tangents.
        closest: as in :func:`reach_of`, with tangents.
        quantile: of the values at single points; more than 0 forgives outliers.

    Returns:
        The estimate; infinite if no pair leaves its tangent space.

    Raises:
        ValueError: if an argument is out of its range, or neither or both of ``tangents`` and ``d`` are given.
    """
    check_types(reach, locals())
    check_least(0, closest=closest)
    points = checked_points(points)
    if (tangents is None) == (d is None):
        raise ValueError(f"Expected argument `tangents` or `d` to be given, not both, but got d={d!r}.")
    check_fraction(quantile=quantile)
    if tangents is None:
        assert d is not None
        check_least(1, d=d)
        if d > points.shape[1]:
            raise ValueError(f"Expected argument `d` to be at most {points.shape[1]}, that of the space, but got {d}.")
        return estimated_reach(points, d, quantile)
    return reach_of(points, checked_tangents(tangents, points), closest, quantile)


def bottleneck(points: Tensor, tangents: Tensor, *, angle: float = 0.2, apart: float = 0.0, most: int = MOST) -> float:
    """Half the narrowest gap between two sheets: pairs whose segment leaves both tangent spaces upright.

    The global part of the reach (Aamari et al., arXiv:1705.04565, theorem 3.4): if it is near :func:`reach`, the
    reach is due to two sheets that come close, else to curvature.

    Args:
        points: shape (N, D).
        tangents: orthonormal bases, shape (N, D, d).
        angle: largest share of the segment that may lie along a tangent space, in (0, 1): the sine of an angle. A
            sample seldom holds the very pair, so it must allow for the spacing of the points over the gap.
        apart: leave out pairs nearer than this, which noise or estimated tangents make upright.
        most: numbers held at once, about.

    Returns:
        Infinite if there is no such pair.

    Raises:
        ValueError: if an argument is out of its range.
    """
    check_types(bottleneck, locals())
    check_least(0, apart=apart)
    check_least(1, most=most)
    points = checked_points(points)
    tangents = checked_tangents(tangents, points)
    if not 0.0 < angle < 1.0:
        raise ValueError(f"Expected argument `angle` to be in (0, 1) but got {angle!r}.")
    best = math.inf
    for rows, steps in _steps(points, most):
        squares = steps.square().sum(2)
        here = torch.einsum("bnd,bdk->bnk", steps, tangents[rows]).square().sum(2)
        there = torch.einsum("bnd,ndk->bnk", steps, tangents).square().sum(2)
        upright = (torch.maximum(here, there) <= angle**2 * squares) & (squares > max(apart**2, 0.0))
        if upright.any():
            best = min(best, 0.5 * squares[upright].min().sqrt().item())
    return best


def injectivity(points: Tensor, charts: TangentCharts, *, apart: float = 0.0, most: int = MOST) -> Tensor:
    """Smallest ratio of a projected to a true distance between two points of each chart's ball, over all such pairs.

    Args:
        points: shape (N, D).
        charts: the charts.
        apart: leave out pairs nearer than this: near pairs of a noisy sample differ in any direction.
        most: numbers held at once, about.

    Returns:
        Shape (C,), in [0, 1]; 1 for a chart with no such pair. A chart whose ratio is near 0 folds: its coordinates do
        not tell two of its points apart.

    Raises:
        ValueError: if the points are of another space.
    """
    check_types(injectivity, locals())
    check_least(0, apart=apart)
    check_least(1, most=most)
    points = checked_points(points).to(charts.centers)
    if points.shape[1] != charts.ambient_dim:
        raise ValueError(
            f"Expected argument `points` to be of shape (N, {charts.ambient_dim}) but got {tuple(points.shape)}."
        )
    lowest = torch.ones(len(charts), dtype=points.dtype, device=points.device)
    for chart, (center, basis) in enumerate(zip(charts.centers, charts.bases, strict=True)):
        inside = points[(points - center).square().sum(1) < charts.radius**2]
        for _, steps in _steps(inside, most):
            squares = steps.square().sum(2)
            pairs = squares > max(apart**2, 0.0)
            if pairs.any():
                ratios = (steps @ basis).square().sum(2)[pairs] / squares[pairs]
                lowest[chart] = torch.minimum(lowest[chart], ratios.min().sqrt())
    return lowest


def checked_points(points: Tensor, name: str = "points") -> Tensor:
    """The points, float, detached.

    Raises:
        ValueError: if they are not of shape (N, D) with N at least 1, float and finite.
    """
    if points.ndim != 2 or len(points) == 0 or not points.is_floating_point():
        raise ValueError(
            f"Expected argument `{name}` to be float points of shape (N, D) but got {points.dtype} of shape "
            f"{tuple(points.shape)}."
        )
    if not bool(points.isfinite().all()):
        raise ValueError(
            f"Expected argument `{name}` to be finite but got {int((~points.isfinite()).sum())} that are not."
        )
    return points.detach()


def checked_tangents(tangents: Tensor, points: Tensor) -> Tensor:
    """The tangents, in the points' dtype.

    Raises:
        ValueError: if they are not of shape (N, D, d) for points (N, D), or not finite.
    """
    if tangents.ndim != 3 or tangents.shape[:2] != points.shape:
        raise ValueError(
            f"Expected argument `tangents` to be of shape ({', '.join(map(str, points.shape))}, d) but got "
            f"{tuple(tangents.shape)}."
        )
    if not bool(tangents.isfinite().all()):
        raise ValueError("Expected argument `tangents` to be finite but got NaN or infinity among them.")
    return tangents.detach().to(points)


def _steps(points: Tensor, most: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Row indices (B,) and differences (B, N, D) to all points, block by block."""
    for rows in torch.arange(len(points), device=points.device).split(max(most // max(points.numel(), 1), 1)):
        yield rows, points - points[rows][:, None]
