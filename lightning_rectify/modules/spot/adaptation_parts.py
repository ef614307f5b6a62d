"""``PartedModule``: which players of an adaptation learn when, and how long their rates last."""

import warnings
from collections.abc import Iterator
from typing import Any

from lightning_rectify.modules.spot.adaptation_answers import AdaptationModule
from lightning_rectify.modules.spot.adaptation_settings import Settings
from lightning_rectify.modules.spot.presets import HoldThenDecay


class PartedModule(AdaptationModule):
    """An adaptation whose run has parts: the source alone, the plan, the classifier alone; "joint" has but one."""

    method: str
    settings: Settings
    source_steps: int
    plan_steps: int | None

    @property
    def part(self) -> str:
        """Which part of "two_stage" the next round is in: "source", "plan" or "classifier"; "joint" has but "plan"."""
        if self.method == "joint" or self._trainer is None:
            return "plan"
        step = self.trainer.global_step
        if step < self.source_steps:
            return "source"
        return "plan" if step < self._plan_end() else "classifier"

    def _plan_end(self) -> int:
        if self.plan_steps is None:
            total = self._rounds()
            if not total:
                raise ValueError(
                    "Expected argument `plan_steps` to be a number with a Trainer that has no end but got None."
                )
            self.plan_steps = max(3 * total // 4 - self.source_steps, 1)
        return self.source_steps + self.plan_steps

    def _rounds(self) -> int:
        steps = float(self.trainer.estimated_stepping_batches)
        return max(int(steps) // self.accumulate, 1) if 0 < steps < float("inf") else 0

    def _optimizers(self) -> Iterator[tuple[str, Any]]:
        """Only the players of this part of the run."""
        part = self.part
        for player, optimizer in super()._optimizers():
            if part == "plan" or player == "classifier":
                yield player, optimizer

    def on_train_start(self) -> None:
        """Averages answer: they are in evaluation mode."""
        super().on_train_start()
        if self.averages is not None:
            self.averages.eval()

    def _step_schedulers(self, plateau: bool | None = None) -> None:
        with warnings.catch_warnings():  # of a player that rests in this part of the run
            warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
            super()._step_schedulers(plateau)

    def configure_optimizers(self) -> Any:
        """One optimizer a player; rates that are held and then fall, unless there is a schedule already."""
        optimizers, schedulers = super().configure_optimizers()
        steps = self.settings.decay_steps
        if steps is None:
            steps = self._rounds() if self._trainer is not None else 0
        if not schedulers and steps:
            end = steps if self.method == "joint" else min(self._plan_end(), steps)
            totals = [steps if player == "classifier" else end for player in self.players]
            schedulers = [
                {"scheduler": HoldThenDecay(optimizer, total)}
                for optimizer, total in zip(optimizers, totals, strict=True)
            ]
        return optimizers, schedulers
