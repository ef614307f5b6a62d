"""Generators and discriminators of the paper: the CNN of SN-GAN, and residual networks, for 32 and 48 pixels.

Sizes and order of layers are those of the authors' code of arXiv:1812.10912 (experiments). Nothing here controls a
spectrum: that is done to a discriminator's layers afterwards, by ``lightning_rectify.nn.spectral``.

A generator maps latents (B, L) to images (B, C, H, W) in [-1, 1], a discriminator images to scores (B,), high for
real ones. Built with ``num_classes``, both also take labels, int64, shape (B,).
"""

import math
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from lightning_rectify.arguments import check_choice, check_least
from lightning_rectify.modules.spectral_gan._blocks import (
    ConditionalNorm,
    DownBlock,
    Norm,
    UpBlock,
    glorot,
    start_generator,
)


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
    """A generator and a discriminator that fit each other.

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

    Example:
        >>> generator, discriminator = build_networks("cnn", generator_width=16, discriminator_width=16)
        >>> images = generator(torch.zeros(2, 128))
        >>> images.shape, discriminator(images).shape
        (torch.Size([2, 3, 32, 32]), torch.Size([2]))
    """
    check_choice(("cnn", "resnet"), network=name)
    check_least(1, generator_width=generator_width, discriminator_width=discriminator_width)
    common: dict[str, Any] = {"image_size": image_size, "in_channels": in_channels, "num_classes": num_classes}
    ours: dict[str, Any] = {"norm": norm}
    if generator_width is not None:
        ours["width"] = generator_width
    if latent_size is not None:
        ours["latent_size"] = latent_size
    theirs = {} if discriminator_width is None else {"width": discriminator_width}
    if name == "cnn":
        return CNNGenerator(**common, **ours), CNNDiscriminator(**common, **theirs)
    return ResNetGenerator(**common, **ours), ResNetDiscriminator(**common, **theirs)


class _Network(nn.Module):
    """What all four share: the checked arguments, and labels where, and only where, they are wanted."""

    def __init__(self, image_size: int, in_channels: int, width: int, num_classes: int | None) -> None:
        super().__init__()
        if image_size not in (32, 48):
            raise ValueError(f"Expected argument `image_size` to be 32 or 48 but got {image_size}.")
        check_least(1, in_channels=in_channels, width=width, num_classes=num_classes)
        self.image_size, self.in_channels, self.num_classes = image_size, in_channels, num_classes
        self.bottom = image_size // 8  # the side of the smallest feature map

    def _image_shape(self) -> tuple[int, int, int]:
        return self.in_channels, self.image_size, self.image_size

    def _check(self, name: str, inputs: Tensor, shape: tuple[int, ...], labels: Tensor | None) -> None:
        """Inputs of this shape, beside the batch; labels where, and only where, there are classes."""
        if inputs.shape[1:] != shape:
            raise ValueError(
                f"Expected argument `{name}` to be of shape (B, {', '.join(map(str, shape))}) but got "
                f"{tuple(inputs.shape)}."
            )
        if (labels is None) != (self.num_classes is None):
            wanted = "None" if self.num_classes is None else f"class numbers below {self.num_classes}"
            came = "None" if labels is None else f"a tensor of shape {tuple(labels.shape)}"
            raise ValueError(f"Expected argument `labels` to be {wanted} but got {came}.")
        if labels is not None and labels.shape != inputs.shape[:1]:  # a single label would silently stand for all
            raise ValueError(
                f"Expected argument `labels` to be of shape ({inputs.shape[0]},) but got {tuple(labels.shape)}."
            )


