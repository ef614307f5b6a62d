"""Shuffled batches cut from tensors, for trainings that shall not pay for a sample at a time."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.utils.data import IterableDataset


class Batches(IterableDataset[tuple[Tensor, ...]]):
    """Each pass is in an order of its own; a last batch that is not full is left out.

    Nothing is drawn from the global random state.

    Args:
        images: shape (N, C, H, W).
        labels: shape (N,).
        batch_size: of every batch.
        seed: of the order, and of ``augment``.
        augment: changes the images of a batch, drawing from the generator; returns them and where they were put, int64,
            (B, 3): row and column of the first pixel in the image, and 1 for a mirror image.
        with_index: batches have a third part, as ``ImageData``'s: indices (B,), or (B, 4) with that.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        batch_size: int,
        seed: int,
        augment: Callable[[Tensor, torch.Generator], tuple[Tensor, Tensor]] | None = None,
        with_index: bool = False,
    ) -> None:
        self.images, self.labels, self.batch_size, self.augment = images, labels, batch_size, augment
        self.with_index = with_index
        self.generator = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return len(self.images) // self.batch_size

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        order = torch.randperm(len(self.images), generator=self.generator)
        for index in order[: len(self) * self.batch_size].split(self.batch_size):
            images, places = self.images[index], index
            if self.augment is not None:
                images, put = self.augment(images, self.generator)
                places = torch.cat([index.unsqueeze(1), put], dim=1)
            yield (images, self.labels[index], places) if self.with_index else (images, self.labels[index])
