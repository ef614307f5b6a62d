"""MinimaxModule against hand-written loops, and its parts one by one; what all modules share is in tests/contract."""

import copy
from functools import partial
from importlib import import_module

import pytest
import torch
from torch import nn
from torch.nn.functional import softplus
from torch.utils.data import DataLoader

from lightning_rectify import _lightning
from lightning_rectify._lightning import NAME, Callback
from lightning_rectify.modules.base import NonFiniteLossError
from lightning_rectify.modules.minimax import MinimaxModule
from tests.helpers.pool import Pool
from tests.helpers.training import differences, largest_difference, snapshot, trainer, weights

SGD = partial(torch.optim.SGD, lr=0.1)


class Game(MinimaxModule):
    players = ("critic", "generator")

    def __init__(self, hidden=8, **kwargs):
        super().__init__(**{"optimizer": SGD, **kwargs})
        self.critic = nn.Sequential(nn.Linear(2, hidden), nn.Tanh(), nn.Linear(hidden, 1))
        self.generator = nn.Sequential(nn.Linear(2, hidden), nn.BatchNorm1d(hidden), nn.Tanh(), nn.Linear(hidden, 2))

    def critic_loss(self, batch):
        return softplus(-self.critic(batch)).mean() + softplus(self.critic(self.generator(batch.flip(1)))).mean()

    def generator_loss(self, batch):
        return softplus(-self.critic(self.generator(batch.flip(1)))).mean()


class JointGame(Game):
    """Both learn from one loss; the generator maximises it."""

    maximizer = "generator"

    def joint_loss(self, batch):
        return self.critic_loss(batch)


def points(count=80, size=8):
    generator = torch.Generator().manual_seed(3)
    return DataLoader(torch.randn(count, 2, generator=generator) + 1, batch_size=size)


def game(cls=Game, **arguments):
    torch.manual_seed(0)
    return cls(**arguments)


def fit(module, loader=None, **options):
    run = trainer(**{"max_epochs": 1, **options})
    run.fit(module, loader or points())
    return run


# -- a hand-written loop -----------------------------------------------------------------------------------------------


def by_hand(module, batches, accumulate, turns, clip):
    """The same game in plain torch: no Lightning, no toggling."""
    optimizers = {name: SGD(getattr(module, name).parameters()) for name in module.players}
    rounds = [batches[i : i + accumulate] for i in range(0, len(batches), accumulate)]
    for window in rounds:
        for name in module.players:
            for _ in range(turns.get(name, 1)):
                parameters = list(getattr(module, name).parameters())
                total = [torch.zeros_like(parameter) for parameter in parameters]
                for batch in window:
                    for one, grad in zip(
                        total, torch.autograd.grad(getattr(module, f"{name}_loss")(batch), parameters), strict=True
                    ):
                        one += grad / len(window)
                norm = torch.sqrt(sum(one.square().sum() for one in total))
                for parameter, one in zip(parameters, total, strict=True):
                    parameter.grad = one * min(1.0, clip[name] / norm) if name in clip else one
                optimizers[name].step()
    return weights(module)


