"""``TransportData``: two distributions to transport one to the other, known problems or a user's samples."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_rectify._lightning import LightningDataModule
from lightning_rectify.arguments import check_least, check_types
from lightning_rectify.data.array_files import check_source, read_samples
from lightning_rectify.data.image_datasets import as_count
from lightning_rectify.data.resumable import ResumableLoader, loader_options, training_loader
from lightning_rectify.data.transport_truths import TransportProblem, TransportTruth, make_problem

_VAL, _TEST, _LOOK, _FIXED = 2**62, 2**62 + 1, 2**62 + 2, 2**62 + 3  # streams that no epoch has


class TransportData(LightningDataModule):
    """Samples of two distributions, drawn independently of each other.

    A batch is x, float32, shape (B, ...), and y, float32, shape (B, ...). Nothing ties the x of a row to its y. What
    training sees is a function of seed, epoch and place in the epoch: a run that resumes, two ranks with half batches,
    and any number of workers see the same points.

    Known problems need no file; ``truth`` then has the answer:

    - "bures2": two Gaussians in two dimensions (squared cost 5.674; the independent coupling 9.3).
    - "gaussians": two Gaussians with random covariances in ``dim`` dimensions.
    - "shift": a Gaussian and itself, shifted by 5. The independent coupling costs 16 % more (squared), 4 % (Euclidean):
      a right cost proves little.
    - "mixture1": a normal distribution and a mixture of two on the line.

    Their training points are drawn anew each epoch, from the whole population, unless ``train_size`` fixes a sample.

    Args:
        problem: a known problem; None for "bures2", and with ``x`` and ``y``.
        dim: D of "gaussians" (8 if None) and "shift" (2 if None).
        cost: whose truth is wanted, "squared" or "euclidean"; None for no truth.
        x: samples of the one side in place of a problem: an array or tensor (N, ...), or a file: ``.npy``, or ``.csv``
            of numbers with commas, a point a line, with or without a line of names.
        y: samples of the other; M need not be N, nor the shapes agree.
        batch_size: points of each side in a training batch, on each rank; of a game that makes several steps of the
            critics on a batch, so many times as large.
        epoch_size: points of each side in an epoch of a known problem drawn anew.
        train_size: so many training points a side, the same in each epoch; None for fresh ones, or all of ``x``, ``y``.
        val_size: points a side for validation of a known problem; of ``x`` and ``y`` the share (below 1) or number.
            The same for the test part.
        eval_batch_size: points in a batch of validation, test and prediction.
        num_workers: loader processes.
        seed: of instance, split, order and draws, at least 0.

    Raises:
        ValueError: for an argument outside its range.
        FileNotFoundError: in ``setup``, if a file is not there.
    """

    def __init__(
        self,
        problem: str | None = None,
        dim: int | None = None,
        cost: str | None = "squared",
        x: Any = None,
        y: Any = None,
        batch_size: int = 640,
        epoch_size: int = 64_000,
        train_size: int | None = None,
        val_size: int | float | None = None,
        eval_batch_size: int = 1000,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        check_types(TransportData, locals())
        val_size = as_count(val_size)
        super().__init__()
        check_source("x", x)
        check_source("y", y)
        if (x is None) != (y is None):
            raise ValueError("Expected arguments `x` and `y` to be given together but got one of them.")
        if x is not None and problem is not None:
            raise ValueError(f"Expected argument `problem` to be None with samples `x` and `y` but got {problem!r}.")
        if x is not None and dim is not None:
            raise ValueError(f"Expected argument `dim` to be None with samples `x` and `y` but got {dim!r}.")
        check_least(0, num_workers=num_workers, seed=seed)
        check_least(1, batch_size=batch_size, epoch_size=epoch_size)
        check_least(1, train_size=train_size, eval_batch_size=eval_batch_size)
        known = x is None
        if val_size is None:
            val_size = 2000 if known else 0.1
        if not 2 <= val_size < float("inf") and (known or not 0 < val_size < 1):
            wanted = "at least 2" if known else "a share in (0, 1) or at least 2"
            raise ValueError(f"Expected argument `val_size` to be {wanted} but got {val_size!r}.")
        name = "bures2" if problem is None else problem
        self.problem: TransportProblem | None = make_problem(name, dim, cost, seed) if known else None
        self.x, self.y = x, y
        self.batch_size, self.epoch_size, self.train_size, self.val_size = batch_size, epoch_size, train_size, val_size
        self.eval_batch_size, self.num_workers, self.seed = eval_batch_size, num_workers, seed
        self._parts: dict[str, Dataset[Any]] = {}

    @property
    def truth(self) -> TransportTruth | None:
        """What is known of the optimal plan; None for a user's samples."""
        return None if self.problem is None else self.problem.truth

    def setup(self, stage: str) -> None:
        """Draw or read all parts.

        Raises:
            FileNotFoundError: if a file is not there.
            ValueError: for samples too few, of no shape (N, ...), or not finite.
        """
        if self._parts:
            return
        if self.problem is not None:
            for part, stream in (("val", _VAL), ("test", _TEST)):
                self._parts[part] = Pairs(*self._draw(int(self.val_size), stream))
            if self.train_size is None:
                self._parts["train"] = FreshPairs(self.problem, self.epoch_size, self.seed)
            else:
                self._parts["train"] = Pairs(*self._draw(self.train_size, _FIXED), seed=self.seed)
            return
        sides = [read_samples(name, side) for name, side in (("x", self.x), ("y", self.y))]
        cut: dict[str, list[Tensor]] = {"train": [], "val": [], "test": []}
        for name, number, side in zip("xy", (0, 1), sides, strict=True):
            held = int(self.val_size * len(side)) if self.val_size < 1 else int(self.val_size)
            if held < 2 or len(side) - 2 * held < 1:
                raise ValueError(
                    f"Expected argument `val_size` to leave at least 2 samples of `{name}` for validation, as many for "
                    f"the test, and some to train on, but got {self.val_size!r} of {len(side)}."
                )
            order = torch.from_numpy(np.random.default_rng([self.seed, _FIXED, number]).permutation(len(side)))
            train = order[2 * held :][: self.train_size]
            for part, rows in (("val", order[:held]), ("test", order[held : 2 * held]), ("train", train)):
                cut[part].append(side[rows])
        self._parts = {part: Pairs(both[0], both[1], self.seed) for part, both in cut.items()}

    def train_dataloader(self) -> ResumableLoader:
        """Batches of one size; resumes in the middle of an epoch."""
        return training_loader(
            self._parts["train"], self.batch_size, self.seed, self.trainer, "points a side", shuffle=False,
            **self._options(),
        )  # fmt: skip

    def val_dataloader(self) -> DataLoader[Any]:
        """The validation part in order."""
        return DataLoader(self._parts["val"], batch_size=self.eval_batch_size, **self._options())

    def test_dataloader(self) -> DataLoader[Any]:
        """The test part in order."""
        return DataLoader(self._parts["test"], batch_size=self.eval_batch_size, **self._options())

    def predict_dataloader(self) -> DataLoader[Any]:
        """The test part in order."""
        return self.test_dataloader()

    @torch.inference_mode(False)  # what is kept from a validation can be used in training
    def training_samples(self, count: int) -> tuple[Tensor, Tensor]:
        """At most so many points of each side, shapes (N, ...) and (M, ...), the same at every call.

        Raises:
            RuntimeError: before ``setup``.
        """
        if not self._parts:
            raise RuntimeError("Expected `setup` to have been called before `training_samples`.")
        train = self._parts["train"]
        if isinstance(train, Pairs):
            return train.x[:count].clone(), train.y[:count].clone()
        return self._draw(count, _LOOK)

    def _draw(self, count: int, stream: int) -> tuple[Tensor, Tensor]:
        assert self.problem is not None
        return draw(self.problem, count, [self.seed, stream])

    def _options(self) -> dict[str, Any]:
        return loader_options(self.seed, self.num_workers)


