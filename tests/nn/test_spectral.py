import subprocess
import sys
from collections import Counter
from copy import deepcopy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from lightning_rectify.nn import (
    Control,
    Divergence,
    DOptimal,
    LipschitzRegularizer,
    SpectralConstraint,
    SpectralFactors,
    SpectralNormalization,
    bake,
    controlled_layers,
    matrix_layers,
    orthogonality_error,
    project,
    rebuilt_once,
    singular_values,
    spectral_control,
    spectral_penalty,
    spectrum,
    weight_matrix,
)
from tests.reference import spectral as reference

HAND_MADE = [[0.5, -2.0, 1.25, 0.1], [3.0], [0.9, 0.2, -0.7]]
PRESETS = {"normalization": 1, "constraint": 2, "lipschitz": 3, "divergence": 5, "d_optimal": 8}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def critic(dtype=torch.float32):
    """Each kind of layer that a discriminator may have: more outputs than inputs, fewer, transposed, grouped."""
    return nn.Sequential(
        nn.Conv2d(1, 12, 3, padding=1),  # 9 inputs: r = 9 < 12
        nn.LeakyReLU(0.2),
        nn.Conv2d(12, 6, 4, 2, 1, groups=2),
        nn.BatchNorm2d(6),
        nn.ConvTranspose2d(6, 4, 2, 2, groups=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(4 * 64, 1),
    ).to(dtype)


def images(batch=3, dtype=torch.float32):
    return torch.randn(batch, 1, 8, 8, dtype=dtype)


def small():
    return nn.Sequential(nn.Linear(5, 3), nn.Tanh(), nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))


def held(layer):
    factors = layer.parametrizations.weight
    return factors.original0, factors.original1, factors.original2


def set_spectra(module, spectra):
    for layer, e in zip(controlled_layers(module).values(), spectra, strict=True):
        with torch.no_grad():
            held(layer)[1].copy_(torch.tensor(e, dtype=torch.float64))


def spectral_net(control, dtype=torch.float64, **options):
    """Three linear layers with 4, 1 and 3 singular values, set to HAND_MADE, U and V orthonormal."""
    net = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 1), nn.Linear(3, 5)).to(dtype)
    spectral_control(net, control, start="ones", **options)
    set_spectra(net, HAND_MADE)
    return net


# -- the formulas -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", [name for pair in PRESETS.items() for name in pair])
def test_presets_project_and_penalize_as_the_authors_code(preset):
    number = PRESETS.get(preset, preset)
    net = spectral_net(preset, orthogonality=0.0)
    e = {1: reference.normalized, 8: reference.normalized, 2: reference.constrained, 5: reference.constrained}.get(
        number, np.array
    )
    projected = [e(values) for values in HAND_MADE]
    project(net)
    for layer, values in zip(controlled_layers(net).values(), projected, strict=True):
        np.testing.assert_allclose(held(layer)[1].detach().numpy(), values, rtol=1e-15)
    expected = {
        3: reference.lipschitz,
        5: lambda spectra: reference.divergence(spectra, spacing=1e-4),
        8: reference.d_optimal,
    }.get(number, lambda spectra: 0.0)(projected)
    # 1e-12: float64 on both sides.
    assert spectral_penalty(net).item() == pytest.approx(expected, rel=1e-12, abs=1e-15)


def test_exact_numbers_by_hand():
    e = [torch.tensor([0.5, -2.0]), torch.tensor([4.0])]
    # log 2 + log 4
    assert LipschitzRegularizer(2.0).penalty(e).item() == pytest.approx(2 * np.log(8))
    assert LipschitzRegularizer().penalty([x / 8 for x in e]).item() == 0.0
    # mean(log .5, log 2) = 0
    assert DOptimal().penalty(e).item() == pytest.approx(-np.log(4))
    # One pair: (1 - .5)^2 / .01 = 25 and gap .25
    gap = [torch.tensor([-0.75, 0.5], dtype=torch.float64)]
    assert Divergence(spacing=1e-7).penalty(gap).item() == pytest.approx(0.05 * (25 - np.log(0.2500001)), rel=1e-12)


def test_divergence_with_the_paper_spacing_and_with_another_law():
    spectra = [torch.tensor(e, dtype=torch.float64) for e in HAND_MADE]
    paper = Divergence(spacing=1e-7, scale=0.3).penalty(spectra)
    assert paper.item() == pytest.approx(reference.divergence(HAND_MADE, scale=0.3), rel=1e-12)
    own = Divergence(reference=lambda e: -3 * e, spacing=1e-7).penalty(spectra)
    expected = reference.divergence(HAND_MADE, minus_log_density=lambda e: 3 * e)
    assert own.item() == pytest.approx(expected, rel=1e-12)


