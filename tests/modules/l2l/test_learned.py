"""The learned attack: its set, its gradients, what it leaves behind, how it is measured."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_rectify._lightning import seed_everything
from lightning_rectify.modules.image_networks import SmallCNN
from lightning_rectify.modules.l2l.attackers import build_attacker
from lightning_rectify.modules.l2l.learned import learned_attack, scale_gradient

EPSILON = 0.1


@pytest.fixture
def game():
    """Classifier, attacker, images (some pixels black or white) and labels, in float64."""
    seed_everything(0, verbose=False)
    classifier, attacker = (
        SmallCNN(4, width=4).double(),
        build_attacker("strided", 1, warm_start=True, width=4).double(),
    )
    images = (1.4 * torch.rand(6, 1, 8, 8, dtype=torch.float64) - 0.2).clamp(0, 1)
    return classifier, attacker, images, torch.arange(6) % 4


# -- the size of gradients ---------------------------------------------------------------------------------------------


def test_sample_std_is_each_samples_own_and_batch_max_is_not():
    gradient = torch.randn(5, 3, 4, 4, dtype=torch.float64) * torch.logspace(-8, 2, 5).view(5, 1, 1, 1)
    each = torch.stack([g / math.sqrt(((g - g.mean()) ** 2).mean()) for g in gradient])
    # 1e-12: float64, divided twice.
    assert torch.allclose(scale_gradient(gradient), each, rtol=1e-12)
    assert torch.equal(scale_gradient(gradient)[1:3], scale_gradient(gradient[1:3]))
    assert torch.allclose(scale_gradient(gradient, "batch_max"), gradient / gradient.abs().max(), rtol=1e-12)


@pytest.mark.parametrize("how", ["sample_std", "batch_max"])
def test_scaling_keeps_zeros_zero_tiny_gradients_alive_and_nan_nan(how):
    gradient = torch.zeros(3, 1, 4, 4)
    assert torch.equal(scale_gradient(gradient, how), gradient)
    gradient[1] = 1e-30 * torch.randn(1, 4, 4)  # its squares are 0 in float32
    scaled = scale_gradient(gradient, how)
    assert torch.isfinite(scaled).all()
    assert scaled[1].abs().max() >= 1
    assert torch.equal(scaled[0], gradient[0])
    assert torch.isfinite(scale_gradient(torch.full((1, 1, 2, 2), 3.0), how)).all()  # it has no deviation
    gradient[2, 0, 0, 0] = math.nan
    assert scale_gradient(gradient, how)[2].isnan().any()


def test_unknown_scale_is_named():
    with pytest.raises(ValueError, match=r"`how`.*'sample_std' or 'batch_max'.*got 'std'"):
        scale_gradient(torch.ones(1, 1, 2, 2), "std")


# -- the attack --------------------------------------------------------------------------------------------------------


def rewrite(attacker, classifier, images, labels, steps, bptt, gradient=True):
    """The attack as one would write it for one image set, with the classifier in evaluation mode already."""
    low, high = (images - EPSILON).clamp(min=0), (images + EPSILON).clamp(max=1)
    x = images
    for _ in range(steps):
        if not bptt:
            x = x.detach()
        parts = [x]
        if gradient:
            leaf = x.detach().clone().requires_grad_()
            (g,) = torch.autograd.grad(F.cross_entropy(classifier(leaf), labels, reduction="sum"), leaf)
            parts.append(torch.stack([one / one.std(correction=0) for one in g]))
        x = x + EPSILON * torch.tanh(attacker(torch.cat(parts, dim=1)))
        x = torch.minimum(torch.maximum(x, low), high)
    return x


@pytest.mark.parametrize(("steps", "bptt"), [(1, True), (2, True), (2, False), (4, True)])
def test_attack_is_the_plain_rewrite_and_so_is_its_gradient(game, steps, bptt):
    classifier, attacker, images, labels = game
    classifier.eval()
    ours = learned_attack(attacker, classifier, images, labels, EPSILON, steps=steps, bptt=bptt).images
    theirs = rewrite(attacker, classifier, images, labels, steps, bptt)
    # 1e-12: float64, sums in another order; epsilon is rounded towards the image.
    assert torch.allclose(ours, theirs, atol=1e-12)
    parameters = list(attacker.parameters())
    gradients = [torch.autograd.grad(F.cross_entropy(classifier(x), labels), parameters) for x in (ours, theirs)]
    for a, b in zip(*gradients, strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-12)


def test_bptt_changes_the_gradient_and_not_the_attack(game):
    classifier, attacker, images, labels = game
    attacked = [
        learned_attack(attacker, classifier, images, labels, EPSILON, steps=2, bptt=b).images for b in (False, True)
    ]
    assert torch.equal(*attacked)
    first, second = (torch.autograd.grad(x.sin().sum(), attacker.head.weight)[0] for x in attacked)
    assert (first - second).abs().max() > 1e-6


@pytest.mark.parametrize("start", [0.0, 1.0])
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("epsilon", [0.1, 0.031, 8 / 255, 1.0])
def test_perturbation_never_leaves_ball_and_bounds(epsilon, steps, start):
    seed_everything(1, verbose=False)
    classifier, attacker = SmallCNN(4, width=4), build_attacker("strided", 3, warm_start=True, gain=50.0)
    classifier.features[0] = nn.Conv2d(3, 4, 3, padding=1)
    images, labels = (1.4 * torch.rand(9, 3, 8, 8) - 0.2).clamp(0, 1), torch.arange(9) % 4
    attacked = learned_attack(
        attacker, classifier, images, labels, epsilon, steps=steps, random_start=start,
        generator=torch.Generator().manual_seed(0),
    ).images  # fmt: skip
    assert attacked.min() >= 0
    assert attacked.max() <= 1
    distance = (attacked.double() - images.double()).abs().max().item()  # float32 numbers, exactly
    assert 0.9 * epsilon < distance <= epsilon


def test_naive_attacker_sees_no_label_and_no_gradient(game):
    classifier, _, images, labels = game
    attacker = build_attacker("strided", 1, gradient=False, width=4).double().eval()
    seen = []
    classifier.register_forward_hook(lambda *_: seen.append(1))
    perturbed = learned_attack(attacker, classifier, images, labels, EPSILON, gradient=False)
    assert seen == []
    assert perturbed.gradient is None
    other = learned_attack(attacker, classifier, images, labels.flip(0), EPSILON, gradient=False)
    assert torch.equal(perturbed.images, other.images)


def test_zero_gradient_makes_no_nan(game):
    _, attacker, images, labels = game

    class Certain(nn.Module):
        def forward(self, x):
            nothing = 0 * x.sum((1, 2, 3))
            return torch.stack([nothing + 200, nothing - 200], dim=1)

    perturbed = learned_attack(attacker, Certain(), images, 0 * labels, EPSILON)
    assert torch.equal(perturbed.gradient, torch.zeros_like(images))
    assert torch.isfinite(perturbed.images).all()
    perturbed.images.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in attacker.parameters())


def test_attack_bn_train_counts_the_clean_images_and_eval_does_not(game):
    classifier, attacker, images, labels = game
    before = {name: value.clone() for name, value in classifier.named_buffers()}
    learned_attack(attacker, classifier, images, labels, EPSILON)
    assert all(torch.equal(value, before[name]) for name, value in classifier.named_buffers())
    assert classifier.training
    learned_attack(attacker, classifier, images, labels, EPSILON, attack_bn="train")
    norm = classifier.features[1]
    pixels = classifier.features[0](images)
    assert torch.allclose(norm.running_mean, 0.1 * pixels.mean((0, 2, 3)))


def test_an_attacker_of_the_wrong_shape_is_named(game):
    classifier, _, images, labels = game
    with pytest.raises(ValueError, match=r"`attacker`.*\(6, 2, 8, 8\) to \(6, 1, 8, 8\).*got \(6, 2, 8, 8\)"):
        learned_attack(nn.Identity(), classifier, images, labels, EPSILON)
