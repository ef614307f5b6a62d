"""What training attacks with: one of five attacks, with its settings."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_rectify.attacks.gradient import fgsm, pgd
from lightning_rectify.modules.l2l.learned import GradientScale, Perturbed, learned_attack
from lightning_rectify.modules.l2l.losses import trades_attack


@dataclass(frozen=True)
class TrainingAttack:
    """An attack and its settings, without networks; l-infinity.

    Args:
        name: "l2l", "fgsm", "pgd", "trades" or "none".
        epsilon: radius in pixel units.
        bounds: least and largest pixel value.
        random_start: share of epsilon, in [0, 1], of a uniform start.
        gradient: whether a learned attacker sees the gradient.
        steps: applications of a learned attacker.
        scale: of the gradient that it sees.
        bptt: whether its own gradient passes from step to step.
        train_steps: of PGD and TRADES.
        step_size: of FGSM, PGD and TRADES, in pixel units, or None.
    """

    name: str
    epsilon: float
    bounds: tuple[float, float] = (0.0, 1.0)
    random_start: float = 0.0
    gradient: bool = True
    steps: int = 1
    scale: GradientScale = "sample_std"
    bptt: bool = True
    train_steps: int = 10
    step_size: float | None = None

    @property
    def gradients(self) -> int:
        """How many gradients of the images one attack takes."""
        once = {"none": 0, "fgsm": 1, "l2l": self.steps * self.gradient}
        return once.get(self.name, self.train_steps)

    def learned(
        self,
        attacker: nn.Module,
        classifier: nn.Module,
        images: Tensor,
        labels: Tensor,
        generator: torch.Generator,
        attack_bn: Literal["eval", "train"] = "eval",
        start: Tensor | None = None,
    ) -> Perturbed:
        """The learned attack; see :func:`~lightning_rectify.modules.l2l.learned.learned_attack`."""
        return learned_attack(
            attacker,
            classifier,
            images,
            labels,
            self.epsilon,
            gradient=self.gradient,
            steps=self.steps,
            scale=self.scale,
            bptt=self.bptt,
            attack_bn=attack_bn,
            random_start=self.random_start,
            bounds=self.bounds,
            generator=generator,
            start=start,
        )

    def fixed(
        self,
        classifier: nn.Module,
        images: Tensor,
        labels: Tensor,
        generator: torch.Generator,
        start: Tensor | None = None,
    ) -> Tensor:
        """Images attacked by what is not learned, detached; for "none" the images themselves.

        From ``start``, where there is one, "fgsm" and "pgd" set out.
        """
        options: dict[str, Any] = {"step_size": self.step_size, "bounds": self.bounds, "generator": generator}
        if self.name == "none":
            return images
        if self.name == "trades":
            return trades_attack(classifier, images, labels, self.epsilon, steps=self.train_steps, **options)
        options |= {"random_start": self.random_start, "start": start}
        if self.name == "fgsm":
            return fgsm(classifier, images, labels, self.epsilon, **options)
        return pgd(classifier, images, labels, self.epsilon, steps=self.train_steps, **options)
