"""Settings that belong together, and the rate's schedule."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.optimizer import Optimizer

from lightning_rectify.arguments import check_choice, check_fraction, check_least


def rmsprop(params: Any, lr: float) -> Optimizer:
    """Torch's RMSprop with this rate, all tensors of a kind in one go (the same numbers, and faster on a CPU too)."""
    return torch.optim.RMSprop(params, lr=lr, foreach=True)


@dataclass(frozen=True)
class Preset:
    """What the arguments of ``SPOT`` that are left at None are; the names are theirs, but ``optimizer``."""

    cost: str
    reduction: str
    eta: float | str
    generator: str
    share: str
    norm: str
    latent_size: int | None
    critic: str
    critic_norm: str
    constraint: str
    critic_steps: int
    burst: int
    ema_decay: float
    decay: bool
    standardize: bool
    optimizer: Callable[[Any], Optimizer]


#: "spot" was found on the problem "bures2"; "spot_released" has the constants of the authors' code of arXiv:1905.00158
PRESETS: dict[str, Preset] = {
    "spot": Preset(
        cost="squared", reduction="mean", eta="auto", generator="mlp", share="trunk", norm="none", latent_size=None,
        critic="mlp", critic_norm="none", constraint="spectral", critic_steps=5, burst=0, ema_decay=0.995, decay=True,
        standardize=True, optimizer=partial(rmsprop, lr=5e-4),
    ),
    "spot_released": Preset(
        cost="euclidean", reduction="released", eta=2000.0, generator="dcgan", share="none", norm="batch",
        latent_size=100, critic="conv", critic_norm="batch", constraint="clip", critic_steps=5, burst=10, ema_decay=0.0,
        decay=False, standardize=False, optimizer=partial(rmsprop, lr=5e-5),
    ),
}  # fmt: skip


def resolve(preset: str, given: Mapping[str, Any]) -> Preset:
    """The preset with what was given besides.

    Args:
        preset: "spot" or "spot_released".
        given: arguments by name; those that are None are left to the preset.

    Raises:
        ValueError: if there is no such preset.
    """
    check_choice(PRESETS, preset=preset)
    base = PRESETS[preset]
    settings = {field.name: getattr(base, field.name) for field in fields(base)}
    return Preset(**{**settings, **{name: value for name, value in given.items() if value is not None}})


class HoldThenDecay(LRScheduler):
    r"""The whole rate for a part of training, then a straight line down to a small part of it.

    .. math::
        \eta_t = \eta \;\; (t \le hT), \qquad
        \eta_t = \eta \left(1 - (1 - f) \frac{t - hT}{T - hT}\right) \;\; (hT < t \le T), \qquad
        \eta_t = \eta f \;\; (t > T)

    with t the updates made before. A closed form of t: it goes on from a state dict bit for bit.

    Args:
        optimizer: any.
        total_steps: T, at least 1.
        hold: part h of training with the whole rate, in [0, 1).
        final: part f of the rate at the end, in [0, 1].

    Raises:
        ValueError: for an argument outside its range.
    """

    def __init__(self, optimizer: Optimizer, total_steps: int, hold: float = 0.5, final: float = 0.02) -> None:
        check_least(1, total_steps=total_steps)
        check_fraction(hold=hold)
        if not 0 <= final <= 1:
            raise ValueError(f"Expected argument `final` to be in [0, 1] but got {final!r}.")
        self.total_steps, self.hold, self.final = total_steps, hold, final
        super().__init__(optimizer)

    def get_lr(self) -> list[float | Tensor]:
        """The rate of each parameter group for the update that comes next."""
        start = self.hold * self.total_steps
        way = min(max((self.last_epoch - start) / (self.total_steps - start), 0.0), 1.0)
        return [base * (1.0 - (1.0 - self.final) * way) for base in self.base_lrs]
