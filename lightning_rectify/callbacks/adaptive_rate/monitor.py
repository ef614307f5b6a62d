"""``AdaptiveRateMonitor``: the variance of the adaptive learning rate at every step, beside its theory."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_rectify._lightning import (
    Callback,
    LightningModule,
    Trainer,
    rank_zero_info,
    rank_zero_warn,
)
from lightning_rectify.arguments import check_least, check_types
from lightning_rectify.callbacks._logs import (
    add_layout,
    hand_over,
    is_dry,
    log_at_step,
    require_logger,
    run_folder,
    writers,
)
from lightning_rectify.callbacks._sharded import reshard
from lightning_rectify.callbacks.adaptive_rate.alarms import AdaptiveRateWarning, GroupAlarms
from lightning_rectify.callbacks.adaptive_rate.dashboard import (
    PREFIX,
    CsvStore,
    draw,
    is_histogram_step,
    layout,
    write_histograms,
)
from lightning_rectify.callbacks.adaptive_rate.quantities import measure
from lightning_rectify.callbacks.adaptive_rate.watch import OptimizerWatch, group_keys
from lightning_rectify.optim.moments import SUPPORTED, beta2_of, rectifier_options, second_moments, unwrap

_MOST_ROWS = 50  # points between two transfers from the device
_ALWAYS = 10  # the first steps are where the paper's story happens


class AdaptiveRateMonitor(Callback):
    """Logs the variance of the adaptive learning rate at every optimizer step, beside the theory of the RAdam paper.

    Works with any LightningModule, automatic or manual optimization, and with RectifiedAdam, torch's Adam, AdamW,
    NAdam, RAdam, RMSprop and other optimizers that keep a second moment (for a game: those of its optimizers that do).

    Logged as ``adaptive_rate/GROUP/QUANTITY``, one point a real optimizer step (not per micro-batch, not for a step
    that a gradient scaler skipped), at that optimizer's own step number. GROUP is the parameter group's ``name``, else
    ``model`` if there is but one, else ``pg<i>``; with ``per_layer`` also GROUP/LAYER. Quantities, all finite:

    - ``rho``, ``rectification``: length of the simple average and r_t (paper, section 4); for an optimizer that does
      not rectify, the r_t that it would need;
    - ``variance``, ``mean``, ``log_variance``: of the adaptive rate 1/(sqrt(v_hat) + eps) over the group's coordinates,
      those not ruled by eps; ``theory_variance``, ``theory_log_variance``: what they would be if all coordinates had
      gradients of one scale (the measured excess is the spread of scales);
    - ``update_surprise``: mean of g^2 / v_hat (v before the step) over its expectation; above 1 gradients grow;
    - ``effective_lr``: what multiplies the step, lr * r_t where rectified;
    - ``eps_share``: share of coordinates with sqrt(v_hat) <= eps;
    - ``gradient_median`` and ``gradient_q05``, ``q25``, ``q75``, ``q95``: quantiles of abs(g), after clipping.

    Every logger gets the numbers. TensorBoard also gets a custom-scalars page that lays measured over theory,
    histograms of log abs(g) and of the log of the adaptive rate at the paper's iterations, the alarms as text, and at
    the end the figure. ``adaptive_rate.csv`` and ``adaptive_rate.png`` are left in the log folder. The latest values
    are in ``trainer.callback_metrics`` for ModelCheckpoint and EarlyStopping.

    Alarms (each once, as :class:`AdaptiveRateWarning`, and in :attr:`alarms`): the jump from unrectified to rectified
    steps; warmup on top of rectification; eps ruling half of the coordinates; second moments standing still in 16 bits;
    a beta2 that never rectifies; Adam without warmup; the collapse of the gradient that the paper's figure 2 shows.

    Cost: two gathers of ``sample_size`` numbers a group and step, nothing that makes the host wait for the device, and
    one transfer (for sharded state: one reduction) each ``trainer.log_every_n_steps`` points. The sample is the same
    fixed random coordinates at every step; it is drawn anew only when a parameter takes its first step later than the
    others. A relative error of a variance over n coordinates is about sqrt(2/n): 2 % at 4096.

    Args:
        every_n_steps: record each n-th step; the first ten, and the paper's histogram iterations, always are.
        sample_size: coordinates read in a group (and in a layer); None reads all.
        per_layer: also log each layer (each module that owns parameters).
        histograms: write the histograms to TensorBoard.
        figure: draw ``adaptive_rate.png`` at the end of fit.
        strict: raise where it cannot work (no logger, no second moment); if False, say so and stay silent.
        seed: of the sample; the global random state is not touched.

    Raises:
        ValueError: for an argument out of its range, or if no optimizer of the module keeps a second moment.
        MisconfigurationException: if the trainer has no logger (except with ``fast_dev_run``).

    Example:
        >>> import lightning_rectify
        >>> monitor = lightning_rectify.AdaptiveRateMonitor(per_layer=True)
        >>> monitor.alarms
        {}
    """

    def __init__(
        self,
        every_n_steps: int = 1,
        sample_size: int | None = 4096,
        per_layer: bool = False,
        histograms: bool = True,
        figure: bool = True,
        strict: bool = True,
        seed: int = 0,
    ) -> None:
        check_types(AdaptiveRateMonitor, locals())
        super().__init__()
        if every_n_steps < 1:
            raise ValueError(f"Expected argument `every_n_steps` to be at least 1 but got {every_n_steps}.")
        if sample_size is not None and sample_size < 2:
            raise ValueError(
                f"Expected argument `sample_size` to be at least 2, or None for all, but got {sample_size}."
            )
        check_least(0, seed=seed)
        self.every_n_steps, self.sample_size, self.per_layer = every_n_steps, sample_size, per_layer
        self.histograms, self.figure, self.strict, self.seed = histograms, figure, strict, seed
        #: findings so far: (alarm, group) -> message
        self.alarms: dict[tuple[str, str], str] = {}
        self._watches: list[OptimizerWatch] = []
        self._handles: list[RemovableHandle] = []
        self._group_alarms: dict[str, GroupAlarms] = {}
        self._latest: dict[str, float] = {}
        self._store: CsvStore | None = None

    # -- Lightning's hooks ---------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a trainer without logger early."""
        if stage == "fit" and self.strict:
            require_logger(trainer, "AdaptiveRateMonitor")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the optimizers, hook their steps, lay out the dashboard."""
        optimizers = self._watchable(trainer)
        reshard(pl_module)
        names: dict[Tensor, str] = {param: name for name, param in pl_module.named_parameters()}
        rows = min(trainer.log_every_n_steps or _MOST_ROWS, _MOST_ROWS)  # type: ignore[attr-defined]
        for optimizer, keys in zip(optimizers, group_keys(optimizers), strict=True):
            watch = OptimizerWatch(optimizer, names, keys, self.per_layer, self.sample_size, rows, self.seed)
            self._watches.append(watch)
            self._handles.append(
                optimizer.register_step_post_hook(lambda *_, watch=watch: self._after_step(trainer, watch))
            )
        if trainer.is_global_zero and optimizers:
            self._open_folder(trainer)
            for writer in writers(trainer):
                add_layout(writer, layout([key for watch in self._watches for key in watch.layer_keys()]))
        self._group_alarms = {}
        for watch in self._watches:
            for key, group in zip(watch.keys, watch.optimizer.param_groups, strict=True):
                rule = rectifier_options(watch.optimizer, group)
                name, frozen = type(watch.optimizer).__name__, int(group.get("frozen_steps", 0))
                alarms = GroupAlarms(key, name, beta2_of(group), rule, frozen)
                self._group_alarms[key] = alarms
                self._raise_alarms(trainer, key, alarms.at_start(), watch.calls)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Hand the latest values to ``callback_metrics``."""
        if self._latest:
            hand_over(pl_module, self._latest)
            self._latest = {}

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write what is buffered."""
        self._flush_all(trainer)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Write what is buffered: no point up to a checkpoint is lost."""
        self._flush_all(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write what is buffered and draw the figure."""
        self._flush_all(trainer)
        self._finish(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Write what is buffered, so that a failed run can be looked at."""
        # Sharded readings need every process, and after an exception not all may be here.
        if not any(unit.sample.sharded for watch in self._watches for unit in watch.units):
            self._flush_all(trainer)
            self._finish(trainer)
        self._release()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let go of the optimizers."""
        self._release()

    def state_dict(self) -> dict[str, Any]:
        """Which alarms were raised, so that a resumed run does not repeat them."""
        return {"alarms": [[alarm, key, message] for (alarm, key), message in self.alarms.items()]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore ``state_dict()``."""
        self.alarms = {(alarm, key): message for alarm, key, message in state_dict["alarms"]}

    def _watchable(self, trainer: Trainer) -> list[Optimizer]:
        """The optimizers, unwrapped, that keep a second moment."""
        kept, refused = [], []
        for optimizer in trainer.optimizers:
            try:
                second_moments(optimizer)
                kept.append(unwrap(optimizer))
            except ValueError:
                refused.append(type(unwrap(optimizer)).__name__)
        if not kept:
            self._give_up(
                f"Expected an optimizer of the module to keep a second moment ({SUPPORTED}) but got "
                f"{', '.join(refused) or 'none'}: there is no adaptive rate to monitor."
            )
        return kept

    def _give_up(self, message: str) -> None:
        if self.strict:
            raise ValueError(message)
        rank_zero_info(f"AdaptiveRateMonitor is silent. {message}")

    # -- a step, and what becomes of it --------------------------------------------------------------------------------

    def _after_step(self, trainer: Trainer, watch: OptimizerWatch) -> None:
        watch.calls += 1
        if watch.silent:
            return
        due = watch.calls <= _ALWAYS or watch.calls % self.every_n_steps == 0 or is_histogram_step(watch.calls)
        if not due:
            return
        if watch.stale:
            self._flush(trainer, watch)
            try:
                watch.rebuild()
            except ValueError as error:  # what only looked like Adam from outside
                self._give_up(str(error))
                watch.silent = True
                return
        watch.record()
        if watch.full:
            self._flush(trainer, watch)

    def _flush_all(self, trainer: Trainer) -> None:
        for watch in self._watches:
            self._flush(trainer, watch)

    def _flush(self, trainer: Trainer, watch: OptimizerWatch) -> None:
        by_step: dict[int, dict[str, float]] = {}
        for unit, block in watch.blocks(_sum_over_processes):
            points = measure(block)
            for i, step in enumerate(points.step):
                row = by_step.setdefault(int(step), {})
                row.update({f"{PREFIX}/{unit.key}/{name}": float(column[i]) for name, column in points.values.items()})
            if self._store is not None:
                self._store.append(unit.key, points.step, points.values)
            for writer in writers(trainer) if self.histograms else ():
                write_histograms(writer, unit.key, block, points)
            if alarms := self._group_alarms.get(unit.key):
                findings = alarms.feed(block, points, unit.low_precision)
                self._raise_alarms(trainer, unit.key, findings, int(points.step[-1]))
        for step, metrics in sorted(by_step.items()):
            log_at_step(trainer, metrics, step)
            self._latest.update(metrics)

    def _raise_alarms(self, trainer: Trainer, key: str, findings: Iterator[tuple[str, str]], step: int) -> None:
        for alarm, message in findings:
            if (alarm, key) in self.alarms:
                continue
            self.alarms[alarm, key] = message
            rank_zero_warn(f"AdaptiveRateMonitor, group {key!r}: {message}", category=AdaptiveRateWarning)
            for writer in writers(trainer):
                writer.add_text(f"{PREFIX}/{key}/{alarm}", message, step)

    def _open_folder(self, trainer: Trainer) -> None:
        if is_dry(trainer) or not trainer.loggers:
            return
        self._store = CsvStore(run_folder(trainer) / "adaptive_rate.csv")
        # A run that goes on in an old folder rewrites what came after its checkpoint.
        self._store.keep_until({key: watch.calls for watch in self._watches for key in watch.layer_keys()})

    def _finish(self, trainer: Trainer) -> None:
        if self._store is None or not self._store.path.exists():
            return
        folder = self._store.path.parent
        said = f"Adaptive rate: points in {self._store.path}"
        if self.figure:
            figure = draw(self._store.read(), [key for watch in self._watches for key in watch.keys])
            figure.savefig(folder / "adaptive_rate.png", dpi=110)
            said += f"\n  figure in {folder / 'adaptive_rate.png'}"
            for writer in writers(trainer):
                writer.add_figure(f"{PREFIX}/figure", figure, max(watch.calls for watch in self._watches))
        if any(True for _ in writers(trainer)):
            said += f"\n  dashboard: tensorboard --logdir {folder}  (tab Custom Scalars)"
        rank_zero_info(said)

    def _release(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles, self._watches, self._store, self._latest = [], [], None, {}


def _sum_over_processes(tensor: Tensor) -> Tensor:
    torch.distributed.all_reduce(tensor)  # not the strategy's `reduce`, which waits at a barrier before
    return tensor
