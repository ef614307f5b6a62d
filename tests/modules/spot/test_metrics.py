"""What is measured of a plan, against closed forms and plain loops; the rate's schedule."""

import math

import pytest
import torch

from lightning_rectify.modules.spot.costs import euclidean_cost, squared_cost
from lightning_rectify.modules.spot.metrics import estimate, independent_cost, l2_uvp, marginal_gap, regret, sliced_w1
from lightning_rectify.modules.spot.presets import PRESETS, HoldThenDecay, resolve
from tests.reference import transport as reference


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_w1_on_the_line_is_exact():
    a, b = normal(50, 1), 2 * normal(50, 1, seed=1) + 1
    expected = reference.w1(a.flatten().double().tolist(), b.flatten().double().tolist())
    assert sliced_w1(a, b) == pytest.approx(expected, rel=1e-12)  # float64 sums


@pytest.mark.parametrize("dim", [2, 10])
def test_sliced_w1_of_a_shift(dim):
    """E |theta . t| over the sphere = |t| Gamma(D/2) / (sqrt(pi) Gamma((D+1)/2))."""
    a = normal(100, dim)
    shift = torch.full((dim,), 3.0)
    expected = 3 * dim**0.5 * math.gamma(dim / 2) / (math.pi**0.5 * math.gamma((dim + 1) / 2))
    # 4 standard errors of 4000 projections, whose values spread by about 0.6 of their mean.
    assert sliced_w1(a, a + shift, directions=4000) == pytest.approx(expected, rel=4 * 0.7 / 4000**0.5)
    assert sliced_w1(a, a.flip(0)) == 0.0
    with pytest.raises(ValueError, match=r"`b`.*shape of `a`"):
        sliced_w1(a, a[:50])


def test_a_perfect_generator_is_at_the_floor_and_a_shifted_one_is_not():
    gaps, floors = zip(
        *(marginal_gap(normal(400, 2, seed=2 * i), normal(400, 2, seed=2 * i + 1)) for i in range(10)), strict=True
    )
    assert sum(gaps) == pytest.approx(sum(floors), rel=0.25)  # ten draws of each, spread by about 0.3
    gap, floor = marginal_gap(normal(400, 2) + 1.0, normal(400, 2, seed=1))
    assert gap > 5 * floor
    with pytest.raises(ValueError, match=r"at least 2 real points.*got 4 and 1"):
        marginal_gap(normal(1, 2), normal(4, 2))


def test_uvp_regret_and_independent_cost():
    x = normal(20_000, 2)
    assert l2_uvp(x, 2 * x, lambda p: 2 * p, 8.0) == 0.0
    # the constant: Var(nu) / Var(nu), to 4 standard errors
    assert l2_uvp(x, torch.zeros_like(x), lambda p: 2 * p, 8.0) == pytest.approx(100, rel=0.04)
    assert regret(5.0, 5.0, 9.0) == 0.0
    assert regret(9.0, 5.0, 9.0) == 1.0
    y = normal(20_000, 2, seed=1) + 1.0
    assert independent_cost(squared_cost, x, y) == pytest.approx(2 + 2 + 2, rel=0.02)  # 4 standard errors
    assert independent_cost(squared_cost, x, x) == pytest.approx(4, rel=0.02)  # not 0, the cost of row by row


def test_estimate_and_its_interval():
    x, y = normal(5000, 2), normal(5000, 2, seed=1)
    found = estimate(euclidean_cost, (x, y), None, 2.0)
    costs = (x - y).norm(dim=1).double()
    assert found.value == float(found) == pytest.approx(costs.mean().item())
    assert found.high - found.low == pytest.approx(2 * 1.96 * costs.std().item() / 5000**0.5)
    assert (found.count, found.eta, found.marginal_gap_x, found.independent_cost) == (5000, 2.0, None, None)
    # It holds its truth, the mean of a Rayleigh number, sqrt(pi), in about 95 of 100 draws.
    hits = 0
    for seed in range(100):
        sides = normal(200, 2, seed=2 * seed), normal(200, 2, seed=2 * seed + 1)
        one = estimate(euclidean_cost, sides, None, 2.0)
        hits += one.low <= math.pi**0.5 <= one.high
    assert 87 <= hits <= 100  # within 4 standard deviations of 95


def test_rate_is_held_and_then_falls():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=2.0)
    schedule = HoldThenDecay(optimizer, total_steps=8)
    rates = []
    for _ in range(11):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    falling = [2.0 * (1 - 0.98 * k / 4) for k in range(5)]
    assert rates == pytest.approx([2.0] * 4 + falling + [0.04] * 2)
    again = HoldThenDecay(torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=2.0), total_steps=3)
    again.load_state_dict(schedule.state_dict())
    assert again.total_steps == 8
    for options, words in (
        ({"total_steps": 0}, "`total_steps`.*got 0"),
        ({"total_steps": 2, "hold": 1.0}, "`hold`.*got 1.0"),
        ({"total_steps": 2, "final": -0.1}, "`final`.*got -0.1"),
    ):
        with pytest.raises(ValueError, match=words):
            HoldThenDecay(optimizer, **options)


def test_presets():
    released = resolve("spot_released", {"critic_steps": 2, "cost": None})
    assert (released.critic_steps, released.cost, released.eta, released.burst) == (2, "euclidean", 1 / 5e-4, 10)
    assert released.optimizer([torch.nn.Parameter(torch.ones(1))]).defaults["lr"] == 5e-5
    ours = PRESETS["spot"].optimizer([torch.nn.Parameter(torch.ones(1))])
    assert (type(ours), ours.defaults["lr"]) == (torch.optim.RMSprop, 5e-4)
    with pytest.raises(ValueError, match=r"`preset` to be 'spot' or 'spot_released' but got 'best'"):
        resolve("best", {})
