"""Constraints bound slopes, the penalty is its formula, generators give pairs."""

import numpy as np
import pytest
import torch
from torch import nn

from lightning_rectify.modules.spot.critics import (
    Bjorck,
    GroupSort,
    build_critics,
    clip_weights,
    constrain,
    gradient_penalty,
)
from lightning_rectify.modules.spot.networks import build_generator
from tests.reference import transport as reference


def largest_slope(critic, shape, count=4000, seed=0):
    """Over pairs of points near and far, and the gradient, of the steeper critic."""
    generator = torch.Generator().manual_seed(seed)
    x = 3 * torch.randn(count, *shape, generator=generator)
    slopes = []
    critic.eval()  # or the power iteration would make two critics of one
    for step in (1e-2, 1.0, 10.0):
        y = x + step * torch.randn(count, *shape, generator=generator)
        with torch.no_grad():
            for a, b in zip(critic(x, x), critic(y, y), strict=True):
                slopes.append(((a - b).abs() / (x - y).flatten(1).norm(dim=1)).max())
    point = x.clone().requires_grad_()
    for score in critic(point, point):
        (gradient,) = torch.autograd.grad(score.sum(), point, retain_graph=True)
        slopes.append(gradient.flatten(1).norm(dim=1).max())
    return torch.stack(slopes).max().item()


def train_to_be_steep(critic, shape, steps=30, lr=0.03):
    """Gradient steps that want nothing but a large difference between two places."""
    torch.manual_seed(1)
    optimizer = torch.optim.Adam([p for p in critic.parameters() if p.requires_grad], lr=lr)
    for _ in range(steps):
        x = torch.randn(64, *shape)
        low, high = critic(x - 1.0, x - 1.0), critic(x + 1.0, x + 1.0)
        loss = sum((a - b).mean() for a, b in zip(low, high, strict=True))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@pytest.mark.parametrize("network", ["mlp", "conv"])
def test_groupsort_critics_have_slope_at_most_one_whatever_their_weights(network):
    shape = (3,) if network == "mlp" else (2, 16, 16)
    critic = build_critics(network, shape, shape, "groupsort", width=8)
    count = 2000 if network == "mlp" else 64
    assert largest_slope(critic, shape, count) <= 1 + 1e-4  # float32, and differences of 1e-2
    train_to_be_steep(critic, shape, steps=10)
    with torch.no_grad():
        for parameter in critic.parameters():
            parameter.add_(torch.randn_like(parameter))  # far from orthonormal
    assert largest_slope(critic, shape, count) <= 1 + 1e-4


def test_groupsort_uses_its_slope():
    """What spectral normalization of piecewise linear nets does not: gradients of norm 1 nearly everywhere."""
    critic = build_critics("mlp", (3,), (3,), "groupsort", width=32)
    train_to_be_steep(critic, (3,))
    x = torch.randn(500, 3, requires_grad=True)
    (gradient,) = torch.autograd.grad(critic.x(x).sum(), x)
    assert gradient.norm(dim=1).mean() > 0.95


def test_spectral_critics_have_slope_at_most_one():
    critic = build_critics("mlp", (3,), (3,), "spectral", width=32)
    free = build_critics("mlp", (3,), (3,), "gradient_penalty", width=32)
    for network in (critic, free):
        train_to_be_steep(network, (3,))
    assert 0.5 < largest_slope(critic, (3,)) <= 1.05  # the power iteration lags behind steps as large as these
    assert largest_slope(free, (3,)) > 2  # what the constraint was for


def test_clipping_bounds_every_parameter():
    critic = build_critics("mlp", (3,), (3,), "clip", width=16)
    clip_weights(critic, 0.02)
    assert max(parameter.abs().max().item() for parameter in critic.parameters()) == pytest.approx(0.02)
    # each layer by the norm of a matrix of 0.02: 16 x 3, 16 x 16, 1 x 16
    assert largest_slope(critic, (3,)) <= 0.02**3 * (16 * 3 * 16 * 16 * 16) ** 0.5 * 1.01


