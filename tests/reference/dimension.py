"""Estimators of the intrinsic dimension as loops over points, in float64 numpy; scipy where a root is wanted."""

import math
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq

Array = NDArray[np.float64]


def sorted_distances(points: Array) -> Array:
    """Distances (N, N - 1) of each point from all others, ascending."""
    table = np.array([[math.dist(a, b) for b in points] for a in points])
    np.fill_diagonal(table, np.inf)
    return np.sort(table, 1)[:, :-1]


def two_nn(points: Array) -> float:
    """Unbiased maximum likelihood of the exponential log r2/r1."""
    distances = sorted_distances(points)
    return (len(points) - 1) / sum(math.log(row[1] / row[0]) for row in distances)


def ratio(points: Array, k: int) -> float:
    """Maximum likelihood of r_k / r_n, n = k // 2, from its log density, by a root of its numerical derivative."""
    n = k // 2
    logs = np.array([math.log(row[k - 1] / row[n - 1]) for row in sorted_distances(points)])

    def score(d: float) -> float:
        def likelihood(d: float) -> float:
            return float(np.sum(np.log(d) + (k - n - 1) * np.log(np.exp(d * logs) - 1) - ((k - 1) * d + 1) * logs))

        step = 1e-4 * d
        return (likelihood(d + step) - likelihood(d - step)) / (2 * step)

    return float(brentq(score, 0.05, 50.0, xtol=1e-10))


def levina_bickel(points: Array, k: int) -> float:
    """Inverse of the mean of the inverse estimates (MacKay and Ghahramani)."""
    inverses = []
    for row in sorted_distances(points):
        inverses.append(sum(math.log(row[k - 1] / row[j]) for j in range(k - 1)) / (k - 1))
    return 1.0 / (sum(inverses) / len(inverses))


def spectrum(points: Array, k: int) -> Array:
    """Mean over points of the local covariance's eigenvalues as shares of its trace, descending."""
    total = np.zeros(min(k, points.shape[1]))
    for point in points:
        near = points[np.argsort(((points - point) ** 2).sum(1), kind="stable")[: k + 1]]
        values = np.linalg.svd(near - near.mean(0), compute_uv=False)[: len(total)] ** 2
        total += values / values.sum()
    return total / len(points)


def local_pca(points: Array, k: int, floor: float = 0.01) -> int:
    """The largest gap of the mean spectrum."""
    shares = [*spectrum(points, k), 0.0]
    ratios = [(a + floor * shares[0]) / (b + floor * shares[0]) for a, b in pairwise(shares)]
    return int(np.argmax(ratios)) + 1
