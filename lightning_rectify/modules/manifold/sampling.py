"""Geometry of point sets: farthest point sampling, local PCA, the reach."""

import math

import torch
from torch import Tensor

from lightning_rectify.arguments import check_least


def farthest_points(points: Tensor, distance: float, most: int | None = None) -> Tensor:
    """Farthest point sampling (Gonzalez 1985): each next point is the one farthest from those chosen.

    Of points equally far (to half the digits of their type) it takes the first: on a symmetric manifold there are many,
    and rounding in another D must not choose for us.

    Args:
        points: shape (N, D).
        distance: stop when every point is within this distance of a chosen one.
        most: stop at this many; at N if left out.

    Returns:
        Indices in the order of choice, int64; the first is 0.

    Raises:
        ValueError: if ``distance`` is negative.
    """
    check_least(0, distance=distance)
    chosen, equal = [0], 1.0 - math.sqrt(torch.finfo(points.dtype).eps)
    gaps = (points - points[0]).square().sum(1)
    while len(chosen) < (len(points) if most is None else most) and gaps.max().item() > distance**2:
        chosen.append(int((gaps >= equal * gaps.max()).int().argmax()))
        gaps = torch.minimum(gaps, (points - points[chosen[-1]]).square().sum(1))
    return torch.tensor(chosen)


def local_tangents(points: Tensor, centers: Tensor, d: int, radius: float, most: int = 400) -> Tensor:
    """Tangent bases by local PCA.

    The covariance has the side of whichever is fewer, coordinates or neighbours (the Gram matrix of the neighbours):
    large D costs no more than that.

    Args:
        points: the sample, shape (N, D).
        centers: where, shape (C, D).
        d: dimension of the tangent space.
        radius: of the neighbourhood; where it holds fewer than 2d + 3 points, the nearest 2d + 3 are taken.
        most: neighbours used at most (spread over the neighbourhood).

    Returns:
        Orthonormal bases, shape (C, D, d).
    """
    least = min(2 * d + 3, len(points))
    bases = []
    for center in centers:
        squares = (points - center).square().sum(1)
        order = squares.argsort()
        order = order[: max(int((squares <= radius**2).sum()), least)]
        order = order[torch.linspace(0, len(order) - 1, min(len(order), most)).long()]
        near = points[order] - points[order].mean(0)
        if near.shape[0] < near.shape[1]:
            _, vectors = torch.linalg.eigh(near @ near.t())
            basis = near.t() @ vectors[:, -d:]
        else:
            _, vectors = torch.linalg.eigh(near.t() @ near)
            basis = vectors[:, -d:]
        bases.append(torch.linalg.qr(basis.flip(1)).Q)
    return torch.stack(bases)


def reach_of(points: Tensor, tangents: Tensor, closest: float = 0.0, quantile: float = 0.0) -> float:
    r"""Federer's formula over all pairs, :math:`\inf |y - x|^2 / (2\,\mathrm{dist}(y - x, T_x))`.

    Aamari et al. (arXiv:1705.04565) study it as an estimator: it is at least the reach where points and tangents are
    exact.

    Args:
        points: shape (M, D).
        tangents: orthonormal bases, shape (M, D, d).
        closest: leave out pairs nearer than this: with noise or estimated tangents they say nothing.
        quantile: take this quantile over points of the smallest value at each point, against outliers.

    Returns:
        The estimate; infinite if all pairs lie in their tangent spaces.
    """
    lowest = torch.full((len(points),), math.inf, dtype=points.dtype)
    for i, (x, basis) in enumerate(zip(points, tangents, strict=True)):
        steps = points - x
        squares = steps.square().sum(1)
        normal = (steps - steps @ basis @ basis.t()).norm(dim=1)
        pairs = (squares > closest**2) & (normal > 1e-10 * squares.sqrt()) & (squares > 0)
        if pairs.any():
            lowest[i] = (squares[pairs] / (2.0 * normal[pairs])).min()
    lowest = lowest.sort().values
    return lowest[min(int(quantile * len(lowest)), len(lowest) - 1)].item()


def nearest_gap(points: Tensor, most: int = 1000) -> float:
    """Distance from a point to its nearest neighbour, the 99 % quantile over at most ``most`` of the points (N, D)."""
    some = points[torch.linspace(0, len(points) - 1, min(len(points), most)).long()]
    gaps = torch.cdist(some, points).topk(2, dim=1, largest=False).values[:, 1]
    return gaps.quantile(0.99).item()


def estimated_reach(points: Tensor, d: int, quantile: float, most: int = 200) -> float:
    """The reach of a sampled manifold: :func:`reach_of` with tangents by local PCA, over pairs well apart.

    Args:
        points: shape (N, D).
        d: dimension of the manifold.
        quantile: as in :func:`reach_of`.
        most: points used as x at most.
    """
    some = points[torch.linspace(0, len(points) - 1, min(len(points), most)).long()]
    extent = (points - points.mean(0)).norm(dim=1).max().item()
    radius = max(3.0 * nearest_gap(points), 0.1 * extent)
    tangents = local_tangents(points, some, d, radius, most=100)
    return reach_of(some, tangents, closest=2.0 * radius, quantile=quantile)
