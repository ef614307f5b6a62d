"""Balls and bounds: invariants over random draws, and exact limits."""

import math

import pytest
import torch

from lightning_rectify.attacks.ball import Ball
from tests.attacks.models import excess, generator

CASES = [(norm, dtype) for norm in ("linf", "l2") for dtype in (torch.float32, torch.float64)]


def draw(seed, dtype, bounds=(0.0, 1.0)):
    """Images with many pixels on the bounds, points well outside, a radius of any size."""
    g = generator(seed)
    low, high = bounds
    images = (low + (high - low) * (torch.rand(5, 3, 4, 4, generator=g, dtype=dtype) * 1.6 - 0.3)).clamp(low, high)
    points = images + torch.randn(images.shape, generator=g, dtype=dtype) * (high - low)
    epsilon = 10.0 ** -(3 * torch.rand(1, generator=g).item()) * (high - low) * 0.9
    return images, points, epsilon


@pytest.mark.parametrize(("norm", "dtype"), CASES)
@pytest.mark.parametrize("bounds", [(0.0, 1.0), (-1.0, 1.0), (0.0, 255.0)])
def test_projection(norm, dtype, bounds):
    for seed in range(40):
        images, points, epsilon = draw(seed, dtype, bounds)
        ball = Ball.around(images, epsilon, norm, bounds)
        inside = ball.project(points)
        # In float64 the norm itself is rounded; in float32 the test is exact.
        assert excess(images, inside, epsilon, norm) <= (1e-15 * 300 if dtype == torch.float64 else 0.0)
        assert inside.min() >= bounds[0]
        assert inside.max() <= bounds[1]
        assert torch.equal(ball.project(inside), inside)  # what is inside is not moved by a bit
        nearer = (inside - images).abs() <= (points - images).abs() + 1e-12
        assert nearer.all()
        assert ((inside - images) * (points - images) >= 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_linf_projection_is_the_nearest_point(dtype):
    images, points, epsilon = draw(0, dtype)
    ball = Ball.around(images, epsilon, "linf", (0.0, 1.0))
    expected = points.double().clamp(images.double() - epsilon, images.double() + epsilon).clamp(0, 1)
    # one unit in the last place of numbers up to 1
    torch.testing.assert_close(ball.project(points).double(), expected, rtol=0, atol=torch.finfo(dtype).eps)


def test_l2_projection_is_the_nearest_point_of_the_ball():
    images, points, _ = draw(0, torch.float64)
    points[0] = images[0] + 0.01  # inside
    ball = Ball.around(images, 0.7, "l2", (-50.0, 50.0))  # no bound is near
    offset = points - images
    expected = images + offset * (0.7 / offset.flatten(1).norm(dim=1)).clamp(max=1)[:, None, None, None]
    # a few units in the last place are kept back
    torch.testing.assert_close(ball.project(points), expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_a_radius_of_zero_is_the_image(norm):
    images, points, _ = draw(3, torch.float32)
    ball = Ball.around(images, 0.0, norm, (0.0, 1.0))
    assert torch.equal(ball.project(points), images)
    assert torch.equal(ball.start(1.0, generator()), images)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_ascend_without_a_gradient_stays(norm):
    images, points, _ = draw(4, torch.float32)
    ball = Ball.around(images, 0.3, norm, (0.0, 1.0))
    assert torch.equal(ball.ascend(points, torch.zeros_like(points), 0.1), points)
    assert torch.equal(ball.ascend(points, torch.full_like(points, math.nan), 0.1), points)


def test_l2_step_has_its_length_also_for_gradients_whose_squares_underflow():
    images, _, _ = draw(5, torch.float32)
    ball = Ball.around(images, 1.0, "l2", (0.0, 1.0))
    gradient = torch.randn(images.shape, generator=generator()) * 1e-30  # squares: 1e-60, below float32
    step = ball.ascend(images, gradient, 0.25) - images
    # float32 rounding of 48 pixels near 1
    torch.testing.assert_close(step.flatten(1).norm(dim=1), torch.full((5,), 0.25), rtol=1e-5, atol=0)


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_starts_are_uniform(share):
    """In linf each pixel is uniform; in l2 the radius to the power of the dimension is."""
    images = torch.full((4000, 1, 2, 2), 0.5)
    # Kolmogorov's distance of 4,000 samples is below .04 with probability 1 - 5e-6.
    grid = torch.linspace(0, 1, 101)
    cube = Ball.around(images, 0.2, "linf", (0.0, 1.0)).start(share, generator()) - images
    for pixel in (cube / (0.2 * share)).flatten(1).T:
        assert (((pixel + 1) / 2)[:, None] <= grid).float().mean(0).sub(grid).abs().max() < 0.04
    offset = (Ball.around(images, 0.2, "l2", (0.0, 1.0)).start(share, generator()) - images).flatten(1)
    radius = (offset.norm(dim=1) / (0.2 * share)) ** 4
    assert (radius[:, None] <= grid).float().mean(0).sub(grid).abs().max() < 0.04
    # each coordinate of a uniform direction in four dimensions has mean 0 and variance 1/4 (standard error .0035)
    assert (offset / offset.norm(dim=1, keepdim=True)).square().mean(0).sub(0.25).abs().max() < 0.02


def test_a_part_of_the_balls():
    images, points, epsilon = draw(6, torch.float32)
    for norm in ("linf", "l2"):
        ball, index = Ball.around(images, epsilon, norm, (0.0, 1.0)), torch.tensor([3, 1])
        assert torch.equal(ball.select(index).project(points[index]), ball.project(points)[index])
