"""Where callbacks leave what they have to show: the run's folder, TensorBoard, tables on disk."""

import csv
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from tensorboard.compat.proto.summary_pb2 import Summary  # type: ignore[import-untyped]
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from lightning_rectify._lightning import LightningModule, Logger, MisconfigurationException, TensorBoardLogger, Trainer

_LAYOUTS: WeakKeyDictionary[Any, dict[str, Any]] = WeakKeyDictionary()  # what each writer's page shows so far


def is_dry(trainer: Trainer) -> bool:
    """Whether this is a ``fast_dev_run``, which leaves no files."""
    return bool(trainer.fast_dev_run)  # type: ignore[attr-defined]


def require_logger(trainer: Trainer, callback: str) -> None:
    """Refuse a trainer without logger, except in a dry run.

    Args:
        trainer: the trainer.
        callback: who asks, for the message.

    Raises:
        MisconfigurationException: if the trainer has no logger.
    """
    if not trainer.loggers and not is_dry(trainer):
        raise MisconfigurationException(
            f"Expected the Trainer of {callback} to have a logger but got logger=False; use logger=True, "
            "or CSVLogger or TensorBoardLogger of your choice."
        )


def writers(trainer: Trainer) -> Iterator[Any]:
    """TensorBoard's writers, on the process that writes."""
    if trainer.is_global_zero:
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                yield logger.experiment


def add_layout(writer: Any, layout: Mapping[str, Any]) -> None:
    """Put categories on TensorBoard's custom-scalars page, beside those that other callbacks put there.

    TensorBoard shows the last layout of a run and forgets those before, so each is written with all that came before.

    Args:
        writer: TensorBoard's.
        layout: categories, as ``add_custom_scalars`` takes them.
    """
    merged = _LAYOUTS.setdefault(writer, {})
    merged |= layout
    writer.add_custom_scalars(merged)


def as_tensors(values: Mapping[str, float], device: torch.device) -> dict[str, Tensor]:
    """Numbers as scalars on a device, brought there by one copy."""
    scalars = torch.tensor(list(values.values()), dtype=torch.float32, device=device).unbind()
    return dict(zip(values, scalars, strict=True))


def hand_over(module: LightningModule, values: Mapping[str, float]) -> None:
    """Numbers of a step to ``trainer.callback_metrics``, not to the loggers; of a training hook that may log.

    Tensors with a batch size take the short way of ``RectifiedModule.log``: Lightning's own copies a key's options at
    each call, which took a small network as long as its forward pass.
    """
    latest = as_tensors(values, module.device)
    module.log_dict(latest, logger=False, on_step=True, on_epoch=False, batch_size=1)


def log_at_step(trainer: Trainer, values: Mapping[str, float], step: int) -> None:
    """Numbers of a step to all loggers; to TensorBoard's file as one event that has them all.

    ``TensorBoardLogger`` writes an event a number, each with a checksum and a turn of the writer's thread: 0.4 ms more
    for the numbers of a step of ``AdaptiveRateMonitor`` (benchmarks/lightning_cost.py). TensorBoard reads both alike. A
    logger of another class, with its own ``log_metrics`` or with a prefix is asked as usual.
    """
    for logger in trainer.loggers:
        plain = type(logger).log_metrics is TensorBoardLogger.log_metrics and not getattr(logger, "_prefix", None)
        writer = getattr(logger, "experiment", None) if plain and trainer.is_global_zero else None
        if type(writer) is SummaryWriter:  # not tensorboardX's
            scalars = [Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
            writer._get_file_writer().add_summary(Summary(value=scalars), step)
        else:
            logger.log_metrics(dict(values), step=step)


def log_folder(logger: Logger, default: str) -> Path:
    """The run's own folder: the logger's log_dir, or what its save_dir, name and version make."""
    if folder := getattr(logger, "log_dir", None):
        return Path(folder)
    parts = [str(part) for part in (logger.name, logger.version) if part is not None]
    return Path(logger.save_dir or default, *parts)


def run_folder(trainer: Trainer) -> Path:
    """The folder of the first logger, or the trainer's root without one."""
    if trainer.loggers:
        return log_folder(trainer.loggers[0], trainer.default_root_dir)
    return Path(trainer.default_root_dir)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file beside ``path`` to write to; it takes the place of ``path`` at the end, unless an exception comes.

    Args:
        path: a file that may be there already; its folder must be.

    Yields:
        The path to write to.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


class CsvFile:
    """A table on disk that grows as a run goes on, so that nothing is lost or held in memory.

    Args:
        path: file to append to; made, with its header, at the first row.
        fields: names of the columns.
    """

    def __init__(self, path: Path, fields: Sequence[str]) -> None:
        self.path, self.fields = path, tuple(fields)

    def append(self, rows: Iterable[Sequence[Any]]) -> None:
        """Write rows, one value a column."""
        new = not self.path.exists()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            if new:
                writer.writerow(self.fields)
            writer.writerows(rows)

    def rows(self) -> Iterator[list[str]]:
        """All rows, without the header, one at a time; not one that a killed run left half written."""
        if not self.path.exists():
            return
        with self.path.open(newline="", encoding="utf-8") as file:
            reader = csv.reader(file)
            next(reader, None)
            yield from (row for row in reader if len(row) == len(self.fields))

    def keep(self, wanted: Callable[[list[str]], bool]) -> None:
        """Drop the rows that are not wanted; without any left, drop the file."""
        if not self.path.exists():
            return
        rest = CsvFile(self.path.with_suffix(".tmp"), self.fields)
        rest.path.unlink(missing_ok=True)
        rest.append(row for row in self.rows() if wanted(row))
        rest.path.replace(self.path)
        if next(self.rows(), None) is None:
            self.path.unlink()
