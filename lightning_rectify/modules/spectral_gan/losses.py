r"""Adversarial losses and penalties on the discriminator's gradient: plain functions of scores and images.

Scores D(x) are unbounded; high means real. Both players minimise, each over its own network: other signs than in the
paper, whose generator maximises (arXiv:1812.10912, section 1). Every loss is a mean over the batch.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_rectify.arguments import check_choice


@dataclass(frozen=True)
class AdversarialLoss:
    """A discriminator's and a generator's loss, both to be minimised.

    Attributes:
        discriminator: of the scores of real images, shape (B,), and of generated ones, shape (B',); a scalar.
        generator: of the scores of generated images, shape (B,); a scalar.
    """

    discriminator: Callable[[Tensor, Tensor], Tensor]
    generator: Callable[[Tensor], Tensor]


def non_saturating_discriminator(real: Tensor, fake: Tensor) -> Tensor:
    r""":math:`E[\mathrm{softplus}(-D(x))] + E[\mathrm{softplus}(D(G(z)))]`; the paper's CNN runs.

    The cross-entropy of Goodfellow et al. 2014 (arXiv:1406.2661) if the logistic function of the score is the
    probability of "real".
    """
    return F.softplus(-real).mean() + F.softplus(fake).mean()


def non_saturating_generator(fake: Tensor) -> Tensor:
    r""":math:`E[\mathrm{softplus}(-D(G(z)))]` (arXiv:1406.2661, section 3: log D is maximised instead)."""
    return F.softplus(-fake).mean()


def hinge_discriminator(real: Tensor, fake: Tensor) -> Tensor:
    r""":math:`E[\max(0, 1 - D(x))] + E[\max(0, 1 + D(G(z)))]` (arXiv:1705.02894); the paper's ResNet runs."""
    return F.relu(1.0 - real).mean() + F.relu(1.0 + fake).mean()


def wasserstein_discriminator(real: Tensor, fake: Tensor) -> Tensor:
    r""":math:`E[D(G(z))] - E[D(x)]` (arXiv:1701.07875), without the constraint on D."""
    return fake.mean() - real.mean()


def wasserstein_generator(fake: Tensor) -> Tensor:
    r""":math:`-E[D(G(z))]` (arXiv:1701.07875); the hinge game's generator has it too."""
    return -fake.mean()


def least_squares_discriminator(real: Tensor, fake: Tensor) -> Tensor:
    r""":math:`(E[(D(x) - 1)^2] + E[D(G(z))^2])/2` (Mao et al. 2017, arXiv:1611.04076, with targets 1 and 0)."""
    return ((real - 1.0).square().mean() + fake.square().mean()) / 2.0


def least_squares_generator(fake: Tensor) -> Tensor:
    r""":math:`E[(D(G(z)) - 1)^2]/2` (arXiv:1611.04076)."""
    return (fake - 1.0).square().mean() / 2.0


#: the games by name; named functions, not lambdas, so that a module that holds one can be pickled
LOSSES: dict[str, AdversarialLoss] = {
    "non_saturating": AdversarialLoss(non_saturating_discriminator, non_saturating_generator),
    "hinge": AdversarialLoss(hinge_discriminator, wasserstein_generator),
    "wasserstein": AdversarialLoss(wasserstein_discriminator, wasserstein_generator),
    "least_squares": AdversarialLoss(least_squares_discriminator, least_squares_generator),
}


def get_loss(name: str) -> AdversarialLoss:
    """The loss of this name.

    Args:
        name: "non_saturating", "hinge", "wasserstein" or "least_squares".

    Raises:
        ValueError: if there is none.

    Example:
        >>> loss = get_loss("hinge")
        >>> loss.discriminator(torch.tensor([0.5]), torch.tensor([0.5])).item(), loss.generator(torch.ones(3)).item()
        (2.0, -1.0)
    """
    check_choice(LOSSES, loss=name)
    return LOSSES[name]


def gradient_penalty(
    discriminator: Callable[[Tensor], Tensor], real: Tensor, fake: Tensor, mix: Tensor, target: float = 1.0
) -> Tensor:
    r"""Mean of (norm of the gradient - target)^2 at points between real and generated images.

    .. math:: E[(\lVert \nabla D(\hat x) \rVert_2 - g)^2], \qquad \hat x = u\, x + (1 - u)\, G(z)

    Gulrajani et al. 2017 (arXiv:1704.00028), equation 3, without its weight (10 there). A gradient of exactly zero
    pushes nowhere: its norm is taken as flat there.

    Args:
        discriminator: images (B, ...) to scores (B,), each score of its own image only (no batch norm).
        real: images x, shape (B, ...); their graph is not followed.
        fake: images G(z), the same shape; their graph is not followed.
        mix: share u of the real image in each point, uniform in [0, 1], shape (B,).
        target: the norm g that costs nothing.

    Returns:
        A scalar; its gradient reaches the discriminator's parameters.

    Raises:
        ValueError: if the shapes do not fit.

    Example:
        >>> critic = lambda images: 1.5 * images.sum(dim=1)  # on four pixels its gradient has norm 3
        >>> gradient_penalty(critic, torch.zeros(2, 4), torch.ones(2, 4), mix=torch.rand(2)).item()
        4.0
    """
    if real.shape != fake.shape:
        raise ValueError(
            f"Expected argument `fake` to be of the shape of `real`, {tuple(real.shape)}, but got {tuple(fake.shape)}."
        )
    if mix.shape != real.shape[:1]:
        raise ValueError(f"Expected argument `mix` to be of shape ({real.shape[0]},) but got {tuple(mix.shape)}.")
    mix = mix.view(-1, *[1] * (real.ndim - 1))
    points = mix * real.detach() + (1.0 - mix) * fake.detach()
    return (_input_gradient(discriminator, points).norm(dim=1) - target).square().mean()


def r1_penalty(discriminator: Callable[[Tensor], Tensor], real: Tensor) -> Tensor:
    r"""Half the mean squared norm of the gradient at real images.

    .. math:: \tfrac12 E[\lVert \nabla D(x) \rVert_2^2]

    Mescheder et al. 2018 (arXiv:1801.04406), equation 9, without its weight gamma.

    Args:
        discriminator: images (B, ...) to scores (B,), each score of its own image only (no batch norm).
        real: images x, shape (B, ...); their graph is not followed.

    Returns:
        A scalar; its gradient reaches the discriminator's parameters.
    """
    return _input_gradient(discriminator, real).square().sum(dim=1).mean() / 2.0


def _input_gradient(discriminator: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """Gradient of each score with respect to its image, flattened, shape (B, P); differentiable."""
    with torch.enable_grad():  # so that a validation step can look at the penalty
        images = images.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(discriminator(images).sum(), images, create_graph=True)
    return gradient.flatten(1)
