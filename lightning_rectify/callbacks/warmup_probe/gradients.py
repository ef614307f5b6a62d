"""Whose gradients a probe takes, of which loss, and how: without a step, and without touching ``grad``."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from inspect import signature
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from lightning_rectify._lightning import LightningDataModule, LightningModule, Logger, Trainer
from lightning_rectify.optim.moments import beta2_of, unwrap

LossFunction = Callable[[LightningModule, Any], Tensor]
_DEFAULT_BETA2 = 0.999
_SMALLEST_SCALE = 1.0


@dataclass
class Player:
    """One loss, and the parameters that one optimizer trains with it.

    Attributes:
        name: of the player; "model" if there is but one.
        parameters: by their names in the module; those that require a gradient.
        loss: of a batch; a scalar.
        beta2: decay of the second moment.
        notes: what a reader should know about these choices.
    """

    name: str
    parameters: dict[str, Parameter]
    loss: Callable[[Any], Tensor]
    beta2: float = _DEFAULT_BETA2
    notes: list[str] = field(default_factory=list)


def find_players(
    module: LightningModule,
    trainer: Trainer,
    loss: LossFunction | Mapping[str, LossFunction] | None,
    beta2: float | None,
) -> list[Player]:
    """The players of a module.

    - ``loss`` given: that function, as player "model", or a player for each entry of a mapping; one named like an
      attribute that is a module owns the parameters below it, any other all parameters.
    - Automatic optimization: ``training_step``.
    - Manual optimization with ``players``: for each the method ``NAME_loss(batch)``, inside the module's
      ``turn_context(NAME)`` and with the part of the batch that ``turn_batch`` gives its first turn, where it has them;
      a ``joint`` game is one player with ``joint_loss(batch)``.

    Only parameters that an optimizer of the trainer has count, and beta2 is that optimizer's.

    Args:
        module: being fitted.
        trainer: fitting it.
        loss: see above.
        beta2: replaces that of the optimizers.

    Raises:
        ValueError: for a manual module without ``players`` if ``loss`` is None, or for a player without parameters.
    """
    losses: dict[str, Callable[[Any], Tensor]]
    if loss is not None:
        given = loss if isinstance(loss, Mapping) else {"model": loss}
        losses = {name: _given(module, function) for name, function in given.items()}
    elif module.automatic_optimization:
        losses = {"model": _training_step(module)}
    elif getattr(module, "joint", False) and callable(getattr(module, "joint_loss", None)):
        losses = {"joint": module.joint_loss}  # type: ignore[dict-item]
    elif names := getattr(module, "players", ()):
        losses = {name: _turn(module, name) for name in names}
    else:
        raise ValueError(
            f"Expected argument `loss` to be a function of module and batch for {type(module).__name__}, which "
            "optimizes manually and has no `players` with losses `NAME_loss(batch)`, but got None."
        )
    groups = {
        parameter: (optimizer, group) for optimizer in trainer.optimizers for group, parameter in _grouped(optimizer)
    }
    players = []
    for name, function in losses.items():
        part = getattr(module, name, None)
        prefix = f"{name}." if isinstance(part, torch.nn.Module) else ""
        owned = {
            key: parameter
            for key, parameter in module.named_parameters()
            if key.startswith(prefix) and parameter.requires_grad and (not groups or parameter in groups)
        }
        if not owned:
            raise ValueError(
                f"Expected player {name!r} of {type(module).__name__} to have parameters that require a gradient and "
                "that an optimizer has but got none."
            )
        player = Player(name, owned, function)
        _set_beta2(player, groups, beta2)
        players.append(player)
    return players


def _grouped(optimizer: Any) -> Iterator[tuple[dict[str, Any], Parameter]]:
    for group in unwrap(optimizer).param_groups:
        for parameter in group["params"]:
            yield group, parameter


def _set_beta2(player: Player, groups: Mapping[Parameter, Any], given: float | None) -> None:
    """Take the decay that most of the player's coordinates have."""
    if given is not None:
        player.beta2 = given
        return
    counts: Counter[float] = Counter()
    for parameter in player.parameters.values():
        optimizer, group = groups.get(parameter, (None, {}))
        if "betas" in group or "alpha" in group:
            counts[beta2_of(group)] += parameter.numel()
        elif optimizer is not None:
            kind = type(unwrap(optimizer)).__name__
            note = f"{kind} keeps no second moment; this is what an Adam with beta2 = {_DEFAULT_BETA2} would meet"
            if note not in player.notes:
                player.notes.append(note)
    if counts:
        player.beta2 = counts.most_common(1)[0][0]
    if len(counts) > 1:
        others = ", ".join(f"{value:g}" for value, _ in counts.most_common()[1:])
        player.notes.append(f"some parameter groups have another beta2 ({others}); all were probed at {player.beta2:g}")


# -- losses ------------------------------------------------------------------------------------------------------------


def _given(module: LightningModule, function: LossFunction) -> Callable[[Any], Tensor]:
    return lambda batch: function(module, batch)


