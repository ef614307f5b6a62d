"""Losses against plain rewrites; counts of passes against the table they come from."""

import math

import pytest
import torch
from torch.nn import functional as F

from lightning_rectify._lightning import seed_everything
from lightning_rectify.modules.image_networks import SmallCNN
from lightning_rectify.modules.l2l.costs import count_passes
from lightning_rectify.modules.l2l.losses import divergence, robust_cross_entropy, trades_attack, trades_loss


@pytest.fixture
def logits():
    generator = torch.Generator().manual_seed(0)
    return [3 * torch.randn(7, 4, dtype=torch.float64, generator=generator).requires_grad_() for _ in range(2)]


def kl(p, q):
    """Of one sample, by the definition."""
    p, q = ([math.exp(z) / sum(map(math.exp, row)) for z in row] for row in (p.tolist(), q.tolist()))
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def test_divergence_is_its_definition_and_not_nan_at_extremes(logits):
    clean, adversarial = (value.detach() for value in logits)
    expected = [kl(a, b) for a, b in zip(clean, adversarial, strict=True)]
    assert divergence(clean, adversarial).tolist() == pytest.approx(expected, rel=1e-12)
    far = torch.tensor([[400.0, -400.0]], requires_grad=True)
    value = divergence(far, torch.tensor([[-400.0, 400.0]]))
    value.sum().backward()
    assert value.item() == pytest.approx(800.0)
    assert torch.isfinite(far.grad).all()


def test_trades_is_the_plain_rewrite_with_its_gradients(logits):
    clean, adversarial = logits
    labels = torch.arange(7) % 4
    loss = trades_loss(adversarial, clean, labels, beta=6.0)
    p, q = clean.softmax(1), adversarial.softmax(1)
    expected = -(p[range(7), labels].log().mean()) + 6 * (p * (p.log() - q.log())).sum(1).mean()
    # 1e-12: float64 of another order.
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    ours, theirs = (torch.autograd.grad(value, [clean, adversarial]) for value in (loss, expected))
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a, b, atol=1e-12)


def test_clean_weight_mixes(logits):
    clean, adversarial = logits
    labels = torch.arange(7) % 4
    a, b = F.cross_entropy(adversarial, labels).item(), F.cross_entropy(clean, labels).item()
    assert robust_cross_entropy(adversarial, labels, clean, 0.25).item() == pytest.approx(0.75 * a + 0.25 * b)
    assert robust_cross_entropy(adversarial, labels).item() == a


def test_trades_attack_is_pgd_on_the_divergence():
    seed_everything(0, verbose=False)
    classifier = SmallCNN(4, width=4).double()
    for norm in (m for m in classifier.modules() if isinstance(m, torch.nn.BatchNorm2d)):
        norm.running_mean.normal_()
    images, labels = torch.rand(6, 1, 8, 8, dtype=torch.float64), torch.arange(6) % 4
    attacked = trades_attack(
        classifier, images, labels, 0.1, steps=3, step_size=0.04, generator=torch.Generator().manual_seed(3)
    )
    assert classifier.training
    classifier.eval()
    noise = torch.randn(images.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    x, target = (images + 0.001 * noise).clamp(0, 1), classifier(images).softmax(1).detach()
    for _ in range(3):
        x = x.detach().requires_grad_()
        q = classifier(x).log_softmax(1)
        (gradient,) = torch.autograd.grad((target * (target.log() - q)).sum(), x)
        x = torch.min(torch.max(x + 0.04 * gradient.sign(), images - 0.1), images + 0.1).clamp(0, 1)
    # 1e-12: epsilon is rounded towards the image; a sign that flipped would be 0.08 away.
    assert torch.allclose(attacked, x.detach(), atol=1e-12)
    with torch.no_grad():
        start = divergence(classifier(images), classifier((images + 0.001 * noise).clamp(0, 1))).mean()
        assert divergence(classifier(images), classifier(attacked)).mean() > 10 * start


@pytest.mark.parametrize(
    ("attack", "options", "classifier", "attacker"),
    [
        # In forward passes of the classifier and of the attacker; PGD-10 is 23 and 0.
        ("none", {"gradients": 0}, 3, 0),
        ("fgsm", {"gradients": 1}, 5, 0),
        ("pgd", {"gradients": 10}, 23, 0),
        ("pgd", {"gradients": 10, "clean": True}, 26, 0),
        ("trades", {"gradients": 10, "clean": True}, 27, 0),
        ("l2l", {"gradients": 0, "applications": 1}, 3, 3),
        ("l2l", {"gradients": 1, "applications": 1}, 5, 3),
        ("l2l", {"gradients": 2, "applications": 2}, 7, 6),
        ("l2l", {"gradients": 1, "applications": 1, "joint": False}, 9, 4),
        ("l2l", {"gradients": 2, "applications": 2, "joint": False}, 13, 8),
        ("l2l", {"gradients": 1, "applications": 1, "joint": False, "attacker_turns": 2}, 13, 7),
    ],
)
def test_passes_of_a_training_step(attack, options, classifier, attacker):
    passes = count_passes(attack, attacker_ratio=0.25, **options)
    assert passes.attacker_forward + 2 * passes.attacker_backward == attacker
    assert passes.cost == classifier + 0.25 * attacker
    assert passes.against_pgd(10) == pytest.approx(passes.cost / 23)
