"""What all attacks share: the context they run in, the gradient of the images, checks, the worst image found so far."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from lightning_rectify.arguments import check_choice, check_least, check_types
from lightning_rectify.attacks.ball import Ball, Norm
from lightning_rectify.attacks.losses import Loss, loss_function
from lightning_rectify.nn.modes import evaluating

#: images (N, C, H, W) in pixel units inside the bounds, to logits (N, K); normalization is inside it
Model = Callable[[Tensor], Tensor]


@contextmanager
def attacking(*modules: nn.Module) -> Iterator[None]:
    """Within this context gradients can be taken from networks that are not being trained, and leave no trace.

    Every submodule is in evaluation mode and gets back the mode that it had; buffers are put back if a forward pass
    changed them; autocast is off, so that float32 stays float32 (signs of bfloat16 gradients are noise); gradients are
    recorded, also inside ``torch.no_grad`` and ``torch.inference_mode``. Tensors made in inference mode must be cloned
    here before a gradient passes through them; the attacks do that with their images and labels.

    Args:
        modules: any modules; none, for the modes of gradients and autocast alone.

    Yields:
        Nothing.
    """
    with ExitStack() as stack:
        stack.enter_context(evaluating(*modules))
        stack.enter_context(_buffers_kept(modules))
        stack.enter_context(_differentiable())
        yield


def input_gradient(model: Model, images: Tensor, labels: Tensor, loss: Loss = "ce") -> tuple[Tensor, Tensor, Tensor]:
    """Gradient of each sample's loss with respect to its image: one forward pass and one backward pass.

    The losses are summed, not averaged, so no sample's gradient depends on the size of the batch. Parameters get no
    gradient. Modes of modules stay as they are (see :func:`attacking`); autocast is off, and gradients are on even in
    inference mode.

    Args:
        model: from images to logits (N, K).
        images: shape (N, C, H, W); below float32 they are taken to float32.
        labels: right classes, shape (N,), int64.
        loss: "ce", "margin", "dlr" or a function of logits (N, K) and labels (N,) to (N,).

    Returns:
        Gradient (N, C, H, W), loss (N,) and logits (N, K), all detached.

    Raises:
        ValueError: if the model gives no logits of shape (N, K) or cannot be differentiated, the labels are not one
            integer an image, or ``loss`` is unknown.
    """
    check_types(input_gradient, locals())
    check_labels_of(images, labels)
    function = loss_function(loss)
    with _differentiable():
        images, labels = usable(images), usable(labels)
        images = images.requires_grad_()
        logits = logits_of(model, images)
        values = function(logits, labels)
        gradient = None
        if values.requires_grad:
            (gradient,) = torch.autograd.grad(values.sum(), images, allow_unused=True)
        if gradient is None:
            raise ValueError(
                "Expected argument `model` to be differentiable with respect to the images but its logits do not "
                "depend on them through autograd; `square` attacks without gradients."
            )
        return gradient, values.detach(), logits.detach()


def correct(model: Model, images: Tensor, labels: Tensor) -> Tensor:
    """Which images a model classifies as their labels say, in evaluation mode and without autocast.

    Args:
        model: from images to logits (N, K).
        images: shape (N, C, H, W).
        labels: right classes, shape (N,), int64.

    Returns:
        Booleans, shape (N,).

    Raises:
        ValueError: if the model gives no logits of shape (N, K), or the labels are not one integer an image.
    """
    check_types(correct, locals())
    check_labels_of(images, labels)
    with attacking(*modules_of(model)), torch.no_grad():
        return logits_of(model, usable(images)).argmax(1) == labels


def modules_of(model: Model) -> Sequence[nn.Module]:
    """The modules behind a callable: the module itself, a bound method's, a partial's; none behind other functions."""
    if isinstance(model, nn.Module):
        return [model]
    if isinstance(model, partial):
        return modules_of(model.func)
    owner = getattr(model, "__self__", None)
    return [owner] if isinstance(owner, nn.Module) else []


def logits_of(model: Model, images: Tensor) -> Tensor:
    """The model's logits, with their shape checked.

    Raises:
        ValueError: if they are not a tensor of shape (N, K).
    """
    logits = model(images)
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(images):
        came = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f"Expected argument `model` to return logits of shape ({len(images)}, K) but got {came!r}.")
    return logits


def usable(values: Tensor) -> Tensor:
    """A detached tensor that autograd takes: never an inference tensor, and at least float32 if it is floating."""
    values = values.clone() if values.is_inference() else values.detach()
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values


def prepare(
    images: Tensor, labels: Tensor, epsilon: float, norm: Norm, bounds: tuple[float, float]
) -> tuple[Ball, Tensor]:
    """Checked arguments of an attack, as the ball to search and the labels; call it within :func:`attacking`.

    Raises:
        ValueError: naming the argument, what was expected and what came.
    """
    _check_set(epsilon, norm, bounds)
    if not isinstance(images, Tensor) or images.ndim != 4 or not images.is_floating_point():
        came = f"{tuple(images.shape)} of {images.dtype}" if isinstance(images, Tensor) else type(images).__name__
        raise ValueError(f"Expected argument `images` to be of shape (N, C, H, W) and floating point but got {came}.")
    if not ((images >= bounds[0]) & (images <= bounds[1])).all():
        raise ValueError(
            f"Expected argument `images` to be inside `bounds` {bounds} (pixel units; normalization belongs inside the "
            f"model) but got values from {images.min().item():g} to {images.max().item():g}."
        )
    check_labels_of(images, labels)
    return Ball.around(usable(images), float(epsilon), norm, bounds), usable(labels)


def check_labels_of(images: Tensor, labels: Tensor) -> None:
    """Refuse labels that are not one integer an image."""
    if not isinstance(labels, Tensor) or labels.shape != images.shape[:1] or labels.dtype != torch.int64:
        came = f"{tuple(labels.shape)} of {labels.dtype}" if isinstance(labels, Tensor) else type(labels).__name__
        raise ValueError(f"Expected argument `labels` to be of shape ({len(images)},) and int64 but got {came}.")


class Worst:
    """The worst image of each sample so far: a misclassified one before any other, then the one of the larger loss.

    Args:
        images: what to hold before anything is offered, shape (N, C, H, W).
        labels: right classes, shape (N,).
    """

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images.clone(), labels
        self.loss = torch.full(labels.shape, -math.inf, dtype=images.dtype, device=images.device)
        self.wrong = torch.zeros_like(labels, dtype=torch.bool)

    def offer(self, images: Tensor, loss: Tensor, logits: Tensor, index: Tensor | slice = slice(None)) -> None:
        """Take what is worse than what is held.

        Args:
            images: shape (n, C, H, W), of the samples at ``index``.
            loss: their losses, shape (n,).
            logits: their logits, shape (n, K).
            index: which samples they are, shape (n,).
        """
        self._take(images, loss, logits.argmax(1) != self.labels[index], index)

    def merge(self, other: "Worst", index: Tensor | slice = slice(None)) -> None:
        """Take what is worse than what is held from another record, of the samples at ``index``."""
        self._take(other.images, other.loss, other.wrong, index)

    def _take(self, images: Tensor, loss: Tensor, wrong: Tensor, index: Tensor | slice) -> None:
        held_wrong, held_loss = self.wrong[index], self.loss[index]
        loss = loss.to(held_loss.dtype)
        better = (wrong & ~held_wrong) | ((wrong == held_wrong) & (loss > held_loss))
        self.images[index] = torch.where(better[:, None, None, None], images, self.images[index])
        self.loss[index] = torch.where(better, loss, held_loss)
        self.wrong[index] = wrong | held_wrong


@contextmanager
def _differentiable() -> Iterator[None]:
    with ExitStack() as stack:
        for device in ("cpu", "cuda", "mps", "xpu"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        yield


@contextmanager
def _buffers_kept(modules: Sequence[nn.Module]) -> Iterator[None]:
    # By version and only where needed: writing to a buffer would break the graph of a forward pass made before.
    held = [
        (part, name, buffer, buffer.clone(), _version(buffer))
        for module in modules
        for part in module.modules()
        for name, buffer in part._buffers.items()
        if buffer is not None
    ]
    try:
        yield
    finally:
        for part, name, buffer, copy, version in held:
            part._buffers[name] = buffer  # a forward pass may have put another in its place
            if _version(buffer) != version or (version is None and not torch.equal(buffer, copy)):
                with torch.no_grad():
                    buffer.copy_(copy)


def _version(buffer: Tensor) -> int | None:
    return None if buffer.is_inference() else buffer._version


def _check_set(epsilon: float, norm: Norm, bounds: tuple[float, float]) -> None:
    check_choice(("linf", "l2"), norm=norm)
    if len(bounds) != 2 or not -math.inf < bounds[0] < bounds[1] < math.inf:
        raise ValueError(f"Expected argument `bounds` to be two finite numbers, the lower first, but got {bounds!r}.")
    check_least(0, epsilon=epsilon)
    if norm == "linf" and epsilon > bounds[1] - bounds[0]:
        raise ValueError(
            f"Expected argument `epsilon` to be at most {bounds[1] - bounds[0]:g}, the width of `bounds`, but got "
            f"{epsilon!r}: it is in pixel units, 8/255 and not 8 for pixels in [0, 1]."
        )
