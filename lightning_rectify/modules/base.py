"""``RectifiedModule``: what every module of the package, and every module a user builds on it, has in common."""

import inspect
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from lightning_rectify._lightning import (
    LightningModule,
    LRSchedulerCallable,
    OptimizerCallable,
    log_next,
    make_up,
    mend_resume,
)
from lightning_rectify.arguments import check_choice, check_types
from lightning_rectify.checkpoints import read_safely, require_whole
from lightning_rectify.modules.sharding import class_of, number_as_module, shard
from lightning_rectify.optim.rectified_adam import RectifiedAdam
from lightning_rectify.seeds import derive_seed

_RANDOM_STATE = "lightning_rectify_random_state"
# Lightning's classmethod that refuses to be called on an instance: its result would be thrown away.
_class_only: Any = type(LightningModule.__dict__["load_from_checkpoint"])
#: Key of a checkpoint that names the module's class, for the command line.
CLASS_PATH = "lightning_rectify_class_path"
_NOT_SUPPORTED = ("FSDP", "DeepSpeed")  # in the names of strategies


class NonFiniteLossError(ArithmeticError):
    """A player's loss was NaN or infinite; raised before the step, so weights and last checkpoint stay good."""


class RectifiedModule(LightningModule):
    """A LightningModule whose optimizer and schedule come in as arguments and whose checkpoints always load.

    Subclasses write ``training_step`` and the rest as in any LightningModule. They may override two hooks:
    ``parameter_groups`` (which parameters form which named group) and ``networks`` (what ``compile`` compiles).

    Saved hyperparameters hold plain values only (numbers, strings, None, and lists and dicts of them): optimizers,
    schedulers, networks and other objects are left out, also when a subclass calls ``save_hyperparameters()`` itself
    (which it need not do: its arguments are collected without it). Checkpoints therefore load with
    ``weights_only=True``, Lightning's default. Nor do they hold what a subclass gives its parent, as in
    ``super().__init__(network="resnet20", **kwargs)``, or leaves at the parent's default: they are what the class
    itself was given, so that ``type(module)(**module.hparams)`` makes an equal one.

    A checkpoint also holds each rank's random state (dropout draws from it), so that a resumed run goes on bit for bit.

    A loss that is not finite raises :class:`NonFiniteLossError` before the backward pass; the check reads one number
    a step.

    Args:
        optimizer: called with the parameter groups; a class, a ``functools.partial``, or in YAML a ``class_path`` with
            ``init_args``.
        lr_scheduler: called with the optimizer; None keeps the learning rate constant. A ``ReduceLROnPlateau`` reads
            the metric named by its ``monitor`` attribute (Lightning's own subclass has one).
        lr_scheduler_interval: when the scheduler steps, "step" (each optimizer step) or "epoch".
        compile: compile the networks with ``torch.compile``; keys of the state dict do not change.

    Raises:
        ValueError: if ``lr_scheduler_interval`` is neither "step" nor "epoch".
    """

    def __init__(
        self,
        optimizer: OptimizerCallable = RectifiedAdam,
        lr_scheduler: LRSchedulerCallable | None = None,
        lr_scheduler_interval: str = "epoch",
        compile: bool = False,
    ) -> None:
        check_types(RectifiedModule, locals())
        super().__init__()
        check_choice(("step", "epoch"), lr_scheduler_interval=lr_scheduler_interval)
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.lr_scheduler_interval = lr_scheduler_interval
        self._compile = compile
        self._random_state: dict[str, Tensor] | None = None
        self._logged_as: dict[str, Any] = {}  # options of each key
        self.save_hyperparameters()

    def __setattr__(self, name: str, value: Any) -> None:
        # Lightning notes the hook that runs, twice a hook: spared torch's search for parameters and modules.
        if name == "_current_fx_name":
            self.__dict__[name] = value
        else:
            super().__setattr__(name, value)

    # -- hooks to override ---------------------------------------------------------------------------------------------

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The optimizer's parameter groups, each with a ``name`` that log keys use.

        Override to split them, for example to keep weight decay from biases or to give the embedding a group of its
        own::

            def parameter_groups(self):
                return [
                    {"name": "backbone", "params": self.backbone.parameters(), "lr": 1e-4},
                    {"name": "head", "params": self.head.parameters()},
                ]
        """
        return [{"name": "model", "params": [p for p in self.parameters() if p.requires_grad]}]

    def networks(self) -> Iterable[nn.Module]:
        """The submodules that ``compile=True`` compiles: by default each child that has parameters."""
        return [child for child in self.children() if next(child.parameters(), None) is not None]

    def sharded_layers(self) -> Iterable[nn.Module]:
        """The submodules that FSDP2 gathers one at a time in training; all others are whole for a step.

        Override for a large network. Name submodules that training uses by calling them and in no other way (their
        weights are elsewhere while another one runs)::

            def sharded_layers(self):
                return self.network.blocks
        """
        return ()

    def check_strategy(self) -> None:
        """Refuse strategies that were not made to work; override to try one.

        Raises:
            ValueError: for FSDP 1 and DeepSpeed.
        """
        name = type(self.trainer.strategy).__name__
        if any(word in name for word in _NOT_SUPPORTED):
            raise ValueError(
                f"Expected the Trainer's `strategy` for {type(self).__name__} to be 'auto', 'ddp' or "
                f"ModelParallelStrategy (FSDP2, configs/trainer/fsdp.yaml) but got {name}: it keeps weights, gradients "
                "and second moments in flat pieces of its own, which parameter groups, the weighting of batches and "
                "AdaptiveRateMonitor cannot read."
            )

    def check_datamodule(self, *names: str) -> None:
        """Refuse a datamodule that says of its data what this module does not; call it in ``setup``.

        Args:
            names: attributes of this module, such as ``num_classes``. A datamodule that has none of that name, or None,
                is not asked.

        Raises:
            ValueError: naming the argument.
        """
        datamodule = getattr(self.trainer, "datamodule", None)
        for name in names:
            theirs = getattr(datamodule, name, None)
            if theirs is not None and theirs != getattr(self, name):
                raise ValueError(
                    f"Expected argument `{name}` of {type(self).__name__} to be {theirs!r}, the `{name}` of the "
                    f"datamodule {type(datamodule).__name__}, but got {getattr(self, name)!r}."
                )

    # -- Lightning's hooks ---------------------------------------------------------------------------------------------

    def configure_model(self) -> None:
        """Compile the networks in place and, under ``ModelParallelStrategy``, shard the weights; each once.

        Keys of the state dict do not change (``nn.Module.compile`` leaves them alone, as FSDP2 does).
        """
        if self._trainer is not None:  # there is none in load_from_checkpoint
            self.check_strategy()
        if self._compile:
            for network in self.networks():
                network.compile()
            self._compile = False
        if self.device_mesh is not None:
            shard(self, self.sharded_layers(), self.device_mesh)

    def configure_optimizers(self) -> Any:
        """The optimizer over ``parameter_groups()``, with its scheduler if there is one."""
        optimizer = self.optimizer(self.parameter_groups())
        if self.lr_scheduler is None:
            return optimizer
        scheduler = self.lr_scheduler(optimizer)
        config: dict[str, Any] = {"scheduler": scheduler, "interval": self.lr_scheduler_interval}
        if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
            config["monitor"] = getattr(scheduler, "monitor", "val/loss")
        return {"optimizer": optimizer, "lr_scheduler": config}

    def on_before_backward(self, loss: Tensor) -> None:
        """Stop at a loss that is not finite, before it reaches a gradient or a weight."""
        self.check_finite(loss, player="model")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the random state of every rank, and the name of the class; number parameters as the module does."""
        cls = class_of(self)
        checkpoint[CLASS_PATH] = f"{cls.__module__}.{cls.__qualname__}"
        if saved := checkpoint.get("optimizer_states"):
            pairs = zip(self.trainer.optimizers, saved, strict=True)
            checkpoint["optimizer_states"] = [number_as_module(self, optimizer, state) for optimizer, state in pairs]
        if self._random_state is not None:  # loaded, and no step taken since
            checkpoint[_RANDOM_STATE] = self._random_state
            return
        states = self._random_states()
        if self.trainer.world_size > 1:
            states = {name: torch.as_tensor(self.all_gather(state)).cpu() for name, state in states.items()}
        else:
            states = {name: state.unsqueeze(0) for name, state in states.items()}
        checkpoint[_RANDOM_STATE] = states

    @_class_only
    def load_from_checkpoint(cls, checkpoint_path: Any, *args: Any, **kwargs: Any) -> Any:
        """A module of this class from a checkpoint; arguments are Lightning's.

        Raises:
            BrokenCheckpointError: if the file is damaged (torch would not see a changed number), or is no checkpoint.
            UntrustedCheckpointError: if it could run code, unless ``weights_only`` is False.
            ValueError: if it is another class's and does not fit this one.
        """
        theirs = None
        if isinstance(checkpoint_path, (str, os.PathLike)):
            path = os.fspath(checkpoint_path)
            if kwargs.get("weights_only") is not False and os.path.isfile(path):
                theirs = read_safely(path).get(CLASS_PATH)
            else:
                require_whole(path)
        own = f"{cls.__module__}.{cls.__qualname__}"
        try:
            return super().load_from_checkpoint(checkpoint_path, *args, **kwargs)
        except (TypeError, RuntimeError) as error:
            if theirs is None or theirs == own:
                raise
            raise ValueError(
                f"Expected {str(checkpoint_path)!r} to be a checkpoint of {own} but got one of {theirs}: {error}"
            ) from error

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the random states until training goes on."""
        self._random_state = checkpoint.get(_RANDOM_STATE)

    def on_train_start(self) -> None:
        """Go on with this rank's random state and data; a rank that has no state saved draws a stream of its own."""
        owed = self._trainer is not None and mend_resume(self._trainer)
        saved, self._random_state = self._random_state, None
        if self.global_rank > 0:
            # One seed serves all ranks, and all would drop the same features. Rank 0 goes on as one process would.
            torch.manual_seed(derive_seed(torch.initial_seed(), self.global_rank))
        for name, states in (saved or {}).items():
            if self.global_rank >= len(states):
                continue
            # A copy: torch reads the state from where the storage begins, not the view (rank 1 would crash).
            self._set_random_state(name, states[self.global_rank].cpu().clone())
        if owed:
            make_up(self._trainer)

    def _random_states(self) -> dict[str, Tensor]:
        """This rank's random state, by the name of what draws from it."""
        states = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            states["cuda"] = torch.cuda.get_rng_state(self.device)
        return states

    def _set_random_state(self, name: str, state: Tensor) -> None:
        if name == "cpu":
            torch.set_rng_state(state)
        elif self.device.type == name:
            torch.cuda.set_rng_state(state, self.device)

    def log(self, name: str, value: Any, *args: Any, **kwargs: Any) -> None:
        """Lightning's ``log``; a key's later values, with the same options, skip what it did for the first one."""
        options = args, {**kwargs, "batch_size": None}
        if self._logged_as.get(name) == options and log_next(self, name, value, kwargs.get("batch_size")):
            return
        super().log(name, value, *args, **kwargs)
        self._logged_as[name] = options

    def check_finite(self, loss: Tensor, player: str) -> None:
        """Raise unless the loss is finite.

        Args:
            loss: scalar.
            player: whose loss it is, for the message.

        Raises:
            NonFiniteLossError: if the loss is NaN or infinite.
        """
        if not math.isfinite(loss.item()):
            raise NonFiniteLossError(
                f"The loss of player {player!r} is {loss.detach().float().item()} at step {self.trainer.global_step} "
                f"(epoch {self.trainer.current_epoch}); expected a finite number. It reached no weight: "
                "the last checkpoint is good. Look at the batch, lower the learning rate or clip the gradient."
            )

    def save_hyperparameters(
        self,
        *args: Any,
        ignore: Sequence[str] | str | None = None,
        frame: FrameType | None = None,
        logger: bool = True,
    ) -> None:
        """Lightning's ``save_hyperparameters`` without arguments that are not plain, or not the class's own.

        Args:
            *args: names of the arguments to save; all of them if empty.
            ignore: names to leave out besides.
            frame: the frame of the constructor; the caller's by default.
            logger: whether to send them to the logger.
        """
        if frame is None:
            current = inspect.currentframe()
            frame = current.f_back if current is not None else None
        ignored = {ignore} if isinstance(ignore, str) else set(ignore or ())
        chain = _constructor_arguments(self, frame)
        ignored |= {name for values in chain for name, value in values.items() if not _is_plain(value)}
        if chain:
            ignored |= {name for values in chain for name in values} - chain[-1].keys()
        if args and not (kept := [name for name in args if not (isinstance(name, str) and name in ignored)]):
            return
        super().save_hyperparameters(*(kept if args else ()), ignore=sorted(ignored), frame=frame, logger=logger)


def _constructor_arguments(module: LightningModule, frame: FrameType | None) -> list[dict[str, Any]]:
    """Arguments by name of each ``__init__`` in the chain of calls, from ``frame`` outwards to the class's own."""
    chain = []
    while frame is not None and frame.f_code.co_name == "__init__" and frame.f_locals.get("self") is module:
        code = frame.f_code
        names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
        values = {name: frame.f_locals.get(name) for name in names if name != "self"}
        if code.co_flags & inspect.CO_VARKEYWORDS:
            rest = code.co_argcount + code.co_kwonlyargcount + bool(code.co_flags & inspect.CO_VARARGS)
            values.update(frame.f_locals.get(code.co_varnames[rest], {}))
        chain.append(values)
        frame = frame.f_back
    return chain


def _is_plain(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(isinstance(key, str) and _is_plain(item) for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return value is None or type(value) in (bool, int, float, str)
