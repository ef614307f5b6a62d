"""The one door to Lightning.

``lightning`` and ``pytorch_lightning`` are two packages with the same classes under different types: a ``Trainer`` of
one refuses modules of the other. This file takes the name that the user has already imported, else the one in the
environment variable ``RECTIFY_LIGHTNING`` (for the command line, where nothing of the user's is imported before), else
``lightning`` if it is installed, else ``pytorch_lightning``. All that the package uses of Lightning comes through here.
"""

import copy
import importlib.util
import math
import os
import signal
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pytorch_lightning import Callback, LightningDataModule, LightningModule, Trainer, seed_everything
    from pytorch_lightning.callbacks import BasePredictionWriter, ModelCheckpoint
    from pytorch_lightning.cli import (
        ArgsType,
        LightningArgumentParser,
        LightningCLI,
        LRSchedulerCallable,
        OptimizerCallable,
        SaveConfigCallback,
    )
    from pytorch_lightning.loggers import Logger, TensorBoardLogger
    from pytorch_lightning.plugins.io import TorchCheckpointIO
    from pytorch_lightning.utilities.exceptions import MisconfigurationException
    from pytorch_lightning.utilities.exceptions import _TunerExitException as EndFit
    from pytorch_lightning.utilities.rank_zero import rank_zero_info, rank_zero_only, rank_zero_warn
else:

    def _choose() -> str:
        """The name already imported (the earliest, if both are), else the one asked for, else the one installed."""
        names = ("lightning.pytorch", "pytorch_lightning")
        for module in sys.modules:  # in the order of import
            if module in names:
                return module
        if asked := os.environ.get("RECTIFY_LIGHTNING"):
            if asked not in names:
                raise ValueError(f"Expected RECTIFY_LIGHTNING to be one of {', '.join(names)} but got {asked!r}.")
            return asked
        return names[0] if importlib.util.find_spec("lightning") else names[1]

    NAME = _choose()
    _pl = import_module(NAME)
    Callback, Trainer, seed_everything = _pl.Callback, _pl.Trainer, _pl.seed_everything
    LightningDataModule, LightningModule = _pl.LightningDataModule, _pl.LightningModule
    _callbacks = import_module(f"{NAME}.callbacks")
    BasePredictionWriter, ModelCheckpoint = _callbacks.BasePredictionWriter, _callbacks.ModelCheckpoint
    _loggers = import_module(f"{NAME}.loggers")
    Logger, TensorBoardLogger = _loggers.Logger, _loggers.TensorBoardLogger
    TorchCheckpointIO = import_module(f"{NAME}.plugins.io").TorchCheckpointIO
    _exceptions = import_module(f"{NAME}.utilities.exceptions")
    MisconfigurationException = _exceptions.MisconfigurationException
    # Private, but it is how a callback ends ``fit`` before its first step without an error: Lightning's own finder of
    # learning rates does (``LearningRateFinder(early_exit=True)``).
    EndFit = _exceptions._TunerExitException
    _rank_zero = import_module(f"{NAME}.utilities.rank_zero")
    rank_zero_info, rank_zero_only, rank_zero_warn = (
        _rank_zero.rank_zero_info,
        _rank_zero.rank_zero_only,
        _rank_zero.rank_zero_warn,
    )
    _cli = import_module(f"{NAME}.cli")
    ArgsType, LightningCLI, LightningArgumentParser = _cli.ArgsType, _cli.LightningCLI, _cli.LightningArgumentParser
    LRSchedulerCallable, OptimizerCallable = _cli.LRSchedulerCallable, _cli.OptimizerCallable
    SaveConfigCallback = _cli.SaveConfigCallback


@contextmanager
def uncounted(optimizer: Any) -> Iterator[None]:
    """Steps of this ``LightningOptimizer`` inside do not advance ``trainer.global_step``.

    Lightning counts every optimizer's steps, so that two players would make ``max_steps``, checkpoints and schedules
    run twice as fast as batches do (its issue 17958). The two callbacks are private, and touched only here; the manual
    loop sets them anew for each batch.
    """
    before, after = optimizer._on_before_step, optimizer._on_after_step
    optimizer._on_before_step = optimizer._on_after_step = _nothing
    try:
        yield
    finally:
        optimizer._on_before_step, optimizer._on_after_step = before, after


def _nothing() -> None:
    pass


def log_next(module: Any, name: str, value: Any, batch_size: int | None) -> bool:
    """Update a key that ``module.log`` took, with the same options, in the hook that runs now.

    ``LightningModule.log`` walks through all attributes of a key's metric at each call, which costs a small network a
    twentieth of its step. What it then does with the value is all that is done here.

    Returns:
        False, with nothing done, where ``log`` is needed: for a new key or device, at an epoch's first batch, without a
        Trainer, or if this Lightning keeps its results elsewhere.
    """
    try:
        hook, trainer = module._current_fx_name, module._trainer
        if trainer is None or batch_size is None or trainer._logger_connector.should_reset_tensors(hook):
            return False
        results = trainer._results
        kept = None if results is None or results.dataloader_idx is not None else results.get(f"{hook}.{name}")
        if kept is None or kept.meta.enable_graph:
            return False
        if kept.is_tensor:
            if not getattr(value, "is_floating_point", bool)() or value.device != kept.value.device:
                return False
            value = value.detach()
        elif value is not kept.value:
            return False
        trainer._logger_connector._current_fx = hook
        results.update_metrics(f"{hook}.{name}", value, batch_size)
    except AttributeError:
        return False
    return True


