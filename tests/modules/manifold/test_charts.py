"""Charts, lifts, covers, gates and partitions: exact geometry, brute force, and bar A8."""

import itertools
import math
import warnings

import numpy as np
import pytest
import torch

from lightning_rectify.modules.manifold.blocks import Indicator
from lightning_rectify.modules.manifold.charts import CoverageWarning, TangentCharts
from lightning_rectify.modules.manifold.gate import SquaredDistance
from lightning_rectify.modules.manifold.graph import ReluGraph
from lightning_rectify.modules.manifold.layered import LayeredNetwork
from lightning_rectify.modules.manifold.manifolds import ParametricManifold, Sphere, Torus
from lightning_rectify.modules.manifold.partitions import BumpPartition, TelescopingPartition
from lightning_rectify.modules.manifold.sampling import farthest_points, local_tangents, nearest_gap, reach_of
from tests.reference import manifold as reference


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def frame(dim, columns, seed=0):
    return torch.linalg.qr(torch.randn(dim, columns, generator=generator(seed), dtype=torch.float64)).Q


def sphere_points(count, dim=2, seed=0):
    x = torch.randn(count, dim + 1, generator=generator(seed), dtype=torch.float64)
    return x / x.norm(dim=1, keepdim=True)


def torus_points(count, seed=0):
    a, b = (torch.rand(2, count, generator=generator(seed), dtype=torch.float64) * 2 * math.pi).unbind()
    return torch.stack([(1 + 0.5 * b.cos()) * a.cos(), (1 + 0.5 * b.cos()) * a.sin(), 0.5 * b.sin()], 1)


def torus_defect(x):
    """How far points are from solving the torus' equation."""
    return ((x[..., :2].norm(dim=-1) - 1) ** 2 + x[..., 2] ** 2 - 0.25).abs()


Q10 = frame(10, 3)
MANIFOLDS = {
    "circle": (Sphere(1), 0.6, lambda x: (x.norm(dim=-1) - 1).abs(), lambda n: sphere_points(n, 1)),
    "sphere": (
        Sphere(2, frame=Q10),
        0.6,
        lambda x: ((x @ Q10).norm(dim=-1) - 1).abs() + (x - x @ Q10 @ Q10.t()).norm(dim=-1),
        lambda n: sphere_points(n) @ Q10.t(),
    ),
    "torus": (Torus(), 0.3, torus_defect, torus_points),
}


@pytest.mark.parametrize("name", MANIFOLDS)
def test_lift_inverts_the_chart(name):
    manifold, radius, defect, _ = MANIFOLDS[name]
    charts = TangentCharts.from_manifold(manifold, radius, 0.7 * radius)
    charts.centers, charts.bases = charts.centers[:4], charts.bases[:4]
    y = torch.rand(4, 50, manifold.dim, generator=generator(), dtype=torch.float64) * 2 - 1
    y = y * radius / y.norm(dim=-1, keepdim=True).clamp(min=1)
    x = manifold.lift(charts.centers, charts.bases, y)
    assert defect(x).max() <= 1e-12
    back = torch.einsum("cmd,cdk->cmk", x - charts.centers[:, None], charts.bases)
    assert (back - y).abs().max() <= 1e-12
    z = charts.coordinates(x[2])[:, 2]
    assert (z - (y[2] / radius + 1) / 2).abs().max() <= 1e-12


