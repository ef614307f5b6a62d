import math
import pickle

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_rectify.modules.spectral_gan.losses import LOSSES, get_loss, gradient_penalty, r1_penalty

# -- adversarial losses ------------------------------------------------------------------------------------------------

# In numpy, float64, from the papers' formulas: (discriminator's, generator's).
FORMULAS = {
    "non_saturating": (
        lambda real, fake: np.mean(np.logaddexp(0, -real)) + np.mean(np.logaddexp(0, fake)),
        lambda fake: np.mean(np.logaddexp(0, -fake)),
    ),
    "hinge": (
        lambda real, fake: np.mean(np.maximum(0, 1 - real)) + np.mean(np.maximum(0, 1 + fake)),
        lambda fake: np.mean(-fake),
    ),
    "wasserstein": (lambda real, fake: np.mean(fake) - np.mean(real), lambda fake: np.mean(-fake)),
    "least_squares": (
        lambda real, fake: np.mean((real - 1) ** 2) / 2 + np.mean(fake**2) / 2,
        lambda fake: np.mean((fake - 1) ** 2) / 2,
    ),
}


def scores(count, seed, scale=3.0):
    return (torch.randn(count, generator=torch.Generator().manual_seed(seed)) * scale).double()


@pytest.mark.parametrize("name", FORMULAS)
def test_losses_are_their_formulas(name):
    real, fake = scores(7, seed=0), scores(5, seed=1)  # of different number: each is a mean of its own
    loss, (discriminator, generator) = get_loss(name), FORMULAS[name]
    # Float64 on both sides.
    assert loss.discriminator(real, fake).item() == pytest.approx(discriminator(real.numpy(), fake.numpy()), rel=1e-13)
    assert loss.generator(fake).item() == pytest.approx(generator(fake.numpy()), rel=1e-13)


# Both scores 0; by hand.
AT_ZERO = {"non_saturating": (2 * math.log(2), math.log(2)), "hinge": (2, 0), "wasserstein": (0, 0),
           "least_squares": (0.5, 0.5)}  # fmt: skip


@pytest.mark.parametrize("name", FORMULAS)
def test_losses_at_zero_and_far_away(name):
    zero, loss = torch.zeros(3), get_loss(name)
    found = loss.discriminator(zero, zero).item(), loss.generator(zero).item()
    assert found == pytest.approx(AT_ZERO[name], rel=1e-6)  # float32
    far = torch.tensor([-1e4, 1e4], requires_grad=True)
    total = loss.discriminator(far, far) + loss.generator(far)
    total.backward()
    assert torch.isfinite(total)
    assert torch.isfinite(far.grad).all()


@pytest.mark.parametrize("name", FORMULAS)
def test_players_pull_against_each_other(name):
    """Discriminators raise real scores and lower fake ones, generators raise them; each minimises."""
    real, fake = torch.full((2,), 0.3, requires_grad=True), torch.full((2,), 0.4, requires_grad=True)
    get_loss(name).discriminator(real, fake).backward()
    assert real.grad.max() < 0 < fake.grad.min()
    fake.grad = None
    get_loss(name).generator(fake).backward()
    assert fake.grad.max() < 0


def test_non_saturating_is_binary_cross_entropy():
    real, fake = scores(6, seed=2), scores(6, seed=3)
    loss = get_loss("non_saturating")
    both = F.binary_cross_entropy_with_logits(real, torch.ones(6).double()) + F.binary_cross_entropy_with_logits(
        fake, torch.zeros(6).double()
    )
    torch.testing.assert_close(loss.discriminator(real, fake), both)
    torch.testing.assert_close(loss.generator(fake), F.binary_cross_entropy_with_logits(fake, torch.ones(6).double()))


def test_names():
    assert set(LOSSES) == set(FORMULAS)
    with pytest.raises(ValueError, match=r"`loss` to be one of non_saturating, .* but got 'minimax'"):
        get_loss("minimax")


@pytest.mark.parametrize("name", FORMULAS)
def test_losses_can_be_pickled(name):
    assert pickle.loads(pickle.dumps(get_loss(name))) == get_loss(name)


# -- penalties ---------------------------------------------------------------------------------------------------------


def images(seed, count=5):
    return torch.randn(count, 2, 3, 3, generator=torch.Generator().manual_seed(seed)).double()


def mixes(count=5, seed=9):
    return torch.rand(count, generator=torch.Generator().manual_seed(seed)).double()


@pytest.mark.parametrize("target", [1.0, 0.0, 2.5])
def test_penalties_of_a_linear_critic(target):
    """D(x) = <w, x>: (|w| - g)^2, of gradient 2 (|w| - g) w / |w|, and |w|^2 / 2, of gradient w."""
    w = torch.randn(18, generator=torch.Generator().manual_seed(0)).double().requires_grad_()

    def critic(x):
        return x.flatten(1) @ w

    penalty = gradient_penalty(critic, images(1), images(2), mixes(), target)
    (gradient,) = torch.autograd.grad(penalty, w)
    length = np.linalg.norm(w.detach().numpy())
    # Float64 on both sides.
    assert penalty.item() == pytest.approx((length - target) ** 2, rel=1e-12)
    np.testing.assert_allclose(gradient, 2 * (length - target) / length * w.detach().numpy(), rtol=1e-12)
    penalty = r1_penalty(critic, images(1))
    (gradient,) = torch.autograd.grad(penalty, w)
    assert penalty.item() == pytest.approx(length**2 / 2, rel=1e-12)
    np.testing.assert_allclose(gradient, w.detach().numpy(), rtol=1e-12)


