"""Labelled images out of whatever a user has: tensors, a loader, a datamodule."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from lightning_rectify._lightning import LightningDataModule
from lightning_rectify.arguments import check_choice

PARTS = ("test", "val")


def labelled_images(
    data: Any, count: int | None, bounds: tuple[float, float], part: str = "test"
) -> tuple[Tensor, Tensor]:
    """The first images and labels of a data set, on the CPU.

    Args:
        data: a pair of tensors, images (N, C, H, W) and labels (N,); or a loader of such pairs (further entries of a
            batch are left alone); or a LightningDataModule.
        count: largest number of images, at least 1; None for all.
        bounds: smallest and largest value of a pixel.
        part: which loader of a datamodule: "test" (or "val" if it has no other), or "val".

    Returns:
        Images, float32, shape (N, C, H, W), and labels, int64, shape (N,).

    Raises:
        ValueError: for an argument outside its range, data that are none of these, and images outside the bounds.
    """
    check_choice(PARTS, part=part)
    if count is not None and count < 1:
        raise ValueError(f"Expected argument `max_images` to be at least 1, or None for all, but got {count!r}.")
    images, labels, taken = [], [], 0
    for batch in _batches(data, part):
        some, theirs = images_and_labels(batch)
        if count is not None:
            some, theirs = some[: count - taken], theirs[: count - taken]
        images.append(some.detach().float().cpu())
        labels.append(theirs.detach().long().cpu())
        taken += len(some)
        if taken == count:
            break
    if not taken:
        raise ValueError("Expected argument `data` to hold at least one image but got none.")
    found = torch.cat(images)
    check_bounds(found, bounds)
    return found.clamp(*bounds), torch.cat(labels)  # rounding alone may pass the bounds


def images_and_labels(batch: Any) -> tuple[Tensor, Tensor]:
    """The two first entries of a batch.

    Raises:
        ValueError: if they are not images and as many labels.
    """
    if isinstance(batch, (tuple, list)) and len(batch) >= 2:
        images, labels = batch[0], batch[1]
        good = isinstance(images, Tensor) and isinstance(labels, Tensor) and images.dim() == 4
        if good and labels.shape == images.shape[:1] and not labels.is_floating_point():
            return images, labels
        got = [tuple(entry.shape) if isinstance(entry, Tensor) else type(entry).__name__ for entry in (images, labels)]
    else:
        got = [type(batch).__name__]
    raise ValueError(
        "Expected argument `data` to hold pairs of images (N, C, H, W) and integer labels (N,) but got "
        f"{' and '.join(map(str, got))}."
    )


def check_bounds(images: Tensor, bounds: tuple[float, float], what: str = "argument `data`") -> None:
    """Refuse images whose pixels are not what an attack's bounds say.

    Args:
        images: shape (N, C, H, W).
        bounds: smallest and largest value of a pixel.
        what: what holds the images, for the message.

    Raises:
        ValueError: if a pixel lies outside them, or is not finite.
    """
    low, high = bounds
    least, most = float(images.min()), float(images.max())
    slack = 1e-6 * (high - low)
    if not (least >= low - slack and most <= high + slack):  # NaN as well
        raise ValueError(
            f"Expected {what} to hold pixels within `bounds` ({low:g}, {high:g}) but got values from "
            f"{least:.4g} to {most:.4g}. Epsilon and bounds are in pixel units: put the normalization inside the model "
            "and give it images that are not normalized (ImageData: normalization='unit')."
        )


def _batches(data: Any, part: str) -> Iterable[Any]:
    if isinstance(data, LightningDataModule):
        return _loader(data, part)
    if isinstance(data, (tuple, list)) and len(data) == 2 and all(isinstance(entry, Tensor) for entry in data):
        return [data]
    if not isinstance(data, Iterable):
        raise ValueError(
            "Expected argument `data` to be a pair of tensors, a loader or a LightningDataModule but got "
            f"{type(data).__name__}."
        )
    return data


def _loader(data: LightningDataModule, part: str) -> Iterable[Any]:
    data.prepare_data()
    overrides = type(data).test_dataloader is not LightningDataModule.test_dataloader
    stage = "test" if part == "test" and overrides else "validate"
    data.setup(stage)
    loader = data.test_dataloader() if stage == "test" else data.val_dataloader()
    if isinstance(loader, (list, tuple)):  # several loaders: the first
        loader = loader[0] if loader else []
    found: Iterable[Any] = loader
    return found
