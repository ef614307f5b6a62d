"""MinimaxModule and its surroundings: noise, gradient scaling, what is refused, two processes."""

import copy
from functools import partial
from importlib import import_module

import numpy as np
import pytest
import torch
from torch import nn

from lightning_rectify._lightning import NAME, Callback
from lightning_rectify.modules.base import NonFiniteLossError
from lightning_rectify.modules.minimax import MinimaxModule
from tests.helpers.games import Game, Steps, fit, make_game
from tests.helpers.training import differences, largest_difference, trainer, weights

STATE = "lightning_rectify_random_state"
CLIP = {"critic": 0.05, "generator": 0.02}
MixedPrecision = import_module(f"{NAME}.plugins").MixedPrecision
strategies = import_module(f"{NAME}.strategies")


# -- noise -------------------------------------------------------------------------------------------------------------


def test_noise_is_a_function_of_the_seed_and_leaves_the_global_state_alone():
    game = make_game()
    before = torch.get_rng_state()
    drawn = game.noise(1000, 2)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)
    assert torch.equal(make_game().noise(1000, 2), drawn)
    assert not torch.equal(game.noise(1000, 2), drawn)
    assert not torch.equal(make_game(seed=1).noise(1000, 2), drawn)
    # 2000 standard normal numbers: five standard errors of mean and variance.
    assert abs(drawn.mean().item()) < 5 / 2000**0.5
    assert abs(drawn.var().item() - 1) < 5 * (2 / 2000) ** 0.5


def test_noise_is_saved_and_restored(tmp_path):
    training = fit(make_game())
    game = training.model
    game.noise(5)
    training.save_checkpoint(tmp_path / "a.ckpt")
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)[STATE]
    (key,) = saved.keys() - {"cpu"}
    assert torch.equal(saved[key], game.noise_generator.get_state().unsqueeze(0))  # a row for each rank
    after = game.noise(5)
    other = make_game(seed=9)
    other.noise(3)
    found = []
    other.turn_batch = lambda batch, player, turn: (found.append(other.noise(5)), batch)[1]
    fit(other, ckpt_path=tmp_path / "a.ckpt", max_epochs=2)
    assert torch.equal(found[0], after)


def test_a_state_saved_on_another_kind_of_device_is_left_out():
    """CUDA's generator has 16 bytes, the CPU's 5056: one does not go on from the other."""
    game = make_game()
    mine = game.noise_generator.get_state()
    game.on_load_checkpoint({STATE: {"noise_cuda": torch.zeros(1, 16, dtype=torch.uint8)}})
    game.on_train_start()
    assert torch.equal(game.noise_generator.get_state(), mine)


def test_a_game_can_be_copied_after_training():
    game = fit(make_game(averages={"generator": 0.5})).model
    game.noise(1)
    game._trainer = None
    twin = copy.deepcopy(game)
    assert differences(weights(twin), weights(game)) == []
    assert torch.equal(twin.noise(3), game.noise(3))


# -- fp16 --------------------------------------------------------------------------------------------------------------


def fp16(scale):
    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=10**6))


