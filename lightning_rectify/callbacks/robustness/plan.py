"""The attacks of a report, with their settings."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_rectify.attacks.apgd import apgd
from lightning_rectify.attacks.autoattack import autoattack
from lightning_rectify.attacks.ball import Norm
from lightning_rectify.attacks.common import Model
from lightning_rectify.attacks.gradient import fgsm, pgd
from lightning_rectify.attacks.losses import Loss
from lightning_rectify.attacks.square import square
from lightning_rectify.callbacks.robustness.evaluation import Attack, noise_attack


@dataclass(frozen=True)
class Plan:
    """What is to be run, and the attacks with their settings.

    Attributes:
        epsilon: radius of the ball, in pixel units.
        norm: "linf" or "l2".
        bounds: smallest and largest pixel.
        steps: numbers of PGD's steps, rising.
        restarts: numbers of PGD's starts, rising.
        epsilons: radii of the curve, rising.
        attacks: names, as :func:`~lightning_rectify.callbacks.robustness.report.robust_report` takes them.
        apgd_steps: steps of APGD.
        queries: of Square for each image.
    """

    epsilon: float
    norm: Norm
    bounds: tuple[float, float]
    steps: list[int]
    restarts: list[int]
    epsilons: list[float]
    attacks: Sequence[str]
    apgd_steps: int
    queries: int

    def pgd(self, steps: int, epsilon: float | None = None, restarts: int = 1, loss: Loss = "ce") -> Attack:
        """PGD; ``epsilon`` None for the plan's."""
        radius = self.epsilon if epsilon is None else epsilon

        def attack(model: Model, images: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
            return pgd(model, images, labels, radius, steps=steps, restarts=restarts, loss=loss, norm=self.norm,
                       bounds=self.bounds, generator=generator)  # fmt: skip

        return attack

    def fgsm(self) -> Attack:
        """FGSM from the image itself."""

        def attack(model: Model, images: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
            return fgsm(model, images, labels, self.epsilon, norm=self.norm, bounds=self.bounds)

        return attack

    def apgd(self, name: str) -> Attack:
        """APGD with the loss that the name says."""
        loss: Any = name.removeprefix("apgd_")

        def attack(model: Model, images: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
            return apgd(model, images, labels, self.epsilon, steps=self.apgd_steps, loss=loss, norm=self.norm,
                        bounds=self.bounds, generator=generator)  # fmt: skip

        return attack

    def square(self) -> Attack:
        """Square."""

        def attack(model: Model, images: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
            return square(model, images, labels, self.epsilon, queries=self.queries, norm=self.norm,
                          bounds=self.bounds, generator=generator)  # fmt: skip

        return attack

    def autoattack(self, batch_size: int, seed: int) -> Attack:
        """The package's standard version."""

        def attack(model: Model, images: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
            return autoattack(model, images, labels, self.epsilon, norm=self.norm, bounds=self.bounds,
                              batch_size=batch_size, seed=seed)  # fmt: skip

        return attack

    def noise(self) -> Attack:
        """Random noise of size epsilon."""
        return noise_attack(self.epsilon, self.norm, self.bounds)

    def transfer(self, source: Model) -> Attack:
        """PGD with the largest number of steps on another model."""
        on_source = self.pgd(max(self.steps))
        return lambda model, images, labels, generator: on_source(source, images, labels, generator)
