"""What a generative module draws: a grid of the same noise as training goes on, and predictions as image files."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor
from torchvision.utils import make_grid, save_image

from lightning_rectify._lightning import BasePredictionWriter, LightningModule, Trainer
from lightning_rectify.arguments import check_least, check_types
from lightning_rectify.callbacks._drawn import DrawnInFit
from lightning_rectify.callbacks._logs import is_dry, run_folder, writers


class Sampler(Protocol):
    """What :class:`SampleGrid` expects of a LightningModule; it may also have ``interpolate``.

    ``interpolate(pairs, steps, seed=...)`` returns images of shape (pairs * steps, C, H, W), the steps of a pair one
    after the other.
    """

    def sample(self, count: int, *, seed: int, labels: Tensor | None = None, truncation: float | None = None) -> Tensor:
        """Images (count, C, H, W) in [-1, 1], on any device, the same for the same seed; C is 1 or 3.

        Args:
            count: number of images.
            seed: of a generator of the module's own.
            labels: classes, shape (count,); None lets the module choose.
            truncation: of the latent law; None for the law that training draws from.
        """


class SampleGrid(DrawnInFit):
    """Writes a grid of samples from one fixed noise, and of interpolations, as training goes on.

    Works with a LightningModule that has ``sample`` (:class:`Sampler`). ``LOGFOLDER/samples`` gets
    ``samples_step=000123.png`` with ``trainer.global_step`` in the name and, if the module has ``interpolate``,
    ``interpolation_step=000123.png`` with one pair a row; TensorBoard gets them as ``samples/fixed_noise`` and
    ``samples/interpolation``. Without a logger the folder is that of the trainer's ``default_root_dir``. Values outside
    [-1, 1] are clipped.

    The module is called at the end of a training epoch and of fit, in evaluation mode, without gradients and on the
    first process alone: it must not communicate. Modes and random state are as they were afterwards. In a
    ``fast_dev_run`` it is called but nothing is written.

    Args:
        every_n_epochs: draw at the end of each n-th epoch; the end of fit always has a grid.
        count: images in the grid.
        columns: images in a row of the grid, and steps of an interpolation.
        seed: of the noise.
        interpolations: number of pairs; 0 for none.

    Raises:
        ValueError: for an argument out of its range, a module without ``sample``, one whose weights are sharded over
            processes, or images of another shape.

    Example:
        >>> SampleGrid(every_n_epochs=5, count=16, columns=4).count
        16
    """

    def __init__(
        self, every_n_epochs: int = 1, count: int = 64, columns: int = 8, seed: int = 0, interpolations: int = 8
    ) -> None:
        check_types(SampleGrid, locals())
        super().__init__(every_n_epochs)
        check_least(0, interpolations=interpolations, seed=seed)
        check_least(1, every_n_epochs=every_n_epochs, count=count, columns=columns)
        self.count, self.columns = count, columns
        self.seed, self.interpolations = seed, interpolations

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a module that cannot sample."""
        if stage == "fit" and not callable(getattr(pl_module, "sample", None)):
            raise ValueError(
                "Expected the module of SampleGrid to have a method `sample(count, seed=..., labels=None, "
                "truncation=None)` that returns images (count, C, H, W) in [-1, 1] but got "
                f"{type(pl_module).__name__} without one."
            )

    def draw(self, trainer: Trainer, pl_module: Any) -> None:
        """The grid, and interpolations where the module can."""
        step = trainer.global_step
        self._write(trainer, "samples", "fixed_noise", pl_module.sample(self.count, seed=self.seed), step)
        if self.interpolations and hasattr(pl_module, "interpolate"):
            between = pl_module.interpolate(self.interpolations, self.columns, seed=self.seed)
            self._write(trainer, "interpolation", "interpolation", between, step)

    def _write(self, trainer: Trainer, stem: str, tag: str, images: Any, step: int) -> None:
        grid = make_grid(_unit_images(images, f"what the module of SampleGrid draws ({tag})"), nrow=self.columns)
        if is_dry(trainer):
            return
        folder = run_folder(trainer) / "samples"
        folder.mkdir(parents=True, exist_ok=True)
        save_image(grid, folder / f"{stem}_step={step:06d}.png")
        for writer in writers(trainer):
            writer.add_image(f"samples/{tag}", grid, step)


class SampleWriter(BasePredictionWriter):
    """Writes the images that ``predict_step`` returns as PNG files, one an image: ``OUTPUT_DIR/000000.png`` and so on.

    A file's number is the place of the sample in the data set, so that processes never write the same file; files of
    an earlier run are overwritten. With several dataloaders each has a folder of its own, ``dataloader_0`` and so on.
    Data without places (an iterable data set) are numbered as they come, on one process only. Values outside [-1, 1]
    are clipped. A ``fast_dev_run`` writes nothing.

    Args:
        output_dir: where to; None for ``LOGFOLDER/predictions`` (without a logger, in the trainer's
            ``default_root_dir``).

    Raises:
        ValueError: if ``predict_step`` returns anything but images (N, C, H, W) with C 1 or 3, one a sample of the
            batch, or if an iterable data set is spread over several processes.

    Example:
        >>> writer = SampleWriter(output_dir="faces")  # trainer = Trainer(callbacks=[writer])
    """

    def __init__(self, output_dir: str | Path | None = None) -> None:
        check_types(SampleWriter, locals())
        super().__init__(write_interval="batch")
        self.output_dir = output_dir
        self._folder = Path()
        self._counts: dict[int, int] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Agree on the folder: loggers on different processes may not."""
        super().setup(trainer, pl_module, stage)
        if stage == "predict":
            folder = self.output_dir if self.output_dir is not None else run_folder(trainer) / "predictions"
            self._folder = Path(trainer.strategy.broadcast(str(folder)))
            self._counts = {}

    def write_on_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        prediction: Any,
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Write one batch."""
        images = _unit_images(prediction, "what `predict_step` returns for SampleWriter")
        numbers = batch_indices or self._numbers(trainer, len(images), dataloader_idx)
        if len(numbers) != len(images):
            raise ValueError(
                "Expected what `predict_step` returns for SampleWriter to have one image a sample of the batch but got "
                f"{len(images)} for {len(numbers)}."
            )
        if is_dry(trainer):
            return
        several = len(trainer.num_predict_batches) > 1
        folder = self._folder / f"dataloader_{dataloader_idx}" if several else self._folder
        folder.mkdir(parents=True, exist_ok=True)
        for number, image in zip(numbers, images, strict=True):
            save_image(image, folder / f"{number:06d}.png")

    def _numbers(self, trainer: Trainer, count: int, dataloader_idx: int) -> Sequence[int]:
        if trainer.world_size > 1:
            raise ValueError(
                "Expected the dataloader of SampleWriter to have a sampler, as one of a map-style data set has, but "
                f"got none on {trainer.world_size} processes: files could not be numbered."
            )
        first = self._counts.get(dataloader_idx, 0)
        self._counts[dataloader_idx] = first + count
        return range(first, first + count)


def _unit_images(images: Any, what: str) -> Tensor:
    """Images in [-1, 1] as float32 ones in [0, 1], on the CPU."""
    if not isinstance(images, Tensor) or images.dim() != 4 or images.shape[1] not in (1, 3):
        shape = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
        raise ValueError(f"Expected {what} to be images (N, C, H, W) with C 1 or 3 but got {shape}.")
    return images.detach().cpu().float().add(1.0).div(2.0).clamp(0.0, 1.0)
