"""The command line: ``lightning-rectify fit|validate|test|predict|probe --config FILE``."""

import errno
import os
import re
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml

from lightning_rectify._lightning import (
    ArgsType,
    LightningArgumentParser,
    LightningCLI,
    LightningDataModule,
    LightningModule,
    SaveConfigCallback,
    TorchCheckpointIO,
    Trainer,
)
from lightning_rectify.callbacks._logs import run_folder
from lightning_rectify.callbacks.adaptive_rate import AdaptiveRateMonitor
from lightning_rectify.callbacks.requeue import RequeueBetweenSteps
from lightning_rectify.callbacks.warmup_probe import WarmupProbe
from lightning_rectify.checkpoints import AtomicCheckpointIO, newest_checkpoint, read_safely
from lightning_rectify.modules.base import CLASS_PATH

# The YAML files: inside the installed package, or beside it in a checkout.
_INSTALLED = Path(__file__).with_name("configs")
CONFIGS = _INSTALLED if _INSTALLED.is_dir() else Path(__file__).parents[1] / "configs"
CONFIG_FLAGS = ("--config", "-c")

# What an operating system says where files cannot be written
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)  # only writing meets them
_CLOSED = (errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST)


class SaveConfigOfRun(SaveConfigCallback):
    """Keeps the configuration in the run's own folder; without a logger there is none, and no file is written."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Save, unless the folder would be the one that one stands in."""
        if trainer.loggers:
            super().setup(trainer, pl_module, stage)


class ProbingTrainer(Trainer):
    """A Trainer with one entry point more, the subcommand ``probe``."""

    def probe(
        self,
        model: LightningModule,
        datamodule: LightningDataModule | None = None,
        streams: int = 16,
        steps: int = 100,
        sample_size: int | None = 1024,
        beta2: float | None = None,
        tolerance: float = 2.0,
        worse_than: float = 2.0,
        accumulate: int | None = None,
        seed: int = 0,
    ) -> None:
        """Does this model need a warmup, and how long a one? Measured at its initial weights, without training.

        Prints a table, and leaves it with CSV files, a figure and TensorBoard's pages in the run's folder.

        Args:
            model: what would be trained; its callbacks and the Trainer's have no part in it.
            datamodule: its data; None if the model has loaders of its own.
            streams: independent streams of minibatches, at least 2.
            steps: length of each.
            sample_size: coordinates sampled in each layer; null for all.
            beta2: of the second moment; null for that of the optimizer.
            tolerance: how many times its floor the variance of the adaptive rate may be, above 1.
            worse_than: factor over the theory from which a layer needs more, above 1.
            accumulate: batches that make one gradient; null for as many as in training.
            seed: of streams and sample.

        Raises:
            ValueError: as :class:`lightning_rectify.WarmupProbe` does.
        """
        self.callbacks = [
            WarmupProbe(
                streams=streams, steps=steps, sample_size=sample_size, beta2=beta2, tolerance=tolerance,
                worse_than=worse_than, accumulate=accumulate, seed=seed, stop=True,
            )
        ]  # fmt: skip
        self.num_sanity_val_steps = 0
        self.fit(model, datamodule=datamodule)


