"""Networks of domain adaptation: those of the authors' code for digits, and the smaller ones of the two-stage way.

Images are (B, C, S, S), pixels about [0, 1]; both domains have one shape.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from lightning_rectify.arguments import check_choice, check_fraction, check_least
from lightning_rectify.nn.dropout import Dropout

Domain = Literal["source", "target"]
SMALLEST = 16


class DigitFeatures(nn.Module):
    """The authors' LeNet-like features: convolutions 20 (5x5), 50 (5x5), each max-pooled, then 500 and PReLU.

    The last convolution covers all that is left: 4x4 of 28 pixels as released, 1x1 of 16. With ``domains=2`` each
    domain has a first convolution of its own, as released; one serves both else.

    Args:
        in_channels: C.
        image_size: S, at least 16.
        width: F, the features, at least 1; 500 as released.
        domains: first convolutions, 1 or 2.
    """

    def __init__(self, in_channels: int = 1, image_size: int = 28, width: int = 500, domains: int = 1) -> None:
        super().__init__()
        check_least(1, in_channels=in_channels, classifier_width=width)
        check_least(SMALLEST, image_size=image_size)
        side = ((image_size - 4) // 2 - 4) // 2
        self.first = nn.ModuleList([nn.Conv2d(in_channels, 20, 5) for _ in range(domains)])
        self.shared = nn.Sequential(
            nn.MaxPool2d(2), nn.Conv2d(20, 50, 5), nn.MaxPool2d(2), nn.Conv2d(50, width, side), nn.PReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        )  # fmt: skip

    def forward(self, images: Tensor, domain: Domain = "target") -> Tensor:
        """Features (B, F) of images (B, C, S, S) of a domain."""
        return self.shared(self.first[-1 if domain == "target" else 0](images))


class DigitClassifier(nn.Module):
    """:class:`DigitFeatures` and a linear head.

    Args:
        num_classes: K, at least 2.
        in_channels: C.
        image_size: S, at least 16.
        width: of the features.
        dropout: probability of dropping a feature before the head, in [0, 1).
    """

    def __init__(
        self, num_classes: int = 10, in_channels: int = 1, image_size: int = 28, width: int = 500, dropout: float = 0.0
    ) -> None:
        super().__init__()
        check_least(2, num_classes=num_classes)
        check_fraction(dropout=dropout)
        self.features = DigitFeatures(in_channels, image_size, width)
        self.dropout = Dropout(dropout)
        self.head = nn.Linear(width, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, K) of images (B, C, S, S)."""
        return self.head(self.dropout(self.features(images)))


class DomainNetwork(nn.Module):
    """The one network of the authors' joint method: features, both critics and the classifier.

    Two first convolutions, else all shared; three linear heads on the features: a critic of each domain and the class.
    With ``critic_width`` the critics are perceptrons of one hidden layer (100 units, PReLU) as released for MNIST to
    MNIST-M. ``forward`` classifies images of the target.

    Args:
        num_classes: K, at least 2.
        in_channels: C.
        image_size: S, at least 16.
        width: of the features; 500 as released.
        critic_width: hidden units of the critics; 0 for none.
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_channels: int = 1,
        image_size: int = 28,
        width: int = 500,
        critic_width: int = 0,
    ) -> None:
        super().__init__()
        check_least(0, critic_width=critic_width)
        check_least(2, num_classes=num_classes)
        self.features = DigitFeatures(in_channels, image_size, width, domains=2)
        self.critic_source = _critic_head(width, critic_width)
        self.critic_target = _critic_head(width, critic_width)
        self.head = nn.Linear(width, num_classes)

    def scores(self, images: Tensor, domain: Domain) -> Tensor:
        """The domain's critic's scores (B,) of images (B, C, S, S), high for real ones."""
        head = self.critic_target if domain == "target" else self.critic_source
        return head(self.features(images, domain))[:, 0]

    def logits(self, images: Tensor, domain: Domain) -> Tensor:
        """Logits (B, K) of images (B, C, S, S) of a domain."""
        return self.head(self.features(images, domain))

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, K) of images (B, C, S, S) of the target."""
        return self.logits(images, "target")


def _critic_head(width: int, hidden: int) -> nn.Module:
    if not hidden:
        return nn.Linear(width, 1)
    return nn.Sequential(nn.Linear(width, hidden), nn.PReLU(), nn.Linear(hidden, 1))


