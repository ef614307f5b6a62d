"""Adaptation: losses and scores against plain rewrites and closed forms, the parts of a run, what sees which label."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from lightning_rectify._lightning import Callback
from lightning_rectify.data.domains import DomainPairs
from lightning_rectify.modules.spot.adaptation import SPOTAdaptation
from lightning_rectify.modules.spot.adaptation_joint import network_loss, pair_loss
from lightning_rectify.modules.spot.adaptation_losses import (
    confident_loss,
    critic_loss,
    entropy_of_mean,
    fooling_loss,
    mean_entropy,
    neighbourhood_density,
    slope_penalty,
    vary,
)
from lightning_rectify.modules.spot.adaptation_networks import DigitClassifier, DigitPair, DomainNetwork, ImageMap
from lightning_rectify.optim import RectifiedAdam
from tests.helpers.training import largest_difference, trainer, weights

SMALL = {"generator_width": 4, "critic_width": 4, "classifier_width": 16, "latent_size": 4}
DATA = {"train_size": 64, "val_size": 50, "batch_size": 32, "eval_batch_size": 30}


def batch(count=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.rand(2, count, 1, 16, 16, generator=generator)
    return x, torch.arange(count) % 10, y


# -- losses and scores -------------------------------------------------------------------------------------------------


def test_adversarial_losses_are_their_formulas():
    generator = np.random.default_rng(0)
    real, fake = generator.standard_normal((2, 50))
    tensors = torch.from_numpy(real), torch.from_numpy(fake)
    sigmoid = lambda s: 1 / (1 + np.exp(-s))  # noqa: E731
    # 1e-12: float64, other order of sums.
    assert critic_loss("wasserstein", *tensors).item() == pytest.approx(fake.mean() - real.mean(), abs=1e-12)
    expected = -np.log(sigmoid(real)).mean() - np.log(1 - sigmoid(fake)).mean()
    assert critic_loss("logistic", *tensors).item() == pytest.approx(expected, abs=1e-12)
    assert fooling_loss("logistic", tensors[1]).item() == pytest.approx(-np.log(sigmoid(fake)).mean(), abs=1e-12)
    assert fooling_loss("wasserstein", tensors[1]).item() == pytest.approx(-fake.mean(), abs=1e-12)


@pytest.mark.parametrize(("length", "expected"), [(0.5, 0.0), (3.0, 4.0)])
def test_slope_penalty_of_a_linear_critic(length, expected):
    direction = torch.zeros(4, dtype=torch.float64)
    direction[1] = length
    x, y = torch.randn(2, 5, 4, dtype=torch.float64)
    found = slope_penalty("wasserstein", lambda images: images @ direction, x, y, torch.rand(5))
    assert found.item() == pytest.approx(expected, abs=1e-10)  # float64; 1e-12 is added under the root
    r1 = slope_penalty("logistic", lambda images: images @ direction, x, y)
    assert r1.item() == pytest.approx(length**2 / 2, abs=1e-12)


def test_confident_loss_takes_sure_answers_alone():
    teacher = torch.tensor([[5.0, 0.0], [0.1, 0.0], [0.0, 6.0]])
    logits = torch.tensor([[1.0, 2.0], [3.0, 0.0], [0.0, 1.0]], requires_grad=True)
    loss, share = confident_loss(logits, teacher, 0.9)
    expected = (math.log(1 + math.e) + math.log(1 + math.exp(-1.0))) / 3
    assert share.item() == pytest.approx(2 / 3)
    assert loss.item() == pytest.approx(expected, rel=1e-6)  # float32
    (gradient,) = torch.autograd.grad(loss, logits)
    assert gradient[1].abs().max() == 0 < gradient[0].abs().max()


def test_neighbourhood_density_is_the_plain_rewrite():
    logits = np.random.default_rng(1).standard_normal((7, 4))
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    f = p / np.linalg.norm(p, axis=1, keepdims=True)
    total = 0.0
    for i in range(7):
        near = np.array([math.exp(f[i] @ f[j] / 0.05) for j in range(7) if j != i])
        near /= near.sum()
        total -= (near * np.log(near)).sum()
    # 1e-9: float64 exponentials of up to 20.
    assert neighbourhood_density(torch.from_numpy(logits)) == pytest.approx(total / 7, rel=1e-9)


def test_scores_know_sure_even_and_lost_classes():
    sure = 50 * torch.eye(10).repeat(20, 1)
    assert mean_entropy(sure) == pytest.approx(0.0, abs=1e-9)
    assert entropy_of_mean(sure) == pytest.approx(math.log(10), rel=1e-9)
    assert entropy_of_mean(sure[:1].repeat(200, 1)) == pytest.approx(0.0, abs=1e-9)
    assert mean_entropy(torch.zeros(5, 10)) == pytest.approx(math.log(10), rel=1e-9)
    # Ten clusters of 20 each: 19 equally near neighbours, the others e^-20 away.
    assert neighbourhood_density(sure) == pytest.approx(math.log(19), abs=1e-5)
    with pytest.raises(ValueError, match=r"`logits`.*at least 2.*got 1"):
        neighbourhood_density(torch.zeros(1, 3))


def test_vary_shifts_and_leaves_alone():
    images = torch.rand(3, 1, 16, 16)
    assert vary(images, torch.zeros(3, 6), 0.0) is images
    numbers = torch.zeros(3, 6)
    numbers[:, 1] = -0.06 / 0.29  # no zoom
    # 1e-5: float32 grid coordinates of 16 pixels.
    assert torch.allclose(vary(images, numbers, 1.0), images, atol=1e-5)
    numbers[:, 4] = 1.0  # a shift of 0.1 in a side of length 2: 0.8 of 16 pixels
    moved = vary(images, numbers, 1.0)
    expected = 0.2 * images[..., :-1] + 0.8 * images[..., 1:]
    assert torch.allclose(moved[..., :-1], expected, atol=1e-5)


# -- networks ----------------------------------------------------------------------------------------------------------


def test_released_networks_have_the_released_sizes():
    """Counted by hand from the notes on the authors' code: 28 pixels, one channel."""
    count = lambda network: sum(p.numel() for p in network.parameters())  # noqa: E731
    features = (20 * 25 + 20) + (50 * 20 * 25 + 50) + (500 * 50 * 16 + 500) + 1
    assert count(DigitClassifier(width=500)) == features + 500 * 10 + 10
    assert count(DomainNetwork()) == features + (20 * 25 + 20) + 500 * 10 + 10 + 2 * 501
    layers = [100 * 1024 * 16 + 1024, 1024 * 512 * 9 + 512, 512 * 256 * 9 + 256, 256 * 128 * 9 + 128]
    assert count(DigitPair()) == sum(layers) + 4 + 2 * (128 * 36 + 1)


