"""Where a ``ChartMixture`` starts: charts and experts from training points, in closed form; no step of training."""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_rectify.modules.manifold.cover import (
    INNER,
    PREFER,
    RIDGE,
    Cover,
    affordable,
    choose_cover,
    cross_entropy,
    highest_degree,
    in_ball,
    monomials,
    relative_square,
    squared_distances,
    weighted_fit,
)
from lightning_rectify.modules.manifold.experts import MLPExpert, P1Expert, PolynomialExpert
from lightning_rectify.modules.manifold.local import grid_nodes
from lightning_rectify.modules.manifold.mixture import ChartMixture

Start = Literal["least_squares", "construction", "random"]

_RIDGES = (1e-8, 1e-6, 1e-4, 1e-2, 1e-1, 1.0)


def estimated_dims(x: Tensor, seed: int, most: int = 20) -> list[int]:
    """What three estimators say of the dimension of the manifold near points (N, D): one to three numbers, rising.

    Local PCA sees the directions of the largest spread, neighbours (TwoNN, Levina and Bickel) all there are at their
    scale, noise included: see ``dimension.py``. Too few distinct points for an estimate give 1.

    Args:
        x: points.
        seed: of the points that are looked at.
        most: highest dimension.
    """
    from lightning_rectify.modules.manifold.dimension import intrinsic_dimension

    found = set()
    for method in ("local_pca", "twonn", "mle"):
        try:
            value = float(
                intrinsic_dimension(x.double(), method=method, queries=1000, bootstrap=0, seed=seed, warn=False)
            )
        except ValueError:
            value = 1.0
        found.add(min(max(round(value), 1), most))
    return sorted(found)


@torch.no_grad()
def fit_mixture(
    network: ChartMixture,
    x: Tensor,
    y: Tensor,
    dims: Sequence[int],
    start: Start,
    radius: float | None = None,
    degree: int | None = None,
    classes: bool = False,
    seed: int = 0,
) -> float:
    """Make the charts of training points and give the experts their start.

    - "least_squares": each chart's expert fitted to the points in its ball, in what it is linear in (of "mlp" the
      outputs, the hidden units are random).
    - "construction": what the proof of arXiv:1908.01842 takes from a known function (step 3), estimated from the inner
      half of the ball: the Taylor polynomial at the centre; for "p1" its values at the nodes; for "mlp" bends on the
      grid of each axis, with the slopes of the polynomial along that axis (exact interpolation for d = 1, without
      mixed terms for d > 1: one hidden layer cannot have hats).
    - "random": charts from the points, experts from the seed.

    Args:
        network: changed in place.
        x: points, shape (N, D).
        y: values, shape (N, K), or classes, int64, shape (N,).
        dims: d, or several from which it is chosen.
        start: see above.
        radius: of the charts; None to choose it.
        degree: of the polynomials; None to choose it.
        classes: whether y are classes, whose logits are fitted to one-hot values and then scaled.
        seed: of all that is drawn.

    Returns:
        Error of the polynomials at points left out: mean square over the variance of y, or cross-entropy.
    """
    x = x.detach().double().cpu()
    shift = x.mean(0)
    x = x - shift
    if classes:
        values = F.one_hot(y.cpu(), network.outputs).double() - 1.0 / network.outputs
        loc, scale = torch.zeros(network.outputs), torch.ones(network.outputs)
    else:
        values = y.detach().double().cpu()
        loc, scale = values.mean(0), values.std(0, correction=0)
        scale = torch.where(scale > 0, scale, torch.ones_like(scale))
        values = (values - loc) / scale
    expert = network.expert
    criterion = cross_entropy if classes else relative_square
    cover: Cover | None = None
    for dim in sorted(set(dims)):
        # "p1" and "mlp": charts as large as few cells or units can serve
        wanted = degree if isinstance(expert, PolynomialExpert) else min(2, highest_degree(dim))
        found = choose_cover(x, values, dim, radius, wanted, seed, network.dispatch, criterion)
        if cover is None or found.error < PREFER * cover.error:
            cover = found
    assert cover is not None
    dim = cover.bases.shape[2]
    size = cover.degree if isinstance(expert, PolynomialExpert) else expert.size
    network.allocate(len(cover.centers), dim, size)
    network.centers.copy_(cover.centers)
    network.log_radii.fill_(math.log(cover.radius))
    network.bases.copy_(cover.bases)
    network.origins.copy_(torch.einsum("cdk,cd->ck", cover.bases, cover.centers))
    network.spans.fill_(cover.radius)
    network.shift.copy_(shift)
    network.loc.copy_(loc)
    network.scale.copy_(scale)
    network.inner.fill_(INNER)
    network.count.fill_(len(x))
    expert.randomize(torch.Generator().manual_seed(seed))
    if start == "random":
        return cover.error
    squares = squared_distances(x, cover.centers)
    for chart in range(len(cover.centers)):
        ball = cover.radius if start == "least_squares" else 0.5 * cover.radius
        inside, weights = in_ball(squares[:, chart], ball, 2 * (dim + 1))
        t = (x[inside] - cover.centers[chart]) @ cover.bases[chart] / cover.radius
        if start == "least_squares":
            _fit_chart(network, chart, t, values[inside], weights, cover.degree)
        else:
            _construct_chart(network, chart, t, values[inside], weights, cover.degree)
    network.start_here()
    if classes:
        network.scale.fill_(cover.factor)
    return cover.error


