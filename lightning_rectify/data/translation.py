"""``TranslationData``: parallel text, embedded or in files, as batches of subwords."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import DataLoader

from lightning_rectify._lightning import LightningDataModule, rank_zero_info
from lightning_rectify.arguments import check_choice, check_least, check_types
from lightning_rectify.data.aligned_texts import (
    MULTI30K_FILES,
    Aligned,
    decode_lines,
    fetch_multi30k,
    read_lines,
    read_pairs,
)
from lightning_rectify.data.number_words import LANGUAGES, number_pairs
from lightning_rectify.data.resumable import ResumableLoader, loader_options
from lightning_rectify.data.token_batches import EncodedPairs, EncodedTexts, TokenBatchSampler
from lightning_rectify.text import Vocabulary

_DATASETS = ("numbers", "multi30k", "files")
_KINDS = ("bpe", "unigram", "char")
_NUMBERS = {"train": 20_000, "val": 500, "test": 1_000}  # sizes of the embedded parts
_BATCH_TOKENS = 2_000

_Vocabularies = tuple[Vocabulary, Vocabulary]


class TranslationData(LightningDataModule):
    """Sentences and their translations in three parts, and sentences to translate.

    A batch is a :class:`~lightning_rectify.text.TranslationBatch`. What training sees is a function of seed, epoch and
    place in the epoch: a run that stops anywhere and resumes, two ranks with half batches, and any number of workers
    see the same pairs in the same batches. Every rank has the same number of batches. Evaluation is in batches of
    sentences sorted by length (``index`` says where they belong), and under DDP each rank has every R-th sentence: none
    is repeated and none is lost.

    Sentences are encoded when a loader is made, by the ``vocabularies`` of the trainer's module if it has some (they
    came with a checkpoint), else by those of this object. So test and prediction with a checkpoint read no training
    text.

    Args:
        dataset: "numbers" (numbers, dates and amounts of money in German and English words, made on the spot; no value
            is in two parts, and the test part does not depend on ``seed``), "multi30k" (descriptions of images,
            arXiv:1605.00459: ``train``, ``val`` and ``test_2016_flickr`` in ``root``, plain or ".gz") or "files".
        source: language to translate from; for files, what their names end in.
        target: language to translate to.
        root: folder of "multi30k"; for "files", what relative ``train``, ``val`` and ``test`` are relative to.
        train: for "files": what the names of the two files begin with (``train`` for ``train.de`` and ``train.en``,
            each plain or ".gz"), or a file of two columns, source and target, that ends in ".tsv" or ".tsv.gz". UTF-8,
            one sentence a line, none empty.
        val: the same; None for no validation.
        test: the same.
        predict: a file of sentences in the source language, one a line, perhaps empty; "-" for standard input; None
            translates the test part.
        vocab_size: number of subwords, special ones among them; for "char", at most so many.
        target_vocab_size: number of subwords of the target, which then has a vocabulary of its own; None for one joint
            vocabulary.
        vocabulary_kind: "bpe", "unigram" or "char", as in :meth:`~lightning_rectify.text.Vocabulary.train`.
        vocabulary_file: ``NAME.model``, which is read if it is there, else learnt before the fit and kept; two separate
            vocabularies are ``NAME.SOURCE.model`` and ``NAME.TARGET.model``. None learns in memory, on each rank the
            same.
        batch_tokens: most tokens of a training batch on each rank: sentences times the longest of them on either side.
            Batches are of sentences of similar length, and no sentence is left out. None for 2,000, unless there is a
            ``batch_size``.
        batch_size: sentences of a training batch on each rank, drawn whatever their length; those left over change
            from epoch to epoch. Instead of ``batch_tokens``.
        eval_batch_size: sentences of a batch of validation, test and prediction, on each rank.
        max_length: training pairs with more subwords than this on one side are left out.
        max_ratio: training pairs are left out of which one side has more than so many times the subwords of the other;
            at least 1. None keeps them.
        train_size: train on the first so many pairs; None for all (20,000 of the numbers).
        val_size: the same for validation; 0 for none, None for all (500 of the numbers).
        test_size: the same for the test; None for all (1,000 of the numbers).
        num_workers: loader processes.
        pin_memory: page-locked batches, for copies to a GPU.
        seed: of order and numbers, at least 0.
        download: fetch missing files of "multi30k" in ``prepare_data``, by checksum.

    Raises:
        ValueError: for an argument outside its range, and, with file and line, for text that is not as described.
        FileNotFoundError: in ``setup``, if a file is not there.
    """

    def __init__(
        self,
        dataset: str = "numbers",
        source: str = "de",
        target: str = "en",
        root: str | None = None,
        train: str | None = None,
        val: str | None = None,
        test: str | None = None,
        predict: str | None = None,
        vocab_size: int = 400,
        target_vocab_size: int | None = None,
        vocabulary_kind: str = "bpe",
        vocabulary_file: str | None = None,
        batch_tokens: int | None = None,
        batch_size: int | None = None,
        eval_batch_size: int = 64,
        max_length: int = 256,
        max_ratio: float | None = None,
        train_size: int | None = None,
        val_size: int | None = None,
        test_size: int | None = None,
        num_workers: int = 0,
        pin_memory: bool = False,
        seed: int = 0,
        download: bool = False,
    ) -> None:
        check_types(TranslationData, locals())
        super().__init__()
        check_choice(_DATASETS, dataset=dataset)
        check_choice(_KINDS, vocabulary_kind=vocabulary_kind)
        check_least(0, val_size=val_size, num_workers=num_workers, seed=seed)
        check_least(1, batch_tokens=batch_tokens, batch_size=batch_size, eval_batch_size=eval_batch_size)
        check_least(1, max_length=max_length, max_ratio=max_ratio, train_size=train_size, test_size=test_size)
        check_least(5, vocab_size=vocab_size, target_vocab_size=target_vocab_size)
        if batch_tokens is not None and batch_size is not None:
            raise ValueError(
                f"Expected argument `batch_size` to be None, as `batch_tokens` is {batch_tokens}, but got {batch_size}."
            )
        if vocabulary_file is not None and not vocabulary_file.endswith(".model"):
            raise ValueError(f"Expected argument `vocabulary_file` to end in '.model' but got {vocabulary_file!r}.")
        self.dataset, self.source, self.target, self.root, self.download = dataset, source, target, root, download
        self.files = {"train": train, "val": val, "test": test}
        self._refuse_wrong_source()
        self.predict, self.vocabulary_file = predict, vocabulary_file
        self.vocab_size, self.target_vocab_size, self.vocabulary_kind = vocab_size, target_vocab_size, vocabulary_kind
        self.batch_tokens = _BATCH_TOKENS if batch_tokens is None and batch_size is None else batch_tokens
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size
        self.max_length, self.max_ratio = max_length, max_ratio
        self.sizes = {"train": train_size, "val": val_size, "test": test_size}
        self.num_workers, self.pin_memory, self.seed = num_workers, pin_memory, seed
        self._texts: dict[str, Aligned] = {}
        self._lines: list[str] | None = None  # to be translated
        self._vocabularies: _Vocabularies | None = None
        self._encoded: dict[str, tuple[_Vocabularies, EncodedPairs]] = {}  # with what they were encoded by

    @property
    def vocabularies(self) -> tuple[Vocabulary, Vocabulary]:
        """Subwords of the source and of the target; twice the same object if they are joint.

        Read from ``vocabulary_file``, or learnt from the training part when asked for the first time.

        Raises:
            ValueError: if the text does not allow ``vocab_size``, or the file has another.
        """
        if self._vocabularies is None:
            self._vocabularies = self._load_vocabularies() or self._learn_vocabularies(self._part("train"))
        return self._vocabularies

    # -- Lightning's hooks ---------------------------------------------------------------------------------------------

    def prepare_data(self) -> None:
        """Download, and learn and keep the vocabularies before a fit, where the arguments say so; on one process."""
        if self.dataset == "multi30k" and self.download:
            fetch_multi30k(self.root or "", (self.source, self.target))
        fits = self.trainer is None or self.trainer.state.fn == "fit"
        paths = self._vocabulary_paths()
        if fits and paths and not all(path.is_file() for path in paths):
            learnt = self._learn_vocabularies(self._read("train"))
            for path, vocabulary in zip(paths, learnt, strict=False):  # joint: one path
                vocabulary.save(path)

    def setup(self, stage: str) -> None:
        """Read the parts that the stage needs and that are not there yet.

        Raises:
            FileNotFoundError: if a file is not there.
            ValueError: for text that is not as described.
        """
        if stage == "predict" and self.predict is not None:
            self._lines = self._read_lines(self.predict) if self._lines is None else self._lines
            return
        for part in {"fit": ("train", "val"), "validate": ("val",)}.get(stage, ("test",)):
            if part != "val" or self._validates:
                self._part(part)

    def train_dataloader(self) -> ResumableLoader:
        """Shuffled batches; resumes in the middle of an epoch."""
        pairs = self._encode_part("train")
        sampler = self._sampler(
            pairs, batch_tokens=self.batch_tokens, batch_size=self.batch_size, shuffle=True, seed=self.seed
        )
        return ResumableLoader(pairs, sampler=sampler, trainer=self.trainer, **self._options())

    def val_dataloader(self) -> Any:
        """The validation part, sorted by length; no loader if there is none."""
        return self._eval_loader(self._encode_part("val")) if self._validates else []

    def test_dataloader(self) -> DataLoader[Any]:
        """The test part, sorted by length."""
        return self._eval_loader(self._encode_part("test"))

    def predict_dataloader(self) -> DataLoader[Any]:
        """What ``predict`` names, else the sources of the test part; sorted by length, without translations."""
        lines = self._part("test").sources if self.predict is None else self._lines
        if lines is None:
            raise RuntimeError("Expected `setup('predict')` to have been called before `predict_dataloader`.")
        return self._eval_loader(EncodedPairs(_encode(self._encoders()[0], lines)))

    # -- text ----------------------------------------------------------------------------------------------------------

    @property
    def _validates(self) -> bool:
        return self.sizes["val"] != 0 and (self.dataset != "files" or self.files["val"] is not None)

    def _refuse_wrong_source(self) -> None:
        """Check what depends on the kind of data: languages, root and files."""
        known = LANGUAGES if self.dataset == "numbers" or self.download else (self.source, self.target)
        for side, language in (("source", self.source), ("target", self.target)):
            check_choice(known, **{side: language})
        if self.source == self.target:
            raise ValueError(
                f"Expected argument `target` to be another language than the source but got {self.target!r}."
            )
        if self.dataset == "multi30k" and self.root is None:
            raise ValueError("Expected argument `root` to be the folder of the multi30k data but got None.")
        if self.download and self.dataset == "files":
            raise ValueError("Expected argument `download` to be False for files, which cannot be fetched.")
        for part, name in self.files.items():
            if name is not None and self.dataset != "files":
                raise ValueError(f"Expected argument `{part}` to be None for {self.dataset} but got {name!r}.")

    def _part(self, part: str) -> Aligned:
        if part not in self._texts:
            self._texts[part] = self._read(part)
        return self._texts[part]

    def _read(self, part: str) -> Aligned:
        size = self.sizes[part]
        if self.dataset == "numbers":
            drawn = number_pairs(part, _NUMBERS[part] if size is None else size, self.seed)
            return Aligned([pair[self.source] for pair in drawn], [pair[self.target] for pair in drawn])
        name = MULTI30K_FILES[part] if self.dataset == "multi30k" else self.files[part]
        if name is None:
            raise ValueError(f"Expected argument `{part}` to name the files of that part but got None.")
        try:
            pair = read_pairs(Path(self.root or "") / name, self.source, self.target)
        except FileNotFoundError as error:
            hint = " TranslationData(download=True) fetches them." if self.dataset == "multi30k" else ""
            raise FileNotFoundError(f"{error}{hint}") from None
        if size is not None and size > len(pair.sources):
            raise ValueError(
                f"Expected argument `{part}_size` to be at most {len(pair.sources)}, the lines of {name}, but got "
                f"{size}."
            )
        return Aligned(pair.sources[:size], pair.targets[:size])

    def _read_lines(self, name: str) -> list[str]:
        if name != "-":
            return read_lines(name)
        if self.trainer is not None and self.trainer.world_size > 1:
            raise ValueError("Expected argument `predict` to be a file on several processes but got '-'.")
        stream = getattr(sys.stdin, "buffer", None)  # bytes, as the terminal's encoding may be another
        return decode_lines(sys.stdin.read().encode() if stream is None else stream.read(), "<stdin>")

    # -- subwords ------------------------------------------------------------------------------------------------------

    def _encoders(self) -> _Vocabularies:
        """Those of the module, which its weights belong to, else our own."""
        module = None if self.trainer is None else self.trainer.lightning_module
        found: _Vocabularies | None = getattr(module, "vocabularies", None)
        return self.vocabularies if found is None else found

    def _vocabulary_paths(self) -> list[Path]:
        if self.vocabulary_file is None:
            return []
        path = Path(self.vocabulary_file)
        if self.target_vocab_size is None:
            return [path]
        return [path.with_suffix(f".{language}.model") for language in (self.source, self.target)]

    def _load_vocabularies(self) -> _Vocabularies | None:
        paths = self._vocabulary_paths()
        if not paths or not all(path.is_file() for path in paths):
            return None
        loaded = [Vocabulary.load(path) for path in paths]
        wanted = (("vocab_size", self.vocab_size), ("target_vocab_size", self.target_vocab_size))
        for (name, size), path, vocabulary in zip(wanted, paths, loaded, strict=False):
            if size != len(vocabulary) and (self.vocabulary_kind != "char" or len(vocabulary) > (size or 0)):
                raise ValueError(
                    f"Expected argument `{name}` to be {len(vocabulary)}, the size of the vocabulary in {path}, but "
                    f"got {size}."
                )
        return loaded[0], loaded[-1]

    def _learn_vocabularies(self, text: Aligned) -> _Vocabularies:
        if self.target_vocab_size is None:
            joint = self._learn("vocab_size", self.vocab_size, [*text.sources, *text.targets])
            return joint, joint
        return (
            self._learn("vocab_size", self.vocab_size, text.sources),
            self._learn("target_vocab_size", self.target_vocab_size, text.targets),
        )

    def _learn(self, name: str, size: int, lines: list[str]) -> Vocabulary:
        try:
            return Vocabulary.train(lines, size, self.vocabulary_kind)
        except ValueError as error:
            raise ValueError(str(error).replace("`size`", f"`{name}`")) from None

    def _encode_part(self, part: str) -> EncodedPairs:
        encoders = self._encoders()
        if part not in self._encoded or self._encoded[part][0] != encoders:
            text = self._part(part)
            sources, targets = (_encode(encoder, side) for encoder, side in zip(encoders, text, strict=True))
            pairs = EncodedPairs(sources, targets, references=None if part == "train" else text.targets)
            self._encoded[part] = encoders, self._filtered(pairs) if part == "train" else pairs
        return self._encoded[part][1]

    def _filtered(self, pairs: EncodedPairs) -> EncodedPairs:
        """Training pairs within ``max_length`` and ``max_ratio``; says how many are not."""
        lengths = pairs.lengths - 1  # without special ids
        shorter, longer = lengths.min(axis=1), lengths.max(axis=1)
        too_long = longer > self.max_length
        uneven = ~too_long & (longer > (np.inf if self.max_ratio is None else self.max_ratio * shorter))
        kept = np.flatnonzero(~too_long & ~uneven)
        if len(kept) == len(pairs):
            return pairs
        if len(kept) == 0:
            raise ValueError(
                f"Expected arguments `max_length` and `max_ratio` to leave some of {len(pairs)} training pairs but got "
                f"{self.max_length} and {self.max_ratio}, which leave none."
            )
        rank_zero_info(
            f"TranslationData leaves out {len(pairs) - len(kept)} of {len(pairs)} training pairs: {too_long.sum()} "
            f"longer than {self.max_length} subwords, {uneven.sum()} with a ratio of lengths above {self.max_ratio}."
        )
        return pairs.take(kept.tolist())

    # -- loaders -------------------------------------------------------------------------------------------------------

    def _sampler(self, pairs: EncodedPairs, **options: Any) -> TokenBatchSampler:
        ranks = (self.trainer.distributed_sampler_kwargs if self.trainer is not None else None) or {}
        return TokenBatchSampler(pairs.lengths, **options, **ranks)

    def _eval_loader(self, pairs: EncodedPairs) -> DataLoader[Any]:
        sampler = self._sampler(pairs, batch_size=self.eval_batch_size, shuffle=False)
        return DataLoader(pairs, sampler=sampler, **self._options())

    def _options(self) -> dict[str, Any]:
        # A key is a batch already.
        return {"batch_size": None, **loader_options(self.seed, self.num_workers, self.pin_memory)}


def _encode(vocabulary: Vocabulary, lines: list[str]) -> EncodedTexts:
    return EncodedTexts([vocabulary.encode(line) for line in lines])
