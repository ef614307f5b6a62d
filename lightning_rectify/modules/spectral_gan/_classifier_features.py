"""Features of a classifier of the very data set: a checkpoint's, or one trained on the spot."""

from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_rectify.arguments import check_least, check_types
from lightning_rectify.checkpoints import require_whole
from lightning_rectify.modules.image_networks import build_network
from lightning_rectify.modules.spectral_gan._extractor import FeatureExtractor, forked_seed
from lightning_rectify.optim.rectified_adam import RectifiedAdam


class ClassifierFeatures(FeatureExtractor):
    """What a classifier of the very data set sees before its last linear layer, and its logits.

    With a checkpoint, its network; without, a network that :meth:`prepare` trains, in float32 and plain torch, on nine
    tenths of the data it is given. It is a function of data, arguments and ``seed`` (on one kind of device), draws
    nothing from the global random state, and so is the same on every rank. Look at :attr:`accuracy`: a classifier that
    does not know the classes measures little.

    Args:
        checkpoint: file saved by Lightning of an ``ImageClassifier`` whose network was given by name. What it holds of
            the next four arguments wins over them.
        network: name for ``build_network``; its last layer must be linear.
        num_classes: number of classes K, at least 2.
        in_channels: channels C of an image, at least 1.
        network_args: further arguments of the network's constructor.
        epochs: passes over the data, at least 1; the learning rate falls to zero over them, as a half cosine.
        batch_size: images in a step, at least 2; a smaller rest is left out.
        lr: learning rate of :class:`RectifiedAdam`, positive.
        seed: of start, order and held-out part, at least 0.
        mean: of pixels in 0 to 1, as the checkpoint's data was normalised (``ImageData.mean``); one number or C.
            None: the checkpoint was trained on images in [-1, 1].
        std: standard deviation, likewise.

    Attributes:
        accuracy: share of right answers on the tenth that was held out, in [0, 1]; None before :meth:`prepare`. With a
            checkpoint it is taken on a tenth of the data given, which that network may have been trained on: it shows
            a wrong ``mean`` and ``std``.

    Raises:
        ValueError: for an argument outside its range, or a checkpoint that does not fit.
    """

    name = "classifier"
    scale: Tensor
    shift: Tensor

    def __init__(
        self,
        checkpoint: str | PathLike[str] | None = None,
        network: str = "small_cnn",
        num_classes: int = 10,
        in_channels: int = 1,
        network_args: dict[str, Any] | None = None,
        epochs: int = 5,
        batch_size: int = 128,
        lr: float = 3e-3,
        seed: int = 0,
        mean: float | Sequence[float] | None = None,
        std: float | Sequence[float] | None = None,
    ) -> None:
        check_types(ClassifierFeatures, locals())
        super().__init__()
        check_least(0, seed=seed)
        check_least(1, epochs=epochs)
        check_least(2, batch_size=batch_size)
        if not 0 < lr < float("inf"):
            raise ValueError(f"Expected argument `lr` to be positive but got {lr}.")
        if (mean is None) != (std is None) or (checkpoint is None and mean is not None):
            raise ValueError(
                "Expected arguments `mean` and `std` to be given both or neither, and only with a checkpoint, but got "
                f"mean {mean}, std {std}, checkpoint {checkpoint}."
            )
        state: dict[str, Tensor] | None = None
        if checkpoint is not None:
            hparams, state = _read_checkpoint(checkpoint)
            network, num_classes = hparams.get("network", network), hparams.get("num_classes", num_classes)
            in_channels = hparams.get("in_channels", in_channels)
            network_args = hparams.get("network_args", network_args)
        check_least(1, in_channels=in_channels)
        check_least(2, num_classes=num_classes)
        self.epochs, self.batch_size, self.lr, self.seed = epochs, batch_size, lr, seed
        with forked_seed(seed):
            self.network = build_network(network, num_classes, in_channels, **(network_args or {}))
        if state is not None:
            _load(self.network, state, checkpoint, network)
        self.network.requires_grad_(False)
        self._head = (_last_linear(self.network, network, num_classes),)  # a tuple: not a second child
        self.num_features, self.num_classes = self._head[0].in_features, num_classes
        self.channels = (in_channels,)
        self.accuracy: float | None = None
        self._from_checkpoint = self._prepared = state is not None
        # x in [-1, 1] is pixel (x + 1) / 2, so (pixel - mean) / std = scale * x + shift.
        half = torch.tensor(0.5)
        std_, mean_ = (half if v is None else torch.as_tensor(v, dtype=torch.float32) for v in (std, mean))
        self.register_buffer("scale", (0.5 / std_).reshape(-1, 1, 1), persistent=False)
        self.register_buffer("shift", ((0.5 - mean_) / std_).reshape(-1, 1, 1), persistent=False)
        self.eval()

    @property
    def needs_training(self) -> bool:
        """Whether there is no checkpoint and no training yet."""
        return not self._prepared

    def prepare(self, images: Tensor, labels: Tensor | None = None) -> None:
        """Train the network where it is (``to`` a device first) unless it is trained; measure :attr:`accuracy`.

        A second call does nothing. Images whose label is negative (unlabelled) are left out.

        Args:
            images: in [-1, 1], float, shape (N, C, H, W), on any device.
            labels: int64, shape (N,), below K.

        Raises:
            ValueError: if labels are missing or do not fit, or fewer than 20 images have one.
        """
        if self.accuracy is not None or (self._from_checkpoint and labels is None):
            return
        if labels is None:
            raise ValueError("Expected argument `labels` to be given to train a ClassifierFeatures but got None.")
        classes = self._head[0].out_features
        if labels.shape != images.shape[:1] or labels.is_floating_point() or bool((labels >= classes).any()):
            raise ValueError(
                f"Expected argument `labels` to be whole numbers below {classes}, shape ({len(images)},), but got "
                f"{labels.dtype}, shape {tuple(labels.shape)}: {labels}."
            )
        order = torch.Generator().manual_seed(self.seed)
        labelled = (labels >= 0).nonzero().flatten().cpu()
        if len(labelled) < 20:
            raise ValueError(
                f"Expected argument `labels` to hold 20 or more that are not negative but got {len(labelled)}."
            )
        labelled = labelled[torch.randperm(len(labelled), generator=order)]
        held_out, rest = labelled[: len(labelled) // 10], labelled[len(labelled) // 10 :]
        if not self._prepared:
            # Validation hooks run without gradients, and in inference mode tensors cannot be trained on.
            with torch.inference_mode(False), torch.enable_grad(), forked_seed(self.seed, self.scale.device):
                self._fit(images, labels, rest, order)
        self._prepared, right = True, 0
        for part in held_out.split(self.batch_size):
            logits = self(self._to_device(images, part))[1]
            right += int((logits.argmax(dim=1) == self._to_device(labels, part)).sum())
        self.accuracy = right / len(held_out)

    def extract(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """What enters the last linear layer (B, F) and what leaves it (B, K).

        Raises:
            ValueError: if the network is not trained yet.
        """
        if not self._prepared:
            raise ValueError("Expected ClassifierFeatures to be trained by `prepare(images, labels)` before its use.")
        entered: list[Tensor] = []
        hook = self._head[0].register_forward_pre_hook(lambda _, inputs: entered.append(inputs[0]))
        try:
            logits = self.network(images * self.scale + self.shift)
        finally:
            hook.remove()
        return entered[0].flatten(1), logits

    def _to_device(self, values: Tensor, index: Tensor) -> Tensor:
        return values[index.to(values.device)].to(self.scale.device)

    def _fit(self, images: Tensor, labels: Tensor, rest: Tensor, order: torch.Generator) -> None:
        self.network.requires_grad_(True)
        self.network.train()
        batch_size = min(self.batch_size, len(rest))
        steps = self.epochs * (len(rest) // batch_size)
        # 0.99: with 0.999 rectification would hold back most of the few hundred steps that small data gives.
        optimizer = RectifiedAdam(self.network.parameters(), lr=self.lr, betas=(0.9, 0.99))
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        with torch.autocast(self.scale.device.type, enabled=False):
            for step in range(steps):
                if (place := step % (len(rest) // batch_size)) == 0:
                    shuffled = rest[torch.randperm(len(rest), generator=order)]
                part = shuffled[place * batch_size : (place + 1) * batch_size]
                logits = self.network(self._to_device(images, part).float())
                loss = F.cross_entropy(logits, self._to_device(labels, part).long())
                gradients = torch.autograd.grad(loss, list(self.network.parameters()))
                for parameter, gradient in zip(self.network.parameters(), gradients, strict=True):
                    parameter.grad = gradient
                optimizer.step()
                schedule.step()
        optimizer.zero_grad()
        self.network.requires_grad_(False)
        self.network.eval()


def _read_checkpoint(path: str | PathLike[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Hyperparameters, and the network's state, of an ``ImageClassifier``."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"Expected argument `checkpoint` to be a file but found none at {str(path)!r}.")
    require_whole(str(path))
    saved = torch.load(path, map_location="cpu", weights_only=True)
    prefix = "network."
    state = {k.removeprefix(prefix): v for k, v in saved.get("state_dict", {}).items() if k.startswith(prefix)}
    if "hyper_parameters" not in saved or not state:
        raise ValueError(
            "Expected argument `checkpoint` to be a Lightning checkpoint of ImageClassifier (with hyper_parameters, "
            f"and a state_dict whose keys start with {prefix!r}) but got {str(path)!r} with {sorted(saved)}."
        )
    return saved["hyper_parameters"], state


def _load(network: nn.Module, state: dict[str, Tensor], path: str | PathLike[str] | None, name: str) -> None:
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(
            f"Expected argument `checkpoint` to hold the weights of network {name!r} but got {str(path)!r}, which does "
            f"not fit (a network given to ImageClassifier as an object has no name there): {error}"
        ) from error


def _last_linear(network: nn.Module, name: str, num_classes: int) -> nn.Linear:
    """The layer that makes the logits."""
    linear = [layer for layer in network.modules() if isinstance(layer, nn.Linear)]
    head = getattr(network, "head", None)
    head = head if isinstance(head, nn.Linear) else (linear[-1] if linear else None)
    if head is None or head.out_features != num_classes:
        raise ValueError(
            f"Expected argument `network` to name a network whose last layer is linear, with {num_classes} outputs, "
            f"but got {name!r}, whose last linear layer is {head}."
        )
    return head
