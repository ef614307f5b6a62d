"""Optimal transport in plain float64 numpy, sums written out. What the torch code is tested against."""

import itertools
import math

import numpy as np
from scipy import linalg, ndimage


def squared(x, y):
    """Costs of rows, number by number."""
    return np.array(
        [sum((a - b) ** 2 for a, b in zip(p.ravel(), q.ravel(), strict=True)) for p, q in zip(x, y, strict=True)]
    )


def euclidean(x, y):
    return np.sqrt(squared(x, y))


def contours(image):
    """Sobel's two filters of an image (C, H, W) with the channels summed, without the border, by scipy."""
    grey = np.asarray(image, float).sum(axis=0)
    # scipy's Sobel is a derivative: the sign of the authors' kernels is the other one, which a norm does not see.
    return [ndimage.sobel(grey, axis=axis)[1:-1, 1:-1] for axis in (0, 1)]


def contour(x, y):
    return np.array([sum(np.linalg.norm(f) for f in contours(p - q)) for p, q in zip(x, y, strict=True)])


def released_euclidean(x, y):
    return math.sqrt(squared(x, y).sum())


def released_contour(x, y):
    """One norm a filter over the whole batch."""
    filtered = [contours(p - q) for p, q in zip(x, y, strict=True)]
    return sum(math.sqrt(sum((f[axis] ** 2).sum() for f in filtered)) for axis in (0, 1))


def best_pairing(matrix):
    """The cheapest permutation, by trying all."""
    n = len(matrix)
    return min(itertools.permutations(range(n)), key=lambda p: sum(matrix[i][p[i]] for i in range(n)))


def bures(mean_x, cov_x, mean_y, cov_y):
    """Squared Wasserstein-2 distance of two Gaussians, by scipy's matrix square root of the product."""
    shared = np.real(np.trace(linalg.sqrtm(cov_x @ cov_y)))
    return float(np.sum((mean_x - mean_y) ** 2) + np.trace(cov_x) + np.trace(cov_y) - 2 * shared)


def w1(a, b):
    """Of two equally large samples on the line."""
    return sum(abs(p - q) for p, q in zip(sorted(a), sorted(b), strict=True)) / len(a)


def tanh_critic(x, w, b, v):
    """A critic v . tanh(W x + b) of rows, and its gradients."""
    hidden = np.tanh(x @ w.T + b)
    return hidden @ v, (v * (1 - hidden**2)) @ w


def one_sided_penalty(gradients):
    return float(np.mean([max(0.0, math.sqrt(sum(g * g for g in row)) - 1.0) ** 2 for row in gradients]))


def bjorck(weight, iterations):
    """Order 1, from the start that is safe."""
    norm_1 = max(sum(abs(weight[i, j]) for i in range(weight.shape[0])) for j in range(weight.shape[1]))
    norm_inf = max(sum(abs(weight[i, j]) for j in range(weight.shape[1])) for i in range(weight.shape[0]))
    weight = weight / math.sqrt(norm_1 * norm_inf)
    for _ in range(iterations):
        weight = weight @ (1.5 * np.eye(weight.shape[1]) - 0.5 * weight.T @ weight)
    return weight
