"""Batches of sentences by number of tokens: their plan for every rank, and the pairs that a batch is made of."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset, DistributedSampler

from lightning_rectify.arguments import check_least
from lightning_rectify.text import BOS, EOS, TranslationBatch, pad


class EncodedTexts:
    """Sentences as ids, side by side in one array, so that workers share it and no sentence is an object.

    Args:
        sentences: N lists of ids.
    """

    def __init__(self, sentences: Sequence[Sequence[int]]) -> None:
        self._ends = np.cumsum([0, *map(len, sentences)])
        self._ids = np.fromiter((i for sentence in sentences for i in sentence), np.int32, count=int(self._ends[-1]))

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> list[int]:
        ids: list[int] = self._ids[self._ends[index] : self._ends[index + 1]].tolist()
        return ids

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Number of ids of each sentence, shape (N,)."""
        return np.diff(self._ends)


class EncodedPairs(Dataset[TranslationBatch]):
    """N sentences and their translations; the key of an item is the tuple of places that make a batch.

    Args:
        sources: the sentences, without special ids.
        targets: their translations, without special ids; None if there are none.
        index: place of each sentence in its file, shape (N,); None for 0 to N - 1.
        references: the translations as text; None to leave them out of batches.
    """

    def __init__(
        self,
        sources: EncodedTexts,
        targets: EncodedTexts | None = None,
        index: NDArray[np.int64] | None = None,
        references: Sequence[str] | None = None,
    ) -> None:
        self.sources, self.targets, self.references = sources, targets, references
        self.index = np.arange(len(sources)) if index is None else index

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens that the network sees of each sentence, shape (N, 2) or, without targets, (N, 1).

        The EOS of the source counts, and of BOS and EOS of the target one: decoder input and labels have one each.
        """
        sides = [self.sources] if self.targets is None else [self.sources, self.targets]
        return np.stack([side.lengths for side in sides], axis=1) + 1

    def take(self, places: Sequence[int]) -> "EncodedPairs":
        """The sentences at these places, which keep their ``index``."""
        sources, targets = (
            None if side is None else EncodedTexts([side[i] for i in places]) for side in (self.sources, self.targets)
        )
        assert sources is not None
        references = None if self.references is None else [self.references[i] for i in places]
        return EncodedPairs(sources, targets, self.index[list(places)], references)

    def __len__(self) -> int:
        return len(self.sources)

    def __getitem__(self, key: int | tuple[int, ...]) -> TranslationBatch:
        """The sentences at these places, in this order; one place is a batch of one."""
        places = (key,) if isinstance(key, int) else key  # Lightning's overfit_batches asks for single ones
        return TranslationBatch(
            source=pad([[*self.sources[i], EOS] for i in places]),
            target=None if self.targets is None else pad([[BOS, *self.targets[i], EOS] for i in places]),
            index=torch.from_numpy(self.index[list(places)]),
            references=None if self.references is None else [self.references[i] for i in places],
        )


class TokenBatchSampler(DistributedSampler[tuple[int, ...]]):
    """Yields batches: tuples of places in a dataset. Use it as ``sampler`` of a loader with ``batch_size=None``.

    The plan of an epoch is made of global batches, which all R ranks share. It is a function of lengths, seed, epoch
    and the global size of a batch, R times that of a rank, and rank r takes every R-th sentence from r of each global
    batch. So R ranks with 1 / R of the size see together, batch by batch, what one process sees; each rank has the same
    number of batches, the same in every epoch; and no sentence is repeated. (A batch has at least R sentences: where it
    would have fewer, and only there, plans for other R differ.)

    - By ``batch_tokens`` (bucketing): sentences sorted by length, those of one length shuffled, are cut into batches,
      and these are shuffled. A batch's tokens are its number of sentences times the longest length in it, as fairseq
      counts them (arXiv:1904.01038), on all ranks together at most R * ``batch_tokens``; one rank may be above its
      share by a sentence. A sentence that is longer makes a batch of its own. None is left out.
    - By ``batch_size``: a new permutation each epoch, cut into global batches of R * ``batch_size`` sentences; those
      left over, fewer than a batch, change from epoch to epoch.
    - Without ``shuffle`` sentences are sorted by length and none is left out, in both cases: for evaluation.

    A last batch of fewer than R sentences is joined to the one before it.

    It is a ``DistributedSampler``, so that Lightning leaves it in place.

    Args:
        lengths: tokens of each sentence, shape (N,), or of each of its K sides, shape (N, K), the first of which is
            sorted by first; the length of a sentence is its longest side.
        batch_tokens: tokens of a batch on each rank, at least 1.
        batch_size: sentences of a batch on each rank, at least 1. Exactly one of the two is to be given.
        num_replicas: number of ranks R.
        rank: this rank, 0 to R - 1.
        shuffle: whether each epoch has an order of its own.
        seed: at least 0.

    Raises:
        ValueError: for an argument outside its range, and if there are fewer sentences than ranks, or than a global
            batch of ``batch_size`` when shuffled.
    """

    def __init__(
        self,
        lengths: NDArray[np.int64],
        batch_tokens: int | None = None,
        batch_size: int | None = None,
        num_replicas: int = 1,
        rank: int = 0,
        shuffle: bool = True,
        seed: int = 0,
    ) -> None:
        if (batch_tokens is None) == (batch_size is None):
            raise ValueError(
                "Expected exactly one of the arguments `batch_tokens` and `batch_size` but got "
                f"{batch_tokens!r} and {batch_size!r}."
            )
        check_least(0, seed=seed)
        check_least(1, batch_tokens=batch_tokens, batch_size=batch_size)
        if len(lengths) < num_replicas:
            raise ValueError(
                f"Expected argument `lengths` to have at least one sentence for each of {num_replicas} ranks but got "
                f"{len(lengths)}."
            )
        self.lengths = np.asarray(lengths).reshape(len(lengths), -1)
        super().__init__(self.lengths, num_replicas, rank, shuffle, seed)  # type: ignore[arg-type]
        self._by_size = shuffle and batch_size is not None
        self._ends = self._cut(batch_tokens, batch_size)

    def __len__(self) -> int:
        """Number of batches, on this rank as on all."""
        return len(self._ends)

    def __iter__(self) -> Iterator[tuple[int, ...]]:
        """This rank's batches of the epoch last set by ``set_epoch``."""
        places = np.arange(len(self.lengths))
        rng = np.random.default_rng([self.seed, self.epoch])
        if self.shuffle:
            places = rng.permutation(places)
        if not self._by_size:
            places = places[self._by_length(places)]
        batches = np.split(places, self._ends)[: len(self)]
        for batch in rng.permutation(len(batches)) if self.shuffle and not self._by_size else range(len(batches)):
            yield tuple(batches[batch][self.rank :: self.num_replicas].tolist())

    def _by_length(self, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """Order that sorts places by the first side, then the second; stable, so that equals stay shuffled."""
        return np.lexsort(self.lengths[places].T[::-1])

    def _cut(self, batch_tokens: int | None, batch_size: int | None) -> list[int]:
        """Where each global batch ends.

        It does not depend on the epoch: the list of lengths, once sorted, is the same however places were shuffled.
        """
        ranks, count = self.num_replicas, len(self.lengths)
        if batch_size is not None:
            ends = list(range(ranks * batch_size, count + 1, ranks * batch_size))
            if self._by_size:
                if not ends:
                    raise ValueError(
                        f"Expected argument `batch_size` to be at most {count // ranks}, the number of sentences on "
                        f"each rank, but got {batch_size}."
                    )
                return ends
        else:
            longest = self.lengths[self._by_length(np.arange(count))].max(axis=1)
            ends = _cut_by_tokens(longest.tolist(), ranks * (batch_tokens or 0), ranks)
        if not ends or ends[-1] < count:
            ends.append(count)
        if len(ends) > 1 and ends[-1] - ends[-2] < ranks:
            del ends[-2]
        return ends


def _cut_by_tokens(lengths: list[int], tokens: int, least: int) -> list[int]:
    """Where batches of at most ``tokens`` end, but for the last one; each has at least so many sentences."""
    ends: list[int] = []
    start = longest = 0
    for place, length in enumerate(lengths):
        if place - start >= least and (place - start + 1) * max(longest, length) > tokens:
            ends.append(place)
            start, longest = place, 0
        longest = max(longest, length)
    return ends
