"""Independent streams of minibatches from one training loader, which is left where it stands."""

import copy
import random
from collections.abc import Iterable, Iterator, Mapping
from itertools import count, islice
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, Sampler

_FIRST_EPOCH = 1_000_000  # beyond those that training will see
_EPOCHS = 1_000  # a stream
_LONG_EPOCH = 8  # times the length of a stream: its end has no part in it


class Streams:
    """S streams of minibatches; iterating gives them in turns: first of each stream, second of each, and so on.

    The training loader is not touched: batches come from a loader of its own over the same data set, with the same
    workers and collate function.

    - A loader with an order of its own each epoch (``shuffle=True``, a generator, a sampler with ``set_epoch``): each
      stream has a copy of the (batch) sampler with another seed, or in epochs that training will not see. A stream
      longer than an epoch goes on with the next one. Each begins at a random place in its first epoch: else all would
      end an epoch at the same step, where they have seen the same samples and differ far less than before and after.
    - A loader that does not shuffle, an ``IterableDataset`` (a deep copy of it), or a loader class with an iteration
      of its own: one long pass is dealt out to the streams in turns; it begins anew, one batch further on, where the
      data ends. :attr:`notes` then says so.
    - A list or dict of loaders gives lists or dicts of batches; a shorter loader begins anew.

    Args:
        loader: a DataLoader, or a list or dict of them, or any iterable of batches that can be iterated again.
        streams: number of streams S.
        length: batches in a stream, T.
        seed: of the streams.
        rank: of this process; ranks whose loaders are not sharded have streams of their own.

    Raises:
        ValueError: if the loader has no batches, or is an iterator that cannot be copied.
    """

    def __init__(self, loader: Any, streams: int, length: int, seed: int = 0, rank: int = 0) -> None:
        self.loader, self.streams, self.length = loader, streams, length
        self.seed, self.rank = seed, rank
        #: what is not as it should be, in words
        self.notes: list[str] = []

    def __iter__(self) -> Iterator[Any]:
        """``streams * length`` batches."""
        return islice(self._batches(self.loader), self.streams * self.length)

    def _batches(self, loader: Any) -> Iterator[Any]:
        if isinstance(loader, Mapping):
            parts = {key: self._batches(part) for key, part in loader.items()}
            return ({key: next(part) for key, part in parts.items()} for _ in count())
        if isinstance(loader, (list, tuple)) and loader and isinstance(loader[0], DataLoader):
            several = [self._batches(part) for part in loader]
            return ([next(part) for part in several] for _ in count())
        if not isinstance(loader, DataLoader) or not _is_plain(loader):
            return self._one_pass(_copied(loader))
        if isinstance(loader.dataset, IterableDataset):
            return self._one_pass(_sibling(loader, self.seed))
        plan = self._plan(loader.sampler if loader.batch_sampler is None else loader.batch_sampler)
        return iter(_sibling(loader, self.seed, plan))

    def _plan(self, sampler: Any) -> list[Any]:
        """Which samples make each batch, in turns over the streams."""
        seeds = np.random.SeedSequence([self.seed, self.rank]).generate_state(self.streams)
        if _same_order(sampler, seeds):
            return list(islice(self._one_pass(_own(sampler, self.seed)), self.streams * self.length))
        plans = [  # the copies of each sampler live for this long only: a permutation of ten million is large
            _take(_own(sampler, int(seed)), self.length, _FIRST_EPOCH + _EPOCHS * stream, int(seed))
            for stream, seed in enumerate(seeds)
        ]
        return [plan[step] for step in range(self.length) for plan in plans]

    def _one_pass(self, batches: Iterable[Any]) -> Iterator[Any]:
        wanted = self.streams * self.length
        self.notes.append(
            "the loader has no order of its own each epoch: one pass was dealt out to the streams, which are "
            "independent only if the data is in random order"
        )
        given = size = 0
        for epoch in count():
            before = given
            # One further on each time, or each stream would get the same batches again.
            for batch in islice(batches, epoch % size if size else 0, None):
                yield batch
                given += 1
            if given == before:
                raise ValueError(f"Expected the training loader to have batches but got none from {self.loader!r}.")
            if epoch == 0:
                size = given
                if size < wanted:
                    self.notes.append(f"the pass has {size} batches, fewer than {wanted}: streams share batches")


