"""Auto-PGD: PGD that sets its step size itself, of Croce and Hein (arXiv:2003.01690, section 3)."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Literal

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
from lightning_rectify.attacks.losses import (
    CheckedLoss,
    Loss,
    check_labels,
    loss_function,
    ranked_others,
    targeted_difference_of_logits_ratio,
)

_MOMENTUM = 0.75  # alpha of the paper
_RISES = 0.75  # rho of the paper: the share of steps that must raise the loss
_MOST_TARGETS = 9  # of the released AutoAttack


def apgd(
    model: Model,
    images: Tensor,
    labels: Tensor,
    epsilon: float,
    *,
    steps: int = 100,
    restarts: int = 1,
    norm: Norm = "linf",
    loss: Loss | Literal["dlr_targeted"] = "ce",
    targets: int | None = None,
    bounds: tuple[float, float] = (0.0, 1.0),
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Auto-PGD: momentum, and a step that starts at 2 epsilon and is halved where the loss stops rising.

    .. math::
        z = \Pi\big(x_k + \eta\,\mathrm{sign}\,\nabla \ell(x_k)\big), \qquad
        x_{k+1} = \Pi\big(x_k + \alpha (z - x_k) + (1 - \alpha)(x_k - x_{k-1})\big), \quad \alpha = .75

    At the :func:`checkpoints` the step is halved, and the search goes on from the best point so far, where fewer than
    .75 of the steps since the last checkpoint raised the loss, or where neither the step nor the largest loss changed
    since then. Croce and Hein (arXiv:2003.01690, algorithm 1); in l2 the gradient over its norm takes the place of its
    sign. Starts are uniform in the ball. The released code moves its checkpoints by whole steps, which is the same at
    100 steps, and never applies the second condition at the first checkpoint.

    The model is treated as in :func:`lightning_rectify.attacks.pgd`.

    Args:
        model: from images (N, C, H, W) in pixel units to logits (N, K); normalization is inside it.
        images: inside ``bounds``, shape (N, C, H, W); below float32 they are taken to float32.
        labels: right classes, shape (N,), int64.
        epsilon: radius of the ball in pixel units, at least 0, in linf at most the width of ``bounds``.
        steps: gradients taken of each start, at least 1; one more forward pass judges the last point.
        restarts: starts, at least 1. A sample that one start breaks is spared the next, except with a ``loss`` of your
            own, which always sees whole batches.
        norm: "linf" or "l2", over all pixels of an image.
        loss: what to climb: "ce", "dlr" (K at least 3), "margin", a function of logits (N, K) and labels (N,) to (N,),
            or "dlr_targeted" (K at least 4), which makes one run towards each of the likeliest wrong classes in turn.
        targets: with "dlr_targeted", how many classes, in 1 to K - 1; None: 9, or K - 1 where that is less.
        bounds: least and largest pixel value.
        generator: of the starts, on any device; None: torch's own.

    Returns:
        Adversarial images (N, C, H, W), detached; inside the ball and the bounds exactly. Of all points visited, those
        of the start included, the worst of each sample: a misclassified one, else the one of the largest loss.

    Raises:
        ValueError: for an argument out of its range, naming it.
    """
    check_types(apgd, locals())
    check_least(1, steps=steps, restarts=restarts, targets=targets)
    if targets is not None and (callable(loss) or loss != "dlr_targeted"):
        raise ValueError(f"Expected argument `targets` to be None with loss {loss!r} but got {targets}.")
    with attacking(*modules_of(model)):
        ball, labels = prepare(images, labels, epsilon, norm, bounds)
        worst, everything = Worst(ball.images, labels), torch.arange(len(labels), device=labels.device)
        for climbed in restarts * _goals(model, ball.images, labels, loss, targets):
            start = ball.start(1.0, generator)
            left = everything if callable(loss) else everything[~worst.wrong]
            if not len(left):
                break
            worst.merge(_climb(model, start[left], ball.select(left), labels[left], climbed(left), steps), left)
        return worst.images


