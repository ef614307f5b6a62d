"""The attackers that ``l2l_search.py`` tries: what ``L2LDefense`` offers, and what it would have to learn.

New here, beside step counts, architectures, random starts and gains, are a memory (an image's attack starts where that
of the last epoch ended, as in ATTA, arXiv:1912.11969, or the attacker sees that perturbation as one more input), step
lengths for hand-made signs, plans that change steps over the epochs, and two attackers that cost next to nothing: one
3x3 convolution, and a network of one pixel.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from l2l import Study, classifier, warm_up_and_cosine
from torch import Tensor, nn

from lightning_rectify.attacks.ball import Ball
from lightning_rectify.attacks.common import attacking, input_gradient
from lightning_rectify.modules.l2l import L2LDefense
from lightning_rectify.modules.l2l.attackers import StridedAttacker
from lightning_rectify.modules.l2l.learned import Perturbed, scale_gradient

PGD, TWO_STEP = "PGD-10", "2-step L2L"
#: lengths of sign steps in epsilons, or the number of a learned attacker's steps
Steps = tuple[float, ...] | int


@dataclass(frozen=True)
class Candidate:
    """How training attacks.

    Args:
        plan: steps from a share of the epochs on: ``((0.0, steps), (0.5, other steps))``.
        memory: "start" from the last epoch's perturbation of an image, or give it to the attacker as "input"; or "".
        attacker: "strided", "two_layer", "linear" or "pixel"; None for signs.
        options: further arguments of ``L2LDefense``.
        attacker_args: of the attacker.
        attacker_lr: of the attacker's Adam.
    """

    plan: tuple[tuple[float, Steps], ...]
    memory: str = ""
    attacker: str | None = None
    options: Mapping[str, Any] | None = None
    attacker_args: Mapping[str, Any] | None = None
    attacker_lr: float = 3e-3

    def steps(self, share: float) -> Steps:
        """The steps at a share of the epochs in [0, 1]."""
        return next(steps for begin, steps in reversed(self.plan) if share >= begin)


def signs(*lengths: float, start: float = 0.0, memory: str = "") -> Candidate:
    """Sign steps of these lengths."""
    return Candidate(((0.0, lengths),), memory, options={"random_start": start})


def signs_in_turn(*plan: tuple[float, Steps], start: float = 0.0) -> Candidate:
    """Sign steps by a plan."""
    return Candidate(plan, options={"random_start": start})


def learned(
    steps: int | tuple[tuple[float, Steps], ...],
    width: int | None = 16,
    attacker: str = "strided",
    memory: str = "",
    lr: float = 3e-3,
    gain: float = 2.0,
    norm: str | None = None,
    **options: Any,
) -> Candidate:
    """A learned attacker."""
    plan = ((0.0, steps),) if isinstance(steps, int) else steps
    arguments: dict[str, Any] = {
        "gain": gain,
        **({"width": width} if width else {}),
        **({"norm": norm} if norm else {}),
    }
    return Candidate(plan, memory, attacker, options, arguments, lr)


def pgd_steps(steps: int) -> tuple[float, ...]:
    """PGD's lengths: 2.5 epsilon in all."""
    return (2.5 / steps,) * steps


