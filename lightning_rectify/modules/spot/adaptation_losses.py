"""What domain adaptation minimises, how it varies images, and what it can know of a target without labels."""

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

Adversarial = Literal["wasserstein", "logistic"]


def critic_loss(kind: Adversarial, real: Tensor, fake: Tensor) -> Tensor:
    r"""What a critic minimises, given its scores (B,) of real and generated images (high is real).

    "wasserstein": :math:`E f(G) - E f(Y)`, of a critic whose slope is held down (:func:`slope_penalty`). "logistic":
    cross-entropy of telling the two apart, as in the authors' code of arXiv:1905.00158 for domain adaptation; its value
    is no transport cost, nor is its game the paper's (measured on Gaussians: 72 % below the cost).
    """
    if kind == "wasserstein":
        return fake.mean() - real.mean()
    return F.softplus(-real).mean() + F.softplus(fake).mean()


def fooling_loss(kind: Adversarial, fake: Tensor) -> Tensor:
    """What a generator minimises, given its critic's scores (B,): their negative mean, or the non-saturating one."""
    return -fake.mean() if kind == "wasserstein" else F.softplus(-fake).mean()


def slope_penalty(
    kind: Adversarial, critic: Callable[[Tensor], Tensor], real: Tensor, fake: Tensor, mix: Tensor | None = None
) -> Tensor:
    r"""The penalty on a critic's gradient that goes with its loss, without its weight.

    "wasserstein": :math:`E \max(0, \lVert \nabla f \rVert - 1)^2` between real and generated images, at u real +
    (1 - u) generated (one-sided, arXiv:1709.08894; weight 10). "logistic": :math:`\tfrac12 E \lVert \nabla f \rVert^2`
    at real images (R1, arXiv:1801.04406). The authors of arXiv:1905.00158 have neither.

    Args:
        kind: of the loss.
        critic: images (B, ...) to scores (B,), each of its own image only.
        real: (B, ...).
        fake: (B, ...).
        mix: u in [0, 1], (B,); needed by "wasserstein".
    """
    points = real.detach()
    if kind == "wasserstein":
        assert mix is not None
        share = mix.view(-1, *[1] * (real.ndim - 1))
        points = share * points + (1.0 - share) * fake.detach()
    points = points.clone().requires_grad_()
    with torch.enable_grad():
        (slope,) = torch.autograd.grad(critic(points).sum(), points, create_graph=True)
    squares = slope.flatten(1).square().sum(dim=1)
    if kind == "logistic":
        return 0.5 * squares.mean()
    return ((squares + 1e-12).sqrt() - 1.0).clamp_min(0.0).square().mean()  # the root's slope at 0 is infinite


def confident_loss(logits: Tensor, teacher: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """Cross-entropy with a teacher's own most probable classes, where it is sure of them; the others count as 0.

    In the authors' code of arXiv:1905.00158 (MNIST to MNIST-M, weight 1, threshold 0.95) for *generated* target images,
    the teacher's view being that of the paired source image; here for real target images.

    Args:
        logits: (B, K).
        teacher: logits of the same images, not followed by gradients, (B, K).
        threshold: probability from which a class is taken, in (0, 1].

    Returns:
        The loss, and the share of images taken.
    """
    sure, classes = teacher.detach().softmax(dim=1).max(dim=1)
    taken = (sure >= threshold).to(logits.dtype)
    return (F.cross_entropy(logits, classes, reduction="none") * taken).mean(), taken.mean()


def vary(images: Tensor, numbers: Tensor, strength: float) -> Tensor:
    """Each image under a small affine change of coordinates of its own (bilinear, black outside).

    Turned by up to 15 degrees, zoomed by 0.7 to 1.25, stretched by up to 20 %, sheared by up to 0.2 and shifted by up
    to a twentieth of the side, all uniform, times ``strength``.

    Args:
        images: (B, C, S, S).
        numbers: uniform in [-1, 1], (B, 6).
        strength: at least 0; 0 returns the images as they are.
    """
    if strength == 0:
        return images
    turn, zoom, stretch, shear, right, down = (strength * numbers.to(images)).unbind(dim=1)
    angle = turn * math.radians(15.0)
    out = torch.exp(0.29 * zoom + 0.06)  # coordinates times this: e^0.35 = 1 / 0.7, e^-0.23 = 1 / 1.25
    tall = out * torch.exp(0.18 * stretch)
    rows = [
        torch.stack([out * angle.cos(), out * (0.2 * shear - angle.sin()), 0.1 * right], dim=1),
        torch.stack([tall * angle.sin(), tall * angle.cos(), 0.1 * down], dim=1),
    ]
    grid = F.affine_grid(torch.stack(rows, dim=1), list(images.shape), False)
    return F.grid_sample(images, grid, align_corners=False)


def neighbourhood_density(logits: Tensor, temperature: float = 0.05) -> float:
    r"""Soft neighbourhood density, a score of a classifier on a target without labels: high is good.

    .. math:: -\frac1N \sum_i \sum_{j \ne i} p_{ij} \log p_{ij}, \qquad
        p_{ij} \propto e^{\langle f_i, f_j \rangle / \tau}, \quad f = \mathrm{softmax} / \lVert \mathrm{softmax} \rVert

    Saito et al. 2021 (arXiv:2108.10860), equations 1 to 3: how evenly an image has neighbours among the others'
    predictions; clusters that fall apart score low. It is at most log(N - 1), grows with N, and is fooled by a
    classifier that says one class for all: read it beside the entropy of the mean prediction.

    Args:
        logits: of target images, (N, K), N at least 2.
        temperature: above 0; 0.05 as there.

    Raises:
        ValueError: for fewer than 2 images.

    Example:
        >>> round(neighbourhood_density(torch.zeros(5, 3)), 4)  # log 4: all look alike
        1.3863
    """
    if len(logits) < 2:
        raise ValueError(f"Expected argument `logits` to be of at least 2 images but got {len(logits)}.")
    features = F.normalize(logits.double().softmax(dim=1), dim=1)
    near = features @ features.T / temperature
    near.fill_diagonal_(float("-inf"))
    logs = near.log_softmax(dim=1)
    return -(logs.exp() * logs.clamp_min(-1e9)).sum(dim=1).mean().item()


def mean_entropy(logits: Tensor) -> float:
    """Mean entropy of predictions, in nats, of logits (N, K): low where a classifier is sure."""
    logs = logits.double().log_softmax(dim=1)
    return -(logs.exp() * logs).sum(dim=1).mean().item()


def entropy_of_mean(logits: Tensor) -> float:
    """Entropy of the mean prediction, in nats, of logits (N, K): log K if all classes are as frequent, 0 for one."""
    mean = logits.double().softmax(dim=1).mean(dim=0)
    return -torch.special.xlogy(mean, mean).sum().item()
