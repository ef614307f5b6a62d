"""The blocks of arXiv:1908.01842 in plain float64 numpy, unit by unit; and geometry by brute force."""

import itertools
import math

import numpy as np


def relu(x):
    return np.maximum(x, 0.0)


def tent(t):
    return 2 * relu(t) - 4 * relu(t - 0.5)


def square(p, levels):
    """p - sum g_s(p)/4^s by composing tents."""
    total, g = np.asarray(p, float).copy(), np.asarray(p, float)
    for s in range(1, levels + 1):
        g = tent(g)
        total = total - g / 4.0**s
    return total


def product(a, b, levels, bound, form):
    f = lambda v: square(np.abs(v) / (2 * bound), levels)  # noqa: E731
    if form == "three_squares":
        return 2 * bound**2 * (f(a + b) - f(a) - f(b))
    return bound**2 * (f(a + b) - f(a - b))


def clip_indicator(a, high, clips):
    """The paper's: 1 - g^k(a)/hi with g(t) = 2 relu(t - hi/2) - 2 relu(t - hi)."""
    t = np.asarray(a, float)
    t = relu(t) - relu(t - high)
    for _ in range(clips):
        t = 2 * relu(t - high / 2) - 2 * relu(t - high)
    return 1 - t / high


def kuhn_interpolant(values, point):
    """Linear interpolation of values on the integer grid, on the Kuhn simplex that holds the point."""
    base = np.floor(point)
    rest = point - base
    order = np.argsort(-rest, kind="stable")
    corner = base.astype(int)
    steps = np.concatenate([[1.0], rest[order], [0.0]])
    total = 0.0
    for k in range(len(point) + 1):
        total += (steps[k] - steps[k + 1]) * values[tuple(corner)]
        if k < len(point):
            corner = corner.copy()
            corner[order[k]] += 1
    return total


def dense_counts(layers):
    """Non-zero weights and biases, and the largest, of dense layers [(A, b), ...]."""
    arrays = [np.asarray(part) for pair in layers for part in pair]
    return sum(np.count_nonzero(a) for a in arrays), max(np.abs(a).max() for a in arrays)


def farthest_points(points, count):
    """Farthest point sampling from the first point, by the definition."""
    chosen = [0]
    while len(chosen) < count:
        gaps = [min(math.dist(p, points[c]) for c in chosen) for p in points]
        chosen.append(int(np.argmax(gaps)))
    return chosen


def reach(points, tangents):
    """Federer's formula over all pairs: inf |y - x|^2 / (2 dist(y - x, T_x))."""
    best = math.inf
    for i, j in itertools.permutations(range(len(points)), 2):
        step = points[j] - points[i]
        normal = step - tangents[i] @ (tangents[i].T @ step)
        if np.linalg.norm(normal) > 1e-12:
            best = min(best, step @ step / (2 * np.linalg.norm(normal)))
    return best
