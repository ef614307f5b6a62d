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

from lightning_rectify.seeds import derive_seed

Key = int | tuple[int, int]
Batch = tuple[Tensor, Tensor]

_SMALL = 96  # side up to which images on disk are treated as those in memory are
_CHUNK = 2**24  # pixels that are floats at one time while images are resized: 64 MiB


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


def resize(images: Tensor, size: int, scale: float = 255.0) -> Tensor:
    """Bring images to another side, bilinear with antialias, a few at a time.

    The images returned are in steps of 1 / 255 even if those given are not: resizing makes shades between theirs.

    Args:
        images: uint8, shape (N, C, H, W), values 0 to ``scale``.
        size: side S wanted, at least 1.
        scale: value of a fully lit pixel in ``images``; it is 255 in those returned.

    Returns:
        Images, uint8, shape (N, C, S, S), each value within half a step of the exact one.

    Example:
        >>> resize(torch.tensor([[[[0, 16]]]], dtype=torch.uint8), size=4, scale=16.0)[0, 0, 0]
        tensor([  0,  64, 191, 255], dtype=torch.uint8)
    """
    count, channels, height, width = images.shape
    resized = torch.empty(count, channels, size, size, dtype=torch.uint8)
    step = max(1, _CHUNK // (channels * max(height * width, size * size)))
    for start in range(0, count, step):
        some = images[start : start + step].to(torch.float32).mul_(255.0 / scale)
        some = F.interpolate(some, size=(size, size), mode="bilinear", antialias=True)
        resized[start : start + step] = some.round_().clamp_(0, 255)  # weights may sum to 1 + 1e-7
    return resized


def file_transforms(
    size: int, mean: Sequence[float], std: Sequence[float], flip: bool
) -> tuple[Callable[[Any], Tensor], Callable[[Any], Tensor]]:
    """Transforms from a PIL image to float32 (C, S, S), normalised: the plain one and the augmenting one.

    Args:
        size: side S. Up to 96 both resize, and the second crops and mirrors as :class:`ArrayImages` does. Above, the
            first cuts the centre out of a larger image and the second crops at random size and shape, and mirrors.
        mean: of each channel, for pixels in 0 to 1.
        std: the same, positive.
        flip: whether to mirror images of up to 96 pixels.
    """
    from torchvision.transforms import v2

    to_tensor = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(list(mean), list(std))]
    if size <= _SMALL:
        mirror = [v2.RandomHorizontalFlip()] if flip else []
        # The frame is added to the bytes, before they are normalised: black whatever the constants.
        crop = [v2.Resize((size, size)), v2.RandomCrop(size, padding=size // 8), *mirror]
        return v2.Compose([v2.Resize((size, size)), *to_tensor]), v2.Compose([*crop, *to_tensor])
    # with the customary margin: 256 pixels for a central crop of 224
    centre = [v2.Resize(round(size * 256 / 224)), v2.CenterCrop(size)]
    random = [v2.RandomResizedCrop(size), v2.RandomHorizontalFlip()]
    return v2.Compose([*centre, *to_tensor]), v2.Compose([*random, *to_tensor])


def as_count(size: int | float | None) -> int | float | None:
    """A number of samples as an integer; shares and None as they are.

    jsonargparse makes 500.0 of a YAML's 500 where another file of the same call had a share.
    """
    return int(size) if isinstance(size, float) and size >= 2 and size.is_integer() else size


def split(labels: Tensor, val_size: int | float, train_size: int | None, seed: int) -> tuple[Tensor, Tensor]:
    """Indices of the images to train on and of those to validate on, sorted.

    Args:
        labels: class of each image, shape (N,); a label of -1 counts as a class.
        val_size: a share (a float below 1) or a number.
        train_size: how many of the others to train on; None for all.
        seed: at least 0.

    Raises:
        ValueError: if there are too few images.
    """
    total = len(labels)
    number = round(val_size * total) if isinstance(val_size, float) else val_size
    if number >= total:
        raise ValueError(f"Expected argument `val_size` to be below {total}, all training images, but got {number}.")
    train, val = stratified_take(labels, number, seed)
    if train_size is not None:
        if train_size > len(train):
            raise ValueError(f"Expected argument `train_size` to be at most {len(train)} but got {train_size}.")
        train = train[stratified_take(labels[train], train_size, seed)[1]]
    return train, val


def _indices(keys: Sequence[Key]) -> Tensor:
    """Which images are asked for, int64, (B,)."""
    return torch.tensor([key[1] if isinstance(key, tuple) else key for key in keys])


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
        index = _indices(keys)
        images = self.images[index]
        if isinstance(first, tuple) and (self.pad or self.flip):
            images = self._augment(images, torch.from_numpy(self._draw(first[0])[index.numpy()]))
        return images.float().mul_(self.factor).sub_(self.shift), self.labels[index]

    def places(self, keys: Sequence[Key]) -> Tensor:
        """Indices of the images asked for, int64, (B,); with augmentation (B, 4): index, then where it put the image.

        Row and column are what the crop's first pixel is in the image, from -pad to pad, before the mirror (0 or 1).
        """
        index = _indices(keys)
        if not isinstance(keys[0], tuple) or not (self.pad or self.flip):
            return index
        drawn = torch.from_numpy(self._draw(keys[0][0])[index.numpy()])
        return torch.cat([index.unsqueeze(1), drawn - torch.tensor([self.pad, self.pad, 0])], dim=1)

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
            torch.manual_seed(derive_seed(self.seed, *key))
            return self.augment(image), torch.tensor(label)

    def __getitems__(self, keys: Sequence[Key]) -> Batch:
        """Images (B, C, H, W), float32, normalised, and labels (B,), int64."""
        images, labels = zip(*(self[key] for key in keys), strict=True)
        return torch.stack(images), torch.stack(labels)

    def places(self, keys: Sequence[Key]) -> Tensor:
        """Indices of the images asked for, int64, (B,); what augmentation does to them is not known."""
        return _indices(keys)


class PlacedImages(Dataset[tuple[Tensor, Tensor, Tensor]]):
    """Images, labels and :meth:`ArrayImages.places`: what is needed to remember something of each image's pixels.

    Args:
        images: the images.
    """

    def __init__(self, images: ArrayImages | FileImages) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: Key) -> tuple[Tensor, Tensor, Tensor]:
        """One image (C, H, W), its label () and its place, () or (4,)."""
        images, labels, places = self.__getitems__([key])
        return images[0], labels[0], places[0]

    def __getitems__(self, keys: Sequence[Key]) -> tuple[Tensor, Tensor, Tensor]:
        """Images (B, C, H, W), labels (B,) and places, (B,) or (B, 4)."""
        images, labels = self.images.__getitems__(keys)
        return images, labels, self.images.places(keys)
