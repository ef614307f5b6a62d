r"""Numbers of the local networks: Taylor coefficients and node values of a known function, least squares for points.

Everything here happens once, when a network is built; none of it is part of the network.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from lightning_rectify.modules.manifold.charts import TangentCharts
from lightning_rectify.modules.manifold.local import LocalKind, grid_nodes, multi_indices
from lightning_rectify.modules.manifold.manifolds import Manifold
from lightning_rectify.modules.manifold.partitions import BumpPartition

Function = Callable[[Tensor], Tensor]


class ChartFunction:
    r"""A function on a manifold in the coordinates of each chart, :math:`(f \rho_i) \circ \phi_i^{-1}`.

    Args:
        manifold: where.
        charts: its charts.
        function: f: points (M, D) to values (M,), by torch, differentiable as often as asked for.
        partition: rho; the function itself if left out.
    """

    def __init__(
        self, manifold: Manifold, charts: TangentCharts, function: Function, partition: BumpPartition | None
    ) -> None:
        self.manifold, self.charts, self.function, self.partition = manifold, charts, function, partition
        # Outside its support the product is 0; a function without bump ends where the chart can no more be inverted.
        self.limit = partition.support if partition else manifold.lift_radius

    def values(self, z: Tensor, ids: Tensor) -> Tensor:
        """Values (C', M) at coordinates (C', M, d) of the charts ``ids`` (C',)."""
        y = (2.0 * z - 1.0) * self.charts.radius
        x = self.manifold.lift(self.charts.centers[ids], self.charts.bases[ids], y).flatten(0, 1)
        values = self.function(x)
        if values.shape != (len(x),):
            raise ValueError(
                f"Expected argument `f` to map points {tuple(x.shape)} to values ({len(x)},) but got "
                f"{tuple(values.shape)}."
            )
        if self.partition is not None:
            own = ids.repeat_interleave(z.shape[1])
            values = values * self.partition(x)[torch.arange(len(x)), own]
        return values.view(z.shape[:2])

    def derivatives(self, z: Tensor, degree: int) -> Tensor:
        """Partial derivatives (C, M, A) at coordinates z (M, d) in every chart, for all ``multi_indices``.

        Coordinates outside ``limit`` give 0 with a bump; without one they are not allowed.
        """
        dim, exponents = z.shape[1], multi_indices(z.shape[1], degree)
        inside = (2.0 * z - 1.0).norm(dim=1) * self.charts.radius < self.limit
        result = torch.zeros(len(self.charts), len(z), len(exponents), dtype=torch.float64)
        count = max(int(inside.sum()), 1)
        for ids in torch.arange(len(self.charts)).split(max(1_000_000 // (count * self.charts.ambient_dim), 1)):
            if not inside.any():
                continue
            at = z[inside].expand(len(ids), -1, dim).clone().requires_grad_(degree > 0)
            done = {(0,) * dim: self.values(at, ids)}
            for a in exponents:
                if sum(a) == degree:
                    continue
                (slopes,) = torch.autograd.grad(done[a].sum(), at, create_graph=True)
                for k in range(dim):
                    done.setdefault((*a[:k], a[k] + 1, *a[k + 1 :]), slopes[..., k])
            result[ids[:, None], inside.nonzero().flatten()] = torch.stack([done[a] for a in exponents], -1).detach()
        return result

    def coefficients(self, kind: LocalKind, grid: int, degree: int) -> Tensor:
        """Coefficients (C, (N + 1)^d, A) for :class:`TaylorNet`, or node values (C, (N + 1)^d, 1) for :class:`P1Net`.

        Nodes beyond the reach of the chart's inverse (possible only without a bump) take the Taylor polynomial of the
        nearest point that has one, moved to the node; P1 one of degree 2.
        """
        dim = self.charts.dim
        z, half = grid_nodes(dim, grid), 2.0 / (3.0 * grid) if kind == "taylor" else 1.0 / grid
        order = degree if kind == "taylor" else (0 if self.partition is not None else 2)
        exponents = multi_indices(dim, order)
        y = (2.0 * z - 1.0) * self.charts.radius
        # nodes whose cell meets the ball
        needed = (y.abs() - 2.0 * self.charts.radius * half).clamp(min=0.0).norm(dim=1) < self.charts.radius
        at = z
        if self.partition is None:
            scale = (0.95 * self.limit / y.norm(dim=1).clamp(min=1e-300)).clamp(max=1.0)
            at = 0.5 + (z - 0.5) * scale[:, None]
        factorials = torch.tensor([math.prod(math.factorial(k) for k in a) for a in exponents], dtype=torch.float64)
        found = torch.zeros(len(self.charts), len(z), len(exponents), dtype=torch.float64)
        found[:, needed] = moved(self.derivatives(at[needed], order) / factorials, (z - at)[needed], exponents)
        return found if kind == "taylor" else found[:, :, :1]

    def recentred(self, kind: LocalKind, grid: int) -> bool:
        """Whether some needed node lies beyond the inverse of the chart, so that error bounds do not hold."""
        half = 2.0 / (3.0 * grid) if kind == "taylor" else 1.0 / grid
        return self.partition is None and (1.0 + 2.0 * half) * self.charts.radius >= 0.95 * self.limit

    def largest_derivatives(self, degree: int, per_axis: int = 0) -> tuple[float, float]:
        """Largest partial derivative of this order and largest gradient norm in z, over a grid in all charts.

        Args:
            degree: order, at least 1.
            per_axis: points of the grid a coordinate; 400 for d = 1 and 40 for d = 2 if 0.
        """
        dim = self.charts.dim
        z = grid_nodes(dim, per_axis or {1: 400, 2: 40}.get(dim, 14))
        span = 1.15 if self.partition is None else 1.0  # cells reach a little beyond the ball
        z = 0.5 + (z - 0.5) * span
        limit = min(span * self.charts.radius, 0.999 * self.limit)
        z = z[(2.0 * z - 1.0).norm(dim=1) * self.charts.radius < limit]
        found, exponents = self.derivatives(z, degree), multi_indices(dim, degree)
        highest = [k for k, a in enumerate(exponents) if sum(a) == degree]
        gradient = [k for k, a in enumerate(exponents) if sum(a) == 1]
        return found[..., highest].abs().max().item(), found[..., gradient].norm(dim=-1).max().item()


def moved(coefficients: Tensor, step: Tensor, exponents: list[tuple[int, ...]]) -> Tensor:
    """The same polynomials in powers around another point.

    Args:
        coefficients: shape (C, M, A), of the powers of z - p.
        step: new point minus p, shape (M, d).
        exponents: the A exponents.

    Returns:
        Shape (C, M, A), of the powers of z - (p + step).
    """
    result = torch.zeros_like(coefficients)
    for target, a in enumerate(exponents):
        for source, b in enumerate(exponents):
            if all(low <= high for low, high in zip(a, b, strict=True)):
                factor = math.prod(math.comb(high, low) for low, high in zip(a, b, strict=True))
                powers = [step[:, k] ** (b[k] - a[k]) for k in range(len(a))]
                result[..., target] += coefficients[..., source] * factor * torch.stack(powers).prod(0)
    return result


def least_squares(
    charts: TangentCharts, x: Tensor, y: Tensor, degree: int | str, highest: int = 5, ridge: float = 1e-8
) -> tuple[Tensor, int]:
    r"""One polynomial a chart, fitted to the points in its ball.

    Args:
        charts: where.
        x: points, shape (N, D).
        y: values, shape (N,).
        degree: of the polynomials, or "auto" for the one with the least leave-one-out error over all charts.
        highest: degree up to which "auto" looks.
        ridge: relative to the mean square of the monomials; keeps charts with few points well posed.

    Returns:
        Coefficients (C, 1, A) of the monomials of t = 2z - 1, and the degree.

    Raises:
        ValueError: if ``degree`` is neither.
    """
    if degree != "auto" and (isinstance(degree, bool) or not isinstance(degree, int) or degree < 0):
        raise ValueError(f"Expected argument `degree` to be 'auto' or an integer >= 0 but got {degree!r}.")
    squares = charts.squared_distances(x)
    flat = charts.bases.permute(1, 0, 2).reshape(charts.ambient_dim, -1)
    origin = torch.einsum("cdk,cd->ck", charts.bases, charts.centers)
    t = ((x @ flat).view(len(x), len(charts), charts.dim) - origin) / charts.radius
    best: tuple[float, Tensor, int] | None = None
    for order in range(highest + 1) if degree == "auto" else [int(degree)]:
        fits, errors, count = [], 0.0, 0
        exponents = multi_indices(charts.dim, order)
        for chart in range(len(charts)):
            inside = squares[:, chart] < charts.radius**2
            if int(inside.sum()) < 2 * len(exponents):  # too few: the nearest ones outside as well
                inside = squares[:, chart].argsort()[: 2 * len(exponents)]
            at = t[inside, chart]
            design = torch.stack(
                [torch.stack([at[:, k] ** a[k] for k in range(charts.dim)]).prod(0) for a in exponents], 1
            )
            gram = design.t() @ design
            gram += ridge * gram.diagonal().mean() * torch.eye(len(exponents), dtype=gram.dtype)
            inverse = torch.linalg.inv(gram)
            fit = inverse @ (design.t() @ y[inside])
            leverage = ((design @ inverse) * design).sum(1).clamp(max=1.0 - 1e-6)
            errors += ((y[inside] - design @ fit) / (1.0 - leverage)).square().sum().item()
            count += len(at)
            fits.append(fit)
        if best is None or errors / count < best[0]:
            best = (errors / count, torch.stack(fits)[:, None], order)
    assert best is not None
    return best[1], best[2]
