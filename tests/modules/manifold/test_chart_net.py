"""The whole construction: bars A2 to A6 and A8 on the circle, and that it works on sphere, torus, curve and points."""

import itertools
import math

import numpy as np
import pytest
import torch

from lightning_rectify.modules.manifold.chart_net import ChartNet
from lightning_rectify.modules.manifold.charts import TangentCharts
from lightning_rectify.modules.manifold.fitting import ChartFunction, moved
from lightning_rectify.modules.manifold.local import multi_indices
from lightning_rectify.modules.manifold.manifolds import ParametricManifold, Sphere, Torus
from lightning_rectify.modules.manifold.partitions import BumpPartition
from lightning_rectify.modules.manifold.recipes import RECIPES
from tests.reference import manifold as reference

MODES = list(RECIPES)
#: with few charts, as the literal radius .24 needs 32 of them
PAPER = {"paper": {"radius": 0.8, "cover": 0.57}}


def frame(dim, columns):
    g = torch.Generator().manual_seed(0)
    return torch.linalg.qr(torch.randn(dim, columns, generator=g, dtype=torch.float64)).Q


class Circle:
    """The fact sheet's target on a circle in R^D, and points everywhere, those between the grid's too."""

    def __init__(self, dim, count=6001):
        self.frame = frame(dim, 2)
        self.manifold = Sphere(1, frame=self.frame)
        angle = torch.linspace(0, 2 * math.pi, count, dtype=torch.float64)
        self.points = torch.stack([angle.cos(), angle.sin()], 1) @ self.frame.t()

    def f(self, x):
        u, v = (x @ self.frame).unbind(1)
        return ((3 * u).sin() + u * v + 0.3 * (4 * v).cos()) / 1.6

    def build(self, mode, **kwargs):
        return ChartNet.from_manifold(self.manifold, self.f, mode=mode, **{**PAPER.get(mode, {}), **kwargs})

    @torch.no_grad()
    def error(self, net):
        return (net(self.points) - self.f(self.points)).abs().max().item()