def checkpoints(steps: int) -> list[int]:
    r"""Steps after which APGD judges its step size, :math:`w_j = \lceil p_j N \rceil`.

    .. math:: p_0 = 0, \quad p_1 = .22, \quad p_{j+1} = p_j + \max(p_j - p_{j-1} - .03, .06)

    Croce and Hein (arXiv:2003.01690, section 3.1).

    Args:
        steps: the number N of steps of a run.

    Returns:
        Rising step numbers in 1 to N, without :math:`w_0 = 0`.

    Example:
        >>> checkpoints(100)
        [22, 41, 57, 70, 80, 87, 93, 99]
    """
    return sorted({-(-percent * steps // 100) for percent in _percents()})


def _percents() -> Iterator[int]:
    # In whole percents: .41 * 100 is above 41 in floats, and its ceiling 42.
    percent, gap = 22, 22
    while percent <= 100:
        yield percent
        gap = max(gap - 3, 6)
        percent += gap


def _goals(
    model: Model, images: Tensor, labels: Tensor, loss: Loss | Literal["dlr_targeted"], targets: int | None
) -> list[Callable[[Tensor], CheckedLoss]]:
    """What one start after the other climbs, each as a function of the samples' indices (n,)."""
    if not isinstance(loss, str) or loss != "dlr_targeted":
        function = loss_function(loss, check_labels=True)
        return [lambda left: function]
    with torch.no_grad():
        logits = logits_of(model, images)
    most = logits.shape[1] - 1
    check_labels(labels, most + 1)
    if targets is not None and targets > most:
        raise ValueError(f"Expected argument `targets` to be at most {most}, the wrong classes, but got {targets}.")

    def towards(goal: Tensor) -> Callable[[Tensor], CheckedLoss]:
        return lambda left: CheckedLoss(partial(targeted_difference_of_logits_ratio, targets=goal[left]))

    return [towards(goal) for goal in ranked_others(logits, labels)[:, : targets or _MOST_TARGETS].unbind(1)]


def _climb(model: Model, points: Tensor, ball: Ball, labels: Tensor, loss: CheckedLoss, steps: int) -> Worst:
    gradient, value, logits = input_gradient(model, points, labels, loss)
    worst = Worst(points, labels)
    worst.offer(points, value, logits)
    best, best_gradient, best_value = points, gradient, value
    step_size = torch.full_like(points[:, :1, :1, :1], 2.0 * ball.epsilon)
    marks, rises, mark = set(checkpoints(steps)), torch.zeros_like(value), 0
    mark_value, halved = best_value, torch.zeros_like(value, dtype=torch.bool)
    previous = points
    for step in range(1, steps + 1):
        aim = ball.project(ball.ascend(points, gradient, step_size))
        if step > 1:
            aim = ball.project(points + _MOMENTUM * (aim - points) + (1.0 - _MOMENTUM) * (points - previous))
        previous, points, before = points, aim, value
        if step < steps:
            gradient, value, logits = input_gradient(model, points, labels, loss)
        else:
            with torch.no_grad():
                logits = logits_of(model, points)
                value = loss(logits, labels)
        worst.offer(points, value, logits)
        rises = rises + (value > before)
        better = value > best_value
        best, best_gradient = _choose(better, points, best), _choose(better, gradient, best_gradient)
        best_value = torch.where(better, value, best_value)
        if step in marks:
            halved = (rises < _RISES * (step - mark)) | (~halved & (best_value == mark_value))
            step_size = _choose(halved, step_size / 2.0, step_size)
            points, gradient = _choose(halved, best, points), _choose(halved, best_gradient, gradient)
            value = torch.where(halved, best_value, value)
            rises, mark, mark_value = torch.zeros_like(rises), step, best_value
    return worst


def _choose(condition: Tensor, yes: Tensor, no: Tensor) -> Tensor:
    return torch.where(condition[:, None, None, None], yes, no)
