"""Order, randomness and position of a training loader as values that can be saved and computed again."""

from collections.abc import Iterator
from itertools import islice, repeat
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from lightning_rectify._lightning import Trainer
from lightning_rectify.arguments import check_least


class EpochSampler(DistributedSampler[tuple[int, int]]):
    """Yields keys ``(epoch, index)``, so that a dataset can draw a sample's randomness from the key alone.

    The order is a function of seed and epoch, whatever the number of ranks. Rank r of R takes every R-th key from r:
    R ranks with batches of B / R keys see together, batch by batch, exactly what one process sees with batches of B.

    Args:
        dataset: map-style, of N samples.
        num_replicas: number of ranks R that share the samples.
        rank: this rank, 0 to R - 1.
        shuffle: whether each epoch has an order of its own; False keeps 0 to N - 1.
        seed: at least 0.
        drop_last: drop the N mod R last keys; False repeats the first ones instead, so that ranks stay equally long.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        num_replicas: int = 1,
        rank: int = 0,
        shuffle: bool = True,
        seed: int = 0,
        drop_last: bool = False,
    ) -> None:
        check_least(0, seed=seed)
        super().__init__(dataset, num_replicas, rank, shuffle, seed, drop_last)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """This rank's keys of the epoch last set by ``set_epoch``."""
        order = np.arange(len(self.dataset))  # type: ignore[arg-type]
        if self.shuffle:
            # Not seed + epoch, torch's choice: neighbouring seeds would run through the same orders one epoch apart.
            order = np.random.default_rng([self.seed, self.epoch]).permutation(order)
        order = np.resize(order, self.total_size)  # cuts, or repeats from the start
        return zip(repeat(self.epoch), order[self.rank :: self.num_replicas].tolist())


