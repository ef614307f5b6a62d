"""L2LDefense: the game against a plain loop, what is logged, what is left alone, what is refused."""

import copy
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_rectify._lightning import seed_everything
from lightning_rectify.attacks.gradient import pgd
from lightning_rectify.data.images import ImageData
from lightning_rectify.modules.l2l import L2LDefense
from lightning_rectify.modules.l2l.attackers import FullResolutionAttacker
from tests.helpers.training import differences, largest_difference, trainer, weights

EPSILON = 0.1
SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
SMALL = {"classifier_args": {"width": 4}, "attacker_args": {"width": 4}, "epsilon": EPSILON}


def make(seed=0, **kwargs):
    """Always with the same weights for a seed."""
    seed_everything(seed, verbose=False)
    return L2LDefense(**{**SMALL, **kwargs})


def batches(count=4, size=8):
    """Digits: batches in a fixed order, on black backgrounds, so that pixels are clipped."""
    data = ImageData(normalization="unit")
    data.setup("fit")
    images, labels = data.training_images()
    return [(images[i * size : (i + 1) * size], labels[i * size : (i + 1) * size]) for i in range(count)]


def loader(count=4, size=8):
    images, labels = (torch.cat(part) for part in zip(*batches(count, size), strict=True))
    return DataLoader(TensorDataset(images, labels), batch_size=size)


def fit(module, count=4, **options):
    training = trainer(**{"max_epochs": 1, "limit_val_batches": 0, **options})
    training.fit(module, loader(count))
    return training


# -- the game, as a loop in plain torch --------------------------------------------------------------------------------


def attack_by_hand(attacker, classifier, x, y, scale):
    leaf = x.clone().requires_grad_()
    (g,) = torch.autograd.grad(F.cross_entropy(classifier(leaf), y, reduction="sum"), leaf)
    g = g / g.abs().max() if scale == "batch_max" else torch.stack([one / one.std(correction=0) for one in g])
    delta = EPSILON * torch.tanh(attacker(torch.cat([x, g], dim=1)))
    return (x + delta).clamp(0, 1)  # inside the ball in any case, as x is in [0, 1]


def by_hand(module, order, attack_bn="eval", scale="sample_std", clean_weight=0.0, attacker_turns=1):
    """What a copy of the module becomes in float64: no Lightning, gradients by ``torch.autograd.grad``."""
    twin = copy.deepcopy(module).double()
    f, h = twin.classifier, twin.attacker
    optimizers = {f: SGD(f.parameters()), h: SGD(h.parameters())}

    def step(network, loss):
        parameters = list(network.parameters())
        for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
            parameter.grad = gradient
        optimizers[network].step()

    def defend(x, attacked, y):
        f.train()
        clean = F.cross_entropy(f(x), y) if clean_weight else 0.0
        return clean_weight * clean + (1 - clean_weight) * F.cross_entropy(f(attacked), y)

    for x, y in batches():
        x = x.double()
        f.train(attack_bn == "train")
        h.train(order == "joint")
        attacked = attack_by_hand(h, f, x, y, scale)
        if order == "joint":
            loss = defend(x, attacked, y)
            up = torch.autograd.grad(loss, list(h.parameters()), retain_graph=True)
            step(f, loss)
            for parameter, gradient in zip(h.parameters(), up, strict=True):
                parameter.grad = -gradient
            optimizers[h].step()
            continue
        step(f, defend(x, attacked.detach(), y))
        f.eval(), h.train()
        for _ in range(attacker_turns):
            step(h, -F.cross_entropy(f(attack_by_hand(h, f, x, y, scale)), y))
    return weights(twin)


GAMES = [
    {"order": "joint"},
    {"order": "joint", "clean_weight": 0.5},
    {"order": "alternate"},
    {"order": "alternate", "attack_bn": "train", "gradient_scale": "batch_max"},
    {"order": "alternate", "turns": {"attacker": 2}},
]


@pytest.mark.parametrize("game", GAMES, ids=lambda game: "-".join(map(str, game.values())))
def test_training_is_the_plain_loop(game):
    """Joint: the two gradients, one reversed; in turns: the classifier first, then the attacker against the new one."""
    module = make(classifier_optimizer=SGD, attacker_optimizer=SGD, **game)
    options = {key: value for key, value in game.items() if key in ("order", "attack_bn", "clean_weight")}
    options["scale"] = game.get("gradient_scale", "sample_std")
    expected = by_hand(module, attacker_turns=game.get("turns", {}).get("attacker", 1), **options)
    start = weights(module)
    fit(module, precision="64-true")
    # 1e-9: float64 in another order; epsilon is rounded towards the image; four steps of momentum.
    assert largest_difference(weights(module), expected) < 1e-9
    for player in ("classifier", "attacker"):
        moved = [(start[key] - expected[key]).abs().max() for key in start if key.startswith(player) and "mean" in key]
        assert max(moved) > 1e-3  # running statistics are part of the comparison


