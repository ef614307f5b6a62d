"""``DomainPairs``: labelled images of one domain, unlabelled images of another."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_rectify._lightning import LightningDataModule
from lightning_rectify.arguments import came, check_choice, check_least, check_types
from lightning_rectify.data.domain_sources import DOMAINS, Images, count_classes, read_domain
from lightning_rectify.data.image_datasets import ArrayImages, stratified_take
from lightning_rectify.data.resumable import ResumableLoader, loader_options, training_loader
from lightning_rectify.data.transport import Pairs

Batch = tuple[Tensor, Tensor, Tensor]


class DomainPairs(LightningDataModule):
    """Labelled images of a source domain and unlabelled images of a target domain, for unsupervised adaptation.

    A training batch has three parts: source images, float32, shape (B, C, S, S), their labels, int64, (B,), and target
    images, (B, C, S, S), drawn independently. Pixels are in [0, 1]. What training sees is a function of seed, epoch and
    place in the epoch: a run that resumes, two ranks with half batches and any number of workers see the same.

    Labels of the target are nowhere but in the test part (and, with ``watch_test``, in what is watched): validation has
    two loaders, source (images and labels) and target (images, and labels that are all -1). The test has two loaders,
    target and source. Batches of prediction are those of the target's test part.

    Domains: "digits" and "digits_turned" need no file: one half each of scikit-learn's digits, the target's turned by
    20 degrees, blurred and faded. "mnist", "usps", "svhn": as torchvision lays them out (its USPS has 7,291 and 2,007
    images, the authors of arXiv:1905.00158 had 7,438 and 1,860). "mnist_m": with ``photos`` made from MNIST, without
    them the files of its authors. "image_folder": ``train/CLASS/*`` and ``test/CLASS/*``; of a target, the training
    images may lie in ``train`` itself. All are held in memory, C * S * S bytes an image.

    Args:
        source: a domain, or a tuple of images, (N, C, S, S) with pixels in [0, 1] (floats) or 0 to 255 (uint8), and
            labels, (N,), from 0.
        target: a domain; or images alone, or with labels, which are used in the test part only. Of such images (of
            ``source`` too) so many as ``val_size`` says are kept for validation and as many for the test.
        root: folder of both domains' data.
        source_root: of the source's; None for ``root``.
        target_root: of the target's; None for ``root``.
        photos: folder of photographs to make "mnist_m" with, whatever their names and sizes.
        image_size: S, to which domains by name are brought; a multiple of 4 and at least 16 for the networks here.
        source_margin: black pixels on each side of the source's images, within S. USPS fills its box, MNIST leaves a
            seventh free: 4 of 28 pixels around USPS gives both one frame (a help that arXiv:1905.00158 does not use).
        target_margin: of the target's.
        batch_size: images of each side in a training batch, on each rank.
        eval_batch_size: images in a batch of validation, test and prediction.
        val_size: share (below 1) or number of the training images of each side to validate on; 0 for no validation.
        train_size: so many training images a side; None for all.
        watch_test: a third validation loader: the target's test part, to follow its accuracy. For comparison with
            papers that report their best test result; never choose by it.
        num_workers: loader processes.
        seed: of split and order, at least 0.

    Raises:
        ValueError: for an argument outside its range.
        FileNotFoundError: in ``setup``, if the data is not there.
    """

    def __init__(
        self,
        source: Any = "digits",
        target: Any = "digits_turned",
        root: str | None = None,
        source_root: str | None = None,
        target_root: str | None = None,
        photos: str | None = None,
        image_size: int = 16,
        source_margin: int = 0,
        target_margin: int = 0,
        batch_size: int = 64,
        eval_batch_size: int = 500,
        val_size: int | float = 0.1,
        train_size: int | None = None,
        watch_test: bool = False,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        check_types(DomainPairs, locals())
        super().__init__()
        self.domains = {"source": source, "target": target}
        self.roots = {"source": source_root or root, "target": target_root or root}
        self.margins = {"source": source_margin, "target": target_margin}
        for side, domain in self.domains.items():
            _check_domain(side, domain, self.roots[side])
        check_least(0, source_margin=source_margin, target_margin=target_margin, num_workers=num_workers, seed=seed)
        check_least(1, image_size=image_size, train_size=train_size)
        check_least(1, batch_size=batch_size, eval_batch_size=eval_batch_size)
        for side, margin in self.margins.items():
            if 2 * margin >= image_size:
                raise ValueError(
                    f"Expected argument `{side}_margin` to be below half of `image_size`, {image_size}, but got "
                    f"{margin!r}."
                )
        if val_size < 0 or (isinstance(val_size, float) and val_size >= 1):
            raise ValueError(f"Expected argument `val_size` to be a share in [0, 1) or a number but got {val_size!r}.")
        self.photos, self.image_size, self.watch_test = photos, image_size, watch_test
        self.batch_size, self.eval_batch_size, self.val_size = batch_size, eval_batch_size, val_size
        self.train_size, self.num_workers, self.seed = train_size, num_workers, seed
        self._parts: dict[str, Any] = {}

    # -- what a network must fit ---------------------------------------------------------------------------------------

    @property
    def num_classes(self) -> int:
        """Number of classes K of the source."""
        domain = self.domains["source"]
        return count_classes(domain, self.roots["source"]) if isinstance(domain, str) else int(domain[1].max()) + 1

    @property
    def in_channels(self) -> int:
        """Channels C of both: grey images of the one side are repeated where the other has three."""
        return max(_channels(domain) for domain in self.domains.values())

    # -- Lightning's hooks ---------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Read and split both domains.

        Raises:
            FileNotFoundError: if the data is not there.
            ValueError: if there are too few images, or the sides do not fit.
        """
        if self._parts:
            return
        found = {side: self._read(side) for side in self.domains}
        shapes = {side: tuple(parts["train"][0].shape[1:]) for side, parts in found.items()}
        if shapes["source"] != shapes["target"]:
            raise ValueError(
                f"Expected images of both domains to be of one shape but got {shapes['source']} and {shapes['target']}."
            )
        source, target = (found[side]["train"] for side in ("source", "target"))
        if (source[1] < 0).any():
            raise ValueError("Expected argument `source` to have a label for each image but got some without.")
        self._parts = {"train": DomainImages(*source, target[0], self.seed)}
        for side, parts in found.items():
            for part in ("val", "test"):
                images, labels = parts[part]
                hidden = torch.full_like(labels, -1) if (side, part) == ("target", "val") else labels
                flat = [0.0] * images.shape[1], [1.0] * images.shape[1]
                self._parts[f"{part}_{side}"] = ArrayImages(images, hidden, *flat)

    def train_dataloader(self) -> ResumableLoader:
        """Batches of one size; resumes in the middle of an epoch."""
        return training_loader(
            self._parts["train"], self.batch_size, self.seed, self.trainer, "images a side", shuffle=False,
            **self._options(),
        )  # fmt: skip

    def val_dataloader(self) -> list[DataLoader[Any]]:
        """Source, target and, with ``watch_test``, the target's test part; in order."""
        names = ["val_source", "val_target", *(["test_target"] if self.watch_test else [])]
        return [self._eval_loader(name) for name in names] if len(self._parts["val_source"]) else []

    def test_dataloader(self) -> list[DataLoader[Any]]:
        """The test parts of target and source, in order."""
        return [self._eval_loader(name) for name in ("test_target", "test_source")]

    def predict_dataloader(self) -> DataLoader[Any]:
        """The target's test part in order."""
        return self._eval_loader("test_target")

    def _eval_loader(self, part: str) -> DataLoader[Any]:
        return DataLoader(self._parts[part], batch_size=self.eval_batch_size, **self._options())

    def _options(self) -> dict[str, Any]:
        return loader_options(self.seed, self.num_workers)

    # -- reading -------------------------------------------------------------------------------------------------------

    def _read(self, side: str) -> dict[str, Images]:
        """Training, validation and test part of a side."""
        domain = self.domains[side]
        if isinstance(domain, str):
            arguments = (self.image_size, self.margins[side], self.photos)
            train, test = (read_domain(domain, self.roots[side], part, *arguments) for part in (False, True))
            held = self._count(side, len(train[0]), 1)
            # Labels of the target do not even steer the split.
            labels = train[1] if side == "source" else torch.zeros_like(train[1])
            rest, val = stratified_take(labels, held, self.seed)
        else:
            train = test = _as_images(side, domain)
            held = self._count(side, len(train[0]), 2)
            order = torch.from_numpy(np.random.default_rng(self.seed).permutation(len(train[0])))
            val, rest = order[:held], order[2 * held :]
            test = tuple(part[order[held : 2 * held]] for part in train)  # type: ignore[assignment]
        if self.train_size is not None:
            order = torch.from_numpy(np.random.default_rng([self.seed, 1]).permutation(len(rest)))
            rest = rest[order[: self.train_size]]
        parts = {"train": (train[0][rest], train[1][rest]), "val": (train[0][val], train[1][val]), "test": test}
        if self.in_channels == 3:
            parts = {name: (images.expand(-1, 3, -1, -1), labels) for name, (images, labels) in parts.items()}
        return parts

    def _count(self, side: str, total: int, times: int) -> int:
        held = round(self.val_size * total) if isinstance(self.val_size, float) else self.val_size
        if times * held >= total or (self.train_size or 0) > total - times * held:
            raise ValueError(
                f"Expected arguments `val_size` and `train_size` to leave images of the {side}, {total} in all, but "
                f"got {self.val_size!r} and {self.train_size!r}."
            )
        return held


class DomainImages(Dataset[Batch]):
    """Source images with labels beside target images; a key (epoch, index) is a row of each side's own order.

    An epoch is as long as the larger side; the smaller one is run through again, in another order.

    Args:
        x: source images, uint8, shape (N, C, S, S).
        labels: int64, (N,).
        y: target images, uint8, (M, C, S, S).
        seed: of the orders.
    """

    def __init__(self, x: Tensor, labels: Tensor, y: Tensor, seed: int = 0) -> None:
        self.x, self.labels, self.y = x, labels, y
        self.rows = Pairs(torch.arange(len(x)), torch.arange(len(y)), seed)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitems__(self, keys: Sequence[Any]) -> Batch:
        """Source images, labels and target images for a list of keys."""
        source, target = self.rows.__getitems__(keys)
        return self.x[source].float().div_(255.0), self.labels[source], self.y[target].float().div_(255.0)


def _check_domain(side: str, domain: Any, root: str | None) -> None:
    if not isinstance(domain, str):
        if side == "source" and not (isinstance(domain, (tuple, list)) and len(domain) == 2):
            raise ValueError(
                f"Expected argument `source` to be a domain, or images and labels, but got {came(domain)}."
            )
        images = domain[0] if isinstance(domain, (tuple, list)) and len(domain) == 2 else domain
        if not isinstance(images, (Tensor, np.ndarray)) or images.ndim != 4:
            raise ValueError(
                f"Expected argument `{side}` to be a domain or images (N, C, S, S), with or without labels, but got "
                f"{came(domain)}."
            )
        return
    check_choice(DOMAINS, **{side: domain})
    if root is None and not domain.startswith("digits"):
        raise ValueError(f"Expected argument `{side}_root` (or `root`) to be the folder of {domain} but got None.")


def _channels(domain: Any) -> int:
    if isinstance(domain, str):
        return DOMAINS[domain]
    return int((domain[0] if isinstance(domain, (tuple, list)) else domain).shape[1])


def _as_images(side: str, domain: Any) -> Images:
    """A user's images as bytes, and labels, -1 where there are none."""
    images, labels = domain if isinstance(domain, (tuple, list)) else (domain, None)
    images = torch.as_tensor(images)
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise ValueError(
            f"Expected argument `{side}` to have images of shape (N, 1 or 3, S, S) but got {tuple(images.shape)}."
        )
    if images.is_floating_point():
        if not bool(((images >= 0) & (images <= 1)).all()):
            raise ValueError(f"Expected argument `{side}` to have pixels in [0, 1] but got others, or NaN.")
        images = (255.0 * images).round().to(torch.uint8)
    labels = torch.full((len(images),), -1) if labels is None else torch.as_tensor(labels).long()
    if labels.shape != (len(images),):
        raise ValueError(
            f"Expected argument `{side}` to have a label an image, {len(images)}, but got {tuple(labels.shape)}."
        )
    return images.to(torch.uint8), labels
