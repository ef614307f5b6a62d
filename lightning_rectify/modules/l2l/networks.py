"""What stands between pixels and logits: normalization inside the model, and the wide residual network."""

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_rectify.arguments import check_fraction, check_least, check_types
from lightning_rectify.modules.image_networks import build_network
from lightning_rectify.nn.dropout import Dropout


class PixelClassifier(nn.Module):
    """A classifier of images in pixel units: it normalizes them itself, so that attacks and epsilon need not know.

    Args:
        network: maps normalized images (N, C, H, W) to logits (N, K).
        mean: of each channel, (C,), or of all, in pixel units; None for 0.
        std: the same for the standard deviation, above 0; None for 1.

    Raises:
        ValueError: if a standard deviation is not above 0.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        network: nn.Module,
        mean: Sequence[float] | float | None = None,
        std: Sequence[float] | float | None = None,
    ) -> None:
        check_types(PixelClassifier, locals())
        super().__init__()
        self.network = network
        self._normalizes = mean is not None or std is not None
        constants = {"mean": 0.0 if mean is None else mean, "std": 1.0 if std is None else std}
        for name, value in constants.items():
            self.register_buffer(name, torch.as_tensor(value, dtype=torch.get_default_dtype()).reshape(-1, 1, 1))
        if not self.mean.numel() or not bool(self.mean.isfinite().all()):
            raise ValueError(f"Expected argument `mean` to be finite, one number or one a channel, but got {mean!r}.")
        if not self.std.numel() or not bool(((self.std > 0) & self.std.isfinite()).all()):
            raise ValueError(f"Expected argument `std` to be finite and above 0 but got {std!r}.")

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, K) of images (N, C, H, W) in pixel units."""
        return self.network((images - self.mean) / self.std if self._normalizes else images)


def build_classifier(name: str, num_classes: int, in_channels: int = 3, **kwargs: Any) -> nn.Module:
    """Build a classifier by name.

    Args:
        name: "wrn_34_10" and other depths and widths of :class:`WideResNet`, or a name of ``build_network``
            ("small_cnn", "resnet20", any torchvision classification model).
        num_classes: number of classes K.
        in_channels: channels C.
        **kwargs: of the network's constructor.

    Raises:
        ValueError: if there is no network of this name, or it has no such arguments.

    Example:
        >>> network = build_classifier("wrn_16_4", num_classes=10)
        >>> round(sum(p.numel() for p in network.parameters()) / 1e6, 2)
        2.75
    """
    check_types(build_classifier, locals())
    check_least(1, num_classes=num_classes, in_channels=in_channels)
    match = re.fullmatch(r"wrn_(\d{1,3})_(\d{1,2})", name)
    if match is None:
        return build_network(name, num_classes, in_channels, **kwargs)
    try:
        return WideResNet(int(match[1]), int(match[2]), num_classes, in_channels, **kwargs)
    except TypeError as error:
        raise ValueError(
            f"Expected argument `network_args` to fit network {name!r} but got {kwargs}: {error}."
        ) from error


class WideResNet(nn.Module):
    """The wide residual network for 32x32 images (Zagoruyko and Komodakis 2016, arXiv:1605.07146, Table 1).

    A 3x3 convolution to 16 channels; three groups of n blocks with 16 k, 32 k and 64 k channels (the second and third
    start with stride 2); normalization, ReLU, the mean over the image and a linear layer. A block is normalization,
    ReLU, 3x3 convolution, twice; where the width changes, the shortcut is a 1x1 convolution of the activated input.
    WRN-34-10 is what most work on adversarial training reports.

    Args:
        depth: 6 n + 4: 10, 16, 22, 28, 34, 40, ...
        width: factor k, at least 1.
        num_classes: number of classes K.
        in_channels: channels C of an image.
        dropout: probability of dropping a feature between a block's convolutions, in [0, 1).

    Raises:
        ValueError: for an argument outside its range.
    """

    def __init__(
        self, depth: int, width: int, num_classes: int = 10, in_channels: int = 3, dropout: float = 0.0
    ) -> None:
        check_types(WideResNet, locals())
        check_least(1, width=width, num_classes=num_classes, in_channels=in_channels)
        super().__init__()
        if depth < 10 or depth % 6 != 4:
            raise ValueError(f"Expected argument `depth` to be 6 n + 4, at least 10, but got {depth!r}.")
        check_fraction(dropout=dropout)
        self.stem = _conv3x3(in_channels, 16)
        blocks: list[nn.Module] = []
        channels = 16
        for group in range(3):
            for block in range((depth - 4) // 6):
                stride = 2 if group > 0 and block == 0 else 1
                blocks.append(_WideBlock(channels, 16 * width * 2**group, stride, dropout))
                channels = 16 * width * 2**group
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.BatchNorm2d(channels)
        self.head = nn.Linear(channels, num_classes)
        nn.init.zeros_(self.head.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, K) of images (N, C, H, W)."""
        features = torch.relu(self.norm(self.blocks(self.stem(images))))
        return self.head(features.mean(dim=(2, 3)))


class _WideBlock(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, stride: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(in_channels)
        self.residual = nn.Sequential(
            _conv3x3(in_channels, out_channels, stride),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(),
            Dropout(dropout) if dropout else nn.Identity(),
            _conv3x3(out_channels, out_channels),
        )
        self.shortcut: nn.Conv2d | None = None
        if in_channels != out_channels or stride != 1:
            self.shortcut = nn.Conv2d(in_channels, out_channels, kernel_size=1, stride=stride, bias=False)
            nn.init.kaiming_normal_(self.shortcut.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Features (N, C', H', W') of (N, C, H, W)."""
        active = torch.relu(self.norm(x))
        return self.residual(active) + (x if self.shortcut is None else self.shortcut(active))


def _conv3x3(in_channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
    conv = nn.Conv2d(in_channels, out_channels, kernel_size=3, stride=stride, padding=1, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return conv
