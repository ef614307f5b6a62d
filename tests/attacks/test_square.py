"""Square Attack: forward passes only, inside the set, and as good as brute force where that can be run."""

import itertools
import math

import pytest
import torch
from torch import nn

from lightning_rectify.attacks import correct, square
from lightning_rectify.attacks.ball import Ball
from lightning_rectify.attacks.losses import margin
from lightning_rectify.attacks.square import _grid, _pyramids, _windows, area
from tests.attacks.models import Linear, batch, excess, generator, smooth
from tests.reference import attacks as reference


class NoBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values):
        return values.clone()

    @staticmethod
    def backward(ctx, gradient):
        raise AssertionError("a backward pass")


class Counting(nn.Module):
    """A model that cannot be differentiated, and counts the images that it sees."""

    def __init__(self, net):
        super().__init__()
        self.net, self.seen, self.calls = net, 0, 0

    def forward(self, images):
        assert not torch.is_grad_enabled()
        self.seen, self.calls = self.seen + len(images), self.calls + 1
        return NoBackward.apply(self.net(images))


@pytest.mark.parametrize(("norm", "epsilon"), [("linf", 0.1), ("l2", 0.7)])
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 5, 7), (2, 1, 1), (1, 2, 9)])
def test_forward_only_and_inside(norm, epsilon, shape):
    images, _ = batch(9, shape=shape, low=-0.3, high=1.3, dtype=torch.float32)
    images = images.clamp(0, 1)  # many pixels on the bounds
    model = Counting(smooth(shape=shape, scale=2.0).float())
    with torch.no_grad():
        labels = model(images).argmax(1)
    labels[0] = (labels[0] + 1) % 4
    model.seen = model.calls = 0
    found = square(model, images, labels, epsilon, queries=60, norm=norm, generator=generator())
    assert excess(images, found, epsilon, norm) <= 0
    assert found.min() >= 0
    assert found.max() <= 1
    assert torch.equal(found[0], images[0])  # wrong as it is
    assert model.calls <= 61
    assert model.seen <= 9 + 8 * 60
    again = square(model, images, labels, epsilon, queries=60, norm=norm, generator=generator())
    assert torch.equal(found, again)
    assert not torch.equal(found[1:], images[1:])


def corners(images, epsilon):
    """All images with each pixel at + or - epsilon, shape (2^d, N, C, H, W)."""
    size = images[0].numel()
    signs = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=size)), dtype=images.dtype)
    return (images + epsilon * signs.view(-1, 1, *images.shape[1:])).clamp(0, 1)


def test_finds_the_best_corner_of_a_linear_model():
    model = Linear(classes=3, shape=(1, 2, 3))
    images, _ = batch(8, shape=(1, 2, 3))
    labels = model(images).argmax(1)
    epsilon = 0.02
    values = torch.stack([margin(model(tried), labels) for tried in corners(images, epsilon)])
    robust = values.amax(0) < 0
    assert robust.sum() >= 3  # those are searched to the end
    found = square(model, images, labels, epsilon, queries=400, generator=generator())
    best = margin(model(found), labels)
    torch.testing.assert_close(best[robust], values.amax(0)[robust], rtol=0, atol=1e-14)  # float64 rounding


def test_breaks_what_stripes_break():
    """Brute force over all images whose columns are at + or - epsilon."""
    shape, epsilon = (1, 3, 4), 0.3
    model = smooth(shape=shape, scale=2.0)
    images, _ = batch(40, shape=shape)
    labels = model(images).argmax(1)
    signs = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=shape[2])), dtype=images.dtype)
    tried = (images + epsilon * signs.view(-1, 1, 1, 1, shape[2])).clamp(0, 1)
    broken = torch.stack([model(images).argmax(1) != labels for images in tried]).any(0)
    found = ~correct(model, square(model, images, labels, epsilon, queries=500, generator=generator()), labels)
    assert broken.any()
    assert not broken.all()
    assert not (broken & ~found).any()


def test_more_queries_are_never_worse():
    model = smooth(scale=2.0)
    images, _ = batch(20)
    labels = model(images).argmax(1)
    for norm, epsilon in (("linf", 0.03), ("l2", 0.1)):
        values = []
        for queries in (1, 5, 40, 200):
            # the schedule of the same length, so that a longer search begins with the shorter one
            found = square(model, images, labels, epsilon, queries=queries, norm=norm, rescale=False,
                           generator=generator())  # fmt: skip
            values.append(margin(model(found), labels))
        gains = torch.stack(values).diff(dim=0)
        robust = values[-1] < 0  # the draws depend on how many are left: compare the means
        assert robust.any()
        assert (gains.mean(1) > 0).all()


def test_schedule():
    halved = {10: 1, 50: 2, 200: 3, 500: 4, 1000: 5, 2000: 6, 4000: 7, 6000: 8, 8000: 9}
    for after, times in halved.items():
        assert area(after, 10_000, 0.8) == 0.8 / 2 ** (times - 1)
        assert area(after + 1, 10_000, 0.8) == 0.8 / 2**times
        assert area((after + 1) // 10 + 1, 1000, 0.8) <= 0.8 / 2**times  # ten times faster
    assert area(0, 1, 0.3) == 0.3


@pytest.mark.parametrize("side", [1, 2, 3, 4, 5, 8, 11])
def test_pyramids(side):
    shape = _pyramids(side, torch.zeros((), dtype=torch.float64))
    left = side // 2
    expected = torch.cat([reference.pyramid(side, left), -reference.pyramid(side, side - left)], 1)
    torch.testing.assert_close(shape, expected, rtol=1e-14, atol=0)


@pytest.mark.parametrize("shape", [(3, 9, 9), (1, 6, 11), (2, 3, 3)])
def test_l2_uses_all_of_epsilon(shape):
    """Away from the bounds a start has norm epsilon, and so has what each query makes of it (algorithm 3)."""
    images = torch.zeros(6, *shape, dtype=torch.float64)
    ball = Ball.around(images, 0.5, "l2", (-9.0, 9.0))
    g = generator()
    points = _grid(ball, g)
    for query in range(30):
        # float64 rounding of sums of squares, and the few units that the projection keeps back
        torch.testing.assert_close(points.flatten(1).norm(dim=1), torch.full((6,), 0.5).double(), rtol=1e-12, atol=0)
        points = _windows(ball, points, 0.5 / (1 + query), g)


def test_l2_query_changes_two_windows():
    images = torch.zeros(50, 1, 12, 12, dtype=torch.float64)
    ball = Ball.around(images, 0.5, "l2", (-9.0, 9.0))
    start = _grid(ball, generator())
    changed = (_windows(ball, start, 9 / 144, generator(1)) != start).flatten(1).sum(1)
    assert changed.max() <= 2 * 9
    assert changed.float().mean() > 9


def test_an_own_p_init_changes_the_search():
    model = smooth(scale=2.0)
    images, _ = batch(20)
    labels = model(images).argmax(1)
    one, other = (
        square(model, images, labels, 0.03, queries=5, p_init=p, rescale=False, generator=generator())
        for p in (0.8, 1 / 16)
    )
    assert not torch.equal(one, other)
    assert math.isclose(area(4, 5, 1 / 16), 1 / 16 / 2**8)
