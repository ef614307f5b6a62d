"""What the arguments of ``SPOTAdaptation`` that are left at None are, by method."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import torch
from torch.optim.optimizer import Optimizer

from lightning_rectify.arguments import check_choice, check_fraction, check_least
from lightning_rectify.modules.spot.adaptation_losses import Adversarial
from lightning_rectify.optim.rectified_adam import RectifiedAdam


def released_adam(params: Any) -> Optimizer:
    """The authors' optimizer of domain adaptation: Adam, 2e-4, betas 0.5 and 0.999, weight decay (in L2 form) 5e-4."""
    return torch.optim.Adam(params, lr=2e-4, betas=(0.5, 0.999), weight_decay=5e-4)


@dataclass(frozen=True)
class Settings:
    """The names are those of ``SPOTAdaptation``'s arguments."""

    adversarial: Adversarial
    penalty_weight: float
    latent_size: int
    generator_width: int
    classifier_width: int
    critic_width: int
    ema_decay: float
    augment: float
    decay_steps: int | None
    generator_optimizer: Callable[[Any], Optimizer]
    critic_optimizer: Callable[[Any], Optimizer]
    classifier_optimizer: Callable[[Any], Optimizer]


_PLAYER = partial(RectifiedAdam, lr=1e-3, betas=(0.5, 0.9))
#: "joint" has the constants of the authors' code of arXiv:1905.00158; there is no average there
METHODS: dict[str, Settings] = {
    "two_stage": Settings(
        adversarial="wasserstein", penalty_weight=10.0, latent_size=16, generator_width=16, classifier_width=128,
        critic_width=16, ema_decay=0.99, augment=1.0, decay_steps=None, generator_optimizer=_PLAYER,
        critic_optimizer=_PLAYER, classifier_optimizer=partial(RectifiedAdam, lr=1e-3),
    ),
    "joint": Settings(
        adversarial="logistic", penalty_weight=0.0, latent_size=100, generator_width=1024, classifier_width=500,
        critic_width=0, ema_decay=0.999, augment=0.0, decay_steps=0, generator_optimizer=released_adam,
        critic_optimizer=released_adam, classifier_optimizer=released_adam,
    ),
}  # fmt: skip


def resolve(method: str, given: Mapping[str, Any]) -> Settings:
    """The method's settings with what was given besides.

    Args:
        method: "two_stage" or "joint".
        given: arguments by name; those that are None are left to the method.

    Raises:
        ValueError: for another method, and for arguments outside their range.
    """
    check_choice(METHODS, method=method)
    base = METHODS[method]
    values = {field.name: getattr(base, field.name) for field in fields(base)}
    chosen = Settings(**{**values, **{name: value for name, value in given.items() if value is not None}})
    check_choice(("wasserstein", "logistic"), adversarial=chosen.adversarial)
    check_fraction(ema_decay=chosen.ema_decay)
    check_least(0, penalty_weight=chosen.penalty_weight, augment=chosen.augment, decay_steps=chosen.decay_steps)
    return chosen