def test_groupsort_sorts_neighbours():
    x = torch.tensor([[1.0, 2.0, 4.0, 3.0]])
    assert GroupSort()(x).tolist() == [[2.0, 1.0, 4.0, 3.0]]
    images = torch.randn(2, 4, 3, 3)
    expected = images.unflatten(1, (2, 2)).sort(dim=2, descending=True).values.flatten(1, 2)
    assert torch.equal(GroupSort()(images), expected)


@pytest.mark.parametrize("shape", [(5, 3), (3, 5), (4, 4)])
@pytest.mark.parametrize("iterations", [1, 12])
def test_bjorck_is_its_formula(shape, iterations):
    weight = torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = Bjorck(iterations)(weight)
    np.testing.assert_allclose(found.numpy(), reference.bjorck(weight.numpy(), iterations), atol=1e-12)  # float64
    assert torch.linalg.svdvals(found).max() <= 1 + 1e-12
    many = Bjorck(40)(weight)
    torch.testing.assert_close(torch.linalg.svdvals(many), torch.ones(min(shape), dtype=torch.float64))
    assert torch.isfinite(Bjorck()(torch.zeros(3, 2))).all()


def test_gradient_penalty_is_its_formula():
    generator = np.random.default_rng(0)
    weights = [generator.normal(size=size) for size in ((6, 3), (6,), (6,))]
    w, b, v = (torch.from_numpy(part) for part in weights)

    def critics(x, y):
        return torch.tanh(x @ w.T + b) @ v, 2.0 * y.sum(dim=1)

    real, fake = (tuple(torch.from_numpy(generator.normal(size=(7, 3))) for _ in range(2)) for _ in range(2))
    mix = torch.from_numpy(generator.uniform(size=7))
    point = (mix[:, None] * real[0] + (1 - mix[:, None]) * fake[0]).numpy()
    _, gradients = reference.tanh_critic(point, *weights)
    expected = reference.one_sided_penalty(gradients) + (2 * 3**0.5 - 1) ** 2
    assert gradient_penalty(critics, real, fake, mix).item() == pytest.approx(expected, rel=1e-12)  # float64
    flat = gradient_penalty(lambda x, y: (x.sum(dim=1) * 0.5, y.sum(dim=1) * 0.0), real, fake, mix)
    assert flat.item() == 0.0  # one-sided: a flatter critic pays nothing


def test_gradient_penalty_reaches_the_weights():
    critic = build_critics("mlp", (3,), (3,), "gradient_penalty", width=8)
    with torch.no_grad():
        for parameter in critic.parameters():
            parameter.mul_(5)
    real, fake = (tuple(torch.randn(16, 3) for _ in range(2)) for _ in range(2))
    gradient_penalty(critic, real, fake, torch.rand(16)).backward()
    assert all(critic.get_submodule(f"{side}.layers.0").weight.grad.norm() > 0 for side in "xy")


def test_released_critics_are_dcgans():
    critic = build_critics("conv", (3, 64, 64), (3, 64, 64), "clip", width=64, norm="batch")
    kinds = [type(layer).__name__ for layer in critic.x.layers]
    assert kinds == ["Conv2d", "LeakyReLU", *["Conv2d", "BatchNorm2d", "LeakyReLU"] * 3, "Conv2d"]
    assert [layer.out_channels for layer in critic.x.layers if isinstance(layer, nn.Conv2d)] == [64, 128, 256, 512, 1]
    assert critic(torch.zeros(2, 3, 64, 64), torch.zeros(2, 3, 64, 64))[0].shape == (2,)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"network": "resnet"}, "`critic`.*'mlp', 'conv'.*got 'resnet'"),
        ({"constraint": "weight_norm"}, "`constraint`.*one of spectral.*got 'weight_norm'"),
        ({"width": 0}, "`critic_width`.*at least 1.*got 0"),
        ({"width": 7, "constraint": "groupsort"}, "`critic_width`.*even.*got 7"),
        ({"norm": "layer"}, "`critic_norm`.*got 'layer'"),
        ({"norm": "batch"}, "`critic_norm`.*'none' unless.*'spectral'"),
        ({"network": "conv"}, "`shape`.*power of two"),
    ],
)
def test_bad_critics(options, words):
    with pytest.raises(ValueError, match=words):
        build_critics(**{"network": "mlp", "shape_x": (3,), "shape_y": (3,), **options})