def sphere_points(count, dim=3, seed=1):
    x = torch.randn(count, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x / x.norm(dim=1, keepdim=True) @ frame(dim, 3).t()


def sphere_f(x):
    u = x @ frame(x.shape[1], 3)
    return ((2 * u[:, 0]).sin() * (0.5 * u[:, 2]).exp() + u[:, 1] * u[:, 2]) / 1.6


# -- A2: dispatch, units and counts ------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_dispatch_is_the_network(mode):
    """On the manifold, around it, far from it and at the centres."""
    circle = Circle(5, 301)
    net = circle.build(mode, grid=6)
    network = net.to_layered()
    g = torch.Generator().manual_seed(0)
    noise = torch.randn(circle.points.shape, generator=g, dtype=torch.float64)
    x = torch.cat([circle.points, circle.points + 0.3 * noise, 3 * circle.points, net.charts.centers])
    with torch.no_grad():
        torch.testing.assert_close(network(x)[:, 0], net(x), rtol=0, atol=1e-10)
        dense = network.to_sequential()
        torch.testing.assert_close(dense(x)[:, 0], net(x), rtol=0, atol=1e-10)
        unpruned = net.to_layered(prune=False)
        torch.testing.assert_close(unpruned(x)[:, 0], net(x), rtol=0, atol=1e-10)
    arrays = [(m.weight.detach().numpy(), m.bias.detach().numpy()) for m in dense if hasattr(m, "weight")]
    size = network.size("layered")
    assert (size.total, size.largest) == reference.dense_counts(arrays)
    report = net.report()
    assert report.layered == size
    assert report.dag == network.size()
    # the parts are the whole but for the pairing and, where it is in the network, the partition
    assert report.local + report.distance + report.projection < report.dag.total <= size.total
    with torch.no_grad():
        single = net.float()(circle.points.float())
        assert (single - network(circle.points)[:, 0]).abs().max() <= 5e-6  # A2, float32


@pytest.mark.parametrize("mode", ["paper", "telescope_p1"])
def test_dispatch_is_the_network_on_the_sphere(mode):
    more = {"radius": 0.8, "levels": 4, "pairing_levels": 4} if mode == "paper" else {}
    net = ChartNet.from_manifold(Sphere(2, frame=frame(4, 3)), sphere_f, grid=2, mode=mode, **more)
    x = sphere_points(100, 4)
    with torch.no_grad():
        torch.testing.assert_close(net.to_layered()(x)[:, 0], net(x), rtol=0, atol=1e-10)


def test_an_architecture_that_does_not_depend_on_f():
    """prune=False: two functions, the same units."""
    circle = Circle(3)
    nets = [
        ChartNet.from_manifold(
            circle.manifold, f, grid=4, mode="paper", radius=0.8, levels=5, pairing_levels=5, shell=0.1
        )
        for f in (circle.f, lambda x: (2 * x[:, 0]).exp())
    ]
    sizes = [net.to_layered(prune=False).size() for net in nets]
    assert (sizes[0].units, sizes[0].depth, sizes[0].width) == (sizes[1].units, sizes[1].depth, sizes[1].width)


def test_the_network_is_exported():
    circle = Circle(3, 50)
    net = circle.build("telescope_p1", grid=4)
    dynamic = ({0: torch.export.Dim("batch", min=2)},)
    program = torch.export.export(net.to_layered(), (circle.points[:3],), dynamic_shapes=dynamic)
    # sums in another order
    torch.testing.assert_close(program.module()(circle.points)[:, 0], net(circle.points).detach(), rtol=0, atol=1e-12)


# -- A3: the ambient dimension -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["paper", "telescope_p1"])
def test_the_error_does_not_see_the_ambient_dimension(mode):
    errors, parts, dims = [], [], (3, 10, 100, 300)
    for dim in dims:
        circle = Circle(dim, 2001)
        more = {"shell": 0.05, "levels": 9, "pairing_levels": 9} if mode == "paper" else {"pairing_levels": 9}
        net = circle.build(mode, grid=12, distance_levels=10, **more)
        errors.append(circle.error(net))
        report = net.report()
        parts.append(report.distance + report.projection)
    assert max(errors) <= 1.05 * min(errors)
    fit = np.polyfit(dims, parts, 1)
    residual = np.polyval(fit, dims) - parts
    assert 1 - (residual**2).sum() / np.var(parts) / len(dims) > 0.999


# -- A4: rates ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "grids", "low", "high", "weights"),
    [
        ("paper", (16, 32, 64), -3.6, -2.6, (-3.2, -2.3)),
        ("lean", (16, 32, 64), -3.6, -2.6, (-3.2, -2.3)),
        ("telescope", (8, 16, 32), -3.6, -2.6, (-3.2, -2.3)),
        ("p1", (64, 128, 256), -2.3, -1.7, (-2.3, -1.7)),
        ("telescope_p1", (32, 64, 128), -2.3, -1.7, (-2.3, -1.7)),
    ],
)
def test_the_error_falls_at_the_rate_of_the_theorem(mode, grids, low, high, weights):
    circle = Circle(3)
    nets = [circle.build(mode, grid=grid) for grid in grids]
    errors = np.log([circle.error(net) for net in nets])
    slope = np.polyfit(np.log(grids), errors, 1)[0]
    assert low <= slope <= high
    local = np.polyfit(np.log([net.report().local for net in nets]), errors, 1)[0]
    assert weights[0] <= local <= weights[1]


# -- A5: what it costs -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dim", "mode", "grid", "error", "weights"),
    [
        (30, "telescope_p1", 26, 2e-3, 5e3),
        (30, "telescope_p1", 160, 5e-5, 1.2e4),
        (3, "paper", 24, 1e-3, 1.2e5),
    ],
)
def test_error_and_weights(dim, mode, grid, error, weights):
    circle = Circle(dim)
    net = circle.build(mode, grid=grid)
    assert circle.error(net) <= error
    assert net.report().dag.total <= weights


