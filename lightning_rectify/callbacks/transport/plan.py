"""``PlanFigure``: the plan of a transport module as a picture, as training goes on."""

from typing import Any, Protocol

import torch
from matplotlib.figure import Figure
from torch import Tensor
from torchvision.utils import save_image

from lightning_rectify._lightning import LightningModule, Trainer
from lightning_rectify.arguments import check_least, check_types
from lightning_rectify.callbacks._drawn import DrawnInFit
from lightning_rectify.callbacks._logs import is_dry, run_folder, writers
from lightning_rectify.callbacks.transport.figures import Pair, draw_pairs, draw_plan_of_numbers, image_pairs

_REACH = 3.5  # standard deviations that a heat map shows to each side


class PlanSampler(Protocol):
    """What :class:`PlanFigure` expects of a LightningModule; it may also have ``has_density`` and ``log_prob``.

    Where ``has_density`` is true, ``log_prob(x, y)`` returns log-densities of pairs, shape (N,).
    """

    def sample_pairs(self, count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
        """Pairs of the plan, shapes (count, ...), the same for the same seed."""


class PlanFigure(DrawnInFit):
    """Draws a transport plan as training goes on: the same latents each time.

    Works with a LightningModule that has ``sample_pairs`` (:class:`PlanSampler`), such as ``SPOT``:

    - numbers (shapes (N, 1)): the density as a heat map, or a histogram without one; the truth beside it; marginals;
    - points of two or more numbers: both sides with a line from x to y (beyond two numbers on principal axes);
    - images (C, H, W): a grid of pairs, x above y.

    ``LOGFOLDER/plans`` gets ``plan_step=000123.png``, TensorBoard ``plan/pairs``. The data module may have
    ``training_samples(count)`` (shown pale) and a ``truth`` with ``map`` (x to the y of the right plan), or
    ``plan_log_prob(x, y)`` and ``sample_plan(count, seed)``; what is not there is left out.

    Drawn at the end of a training epoch and of fit, in evaluation mode, without gradients and on the first process
    alone: the module must not communicate. Modes and random state are as they were afterwards. In a ``fast_dev_run``
    it is drawn but nothing is written.

    Args:
        every_n_epochs: draw at the end of each n-th epoch; the end of fit is always drawn.
        count: pairs generated for points and numbers.
        images: pairs in a grid of images.
        columns: pairs in a row of it.
        image_range: darkest and lightest value of a pixel.
        grid: values of x, and of y, at which densities are computed.
        seed: of the latents.

    Raises:
        ValueError: for an argument out of its range, a module without ``sample_pairs``, one whose weights are sharded
            over processes, or pairs that cannot be drawn.

    Example:
        >>> PlanFigure(every_n_epochs=5).count
        2000
    """

    def __init__(
        self,
        every_n_epochs: int = 1,
        count: int = 2000,
        images: int = 32,
        columns: int = 8,
        image_range: tuple[float, float] = (-1.0, 1.0),
        grid: int = 121,
        seed: int = 0,
    ) -> None:
        check_types(PlanFigure, locals())
        super().__init__(every_n_epochs)
        check_least(0, seed=seed)
        check_least(1, every_n_epochs=every_n_epochs, images=images, columns=columns)
        check_least(2, count=count, grid=grid)
        low, high = image_range
        if not -float("inf") < low < high < float("inf"):
            raise ValueError(
                f"Expected argument `image_range` to be a smaller and a larger finite number but got {image_range}."
            )
        self.count, self.images, self.columns = count, images, columns
        self.image_range, self.grid, self.seed = (low, high), grid, seed

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a module that has no pairs."""
        if stage == "fit" and not callable(getattr(pl_module, "sample_pairs", None)):
            raise ValueError(
                "Expected the module of PlanFigure to have a method `sample_pairs(count, seed)` that returns x and y "
                f"but got {type(pl_module).__name__} without one."
            )

    def draw(self, trainer: Trainer, pl_module: Any) -> None:
        """A grid of images, or a figure."""
        shapes = [side.shape[1:] for side in pl_module.sample_pairs(1, seed=self.seed)]
        pictures = all(len(shape) == 3 and shape[0] in (1, 3) for shape in shapes)
        pairs = _on_cpu(pl_module.sample_pairs(self.images if pictures else self.count, seed=self.seed))
        if pictures:
            self._write_grid(trainer, image_pairs(*pairs, self.columns, self.image_range))
        else:
            self._write_figure(trainer, self._figure(trainer, pl_module, pairs))

    def _figure(self, trainer: Trainer, pl_module: Any, pairs: Pair) -> Figure:
        datamodule: Any = getattr(trainer, "datamodule", None)
        truth: Any = getattr(datamodule, "truth", None)
        data = None
        if hasattr(datamodule, "training_samples"):
            data = _flat(_on_cpu(datamodule.training_samples(self.count)))
        pairs, title = _flat(pairs), f"step {trainer.global_step:,}"
        if [side.shape[1] for side in pairs] == [1, 1]:
            return self._figure_of_numbers(pl_module, pairs, truth, data, title)
        right = None
        if getattr(truth, "map", None) is not None:
            right = (pairs[0], truth.map(pairs[0]))
        elif hasattr(truth, "sample_plan"):
            right = _flat(_on_cpu(truth.sample_plan(self.count, seed=self.seed)))
        return draw_pairs(pairs, data, right, title)

    def _figure_of_numbers(self, pl_module: Any, pairs: Pair, truth: Any, data: Pair | None, title: str) -> Figure:
        ends = []
        for side in data or pairs:  # fixed by the data: figures of one run have the same axes
            ends.append((float(side.mean()), _REACH * float(side.double().std()) or 1.0))
        axes = (_axis(*ends[0], self.grid), _axis(*ends[1], self.grid))
        x, y = (side.reshape(-1, 1) for side in torch.meshgrid(*axes, indexing="ij"))
        found: list[Tensor | None] = []
        for known, log_prob in (
            (getattr(pl_module, "has_density", False), getattr(pl_module, "log_prob", None)),
            (hasattr(truth, "plan_log_prob"), getattr(truth, "plan_log_prob", None)),
        ):
            density = log_prob(x, y).double().exp().cpu() if known and log_prob is not None else None
            found.append(None if density is None else density.view(self.grid, self.grid))
        line = None
        if getattr(truth, "map", None) is not None:
            line = (axes[0][:, None], truth.map(axes[0][:, None]))
        return draw_plan_of_numbers(pairs, axes, found[0], found[1], line, data, title)

    def _write_figure(self, trainer: Trainer, figure: Figure) -> None:
        if is_dry(trainer):
            return
        figure.savefig(self._path(trainer), dpi=110)
        for writer in writers(trainer):
            writer.add_figure("plan/pairs", figure, trainer.global_step)

    def _write_grid(self, trainer: Trainer, grid: Tensor) -> None:
        if is_dry(trainer):
            return
        save_image(grid, self._path(trainer))
        for writer in writers(trainer):
            writer.add_image("plan/pairs", grid, trainer.global_step)

    def _path(self, trainer: Trainer) -> Any:
        folder = run_folder(trainer) / "plans"
        folder.mkdir(parents=True, exist_ok=True)
        return folder / f"plan_step={trainer.global_step:06d}.png"


def _on_cpu(pairs: Any) -> Pair:
    x, y = (side.detach().float().cpu() for side in pairs)
    return x, y


def _flat(pairs: Pair) -> Pair:
    return pairs[0].flatten(1), pairs[1].flatten(1)


def _axis(middle: float, reach: float, count: int) -> Tensor:
    return torch.linspace(middle - reach, middle + reach, count, dtype=torch.float64)
