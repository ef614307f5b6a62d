"""MinimaxModule: rounds equal a loop by hand, steps are counted once, players stay apart, the state comes back."""

from contextlib import nullcontext
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau, StepLR

from lightning_rectify._lightning import Callback, ModelCheckpoint, uncounted
from lightning_rectify.modules import minimax
from tests.helpers.games import SGD, Adam, Game, Steps, by_hand, fit, loader, make_game
from tests.helpers.training import differences, largest_difference, snapshot, trainer, weights

STATE = "lightning_rectify_random_state"
CLIP = {"critic": 0.05, "generator": 0.02}


# -- rounds ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", [SGD, Adam], ids=["SGD", "Adam"])
@pytest.mark.parametrize(
    "how",
    [
        {},
        {"accumulate": 3},  # of seven batches: the last round of an epoch has one
        {"turns": {"critic": 3}},
        {"clip": CLIP},
        {"accumulate": 3, "turns": {"critic": 2}, "clip": CLIP},
        {"accumulate": 4, "turns": {"generator": 3}, "clip": {"critic": 0.05}},
        {"joint": True},
        {"joint": True, "accumulate": 3, "clip": CLIP},
    ],
    ids=lambda how: "-".join(how) or "plain",
)
def test_rounds_equal_a_loop_by_hand(how, optimizer):
    arguments = {"clip_norm" if name == "clip" else name: value for name, value in how.items()}
    game = make_game(optimizer=optimizer, **arguments)
    expected = by_hand(game, epochs=2, optimizer=optimizer, **how)
    before = weights(game)
    training = fit(game, max_epochs=2)
    # 1e-6: float32, of numbers below 3; sums in another order.
    assert largest_difference(weights(game), expected) < 1e-6
    assert largest_difference(weights(game), before) > 0.01
    assert training.global_step == 2 * -(-7 // how.get("accumulate", 1))


@pytest.mark.parametrize(
    "how", [{"turns": {"critic": 3}}, {"clip": CLIP}, {"accumulate": 3}, {"joint": True}], ids="-".join
)
def test_the_loop_by_hand_sees_each_option(how):
    game = make_game()
    assert largest_difference(by_hand(game), by_hand(game, **how)) > 1e-3


@pytest.mark.parametrize("accumulate", [1, 7])
def test_joint_is_one_forward_pass_of_each_network_and_one_backward_pass(accumulate):
    calls, backwards = [], []

    class Look(Game):
        def on_before_backward(self, loss):
            backwards.append(loss.item())
            super().on_before_backward(loss)

    game = make_game(Look, joint=True, accumulate=accumulate)
    game.generator.register_forward_hook(lambda *_: calls.append(1))
    training = fit(game)
    assert len(calls) == len(backwards) == training.global_step * accumulate == 7
    # 1e-5: float32 sums. A batch's share of the mean is what goes backward.
    mean = sum(backwards[-accumulate:])
    assert training.callback_metrics["train/loss"].item() == pytest.approx(mean, rel=1e-5)


def test_a_batch_left_over_from_an_interrupted_run_is_forgotten():
    class Stop(Callback):
        def on_train_batch_end(self, *args):
            raise KeyError("between the batches of a round")

    game = make_game(accumulate=3)
    with pytest.raises(KeyError, match="between"):
        fit(game, callbacks=[Stop()])
    expected = by_hand(game, accumulate=3)
    fit(game)
    assert largest_difference(weights(game), expected) < 1e-6  # as above


def test_clip_norm_of_one_number_is_for_every_player():
    steps = Steps()
    fit(make_game(clip_norm=0.01), callbacks=[steps])
    # 1e-3: torch clips by bound / (norm + 1e-6).
    assert steps.norm == pytest.approx([0.01] * 14, rel=1e-3)
    assert steps.players == ["critic", "generator"] * 7
    some = Steps()
    fit(make_game(clip_norm={"generator": 0.01}), callbacks=[some])
    norms = {
        player: [n for p, n in zip(some.players, some.norm, strict=True) if p == player] for player in Game.players
    }
    assert norms["generator"] == pytest.approx([0.01] * 7, rel=1e-3)
    assert min(norms["critic"]) > 0.011


def test_each_turn_sees_its_part_of_the_batch_within_its_context():
    seen = []

    class Parts(Game):
        def turn_batch(self, batch, player, turn):
            return [part[4 * turn : 4 * turn + 4] for part in batch]

        def turn_context(self, player):
            seen.append(player)
            return nullcontext()

        def critic_loss(self, batch):
            seen.append(batch[0])
            return super().critic_loss(batch)

    fit(make_game(Parts, turns={"critic": 2}), batches=1)
    ((x, _),) = loader(1)
    assert [part for part in seen if isinstance(part, str)] == ["critic", "critic", "generator"]
    assert torch.equal(torch.cat([part for part in seen if not isinstance(part, str)]), x)


def test_losses_logged_are_means_over_turns_and_batches_of_the_round():
    values = {"critic": [], "generator": []}

    class Look(Game):
        def critic_loss(self, batch):
            values["critic"].append(super().critic_loss(batch))
            return values["critic"][-1]

        def generator_loss(self, batch):
            values["generator"].append(super().generator_loss(batch))
            return values["generator"][-1]

    training = fit(make_game(Look, turns={"critic": 2}, accumulate=3), batches=3)
    for player, count in (("critic", 6), ("generator", 3)):
        assert len(values[player]) == count
        mean = float(np.mean([value.item() for value in values[player]]))
        assert training.callback_metrics[f"train/loss_{player}"].item() == pytest.approx(mean, rel=1e-6)


# -- counts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [{"turns": {"critic": 3}}, {"joint": True}], ids="-".join)
def test_max_steps_and_checkpoints_count_batches(how, tmp_path):
    keep = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=3, save_top_k=-1)
    steps = Steps()
    training = fit(make_game(**how), max_steps=10, max_epochs=-1, callbacks=[keep, steps], enable_checkpointing=True)
    assert training.global_step == training.fit_loop.epoch_loop.total_batch_idx + 1 == 10
    assert steps.players == ([*["critic"] * 3, "generator"] if "turns" in how else ["critic", "generator"]) * 10
    assert sorted(path.name for path in tmp_path.glob("*.ckpt")) == ["step=3.ckpt", "step=6.ckpt", "step=9.ckpt"]


