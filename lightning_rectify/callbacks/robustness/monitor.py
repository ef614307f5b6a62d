"""``RobustnessMonitor``: robust accuracy as training goes on, and an alarm when the attack fails."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from torch import Tensor

from lightning_rectify._lightning import (
    Callback,
    LightningModule,
    ModelCheckpoint,
    Trainer,
    rank_zero_info,
    rank_zero_warn,
)
from lightning_rectify.arguments import check_choice, check_least, check_types
from lightning_rectify.attacks.ball import Norm
from lightning_rectify.attacks.common import attacking, input_gradient
from lightning_rectify.attacks.gradient import pgd
from lightning_rectify.attacks.quality import attack_quality
from lightning_rectify.callbacks._logs import add_layout, is_dry, run_folder, writers
from lightning_rectify.callbacks._sharded import refuse_sharded
from lightning_rectify.callbacks._untouched import random_state, untouched
from lightning_rectify.callbacks.robustness.figures import draw_examples
from lightning_rectify.callbacks.robustness.images import check_bounds, images_and_labels
from lightning_rectify.callbacks.robustness.report import robust_report
from lightning_rectify.seeds import derive_seed

PREFIX = "robustness"
ROBUST_ACCURACY = "val/robust_accuracy"
# What can be said to `robust_report` beside what the monitor gives it by place.
_REPORT_OPTIONS = [name for name in signature(robust_report).parameters if name not in ("model", "data", "epsilon")]
_OWN = ("own_images", "own_attack_accuracy", "sign_agreement", "saturation")
_LAYOUT = {
    "Robustness": {
        "accuracy": [
            "Multiline",
            [r"^val/robust_accuracy$", rf"^{PREFIX}/clean_accuracy$", rf"^{PREFIX}/own_attack_accuracy$"],
        ],
        "own attack": ["Multiline", [rf"^{PREFIX}/own_attack_gap$", rf"^{PREFIX}/sign_agreement$"]],
    }
}


class RobustnessWarning(UserWarning):
    """A finding of :class:`RobustnessMonitor`: a training attack that has become too weak, or a metric out of date."""


@dataclass
class _Examples:
    """What the figure shows."""

    images: Tensor
    attacked: Tensor
    labels: Tensor
    before: Tensor
    after: Tensor


class RobustnessMonitor(Callback):
    """Attacks the first validation images by PGD and logs the accuracy that is left, for ModelCheckpoint to choose by.

    Works with any LightningModule whose ``forward`` maps images (N, C, H, W) in pixel units to logits (N, K) and whose
    validation batches begin with images and labels. Logged at the end of a validation epoch, before ModelCheckpoint and
    EarlyStopping look:

    - ``val/robust_accuracy``: share of the images classified correctly with and without PGD;
    - ``robustness/clean_accuracy``: without it, on the same images;
    - if the module has ``attack(images, labels)``, what it trains with now, and that changes an image:
      ``robustness/own_attack_accuracy``, images right with and without it; ``robustness/own_attack_gap``, that minus
      the robust accuracy; ``robustness/sign_agreement``, share of an image's pixels that move as the gradient's sign
      says, of those that have a gradient and room to; for "linf" ``robustness/saturation``, share of its pixels that
      are changed by as much as ball and bounds allow (within 1 %).

    A module that logs ``val/robust_accuracy`` itself is overruled; keep it from that (``val_attack_steps=0`` of
    L2LDefense) to save the time.

    A gap above ``own_attack_gap`` warns once a fit (:class:`RobustnessWarning`): the classifier has learnt to withstand
    the attack it trains with, and no other. One-step and learned attacks both do that (arXiv:2001.03994).

    TensorBoard gets a page with these curves and the figure ``robustness/examples``: images, what PGD adds to them,
    predictions; the same figure is left in ``LOGFOLDER/robustness``. Nothing happens in the sanity check; in a
    ``fast_dev_run`` nothing is written.

    Training is not touched: modes, buffers, gradients and all random states are the same with it as without it; it
    runs under the Trainer's inference mode. Each process attacks its own images, from starts of its own, and counts are
    added up: of N images in a fixed order, two processes take the same ones as one.

    PGD with few steps is a screening number. In the end report what
    :func:`~lightning_rectify.callbacks.robustness.report.robust_report` finds on test images.

    Cost: ``steps * restarts`` passes forward and backward, and four passes forward, for each of ``max_images`` images.

    Args:
        epsilon: radius of the ball in pixel units, above 0; None for the module's ``epsilon``.
        norm: "linf" or "l2"; None for the module's ``norm``, else "linf".
        bounds: smallest and largest value of a pixel; None for the module's ``bounds``, else 0 and 1.
        every_n_epochs: measure in each n-th epoch. Give ModelCheckpoint a multiple of it: in the epochs between it
            would judge new weights by an old number.
        max_images: the first so many validation images, on all processes together.
        steps: of PGD.
        restarts: of PGD, from random starts.
        own_attack_gap: gap that raises the alarm, in (0, 1].
        examples: images in the figure; 0 for none.
        report_at_end: make a whole report of the last weights when fit ends, on the first process (of its share of the
            validation images), and leave it in ``LOGFOLDER/robustness``.
        report_options: further arguments of ``robust_report`` for it.
        seed: of the starts.

    Raises:
        ValueError: for an argument out of its range; in ``setup``, if neither the argument nor the module gives
            ``epsilon``; for images outside the bounds, and sharded weights.

    Example:
        >>> monitor = RobustnessMonitor(epsilon=8 / 255)
        >>> checkpoint = ModelCheckpoint(monitor="val/robust_accuracy", mode="max")  # Trainer(callbacks=[both])
    """

    def __init__(
        self,
        epsilon: float | None = None,
        norm: Norm | None = None,
        bounds: tuple[float, float] | None = None,
        every_n_epochs: int = 1,
        max_images: int = 256,
        steps: int = 10,
        restarts: int = 1,
        own_attack_gap: float = 0.10,
        examples: int = 8,
        report_at_end: bool = False,
        report_options: dict[str, Any] | None = None,
        seed: int = 0,
    ) -> None:
        check_types(RobustnessMonitor, locals())
        super().__init__()
        if epsilon is not None and not 0 < epsilon < float("inf"):
            raise ValueError(f"Expected argument `epsilon` to be above 0, or None, but got {epsilon!r}.")
        check_choice(("linf", "l2", None), norm=norm)
        check_least(0, examples=examples, seed=seed)
        check_least(1, every_n_epochs=every_n_epochs, max_images=max_images, steps=steps, restarts=restarts)
        if bounds is not None and not -float("inf") < bounds[0] < bounds[1] < float("inf"):
            raise ValueError(
                f"Expected argument `bounds` to be two finite numbers, the lower first, or None, but got {bounds!r}."
            )
        if unknown := set(report_options or ()) - set(_REPORT_OPTIONS):
            raise ValueError(
                f"Expected argument `report_options` to be some of {', '.join(_REPORT_OPTIONS)} but got "
                f"{', '.join(map(repr, sorted(unknown, key=str)))}."
            )
        if not 0 < own_attack_gap <= 1:
            raise ValueError(f"Expected argument `own_attack_gap` to be in (0, 1] but got {own_attack_gap!r}.")
        self.epsilon, self.norm, self.bounds = epsilon, norm, bounds
        self.every_n_epochs, self.max_images = every_n_epochs, max_images
        self.steps, self.restarts, self.own_attack_gap = steps, restarts, own_attack_gap
        self.examples, self.seed = examples, seed
        self.report_at_end, self.report_options = report_at_end, dict(report_options or {})
        self._measuring, self._left, self._warned = False, 0, False
        self._sums: dict[str, float] = {}
        self._examples: _Examples | None = None

    # -- Lightning's hooks ---------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a module without epsilon early."""
        if stage in ("fit", "validate"):
            self._ball(pl_module)
            self._warned = False
        if stage == "fit":
            for callback in trainer.callbacks:  # type: ignore[attr-defined]
                if isinstance(callback, ModelCheckpoint) and callback.monitor == ROBUST_ACCURACY:
                    self._check_interval(callback)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the curves on TensorBoard's page."""
        for writer in writers(trainer):
            add_layout(writer, _LAYOUT)

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to count."""
        fitting = trainer.state.fn == "fit"  # of `validate` each run counts
        due = not fitting or (trainer.current_epoch + 1) % self.every_n_epochs == 0
        self._measuring = due and not trainer.sanity_checking
        self._sums, self._examples = {}, None
        if self._measuring:
            refuse_sharded([pl_module], "RobustnessMonitor")
            self._left = self._share(trainer)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Attack what this batch still adds."""
        if not self._measuring or self._left < 1 or dataloader_idx > 0:
            return
        images, labels = images_and_labels(batch)
        images, labels = images[: self._left], labels[: self._left]
        self._left -= len(images)
        with self._borrowed(pl_module, trainer.global_rank, batch_idx) as generator:
            # Clones: no gradient passes through what was made in inference mode.
            self._measure(pl_module, images.detach().clone().float(), labels.clone(), generator)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Add up the counts of all processes, log the shares, look for a collapse."""
        if not self._measuring:
            return
        self._measuring = False
        names = ["images", "clean", "robust", *(_OWN if callable(getattr(pl_module, "attack", None)) else ())]
        sums = torch.tensor([self._sums.get(name, 0.0) for name in names], device=pl_module.device)
        sums = trainer.strategy.reduce(sums, reduce_op="sum")
        count, clean, robust, *own = (float(value) for value in sums)
        if count == 0:  # no batch at all, on any process
            return
        own = own[1:] if own and own[0] else []  # an attack that leaves every image as it is, is none
        values = {ROBUST_ACCURACY: robust / count, f"{PREFIX}/clean_accuracy": clean / count}
        if own:
            values |= {f"{PREFIX}/{name}": total / count for name, total in zip(_OWN[1:], own, strict=True)}
            values[f"{PREFIX}/own_attack_gap"] = (own[0] - robust) / count
            if self._ball(pl_module)[1] != "linf":
                del values[f"{PREFIX}/saturation"]
        # All processes have the same numbers: their mean is the number itself.
        pl_module.log_dict(values, on_step=False, on_epoch=True, sync_dist=True, batch_size=1)
        if own:
            self._look_for_collapse(trainer, pl_module, own[0] / count, robust / count, int(count))
        self._draw(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make the report, if it was asked for."""
        if not self.report_at_end or is_dry(trainer):
            return
        loader: Any = trainer.val_dataloaders
        loader = loader[0] if isinstance(loader, (list, tuple)) else loader
        if loader is not None and trainer.is_global_zero:
            epsilon, norm, bounds = self._ball(pl_module)
            report = robust_report(pl_module, loader, epsilon, **{"norm": norm, "bounds": bounds, "seed": self.seed,
                                                                  **self.report_options})  # fmt: skip
            folder = report.save(run_folder(trainer) / PREFIX)
            rank_zero_info(f"{report.table()}\n  Report in {folder}")
            for logger in trainer.loggers:
                logger.log_metrics({f"{PREFIX}/worst_case": report.robust_accuracy}, step=trainer.global_step)
        trainer.strategy.barrier()

    # -- one batch -----------------------------------------------------------------------------------------------------

    def _measure(self, pl_module: Any, images: Tensor, labels: Tensor, generator: torch.Generator) -> None:
        epsilon, norm, bounds = self._ball(pl_module)
        check_bounds(images, bounds, "the validation batches of RobustnessMonitor")
        images = images.clamp(*bounds)
        with torch.no_grad():
            before = pl_module(images).argmax(dim=1)
        right = before == labels
        attacked, after = images.clone(), before.clone()
        if right.any():
            attacked[right] = pgd(pl_module, images[right], labels[right], epsilon, steps=self.steps, norm=norm,
                                  restarts=self.restarts, bounds=bounds, generator=generator)  # fmt: skip
            with torch.no_grad():
                after[right] = pl_module(attacked[right]).argmax(dim=1)
        self._add("images", float(len(images)))
        self._add("clean", float(right.sum()))
        self._add("robust", float((right & (after == labels)).sum()))
        if self._examples is None and self.examples:
            chosen = (~right).int().argsort(stable=True)[: self.examples]  # those that were attacked come first
            shown = [part[chosen].cpu() for part in (images, attacked, labels, before, after)]
            self._examples = _Examples(*shown)
        if callable(getattr(pl_module, "attack", None)):
            self._measure_own(pl_module, images, labels, right, epsilon)

    def _measure_own(self, pl_module: Any, images: Tensor, labels: Tensor, right: Tensor, epsilon: float) -> None:
        own = pl_module.attack(images, labels).detach()
        if torch.equal(own, images):
            return
        self._add("own_images", float(len(images)))
        with torch.no_grad():
            kept = pl_module(own).argmax(dim=1) == labels
        self._add("own_attack_accuracy", float((right & kept).sum()))
        gradient, _, _ = input_gradient(pl_module, images, labels)
        quality = attack_quality(images, own, gradient, epsilon, self._ball(pl_module)[2])
        self._add("sign_agreement", float(quality.agreement.sum()))
        self._add("saturation", float(quality.saturation.sum()))

    def _add(self, name: str, value: float) -> None:
        self._sums[name] = self._sums.get(name, 0.0) + value

    @contextmanager
    def _borrowed(self, pl_module: LightningModule, rank: int, batch: int) -> Iterator[torch.Generator]:
        """The module as an attack needs it, given back as it was; yields this rank's generator for this batch."""
        seed = derive_seed(self.seed, rank, batch)
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode(False))
            # The module's own attack may draw from the global state, or from a generator of the module's.
            stack.enter_context(random_state(seed, pl_module.device))
            stack.enter_context(untouched(pl_module))
            stack.enter_context(attacking(pl_module))
            yield torch.Generator(pl_module.device).manual_seed(seed)

    # -- what becomes of it --------------------------------------------------------------------------------------------

    def _look_for_collapse(
        self, trainer: Trainer, pl_module: LightningModule, own: float, robust: float, count: int
    ) -> None:
        if own - robust <= self.own_attack_gap or self._warned:
            return
        self._warned = True
        epsilon, norm, _ = self._ball(pl_module)
        rank_zero_warn(
            f"In epoch {trainer.current_epoch} the module's own attack leaves {100 * own:.1f} % of {count} validation "
            f"images right, but PGD-{self.steps} only {100 * robust:.1f} % (epsilon {epsilon:.4g}, {norm}): a gap of "
            f"{100 * (own - robust):.1f} points, above {100 * self.own_attack_gap:.0f}. The classifier learns to "
            "withstand the attack it trains with and no other. Train with a stronger one (two steps in place of one, a "
            "random start, the gradient scaled sample by sample, a higher learning rate of the attacker, or PGD), or "
            f"with a smaller epsilon at first; choose weights by {ROBUST_ACCURACY}, never by the own attack.",
            category=RobustnessWarning,
        )

    def _draw(self, trainer: Trainer, pl_module: LightningModule) -> None:
        shown = self._examples
        if shown is None or not trainer.is_global_zero or is_dry(trainer) or shown.images.shape[1] not in (1, 3):
            return
        epsilon, _, bounds = self._ball(pl_module)
        figure = draw_examples(
            shown.images, shown.attacked, shown.labels, shown.before, shown.after, epsilon, bounds
        )  # fmt: skip
        path = run_folder(trainer) / PREFIX / f"examples_step={trainer.global_step:06d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=110)
        for writer in writers(trainer):
            writer.add_figure(f"{PREFIX}/examples", figure, trainer.global_step)

    # -- settings ------------------------------------------------------------------------------------------------------

    def _ball(self, pl_module: LightningModule) -> tuple[float, Norm, tuple[float, float]]:
        """Epsilon, norm and bounds: the arguments', else the module's at this moment."""
        epsilon = self.epsilon if self.epsilon is not None else getattr(pl_module, "epsilon", None)
        if not isinstance(epsilon, (int, float)) or not epsilon > 0:
            raise ValueError(
                "Expected argument `epsilon` of RobustnessMonitor to be above 0 (in pixel units), or None for a module "
                f"with an attribute `epsilon`, but got {self.epsilon!r} and {type(pl_module).__name__} has {epsilon!r}."
            )
        norm = self.norm or getattr(pl_module, "norm", None)
        low, high = self.bounds if self.bounds is not None else getattr(pl_module, "bounds", (0.0, 1.0))
        return float(epsilon), "l2" if norm == "l2" else "linf", (float(low), float(high))

    def _share(self, trainer: Trainer) -> int:
        """How many images this process takes; those that a sampler repeats to fill up are not among them."""
        loader: Any = trainer.val_dataloaders
        loader = loader[0] if isinstance(loader, (list, tuple)) else loader
        limit = self.max_images
        with suppress(AttributeError, TypeError):  # not a DataLoader, or without a length
            limit = min(limit, len(loader.dataset))
        ranks = trainer.world_size
        return max(0, limit - trainer.global_rank + ranks - 1) // ranks

    def _check_interval(self, checkpoint: Any) -> None:
        every = getattr(checkpoint, "every_n_epochs", None)
        if isinstance(every, int) and every % self.every_n_epochs:
            rank_zero_warn(
                f"ModelCheckpoint looks at {ROBUST_ACCURACY} every {every} epochs but RobustnessMonitor measures it "
                f"every {self.every_n_epochs}: weights would be judged by an old number. Use "
                f"ModelCheckpoint(every_n_epochs={self.every_n_epochs}).",
                category=RobustnessWarning,
            )
