"""The explicit network: strict layers against the graph, counts against dense matrices, composition, export."""

import numpy as np
import pytest
import torch
from torch import nn

from lightning_rectify.modules.manifold.blocks import Monomial, Product, Square
from lightning_rectify.modules.manifold.graph import ReluGraph, concatenated
from lightning_rectify.modules.manifold.layered import LayeredNetwork
from tests.reference import manifold as reference


def skipping(prune=True):
    """Outputs that read inputs and units of all levels, and a unit that nobody reads."""
    graph = ReluGraph(2)
    x = graph.input()
    first = x.times(torch.tensor([[1.0, -2.0], [0.5, 1.0], [0.0, 3.0]])).relu()
    second = (first[slice(0, 1)] - x[1] + 0.3).relu()
    (second + 1.0).relu()
    third = (second * 2.0 - first[2] + x[0]).relu()
    return LayeredNetwork(concatenated([third - x[1] * 0.5, first[1] + 0.7, third + second - first[0]]), prune)


def by_hand(x):
    relu = lambda v: np.maximum(v, 0)  # noqa: E731
    a, b, c = relu(x[:, 0] - 2 * x[:, 1]), relu(0.5 * x[:, 0] + x[:, 1]), relu(3 * x[:, 1])
    second = relu(a - x[:, 1] + 0.3)
    third = relu(2 * second - c + x[:, 0])
    return np.stack([third - 0.5 * x[:, 1], b + 0.7, third + second - a], 1)


@pytest.fixture
def points():
    return torch.randn(200, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_values_that_skip_layers(points):
    # a handful of roundings
    torch.testing.assert_close(skipping()(points), torch.from_numpy(by_hand(points.numpy())), rtol=0, atol=1e-14)


def test_counts_by_hand():
    network = skipping()
    # units read 5, 2 and 3 nodes; outputs 2, 1 and 3; biases 0.3 and 0.7
    size = network.size()
    assert (size.weights, size.biases, size.units, size.depth, size.width) == (5 + 2 + 3 + 6, 2, 5, 4, 3)
    assert size.largest == 3.0
    # the dead unit is among the others if it is not pruned: one weight and one bias more
    assert skipping(prune=False).size().total == size.total + 2
    assert skipping(prune=False).size().units == size.units + 1


@pytest.mark.parametrize("make", [skipping, lambda: Monomial((2, 1), 3).layers()])
def test_strict_counts_are_those_of_the_dense_layers(make, points):
    network = make()
    dense = [
        (m.weight.detach().numpy(), m.bias.detach().numpy()) for m in network.to_sequential() if len([*m.parameters()])
    ]
    size = network.size("layered")
    assert (size.total, size.largest) == reference.dense_counts(dense)
    assert size.depth == len(dense)
    assert size.width == max(len(b) for _, b in dense[:-1])
    torch.testing.assert_close(network.to_sequential()(points), network(points), rtol=0, atol=1e-13)


def test_no_unit_of_a_strict_layer_waits_for_nothing():
    network = skipping()
    for number in range(1, network.depth):
        _, cols, _, _ = network.layer(number)
        assert set(cols.tolist()) == set(range(len(network.layer(number - 1)[3])))


def test_composition(points):
    product, square = Product(4).layers(), Square(3).layers()
    points = points.clamp(-1, 1)
    series = LayeredNetwork.series(product, square)
    torch.testing.assert_close(series(points), square(product(points)), rtol=0, atol=1e-13)
    assert series.depth == product.depth + square.depth - 1  # two affine maps met
    other = skipping()
    both = LayeredNetwork.parallel(product, other)
    torch.testing.assert_close(both(points), torch.cat([product(points), other(points)], 1), rtol=0, atol=1e-13)
    # nothing is shared or lost
    assert both.size().total == product.size().total + other.size().total
    total = LayeredNetwork.sum(product, Monomial((1, 2), 2).layers())
    expected = product(points) + Monomial((1, 2), 2).layers()(points)
    torch.testing.assert_close(total(points), expected, rtol=0, atol=1e-13)


def test_an_affine_map_is_a_network_without_units(points):
    network = LayeredNetwork(ReluGraph(2).input().times(torch.tensor([[2.0, -1.0]])) + 1.0)
    torch.testing.assert_close(network(points), points @ torch.tensor([[2.0], [-1.0]]).double() + 1, rtol=0, atol=1e-14)
    assert network.size() == network.size("layered")
    assert (network.depth, network.size().units) == (1, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_export_with_a_dynamic_batch(dtype, points):
    network = skipping().to(dtype)
    points = points.to(dtype)
    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(network, (points[:3],), dynamic_shapes=({0: batch},))
    # sums in another order
    torch.testing.assert_close(program.module()(points), network(points), rtol=0, atol=20 * torch.finfo(dtype).eps)


def test_state_dict_and_gradients(points):
    network = skipping()
    other = skipping()
    nn.init.zeros_(other.values_0)
    other.load_state_dict(network.state_dict())
    assert torch.equal(other(points), network(points))
    inputs = points.clone().requires_grad_()
    assert torch.autograd.gradcheck(network, inputs[:5])


def test_bad_input():
    network = skipping()
    with pytest.raises(ValueError, match="`count` to be 'dag' or 'layered' but got 'all'"):
        network.size("all")
    with pytest.raises(ValueError, match="`values` to hold 2 values but got 3"):
        network.on(ReluGraph(3).input())
    with pytest.raises(ValueError, match="`values` to belong to this graph"):
        ReluGraph(2).relu(ReluGraph(2).input())
    with pytest.raises(ValueError, match="`inputs` to be at least 1 but got 0"):
        ReluGraph(0)