class RectifyCLI(LightningCLI):
    """LightningCLI for any module and data class, the package's or a user's, named by import path.

    Beside Lightning's own, a configuration has two keys: ``adaptive_rate``, the arguments of
    :class:`AdaptiveRateMonitor` (which is always there; where it cannot work it says so and stays silent, unless
    ``strict``), and ``test_after_fit``. Optimizers and schedules are arguments of the module (``model.optimizer``), one
    a player, not of the command line. Beside Lightning's subcommands there is ``probe``:
    :meth:`ProbingTrainer.probe`.

    ``--ckpt_path FILE`` brings the checkpoint's class and hyperparameters with it: they come after ``--config`` files
    and before all other flags, so that a checkpoint alone is enough to test or predict, and a flag has the last word.

    Checkpoints are written and read by :class:`lightning_rectify.checkpoints.AtomicCheckpointIO`, unless ``trainer``
    names another way, and a SLURM job is requeued between two steps
    (:class:`lightning_rectify.callbacks.RequeueBetweenSteps`).

    Args:
        args: arguments in place of the command line's: a list of strings, or a nested dict.
        run: whether to run the subcommand; False only parses and instantiates.
        **kwargs: for LightningCLI; a ``trainer_class`` must be a subclass of :class:`ProbingTrainer`.
    """

    def __init__(self, args: ArgsType = None, run: bool = True, **kwargs: Any) -> None:
        # An optimizer of the command line's would replace the configure_optimizers of a game.
        defaults: dict[str, Any] = {
            "auto_configure_optimizers": False,
            "seed_everything_default": 1,
            "save_config_callback": SaveConfigOfRun,
            "trainer_class": ProbingTrainer,
        }
        options = defaults | kwargs
        trainer_class = options["trainer_class"]
        if isinstance(trainer_class, type) and not issubclass(trainer_class, ProbingTrainer):
            raise TypeError(
                "Expected argument `trainer_class` to be a subclass of lightning_rectify.cli.ProbingTrainer, for the "
                f"subcommand probe, but got {trainer_class.__name__}."
            )
        try:
            super().__init__(args=args, run=run, **options)
        except OSError as error:
            if (explained := self._explained(error)) is None:
                raise
            raise explained from error

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Lightning's, and ``probe``."""
        return {**LightningCLI.subcommands(), "probe": {"model", "datamodule"}}

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse, with the hyperparameters of the checkpoint that ``--ckpt_path`` names between files and flags."""
        given: Any = sys.argv[1:] if args is None else args
        if isinstance(given, list):
            try:
                args = given = _named_configs(list(map(str, given)))
            except ValueError as error:
                parser.error(str(error))
        commands = isinstance(given, list) and len(given) > 0 and given[0] in self.subcommands()
        model = _model_of_checkpoint(given) if commands else None
        if model is None:
            with warnings.catch_warnings():  # they are the command line's own, with paths for names
                warnings.filterwarnings("ignore", "LightningCLI's args parameter")
                super().parse_arguments(parser, args)
            return
        with TemporaryDirectory() as folder:
            file = Path(folder) / "checkpoint.yaml"
            file.write_text(yaml.safe_dump({"model": model}), encoding="utf-8")
            super().parse_arguments(parser, _behind_configs(list(map(str, given)), f"--config={file}"))

    def _parse_ckpt_path(self) -> None:
        """Nothing: Lightning's own lets the checkpoint overrule flags, and needs one that a command line wrote."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the monitor's block and ``test_after_fit``."""
        parser.add_lightning_class_args(AdaptiveRateMonitor, "adaptive_rate")
        parser.set_defaults({"adaptive_rate.strict": False})
        parser.add_argument(
            "--test_after_fit",
            type=bool,
            default=False,
            help="After fit, test the best checkpoint (without checkpoints: the last weights).",
        )

    def instantiate_classes(self) -> None:
        """Lightning's; an argument that a class refuses is reported in the words of the class alone.

        jsonargparse wraps them in what else the key could have been, and in the whole configuration.
        """
        try:
            super().instantiate_classes()
        except ValueError as error:
            said = re.search(r"^\s*- (Expected arguments? `.*)$", str(error), re.MULTILINE)
            if said is None:
                raise
            raise ValueError(said[1]) from None

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """The trainer, with checkpoint files that are whole or not there, and are of whole steps."""
        trainer = super().instantiate_trainer(**kwargs)
        # Last: what the others keep of a step is in its checkpoint.
        trainer.callbacks.append(RequeueBetweenSteps())  # type: ignore[attr-defined]
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:  # Lightning's default, not one that was asked for
            trainer.strategy.checkpoint_io = AtomicCheckpointIO()
        return trainer

    def _explained(self, error: OSError) -> OSError | None:
        """An error of writing the run's files, with what to do; None if it is another one, or says so itself."""
        trainer = getattr(self, "trainer", None)
        if trainer is None or error.errno not in _FULL + _CLOSED or str(error.strerror).startswith("Expected"):
            return None
        folder = run_folder(trainer).absolute()
        if error.errno in _CLOSED:  # or is it a file of the user's that cannot be read?
            place = Path(error.filename or "").absolute()
            if not (place.is_relative_to(folder) or folder.is_relative_to(place)):
                return None
        last = newest_checkpoint(folder) if folder.is_dir() else None
        resume = f" The last whole checkpoint is {str(last)!r}: go on from it with --ckpt_path." if last else ""
        return OSError(
            error.errno,
            f"Expected to write the run into {str(folder)!r} but got: {error.strerror}. Free space or give the right "
            f"to write there, or name another folder with --trainer.logger.init_args.save_dir.{resume}",
        )

    def after_fit(self) -> None:
        """Test what was fitted, if asked to."""
        if not self._get(self.config_init, "test_after_fit"):
            return
        saved = getattr(self.trainer.checkpoint_callback, "best_model_path", "")
        self.trainer.test(self.model, datamodule=self.datamodule, ckpt_path="best" if saved else None)


