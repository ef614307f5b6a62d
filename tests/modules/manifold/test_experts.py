"""Experts and their mixture: closed forms, the gates' promises, and agreement with plain rewrites."""

import math

import numpy as np
import pytest
import torch

from lightning_rectify.modules.manifold.charts import TangentCharts
from lightning_rectify.modules.manifold.cover import (
    affordable,
    choose_cover,
    cross_entropy,
    farthest_order,
    left_out_values,
    lloyd,
    mixture_weights,
    monomials,
    principal,
    squared_distances,
    weighted_fit,
)
from lightning_rectify.modules.manifold.experts import EXPERTS, P1Expert, PolynomialExpert
from lightning_rectify.modules.manifold.local import P1Net, multi_indices
from lightning_rectify.modules.manifold.mixture import ChartMixture
from lightning_rectify.modules.manifold.starts import fit_mixture


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def mixture(kind="polynomial", charts=6, dim=2, size=2, outputs=3, in_features=5, dispatch=3, **options):
    """Random charts and experts in float64."""
    options = {"trained_gate": False, "outside": "nearest", **options}
    network = ChartMixture(in_features, outputs, kind, size, dispatch, **options).double()
    network.allocate(charts, dim, size)
    draw = generator(1)
    network.centers.data.copy_(torch.randn(charts, in_features, generator=draw))
    network.log_radii.data.copy_(0.3 * torch.randn(charts, generator=draw) + 0.7)
    network.bases.copy_(torch.linalg.qr(torch.randn(charts, in_features, dim, generator=draw)).Q)
    network.origins.copy_(torch.einsum("cdk,cd->ck", network.bases, network.centers))
    network.spans.copy_(network.log_radii.exp())
    network.expert.randomize(draw)
    network.count.fill_(1)
    return network


# -- experts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [1, 2, 3])
def test_p1_expert_is_the_constructions_p1_net(dim):
    """The hats of ``P1Net`` and the simplices found by sorting are the same function on [0, 1]^d."""
    expert = P1Expert(3, 1)
    expert.allocate(4, dim, 3)
    expert.double()
    expert.randomize(generator())
    net = P1Net(expert.values.detach().double(), dim, 3)
    z, ids = torch.rand(200, dim, dtype=torch.float64), torch.randint(4, (200,))
    found = expert(z[:, None], ids[:, None])[:, 0, 0]
    assert (found - net(z, ids)).abs().max() < 1e-12  # float64, d + 1 terms


def test_polynomial_expert_is_the_polynomial_and_stops_at_the_edge():
    expert = PolynomialExpert(3, 2)
    expert.allocate(2, 2, 3)
    expert.double()
    expert.randomize(generator())
    z, ids = 2.0 * torch.rand(50, 2, dtype=torch.float64) - 0.5, torch.randint(2, (50,))
    t = 2.0 * z.clamp(0, 1) - 1.0
    expected = sum(
        expert.coefficients[ids, k] * (t[:, 0] ** a * t[:, 1] ** b)[:, None]
        for k, (a, b) in enumerate(multi_indices(2, 3))
    )
    assert (expert(z[:, None], ids[:, None])[:, 0] - expected).abs().max() < 1e-12


@pytest.mark.parametrize("kind", EXPERTS)
def test_experts_are_linear_in_what_they_say_they_are(kind):
    expert = EXPERTS[kind](3, 2)
    expert.allocate(2, 2, 3)
    expert.double()
    expert.randomize(generator())
    z, ids = torch.rand(40, 2, dtype=torch.float64), torch.ones(40, dtype=torch.int64)
    features = expert.features(z, 1)
    rows = torch.randn(features.shape[1], 2, dtype=torch.float64)
    expert.set_linear(1, rows)
    assert (expert(z[:, None], ids[:, None])[:, 0] - features @ rows).abs().max() < 1e-12
    assert torch.autograd.gradcheck(lambda z: expert(z[:, None], ids[:5, None]), z[:5].requires_grad_())