class DigitPair(nn.Module):
    """The authors' generator of digit pairs: one trunk, and a last layer for each domain.

    Transposed convolutions 1024, 512, 256, 128 with batch norm without gains and PReLU, and a last one with a sigmoid:
    latents to pixels in [0, 1]. Sides 4, 7, 13, 25, then 28; other S start from ceil((S + 4) / 8).

    Args:
        in_channels: C.
        image_size: S, at least 16.
        latent_size: L, at least 1; 100 as released.
        width: channels of the first layer, a multiple of 8; 1024 as released, which a CPU takes seconds a step for.
        norm: "batch" as released, or "none".
    """

    def __init__(
        self,
        in_channels: int = 1,
        image_size: int = 28,
        latent_size: int = 100,
        width: int = 1024,
        norm: str = "batch",
    ) -> None:
        super().__init__()
        check_least(1, latent_size=latent_size)
        check_least(8, generator_width=width)
        check_least(SMALLEST, image_size=image_size)
        check_choice(("batch", "none"), norm=norm)
        if width % 8:
            raise ValueError(f"Expected argument `generator_width` to be a multiple of 8 but got {width!r}.")
        self.latent_size = latent_size
        base = -(-(image_size + 4) // 8)
        layers: list[nn.Module] = [nn.ConvTranspose2d(latent_size, width, base), *_norm(norm, width), nn.PReLU()]
        for _ in range(3):
            layers += [nn.ConvTranspose2d(width, width // 2, 3, stride=2, padding=1)]
            width //= 2
            layers += [*_norm(norm, width), nn.PReLU()]
        self.trunk = nn.Sequential(*layers)
        more = image_size - (8 * base - 7)
        kernel, padding = (more + 3, 1) if more >= 0 else (more + 7, 3)
        self.last = nn.ModuleList([nn.ConvTranspose2d(width, in_channels, kernel, padding=padding) for _ in range(2)])

    def forward(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """A source and a target image, (B, C, S, S) each, for latents (B, L)."""
        features = self.trunk(latents[:, :, None, None])
        return torch.sigmoid(self.last[0](features)), torch.sigmoid(self.last[1](features))


def _norm(norm: str, channels: int) -> list[nn.Module]:
    return [nn.BatchNorm2d(channels, affine=False)] if norm == "batch" else []


class ImageMap(nn.Module):
    r"""A random map of images, :math:`y = A x + r(x, z)`: a plan whose x are the data themselves.

    A is one affine change of coordinates for all images (zoom, shear, turn, shift; bilinear), r a network that goes
    down to a quarter of the side and up again, with z added at the bottom. Both start as nothing: y = x. Any plan with
    the data as its first marginal is the law of (X, T(X, Z)) for a T like this of enough capacity.

    Args:
        in_channels: C.
        image_size: S, a multiple of 4.
        latent_size: length L of z, at least 1.
        width: channels at the whole side, at least 1; twice and four times as many below.
        affine: whether A may change.
    """

    def __init__(
        self, in_channels: int = 1, image_size: int = 28, latent_size: int = 16, width: int = 16, affine: bool = True
    ) -> None:
        super().__init__()
        check_least(1, latent_size=latent_size, generator_width=width)
        check_least(SMALLEST, image_size=image_size)
        if image_size % 4:
            raise ValueError(f"Expected argument `image_size` to be a multiple of 4 but got {image_size!r}.")
        self.latent_size = latent_size
        self.affine = nn.Parameter(torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]), requires_grad=affine)
        self.top = nn.Sequential(nn.Conv2d(in_channels, width, 5, padding=2), nn.LeakyReLU(0.2))
        self.down = nn.Sequential(nn.Conv2d(width, 2 * width, 4, 2, 1), nn.LeakyReLU(0.2))
        self.bottom = nn.Sequential(nn.Conv2d(2 * width, 4 * width, 4, 2, 1), nn.LeakyReLU(0.2))
        self.latent = nn.Linear(latent_size, 4 * width)
        self.blocks = nn.ModuleList([_Block(4 * width) for _ in range(2)])
        self.up = nn.ConvTranspose2d(4 * width, 2 * width, 4, 2, 1)
        self.rise = nn.ConvTranspose2d(2 * width, width, 4, 2, 1)
        self.last = nn.Conv2d(width, in_channels, 3, padding=1)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)  # type: ignore[arg-type]

    def forward(self, images: Tensor, latents: Tensor) -> Tensor:
        """Images (B, C, S, S) carried to the target's side, with latents (B, L)."""
        if self.affine.requires_grad:
            grid = nn.functional.affine_grid(self.affine.expand(len(images), 2, 3), list(images.shape), False)
            images = nn.functional.grid_sample(images, grid.to(images), align_corners=False)
        top = self.top(images)
        down = self.down(top)
        bottom = self.bottom(down) + self.latent(latents)[:, :, None, None]
        for block in self.blocks:
            bottom = block(bottom)
        middle = nn.functional.leaky_relu(self.up(bottom) + down, 0.2)
        return images + self.last(nn.functional.leaky_relu(self.rise(middle) + top, 0.2))


class _Block(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(nn.functional.leaky_relu(self.first(x), 0.2))


class ImageCritic(nn.Module):
    """Two strided convolutions (4x4) and two linear layers: images (B, C, S, S) to scores (B,), high for real ones.

    No normalization: a penalty on each image's gradient is then of that image alone.

    Args:
        in_channels: C.
        image_size: S, a multiple of 4.
        width: channels of the first layer, at least 1.
    """

    def __init__(self, in_channels: int = 1, image_size: int = 28, width: int = 32) -> None:
        super().__init__()
        check_least(1, critic_width=width)
        side = image_size // 4
        self.layers = nn.Sequential(
            nn.Conv2d(in_channels, width, 4, 2, 1), nn.LeakyReLU(0.2),
            nn.Conv2d(width, 2 * width, 4, 2, 1), nn.LeakyReLU(0.2), nn.Flatten(),
            nn.Linear(2 * width * side**2, 4 * width), nn.LeakyReLU(0.2), nn.Linear(4 * width, 1, bias=False),
        )  # fmt: skip

    def forward(self, images: Tensor) -> Tensor:
        """Scores (B,)."""
        return self.layers(images)[:, 0]


def check_logits(network: nn.Module, shape: Sequence[int], num_classes: int) -> None:
    """Raise unless a user's classifier gives logits (B, K) of images (B, *shape).

    Raises:
        ValueError: if not.
    """
    anchor = next(network.parameters(), torch.zeros(()))
    modes = [(part, part.training) for part in network.modules()]
    network.eval()  # a batch norm's statistics are not to see zeros
    with torch.no_grad():
        logits = network(anchor.new_zeros(2, *shape))
    for part, mode in modes:
        part.training = mode
    if not isinstance(logits, Tensor) or logits.shape != (2, num_classes):
        got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f"Expected argument `classifier` to give logits of shape (B, {num_classes}) but got {got!r}.")
