"""What the networks are made of: conditional normalisation, residual blocks, how weights start."""

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_rectify.arguments import check_choice

Norm = Literal["batch", "group", "none"]


class ConditionalNorm(nn.Module):
    r"""Normalisation whose scale and shift belong to the class (Dumoulin et al. 2017, arXiv:1610.07629).

    .. math:: y = \gamma_c\, \mathrm{norm}(x) + \beta_c

    with :math:`\gamma_c` and :math:`\beta_c` of class c starting at 1 and 0. Without classes it is plain BatchNorm or
    GroupNorm; with ``norm="none"`` only the class's scale and shift are left.

    Args:
        channels: channels C of the features.
        num_classes: K, or None.
        norm: "batch", "group" (of at most 8 channels) or "none".
        positions: H W, for a batch norm with statistics of its own at each position; None for one of channels.

    Raises:
        ValueError: for another ``norm``.
    """

    def __init__(self, channels: int, num_classes: int | None, norm: Norm, positions: int | None = None) -> None:
        super().__init__()
        check_choice(("batch", "group", "none"), norm=norm)
        plain = num_classes is None
        self.flat = positions is not None and norm == "batch"
        self.norm: nn.Module
        if positions is not None and norm == "batch":
            self.norm = nn.BatchNorm1d(channels * positions, affine=plain)
        elif norm == "batch":
            self.norm = nn.BatchNorm2d(channels, affine=plain)
        elif norm == "group":
            groups = next(g for g in range((channels + 7) // 8, channels + 1) if channels % g == 0)
            self.norm = nn.GroupNorm(groups, channels, affine=plain)
        else:
            self.norm = nn.Identity()
        self.scale = self.shift = None
        if num_classes is not None:
            self.scale, self.shift = nn.Embedding(num_classes, channels), nn.Embedding(num_classes, channels)
            nn.init.ones_(self.scale.weight)
            nn.init.zeros_(self.shift.weight)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        """Features (B, C, H, W) of features and labels (B,)."""
        x = self.norm(x.flatten(1)).view_as(x) if self.flat else self.norm(x)
        if self.scale is not None and self.shift is not None:
            return x * self.scale(labels)[:, :, None, None] + self.shift(labels)[:, :, None, None]
        return x


class UpBlock(nn.Module):
    """Norm, ReLU, doubling, convolution, norm, ReLU, convolution; beside it doubling and a convolution."""

    def __init__(self, width: int, num_classes: int | None, norm: Norm) -> None:
        super().__init__()
        self.norms = nn.ModuleList(ConditionalNorm(width, num_classes, norm) for _ in range(2))
        self.convs = nn.ModuleList(nn.Conv2d(width, width, kernel_size=3, padding=1) for _ in range(2))
        self.shortcut = nn.Conv2d(width, width, kernel_size=3, padding=1)

    def forward(self, x: Tensor, labels: Tensor | None) -> Tensor:
        """Features (B, width, 2 H, 2 W) of features (B, width, H, W)."""
        y = self.convs[0](_double(torch.relu(self.norms[0](x, labels))))
        y = self.convs[1](torch.relu(self.norms[1](y, labels)))
        return y + self.shortcut(_double(x))


class DownBlock(nn.Module):
    """Two convolutions beside a shortcut; with ``down`` the image is halved by means at the end of both."""

    def __init__(self, in_channels: int, width: int, down: bool, first: bool = False) -> None:
        super().__init__()
        self.down, self.first = down, first
        self.convs = nn.Sequential(
            nn.Conv2d(in_channels, width, kernel_size=3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, width, kernel_size=3, padding=1),
        )
        self.shortcut: nn.Module = nn.Conv2d(in_channels, width, kernel_size=1) if down else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Features (B, width, H or H/2, W or W/2) of features (B, in_channels, H, W)."""
        # The first block sees images: no ReLU before its convolutions, and its shortcut works on the halved image.
        y = self.convs(x if self.first else torch.relu(x))
        if self.first:
            return F.avg_pool2d(y, 2) + self.shortcut(F.avg_pool2d(x, 2))
        y = y + self.shortcut(x)
        return F.avg_pool2d(y, 2) if self.down else y


def start_generator(generator: nn.Module, norm: Norm) -> None:
    """Draw weights from N(0, 0.02^2), without normalisation from N(0, 2/inputs); biases are set to 0.

    Args:
        generator: whose linear layers and convolutions are drawn anew.
        norm: what its layers are followed by.
    """
    for layer in generator.modules():
        if isinstance(layer, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)):
            nn.init.normal_(layer.weight, std=0.02 if norm != "none" else math.sqrt(2.0 / _inputs(layer)))
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def _inputs(layer: nn.Linear | nn.Conv2d | nn.ConvTranspose2d) -> float:
    """How many products an output adds up."""
    if isinstance(layer, nn.Linear):
        return layer.in_features
    products = layer.in_channels * math.prod(layer.kernel_size)
    return products / math.prod(layer.stride) if isinstance(layer, nn.ConvTranspose2d) else products


def glorot(layer: nn.Module) -> None:
    """Draw the weights of one layer uniformly by Glorot and Bengio 2010, set its bias to 0; for ``Module.apply``."""
    if isinstance(layer, (nn.Linear, nn.Conv2d, nn.Embedding)):
        nn.init.xavier_uniform_(layer.weight)
    if isinstance(layer, (nn.Linear, nn.Conv2d)) and layer.bias is not None:
        nn.init.zeros_(layer.bias)


def _double(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2, mode="nearest")