class Pairs(Dataset[tuple[Tensor, Tensor]]):
    """Two samples; a key (epoch, index) is a row of x and one of y, in orders that change with the epoch, each side's.

    An epoch is as long as the larger sample; the smaller one is run through again, in another order. A plain index
    keeps the order and, at the end of the smaller sample, begins it again.

    Args:
        x: shape (N, ...).
        y: shape (M, ...).
        seed: of the orders.
    """

    def __init__(self, x: Tensor, y: Tensor, seed: int = 0) -> None:
        self.x, self.y, self.seed = x, y, seed
        self._orders: tuple[int, list[Tensor]] | None = None

    def __len__(self) -> int:
        return max(len(self.x), len(self.y))

    def __getitems__(self, keys: Sequence[Any]) -> tuple[Tensor, Tensor]:
        """Rows of x and of y for a list of keys."""
        if isinstance(keys[0], tuple):
            index = torch.tensor([key[1] for key in keys])
            orders = self._orders_of(keys[0][0])
            return self.x[orders[0][index]], self.y[orders[1][index]]
        index = torch.tensor(keys)
        return self.x[index % len(self.x)], self.y[index % len(self.y)]

    def _orders_of(self, epoch: int) -> list[Tensor]:
        if self._orders is None or self._orders[0] != epoch:
            orders = []
            for side, data in enumerate((self.x, self.y)):
                generator = np.random.default_rng([self.seed, epoch, side])
                rounds = -(-len(self) // len(data))
                order = np.concatenate([generator.permutation(len(data)) for _ in range(rounds)])
                orders.append(torch.from_numpy(order[: len(self)]))
            self._orders = (epoch, orders)
        return self._orders[1]


class FreshPairs(Dataset[tuple[Tensor, Tensor]]):
    """An epoch's points drawn from the population: a function of seed and epoch.

    Args:
        problem: to draw from.
        size: points of each side in an epoch.
        seed: of the draws.
    """

    def __init__(self, problem: TransportProblem, size: int, seed: int = 0) -> None:
        self.problem, self.size, self.seed = problem, size, seed
        self._drawn: tuple[int, tuple[Tensor, Tensor]] | None = None

    def __len__(self) -> int:
        return self.size

    def __getitems__(self, keys: Sequence[tuple[int, int]]) -> tuple[Tensor, Tensor]:
        """Rows of x and of y for a list of keys (epoch, index)."""
        epoch = keys[0][0]
        if self._drawn is None or self._drawn[0] != epoch:
            self._drawn = (epoch, draw(self.problem, self.size, [self.seed, epoch]))
        index = torch.tensor([key[1] for key in keys])
        return self._drawn[1][0][index], self._drawn[1][1][index]


def draw(problem: TransportProblem, count: int, seed: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Points of both sides, float32, shape (count, D) each, drawn independently.

    Args:
        problem: to draw from.
        count: of each side.
        seed: what numpy's generator takes.
    """
    sides = (problem.draw_x, problem.draw_y)
    x, y = (side(count, np.random.default_rng([*seed, number])) for number, side in enumerate(sides))
    return torch.from_numpy(x).float(), torch.from_numpy(y).float()