LINEAR, PIXEL = {"attacker": "linear", "width": None}, {"attacker": "pixel", "width": 8}
CANDIDATES: dict[str, Candidate] = {
    PGD: signs(*pgd_steps(10), start=1.0),
    TWO_STEP: learned(2),
    # hand-made: fewer steps, lengths, memory, plans
    "sign 1": signs(1.0),
    "sign 1, 1": signs(1.0, 1.0),
    "sign 1, .5": signs(1.0, 0.5),
    "sign 1, .5, .25": signs(1.0, 0.5, 0.25),
    "sign 1, .5, .25, .125": signs(1.0, 0.5, 0.25, 0.125),
    "PGD-2": signs(*pgd_steps(2), start=1.0),
    "PGD-3": signs(*pgd_steps(3), start=1.0),
    "PGD-4": signs(*pgd_steps(4), start=1.0),
    "sign .5, memory": signs(0.5, memory="start"),
    "sign 1, memory": signs(1.0, memory="start"),
    "sign .5, .25, memory": signs(0.5, 0.25, memory="start"),
    "sign .5, .25, .125, memory": signs(0.5, 0.25, 0.125, memory="start"),
    "sign 1, then PGD-6": signs_in_turn((0.0, (1.0,)), (0.5, pgd_steps(6))),
    "sign 1, then PGD-8": signs_in_turn((0.0, (1.0,)), (0.6, pgd_steps(8))),
    "PGD-2, then PGD-6": signs_in_turn((0.0, pgd_steps(2)), (0.5, pgd_steps(6)), start=1.0),
    # learned: steps, architecture, random start, recipe
    "1-step L2L": learned(1),
    "2-step, width 8": learned(2, width=8),
    "2-step, width 4": learned(2, width=4),
    "3-step, width 4": learned(3, width=4),
    "2-step, group normalization": learned(2, norm="group"),
    "2-step, no normalization": learned(2, norm="none"),
    "2-step, gain 4": learned(2, gain=4.0),
    "2-step, attacker's lr 1e-3": learned(2, lr=1e-3),
    "2-step, attacker's lr 1e-2": learned(2, lr=1e-2),
    "2-step, start .5": learned(2, random_start=0.5),
    "2-step, start 1": learned(2, random_start=1.0),
    "2-step, no gradient between steps": learned(2, bptt=False),
    "2-step, full resolution, width 4": learned(2, width=4, attacker="two_layer", skip=True),
    "linear, 2-step": learned(2, **LINEAR),
    "linear, 3-step": learned(3, **LINEAR),
    "linear, 4-step": learned(4, **LINEAR),
    "pixel, 2-step": learned(2, **PIXEL),
    "pixel, 3-step": learned(3, **PIXEL),
    # learned: memory, plans
    "1-step, width 8, memory": learned(1, width=8, memory="start"),
    "2-step, width 8, memory": learned(2, width=8, memory="start"),
    "2-step, width 8, memory as input": learned(2, width=8, memory="input"),
    "linear, 3-step, memory": learned(3, memory="start", **LINEAR),
    "1-step, then 3-step, width 8": learned(((0.0, 1), (0.5, 3)), width=8),
    "linear, 1-step, then 6-step": learned(((0.0, 1), (0.5, 6)), **LINEAR),
}


class Linear(nn.Module):
    """One 3x3 convolution of image and gradient; it starts as a soft FGSM."""

    def __init__(self, inputs: int, channels: int, gain: float) -> None:
        super().__init__()
        self.head, self.gain = nn.Conv2d(inputs, channels, kernel_size=3, padding=1), gain
        soft_sign(self.head, channels)

    def forward(self, inputs: Tensor) -> Tensor:
        """Directions (N, C, H, W) of (N, inputs, H, W)."""
        return self.gain * self.head(inputs)


class Pixel(nn.Module):
    """A network of each pixel alone, as a learned optimizer of one coordinate; it starts as a soft FGSM."""

    def __init__(self, inputs: int, channels: int, gain: float, width: int) -> None:
        super().__init__()
        self.hidden, self.head = nn.Conv2d(inputs, width, kernel_size=1), nn.Conv2d(width, channels, kernel_size=1)
        self.gain, self.channels = gain, channels
        nn.init.zeros_(self.head.weight)

    def forward(self, inputs: Tensor) -> Tensor:
        """Directions (N, C, H, W) of (N, inputs, H, W)."""
        return self.gain * (inputs[:, -self.channels :] + self.head(torch.relu(self.hidden(inputs))))


@torch.no_grad()
def soft_sign(head: nn.Conv2d, channels: int) -> None:
    """The warm start of ``build_attacker``: the last channels, the gradient, pass; all else is a tenth."""
    head.weight.mul_(0.1)
    assert head.bias is not None
    head.bias.mul_(0.1)
    for channel in range(channels):
        head.weight[channel, head.in_channels - channels + channel, 1, 1] = 1.0