def test_penalties_survive_zeros_and_ties():
    spectra = [torch.tensor([0.0, 0.0, 1.0, 1.0], requires_grad=True)]
    for control in (DOptimal(), Divergence(), Divergence(spacing=1e-7), LipschitzRegularizer()):
        (gradient,) = torch.autograd.grad(control.penalty(spectra), spectra)
        assert gradient.isfinite().all()
    zero = torch.zeros(3)
    SpectralNormalization().project(zero)
    assert zero.tolist() == [0.0, 0.0, 0.0]
    assert LipschitzRegularizer().penalty([zero]).item() == 0.0


def test_orthogonality_penalty():
    net = critic(torch.float64)
    spectral_control(net, "normalization", orthogonality=7.0)
    expected = 0.0
    for layer in controlled_layers(net).values():
        u, _, v = held(layer)
        with torch.no_grad():
            u += 0.1 * torch.randn_like(u)
            v += 0.1 * torch.randn_like(v)
        error = reference.orthogonality(u.detach().numpy(), v.detach().numpy())
        assert orthogonality_error(layer).item() == pytest.approx(error, rel=1e-12)
        expected += 7 * error
    assert spectral_penalty(net).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("control", [2, 3, 5, 8])
def test_penalty_gradients_against_finite_differences(control):
    net = spectral_net(control)
    for parameter in net.parameters():
        with torch.no_grad():
            parameter += 0.05 * torch.randn_like(parameter)
    spectral_penalty(net).backward()
    for layer in controlled_layers(net).values():
        for factor in held(layer):
            for index in range(0, factor.numel(), 3):
                value, h = factor.data.view(-1)[index].item(), 1e-6
                ends = []
                for end in (value + h, value - h):
                    factor.data.view(-1)[index] = end
                    ends.append(spectral_penalty(net).item())
                factor.data.view(-1)[index] = value
                slope = (ends[0] - ends[1]) / (2 * h)
                # 1e-5 + 1e-6 of the value: rounding of a penalty of 10 or so divided by h, and h^2 of the curvature.
                gradient = 0.0 if factor.grad is None else factor.grad.view(-1)[index].item()
                assert gradient == pytest.approx(slope, rel=1e-6, abs=1e-5)


def test_orthogonality_penalty_has_second_derivatives():
    net = spectral_control(nn.Linear(3, 2, dtype=torch.float64), "normalization")
    _, _, v = held(net)

    def penalty(v):
        return torch.func.functional_call(_Penalty(net), {"net.parametrizations.weight.original2": v}, ())

    v = (v + 0.1).detach().requires_grad_()
    assert torch.autograd.gradcheck(penalty, (v,))
    assert torch.autograd.gradgradcheck(penalty, (v,))


class _Penalty(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self):
        return spectral_penalty(self.net)


def test_a_control_of_ones_own_and_combinations():
    class Nuclear(Control):
        def penalty(self, spectra):
            return sum(e.abs().sum() for e in spectra)

    net = spectral_net([SpectralConstraint(0.5), "lipschitz", Nuclear()], orthogonality=0.0)
    project(net)
    assert max(spectrum(layer)[0].item() for layer in controlled_layers(net).values()) == 0.5
    clipped = [reference.constrained(e, 0.5) for e in HAND_MADE]
    expected = sum(np.abs(e).sum() for e in clipped) + reference.lipschitz(clipped)
    assert spectral_penalty(net).item() == pytest.approx(expected, rel=1e-12)


def test_one_hinge_for_the_network_not_one_a_layer():
    net = spectral_net("lipschitz", orthogonality=0.0)
    set_spectra(net, [[4.0, 1, 1, 1], [0.125], [2.0, 1, 1]])
    assert spectral_penalty(net).item() < 1e-15  # log 4 - log 8 + log 2
    copy = deepcopy(net)
    set_spectra(copy, [[4.0, 1, 1, 1], [0.25], [2.0, 1, 1]])
    assert spectral_penalty(copy).item() == pytest.approx(np.log(2))
    # The same, of a container in which both networks are: two calls, two hinges.
    both = nn.ModuleList([net, spectral_net("lipschitz", orthogonality=0.0)])
    assert spectral_penalty(both).item() == pytest.approx(reference.lipschitz(HAND_MADE), rel=1e-12)


