r"""Samples of known manifolds, a function on each, and embeddings into any dimension. numpy, float64.

Points of a manifold come in coordinates u of its own small space R^m (the sphere's in R^3), and an embedding takes
them into R^D. The function is one of u or of the manifold's parameters, never of the embedding: its values are the
same whatever D is, and so is what there is to learn.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Generator = np.random.Generator


@dataclass(frozen=True)
class SampledManifold:
    """How to draw from a manifold.

    Attributes:
        dim: d, its dimension.
        own_dim: m, of the space it is drawn in; None where the caller says (the moment curve).
        draw: generator, number N and m to points u, (N, m), and values of the function, (N,).
    """

    dim: int
    own_dim: int | None
    draw: Callable[[Generator, int, int], tuple[Array, Array]]


def circle(generator: Generator, count: int, _: int) -> tuple[Array, Array]:
    """The unit circle, uniformly; the values are (sin 3u_0 + u_0 u_1 + 0.3 cos 4u_1) / 1.6."""
    angle = generator.uniform(0.0, 2.0 * math.pi, count)
    u = np.stack([np.cos(angle), np.sin(angle)], 1)
    return u, (np.sin(3.0 * u[:, 0]) + u[:, 0] * u[:, 1] + 0.3 * np.cos(4.0 * u[:, 1])) / 1.6


def sphere(generator: Generator, count: int, _: int) -> tuple[Array, Array]:
    """The unit sphere in R^3, uniformly."""
    u = generator.standard_normal((count, 3))
    u /= np.linalg.norm(u, axis=1, keepdims=True)
    return u, _smooth(u)


def torus(generator: Generator, count: int, _: int) -> tuple[Array, Array]:
    """The torus of radii 1 and 0.4 in R^3 (reach 0.4), uniformly by area."""
    angles: Array = np.empty((0, 2))
    while len(angles) < count:  # the outside has more area than the inside: (1 + 0.4 cos b) / 1.4 of the draws stay
        drawn = generator.uniform(0.0, 2.0 * math.pi, (2 * count, 2))
        keep = generator.uniform(0.0, 1.4, 2 * count) < 1.0 + 0.4 * np.cos(drawn[:, 1])
        angles = np.concatenate([angles, drawn[keep]])
    a, b = angles[:count].T
    ring = 1.0 + 0.4 * np.cos(b)
    u = np.stack([ring * np.cos(a), ring * np.sin(a), 0.4 * np.sin(b)], 1)
    return u, _smooth(u)


def swiss_roll(generator: Generator, count: int, _: int) -> tuple[Array, Array]:
    """scikit-learn's roll, (t cos t, h, t sin t) / 10 with t in [1.5 pi, 4.5 pi] and h in [0, 21], uniform in t and h.

    The values are sin(0.8 t) + 0.5 cos(0.3 h): of the sheet, not of the space it is rolled up in.
    """
    t = generator.uniform(1.5 * math.pi, 4.5 * math.pi, count)
    h = generator.uniform(0.0, 21.0, count)
    return np.stack([t * np.cos(t), h, t * np.sin(t)], 1) / 10.0, np.sin(0.8 * t) + 0.5 * np.cos(0.3 * h)


def moment_curve(generator: Generator, count: int, own_dim: int) -> tuple[Array, Array]:
    """The closed curve cos(k a) / k, sin(k a) / k for k = 1, 2, ..., D / 2: it turns through all D dimensions.

    No linear map to fewer dimensions keeps it, unlike an isometric embedding. The values are
    (sin 2a + 0.5 cos 3a) / 1.5.
    """
    a = generator.uniform(0.0, 2.0 * math.pi, count)
    k = np.arange(1, own_dim // 2 + 1)
    u = np.stack([np.cos(a[:, None] * k) / k, np.sin(a[:, None] * k) / k], 2).reshape(count, -1)
    return u, (np.sin(2.0 * a) + 0.5 * np.cos(3.0 * a)) / 1.5


def so3(generator: Generator, count: int, _: int) -> tuple[Array, Array]:
    """Rotations of R^3, uniformly (by unit quaternions), as the nine numbers of their matrices, row by row.

    The values are those of the other functions, of a matrix's first row.
    """
    q = generator.standard_normal((count, 4))
    w, x, y, z = (q / np.linalg.norm(q, axis=1, keepdims=True)).T
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
        [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
        [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
    ]
    u = np.stack([entry for row in rows for entry in row], 1)
    return u, _smooth(u[:, [0, 1, 5]])


def _smooth(u: Array) -> Array:
    """(sin(2 u_0) exp(u_2 / 2) + u_1 u_2) / 1.6 of points (N, 3)."""
    values: Array = (np.sin(2.0 * u[:, 0]) * np.exp(0.5 * u[:, 2]) + u[:, 1] * u[:, 2]) / 1.6
    return values


MANIFOLDS = {
    "circle": SampledManifold(1, 2, circle),
    "sphere": SampledManifold(2, 3, sphere),
    "torus": SampledManifold(2, 3, torus),
    "swiss_roll": SampledManifold(2, 3, swiss_roll),
    "moment_curve": SampledManifold(1, None, moment_curve),
    "so3": SampledManifold(3, 9, so3),
}
EMBEDDINGS = ("orthogonal", "sine")


def embed(u: Array, ambient_dim: int, kind: str, generator: Generator) -> Array:
    r"""Points of R^m in R^D.

    Args:
        u: shape (N, m).
        ambient_dim: D, at least m for "orthogonal".
        kind: "orthogonal": a random isometry, whose image spans only m dimensions (a first PCA layer would undo it).
            "sine": :math:`\sqrt{2/D} \sin(W u + b)` with normal W of standard deviation 1.5 and uniform b: no isometry,
            and the image spans all D dimensions.
        generator: of the embedding.
    """
    m = u.shape[1]
    if kind == "orthogonal":
        frame, _ = np.linalg.qr(generator.standard_normal((ambient_dim, m)))
        return u @ frame.T
    weight = 1.5 * generator.standard_normal((m, ambient_dim))
    phase = generator.uniform(0.0, 2.0 * math.pi, ambient_dim)
    embedded: Array = math.sqrt(2.0 / ambient_dim) * np.sin(u @ weight + phase)
    return embedded
