"""FrozenStartAdam against AdamW, and against the formula in float64."""

import copy

import numpy as np
import pytest
import torch

from lightning_rectify.optim.frozen_start import FrozenStartAdam
from lightning_rectify.optim.moments import second_moments

OPTIONS = {"lr": 0.05, "betas": (0.8, 0.97), "eps": 1e-3, "weight_decay": 0.1}


def gradients(steps, seed=0):
    return torch.randn(steps, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def run(optimizer, param, grads):
    path = []
    for grad in grads:
        param.grad = grad.clone()
        optimizer.step()
        path.append(param.detach().clone())
    return torch.stack(path)


def test_without_frozen_steps_it_is_adamw():
    a, b = (torch.nn.Parameter(torch.ones(3, dtype=torch.float64)) for _ in range(2))
    ours = run(FrozenStartAdam([a], frozen_steps=0, **OPTIONS), a, gradients(30))
    theirs = run(torch.optim.AdamW([b], **OPTIONS), b, gradients(30))
    # 1e-12: float64, the same formula in another order.
    assert torch.allclose(ours, theirs, rtol=0, atol=1e-12)


def test_weights_stand_still_and_then_follow_the_formula():
    frozen, grads = 10, gradients(25)
    param = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
    path = run(FrozenStartAdam([param], frozen_steps=frozen, **OPTIONS), param, grads).numpy()
    (beta1, beta2), m, v, theta = OPTIONS["betas"], np.zeros(3), np.zeros(3), np.ones(3)
    for t, g in enumerate(grads.numpy(), start=1):
        v = beta2 * v + (1 - beta2) * g**2
        if t > frozen:
            m = beta1 * m + (1 - beta1) * g
            direction = m / (1 - beta1 ** (t - frozen)) / (np.sqrt(v / (1 - beta2**t)) + OPTIONS["eps"])
            theta = theta - OPTIONS["lr"] * (direction + OPTIONS["weight_decay"] * theta)
        assert path[t - 1] == pytest.approx(theta, abs=1e-12)  # float64, another order
    assert (path[: frozen - 1] == 1).all()
    assert (path[frozen] != 1).all()


def test_goes_on_from_its_state_and_shows_its_second_moment():
    param = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
    optimizer = FrozenStartAdam([param], frozen_steps=4, **OPTIONS)
    whole = run(optimizer, param, gradients(9))
    half = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
    first = FrozenStartAdam([half], frozen_steps=4, **OPTIONS)
    run(first, half, gradients(9)[:6])
    second = FrozenStartAdam([half])
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert torch.equal(run(second, half, gradients(9)[6:])[-1], whole[-1])
    (moment,) = second_moments(optimizer)
    assert moment.corrected
    assert not moment.eps_before_correction


@pytest.mark.parametrize("bad", [{"lr": -1.0}, {"eps": -1.0}, {"frozen_steps": -1}, {"betas": (0.9, 1.0)}])
def test_bad_arguments(bad):
    (name,) = bad
    with pytest.raises(ValueError, match=f"`{name}`"):
        FrozenStartAdam([torch.nn.Parameter(torch.ones(1))], **bad)
