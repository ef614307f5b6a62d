"""``WarmupProbe`` and ``probe_warmup``: does this model need a warmup, and how long a one?"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lightning_rectify._lightning import Callback, EndFit, LightningDataModule, LightningModule, Trainer, rank_zero_info
from lightning_rectify.arguments import check_types
from lightning_rectify.callbacks._logs import is_dry, run_folder, writers
from lightning_rectify.callbacks._untouched import random_state
from lightning_rectify.callbacks.warmup_probe.gradients import LossFunction
from lightning_rectify.callbacks.warmup_probe.probe import ProbeOptions, lent, measure
from lightning_rectify.callbacks.warmup_probe.result import WarmupProbeResult

_QUIET: dict[str, Any] = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
    "limit_val_batches": 0,
    "max_epochs": 1,
    "devices": 1,
}


class WarmupProbe(Callback):
    r"""Measures, before training, how long the adaptive learning rate is too uncertain to be trusted.

    The RAdam paper (arXiv:1908.03265, section 3) lays the need for warmup on the variance of the adaptive rate
    :math:`\psi_t = 1/\sqrt{\hat v_t}` in the first steps, and computes it for Gaussian gradients. This callback
    measures it on the model at hand: at its frozen initial weights it draws ``streams`` independent streams of
    minibatches, runs the second moment of each, and takes for each of some sampled coordinates the relative variance
    Var[psi]/E[psi]^2 and the variance of ln psi over streams, at t = 1 to ``steps``, beside the exact theory at rho_t,
    for each layer and for the whole. From that it says, in :attr:`result`, in a table, in ``warmup_probe.txt``,
    ``.csv``, ``_layers.csv`` and ``.png`` in the log folder and in TensorBoard:

    - how many steps it takes until the variance is within ``tolerance`` times its floor;
    - the linear warmup that gives the same protection, and what RectifiedAdam gives by itself;
    - which layers are worse than the theory and need more, and by what factor: those with rare gradients, such as
      embeddings. Coordinates whose gradient is zero are counted: in medians, one without a gradient so far in some
      stream has infinite variance; one without in all of them is left out and reported as such.

    Medians over coordinates are corrected for the few streams (with 16 they would be 6 % to 28 % low) by what the same
    probe finds in Gaussian noise.

    It works with automatic optimization; with games that have ``players`` and ``NAME_loss(batch)``, player by player;
    and with any other manual optimization through ``loss``. It runs once, at the start of the first epoch, after the
    module's ``on_train_start``; a resumed run (``trainer.global_step`` above 0) is not probed. Weights, buffers,
    gradients, optimizers, metrics, order of the data and random state are afterwards what they were, bit for bit, and
    nothing that ``training_step`` logs in between is logged. Hooks around a batch (``on_train_batch_start`` and so on),
    gradient clipping and weight decay have no part in it.

    With several processes each takes batches of its own part of the data and the sampled coordinates are averaged
    over processes, as DDP does with gradients: one small reduction a gradient. All find the same, the first one writes.

    Cost: ``streams * steps`` gradients of each player (times accumulated batches) and little more; memory for one copy
    of the weights and ``16 * streams`` bytes a sampled coordinate.

    Args:
        streams: independent streams S, at least 2.
        steps: length T of each; what comes after is theory with the measured factor.
        sample_size: coordinates sampled in each layer; None for all.
        beta2: of the second moment; None for that of the optimizer (0.999 if it has none).
        tolerance: how many times its floor the variance may be, above 1.
        worse_than: factor from which a layer needs more, above 1.
        loss: function of module and batch that returns a scalar, or a dict of them by player; for modules that optimize
            manually. A player named like a submodule owns the parameters below it.
        accumulate: batches that make one gradient; None for as many as in training.
        seed: of streams and sample, at least 0.
        stop: end ``fit`` after the probe, before any step.

    Raises:
        ValueError: for an argument out of its range; when it runs, for a manual module without players if ``loss`` is
            None, for sharded weights, a loader without batches or that cannot be copied, or a gradient that is not
            finite.

    Example:
        >>> from lightning_rectify.callbacks.warmup_probe import WarmupProbe
        >>> probe = WarmupProbe(streams=8)  # trainer = Trainer(callbacks=[probe])
        >>> probe.result is None
        True
    """

    def __init__(
        self,
        streams: int = 16,
        steps: int = 100,
        sample_size: int | None = 1024,
        beta2: float | None = None,
        tolerance: float = 2.0,
        worse_than: float = 2.0,
        loss: LossFunction | Mapping[str, LossFunction] | None = None,
        accumulate: int | None = None,
        seed: int = 0,
        stop: bool = False,
    ) -> None:
        check_types(WarmupProbe, locals())
        super().__init__()
        self.options = ProbeOptions(streams, steps, sample_size, beta2, tolerance, worse_than, loss, accumulate, seed)
        self.stop = stop
        self._silent = False  # probe_warmup's caller has the result
        #: what was found; None before
        self.result: WarmupProbeResult | None = None

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Probe, write and say it."""
        if self.result is not None or trainer.global_step > 0:
            return
        options = self.options
        if is_dry(trainer):  # a dry run is to show that it runs
            options = ProbeOptions(**{**vars(options), "streams": 2, "steps": 2})
        self.result = measure(trainer, pl_module, options)
        if trainer.is_global_zero and not is_dry(trainer) and not self._silent:
            self._write(trainer, self.result)
        if self.stop:
            raise EndFit

    def _write(self, trainer: Trainer, result: WarmupProbeResult) -> None:
        rank_zero_info(result.table())
        folder = result.save(run_folder(trainer))
        rank_zero_info(f"Warmup probe: files warmup_probe.* in {folder}")
        for writer in writers(trainer):
            writer.add_figure("warmup_probe/figure", result.plot(), 0)
            writer.add_text("warmup_probe/table", "\n".join(f"    {line}" for line in result.table().splitlines()), 0)


