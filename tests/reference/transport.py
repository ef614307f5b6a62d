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


# -- entropic plans ----------------------------------------------------------------------------------------------------


def entropic_cross(cov_x, cov_y, eps):
    """Cov(X, Y) of the entropic plan of two Gaussians, squared cost, eps KL(plan, product).

    Mallasto, Gerolin and Minh 2021 (arXiv:2006.03416) and Janati et al. 2020, with the roots drawn together into one
    of a matrix that is not symmetric: A^(1/2) (4 A^(1/2) B A^(1/2) + c I)^(1/2) A^(-1/2) = (4 A B + c I)^(1/2).
    """
    eye = np.eye(len(cov_x))
    return np.real(linalg.sqrtm(4 * cov_x @ cov_y + (eps / 2) ** 2 * eye)) / 2 - eps / 4 * eye


def entropic_cross_1d(s1, s2, eps):
    return (-eps + math.sqrt(eps**2 + 16 * s1**2 * s2**2)) / 4


def gaussian_log_density(points, mean, cov):
    """Row by row, from the inverse and the determinant."""
    inverse, constant = np.linalg.inv(cov), math.log(np.linalg.det(2 * math.pi * cov))
    return np.array([-0.5 * (p - mean) @ inverse @ (p - mean) - 0.5 * constant for p in points])


def gaussian_kl(mean_p, cov_p, mean_q, cov_q):
    """KL(p, q) of two Gaussians."""
    inverse = np.linalg.inv(cov_q)
    gap = mean_q - mean_p
    ratio = math.log(np.linalg.det(cov_q) / np.linalg.det(cov_p))
    return 0.5 * (np.trace(inverse @ cov_p) + gap @ inverse @ gap - len(gap) + ratio)


def sinkhorn(weights_x, weights_y, matrix, eps, rounds):
    """The entropic plan of two discrete distributions: rows and columns scaled in turn."""
    kernel = np.exp(-(matrix - matrix.min()) / eps)
    u, v = np.ones(len(weights_x)), np.ones(len(weights_y))
    for _ in range(rounds):
        u = weights_x / (kernel @ v)
        v = weights_y / (kernel.T @ u)
    return u[:, None] * kernel * v[None, :]


def gaussian_on_a_grid(mean, cov, points, reach):
    """A Gaussian's weights on a grid of its own standard deviations: points (points^D, D), weights of sum 1."""
    axes = [np.linspace(m - reach * s, m + reach * s, points) for m, s in zip(mean, np.sqrt(np.diag(cov)), strict=True)]
    grid = np.stack([axis.ravel() for axis in np.meshgrid(*axes, indexing="ij")], axis=1)
    weights = np.exp(gaussian_log_density(grid, mean, cov))
    return grid, weights / weights.sum()