# -- starts -----------------------------------------------------------------------------------------------------------

LAYERS = {
    "linear": lambda: nn.Linear(7, 4),
    "tall linear": lambda: nn.Linear(3, 9, bias=False),
    "conv1d": lambda: nn.Conv1d(3, 4, 5),
    "conv2d": lambda: nn.Conv2d(3, 40, 3),
    "grouped conv2d": lambda: nn.Conv2d(4, 6, 3, groups=2),
    "conv3d": lambda: nn.Conv3d(2, 3, 2),
    "conv_transpose1d": lambda: nn.ConvTranspose1d(3, 4, 5),
    "conv_transpose2d": lambda: nn.ConvTranspose2d(3, 4, (2, 3), stride=2),
    "grouped conv_transpose2d": lambda: nn.ConvTranspose2d(4, 6, 3, groups=2),
    "conv_transpose3d": lambda: nn.ConvTranspose3d(2, 3, 2),
}


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_weight_start_reproduces_the_layer(kind, dtype):
    layer = LAYERS[kind]().to(dtype)
    weight, matrix = layer.weight.detach().clone(), weight_matrix(layer).detach().double()
    spectral_control(layer)
    assert (layer.weight - weight).abs().max() < (1e-6 if dtype == torch.float32 else 1e-14)
    assert layer.weight.dtype == dtype
    u, e, v = held(layer)
    assert e.shape == (min(matrix.shape),)
    np.testing.assert_allclose(spectrum(layer).numpy(), np.linalg.svd(matrix.numpy())[1], rtol=1e-5)
    product = reference.rebuilt(*(factor.detach().double().numpy() for factor in (u, e, v)))
    np.testing.assert_allclose(product, matrix.numpy(), atol=1e-6)


@pytest.mark.parametrize("kind", LAYERS)
def test_ones_start_is_orthonormal_and_fresh(kind):
    layer = LAYERS[kind]()
    before = layer.weight.detach().clone()
    spectral_control(layer, start="ones")
    # The paper's start. 1e-10: a few hundred squares of float32 roundings of 1e-7 or so.
    assert all(factor.is_contiguous() for factor in held(layer))
    assert orthogonality_error(layer).item() < 1e-10
    assert spectrum(layer).eq(1.0).all()
    np.testing.assert_allclose(singular_values(weight_matrix(layer)).numpy(), 1.0, atol=1e-6)
    assert not torch.allclose(layer.weight, before, atol=1e-2)


def test_ones_start_follows_the_seed():
    def weight():
        torch.manual_seed(3)
        return spectral_control(nn.Linear(4, 4), start="ones").weight

    assert torch.equal(weight(), weight())


def test_spread_start_is_at_the_quantiles_of_the_reference_law():
    layer = spectral_control(nn.Linear(400, 400), "divergence", start="spread")
    e = spectrum(layer).double()
    assert e[0] <= 1.0
    assert e.diff().max() < 0  # no ties
    # A half-normal law of standard deviation .1 / sqrt(2) below 1: its mean and its mean square.
    assert (1 - e).mean().item() == pytest.approx(0.1 / np.sqrt(np.pi), rel=1e-2)
    assert (1 - e).square().mean().item() == pytest.approx(0.005, rel=2e-2)
    assert spectrum(spectral_control(nn.Linear(5, 1), 5, start="spread")).tolist() == [1.0]


def test_quantiles_of_a_law_given_by_its_density_agree_with_the_closed_form():
    closed, numeric = Divergence(), Divergence(reference=lambda e: -(((1 - e) / 0.1) ** 2))
    # 1e-4: two points of the numeric grid.
    torch.testing.assert_close(numeric.quantiles(50), closed.quantiles(50), atol=1e-4, rtol=0)
    uniform = Divergence(reference=torch.zeros_like).quantiles(4)
    torch.testing.assert_close(uniform, torch.tensor([7, 5, 3, 1]).double() / 8, atol=1e-4, rtol=0)
    wide = Divergence(scale=5.0).quantiles(9)  # a wide law is cut at 0
    assert wide.min() > 0


