"""Text as numbers: subword vocabularies, padding, and what a batch of sentence pairs holds."""

import io
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_rectify.arguments import check_choice, check_least, check_types

PAD, UNK, BOS, EOS = 0, 1, 2, 3
"""Ids of padding, of what a vocabulary does not know, and of a sentence's beginning and end; in each vocabulary."""

_KINDS = ("bpe", "unigram", "char")
_LONGEST = 1 << 16  # bytes; sentencepiece leaves longer sentences out of the training (its default is 4192)


class TranslationBatch(NamedTuple):
    """B sentences and their translations.

    Attributes:
        source: subword ids with EOS at the end, padded with PAD on the right; int64, shape (B, S).
        target: BOS, subword ids, EOS, padded with PAD on the right; int64, shape (B, T). A decoder reads
            ``target[:, :-1]`` and is to answer ``target[:, 1:]``. None in prediction.
        index: place of each sentence in its file, from 0; int64, shape (B,).
        references: the B translations as they stand in their file, in validation and test; else None.
    """

    source: Tensor
    target: Tensor | None
    index: Tensor  # type: ignore[assignment]  # a tuple's method has this name
    references: list[str] | None


class Vocabulary:
    """Subword units, learnt by sentencepiece (arXiv:1808.06226) and kept as the bytes of its model file.

    Two vocabularies of the same bytes are equal. Text is normalised as sentencepiece does by default: compatible
    characters become one (NFKC) and runs of white space a single blank.

    Args:
        model: what :attr:`model` of another vocabulary was, or the content of a sentencepiece model file whose special
            ids are padding 0, unknown 1, beginning 2, end 3.

    Raises:
        ValueError: if ``model`` is no such thing.

    Example:
        >>> vocabulary = Vocabulary.train(["a rose is a rose is a rose"] * 3, size=14)
        >>> vocabulary.decode(vocabulary.encode("a rose is a rose"))
        'a rose is a rose'
    """

    def __init__(self, model: bytes) -> None:
        check_types(Vocabulary, locals())
        from sentencepiece import SentencePieceProcessor

        self.model, self._processor = bytes(model), SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(self.model)  # unlike the constructor, it refuses no bytes at all
        except RuntimeError as error:
            raise ValueError(
                f"Expected argument `model` to be the bytes of a sentencepiece model but got {len(model)} bytes that "
                f"sentencepiece does not read ({error})."
            ) from None
        processor = self._processor
        special = (processor.pad_id(), processor.unk_id(), processor.bos_id(), processor.eos_id())
        if special != (PAD, UNK, BOS, EOS):
            raise ValueError(
                f"Expected argument `model` to have ids {(PAD, UNK, BOS, EOS)} for padding, unknown, beginning and end "
                f"but got {special}."
            )

    @classmethod
    def train(
        cls, sentences: Iterable[str], size: int, kind: str = "bpe", character_coverage: float = 1.0
    ) -> "Vocabulary":
        """Learn a vocabulary; the same sentences give the same bytes.

        Args:
            sentences: one line of text each, at least one; those of more than 65,536 bytes are left out.
            size: number of ids, the four special ones among them, at least 5; for "char" it is an upper bound.
            kind: "bpe" (byte-pair encoding, arXiv:1508.07909), "unigram" (arXiv:1804.10959) or "char" (characters).
            character_coverage: share of the text's characters that must be known, in [0.98, 1] (what
                sentencepiece takes); the rarest go first.

        Raises:
            ValueError: for an argument outside its range, and if the sentences do not allow ``size``: too large (they
                do not have so many units) or too small (they have more characters).
        """
        check_types(Vocabulary.train, locals())
        from sentencepiece import SentencePieceTrainer

        check_choice(_KINDS, kind=kind)
        check_least(5, size=size)
        if not 0.98 <= character_coverage <= 1:
            raise ValueError(
                f"Expected argument `character_coverage` to be in [0.98, 1] but got {character_coverage!r}."
            )
        sentences, buffer = list(sentences), io.BytesIO()  # a list, as an iterator's own errors would lose their type
        if not any(sentence.strip() for sentence in sentences):
            raise ValueError("Expected argument `sentences` to hold some text but got none.")
        try:
            SentencePieceTrainer.train(
                sentence_iterator=iter(sentences),
                model_writer=buffer,
                vocab_size=size,
                model_type=kind,
                character_coverage=character_coverage,
                pad_id=PAD,
                unk_id=UNK,
                bos_id=BOS,
                eos_id=EOS,
                max_sentence_length=_LONGEST,
                num_threads=1,  # sums of several threads would be rounded otherwise elsewhere
                minloglevel=2,
            )
        except RuntimeError as error:
            raise _size_error(size, str(error)) or error from None
        return cls(buffer.getvalue())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Vocabulary":
        """Read what :meth:`save` wrote.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if it holds no vocabulary.
        """
        try:
            return cls(Path(path).read_bytes())
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the model to a file, which sentencepiece's own tools read as well.

        The file appears whole or not at all; its folder is made if need be.
        """
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f"{path.name}.{os.getpid()}.part")
        part.write_bytes(self.model)
        part.replace(path)

    def encode(self, text: str) -> list[int]:
        """Ids of a text's subwords, without BOS and EOS; text that looks like a special unit is plain text."""
        ids: list[int] = self._processor.encode(text)
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids, each 0 to ``len(self) - 1``; special ids are left out."""
        text: str = self._processor.decode([i for i in map(int, ids) if i > EOS])
        return text

    def pieces(self, ids: Iterable[int]) -> list[str]:
        """Each id's unit, special ones too; "▁" stands for the blank before a word. For plots."""
        return [self._processor.id_to_piece(int(i)) for i in ids]

    def __len__(self) -> int:
        """Number of ids, the four special ones among them."""
        return len(self._processor)

    def __eq__(self, other: object) -> bool:
        return self.model == other.model if isinstance(other, Vocabulary) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.model)

    def __reduce__(self) -> tuple[Any, ...]:
        return Vocabulary, (self.model,)

    def __repr__(self) -> str:
        return f"Vocabulary of {len(self)} units"


def pad(sequences: Sequence[Sequence[int]]) -> Tensor:
    """Bring sequences of ids to one length.

    Args:
        sequences: B sequences, the longest of L ids.

    Returns:
        The sequences, padded with PAD on the right; int64, shape (B, L).

    Example:
        >>> pad([[5, 3], [3]])
        tensor([[5, 3],
                [3, 0]])
    """
    padded = torch.full((len(sequences), max(map(len, sequences), default=0)), PAD)
    for row, sequence in zip(padded, sequences, strict=True):
        row[: len(sequence)] = torch.as_tensor(sequence, dtype=torch.int64)
    return padded


def _size_error(size: int, message: str) -> ValueError | None:
    """What sentencepiece says about a size that cannot be had, in our words; None if it says something else."""
    if found := re.search(r"size too high .*<= (\d+)", message):
        return ValueError(
            f"Expected argument `size` to be at most {found[1]}, the units that this text has, but got {size}."
        )
    if found := re.search(r"smaller than required_chars. \d+ vs (\d+)", message):
        return ValueError(
            f"Expected argument `size` to be at least {found[1]}, the characters of this text and the four special "
            f"ids, but got {size}."
        )
    return None
