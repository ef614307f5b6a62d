"""The face for people who do not train: from samples to a cost, pairs and an out-of-sample map."""

import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from lightning_rectify._lightning import Callback, Trainer
from lightning_rectify.arguments import check_choice, check_least
from lightning_rectify.modules.spot.metrics import TransportEstimate, estimate
from lightning_rectify.modules.spot.plan import LOOK, PlanModule
from lightning_rectify.modules.spot.transport_map import TransportMap

Samples = Tensor | np.ndarray[Any, Any] | Sequence[Any]
Plan = TypeVar("Plan", bound="PlanEstimator")


class PlanEstimator(PlanModule):
    """A game whose generator is a transport plan, and what can be asked of it by those who do not train.

    All answers come from the generator's moving average, in the units of the data, and are functions of the weights and
    the arguments: latents are drawn on the CPU from ``seed``.
    """

    _samples: tuple[Tensor, Tensor] | None = None

    @classmethod
    def fit_samples(
        cls: type[Plan],
        x: Samples,
        y: Samples,
        *,
        steps: int = 1500,
        batch_size: int = 128,
        seed: int = 0,
        accelerator: str = "auto",
        callbacks: Sequence[Callback] = (),
        **options: Any,
    ) -> Plan:
        """Train a plan between two samples, quietly, and return it.

        The global random state is left as it was. The samples are kept (not in checkpoints) for the marginal gaps of
        :meth:`cost`.

        Args:
            x: samples of the one side, shape (N, ...) or (N,) for numbers; arrays, tensors or lists, finite.
            y: samples of the other, shape (M, ...); M need not be N.
            steps: of the generator, at least 1.
            batch_size: points of each side a step of the critics, drawn with replacement, at least 1.
            seed: of weights, batches and latents, at least 0.
            accelerator: of the Trainer; small networks are as fast on the "cpu".
            callbacks: of the Trainer.
            **options: of the class; shapes are taken from the samples.

        Raises:
            ValueError: for an argument outside its range.

        Example:
            >>> x = torch.randn(500, 2)
            >>> plan = SPOT.fit_samples(x, x + 3.0, steps=500)  # doctest: +SKIP
            >>> plan.cost().value, plan.transform(torch.zeros(1, 2))  # doctest: +SKIP
            (17.9, tensor([[2.98, 3.01]]))
        """
        left, right = as_samples("x", x), as_samples("y", y)
        check_least(0, seed=seed)
        check_least(1, steps=steps, batch_size=batch_size)
        with torch.random.fork_rng(), _quiet():
            torch.manual_seed(seed)
            shapes = {"shape_x": list(left.shape[1:]), "shape_y": list(right.shape[1:])}
            plan = cls(**{**shapes, "decay_steps": steps, **options})
            batches = _Batches(left, right, batch_size * plan.turns["critic"], seed)
            trainer = Trainer(
                max_steps=steps, max_epochs=-1, accelerator=accelerator, devices=1, callbacks=list(callbacks),
                logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
            )  # fmt: skip
            plan._samples = (left, right)
            trainer.fit(plan, DataLoader(batches, batch_size=None))
        return plan.eval()

    def cost(
        self, x: Samples | None = None, y: Samples | None = None, count: int = 10_000, seed: int = 0
    ) -> TransportEstimate:
        """The plan's transport cost, beside what it takes to believe it.

        The value is the mean cost of generated pairs, nothing of a critic's. See
        :class:`~lightning_rectify.modules.spot.metrics.TransportEstimate` for what the interval does not cover.

        Args:
            x: samples to hold the marginal of x against, shape (N, ...); None for those of :meth:`fit_samples`.
            y: the same of y; both or neither.
            count: pairs generated, at least 2; no more samples than that enter the gaps.
            seed: of the latents.

        Raises:
            ValueError: for one of x and y alone, or a count below 2.
        """
        if (x is None) != (y is None):
            raise ValueError("Expected arguments `x` and `y` to be given together but got one of them.")
        check_least(2, count=count)
        data = self._samples if x is None or y is None else (as_samples("x", x), as_samples("y", y))
        return estimate(self.cost_function, self.sample_pairs(count, seed), data, float(self.eta))

    def transform(
        self, x: Samples, mode: str = "mean", neighbours: int = 10, pool: int = 10_000, seed: int = 0
    ) -> Tensor:
        """Carry points from x's side to y's, new ones too, by the plan's conditional law.

        ``pool`` pairs are generated; those whose x is among the ``neighbours`` nearest to a point (Euclidean distance)
        are taken for the plan's law given the point. "mean" returns the mean of their y; where both sides have one
        shape, the point plus their mean displacement y - x, which does not shrink towards the neighbours. "sample"
        returns the y of one of them, drawn at random. The error is that of a nearest-neighbour estimate: it grows with
        the dimension and outside the data.

        Args:
            x: points, shape (N, *shape_x).
            mode: "mean" (the barycentric map) or "sample".
            neighbours: at least 1 and at most ``pool``.
            pool: pairs generated.
            seed: of pairs and draws.

        Returns:
            Shape (N, *shape_y), on the module's device.

        Raises:
            ValueError: for an argument outside its range.
        """
        return self._carry(as_samples("x", x), self.sample_pairs(pool, seed), mode, neighbours, seed)

    def inverse_transform(
        self, y: Samples, mode: str = "mean", neighbours: int = 10, pool: int = 10_000, seed: int = 0
    ) -> Tensor:
        """The same from y's side to x's: points of shape (N, *shape_y) to (N, *shape_x)."""
        x, image = self.sample_pairs(pool, seed)
        return self._carry(as_samples("y", y), (image, x), mode, neighbours, seed)

    def transport_map(self, neighbours: int = 10, pool: int = 10_000, seed: int = 0) -> TransportMap:
        """What :meth:`transform` does, as a network with its pairs inside: for ``torch.export``, or without Lightning.

        Args:
            neighbours: at least 1 and at most ``pool``.
            pool: pairs generated and kept.
            seed: of the pairs.

        Raises:
            ValueError: for ``neighbours`` outside its range.
        """
        return TransportMap(*self.sample_pairs(pool, seed), neighbours)

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        """:meth:`transform` of the batch's x (a batch is x, or x with others), shape (B, *shape_y)."""
        return self.transform(batch[0] if isinstance(batch, (tuple, list)) else batch, seed=self.eval_seed)

    def _first_samples(self) -> tuple[Tensor, Tensor]:
        """Of samples in memory some at random: users' are often sorted."""
        if self._samples is None:
            return super()._first_samples()
        generator = torch.Generator().manual_seed(0)
        x, y = (side[torch.randperm(len(side), generator=generator)[:LOOK]] for side in self._samples)
        return x, y

    def _carry(self, points: Tensor, pairs: tuple[Tensor, Tensor], mode: str, neighbours: int, seed: int) -> Tensor:
        check_choice(("mean", "sample"), mode=mode)
        here, there = pairs
        carry = TransportMap(here, there, neighbours)
        if points.shape[1:] != here.shape[1:]:
            raise ValueError(
                f"Expected points of shape (N, {', '.join(map(str, here.shape[1:]))}) but got {tuple(points.shape)}."
            )
        generator = torch.Generator().manual_seed(seed)
        pick = torch.randint(neighbours, (len(points), 1), generator=generator).to(here.device)
        answers = []
        for some, choice in zip(points.to(here).split(1024), pick.split(1024), strict=True):
            if mode == "sample":
                answers.append(there[carry.nearest(some).gather(1, choice)[:, 0]])
            else:
                answers.append(carry(some))
        return torch.cat(answers)


