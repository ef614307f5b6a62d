"""Costs and eta against plain loops, scipy and all permutations."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from lightning_rectify.modules.spot.costs import (
    ContourCost,
    FeatureCost,
    costs_of,
    euclidean_cost,
    get_cost,
    gradient_norms,
    reduce_cost,
    squared_cost,
)
from lightning_rectify.modules.spot.eta import (
    EtaWarning,
    automatic_eta,
    exact_pairs,
    huber_cost,
    largest_gradient,
    warn_if_binding,
    warn_if_small,
)
from tests.reference import transport as reference


def pair(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=generator, dtype=torch.float64) for _ in range(2)]


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("squared", (5, 3)),
        ("euclidean", (5, 3)),
        ("euclidean", (4, 2, 5, 5)),
        ("contour", (4, 3, 7, 6)),
        ("contour", (3, 1, 3, 3)),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_costs_are_those_of_loops(name, shape, dtype):
    x, y = (side.to(dtype) for side in pair(*shape))
    found = get_cost(name)[1](x, y)
    assert found.dtype == dtype
    # Rounding of a sum of at most 50 numbers.
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    np.testing.assert_allclose(found.numpy(), getattr(reference, name)(x.numpy(), y.numpy()), rtol=tolerance)
    assert reduce_cost(get_cost(name)[1], x, y).item() == pytest.approx(found.mean().item())


@pytest.mark.parametrize(("name", "shape"), [("euclidean", (5, 3, 4, 4)), ("contour", (5, 3, 6, 6))])
def test_released_reduction_is_one_norm_of_the_batch(name, shape):
    x, y = pair(*shape)
    found = reduce_cost(get_cost(name)[1], x, y, "released").item()
    assert found == pytest.approx(getattr(reference, f"released_{name}")(x.numpy(), y.numpy()), rel=1e-12)
    twice = reduce_cost(get_cost(name)[1], x.repeat(2, 1, 1, 1), y.repeat(2, 1, 1, 1), "released").item()
    assert twice == pytest.approx(found * math.sqrt(2), rel=1e-12)  # it grows with the batch: no mean of a cost


def test_contours_do_not_see_a_uniform_change_of_light():
    x, _ = pair(2, 3, 8, 8)
    assert ContourCost()(x, x + 0.7).abs().max() < 1e-12  # float64 rounding


def test_feature_cost_is_frozen_and_of_two_networks():
    network = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    cost = FeatureCost(network, nn.Linear(5, 4))
    cost.train()
    x, y = torch.randn(6, 3), torch.randn(6, 5)
    network.eval()
    expected = (network(x) - cost.features_y(y)).square().sum(dim=1)
    torch.testing.assert_close(cost(x, y), expected)
    assert not any(parameter.requires_grad for parameter in cost.parameters())
    assert all(parameter.requires_grad for parameter in network.parameters())
    name, same = get_cost(cost)
    assert (name, same) == ("FeatureCost", cost)


def test_gradient_norms_by_hand():
    x, y = pair(6, 3)
    torch.testing.assert_close(gradient_norms(squared_cost, x, y), 2 * (x - y).norm(dim=1))
    torch.testing.assert_close(gradient_norms(euclidean_cost, x, y), torch.ones(6, dtype=torch.float64))
    # the steeper side counts
    torch.testing.assert_close(
        gradient_norms(lambda a, b: a.sum(dim=1) - 5 * b.sum(dim=1), x, y), torch.full((6,), 5 * 3**0.5).double()
    )
    with torch.inference_mode():
        assert gradient_norms(squared_cost, x, x).tolist() == [0] * 6
    assert not torch.isnan(gradient_norms(euclidean_cost, x, x)).any()  # flat, not 0 / 0


def test_bad_costs():
    x, y = pair(4, 2)
    for path in ("nowhere.cost", "lightning_rectify.modules.spot.nothing"):
        with pytest.raises(ValueError, match=f"`cost`.*import path.*got '{path}'"):
            get_cost(path)
    assert get_cost("lightning_rectify.modules.spot.squared_cost") == ("squared", squared_cost)
    for cost, words in (("cosine", "`cost`.*one of squared.*got 'cosine'"), (3, "`cost`.*got 3")):
        with pytest.raises(ValueError, match=words):
            get_cost(cost)
    with pytest.raises(ValueError, match=r"`cost`.*one number a pair, shape \(4,\).*got \(\)"):
        costs_of(lambda a, b: (a - b).sum(), x, y)
    with pytest.raises(ValueError, match=r"`reduction`.*'mean' or 'released'.*got 'sum'"):
        reduce_cost(squared_cost, x, y, "sum")
    with pytest.raises(ValueError, match=r"`reduction`.*'mean'.*squared"):
        reduce_cost(squared_cost, x, y, "released")
    with pytest.raises(ValueError, match="images"):
        ContourCost()(x, y)
    with pytest.raises(ValueError, match="one shape"):
        squared_cost(x, y[:, :1])


# -- eta ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["squared", "euclidean"])
def test_exact_pairs_are_the_best_of_all_permutations(name):
    x, y = pair(6, 2, seed=1)
    cost = get_cost(name)[1]
    left, right = exact_pairs(cost, x, y)
    function = getattr(reference, name)
    matrix = np.stack([function(x[i : i + 1].expand(6, 2).numpy(), y.numpy()) for i in range(6)])
    best = reference.best_pairing(matrix)
    torch.testing.assert_close(left, x)
    assert cost(left, right).sum().item() == pytest.approx(sum(matrix[i][best[i]] for i in range(6)), rel=1e-12)


def test_exact_pairs_in_parts_and_of_large_samples(monkeypatch):
    x, y = pair(50, 3)
    whole = exact_pairs(squared_cost, x, y, points=40)
    monkeypatch.setattr("lightning_rectify.modules.spot.eta._CHUNK", 500)
    parts = exact_pairs(squared_cost, x, y, points=40)
    assert torch.equal(whole[1], parts[1])
    assert len(whole[0]) == 40
    monkeypatch.setattr("lightning_rectify.modules.spot.eta._NUMBERS", 3 * 100)
    assert len(exact_pairs(squared_cost, x, y)[0]) == 10  # 10 x 10 differences of 3 numbers


def test_eta_rule():
    x = torch.rand(100, 2)
    assert largest_gradient(squared_cost, x, x + 3.0) == pytest.approx(2 * 3 * 2**0.5, rel=1e-4)  # float32; a shift
    assert automatic_eta(largest_gradient(euclidean_cost, x, x + 3.0)) == pytest.approx(2.5, rel=1e-5)
    assert automatic_eta(largest_gradient(squared_cost, x, x), scale=0.7) == 0.7
    with pytest.raises(ValueError, match=r"`cost`.*finite"):
        exact_pairs(lambda a, b: (a - b)[:, 0] / 0.0, x, x)
    with pytest.raises(ValueError, match=r"samples of both sides.*got 0 and 100"):
        exact_pairs(squared_cost, x[:0], x)


def test_huber_prediction_of_the_papers_page():
    """bures2 with critics of slope 1: eta 3 gives -61 %, 5 -12 %, 7 -0.2 % (papers/spot.md, section 5)."""
    from lightning_rectify.data.transport_truths import make_problem

    problem = make_problem("bures2")
    x = torch.from_numpy(problem.draw_x(200_000, np.random.default_rng(0)))
    distances = (problem.truth.map(x) - x).norm(dim=1)
    for eta, percent, digits in ((3, -61, 1), (5, -12, 1), (7, -0.2, 0.3)):
        found = 100 * (huber_cost(distances, eta).mean().item() / problem.truth.cost - 1)
        assert found == pytest.approx(percent, abs=digits)  # the digits there, and 0.3 % of sampling


def test_warnings_of_eta():
    with pytest.warns(EtaWarning, match="below 6.*'auto' would take 15"):
        assert warn_if_small(6.0, 5.0)
    assert not warn_if_small(4.0, 5.0)
    with pytest.warns(EtaWarning, match="reaches 5.1 with eta = 5"):
        assert warn_if_binding(torch.tensor([1.0] * 99 + [5.1]), 5.0)
    with pytest.warns(EtaWarning):
        assert warn_if_binding(torch.tensor([4.5] * 3 + [1.0] * 97), 5.0)  # piled up below eta
    assert not warn_if_binding(torch.tensor([4.5] * 2 + [1.0] * 98), 5.0)