def test_points_lie_between_real_and_fake():
    """D(x) = |x|^2 / 2 has gradient x: the penalty shows where it was taken; u is the share of the real image."""
    real, fake, mix = images(1), images(2), mixes()

    def critic(x):
        return x.square().flatten(1).sum(dim=1) / 2

    for shares in (mix, torch.ones(5).double(), torch.zeros(5).double()):
        u = shares.numpy()[:, None]
        points = u * real.flatten(1).numpy() + (1 - u) * fake.flatten(1).numpy()
        expected = np.mean((np.linalg.norm(points, axis=1) - 1) ** 2)
        assert gradient_penalty(critic, real, fake, shares).item() == pytest.approx(expected, rel=1e-12)
    expected = np.mean(np.sum(real.flatten(1).numpy() ** 2, axis=1)) / 2
    assert r1_penalty(critic, real).item() == pytest.approx(expected, rel=1e-12)


@pytest.fixture
def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(27, 1), nn.Flatten(0)
    ).double()


def numeric_gradients(network, x, step=1e-5):
    """Central differences of each score, one number of all images at a time; score i sees image i only."""
    columns = []
    for i in range(x[0].numel()):
        shift = torch.zeros(x[0].numel()).double()
        shift[i] = step
        shift = shift.view(x.shape[1:])
        columns.append((network(x + shift) - network(x - shift)).detach().numpy() / (2 * step))
    return np.stack(columns, axis=1)


def test_penalties_of_a_network_by_finite_differences(network):
    real, fake, mix = images(1), images(2), mixes()
    u = mix[:, None, None, None]
    lengths = np.linalg.norm(numeric_gradients(network, u * real + (1 - u) * fake), axis=1)
    # Central differences: step^2 plus 1e-16 / step, both near 1e-10.
    assert gradient_penalty(network, real, fake, mix).item() == pytest.approx(np.mean((lengths - 1) ** 2), rel=1e-7)
    squares = np.sum(numeric_gradients(network, real) ** 2, axis=1)
    assert r1_penalty(network, real).item() == pytest.approx(np.mean(squares) / 2, rel=1e-7)


@pytest.mark.parametrize("penalty", [lambda net: gradient_penalty(net, images(1), images(2), mixes()),
                                     lambda net: r1_penalty(net, images(1))], ids=["gradient", "r1"])  # fmt: skip
def test_penalties_train_the_parameters(network, penalty):
    """Their gradient with respect to the weights, through the gradient with respect to the images."""
    names, values = zip(*network.named_parameters(), strict=True)

    def of(*weights):
        def critic(x):
            return torch.func.functional_call(network, dict(zip(names, weights, strict=True)), (x,))

        return penalty(critic)

    assert torch.autograd.gradcheck(of, values)


def test_penalties_touch_nothing_but_the_parameters(network):
    real, fake = images(1).requires_grad_(), images(2).requires_grad_()
    total = gradient_penalty(network, real, fake, mixes()) + r1_penalty(network, real)
    assert all(p.grad is None for p in network.parameters())  # not before backward
    total.backward()
    assert real.grad is None
    assert fake.grad is None
    assert network[0].weight.grad.abs().max() > 0


def test_a_flat_critic_is_finite():
    """Where the gradient is zero its length has none: the penalty is 1 and pushes nowhere."""
    w = torch.zeros(18, dtype=torch.float64, requires_grad=True)
    penalty = gradient_penalty(lambda x: x.flatten(1) @ w, images(1), images(2), mixes())
    penalty.backward()
    assert penalty.item() == 1
    assert (w.grad == 0).all()


def test_penalties_can_be_looked_at_without_gradients(network):
    asked = gradient_penalty(network, images(1), images(2), mixes()), r1_penalty(network, images(1))
    with torch.no_grad():
        looked = gradient_penalty(network, images(1), images(2), mixes()), r1_penalty(network, images(1))
    assert [value.item() for value in looked] == [value.item() for value in asked]


def test_penalties_refuse_shapes_that_do_not_fit(network):
    with pytest.raises(
        ValueError, match=r"`fake` to be of the shape of `real`, \(5, 2, 3, 3\), but got \(4, 2, 3, 3\)"
    ):
        gradient_penalty(network, images(1), images(2, count=4), mixes())
    with pytest.raises(ValueError, match=r"`mix` to be of shape \(5,\) but got \(5, 1\)"):
        gradient_penalty(network, images(1), images(2), mixes()[:, None])
