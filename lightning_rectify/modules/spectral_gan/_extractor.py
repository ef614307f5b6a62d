"""What every feature extractor has in common."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class FeatureExtractor(nn.Module):
    """Base of the extractors: always in evaluation mode, without gradients, in float32 whatever autocast says.

    Subclasses set ``name`` (short, used in metric keys), ``num_features`` F, ``num_classes`` K (None if there are no
    logits) and ``channels`` (the numbers of channels they take), and write :meth:`extract`.
    """

    name: str
    num_features: int
    num_classes: int | None = None
    channels: tuple[int, ...] = (1, 3)

    @property
    def needs_training(self) -> bool:
        """Whether :meth:`prepare` must be called before the first use."""
        return False

    def prepare(self, images: Tensor, labels: Tensor | None = None) -> None:
        """Look at the training data; called before the first use. By default nothing is needed.

        Args:
            images: training images in [-1, 1], float, shape (N, C, H, W).
            labels: their classes, int64, shape (N,), or None where there are none.
        """

    def extract(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Features (B, F), and logits (B, K) or None, of float32 images (B, C, H, W); the network runs once."""
        raise NotImplementedError

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Features (B, F), and logits (B, K) or None, both float32, of images (B, C, H, W) in [-1, 1].

        Raises:
            ValueError: if images are not float, not four-dimensional, or have other channels than the extractor takes.
        """
        if images.ndim != 4 or images.shape[1] not in self.channels or not images.is_floating_point():
            raise ValueError(
                f"Expected argument `images` to be float, shape (B, C, H, W), with C in {self.channels} for extractor "
                f"{self.name!r} but got {images.dtype}, shape {tuple(images.shape)}."
            )
        with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
            return self.extract(images.float())

    def train(self, mode: bool = True) -> "FeatureExtractor":
        """Stay in evaluation mode, also when the module that uses the extractor is trained."""
        return super().train(False)


@contextmanager
def forked_seed(seed: int, device: torch.device | None = None) -> Iterator[None]:
    """Seed torch's generators of the CPU and of ``device`` for a while; afterwards they are as before.

    Not ``torch.manual_seed``, which would seed every other device for good.

    Args:
        seed: at least 0.
        device: a CUDA device whose generator is seeded as well; others are ignored.
    """
    cuda = [device] if device is not None and device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda):
        torch.random.default_generator.manual_seed(seed)
        for each in cuda:
            with torch.cuda.device(each):
                torch.cuda.manual_seed(seed)
        yield