def test_joint_gradient_is_the_two_players_own_gradients():
    """One graph gives what two losses do: one has the attacked images fixed, one the classifier's weights."""
    module = make().double()
    images, labels = batches(1)[0]
    images, twin = images.double(), copy.deepcopy(module)  # running statistics move with each pass
    joint = [*module.classifier.parameters(), *module.attacker.parameters()]
    together = torch.autograd.grad(module.joint_loss((images, labels)), joint)
    f, h = twin.classifier, twin.attacker
    players = [*f.parameters()], [*h.parameters()]
    attacked = attack_by_hand(h, f.eval(), images, labels, "sample_std")
    down = torch.autograd.grad(F.cross_entropy(f.train()(attacked.detach()), labels), players[0])
    f.requires_grad_(False)
    up = torch.autograd.grad(-F.cross_entropy(f(attacked), labels), players[1])
    for ours, theirs in zip(together, [*down, *(-gradient for gradient in up)], strict=True):
        # 1e-12: float64 in another order.
        assert torch.allclose(ours, theirs, rtol=1e-9, atol=1e-12)
    assert all(gradient.abs().max() > 0 for gradient in up)


@pytest.mark.parametrize("attack", ["fgsm", "pgd", "trades", "none"])
def test_an_attack_that_is_not_learned_has_one_player(attack):
    module = make(attack=attack, train_steps=2)
    assert module.players == ("classifier",)
    assert not hasattr(module, "attacker")
    training = fit(module)
    assert len(training.optimizers) == 1
    assert training.global_step == 4
    keys = training.callback_metrics.keys()
    assert {"train/loss", "train/accuracy"} == set(keys)
    assert L2LDefense.players == ("classifier", "attacker")


@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("variant", ["gradient", "naive"])
def test_learned_attacks_log_what_they_are_like(variant, steps):
    training = fit(make(variant=variant, steps=steps, order="alternate"))
    keys = {"train/loss", "train/loss_classifier", "train/loss_attacker", "train/accuracy"}
    if variant == "gradient":
        keys |= {"train/attack_agreement", "train/attack_saturation"}
    assert set(training.callback_metrics) == keys
    assert all(torch.isfinite(value) for value in training.callback_metrics.values())


def test_fgsm_training_is_fgsm_and_then_a_step():
    module = make(attack="fgsm", optimizer=SGD)
    twin = copy.deepcopy(module).double().classifier
    optimizer = SGD(twin.parameters())
    for x, y in batches():
        leaf = x.double().requires_grad_()
        (gradient,) = torch.autograd.grad(F.cross_entropy(twin.eval()(leaf), y), leaf)
        attacked = (x.double() + EPSILON * gradient.sign()).clamp(0, 1)
        optimizer.zero_grad()
        F.cross_entropy(twin.train()(attacked), y).backward()
        optimizer.step()
    fit(module, precision="64-true")
    # 1e-9: as above.
    assert largest_difference(weights(module.classifier), weights(twin)) < 1e-9


def test_two_epochs_on_the_digits_lower_the_loss():
    module = make(classifier_args={"width": 8}, optimizer=partial(torch.optim.Adam, lr=0.02), steps=2)
    losses = []
    module.on_train_batch_end = lambda *_: losses.append(module.trainer.callback_metrics["train/loss"].item())
    data = ImageData(normalization="unit", train_size=768, batch_size=32)
    trainer(max_epochs=2, limit_val_batches=0, log_every_n_steps=1).fit(module, data)
    assert len(losses) == 48
    assert sum(losses[-4:]) / 4 < 0.5 * losses[0]  # measured: 0.33, seeds 1 and 2: 0.41, 0.38


