"""The set an attack may search: a ball of radius epsilon around each image, cut by the bounds of pixels."""

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

Norm = Literal["linf", "l2"]


@dataclass(frozen=True)
class Ball:
    """The points within epsilon of each image, in a norm over all of its pixels, and inside the bounds.

    Points are held inside in exact arithmetic: x + epsilon may round to a float further away than epsilon, so the
    limits are rounded towards the image.

    Args:
        images: the centres x, shape (N, C, H, W), inside the bounds.
        epsilon: radius in pixel units.
        norm: "linf" or "l2".
        low: least value of each pixel, shape (N, C, H, W).
        high: largest value of each pixel, shape (N, C, H, W).
    """

    images: Tensor
    epsilon: float
    norm: Norm
    low: Tensor
    high: Tensor

    @classmethod
    def around(cls, images: Tensor, epsilon: float, norm: Norm, bounds: tuple[float, float]) -> "Ball":
        """The ball around images; arguments as in the class, ``bounds`` the least and the largest pixel value."""
        if norm == "linf":
            radius = torch.full_like(images, epsilon)
            if float(torch.tensor(epsilon, dtype=images.dtype)) > epsilon:  # float32(0.1) is above 0.1
                radius = torch.nextafter(radius, torch.zeros_like(radius))
            low, high = (shifted(images, way).clamp(*bounds) for way in (-radius, radius))
        else:
            low, high = (torch.full_like(images, bound) for bound in bounds)
        return cls(images, epsilon, norm, low, high)

    def project(self, points: Tensor) -> Tensor:
        """Points of shape (N, C, H, W) moved into the ball and the bounds; those inside stay bit-equal.

        In linf it is the nearest point of both; in l2 the nearest of the ball and then of the bounds, which is inside
        both because the image is.
        """
        if self.norm == "l2":
            norm = _l2(points.double() - self.images.double())
            rounding = 4.0 * torch.finfo(points.dtype).eps  # of offset, factor and product, with room to spare
            factor = (self.epsilon / norm.clamp_min(1e-300) * (1.0 - rounding)).to(points.dtype)
            shrunk = shifted(self.images, (points - self.images) * factor)
            points = torch.where(norm > self.epsilon, shrunk, points)
        return points.clamp(self.low, self.high)

    def ascend(self, points: Tensor, gradient: Tensor, step_size: float | Tensor) -> Tensor:
        """Points after the steepest step of a length in this norm, not projected; a zero gradient makes none.

        Args:
            points: shape (N, C, H, W).
            gradient: shape (N, C, H, W); values that are not a number count as 0.
            step_size: length, one for all or shape (N, 1, 1, 1).
        """
        gradient = gradient.nan_to_num()
        if self.norm == "linf":
            return points + step_size * gradient.sign()
        # By the largest value first: squares of a small gradient underflow.
        gradient = gradient / gradient.abs().amax((1, 2, 3), keepdim=True).clamp_min(torch.finfo(gradient.dtype).tiny)
        return points + step_size * gradient / _l2(gradient).clamp_min(0.5)  # the norm is 0 or at least 1

    def start(self, share: float, generator: torch.Generator | None) -> Tensor:
        """Uniform in the ball of ``share`` times the radius, then moved into the bounds; the images if ``share`` is 0.

        Args:
            share: in [0, 1].
            generator: draws on its own device; None: torch's of the images' device.
        """
        if share == 0.0:
            return self.images.clone()
        if self.norm == "linf":
            offset = (2.0 * uniform(self.images, generator) - 1.0) * (share * self.epsilon)
        else:
            # Uniform in a ball of d dimensions: a uniform direction at a radius u^(1/d).
            direction = normal(self.images, generator)
            radius = uniform(self.images[:, :1, :1, :1], generator) ** (1.0 / max(math.prod(self.images.shape[1:]), 1))
            offset = direction / _l2(direction).clamp_min(1e-12) * radius * (share * self.epsilon)
        return self.project(self.images + offset)

    def starting_at(self, points: Tensor) -> Tensor:
        """Points to start at, moved into the ball and the bounds.

        Raises:
            ValueError: if they have not the images' shape.
        """
        if points.shape != self.images.shape:
            raise ValueError(
                f"Expected argument `start` to be of shape {tuple(self.images.shape)}, the images', but got "
                f"{tuple(points.shape)}."
            )
        return self.project(points.detach().to(self.images))

    def select(self, index: Tensor) -> "Ball":
        """The balls of some samples; ``index`` has shape (n,)."""
        return replace(self, images=self.images[index], low=self.low[index], high=self.high[index])


def shifted(images: Tensor, offset: Tensor) -> Tensor:
    """Images plus an offset, rounded towards the image, so that no pixel moves further than the offset says."""
    moved = images + offset
    too_far = (moved.double() - images.double()).abs() > offset.double().abs()
    return torch.where(too_far, torch.nextafter(moved, images), moved)


def uniform(like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Uniform numbers in [0, 1) of a tensor's shape, dtype and device, drawn on the generator's device."""
    device = like.device if generator is None else generator.device
    return torch.rand(like.shape, dtype=like.dtype, device=device, generator=generator).to(like.device)


def normal(like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Standard normal numbers of a tensor's shape, dtype and device, drawn on the generator's device."""
    device = like.device if generator is None else generator.device
    return torch.randn(like.shape, dtype=like.dtype, device=device, generator=generator).to(like.device)


def _l2(values: Tensor) -> Tensor:
    return values.square().sum((1, 2, 3), keepdim=True).sqrt()