def probe_warmup(
    module: LightningModule,
    data: Any,
    *,
    streams: int = 16,
    steps: int = 100,
    sample_size: int | None = 1024,
    beta2: float | None = None,
    tolerance: float = 2.0,
    worse_than: float = 2.0,
    loss: LossFunction | Mapping[str, LossFunction] | None = None,
    accumulate: int | None = None,
    seed: int = 0,
    folder: str | Path | None = None,
    trainer_options: Mapping[str, Any] | None = None,
) -> WarmupProbeResult:
    """Find out, without training, whether a model needs a warmup, and how long a one.

    Runs :class:`WarmupProbe` in a quiet Trainer of its own and leaves module, data and random state as they were;
    a datamodule has been set up for "fit" and torn down again.

    Args:
        module: at its initial weights.
        data: its training loader, or the datamodule.
        streams: as for :class:`WarmupProbe`, like all up to ``seed``.
        steps: length of the streams.
        sample_size: coordinates a layer.
        beta2: of the second moment.
        tolerance: how many times its floor the variance may be.
        worse_than: factor from which a layer needs more.
        loss: for modules that optimize manually.
        accumulate: batches that make one gradient.
        seed: of streams and sample.
        folder: where to write the table, the CSV files and the figure; None to write nothing.
        trainer_options: of the Trainer, such as ``{"accelerator": "gpu", "precision": "bf16-mixed"}``; one device and
            no logger unless they say otherwise.

    Returns:
        What was found; print its ``table()``.

    Raises:
        ValueError: as :class:`WarmupProbe` does.
    """
    check_types(probe_warmup, locals())
    probe = WarmupProbe(streams, steps, sample_size, beta2, tolerance, worse_than, loss, accumulate, seed, stop=True)
    probe._silent = True
    datamodule = data if isinstance(data, LightningDataModule) else None
    given = {"datamodule": data} if datamodule is not None else {"train_dataloaders": data}
    options = {**_QUIET, **(trainer_options or {})}
    callbacks = [*(options.pop("callbacks", None) or []), probe]
    with lent(module, datamodule), random_state(seed, _cuda_or_cpu(), [data]):
        trainer = Trainer(callbacks=callbacks, **options)
        trainer.fit(module, **given)
    if probe.result is None:
        raise ValueError("Expected argument `data` to have training batches but the Trainer skipped its training.")
    if folder is not None and trainer.is_global_zero:
        probe.result.save(folder)
    return probe.result


def _cuda_or_cpu() -> torch.device:
    """The device whose random state a Trainer may advance."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_initialized() else torch.device("cpu")