def test_spread_start_moves_where_ones_would_not():
    """The reason for the start: at equal values the penalty's gradient is that of the spacing."""

    def gradient(start, spacing):
        net = spectral_control(nn.Linear(40, 20), [Divergence(spacing=spacing)], start=start, orthogonality=0.0)
        spectral_penalty(net).backward()
        return held(net)[1].grad.abs().max().item()

    assert gradient("ones", 1e-7) > 1e4
    assert gradient("ones", 1e-4) < 1e2
    assert gradient("spread", 1e-7) < 5


# -- projection -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("control", [1, 2, 5, 8])
def test_norms_are_at_most_one_after_every_step(control):
    net = spectral_control(critic(), control, start="weight")
    optimizer = torch.optim.Adam(net.parameters(), lr=2e-3, betas=(0.5, 0.999))
    x = images(8)
    project(net)
    for _ in range(30):
        loss = nn.functional.softplus(net(x)).mean() + nn.functional.softplus(-net(-x)).mean() + spectral_penalty(net)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        project(net)
        for layer in controlled_layers(net).values():
            assert spectrum(layer)[0] <= 1.0 + 1e-6
            # 0.05: U and V drift by about the learning rate times their size between penalty and step.
            assert singular_values(weight_matrix(layer))[0] < 1.05


def test_the_orthogonality_penalty_is_what_ties_e_to_the_singular_values():
    def worst(orthogonality):
        torch.manual_seed(0)
        net = spectral_control(small(), "normalization", start="ones", orthogonality=orthogonality)
        optimizer = torch.optim.Adam(net.parameters(), lr=5e-3)
        x = torch.randn(32, 5)
        for _ in range(400):
            project(net)
            loss = nn.functional.softplus(-net(x) * x[:, :1]).mean() + spectral_penalty(net)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        project(net)
        layers = controlled_layers(net).values()
        return max((singular_values(weight_matrix(layer)) - spectrum(layer)).abs().max().item() for layer in layers)

    assert worst(10.0) < 0.02
    assert worst(0.0) > 0.5


def test_projection_leaves_no_trace_in_the_graph_and_moves_nothing_else():
    net = spectral_net(1)
    others = [(factor, factor.detach().clone()) for layer in controlled_layers(net).values() for factor in held(layer)]
    project(net)
    assert all(factor.grad_fn is None and factor.is_leaf for factor, _ in others)
    for index, (factor, before) in enumerate(others):
        assert torch.equal(factor, before) is (index % 3 != 1)


def test_retraction_every_third_call():
    net = spectral_control(nn.Linear(6, 4), "normalization", retraction=3)
    u, _, v = held(net)
    assert spectral_penalty(net).item() == 0.0
    errors, before = [], None
    for step in range(1, 7):
        with torch.no_grad():
            for factor in (u, v):
                factor += 0.05 * torch.randn_like(factor)
        if step == 3:
            before = (u.detach().clone(), v.detach().clone())
        project(net)
        errors.append(orthogonality_error(net).item() < 1e-10)
        if step == 3:
            for factor, old in zip((u, v), before, strict=True):
                q, r = np.linalg.qr(old.double().numpy())
                np.testing.assert_allclose(factor.detach().numpy(), q * np.sign(np.diag(r)), atol=1e-5)
    assert errors == [False, False, True, False, False, True]


def test_retraction_leaves_orthonormal_factors_alone():
    net = spectral_control(nn.Linear(6, 4, dtype=torch.float64), SpectralConstraint(), retraction=1)
    weight = net.weight.detach().clone()
    project(net)
    torch.testing.assert_close(net.weight, weight, atol=1e-14, rtol=0)


def test_retraction_resumes_where_it_was():
    def train(net, steps):
        for step in steps:
            with torch.no_grad():
                for factor in held(net):
                    factor += 0.01 * torch.sin(torch.arange(factor.numel()) + step).view_as(factor)
            project(net)
        return net

    make = lambda: spectral_control(nn.Linear(6, 4), "d_optimal", retraction=3)  # noqa: E731
    start = make().state_dict()
    whole, first, second = make(), make(), make()
    whole.load_state_dict(start)
    first.load_state_dict(start)
    train(whole, range(8))
    second.load_state_dict(train(first, range(4)).state_dict())
    train(second, range(4, 8))
    for key, value in whole.state_dict().items():
        assert torch.equal(value, second.state_dict()[key]), key


# -- rebuilding once --------------------------------------------------------------------------------------------------


@pytest.fixture
def rebuilds(monkeypatch):
    counts = Counter()
    original = SpectralFactors._rebuild

    def counted(self, *factors):
        counts[id(self)] += 1
        return original(self, *factors)

    monkeypatch.setattr(SpectralFactors, "_rebuild", counted)
    return counts