# -- the mixture -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("kind", EXPERTS)
def test_mixture_is_its_formula(kind, trained):
    """A loop over points and charts, from the formula of the docstring."""
    network = mixture(kind, trained_gate=trained)
    x = 0.7 * torch.randn(30, 5, dtype=torch.float64, generator=generator(2))
    found = network(x)
    for point, value in zip(x, found, strict=True):
        u = ((point - network.centers).norm(dim=1) / network.log_radii.exp()) ** 2
        order = u.argsort()
        cut = min(1.0, u[order[3]].item())
        weights = [(1.0 - u[i].item() / cut) ** 2 if u[i] < cut else 0.0 for i in order[:3]]
        weights = [w / sum(weights) for w in weights] if sum(weights) else [1.0, 0.0, 0.0]
        expected = torch.zeros(3, dtype=torch.float64)
        for weight, i in zip(weights, order[:3].tolist(), strict=True):
            y = (point - network.centers[i]) @ network.bases[i]
            z = y / (2.0 * network.spans[i]) + 0.5
            expected += weight * network.expert(z[None, None], torch.tensor([[i]]))[0, 0]
        assert (value - expected).abs().max() < 1e-10  # float64; distances by differences of squares


def test_mixture_is_continuous_where_charts_take_over():
    """Along a line the largest step falls with the step's length; a jump would not."""
    network = mixture(charts=12, dispatch=2)
    ends = torch.randn(2, 5, dtype=torch.float64, generator=generator(3)) * 0.5

    def largest_step(count):
        share = torch.linspace(0, 1, count, dtype=torch.float64)[:, None]
        x = ends[0] + share * (ends[1] - ends[0])
        assert network.coverage(x).min() > 0
        return network(x).diff(dim=0).abs().max().item()

    assert largest_step(20_001) < 0.15 * largest_step(2_001)


def test_points_in_no_chart_get_what_outside_says():
    far = torch.full((2, 5), 50.0, dtype=torch.float64)
    nearest, mean = mixture(), mixture(outside="mean")
    mean.loc.fill_(2.5)
    assert torch.equal(mean(far), torch.full((2, 3), 2.5, dtype=torch.float64))
    assert nearest(far).abs().max() < 100  # at the end of its coordinates, not 50 radii away
    assert nearest.coverage(far).tolist() == [0.0, 0.0]
    ids, z = nearest.encode(far)
    assert ids.tolist() == [-1, -1]
    assert z.isnan().all()


def test_coverage_and_encode_are_those_of_tangent_charts():
    network = mixture()
    network.log_radii.fill_(math.log(1.5))
    network.spans.fill_(1.5)
    charts = TangentCharts(network.centers, network.bases, 1.5, 0.75 * 1.5)
    x = torch.randn(300, 5, dtype=torch.float64)
    assert (network.coverage(x) - charts.coverage(x, warn=False)).abs().max() < 1e-6  # ``inner`` is a float32 0.75
    for mine, theirs in zip(network.encode(x), charts.encode(x), strict=True):
        assert torch.allclose(mine.double(), theirs.double(), atol=1e-12, equal_nan=True)


def test_gates_gradient_is_right_and_reaches_centres_and_radii():
    network = mixture(trained_gate=True)
    x = 0.5 * torch.randn(4, 5, dtype=torch.float64, generator=generator(4))

    def values(centers, log_radii):
        return torch.func.functional_call(network, {"centers": centers, "log_radii": log_radii}, (x,))

    start = tuple(network.get_parameter(name).detach().clone().requires_grad_() for name in ("centers", "log_radii"))
    assert torch.autograd.gradcheck(values, start)


# -- how charts are chosen ---------------------------------------------------------------------------------------------


