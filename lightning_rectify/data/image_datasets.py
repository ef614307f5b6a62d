"""Two kinds of labelled images, in memory and on disk, that make whole batches and hold no random state.

A key ``(epoch, index)`` asks for training images: their augmentation is a function of seed, epoch and index, so it does
not depend on workers, ranks, batch size or a restart. A plain index asks for the image as it is.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

Key = int | tuple[int, int]
Batch = tuple[Tensor, Tensor]


def pairs(batch: Batch) -> Batch:
    """The ``collate_fn`` of datasets that return whole batches: nothing is left to do."""
    return batch


def stratified_take(labels: Tensor, size: int, seed: int) -> tuple[Tensor, Tensor]:
    """Take ``size`` samples at random, each class in proportion to its share (to within one sample).

    Samples are shuffled, sorted by class and taken at even distances.

    Args:
        labels: class of each sample, shape (N,).
        size: 0 to N.
        seed: at least 0.

    Returns:
        Sorted indices of the samples left, shape (N - size,), and of those taken, shape (size,).

    Example:
        >>> left, taken = stratified_take(torch.tensor([0, 0, 0, 0, 1, 1]), size=3, seed=0)
        >>> len(left), len(taken), int((taken > 3).sum())
        (3, 3, 1)
    """
    shuffled = np.random.default_rng(seed).permutation(len(labels))
    by_class = shuffled[np.argsort(labels.numpy()[shuffled], kind="stable")]
    chosen = np.zeros(len(labels), dtype=bool)
    chosen[((np.arange(size) + 0.5) * len(labels) / max(size, 1)).astype(int)] = True
    return torch.from_numpy(np.sort(by_class[~chosen])), torch.from_numpy(np.sort(by_class[chosen]))


class ArrayImages(Dataset[Batch]):
    """Images in memory as one tensor of bytes; a batch is cut, augmented and normalised in a few tensor operations.

    Augmentation is a crop of the image's own size out of the image with ``pad`` black pixels on each side, then,
    with ``flip``, a mirror image for one in two.

    Args:
        images: uint8, shape (N, C, H, W).
        labels: int64, shape (N,).
        mean: of each channel, in units of ``scale``.
        std: of each channel, in the same units, positive.
        scale: value of a fully lit pixel.
        pad: at least 0.
        flip: whether to mirror.
        seed: of the augmentation.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        mean: Sequence[float],
        std: Sequence[float],
        scale: float = 255.0,
        pad: int = 0,
        flip: bool = False,
        seed: int = 0,
    ) -> None:
        self.images, self.labels = images, labels
        deviation = torch.tensor(std).view(-1, 1, 1)
        self.factor, self.shift = 1 / (scale * deviation), torch.tensor(mean).view(-1, 1, 1) / deviation
        self.pad, self.flip, self.seed = pad, flip, seed
        self._drawn: tuple[int, NDArray[np.int64]] | None = None  # epoch, (N, 3): row, column, mirror

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: Key) -> Batch:
        """One image (C, H, W), float32, and its label ()."""
        images, labels = self.__getitems__([key])
        return images[0], labels[0]

    def __getitems__(self, keys: Sequence[Key]) -> Batch:
        """Images (B, C, H, W), float32, normalised, and labels (B,), int64; ``keys`` are of one kind and epoch."""
        first = keys[0]
        index = torch.tensor([key[1] if isinstance(key, tuple) else key for key in keys])
        images = self.images[index]
        if isinstance(first, tuple) and (self.pad or self.flip):
            images = self._augment(images, torch.from_numpy(self._draw(first[0])[index.numpy()]))
        return images.float().mul_(self.factor).sub_(self.shift), self.labels[index]

    def _draw(self, epoch: int) -> NDArray[np.int64]:
        """Offsets and mirrorings of all N images, (N, 3): one generator an image would cost more than the batch."""
        if self._drawn is None or self._drawn[0] != epoch:
            high = [2 * self.pad + 1, 2 * self.pad + 1, 1 + self.flip]
            self._drawn = epoch, np.random.default_rng([self.seed, epoch]).integers(0, high, (len(self), 3))
        return self._drawn[1]

    def _augment(self, images: Tensor, drawn: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        row, column, mirror = drawn.unsqueeze(-1).unbind(1)  # each (B, 1)
        rows = row + torch.arange(height)
        columns = column + torch.where(mirror > 0, torch.arange(width - 1, -1, -1), torch.arange(width))
        padded = F.pad(images, [self.pad] * 4)
        batch, channel = torch.arange(len(images)), torch.arange(images.shape[1])
        return padded[
            batch[:, None, None, None], channel[None, :, None, None], rows[:, None, :, None], columns[:, None, None, :]
        ]


class FileImages(Dataset[Batch]):
    """Images on disk, decoded and transformed one by one.

    Args:
        images: an ``ImageFolder`` or another dataset of (PIL image, label) pairs.
        indices: which of them, shape (N,).
        transform: for plain indices: from a PIL image to float32 (C, H, W).
        augment: the same for training keys; draws from torch's global generator, which is seeded for each image and
            put back afterwards. None uses ``transform``.
        seed: of the augmentation, at least 0.
    """

    def __init__(
        self,
        images: Any,
        indices: Tensor,
        transform: Callable[[Any], Tensor],
        augment: Callable[[Any], Tensor] | None = None,
        seed: int = 0,
    ) -> None:
        self.images, self.indices = images, indices
        self.transform, self.augment, self.seed = transform, augment, seed

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, key: Key) -> Batch:
        """One image (C, H, W), float32, and its label ()."""
        index = key[1] if isinstance(key, tuple) else key
        image, label = self.images[int(self.indices[index])]
        if not isinstance(key, tuple) or self.augment is None:
            return self.transform(image), torch.tensor(label)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(np.random.SeedSequence([self.seed, *key]).generate_state(1, np.uint64)[0] >> 1))
            return self.augment(image), torch.tensor(label)

    def __getitems__(self, keys: Sequence[Key]) -> Batch:
        """Images (B, C, H, W), float32, normalised, and labels (B,), int64."""
        images, labels = zip(*(self[key] for key in keys), strict=True)
        return torch.stack(images), torch.stack(labels)
