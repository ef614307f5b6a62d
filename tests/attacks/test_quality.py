"""How good an attack is, image by image."""

import pytest
import torch
from torch import nn

from lightning_rectify.attacks import fgsm, input_gradient
from lightning_rectify.attacks.quality import attack_quality

EPSILON = 0.1


def test_fgsm_agrees_everywhere_and_is_saturated():
    torch.manual_seed(0)
    model, images, labels = nn.Sequential(nn.Flatten(), nn.Linear(64, 5)), torch.rand(6, 1, 8, 8), torch.arange(6) % 5
    gradient, _, _ = input_gradient(model, images, labels)
    quality = attack_quality(images, fgsm(model, images, labels, EPSILON), gradient, EPSILON)
    assert torch.equal(quality.agreement, torch.ones(6))
    assert torch.equal(quality.saturation, torch.ones(6))


def test_by_hand_and_image_by_image():
    image = torch.tensor([0.0, 0.0, 0.5, 0.5, 0.5]).view(1, 1, 1, 5)
    gradient = torch.tensor([-1.0, 1.0, 1.0, -1.0, 0.0]).view(1, 1, 1, 5)
    # black and pushed down: no room; up, all the way; up, half; up against the gradient, all the way; not moved.
    attacked = image + torch.tensor([0.0, 0.1, 0.05, 0.1, 0.0]).view(1, 1, 1, 5)
    quality = attack_quality(
        torch.cat([image, image]), torch.cat([attacked, image]), torch.cat([gradient, 0 * gradient]), EPSILON
    )
    assert quality.agreement.tolist() == pytest.approx([2 / 3, 0])
    assert quality.saturation.tolist() == pytest.approx([3 / 5, 2 / 5])  # a black pixel is where it can be, twice