class ResumableLoader(DataLoader[Any]):
    """A DataLoader that can go on in the middle of an epoch.

    ``state_dict`` says where training goes on: in which epoch, behind how many batches; batches that the workers have
    read ahead do not count. The first iteration after ``load_state_dict`` starts there, and the skipped batches are
    drawn from the sampler but never loaded. Lightning saves and restores this state with its checkpoints.

    The epoch is the ``epoch`` attribute of the sampler (or of the batch sampler's ``sampler``, or of the batch
    sampler), set by ``set_epoch``. The order must be a function of it, as it is with :class:`EpochSampler` and
    ``DistributedSampler``. If the epoch set from outside runs ahead of the one restored (Lightning counts an epoch that
    ``max_steps`` cut short as a whole one), the difference is kept: no part of the data is left out.

    Args:
        dataset: map-style.
        *args: of ``DataLoader``.
        trainer: the trainer that the loader serves. With it, an epoch may end early (``limit_train_batches``), and a
            batch that was handed out but whose step raised an exception is trained on after the resume.
        **kwargs: of ``DataLoader``.

    Example:
        >>> loader = ResumableLoader(range(6), batch_size=2)
        >>> next(iter(loader))
        tensor([0, 1])
        >>> again = ResumableLoader(range(6), batch_size=2)
        >>> again.load_state_dict(loader.state_dict())
        >>> list(again)
        [tensor([2, 3]), tensor([4, 5])]
    """

    def __init__(self, dataset: Dataset[Any], *args: Any, trainer: Trainer | None = None, **kwargs: Any) -> None:
        self.trainer = trainer
        self._resume: dict[str, Any] | None = None  # loaded, not yet used
        self._lag = 0  # epochs by which the data is behind the epoch set from outside
        self._skip = [0]  # batches that the iteration under way leaves out; a cell shared with _Skipping
        self._epoch: int | None = None  # of the iteration under way
        self._handed_out = 0
        super().__init__(dataset, *args, **kwargs)

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        """Batches of the sampler's epoch.

        A generator, so that the sampler is not asked before the first batch is: on resume Lightning calls ``iter()``
        before ``set_epoch()``, and workers would start on the batches of epoch 0.
        """
        if self._resume is not None and self._epoch_is_over():
            return
        owner = self._epoch_owner()
        epoch_outside: int | None = getattr(owner, "epoch", None)
        resume, self._resume = self._resume or {"epoch": None, "batches": 0}, None
        if epoch_outside is not None and resume["epoch"] is not None:
            self._lag = epoch_outside - resume["epoch"]
        self._epoch = None if epoch_outside is None else epoch_outside - self._lag
        self._handed_out = self._skip[0] = resume["batches"]
        if self._lag:
            owner.set_epoch(self._epoch)
        for batch in super().__iter__():
            if self._lag:  # the sampler has begun: what others set is theirs again
                owner.set_epoch(epoch_outside)
            self._handed_out += 1
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """``{"epoch": int or None, "batches": int}``: where training goes on."""
        if self._resume is not None:
            return dict(self._resume)
        batches, total = self._handed_out, len(self)
        if self.trainer is not None:
            progress: Any = self.trainer.fit_loop.epoch_loop.batch_progress.current
            batches, total = min(batches, progress.processed), min(total, int(self.trainer.num_training_batches))
        if 0 < total <= batches:
            return {"epoch": None if self._epoch is None else self._epoch + 1, "batches": 0}
        return {"epoch": self._epoch, "batches": batches}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Let the next iteration start where ``state`` says."""
        self._resume = dict(state)

    def _epoch_is_over(self) -> bool:
        # Resumed at the end of an epoch, by steps and without validation, Lightning asks for one batch more of it.
        if self.trainer is None:
            return False
        return self.trainer.fit_loop.epoch_loop.batch_progress.current.ready >= self.trainer.num_training_batches

    def _epoch_owner(self) -> Any:
        owners = (self.sampler, getattr(self.batch_sampler, "sampler", None), self.batch_sampler)
        return next((owner for owner in owners if getattr(owner, "epoch", None) is not None), None)

    @property
    def _index_sampler(self) -> Any:
        # What torch's iterators read indices from; the one place where a batch can be left out without loading it.
        return _Skipping(super()._index_sampler, self._skip)


class _Skipping:
    """A (batch) sampler's indices without the first ``skip[0]`` of them.

    It does not know the loader: persistent workers whose iterator is in a reference cycle take seconds to shut down.
    """

    def __init__(self, sampler: Any, skip: list[int]) -> None:
        self.sampler, self.skip = sampler, skip

    def __iter__(self) -> Iterator[Any]:
        # A generator too: torch calls iter() twice where there are workers, and reads from the second only.
        yield from islice(self.sampler, self.skip[0], None)

    def __len__(self) -> int:
        return len(self.sampler)


def loader_options(seed: int, num_workers: int = 0, pin_memory: bool = False) -> dict[str, Any]:
    """What all DataLoaders of data sets that make whole batches themselves are given.

    Args:
        seed: from it each iteration draws what its workers need: not from the global generator, which dropout reads.
        num_workers: processes, which stay from epoch to epoch.
        pin_memory: of the DataLoader.
    """
    return {
        "collate_fn": _as_it_is,
        "num_workers": num_workers,
        "persistent_workers": num_workers > 0,
        "pin_memory": pin_memory,
        "generator": torch.Generator().manual_seed(seed),
    }


def _as_it_is(batch: Any) -> Any:
    """Nothing is left to collate. A named function: workers that are spawned unpickle it."""
    return batch


def training_loader(
    dataset: Dataset[Any], batch_size: int, seed: int, trainer: Any, what: str, shuffle: bool = True, **options: Any
) -> ResumableLoader:
    """Batches of one size of a rank's share of the data, in an order that is a function of seed and epoch.

    Args:
        dataset: takes keys (epoch, index).
        batch_size: on each rank.
        seed: of the order.
        trainer: whose epoch and ranks count, or None.
        what: the data consists of, for the message.
        shuffle: whether the order is drawn; False for data that has an order of each epoch's own.
        **options: of the DataLoader.

    Raises:
        ValueError: if a rank has less than one batch.
    """
    ranks = (trainer.distributed_sampler_kwargs if trainer is not None else None) or {}
    sampler = EpochSampler(dataset, **ranks, shuffle=shuffle, seed=seed, drop_last=True)
    if len(sampler) < batch_size:
        raise ValueError(
            f"Expected argument `batch_size` to be at most {len(sampler)}, the number of training {what} on each rank, "
            f"but got {batch_size}."
        )
    return ResumableLoader(dataset, sampler=sampler, batch_size=batch_size, drop_last=True, trainer=trainer, **options)
