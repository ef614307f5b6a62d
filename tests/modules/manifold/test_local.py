"""Local networks: their cells against sums over all cells, P1 against interpolation, units against forward."""

import itertools

import numpy as np
import pytest
import torch

from lightning_rectify.modules.manifold.blocks import Hat, Trapezoid
from lightning_rectify.modules.manifold.factored import FactoredTaylorNet
from lightning_rectify.modules.manifold.graph import ReluGraph
from lightning_rectify.modules.manifold.layered import LayeredNetwork
from lightning_rectify.modules.manifold.local import P1Net, PolynomialNet, TaylorNet, grid_nodes, multi_indices
from tests.reference import manifold as reference

CHARTS = 3


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def points(dim, count=300):
    """Points inside and around the cube, on its nodes and its faces too."""
    z = torch.rand(count, dim, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 1.8 - 0.4
    z[:40] = (z[:40] * 6).round() / 6
    return z


def units_equal_forward(net, z, atol=1e-12):
    graph = ReluGraph(CHARTS * net.dim)
    network = LayeredNetwork(net.on(graph.input()))
    every = z.repeat(1, CHARTS)
    expected = torch.stack([net(z, torch.full((len(z),), chart)) for chart in range(CHARTS)], 1)
    # about a thousand roundings of numbers up to 3
    torch.testing.assert_close(network(every), expected, rtol=0, atol=atol)
    assert expected.abs().max() <= net.bound()
    return network


@pytest.mark.parametrize(("dim", "grid", "degree"), [(1, 4, 2), (1, 3, 0), (2, 3, 2), (3, 2, 1)])
@pytest.mark.parametrize("kind", ["paper", "shared", "factored"])
def test_taylor(dim, grid, degree, kind):
    exponents, nodes, z = multi_indices(dim, degree), grid_nodes(dim, grid), points(dim)
    coefficients = random(CHARTS, len(nodes), len(exponents))
    coefficients[1, ::2] = 0
    if kind == "factored":
        net = FactoredTaylorNet(coefficients, dim, grid, degree, 20, "two_squares")
    else:
        form = "three_squares" if kind == "paper" else "two_squares"
        net = TaylorNet(coefficients, dim, grid, degree, 20, form, shared=kind == "shared")
    network = units_equal_forward(net, z, atol=1e-11)
    clipped = z.clamp(min=0)
    exact = torch.zeros(len(z), dtype=torch.float64)
    for index, node in enumerate(nodes):
        zeta = torch.stack([Trapezoid()(3 * grid * (clipped[:, k] - node[k])) for k in range(dim)]).prod(0)
        for order, a in enumerate(exponents):
            power = torch.stack([(clipped[:, k] - node[k]) ** a[k] for k in range(dim)]).prod(0)
            exact += coefficients[1, index, order] * zeta * power
    got = net(z, torch.ones(len(z), dtype=torch.int64))
    assert (got - exact).abs().max() <= net.error() + 1e-12
    assert net.error() <= 1e-8  # with 20 levels
    everything = LayeredNetwork(net.on(ReluGraph(CHARTS * dim).input(), prune=False), prune=False)
    assert everything.size().units > network.size().units  # an architecture that f did not choose


def test_shared_chains_cost_less_and_compute_the_same():
    coefficients, z = random(CHARTS, 16, 6), points(2)
    sizes = []
    for shared in (True, False):
        net = TaylorNet(coefficients, 2, 3, 2, 8, "two_squares", shared)
        sizes.append(units_equal_forward(net, z, atol=1e-11).size().total)
    assert sizes[0] < 0.5 * sizes[1]


@pytest.mark.parametrize("levels", [2, 4, 8])
def test_one_product_a_cell_costs_less_and_keeps_its_bound(levels):
    coefficients, z = random(CHARTS, 81, 6), points(2)
    exact = FactoredTaylorNet(coefficients, 2, 8, 2, 24, "two_squares")
    net = FactoredTaylorNet(coefficients, 2, 8, 2, levels, "two_squares")
    chains = TaylorNet(coefficients, 2, 8, 2, levels, "two_squares", shared=True)
    ids = torch.arange(len(z)) % CHARTS
    assert (net(z, ids) - exact(z, ids)).abs().max() <= net.error() + exact.error()
    total = units_equal_forward(net, z, atol=1e-11).size().total
    # 2 products a cell of 7, and 4 wide inputs in place of 2
    assert total <= 0.5 * LayeredNetwork(chains.on(ReluGraph(CHARTS * 2).input())).size().total
    loss = net(z, ids).sum()
    loss.backward()
    assert net.coefficients.grad.abs().max() > 0


@pytest.mark.parametrize(("dim", "grid"), [(1, 5), (2, 4), (3, 2)])
def test_p1(dim, grid):
    values, z = random(CHARTS, (grid + 1) ** dim, 1), points(dim)
    net = P1Net(values, dim, grid)
    units_equal_forward(net, z)
    table = np.zeros((grid + 3,) * dim)  # zero beyond the grid
    table[(slice(grid + 1),) * dim] = values[2, :, 0].numpy().reshape((grid + 1,) * dim)
    expected = [reference.kuhn_interpolant(table, np.minimum(np.maximum(p, 0) * grid, grid + 1)) for p in z.numpy()]
    got = net(z, torch.full((len(z),), 2))
    np.testing.assert_allclose(got.detach().numpy(), expected, rtol=0, atol=1e-12)


def test_p1_costs():
    """Counted: 3 weights a bend for d = 1; 4 a node and the shared rows for d = 2."""
    grid, z = 20, ReluGraph(2)
    net = P1Net(random(1, (grid + 1) ** 2, 1), 2, grid)
    total = LayeredNetwork(net.on(z.input())).size().total
    # -z1 and its complement, z2, z1 - z2, each with a bias; two clips
    rows = (grid + 1) * (2 + 2 + 2) + (2 * grid + 1) * 3 + 2
    assert 4 * (grid + 1) ** 2 < total <= 4 * (grid + 1) ** 2 + rows
    line = P1Net(random(1, grid + 1, 1), 1, grid)
    # N + 1 bends of weight, bias and output, the first slope, the first value, the clip
    assert LayeredNetwork(line.on(ReluGraph(1).input())).size().total == 3 * (grid + 1) + 3


def test_the_hat_of_three_shared_units_is_the_hat():
    t = torch.rand(2000, 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64) * 4 - 2
    cyclic = (1 - (-t[:, 0]).relu() - t[:, 1].relu() - (t[:, 0] - t[:, 1]).relu()).relu()
    assert (cyclic - Hat(2)(*t.unbind(1))).abs().max() <= 1e-15


@pytest.mark.parametrize(("dim", "degree"), [(1, 3), (2, 3), (2, 0)])
def test_polynomial(dim, degree):
    exponents, z = multi_indices(dim, degree), points(dim)
    net = PolynomialNet(random(CHARTS, 1, len(exponents)), dim, degree, levels=20)
    units_equal_forward(net, z)
    t = 2 * z.clamp(0, 1) - 1
    exact = sum(
        net.coefficients[1, 0, k] * torch.stack([t[:, j] ** a[j] for j in range(dim)]).prod(0)
        for k, a in enumerate(exponents)
    )
    assert (net(z, torch.ones(len(z), dtype=torch.int64)) - exact).abs().max() <= 1e-9


@pytest.mark.parametrize("dim", [1, 2, 3])
def test_multi_indices(dim):
    got = multi_indices(dim, 3)
    assert sorted(got) == sorted(a for a in itertools.product(range(4), repeat=dim) if sum(a) <= 3)
    assert [sum(a) for a in got] == sorted(sum(a) for a in got)


def test_coefficients_are_trainable():
    net = P1Net(random(CHARTS, 6, 1), 1, 5)
    net(points(1), torch.zeros(300, dtype=torch.int64)).sum().backward()
    assert net.coefficients.grad[0].abs().sum() > 0
    assert net.coefficients.grad[1:].abs().sum() == 0
