r"""Known manifolds in R^D with exact tangent charts: what a network is constructed on.

The chart at c with tangent basis V is :math:`x \mapsto y = V^\top(x - c)`; its inverse, the lift, is needed only while
a network is built. Lengths are in the units of the embedding.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from lightning_rectify.arguments import check_above, check_least, check_types
from lightning_rectify.modules.manifold.sampling import farthest_points, reach_of


class Manifold(ABC):
    """A compact manifold in R^D whose tangent projections can be inverted.

    Attributes:
        dim: d, its own dimension.
        ambient_dim: D.
        reach: tau, in lengths of R^D (arXiv:1908.01842, definition 2).
    """

    dim: int
    ambient_dim: int
    reach: float

    @abstractmethod
    def points(self, spacing: float) -> tuple[Tensor, float]:
        """Points (M, D) on a grid of the parameters, about ``spacing`` apart, and their fill distance.

        The fill distance is an upper bound of the distance of any point of the manifold from the nearest of them.
        """

    @abstractmethod
    def tangent(self, x: Tensor) -> Tensor:
        """Orthonormal bases (M, D, d) of the tangent spaces at points (M, D)."""

    @abstractmethod
    def lift(self, centers: Tensor, bases: Tensor, y: Tensor) -> Tensor:
        """Points (C, M, D) of the manifold over tangent coordinates (C, M, d), differentiable in them.

        Args:
            centers: c, shape (C, D).
            bases: V, shape (C, D, d).
            y: coordinates, with a norm of at most ``lift_radius``.
        """

    @property
    @abstractmethod
    def lift_radius(self) -> float:
        """Norm of y up to which every chart can be inverted."""

    def centers(self, cover: float, points: Tensor, fill: float) -> Tensor:
        """Centres (C, D) of balls of radius ``cover`` that cover the manifold: farthest points of a grid.

        Args:
            cover: radius, more than ``fill``.
            points: a grid, shape (M, D), as from :meth:`points`.
            fill: its fill distance.
        """
        return points[farthest_points(points, cover - fill)]


class Sphere(Manifold):
    r"""The sphere of dimension d and radius R around the origin, isometrically in R^D; the circle for d = 1.

    Its lift is :math:`Vy + c\sqrt{1 - |y|^2/R^2}`, its reach R.

    Args:
        dim: d, at least 1.
        ambient_dim: D, at least d + 1; d + 1 if left out.
        radius: R, positive.
        frame: orthonormal columns, shape (D, d + 1); the first unit vectors if left out.

    Raises:
        ValueError: if an argument is out of its range.

    Example:
        >>> Sphere(1, 3).points(0.5)[0].shape
        torch.Size([13, 3])
    """

    def __init__(
        self, dim: int = 2, ambient_dim: int | None = None, radius: float = 1.0, frame: Tensor | None = None
    ) -> None:
        check_types(Sphere, locals())
        check_above(0, radius=radius)
        self.dim, self.radius, self.reach = dim, radius, radius
        self.frame = _frame(dim + 1, ambient_dim, frame)
        self.ambient_dim = self.frame.shape[0]

    def points(self, spacing: float) -> tuple[Tensor, float]:
        """A grid of polar angles; see :meth:`Manifold.points`."""
        step = spacing / self.radius
        around = math.ceil(2 * math.pi / step)
        last = torch.arange(around, dtype=torch.float64) * (2 * math.pi / around)
        unit = torch.stack([last.cos(), last.sin()], 1)
        half = math.pi / around
        steps = [half]
        for _ in range(self.dim - 1):
            polar = math.ceil(math.pi / step)
            angle = (torch.arange(polar, dtype=torch.float64) + 0.5) * (math.pi / polar)
            steps.append(math.pi / polar / 2)
            unit = torch.cat(
                [
                    angle.cos().repeat_interleave(len(unit))[:, None],
                    angle.sin().repeat_interleave(len(unit))[:, None] * unit.repeat(polar, 1),
                ],
                1,
            )
        # The metric of the angles is at most the flat one, and the chord at most the arc.
        return self.radius * unit @ self.frame.t(), self.radius * math.hypot(*steps)

    def tangent(self, x: Tensor) -> Tensor:
        """See :meth:`Manifold.tangent`."""
        return _complement((x @ self.frame)[:, :, None], self.frame)

    def centers(self, cover: float, points: Tensor, fill: float) -> Tensor:
        """See :meth:`Manifold.centers`; on a circle evenly spaced, which needs the fewest."""
        if self.dim > 1:
            return super().centers(cover, points, fill)
        # a chord of length `cover` is half the arc between two centres
        count = max(math.ceil(math.pi / (2.0 * math.asin(min(cover / (2.0 * self.radius), 1.0))) - 1e-9), 3)
        return self.points(2.0 * math.pi * self.radius / count * (1.0 + 1e-12))[0]

    def lift(self, centers: Tensor, bases: Tensor, y: Tensor) -> Tensor:
        """See :meth:`Manifold.lift`."""
        height = (1.0 - y.square().sum(-1, keepdim=True) / self.radius**2).sqrt()
        return y @ bases.mT + height * centers[:, None]

    @property
    def lift_radius(self) -> float:
        """A little less than R, where the derivatives of the root have no end."""
        return 0.98 * self.radius


class ParametricManifold(Manifold):
    r"""A manifold given by a smooth map of parameters; its lifts by Newton's method.

    Args:
        embedding: parameters (M, d) to points (M, D), differentiable by torch, each point from its own parameters.
        ranges: lowest and highest value of each parameter.
        reach: tau; estimated by Federer's formula on a grid if left out.
        lift_radius: as in :class:`Manifold`; 0.8 tau if left out.

    Raises:
        ValueError: if ``ranges`` is empty.
    """

    def __init__(
        self,
        embedding: Callable[[Tensor], Tensor],
        ranges: list[tuple[float, float]],
        reach: float | None = None,
        lift_radius: float | None = None,
    ) -> None:
        check_types(ParametricManifold, locals())
        check_above(0, reach=reach, lift_radius=lift_radius)
        if not ranges:
            raise ValueError("Expected argument `ranges` to hold at least one pair but got none.")
        if not all(-math.inf < low < high < math.inf for low, high in ranges):
            raise ValueError(f"Expected argument `ranges` to hold finite pairs, the lower first, but got {ranges!r}.")
        self.embedding, self.ranges, self.dim = embedding, ranges, len(ranges)
        self._known: tuple[Tensor, Tensor] = self._grid(60 if self.dim > 1 else 2000)
        self.ambient_dim = self._known[1].shape[1]
        jacobians = self.jacobian(self._known[0])
        self._stretch = jacobians.norm(dim=1).amax(0)  # (d,), largest speed along each parameter
        if reach is None:
            pick = torch.linspace(0, len(jacobians) - 1, min(len(jacobians), 600)).long()
            reach = reach_of(self._known[1][pick], torch.linalg.qr(jacobians[pick]).Q)
        self.reach = reach
        self._lift_radius = 0.8 * reach if lift_radius is None else lift_radius

    def jacobian(self, parameters: Tensor) -> Tensor:
        """Derivatives (M, D, d) of the embedding at parameters (M, d)."""

        def one(u: Tensor) -> Tensor:
            return self.embedding(u[None])[0]

        jacobians: Tensor = torch.func.vmap(torch.func.jacfwd(one))(parameters)
        return jacobians

    def points(self, spacing: float) -> tuple[Tensor, float]:
        """See :meth:`Manifold.points`; the bound uses the largest speeds seen on a grid."""
        counts = [
            max(math.ceil((high - low) * speed / spacing), 2)
            for (low, high), speed in zip(self.ranges, self._stretch.tolist(), strict=True)
        ]
        steps = [
            (high - low) / count * speed / 2
            for (low, high), count, speed in zip(self.ranges, counts, self._stretch.tolist(), strict=True)
        ]
        return self._grid(*counts)[1], math.hypot(*steps)

    def tangent(self, x: Tensor) -> Tensor:
        """See :meth:`Manifold.tangent`."""
        return torch.linalg.qr(self.jacobian(self.parameters(x))).Q

    def parameters(self, x: Tensor) -> Tensor:
        """Parameters (M, d) of points (M, D) of the manifold, by Gauss-Newton from the nearest point of a grid."""
        known, at = self._known
        u = known[torch.cdist(x, at).argmin(1)]
        for _ in range(12):
            u = u - torch.linalg.lstsq(self.jacobian(u), (self.embedding(u) - x)[:, :, None]).solution[:, :, 0]
        return u

    def lift(self, centers: Tensor, bases: Tensor, y: Tensor) -> Tensor:
        """See :meth:`Manifold.lift`."""
        charts, count, dim = y.shape
        start = self.parameters(centers)
        u = start[:, None].expand(charts, count, dim).reshape(-1, dim)

        def step(u: Tensor, target: Tensor) -> Tensor:
            residual = (self.embedding(u).view(charts, count, -1) - centers[:, None]) @ bases - target
            slopes = bases.mT[:, None] @ self.jacobian(u).view(charts, count, -1, dim)
            return u - torch.linalg.solve(slopes, residual[..., None])[..., 0].reshape(-1, dim)

        with torch.no_grad():
            for part in torch.linspace(0.25, 1.0, 4).tolist():  # from the centre outward, so that no step is too long
                for _ in range(6):
                    u = step(u, part * y)
        for _ in range(3):  # from the root on: each recorded step doubles the order of derivatives that are right
            u = step(u, y)
        return self.embedding(u).view(charts, count, -1)

    @property
    def lift_radius(self) -> float:
        """As given, else 0.8 tau."""
        return self._lift_radius

    def _grid(self, *counts: int) -> tuple[Tensor, Tensor]:
        counts = counts if len(counts) == self.dim else counts * self.dim
        # cell middles, so that the ends of a period do not meet and each cell has its point
        axes = [
            low + (high - low) * (torch.arange(count, dtype=torch.float64) + 0.5) / count
            for (low, high), count in zip(self.ranges, counts, strict=True)
        ]
        parameters = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).reshape(-1, self.dim)
        return parameters, self.embedding(parameters)


class Torus(ParametricManifold):
    r"""The torus of revolution with radii R > r, isometrically in R^D; its reach is min(r, R - r).

    Args:
        ambient_dim: D, at least 3; 3 if left out.
        major: R.
        minor: r, in (0, R).
        frame: orthonormal columns, shape (D, 3); the first unit vectors if left out.

    Raises:
        ValueError: if an argument is out of its range.
    """

    def __init__(
        self, ambient_dim: int | None = None, major: float = 1.0, minor: float = 0.5, frame: Tensor | None = None
    ) -> None:
        check_types(Torus, locals())
        check_above(0, major=major)
        if not 0.0 < minor < major:
            raise ValueError(f"Expected argument `minor` to be in (0, major={major!r}) but got {minor!r}.")
        columns = _frame(3, ambient_dim, frame)

        def embedding(u: Tensor) -> Tensor:
            ring = major + minor * u[:, 1].cos()
            return torch.stack([ring * u[:, 0].cos(), ring * u[:, 0].sin(), minor * u[:, 1].sin()], 1) @ columns.t()

        super().__init__(embedding, [(0.0, 2 * math.pi)] * 2, reach=min(minor, major - minor))


def _frame(columns: int, ambient_dim: int | None, frame: Tensor | None) -> Tensor:
    check_least(1, dim=columns - 1)
    if frame is not None:
        frame = frame.to(torch.float64)
        close = frame.ndim == 2 and frame.shape[1] == columns and ambient_dim in (None, frame.shape[0])
        if not close or not (frame.t() @ frame - torch.eye(columns, dtype=torch.float64)).abs().max() <= 1e-8:
            raise ValueError(
                f"Expected argument `frame` to have {columns} orthonormal columns of length {ambient_dim or 'D'} but "
                f"got a tensor of shape {tuple(frame.shape)}."
            )
        return frame
    check_least(columns, ambient_dim=ambient_dim)
    return torch.eye(ambient_dim or columns, columns, dtype=torch.float64)


def _complement(normals: Tensor, frame: Tensor) -> Tensor:
    """Orthonormal bases of what is orthogonal to unit-free normals (M, k, 1) within a frame (D, k)."""
    return frame @ torch.linalg.qr(normals, mode="complete").Q[:, :, 1:]
