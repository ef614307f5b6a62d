import copy
import itertools
import math
import pickle

import numpy as np
import pytest
import torch

from lightning_rectify.optim import RectifiedAdam
from lightning_rectify.optim.variance import rectification, sma_length
from tests.reference import radam as reference

WAYS = {"auto": {}, "fused": {"fused": True}, "foreach": {"foreach": True}, "loop": {"foreach": False}}


def parameters(dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(7, 5), (11,), (2, 3, 4, 4)]
    if dtype.is_complex:
        return [torch.nn.Parameter(torch.randn(s, generator=generator, dtype=dtype)) for s in shapes]
    return [torch.nn.Parameter(torch.randn(s, generator=generator, dtype=torch.float64).to(dtype)) for s in shapes]


def train(optimizer, steps, *, late=0, seed=1, change_lr=True):
    """Steps on random gradients plus a pull to zero; the second parameter gets its first gradient at step ``late``."""
    generator = torch.Generator().manual_seed(seed)
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for t in range(steps):
        for i, p in enumerate(params):
            noise = torch.randn(p.shape, generator=generator, dtype=p.dtype if p.is_complex() else torch.float64)
            p.grad = None if i == 1 and t < late else noise.to(p.dtype) + 0.1 * p.detach()
        if change_lr:
            for group in optimizer.param_groups:
                group["lr"] = 1e-2 * (1 + 0.5 * (t % 7)) * 0.997**t
        optimizer.step()
    return torch.cat([p.detach().flatten() for p in params])


def relative_gap(a, b):
    return ((a - b).abs() / b.abs()).max().item()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("decoupled", "maximize", "decay"), list(itertools.product([False, True], [False, True], [0, 0.01]))
)
def test_equals_torch_over_a_thousand_steps(way, decoupled, maximize, decay):
    options = {"weight_decay": decay, "decoupled_weight_decay": decoupled, "maximize": maximize}
    ours = train(RectifiedAdam(parameters(), **options, **WAYS[way]), 1000, late=37)
    theirs = train(torch.optim.RAdam(parameters(), **options), 1000, late=37)
    # Same operations up to their order: rounding of 1e-16 a step, a thousand steps, some parameters near zero.
    assert relative_gap(ours, theirs) < 1e-10