# -- A6: the guarantee -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("budget", "loose"), [("charts", 300), ("overlap", 30)])
def test_the_guarantee_holds(mode, budget, loose):
    circle = Circle(30, 4001)
    weights = []
    for eps in (0.3, 0.1, 0.03, 0.01, 0.003):
        net = ChartNet.from_manifold(circle.manifold, circle.f, eps, mode=mode, budget=budget)
        guarantee, error = net.guarantee, circle.error(net)
        assert error <= guarantee.bound <= eps * (1 + 1e-12)
        assert eps <= loose * error
        assert guarantee.count == (len(net.charts) if budget == "charts" else guarantee.count) <= len(net.charts)
        weights.append(net.local.grid)
    assert weights == sorted(weights)
    if mode == "paper":
        assert net.charts.radius < circle.manifold.reach / 4  # the theorem's own condition


def test_the_terms_of_the_guarantee_are_the_proofs():
    """Delta, nu and the levels of the distances, from the formulas of the paper."""
    circle = Circle(30)
    net = ChartNet.from_manifold(circle.manifold, circle.f, 0.01, mode="paper")
    r, count, guarantee = net.charts.radius, len(net.charts), net.guarantee
    c = guarantee.gradient / (2 * r)
    delta = r * (1 - r) * 0.01 / (3 * c * (math.pi + 1) * count)
    nu = delta / (16 * net.distance.bound**2 * 30)
    assert net.distance.square.square.levels == math.ceil(math.log2(1 / nu) / 2) - 1
    assert guarantee.shell == pytest.approx(0.01 / 3)
    assert net.gate.high == pytest.approx(r**2 - net.distance.error)
    assert net.gate.low >= r**2 - delta + net.distance.error
    assert net.distance.form == "per_chart"
    assert net.gate.slope == "bounded"
    assert net.pairing.product.form == net.local.product.form == "three_squares"


# -- A8: the gate ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_off_the_charts_the_value_is_zero(mode):
    circle = Circle(6)
    net = circle.build(mode, grid=5)
    far = torch.cat([1.9 * circle.points[::100], 0 * circle.points[:1]])
    far = far[(net.charts.squared_distances(far) >= net.charts.radius**2).all(1)]
    assert len(far) > 20
    assert net(far).abs().max() == 0.0
    assert net.to_layered()(far).abs().max() <= 1e-12  # a cancelling shift of size 1
    assert net.coverage(far, warn=False).max() == 0.0
    assert net.coverage(circle.points).min() >= 1 - 1e-9


# -- other manifolds ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "grid", "bound"), [("telescope_p1", 12, 0.011), ("telescope", 5, 0.02), ("p1", 10, 0.1)]
)
def test_sphere(mode, grid, bound):
    net = ChartNet.from_manifold(Sphere(2, frame=frame(30, 3)), sphere_f, grid=grid, mode=mode)
    x = sphere_points(3000, 30)
    with torch.no_grad():
        assert (net(x) - sphere_f(x)).abs().max() <= bound
    assert net.coverage(x).min() >= 1 - 1e-9


def test_the_sphere_in_300_dimensions_takes_less_than_5e4_weights():
    """1e-2 in the sup norm: few wide charts, hats of 4 weights, one unit a waiting value."""
    net = ChartNet.from_manifold(Sphere(2, frame=frame(300, 3)), sphere_f, grid=16, radius=0.8, cover=0.92)
    x = sphere_points(4000, 300)
    with torch.no_grad():
        assert (net(x) - sphere_f(x)).abs().max() <= 1e-2
    assert net.to_layered().size().total <= 5e4


def test_degree_2_on_the_sphere_in_30_dimensions():
    """A5: 1e-3 with at most 1.3e6 weights; one product a cell keeps it below."""
    net = ChartNet.from_manifold(Sphere(2, frame=frame(30, 3)), sphere_f, grid=8, mode="telescope")
    x = sphere_points(4000, 30)
    with torch.no_grad():
        assert (net(x) - sphere_f(x)).abs().max() <= 1e-3
    assert net.to_layered().size().total <= 1.3e6


