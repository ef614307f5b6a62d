"""``ManifoldData``: values or classes at points near a manifold: known manifolds, digits, or a user's points."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_rectify._lightning import LightningDataModule
from lightning_rectify.arguments import check_choice, check_least, check_types
from lightning_rectify.data.array_files import check_source, read_samples
from lightning_rectify.data.image_datasets import as_count, split
from lightning_rectify.data.image_sources import SOURCES, in_memory
from lightning_rectify.data.manifold_samples import EMBEDDINGS, MANIFOLDS, embed
from lightning_rectify.data.resumable import ResumableLoader, loader_options, training_loader

_PARTS = ("train", "val", "test")


class ManifoldData(LightningDataModule):
    """Points and their values (or classes), for learning a function near a low dimensional manifold.

    A batch is x, float32, shape (B, D), and y: float32, shape (B,) or (B, K), or classes, int64, shape (B,). The order
    of training is a function of seed and epoch: a run that resumes, and two ranks with half batches, see the same.

    - "digits" (the default, real data): scikit-learn's 1,797 images of 8x8 pixels, values in 0 to 1, D = 64, ten
      classes; 359 of them are the test part whatever the seed, as in :class:`ImageData`.
    - "circle", "sphere", "torus", "swiss_roll", "moment_curve", "so3": points and values drawn from the seed; see
      ``manifold_samples.py`` for the functions. Training, validation and test points are independent. Noise is on the
      points of all parts, noise of the values on training and validation: the test part has the true values, so that
      an error on it is the error of the function.
    - a user's ``x`` and ``y``, split at random by the seed.

    Args:
        dataset: one of the above; None for "digits", and with ``x``.
        ambient_dim: D of a drawn manifold; None for its own space (2, 3, 9; 10 for the moment curve). The moment curve
            has an even D and no embedding.
        embedding: into R^D: "orthogonal" (isometric) or "sine" (bends through all D dimensions).
        noise: of the points: the root mean square of its length (so noise / sqrt(D) a coordinate), at least 0.
        label_noise: of the values: standard deviation, at least 0.
        x: a user's points: an array or tensor (N, ...), flattened to (N, D), or a ``.npy`` or ``.csv`` file.
        y: their values, the same way, (N,) or (N, K); None takes the last column of ``x``.
        num_classes: the user's ``y`` are classes 0 to num_classes - 1; None for values.
        batch_size: points in a training batch, on each rank.
        train_size: training points: to draw (2,000 if None), or to take of what is there (all if None).
        val_size: of digits and a user's points the share (a float below 1) or number; None for 0.1. Of a drawn
            manifold the number; None for 1,000.
        test_size: the same; not for digits. None for 0.1, of a drawn manifold 2,000.
        eval_batch_size: points in a batch of validation, test and prediction.
        num_workers: loader processes.
        seed: of draws, embedding, split and order, at least 0.

    Raises:
        ValueError: for an argument outside its range.
        FileNotFoundError: in ``setup``, if a file is not there.
    """

    def __init__(
        self,
        dataset: str | None = None,
        ambient_dim: int | None = None,
        embedding: str = "orthogonal",
        noise: float = 0.0,
        label_noise: float = 0.0,
        x: Any = None,
        y: Any = None,
        num_classes: int | None = None,
        batch_size: int = 64,
        train_size: int | None = None,
        val_size: int | float | None = None,
        test_size: int | float | None = None,
        eval_batch_size: int = 1000,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        check_types(ManifoldData, locals())
        val_size, test_size = as_count(val_size), as_count(test_size)
        super().__init__()
        name = "digits" if dataset is None and x is None else dataset
        drawn = name in MANIFOLDS
        _check(name, drawn, locals())
        self.dataset, self.embedding, self.noise, self.label_noise = name, embedding, noise, label_noise
        self.x, self.y = x, y
        self.batch_size, self.train_size, self.eval_batch_size = batch_size, train_size, eval_batch_size
        self.val_size = (1000 if drawn else 0.1) if val_size is None else val_size
        self.test_size = (2000 if drawn else 0.1) if test_size is None else test_size
        self.num_workers, self.seed = num_workers, seed
        self._num_classes, self._ambient_dim = num_classes, ambient_dim
        self._parts: dict[str, LabelledPoints] = {}

    # -- what a network must fit ---------------------------------------------------------------------------------------

    @property
    def in_features(self) -> int:
        """D, numbers of a point; of a user's points, known after ``setup``."""
        if self.dataset == "digits":
            return 64
        if self.dataset in MANIFOLDS:
            return self._ambient_dim or MANIFOLDS[self.dataset].own_dim or 10
        return self._train.x.shape[1]

    @property
    def outputs(self) -> int:
        """K, values of a point."""
        if self.dataset is not None:
            return 10 if self.dataset == "digits" else 1
        return self._num_classes or (self._train.y.shape[1] if self._train.y.ndim > 1 else 1)

    @property
    def num_classes(self) -> int | None:
        """Number of classes; None for values."""
        return 10 if self.dataset == "digits" else self._num_classes

    @property
    def dim(self) -> int | None:
        """d, dimension of a drawn manifold; None where nobody knows it."""
        return MANIFOLDS[self.dataset].dim if self.dataset in MANIFOLDS else None

    @property
    def _train(self) -> "LabelledPoints":
        if not self._parts:
            raise RuntimeError("Expected `setup` to have been called before the points are asked for.")
        return self._parts["train"]

    @torch.inference_mode(False)  # what is kept from a validation can be used in training
    def training_points(self) -> tuple[Tensor, Tensor]:
        """All training points, (N, D), and their values or classes; copies, on each rank all of them.

        Raises:
            RuntimeError: before ``setup``.
        """
        return self._train.x.clone(), self._train.y.clone()

    # -- Lightning's hooks ---------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Draw or read all parts.

        Raises:
            FileNotFoundError: if a file is not there.
            ValueError: for points too few, not finite, or with classes out of range.
        """
        if self._parts:
            return
        if self.dataset == "digits":
            self._parts = self._digits()
        elif self.dataset is not None:
            self._parts = {part: self._drawn(number) for number, part in enumerate(_PARTS)}
        else:
            self._parts = self._users()

    def train_dataloader(self) -> ResumableLoader:
        """Shuffled batches of one size; resumes in the middle of an epoch."""
        return training_loader(self._train, self.batch_size, self.seed, self.trainer, "points", **self._options())

    def val_dataloader(self) -> DataLoader[Any]:
        """The validation part in order."""
        return self._eval_loader("val")

    def test_dataloader(self) -> DataLoader[Any]:
        """The test part in order."""
        return self._eval_loader("test")

    def predict_dataloader(self) -> DataLoader[Any]:
        """The test part in order."""
        return self._eval_loader("test")

    def _eval_loader(self, part: str) -> DataLoader[Any]:
        return DataLoader(self._parts[part], batch_size=self.eval_batch_size, **self._options())

    def _options(self) -> dict[str, Any]:
        return loader_options(self.seed, self.num_workers)

    # -- the parts -----------------------------------------------------------------------------------------------------

    def _digits(self) -> dict[str, "LabelledPoints"]:
        source = SOURCES["digits"]
        images, labels = in_memory(source, None, test=False)
        train, val = split(labels, self.val_size, self.train_size, self.seed)
        test_images, test_labels = in_memory(source, None, test=True)
        points, test = (part.flatten(1).float() / source.scale for part in (images, test_images))
        return {
            "train": LabelledPoints(points[train], labels[train]),
            "val": LabelledPoints(points[val], labels[val]),
            "test": LabelledPoints(test, test_labels),
        }

    def _drawn(self, number: int) -> "LabelledPoints":
        assert self.dataset is not None
        count = int((self.train_size or 2000, self.val_size, self.test_size)[number])
        manifold, dim = MANIFOLDS[self.dataset], self.in_features
        generator = np.random.default_rng([self.seed, number])
        points, values = manifold.draw(generator, count, dim)
        if manifold.own_dim is not None and self._ambient_dim is not None:
            points = embed(points, dim, self.embedding, np.random.default_rng([self.seed, len(_PARTS)]))
        points = points + self.noise / dim**0.5 * generator.standard_normal(points.shape)
        if _PARTS[number] != "test":
            values = values + self.label_noise * generator.standard_normal(values.shape)
        return LabelledPoints(torch.from_numpy(points).float(), torch.from_numpy(values).float())

    def _users(self) -> dict[str, "LabelledPoints"]:
        x = read_samples("x", self.x).flatten(1)
        if self.y is None and x.shape[1] < 2:
            raise ValueError("Expected argument `x` to have two columns or more without `y` but got one.")
        x, y = (x[:, :-1], x[:, -1:]) if self.y is None else (x, read_samples("y", self.y).flatten(1))
        if len(y) != len(x):
            raise ValueError(f"Expected argument `y` to hold {len(x)} values, one a point of `x`, but got {len(y)}.")
        y = y.squeeze(1) if y.shape[1] == 1 else y
        if self._num_classes is not None:
            if y.ndim > 1 or not torch.equal(y, y.round()) or not 0 <= y.min() <= y.max() < self._num_classes:
                raise ValueError(
                    f"Expected argument `y` to hold classes 0 to {self._num_classes - 1} with `num_classes` but got "
                    f"values from {y.min().item():g} to {y.max().item():g} of shape {tuple(y.shape)}."
                )
            y = y.long()
        held = [round(s * len(x)) if isinstance(s, float) else s for s in (self.val_size, self.test_size)]
        if min(held) < 2 or len(x) - sum(held) < 1:
            raise ValueError(
                f"Expected arguments `val_size` and `test_size` to leave at least 2 points each and some to train on "
                f"but got {self.val_size!r} and {self.test_size!r} of {len(x)}."
            )
        order = torch.from_numpy(np.random.default_rng([self.seed, 0]).permutation(len(x)))
        val, test, train = order[: held[0]], order[held[0] : sum(held)], order[sum(held) :][: self.train_size]
        rows = zip(_PARTS, (train, val, test), strict=True)
        return {part: LabelledPoints(x[some].contiguous(), y[some].contiguous()) for part, some in rows}


class LabelledPoints(Dataset[tuple[Tensor, Tensor]]):
    """Points and values in memory; a key is an index, or (epoch, index).

    Args:
        x: shape (N, D).
        y: shape (N, ...).
    """

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y

    def __len__(self) -> int:
        return len(self.x)

    def __getitems__(self, keys: Sequence[Any]) -> tuple[Tensor, Tensor]:
        """Rows of x and of y for a list of keys."""
        rows = torch.tensor([key[1] if isinstance(key, tuple) else key for key in keys])
        return self.x[rows], self.y[rows]


def _check(name: str | None, drawn: bool, given: dict[str, Any]) -> None:
    """Refuse arguments of ``ManifoldData`` that are out of their range or do not go together."""
    check_source("x", given["x"])
    check_source("y", given["y"])
    if given["x"] is not None and name is not None:
        raise ValueError(f"Expected argument `dataset` to be None with points `x` but got {name!r}.")
    if given["y"] is not None and given["x"] is None:
        raise ValueError("Expected argument `y` to be None without points `x`.")
    if name is not None:
        check_choice(("digits", *MANIFOLDS), dataset=name)
    check_choice(EMBEDDINGS, embedding=given["embedding"])
    check_least(0, **{argument: given[argument] for argument in ("noise", "label_noise", "num_workers", "seed")})
    check_least(1, **{argument: given[argument] for argument in ("batch_size", "train_size", "eval_batch_size")})
    for argument in ("noise", "label_noise"):
        if given[argument] and not drawn:
            raise ValueError(f"Expected argument `{argument}` to be 0 without a manifold but got {given[argument]!r}.")
    if given["num_classes"] is not None and (given["x"] is None or given["num_classes"] < 2):
        raise ValueError(
            f"Expected argument `num_classes` to be at least 2, and None without points `x`, but got "
            f"{given['num_classes']!r}."
        )
    if name == "digits" and given["test_size"] is not None:
        raise ValueError(f"Expected argument `test_size` to be None for digits but got {given['test_size']!r}.")
    for argument in ("val_size", "test_size"):
        value = given[argument]
        share = isinstance(value, float) and 0 < value < 1 and not drawn
        if value is not None and not share and (isinstance(value, float) or value < 2):
            wanted = "at least 2" if drawn else "a share in (0, 1) or at least 2"
            raise ValueError(f"Expected argument `{argument}` to be {wanted} but got {value!r}.")
    _check_ambient_dim(name, drawn, given["ambient_dim"], given["embedding"])


def _check_ambient_dim(name: str | None, drawn: bool, dim: int | None, embedding: str) -> None:
    if dim is None:
        return
    if not drawn:
        raise ValueError(f"Expected argument `ambient_dim` to be None without a manifold but got {dim!r}.")
    own = MANIFOLDS[str(name)].own_dim
    if own is None:
        if dim < 2 or dim % 2:
            raise ValueError(f"Expected argument `ambient_dim` of a moment curve to be even and >= 2 but got {dim!r}.")
    elif dim < (own if embedding == "orthogonal" else 1):
        raise ValueError(f"Expected argument `ambient_dim` to be at least {own} for {name!r} but got {dim!r}.")