def _polynomial(t: Tensor, y: Tensor, weights: Tensor, degree: int) -> tuple[Tensor, int]:
    """Coefficients (A, K) and the degree, lower than asked for where there are too few points."""
    degree = affordable(degree, t.shape[1], len(t))
    return weighted_fit(monomials(t, degree), y, weights, RIDGE)[0], degree


def _fit_chart(network: ChartMixture, chart: int, t: Tensor, y: Tensor, weights: Tensor, degree: int) -> None:
    expert = network.expert
    if isinstance(expert, MLPExpert):
        design = expert.features(t / 2.0 + 0.5, chart)
        fits = [weighted_fit(design, y, weights, ridge) for ridge in _RIDGES]
        best = min(fits, key=lambda fit: (weights[:, None] * fit[1].square()).sum().item())
        expert.set_linear(chart, best[0])
        return
    fit, degree = _polynomial(t, y, weights, degree)
    if isinstance(expert, P1Expert):
        nodes = 2.0 * grid_nodes(expert.dim, expert.size).clamp(0.0, 1.0) - 1.0
        at_nodes = monomials(_into_ball(nodes), degree) @ fit
        design = expert.features(t / 2.0 + 0.5, chart)
        # The polynomial rules nodes that few points see; the points correct the others.
        correction, _ = weighted_fit(design, y - design @ at_nodes, weights, 1e-2)
        expert.set_linear(chart, at_nodes + correction)
        return
    assert isinstance(expert, PolynomialExpert)
    padded = torch.zeros(len(expert.exponents), fit.shape[1], dtype=fit.dtype)
    padded[: len(fit)] = fit
    expert.set_linear(chart, padded)


def _construct_chart(network: ChartMixture, chart: int, t: Tensor, y: Tensor, weights: Tensor, degree: int) -> None:
    expert = network.expert
    # A Taylor polynomial is used beyond the half of the ball that it was estimated from: not of a high degree.
    fit, degree = _polynomial(t, y, weights, min(degree, 2))
    if isinstance(expert, P1Expert):
        nodes = 2.0 * grid_nodes(expert.dim, expert.size) - 1.0
        expert.set_linear(chart, monomials(_into_ball(nodes), degree) @ fit)
    elif isinstance(expert, PolynomialExpert):
        padded = torch.zeros(len(expert.exponents), fit.shape[1], dtype=fit.dtype)
        padded[: len(fit)] = fit
        expert.set_linear(chart, padded)
    elif isinstance(expert, MLPExpert):
        _bends(expert, chart, fit, degree)


def _bends(expert: MLPExpert, chart: int, fit: Tensor, degree: int) -> None:
    """Units that bend at the nodes of each axis, and the slopes of the polynomial between them."""
    dim, cells = expert.dim, expert.size // expert.dim
    nodes = torch.linspace(-1.0, 1.0, cells + 1, dtype=fit.dtype)
    expert.weight[chart] = 0.0
    expert.bias[chart] = 0.0
    outputs = torch.zeros(expert.size + 1, fit.shape[1], dtype=fit.dtype)
    outputs[-1] = fit[0]
    for k in range(dim):
        axis = torch.zeros(cells + 1, dim, dtype=fit.dtype)
        axis[:, k] = nodes
        along = monomials(axis, degree) @ fit - fit[0]
        slopes = along.diff(dim=0) * (cells / 2.0)
        units = slice(k * cells, (k + 1) * cells)
        expert.weight[chart, k, units] = 1.0
        expert.bias[chart, units] = -nodes[:-1].to(expert.bias.dtype)
        outputs[units] = torch.cat([slopes[:1], slopes.diff(dim=0)])
        outputs[-1] += along[0]
    expert.set_linear(chart, outputs)


def _into_ball(nodes: Tensor) -> Tensor:
    """Nodes brought to the ball, where the polynomial was fitted: beyond it a polynomial may be anything."""
    return nodes / nodes.norm(dim=1, keepdim=True).clamp(min=1.0)
