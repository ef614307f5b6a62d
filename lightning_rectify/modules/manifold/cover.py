r"""Charts for values at noisy points of an unknown manifold: how many, how large, and which degree; ours.

Radius and degree trade bias for noise. Both are chosen by the error of the whole estimator at points that had no part
in making the charts, :math:`\sum_i \rho_i(x_j)\, e_{ij}` with :math:`e_{ij}` the leave-one-out residual of chart i at
point j, which linear least squares give in closed form. (Points that charts were made from flatter them: with five
points a chart by half.) A radius by the reach alone (``TangentCharts.from_points``) is right without noise and wrong
with it: then the reach of a sample is that of its noise.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_rectify.modules.manifold.local import multi_indices

INNER = 0.75  # distance to the nearest centre that charts are made for, as a share of their radius
PREFER = 0.98  # a higher dimension must be better by this factor
_GAIN = 5.0  # a larger model by this over the number of points left out: what chance alone may bring
_SELECT, _FOLDED = 10_000, 4000  # points by which charts are chosen, at most; up to which several parts are left out
_TERMS = 70  # of a polynomial, at most
RIDGE = 1e-9


@dataclass(frozen=True)
class Cover:
    """Charts and what to fit in them.

    Attributes:
        centers: shape (C, D).
        bases: orthonormal, shape (C, D, d).
        radius: r.
        degree: of the polynomials.
        error: of the criterion, at the points left out.
        factor: of the values, as the criterion says.
    """

    centers: Tensor
    bases: Tensor
    radius: float
    degree: int
    error: float
    factor: float


Criterion = Callable[[Tensor, Tensor], tuple[float, float]]  # of fitted and true values (M, K): an error, and a factor
_TEMPERATURES = (1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 24.0)


def relative_square(values: Tensor, y: Tensor) -> tuple[float, float]:
    """Mean square error over the variance of y; the factor is 1."""
    return ((values - y).square().mean() / (y - y.mean(0)).square().mean().clamp(min=1e-300)).item(), 1.0


def cross_entropy(values: Tensor, y: Tensor) -> tuple[float, float]:
    """Cross-entropy of values as logits, y being one-hot, with the factor that makes it least; and that factor.

    The square of one-hot values would prefer charts that are surer of themselves and wrong more often.
    """
    labels = y.argmax(1)
    return min((F.cross_entropy(factor * values, labels).item(), factor) for factor in _TEMPERATURES)


def choose_cover(
    x: Tensor,
    y: Tensor,
    dim: int,
    radius: float | None,
    degree: int | None,
    seed: int,
    dispatch: int,
    criterion: Criterion = relative_square,
    most: int = 512,
) -> Cover:
    """The charts and degree with the least error at points left out.

    Centres are the means of the cells of farthest points (Gonzalez 1985, then Lloyd's steps, which bring a noisy
    centre closer to the manifold and leave no chart to an outlier). The candidates have 1, 2, 4, ... charts.

    Args:
        x: points, shape (N, D), float64.
        y: values, shape (N, K), float64.
        dim: d.
        radius: r; None to choose it.
        degree: of the polynomials; None to choose it.
        seed: of the points that serve for the choice where there are many, and of those left out.
        dispatch: charts that answer for a point, at most.
        criterion: which error.
        most: charts, at most.
    """
    shuffled = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[:_SELECT]
    x, y = x[shuffled], y[shuffled]
    limit = min(most, max(len(x) // 4, 1))
    # A quarter is left out; of a small sample each quarter in turn.
    quarters = torch.arange(len(x)) % 4
    folds = [quarters == k for k in range(min(max(_FOLDED // len(x), 1), 4))] if len(x) >= 8 else []
    orders = [farthest_order(x[~out], limit, None if radius is None else INNER * radius) for out in folds]
    whole = farthest_order(x, limit, None if radius is None else INNER * radius)
    shortest = min(len(order) for order in [whole, *orders])
    counts = [2**k for k in range(shortest.bit_length())] if radius is None else [len(whole)]
    best: tuple[float, float, int, int] = (math.inf, 1.0, degree or 0, counts[0])
    judged = torch.stack(folds).any(0) if folds else torch.zeros(len(x), dtype=torch.bool)
    for count in counts:
        if count > max(8 * best[3], 64):
            break  # more charts have helped no more
        values: dict[int, Tensor] = {}
        for out, order in zip(folds, orders, strict=True):
            charts = _charts(x[~out], order[:count], dim, radius)
            for of, found in left_out_values(x, y, *charts, degree, dispatch, out).items():
                values.setdefault(of, torch.zeros_like(y))[out] = found
        for of, fitted in values.items():
            error, factor = criterion(fitted[judged], y[judged])
            if error < (1.0 - min(_GAIN / int(judged.sum()), 0.5)) * best[0]:
                best = (error, factor, of, count)
    error, factor, chosen, count = best
    return Cover(*_charts(x, whole[:count], dim, radius), chosen, error, factor)


def _charts(x: Tensor, first: Tensor, dim: int, radius: float | None) -> tuple[Tensor, Tensor, float]:
    """Centres that start at the rows ``first``, their bases, and the radius."""
    # A radius that is given: points are as near to their centre as was asked for, and Lloyd's steps might change that.
    centers = lloyd(x, x[first]) if radius is None else x[first]
    squares = squared_distances(x, centers)
    size = radius or max(squares.amin(1).sqrt().quantile(0.99).item() / INNER, 1e-12)
    return centers, tangents(x, centers, dim, size, squares), size


def farthest_order(x: Tensor, most: int, distance: float | None = None) -> Tensor:
    """Farthest points in the order of choice, int64 (M,); the first is the one nearest to the mean.

    ``sampling.farthest_points`` begins with the first row, so that its choice hangs on the order of the rows.

    Args:
        x: points, shape (N, D).
        most: M at most.
        distance: stop when all points are as near; None for not.
    """
    chosen = [int((x - x.mean(0)).square().sum(1).argmin())]
    near = (x - x[chosen[0]]).square().sum(1)
    while len(chosen) < min(most, len(x)) and near.max().item() > (0.0 if distance is None else distance**2):
        chosen.append(int(near.argmax()))
        near = torch.minimum(near, (x - x[chosen[-1]]).square().sum(1))
    return torch.tensor(chosen)


def lloyd(x: Tensor, centers: Tensor, steps: int = 5) -> Tensor:
    """Centres moved to the means of their cells; an empty cell keeps its centre."""
    for _ in range(steps if len(centers) > 1 else 1):
        cell = squared_distances(x, centers).argmin(1)
        count = torch.bincount(cell, minlength=len(centers))
        sums = torch.zeros_like(centers).index_add(0, cell, x)
        centers = torch.where(count[:, None] > 0, sums / count.clamp(min=1)[:, None], centers)
    return centers


def squared_distances(x: Tensor, centers: Tensor) -> Tensor:
    """Squared distances (N, C)."""
    squares = x.square().sum(1, keepdim=True) - 2.0 * x @ centers.t() + centers.square().sum(1)
    return squares.clamp(min=0.0)


def tangents(x: Tensor, centers: Tensor, dim: int, radius: float, squares: Tensor, most: int = 400) -> Tensor:
    """Bases (C, D, d) by local PCA over each ball, or over the nearest 2d + 3 points where it holds fewer.

    ``sampling.local_tangents`` is for points without noise, where a small part of the ball is better.
    """
    bases = []
    least = min(2 * dim + 3, len(x))
    for chart in range(len(centers)):
        inside = (squares[:, chart] < radius**2).nonzero().flatten()
        if len(inside) < least:
            inside = squares[:, chart].topk(least, largest=False).indices
        inside = inside[torch.linspace(0, len(inside) - 1, min(len(inside), most)).long()]
        bases.append(principal(x[inside] - x[inside].mean(0), dim))
    return torch.stack(bases)


def principal(near: Tensor, dim: int, steps: int = 4) -> Tensor:
    """The first principal directions (D, d) of centred points (M, D), by whichever side is small, or by iteration."""
    if min(near.shape) <= 160:
        if len(near) < near.shape[1]:
            basis = near.t() @ torch.linalg.eigh(near @ near.t()).eigenvectors[:, -dim:]
        else:
            basis = torch.linalg.eigh(near.t() @ near).eigenvectors[:, -dim:]
        return torch.linalg.qr(basis.flip(1)).Q
    # Halko et al. 2011 (arXiv:0909.4061), algorithm 4.4
    draw = torch.randn(near.shape[1], dim + 8, generator=torch.Generator().manual_seed(0), dtype=near.dtype)
    basis = torch.linalg.qr(draw).Q
    for _ in range(steps):
        basis = torch.linalg.qr(near.t() @ (near @ basis)).Q
    turn = torch.linalg.svd(near @ basis, full_matrices=False).Vh[:dim]
    return basis @ turn.t()


def in_ball(squares: Tensor, radius: float, least: int) -> tuple[Tensor, Tensor]:
    """Rows of one chart's points and their weights in the fit, from squared distances (N,) to its centre.

    Weights fall from 1 to 0.05 towards the edge, as the gates do; a ball with too few points takes the nearest ones.
    """
    inside = (squares < radius**2).nonzero().flatten()
    if len(inside) < least:
        inside = squares.topk(min(least, len(squares)), largest=False).indices
    return inside, (1.0 - squares[inside] / radius**2).clamp(min=0.05)


def monomials(t: Tensor, degree: int) -> Tensor:
    """Monomials (M, A) of coordinates (M, d), in the order of ``multi_indices``."""
    exponents = multi_indices(t.shape[1], degree)
    return torch.stack([torch.stack([t[:, k] ** p for k, p in enumerate(a)]).prod(0) for a in exponents], 1)


def highest_degree(dim: int) -> int:
    """Highest degree that "auto" tries."""
    degree = 1
    while degree < 6 and math.comb(dim + degree + 1, dim) <= _TERMS:
        degree += 1
    return degree


def weighted_fit(design: Tensor, y: Tensor, weights: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """Weighted ridge regression: coefficients (A, K), and the leave-one-out residuals (M, K).

    Args:
        design: shape (M, A).
        y: shape (M, K).
        weights: shape (M,).
        ridge: relative to the mean of the Gram matrix's diagonal.
    """
    heavy = design * weights[:, None]
    gram = heavy.t() @ design
    gram = gram + ridge * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky_ex(gram).L)
    fit = inverse @ (heavy.t() @ y)
    leverage = ((heavy @ inverse) * design).sum(1).clamp(max=0.999)
    return fit, (y - design @ fit) / (1.0 - leverage)[:, None]


def mixture_weights(squares: Tensor, radius: float, dispatch: int) -> Tensor:
    """Weights rho (N, C) of a frozen gate, as ``ChartMixture`` has them, from squared distances (N, C)."""
    u = squares / radius**2
    if u.shape[1] > dispatch:
        cut = u.topk(dispatch + 1, dim=1, largest=False).values[:, -1:].clamp(max=1.0)
    else:
        cut = torch.ones_like(u[:, :1])
    rho = (1.0 - u / cut.clamp(min=1e-30)).clamp(min=0.0).square()
    total = rho.sum(1, keepdim=True)
    nearest = torch.zeros_like(rho).scatter(1, u.argmin(1, keepdim=True), 1.0)
    return torch.where(total > 0, rho / total.clamp(min=1e-30), nearest)


def left_out_values(
    x: Tensor,
    y: Tensor,
    centers: Tensor,
    bases: Tensor,
    radius: float,
    degree: int | None,
    dispatch: int,
    out: Tensor,
) -> dict[int, Tensor]:
    """Values (M, K) at the points ``out``, bool (N,), for each degree, each fitted to all points but the one."""
    dim = bases.shape[2]
    degrees = list(range(highest_degree(dim) + 1)) if degree is None else [degree]
    squares = squared_distances(x, centers)
    rho = mixture_weights(squares, radius, dispatch)
    errors = {order: torch.zeros_like(y) for order in degrees}
    for chart in range(len(centers)):
        inside, weights = in_ball(squares[:, chart], radius, 2 * (dim + 1))
        design = monomials((x[inside] - centers[chart]) @ bases[chart] / radius, degrees[-1])
        fitted = torch.zeros(len(x), dtype=torch.bool).index_fill(0, inside, True)
        beyond = (out & ~fitted & (rho[:, chart] > 0)).nonzero().flatten()  # in no chart, and this is the nearest
        ends = monomials(((x[beyond] - centers[chart]) @ bases[chart] / radius).clamp(-1.0, 1.0), degrees[-1])
        for order in degrees:
            terms = math.comb(dim + affordable(order, dim, len(inside)), dim)
            fit, left = weighted_fit(design[:, :terms], y[inside], weights, RIDGE)
            errors[order][inside] += rho[inside, chart][:, None] * left
            errors[order][beyond] += rho[beyond, chart][:, None] * (y[beyond] - ends[:, :terms] @ fit)
    return {order: (y - e)[out] for order, e in errors.items()}


def affordable(degree: int, dim: int, points: int) -> int:
    """The degree, or the highest one below it with two points a term."""
    while degree > 0 and 2 * math.comb(dim + degree, dim) > points:
        degree -= 1
    return degree
