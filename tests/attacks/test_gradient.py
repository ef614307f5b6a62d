"""FGSM and PGD against closed forms and a plain loop."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_rectify.attacks import apgd, correct, fgsm, input_gradient, pgd
from tests.attacks.models import Linear, batch, excess, generator, smooth
from tests.reference import attacks as reference

HALF = 0.5 * torch.ones(3, 1, 3, 4, dtype=torch.float64)  # no bound is near
LABELS = torch.tensor([0, 1, 0])


def worst_of_linear(model, labels, epsilon, norm):
    """Images of the largest loss of a linear model of two classes in a ball: along w_wrong - w_right."""
    way = model.weight.detach()[1 - labels] - model.weight.detach()[labels]
    if norm == "linf":
        return HALF + epsilon * way.sign()
    return HALF + epsilon * way / way.flatten(1).norm(dim=1)[:, None, None, None]


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("loss", ["ce", "margin"])
@pytest.mark.parametrize(
    "attack",
    [
        fgsm,
        lambda *args, **kw: pgd(*args, steps=20, random_start=0.0, **kw),
        lambda *args, **kw: pgd(*args, steps=20, step_size=0.1, restarts=2, **kw),
        lambda *args, **kw: apgd(*args, steps=40, **kw),
    ],
    ids=["fgsm", "pgd", "pgd with restarts", "apgd"],
)
def test_linear_worst_case(attack, loss, norm):
    model, epsilon = Linear(), 0.2
    found = attack(model, HALF, LABELS, epsilon, loss=loss, norm=norm)
    expected = worst_of_linear(model, LABELS, epsilon, norm)
    if norm == "linf":  # a corner: exact but for the limits, which are rounded inwards
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-15)
    value, best = (input_gradient(model, images, LABELS, loss)[1] for images in (found, expected))
    # l2: from a random start each of 20 steps of half the radius leaves 1/1.5 of the angle to the worst point, whose
    # square the loss lacks; APGD halves its step on the way
    torch.testing.assert_close(value, best, rtol=1e-12 if norm == "linf" else 1e-5, atol=0)


def test_pgd_walks_along_the_sphere_to_the_pole():
    model = Linear()
    found = pgd(model, HALF, LABELS, 0.2, steps=400, step_size=0.02, norm="l2")
    expected = worst_of_linear(model, LABELS, 0.2, "l2")
    # a step of .02 turns the point by a tenth of what is left of the angle
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("loss", ["ce", "margin"])
@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize(("steps", "step_size"), [(1, None), (7, 0.02), (10, None)])
def test_pgd_equals_the_plain_loop(steps, step_size, norm, loss):
    model = smooth()
    images, labels = batch()
    found = pgd(model, images, labels, 0.1, steps=steps, step_size=step_size, random_start=0.0, norm=norm, loss=loss)
    size = 0.25 / steps if step_size is None else step_size  # 2.5 epsilon / steps
    for image, label, ours in zip(images, labels, found, strict=True):
        theirs = reference.pgd(model, image, label, 0.1, steps, size, norm, loss)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-13)  # float64 rounding


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_fgsm_with_random_start_is_wong_et_al(norm):
    model = smooth()
    images, labels = batch()
    found = fgsm(model, images, labels, 0.1, step_size=0.125, random_start=1.0, norm=norm, generator=generator(5))
    start = pgd(Zero(), images, labels, 0.1, steps=1, norm=norm, generator=generator(5))  # a start and no more
    assert not torch.equal(start, images)
    for image, label, begin, ours in zip(images, labels, start, found, strict=True):
        theirs = reference.pgd(model, image, label, 0.1, 1, 0.125, norm, start=begin)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-13)  # float64 rounding


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("restarts", [1, 3])
def test_pgd_starts_where_it_is_told(norm, restarts):
    model = smooth()
    images, labels = batch()
    outside = images + torch.randn(images.shape, generator=generator(7), dtype=images.dtype)
    inside = pgd(Zero(), images, labels, 0.1, steps=1, norm=norm, start=outside)
    length = (inside - images).abs().amax((1, 2, 3)) if norm == "linf" else (inside - images).flatten(1).norm(dim=1)
    assert (length <= 0.1).all()
    assert (length > 0.05).all()
    assert ((inside >= 0) & (inside <= 1)).all()
    options = {"steps": 3, "step_size": 0.02, "norm": norm}
    found = pgd(model, images, labels, 0.1, start=outside, restarts=restarts, **options)
    for image, label, begin, ours in zip(images, labels, inside, found, strict=True):
        theirs = reference.pgd(model, image, label, 0.1, 3, 0.02, norm, start=begin)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-13)  # float64 rounding


class Zero(nn.Module):
    """Logits that depend on the images with gradient 0."""

    def forward(self, images):
        return images.flatten(1)[:, :4] * 0.0


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("attack", [fgsm, pgd, apgd])
def test_no_gradient_no_step(attack, norm):
    images, labels = batch(dtype=torch.float32)
    found = attack(Zero(), images, labels, 0.1, norm=norm)
    assert found.isfinite().all()
    assert excess(images, found, 0.1, norm) <= 0
    if attack is fgsm:
        assert torch.equal(found, images)


def objective(model, images, labels, loss):
    """What restarts are compared by: misclassified before not, then the loss."""
    value = input_gradient(model, images, labels, loss)[1]
    return (~correct(model, images, labels)).double() * 1e6 + value


@pytest.mark.parametrize("loss", ["ce", "margin"])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_restarts_are_never_worse_than_one(norm, loss):
    model = smooth(scale=6.0)
    images, _ = batch(40)
    labels = model(images).argmax(1)
    gained = 0
    for seed in range(4):
        several, one = (
            pgd(model, images, labels, 0.08, steps=3, restarts=restarts, norm=norm, loss=loss,
                generator=generator(seed))
            for restarts in (4, 1)
        )  # fmt: skip
        difference = objective(model, several, labels, loss) - objective(model, one, labels, loss)
        assert difference.min() >= -1e-12  # batches of other sizes round differently
        gained += (difference > 0).sum().item()
    assert gained > 0


def test_a_broken_sample_is_spared_but_a_loss_of_ones_own_sees_whole_batches():
    model, sizes = smooth(), []
    images, labels = batch(8)
    labels = model(images).argmax(1)
    labels[:4] = (labels[:4] + 1) % 4  # wrong from the start

    def watched(images):
        sizes.append(len(images))
        return model(images)

    pgd(watched, images, labels, 0.01, steps=1, restarts=2)
    assert sizes[0] == 8
    assert sizes[-1] == 4
    sizes.clear()
    clean = model(images).detach()
    pgd(watched, images, labels, 0.01, steps=1, restarts=2, loss=lambda z, y: (z - clean).square().sum(1))
    assert set(sizes) == {8}


def test_a_loss_of_ones_own_is_climbed():
    def cross_entropy(logits, labels):
        return F.cross_entropy(logits, labels, reduction="none")

    model = smooth()
    images, labels = batch()
    own = pgd(model, images, labels, 0.1, random_start=0.0, loss=cross_entropy)
    assert torch.equal(own, pgd(model, images, labels, 0.1, random_start=0.0))


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("attack", [fgsm, lambda *a, **k: pgd(*a, random_start=0.0, **k)], ids=["fgsm", "pgd"])
def test_samples_do_not_see_each_other(attack, norm):
    model = smooth()
    images, labels = batch(7)
    whole = attack(model, images, labels, 0.1, norm=norm)
    halves = zip(images.split(3), labels.split(3), strict=True)
    parts = torch.cat([attack(model, x, y, 0.1, norm=norm) for x, y in halves])
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-12)  # matrix products of other sizes round differently


@pytest.mark.parametrize("attack", [lambda *a, **k: fgsm(*a, random_start=1.0, **k), pgd, apgd])
def test_a_generator_decides(attack):
    model = smooth(scale=6.0)
    images, labels = batch()
    first, again, other = (attack(model, images, labels, 0.1, generator=generator(seed)) for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    torch.manual_seed(3)
    default = attack(model, images, labels, 0.1)
    torch.manual_seed(3)
    assert torch.equal(default, attack(model, images, labels, 0.1))


def test_pixels_in_other_units():
    """A model of pixels in [0, 255] is attacked as the same model of pixels in [0, 1]."""
    model = smooth()
    images, labels = batch()
    unit = pgd(model, images, labels, 0.1, random_start=0.0)
    bytes_ = pgd(lambda x: model(x / 255), images * 255, labels, 25.5, random_start=0.0, bounds=(0.0, 255.0))
    torch.testing.assert_close(bytes_ / 255, unit, rtol=0, atol=1e-13)  # float64 rounding


def test_nothing_to_attack():
    model = smooth()
    images, labels = batch()
    for attack in (fgsm, pgd, apgd):
        assert torch.equal(attack(model, images, labels, 0.0), images)
        assert attack(model, images[:0], labels[:0], 0.1).shape == (0, 2, 4, 4)
