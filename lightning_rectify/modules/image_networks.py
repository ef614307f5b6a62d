"""Image classification networks by name: a small CNN, the CIFAR ResNets, and torchvision's."""

import difflib
import math
import re
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_rectify.arguments import check_choice, check_fraction, check_least, check_types
from lightning_rectify.nn.dropout import Dropout

Norm = Literal["batch", "group", "none"]


def build_network(name: str, num_classes: int, in_channels: int = 3, **kwargs: Any) -> nn.Module:
    """Build a network that maps images (B, C, H, W) to logits (B, K).

    Args:
        name: "small_cnn" (:class:`SmallCNN`), "resnet20" and the other depths 6 n + 2 of :class:`CifarResNet`, or
            any classification model of torchvision. Where both have the name (resnet50, resnet152) it is torchvision's.
        num_classes: number of classes K.
        in_channels: channels C. torchvision's models have three; one channel is then repeated.
        **kwargs: of the network's constructor; for torchvision also ``weights`` (whose number of classes must be K).

    Raises:
        ValueError: if there is no network of this name, or it has no such arguments.

    Example:
        >>> network = build_network("resnet20", num_classes=10)
        >>> sum(p.numel() for p in network.parameters())
        269722
    """
    check_types(build_network, locals())
    check_least(1, num_classes=num_classes, in_channels=in_channels)
    make = _constructor(name, in_channels)
    try:
        return make(num_classes=num_classes, **kwargs)
    except TypeError as error:
        raise ValueError(
            f"Expected argument `network_args` to fit network {name!r} but got {kwargs}: {error}."
        ) from error


def given_network(name: str, network: str | nn.Module, arguments: dict[str, Any] | None) -> nn.Module | None:
    """The network, if it was passed as an object; None if it is the name of one to be built with the arguments.

    Args:
        name: of the argument.
        network: what was passed.
        arguments: of the constructor, for one given by name.

    Raises:
        ValueError: for an object with arguments.
    """
    if not isinstance(network, nn.Module):
        return None
    if arguments:
        raise ValueError(
            f"Expected argument `{name}_args` to be None for a network passed as an object but got {arguments!r}."
        )
    return network


def _constructor(name: str, in_channels: int) -> Callable[..., nn.Module]:
    """What builds the network of this name when called with ``num_classes`` and its own arguments."""
    from torchvision import models

    theirs = models.list_models(module=models)
    if name == "small_cnn":
        return lambda **kwargs: SmallCNN(in_channels=in_channels, **kwargs)
    if name in theirs:
        return lambda **kwargs: _from_torchvision(name, in_channels, **kwargs)
    depth = int(match[1]) if (match := re.fullmatch(r"resnet(\d{1,4})", name)) else 0
    if depth >= 8 and depth % 6 == 2:
        return lambda **kwargs: CifarResNet(depth, in_channels=in_channels, **kwargs)
    ours = ["small_cnn", *(f"resnet{depth}" for depth in (20, 32, 44, 56, 110))]
    near = difflib.get_close_matches(name, [*ours, *theirs], n=5)
    raise ValueError(
        f"Expected argument `network` to be one of {', '.join(ours)} or a torchvision classification model but got "
        f"{name!r}. Near matches: {', '.join(near) or 'none'}."
    )


