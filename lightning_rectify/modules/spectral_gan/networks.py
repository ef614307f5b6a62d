"""Generators and discriminators of the paper: the CNN of SN-GAN, and residual networks, for 32 and 48 pixels."""

from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Norm = Literal["batch", "group", "none"]


def build_networks(
    name: str,
    image_size: int = 32,
    in_channels: int = 3,
    generator_width: int | None = None,
    discriminator_width: int | None = None,
    latent_size: int | None = None,
    num_classes: int | None = None,
    norm: Norm = "batch",
) -> tuple[nn.Module, nn.Module]:
    """A generator and its discriminator.

    Args:
        name: "cnn" or "resnet".
        image_size: 32 or 48.
        in_channels: channels C of an image.
        generator_width: channels of the generator's widest layer; None for the paper's (512, or 256 for "resnet").
        discriminator_width: the same of the discriminator (512, or 128 for "resnet").
        latent_size: length L of a latent vector; None for the paper's (128, or 256 for "resnet").
        num_classes: K for the conditional networks, None for those without labels.
        norm: of the generator.

    Raises:
        ValueError: for an argument outside its range.
    """
    if name not in ("cnn", "resnet"):
        raise ValueError(f"Expected argument `network` to be 'cnn' or 'resnet' but got {name!r}.")
    widths = {"generator_width": generator_width, "discriminator_width": discriminator_width}
    for argument, value in widths.items():
        if value is not None and value < 1:
            raise ValueError(f"Expected argument `{argument}` to be at least 1 but got {value}.")
    common: dict[str, Any] = {"image_size": image_size, "in_channels": in_channels, "num_classes": num_classes}
    if name == "cnn":
        return (
            CNNGenerator(width=generator_width or 512, latent_size=latent_size or 128, norm=norm, **common),
            CNNDiscriminator(width=discriminator_width or 512, **common),
        )
    return (
        ResNetGenerator(width=generator_width or 256, latent_size=latent_size or 256, norm=norm, **common),
        ResNetDiscriminator(width=discriminator_width or 128, **common),
    )


class _Network(nn.Module):
    """What all four share: the checked arguments, and labels where, and only where, they are wanted."""

    def __init__(self, image_size: int, in_channels: int, width: int, num_classes: int | None) -> None:
        super().__init__()
        if image_size not in (32, 48):
            raise ValueError(f"Expected argument `image_size` to be 32 or 48 but got {image_size}.")
        lowest = {"in_channels": in_channels, "width": width, "num_classes": 1 if num_classes is None else num_classes}
        for name, value in lowest.items():
            if value < 1:
                raise ValueError(f"Expected argument `{name}` to be at least 1 but got {value}.")
        self.image_size, self.in_channels, self.num_classes = image_size, in_channels, num_classes
        self.bottom = image_size // 8  # the side of the smallest feature map

    def check_labels(self, labels: Tensor | None) -> None:
        """Labels are wanted exactly by conditional networks.

        Raises:
            ValueError: if they are missing or not wanted.
        """
        if (labels is None) != (self.num_classes is None):
            wanted = "None" if self.num_classes is None else f"class numbers below {self.num_classes}"
            raise ValueError(
                f"Expected argument `labels` to be {wanted} but got {labels if labels is None else 'some'}."
            )


