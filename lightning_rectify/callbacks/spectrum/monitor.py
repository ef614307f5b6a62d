"""``SpectrumMonitor``: the singular values of every layer as training goes on."""

from typing import Any

from lightning_rectify._lightning import Callback, LightningModule, Trainer, rank_zero_info
from lightning_rectify.arguments import check_least, check_types
from lightning_rectify.callbacks._logs import (
    add_layout,
    as_tensors,
    hand_over,
    is_dry,
    log_at_step,
    require_logger,
    run_folder,
    writers,
)
from lightning_rectify.callbacks._sharded import refuse_sharded
from lightning_rectify.callbacks.spectrum.dashboard import PREFIX, Records, SpectrumStore, draw, layout
from lightning_rectify.callbacks.spectrum.readings import read_layers, watched_layers


class SpectrumMonitor(Callback):
    r"""Logs the singular values of every Linear and (transposed) convolution of any LightningModule.

    Works with plain layers, with layers under torch's spectral_norm, weight_norm and other parametrizations, and with
    those of :func:`~lightning_rectify.nn.spectral.spectral_control`; with automatic and manual optimization. The
    diagnostic of the GAN spectrum paper (arXiv:1812.10912): its code plots the sorted values of all layers, index over
    length on the x axis, so that a slow decay can be told from a collapsed spectrum.

    The weight is seen as a matrix, one row an output channel. All r = min(rows, columns) singular values come from the
    Gram matrix in float64: exact to about 1e-8 of the largest, so a condition number beyond 1e8 means "singular".

    Logged as ``spectrum/LAYER/QUANTITY`` at ``trainer.global_step``, LAYER the dotted name inside ``module``:

    - ``max``, ``min``, ``mean`` of the singular values;
    - ``stable_rank``: sum of squares over the largest square; ``condition_number``: largest over smallest;
    - ``deviation``: largest distance of a singular value from the controlled one (abs(e), both sorted); controlled
      layers only;
    - ``orthogonality_error``: :math:`\|U^\top U - I\|_F^2 + \|V^\top V - I\|_F^2`; controlled layers, and those of the
      baseline "orthogonal" (of their weight);
    - ``convolution_norm``, with ``image_size``: operator norm of the circular convolution; convolutions only. The norm
      of the matrix (``max``) is smaller than that by a factor of up to the root of the number of kernel positions.

    Recorded at step 0 (or where a resumed run begins), at the end of the first batch at or after each multiple of
    ``every_n_steps``, and when training ends. Every logger gets the numbers; TensorBoard also a custom-scalars page
    with a chart a quantity, and at the end the figure. ``spectrum.csv`` (columns step, layer, index, value; all
    singular values) and ``spectrum.png`` (their decay at the first, the middle and the last step) are left in the log
    folder. The latest values are in ``trainer.callback_metrics`` for ModelCheckpoint and EarlyStopping. A run that
    goes on in an old folder first drops what is there beyond its checkpoint's step. A weight that is not finite gives
    NaN.

    Training is not touched: weights, buffers, modes and random state are the same with it as without it. With several
    processes each reads its own copy of the weights, which are the same, so ModelCheckpoint finds the values on all of
    them; nothing is communicated, and the first one writes.

    Cost, on one CPU thread, for the discriminator of the paper's CNN: 5.5 ms a reading with 128 channels at the top
    (a training step with 64 images: 120 ms), 160 ms with 512 (1.5 s). Norms of convolutions cost far more: 0.13, 0.5
    and 2 s with 128 channels at ``image_size`` 8, 16 and 32, and 5 s with 512 at 8.

    Args:
        every_n_steps: distance between two readings, at least 1, in ``trainer.global_step`` (which in manual
            optimization counts the steps of all optimizers).
        module: dotted name of the part to watch, such as "discriminator"; None watches the whole LightningModule
            (with what else it holds, such as the network inside a metric).
        image_size: at least 1; also log ``convolution_norm`` for an image of so many positions along each axis, the
            next multiple of its stride for a layer with a stride. One size serves all layers: the norm at n positions
            bounds the norm at each divisor of n, and hardly grows once n is several times the kernel. None leaves it
            out.
        figure: draw the figure at the end of fit.
        values: write ``spectrum.csv``.

    Raises:
        ValueError: for an argument out of its range, if ``module`` names no part with such a layer, or if weights are
            sharded over processes.
        MisconfigurationException: if the trainer has no logger (except with ``fast_dev_run``).

    Example:
        >>> from lightning_rectify.callbacks import SpectrumMonitor
        >>> SpectrumMonitor(every_n_steps=500, module="discriminator").every_n_steps
        500
    """

    def __init__(
        self,
        every_n_steps: int = 100,
        module: str | None = None,
        image_size: int | None = None,
        figure: bool = True,
        values: bool = True,
    ) -> None:
        check_types(SpectrumMonitor, locals())
        super().__init__()
        check_least(1, every_n_steps=every_n_steps)
        if module == "":
            raise ValueError(f"Expected argument `module` to be a dotted name, or None for all, but got {module!r}.")
        if image_size is not None and image_size < 1:
            raise ValueError(
                f"Expected argument `image_size` to be at least 1, or None for no norm, but got {image_size}."
            )
        self.every_n_steps, self.module, self.image_size = every_n_steps, module, image_size
        self.figure, self.values = figure, values
        self._records = Records()
        self._store: SpectrumStore | None = None
        self._latest: dict[str, float] = {}
        self._last_step = 0

    # -- Lightning's hooks ---------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a trainer without logger early."""
        if stage == "fit":
            require_logger(trainer, "SpectrumMonitor")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the layers, take up what an earlier run left, record where training begins."""
        refuse_sharded(watched_layers(pl_module, self.module).values(), "SpectrumMonitor")
        self._records = Records()
        if self.values and trainer.is_global_zero and not is_dry(trainer):
            self._store = SpectrumStore(run_folder(trainer) / "spectrum.csv")
            self._store.keep_until(trainer.global_step)
            for step, spectra in self._store.read():
                self._records.add(step, spectra)
        names = self._record(trainer, pl_module)
        for writer in writers(trainer):
            add_layout(writer, layout(names))

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Record where a multiple of ``every_n_steps`` was reached, and hand the values to ``callback_metrics``."""
        if trainer.global_step // self.every_n_steps > self._last_step // self.every_n_steps:
            self._record(trainer, pl_module)
        if self._latest:
            hand_over(pl_module, self._latest)
            self._latest = {}

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record the last step and draw the figure."""
        if trainer.global_step > self._last_step:
            self._record(trainer, pl_module)
        # log_dict may not be called any more
        trainer.callback_metrics.update(as_tensors(self._latest, pl_module.device))
        self._finish(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Draw the figure of what was recorded, so that a failed run can be looked at."""
        self._finish(trainer)
        self._release()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget the run."""
        self._release()

    # -- a reading, and what becomes of it -----------------------------------------------------------------------------

    def _record(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, list[str]]:
        """Read all layers and send the numbers to where they go; returns what is logged of each layer."""
        step = self._last_step = trainer.global_step
        readings = read_layers(watched_layers(pl_module, self.module), self.image_size)
        self._latest = {
            f"{PREFIX}/{layer}/{name}": value
            for layer, reading in readings.items()
            for name, value in reading.quantities.items()
        }
        if step != self._records.last_step:  # else a resumed run found it in its folder
            log_at_step(trainer, self._latest, step)
            if trainer.is_global_zero:
                spectra = {layer: reading.values for layer, reading in readings.items()}
                self._records.add(step, spectra)
                if self._store is not None:
                    self._store.append(step, spectra)
        return {layer: list(reading.quantities) for layer, reading in readings.items()}

    def _finish(self, trainer: Trainer) -> None:
        spectra = self._records.chosen()
        if not spectra or is_dry(trainer):
            return
        said = [f"values in {self._store.path}"] if self._store is not None else []
        if self.figure:
            figure, path = draw(spectra), run_folder(trainer) / "spectrum.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(path, dpi=110)
            said.append(f"figure in {path}")
            for writer in writers(trainer):
                writer.add_figure(f"{PREFIX}/decay", figure, self._last_step)
        if said:
            rank_zero_info(f"Spectra: {', '.join(said)}")

    def _release(self) -> None:
        self._store, self._latest, self._records = None, {}, Records()
