"""The estimator's face: from arrays to a plan, pairs, a cost with its company, and a map."""

import logging

import numpy as np
import pytest
import torch

from lightning_rectify.modules.spot import SPOT
from tests.helpers.training import differences

FAST = {"accelerator": "cpu", "width": 32, "critic_width": 32, "critic_steps": 2, "ema_decay": 0.9}


def samples(count=400, seed=0):
    generator = np.random.default_rng(seed)
    x = generator.normal(size=(count, 2))
    return x, generator.normal(size=(count + 50, 2)) * [1.0, 2.0] + [1.0, 0.0]


@pytest.fixture(scope="module")
def plan():
    return SPOT.fit_samples(*samples(), steps=300, batch_size=96, **FAST)


def test_round_trip(plan):
    """Squared cost 1 + 1 (random pairs: 8), map (x + 1, 2 y); 300 short steps come this far."""
    found = plan.cost()
    assert found.low < found.value < found.high
    assert found.value == pytest.approx(2.0, abs=1.0)
    assert found.independent_cost == pytest.approx(1 + 2 + 1 + 4, rel=0.15)  # of 400 points
    assert 0 < found.marginal_floor_x < 0.2
    assert found.marginal_gap_x < 0.5
    x, y = plan.sample_pairs(2000)
    assert (x.shape, y.shape) == ((2000, 2), (2000, 2))
    assert (y - x).mean(dim=0).tolist() == pytest.approx([1.0, 0.0], abs=0.4)
    points = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, -1.0]])
    expected = torch.tensor([[1.0, 0.0], [1.0, 2.0], [2.0, -2.0]])
    moved = plan.transform(points)
    assert (moved - expected).norm(dim=1).max() < 1.2
    back = plan.inverse_transform(moved)
    assert (back - points).norm(dim=1).max() < 0.5


def test_answers_are_functions_of_their_arguments(plan):
    assert differences(plan.sample_pairs(50, seed=3), plan.sample_pairs(50, seed=3)) == []
    assert differences(plan.sample_pairs(50, seed=3), plan.sample_pairs(50, seed=4)) != []
    assert plan.cost(seed=1) == plan.cost(seed=1)
    assert torch.equal(plan.transform([[0.0, 0.0]]), plan.transform(np.zeros((1, 2))))


def test_other_samples_can_be_held_against_the_plan(plan):
    x, y = samples(seed=1)
    near, far = plan.cost(x, y), plan.cost(x + 3.0, y)
    assert near.value == far.value == plan.cost().value
    assert far.marginal_gap_x > near.marginal_gap_x + 1
    assert far.marginal_gap_y == near.marginal_gap_y


def test_transform_takes_the_nearest_pairs(plan):
    """Against a plain search: the mean displacement of the nearest, or the partner of one of them."""
    x, y = (side.numpy() for side in plan.sample_pairs(300, seed=5))
    points = np.array([[0.3, -0.2], [1.0, 1.0]], dtype=np.float32)
    order = [sorted(range(300), key=lambda i: np.linalg.norm(x[i] - p))[:4] for p in points]
    expected = np.stack(
        [p + np.mean([y[i] - x[i] for i in some], axis=0) for p, some in zip(points, order, strict=True)]
    )
    moved = plan.transform(points, neighbours=4, pool=300, seed=5)
    np.testing.assert_allclose(moved.numpy(), expected, rtol=1e-4, atol=1e-4)  # float32 distances and sums
    drawn = plan.transform(points, mode="sample", neighbours=4, pool=300, seed=5).numpy()
    for row, some in zip(drawn, order, strict=True):
        assert any(np.array_equal(row, y[i]) for i in some)
    many = plan.transform(np.repeat(points[:1], 200, axis=0), mode="sample", neighbours=4, pool=300, seed=5)
    assert len(many.unique(dim=0)) == 4  # each in turn, by chance


def test_transport_map_is_transform_as_a_network(plan):
    network = plan.transport_map(neighbours=4, pool=3000, seed=2)
    points = torch.randn(50, 2)
    assert torch.equal(network(points), plan.transform(points, neighbours=4, pool=3000, seed=2))
    assert set(network.state_dict()) == {"x", "y"}  # all there is: it serves without the plan
    with pytest.raises(ValueError, match=r"`neighbours`.*from 1 to the pool, 3.*got 4"):
        plan.transport_map(neighbours=4, pool=3)


def test_sides_of_different_shapes_and_lists_of_numbers():
    x, y = list(np.linspace(0, 1, 40)), np.random.default_rng(0).normal(size=(30, 2, 2))
    plan = SPOT.fit_samples(
        x, y, steps=2, cost=lambda a, b: (a - b.flatten(1).sum(dim=1, keepdim=True))[:, 0] ** 2, **FAST
    )
    assert plan.transform(x[:5]).shape == (5, 2, 2)
    assert plan.inverse_transform(y[:5]).shape == (5, 1)
    pairs = plan.sample_pairs(1000)
    image = plan.transform(torch.zeros(1, 1), neighbours=3, pool=1000)
    nearest = pairs[0].abs().flatten().topk(3, largest=False).indices
    torch.testing.assert_close(image[0], pairs[1][nearest].mean(dim=0))


def test_it_is_quiet_and_leaves_the_random_state(recwarn, caplog, capsys):
    level = logging.getLogger("pytorch_lightning").level
    torch.manual_seed(5)
    state = torch.get_rng_state()
    with caplog.at_level(logging.INFO):
        one = SPOT.fit_samples(*samples(), steps=3, seed=2, **FAST)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(6)
    two = SPOT.fit_samples(*samples(), steps=3, seed=2, **FAST)
    other = SPOT.fit_samples(*samples(), steps=3, seed=3, **FAST)
    assert differences(one.sample_pairs(5), two.sample_pairs(5)) == []
    assert differences(one.sample_pairs(5), other.sample_pairs(5)) != []
    assert [str(w.message) for w in recwarn if "num_workers" in str(w.message) or "dataloader" in str(w.message)] == []
    assert capsys.readouterr().out == ""
    assert logging.getLogger("pytorch_lightning").level == level


def test_a_subclass_fits_as_itself():
    class Mine(SPOT):
        pass

    plan = Mine.fit_samples(*samples(), steps=1, **FAST)
    assert type(plan) is Mine
    assert not plan.training


def test_bad_arguments(plan):
    x, y = samples()
    for options, words in (
        ({"x": [float("nan")]}, "`x`.*finite"),
        ({"y": []}, "`y`.*hold samples"),
        ({"steps": 0}, "`steps`.*at least 1.*got 0"),
        ({"batch_size": 0}, "`batch_size`.*at least 1.*got 0"),
        ({"eta": -1.0}, "`eta`.*got -1.0"),
    ):
        with pytest.raises(ValueError, match=words):
            SPOT.fit_samples(**{"x": x, "y": y, **options}, **FAST)
    for call, words in (
        (lambda: plan.sample_pairs(0), "`count`.*at least 1.*got 0"),
        (lambda: plan.cost(x=x), "`x` and `y`.*together"),
        (lambda: plan.cost(count=1), "`count`.*at least 2.*got 1"),
        (lambda: plan.transform(x, mode="median"), "`mode`.*'mean' or 'sample'.*got 'median'"),
        (lambda: plan.transform(x, neighbours=0), "`neighbours`.*from 1 to.*got 0"),
        (lambda: plan.transform(x[:, :1]), r"points of shape \(N, 2\).*got \(400, 1\)"),
    ):
        with pytest.raises(ValueError, match=words):
            call()
