"""``AdaptationModule``: what an adapted classifier answers, and how it is judged without the target's labels."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

from lightning_rectify.modules.minimax import MinimaxModule
from lightning_rectify.modules.spot.adaptation_losses import entropy_of_mean, mean_entropy, neighbourhood_density
from lightning_rectify.modules.spot.adaptation_networks import Domain
from lightning_rectify.modules.spot.plan import at_least_float32

_SCORED = 2000  # target images that the unsupervised score looks at: it compares all with all


@dataclass(eq=False)
class Predictions:
    """What ``predict_step`` returns of a batch.

    Attributes:
        labels: the most probable classes, int64, (B,).
        probabilities: of all classes, (B, K).
    """

    labels: Tensor
    probabilities: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Predictions) and torch.equal(self.probabilities, other.probabilities)

    __hash__ = None  # type: ignore[assignment]


class AdaptationModule(MinimaxModule):
    """A game whose outcome is a classifier of a target domain; the subclass has ``domain_logits`` and the losses."""

    num_classes: int
    in_channels: int
    image_size: int
    best_of_test: Tensor

    def make_judges(self) -> None:
        """Make the metrics; called by the subclass's constructor once the sizes are set."""
        # Labels outside the range fail in the loss; the metric's own check would read the device at every step.
        accuracy = MulticlassAccuracy(self.num_classes, average="micro", validate_args=False)
        names = ("val_source", "watched", "test_target", "test_source")
        self.accuracies = nn.ModuleDict({name: accuracy.clone() for name in names})
        self.register_buffer("best_of_test", torch.zeros(()))
        self._target_logits: list[Tensor] = []
        self.example_input_array = torch.zeros(2, self.in_channels, self.image_size, self.image_size)

    def domain_logits(self, images: Tensor, domain: Domain) -> Tensor:
        """Logits (B, K) of images (B, C, S, S) of either domain, by the averaged weights."""
        raise NotImplementedError

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, K) of images (B, C, S, S) of the target, by the averaged weights."""
        return self.domain_logits(images, "target")

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Predictions:
        """Classes and probabilities of target images; a batch is images, or images with others behind."""
        images = batch[0] if isinstance(batch, (tuple, list)) else batch
        probabilities = at_least_float32(self(images)).softmax(dim=1)
        return Predictions(probabilities.argmax(dim=1), probabilities)

    def setup(self, stage: str) -> None:
        """Refuse a datamodule whose images or classes are not those the networks were built for."""
        super().setup(stage)
        self.check_datamodule("num_classes", "in_channels", "image_size")

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Loader 0: source, 1: target without labels, 2: what is watched."""
        images, labels = batch[0], batch[1]
        if dataloader_idx == 1:
            self._target_logits.append(at_least_float32(self(images)))
        elif dataloader_idx == 0:
            self._count("val_source", "val/source_accuracy", images, labels, "source")
        else:
            known = labels >= 0
            self._metric("watched").update(self(images[known]), labels[known])

    def on_validation_epoch_end(self) -> None:
        """Log what can be said of the target without its labels."""
        seen, self._target_logits = self._target_logits, []
        watched = self._metric("watched")
        if self.trainer.sanity_checking:
            watched.reset()
            return
        if seen:
            logits = torch.cat(seen)
            if self.trainer.world_size > 1:  # every rank then computes the same
                logits = torch.as_tensor(self.all_gather(logits)).flatten(0, 1)
            values = {
                "val/unsupervised_score": neighbourhood_density(logits[:_SCORED]),
                "val/target_entropy": mean_entropy(logits),
                "val/target_diversity": entropy_of_mean(logits),
            }
            self.log_dict(values, rank_zero_only=False)
        if watched.update_called:
            now = watched.compute()
            watched.reset()
            self.best_of_test.copy_(torch.maximum(self.best_of_test, now.to(self.best_of_test)))
            best = self.best_of_test.clone()
            self.log_dict({"watch/test_accuracy": now, "watch/test_accuracy_best_of_test": best})

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Loader 0: target, 1: source, with their labels."""
        domain: Domain = "target" if dataloader_idx == 0 else "source"
        name = "test/accuracy" if domain == "target" else "test/source_accuracy"
        self._count(f"test_{domain}", name, batch[0], batch[1], domain)

    def _count(self, key: str, name: str, images: Tensor, labels: Tensor, domain: Domain) -> None:
        metric, known = self._metric(key), labels >= 0  # a user's target may have no labels at all
        metric.update(self.domain_logits(images[known], domain), labels[known])
        self.log(
            name, metric, on_step=False, on_epoch=True, prog_bar=True, add_dataloader_idx=False, batch_size=len(labels)
        )

    def _metric(self, key: str) -> Any:
        return self.accuracies[key]
