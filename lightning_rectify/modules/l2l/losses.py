r"""What the classifier minimises: cross-entropy on attacked images, or TRADES.

TRADES (Zhang et al. 2019, arXiv:1901.08573, equation 5 and Algorithm 1) attacks the difference between the
predictions for the image and for its neighbour, and pays for that difference beside the clean cross-entropy.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_rectify.attacks.ball import Ball, normal
from lightning_rectify.attacks.common import attacking, input_gradient

_START = 1e-3  # the standard deviation of Algorithm 1's start, in pixel units of [0, 1]


def robust_cross_entropy(
    adversarial: Tensor, labels: Tensor, clean: Tensor | None = None, clean_weight: float = 0.0
) -> Tensor:
    r"""Cross-entropy of attacked images, mixed with that of clean ones.

    .. math:: (1-w)\,\ell(f(x'), y) + w\,\ell(f(x), y)

    Args:
        adversarial: logits of the attacked images, shape (N, K).
        labels: right classes, shape (N,).
        clean: logits of the clean images, shape (N, K); needed for a weight above 0.
        clean_weight: :math:`w` in [0, 1). L2L has 0; the authors' own PGD training has 1/2.

    Returns:
        A scalar.
    """
    loss = F.cross_entropy(adversarial, labels)
    if clean is None or clean_weight == 0.0:
        return loss
    return (1.0 - clean_weight) * loss + clean_weight * F.cross_entropy(clean, labels)


def trades_loss(adversarial: Tensor, clean: Tensor, labels: Tensor, beta: float = 6.0) -> Tensor:
    r"""TRADES: :math:`\ell(f(x), y) + \beta\,\mathrm{KL}(p(\cdot|x)\,\|\,p(\cdot|x'))`, means over the batch.

    Gradients pass through both predictions, as in the authors' code (the paper's :math:`\beta` is its
    :math:`1/\lambda`).

    Args:
        adversarial: logits of the attacked images, shape (N, K).
        clean: logits of the clean images, shape (N, K).
        labels: right classes, shape (N,).
        beta: weight of the divergence, at least 0.

    Returns:
        A scalar.
    """
    return F.cross_entropy(clean, labels) + beta * divergence(clean, adversarial).mean()


def divergence(clean: Tensor, adversarial: Tensor) -> Tensor:
    r"""KL divergence :math:`\sum_k p_k \ln(p_k / q_k)` of each sample's two predictions, from their logits.

    From logarithms on both sides: the authors' code takes that of a softmax, and its gradient is NaN where that is 0.

    Args:
        clean: logits of :math:`p`, shape (N, K).
        adversarial: logits of :math:`q`, shape (N, K).

    Returns:
        Shape (N,), at least 0.
    """
    p, q = F.log_softmax(clean, dim=1), F.log_softmax(adversarial, dim=1)
    return F.kl_div(q, p, reduction="none", log_target=True).sum(dim=1)


def trades_attack(
    classifier: nn.Module,
    images: Tensor,
    labels: Tensor,
    epsilon: float,
    *,
    steps: int = 10,
    step_size: float | None = None,
    bounds: tuple[float, float] = (0.0, 1.0),
    generator: torch.Generator | None = None,
) -> Tensor:
    """PGD (l-infinity) on the divergence from the clean prediction, from a start of tiny normal noise.

    The start is needed: at the image itself the divergence has its minimum, and no gradient. Labels are not used.

    Args:
        classifier: maps images in pixel units to logits (N, K); in evaluation mode and float32 for the attack.
        images: inside ``bounds``, shape (N, C, H, W).
        labels: shape (N,).
        epsilon: radius in pixel units.
        steps: gradients taken, at least 1.
        step_size: in pixel units; None: 2.5 * epsilon / steps.
        bounds: least and largest pixel value.
        generator: of the start.

    Returns:
        Attacked images (N, C, H, W), detached.
    """
    length = 2.5 * epsilon / steps if step_size is None else step_size
    with attacking(classifier):
        images = images.clone() if images.is_inference() else images.detach()
        images = images.float() if images.dtype in (torch.float16, torch.bfloat16) else images
        ball = Ball.around(images, epsilon, "linf", bounds)
        with torch.no_grad():
            clean = classifier(images)
        spread = _START * (bounds[1] - bounds[0])
        points = ball.project(images + spread * normal(images, generator))
        for _ in range(steps):
            gradient, _, _ = input_gradient(classifier, points, labels, lambda logits, _: divergence(clean, logits))
            points = ball.project(ball.ascend(points, gradient, length))
    return points