@pytest.mark.parametrize("size", [16, 20, 24, 28, 32])
def test_networks_fit_every_size(size):
    pair = DigitPair(3, size, 5, 8)(torch.randn(2, 5))
    assert [tuple(side.shape) for side in pair] == [(2, 3, size, size)] * 2
    assert DigitClassifier(7, 3, size, 12)(pair[0]).shape == (2, 7)
    assert ImageMap(3, size, 5, 2)(pair[0], torch.randn(2, 5)).shape == pair[0].shape


def test_map_starts_as_the_identity():
    images = torch.rand(4, 1, 16, 16)
    # 1e-5: float32 grid coordinates of 16 pixels.
    assert torch.allclose(ImageMap(1, 16, 3, 2)(images, torch.randn(4, 3)), images, atol=1e-5)


# -- the joint method's losses -----------------------------------------------------------------------------------------


def test_joint_losses_are_the_formula_term_by_term():
    torch.manual_seed(0)
    network, (x, labels, y) = DomainNetwork(10, 1, 16, 8).double(), batch()
    x, y = x.double(), y.double()
    fakes = torch.rand(2, 6, 1, 16, 16, dtype=torch.float64)
    loss, cost = network_loss(network, (x, labels, y), tuple(fakes), "logistic", 10.0, 0.01, lambda *_: 0.0)
    phi = [network.features(fakes[0], "source"), network.features(fakes[1], "target")]
    expected = (phi[0] - phi[1]).square().sum(dim=1).mean()
    adversarial = sum(
        critic_loss("logistic", network.scores(real, domain), network.scores(fake, domain))
        for real, fake, domain in ((x, fakes[0], "source"), (y, fakes[1], "target"))
    )
    entropy = nn.functional.cross_entropy(network.logits(x, "source"), labels)
    # 1e-9: float64, batches of another size.
    assert cost.item() == pytest.approx(expected.item(), rel=1e-9)
    assert loss.item() == pytest.approx((adversarial + 10 * entropy + 0.01 * expected).item(), rel=1e-9)
    fooling = sum(
        fooling_loss("logistic", network.scores(f, d)) for f, d in zip(fakes, ("source", "target"), strict=True)
    )
    found = pair_loss(network, tuple(fakes), "logistic", 0.01)
    assert found.item() == pytest.approx((fooling + 0.01 * expected).item(), rel=1e-9)