def _is_plain(loader: DataLoader[Any]) -> bool:
    """Whether its batches are those of a plain DataLoader with its samplers; a stateful one only counts them."""
    overridden = type(loader).__iter__ is not DataLoader.__iter__
    return not overridden or (hasattr(loader, "state_dict") and hasattr(loader, "load_state_dict"))


def _copied(loader: Any) -> Any:
    if isinstance(loader, DataLoader):
        loader = copy.copy(loader)
        loader._iterator = None  # persistent workers are the original's
        return loader
    try:
        return copy.deepcopy(loader)
    except TypeError as error:
        raise ValueError(
            "Expected the training loader to be one that can be copied, so that training gets its batches, but got "
            f"{type(loader).__name__} ({error})."
        ) from error


def _sibling(loader: DataLoader[Any], seed: int, plan: list[Any] | None = None) -> DataLoader[Any]:
    """A loader over the same data that shares no state with this one.

    Args:
        loader: the original.
        seed: of what workers draw from.
        plan: keys of each batch (for a loader without batches of its own: of each item); None for an iterable data set.
    """
    options: dict[str, Any] = {
        "collate_fn": loader.collate_fn,
        "num_workers": loader.num_workers,
        "pin_memory": loader.pin_memory,
        "timeout": loader.timeout,
        "worker_init_fn": loader.worker_init_fn,
        "generator": torch.Generator().manual_seed(seed),
    }
    if loader.num_workers > 0:
        options |= {
            "multiprocessing_context": loader.multiprocessing_context,
            "prefetch_factor": loader.prefetch_factor,
        }
    if plan is None:
        dataset = copy.deepcopy(loader.dataset)
        return DataLoader(dataset, batch_size=loader.batch_size, drop_last=loader.drop_last, **options)
    if loader.batch_sampler is None:
        return DataLoader(loader.dataset, batch_size=None, sampler=plan, **options)
    return DataLoader(loader.dataset, batch_sampler=plan, **options)


def _own(sampler: Any, seed: int) -> Any:
    """A copy of a sampler, and of those inside it, with generators of its own."""
    own = copy.copy(sampler)
    for name, value in list(getattr(own, "__dict__", {}).items()):
        if isinstance(value, torch.Generator):
            setattr(own, name, torch.Generator(value.device).manual_seed(seed))
        elif name == "generator" and value is None:  # torch's samplers would draw a seed from the global one
            own.generator = torch.Generator().manual_seed(seed)
        elif isinstance(value, np.random.Generator):
            setattr(own, name, np.random.default_rng(seed))
        elif isinstance(value, np.random.RandomState):
            setattr(own, name, np.random.RandomState(seed))
        elif isinstance(value, random.Random):
            setattr(own, name, random.Random(seed))
        elif isinstance(value, Sampler):
            setattr(own, name, _own(value, seed))
    return own


def _same_order(sampler: Any, seeds: Any) -> bool:
    """Whether copies of a sampler with different seeds and epochs begin alike."""
    first, second = (
        _keys(_own(sampler, int(seed)), _FIRST_EPOCH + _EPOCHS * stream) for stream, seed in enumerate(seeds[:2])
    )
    return first == second


def _keys(sampler: Any, epoch: int) -> str:
    _set_epoch(sampler, epoch)
    return repr(list(islice(sampler, 8)))


def _set_epoch(sampler: Any, epoch: int) -> None:
    for owner in (sampler, getattr(sampler, "sampler", None)):
        if callable(set_epoch := getattr(owner, "set_epoch", None)):
            set_epoch(epoch)


def _take(sampler: Any, length: int, first_epoch: int, seed: int) -> list[Any]:
    """Keys of a sampler from a random place in an epoch on, over as many epochs as it takes."""
    taken: list[Any] = []
    size = len(sampler) if hasattr(sampler, "__len__") else 0
    start = int(np.random.default_rng(seed).integers(size)) if 0 < size <= _LONG_EPOCH * length else 0
    for epoch in count(first_epoch):
        _set_epoch(sampler, epoch)
        before = len(taken)
        taken += islice(sampler, start, start + length - before)
        start = 0
        if len(taken) == length:
            break
        if len(taken) == before and epoch > first_epoch:
            raise ValueError("Expected the training loader to have batches but its sampler gave none.")
    return taken
