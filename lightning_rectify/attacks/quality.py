"""How good an attack is, without asking the model."""

from typing import NamedTuple

import torch
from torch import Tensor


class Quality(NamedTuple):
    """How good an attack is on each of N images, without asking the model.

    Attributes:
        agreement: share of the pixels moved in the direction of the gradient's sign, among those where the gradient is
            not zero and the bounds leave room in that direction; 1 for FGSM, 0 where there is no such pixel. (N,).
        saturation: share of the pixels that are as far from the image as l-infinity ball and bounds allow; 1 for FGSM,
            where the gradient is not zero. (N,).
    """

    agreement: Tensor
    saturation: Tensor


@torch.no_grad()
def attack_quality(
    images: Tensor, adversarial: Tensor, gradient: Tensor, epsilon: float, bounds: tuple[float, float] = (0.0, 1.0)
) -> Quality:
    """Agreement with the gradient's sign, and saturation, of an attack.

    Args:
        images: shape (N, C, H, W).
        adversarial: shape (N, C, H, W).
        gradient: of the loss at ``images``, shape (N, C, H, W).
        epsilon: radius of the ball in pixel units.
        bounds: least and largest pixel value.

    Returns:
        Shares in [0, 1], float, two times shape (N,).
    """
    low, high = ((images + way).clamp(*bounds) for way in (-epsilon, epsilon))
    moved = adversarial - images
    room = torch.where(gradient > 0, high > images, low < images) & (gradient != 0)
    agrees = ((moved.sign() == gradient.sign()) & room).flatten(1).sum(dim=1)
    near = 0.01 * epsilon  # tanh never is 1
    edge = ((high - adversarial <= near) & (moved >= 0)) | ((adversarial - low <= near) & (moved <= 0))
    return Quality(agrees / room.flatten(1).sum(dim=1).clamp_min(1), edge.flatten(1).float().mean(dim=1))
