"""Text as numbers, word by word: vocabularies sorted by frequency, and what a batch of text holds."""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_rectify.arguments import check_least, check_types

UNKNOWN, END = 0, 1
"""Ids of words that a vocabulary does not know, and of a sentence's end; in each vocabulary."""

IGNORED = -1
"""Stands in ``targets`` where there is no word to be predicted."""

SPECIAL = ("<unk>", "</s>")
"""How text shows ids ``UNKNOWN`` and ``END``."""


class TextBatch(NamedTuple):
    """B pieces of text, each of T words: streams that go on from batch to batch, or whole sentences.

    In training, the text is cut into streams side by side, these into ``groups`` groups of B, and a batch is a window
    of one group's streams. The next window of the same streams is ``groups`` batches later.

    Attributes:
        tokens: ids of the words read, int64, shape (B, T).
        targets: the word that comes after each of them, or ``IGNORED``; int64, shape (B, T).
        index: which stream, or which sentence of its file, each row is, from 0; int64, shape (B,).
        group: which of the groups of streams this is, 0 to ``groups - 1``.
        groups: number of groups that take turns.
        start: whether the rows begin here; else they go on where the group's last batch ended.
    """

    tokens: Tensor
    targets: Tensor
    index: Tensor  # type: ignore[assignment]  # a tuple's method has this name
    group: int = 0
    groups: int = 1
    start: bool = True


class WordVocabulary:
    """Words by frequency, the most frequent first, behind the two special ones; a plain list, as checkpoints hold it.

    Text is words with white space between them. A word that looks like a special one is an unknown word.

    Args:
        words: what :attr:`words` of another vocabulary was: ``SPECIAL`` and then words, none twice.

    Raises:
        ValueError: if ``words`` is no such list.

    Example:
        >>> vocabulary = WordVocabulary.build(["a rose is a rose", "a rose"])
        >>> vocabulary.words
        ['<unk>', '</s>', 'a', 'rose', 'is']
        >>> vocabulary.encode("is a flower")
        [4, 2, 0]
    """

    def __init__(self, words: Sequence[str]) -> None:
        check_types(WordVocabulary, locals())
        self.words = list(words)
        if tuple(self.words[:2]) != SPECIAL:
            raise ValueError(f"Expected argument `words` to begin with {SPECIAL} but got {tuple(self.words[:2])}.")
        self._ids = {word: i for i, word in enumerate(self.words)}
        if len(self._ids) != len(self.words):
            (word, _), *_ = Counter(self.words).most_common(1)
            raise ValueError(f"Expected argument `words` to hold no word twice but got {word!r} twice.")
        if wrong := next((word for word in self.words if word.split() != [word]), None):
            raise ValueError(f"Expected argument `words` to hold words without white space but got {wrong!r}.")
        if "" in self._ids:
            raise ValueError("Expected argument `words` to hold no empty word but got ''.")
        self._known = {word: i for word, i in self._ids.items() if i > END}

    @classmethod
    def build(cls, sentences: Iterable[str], min_count: int = 1, size: int | None = None) -> "WordVocabulary":
        """Count words; of equally frequent ones the first in the alphabet comes first.

        Args:
            sentences: text, at least one word.
            min_count: words that occur less often are left out, at least 1.
            size: largest number of ids, the two special ones among them, at least 3; the rarest words go. None: no
                limit.

        Raises:
            ValueError: for an argument outside its range, and if no word is left.
        """
        check_types(WordVocabulary.build, locals())
        check_least(1, min_count=min_count)
        check_least(3, size=size)
        counts: Counter[str] = Counter()
        for sentence in sentences:
            counts.update(sentence.split())
        for special in SPECIAL:
            counts.pop(special, None)
        words = sorted((word for word, count in counts.items() if count >= min_count), key=lambda w: (-counts[w], w))
        if not words:
            raise ValueError(
                f"Expected argument `sentences` to hold a word at least {min_count} times but got {len(counts)} words "
                f"of which the most frequent is there {max(counts.values(), default=0)} times."
            )
        return cls([*SPECIAL, *(words if size is None else words[: size - 2])])

    def encode(self, text: str) -> list[int]:
        """Ids of a text's words; ``UNKNOWN`` for those that are not in the vocabulary."""
        known = self._known
        return [known.get(word, UNKNOWN) for word in text.split()]

    def decode(self, ids: Iterable[int]) -> str:
        r"""The text of ids, each 0 to ``len(self) - 1``; a sentence's end ends a line.

        Example:
            >>> WordVocabulary(["<unk>", "</s>", "yes"]).decode([2, 0, 1, 2])
            'yes <unk>\nyes'
        """
        lines: list[list[str]] = [[]]
        for i in map(int, ids):
            if i == END:
                lines.append([])
            else:
                lines[-1].append(self.words[i])
        return "\n".join(map(" ".join, lines))

    def __len__(self) -> int:
        """Number of ids, the two special ones among them."""
        return len(self.words)

    def __eq__(self, other: object) -> bool:
        return self.words == other.words if isinstance(other, WordVocabulary) else NotImplemented

    def __hash__(self) -> int:
        return hash(tuple(self.words))

    def __reduce__(self) -> tuple[Any, ...]:
        return WordVocabulary, (self.words,)

    def __repr__(self) -> str:
        return f"WordVocabulary of {len(self)} words"


def sentence_batch(sentences: Sequence[Sequence[int]], index: Tensor | None = None) -> TextBatch:
    """Whole sentences, each from its beginning to its end.

    A sentence's beginning is read as the end of one before it, as it is in a stream.

    Args:
        sentences: B lists of ids without ``END``, the longest of T - 1.
        index: shape (B,); None for 0 to B - 1.

    Example:
        >>> batch = sentence_batch([[5, 3], [4]])
        >>> batch.tokens.tolist(), batch.targets.tolist()
        ([[1, 5, 3], [1, 4, 1]], [[5, 3, 1], [4, 1, -1]])
    """
    width = 1 + max(map(len, sentences), default=0)
    tokens, targets = torch.full((len(sentences), width), END), torch.full((len(sentences), width), IGNORED)
    for row, sentence in enumerate(sentences):
        tokens[row, 1 : len(sentence) + 1] = torch.as_tensor(sentence, dtype=torch.int64)
        targets[row, : len(sentence) + 1] = torch.as_tensor([*sentence, END])
    return TextBatch(tokens, targets, torch.arange(len(sentences)) if index is None else index)
