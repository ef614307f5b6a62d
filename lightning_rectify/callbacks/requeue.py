"""SLURM's warning that time is up, answered between two steps."""

import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

from lightning_rectify._lightning import Callback, LightningModule, Trainer, requeue_handler


class RequeueBetweenSteps(Callback):
    """Let Lightning save and requeue a SLURM job when a step is complete, and not in the middle of it.

    Lightning answers the signal (``#SBATCH --signal=SIGUSR1@90``) at once, wherever training stands: a checkpoint with
    half of a round of a game in it, or with a step taken that its counters do not know of, and the run that goes on
    from it is another one. With this callback it is the uninterrupted run, bit for bit. It waits for the end of the
    step under way, of all batches whose gradients the step sums, or of the validation. The command line has it always;
    it does nothing where Lightning does not listen to SIGUSR1.
    """

    def __init__(self) -> None:
        self._answer: Callable[[int, FrameType | None], Any] | None = None
        self._asked = False
        self._step = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stand before Lightning's handler, which puts everything back when the trainer is done."""
        self._asked, self._answer = False, None
        if threading.current_thread() is threading.main_thread():  # the only one that may set handlers
            self._answer = requeue_handler()
        if self._answer is not None:
            signal.signal(signal.SIGUSR1, self._note)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Remember which step is under way."""
        self._step = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Answer, if this batch completed a step."""
        if trainer.global_step > self._step:
            self._answer_if_asked()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Answer."""
        self._answer_if_asked()

    def _note(self, signum: int, frame: FrameType | None) -> None:
        self._asked = True

    def _answer_if_asked(self) -> None:
        if self._asked and self._answer is not None:
            self._asked = False
            self._answer(signal.SIGUSR1, None)