def two_pass_gradients(net, x):
    loss = net(x).sin().mean() - net(-x).cos().mean() + spectral_penalty(net)
    net.zero_grad()
    loss.backward()
    return [parameter.grad.clone() for parameter in net.parameters()]


def test_rebuilt_once_rebuilds_once_and_gives_the_same_gradients(rebuilds):
    net, x = spectral_control(critic()), images()
    rebuilds.clear()  # torch looks at each weight when it is registered
    expected = two_pass_gradients(net, x)
    assert set(rebuilds.values()) == {2}
    rebuilds.clear()
    with rebuilt_once(net):
        gradients = two_pass_gradients(net, x)
    assert sorted(rebuilds.values()) == [1] * 4
    for gradient, other in zip(gradients, expected, strict=True):
        # Relative 1e-4: the two passes' float32 gradients are added in another order.
        torch.testing.assert_close(gradient, other, rtol=1e-4, atol=1e-6)
    rebuilds.clear()
    net(x)
    net(x)
    assert set(rebuilds.values()) == {2}  # and nothing stays behind


def test_rebuilt_once_concerns_its_module_only(rebuilds):
    net, other = spectral_control(nn.Linear(4, 3)), spectral_control(nn.Linear(4, 3))
    rebuilds.clear()
    with rebuilt_once(net), rebuilt_once(net):  # nested as well
        for layer in (net, other):
            layer(torch.ones(1, 4))
            layer(torch.ones(1, 4))
    assert rebuilds == {id(net.parametrizations.weight[0]): 1, id(other.parametrizations.weight[0]): 2}


@pytest.mark.parametrize("change", ["project", "step", "fused step", "in place", "load", "backward"])
def test_a_kept_weight_does_not_outlive_a_change(change):
    net, x = spectral_control(nn.Linear(4, 3), "normalization"), torch.ones(1, 4)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.1, fused=change.startswith("fused"))
    for parameter in net.parameters():
        parameter.grad = torch.ones_like(parameter)
    other = {key: value + 1 for key, value in net.state_dict().items()}
    with rebuilt_once(net):
        first = net(x)
        if change == "project":
            project(net)
        elif change == "in place":
            with torch.no_grad():
                held(net)[1].mul_(2)
        elif change == "load":
            net.load_state_dict(other)
        elif change == "backward":
            first.sum().backward()
            net(x).sum().backward()  # would raise: the first graph is gone
        else:
            optimizer.step()
        within = net(x)
    assert torch.equal(within, net(x))
    assert change == "backward" or not torch.allclose(within, first)


def test_a_weight_made_without_gradients_is_not_kept_for_a_pass_with_them():
    net, x = spectral_control(nn.Linear(4, 3)), torch.ones(1, 4)
    with rebuilt_once(net):
        with torch.no_grad():
            net(x)
        net(x).sum().backward()
    assert all(factor.grad is not None for factor in held(net))


def test_rebuilt_once_cleans_up_after_an_error_and_can_be_copied():
    net = spectral_control(nn.Linear(4, 3))
    copies = []

    def fail():
        with rebuilt_once(net):
            net(torch.ones(1, 4))
            copies.append(deepcopy(net))
            raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        fail()
    for layer in (net, *copies):
        assert layer.parametrizations.weight[0].cache.depth == 0
        assert layer.weight is not layer.weight


def test_gradient_penalty_through_a_kept_weight():
    """The penalty on the gradient by the image (R1) differentiates twice through the rebuilt weight."""
    net, x = spectral_control(critic()).eval(), images().requires_grad_()

    def gradients():
        net.zero_grad()
        out = net(x)
        (by_image,) = torch.autograd.grad(out.sum(), x, create_graph=True)
        (out.mean() + by_image.square().sum() + net(-x).mean()).backward()
        return [parameter.grad.clone() for parameter in net.parameters() if parameter.grad is not None]

    expected = gradients()
    with rebuilt_once(net):
        for gradient, other in zip(gradients(), expected, strict=True):
            torch.testing.assert_close(gradient, other, rtol=1e-4, atol=1e-6)


