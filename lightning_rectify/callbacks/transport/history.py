"""``PlanHistory``: cost and marginals of a transport plan over training, against what is known."""

from typing import Any

from lightning_rectify._lightning import Callback, LightningModule, Trainer
from lightning_rectify.arguments import check_least, check_types
from lightning_rectify.callbacks._logs import CsvFile, is_dry, run_folder, writers
from lightning_rectify.callbacks.transport.figures import draw_history

NAMES = (
    "cost", "marginal_gap_x", "marginal_floor_x", "marginal_gap_y", "marginal_floor_y", "l2_uvp", "plan_kl"
)  # fmt: skip


class PlanHistory(Callback):
    """Draws what validation says of a transport plan over steps: the cost against the truth, marginals, the plan.

    Reads the metrics ``val/cost``, ``val/marginal_gap_x`` and ``_y`` with their floors, ``val/l2_uvp`` and
    ``val/plan_kl`` at the end of each validation; those that are not logged are left out. The data module may have a
    ``truth`` with ``cost`` and ``independent_cost``. At the end of fit ``LOGFOLDER/plans`` gets ``history.csv`` (a row
    a validation) and ``history.png``; TensorBoard gets the figure as ``plan/history``. The values are part of the
    checkpoint, so that a run that resumes has the whole curve. A validation without ``val/cost`` is passed over, and
    so is the sanity check; in a ``fast_dev_run`` nothing is written.

    Args:
        every_n_validations: draw also while training, at each n-th validation; 0 for the end of fit alone.

    Raises:
        ValueError: for a negative number.

    Example:
        >>> PlanHistory(every_n_validations=5).every_n_validations
        5
    """

    def __init__(self, every_n_validations: int = 0) -> None:
        check_types(PlanHistory, locals())
        super().__init__()
        check_least(0, every_n_validations=every_n_validations)
        self.every_n_validations = every_n_validations
        self._steps: list[int] = []
        self._values: dict[str, list[float]] = {name: [] for name in NAMES}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget another fit's values, but not those that a checkpoint brought back."""
        if self._steps and self._steps[-1] > trainer.global_step:
            self.load_state_dict({"steps": [], "values": {}})

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the values."""
        found = trainer.callback_metrics
        if trainer.sanity_checking or trainer.state.fn != "fit" or "val/cost" not in found:
            return
        if self._steps and self._steps[-1] == trainer.global_step:  # validated again: the last one counts
            self._steps.pop()
            for values in self._values.values():
                values.pop()
        self._steps.append(trainer.global_step)
        for name, values in self._values.items():
            values.append(float(found.get(f"val/{name}", float("nan"))))
        if self.every_n_validations and len(self._steps) % self.every_n_validations == 0:
            self._draw(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the table and the figure."""
        self._draw(trainer)

    def state_dict(self) -> dict[str, Any]:
        """The values so far."""
        return {"steps": list(self._steps), "values": {name: list(held) for name, held in self._values.items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the values of a checkpoint."""
        self._steps = list(state_dict["steps"])
        self._values = {name: list(state_dict["values"].get(name, [])) for name in NAMES}

    def _draw(self, trainer: Trainer) -> None:
        if not self._steps or is_dry(trainer) or not trainer.is_global_zero:
            return
        truth: Any = getattr(getattr(trainer, "datamodule", None), "truth", None)
        lines = {"truth": truth.cost, "independent coupling": truth.independent_cost} if truth is not None else {}
        logged = {name: values for name, values in self._values.items() if any(v == v for v in values)}
        folder = run_folder(trainer) / "plans"
        table = CsvFile(folder / "history.csv", ("step", *NAMES))
        table.path.unlink(missing_ok=True)
        table.append(zip(self._steps, *self._values.values(), strict=True))
        figure = draw_history(self._steps, logged, lines)
        figure.savefig(folder / "history.png", dpi=110)
        for writer in writers(trainer):
            writer.add_figure("plan/history", figure, self._steps[-1])