def allow_unused_parameters(strategy: Any) -> bool:
    """Make a DDP strategy that is not set up yet search each graph for the parameters it used.

    Returns:
        Whether it does now: False for a strategy that is not DDP, or whose keyword arguments are kept elsewhere.
    """
    options = getattr(strategy, "_ddp_kwargs", None)
    if not isinstance(options, dict) or options.get("static_graph"):
        return False
    options["find_unused_parameters"] = True
    return True


def requeue_handler() -> Any:
    """What Lightning does at SIGUSR1 in a SLURM job with ``auto_requeue``; None without one.

    Its class is private: it is known by where it is defined.
    """
    handler = signal.getsignal(signal.SIGUSR1) if hasattr(signal, "SIGUSR1") else None
    return handler if type(handler).__module__.endswith(".trainer.connectors.signal_connector") else None


def mend_resume(trainer: Any) -> bool:
    """Keep three things that Lightning loses when it resumes; call it when training starts, before the first batch.

    Where the loaders stand: Lightning sets it when it makes them. A module that asks for
    ``trainer.estimated_stepping_batches`` in ``configure_optimizers`` has them made before the checkpoint's loops are
    read; the position is then forgotten, and the epoch begins anew.

    Which epoch it is: a run that goes on from a checkpoint of an epoch's last batch does not count the beginning of the
    next epoch (nor call ``on_train_epoch_start``), so that a checkpoint from the middle of that one repeats batches.

    What schedules wait for: at the end of the epoch under way Lightning leaves out those that read a metric, though
    that epoch has a validation still before it.

    Returns:
        Whether there is something to :func:`make_up` for, once the random state is back.
    """
    loop = trainer.fit_loop
    if getattr(loop, "_combined_loader_states_to_load", None) and loop._data_fetcher is not None:
        loop._load_combined_loader_states()
        iter(loop._data_fetcher)  # the iterators made before know nothing of it
    if not getattr(loop, "restarted_mid_epoch", False):
        return False
    epochs = loop.epoch_progress.current
    if epochs.processed >= epochs.ready:
        loop.reset_restart_stage()
    elif _validates_again(trainer):
        loop._restarting = False
    return bool(loop.epoch_loop.restarted_on_train_batch_end)


def _validates_again(trainer: Any) -> bool:
    """Whether the epoch under way surely has a validation before it, counted by its own batches."""
    steps, every = trainer.fit_loop.epoch_loop, trainer.val_check_batch
    if trainer.check_val_every_n_epoch is None or every is None or not steps._should_check_val_epoch():
        return False
    batches = trainer.num_training_batches
    # without a length there is one validation, behind the last batch
    return every == math.inf or bool(batches // every > steps.batch_progress.current.ready // every)


def make_up(trainer: Any) -> None:
    """Do what Lightning leaves out of a run that goes on from a checkpoint of ``on_train_batch_end``.

    In the run that made it a validation may have been due after that batch, and after an epoch's last batch came
    ``on_train_epoch_end``; early stopping, the best checkpoint and schedules that wait for a metric hang on them. The
    loops are put where they were in that run, and afterwards where Lightning expects them.
    """
    loop, steps = trainer.fit_loop, trainer.fit_loop.epoch_loop
    validation, ended = steps.val_loop, loop.epoch_progress.current.processed >= loop.epoch_progress.current.ready
    counted = [(steps.batch_progress, "completed", 1)]
    if ended:  # Lightning counts the epoch as over
        counted += [(loop.epoch_progress, "processed", -1), (loop.epoch_progress, "completed", -1)]
    _count(counted)
    if steps._should_check_val_fx(loop._data_fetcher):
        before = copy.deepcopy(validation.batch_progress.state_dict())
        validation.restarting = False
        trainer.validating = True
        validation.run()
        trainer.training = True
        validation.batch_progress.load_state_dict(before)  # Lightning counts these batches where it goes on
        loop._restarting = False  # else schedules would not wait for the metric, which is known now
        steps.update_lr_schedulers("step", update_plateau_schedulers=True)
    if ended:
        stepped = int(not steps._should_accumulate())
        steps._batches_that_stepped += stepped
        loop.on_advance_end()  # counts the epoch
        steps._batches_that_stepped -= stepped
    _count([(steps.batch_progress, "completed", -1)])


def _count(steps: Iterable[tuple[Any, str, int]]) -> None:
    for progress, name, by in steps:
        for counts in (progress.current, progress.total):
            setattr(counts, name, getattr(counts, name) + by)


__all__ = [
    "ArgsType",
    "BasePredictionWriter",
    "Callback",
    "LRSchedulerCallable",
    "LightningArgumentParser",
    "LightningCLI",
    "LightningDataModule",
    "LightningModule",
    "Logger",
    "MisconfigurationException",
    "ModelCheckpoint",
    "OptimizerCallable",
    "SaveConfigCallback",
    "TensorBoardLogger",
    "TorchCheckpointIO",
    "Trainer",
    "allow_unused_parameters",
    "log_next",
    "make_up",
    "mend_resume",
    "rank_zero_info",
    "rank_zero_only",
    "rank_zero_warn",
    "requeue_handler",
    "seed_everything",
    "uncounted",
]
