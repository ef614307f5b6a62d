"""The one door to Lightning.

``lightning`` and ``pytorch_lightning`` are two packages with the same classes under different types: a ``Trainer`` of
one refuses modules of the other. This file takes the name that the user has already imported, else ``lightning`` if it
is installed, else ``pytorch_lightning``. Everything of Lightning that the package uses comes through here.
"""

import importlib.util
import sys
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pytorch_lightning import Callback, LightningDataModule, LightningModule, Trainer, seed_everything
    from pytorch_lightning.callbacks import ModelCheckpoint
    from pytorch_lightning.cli import ArgsType, LightningCLI, LRSchedulerCallable, OptimizerCallable
    from pytorch_lightning.loggers import Logger, TensorBoardLogger
    from pytorch_lightning.utilities.exceptions import MisconfigurationException
    from pytorch_lightning.utilities.rank_zero import rank_zero_info, rank_zero_only, rank_zero_warn
else:

    def _choose() -> str:
        """The Lightning already imported (the earliest, if both are), else the one installed."""
        names = ("lightning.pytorch", "pytorch_lightning")
        for module in sys.modules:  # in the order of import
            if module in names:
                return module
        return names[0] if importlib.util.find_spec("lightning") else names[1]

    NAME = _choose()
    _pl = import_module(NAME)
    Callback, Trainer, seed_everything = _pl.Callback, _pl.Trainer, _pl.seed_everything
    LightningDataModule, LightningModule = _pl.LightningDataModule, _pl.LightningModule
    ModelCheckpoint = import_module(f"{NAME}.callbacks").ModelCheckpoint
    _loggers = import_module(f"{NAME}.loggers")
    Logger, TensorBoardLogger = _loggers.Logger, _loggers.TensorBoardLogger
    MisconfigurationException = import_module(f"{NAME}.utilities.exceptions").MisconfigurationException
    _rank_zero = import_module(f"{NAME}.utilities.rank_zero")
    rank_zero_info, rank_zero_only, rank_zero_warn = (
        _rank_zero.rank_zero_info,
        _rank_zero.rank_zero_only,
        _rank_zero.rank_zero_warn,
    )
    _cli = import_module(f"{NAME}.cli")
    ArgsType, LightningCLI = _cli.ArgsType, _cli.LightningCLI
    LRSchedulerCallable, OptimizerCallable = _cli.LRSchedulerCallable, _cli.OptimizerCallable

__all__ = [
    "ArgsType",
    "Callback",
    "LRSchedulerCallable",
    "LightningCLI",
    "LightningDataModule",
    "LightningModule",
    "Logger",
    "MisconfigurationException",
    "ModelCheckpoint",
    "OptimizerCallable",
    "TensorBoardLogger",
    "Trainer",
    "rank_zero_info",
    "rank_zero_only",
    "rank_zero_warn",
    "seed_everything",
]
