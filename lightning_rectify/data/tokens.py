"""``TokenData``: text of sentences, embedded or in files, as streams of words."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader

from lightning_rectify._lightning import LightningDataModule
from lightning_rectify.arguments import check_choice, check_least, check_types
from lightning_rectify.data import grammar
from lightning_rectify.data.aligned_texts import find, read_lines
from lightning_rectify.data.resumable import EpochSampler, ResumableLoader, loader_options
from lightning_rectify.data.token_batches import TokenBatchSampler
from lightning_rectify.data.token_streams import (
    EncodedSentences,
    EvaluationStreams,
    Share,
    TrainingStreams,
    WholeSentences,
)
from lightning_rectify.words import WordVocabulary

_DATASETS = ("grammar", "one_billion_words", "files")
_GRAMMAR = {"train": 20_000, "val": 1_000, "test": 2_000}  # sizes of the embedded parts
_TRAINING = ("training-monolingual.tokenized.shuffled", "news.en-*-of-*")
_HELD_OUT = ("heldout-monolingual.tokenized.shuffled", "news.en.heldout-*-of-*")


class TokenData(LightningDataModule):
    """Text of sentences in three parts, read word by word, and sentences to score.

    A batch is a :class:`~lightning_rectify.words.TextBatch`. Text is cut into streams side by side; a batch is a window
    of ``bptt`` words of some of them, and the next window goes on where it ended, so that a recurrent network can carry
    its state over (truncated back-propagation through time). What training sees is a function of seed, epoch and place
    in the epoch: a run that stops anywhere and resumes sees the same. R ranks with ``batch_size`` streams each see
    what one with R times as many sees; and with ``streams`` fixed, accumulated batches are one of more streams. In
    evaluation each word counts once, on any number of ranks.

    Words are encoded when a loader is made, by the ``vocabulary`` of the trainer's module if it has one (it came with a
    checkpoint), else by that of this object. So test and prediction with a checkpoint read no training text.

    Args:
        dataset: "grammar" (sentences of :mod:`lightning_rectify.data.grammar`, made on the spot, whose least perplexity
            is known: about 10.0; the test part does not depend on ``seed``), "one_billion_words" (arXiv:1312.3005 as it
            is distributed, or any text in that layout: all shards of ``training-monolingual.tokenized.shuffled``, and
            of ``heldout-monolingual.tokenized.shuffled`` the first for the test, the second for validation) or "files".
        root: folder of "one_billion_words"; for "files", what relative ``train``, ``val`` and ``test`` are relative to.
        train: for "files": one sentence a line, words with white space between them; UTF-8, plain or ".gz".
        val: the same; None for no validation.
        test: the same.
        predict: a file of sentences to be scored, one a line, perhaps empty; None scores the test part.
        min_count: words that occur less often in the training part are unknown, at least 1 (the RAdam paper's: 4).
        vocab_size: largest number of words, the unknown one and the sentence end among them, at least 3; the rarest
            are then unknown. None: no limit.
        batch_size: streams of a training batch on each rank.
        streams: number of streams of the training part on all ranks, a multiple of a batch's; None for one batch.
            Batches of the streams take turns, each with a state of its own.
        bptt: words of a window, at least 1.
        eval_streams: number of streams in validation and test, on all ranks; each begins without knowing what came
            before it, so that perplexity is the truer the fewer there are.
        eval_batch_size: sentences of a batch of prediction, on each rank.
        train_size: train on the first so many sentences; None for all (20,000 of the grammar).
        val_size: the same for validation; 0 for none, None for all (1,000 of the grammar).
        test_size: the same for the test; None for all (2,000 of the grammar).
        shuffle: sentences in a new order in each epoch; False for running text, whose sentences follow each other.
        seed: of the order and of the grammar's sentences, at least 0.

    Raises:
        ValueError: for an argument outside its range; when a loader is made, for a text that is too short.
        FileNotFoundError: in ``setup``, if a file is not there.
    """

    def __init__(
        self,
        dataset: str = "grammar",
        root: str | None = None,
        train: str | None = None,
        val: str | None = None,
        test: str | None = None,
        predict: str | None = None,
        min_count: int = 1,
        vocab_size: int | None = None,
        batch_size: int = 20,
        streams: int | None = None,
        bptt: int = 35,
        eval_streams: int = 10,
        eval_batch_size: int = 64,
        train_size: int | None = None,
        val_size: int | None = None,
        test_size: int | None = None,
        shuffle: bool = True,
        seed: int = 0,
    ) -> None:
        check_types(TokenData, locals())
        super().__init__()
        check_least(0, val_size=val_size, seed=seed)
        check_least(1, min_count=min_count, train_size=train_size, test_size=test_size, eval_batch_size=eval_batch_size)
        check_least(1, batch_size=batch_size, streams=streams, bptt=bptt, eval_streams=eval_streams)
        check_least(3, vocab_size=vocab_size)
        self.dataset, self.root, self.files = dataset, root, {"train": train, "val": val, "test": test}
        self._refuse_wrong_source()
        self.predict, self.min_count, self.vocab_size = predict, min_count, vocab_size
        self.batch_size, self.streams, self.bptt = batch_size, streams, bptt
        self.eval_streams, self.eval_batch_size = eval_streams, eval_batch_size
        self.sizes = {"train": train_size, "val": val_size, "test": test_size}
        self.shuffle, self.seed = shuffle, seed
        self._vocabulary: WordVocabulary | None = None
        self._encoded: dict[str, tuple[WordVocabulary, EncodedSentences]] = {}  # with what they were encoded by

    @property
    def vocabulary(self) -> WordVocabulary:
        """Words of the training part, counted when asked for the first time.

        Raises:
            ValueError: if no word is frequent enough.
        """
        if self._vocabulary is None:
            sentences = (sentence for shard in self._shards("train") for sentence in shard)
            self._vocabulary = WordVocabulary.build(sentences, self.min_count, self.vocab_size)
        return self._vocabulary

    # -- Lightning's hooks ---------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Look for the files that the stage needs.

        Raises:
            FileNotFoundError: if one is not there.
            ValueError: if an argument should name it and does not.
        """
        if stage == "predict" and self.predict is not None:
            find(self.predict)
            return
        for part in {"fit": ("train", "val"), "validate": ("val",)}.get(stage, ("test",)):
            if self.dataset != "grammar" and (part != "val" or self._validates):
                self._paths(part)

    def train_dataloader(self) -> ResumableLoader:
        """Windows of the training part; resumes in the middle of an epoch."""
        share = self._share()
        streams = TrainingStreams(
            self._encode_part("train"),
            streams=self.batch_size * share.ranks if self.streams is None else self.streams,
            batch_size=self.batch_size, bptt=self.bptt, share=share, shuffle=self.shuffle, seed=self.seed,
        )  # fmt: skip
        # The sampler counts batches, the same on each rank; which of their streams are a rank's, the dataset knows.
        sampler = EpochSampler(streams, shuffle=False)
        return ResumableLoader(streams, sampler=sampler, trainer=self.trainer, **self._options())

    def val_dataloader(self) -> Any:
        """Windows of the validation part; no loader if there is none."""
        return self._eval_loader("val") if self._validates else []

    def test_dataloader(self) -> DataLoader[Any]:
        """Windows of the test part."""
        return self._eval_loader("test")

    def predict_dataloader(self) -> DataLoader[Any]:
        """Sentences of ``predict``, else of the test part, sorted by length: ``index`` says which each is."""
        if self.predict is None:
            text = self._encode_part("test")
        else:
            text = EncodedSentences.encode(self._encoder(), [read_lines(self.predict)])
        sentences, share = WholeSentences(text), self._share()
        sampler = TokenBatchSampler(
            sentences.lengths, batch_size=self.eval_batch_size, num_replicas=share.ranks, rank=share.rank, shuffle=False
        )
        return DataLoader(sentences, sampler=sampler, **self._options())

    # -- text ----------------------------------------------------------------------------------------------------------

    @property
    def _validates(self) -> bool:
        return self.sizes["val"] != 0 and (self.dataset != "files" or self.files["val"] is not None)

    def _refuse_wrong_source(self) -> None:
        """Check what depends on the kind of data: root and files."""
        check_choice(_DATASETS, dataset=self.dataset)
        if self.dataset == "one_billion_words" and self.root is None:
            raise ValueError("Expected argument `root` to be the folder of the two folders of shards but got None.")
        for part, name in self.files.items():
            if name is not None and self.dataset != "files":
                raise ValueError(f"Expected argument `{part}` to be None for {self.dataset} but got {name!r}.")

    def _shards(self, part: str) -> Iterator[Sequence[str]]:
        """Sentences of a part, file by file, ``sizes[part]`` of them at most."""
        size = self.sizes[part]
        if self.dataset == "grammar":
            yield grammar.sentences(part, _GRAMMAR[part] if size is None else size, self.seed)
            return
        left = size
        for path in self._paths(part):
            lines = read_lines(path)
            if not lines:
                raise ValueError(f"Expected {path} to hold at least one line but got none.")
            if left is None:
                yield lines
                continue
            yield lines[:left]
            left -= min(left, len(lines))
            if left == 0:
                return
        if left:
            raise ValueError(f"Expected argument `{part}_size` to be at most {(size or 0) - left} but got {size}.")

    def _paths(self, part: str) -> list[Path]:
        """Files of a part, in order of their names."""
        if self.dataset == "files":
            name = self.files[part]
            if name is None:
                raise ValueError(f"Expected argument `{part}` to name the file of that part but got None.")
            return [find(Path(self.root or "") / name)]
        folder, pattern = _TRAINING if part == "train" else _HELD_OUT
        paths = sorted((Path(self.root or "") / folder).glob(pattern))
        if part != "train":
            place = ("test", "val").index(part)
            paths = paths[place : place + 1]
        if not paths:
            raise FileNotFoundError(
                f"Expected {Path(self.root or '') / folder} to hold {'shards' if part == 'train' else 'two shards'} "
                f"{pattern} but found none for the {part} part."
            )
        return paths

    def _encoder(self) -> WordVocabulary:
        """That of the module, which its weights belong to, else our own."""
        module = None if self.trainer is None else self.trainer.lightning_module
        found: WordVocabulary | None = getattr(module, "vocabulary", None)
        return self.vocabulary if found is None else found

    def _encode_part(self, part: str) -> EncodedSentences:
        encoder = self._encoder()
        if part not in self._encoded or self._encoded[part][0] != encoder:
            self._encoded[part] = encoder, EncodedSentences.encode(encoder, self._shards(part))
        return self._encoded[part][1]

    # -- loaders -------------------------------------------------------------------------------------------------------

    def _share(self) -> Share:
        ranks = (self.trainer.distributed_sampler_kwargs if self.trainer is not None else None) or {}
        return Share(ranks.get("rank", 0), ranks.get("num_replicas", 1))

    def _eval_loader(self, part: str) -> DataLoader[Any]:
        streams = EvaluationStreams(self._encode_part(part), self.eval_streams, self.bptt, self._share())
        # A sampler that Lightning leaves in place: the streams are shared out already.
        return DataLoader(streams, sampler=_InOrder(streams), **self._options())

    def _options(self) -> dict[str, Any]:
        """No workers: a batch is cut out of an array, which they would copy."""
        return {"batch_size": None, **loader_options(self.seed)}  # a key is a batch already


class _InOrder(EpochSampler):
    """Places of a dataset, 0 to N - 1; every rank has all of them."""

    def __init__(self, dataset: Any) -> None:
        super().__init__(dataset, shuffle=False)

    def __iter__(self) -> Iterator[Any]:
        return iter(range(len(self.dataset)))  # type: ignore[arg-type]