@pytest.mark.parametrize("way", ["auto", "foreach", "loop"])
def test_equals_torch_for_complex_parameters(way):
    ours = train(RectifiedAdam(parameters(torch.complex128), **WAYS[way]), 50)
    theirs = train(torch.optim.RAdam(parameters(torch.complex128)), 50)
    assert relative_gap(torch.view_as_real(ours), torch.view_as_real(theirs)) < 1e-11


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("early_phase", ["momentum", "skip", "adam"])
@pytest.mark.parametrize("rectifier", ["first_order", "exact"])
@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize("threshold", [4.0, 5.0])
def test_equals_the_plain_reference(way, early_phase, rectifier, decoupled, threshold):
    options = {"lr": 0.01, "eps": 1e-6, "weight_decay": 0.1, "early_phase": early_phase, "rectifier": rectifier}
    options |= {"threshold": threshold, "betas": (0.8, 0.99)}
    generator = np.random.default_rng(3)
    start, gradients = generator.normal(size=6), generator.normal(size=(200, 6)) * 10.0 ** generator.uniform(-3, 1, 6)
    weight = torch.nn.Parameter(torch.tensor(start))
    optimizer = RectifiedAdam([weight], decoupled_weight_decay=decoupled, **options, **WAYS[way])
    path = reference.radam(start, gradients, decoupled=decoupled, **options)
    for gradient, expected in zip(gradients, path, strict=True):
        weight.grad = torch.tensor(gradient)
        optimizer.step()
        # 1e-10: our closed form is good to 2e-11.
        np.testing.assert_allclose(weight.detach().numpy(), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("way", WAYS)
def test_skip_equals_the_authors_released_rule(way):
    start, lr, decay = [2.0, -1.0], 0.01, 0.1
    gradients = np.random.default_rng(0).normal(size=(300, 2))
    weight = torch.nn.Parameter(torch.tensor(start, dtype=torch.float64))
    optimizer = RectifiedAdam(
        [weight], lr=lr, weight_decay=decay, decoupled_weight_decay=True, early_phase="skip", **WAYS[way]
    )
    expected = reference.authors_released(start, gradients, lr, weight_decay=decay)
    for gradient, target in zip(gradients, expected, strict=True):
        weight.grad = torch.tensor(gradient)
        optimizer.step()
        np.testing.assert_allclose(weight.detach().numpy(), target, rtol=1e-12)


def test_published_trajectories():
    """First eight steps from 2 with gradient .5, lr .01, decay .1, as the authors' released code prints them."""
    published = {
        "skip": [2, 2, 2, 2, 2, 1.99774, 1.99542, 1.99303],
        "momentum": [1.993, 1.98601, 1.97902, 1.97204, 1.96507, 1.96285, 1.96056, 1.95821],
    }
    for early_phase, path in published.items():
        weight = torch.nn.Parameter(torch.tensor([2.0]))
        optimizer = RectifiedAdam(
            [weight], lr=0.01, weight_decay=0.1, decoupled_weight_decay=True, early_phase=early_phase
        )
        for expected in path:
            weight.grad = torch.tensor([0.5])
            optimizer.step()
            assert weight.item() == pytest.approx(expected, abs=6e-6)


@pytest.mark.parametrize("late", [0, 37])
@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize("early_phase", ["momentum", "skip", "adam"])
def test_compiled_step_equals_eager(late, decoupled, early_phase):
    options = {"weight_decay": 0.01, "decoupled_weight_decay": decoupled, "early_phase": early_phase}
    eager, compiled = RectifiedAdam(parameters(), **options), RectifiedAdam(parameters(), **options)
    torch._dynamo.reset()
    compiled.step = torch.compile(compiled.step, backend="aot_eager")
    expected, got = train(eager, 60, late=late, change_lr=False), train(compiled, 60, late=late, change_lr=False)
    # Powers of beta by exp and log in place of pow: 1e-16 each.
    assert relative_gap(got, expected) < 1e-10


@pytest.mark.parametrize("rectifier", ["first_order", "exact"])
def test_capturable_step_equals_eager(rectifier):
    """Counts stay tensors and nothing branches on them; here on the CPU, where no graph is captured."""
    options = {"weight_decay": 0.01, "decoupled_weight_decay": True, "rectifier": rectifier, "betas": (0.9, 0.9999)}
    on_device = RectifiedAdam(parameters(), capturable=True, **options)
    assert relative_gap(train(on_device, 60, late=7), train(RectifiedAdam(parameters(), **options), 60, late=7)) < 1e-10
    assert {rate.step for rate in on_device.rates} == {60, 53}


@pytest.mark.parametrize("beta2", [0.999, 0.9995, 0.9999, 0.99999])
def test_gate_is_right_when_compiled(beta2):
    """torch.optim.RAdam compiled rectifies steps 2, 4 and 5 at .9999 and moves them by up to 14 times too much."""
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = RectifiedAdam([weight], lr=1.0, betas=(0.9, beta2))
    torch._dynamo.reset()
    step = torch.compile(optimizer.step, backend="aot_eager")
    moves = []
    for _ in range(8):
        before = weight.item()
        weight.grad = torch.full((1,), 100.0)
        step()
        moves.append(before - weight.item())
    # A constant gradient g: m_hat = g, psi = 1/g; early steps move by g, rectified ones by r_t. A float32 weight near
    # 500 knows its moves to 3e-5.
    expected = [100.0] * 5 + [rectification(t, beta2) for t in (6, 7, 8)]
    assert moves == pytest.approx(expected, abs=7e-5)
    assert [rate.phase for rate in optimizer.rates] == ["rectified"]  # worked out from the counts
    assert optimizer.rates[0].step == 8


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("steps", [1, 5, 6, 50])
def test_zero_gradient_with_zero_eps_stays(way, steps):
    weight = torch.nn.Parameter(torch.ones(4))
    optimizer = RectifiedAdam([weight], eps=0.0, **WAYS[way])
    for _ in range(steps):
        weight.grad = torch.tensor([0.0, 0.0, 1.0, -1.0])
        optimizer.step()
    assert weight[:2].tolist() == [1.0, 1.0]
    assert torch.isfinite(weight).all()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_parameters_keep_float32_moments(way, dtype):
    weight = torch.nn.Parameter(torch.ones(3, dtype=dtype))
    optimizer = RectifiedAdam([weight], lr=1e-4, **WAYS[way])
    for _ in range(3000):
        weight.grad = torch.ones(3, dtype=dtype)
        optimizer.step()
    state = optimizer.state[weight]
    assert state["exp_avg_sq"].dtype == state["exp_avg"].dtype == torch.float32
    # In bfloat16 v stalls at .5. 1e-4: three thousand float32 roundings.
    assert state["exp_avg_sq"][0].item() == pytest.approx(1 - 0.999**3000, rel=1e-4)
    assert weight.dtype == dtype
    # And they survive a round trip through the state dict.
    other = RectifiedAdam([torch.nn.Parameter(torch.ones(3, dtype=dtype))])
    other.load_state_dict(optimizer.state_dict())
    (loaded,) = other.state.values()
    assert loaded["exp_avg_sq"].dtype == torch.float32
    assert torch.equal(loaded["exp_avg_sq"], state["exp_avg_sq"])


@pytest.mark.parametrize("way", WAYS)
def test_state_dicts_load_both_ways(way):
    ours, theirs = RectifiedAdam(parameters(), **WAYS[way]), torch.optim.RAdam(parameters())
    train(ours, 20, change_lr=False), train(theirs, 20, change_lr=False)
    assert ours.state_dict()["state"][0].keys() == theirs.state_dict()["state"][0].keys()
    swapped_ours = RectifiedAdam(parameters(), early_phase="skip", **WAYS[way])
    swapped_theirs = torch.optim.RAdam(parameters())
    for a, b in ((swapped_ours, theirs), (swapped_theirs, ours)):
        for p, q in zip(a.param_groups[0]["params"], b.param_groups[0]["params"], strict=True):
            p.data.copy_(q.data)
        a.load_state_dict(b.state_dict())
    assert swapped_ours.param_groups[0]["early_phase"] == "skip"  # an option that torch's file does not know
    assert relative_gap(train(swapped_ours, 30, seed=2), train(swapped_theirs, 30, seed=2)) < 1e-12


def test_copies_and_pickles():
    optimizer = RectifiedAdam(parameters(), early_phase="skip")
    train(optimizer, 7)
    for twin in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert twin.param_groups[0]["early_phase"] == "skip"
        assert torch.equal(train(twin, 5), train(copy.deepcopy(optimizer), 5))


@pytest.mark.parametrize("way", WAYS)
def test_rates_tell_what_the_step_did(way):
    params = parameters()
    groups = [{"params": params[:2]}, {"params": params[2:], "lr": 0.5, "betas": (0.9, 0.99)}]
    optimizer = RectifiedAdam(groups, lr=0.1, early_phase="skip", **WAYS[way])
    train(optimizer, 8, late=5, change_lr=False)
    rates = {(rate.group, rate.step): rate for rate in optimizer.rates}
    assert set(rates) == {(0, 8), (0, 3), (1, 8)}
    assert rates[0, 8].rectification == rectification(8.0, 0.999)
    assert rates[0, 8].effective_lr == pytest.approx(0.1 * rectification(8.0, 0.999))
    assert rates[0, 3].phase == "skip"
    assert rates[0, 3].effective_lr == 0.0
    assert rates[1, 8].rho == sma_length(8.0, 0.99)
    assert all(rate.tensors == 1 for rate in optimizer.rates)


def test_gradient_laid_out_unlike_its_parameter():
    torch.manual_seed(0)
    weight, gradient = torch.randn(8, 3, 3, 3, dtype=torch.float64), torch.randn(8, 3, 3, 3, dtype=torch.float64)
    results = []
    for cls in (RectifiedAdam, torch.optim.RAdam):
        param = torch.nn.Parameter(weight.clone(memory_format=torch.channels_last))
        optimizer = cls([param])
        for _ in range(10):
            param.grad = gradient.contiguous()
            optimizer.step()
        results.append(param.detach())
    torch.testing.assert_close(*results, rtol=1e-12, atol=0)


@pytest.mark.parametrize("fused", [None, True])
def test_grad_scaler_skips_overflows_and_unscales(fused):
    def run(scaled):
        weight = torch.nn.Parameter(torch.ones(3))
        optimizer = RectifiedAdam([weight], lr=0.1, fused=fused)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=scaled)
        for step in range(12):
            optimizer.zero_grad()
            factor = math.inf if step == 7 else float(step + 1)
            if not scaled and step == 7:
                continue
            scaler.scale((weight * factor).sum()).backward()
            scaler.step(optimizer)
            scaler.update()
        return weight.detach(), optimizer.state[weight]["step"].item()

    (scaled, count), (plain, plain_count) = run(True), run(False)
    assert count == plain_count == 11
    torch.testing.assert_close(scaled, plain, rtol=1e-6, atol=0)  # float32


