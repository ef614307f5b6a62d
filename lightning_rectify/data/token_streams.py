"""Text cut into streams side by side, and these into windows: what a recurrent network reads with a carried state."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from lightning_rectify.words import END, IGNORED, TextBatch, WordVocabulary, sentence_batch

_GATHERED = 1 << 20  # sentences moved at once: an index of all words would be larger than the words


class EncodedSentences:
    """M sentences as ids, side by side in one array, each with ``END`` behind it.

    Args:
        ids: N words, int32, shape (N,).
        ends: place behind each sentence's last id, int64, shape (M,).
    """

    def __init__(self, ids: NDArray[np.int32], ends: NDArray[np.int64]) -> None:
        self.ids, self.ends = ids, ends

    @classmethod
    def encode(cls, vocabulary: WordVocabulary, shards: Iterable[Sequence[str]]) -> "EncodedSentences":
        """Encode sentences, shard by shard."""
        arrays: list[NDArray[np.int32]] = []
        lengths: list[NDArray[np.int64]] = []
        for shard in shards:
            encoded = [[*vocabulary.encode(sentence), END] for sentence in shard]
            lengths.append(np.fromiter(map(len, encoded), np.int64, count=len(encoded)))
            count = int(lengths[-1].sum())
            arrays.append(np.fromiter((i for sentence in encoded for i in sentence), np.int32, count=count))
        ids = np.concatenate(arrays) if arrays else np.zeros(0, np.int32)
        return cls(ids, np.cumsum(np.concatenate(lengths)) if lengths else np.zeros(0, np.int64))

    def __len__(self) -> int:
        return len(self.ends)

    def sentence(self, place: int) -> NDArray[np.int32]:
        """Ids of one sentence, without its ``END``."""
        return self.ids[(self.ends[place - 1] if place else 0) : self.ends[place] - 1]

    def permuted(self, order: NDArray[np.int64]) -> NDArray[np.int32]:
        """Ids of all sentences in another order, shape (N,)."""
        found = np.empty_like(self.ids)
        lengths = np.diff(self.ends, prepend=0)
        done = 0
        for first in range(0, len(order), _GATHERED):
            part = order[first : first + _GATHERED]
            sizes = lengths[part]
            offsets = np.cumsum(sizes) - sizes
            places = np.repeat(self.ends[part] - sizes - offsets, sizes) + np.arange(int(sizes.sum()))
            found[done : done + len(places)] = self.ids[places]
            done += len(places)
        return found


@dataclass(frozen=True)
class Share:
    """Which streams a rank reads.

    Attributes:
        rank: 0 to ``ranks - 1``.
        ranks: number of ranks R; rank r reads every R-th stream from r.
    """

    rank: int = 0
    ranks: int = 1


class TrainingStreams(Dataset[TextBatch]):
    """An epoch of training: equally long streams, and windows of them.

    The text of an epoch, its sentences perhaps in a new order, is cut into S streams of L = N // S words, and these
    into W = L // T windows. Streams are in G = S / (R B) groups; batch ``w G + g`` is window w of group g's R B
    streams, of which rank r of R has every R-th. So what a step sees does not depend on how its streams are shared out:
    R ranks with B streams each are one with R B, and G batches, accumulated, are one of all S streams.

    An item's key is ``(epoch, batch)``, or the batch alone for epoch 0. All words of an epoch count the same, and all
    batches have as many; left over are fewer than T words a stream, others in each epoch if it is shuffled.

    Args:
        text: the sentences, of N words with their ends.
        streams: number S of streams on all ranks.
        batch_size: streams B of a batch on each rank.
        bptt: words T of a window.
        share: of this rank.
        shuffle: whether each epoch has its sentences in an order of its own; False keeps running text together.
        seed: of the order, at least 0.

    Raises:
        ValueError: if S is not a multiple of R B, or the text is too short for one window.
    """

    def __init__(
        self,
        text: EncodedSentences,
        streams: int,
        batch_size: int,
        bptt: int,
        share: Share | None = None,
        shuffle: bool = False,
        seed: int = 0,
    ) -> None:
        self.share = share or Share()
        if streams % (batch_size * self.share.ranks):
            raise ValueError(
                f"Expected argument `streams` to be a multiple of {batch_size * self.share.ranks}, the streams of a "
                f"batch on all ranks, but got {streams}."
            )
        self.text, self.streams, self.batch_size, self.bptt = text, streams, batch_size, bptt
        self.shuffle, self.seed = shuffle, seed
        self.groups = streams // (batch_size * self.share.ranks)
        # Read from the end of a sentence before the first: N words, all of which can be predicted.
        self.length = len(text.ids) // streams
        if self.length < bptt:
            raise ValueError(
                f"Expected argument `streams` to leave at least `bptt`, {bptt}, of the text's {len(text.ids)} words to "
                f"each stream but got {streams}, which leave {self.length}."
            )
        self._epoch: tuple[int, NDArray[np.int32]] | None = None

    def __len__(self) -> int:
        """Number of batches of an epoch."""
        return self.length // self.bptt * self.groups

    def __getitem__(self, key: int | tuple[int, int]) -> TextBatch:
        epoch, batch = (0, key) if isinstance(key, int) else key
        window, group = divmod(batch, self.groups)
        first = group * self.batch_size * self.share.ranks + self.share.rank
        index = first + self.share.ranks * np.arange(self.batch_size)
        places = (index * self.length + window * self.bptt)[:, None] + np.arange(self.bptt + 1)
        words = torch.from_numpy(self._words(epoch)[places].astype(np.int64))
        return TextBatch(
            tokens=words[:, :-1],
            targets=words[:, 1:],
            index=torch.from_numpy(index),
            group=group,
            groups=self.groups,
            start=window == 0,
        )

    def _words(self, epoch: int) -> NDArray[np.int32]:
        """``END`` and the words of an epoch; kept until another is asked for."""
        if not self.shuffle:
            epoch = 0
        if self._epoch is None or self._epoch[0] != epoch:
            self._epoch = None  # two epochs of a large text need not fit
            ids = self.text.ids
            if self.shuffle:
                order = np.random.default_rng([self.seed, epoch]).permutation(len(self.text))
                ids = self.text.permuted(order)
            self._epoch = epoch, np.concatenate([np.array([END], np.int32), ids])
        return self._epoch[1]


class EvaluationStreams(Dataset[TextBatch]):
    """A text to be measured: each word once, in streams whose lengths differ by at most one.

    What a word is predicted from does not depend on the number of ranks, nor does the number of batches, ceil(L / T)
    with L the longest stream; rank r of R has every R-th stream from r.

    Args:
        text: the sentences, of N words with their ends.
        streams: number S of streams on all ranks; fewer for a text of fewer words.
        bptt: words T of a window.
        share: of this rank.

    Raises:
        ValueError: if there are fewer streams than ranks.
    """

    def __init__(self, text: EncodedSentences, streams: int, bptt: int, share: Share | None = None) -> None:
        share = share or Share()
        streams = min(streams, len(text.ids))
        if streams < share.ranks:
            raise ValueError(
                f"Expected argument `eval_streams` to give each of {share.ranks} ranks a stream of the text's "
                f"{len(text.ids)} words but got {streams}."
            )
        self.bptt = bptt
        self._index = np.arange(share.rank, streams, share.ranks)
        ends = np.arange(streams + 1) * len(text.ids) // streams
        self._starts, self._ends = ends[self._index], ends[self._index + 1]
        self._longest = int(np.diff(ends).max())
        self._words = np.concatenate([np.array([END], np.int32), text.ids])

    def __len__(self) -> int:
        """Number of batches, on this rank as on all."""
        return -(-self._longest // self.bptt)

    def __getitem__(self, window: int) -> TextBatch:
        first = window * self.bptt
        places = self._starts[:, None] + np.arange(first, min(first + self.bptt, self._longest))
        real = places < self._ends[:, None]
        places = np.minimum(places, len(self._words) - 2)
        targets = np.where(real, self._words[places + 1], IGNORED)
        return TextBatch(
            tokens=torch.from_numpy(self._words[places].astype(np.int64)),
            targets=torch.from_numpy(targets.astype(np.int64)),
            index=torch.from_numpy(self._index),
            start=window == 0,
        )


class WholeSentences(Dataset[TextBatch]):
    """Sentences to be scored; an item's key is the tuple of places that make a batch.

    Args:
        text: the sentences.
    """

    def __init__(self, text: EncodedSentences) -> None:
        self.text = text

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Words of each sentence, its end among them, shape (M,)."""
        return np.diff(self.text.ends, prepend=0)

    def __len__(self) -> int:
        return len(self.text)

    def __getitem__(self, places: tuple[int, ...]) -> TextBatch:
        return sentence_batch([self.text.sentence(i).tolist() for i in places], torch.tensor(places))