# -- measuring ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attack", ["l2l", "fgsm", "pgd", "trades", "none"])
def test_attack_leaves_no_trace_and_works_in_inference_mode(attack):
    module = make(attack=attack, train_steps=2, random_start=0.5)
    module.classifier.network.features[1].eval()  # frozen by a user, and so is a weight
    module.classifier.network.head.weight.requires_grad_(False)
    images, labels = batches(1)[0]
    module.noise(1)
    modes = {name: part.training for name, part in module.named_modules()}
    needs = {name: parameter.requires_grad for name, parameter in module.named_parameters()}
    before, states = weights(module), (torch.get_rng_state(), module.noise_generator.get_state())
    attacked = module.attack(images, labels)
    with torch.inference_mode():
        again = module.attack(images.clone(), labels.clone())
    assert torch.equal(attacked, again)
    assert not attacked.requires_grad
    assert not attacked.is_inference()
    distance = (attacked.double() - images.double()).abs().max().item()
    assert attacked.min() >= 0
    assert attacked.max() <= 1
    assert distance == 0 if attack == "none" else 0.5 * EPSILON < distance <= EPSILON
    assert {name: part.training for name, part in module.named_modules()} == modes
    assert {name: parameter.requires_grad for name, parameter in module.named_parameters()} == needs
    assert all(parameter.grad is None for parameter in module.parameters())
    assert differences(weights(module), before) == []
    assert torch.equal(torch.get_rng_state(), states[0])
    assert torch.equal(module.noise_generator.get_state(), states[1])


@pytest.mark.parametrize("inference_mode", [True, False])
def test_validation_and_test_measure_what_they_say(inference_mode):
    module = make(attack="pgd", train_steps=1, val_attack_steps=3, test_attack_steps=4)
    fit(module)  # a classifier that is right sometimes
    before = weights(module)
    runs = trainer(inference_mode=inference_mode)
    val = runs.validate(module, loader(), verbose=False)[0]
    assert runs.validate(module, loader(), verbose=False)[0] == val
    test = runs.test(module, loader(), verbose=False)[0]
    assert differences(weights(module), before) == []
    module.eval()
    for stage, steps, logged in (("val", 3, val), ("test", 4, test)):
        module._start_evaluation()
        hits = {f"{stage}/{kind}": 0.0 for kind in ("accuracy", "robust_accuracy", "own_attack_accuracy")}
        for x, y in batches():
            attacked = pgd(module.classifier, x, y, EPSILON, steps=steps, generator=module._eval_generator)
            for key, images in zip(hits, (x, attacked, module.attack(x, y)), strict=True):
                hits[key] += (module(images).argmax(1) == y).sum().item() / 32
        assert {key: logged[key] for key in hits} == pytest.approx(hits)


def test_without_attack_steps_validation_is_clean():
    module = make(val_attack_steps=0)
    assert set(trainer().validate(module, loader(), verbose=False)[0]) == {"val/loss", "val/accuracy"}
    kinds = {"loss", "accuracy", "robust_accuracy", "own_attack_accuracy", "attack_agreement", "attack_saturation"}
    assert set(trainer().test(module, loader(), verbose=False)[0]) == {f"test/{kind}" for kind in kinds}


def test_gradients_of_images_are_float32_under_bf16():
    module, seen = make(), set()
    module.classifier.register_forward_pre_hook(
        lambda m, inputs: seen.add((m.training, torch.is_autocast_enabled("cpu")))
    )
    fit(module, precision="bf16-mixed")
    assert seen == {(False, False), (True, True)}  # the attack's passes, and training's


def test_the_average_is_what_is_measured():
    module = make(averages={"classifier": 0.5})
    fit(module)
    images, labels = batches(1)[0]
    average = module.averaged("classifier")
    assert average is not module.classifier
    module.eval()
    assert torch.equal(module(images), average(images))
    twin = make()
    twin.classifier.load_state_dict(average.state_dict()), twin.attacker.load_state_dict(module.attacker.state_dict())
    assert torch.equal(module.attack(images, labels), twin.eval().attack(images, labels))


def test_passes_compare_with_pgd():
    joint, turns = make(steps=2), make(steps=2, order="alternate")
    ratio = joint.passes.attacker_ratio
    # Multiplications of the strided attacker of width 4 on 8x8 images: at 4x4 but for its last layer.
    attacker = 16 * (9 * 2 * 4 + 2 * 9 * 4 * 4 + 16 * 4 * 2) + 64 * 9 * (2 + 2)
    classifier = 64 * 9 * (4 + 16) + 16 * 9 * (32 + 64) + 4 * 9 * (128 + 256) + 160
    assert ratio == pytest.approx(attacker / classifier)
    assert joint.passes.against_pgd() == pytest.approx((7 + 6 * ratio) / 23)
    assert turns.passes.against_pgd() == pytest.approx((13 + 8 * ratio) / 23)
    assert make(attack="pgd", train_steps=7).passes.against_pgd(7) == 1
    assert make(attack="trades").passes.cost == 27


