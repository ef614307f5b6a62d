"""What ``manifold_scaling.py`` approximates: four manifolds in R^D, a function on each, and points to judge it by."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_rectify.modules.manifold import Manifold, ParametricManifold, Sphere, Torus

TEST = 10_000  # points of the supremum


@dataclass(frozen=True)
class Target:
    """A function on a manifold in R^D.

    Attributes:
        name: of the manifold.
        dim: d.
        manifold: in R^D.
        place: own coordinates (N, m) to points (N, D).
        f: points (N, D) to values (N,).
        draw: N own coordinates, random.
        dense: own coordinates of the test points: a grid of a curve, random ones of a surface.
    """

    name: str
    dim: int
    manifold: Manifold
    place: Callable[[Tensor], Tensor]
    f: Callable[[Tensor], Tensor]
    draw: Callable[[int, torch.Generator], Tensor]

    def test_points(self, count: int = TEST) -> Tensor:
        """Points (N, D), the same own coordinates whatever D is."""
        if self.dim > 1:
            return self.place(self.draw(count, torch.Generator().manual_seed(0)))
        angle = torch.arange(count, dtype=torch.float64)[:, None] * (2 * math.pi / count)
        return self.place(angle if self.name == "moment curve" else torch.cat([angle.cos(), angle.sin()], 1))


def on_circle(u: Tensor) -> Tensor:
    """(sin 3u_0 + u_0 u_1 + 0.3 cos 4u_1) / 1.6 of points (N, 2 or more)."""
    return ((3 * u[:, 0]).sin() + u[:, 0] * u[:, 1] + 0.3 * (4 * u[:, 1]).cos()) / 1.6


def on_surface(u: Tensor) -> Tensor:
    """(sin(2 u_0) exp(u_2 / 2) + u_1 u_2) / 1.6 of points (N, 3)."""
    return ((2 * u[:, 0]).sin() * (0.5 * u[:, 2]).exp() + u[:, 1] * u[:, 2]) / 1.6


def target(name: str, ambient_dim: int) -> Target:
    """The circle, sphere or torus (radii 1 and 0.5) by a random isometry, or a curve that spans all of R^D.

    Args:
        name: "circle", "sphere", "torus" or "moment curve".
        ambient_dim: D; even for the moment curve.
    """
    if name == "moment curve":
        return moment_curve(ambient_dim)
    own = {"circle": on_circle, "sphere": on_surface, "torus": on_surface}[name]
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(ambient_dim, 2 if name == "circle" else 3, generator=generator, dtype=torch.float64)
    frame = torch.linalg.qr(normal).Q
    manifold: Manifold = Torus(frame=frame) if name == "torus" else Sphere(1 if name == "circle" else 2, frame=frame)
    return Target(
        name,
        manifold.dim,
        manifold,
        place=lambda u: u @ frame.t(),
        f=lambda x: own(x @ frame),
        draw=_torus if name == "torus" else lambda n, generator: _unit(n, frame.shape[1], generator),
    )


def moment_curve(ambient_dim: int) -> Target:
    r"""Coordinates :math:`\cos(ka)/k^2, \sin(ka)/k^2`, k = 1 to D/2; f = (sin 2a + 0.5 cos 3a) / 1.5.

    No linear map to fewer dimensions keeps it. Its curvature grows with D, as :math:`\sqrt D`.
    """
    k = torch.arange(1, ambient_dim // 2 + 1, dtype=torch.float64)

    def place(a: Tensor) -> Tensor:
        return torch.cat([(a * k).cos(), (a * k).sin()], 1) / k.square().repeat(2)

    def f(x: Tensor) -> Tensor:
        cos, sin = x[:, 0], x[:, len(k)]
        return (2 * sin * cos + 0.5 * (4 * cos**3 - 3 * cos)) / 1.5

    def draw(count: int, generator: torch.Generator) -> Tensor:
        return 2 * math.pi * torch.rand(count, 1, generator=generator, dtype=torch.float64)

    return Target("moment curve", 1, ParametricManifold(place, [(0.0, 2 * math.pi)]), place, f, draw)


def _unit(count: int, dim: int, generator: torch.Generator) -> Tensor:
    normal = torch.randn(count, dim, generator=generator, dtype=torch.float64)
    return normal / normal.norm(dim=1, keepdim=True)


def _torus(count: int, generator: torch.Generator) -> Tensor:
    a, b = 2 * math.pi * torch.rand(2, count, generator=generator, dtype=torch.float64)
    ring = 1.0 + 0.5 * b.cos()
    return torch.stack([ring * a.cos(), ring * a.sin(), 0.5 * b.sin()], 1)
