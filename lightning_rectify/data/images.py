"""``ImageData``: image classification datasets behind one set of arguments."""

import difflib
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_rectify._lightning import LightningDataModule
from lightning_rectify.data.image_datasets import ArrayImages, FileImages, pairs, stratified_take
from lightning_rectify.data.image_sources import SOURCES, folder, in_memory, open_part
from lightning_rectify.data.resumable import EpochSampler, ResumableLoader

_SMALL = 96  # side up to which images on disk are treated as those in memory are


class ImageData(LightningDataModule):
    """Labelled images in three parts: training, validation (split off the training part) and test.

    A batch is a pair: images, float32, shape (B, C, H, W), normalised with the dataset's constants, and labels, int64,
    shape (B,). What training sees is a function of seed, epoch and place in the epoch: a run that stops anywhere and
    resumes, two ranks with half batches, and any number of workers see the same images with the same augmentation.
    Training batches are all of one size; the images left over change from epoch to epoch. Validation and test keep
    their order and are not augmented; under DDP, Lightning pads them with repeats to equal length on each rank.

    Args:
        dataset: "digits" (scikit-learn's, 8x8, nothing to download), "cifar10", "cifar100", "mnist", "fashion_mnist",
            "kmnist", "svhn", "stl10", "usps", "imagenet" (its validation part is the test part here) or "image_folder"
            (``root/train/CLASS/*`` and ``root/test/CLASS/*``, or ``root/val`` for want of ``root/test``).
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
        image_size: side to which "imagenet" and "image_folder" are brought, 224 if None; others have their own. Up to
            96 by resizing alone, above by resizing with a margin and a central crop.
        train_size: train on so many images only, each class in proportion; None for all.

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
    ) -> None:
        super().__init__()
        if dataset not in SOURCES:
            near = difflib.get_close_matches(dataset, SOURCES, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ValueError(
                f"Expected argument `dataset` to be one of {', '.join(SOURCES)} but got {dataset!r}.{hint}"
            )
        self.source = SOURCES[dataset]
        if root is None and self.source.torchvision is not None:
            raise ValueError(f"Expected argument `root` to be the folder of the {dataset} data but got None.")
        if download and self.source.torchvision is not None and not self.source.downloads:
            raise ValueError(f"Expected argument `download` to be False for {dataset}, which cannot be fetched.")
        if image_size is not None and not self.source.on_disk and image_size != self.source.image_size:
            raise ValueError(
                f"Expected argument `image_size` to be {self.source.image_size} or None for {dataset} "
                f"but got {image_size}."
            )
        lowest = {"batch_size": 1, "eval_batch_size": 1, "num_workers": 0, "seed": 0, "image_size": 1, "train_size": 1}
        for name, low in lowest.items():
            value = locals()[name]
            if value is not None and value < low:
                raise ValueError(f"Expected argument `{name}` to be at least {low} but got {value}.")
        if val_size < 0 or (isinstance(val_size, float) and val_size >= 1):
            raise ValueError(f"Expected argument `val_size` to be a share in [0, 1) or a number but got {val_size}.")
        self.dataset, self.root, self.download = dataset, root, download
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size or batch_size
        self.val_size, self.train_size = val_size, train_size
        self.augment = self.source.augment if augment is None else augment
        self.num_workers, self.pin_memory, self.seed = num_workers, pin_memory, seed
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
        trainer = self.trainer
        ranks = (trainer.distributed_sampler_kwargs if trainer is not None else None) or {}
        dataset = self._parts["train"]
        sampler = EpochSampler(dataset, **ranks, seed=self.seed, drop_last=True)
        if len(sampler) < self.batch_size:
            raise ValueError(
                f"Expected argument `batch_size` to be at most {len(sampler)}, the number of training images on each "
                f"rank, but got {self.batch_size}."
            )
        return ResumableLoader(
            dataset,
            sampler=sampler,
            batch_size=self.batch_size,
            drop_last=True,
            trainer=trainer,
            **self._loader_options(),
        )

    def val_dataloader(self) -> Any:
        """The validation part in order; no loader if ``val_size`` is 0."""
        return self._eval_loader("val") if len(self._parts["val"]) else []

    def test_dataloader(self) -> DataLoader[Any]:
        """The test part in order."""
        return self._eval_loader("test")

    def predict_dataloader(self) -> DataLoader[Any]:
        """The test part in order."""
        return self._eval_loader("test")

    # -- parts and loaders ---------------------------------------------------------------------------------------------

    def _eval_loader(self, part: str) -> DataLoader[Any]:
        return DataLoader(self._parts[part], batch_size=self.eval_batch_size, **self._loader_options())

    def _loader_options(self) -> dict[str, Any]:
        return {
            "collate_fn": pairs,
            "num_workers": self.num_workers,
            "persistent_workers": self.num_workers > 0,
            "pin_memory": self.pin_memory,
            # Each iteration draws a seed for the workers: from here, not from the global generator that dropout reads.
            "generator": torch.Generator().manual_seed(self.seed),
        }

    def _read_training_part(self) -> dict[str, ArrayImages | FileImages]:
        if self.source.on_disk:
            images = open_part(self.source, self.root or "", test=False)
            train, val = self._split(torch.tensor(images.targets))
            return {"train": self._files(images, train, self.augment), "val": self._files(images, val)}
        pixels, labels = in_memory(self.source, self.root, test=False)
        train, val = self._split(labels)
        return {
            "train": self._arrays(pixels[train], labels[train], self.augment),
            "val": self._arrays(pixels[val], labels[val]),
        }

    def _read_test_part(self) -> ArrayImages | FileImages:
        if not self.source.on_disk:
            return self._arrays(*in_memory(self.source, self.root, test=True))
        images = open_part(self.source, self.root or "", test=True)
        if self.dataset == "image_folder":
            classes = open_part(self.source, self.root or "", test=False).classes
            if images.classes != classes:
                raise ValueError(
                    f"Expected argument `root` to hold the same classes in {folder(self.root or '', True)} as in its "
                    f"train folder, {classes}, but got {images.classes}."
                )
        return self._files(images, torch.arange(len(images)))

    def _split(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Indices of training and validation images."""
        total = len(labels)
        val_size = round(self.val_size * total) if isinstance(self.val_size, float) else self.val_size
        if val_size >= total:
            raise ValueError(
                f"Expected argument `val_size` to be below {total}, all training images, but got {val_size}."
            )
        train, val = stratified_take(labels, val_size, self.seed)
        if self.train_size is not None:
            if self.train_size > len(train):
                raise ValueError(
                    f"Expected argument `train_size` to be at most {len(train)} but got {self.train_size}."
                )
            train = train[stratified_take(labels[train], self.train_size, self.seed)[1]]
        return train, val

    def _arrays(self, images: Tensor, labels: Tensor, augment: bool = False) -> ArrayImages:
        source = self.source
        pad, flip = (source.image_size // 8, source.flip) if augment else (0, False)
        return ArrayImages(images, labels, source.mean, source.std, source.scale, pad, flip, self.seed)

    def _files(self, images: Any, indices: Tensor, augment: bool = False) -> FileImages:
        from torchvision.transforms import v2

        size, source = self.image_size, self.source
        to_tensor = [
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(list(source.mean), list(source.std)),
        ]
        if size <= _SMALL:  # as for the datasets in memory
            plain = v2.Compose([v2.Resize((size, size)), *to_tensor])
            mirror = [v2.RandomHorizontalFlip()] if source.flip else []
            random = v2.Compose([v2.Resize((size, size)), v2.RandomCrop(size, padding=size // 8), *mirror, *to_tensor])
        else:  # with the customary margin: 256 pixels for a central crop of 224
            plain = v2.Compose([v2.Resize(round(size * 256 / 224)), v2.CenterCrop(size), *to_tensor])
            random = v2.Compose([v2.RandomResizedCrop(size), v2.RandomHorizontalFlip(), *to_tensor])
        return FileImages(images, indices, plain, random if augment else None, self.seed)
