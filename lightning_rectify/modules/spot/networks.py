"""Generators of pairs: latents (B, L) to x and y, trained by the game of arXiv:1905.00158.

A generator's network gives a tuple (x, y). :class:`PlanGenerator` around it gives both as one tensor, flat and joined,
shape (B, P + Q): one tensor is what can be exported, and what a density is of.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_rectify.arguments import check_choice, check_least
from lightning_rectify.modules.spot.ode import ODEPair

Share = Literal["trunk", "none"]
GeneratorNorm = Literal["batch", "group", "none"]


class PlanGenerator(nn.Module):
    """Any network of pairs, with its two answers flat and joined.

    Args:
        network: latents (B, L) to a tuple: x, shape (B, *shape_x), and y, shape (B, *shape_y).
        shape_x: of one x.
        shape_y: of one y.
    """

    def __init__(self, network: nn.Module, shape_x: Sequence[int], shape_y: Sequence[int]) -> None:
        super().__init__()
        self.network = network
        self.shape_x, self.shape_y = tuple(shape_x), tuple(shape_y)

    def forward(self, latents: Tensor) -> Tensor:
        """Pairs of latents (B, L), flat and joined, shape (B, P + Q)."""
        x, y = self.network(latents)
        return torch.cat([x.flatten(1), y.flatten(1)], dim=1)

    def split(self, joined: Tensor) -> tuple[Tensor, Tensor]:
        """x, shape (B, *shape_x), and y, shape (B, *shape_y), of what ``forward`` gives."""
        x, y = joined.split([math.prod(self.shape_x), math.prod(self.shape_y)], dim=1)
        return x.unflatten(1, self.shape_x), y.unflatten(1, self.shape_y)


class MLPPair(nn.Module):
    """Two smooth multilayer perceptrons, or one with two heads.

    Args:
        shape_x: of one x.
        shape_y: of one y.
        latent_size: length L of a latent.
        width: of each hidden layer, at least 1.
        depth: hidden layers, at least 1.
        share: "trunk" for one network up to the last layer, "none" for two. Every plan is within reach of both.
    """

    def __init__(
        self,
        shape_x: Sequence[int],
        shape_y: Sequence[int],
        latent_size: int,
        width: int = 64,
        depth: int = 2,
        share: Share = "trunk",
    ) -> None:
        super().__init__()
        self.shape_x, self.shape_y = tuple(shape_x), tuple(shape_y)
        self.trunk: nn.Module = _mlp_trunk(latent_size, width, depth)
        self.trunk_y: nn.Module = nn.Identity() if share == "trunk" else _mlp_trunk(latent_size, width, depth)
        self.shared = share == "trunk"
        self.head_x = nn.Linear(width, math.prod(self.shape_x))
        self.head_y = nn.Linear(width, math.prod(self.shape_y))

    def forward(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """X and y of latents (B, L)."""
        features = self.trunk(latents)
        features_y = features if self.shared else self.trunk_y(latents)
        return self.head_x(features).unflatten(1, self.shape_x), self.head_y(features_y).unflatten(1, self.shape_y)


def _mlp_trunk(size: int, width: int, depth: int) -> nn.Sequential:
    sizes = [size, *[width] * depth]
    layers: list[nn.Module] = []
    for into, out in pairwise(sizes):
        layers += [nn.Linear(into, out), nn.SiLU()]
    return nn.Sequential(*layers)


class DCGANPair(nn.Module):
    """Two DCGAN generators of images in [-1, 1], or one with two last layers.

    Transposed convolutions of 4 x 4 that double the side, from 4 up, each with a norm and ReLU, and tanh at the end;
    channels halve from ``width`` * side / 8 down to ``width``. The authors' code of arXiv:1905.00158 has two separate
    ones ("none") of 64 x 64 pixels, width 64, L = 100 and batch norm, all weights from N(0, 0.02^2) (gains of the
    norm N(1, 0.02^2)).

    Args:
        shape_x: (C, S, S) of one x, S a power of two, at least 8.
        shape_y: (C', S, S) of one y, the same S where the trunk is shared.
        latent_size: length L of a latent.
        width: channels before the last layer, at least 1.
        share: "trunk" for one network up to the last layer, "none" for two.
        norm: "batch", "group" (of at most 8 channels) or "none".

    Raises:
        ValueError: for another shape.
    """

    def __init__(
        self,
        shape_x: Sequence[int],
        shape_y: Sequence[int],
        latent_size: int = 100,
        width: int = 64,
        share: Share = "none",
        norm: GeneratorNorm = "batch",
    ) -> None:
        super().__init__()
        side_x, side_y = image_side("shape_x", shape_x), image_side("shape_y", shape_y)
        if share == "trunk" and side_x != side_y:
            raise ValueError(
                f"Expected argument `share` to be 'none' for images of {side_x} and {side_y} pixels but got 'trunk'."
            )
        self.shared = share == "trunk"
        self.trunk: nn.Module = _dcgan_trunk(side_x, latent_size, width, norm)
        self.trunk_y: nn.Module = nn.Identity() if self.shared else _dcgan_trunk(side_y, latent_size, width, norm)
        self.head_x = nn.ConvTranspose2d(width, shape_x[0], 4, stride=2, padding=1, bias=False)
        self.head_y = nn.ConvTranspose2d(width, shape_y[0], 4, stride=2, padding=1, bias=False)
        self.apply(dcgan_start)

    def forward(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Images x and y in [-1, 1] of latents (B, L)."""
        latents = latents[:, :, None, None]
        features = self.trunk(latents)
        features_y = features if self.shared else self.trunk_y(latents)
        return torch.tanh(self.head_x(features)), torch.tanh(self.head_y(features_y))


def _dcgan_trunk(side: int, latent_size: int, width: int, norm: GeneratorNorm) -> nn.Sequential:
    """Latents (B, L, 1, 1) to features (B, width, S / 2, S / 2)."""
    channels = width * side // 8
    layers: list[nn.Module] = [nn.ConvTranspose2d(latent_size, channels, 4, bias=False), make_norm(norm, channels)]
    layers.append(nn.ReLU())
    while channels > width:
        layers += [nn.ConvTranspose2d(channels, channels // 2, 4, 2, 1, bias=False), make_norm(norm, channels // 2)]
        layers.append(nn.ReLU())
        channels //= 2
    return nn.Sequential(*layers)


def image_side(name: str, shape: Sequence[int]) -> int:
    """The side S of images of this shape.

    Args:
        name: of the argument, for the message.
        shape: (C, S, S).

    Raises:
        ValueError: unless S is a power of two and at least 8.
    """
    if len(shape) != 3 or shape[1] != shape[2] or shape[1] < 8 or shape[1] & (shape[1] - 1):
        raise ValueError(
            f"Expected argument `{name}` for a network of images to be [C, S, S], S a power of two and at least 8, but "
            f"got {list(shape)}."
        )
    return shape[1]


def make_norm(norm: str, channels: int) -> nn.Module:
    """A normalization of features (B, C, H, W): "batch", "group" (of at most 8 channels) or "none"."""
    if norm == "batch":
        return nn.BatchNorm2d(channels)
    if norm == "group":
        groups = next(g for g in range((channels + 7) // 8, channels + 1) if channels % g == 0)
        return nn.GroupNorm(groups, channels)
    return nn.Identity()


def dcgan_start(layer: nn.Module) -> None:
    """Start a layer as DCGAN's are: weights N(0, 0.02^2), gains of a batch norm N(1, 0.02^2)."""
    if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)):
        nn.init.normal_(layer.weight, 0.0, 0.02)
    elif isinstance(layer, nn.BatchNorm2d):
        nn.init.normal_(layer.weight, 1.0, 0.02)
        nn.init.zeros_(layer.bias)


def build_generator(
    network: str | nn.Module,
    shape_x: Sequence[int],
    shape_y: Sequence[int],
    latent_size: int,
    width: int = 64,
    depth: int = 2,
    share: Share = "trunk",
    norm: GeneratorNorm = "batch",
    ode: Mapping[str, Any] | None = None,
) -> PlanGenerator:
    """A generator of pairs by name, or around a network of the user's.

    Args:
        network: "mlp", "dcgan", "ode" (which has a density), or latents (B, L) to a tuple of x and y.
        shape_x: of one x.
        shape_y: of one y.
        latent_size: length L of a latent.
        width: of the hidden layers, or channels before the DCGAN's last layer.
        depth: hidden layers of the "mlp" and of the "ode"'s field.
        share: "trunk" or "none"; not read by the "ode", one flow of both.
        norm: of the "dcgan".
        ode: more arguments of :class:`~lightning_rectify.modules.spot.ode.ODEPair`: method, steps, rtol, atol, trace,
            adjoint.

    Raises:
        ValueError: for an argument outside its range or unknown, and for a network that gives other shapes.

    Example:
        >>> generator = build_generator("mlp", (2,), (3,), latent_size=5)
        >>> generator(torch.zeros(4, 5)).shape
        torch.Size([4, 5])
    """
    check_least(1, latent_size=latent_size, width=width, depth=depth)
    check_choice(("trunk", "none"), share=share)
    check_choice(("batch", "group", "none"), norm=norm)
    _check_ode(network, dict(ode or {}), latent_size, math.prod(shape_x) + math.prod(shape_y))
    if isinstance(network, nn.Module):
        return PlanGenerator(_checked(network, shape_x, shape_y, latent_size), shape_x, shape_y)
    make: dict[str, Callable[[], nn.Module]] = {
        "mlp": lambda: MLPPair(shape_x, shape_y, latent_size, width, depth, share),
        "dcgan": lambda: DCGANPair(shape_x, shape_y, latent_size, width, share, norm),
        "ode": lambda: ODEPair(shape_x, shape_y, width, depth, **(ode or {})),
    }
    check_choice(make, generator=network)
    return PlanGenerator(make[network](), shape_x, shape_y)


def _check_ode(network: str | nn.Module, ode: dict[str, Any], latent_size: int, size: int) -> None:
    known = ("method", "steps", "rtol", "atol", "trace", "adjoint")
    if ode and (network != "ode" or set(ode) - set(known)):
        raise ValueError(
            f"Expected argument `ode` to be None, or for the generator 'ode' some of {', '.join(known)}, but got "
            f"{ode!r} for {network!r}."
        )
    if network == "ode" and latent_size != size:
        raise ValueError(
            f"Expected argument `latent_size` of the generator 'ode', a flow, to be the number of numbers in x and y, "
            f"{size}, or None, but got {latent_size!r}."
        )


def _checked(network: nn.Module, shape_x: Sequence[int], shape_y: Sequence[int], latent_size: int) -> nn.Module:
    anchor = next(network.parameters(), torch.zeros(()))
    modes = [(part, part.training) for part in network.modules()]
    network.eval()  # a batch norm's statistics are not to see zeros
    with torch.no_grad():
        pair = network(anchor.new_zeros(2, latent_size))
    for part, mode in modes:
        part.training = mode
    shapes = [tuple(part.shape[1:]) for part in pair] if isinstance(pair, (tuple, list)) else type(pair).__name__
    if shapes != [tuple(shape_x), tuple(shape_y)]:
        raise ValueError(
            f"Expected argument `generator` to give a tuple of x, shape (B, *{tuple(shape_x)}), and y, shape "
            f"(B, *{tuple(shape_y)}), but got {shapes}."
        )
    return network
