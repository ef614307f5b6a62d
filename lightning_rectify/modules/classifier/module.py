"""``ImageClassifier``: one network, cross-entropy, accuracy."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy

from lightning_rectify.arguments import check_fraction, check_least, check_types
from lightning_rectify.modules.base import RectifiedModule
from lightning_rectify.modules.image_networks import build_network, given_network


class ImageClassifier(RectifiedModule):
    """Image classification with cross-entropy (arXiv:1908.03265, section 5.1).

    A batch is a pair: images, float, shape (B, C, H, W), and labels, int64, shape (B,); for prediction the images alone
    will do. Logged: ``train/loss`` at each step, ``train/accuracy``, ``val/loss``, ``val/accuracy``, ``test/loss`` and
    ``test/accuracy`` over each epoch. Labels are smoothed in ``train/loss`` only.

    Override ``parameter_groups`` to split the optimizer's parameters, ``forward`` to change the network's use.

    Saved hyperparameters hold plain values only. A network passed as an object is not among them: load such a
    checkpoint with ``ImageClassifier.load_from_checkpoint(path, network=network)``.

    Args:
        network: name for ``build_network`` ("small_cnn", "resnet20", any torchvision classification model) or a module
            that maps images to logits, shape (B, K).
        num_classes: number of classes K, at least 2.
        in_channels: channels C of an image, at least 1.
        image_size: height and width of the images by which the model summary and the graph are made, at least 1.
        label_smoothing: probability taken from the true class and spread over all, in [0, 1).
        network_args: further arguments of the network's constructor, for a network given by name.
        **kwargs: of :class:`RectifiedModule`: ``optimizer``, ``lr_scheduler``, ``lr_scheduler_interval``, ``compile``.

    Raises:
        ValueError: for an argument outside its range; in ``setup``, if the trainer's datamodule has other classes or
            channels.
    """

    def __init__(
        self,
        network: str | nn.Module = "small_cnn",
        num_classes: int = 10,
        in_channels: int = 1,
        image_size: int = 8,
        label_smoothing: float = 0.0,
        network_args: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        check_types(ImageClassifier, locals())
        super().__init__(**kwargs)
        check_least(1, in_channels=in_channels, image_size=image_size)
        check_least(2, num_classes=num_classes)
        check_fraction(label_smoothing=label_smoothing)
        given = given_network("network", network, network_args)
        if given is None:
            given = build_network(str(network), num_classes, in_channels, **(network_args or {}))
        self.network = given
        self.num_classes, self.in_channels, self.label_smoothing = num_classes, in_channels, label_smoothing
        # Labels outside the range fail in the loss; the metric's own check would read the device at every step.
        self.train_accuracy = MulticlassAccuracy(num_classes, average="micro", validate_args=False)
        self.val_accuracy = self.train_accuracy.clone()
        self.test_accuracy = self.train_accuracy.clone()
        self.example_input_array = torch.zeros(2, in_channels, image_size, image_size)

    def setup(self, stage: str) -> None:
        """Refuse a datamodule whose images or classes are not those the network was built for."""
        self.check_datamodule("num_classes", "in_channels")

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, K) of images (B, C, H, W)."""
        return self.network(images)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """The loss, a scalar; logs ``train/loss`` and ``train/accuracy``."""
        return self._step(batch, "train", self.train_accuracy)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Logs ``val/loss`` and ``val/accuracy``."""
        self._step(batch, "val", self.val_accuracy)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Logs ``test/loss`` and ``test/accuracy``."""
        self._step(batch, "test", self.test_accuracy)

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        """The most probable class of each image, int64, shape (B,)."""
        images = batch[0] if isinstance(batch, (tuple, list)) else batch
        return self(images).argmax(dim=1)

    def _step(self, batch: tuple[Tensor, Tensor], stage: str, accuracy: Metric) -> Tensor:
        images, labels = batch[:2]
        training, size = stage == "train", len(labels)
        logits = self(images)
        loss = F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing if training else 0.0)
        accuracy.update(logits.detach(), labels)
        # Ranks hold different batches: outside training, where loggers read one number an epoch, it is their mean.
        self.log(f"{stage}/loss", loss, prog_bar=training, sync_dist=not training, batch_size=size)
        self.log(f"{stage}/accuracy", accuracy, on_step=False, on_epoch=True, prog_bar=True, batch_size=size)
        return loss