def test_what_lightning_counts_is_what_uncounted_takes_away(monkeypatch):
    """The two callbacks are Lightning's private ones: this fails when it renames them or counts elsewhere."""
    found = []

    class Look(Game):
        def on_train_batch_end(self, *args):
            optimizer = self.optimizers()[0]
            before = optimizer._on_before_step, optimizer._on_after_step
            with uncounted(optimizer):
                found.append((optimizer._on_before_step, optimizer._on_after_step) != before)
            assert (optimizer._on_before_step, optimizer._on_after_step) == before
            with pytest.raises(KeyError), uncounted(optimizer):
                raise KeyError
            assert (optimizer._on_before_step, optimizer._on_after_step) == before

    assert fit(make_game(Look, turns={"critic": 3})).global_step == 7
    assert found == [True] * 7
    monkeypatch.setattr(minimax, "uncounted", lambda optimizer: nullcontext())
    assert fit(make_game(turns={"critic": 3})).global_step == 7 * 4


# -- players stay apart ------------------------------------------------------------------------------------------------


def test_the_other_player_needs_no_gradient_and_gets_none():
    class Apart(Game):
        def check(self, mine, other):
            assert all(parameter.requires_grad for parameter in mine.parameters())
            assert not any(parameter.requires_grad for parameter in other.parameters())

        def critic_loss(self, batch):
            self.check(self.critic, self.generator)
            return super().critic_loss(batch)

        def generator_loss(self, batch):
            self.check(self.generator, self.critic)
            self.of_the_critic = [parameter.grad.clone() for parameter in self.critic.parameters()]
            return super().generator_loss(batch)

        def on_player_step(self, player):
            super().on_player_step(player)
            assert not torch.is_grad_enabled()  # what it does to weights is no part of a graph
            if player == "critic" and self.trainer.global_step == 0:
                assert all(parameter.grad is None for parameter in self.generator.parameters())
            if player == "generator":
                now = [parameter.grad for parameter in self.critic.parameters()]
                assert all(map(torch.equal, now, self.of_the_critic))

    game = make_game(Apart, turns={"critic": 2})
    assert fit(game).global_step == 7
    assert all(parameter.requires_grad for parameter in game.parameters())