def test_a_users_critics_are_constrained():
    class Mine(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(2, 1), nn.ConvTranspose2d(1, 1, 2)

        def forward(self, x, y):
            return 9 * self.a(x)[:, 0] / 9, self.a(y)[:, 0]

    with pytest.raises(ValueError, match=r"`constraint`.*ConvTranspose2d.*'groupsort'"):
        constrain(Mine(), "groupsort")
    critic = build_critics(Mine(), (2,), (2,), "spectral")
    critic(torch.zeros(1, 2), torch.zeros(1, 2))
    assert critic.a.weight.norm().item() == pytest.approx(1.0, abs=1e-5)  # one row: exact after one iteration


# -- generators --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", ["trunk", "none"])
@pytest.mark.parametrize(
    ("network", "shape_x", "shape_y"), [("mlp", (2,), (3, 4)), ("dcgan", (1, 16, 16), (3, 16, 16)), ("mlp", (1,), (1,))]
)
def test_generators_give_pairs(network, shape_x, shape_y, share):
    generator = build_generator(network, shape_x, shape_y, latent_size=5, width=8, share=share, norm="group")
    latents = torch.randn(6, 5)
    joined = generator(latents)
    x, y = generator.split(joined)
    assert (tuple(x.shape), tuple(y.shape)) == ((6, *shape_x), (6, *shape_y))
    expected = generator.network(latents)
    torch.testing.assert_close((x, y), expected)
    # What moves y's side alone: with a shared trunk its last layer, else all of its own.
    y.square().sum().backward()
    of_x = [p for name, p in generator.network.named_parameters() if name.startswith("head_x")]
    assert all(p.grad is None or not p.grad.any() for p in of_x)
    trunk = next(generator.network.trunk.parameters())
    assert (trunk.grad is not None and bool(trunk.grad.any())) == (share == "trunk")


def test_released_generators_are_dcgans():
    generator = build_generator("dcgan", (3, 64, 64), (3, 64, 64), latent_size=100, width=64, share="none")
    channels = [layer.out_channels for layer in generator.network.trunk if isinstance(layer, nn.ConvTranspose2d)]
    assert channels == [512, 256, 128, 64]
    assert sum(p.numel() for p in generator.parameters()) == 2 * 3_576_704  # DCGAN's generator, counted by hand
    assert generator.network.head_x.weight.std().item() == pytest.approx(0.02, rel=0.1)  # 3,072 numbers


class Pair(nn.Module):
    def __init__(self, wrong=False):
        super().__init__()
        self.layer, self.norm, self.wrong = nn.Linear(4, 3), nn.BatchNorm1d(3), wrong

    def forward(self, latents):
        x = self.norm(self.layer(latents))
        return x if self.wrong else (x, x[:, :1])


def test_a_users_generator():
    network = Pair()
    generator = build_generator(network, (3,), (1,), latent_size=4)
    assert generator.network is network
    assert network.norm.training
    assert network.norm.num_batches_tracked == 0  # the check left no trace
    for bad in (Pair(wrong=True), Pair()):
        with pytest.raises(ValueError, match=r"`generator`.*tuple of x"):
            build_generator(bad, (3,), (2,), latent_size=4)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"network": "unet"}, "`generator`.*'mlp', 'dcgan'.*got 'unet'"),
        ({"latent_size": 0}, "`latent_size`.*at least 1.*got 0"),
        ({"width": 0}, "`width`.*at least 1.*got 0"),
        ({"share": "all"}, "`share`.*got 'all'"),
        ({"norm": "layer"}, "`norm`.*got 'layer'"),
        ({"network": "dcgan"}, "`shape_x`.*power of two"),
        ({"network": "dcgan", "shape_x": (1, 8, 8), "shape_y": (1, 16, 16)}, "`share`.*'none'.*8 and 16.*got 'trunk'"),
    ],
)
def test_bad_generators(options, words):
    with pytest.raises(ValueError, match=words):
        build_generator(**{"network": "mlp", "shape_x": (2,), "shape_y": (2,), "latent_size": 4, **options})
