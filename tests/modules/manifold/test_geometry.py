"""Reach, gaps, radii and injectivity against closed forms and brute force."""

import math

import numpy as np
import pytest
import torch

from lightning_rectify.modules.manifold.charts import TangentCharts
from lightning_rectify.modules.manifold.geometry import (
    bottleneck,
    covering_radius,
    distances_to,
    fill_distance,
    injectivity,
    nearest_neighbors,
    reach,
)
from lightning_rectify.modules.manifold.manifolds import Sphere, Torus
from lightning_rectify.modules.manifold.sampling import estimated_reach, nearest_gap


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def circle(count, radius=1.0):
    angle = torch.arange(count, dtype=torch.float64) * (2 * math.pi / count)
    around = torch.stack([angle.cos(), angle.sin()], 1)
    return radius * around, torch.stack([-around[:, 1], around[:, 0]], 1)[:, :, None]


def two_lines(gap, count=81):
    along = torch.linspace(0, 4, count, dtype=torch.float64)
    points = torch.cat([torch.stack([along, torch.full_like(along, height)], 1) for height in (0.0, gap)])
    return points, torch.tensor([[1.0], [0.0]]).double().expand(2 * count, 2, 1)


# -- reach -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("radius", [0.5, 1.0, 3.0])
def test_the_reach_of_a_circle_is_its_radius(radius):
    points, tangents = circle(100, radius)
    # every pair gives R exactly: rounding only, the nearest pair loses six digits in its normal part
    assert reach(points, tangents) == pytest.approx(radius, rel=1e-9)


@pytest.mark.parametrize("dim", [2, 3])
def test_the_reach_of_a_sphere_is_its_radius(dim):
    x = torch.randn(150, dim + 1, generator=generator(), dtype=torch.float64)
    sphere = Sphere(dim, radius=2.0)
    x = 2.0 * x / x.norm(dim=1, keepdim=True)
    assert reach(x, sphere.tangent(x)) == pytest.approx(2.0, rel=1e-9)  # as above


@pytest.mark.parametrize(("major", "minor"), [(1.0, 0.3), (1.0, 0.7)])
def test_the_reach_of_a_torus(major, minor):
    """min(r, R - r): the tube's radius, or half the hole's width, of which the second is a bottleneck."""
    torus = Torus(major=major, minor=minor)
    points, _ = torus.points(0.2)
    tangents = torus.tangent(points)
    found = reach(points, tangents)
    # never below the reach; the grid misses the hole's rim by half a cell of 0.1, (1 - cos 0.07) of the tube's radius
    assert torus.reach * (1 - 1e-9) <= found <= 1.04 * torus.reach
    gap = bottleneck(points, tangents, apart=0.4)
    assert gap == pytest.approx(torus.reach, rel=0.04)


@pytest.mark.parametrize("gap", [0.2, 1.0])
def test_the_reach_of_two_parallel_lines_is_half_their_distance(gap):
    points, tangents = two_lines(gap)
    assert reach(points, tangents) == pytest.approx(gap / 2, rel=1e-12)
    assert bottleneck(points, tangents) == pytest.approx(gap / 2, rel=1e-12)


def test_curvature_is_no_bottleneck():
    """An ellipse: its reach is b²/a, its narrowest gap 2b."""
    u = torch.arange(200, dtype=torch.float64) * (2 * math.pi / 200)
    points = torch.stack([2 * u.cos(), u.sin()], 1)
    tangents = torch.nn.functional.normalize(torch.stack([-2 * u.sin(), u.cos()], 1), dim=1)[:, :, None]
    assert reach(points, tangents) == pytest.approx(0.5, rel=0.01)  # from above, by the spacing at the tip
    assert bottleneck(points, tangents, angle=0.05) == pytest.approx(1.0, rel=0.01)
    assert bottleneck(points[:30], tangents[:30], angle=0.05) == math.inf


def test_the_reach_without_tangents():
    x = torch.randn(1500, 3, generator=generator(), dtype=torch.float64)
    x = x / x.norm(dim=1, keepdim=True)
    assert reach(x, d=2, quantile=0.05) == estimated_reach(x, 2, 0.05) == pytest.approx(1.0, rel=0.15)
    line = torch.linspace(0, 1, 40, dtype=torch.float64)[:, None] * torch.ones(1, 3)
    flat = torch.full((40, 3, 1), 1 / math.sqrt(3), dtype=torch.float64)
    assert reach(line, flat) > 1e6  # rounding alone leaves the line