# -- there and back ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("control", ["plain", "spectral_norm", "orthogonal", "d_optimal", 3])
@pytest.mark.parametrize("inplace", [False, True])
def test_baked_networks_are_plain_and_equal(control, inplace):
    net, x = spectral_control(critic(), control), images()
    project(net)
    net.train()(x)  # spectral_norm takes a power iteration, batch norm a batch
    expected = net.eval()(x)
    net.train()
    baked = bake(net, inplace=inplace)
    assert (baked is net) is inplace
    assert (baked.eval()(x) - expected).abs().max() < 1e-6
    plain = critic()
    assert list(baked.state_dict()) == list(plain.state_dict())
    assert [name for name, _ in baked.named_parameters()] == [name for name, _ in plain.named_parameters()]
    assert [type(layer) for layer in baked.modules()] == [type(layer) for layer in plain.modules()]
    assert all(weight.is_contiguous() and weight.requires_grad for weight in baked.parameters())
    plain.load_state_dict(baked.state_dict())
    assert (plain.eval()(x) - expected).abs().max() < 1e-6
    assert spectral_penalty(baked).item() == 0.0
    spectral_control(baked, "normalization")  # and can be controlled again


def test_a_baked_copy_leaves_the_original_and_other_copies_whole():
    net, x = spectral_control(critic()).eval(), images()
    other, expected = deepcopy(net), net(x)
    bake(other, inplace=True)
    bake(net)
    assert torch.equal(net(x), expected)
    assert list(controlled_layers(net)) == ["0", "2", "4", "7"]


def test_baking_keeps_frozen_weights_frozen_and_other_parametrizations():
    net = nn.Sequential(nn.Linear(3, 3).requires_grad_(False), parametrizations.weight_norm(nn.Linear(3, 2)))
    spectral_control(net, exclude="1")
    baked = bake(net)
    assert not baked[0].weight.requires_grad
    assert parametrize.is_parametrized(baked[1], "weight")


def test_baked_weights_load_without_the_package(tmp_path):
    net, x = spectral_control(critic(), "d_optimal", start="ones").eval(), images()
    torch.save({"weights": bake(net).state_dict(), "x": x, "y": net(x).detach()}, tmp_path / "baked.pt")
    script = f"""
import sys
sys.modules["lightning_rectify"] = None  # an import of it would fail
import torch
from torch import nn
saved = torch.load({str(tmp_path / "baked.pt")!r}, weights_only=True)
net = nn.Sequential(nn.Conv2d(1, 12, 3, padding=1), nn.LeakyReLU(0.2), nn.Conv2d(12, 6, 4, 2, 1, groups=2),
    nn.BatchNorm2d(6), nn.ConvTranspose2d(6, 4, 2, 2, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(256, 1))
net.load_state_dict(saved["weights"])
print((net.eval()(saved["x"]) - saved["y"]).abs().max().item())
"""
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert out.returncode == 0, out.stderr
    assert float(out.stdout) < 1e-6


@pytest.mark.parametrize("prefix", ["", "critic.inner."])
def test_a_plain_checkpoint_loads_into_a_controlled_network(prefix):
    plain, x = critic().eval(), images()
    net = target = spectral_control(critic(), retraction=2).eval()
    if prefix:
        target = nn.ModuleDict({"critic": nn.ModuleDict({"inner": net})})
    project(net)
    saved = {prefix + key: value for key, value in plain.state_dict().items()}
    keys = list(saved)
    assert target.load_state_dict(saved).missing_keys == []
    assert list(saved) == keys  # the caller's dictionary stays as it was
    assert (net(x) - plain(x)).abs().max() < 1e-6
    assert all(layer.parametrizations.weight[0].projections == 0 for layer in controlled_layers(net).values())


def test_plain_checkpoints_load_into_copies_and_by_assignment():
    plain, x = critic().eval(), images()
    net = spectral_control(critic()).eval()
    copy, before = deepcopy(net), net(x)
    copy.load_state_dict(plain.state_dict(), assign=True)
    assert (copy(x) - plain(x)).abs().max() < 1e-6
    assert torch.equal(net(x), before)


def test_controlled_checkpoints_load_as_usual_and_wrong_shapes_are_named():
    net, other = spectral_control(critic()), spectral_control(critic())
    other.load_state_dict(net.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), other.parameters(), strict=True))
    with pytest.raises(RuntimeError, match=r"size mismatch for weight: .* \(3, 5\), the layer \(3, 4\)"):
        spectral_control(nn.Linear(4, 3)).load_state_dict(nn.Linear(5, 3).state_dict())


