"""FGSM and PGD: one step and many steps along the gradient of the image."""

import math

import torch
from torch import Tensor

from lightning_rectify.arguments import check_least, check_types
from lightning_rectify.attacks.ball import Ball, Norm
from lightning_rectify.attacks.common import (
    Model,
    Worst,
    attacking,
    input_gradient,
    logits_of,
    modules_of,
    prepare,
)
from lightning_rectify.attacks.losses import CheckedLoss, Loss, loss_function


def fgsm(
    model: Model,
    images: Tensor,
    labels: Tensor,
    epsilon: float,
    *,
    step_size: float | None = None,
    random_start: float = 0.0,
    norm: Norm = "linf",
    loss: Loss = "ce",
    bounds: tuple[float, float] = (0.0, 1.0),
    generator: torch.Generator | None = None,
    start: Tensor | None = None,
) -> Tensor:
    r"""Fast gradient sign method: one step of length epsilon along the sign of the gradient.

    .. math:: x' = \Pi\big(x_0 + \alpha\,\mathrm{sign}\,\nabla_x \ell(f(x_0), y)\big)

    Goodfellow et al. (arXiv:1412.6572, section 4). With ``random_start=1.0`` and a ``step_size`` of 1.25 epsilon it is
    FGSM-RS of Wong et al. (arXiv:2001.03994). Never a measure of robustness: a model can learn to mask this gradient.

    Args:
        model: as in :func:`pgd`.
        images: as in :func:`pgd`.
        labels: as in :func:`pgd`.
        epsilon: as in :func:`pgd`.
        step_size: length :math:`\alpha` of the step, in pixel units, above 0; None: epsilon.
        random_start: as in :func:`pgd`.
        norm: as in :func:`pgd`.
        loss: as in :func:`pgd`.
        bounds: as in :func:`pgd`.
        generator: as in :func:`pgd`.
        start: as in :func:`pgd`.

    Returns:
        Adversarial images (N, C, H, W), detached.

    Raises:
        ValueError: as in :func:`pgd`.
    """
    check_types(fgsm, locals())
    if step_size is None and 0.0 < epsilon < math.inf:
        step_size = epsilon
    return pgd(
        model, images, labels, epsilon, steps=1, step_size=step_size, random_start=random_start, norm=norm, loss=loss,
        bounds=bounds, generator=generator, start=start,
    )  # fmt: skip


def pgd(
    model: Model,
    images: Tensor,
    labels: Tensor,
    epsilon: float,
    *,
    steps: int = 10,
    step_size: float | None = None,
    restarts: int = 1,
    random_start: float = 1.0,
    norm: Norm = "linf",
    loss: Loss = "ce",
    bounds: tuple[float, float] = (0.0, 1.0),
    generator: torch.Generator | None = None,
    start: Tensor | None = None,
) -> Tensor:
    r"""Projected gradient descent on minus the loss, from random starts.

    .. math:: x_{t+1} = \Pi\big(x_t + \alpha\,\mathrm{sign}\,\nabla_x \ell(f(x_t), y)\big)

    with :math:`\Pi` the projection to the ball around the image and to the bounds; sign(0) = 0, and in l2 the gradient
    over its norm takes the place of its sign. Madry et al. (arXiv:1706.06083, section 2.1). The last iterate counts.

    The model runs in evaluation mode, float32, and leaves no trace (:func:`attacking`), if it is a module, a method of
    one or a ``functools.partial`` of these; around any other function enter :func:`attacking` with its modules.

    Args:
        model: from images (N, C, H, W) in pixel units to logits (N, K); normalization is inside it.
        images: inside ``bounds``, shape (N, C, H, W); below float32 they are taken to float32.
        labels: right classes, shape (N,), int64.
        epsilon: radius of the ball in pixel units, at least 0 (then the images come back), in linf at most the width
            of ``bounds``.
        steps: gradients taken, at least 1.
        step_size: length :math:`\alpha` of a step, in pixel units, above 0; None: 2.5 * epsilon / steps.
        restarts: starts, at least 1; the worst of each sample is returned: a misclassified one, else the one of the
            largest loss. A sample that one start breaks is spared the next, except with a ``loss`` of your own, which
            always sees whole batches.
        random_start: share of epsilon, in [0, 1], that a uniform start in the ball may use; 0 starts at the image.
        norm: "linf" or "l2", over all pixels of an image.
        loss: what to climb: "ce", "margin", "dlr", or a function of logits (N, K) and labels (N,) to (N,).
        bounds: least and largest pixel value.
        generator: of the starts, on any device; None: torch's own.
        start: where to start instead, shape (N, C, H, W), moved into the ball and the bounds; ``random_start`` and
            ``restarts`` then count for nothing.

    Returns:
        Adversarial images (N, C, H, W), detached; inside the ball and the bounds exactly.

    Raises:
        ValueError: for an argument out of its range, naming it.

    Example:
        >>> weight = torch.tensor([[-1.0, 2.0], [0.0, 0.0]])  # class 1 has logit 0 everywhere
        >>> image = torch.tensor([0.5, 0.5]).view(1, 2, 1, 1)
        >>> attacked = pgd(lambda x: x.flatten(1) @ weight.T, image, torch.tensor([0]), 0.25)
        >>> attacked.flatten().tolist()  # the right logit falls with -1 and 2
        [0.75, 0.25]
    """
    check_types(pgd, locals())
    check_least(1, steps=steps, restarts=restarts)
    if step_size is not None and not 0.0 < step_size < math.inf:
        raise ValueError(f"Expected argument `step_size` to be above 0 but got {step_size!r}.")
    if not 0.0 <= random_start <= 1.0:
        raise ValueError(
            f"Expected argument `random_start` to be a share of epsilon in [0, 1] but got {random_start!r}."
        )
    if restarts > 1 and not random_start:
        raise ValueError("Expected argument `random_start` to be above 0 with several restarts but got 0.")
    function = loss_function(loss, check_labels=True)
    with attacking(*modules_of(model)):
        ball, labels = prepare(images, labels, epsilon, norm, bounds)
        length = 2.5 * ball.epsilon / steps if step_size is None else step_size
        if restarts == 1 or start is not None:
            begin = ball.start(random_start, generator) if start is None else ball.starting_at(start)
            return _climb(model, begin, ball, labels, function, steps, length)
        worst, everything = Worst(ball.images, labels), torch.arange(len(labels), device=labels.device)
        for _ in range(restarts):
            begin = ball.start(random_start, generator)
            left = everything if callable(loss) else everything[~worst.wrong]
            if not len(left):
                break
            points = _climb(model, begin[left], ball.select(left), labels[left], function, steps, length)
            with torch.no_grad():
                logits = logits_of(model, points)
                worst.offer(points, function(logits, labels[left]), logits, left)
        return worst.images


def _climb(
    model: Model, points: Tensor, ball: Ball, labels: Tensor, loss: CheckedLoss, steps: int, length: float
) -> Tensor:
    for _ in range(steps):
        gradient, _, _ = input_gradient(model, points, labels, loss)
        points = ball.project(ball.ascend(points, gradient, length))
    return points.detach()
