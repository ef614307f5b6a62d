"""What a translation module writes: a few sentences as training goes on, and whole files in their own order."""

import html
import re
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist

from lightning_rectify._lightning import Callback, LightningModule, Trainer
from lightning_rectify.arguments import check_least, check_types
from lightning_rectify.callbacks._logs import CsvFile, is_dry, replacing, run_folder, writers
from lightning_rectify.callbacks._sharded import refuse_sharded
from lightning_rectify.nn.modes import evaluating
from lightning_rectify.text import TranslationBatch, Vocabulary

# All that str.splitlines() takes for the end of a line: whoever reads the file must find one line a sentence.
_LINE_ENDS = re.compile("\r\n|[\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029]")


class Translating(Protocol):
    """What :class:`TranslationSamples` expects of a LightningModule; it may also have ``plot_attention``.

    ``plot_attention(source, target)`` returns a matplotlib figure of how the translation ``target`` attends to
    ``source``, both plain text.
    """

    @property
    def vocabularies(self) -> tuple[Vocabulary, Vocabulary]:
        """Those of source and target."""

    def translate(self, texts: list[str], beam_size: int = 5) -> list[str]:
        """One translation a text, in order; without communication between processes."""


class TranslationWriter(Callback):
    """Writes the translations that ``Trainer.predict`` makes, one a line, in the order of the input.

    ``predict_step`` returns one text a sentence of its batch, and ``batch.index`` says which line of the input each
    sentence is; batches may come in any order and on any process. All are gathered on the first process, which writes
    them when prediction ends: all at once, so that a file is never half there. Line ends inside a translation become
    spaces. A ``fast_dev_run`` writes nothing.

    Args:
        output: file to write, in UTF-8, or "-" for standard output, from which it keeps the progress bar away.

    Raises:
        ValueError: if ``output`` is empty; if ``predict_step`` returns anything but one text a sentence; with several
            dataloaders; if a line of the input has no translation, or more than one.

    Example:
        >>> writer = TranslationWriter("test.hyp")  # Trainer(callbacks=[writer]).predict(module, datamodule)
    """

    def __init__(self, output: str | Path = "-") -> None:
        check_types(TranslationWriter, locals())
        if not str(output):
            raise ValueError(f"Expected argument `output` to be a path or '-' (standard output) but got {output!r}.")
        self.output = output
        self._lines: list[tuple[int, str]] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave standard output to the translations."""
        bar = trainer.progress_bar_callback
        if stage == "predict" and str(self.output) == "-" and bar is not None:
            bar.disable()

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin anew."""
        if (count := len(trainer.num_predict_batches)) > 1:
            raise ValueError(f"Expected the prediction of TranslationWriter to have one dataloader but got {count}.")
        self._lines = []

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: TranslationBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep one batch."""
        index = batch.index.tolist()
        good = isinstance(outputs, (list, tuple)) and all(isinstance(text, str) for text in outputs)
        if not good or len(outputs) != len(index):
            got = f"{len(outputs)} texts" if good else f"{type(outputs).__name__} of other things"
            raise ValueError(
                "Expected what `predict_step` returns for TranslationWriter to be a list of texts, one for each of the "
                f"{len(index)} sentences of the batch, but got {got}."
            )
        self._lines += zip(index, outputs, strict=True)

    def on_predict_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Gather what all processes have, and write it."""
        lines, self._lines = _gather(self._lines), []
        if is_dry(trainer):
            return
        failure = None
        if trainer.is_global_zero:
            try:
                self._write(_in_order(lines, _known_length(trainer)))
            except Exception as error:  # the others wait, and must hear of it
                failure = error
        message = trainer.strategy.broadcast(str(failure or ""))
        if failure is not None:
            raise failure
        if message:
            raise RuntimeError(f"The first process could not write the translations: {message}")

    def _write(self, texts: list[str]) -> None:
        content = "".join(_LINE_ENDS.sub(" ", text) + "\n" for text in texts)
        if str(self.output) == "-":
            sys.stdout.write(content)
            sys.stdout.flush()
            return
        path = Path(self.output)
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            temporary.write_bytes(content.encode("utf-8"))  # bytes: Windows would write other line ends