# -- neighbours and radii ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [2, 200])
def test_neighbors_against_brute_force(dim):
    x = torch.rand(120, dim, generator=generator(), dtype=torch.float64) + 100.0
    x[1] = x[0] + 1e-9 * torch.ones(dim)  # far closer than the rounding of |x|² tells
    distances, indices = nearest_neighbors(x, 7, most=500)
    table = np.sqrt(((x.numpy()[:, None] - x.numpy()) ** 2).sum(2))
    np.fill_diagonal(table, np.inf)
    order = np.argsort(table, 1, kind="stable")[:, :7]
    np.testing.assert_array_equal(indices.numpy(), order)
    # centring rounds each coordinate, of size 100, in its 14th digit
    np.testing.assert_allclose(distances.numpy(), np.take_along_axis(table, order, 1), rtol=0, atol=1e-12)
    some, _ = nearest_neighbors(x, 7, torch.tensor([5, 1]))
    # blocks of another size add in another order
    torch.testing.assert_close(some, distances[[5, 1]], rtol=0, atol=1e-12)


def test_equal_points_are_neighbors_at_distance_zero():
    distances, indices = nearest_neighbors(torch.tensor([[0.0, 1.0], [0.0, 1.0], [3.0, 1.0]]), 1)
    assert distances.flatten().tolist() == pytest.approx([0.0, 0.0, 3.0], abs=1e-6)
    assert indices[:2].flatten().tolist() == [1, 0]


def test_radii_on_the_circle():
    """n points of the unit circle leave the middles of their arcs at a chord of half an arc."""
    centers, _ = circle(12)
    dense, _ = circle(12 * 64)
    exact = 2 * math.sin(math.pi / 12 / 2)
    assert covering_radius(dense, centers) == pytest.approx(exact, rel=1e-9)  # a grid point is each middle
    assert covering_radius(dense, centers, most=40) == pytest.approx(exact, rel=1e-9)  # blocks round otherwise
    assert fill_distance(centers, dense) == covering_radius(dense, centers)
    bound = fill_distance(centers, Sphere(1))
    assert (
        exact <= bound <= 1.25 * exact + 1e-9
    )  # a grid four times as fine adds half of its spacing, a quarter of exact
    assert fill_distance(centers) == nearest_gap(centers) == pytest.approx(2 * math.sin(math.pi / 12))
    assert distances_to(dense, centers).min() <= 1e-7  # the centres are among them, by products


# -- injectivity -------------------------------------------------------------------------------------------------------


def test_injectivity_on_an_arc():
    """Two points at angles a, b from the centre: ratio |sin a - sin b| / chord = cos((a + b)/2), least at the rim."""
    points, _ = circle(4000)
    center, basis = points[:1], torch.tensor([[[0.0], [1.0]]]).double()
    for r in (0.3, 1.2):
        charts = TangentCharts(center, basis, r, 0.5 * r)
        rim = 2 * math.asin(r / 2)
        # the two points next to the rim lie within two spacings of it
        got = injectivity(points, charts, most=100_000).item()
        assert math.cos(rim) <= got <= math.cos(rim - 2 * 2 * math.pi / 4000)


def test_a_chart_beyond_a_right_angle_folds():
    points, _ = circle(400)
    charts = TangentCharts(points[:1], torch.tensor([[[0.0], [1.0]]]).double(), 1.8, 0.5)
    assert injectivity(points, charts).item() <= 0.02  # half a spacing of the grid
    assert injectivity(points[200:201], charts).item() == 1.0  # no pair


def test_injectivity_is_what_the_charts_report():
    sphere = Sphere(2)
    charts = TangentCharts.from_manifold(sphere, 0.5, 0.4)
    points, _ = sphere.points(0.4 * 0.2)
    ours = injectivity(points, charts, apart=0.25).min().item()
    # the report looks at 300 points of a chart at most, so it can only be higher
    assert ours <= charts.report.injectivity * (1 + 1e-12) <= 1.05 * ours


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, t: reach(x), "`tangents` or `d` to be given, not both, but got d=None"),
        (lambda x, t: reach(x, t, d=1), "`tangents` or `d` to be given, not both, but got d=1"),
        (lambda x, t: reach(x, d=0), "`d` to be at least 1 but got 0"),
        (lambda x, t: reach(x, t, quantile=1.0), r"`quantile` to be in \[0, 1\) but got 1.0"),
        (lambda x, t: reach(x, t[:3]), r"`tangents` to be of shape \(20, 2, d\) but got \(3, 2, 1\)"),
        (lambda x, t: bottleneck(x, t, angle=1.5), r"`angle` to be in \(0, 1\) but got 1.5"),
        (lambda x, t: covering_radius(x, x[:, :1]), r"`centers` to be of shape \(C, 2\) but got \(20, 1\)"),
        (lambda x, t: covering_radius(x.long(), x), "`points` to be float points of shape"),
        (lambda x, t: covering_radius(x * math.nan, x), "`points` to be finite but got 40 that are not"),
        (lambda x, t: nearest_neighbors(x, 20), "`k` to be less than the 20 points but got 20"),
        (lambda x, t: nearest_neighbors(x, 0), "`k` to be at least 1 but got 0"),
        (
            lambda x, t: injectivity(x[:, :1], TangentCharts(x[:1], t[:1], 0.5, 0.3)),
            r"`points` to be of shape \(N, 2\)",
        ),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call(*circle(20))
