"""What a defended classifier is asked after training, and in between: predictions, attacks, robust accuracy."""

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import Metric

from lightning_rectify.attacks.common import attacking
from lightning_rectify.attacks.gradient import pgd
from lightning_rectify.attacks.quality import attack_quality
from lightning_rectify.modules.l2l.learned import Perturbed
from lightning_rectify.modules.l2l.networks import PixelClassifier
from lightning_rectify.modules.l2l.settings import check_pixels
from lightning_rectify.modules.l2l.training_attack import TrainingAttack
from lightning_rectify.modules.minimax import MinimaxModule
from lightning_rectify.seeds import derive_seed

#: images, labels and, for a memory, the images' indices
Batch = tuple[Tensor, ...]


class MeasuredDefense(MinimaxModule):
    """Validation, test and prediction of ``L2LDefense``, whose constructor sets what is named here."""

    classifier: PixelClassifier
    attacker: nn.Module
    metrics: nn.ModuleDict
    training_attack: TrainingAttack
    evaluation_attack: TrainingAttack  # what training attacks with, as far as it can be had outside training
    attack_steps: dict[str, int]  # PGD's, by stage
    epsilon: float
    bounds: tuple[float, float]
    learned: bool
    eval_seed: int
    _eval_generator: torch.Generator | None = None

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, K) of images (N, C, H, W) in pixel units, by the averaged classifier if there is an average."""
        return self.averaged("classifier")(images)

    def attack(self, images: Tensor, labels: Tensor) -> Tensor:
        """Attack as training does now, but with all networks in evaluation mode; for measuring.

        A function of its arguments and the weights: random starts come from ``eval_seed``, and a memory has no part in
        it. It attacks what ``forward`` computes with, leaves no trace in modes, buffers and random states, and works in
        inference mode.

        Args:
            images: inside ``bounds``, shape (N, C, H, W), on the module's device.
            labels: right classes, int64, shape (N,).

        Returns:
            Adversarial images (N, C, H, W), detached, inside ball and bounds; the images themselves for "none".

        Raises:
            ValueError: for images outside the bounds.
        """
        check_pixels(images, self.bounds, type(self).__name__)
        return self._own_attack(images, labels).images

    # -- Lightning's hooks ---------------------------------------------------------------------------------------------

    def on_validation_epoch_start(self) -> None:
        """The same random starts each time."""
        self._start_evaluation()

    def on_test_epoch_start(self) -> None:
        """The same random starts each time."""
        self._start_evaluation()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Logs ``val/...``."""
        self._evaluate(batch, "val")

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Logs ``test/...``."""
        self._evaluate(batch, "test")

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        """The most probable class of each image, int64, shape (N,)."""
        images = batch[0] if isinstance(batch, (tuple, list)) else batch
        check_pixels(images, self.bounds, type(self).__name__)
        return self(images).argmax(dim=1)

    def _start_evaluation(self) -> None:
        seed = derive_seed(self.eval_seed, self.global_rank)
        self._eval_generator = torch.Generator(self.device).manual_seed(seed)

    def _evaluate(self, batch: Batch, stage: str) -> None:
        images, labels, good = self._checked(batch)
        logits = self(images)
        self.log(f"{stage}/loss", F.cross_entropy(logits, labels), sync_dist=True, batch_size=len(labels))
        self._count(f"{stage}_accuracy", logits, labels)
        steps = self.attack_steps[stage]
        if not good or steps == 0:
            return
        model = self.averaged("classifier")
        attacked = pgd(
            model, images, labels, self.epsilon, steps=steps, bounds=self.bounds, generator=self._eval_generator
        )
        self._count(f"{stage}_robust_accuracy", _predictions(model, attacked), labels)
        if self.training_attack.name == "none":
            return
        own = self._own_attack(images, labels)
        self._count(f"{stage}_own_attack_accuracy", _predictions(model, own.images), labels)
        self._log_quality(stage, images, own)

    def _count(self, name: str, predicted: Tensor, labels: Tensor) -> None:
        """Update an accuracy with logits or classes."""
        metric = cast(Metric, self.metrics[name])
        metric.update(predicted, labels)
        self.log(name.replace("_", "/", 1), metric, on_step=False, on_epoch=True, prog_bar=True, batch_size=len(labels))

    # -- attacks -------------------------------------------------------------------------------------------------------

    def _own_attack(self, images: Tensor, labels: Tensor) -> Perturbed:
        """What training attacks with, against what ``forward`` computes with, all in evaluation mode."""
        model = self.averaged("classifier")
        generator = torch.Generator(images.device).manual_seed(self.eval_seed)
        if not self.learned:
            return Perturbed(self.evaluation_attack.fixed(model, images, labels, generator), None)
        with attacking(model, self.attacker), torch.no_grad():
            images = images.clone() if images.is_inference() else images.detach()
            return self.evaluation_attack.learned(self.attacker, model, images, labels, generator)

    def _checked(self, batch: Any) -> tuple[Tensor, Tensor, bool]:
        """Images and labels, and whether all pixels are finite."""
        images, labels = batch[:2]
        return images, labels, check_pixels(images, self.bounds, type(self).__name__)

    def _log_quality(self, stage: str, images: Tensor, perturbed: Perturbed) -> None:
        if perturbed.gradient is None:
            return
        quality = attack_quality(images, perturbed.images, perturbed.gradient, self.epsilon, self.bounds)
        values = {f"{stage}/attack_{name}": value.mean() for name, value in quality._asdict().items()}
        self.log_dict(values, on_step=False, on_epoch=True, sync_dist=True, batch_size=len(images))


def _predictions(model: nn.Module, images: Tensor) -> Tensor:
    """Classes, in evaluation mode and float32 as the attack saw the model."""
    with attacking(model), torch.no_grad():
        return model(images).argmax(dim=1)