def test_assigning_a_weight_decomposes_it():
    layer, weight = spectral_control(nn.Conv2d(2, 3, 3)), torch.randn(3, 2, 3, 3)
    layer.weight = weight
    torch.testing.assert_close(layer.weight, weight, atol=1e-6, rtol=0)
    layer = spectral_control(nn.Linear(3, 3), start="ones")  # whose start the assignment must not meet
    layer.weight = weight[0, 0]
    torch.testing.assert_close(layer.weight, weight[0, 0], atol=1e-6, rtol=0)


# -- life with the rest of torch --------------------------------------------------------------------------------------


def test_deepcopy_is_independent_and_keeps_its_controls_together():
    net, x = spectral_control(critic(), 3).eval(), images()
    copy = deepcopy(net)
    assert torch.equal(copy(x), net(x))
    sets = {id(layer.parametrizations.weight[0].settings) for layer in controlled_layers(copy).values()}
    assert len(sets) == 1
    with torch.no_grad():
        held(copy[0])[1].mul_(3)
    assert not torch.equal(copy(x), net(x))


def test_autocast_does_not_touch_the_factors():
    net, x = spectral_control(critic(), start="ones"), images()
    full_weight, full_penalty = net[0].weight, spectral_penalty(net)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(net[0].weight, full_weight)
        penalty = spectral_penalty(net)
        error = orthogonality_error(net[2])
        assert net(x).dtype == torch.bfloat16
    assert penalty.dtype == torch.float32
    assert torch.equal(penalty, full_penalty)
    assert error < 1e-10  # in bfloat16 it reads 1e-3


def test_half_precision_weights_are_rebuilt_in_float32():
    layer = spectral_control(nn.Linear(64, 64), start="ones").to(torch.bfloat16)
    u, e, v = (factor.float() for factor in held(layer))
    assert layer.weight.dtype == torch.bfloat16
    assert torch.equal(layer.weight, ((u * e) @ v.T).bfloat16())
    assert spectral_penalty(layer).dtype == torch.float32
    project(layer)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_compile_and_export():
    net, x = spectral_control(critic(), "d_optimal").eval(), images()
    expected = two_pass_gradients(net, x)
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    penalty = torch.compile(spectral_penalty, backend="aot_eager", fullgraph=True)
    with rebuilt_once(net):
        loss = compiled(x).sin().mean() - compiled(-x).cos().mean() + penalty(net)
        net.zero_grad()
        loss.backward()
    for parameter, gradient in zip(net.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-6)
    exported = torch.export.export(net, (x,)).module()
    torch.testing.assert_close(exported(x), net(x))


def test_spectral_control_on_the_meta_device():
    net = spectral_control(critic().to("meta"))
    assert spectral_penalty(net).device.type == "meta"
    assert net[0].weight.shape == (12, 1, 3, 3)


# -- baselines, exclusion, bad input ----------------------------------------------------------------------------------


def test_plain_and_nothing_controlled():
    net, x = critic().eval(), images()
    expected = net(x)
    assert spectral_control(net, "plain") is net
    project(net)
    assert torch.equal(net(x), expected)
    assert controlled_layers(net) == {}
    penalty = spectral_penalty(net)
    assert penalty.item() == 0.0
    assert penalty.shape == ()
    assert spectral_penalty(nn.ReLU()).item() == 0.0
    assert spectral_penalty(nn.Linear(2, 2, device="meta")).device.type == "meta"


def test_spectral_norm_baseline_bounds_the_matrix_of_each_layer():
    net = spectral_control(
        nn.Sequential(nn.Conv2d(3, 6, 3), nn.ConvTranspose2d(6, 3, 3), nn.Linear(5, 5)), "spectral_norm"
    )
    for _ in range(200):
        net(torch.randn(1, 3, 5, 5))
    for layer in matrix_layers(net.eval()).values():
        # 1e-3: power iterations on matrices whose two largest values are close.
        assert singular_values(weight_matrix(layer))[0].item() == pytest.approx(1.0, abs=1e-3)


def test_orthogonal_baseline():
    net = spectral_control(critic(torch.float64), "orthogonal", orthogonality=3.0)
    assert spectral_penalty(net).item() < 1e-25
    assert list(net.state_dict()) == list(critic().state_dict())
    expected = 0.0
    for name, layer in matrix_layers(net).items():
        with torch.no_grad():
            layer.weight += 0.1 * torch.randn_like(layer.weight)
        w = weight_matrix(layer).detach().numpy()
        gram = w @ w.T if w.shape[0] <= w.shape[1] else w.T @ w
        error = ((gram - np.eye(len(gram))) ** 2).sum()
        assert orthogonality_error(net.get_submodule(name)).item() == pytest.approx(error, rel=1e-12)
        expected += 3 * error
    assert spectral_penalty(deepcopy(net)).item() == pytest.approx(expected, rel=1e-12)
    spectral_penalty(net).backward()
    assert net[0].weight.grad.abs().max() > 0