def _training_step(module: LightningModule) -> Callable[[Any], Tensor]:
    names = list(signature(module.training_step).parameters)
    if "dataloader_iter" in names:
        raise ValueError(
            f"Expected argument `loss` to be a function of module and batch for {type(module).__name__}, whose "
            "`training_step` takes `dataloader_iter`, but got None."
        )
    more = (0,) if len(names) > 1 else ()

    def loss(batch: Any) -> Tensor:
        output: Any = module.training_step(batch, *more)
        if isinstance(output, Mapping):
            output = output.get("loss")
        if not isinstance(output, Tensor):
            raise ValueError(
                f"Expected `training_step` of {type(module).__name__} to return the loss as a tensor, or in a dict "
                f"as 'loss', but got {output!r}."
            )
        return output

    return loss


def _turn(module: Any, player: str) -> Callable[[Any], Tensor]:
    function = getattr(module, f"{player}_loss")
    turn_batch, turn_context = getattr(module, "turn_batch", None), getattr(module, "turn_context", None)

    def loss(batch: Any) -> Tensor:
        if turn_batch is not None:
            batch = turn_batch(batch, player, 0)
        if turn_context is None:
            return function(batch)
        with turn_context(player):
            return function(batch)

    return loss


# -- a batch, and its gradient -----------------------------------------------------------------------------------------


class GradientMaker:
    """Gradients at the weights as they are.

    ``torch.autograd.grad``, so that ``grad``, hooks that wait for it (an optimizer's own step in the backward pass,
    DDP's reductions) and the weights are left alone. Forward passes run under the trainer's precision. Under a gradient
    scaler the loss is scaled down until gradients are finite, as the scaler would.

    Args:
        module: being fitted.
        trainer: fitting it.
    """

    def __init__(self, module: LightningModule, trainer: Trainer) -> None:
        self.module, self.trainer = module, trainer
        self._plugin: Any = trainer.precision_plugin
        scaler = getattr(self._plugin, "scaler", None)
        self._scaled = scaler is not None
        self._scale: float = scaler.get_scale() if scaler is not None else 1.0
        datamodule: LightningDataModule | None = getattr(trainer, "datamodule", None)
        overrides = _overrides(datamodule, "on_before_batch_transfer")
        hooks: Any = datamodule if overrides else module
        self._before_transfer = hooks.on_before_batch_transfer

    def move(self, batch: Any) -> Any:
        """The batch as ``training_step`` gets it: converted, moved and changed by its hooks."""
        batch = self._before_transfer(self._plugin.convert_input(batch), 0)
        return self.trainer.strategy.batch_to_device(batch, dataloader_idx=0)

    def mean_gradient(self, player: Player, batches: list[Any]) -> list[Tensor]:
        """The mean over the batches, for each of the player's parameters; zeros where the loss does not depend on it.

        Args:
            player: whose loss.
            batches: moved.

        Raises:
            ValueError: if the loss has no gradient.
        """
        while True:
            total: list[Tensor] = []
            for batch in batches:
                gradients = self._gradient(player, batch, 1.0 / len(batches))
                total = [a + b for a, b in zip(total, gradients, strict=True)] if total else gradients
            # One read of the device a gradient, as a scaler has it.
            if not self._scaled or self._scale <= _SMALLEST_SCALE or all(g.isfinite().all() for g in total):
                return total
            self._scale /= 2.0

    def _gradient(self, player: Player, batch: Any, weight: float) -> list[Tensor]:
        with self._plugin.train_step_context():
            loss = player.loss(batch)
        if not loss.requires_grad:
            raise ValueError(
                f"Expected the loss of player {player.name!r} to depend on its parameters but got one without gradient."
            )
        parameters = list(player.parameters.values())
        gradients = torch.autograd.grad(loss * (weight * self._scale), parameters, materialize_grads=True)
        return [g.to_dense() if g.layout != torch.strided else g for g in gradients]


def _overrides(datamodule: LightningDataModule | None, hook: str) -> bool:
    return datamodule is not None and getattr(type(datamodule), hook) is not getattr(LightningDataModule, hook)


# -- silence -----------------------------------------------------------------------------------------------------------


class _Sink:
    """Takes any call of any method, such as ``add_image``, and does nothing."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Sink()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return _Sink()


class _SilentLogger(Logger):
    """A logger that forgets."""

    @property
    def name(self) -> str:
        return "silent"

    @property
    def version(self) -> str:
        return ""

    @property
    def experiment(self) -> Any:
        return _Sink()

    def log_metrics(self, *args: Any, **kwargs: Any) -> None:
        pass

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass


def _forget(*args: Any, **kwargs: Any) -> None:
    pass


@contextmanager
def silent(module: LightningModule, trainer: Trainer) -> Iterator[None]:
    """Inside this context what ``training_step`` logs reaches no logger, no metric and no progress bar."""
    loggers, trainer.loggers = trainer.loggers, [_SilentLogger()] if trainer.loggers else []
    module.log = module.log_dict = _forget  # type: ignore[method-assign]
    try:
        yield
    finally:
        del module.log, module.log_dict
        trainer.loggers = loggers