class SmallCNN(nn.Module):
    """Three stages of two 3x3 convolutions each, then the mean over the image and a linear layer.

    A convolution is followed by normalisation and ReLU; between stages, max-pooling halves the image and the width
    doubles. Images of 4x4 and more; 8x8 to 32x32 is what it is meant for.

    Args:
        num_classes: number of classes K.
        in_channels: channels C of an image.
        width: channels of the first stage, at least 1.
        norm: "batch", "group" (of at most 8 channels; does not depend on batch size or number of ranks) or "none".
        dropout: probability of dropping a feature before the linear layer, in [0, 1).

    Raises:
        ValueError: for an argument outside its range.
    """

    def __init__(
        self, num_classes: int, in_channels: int = 1, width: int = 32, norm: Norm = "batch", dropout: float = 0.0
    ) -> None:
        check_types(SmallCNN, locals())
        super().__init__()
        check_least(1, width=width)
        check_choice(("batch", "group", "none"), norm=norm)
        check_fraction(dropout=dropout)
        layers: list[nn.Module] = []
        channels = in_channels
        for stage in range(3):
            if stage > 0:
                layers.append(nn.MaxPool2d(2))
            for _ in range(2):
                layers += _conv_block(channels, width * 2**stage, norm)
                channels = width * 2**stage
        self.features = nn.Sequential(*layers)
        self.dropout = Dropout(dropout)
        self.head = nn.Linear(channels, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, K) of images (B, C, H, W)."""
        return self.head(self.dropout(self.features(images).mean(dim=(2, 3))))


def _conv_block(in_channels: int, out_channels: int, norm: Norm) -> list[nn.Module]:
    conv = nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1, bias=norm == "none")
    nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
    if norm == "batch":
        return [conv, nn.BatchNorm2d(out_channels), nn.ReLU()]
    if norm == "group":
        return [conv, nn.GroupNorm(out_channels // math.gcd(8, out_channels), out_channels), nn.ReLU()]
    return [conv, nn.ReLU()]


class CifarResNet(nn.Module):
    """The residual network for 32x32 images of He et al. 2015 (arXiv:1512.03385), section 4.2.

    A 3x3 convolution to 16 channels, three stages of n blocks with 16, 32 and 64 channels (the second and third start
    with stride 2), the mean over the image and a linear layer: 6 n + 2 layers with weights. Shortcuts have no
    parameters (option A: every second pixel, new channels zero), convolutions no bias.

    Args:
        depth: 6 n + 2: 20, 32, 44, 56, 110, ...
        num_classes: number of classes K.
        in_channels: channels C of an image.

    Raises:
        ValueError: if ``depth`` is not 6 n + 2 with n at least 1.
    """

    def __init__(self, depth: int, num_classes: int = 10, in_channels: int = 3) -> None:
        check_types(CifarResNet, locals())
        super().__init__()
        if depth < 8 or depth % 6 != 2:
            raise ValueError(f"Expected argument `depth` to be 6 n + 2, at least 8, but got {depth}.")
        self.stem = nn.Sequential(_conv3x3(in_channels, 16), nn.BatchNorm2d(16), nn.ReLU())
        blocks: list[nn.Module] = []
        channels = 16
        for width in (16, 32, 64):
            for _ in range((depth - 2) // 6):
                blocks.append(_ResidualBlock(channels, width))
                channels = width
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(64, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, K) of images (B, C, H, W)."""
        return self.head(self.blocks(self.stem(images)).mean(dim=(2, 3)))


class _ResidualBlock(nn.Module):
    """Two convolutions beside a shortcut; more channels out than in means half the image."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.new_channels = out_channels - in_channels
        self.stride = 2 if self.new_channels else 1
        self.residual = nn.Sequential(
            _conv3x3(in_channels, out_channels, self.stride),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(),
            _conv3x3(out_channels, out_channels),
            nn.BatchNorm2d(out_channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Features (B, C', H', W') of features (B, C, H, W)."""
        shortcut = x
        if self.new_channels:
            shortcut = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.new_channels))
        return torch.relu(shortcut + self.residual(x))


def _conv3x3(in_channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
    conv = nn.Conv2d(in_channels, out_channels, kernel_size=3, stride=stride, padding=1, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return conv


def _from_torchvision(name: str, in_channels: int, num_classes: int, **kwargs: Any) -> nn.Module:
    from torchvision import models

    if in_channels not in (1, 3):
        raise ValueError(
            f"Expected argument `in_channels` to be 1 or 3 for torchvision's {name} but got {in_channels}."
        )
    if name in ("googlenet", "inception_v3") and kwargs.get("weights") is None:
        # Their auxiliary heads would make forward return several logits while training.
        kwargs = {"aux_logits": False, "init_weights": True, **kwargs}
    network = models.get_model(name, weights=kwargs.pop("weights", None), num_classes=num_classes, **kwargs)
    return network if in_channels == 3 else _Greyscale(network)


class _Greyscale(nn.Module):
    """A network for three channels, given one."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, K) of images (B, 1, H, W)."""
        return self.network(images.expand(-1, 3, -1, -1))