def test_embeddings_and_norms_are_left_alone_and_excluded_names_too():
    def make():
        block = nn.ModuleDict({"shortcut": nn.Conv2d(3, 3, 1), "conv": nn.Conv2d(3, 3, 3)})
        return nn.ModuleDict({"embed": nn.Embedding(5, 4), "norm": nn.BatchNorm2d(3), "block": block,
                              "heads": nn.ModuleList([nn.Linear(3, 1), nn.Linear(3, 2)])})  # fmt: skip

    assert list(controlled_layers(spectral_control(make()))) == ["block.shortcut", "block.conv", "heads.0", "heads.1"]
    cases = {
        "*.shortcut": ["block.conv", "heads.0", "heads.1"],
        "block": ["heads.0", "heads.1"],
        ("heads.1", "block.c*"): ["block.shortcut", "heads.0"],
    }
    for exclude, names in cases.items():
        assert list(controlled_layers(spectral_control(make(), exclude=exclude))) == names
    with pytest.raises(ValueError, match=r"argument `exclude` .* \['shortcut'\]"):
        spectral_control(make(), exclude=["block", "shortcut"])


def test_biases_stay():
    net = critic()
    bias = net[0].bias
    assert spectral_control(net, start="ones")[0].bias is bias


def tied():
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    net[1].weight = net[0].weight
    return net


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: spectral_control(small(), "sn"), "argument `control` .* 'd_optimal' .* got 'sn'"),
        (lambda: spectral_control(small(), 4), r"'divergence' \(5\).* got 4"),
        (lambda: spectral_control(small(), True), "argument `control` .* True"),
        (lambda: spectral_control(small(), []), r"argument `control` .* \[\]"),
        (lambda: spectral_control(small(), ["plain", DOptimal()]), "by itself .* got 'plain'"),
        (lambda: spectral_control(small(), start="zeros"), "argument `start` .* 'zeros'"),
        (lambda: spectral_control(small(), orthogonality=-1.0), "argument `orthogonality` .* -1.0"),
        (lambda: spectral_control(small(), orthogonality=float("nan")), "argument `orthogonality` .* nan"),
        (lambda: spectral_control(small(), retraction=-1), "argument `retraction` .* -1"),
        (lambda: spectral_control(small(), retraction=0.5), "argument `retraction` .* 0.5"),
        (lambda: spectral_control(nn.ReLU()), "argument `module`"),
        (lambda: spectral_control(nn.Linear(2, 2), exclude="*"), "argument `module`"),
        (lambda: spectral_control(spectral_control(small())), "argument `module` .* '0'"),
        (lambda: spectral_control(spectral_control(small(), "orthogonal")), "argument `module` .* '0'"),
        (lambda: spectral_control(parametrizations.weight_norm(nn.Linear(2, 2))), "argument `module` .* parametrized"),
        (lambda: spectral_control(prune.identity(nn.Linear(2, 2), "weight")), "argument `module` .* parametrized"),
        (lambda: spectral_control(nn.LazyLinear(2)), "argument `module` .* lazy"),
        (lambda: spectral_control(tied()), r"argument `module` .* \['0.weight', '1.weight'\]"),
        (lambda: spectrum(nn.Linear(2, 2)), "argument `layer`"),
        (lambda: orthogonality_error(nn.Linear(2, 2)), "argument `layer`"),
        (lambda: SpectralConstraint(0.0), "argument `bound` .* 0.0"),
        (lambda: LipschitzRegularizer(-1.0), "argument `weight` .* -1.0"),
        (lambda: DOptimal(float("inf")), "argument `weight` .* inf"),
        (lambda: Divergence(scale=0.0), "argument `scale` .* 0.0"),
        (lambda: Divergence(spacing=-1e-7), "argument `spacing` .* -1e-07"),
    ],
)  # fmt: skip
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_refused_call_changes_nothing():
    net = nn.Sequential(nn.Linear(2, 2), parametrizations.weight_norm(nn.Linear(2, 2)))
    with pytest.raises(ValueError, match="parametrized"):
        spectral_control(net)
    assert controlled_layers(net) == {}