def shipped_configs() -> dict[str, Path]:
    """The YAML files that come with the package: by name, without suffix, those in folders as ``folder/name``."""
    found = sorted(CONFIGS.rglob("*.yaml"))
    return {path.relative_to(CONFIGS).with_suffix("").as_posix(): path for path in found}


def _named_configs(args: list[str]) -> list[str]:
    """The arguments with the path of a shipped file in place of its name, where a configuration is asked for.

    Raises:
        ValueError: if what looks like a name or a path is neither a path that exists nor a shipped file.
    """
    named: list[str] = []
    for item in args:
        flag, equals, value = item.partition("=")
        if named and named[-1] in CONFIG_FLAGS:
            item = _config_path(item)
        elif equals and flag in CONFIG_FLAGS:
            item = f"{flag}={_config_path(value)}"
        named.append(item)
    return named


def _config_path(value: str) -> str:
    """The path for one value of ``--config``; text that holds a blank or a colon is YAML itself, for jsonargparse."""
    if os.path.exists(value) or not re.fullmatch(r"[^\s:{}]+", value):
        return value
    shipped = shipped_configs()
    name = value.removeprefix("configs/").removesuffix(".yaml")
    if name not in shipped:
        raise ValueError(
            f"Expected argument `--config` to be a file or the name of one that comes with the package "
            f"({', '.join(shipped)}) but got {value!r}."
        )
    return str(shipped[name])


def _model_of_checkpoint(args: Sequence[Any]) -> dict[str, Any] | None:
    """Class and hyperparameters of the checkpoint that the arguments name; None if there is none that says them."""
    path = None
    for i, item in enumerate(map(str, args)):
        if item.startswith("--ckpt_path="):
            path = item.partition("=")[2]
        elif item == "--ckpt_path" and i + 1 < len(args):
            path = str(args[i + 1])
    if path is None or not Path(path).is_file():
        return None
    saved = read_safely(path)
    plain = dict(saved.get("hyper_parameters", {}))
    plain.pop("_instantiator", None)
    class_path = plain.pop("_class_path", saved.get(CLASS_PATH))
    return None if class_path is None else {"class_path": class_path, "init_args": _yaml_plain(plain)}


def _yaml_plain(value: Any) -> Any:
    """The same without tuples, which YAML does not have."""
    if isinstance(value, dict):
        return {key: _yaml_plain(item) for key, item in value.items()}
    return [_yaml_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def _behind_configs(args: list[str], file: str) -> list[str]:
    """The arguments with configuration files first (behind the subcommand), then ``file``, then the rest."""
    configs, rest, items = [], [], iter(args[1:])
    for item in items:
        if item in CONFIG_FLAGS:
            configs += [item, next(items, "")]
        elif item.startswith(("--config=", "-c=")):
            configs.append(item)
        else:
            rest.append(item)
    return [args[0], *configs, file, *rest]


def main(args: ArgsType = None) -> None:
    """Run the command line.

    Args:
        args: arguments in place of ``sys.argv``.
    """
    # As with ``python -m``: modules of the folder one stands in can be named.
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    RectifyCLI(args=args)


if __name__ == "__main__":
    main()