# -- arguments ---------------------------------------------------------------------------------------------------------


def test_released_preset_and_what_wins_over_it():
    arguments = {"in_channels": 3, "image_size": 32, "attacker_args": {}, "preset": "released"}
    module = make(**arguments)
    assert isinstance(module.attacker, FullResolutionAttacker)
    assert (module.joint, module.attack_bn, module.training_attack.scale) == (False, "train", "batch_max")
    (classifier, attacker), _ = module.configure_optimizers()
    assert isinstance(classifier, torch.optim.SGD)
    assert [classifier.defaults[name] for name in ("lr", "momentum", "weight_decay")] == [0.1, 0.9, 2e-4]
    assert isinstance(attacker, torch.optim.Adam)
    assert [attacker.defaults[name] for name in ("lr", "weight_decay")] == [1e-3, 2e-4]
    module = make(**arguments, gradient_scale="sample_std", order="joint", attacker_optimizer=SGD)
    assert (module.joint, module.attack_bn, module.training_attack.scale) == (True, "train", "sample_std")
    assert isinstance(module.configure_optimizers()[0][1], torch.optim.SGD)


def test_schedules_can_be_of_one_player():
    halve = partial(torch.optim.lr_scheduler.StepLR, step_size=1, gamma=0.5)
    module = make(classifier_optimizer=SGD, attacker_optimizer=SGD, classifier_lr_scheduler=halve)
    training = fit(module, max_epochs=2)
    assert [optimizer.param_groups[0]["lr"] for optimizer in training.optimizers] == [0.025, 0.1]


class Dense(nn.Module):
    """A user's networks."""

    def __init__(self, inputs, outputs, images):
        super().__init__()
        self.layer, self.images = nn.Linear(inputs, outputs), images

    def forward(self, x):
        output = self.layer(x.flatten(1))
        return output.view(-1, 1, 8, 8) if self.images else output


def test_networks_as_objects(tmp_path):
    def networks():
        return {"classifier": Dense(64, 10, False), "attacker": Dense(128, 64, True)}

    module = L2LDefense(**networks(), epsilon=EPSILON, steps=2)
    fit(module).save_checkpoint(tmp_path / "objects.ckpt")
    loaded = L2LDefense.load_from_checkpoint(tmp_path / "objects.ckpt", **networks())
    assert differences(weights(loaded), weights(module)) == []
    assert loaded.epsilon == EPSILON
    with pytest.raises(ValueError, match=r"`attacker`.*shape, but got \(8, 2, 8, 8\)"):
        fit(make(attacker=nn.Identity(), attacker_args=None))


@pytest.mark.parametrize("normalization", ["dataset", "symmetric"])
def test_normalized_data_are_refused_before_training(normalization):
    data = ImageData(normalization=normalization, batch_size=64)
    with pytest.raises(ValueError, match=rf"`normalization`.*ImageData.*'unit' for.*got '{normalization}'"):
        trainer(max_epochs=1).fit(make(), data)


def test_pixels_in_other_bounds_are_welcome_where_they_are_the_modules():
    data = ImageData(normalization="symmetric", batch_size=64, train_size=64)
    training = trainer(max_epochs=1, limit_val_batches=0)
    training.fit(make(bounds=[-1.0, 1.0], epsilon=0.2), data)
    assert training.global_step == 1


@pytest.mark.parametrize(("name", "value"), [("num_classes", 7), ("in_channels", 3)])
def test_other_classes_or_channels_are_refused(name, value):
    ours = 10 if name == "num_classes" else 1
    data = ImageData(normalization="unit", batch_size=64)
    with pytest.raises(ValueError, match=rf"`{name}` of L2LDefense to be {ours}.*got {value}"):
        trainer(max_epochs=1).fit(make(**{name: value}), data)


def test_images_outside_the_bounds_are_refused_wherever_they_come():
    module, (images, labels) = make(), batches(1)[0]
    words = r"(?s)inside `bounds` = \(0.0, 1.0\).*got values from -2 to -0.*`normalization: unit`"
    outside = -2 * images
    outside[0, 0, 0, 0] = -2.0
    for run in (
        lambda: module.attack(outside, labels),
        lambda: module.predict_step((outside, labels), 0),
        lambda: module.joint_loss((outside, labels)),
        lambda: trainer().validate(module, DataLoader(TensorDataset(outside, labels), batch_size=8), verbose=False),
    ):
        with pytest.raises(ValueError, match=words):
            run()
