"""The spectrum controls in plain float64 numpy, from arXiv:1812.10912 and its authors' code (``--udvmode``).

One layer's spectrum at a time, the sums written out. What the torch code is tested against.
"""

import math

import numpy as np


def normalized(e):
    """Modes 1 and 8."""
    return np.asarray(e, float) / max(abs(x) for x in e)


def constrained(e, bound=1.0):
    """Modes 2 and 5."""
    return np.array([min(max(x, -bound), bound) for x in e])


def lipschitz(spectra):
    """Mode 3: one hinge for the network."""
    return max(0.0, sum(math.log(max(abs(x) for x in e)) for e in spectra))


def d_optimal(spectra):
    """The penalty of mode 8."""
    return -sum(sum(math.log(abs(x)) for x in e) / len(e) for e in spectra)


def divergence(spectra, scale=0.1, spacing=1e-7, minus_log_density=None):
    """The penalty of mode 5 with its factor 0.05."""
    if minus_log_density is None:
        minus_log_density = lambda x: (1 - x) ** 2 / scale**2  # noqa: E731
    total = 0.0
    for e in spectra:
        s = sorted(abs(x) for x in e)
        if len(s) == 1:
            continue
        terms = [minus_log_density(s[k]) - math.log(s[k + 1] - s[k] + spacing) for k in range(len(s) - 1)]
        total += sum(terms) / len(terms)
    return 0.05 * total


def orthogonality(u, v):
    """||U^T U - I||_F^2 + ||V^T V - I||_F^2."""
    return sum(float(((a.T @ a - np.eye(a.shape[1])) ** 2).sum()) for a in (u, v))


def rebuilt(u, e, v):
    """The matrix, value by value of the spectrum."""
    return sum(e[k] * np.outer(u[:, k], v[:, k]) for k in range(len(e)))


def circular_matrix(kernel, sizes, stride, dilation):
    """The dense matrix of a circular 2-D convolution (cross-correlation), (out * positions, in * positions)."""
    out, into, height, width = kernel.shape
    n, m = sizes
    rows = [(o, i, j) for o in range(out) for i in range(0, n, stride[0]) for j in range(0, m, stride[1])]
    matrix = np.zeros((len(rows), into * n * m))
    for row, (o, i, j) in enumerate(rows):
        for c in range(into):
            for a in range(height):
                for b in range(width):
                    x, y = (i + a * dilation[0]) % n, (j + b * dilation[1]) % m
                    matrix[row, (c * n + x) * m + y] += kernel[o, c, a, b]
    return matrix
