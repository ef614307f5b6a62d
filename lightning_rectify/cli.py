"""The command line: ``lightning-rectify fit|validate|test|predict|probe --config FILE``."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import yaml

from lightning_rectify._lightning import (
    ArgsType,
    LightningArgumentParser,
    LightningCLI,
    LightningDataModule,
    LightningModule,
    SaveConfigCallback,
    Trainer,
)
from lightning_rectify.callbacks.adaptive_rate import AdaptiveRateMonitor
from lightning_rectify.callbacks.warmup_probe import WarmupProbe
from lightning_rectify.modules.base import CLASS_PATH


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
        super().__init__(args=args, run=run, **options)

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Lightning's, and ``probe``."""
        return {**LightningCLI.subcommands(), "probe": {"model", "datamodule"}}

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse, with the hyperparameters of the checkpoint that ``--ckpt_path`` names between files and flags."""
        given: Any = sys.argv[1:] if args is None else args
        commands = isinstance(given, list) and len(given) > 0 and given[0] in self.subcommands()
        model = _model_of_checkpoint(given) if commands else None
        if model is None:
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

    def after_fit(self) -> None:
        """Test what was fitted, if asked to."""
        if not self._get(self.config_init, "test_after_fit"):
            return
        saved = getattr(self.trainer.checkpoint_callback, "best_model_path", "")
        self.trainer.test(self.model, datamodule=self.datamodule, ckpt_path="best" if saved else None)


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
    saved = torch.load(path, weights_only=True, map_location="cpu", mmap=True)
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
        if item in ("--config", "-c"):
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