def as_samples(name: str, samples: Samples) -> Tensor:
    """Samples as a float32 tensor, shape (N, ...), numbers as (N, 1).

    Args:
        name: of the argument, for the message.
        samples: an array, tensor or list.

    Raises:
        ValueError: for fewer than 1 sample, or values that are not finite.
    """
    tensor = torch.as_tensor(samples).detach().to(torch.float32)
    if tensor.ndim == 0 or not len(tensor):
        raise ValueError(f"Expected argument `{name}` to hold samples, shape (N, ...), but got {tuple(tensor.shape)}.")
    if not torch.isfinite(tensor).all():
        raise ValueError(f"Expected argument `{name}` to be finite but got NaN or infinity among its values.")
    return tensor[:, None] if tensor.ndim == 1 else tensor


class _Batches(IterableDataset[tuple[Tensor, Tensor]]):
    """Endless batches, each side drawn with replacement: a function of the seed."""

    def __init__(self, x: Tensor, y: Tensor, size: int, seed: int) -> None:
        self.x, self.y, self.size, self.seed = x, y, size, seed

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(self.seed)
        while True:
            rows, columns = (torch.randint(len(p), (self.size,), generator=generator) for p in (self.x, self.y))
            yield self.x[rows], self.y[columns]


@contextmanager
def _quiet() -> Iterator[None]:
    """Leave out what Lightning says of hardware and loaders; warnings of our own come through."""
    loggers = [logging.getLogger(name) for name in ("pytorch_lightning", "lightning.pytorch", "lightning")]
    handles = [logging.getLogger(f"{logger.name}.utilities.rank_zero") for logger in loggers]
    levels: list[tuple[Callable[[int], None], int]] = [(log.setLevel, log.level) for log in [*loggers, *handles]]
    for put, _ in levels:
        put(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*(num_workers|_dataloader|IterableDataset|treespec).*")
            yield
    finally:
        for put, level in levels:
            put(level)
