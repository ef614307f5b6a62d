"""Adversarial losses and penalties on the discriminator's gradient: plain functions of scores and images.

Scores are unbounded; high means real. Both players minimise.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class AdversarialLoss:
    """A discriminator's and a generator's loss, means over the batch.

    Attributes:
        discriminator: of the scores of real images, shape (B,), and of generated ones, shape (B',).
        generator: of the scores of generated images, shape (B,).
    """

    discriminator: Callable[[Tensor, Tensor], Tensor]
    generator: Callable[[Tensor], Tensor]


#: non_saturating: Goodfellow et al. 2014 (the paper's CNN runs); hinge: Lim and Ye 2017 (its ResNet runs);
#: wasserstein: Arjovsky et al. 2017, without the constraint; least_squares: Mao et al. 2017, targets 0 and 1.
LOSSES = {
    "non_saturating": AdversarialLoss(
        lambda real, fake: F.softplus(-real).mean() + F.softplus(fake).mean(), lambda fake: F.softplus(-fake).mean()
    ),
    "hinge": AdversarialLoss(
        lambda real, fake: F.relu(1 - real).mean() + F.relu(1 + fake).mean(), lambda fake: -fake.mean()
    ),
    "wasserstein": AdversarialLoss(lambda real, fake: fake.mean() - real.mean(), lambda fake: -fake.mean()),
    "least_squares": AdversarialLoss(
        lambda real, fake: ((real - 1).square().mean() + fake.square().mean()) / 2,
        lambda fake: (fake - 1).square().mean() / 2,
    ),
}


def get_loss(name: str) -> AdversarialLoss:
    """The loss of this name.

    Raises:
        ValueError: if there is none.
    """
    if name not in LOSSES:
        raise ValueError(f"Expected argument `loss` to be one of {', '.join(LOSSES)} but got {name!r}.")
    return LOSSES[name]


def gradient_penalty(
    discriminator: Callable[[Tensor], Tensor], real: Tensor, fake: Tensor, mix: Tensor, target: float = 1.0
) -> Tensor:
    """Mean of (norm of the gradient - target)^2 at points between real and generated images.

    Gulrajani et al. 2017 (arXiv:1704.00028), equation 3, without its weight.

    Args:
        discriminator: images (B, C, H, W) to scores (B,).
        real: images, shape (B, C, H, W).
        fake: images, the same shape; their graph is not followed.
        mix: share of the real image in each point, in [0, 1], shape (B,).
        target: the norm that costs nothing.
    """
    mix = mix.view(-1, *[1] * (real.ndim - 1))
    points = (mix * real.detach() + (1 - mix) * fake.detach()).requires_grad_()
    return (_input_gradient(discriminator, points).norm(dim=1) - target).square().mean()


def r1_penalty(discriminator: Callable[[Tensor], Tensor], real: Tensor) -> Tensor:
    """Half the mean squared norm of the gradient at real images.

    Mescheder et al. 2018 (arXiv:1801.04406), equation 9, without its weight gamma.

    Args:
        discriminator: images (B, C, H, W) to scores (B,).
        real: images, shape (B, C, H, W).
    """
    return _input_gradient(discriminator, real.detach().requires_grad_()).square().sum(dim=1).mean() / 2


def _input_gradient(discriminator: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """Gradient of each score with respect to its image, flattened, shape (B, C H W); differentiable."""
    (gradient,) = torch.autograd.grad(discriminator(images).sum(), images, create_graph=True)
    return gradient.flatten(1)
