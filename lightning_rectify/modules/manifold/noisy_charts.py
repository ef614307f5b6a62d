"""A given number of charts over noisy points without values, for the gate alone: is a new point one of these? Ours."""

import torch
from torch import Tensor

from lightning_rectify.arguments import check_fraction, check_types
from lightning_rectify.modules.manifold.charts import TangentCharts
from lightning_rectify.modules.manifold.cover import INNER, farthest_order, lloyd, squared_distances, tangents
from lightning_rectify.modules.manifold.geometry import checked_points


@torch.no_grad()
def noisy_charts(x: Tensor, d: int, charts: int, *, outside: float = 0.01) -> TangentCharts:
    """Charts as :class:`ManifoldRegressor` makes them, of points alone.

    Centres are the means of the cells of farthest points, one radius for all is such that most points lie within the
    inner radius of a centre, tangents come from the principal directions of each ball. ``TangentCharts.from_points`` is
    for points without noise, whose reach says how large a chart may be.

    Args:
        x: points, shape (N, D), float.
        d: dimension of the charts, in [1, D].
        charts: how many, in [1, N]; fewer if there are fewer different points.
        outside: share of the points that may be farther than the inner radius from every centre, in [0, 1).

    Raises:
        ValueError: if an argument is out of its range.

    Example:
        >>> x = torch.randn(500, 2, generator=torch.Generator().manual_seed(0))
        >>> gate = noisy_charts(x / x.norm(dim=1, keepdim=True), d=1, charts=8)
        >>> gate.coverage(torch.tensor([[0.0, 1.0], [0.0, 3.0]]), warn=False).tolist()
        [1.0, 0.0]
    """
    check_types(noisy_charts, locals())
    x = checked_points(x, "x")
    for name, value, high in (("d", d, x.shape[1]), ("charts", charts, len(x))):
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= high:
            raise ValueError(f"Expected argument `{name}` to be an integer in [1, {high}] but got {value!r}.")
    check_fraction(outside=outside)
    shift = x.mean(0)
    centred = (x - shift).double()
    centers = lloyd(centred, centred[farthest_order(centred, charts)])
    squares = squared_distances(centred, centers)
    radius = max(squares.amin(1).sqrt().quantile(1.0 - outside).item() / INNER, 1e-12)
    bases = tangents(centred, centers, d, radius, squares)
    return TangentCharts(centers.to(x) + shift, bases.to(x), radius, INNER * radius)


@torch.no_grad()
def plane_distances(charts: TangentCharts, x: Tensor, most: int = 4_000_000) -> Tensor:
    """Distance (B,) of points (B, D) from the tangent plane of their nearest chart, in the points' unit.

    The gate sees how far along the manifold a point is from a centre as much as how far it is off; this, the latter.

    Args:
        charts: any.
        x: points, float.
        most: numbers held at once, about.
    """
    x = checked_points(x, "x").to(charts.centers)
    found = []
    for block in x.split(max(most // (charts.ambient_dim * charts.dim), 1)):
        ids = charts.squared_distances(block).argmin(1)
        steps = block - charts.centers[ids]
        along = torch.einsum("bk,bkd->bd", steps, charts.bases[ids])
        found.append((steps.square().sum(1) - along.square().sum(1)).clamp(min=0.0).sqrt())
    return torch.cat(found)
