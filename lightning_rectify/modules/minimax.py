"""``MinimaxModule``: games of two or more players, each with networks, a loss and an optimizer of its own."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.optim.optimizer import Optimizer
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from lightning_rectify._lightning import (
    LRSchedulerCallable,
    OptimizerCallable,
    allow_unused_parameters,
    rank_zero_info,
    uncounted,
)
from lightning_rectify.arguments import check_least, check_types
from lightning_rectify.modules.base import RectifiedModule
from lightning_rectify.modules.compiling import notices_frozen_weights
from lightning_rectify.seeds import derive_seed

_NOISE = "noise_"  # and the kind of device: no generator takes another kind's state


class MinimaxModule(RectifiedModule):
    """A RectifiedModule for games: a subclass names its players and writes one loss for each, no backward, no step.

    For each name in ``players``, in this order, the subclass has an attribute of that name (a module, the player's
    network) and a method ``NAME_loss(batch)`` that returns the scalar the player minimises::

        class ToyGame(MinimaxModule):
            players = ("critic", "generator")

            def __init__(self, **kwargs):
                super().__init__(**kwargs)
                self.critic, self.generator = torch.nn.Linear(2, 1), torch.nn.Linear(4, 2)

            def critic_loss(self, batch):
                fake = self.generator(self.noise(len(batch), 4))
                return F.softplus(-self.critic(batch)).mean() + F.softplus(self.critic(fake)).mean()

            def generator_loss(self, batch):
                return F.softplus(-self.critic(self.generator(self.noise(len(batch), 4)))).mean()

    A round is ``accumulate`` batches: each player in turn, ``turns[player]`` times, computes its loss on each of them
    and makes one step with the mean gradient. While a player moves, the parameters of the others need no gradient
    (compiled, with a torch whose code would not notice that they do again: theirs is thrown away).
    With ``joint=True`` there is one graph and one backward pass: every player minimises ``joint_loss(batch)``, but the
    one named by ``maximizer`` maximises it.

    - ``trainer.global_step`` counts rounds (batches, with ``accumulate=1``), so ``max_steps``, ``ModelCheckpoint`` and
      schedules mean the same as for one player.
    - The optimizer of a player is its attribute ``NAME_optimizer``, if the subclass has one, else ``optimizer``; so for
      ``NAME_lr_scheduler``. Schedulers step after each round or at the end of an epoch. Their order is that of
      ``players``; it is part of the checkpoint, as are all averages and generators.
    - Noise is drawn by ``noise``, or from ``noise_generator``: one a rank, seeded from the run's seed and the rank.
    - A loss that is not finite raises ``NonFiniteLossError`` with player and step, before it reaches a gradient.
    - ``averages`` keeps exponential moving averages of players' networks, with the players' buffers; read them with
      ``averaged(player)``.
    - Logged: ``train/loss_NAME``, the mean over the turns and batches of the round; ``train/loss`` for ``joint``.
    - ``ddp`` works: unused parameters are searched for. Strategies that shard weights or take one optimizer are refused
      in ``setup``. Unlike Lightning's own loop, the last round of an epoch may be of fewer batches, and it is their
      mean that is taken.

    Hooks to override: ``turn_batch`` (what part of the batch a turn sees), ``turn_context`` (around each loss),
    ``on_player_step`` (after each step of a player).

    Args:
        turns: steps of each player in a round, at least 1; players not named make one.
        clip_norm: largest norm of a player's gradient, above 0: one number for all, or by player. None: no clipping.
        accumulate: batches in a round, at least 1.
        joint: play ``joint_loss`` in one backward pass.
        averages: decay, in [0, 1), of the average of each player named, once a step of that player.
        **kwargs: of :class:`RectifiedModule`.

    Raises:
        ValueError: for an argument outside its range or an unknown player; in ``setup``, for a player without network
            or loss, or a strategy that cannot play.
    """

    players: ClassVar[tuple[str, ...]] = ()
    maximizer: ClassVar[str | None] = None

    def __init__(
        self,
        turns: dict[str, int] | None = None,
        clip_norm: float | dict[str, float] | None = None,
        accumulate: int = 1,
        joint: bool = False,
        averages: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        check_types(MinimaxModule, locals())
        super().__init__(**kwargs)
        self.automatic_optimization = False
        clip = dict.fromkeys(self.players, clip_norm) if isinstance(clip_norm, (int, float)) else clip_norm or {}
        named: dict[str, Mapping[str, float]] = {"turns": turns or {}, "clip_norm": clip, "averages": averages or {}}
        for name, by_player in named.items():
            for player in by_player:
                if player not in self.players:
                    raise ValueError(
                        f"Expected argument `{name}` to name players of {', '.join(self.players)} but got {player!r}."
                    )
        _check_all("turns", turns, lambda value: value >= 1, "at least 1")
        _check_all("clip_norm", clip, lambda value: value > 0, "above 0")
        _check_all("averages", averages, lambda value: 0 <= value < 1, "decays in [0, 1)")
        check_least(1, accumulate=accumulate)
        if joint and self.maximizer not in self.players:
            raise ValueError(
                f"Expected argument `joint` to be False for {type(self).__name__}, whose `maximizer` is "
                f"{self.maximizer!r} and not one of its players, but got True."
            )
        if joint and turns:
            raise ValueError(f"Expected argument `turns` to be None with `joint`, which has no turns, but got {turns}.")
        self.turns = {player: (turns or {}).get(player, 1) for player in self.players}
        self.clip_norm: dict[str, float] = dict(clip)
        self.accumulate, self.joint, self.decays = accumulate, joint, dict(averages or {})
        self.averages: nn.ModuleDict | None = None
        self._window: list[Any] = []
        self._playing = ""
        self._freeze = True  # players that do not move
        self._noise_generator: torch.Generator | None = None
        self._noise_rank = 0  # whose stream that generator draws

    # -- what a subclass reads and overrides ---------------------------------------------------------------------------

    def noise(self, *size: int) -> Tensor:
        """Standard normal numbers from this rank's generator, on the module's device, shape ``size``."""
        return torch.randn(size, generator=self.noise_generator, device=self.device)

    @property
    def noise_generator(self) -> torch.Generator:
        """This rank's generator of latent noise; its state is saved with the checkpoint.

        Before there is a Trainer the rank counts as 0; a rank that turns out to be another starts a stream of its own.
        """
        rank = self.global_rank if self._trainer is not None else self._noise_rank
        generator = self._noise_generator
        if generator is None or generator.device.type != self.device.type or rank != self._noise_rank:
            generator = torch.Generator(self.device).manual_seed(derive_seed(torch.initial_seed(), rank, 1))
            self._noise_generator, self._noise_rank = generator, rank
        return generator

    def averaged(self, player: str) -> nn.Module:
        """The moving average of a player's network, or the network itself if none is kept."""
        if player not in self.decays:
            return getattr(self, player)
        self._make_averages()
        assert self.averages is not None
        average = self.averages[player]
        assert isinstance(average, AveragedModel)
        return average.module

    def turn_batch(self, batch: Any, player: str, turn: int) -> Any:
        """What a player sees of the batch in its turn, 0 to ``turns[player] - 1``; all of it by default."""
        return batch

    def turn_context(self, player: str) -> AbstractContextManager[Any]:
        """Entered around each computation of a player's loss and its backward pass."""
        return nullcontext()

    def on_player_step(self, player: str) -> None:
        """Called after each step of a player's optimizer; call ``super()``, which updates the averages."""
        if player in self.decays:
            average = self.averages[player] if self.averages is not None else None
            assert isinstance(average, AveragedModel)
            average.update_parameters(getattr(self, player))

    def joint_loss(self, batch: Any) -> Tensor:
        """What all players minimise, but ``maximizer``, in ``joint`` mode."""
        raise NotImplementedError(f"{type(self).__name__} plays in turns: it has no `joint_loss(batch)`.")

    def player_parameter_groups(self, player: str) -> list[dict[str, Any]]:
        """The parameter groups of a player's optimizer, named after it."""
        return [{"name": player, "params": [p for p in getattr(self, player).parameters() if p.requires_grad]}]

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The groups of all players, in their order."""
        return [group for player in self.players for group in self.player_parameter_groups(player)]

    def networks(self) -> Iterable[nn.Module]:
        """The players' networks: what ``compile`` compiles."""
        return [getattr(self, player) for player in self.players]

    # -- Lightning's hooks ---------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Check that the game can be played, and make plain DDP play it."""
        for player in self.players:
            if not isinstance(getattr(self, player, None), nn.Module):
                raise ValueError(
                    f"Expected attribute `{player}` of {type(self).__name__} to be player {player!r}'s network "
                    f"(a torch.nn.Module) but got {getattr(self, player, None)!r}."
                )
            if not self.joint and not callable(getattr(self, f"{player}_loss", None)):
                raise ValueError(
                    f"Expected {type(self).__name__} to have a method `{player}_loss(batch)` for player {player!r} "
                    "but found none."
                )
        if not self.players:
            raise ValueError(f"Expected {type(self).__name__}.players to name the players but got ().")
        if stage == "fit":
            self._check_strategy()

    def configure_model(self) -> None:
        """Make the averages, then compile."""
        self._make_averages()
        self._freeze = self._freeze and (not self._compile or notices_frozen_weights())
        super().configure_model()

    def configure_optimizers(self) -> Any:
        """One optimizer a player, in the order of ``players``, with the player's scheduler if it has one."""
        optimizers, schedulers = [], []
        for player in self.players:
            make: OptimizerCallable = getattr(self, f"{player}_optimizer", None) or self.optimizer
            schedule: LRSchedulerCallable | None = getattr(self, f"{player}_lr_scheduler", None) or self.lr_scheduler
            optimizers.append(make(self.player_parameter_groups(player)))
            if schedule is not None:
                schedulers.append({"scheduler": schedule(optimizers[-1])})
        return optimizers, schedulers

    def on_before_backward(self, loss: Tensor) -> None:
        """Stop at a loss that is not finite, in the name of the player whose it is."""
        self.check_finite(loss, self._playing)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Clip the gradient of the player whose optimizer steps (by now it is unscaled)."""
        for player, raw in zip(self.players, self.trainer.optimizers, strict=True):
            if raw is optimizer and player in self.clip_norm:
                self.clip_gradients(optimizer, self.clip_norm[player], "norm")

    def on_train_start(self) -> None:
        """Seed or restore this rank's noise, beside the global random state."""
        _ = self.noise_generator  # made before the global seed of this rank changes
        self._window = []
        super().on_train_start()

    def training_step(self, batch: Any, batch_idx: int) -> None:
        """Keep the batch; play a round when there are ``accumulate`` of them, or the epoch ends."""
        self._window.append(batch)
        if len(self._window) < self.accumulate and not self.trainer.is_last_batch:
            return
        window, self._window = self._window, []
        losses = self._play_jointly(window) if self.joint else self._play_in_turns(window)
        # Not the batch's own size: its length is not known here, and a step's value needs none.
        self.log_dict(losses, prog_bar=True, on_step=True, on_epoch=False, batch_size=1)
        if self.lr_scheduler_interval == "step":
            self._step_schedulers()
        elif self.trainer.is_last_batch:
            # As Lightning does: in a checkpoint of this batch they have moved.
            self._step_schedulers(plateau=False)

    def on_train_epoch_end(self) -> None:
        """Step the schedulers that count epochs and wait for the metric of a validation."""
        if self.lr_scheduler_interval == "epoch":
            self._step_schedulers(plateau=True)

    # -- a round -------------------------------------------------------------------------------------------------------

    def _play_in_turns(self, window: list[Any]) -> dict[str, Tensor]:
        means = {}
        for player, optimizer in self._optimizers():
            losses = []
            with self._alone(optimizer):
                for turn in range(self.turns[player]):
                    last = player == self.players[-1] and turn == self.turns[player] - 1
                    loss = getattr(self, f"{player}_loss")

                    def of_this_turn(batch: Any, loss: Any = loss, player: str = player, turn: int = turn) -> Tensor:
                        return loss(self.turn_batch(batch, player, turn))

                    losses += self._accumulate(player, [optimizer], window, of_this_turn)
                    self._step(player, optimizer, counted=last)
            means[f"train/loss_{player}"] = torch.stack(losses).mean()
        return means

    def _play_jointly(self, window: list[Any]) -> dict[str, Tensor]:
        optimizers = dict(self._optimizers())
        losses = self._accumulate("joint", list(optimizers.values()), window, self.joint_loss)
        for group in optimizers[str(self.maximizer)].param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.grad.neg_()
        for player, optimizer in optimizers.items():
            self._step(player, optimizer, counted=player == self.players[-1])
        return {"train/loss": torch.stack(losses).mean()}

    def _accumulate(
        self, player: str, optimizers: list[Any], window: list[Any], compute: Callable[[Any], Tensor]
    ) -> list[Tensor]:
        """Leave the mean gradient over the window's batches; ranks meet in the last one only."""
        self._playing, losses = player, []
        for optimizer in optimizers:
            optimizer.zero_grad()
        for i, batch in enumerate(window):
            with self._ranks_meet(i == len(window) - 1), self.turn_context(player):
                loss = compute(batch)
                self.manual_backward(loss / len(window) if len(window) > 1 else loss)
            losses.append(loss.detach())
        return losses

    def _step(self, player: str, optimizer: Any, counted: bool) -> None:
        with nullcontext() if counted else uncounted(optimizer):
            optimizer.step()
        with torch.no_grad():
            self.on_player_step(player)

    def _optimizers(self) -> Iterator[tuple[str, Any]]:
        optimizers = self.optimizers()
        yield from zip(self.players, optimizers if isinstance(optimizers, list) else [optimizers], strict=True)

    @contextmanager
    def _alone(self, optimizer: Any) -> Iterator[None]:
        """The parameters of the other optimizers need no gradient meanwhile."""
        # Lightning's toggled_optimizer is not in 2.5, and takes longer.
        own = {id(p) for group in optimizer.param_groups for p in group["params"]}
        groups = (group for other in self.trainer.optimizers for group in other.param_groups)
        others = [p for group in groups for p in group["params"] if p.requires_grad and id(p) not in own]
        for parameter in others:
            parameter.requires_grad_(not self._freeze)
        try:
            yield
        finally:
            for parameter in others:
                if self._freeze:
                    parameter.requires_grad_(True)
                else:  # what compiled code of an older torch would not notice
                    parameter.grad = None

    @contextmanager
    def _ranks_meet(self, meet: bool) -> Iterator[None]:
        block = getattr(self.trainer.strategy, "block_backward_sync", None)
        with nullcontext() if meet or block is None else block():
            yield

    def _step_schedulers(self, plateau: bool | None = None) -> None:
        """Step all schedulers, or only those that do, or do not, read a metric."""
        schedulers: Any = self.lr_schedulers()
        for scheduler in schedulers if isinstance(schedulers, list) else [schedulers] if schedulers else []:
            if plateau is not None and isinstance(scheduler, ReduceLROnPlateau) is not plateau:
                continue
            if isinstance(scheduler, ReduceLROnPlateau):
                monitor = getattr(scheduler, "monitor", "val/loss")
                value = self.trainer.callback_metrics.get(monitor)
                if value is None and self.trainer.ckpt_path:
                    continue  # a run that goes on knows the metrics of its own validations alone
                if value is None:
                    raise ValueError(
                        f"Expected metric {monitor!r} of ReduceLROnPlateau to be logged by now but got only "
                        f"{', '.join(sorted(self.trainer.callback_metrics)) or 'none'}."
                    )
                scheduler.step(value)
            else:
                scheduler.step()

    # -- the state -----------------------------------------------------------------------------------------------------

    def _make_averages(self) -> None:
        if self.decays and self.averages is None:
            averages = {}
            for player, decay in self.decays.items():
                average = AveragedModel(getattr(self, player), multi_avg_fn=get_ema_multi_avg_fn(decay))
                averages[player] = average.requires_grad_(False)
            self.averages = nn.ModuleDict(averages)

    def _check_strategy(self) -> None:
        strategy = self.trainer.strategy
        name = type(strategy).__name__
        if any(word in name for word in ("FSDP", "ModelParallel", "DeepSpeed", "XLA")):
            raise ValueError(
                f"Expected the Trainer's `strategy` for {type(self).__name__}, a game of {len(self.players)} players, "
                f"to be 'auto' or 'ddp' but got {name}: it takes one optimizer or shards the weights that the other "
                "players read."
            )
        distributed = self.trainer.world_size > 1
        if distributed and not self.joint:
            if not allow_unused_parameters(strategy):
                raise ValueError(
                    f"Expected the Trainer's `strategy` for {type(self).__name__}, a game played in turns, to be 'ddp' "
                    f"or 'ddp_find_unused_parameters_true' without static_graph but got {name}: in a turn the other "
                    "players' parameters get no gradient."
                )
            rank_zero_info(f"{type(self).__name__}: DDP searches each graph for the parameters it used.")
        if self.joint and self.trainer.precision == "16-mixed":
            raise ValueError(
                "Expected the Trainer's `precision` for a joint game to be 'bf16-mixed' or '32-true' but got "
                "'16-mixed': its gradient scale changes between two players' steps from one backward pass."
            )

    def _random_states(self) -> dict[str, Tensor]:
        return {**super()._random_states(), _NOISE + self.device.type: self.noise_generator.get_state()}

    def _set_random_state(self, name: str, state: Tensor) -> None:
        if name == _NOISE + self.device.type:
            self.noise_generator.set_state(state)
        else:
            super()._set_random_state(name, state)


def _check_all(name: str, values: Mapping[str, float] | None, good: Callable[[float], bool], expected: str) -> None:
    for player, value in (values or {}).items():
        if not isinstance(value, (int, float)) or not good(value):
            raise ValueError(f"Expected argument `{name}` of player {player!r} to be {expected} but got {value!r}.")
