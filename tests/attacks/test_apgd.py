"""APGD against algorithm 1 written out for one image, and what it promises."""

import pytest
import torch

from lightning_rectify.attacks import apgd, correct, input_gradient
from lightning_rectify.attacks.apgd import checkpoints
from lightning_rectify.attacks.ball import Ball
from lightning_rectify.attacks.losses import difference_of_logits_ratio, targeted_difference_of_logits_ratio
from tests.attacks.models import batch, excess, generator, smooth
from tests.reference import attacks as reference


@pytest.mark.parametrize("steps", [1, 2, 3, 5, 7, 10, 20, 33, 50, 100, 101, 400, 1000])
def test_checkpoints(steps):
    assert checkpoints(steps) == sorted(reference.checkpoints(steps))
    assert all(1 <= mark <= steps for mark in checkpoints(steps))


@pytest.mark.parametrize("loss", ["ce", "margin"])
@pytest.mark.parametrize(("norm", "epsilon"), [("linf", 0.1), ("l2", 0.4)])
@pytest.mark.parametrize("steps", [1, 10, 60])
def test_equals_algorithm_1(steps, norm, epsilon, loss):
    model = smooth(scale=4.0)
    images, labels = batch(5)
    found = apgd(model, images, labels, epsilon, steps=steps, norm=norm, loss=loss, generator=generator(2))
    start = Ball.around(images, epsilon, norm, (0.0, 1.0)).start(1.0, generator(2))
    for image, label, begin, ours in zip(images, labels, start, found, strict=True):
        theirs = reference.apgd(model, image, label, epsilon, steps, norm, loss, begin)
        # float64 rounding, which 60 steps of a smooth model multiply; another branch would differ by 1e-3
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)


def test_equals_algorithm_1_where_it_oscillates():
    """A rough model and a ball of half the range: each of the numbers of steps that may raise the loss occurs."""
    model = smooth(scale=15.0)
    images, labels = batch(12)
    found = apgd(model, images, labels, 0.5, steps=30, loss="margin", generator=generator(2))
    start = Ball.around(images, 0.5, "linf", (0.0, 1.0)).start(1.0, generator(2))
    for image, label, begin, ours in zip(images, labels, start, found, strict=True):
        theirs = reference.apgd(model, image, label, 0.5, 30, "linf", "margin", begin)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)  # as above


@pytest.mark.parametrize("loss", ["ce", "margin", "dlr"])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_never_worse_than_its_start(norm, loss):
    for seed in range(6):
        model = smooth(seed=seed, scale=6.0)
        images, labels = batch(20, seed=seed)
        start = Ball.around(images, 0.05, norm, (0.0, 1.0)).start(1.0, generator(seed))
        found = apgd(model, images, labels, 0.05, steps=4, norm=norm, loss=loss, generator=generator(seed))
        assert excess(images, found, 0.05, norm) <= 1e-14  # the test's own float64 norm is rounded
        broken, before = ~correct(model, found, labels), ~correct(model, start, labels)
        assert not (before & ~broken).any()
        gain = input_gradient(model, found, labels, loss)[1] - input_gradient(model, start, labels, loss)[1]
        # a first misclassified point is taken whatever its loss
        assert (gain[before == broken] >= -1e-12).all()
        assert (gain[before == broken] > 0).any()


def test_several_runs_are_never_worse_than_one():
    model = smooth(scale=6.0)
    images, _ = batch(60)
    labels = model(images).argmax(1)
    for loss in ("ce", "dlr"):
        one = apgd(model, images, labels, 0.05, steps=5, loss=loss, generator=generator())
        more = apgd(model, images, labels, 0.05, steps=5, loss=loss, restarts=3, generator=generator())
        assert not (correct(model, more, labels) & ~correct(model, one, labels)).any()
    one = apgd(model, images, labels, 0.05, steps=5, loss="dlr_targeted", targets=1, generator=generator())
    more = apgd(model, images, labels, 0.05, steps=5, loss="dlr_targeted", generator=generator())
    assert not (correct(model, more, labels) & ~correct(model, one, labels)).any()


def test_targeted_runs_reach_each_class_in_turn():
    """Two runs are two single ones towards the likeliest and the second likeliest class."""
    model, epsilon, steps = smooth(classes=5, scale=4.0), 0.02, 30
    images, _ = batch(12)
    logits = model(images).detach()
    ranking = logits.argsort(1, descending=True)
    labels = ranking[:, 0]
    found = apgd(model, images, labels, epsilon, steps=steps, loss="dlr_targeted", targets=2, generator=generator())
    starts = generator()
    runs = []
    for rank in (1, 2):
        goal = ranking[:, rank]
        state = generator()
        state.set_state(starts.get_state())
        Ball.around(images, epsilon, "linf", (0.0, 1.0)).start(1.0, starts)  # the next run draws after this one
        runs.append(
            apgd(model, images, labels, epsilon, steps=steps, generator=state,
                 loss=lambda z, y, goal=goal: targeted_difference_of_logits_ratio(z, y, goal))
        )  # fmt: skip
    broken = [~correct(model, run, labels) for run in runs]
    assert torch.equal(~correct(model, found, labels), broken[0] | broken[1])
    assert torch.allclose(found[broken[0]], runs[0][broken[0]], rtol=0, atol=1e-9)
    second = ~broken[0] & broken[1]
    assert torch.allclose(found[second], runs[1][second], rtol=0, atol=1e-9)


def test_the_losses_by_hand():
    logits = torch.tensor([[4.0, 1.0, 3.0, -2.0], [0.0, 5.0, 1.0, 2.0]])
    labels, goals = torch.tensor([0, 2]), torch.tensor([3, 0])
    # -(4 - 3) / (4 - 1) and -(1 - 5) / (5 - 1)
    torch.testing.assert_close(difference_of_logits_ratio(logits, labels), torch.tensor([-1 / 3, 1.0]))
    # -(4 + 2) / (4 - (1 - 2) / 2) and -(1 - 0) / (5 - (1 + 0) / 2)
    expected = torch.tensor([-6 / 4.5, -1 / 4.5])
    torch.testing.assert_close(targeted_difference_of_logits_ratio(logits, labels, goals), expected)
    moved = 3.0 * logits + 7.0  # neither shift nor scale changes them
    torch.testing.assert_close(difference_of_logits_ratio(moved, labels), torch.tensor([-1 / 3, 1.0]))
    torch.testing.assert_close(targeted_difference_of_logits_ratio(moved, labels, goals), expected)
    equal = torch.zeros(2, 4)
    assert difference_of_logits_ratio(equal, labels).isfinite().all()
    assert targeted_difference_of_logits_ratio(equal, labels, goals).isfinite().all()