def test_torus():
    f = lambda x: (2 * x[:, 0]).sin() * x[:, 2] + x[:, 1]  # noqa: E731
    net = ChartNet.from_manifold(Torus(), f, grid=6, cover=0.8)
    a, b = (torch.rand(2, 2000, generator=torch.Generator().manual_seed(3), dtype=torch.float64) * 2 * math.pi).unbind()
    x = torch.stack([(1 + 0.5 * b.cos()) * a.cos(), (1 + 0.5 * b.cos()) * a.sin(), 0.5 * b.sin()], 1)
    with torch.no_grad():
        assert (net(x) - f(x)).abs().max() <= 2e-2
    assert net.coverage(x).min() >= 1 - 1e-9


@pytest.mark.parametrize("dim", [30])
def test_a_curve_of_full_rank(dim):
    """A7: the moment curve turns through all dimensions, so no projection of R^D holds it."""
    scale = torch.arange(1, dim // 2 + 1, dtype=torch.float64)

    def embedding(u):
        waves = u * scale
        return torch.cat([waves.cos(), waves.sin()], 1) / scale.repeat(2) / math.sqrt(dim // 2)

    curve = ParametricManifold(embedding, [(0.0, 2 * math.pi)])
    u = torch.linspace(0, 2 * math.pi, 4001, dtype=torch.float64)[:, None]
    x = embedding(u)
    assert torch.linalg.matrix_rank(x) == dim
    f = lambda x: 3 * x[:, 0] + torch.sin(5 * x[:, 1]) + x[:, 2]  # noqa: E731
    errors = {}
    for grid in (16, 32, 64):
        net = ChartNet.from_manifold(curve, f, grid=grid)
        with torch.no_grad():
            errors[grid] = (net(x) - f(x)).abs().max().item()
    slope = np.polyfit(np.log(list(errors)), np.log(list(errors.values())), 1)[0]
    assert -2.3 <= slope <= -1.7
    assert errors[64] <= 2e-4


# -- points ------------------------------------------------------------------------------------------------------------


def test_from_points_learns_a_function_from_a_sample():
    x, fresh = sphere_points(2000, 30), sphere_points(1000, 30, seed=9)
    net = ChartNet.from_points(x, sphere_f(x), 2)
    inside = net.coverage(fresh, warn=False) == 1
    assert inside.float().mean() > 0.9
    with torch.no_grad():
        errors = (net(fresh) - sphere_f(fresh))[inside]
    assert errors.square().mean().sqrt() <= 2e-3  # the fact sheet's prototype: 1.1e-3
    with torch.no_grad():
        torch.testing.assert_close(net.to_layered()(fresh[:50])[:, 0], net(fresh[:50]), rtol=0, atol=1e-10)


def test_noise_lowers_the_degree_that_is_chosen():
    x = sphere_points(2000, 3)
    noise = torch.randn(2000, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    clean = ChartNet.from_points(x, sphere_f(x), 2)
    noisy = ChartNet.from_points(x, sphere_f(x) + 0.2 * noise, 2)
    assert noisy.local.degree < clean.local.degree
    with torch.no_grad():
        fresh = sphere_points(800, 3, seed=8)
        error = noisy(fresh) - sphere_f(fresh)
    assert error.square().mean().sqrt() <= 0.06  # against 0.2 of noise


def test_training_moves_the_coefficients():
    circle = Circle(3, 401)
    net = circle.build("telescope_p1", grid=4)
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    losses = []
    for _ in range(30):
        loss = (net(circle.points) - circle.f(circle.points)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


# -- the pieces --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [1, 2])
def test_derivatives_against_finite_differences(dim):
    manifold = Sphere(dim)
    charts = TangentCharts.from_manifold(manifold, 0.6, 0.45)
    function = ChartFunction(
        manifold, charts, lambda x: (2 * x[:, 0]).sin() * x[:, 1], BumpPartition(charts.centers, 0.6)
    )
    z = torch.full((1, dim), 0.45, dtype=torch.float64)
    exponents, found = multi_indices(dim, 2), function.derivatives(z, 2)
    h, ids = 1e-4, torch.arange(len(charts))

    def at(*steps):
        return function.values((z + h * torch.tensor(steps, dtype=torch.float64)).expand(len(ids), 1, dim), ids)[:, 0]

    eye = torch.eye(dim, dtype=torch.float64).tolist()
    zero = [0.0] * dim
    for k, a in enumerate(exponents):
        axes = [axis for axis, power in enumerate(a) for _ in range(power)]
        total = sum(
            math.prod(signs)
            * at(*[sum(s * eye[axis][j] for s, axis in zip(signs, axes, strict=True)) for j in range(dim)] or zero)
            for signs in itertools.product((1, -1), repeat=len(axes))
        )
        # central differences: an error of h^2 times a fourth derivative of about 1e4, and of rounding / h^2
        torch.testing.assert_close(found[:, 0, k], total / (2 * h) ** len(axes), rtol=1e-3, atol=1e-3)


def test_a_moved_polynomial_is_the_same_polynomial():
    exponents = multi_indices(2, 3)
    g = torch.Generator().manual_seed(0)
    c, step, z = (torch.randn(*s, generator=g, dtype=torch.float64) for s in ((2, 5, 10), (5, 2), (5, 2)))

    def value(coefficients, z):
        return sum(coefficients[..., k] * z[:, 0] ** a[0] * z[:, 1] ** a[1] for k, a in enumerate(exponents))

    torch.testing.assert_close(value(moved(c, step, exponents), z - step), value(c, z), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({}, "`eps` or `grid` to be given, not both, but got eps=None, grid=None"),
        ({"eps": 0.1, "grid": 3}, "`eps` or `grid`"),
        ({"eps": -1.0}, "`eps` to be a finite number above 0 but got -1.0"),
        ({"grid": 0}, "`grid` to be at least 1 but got 0"),
        ({"grid": 3, "mode": "best"}, "`mode` to be one of paper, lean, .* but got 'best'"),
        ({"grid": 3, "mode": "p1", "degree": 2}, "`degree` to be 1 in mode 'p1' but got 2"),
        ({"grid": 3, "cover": 1.5}, r"`cover` to be in \(0, 1\) but got 1.5"),
        ({"grid": 3, "distance_levels": 1}, "`distance_levels` to leave an error of at most"),
        ({"eps": 0.1, "budget": "all"}, "`budget` to be 'charts' or 'overlap' but got 'all'"),
        ({"grid": 3, "safety": 0.5}, "`safety` to be at least 1 but got 0.5"),
    ],
)
def test_bad_input(kwargs, message):
    circle = Circle(300, 10)
    with pytest.raises(ValueError, match=message):
        ChartNet.from_manifold(circle.manifold, circle.f, **kwargs)


def test_bad_function_and_points():
    circle = Circle(3)
    with pytest.raises(ValueError, match=r"`f` to map points \(\d+, 3\) to values \(\d+,\) but got \(\d+, 2\)"):
        ChartNet.from_manifold(circle.manifold, lambda x: x[:, :2], grid=3)
    x = sphere_points(100)
    with pytest.raises(ValueError, match=r"`y` to be of shape \(100,\) but got \(99,\)"):
        ChartNet.from_points(x, x[:99, 0], 2)
    with pytest.raises(ValueError, match="`mode` to be 'telescope' for points but got 'lean'"):
        ChartNet.from_points(x, x[:, 0], 2, mode="lean")
    with pytest.raises(ValueError, match="`degree` to be 'auto' or an integer >= 0 but got -1"):
        ChartNet.from_points(x, x[:, 0], 2, degree=-1)
