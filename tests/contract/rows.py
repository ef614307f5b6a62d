"""The modules that sign the contract: one row each. A new module is a new row, not a new test."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from lightning_rectify._lightning import LightningDataModule, LightningModule, seed_everything
from lightning_rectify.data import ImageData
from lightning_rectify.modules import ImageClassifier

CONFIGS = Path(__file__).parents[2] / "configs"


@dataclass(frozen=True)
class Row:
    """One module, and what the suite must know of it.

    Attributes:
        stem: its YAML is configs/STEM.yaml; also the id of its tests.
        module: the class.
        module_args: a small network, without anything that sees the batch as a whole (batch norm) or draws noise.
        noise_args: on top of them, makes training draw random numbers (dropout, latent noise).
        data: the class of its embedded data.
        data_args: a training epoch of exactly six batches of ``batch_size``.
        batch_size: even, so that two ranks can halve it.
        quick_cli: arguments that make the YAML's run as small.
        metric: what it is about, a key of ``validate``.
        higher: whether a high value is good.
        margin: by how much training for ``epochs`` epochs beats the untrained module.
        learn_args: of the data for that run, in place of ``data_args``.
        epochs: of that run.
        players: the names of the parameter groups, with the optimizer's argument and its steps a batch.
        players_loss: the player whose loss first turns NaN with a poisoned batch.
        networks: attributes that hold networks with weights; the first one is exported.
        strategy: Lightning's name of the strategy for two processes.
        subclass: a user's, with an extra argument ``extra``, without and with a second ``save_hyperparameters()``.
        bad_arguments: wrong arguments of the constructor, with words that the message must hold.
    """

    stem: str
    module: type[LightningModule]
    module_args: Mapping[str, Any]
    noise_args: Mapping[str, Any]
    data: type[LightningDataModule]
    data_args: Mapping[str, Any]
    batch_size: int
    quick_cli: Sequence[str]
    metric: str
    higher: bool
    margin: float
    learn_args: Mapping[str, Any]
    epochs: int
    subclasses: Mapping[str, type[LightningModule]]
    bad_arguments: Sequence[tuple[Mapping[str, Any], str]]
    players: Mapping[str, tuple[str, int]] = field(default_factory=lambda: {"model": ("optimizer", 1)})
    players_loss: str = "model"
    networks: Sequence[str] = ("network",)
    strategy: str = "ddp"
    batches: int = 6

    @property
    def config(self) -> Path:
        return CONFIGS / f"{self.stem}.yaml"

    @property
    def automatic(self) -> bool:
        """Whether Lightning optimizes: its clipping and accumulation then apply."""
        return len(self.players) == 1

    def make_module(self, cls: type | None = None, seed: int = 0, noise: bool = False, **overrides: Any) -> Any:
        """The module, always with the same weights for a seed; the global random state goes on from there."""
        seed_everything(seed, verbose=False)
        return (cls or self.module)(**{**self.module_args, **(self.noise_args if noise else {}), **overrides})

    def make_data(self, **overrides: Any) -> Any:
        return self.data(**{"batch_size": self.batch_size, **self.data_args, **overrides})

    def optimizers(self, make: Any) -> dict[str, Any]:
        """The arguments that give every player this optimizer."""
        return {argument: make for argument, _ in self.players.values()}


class UserClassifier(ImageClassifier):
    """A user's subclass with an argument of its own."""

    def __init__(self, extra: float = 1.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.extra = extra


class ResavingClassifier(UserClassifier):
    """One that saves hyperparameters again, with an object among its own arguments."""

    def __init__(self, head: nn.Module | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.save_hyperparameters()


_SMALL = {"width": 4, "norm": "group"}

ROWS = (
    Row(
        stem="classifier",
        module=ImageClassifier,
        module_args={"network_args": _SMALL},
        noise_args={"network_args": {**_SMALL, "dropout": 0.3}},
        data=ImageData,
        data_args={"train_size": 192, "val_size": 100, "eval_batch_size": 100, "augment": True},
        batch_size=32,
        quick_cli=(
            "--model.init_args.network_args={width: 4, norm: group}",
            "--data.init_args.train_size=192",
            "--data.init_args.batch_size=32",
        ),
        metric="val/accuracy",
        higher=True,
        margin=0.6,  # untrained: about 0.1, chance
        learn_args={"train_size": 1024, "val_size": 200, "eval_batch_size": 200},
        epochs=6,
        subclasses={"extra argument": UserClassifier, "saves again": ResavingClassifier},
        bad_arguments=(
            ({"num_classes": 1}, "`num_classes`.*at least 2.*got 1"),
            ({"in_channels": 0}, "`in_channels`.*at least 1.*got 0"),
            ({"image_size": 0}, "`image_size`.*at least 1.*got 0"),
            ({"label_smoothing": 1.0}, r"`label_smoothing`.*\[0, 1\).*got 1.0"),
            ({"network": "nothing"}, "`network`.*one of.*got 'nothing'"),
            ({"network_args": {"depth": 3}}, "`network_args`.*fit network 'small_cnn'.*depth"),
            ({"network": nn.Flatten(), "network_args": {"width": 3}}, "`network_args`.*None.*got {'width': 3}"),
            ({"lr_scheduler_interval": "day"}, "`lr_scheduler_interval`.*'step' or 'epoch'.*got 'day'"),
        ),
    ),
)