class TranslationSamples(Callback):
    """Translates the same few validation sentences as training goes on, to be read beside their references.

    Works with a LightningModule that has ``vocabularies`` and ``translate`` (:class:`Translating`). The sentences are
    the first ``count`` by ``batch.index`` of the first validation (with several processes: of the first one's share),
    from the first dataloader; a reference is the line of ``batch.references``, or, without, the target decoded. At the
    end of validation TensorBoard gets a table of source, translation and reference as the text ``translations`` and, if
    the module has ``plot_attention``, the attention of the first sentence as the figure ``attention``;
    ``LOGFOLDER/translations.csv`` gets the same rows with the step (without a logger, in the trainer's
    ``default_root_dir``). A resumed run in the same folder drops the rows behind its checkpoint.

    The module is called in evaluation mode, without gradients, and on the first process alone. Modes and random state
    are as they were afterwards. Nothing happens in the sanity check; in a ``fast_dev_run`` nothing is written.

    Args:
        count: number of sentences, at least 1.
        every_n_epochs: translate in each n-th epoch of training (in a ``Trainer.validate`` always), at least 1.
        beam_size: of the search, at least 1; 1 is greedy and costs least.

    Raises:
        ValueError: for an argument out of its range, a module without the methods, one whose weights are sharded over
            processes, or validation batches that are not ``TranslationBatch``.

    Example:
        >>> TranslationSamples(count=4, every_n_epochs=2).count
        4
    """

    def __init__(self, count: int = 8, every_n_epochs: int = 1, beam_size: int = 1) -> None:
        check_types(TranslationSamples, locals())
        super().__init__()
        check_least(1, count=count, every_n_epochs=every_n_epochs, beam_size=beam_size)
        self.count, self.every_n_epochs, self.beam_size = count, every_n_epochs, beam_size
        self._seen: dict[int, tuple[str, str]] = {}  # source and reference by place, while a validation goes on
        self._chosen: list[tuple[str, str]] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a module that cannot translate, and choose sentences anew."""
        missing = [name for name in ("vocabularies", "translate") if not hasattr(pl_module, name)]
        if stage in ("fit", "validate") and missing:
            raise ValueError(
                "Expected the module of TranslationSamples to have `vocabularies` and `translate(texts, beam_size)` "
                f"but got {type(pl_module).__name__} without {' and '.join(missing)}."
            )
        self._seen, self._chosen = {}, []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Drop what a lost run wrote behind the checkpoint that this one goes on from."""
        if trainer.is_global_zero and not is_dry(trainer):
            _table(trainer).keep(lambda row: int(row[0]) <= trainer.global_step)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse weights that one process alone cannot use."""
        refuse_sharded([pl_module], "TranslationSamples")
        self._seen = {}

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: Any,
        outputs: Any,
        batch: TranslationBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep the sentences of the batch that are among the first, until the first validation is over."""
        if self._chosen or dataloader_idx or not trainer.is_global_zero:
            return
        if not isinstance(batch, TranslationBatch):
            raise ValueError(
                "Expected the validation batches of TranslationSamples to be `TranslationBatch` but got "
                f"{type(batch).__name__}."
            )
        source, target = pl_module.vocabularies
        for row, place in enumerate(batch.index.tolist()):
            if len(self._seen) >= self.count and place > max(self._seen):
                continue
            reference = ""
            if batch.references is not None:
                reference = batch.references[row]
            elif batch.target is not None:
                reference = target.decode(batch.target[row].tolist())
            self._seen[place] = source.decode(batch.source[row].tolist()), reference
        self._seen = dict(sorted(self._seen.items())[: self.count])

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Translate, if it is this epoch's turn."""
        if trainer.sanity_checking or not trainer.is_global_zero:
            return
        self._chosen = self._chosen or list(self._seen.values())
        training = trainer.state.fn == "fit"
        if self._chosen and not (training and (trainer.current_epoch + 1) % self.every_n_epochs):
            self._translate(trainer, pl_module)

    def _translate(self, trainer: Trainer, pl_module: Any) -> None:
        sources = [source for source, _ in self._chosen]
        devices = [pl_module.device] if pl_module.device.type == "cuda" else []
        # Trainer.validate is in inference mode: a tensor that the module makes and keeps then could not train later.
        with torch.inference_mode(False), evaluating(pl_module), torch.random.fork_rng(devices):
            translations = pl_module.translate(sources, beam_size=self.beam_size)
            rows = [(s, t, r) for (s, r), t in zip(self._chosen, translations, strict=True)]
            if is_dry(trainer):
                return
            step = trainer.global_step
            _table(trainer).append((step, *row) for row in rows)
            for writer in writers(trainer):
                writer.add_text("translations", _markdown(rows), step)
                # An empty translation, as early in training, attends to nothing.
                if hasattr(pl_module, "plot_attention") and translations[0]:
                    writer.add_figure("attention", pl_module.plot_attention(sources[0], translations[0]), step)


def _gather(lines: list[tuple[int, str]]) -> list[tuple[int, str]]:
    """The lines of all processes, on the first one; there are none on the others."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return lines
    first = dist.get_rank() == 0
    gathered: list[Any] | None = [None] * dist.get_world_size() if first else None
    dist.gather_object(lines, gathered)
    return [line for part in gathered or [] for line in part]


def _known_length(trainer: Trainer) -> int:
    """Number of sentences to predict as far as the data set says; else 0."""
    try:
        return len(trainer.predict_dataloaders.dataset)  # type: ignore[union-attr]
    except (AttributeError, TypeError):
        return 0


def _in_order(lines: list[tuple[int, str]], length: int) -> list[str]:
    """The texts by place, if each place from 0 on is there exactly once."""
    texts = dict(lines)
    length = max([length, *(place + 1 for place in texts)])
    missing = [place for place in range(length) if place not in texts]
    places = sorted(place for place, _ in lines)
    repeated = sorted({a for a, b in pairwise(places) if a == b})
    if missing or repeated:
        found = [f"{len(p)} {name} ({_some(p)})" for name, p in (("missing", missing), ("repeated", repeated)) if p]
        raise ValueError(
            f"Expected each of the {length} sentences to be translated exactly once but got {' and '.join(found)}, "
            "counted from 0; `limit_predict_batches` and samplers that repeat or drop sentences do not go with "
            "TranslationWriter."
        )
    return [texts[place] for place in range(length)]


def _some(places: list[int]) -> str:
    return ", ".join(map(str, places[:10])) + (", ..." if len(places) > 10 else "")


def _table(trainer: Trainer) -> CsvFile:
    return CsvFile(run_folder(trainer) / "translations.csv", ("step", "source", "translation", "reference"))


def _markdown(rows: list[tuple[str, str, str]]) -> str:
    lines: list[Sequence[str]] = [("source", "translation", "reference"), ("---",) * 3]
    lines += [[_cell(text) for text in row] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(text: str) -> str:
    """The text as it is, in spite of what Markdown and HTML make of some signs."""
    return re.sub(r"([\\`*_|~\[\]])", r"\\\1", html.escape(_LINE_ENDS.sub(" ", text), quote=False))