@pytest.mark.parametrize("adversarial", [{}, {"adversarial": "wasserstein", "penalty_weight": 10.0}])
def test_joint_method_trains_both_players(adversarial):
    torch.manual_seed(0)
    module = SPOTAdaptation("joint", generator_width=8, classifier_width=8, latent_size=4, **adversarial)
    before = weights(module)
    fit = trainer(max_epochs=1)
    fit.fit(module, DomainPairs(**DATA))
    assert fit.global_step == 2
    for player in ("critic", "generator"):
        assert torch.isfinite(fit.callback_metrics[f"train/loss_{player}"])
        moved = {key: value for key, value in weights(module).items() if key.startswith(player)}
        assert largest_difference(moved, {key: before[key] for key in moved}) > 0
    assert fit.callback_metrics["val/source_accuracy"] >= 0
    with pytest.raises(ValueError, match=r"`method`.*'two_stage'.*got 'joint'"):
        module.transport(torch.zeros(1, 1, 16, 16))


# -- the parts of a run ------------------------------------------------------------------------------------------------


class Moves(Callback):
    """Which players' weights each round moved."""

    def __init__(self):
        self.moved = []

    def on_train_batch_start(self, trainer, module, *args):
        self.before = {name: weights(getattr(module, name)) for name in module.players}

    def on_train_batch_end(self, trainer, module, *args):
        changed = [n for n, old in self.before.items() if largest_difference(old, weights(getattr(module, n))) > 0]
        self.moved.append(changed)


def test_parts_follow_each_other():
    sgd = partial(torch.optim.SGD, lr=1e-3)
    optimizers = dict.fromkeys(("generator_optimizer", "critic_optimizer", "classifier_optimizer"), sgd)
    module, moves = SPOTAdaptation(source_steps=2, plan_steps=3, **SMALL, **optimizers), Moves()
    fit = trainer(max_steps=7, max_epochs=-1, limit_val_batches=0, callbacks=[moves])
    fit.fit(module, DomainPairs(**DATA))
    assert fit.global_step == 7
    assert moves.moved == [["classifier"]] * 2 + [["critic", "generator", "classifier"]] * 3 + [["classifier"]] * 2


def test_plan_steps_are_three_quarters_of_the_trainers_rounds():
    module = SPOTAdaptation(source_steps=1, **SMALL)
    trainer(max_steps=8, max_epochs=-1, limit_val_batches=0).fit(module, DomainPairs(**DATA))
    assert module.plan_steps == 5
    endless = SPOTAdaptation(**SMALL, decay_steps=0)
    with pytest.raises(ValueError, match=r"`plan_steps`.*number.*got None"):
        trainer(max_epochs=-1, limit_val_batches=0).fit(endless, DomainPairs(**DATA))


def test_without_alternation_the_classifier_waits_for_the_plan():
    """Until the plan is done, target images change nothing of the classifier."""

    def losses(y, alternate):
        torch.manual_seed(0)
        module = SPOTAdaptation(alternate=alternate, augment=0.0, pseudo_threshold=0.05, **SMALL)
        x, labels, _ = batch()
        return module.classifier_loss((x, labels, y)).item()

    dark, light = torch.zeros(6, 1, 16, 16), torch.ones(6, 1, 16, 16)
    assert losses(dark, False) == losses(light, False)
    assert losses(dark, True) != losses(light, True)


def test_semantic_cost_steers_the_map_and_not_the_classifier():
    torch.manual_seed(0)
    module = SPOTAdaptation(**SMALL)
    module.configure_model()
    loss = module.generator_loss(batch())
    gradients = torch.autograd.grad(loss, list(module.classifier.parameters()), allow_unused=True)
    assert all(gradient is None for gradient in gradients)  # of the moving average, which has none
    assert torch.autograd.grad(module.generator_loss(batch()), module.generator.last.weight)[0].abs().max() > 0


def test_answers_come_from_the_average():
    module = SPOTAdaptation(**SMALL)
    module.configure_model()
    with torch.no_grad():
        for parameter in module.classifier.parameters():
            parameter.zero_()
    assert module(batch()[0]).abs().max() > 0