@pytest.mark.parametrize("where", ["critic", "generator"])
def test_requires_grad_comes_back_after_an_exception_and_frozen_stays_frozen(where):
    def fail(batch):
        raise KeyError("in the middle")

    game = make_game()
    game.critic[0].bias.requires_grad_(False)
    setattr(game, f"{where}_loss", fail)
    before = [parameter.requires_grad for parameter in game.parameters()]
    assert before.count(False) == 1
    with pytest.raises(KeyError, match="in the middle"):
        fit(game)
    assert [parameter.requires_grad for parameter in game.parameters()] == before


# -- optimizers and schedules ------------------------------------------------------------------------------------------


class Watching(Game):
    """Notes whether the generator needs a gradient while the critic moves, and whether it was left one."""

    def on_train_start(self):
        super().on_train_start()
        self.needed, self.left = set(), []

    def critic_loss(self, batch):
        self.needed |= {p.requires_grad for p in self.generator.parameters()}
        return super().critic_loss(batch)

    def on_train_batch_end(self, *args):
        self.left.append([p.grad for p in self.critic.parameters()])


@pytest.mark.parametrize("noticed", [True, False])
def test_compiled_players_are_kept_apart_also_where_torch_does_not_notice_frozen_weights(monkeypatch, noticed):
    monkeypatch.setattr(minimax, "notices_frozen_weights", lambda: noticed)
    arguments = {"accumulate": 3, "turns": {"critic": 2}, "clip_norm": CLIP}
    plain = make_game(**arguments)
    game = make_game(Watching, compile=True, **arguments)
    game.load_state_dict(plain.state_dict())
    monkeypatch.setattr(nn.Module, "compile", lambda self: None)  # this is about who needs a gradient
    fit(plain, max_epochs=2)
    fit(game, max_epochs=2)
    assert differences(weights(game), weights(plain)) == []
    assert game.needed == {not noticed}
    moved = game.left[2::7]  # rounds end behind the third batch, of seven
    assert all((grad is None) is not noticed for grads in moved for grad in grads)


class Own(Game):
    """Players with optimizers and schedules of their own; what is None is the shared one."""

    def __init__(self, critic_optimizer=None, generator_lr_scheduler=None, **kwargs):
        super().__init__(**kwargs)
        self.critic_optimizer, self.generator_lr_scheduler = critic_optimizer, generator_lr_scheduler


HALVE = partial(StepLR, step_size=1, gamma=0.5)


def test_a_players_attribute_comes_before_the_shared_optimizer():
    game = make_game(Own, critic_optimizer=partial(torch.optim.AdamW, lr=0.3), optimizer=partial(SGD, lr=0.2))
    optimizers, schedulers = game.configure_optimizers()
    assert [type(optimizer) for optimizer in optimizers] == [torch.optim.AdamW, torch.optim.SGD]
    assert [optimizer.param_groups[0]["name"] for optimizer in optimizers] == ["critic", "generator"]
    assert [optimizer.param_groups[0]["lr"] for optimizer in optimizers] == [0.3, 0.2]
    for optimizer, network in zip(optimizers, (game.critic, game.generator), strict=True):
        assert {*map(id, optimizer.param_groups[0]["params"])} == {*map(id, network.parameters())}
    assert schedulers == []
    assert "critic_optimizer" not in game.hparams