def test_farthest_order_covers_and_does_not_hang_on_the_order():
    x = torch.randn(300, 3, dtype=torch.float64)
    chosen = farthest_order(x, 300, 0.8)
    assert squared_distances(x, x[chosen]).amin(1).max() <= 0.8**2 + 1e-12
    gaps = squared_distances(x[chosen], x[chosen]).fill_diagonal_(9.0).min()
    assert gaps > 0.8**2 - 1e-12
    turned = farthest_order(x.flip(0), 300, 0.8)
    assert torch.equal(x[chosen], x.flip(0)[turned])


def test_lloyd_makes_cells_smaller_and_centres_their_means():
    x = torch.randn(500, 2, dtype=torch.float64)
    first = x[farthest_order(x, 10)]
    moved = lloyd(x, first, steps=50)
    cost = lambda centers: squared_distances(x, centers).amin(1).mean()  # noqa: E731
    assert cost(moved) < cost(first)
    cell = squared_distances(x, moved).argmin(1)
    for k in range(10):
        assert (x[cell == k].mean(0) - moved[k]).norm() < 0.05  # 50 steps come near to the fixed point


@pytest.mark.parametrize("shape", [(300, 8), (40, 300), (300, 400)])
def test_principal_directions_are_those_of_the_svd(shape):
    """By either side of the Gram matrix, and by iteration for large ones."""
    near = torch.randn(shape[0], 3, dtype=torch.float64) @ torch.randn(3, shape[1], dtype=torch.float64)
    near = near + 0.01 * torch.randn(shape, dtype=torch.float64)
    expected = torch.linalg.svd(near, full_matrices=False).Vh[:3].t()
    found = principal(near, 3)
    assert (found.t() @ found - torch.eye(3)).abs().max() < 1e-12
    # cosines of the angles between the two spaces; the gap of the spectrum is over 10, four iterations leave 1e-8
    assert torch.linalg.svdvals(expected.t() @ found).min() > 1.0 - 1e-7


def test_left_out_residuals_are_those_of_fits_without_the_point():
    t, y = torch.randn(20, 2, dtype=torch.float64), torch.randn(20, 2, dtype=torch.float64)
    design, weights = monomials(t, 2), torch.rand(20, dtype=torch.float64) + 0.1
    _, left = weighted_fit(design, y, weights, 1e-12)
    for k in range(20):
        keep = torch.arange(20) != k
        root = weights[keep].sqrt()[:, None]
        fit = np.linalg.lstsq((root * design[keep]).numpy(), (root * y[keep]).numpy(), rcond=None)[0]
        # 1e-6: the ridge of 1e-12 and the condition of a Gram matrix of 6 monomials
        assert np.abs((y[k] - design[k] @ torch.from_numpy(fit) - left[k]).numpy()).max() < 1e-6


def test_left_out_values_are_those_of_a_mixture_fitted_without_the_point():
    """The whole estimator, charts fixed, against one fit a point."""
    x = torch.rand(60, 2, dtype=torch.float64, generator=generator(5))
    y = torch.stack([x[:, 0] ** 2, (5 * x[:, 1]).sin()], 1) + 0.1 * torch.randn(60, 2, generator=generator(6))
    centers, bases, radius = x[:5], torch.eye(2, dtype=torch.float64).expand(5, 2, 2), 0.7
    out = torch.arange(60) % 7 == 0
    found = left_out_values(x, y, centers, bases, radius, 1, 2, out)[1]
    rho = mixture_weights(squared_distances(x, centers), radius, 2)
    for row, k in enumerate(out.nonzero().flatten().tolist()):
        expected = torch.zeros(2, dtype=torch.float64)
        for chart in (rho[k] > 0).nonzero().flatten().tolist():
            squares = (x - centers[chart]).square().sum(1)
            keep = (squares < radius**2) & (torch.arange(60) != k)
            root = (1.0 - squares[keep] / radius**2).clamp(min=0.05).sqrt()[:, None]
            design = monomials((x - centers[chart]) / radius, 1)
            fit = np.linalg.lstsq((root * design[keep]).numpy(), (root * y[keep]).numpy(), rcond=None)[0]
            expected += rho[k, chart] * (design[k] @ torch.from_numpy(fit))
        assert (found[row] - expected).abs().max() < 1e-6  # the ridge of 1e-9