class SearchDefense(L2LDefense):
    """``L2LDefense`` with a memory, step lengths and a plan; a batch is images, labels and the images' numbers.

    Args:
        candidate: how it attacks.
        remembered: number of training images, for a memory.
        **kwargs: of ``L2LDefense``.
    """

    def __init__(self, candidate: Candidate, remembered: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.candidate, self.now = candidate, candidate.steps(0.0)
        side = self.example_input_array.shape[-1]  # type: ignore[union-attr]
        count = remembered if candidate.memory else 0
        self.past = torch.zeros(count, self.in_channels, side, side)

    def on_train_epoch_start(self) -> None:
        """Take the epoch's steps from the plan."""
        assert self.trainer.max_epochs is not None
        self.now = self.candidate.steps(self.current_epoch / self.trainer.max_epochs)
        if isinstance(self.now, int):
            self.training_attack = replace(self.training_attack, steps=self.now)

    def classifier_loss(self, batch: Any) -> Tensor:
        """On images moved by signs of the gradient."""
        images, labels, _ = self._checked(batch)
        assert isinstance(self.now, tuple)
        ball = Ball.around(images, self.epsilon, "linf", self.bounds)
        points = self._begin(ball, batch)
        with attacking(self.classifier):
            for length in self.now:
                gradient, _, _ = input_gradient(self.classifier, points, labels)
                points = ball.project(ball.ascend(points, gradient, length * self.epsilon))
        self._remember(points, batch)
        return self._defend(images, points.detach(), labels)

    def _learn(self, batch: Any, again: bool = False) -> Perturbed:
        if not self.candidate.memory:
            return super()._learn(batch, again)
        images, labels, numbers = batch
        ball = Ball.around(images, self.epsilon, "linf", self.bounds)
        points, first, seen = self._begin(ball, batch), None, self.past[numbers] / self.epsilon
        assert isinstance(self.now, int)
        for _ in range(self.now):
            with attacking(self.classifier):
                raw, _, _ = input_gradient(self.classifier, points.detach(), labels)
            first = raw if first is None else first
            parts = [points, *([seen] if self.candidate.memory == "input" else []), scale_gradient(raw)]
            points = ball.project(points + self.epsilon * self.attacker(torch.cat(parts, dim=1)).tanh())
        self._remember(points.detach(), batch)
        return Perturbed(points, first)

    def _begin(self, ball: Ball, batch: Any) -> Tensor:
        if self.candidate.memory == "start":
            return ball.project(ball.images + self.past[batch[2]])
        return ball.start(self.training_attack.random_start, self.noise_generator)

    def _remember(self, points: Tensor, batch: Any) -> None:
        if self.candidate.memory:
            self.past[batch[2]] = points - batch[0]


def make_attacker(candidate: Candidate, channels: int) -> str | nn.Module:
    """The attacker, or the name of one of the package's."""
    arguments = dict(candidate.attacker_args or {})
    inputs = channels * (3 if candidate.memory == "input" else 2)
    if candidate.attacker in ("linear", "pixel"):
        return {"linear": Linear, "pixel": Pixel}[candidate.attacker](inputs, channels, **arguments)
    if candidate.memory == "input":
        network = StridedAttacker(inputs, channels, **arguments)
        soft_sign(network.head, channels)
        return network
    return str(candidate.attacker)


def build(name: str, study: Study, epsilon: float, images: int, image_size: int, steps: int) -> SearchDefense:
    """The module of a candidate, with the study's network, optimizer and schedule; ``steps`` is an epoch's."""
    candidate = CANDIDATES[name]
    options: dict[str, Any] = {"attack": "pgd", **(candidate.options or {})}
    if candidate.attacker is not None:
        attacker = make_attacker(candidate, 1)
        options |= {"attack": "l2l", "attacker": attacker, "steps": candidate.steps(0.0)}
        if isinstance(attacker, str):
            extra = {"skip": True} if options.pop("skip", False) else {}
            options["attacker_args"] = {**(candidate.attacker_args or {}), **extra}
    sgd = partial(torch.optim.SGD, lr=study.lr, momentum=study.momentum, weight_decay=study.weight_decay)
    module = SearchDefense(
        candidate, images, classifier=classifier(image_size), image_size=image_size, epsilon=epsilon,
        classifier_optimizer=sgd, attacker_optimizer=partial(torch.optim.Adam, lr=candidate.attacker_lr),
        lr_scheduler_interval="step", **options,
    )  # fmt: skip
    schedule = partial(warm_up_and_cosine, steps=steps * study.epochs, warmup=steps)
    module.classifier_lr_scheduler = schedule  # type: ignore[assignment]
    return module