class ConditionalNorm(nn.Module):
    """Normalisation whose scale and shift belong to the class (Dumoulin et al. 2017, arXiv:1610.07629).

    Without classes it is plain BatchNorm or GroupNorm; with ``norm="none"`` only the class's scale and shift are left.

    Args:
        channels: of the features.
        num_classes: K, or None.
        norm: "batch", "group" (of at most 8 channels) or "none".

    Raises:
        ValueError: for another ``norm``.
    """

    def __init__(self, channels: int, num_classes: int | None, norm: Norm) -> None:
        super().__init__()
        plain = num_classes is None
        if norm == "batch":
            self.norm: nn.Module = nn.BatchNorm2d(channels, affine=plain)
        elif norm == "group":
            groups = next(g for g in range((channels + 7) // 8, channels + 1) if channels % g == 0)
            self.norm = nn.GroupNorm(groups, channels, affine=plain)
        elif norm == "none":
            self.norm = nn.Identity()
        else:
            raise ValueError(f"Expected argument `norm` to be 'batch', 'group' or 'none' but got {norm!r}.")
        self.scale = self.shift = None
        if num_classes is not None:
            self.scale, self.shift = nn.Embedding(num_classes, channels), nn.Embedding(num_classes, channels)
            nn.init.ones_(self.scale.weight)
            nn.init.zeros_(self.shift.weight)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        """Features (B, C, H, W) of features and labels (B,)."""
        x = self.norm(x)
        if self.scale is not None and self.shift is not None:
            return x * self.scale(labels)[:, :, None, None] + self.shift(labels)[:, :, None, None]
        return x


class CNNGenerator(_Network):
    """Linear layer to a 4x4 (6x6) map, three transposed convolutions that double it, one more, and tanh.

    Weights are drawn from N(0, 0.02^2), as in the authors' code. Their first batch norm is over the flattened map's
    features, one by one; here it is over channels, as in SN-GAN.

    Args:
        image_size: 32 or 48.
        in_channels: channels C of an image.
        width: channels of the first map; then a half, a quarter and an eighth of it, at least 1.
        latent_size: length L of a latent vector.
        num_classes: K for class-conditional normalisation, None for none.
        norm: "batch", "group" or "none".
    """

    def __init__(
        self,
        image_size: int = 32,
        in_channels: int = 3,
        width: int = 512,
        latent_size: int = 128,
        num_classes: int | None = None,
        norm: Norm = "batch",
    ) -> None:
        super().__init__(image_size, in_channels, width, num_classes)
        self.latent_size = _checked_latent(latent_size)
        widths = [max(1, width // 2**i) for i in range(4)]
        self.stem = nn.Linear(latent_size, widths[0] * self.bottom**2)
        self.norms = nn.ModuleList(ConditionalNorm(channels, num_classes, norm) for channels in widths)
        self.ups = nn.ModuleList(
            nn.ConvTranspose2d(a, b, kernel_size=4, stride=2, padding=1) for a, b in pairwise(widths)
        )
        self.head = nn.Conv2d(widths[-1], in_channels, kernel_size=3, padding=1)
        self.apply(_normal_weights)

    def forward(self, latents: Tensor, labels: Tensor | None = None) -> Tensor:
        """Images (B, C, H, W) in [-1, 1] of latents (B, L) and, for conditional networks, labels (B,)."""
        self.check_labels(labels)
        x = self.stem(latents).unflatten(1, (-1, self.bottom, self.bottom))
        x = torch.relu(self.norms[0](x, labels))
        for up, norm in zip(self.ups, self.norms[1:], strict=True):
            x = torch.relu(norm(up(x), labels))
        return torch.tanh(self.head(x))


class CNNDiscriminator(_Network):
    """Seven convolutions with leaky ReLU (slope 0.2), three of them halving the image, and a linear layer.

    3x3 and 4x4 kernels in turn: channels width/8, width/4 twice, width/2 twice, width twice (the paper's: 64 to 512).
    No normalisation. Weights are Xavier-uniform, biases 0.

    Args:
        image_size: 32 or 48.
        in_channels: channels C of an image.
        width: channels of the last convolutions.
        num_classes: K for the projection form (Miyato and Koyama 2018, arXiv:1802.05637), None for none.
    """

    def __init__(
        self, image_size: int = 32, in_channels: int = 3, width: int = 512, num_classes: int | None = None
    ) -> None:
        super().__init__(image_size, in_channels, width, num_classes)
        a, b, c, d = (max(1, width // 2**i) for i in (3, 2, 1, 0))
        layers: list[nn.Module] = []
        channels = in_channels
        for i, outputs in enumerate((a, b, b, c, c, d, d)):
            kernel, stride = (4, 2) if i % 2 else (3, 1)
            layers += [nn.Conv2d(channels, outputs, kernel, stride, padding=1), nn.LeakyReLU(0.2)]
            channels = outputs
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(d * self.bottom**2, 1)
        self.classes = None if num_classes is None else nn.Embedding(num_classes, d * self.bottom**2)
        self.apply(_xavier_weights)

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        """Scores (B,) of images (B, C, H, W) and, for conditional networks, labels (B,)."""
        self.check_labels(labels)
        return _score(self.features(images).flatten(1), self.head, self.classes, labels)


class ResNetGenerator(_Network):
    """Linear layer to a 4x4 (6x6) map, three residual blocks that double it, ReLU, normalisation, convolution, tanh.

    The order of the last ReLU and normalisation is the authors'.

    Args:
        image_size: 32 or 48.
        in_channels: channels C of an image.
        width: channels of all maps.
        latent_size: length L of a latent vector.
        num_classes: K for class-conditional normalisation, None for none.
        norm: "batch", "group" or "none".
    """

    def __init__(
        self,
        image_size: int = 32,
        in_channels: int = 3,
        width: int = 256,
        latent_size: int = 256,
        num_classes: int | None = None,
        norm: Norm = "batch",
    ) -> None:
        super().__init__(image_size, in_channels, width, num_classes)
        self.latent_size = _checked_latent(latent_size)
        self.stem = nn.Linear(latent_size, width * self.bottom**2)
        self.blocks = nn.ModuleList(_UpBlock(width, num_classes, norm) for _ in range(3))
        self.norm = ConditionalNorm(width, num_classes, norm)
        self.head = nn.Conv2d(width, in_channels, kernel_size=3, padding=1)
        self.apply(_normal_weights)

    def forward(self, latents: Tensor, labels: Tensor | None = None) -> Tensor:
        """Images (B, C, H, W) in [-1, 1] of latents (B, L) and, for conditional networks, labels (B,)."""
        self.check_labels(labels)
        x = self.stem(latents).unflatten(1, (-1, self.bottom, self.bottom))
        for block in self.blocks:
            x = block(x, labels)
        return torch.tanh(self.head(self.norm(torch.relu(x), labels)))


class ResNetDiscriminator(_Network):
    """Five residual blocks (three halve the image), ReLU, the sum over the image and a linear layer.

    That is one block more than SN-GAN's for CIFAR-10; it is what the authors ran. Weights are Xavier-uniform, biases 0.

    Args:
        image_size: 32 or 48.
        in_channels: channels C of an image.
        width: channels of all maps.
        num_classes: K for the projection form (arXiv:1802.05637), None for none.
    """

    def __init__(
        self, image_size: int = 32, in_channels: int = 3, width: int = 128, num_classes: int | None = None
    ) -> None:
        super().__init__(image_size, in_channels, width, num_classes)
        self.blocks = nn.Sequential(
            _DownBlock(in_channels, width, down=True, first=True),
            *(_DownBlock(width, width, down=i < 2) for i in range(4)),
        )
        self.head = nn.Linear(width, 1)
        self.classes = None if num_classes is None else nn.Embedding(num_classes, width)
        self.apply(_xavier_weights)

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        """Scores (B,) of images (B, C, H, W) and, for conditional networks, labels (B,)."""
        self.check_labels(labels)
        features = torch.relu(self.blocks(images)).sum(dim=(2, 3))
        return _score(features, self.head, self.classes, labels)


class _UpBlock(nn.Module):
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


class _DownBlock(nn.Module):
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


def _score(features: Tensor, head: nn.Module, classes: nn.Module | None, labels: Tensor | None) -> Tensor:
    score = head(features).squeeze(1)
    return score if classes is None else score + (classes(labels) * features).sum(dim=1)


def _double(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2, mode="nearest")


def _checked_latent(size: int) -> int:
    if size < 1:
        raise ValueError(f"Expected argument `latent_size` to be at least 1 but got {size}.")
    return size


def _normal_weights(layer: nn.Module) -> None:
    if isinstance(layer, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)):
        nn.init.normal_(layer.weight, std=0.02)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)


def _xavier_weights(layer: nn.Module) -> None:
    if isinstance(layer, (nn.Linear, nn.Conv2d)):
        nn.init.xavier_uniform_(layer.weight)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