class CNNGenerator(_Network):
    """Linear layer to a 4x4 (6x6) map, three transposed convolutions that double it, one that does not, and tanh.

    Each of the first four is followed by normalisation and ReLU. The first batch norm has statistics of its own at each
    position of the map, as in the authors' code; so has its scale and shift without classes, one of a channel with
    them. Weights are drawn from N(0, 0.02^2), as theirs; without normalisation, which would undo so small a scale, from
    N(0, 2/inputs) (He et al. 2015, arXiv:1502.01852): images would all be grey. Biases are 0.

    Args:
        image_size: 32 or 48.
        in_channels: channels C of an image.
        width: channels of the first map; then a half, a quarter and an eighth of it, at least 1.
        latent_size: length L of a latent vector; the paper's are uniform in [-1, 1].
        num_classes: K for class-conditional normalisation (:class:`ConditionalNorm`), None for none.
        norm: "batch", "group" or "none"; with the last two an image does not depend on its batch.

    Raises:
        ValueError: for an argument outside its range.

    Example:
        >>> CNNGenerator(width=8, num_classes=10)(torch.zeros(4, 128), torch.arange(4)).shape
        torch.Size([4, 3, 32, 32])
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
        check_least(1, latent_size=latent_size)
        self.latent_size, self.norm = latent_size, norm
        widths = [max(1, width // 2**i) for i in range(4)]
        self.stem = nn.Linear(latent_size, widths[0] * self.bottom**2)
        self.norms = nn.ModuleList(
            ConditionalNorm(channels, num_classes, norm, positions=None if i else self.bottom**2)
            for i, channels in enumerate(widths)
        )
        self.ups = nn.ModuleList(
            nn.ConvTranspose2d(a, b, kernel_size=4, stride=2, padding=1) for a, b in pairwise(widths)
        )
        self.head = nn.ConvTranspose2d(widths[-1], in_channels, kernel_size=3, padding=1)
        start_generator(self, norm)

    def forward(self, latents: Tensor, labels: Tensor | None = None) -> Tensor:
        """Images (B, C, H, W) in [-1, 1] of latents (B, L) and, for conditional networks, labels (B,).

        Raises:
            ValueError: for latents of another size, a single one in training with batch normalisation, and for labels
                that are missing, not wanted or of another number.
        """
        self._check("latents", latents, (self.latent_size,), labels)
        if self.training and len(latents) == 1 and self.norm == "batch":
            raise ValueError(
                "Expected argument `latents` to hold two latent vectors at least, in training with batch normalisation "
                "of each position, but got 1: take a larger `batch_size` or `norm` 'group'."
            )
        x = self.stem(latents).unflatten(1, (-1, self.bottom, self.bottom))
        x = torch.relu(self.norms[0](x, labels))
        for up, norm in zip(self.ups, self.norms[1:], strict=True):
            x = torch.relu(norm(up(x), labels))
        return torch.tanh(self.head(x))


class CNNDiscriminator(_Network):
    """Seven convolutions with leaky ReLU (slope 0.2), three of them halving the image, and a linear layer.

    3x3 and 4x4 kernels in turn: channels width/8, width/4 twice, width/2 twice, width twice (the paper's: 64 to 512).
    No normalisation. Weights are Glorot-uniform, biases 0: at the paper's width scores are as large as from the
    N(0, 0.02^2) of the authors' baselines, which in a network of width 16 would make scores of 1e-9.

    With classes, the score gains the inner product of the linear layer's input and a vector of the class.

    Args:
        image_size: 32 or 48.
        in_channels: channels C of an image.
        width: channels of the last convolutions.
        num_classes: K for the projection form (Miyato and Koyama 2018, arXiv:1802.05637), None for none.

    Raises:
        ValueError: for an argument outside its range.
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
        self.apply(glorot)

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        """Scores (B,) of images (B, C, H, W) and, for conditional networks, labels (B,).

        Raises:
            ValueError: for images of another size, and for labels that are missing, not wanted or of another number.
        """
        self._check("images", images, self._image_shape(), labels)
        return _score(self.features(images).flatten(1), self.head, self.classes, labels)


class ResNetGenerator(_Network):
    """Linear layer to a 4x4 (6x6) map, ReLU, three residual blocks that double it, ReLU, normalisation, 3x3, tanh.

    The first ReLU, and the order of the last ReLU and normalisation, are of the authors' code. That last normalisation
    is not conditional (as in arXiv:1802.05637). Weights start as in :class:`CNNGenerator` (the authors' linear layer by
    their framework's default, its scale undone by the norms).

    Args:
        image_size: 32 or 48.
        in_channels: channels C of an image.
        width: channels of all maps.
        latent_size: length L of a latent vector; the paper's are normal.
        num_classes: K for class-conditional normalisation (:class:`ConditionalNorm`), None for none.
        norm: "batch", "group" or "none"; with the last two an image does not depend on its batch.

    Raises:
        ValueError: for an argument outside its range.
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
        check_least(1, latent_size=latent_size)
        self.latent_size = latent_size
        self.stem = nn.Linear(latent_size, width * self.bottom**2)
        self.blocks = nn.ModuleList(UpBlock(width, num_classes, norm) for _ in range(3))
        self.norm = ConditionalNorm(width, None, norm)
        self.head = nn.Conv2d(width, in_channels, kernel_size=3, padding=1)
        start_generator(self, norm)

    def forward(self, latents: Tensor, labels: Tensor | None = None) -> Tensor:
        """Images (B, C, H, W) in [-1, 1] of latents (B, L) and, for conditional networks, labels (B,).

        Raises:
            ValueError: for latents of another size, and for labels that are missing, not wanted or of another number.
        """
        self._check("latents", latents, (self.latent_size,), labels)
        x = torch.relu(self.stem(latents)).unflatten(1, (-1, self.bottom, self.bottom))
        for block in self.blocks:
            x = block(x, labels)
        return torch.tanh(self.head(self.norm(torch.relu(x))))


class ResNetDiscriminator(_Network):
    """Five residual blocks (three halve the image), ReLU, the sum over the image and a linear layer.

    That is one block more than SN-GAN's for CIFAR-10; it is what the authors ran. Weights are Glorot-uniform, by a
    factor of sqrt(2) larger in the blocks' 3x3 convolutions, as in the authors' baselines; biases are 0.

    Args:
        image_size: 32 or 48.
        in_channels: channels C of an image.
        width: channels of all maps.
        num_classes: K for the projection form (arXiv:1802.05637), None for none.

    Raises:
        ValueError: for an argument outside its range.
    """

    def __init__(
        self, image_size: int = 32, in_channels: int = 3, width: int = 128, num_classes: int | None = None
    ) -> None:
        super().__init__(image_size, in_channels, width, num_classes)
        self.blocks = nn.Sequential(
            DownBlock(in_channels, width, down=True, first=True),
            *(DownBlock(width, width, down=i < 2) for i in range(4)),
        )
        self.head = nn.Linear(width, 1)
        self.classes = None if num_classes is None else nn.Embedding(num_classes, width)
        self.apply(glorot)
        for layer in self.blocks.modules():
            if isinstance(layer, nn.Conv2d) and layer.kernel_size == (3, 3):
                nn.init.xavier_uniform_(layer.weight, math.sqrt(2.0))

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        """Scores (B,) of images (B, C, H, W) and, for conditional networks, labels (B,).

        Raises:
            ValueError: for images of another size, and for labels that are missing, not wanted or of another number.
        """
        self._check("images", images, self._image_shape(), labels)
        features = torch.relu(self.blocks(images)).sum(dim=(2, 3))
        return _score(features, self.head, self.classes, labels)


def _score(features: Tensor, head: nn.Module, classes: nn.Module | None, labels: Tensor | None) -> Tensor:
    score = head(features).squeeze(1)
    return score if classes is None else score + (classes(labels) * features).sum(dim=1)
