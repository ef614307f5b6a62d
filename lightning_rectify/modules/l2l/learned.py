r"""The learned attack: one network's output, instead of an optimization for each image.

Learning to defend by learning to attack (arXiv:1811.01213) replaces the inner problem of adversarial training by an
attacker :math:`g(\cdot;\varphi)` that is trained along with the classifier :math:`f(\cdot;\theta)`. Where the paper's
text was not at hand this follows the authors' code; departures are named.
"""

from contextlib import nullcontext
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from lightning_rectify.arguments import check_choice, check_least, check_types
from lightning_rectify.attacks.ball import Ball
from lightning_rectify.attacks.common import attacking, check_labels_of, input_gradient
from lightning_rectify.modules.l2l.settings import check_ball

GradientScale = Literal["sample_std", "batch_max"]

_SMALLEST_STD = 1e-4  # of a gradient whose largest value is 1; only one that is the same everywhere is below


class Perturbed(NamedTuple):
    """What a learned attack made.

    Attributes:
        images: adversarial images (N, C, H, W), inside the ball and the bounds.
        gradient: of each sample's loss at the start of the attack, (N, C, H, W); None if the attacker sees none.
    """

    images: Tensor
    gradient: Tensor | None


def scale_gradient(gradient: Tensor, how: GradientScale = "sample_std") -> Tensor:
    """Bring gradients to a size that a network can read; a gradient of zeros stays zero.

    Args:
        gradient: shape (N, C, H, W).
        how: "sample_std", each sample by its own standard deviation: its result does not depend on the batch.
            "batch_max", all samples by the largest absolute value in the batch, as in the authors' code: one hard
            sample then makes the gradients of all others small, and each process has a largest value of its own.

    Returns:
        Shape (N, C, H, W). Gradients that are not finite stay so.

    Raises:
        ValueError: for an unknown ``how``.

    Example:
        >>> scale_gradient(torch.tensor([1e-30, -1e-30, 0.0, 0.0]).view(1, 1, 2, 2)).flatten().tolist()
        [1.4142135381698608, -1.4142135381698608, 0.0, 0.0]
    """
    check_choice(get_args(GradientScale), how=how)
    dims = (0, 1, 2, 3) if how == "batch_max" else (1, 2, 3)
    largest = gradient.abs().amax(dims, keepdim=True)
    # By the largest value first: the squares of a confident classifier's gradient are 0 in float32.
    gradient = gradient / torch.where(largest == 0, torch.ones_like(largest), largest)
    if how == "batch_max":
        return gradient
    return gradient / gradient.std(dims, correction=0, keepdim=True).clamp_min(_SMALLEST_STD)


def learned_attack(
    attacker: nn.Module,
    classifier: nn.Module,
    images: Tensor,
    labels: Tensor,
    epsilon: float,
    *,
    gradient: bool = True,
    steps: int = 1,
    scale: GradientScale = "sample_std",
    bptt: bool = True,
    attack_bn: Literal["eval", "train"] = "eval",
    random_start: float = 0.0,
    bounds: tuple[float, float] = (0.0, 1.0),
    generator: torch.Generator | None = None,
    start: Tensor | None = None,
) -> Perturbed:
    r"""Attack images with a network, in one step or several with the same weights.

    .. math:: x_{t+1} = \Pi\big(x_t + \epsilon \tanh h_\varphi([x_t, \hat g_t])\big),
        \quad \hat g_t = \mathrm{scale}\,\nabla_x \ell(f_\theta(x_t), y)

    :math:`\Pi` projects to the ball around :math:`x_0` and to the bounds after every step; the authors' code does so
    for one and two steps, for more at the end only. :math:`\hat g_t` is a constant for autograd: there is no second
    derivative through the classifier. Where a pixel is clipped no gradient reaches :math:`\varphi`.

    Autograd records what the attacker does (enter ``torch.no_grad`` for an attack that is no part of a loss). Gradients
    of the images are taken in at least float32, without autocast; the attacker itself runs as its surroundings say.

    Args:
        attacker: :math:`h`, maps (N, 2 C, H, W), image and gradient, or (N, C, H, W), the image alone, to
            (N, C, H, W); any real numbers.
        classifier: :math:`f`, maps images in pixel units to logits (N, K).
        images: inside ``bounds``, shape (N, C, H, W); below float32 they are taken to float32.
        labels: right classes, shape (N,). They enter through the gradient only.
        epsilon: radius of the ball (l-infinity), in pixel units, above 0.
        gradient: whether the attacker sees the gradient ("Grad L2L") or not ("Naive L2L", which sees no label).
        steps: how often the attacker is applied, at least 1.
        scale: see :func:`scale_gradient`.
        bptt: let the attacker's gradient pass through :math:`x_1, x_2, \dots` to earlier steps.
        attack_bn: take gradients of the images with the classifier in "eval" mode, or as it is ("train"): the mode
            that it is in, its batch normalization then counting the clean images too.
        random_start: share of epsilon, in [0, 1], that a uniform start may use.
        bounds: least and largest pixel value.
        generator: of the random start.
        start: where to start instead, shape (N, C, H, W), moved into the ball and the bounds.

    Raises:
        ValueError: for an argument outside its range; if the attacker's output has not the shape of the images.
    """
    check_types(learned_attack, locals())
    check_least(1, steps=steps)
    check_choice(get_args(GradientScale), scale=scale)
    check_choice(("eval", "train"), attack_bn=attack_bn)
    check_ball(epsilon, bounds, None, random_start)
    if images.ndim != 4 or not images.is_floating_point():
        raise ValueError(
            f"Expected argument `images` to be of shape (N, C, H, W) and floating point but got {tuple(images.shape)} "
            f"of {images.dtype}."
        )
    check_labels_of(images, labels)
    if images.dtype in (torch.float16, torch.bfloat16):
        images = images.float()
    ball = Ball.around(images, epsilon, "linf", bounds)
    points = ball.start(random_start, generator) if start is None else ball.starting_at(start)
    first = None
    for step in range(steps):
        if step > 0 and not bptt:
            points = points.detach()
        inputs = points
        if gradient:
            with attacking(classifier) if attack_bn == "eval" else nullcontext():
                raw, _, _ = input_gradient(classifier, points.detach(), labels)
            first = raw if first is None else first
            inputs = torch.cat([points, scale_gradient(raw, scale)], dim=1)
        direction = attacker(inputs)
        if direction.shape != images.shape:
            raise ValueError(
                f"Expected argument `attacker` to map {tuple(inputs.shape)} to {tuple(images.shape)}, the images' "
                f"shape, but got {tuple(direction.shape)}."
            )
        # Not in the precision of autocast: near the ball's edge bfloat16 has steps of epsilon / 256.
        points = ball.project(points + epsilon * direction.to(images.dtype).tanh())
    return Perturbed(points, first)