def test_derivatives_of_a_newton_lift_are_those_of_the_closed_form():
    """The circle both ways: derivatives up to the third, of which Newton's steps must keep enough."""
    closed = Sphere(1)
    newton = ParametricManifold(lambda u: torch.cat([u.cos(), u.sin()], 1), [(0.0, 2 * math.pi)], reach=1.0)
    center = torch.tensor([[0.6, 0.8]], dtype=torch.float64)
    basis = closed.tangent(center)
    results = []
    for manifold in (closed, newton):
        y = torch.linspace(-0.6, 0.6, 7, dtype=torch.float64).view(1, 7, 1).requires_grad_()
        value, orders = manifold.lift(center, basis, y)[..., 0], []
        for _ in range(3):
            (value,) = torch.autograd.grad(value.sum(), y, create_graph=True)
            orders.append(value.detach())
        results.append(torch.stack(orders))
    torch.testing.assert_close(results[1], results[0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", MANIFOLDS)
def test_tangents_and_fill_distance(name):
    manifold, _, _, draw = MANIFOLDS[name]
    points, fill = manifold.points(0.25)
    fresh = draw(1500)
    assert torch.cdist(fresh, points).amin(1).max() <= fill
    basis = manifold.tangent(fresh[:20])
    eye = torch.eye(manifold.dim, dtype=torch.float64).expand(20, -1, -1)
    torch.testing.assert_close(basis.mT @ basis, eye, rtol=0, atol=1e-12)
    # to second order, a neighbour on the manifold lies in the tangent plane
    y = torch.full((20, 1, manifold.dim), 1e-4, dtype=torch.float64)
    step = manifold.lift(fresh[:20], basis, y)[:, 0] - fresh[:20]
    normal = step - (basis @ (basis.mT @ step[:, :, None]))[:, :, 0]
    assert normal.norm(dim=1).max() <= 1e-8 * 2 / manifold.reach  # |step|^2 / (2 reach), |step| up to 1.5e-4


def test_known_reaches():
    u = torch.linspace(0, 2 * math.pi, 81, dtype=torch.float64)[:-1]
    ellipse = torch.stack([2 * u.cos(), u.sin()], 1)
    tangents = torch.nn.functional.normalize(torch.stack([-2 * u.sin(), u.cos()], 1), dim=1)[:, :, None]
    got = reach_of(ellipse, tangents)
    assert got == pytest.approx(reference.reach(ellipse.numpy(), tangents.numpy()), rel=1e-9)
    assert 0.5 <= got <= 0.51  # the least radius of curvature, b^2/a
    assert ParametricManifold(lambda u: torch.cat([2 * u.cos(), u.sin()], 1), [(0, 2 * math.pi)]).reach >= 0.5


def test_farthest_points_against_the_definition():
    x = torch.rand(120, 3, generator=generator(), dtype=torch.float64)
    assert farthest_points(x, 0.0, most=15).tolist() == reference.farthest_points(x.numpy(), 15)
    chosen = farthest_points(x, 0.3)
    assert torch.cdist(x, x[chosen]).amin(1).max() <= 0.3
    assert torch.pdist(x[chosen]).min() > 0.3


@pytest.mark.parametrize("dim", [3, 300])
def test_local_tangents_are_those_of_the_svd(dim):
    x = sphere_points(1500) @ frame(dim, 3).t()
    x += 0.002 * torch.randn(x.shape, generator=generator(4), dtype=torch.float64) / math.sqrt(dim)
    bases = local_tangents(x, x[:5], 2, 0.3)
    for center, basis in zip(x[:5], bases, strict=True):
        near = x[(x - center).norm(dim=1) <= 0.3]
        _, _, v = np.linalg.svd((near - near.mean(0)).numpy(), full_matrices=False)
        cosines = np.linalg.svd(v[:2] @ basis.numpy())[1]
        assert cosines.min() >= 1 - 1e-10  # the same plane
    exact = Sphere(2, frame=frame(dim, 3)).tangent(x[:5])
    assert torch.linalg.svdvals(exact.mT @ bases).min() >= 0.99


@pytest.mark.parametrize("name", MANIFOLDS)
def test_charts_cover_the_manifold(name):
    manifold, radius, _, draw = MANIFOLDS[name]
    charts = TangentCharts.from_manifold(manifold, radius, 0.7 * radius)
    report = charts.report
    fresh = draw(3000)
    assert charts.coverage(fresh).min() >= 1 - 1e-9  # A8
    assert report.covering_radius + report.fill_distance <= 0.7 * radius + 1e-9
    assert 0.1 < report.injectivity <= 1
    assert (charts.squared_distances(fresh) < radius**2).sum(1).max() <= report.overlap + 2
    ids, z = charts.encode(fresh)
    assert ids.min() >= 0
    assert z.min() >= 0
    assert z.max() <= 1
    expected = (fresh[:, None] - charts.centers).norm(dim=2).argmin(1)
    assert torch.equal(ids, expected)


def test_the_circle_needs_the_fewest_charts():
    charts = TangentCharts.from_manifold(Sphere(1), 0.6, 2 * math.sin(math.pi / 16) + 1e-9)
    assert len(charts) == 8


def test_points_off_the_cover_are_reported():
    """A8: at distance r or more from all centres the coverage is 0, with a warning, and there is no chart."""
    charts = TangentCharts.from_manifold(Sphere(2), 0.6, 0.4)
    edge = charts.centers[:1] * (1 + 0.6 * (1 + 1e-12))
    far = torch.cat([edge, torch.zeros(1, 3).double(), 50 * charts.centers[1:2]])
    with pytest.warns(CoverageWarning, match="3 of 3 points lie in no chart"):
        assert charts.coverage(far).tolist() == [0, 0, 0]
    ids, z = charts.encode(far)
    assert ids.tolist() == [-1, -1, -1]
    assert z.isnan().all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        charts.coverage(far, warn=False)
        charts.coverage(charts.centers)


def test_a_radius_that_folds_charts_is_refused():
    with pytest.raises(ValueError, match=r"`radius` to leave every chart injective but got 1\.8"):
        TangentCharts.from_manifold(Sphere(1), 1.8, 1.0)


@pytest.mark.parametrize("dim", [3, 30, 300])
def test_charts_from_points(dim):
    x = sphere_points(2000) @ frame(dim, 3).t()
    charts = TangentCharts.from_points(x, 2)
    assert charts.report.reach == pytest.approx(1.0, rel=0.15)  # the sphere's, from tangents of a sample
    assert charts.radius == pytest.approx(0.6 * charts.report.reach)
    assert charts.coverage(x).min() >= 1 - 1e-9
    assert charts.report.fill_distance == nearest_gap(x)
    assert charts.report.injectivity > 0.5
    assert charts.coverage(sphere_points(3000, seed=5) @ frame(dim, 3).t()).min() >= 0.9
    assert len(TangentCharts.from_points(x, 2, r=0.4)) > len(charts)


# -- the gate ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["per_chart", "shared"])
@pytest.mark.parametrize("dim", [3, 30])
def test_squared_distance_never_falls_short(form, dim):
    x = sphere_points(400) @ frame(dim, 3).t()
    centers = x[:6]
    block = SquaredDistance(centers, 1.0, 0.6, 4, form)
    exact = (x[:, None] - centers).square().sum(2)
    error = block(x) - exact
    assert error.min() >= -1e-12
    assert error.max() <= block.error
    graph = ReluGraph(dim)
    units = LayeredNetwork(block.on(graph.input()))
    # sums of D numbers of size up to 2B|c|_1
    torch.testing.assert_close(units(x), block(x), rtol=0, atol=1e-12)
    rows, charts = torch.tensor([3, 0, 7]), torch.tensor([5, 0, 2])
    torch.testing.assert_close(block.at(x, rows, charts), block(x)[rows, charts], rtol=0, atol=1e-14)


def test_shared_squares_grow_with_the_dimension_once():
    costs = {}
    for form, dim in itertools.product(("per_chart", "shared"), (50, 100)):
        centers = frame(dim, 8).t()
        costs[form, dim] = (
            LayeredNetwork(SquaredDistance(centers, 1.0, 0.6, 6, form).on(ReluGraph(dim).input())).size().total
        )
    per_chart, shared = (costs[form, 100] - costs[form, 50] for form in ("per_chart", "shared"))
    # counted: 8 charts of 8 m weights a coordinate against 8 m + 7 + one weight a chart
    assert per_chart > 5 * shared
    assert shared / 50 == pytest.approx(8 * 6 + 3 + 4 + 8, abs=3)


@pytest.mark.parametrize("form", ["per_chart", "shared"])
@pytest.mark.parametrize("slope", ["steep", "bounded"])
def test_a_gate_leaks_nothing(form, slope):
    """A8: exactly 0 at distance r and beyond, in floats, units included; 1 where the distance allows for the error."""
    charts = TangentCharts.from_manifold(Sphere(2, frame=Q10), 0.6, 0.4)
    distance = SquaredDistance(charts.centers, 0.7, 0.6, 5, form)
    gate = Indicator(0.4**2, 0.6**2, slope)
    sphere = sphere_points(1000) @ Q10.t()
    # around the manifold and outside the box as well, which has no room to spare here
    x = torch.cat(
        [
            sphere,
            sphere * torch.linspace(0, 3, 1000)[:, None].double(),
            0.3 * torch.randn(1000, 10, generator=generator()).double(),
        ]
    )
    squares = (x[:, None] - charts.centers).square().sum(2)
    inside = (x.abs() <= 0.7).all(1)
    assert 0.2 < inside.double().mean() < 0.9
    values = gate(distance(x))
    assert values[squares >= 0.36].abs().max() == 0.0
    assert (values[inside][squares[inside] <= 0.16 - distance.error] == 1.0).all()
    units = LayeredNetwork(gate.on(distance.on(ReluGraph(10).input())))(x)
    assert units[squares >= 0.36 + 1e-12].abs().max() == 0.0
    torch.testing.assert_close(units, values, rtol=0, atol=1e-11)


# -- partitions --------------------------------------------------------------------------------------------------------


def test_bumps_sum_to_one_and_end_at_their_support():
    charts = TangentCharts.from_manifold(Sphere(2), 0.6, 0.4, cover=0.35)
    x = sphere_points(2000)
    rho = BumpPartition(charts.centers, 0.6)(x)
    assert (rho.sum(1) - 1).abs().max() <= 1e-12
    assert rho[charts.squared_distances(x) >= 0.36].abs().max() == 0.0
    assert rho.min() >= 0
    assert BumpPartition(charts.centers, 0.6)(torch.zeros(1, 3).double()).abs().max() == 0.0


def test_telescoping_maxima():
    gates = torch.rand(500, 9, generator=generator(), dtype=torch.float64) * 1.6 - 0.4
    gates = gates.clamp(0, 1)
    rho = TelescopingPartition()(gates)
    torch.testing.assert_close(rho.sum(1), gates.amax(1), rtol=0, atol=1e-14)
    assert (rho >= 0).all()
    assert (rho <= gates).all()
    assert rho[gates == 0].abs().max() == 0.0
    units = LayeredNetwork(TelescopingPartition().on(ReluGraph(9).input()))
    torch.testing.assert_close(units(gates), rho, rtol=0, atol=1e-14)
    assert units.size().total <= 5 * 9


def test_bad_input():
    circle = TangentCharts.from_manifold(Sphere(1), 0.6, 0.4)
    with pytest.raises(ValueError, match=r"`bases` to be of shape \(\d+, 2, d\) but got \(3, 2, 1\)"):
        TangentCharts(circle.centers, torch.zeros(3, 2, 1), 0.5, 0.3)
    with pytest.raises(ValueError, match=r"`inner_radius` to be in \[0, 0.5\) but got 0.6"):
        TangentCharts(circle.centers, circle.bases, 0.5, 0.6)
    with pytest.raises(ValueError, match=r"`d` to be in \[1, 2\] .* but got 3"):
        TangentCharts.from_points(torch.rand(20, 2), 3)
    with pytest.raises(ValueError, match="`r` to be 'auto' or a positive number but got -1"):
        TangentCharts.from_points(torch.rand(20, 2), 1, r=-1)
    with pytest.raises(ValueError, match="`form` to be 'per_chart' or 'shared' but got 'x'"):
        SquaredDistance(circle.centers, 1.0, 0.6, 3, "x")
    with pytest.raises(ValueError, match="`frame` to have 2 orthonormal columns"):
        Sphere(1, frame=torch.ones(4, 2))
    with pytest.raises(ValueError, match=r"`minor` to be in \(0, major=1.0\) but got 2"):
        Torus(minor=2)