def test_differentiable_step():
    start = torch.tensor([1.0, -2.0], dtype=torch.float64)

    def after(gradient):
        param = start.clone().requires_grad_(True)
        clone = param.clone()
        optimizer = RectifiedAdam([clone], lr=0.1, betas=(0.9, 0.9), differentiable=True)
        for _ in range(8):
            clone.grad = gradient
            optimizer.step()
        return clone

    assert torch.autograd.gradcheck(after, torch.tensor([0.3, 0.7], dtype=torch.float64, requires_grad=True))


def test_closure_and_no_gradients():
    weight = torch.nn.Parameter(torch.ones(1))
    optimizer = RectifiedAdam([weight])

    def closure():
        optimizer.zero_grad()
        loss = (weight**2).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 1.0
    weight.grad = None
    optimizer.step()
    assert optimizer.state[weight]["step"] == 1


def test_sparse_gradients_are_refused():
    embedding = torch.nn.Embedding(5, 2, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="sparse"):
        RectifiedAdam(embedding.parameters()).step()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"lr": -1.0}, "`lr`"),
        ({"lr": torch.ones(2)}, "`lr`"),
        ({"lr": math.nan}, "`lr`"),
        ({"eps": -1.0}, "`eps`"),
        ({"weight_decay": -1.0}, "`weight_decay`"),
        ({"betas": (1.0, 0.999)}, r"`betas\[0\]`"),
        ({"betas": (0.9, 0.65)}, "no step would ever be rectified"),
        ({"betas": (0.9, 1.0)}, r"`betas\[1\]`"),
        ({"early_phase": "none"}, "`early_phase`"),
        ({"threshold": 3.9}, "`threshold`"),
        ({"rectifier": "best"}, "`rectifier`"),
        ({"fused": True, "foreach": True}, "`fused`"),
        ({"fused": True, "capturable": True}, "`fused`"),
        ({"foreach": True, "differentiable": True}, "`foreach`"),
    ],
)
def test_bad_options_are_named(options, words):
    with pytest.raises(ValueError, match=words):
        RectifiedAdam(parameters(), **options)


def test_a_bad_group_is_refused_and_not_kept():
    optimizer = RectifiedAdam(parameters())
    with pytest.raises(ValueError, match="rectified"):
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(1))], "betas": (0.9, 0.5)})
    assert len(optimizer.param_groups) == 1


def test_beta1_zero():
    ours = train(RectifiedAdam(parameters(), betas=(0.0, 0.99)), 30)
    theirs = train(torch.optim.RAdam(parameters(), betas=(0.0, 0.99)), 30)
    assert relative_gap(ours, theirs) < 1e-12