def test_steps_with_a_scale_that_overflows_are_skipped_and_then_it_trains():
    game, steps, seen = make_game(turns={"critic": 2}), Steps(), set()
    for layer in (*game.critic, *game.generator):
        layer.register_forward_hook(lambda _, __, output: seen.add(output.dtype))
    before, plugin = weights(game), fp16(2.0**24)
    first = {}

    class Look(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch_idx == 0:
                first.update(weights(pl_module))

    training = fit(game, batches=14, plugins=[plugin], callbacks=[steps, Look()])
    assert training.precision == "16-mixed"
    assert seen == {torch.float16}
    assert differences(first, before) == []  # the scale is halved at each skipped step, three in the first batch
    assert 0 < len(steps.players) < 14 * 3
    skipped = 14 * 3 - len(steps.players)
    assert plugin.scaler.get_scale() == 2.0 ** (24 - skipped)
    assert training.global_step == 14  # batches, also those that were skipped
    assert all(torch.isfinite(value).all() for value in weights(game).values())
    assert largest_difference(weights(game), before) > 0.01
    assert all(np.isfinite(steps.norm))


def test_clipping_sees_gradients_without_their_scale():
    half, full = Steps(), Steps()
    options = {"clip_norm": CLIP, "optimizer": partial(torch.optim.SGD, lr=0.1)}
    game = make_game(**options)
    fit(game, plugins=[fp16(256.0)], callbacks=[half])
    exact = make_game(**options)
    fit(exact, callbacks=[full])
    bounds = [CLIP[player] for player in half.players]
    assert len(bounds) == 14
    # 1e-3: torch clips by bound / (norm + 1e-6). With the scale still in, they would be 256 times too small.
    assert half.norm == pytest.approx(bounds, rel=1e-3)
    # 2e-3: seven steps of 0.1 * 0.05 at most, with gradients to fp16's three digits.
    assert largest_difference(weights(game), weights(exact)) < 2e-3


# -- errors ------------------------------------------------------------------------------------------------------------


class NoNetwork(Game):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        del self.generator
        self.generator = "later"


class NoLoss(Game):
    players = ("critic", "generator", "judge")

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.judge = nn.Linear(1, 1)


class Nobody(MinimaxModule):
    pass


@pytest.mark.parametrize(
    ("cls", "words"),
    [
        (NoNetwork, r"attribute `generator` of NoNetwork .*torch.nn.Module.* got 'later'"),
        (NoLoss, r"NoLoss to have a method `judge_loss\(batch\)` for player 'judge'"),
        (Nobody, r"Nobody.players to name the players but got \(\)"),
    ],
)
def test_setup_says_what_the_game_lacks(cls, words):
    with pytest.raises(ValueError, match=f"Expected {words}"):
        fit(make_game(cls))


class NoMaximizer(Game):
    maximizer = None


class Turns(MinimaxModule):
    players, maximizer = ("critic",), "critic"
    critic_loss = None

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.critic = nn.Linear(2, 1)


@pytest.mark.parametrize(
    ("cls", "arguments", "words"),
    [
        (Game, {"turns": {"critic": 0}}, "`turns` of player 'critic'.*at least 1.*got 0"),
        (Game, {"turns": {"critic": 1.5}}, "`turns`.*integer.*got {'critic': 1.5}"),
        (Game, {"turns": {"driver": 1}}, "`turns`.*critic, generator.*got 'driver'"),
        (Game, {"clip_norm": 0}, "`clip_norm` of player 'critic'.*above 0.*got 0"),
        (Game, {"clip_norm": float("nan")}, "`clip_norm`.*number.*got nan"),
        (Game, {"clip_norm": {"generator": -1.0}}, "`clip_norm` of player 'generator'.*above 0.*got -1.0"),
        (Game, {"clip_norm": {"driver": 1.0}}, "`clip_norm`.*critic, generator.*got 'driver'"),
        (Game, {"averages": {"critic": 1.0}}, r"`averages` of player 'critic'.*\[0, 1\).*got 1.0"),
        (Game, {"averages": {"critic": -0.1}}, r"`averages` of player 'critic'.*\[0, 1\).*got -0.1"),
        (Game, {"averages": {"driver": 0.5}}, "`averages`.*critic, generator.*got 'driver'"),
        (Game, {"clip_norm": {"critic": None}}, "`clip_norm`.*number.*got {'critic': None}"),
        (Game, {"accumulate": 1.5}, "`accumulate`.*integer.*got 1.5"),
        (Game, {"accumulate": 0}, "`accumulate`.*at least 1.*got 0"),
        (Game, {"joint": True, "turns": {"critic": 2}}, "`turns`.*None with `joint`.*got {'critic': 2}"),
        (NoMaximizer, {"joint": True}, "`joint`.*False for NoMaximizer.*`maximizer` is None.*got True"),
        (Game, {"lr_scheduler_interval": "day"}, "`lr_scheduler_interval`.*got 'day'"),
    ],
)
def test_wrong_argument_is_named(cls, arguments, words):
    with pytest.raises(ValueError, match=f"Expected argument {words}"):
        cls(**arguments)


def test_joint_is_refused_with_a_gradient_scaler():
    with pytest.raises(ValueError, match=r"`precision` for a joint game.*'bf16-mixed'.*got '16-mixed'"):
        fit(make_game(joint=True), plugins=[fp16(256.0)])


def test_joint_without_its_loss_says_so():
    with pytest.raises(NotImplementedError, match=r"Turns plays in turns: it has no `joint_loss\(batch\)`"):
        fit(make_game(Turns, joint=True))


@pytest.mark.parametrize("name", ["FSDPStrategy", "ModelParallelStrategy", "DeepSpeedStrategy", "XLAStrategy"])
@pytest.mark.parametrize("joint", [False, True])
def test_strategies_that_cannot_play_are_refused_by_name(name, joint):
    """Stand-ins with the names: the real ones want devices that tests have not."""
    strategy = type(name, (strategies.SingleDeviceStrategy,), {})("cpu")
    with pytest.raises(ValueError, match=f"`strategy` for Game, a game of 2 players.*'auto' or 'ddp' but got {name}"):
        fit(make_game(joint=joint), strategy=strategy)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (strategies.ModelParallelStrategy, "'auto' or 'ddp' but got ModelParallelStrategy"),
        (partial(strategies.DDPStrategy, static_graph=True), "without static_graph but got DDPStrategy"),
    ],
)
def test_strategies_of_two_processes_that_cannot_play_are_refused(make, words):
    game = make_game()
    game.trainer = trainer(strategy=make(), devices=2)
    with pytest.raises(ValueError, match=f"`strategy` for Game, a game .*{words}"):
        game.setup("fit")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("player", ["critic", "generator", "joint"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_loss_that_is_not_finite_names_player_and_step(player, value, accumulate):
    class Poisoned(Game):
        calls = 0

        def poison(self, name, loss):
            if name != player:
                return loss
            self.calls += 1
            return loss * (value if self.calls == 2 * accumulate else 1.0)  # the last batch of the second round

        def critic_loss(self, batch):
            return self.poison("critic", super().critic_loss(batch))

        def generator_loss(self, batch):
            return self.poison("generator", super().generator_loss(batch))

        def joint_loss(self, batch):
            return self.poison("joint", super().joint_loss(batch))

    game = make_game(Poisoned, accumulate=accumulate, joint=player == "joint", averages={"generator": 0.5})
    with pytest.raises(NonFiniteLossError, match=rf"player '{player}' is (nan|-?inf) at step 1 \(epoch 0\)"):
        fit(game)
    assert game.calls == 2 * accumulate
    assert all(torch.isfinite(value).all() for value in weights(game).values())
    assert all(parameter.requires_grad for parameter in (*game.critic.parameters(), *game.generator.parameters()))


# -- two processes -----------------------------------------------------------------------------------------------------


@pytest.mark.ddp
@pytest.mark.parametrize(
    "how",
    [
        {"turns": {"critic": 3}},
        {"turns": {"critic": 2}, "accumulate": 3, "clip_norm": CLIP, "averages": {"generator": 0.9}},
        {"joint": True},
        {"joint": True, "accumulate": 3, "clip_norm": CLIP},
    ],
    ids="-".join,
)
def test_plain_ddp_plays_as_one_process(pool, how):
    ranks = pool.run("tests.helpers.games.play_on_rank", **how)
    alone = make_game(**how)
    steps = fit(alone, max_epochs=2, precision="64-true").global_step
    assert [rank["steps"] for rank in ranks] == [steps, steps]
    assert differences(ranks[0]["weights"], ranks[1]["weights"]) == []
    # 1e-10: float64 sums in another order, through 14 rounds with momentum.
    assert largest_difference(ranks[0]["weights"], weights(alone)) < 1e-10


@pytest.mark.ddp
def test_ranks_meet_once_a_step(pool):
    assert pool.run("tests.helpers.games.meetings_on_rank") == [[False, False, True] * 2] * 2


@pytest.mark.ddp
def test_ranks_draw_noise_of_their_own_also_if_they_drew_before_there_was_a_trainer(pool):
    a, b = pool.run("tests.helpers.games.noise_on_rank")
    assert not torch.isin(a, b).any()
