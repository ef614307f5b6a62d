"""Pictures of what a module generates, while it trains."""

from abc import abstractmethod
from typing import Any

import torch

from lightning_rectify._lightning import Callback, LightningModule, Trainer
from lightning_rectify.callbacks._sharded import refuse_sharded
from lightning_rectify.nn.modes import evaluating


class DrawnInFit(Callback):
    """Draws at the end of some epochs and of fit, in evaluation mode, without gradients, on the first process alone.

    Args:
        every_n_epochs: draw at the end of each n-th epoch; the end of fit is always drawn.
    """

    def __init__(self, every_n_epochs: int) -> None:
        super().__init__()
        self.every_n_epochs = every_n_epochs
        self._drawn_at: int | None = None

    @abstractmethod
    def draw(self, trainer: Trainer, pl_module: Any) -> None:
        """Draw and write."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse weights that one process alone cannot use."""
        refuse_sharded([pl_module], type(self).__name__)
        self._drawn_at = None

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw if it is this epoch's turn."""
        if (trainer.current_epoch + 1) % self.every_n_epochs == 0:
            self._draw_once(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw unless the last epoch's picture shows the same weights."""
        if self._drawn_at != trainer.global_step:
            self._draw_once(trainer, pl_module)

    def _draw_once(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._drawn_at = trainer.global_step
        if not trainer.is_global_zero:
            return
        device = pl_module.device
        # A module that draws from the global generator nevertheless must not make ranks, or runs, differ.
        with evaluating(pl_module), torch.random.fork_rng([device] if device.type == "cuda" else []):
            self.draw(trainer, pl_module)