def test_charts_follow_the_noise():
    """Smooth values with noise take fewer charts or lower degrees than the same values without."""
    angle = 2.0 * math.pi * torch.rand(600, dtype=torch.float64, generator=generator(7))
    x = torch.stack([angle.cos(), angle.sin()], 1)
    y = (5 * angle).sin()[:, None]
    noisy = y + 0.5 * torch.randn(600, 1, generator=generator(8), dtype=torch.float64)
    terms = [len(c.centers) * (c.degree + 1) for c in (choose_cover(x, v, 1, None, None, 0, 8) for v in (y, noisy))]
    assert terms[1] < terms[0] / 2


def test_a_given_radius_covers_every_point():
    x = torch.randn(400, 3, dtype=torch.float64)
    cover = choose_cover(x, x[:, :1], 3, 1.0, 1, 0, 8)
    assert squared_distances(x, cover.centers).amin(1).max() <= 0.75**2 + 1e-12


def test_degrees_are_those_that_points_afford():
    assert [affordable(3, 2, count) for count in (1, 5, 6, 12, 19, 20)] == [0, 0, 1, 2, 2, 3]


def test_cross_entropy_takes_the_best_factor():
    y = torch.eye(3, dtype=torch.float64).repeat(5, 1)
    error, factor = cross_entropy(y, y)
    assert factor == 24.0
    # K = 3: log(1 + 2 exp(-factor))
    assert error == pytest.approx(math.log1p(2.0 * math.exp(-24.0)), rel=1e-6)


# -- starts ------------------------------------------------------------------------------------------------------------


def circle(count, seed=0, noise=0.0):
    angle = 2.0 * math.pi * torch.rand(count, dtype=torch.float64, generator=generator(seed))
    y = (3 * angle).sin() + noise * torch.randn(count, dtype=torch.float64, generator=generator(seed + 50))
    return torch.stack([angle.cos(), angle.sin()], 1), y[:, None]


@pytest.mark.parametrize(
    ("kind", "size", "start", "bar"),
    [
        # about three times the worst of three seeds
        ("polynomial", 1, "least_squares", 3e-7),
        ("polynomial", 1, "construction", 0.003),
        ("p1", 4, "least_squares", 0.0015),
        ("p1", 4, "construction", 0.0025),
        ("mlp", 16, "least_squares", 0.02),
        ("mlp", 16, "construction", 0.002),
    ],
)
def test_starts_are_already_right(kind, size, start, bar):
    network = ChartMixture(2, 1, kind, size, 8, False, "nearest")
    fit_mixture(network, *circle(1000), [1], start)
    x, y = circle(500, seed=1)
    with torch.no_grad():
        assert (network(x.float()) - y).square().mean().sqrt() < bar


def test_random_start_is_charts_alone():
    network = ChartMixture(2, 1, "polynomial", 1, 8, False, "nearest")
    fit_mixture(network, *circle(500), [1], "random", degree=2)
    x, y = circle(500, seed=1)
    assert network.coverage(x).min() > 0
    with torch.no_grad():
        assert (network(x.float()) - y).square().mean() > y.var()


def test_the_dimension_with_the_least_error_is_taken():
    network = ChartMixture(3, 1, "polynomial", 1, 8, False, "nearest")
    x = torch.randn(600, 3, dtype=torch.float64, generator=generator(9))
    x = x / x.norm(dim=1, keepdim=True)
    y = (2 * x[:, :1]).sin() + x[:, 1:2] * x[:, 2:]
    fit_mixture(network, x, y, [1, 2], "least_squares")
    assert network.dim == 2
