"""``ImageData``: image classification datasets behind one set of arguments."""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_rectify._lightning import LightningDataModule
from lightning_rectify.arguments import check_choice, check_least, check_types
from lightning_rectify.data.image_datasets import (
    ArrayImages,
    FileImages,
    PlacedImages,
    file_transforms,
    resize,
    split,
)
from lightning_rectify.data.image_sources import SOURCES, folder, in_memory, open_part
from lightning_rectify.data.resumable import ResumableLoader, loader_options, training_loader

_NORMALIZATIONS = {"dataset": None, "symmetric": (0.5, 0.5), "unit": (0.0, 1.0)}  # mean and std of each channel


class ImageData(LightningDataModule):
    """Labelled images in three parts: training, validation (split off the training part) and test.

    A batch is a pair: images, float32, shape (B, C, H, W), normalised as ``normalization`` says, and labels, int64,
    shape (B,), 0 to K - 1 ("stl10_unlabeled" only: or -1, unlabelled). What training sees is a function of seed, epoch
    and place in the epoch: a run that stops anywhere and resumes, two ranks with half batches, and any number of
    workers see the same images with the same augmentation. Training batches are all of one size; the images left over
    change from epoch to epoch. Validation and test keep their order and are not augmented; under DDP, Lightning pads
    them with repeats to equal length on each rank.

    Args:
        dataset: "digits" (scikit-learn's, 8x8, nothing to download), "cifar10", "cifar100", "mnist", "fashion_mnist",
            "kmnist", "svhn", "stl10", "stl10_unlabeled", "usps", "imagenet" (its validation part is the test part here)
            or "image_folder" (``root/train/CLASS/*`` and ``root/test/CLASS/*``, or ``root/val`` for want of
            ``root/test``). The training part of "stl10_unlabeled" is STL-10's 5,000 labelled and 100,000 unlabelled
            images. The label of the latter is -1: a loss must leave it out, and where classes are kept in proportion
            it counts as a class. Reading them takes about 6 GB for a moment.
        root: folder of the data as torchvision lays it out; needed for all but the digits.
        batch_size: images in a training batch, on each rank.
        eval_batch_size: images in a batch of validation, test and prediction; None for ``batch_size``.
        val_size: share (below 1) or number of the training images to validate on, each class in proportion; 0 for no
            validation.
        augment: crop training images at random out of a frame an eighth of their side wide (4 pixels for 32x32), and
            mirror those datasets that bear it (not digits and letters); files brought to more than 96 pixels: a crop
            of random size and shape, and mirror. None does it where the RAdam paper does: CIFAR and ImageNet.
        download: fetch missing data in ``prepare_data``, if torchvision can.
        num_workers: loader processes.
        pin_memory: page-locked batches, for copies to a GPU.
        seed: of split, order and augmentation, at least 0.
        image_size: side to which images are brought, bilinear with antialias; None for the dataset's own, 224 for
            "imagenet" and "image_folder". Those two: up to 96 by resizing alone, above by resizing with a margin and a
            central crop. All others: by resizing alone, once, in ``setup``; an image then takes C * H * W bytes.
        train_size: train on so many images only, each class in proportion; None for all.
        normalization: of pixels in 0 to 1. "dataset": less the dataset's mean, over its standard deviation, for each
            channel; "symmetric": to -1 to 1, for generators that end in tanh (a step of 1 / 255 is 2 / 255 there);
            "unit": none, for attacks. The frame of the augmentation is black in each.
        with_index: training batches have a third part, for modules that remember something of each image
            (``L2LDefense``'s ``memory``): the images' indices in the training part, int64, shape (B,). With
            augmentation (B, 4): index, row and column of the crop's first pixel in the image (from -F to F where the
            frame is F pixels wide), and 1 for a mirror image. Files must not be augmented: torchvision draws there.

    Raises:
        ValueError: for an argument outside its range.
        FileNotFoundError: in ``setup``, if the data is not there.
    """

    def __init__(
        self,
        dataset: str = "digits",
        root: str | None = None,
        batch_size: int = 128,
        eval_batch_size: int | None = None,
        val_size: int | float = 0.1,
        augment: bool | None = None,
        download: bool = False,
        num_workers: int = 0,
        pin_memory: bool = False,
        seed: int = 0,
        image_size: int | None = None,
        train_size: int | None = None,
        normalization: str = "dataset",
        with_index: bool = False,
    ) -> None:
        check_types(ImageData, locals())
        super().__init__()
        check_choice(SOURCES, dataset=dataset)
        self.source = SOURCES[dataset]
        if root is None and self.source.torchvision is not None:
            raise ValueError(f"Expected argument `root` to be the folder of the {dataset} data but got None.")
        if download and self.source.torchvision is not None and not self.source.downloads:
            raise ValueError(f"Expected argument `download` to be False for {dataset}, which cannot be fetched.")
        check_choice(_NORMALIZATIONS, normalization=normalization)
        check_least(0, num_workers=num_workers, seed=seed)
        check_least(1, batch_size=batch_size, eval_batch_size=eval_batch_size)
        check_least(1, image_size=image_size, train_size=train_size)
        if val_size < 0 or (isinstance(val_size, float) and val_size >= 1):
            raise ValueError(f"Expected argument `val_size` to be a share in [0, 1) or a number but got {val_size}.")
        self.dataset, self.root, self.download = dataset, root, download
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size or batch_size
        self.val_size, self.train_size = val_size, train_size
        self.augment = self.source.augment if augment is None else augment
        if with_index and self.augment and self.source.on_disk:
            raise ValueError(
                f"Expected argument `augment` to be False with `with_index` for {dataset}, where torchvision draws the "
                "crops, but got True."
            )
        self.num_workers, self.pin_memory, self.seed = num_workers, pin_memory, seed
        self.normalization, self.with_index = normalization, with_index
        self._image_size = image_size
        self._parts: dict[str, ArrayImages | FileImages] = {}

    # -- what a network must fit ---------------------------------------------------------------------------------------

    @cached_property
    def num_classes(self) -> int:
        """Number of classes K; of an ``image_folder``, counted in ``root/train``."""
        if self.source.num_classes is not None:
            return self.source.num_classes
        return len(open_part(self.source, self.root or "", test=False).classes)

    @property
    def in_channels(self) -> int:
        """Channels C of an image."""
        return self.source.in_channels

    @property
    def image_size(self) -> int:
        """Height and width of an image."""
        return self._image_size or self.source.image_size

    @property
    def mean(self) -> tuple[float, ...]:
        """Mean of each channel of the dataset, (C,), for pixels in 0 to 1, whatever ``normalization`` is.

        With :attr:`std` it is what a network needs that takes "unit" images and normalises them itself.
        """
        return self.source.mean

    @property
    def std(self) -> tuple[float, ...]:
        """Standard deviation of each channel of the dataset, (C,), for pixels in 0 to 1; see :attr:`mean`."""
        return self.source.std

    @property
    def pixel_range(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Values of black and of white in a batch, for each channel, two times (C,).

        They bound an attack's images, and ``(images - black) / (white - black)`` are pixels in 0 to 1 again.
        """
        channels = list(zip(*self._constants, strict=True))
        black = tuple((0.0 - mean) / std for mean, std in channels)
        return black, tuple((1.0 - mean) / std for mean, std in channels)

    # -- Lightning's hooks ---------------------------------------------------------------------------------------------

    def prepare_data(self) -> None:
        """Fetch the data if ``download`` says so; on one process only."""
        if self.download and self.source.downloads:
            for test in (False, True):
                open_part(self.source, self.root or "", test, download=True)

    def setup(self, stage: str) -> None:
        """Read and split the parts that the stage needs and that are not there yet.

        Raises:
            FileNotFoundError: if the data is not there.
            ValueError: if the training part is too small for ``val_size``, ``train_size`` or ``batch_size``.
        """
        if stage in ("fit", "validate") and "train" not in self._parts:
            self._parts |= self._read_training_part()
        if stage in ("test", "predict") and "test" not in self._parts:
            self._parts["test"] = self._read_test_part()

    def train_dataloader(self) -> ResumableLoader:
        """Shuffled batches of one size; resumes in the middle of an epoch."""
        images = self._parts["train"]
        dataset: Any = PlacedImages(images) if self.with_index else images
        return training_loader(dataset, self.batch_size, self.seed, self.trainer, "images", **self._options())

    def val_dataloader(self) -> Any:
        """The validation part in order; no loader if ``val_size`` is 0."""
        return self._eval_loader("val") if len(self._parts["val"]) else []

    def test_dataloader(self) -> DataLoader[Any]:
        """The test part in order."""
        return self._eval_loader("test")

    def predict_dataloader(self) -> DataLoader[Any]:
        """The test part in order."""
        return self._eval_loader("test")

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Move a batch; in validation and test, too, autograd takes what comes out.

        Lightning runs those in inference mode, and neither images nor labels made there may have a part in a backward
        pass. An attack in ``validation_step`` or ``test_step`` is left with what it would need anyway:
        ``torch.inference_mode(False)`` and ``torch.enable_grad()`` around it.
        """
        with torch.inference_mode(False):
            moved = super().transfer_batch_to_device(batch, device, dataloader_idx)
            if isinstance(moved, torch.Tensor):  # the model summary's example, which is no batch
                return moved
            return tuple(part.clone() if part.is_inference() else part for part in moved)

    @torch.inference_mode(False)  # what is kept from a validation can be used in training
    def training_images(self) -> tuple[Tensor, Tensor]:
        """All images of the training part in memory, as batches have them but never augmented, in the part's order.

        For what is fitted once to the data, and for look-ups of nearest neighbours. Validation images are not among
        them. The images take 4 * N * C * H * W bytes, and those on disk are all decoded (STL-10 with its unlabelled
        images at 48x48: 2.9 GB; ImageNet at 224x224: 770 GB, so ask for a ``train_size``). Under DDP each rank gets
        all of them. Order, augmentation and place of the training loader do not change.

        Returns:
            Images, float32, shape (N, C, H, W), and labels, int64, shape (N,); copies, free to be written to.

        Raises:
            RuntimeError: before ``setup("fit")``.
        """
        if "train" not in self._parts:
            raise RuntimeError("Expected `setup('fit')` to have been called before `training_images`.")
        count, side = len(self._parts["train"]), self.image_size
        images = torch.empty(count, self.in_channels, side, side, dtype=torch.float32)
        labels = torch.empty(count, dtype=torch.int64)
        start = 0
        for some_images, some_labels in self._eval_loader("train"):  # its keys are plain indices: no augmentation
            stop = start + len(some_labels)
            images[start:stop], labels[start:stop] = some_images, some_labels
            start = stop
        return images, labels

    # -- parts and loaders ---------------------------------------------------------------------------------------------

    def _eval_loader(self, part: str) -> DataLoader[Any]:
        return DataLoader(self._parts[part], batch_size=self.eval_batch_size, **self._options())

    def _options(self) -> dict[str, Any]:
        return loader_options(self.seed, self.num_workers, self.pin_memory)

    def _read_training_part(self) -> dict[str, ArrayImages | FileImages]:
        if self.source.on_disk:
            images = open_part(self.source, self.root or "", test=False)
            train, val = split(torch.tensor(images.targets), self.val_size, self.train_size, self.seed)
            return {"train": self._files(images, train, self.augment), "val": self._files(images, val)}
        pixels, labels = self._in_memory(test=False)
        train, val = split(labels, self.val_size, self.train_size, self.seed)
        return {
            "train": self._arrays(pixels[train], labels[train], self.augment),
            "val": self._arrays(pixels[val], labels[val]),
        }

    def _read_test_part(self) -> ArrayImages | FileImages:
        if not self.source.on_disk:
            return self._arrays(*self._in_memory(test=True))
        images = open_part(self.source, self.root or "", test=True)
        if self.dataset == "image_folder":
            classes = open_part(self.source, self.root or "", test=False).classes
            if images.classes != classes:
                raise ValueError(
                    f"Expected argument `root` to hold the same classes in {folder(self.root or '', True)} as in its "
                    f"train folder, {classes}, but got {images.classes}."
                )
        return self._files(images, torch.arange(len(images)))

    @property
    def _constants(self) -> tuple[Sequence[float], Sequence[float]]:
        """Mean and standard deviation by which batches are normalised, each (C,)."""
        constants = _NORMALIZATIONS[self.normalization]
        if constants is None:
            return self.source.mean, self.source.std
        mean, std = constants
        return [mean] * self.in_channels, [std] * self.in_channels

    def _in_memory(self, test: bool) -> tuple[Tensor, Tensor]:
        images, labels = in_memory(self.source, self.root, test)
        return (resize(images, self.image_size, self.source.scale) if self._resized else images), labels

    @property
    def _resized(self) -> bool:
        return self.image_size != self.source.image_size

    def _arrays(self, images: Tensor, labels: Tensor, augment: bool = False) -> ArrayImages:
        pad, flip = (self.image_size // 8, self.source.flip) if augment else (0, False)
        scale = 255.0 if self._resized else self.source.scale
        return ArrayImages(images, labels, *self._constants, scale, pad, flip, self.seed)

    def _files(self, images: Any, indices: Tensor, augment: bool = False) -> FileImages:
        plain, random = file_transforms(self.image_size, *self._constants, self.source.flip)
        return FileImages(images, indices, plain, random if augment else None, self.seed)