@pytest.mark.parametrize(
    ("accumulate", "turns", "clip"),
    [
        (1, {}, {}),
        (3, {}, {}),
        (3, {"critic": 2}, {"critic": 0.05}),
        (4, {"generator": 3}, {"critic": 0.1, "generator": 0.02}),
    ],
)
def test_accumulation_turns_and_clipping_equal_a_hand_written_loop(accumulate, turns, clip):
    """Ten batches: with 3 and 4 the last round of the epoch has fewer."""
    module = game(accumulate=accumulate, turns=turns, clip_norm=clip)
    expected = by_hand(copy.deepcopy(module), list(points()), accumulate, turns, clip)
    before = weights(module)
    run = fit(module)
    assert run.global_step == -(-10 // accumulate)
    # 1e-6: float32, and torch adds 1e-6 to the norm it divides by.
    assert largest_difference(weights(module), expected) < 1e-6
    assert largest_difference(weights(module), before) > 1e-2


def test_one_number_clips_every_player():
    module, both = game(clip_norm=0.03), game(clip_norm={"critic": 0.03, "generator": 0.03})
    fit(module), fit(both)
    assert differences(weights(module), weights(both)) == []


# -- joint -------------------------------------------------------------------------------------------------------------


def test_joint_game_is_one_backward_with_one_gradient_reversed():
    module = game(JointGame, joint=True)
    plain = copy.deepcopy(module)
    ups, downs = (SGD(net.parameters()) for net in (plain.generator, plain.critic))
    for batch in points():
        loss = plain.joint_loss(batch)
        parameters = [*plain.critic.parameters(), *plain.generator.parameters()]
        grads = torch.autograd.grad(loss, parameters)
        for i, (parameter, grad) in enumerate(zip(parameters, grads, strict=True)):
            parameter.grad = grad if i < 4 else -grad
        ups.step(), downs.step()
    calls = []
    module.critic.register_forward_hook(lambda *_: calls.append(1))
    run = fit(module)
    assert run.global_step == 10
    assert len(calls) == 2 * 10  # real and fake, once a batch
    assert "train/loss" in run.callback_metrics
    # The same operations in the same order, but for -grad: nothing to round.
    assert largest_difference(weights(module), weights(plain)) < 1e-7


@pytest.mark.parametrize(
    ("cls", "arguments", "words"),
    [
        (Game, {"joint": True}, "`joint`.*False.*`maximizer` is None"),
        (JointGame, {"joint": True, "turns": {"critic": 2}}, "`turns`.*None with `joint`.*'critic': 2"),
    ],
)
def test_games_that_cannot_be_joint(cls, arguments, words):
    with pytest.raises(ValueError, match=words):
        cls(**arguments)


def test_joint_loss_is_asked_for_by_name():
    with pytest.raises(NotImplementedError, match=r"Game plays in turns.*joint_loss"):
        game().joint_loss(None)


# -- turns -------------------------------------------------------------------------------------------------------------


class Watched(Game):
    """Keeps who needed a gradient in whose turn."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.seen = []

    def _look(self, player):
        needs = {name: next(getattr(self, name).parameters()).requires_grad for name in self.players}
        self.seen.append((player, needs))

    def critic_loss(self, batch):
        self._look("critic")
        return super().critic_loss(batch)

    def generator_loss(self, batch):
        self._look("generator")
        return super().generator_loss(batch)


def test_the_others_need_no_gradient_and_get_none():
    module = game(Watched, turns={"critic": 2})
    grads = []

    class Look(Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            grads.append(
                {name: [p.grad is not None for p in getattr(pl_module, name).parameters()] for name in ("critic",)}
            )

    fit(module, callbacks=[Look()], limit_train_batches=1)
    critic, generator = {"critic": True, "generator": False}, {"critic": False, "generator": True}
    assert module.seen == [("critic", critic), ("critic", critic), ("generator", generator)]
    assert all(parameter.requires_grad for parameter in module.parameters())


def test_requires_grad_is_restored_after_an_exception():
    class Broken(Game):
        def critic_loss(self, batch):
            raise RuntimeError("here")

    module = game(Broken)
    with pytest.raises(RuntimeError, match="here"):
        fit(module)
    assert all(parameter.requires_grad for parameter in module.parameters())


@pytest.mark.parametrize("accumulate", [1, 2])
def test_loss_that_is_not_finite_names_the_player_and_the_step(accumulate):
    class Diverging(Game):
        def generator_loss(self, batch):
            loss = super().generator_loss(batch)
            return loss * float("nan") if self.trainer.global_step == 3 else loss

    module = game(Diverging, accumulate=accumulate)
    with pytest.raises(NonFiniteLossError, match=r"player 'generator' is nan at step 3"):
        fit(module)


def test_each_turn_sees_its_part_of_the_batch():
    seen = []

    class Parts(Game):
        def turn_batch(self, batch, player, turn):
            return batch[turn::2] if player == "critic" else batch

        def critic_loss(self, batch):
            seen.append(batch)
            return super().critic_loss(batch)

    fit(game(Parts, turns={"critic": 2}), limit_train_batches=1)
    whole = next(iter(points()))
    assert torch.equal(seen[0], whole[0::2])
    assert torch.equal(seen[1], whole[1::2])


# -- the count ---------------------------------------------------------------------------------------------------------


def test_the_private_callbacks_of_lightnings_optimizer_are_what_the_door_thinks(monkeypatch):
    """Fails when Lightning renames them: then `uncounted` would count every player."""
    module, found = game(), []

    class Look(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            for optimizer in pl_module.optimizers():
                found.extend([optimizer._on_before_step, optimizer._on_after_step])

    assert fit(module, callbacks=[Look()]).global_step == 10
    assert all(callable(each) for each in found)

    @_lightning.contextmanager
    def counting(optimizer):
        yield

    monkeypatch.setattr("lightning_rectify.modules.minimax.uncounted", counting)
    assert fit(game()).global_step == 20  # Lightning's own count, which the door puts right


# -- averages ----------------------------------------------------------------------------------------------------------


def test_average_is_the_formula_with_the_players_buffers():
    module, followed = game(averages={"generator": 0.8}), []

    class Follow(Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            followed.append({name: p.detach().clone() for name, p in pl_module.generator.named_parameters()})

    fit(module, callbacks=[Follow()])
    expected = followed[0]
    for step in followed[1:]:
        expected = {name: 0.8 * value + 0.2 * step[name] for name, value in expected.items()}
    average = module.averaged("generator")
    # 1e-6: float32, torch interpolates in another form.
    assert all(torch.allclose(p, expected[name], atol=1e-6) for name, p in average.named_parameters())
    buffers = dict(module.generator.named_buffers())
    assert buffers
    assert all(torch.equal(value, buffers[name]) for name, value in average.named_buffers())
    assert module.averaged("critic") is module.critic
    assert not any(parameter.requires_grad for parameter in average.parameters())


def test_average_resumes_bit_for_bit(tmp_path):
    whole = snapshot(fit(game(averages={"generator": 0.8}), max_epochs=2))
    fit(game(averages={"generator": 0.8})).save_checkpoint(tmp_path / "one.ckpt")
    run = trainer(max_epochs=2)
    run.fit(game(averages={"generator": 0.8}), points(), ckpt_path=tmp_path / "one.ckpt")
    assert any(key.startswith("averages.generator") for key in whole["state_dict"])
    # A plain DataLoader draws from the global generator each time it starts, and it started once more.
    assert differences(whole, snapshot(run)) == ["/lightning_rectify_random_state/cpu"]


# -- noise -------------------------------------------------------------------------------------------------------------


def test_noise_is_a_stream_of_its_own():
    torch.manual_seed(5)
    first = game()
    state = torch.get_rng_state()
    drawn = first.noise(3, 2)
    assert torch.equal(state, torch.get_rng_state())
    assert drawn.shape == (3, 2)
    assert not torch.equal(drawn, first.noise(3, 2))
    second = game()
    assert torch.equal(drawn, second.noise(3, 2))  # of the seed


# -- optimizers and schedules ------------------------------------------------------------------------------------------


def test_a_player_has_the_optimizer_and_the_schedule_of_its_name():
    class Own(Game):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.critic_optimizer = partial(torch.optim.Adam, lr=0.5)
            self.critic_lr_scheduler = partial(torch.optim.lr_scheduler.ExponentialLR, gamma=0.5)

    run = fit(game(Own, lr_scheduler_interval="step"), limit_train_batches=3)
    critic, generator = run.optimizers
    assert isinstance(critic, torch.optim.Adam)
    assert isinstance(generator, torch.optim.SGD)
    assert critic.param_groups[0]["lr"] == pytest.approx(0.5 / 8, rel=1e-12)
    assert generator.param_groups[0]["lr"] == 0.1
    assert [group["name"] for optimizer in run.optimizers for group in optimizer.param_groups] == [
        "critic",
        "generator",
    ]


def test_plateau_says_which_metric_it_misses():
    plateau = partial(torch.optim.lr_scheduler.ReduceLROnPlateau, patience=0)
    with pytest.raises(ValueError, match=r"metric 'val/loss' of ReduceLROnPlateau.*train/loss_critic"):
        fit(game(lr_scheduler=plateau))


# -- precision ---------------------------------------------------------------------------------------------------------


def test_gradient_scaling_skips_what_overflows_and_clips_what_is_unscaled():
    """A real scaler on the CPU, whose first scale overflows."""
    plugin = import_module(f"{NAME}.plugins").MixedPrecision
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24, growth_interval=1000)
    norms, taken = [], []

    class Look(Callback):
        def on_train_start(self, trainer, pl_module):
            for optimizer in trainer.optimizers:
                optimizer.register_step_post_hook(self.keep)

        def keep(self, optimizer, *args):
            taken.append(optimizer)
            norms.append(nn.utils.get_total_norm([p.grad for group in optimizer.param_groups for p in group["params"]]))

    module = game(clip_norm=0.05)
    before = weights(module)
    run = trainer(max_epochs=4, callbacks=[Look()], plugins=[plugin("16-mixed", "cpu", scaler=scaler)])
    run.fit(module, points())
    assert run.global_step == 40
    assert 0 < len(taken) < 80  # some were skipped
    assert scaler.get_scale() < 2.0**24
    assert all(torch.isfinite(value).all() for value in weights(module).values())
    assert max(norms) <= 0.05 * (1 + 1e-3)  # 1e-3: gradients in half precision
    assert largest_difference(before, weights(module)) > 1e-3


# -- what setup refuses ------------------------------------------------------------------------------------------------


class NoNetwork(MinimaxModule):
    players = ("critic",)

    def critic_loss(self, batch):
        return batch.sum()


class NoLoss(MinimaxModule):
    players = ("critic",)

    def __init__(self):
        super().__init__()
        self.critic = nn.Linear(2, 1)


class NoPlayers(MinimaxModule):
    pass


@pytest.mark.parametrize(
    ("cls", "words"),
    [
        (NoNetwork, "attribute `critic` of NoNetwork.*torch.nn.Module.*got None"),
        (NoLoss, r"method `critic_loss\(batch\)`.*found none"),
        (NoPlayers, "NoPlayers.players.*name the players"),
    ],
)
def test_setup_says_what_a_game_lacks(cls, words):
    with pytest.raises(ValueError, match=words):
        fit(cls())


def test_strategies_that_shard_are_refused_by_name():
    strategies = import_module(f"{NAME}.strategies")
    module = game()
    run = trainer(strategy=strategies.ModelParallelStrategy(), devices=2)
    module.trainer = run
    with pytest.raises(ValueError, match=r"`strategy` for Game.*'auto' or 'ddp'.*got ModelParallelStrategy"):
        module.setup("fit")


def test_static_graph_is_refused():
    run = trainer(strategy=import_module(f"{NAME}.strategies").DDPStrategy(static_graph=True), devices=2)
    module = game()
    module.trainer = run
    with pytest.raises(ValueError, match=r"without static_graph.*got DDPStrategy"):
        module.setup("fit")


# -- two processes -----------------------------------------------------------------------------------------------------


def play(kind, ranks=2):
    """What each rank does: half of each batch, or all of it alone."""
    cls, arguments = {
        "turns": (Game, {"turns": {"critic": 3}, "accumulate": 2}),
        "joint": (JointGame, {"joint": True}),
    }[kind]
    module = game(cls, clip_norm=0.1, **arguments)
    module.generator[1] = nn.Identity()  # batch norm would see half of a batch
    whole = list(points())
    rank = torch.distributed.get_rank() if ranks > 1 else 0
    batches = [batch[rank::ranks] for batch in whole]
    run = trainer(devices=ranks, strategy="ddp" if ranks > 1 else "auto", max_epochs=1, use_distributed_sampler=False)
    run.fit(module, DataLoader(batches, batch_size=None))
    return {"weights": weights(module), "steps": run.global_step}


@pytest.mark.ddp
@pytest.mark.parametrize("kind", ["turns", "joint"])
def test_plain_ddp_plays(kind):
    pool = Pool()
    try:
        ranks = pool.run("tests.modules.test_minimax.play", kind=kind)
    finally:
        pool.close()
    alone = play(kind, ranks=1)
    assert ranks[0]["steps"] == ranks[1]["steps"] == alone["steps"] == (5 if kind == "turns" else 10)
    assert differences(ranks[0]["weights"], ranks[1]["weights"]) == []
    # 1e-6: means of halves in float32.
    assert largest_difference(ranks[0]["weights"], alone["weights"]) < 1e-6