@pytest.mark.parametrize("interval", ["step", "epoch"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_schedules_of_one_player_and_of_all(interval, accumulate):
    options = {"lr_scheduler_interval": interval, "accumulate": accumulate}
    rounds = 4 // accumulate
    shape = [2.0**-i for i in range(2 * rounds)] if interval == "step" else [1.0] * rounds + [0.5] * rounds
    expected = [0.1 * factor for factor in shape]
    for own, critic in ((True, [0.1] * 2 * rounds), (False, expected)):
        steps = Steps()
        game = make_game(Own, **{"generator_lr_scheduler" if own else "lr_scheduler": HALVE}, **options)
        fit(game, batches=4, max_epochs=2, callbacks=[steps])
        assert steps.rates("generator") == pytest.approx(expected)
        assert steps.rates("critic") == pytest.approx(critic)


def test_a_player_can_have_another_schedule_than_the_shared_one():
    steps = Steps()
    shared = partial(LambdaLR, lr_lambda=lambda step: 1.0 + step)
    game = make_game(Own, generator_lr_scheduler=HALVE, lr_scheduler=shared, lr_scheduler_interval="step")
    fit(game, batches=3, callbacks=[steps])
    assert steps.rates("critic") == pytest.approx([0.1, 0.2, 0.3])
    assert steps.rates("generator") == pytest.approx([0.1, 0.05, 0.025])


class Validated(Game):
    def validation_step(self, batch, batch_idx):
        self.log("val/loss", torch.tensor(1.0), batch_size=1)


def test_plateau_reads_its_metric():
    game = make_game(Validated, lr_scheduler=partial(ReduceLROnPlateau, patience=0, factor=0.5))
    training = trainer(max_epochs=3)
    training.fit(game, loader(2), loader(1))
    # The metric stands still: halved after each epoch but the first.
    assert [o.param_groups[0]["lr"] for o in training.optimizers] == pytest.approx([0.1 / 4] * 2)


@pytest.mark.parametrize("interval", ["step", "epoch"])
def test_plateau_without_its_metric_says_which_one_and_what_there_is(interval):
    game = make_game(lr_scheduler=ReduceLROnPlateau, lr_scheduler_interval=interval)
    with pytest.raises(ValueError, match=r"metric 'val/loss' of ReduceLROnPlateau .* got only train/loss_critic"):
        fit(game)


# -- averages ----------------------------------------------------------------------------------------------------------


class Normed(Game):
    """With batch norm, so that there are buffers."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.generator.insert(1, nn.BatchNorm1d(8))
        self.history = []

    def on_player_step(self, player):
        super().on_player_step(player)
        if player == "generator":
            self.history.append({name: p.detach().clone() for name, p in self.generator.named_parameters()})


def test_averages_equal_the_formula_and_have_the_networks_buffers():
    game = make_game(Normed, averages={"generator": 0.7}, turns={"generator": 2})
    fit(game)
    assert len(game.history) == 14
    expected = {name: value.double().numpy() for name, value in game.history[0].items()}  # the first step is copied
    for parameters in game.history[1:]:
        expected = {name: 0.7 * expected[name] + 0.3 * parameters[name].double().numpy() for name in expected}
    average = game.averaged("generator")
    for name, parameter in average.named_parameters():
        # 1e-6: float32 against float64, of numbers below 2.
        np.testing.assert_allclose(parameter.numpy(), expected[name], atol=1e-6)
        assert not parameter.requires_grad
    assert differences(dict(average.named_buffers()), dict(game.generator.named_buffers())) == []
    assert not torch.equal(game.generator[1].running_mean, torch.zeros(8))
    assert game.averaged("critic") is game.critic
    assert average is not game.generator


def test_resume_is_bit_equal_with_averages_schedules_and_noise(tmp_path):
    class Noisy(Normed):
        def critic_loss(self, batch):
            return super().critic_loss((batch[0], batch[1] + self.noise(*batch[1].shape)))

    def play(seed, **options):
        game = make_game(
            Noisy, seed, optimizer=Adam, averages={"generator": 0.7, "critic": 0.5}, turns={"critic": 2},
            lr_scheduler=HALVE, accumulate=3, clip_norm=0.5,
        )  # fmt: skip
        return fit(game, **options)

    whole = snapshot(play(0, max_epochs=3))
    play(0, max_epochs=1).save_checkpoint(tmp_path / "1.ckpt")
    resumed = snapshot(play(7, max_epochs=3, ckpt_path=tmp_path / "1.ckpt"))
    assert whole["global_step"] == 9
    for run in (whole, resumed):
        del run[STATE]["cpu"]  # a plain DataLoader draws from it before training starts; the game does not
    assert differences(whole, resumed) == []
    assert whole["state_dict"]["averages.generator.n_averaged"] == 9
    assert any(name.startswith("averages.generator") and "running_mean" in name for name in whole["state_dict"])
    loaded = Noisy.load_from_checkpoint(tmp_path / "1.ckpt")
    saved = torch.load(tmp_path / "1.ckpt", weights_only=True)["state_dict"]
    assert differences(weights(loaded), saved) == []
