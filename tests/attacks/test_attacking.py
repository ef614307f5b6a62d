"""What attacks leave behind (nothing), where they can run (anywhere), and what they refuse."""

import random
from copy import deepcopy
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_rectify.attacks import apgd, attacking, autoattack, correct, fgsm, input_gradient, pgd, square
from tests.attacks.models import batch, excess, generator, smooth


class Counter(nn.Module):
    """Writes to its buffers in every forward pass, whatever the mode: one in place, one anew."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("last", torch.zeros(4))

    def forward(self, images):
        self.calls += 1
        self.last = images.detach().flatten()[:4].float()
        return images


class Residual(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.body = nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU(), nn.Conv2d(channels, channels, 3, padding=1))
        self.drop = nn.ModuleDict({"out": nn.Dropout(0.5)})

    def forward(self, images):
        return images + self.drop["out"](self.body(images))


def nested(seed):
    """A network whose parts are frozen, in training or in evaluation mode by chance, some with a gradient."""
    torch.manual_seed(seed)
    frozen = nn.Sequential(Residual(4), nn.BatchNorm2d(4, affine=False))
    head = nn.Sequential(nn.Flatten(), nn.LayerNorm(64), nn.Linear(64, 5), nn.BatchNorm1d(5, momentum=None))
    net = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), Counter(), Residual(4), frozen, *head)
    net.train()
    net(torch.rand(8, 2, 4, 4))  # statistics that are not those of the start
    chance = random.Random(seed)
    for part in net.modules():
        part.training = chance.random() < 0.5
    for parameter in net.parameters():
        parameter.requires_grad_(chance.random() < 0.5)
        parameter.grad = torch.randn_like(parameter) if chance.random() < 0.5 else None
    return net


def state_of(net):
    return {
        "modes": {name: part.training for name, part in net.named_modules()},
        "identities": {name: id(buffer) for name, buffer in net.named_buffers()},
        "tensors": {name: value.clone() for name, value in net.state_dict().items()},
        "needs": {name: parameter.requires_grad for name, parameter in net.named_parameters()},
        "gradients": {name: None if p.grad is None else p.grad.clone() for name, p in net.named_parameters()},
        "random": torch.get_rng_state(),
    }


def same(one, other):
    assert one.keys() == other.keys()
    for key, value in one.items():
        if isinstance(value, dict):
            same(value, other[key])
        elif isinstance(value, torch.Tensor):
            assert torch.equal(value, other[key]), key
        else:
            assert value == other[key], key


def within(model, images, labels, epsilon, **kwargs):
    with attacking(model):
        return input_gradient(model, images, labels)[0]


ATTACKS = {
    "fgsm": fgsm,
    "fgsm_rs": partial(fgsm, random_start=1.0, step_size=0.0625),
    "pgd": partial(pgd, steps=3, restarts=2, norm="l2"),
    "apgd": partial(apgd, steps=5),
    "apgd_targeted": partial(apgd, steps=3, loss="dlr_targeted", norm="l2"),
    "square": partial(square, queries=12),
    "square_l2": partial(square, queries=12, norm="l2"),
    "correct": lambda model, images, labels, epsilon, **kwargs: correct(model, images, labels),
    "input_gradient": within,
}


@pytest.mark.parametrize("name", ATTACKS)
def test_no_trace(name):
    images, labels = batch(6, classes=5, dtype=torch.float32)
    for seed in range(8):
        net = nested(seed)
        before = state_of(net)
        ATTACKS[name](net, images, labels, 0.05, generator=generator())
        same(before, state_of(net))


def test_no_trace_of_an_attack_that_fails():
    class Failing(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.calls = nested(0), 0

        def forward(self, images):
            self.calls += 1
            if self.calls == 3:
                raise RuntimeError("no")
            return self.net(images)

    images, labels = batch(6, classes=5, dtype=torch.float32)
    model = Failing()
    before = state_of(model)
    with pytest.raises(RuntimeError, match="no"):
        pgd(model, images, labels, 0.05, generator=generator())
    same(before, state_of(model))


def test_it_attacks_in_evaluation_mode():
    net = nested(0)
    images, labels = batch(6, classes=5, dtype=torch.float32)
    still = deepcopy(net).eval()
    for model in (net, net.forward, partial(net), partial(net.forward)):
        assert torch.equal(fgsm(model, images, labels, 0.05), fgsm(still, images, labels, 0.05))


def test_a_graph_made_before_can_still_be_used():
    """A training step may attack between its forward and its backward pass."""
    net = nested(1).train()
    for parameter in net.parameters():
        parameter.requires_grad_()
    net[1] = nn.Identity()  # its buffers do change, and are put back
    images, labels = batch(6, classes=5, dtype=torch.float32)
    loss = F.cross_entropy(net(images), labels)
    pgd(net, images, labels, 0.05)
    loss.backward()


@pytest.mark.parametrize("name", ATTACKS)
def test_anywhere_the_same(name):
    images, labels = batch(6, classes=5, dtype=torch.float32)
    net, attack = nested(3), ATTACKS[name]
    expected = attack(net, images, labels, 0.05, generator=generator())
    assert not expected.requires_grad
    contexts = {
        "no_grad": torch.no_grad(),
        "inference_mode": torch.inference_mode(),
        "autocast": torch.autocast("cpu", torch.bfloat16),
    }
    for where, context in contexts.items():
        with context:
            # in inference mode these are inference tensors, which autograd refuses
            found = attack(net, images + 0.0, labels + 0, 0.05, generator=generator())
            assert torch.equal(found, expected), where
            assert found.dtype == expected.dtype


def test_autocast_would_have_changed_it():
    net = nested(3).eval()
    images, labels = batch(6, classes=5, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = net(images)
    assert rounded.dtype == torch.bfloat16 or not torch.equal(rounded, net(images))
    values = input_gradient(net, images, labels)
    with torch.autocast("cpu", torch.bfloat16):
        assert all(torch.equal(one, two) for one, two in zip(values, input_gradient(net, images, labels), strict=True))


def test_half_precision_images_are_taken_to_float32():
    net = nested(3)
    images, labels = batch(6, classes=5, dtype=torch.bfloat16)
    assert torch.equal(fgsm(net, images, labels, 0.05), fgsm(net, images.float(), labels, 0.05))


@pytest.mark.parametrize("loss", ["ce", "margin", "dlr"])
def test_input_gradient_by_finite_differences(loss):
    model = smooth()
    images, labels = batch(3)
    gradient, values, logits = input_gradient(model, images, labels, loss)
    assert torch.equal(logits, model(images))
    way = torch.randn(images.shape, generator=generator(), dtype=torch.float64)
    ahead, behind = (input_gradient(model, images + h * way, labels, loss)[1] for h in (1e-6, -1e-6))
    # central differences of step 1e-6 in float64: rounding 1e-10, curvature 1e-12
    torch.testing.assert_close((gradient * way).sum((1, 2, 3)), (ahead - behind) / 2e-6, rtol=1e-6, atol=1e-8)
    alone = input_gradient(model, images[:1], labels[:1], loss)
    torch.testing.assert_close(alone[0], gradient[:1], rtol=0, atol=1e-14)  # no mean over the batch
    assert not gradient.requires_grad
    assert not values.requires_grad
    assert not images.requires_grad


def test_input_gradient_keeps_modes():
    """Whoever wants batch statistics in an attack asks for them; ``attacking`` is for the others."""
    net = nested(2).train()
    images, labels = batch(6, classes=5, dtype=torch.float32)
    before = net[-1].num_batches_tracked.item()
    input_gradient(net, images, labels)
    assert net[-1].num_batches_tracked.item() == before + 1
    assert net.training


def test_correct():
    model = smooth()
    images, labels = batch(50)
    assert torch.equal(correct(model, images, labels), model(images).argmax(1) == labels)


# -- bad arguments -----------------------------------------------------------------------------------------------------

GIVEN = (fgsm, pgd, apgd, square, autoattack)


@pytest.mark.parametrize("attack", GIVEN, ids=lambda attack: attack.__name__)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epsilon": -0.1}, "`epsilon` to be at least 0 but got -0.1"),
        ({"epsilon": float("nan")}, "`epsilon`"),
        ({"epsilon": 8.0}, "`epsilon` to be at most 1, the width of `bounds`.*pixel units"),
        ({"norm": "l1"}, "`norm` to be 'linf' or 'l2' but got 'l1'"),
        ({"bounds": (1.0, 0.0)}, "`bounds` to be two finite numbers"),
        ({"bounds": (0.0, 0.5)}, r"`images` to be inside `bounds` \(0.0, 0.5\).*normalization"),
        ({"images": torch.rand(2, 4, 4)}, r"`images` to be of shape \(N, C, H, W\).*\(2, 4, 4\)"),
        ({"images": torch.ones(6, 2, 4, 4, dtype=torch.uint8)}, "`images` to be .* floating point but got .*uint8"),
        ({"images": torch.full((6, 2, 4, 4), float("nan"))}, "`images` to be inside"),
        ({"labels": torch.zeros(5, dtype=torch.int64)}, r"`labels` to be of shape \(6,\)"),
        ({"labels": torch.zeros(6)}, "`labels` to be .* int64 but got .*float32"),
        ({"labels": torch.full((6,), 4)}, r"`labels` to be in \[0, 4\) but got 4"),
        ({"labels": torch.tensor([0, 1, 2, 3, -1, 0])}, r"`labels` to be in \[0, 4\) but got -1"),
        ({"model": lambda images: images.flatten(1).sum(1)}, r"`model` to return logits of shape \(6, K\) but got"),
        ({"model": lambda images: (images, images)}, "`model` to return logits .* but got 'tuple'"),
    ],
)
def test_bad_arguments(attack, change, message):
    images, labels = batch()
    given = {"model": smooth(), "images": images, "labels": labels, "epsilon": 0.1, **change}
    with pytest.raises(ValueError, match=message):
        attack(given.pop("model"), given.pop("images"), given.pop("labels"), given.pop("epsilon"), **given)


@pytest.mark.parametrize(
    ("attack", "kwargs", "message"),
    [
        (pgd, {"steps": 0}, "`steps` to be at least 1 but got 0"),
        (pgd, {"steps": True}, "`steps`"),
        (pgd, {"restarts": 1.5}, "`restarts` to be an integer but got 1.5"),
        (pgd, {"step_size": 0.0}, "`step_size` to be above 0 but got 0.0"),
        (fgsm, {"step_size": -1.0}, "`step_size` to be above 0"),
        (fgsm, {"random_start": 1.5}, r"`random_start` to be a share of epsilon in \[0, 1\] but got 1.5"),
        (pgd, {"random_start": 0.0, "restarts": 2}, "`random_start` to be above 0 with several restarts"),
        (pgd, {"loss": "kl"}, "`loss` to be one of 'ce', 'margin', 'dlr' or a function but got 'kl'"),
        (pgd, {"loss": lambda z, y: z.sum()}, r"`loss` to return one value a sample, shape \(6,\), but got \(\)"),
        (apgd, {"steps": 0}, "`steps`"),
        (apgd, {"restarts": 0}, "`restarts`"),
        (apgd, {"loss": "kl"}, "`loss`"),
        (apgd, {"targets": 3}, "`targets` to be None with loss 'ce' but got 3"),
        (apgd, {"loss": "dlr_targeted", "targets": 4}, "`targets` to be at most 3, the wrong classes, but got 4"),
        (apgd, {"loss": "dlr_targeted", "targets": 0}, "`targets` to be at least 1 but got 0"),
        (square, {"queries": 0}, "`queries` to be at least 1"),
        (square, {"p_init": 0.0}, r"`p_init` to be in \(0, 1\] but got 0.0"),
        (autoattack, {"version": "fast"}, "`version` to be standard, plus, rand or custom but got 'fast'"),
        (autoattack, {"version": "custom"}, "`attacks` to be names with version 'custom'"),
        (autoattack, {"attacks": ["square"]}, "`attacks` to be names with version 'custom'"),
    ],
)
def test_bad_settings(attack, kwargs, message):
    images, labels = batch()
    with pytest.raises(ValueError, match=message):
        attack(smooth(), images, labels, 0.1, **kwargs)


@pytest.mark.parametrize(("loss", "least"), [("margin", 2), ("dlr", 3), ("dlr_targeted", 4)])
def test_losses_say_how_many_classes_they_need(loss, least):
    images, _ = batch()
    labels = torch.zeros(6, dtype=torch.int64)
    with pytest.raises(ValueError, match=f"`loss` to be one for {least - 1} classes but got .*needs {least}"):
        apgd(smooth(classes=least - 1), images, labels, 0.1, steps=2, loss=loss)
    found = apgd(smooth(classes=least), images, labels, 0.1, steps=2, loss=loss)
    assert excess(images, found, 0.1, "linf") <= 0.0


def test_a_model_without_gradient_is_refused_but_square_takes_it():
    images, labels = batch()
    net = smooth()

    def rounded(images):
        return net(images.detach())

    for attack in (fgsm, pgd, apgd):
        with pytest.raises(ValueError, match=r"`model` to be differentiable.*`square`"):
            attack(rounded, images, labels, 0.1)
    assert square(rounded, images, labels, 0.1, queries=3).shape == images.shape


def test_l2_balls_may_be_wider_than_the_bounds():
    images, labels = batch(dtype=torch.float32)
    found = pgd(smooth().float(), images, labels, 3.0, norm="l2")
    assert found.min() >= 0
    assert found.max() <= 1