def test_predictions_are_labels_and_probabilities():
    module = SPOTAdaptation(**SMALL).eval()
    images = batch()[0]
    found = module.predict_step((images, torch.zeros(6)), 0)
    assert len(found) == 6
    assert torch.allclose(found.probabilities.sum(dim=1), torch.ones(6), atol=1e-6)  # float32
    assert torch.equal(found.labels, module(images).argmax(dim=1))
    assert found == module.predict_step(images, 0) != module.predict_step(images.flip(0), 0)


# -- labels of the target ----------------------------------------------------------------------------------------------


class Shuffled(DomainPairs):
    """The target's labels are wrong, wherever they are."""

    def _read(self, side):
        parts = super()._read(side)
        if side == "target":
            parts = {name: (images, (labels + 1) % 10) for name, (images, labels) in parts.items()}
        return parts


def run(data, **options):
    torch.manual_seed(0)
    module = SPOTAdaptation(**SMALL, decay_steps=0, plan_steps=100)
    fit = trainer(max_epochs=2, **options)
    fit.fit(module, data)
    return module, dict(fit.callback_metrics)


def test_labels_of_the_target_reach_neither_training_nor_validation():
    right, seen = run(DomainPairs(**DATA))
    wrong, other = run(Shuffled(**DATA))
    assert largest_difference(weights(right), weights(wrong)) == 0
    assert seen == other
    assert {"val/source_accuracy", "val/unsupervised_score", "val/target_entropy", "val/target_diversity"} <= set(seen)
    assert not any(name.startswith(("test", "watch")) for name in seen)
    tested = [trainer().test(m, d(**DATA), verbose=False)[0] for m, d in ((right, DomainPairs), (wrong, Shuffled))]
    assert tested[0]["test/accuracy"] != tested[1]["test/accuracy"]  # there they do count


def test_watched_test_is_named_so_and_changes_nothing():
    plain, _ = run(DomainPairs(**DATA))
    watched, metrics = run(DomainPairs(**DATA, watch_test=True))
    same = {k: v for k, v in weights(watched).items() if k != "best_of_test"}
    assert largest_difference({k: v for k, v in weights(plain).items() if k != "best_of_test"}, same) == 0
    assert metrics["watch/test_accuracy_best_of_test"] >= metrics["watch/test_accuracy"] > 0
    tested = trainer().test(watched, DomainPairs(**DATA), verbose=False)
    assert tested[0]["test/accuracy"] == pytest.approx(metrics["watch/test_accuracy"].item(), abs=1e-6)  # float32
    assert 0 <= tested[1]["test/source_accuracy"] <= 1


def test_data_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"`image_size` of SPOTAdaptation.*16.*got 28"):
        trainer().fit(SPOTAdaptation(image_size=28, **SMALL), DomainPairs(**DATA))


# -- it adapts ---------------------------------------------------------------------------------------------------------


def test_two_stages_beat_the_source_alone_where_colours_are_faded():
    """Squares and bars, black and white, to grey ones on grey: the source's classifier sees nothing of it."""
    generator = torch.Generator().manual_seed(0)

    def shapes(count):
        labels = torch.randint(2, (count,), generator=generator)
        places = torch.randint(2, 8, (count, 2), generator=generator)
        images = torch.zeros(count, 1, 16, 16)
        for image, label, (row, column) in zip(images, labels, places.tolist(), strict=True):
            image[0, row : row + (6 if label else 3), column : column + (2 if label else 6)] = 1.0
        return images, labels

    source, (target, labels) = shapes(500), shapes(500)
    target = 0.9 - 0.5 * target  # dark on light
    data = {"source": source, "target": (target, labels), "val_size": 0.2, "batch_size": 32}
    found = {}
    for name, options in {"source": {"source_steps": 10**6}, "adapted": {"source_steps": 40}}.items():
        torch.manual_seed(1)
        optimizer = partial(RectifiedAdam, lr=5e-3, betas=(0.5, 0.9))
        module = SPOTAdaptation(
            num_classes=2, augment=0.0, pseudo_weight=0.0, plan_steps=160, decay_steps=0, generator_optimizer=optimizer,
            critic_optimizer=optimizer, classifier_optimizer=optimizer, **{**SMALL, "generator_width": 8}, **options,
        )  # fmt: skip
        trainer(max_steps=200, max_epochs=-1, limit_val_batches=0).fit(module, DomainPairs(**data))
        found[name] = trainer().test(module, DomainPairs(**data), verbose=False)[0]["test/accuracy"]
    assert found["adapted"] > found["source"] + 0.1
