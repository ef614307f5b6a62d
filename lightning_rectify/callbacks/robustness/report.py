"""``robust_report``: what a classifier's robustness really is."""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_rectify.arguments import came, check_choice, check_least, check_types
from lightning_rectify.attacks.ball import Norm
from lightning_rectify.attacks.common import Model, attacking, modules_of
from lightning_rectify.callbacks._untouched import random_state, untouched
from lightning_rectify.callbacks.robustness.checks import Evidence, Limits, masking_checks
from lightning_rectify.callbacks.robustness.evaluation import (
    Attack,
    Evaluation,
    Outcome,
    Progress,
    device_of,
    whole_space,
)
from lightning_rectify.callbacks.robustness.images import labelled_images
from lightning_rectify.callbacks.robustness.plan import Plan
from lightning_rectify.callbacks.robustness.result import AttackRow, RobustReport

#: attacks of a full report, in the order in which they run
ATTACKS = ("fgsm", "pgd", "pgd_margin", "apgd_ce", "apgd_dlr_targeted", "square")
_KNOWN = (*ATTACKS, "apgd_dlr", "autoattack")
_ALWAYS = ("fgsm", "pgd")
_CLASSES = {"apgd_dlr": 3, "apgd_dlr_targeted": 4}  # logits that the loss is made of
_NORMS = ("linf", "l2")


def robust_report(
    model: Any,
    data: Any,
    epsilon: float,
    *,
    norm: Norm = "linf",
    bounds: tuple[float, float] = (0.0, 1.0),
    steps: Sequence[int] = (1, 10, 50),
    restarts: Sequence[int] = (1, 5),
    epsilons: Sequence[float] | None = None,
    attacks: Sequence[str] = ATTACKS,
    apgd_steps: int = 100,
    queries: int = 5000,
    max_images: int | None = 1000,
    batch_size: int = 128,
    part: str = "test",
    own_attack: Callable[[Tensor, Tensor], Tensor] | bool | None = None,
    transfer_from: Any = None,
    limits: Limits | None = None,
    device: str | torch.device | None = None,
    seed: int = 0,
    progress: bool = True,
) -> RobustReport:
    """Attack a classifier in many ways and say what is left, and whether that can be believed.

    The number to believe is the worst case: the share of images that are classified correctly after every attack that
    ran at ``epsilon``, counted image by image. Around it: accuracy under PGD over steps, over restarts and over
    epsilons, under FGSM, random noise, images made on other models and the model's own attack, each with its standard
    error; and the checks of :func:`~lightning_rectify.callbacks.robustness.checks.masking_checks`.

    Images misclassified from the start count as broken and are not attacked. FGSM, noise, transfer, the own attack and
    PGD with each number of steps face all others, so that their accuracies can be compared; every further attack (more
    restarts, margin loss, APGD, Square) faces only what the attacks with the gradient have left so far. FGSM and PGD
    with cross-entropy always run, as the checks need them.

    The model runs in evaluation mode, in float32 and without autocast; modes, buffers and gradients are as they were
    afterwards, and the global random state too. On one process: under DDP call it on one rank.

    Cost for N images that survive, in passes forward and backward with the defaults: 61 N for the curve over steps,
    200 N for the restarts, at most 150 N for other epsilons, 250 N for the margin, 200 N to 1000 N for APGD (targeted:
    one run a target class), and 5000 N forward for Square. Use ``attacks=("fgsm", "pgd", "pgd_margin")`` for a look.

    Args:
        model: a LightningModule, module or callable that maps images (N, C, H, W) in pixel units to logits (N, K); any
            normalization is inside it.
        data: a pair of tensors, images (N, C, H, W) and labels (N,); a loader of such pairs, in a fixed order; or a
            LightningDataModule.
        epsilon: radius of the ball in pixel units, above 0 (8 / 255 for bounds 0 to 1).
        norm: "linf" or "l2".
        bounds: smallest and largest value of a pixel.
        steps: numbers of PGD's steps, each at least 1.
        restarts: numbers of PGD's random starts at the largest number of steps, each at least 1.
        epsilons: radii of the curve, above 0; None for 0.5, 1, 2 and 4 times ``epsilon``.
        attacks: from "fgsm", "pgd", "pgd_margin", "apgd_ce", "apgd_dlr", "apgd_dlr_targeted", "square" and "autoattack"
            (the package of that name, standard version; see :func:`lightning_rectify.attacks.autoattack`).
        apgd_steps: steps of APGD, at least 1.
        queries: of Square for each image, at least 1.
        max_images: the first so many images are used; None for all.
        batch_size: images at a time, at least 1.
        part: of a datamodule: "test" (or "val" if it has no other), or "val". Choose a model by "val".
        own_attack: called with images and labels, returns attacked images; None for ``model.attack`` if there is one,
            False for none.
        transfer_from: another model of the same kind, or a dict of several by name: images made on it by PGD are tried.
        limits: where the checks fail.
        device: where to run; None for where the module's weights are, and for a plain callable the CPU.
        seed: of all draws, at least 0.
        progress: say on standard error what is done.

    Returns:
        The report: ``print(report.table())``, ``report.plot()``, ``report.save(folder)``.

    Raises:
        ValueError: for an argument outside its range, images outside the bounds (normalized ones), labels that do not
            fit the logits.
        ImportError: for "autoattack" without its package.

    Example:
        >>> images = torch.tensor([0.2, 0.45, 0.9]).view(3, 1, 1, 1)
        >>> def model(x):  # class 1 above one half
        ...     return torch.cat([0.5 - x, x - 0.5], dim=1).flatten(1)
        >>> report = robust_report(model, (images, torch.tensor([0, 0, 1])), 0.1, progress=False, queries=10)
        >>> round(report.clean_accuracy, 3), round(report.robust_accuracy, 3)
        (1.0, 0.667)
    """
    check_types(robust_report, locals())
    check_least(0, seed=seed)
    check_least(1, apgd_steps=apgd_steps, queries=queries, batch_size=batch_size)
    begin = time.perf_counter()
    given = {"steps": steps, "restarts": restarts, "epsilons": epsilons or ()}
    _check(epsilon, norm, bounds, given, attacks)
    if not callable(model):
        raise ValueError(f"Expected argument `model` to be callable, images to logits, but got {came(model)}.")
    plan = Plan(
        epsilon, norm, bounds, sorted(set(steps)), sorted(set(restarts)),
        sorted(set(epsilons or [factor * epsilon for factor in (0.5, 1, 2, 4)])), attacks, apgd_steps, queries,
    )  # fmt: skip
    sources = _sources(transfer_from)
    own = _own_attack(model, own_attack)
    modules = [module for each in (model, *sources.values()) for module in modules_of(each)]
    where = _device(device) if device is not None else device_of(modules_of(model))
    with ExitStack() as stack:
        # Loaders draw from the global random state; so may an own attack, or from a generator that the module holds.
        stack.enter_context(random_state(seed, where, [data]))
        images, labels = labelled_images(data, max_images, bounds, part)
        for module in modules:
            stack.enter_context(untouched(module))
        stack.enter_context(attacking(*modules))
        evaluation = Evaluation(model, images, labels, norm, bounds, batch_size, where, seed, Progress(progress))
        found = _Findings(plan, evaluation)
        found.look(sources, own)
    settings = {
        "steps": plan.steps, "restarts": plan.restarts, "attacks": list(attacks), "apgd_steps": apgd_steps,
        "queries": queries, "batch_size": batch_size, "seed": seed,
    }  # fmt: skip
    return found.report(settings, limits, time.perf_counter() - begin)


@dataclass
class _Findings:
    """What the attacks found, as it grows."""

    plan: Plan
    evaluation: Evaluation
    rows: list[AttackRow] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    outside: int = 0
    by_steps: list[Outcome] = field(default_factory=list)
    by_restarts: list[float] = field(default_factory=list)
    by_epsilon: list[float] = field(default_factory=list)
    black_box: dict[str, float] = field(default_factory=dict)
    own: float | None = None
    square_gain: float | None = None

    def look(self, sources: Mapping[str, Model], own: Callable[[Tensor, Tensor], Tensor] | None) -> None:
        """Run everything."""
        ev, plan = self.evaluation, self.plan
        logits = ev.logits()
        self.classes = logits.shape[1]
        self.correct = ((logits.argmax(dim=1) == ev.labels) & torch.isfinite(logits).all(dim=1)).numpy()
        sums = logits.double().sum(dim=1)
        self.probabilities = bool((logits >= 0).all() and (sums - 1).abs().max() < 1e-3)
        self.repeat_difference = ev.repeat_difference()
        self.zero_gradients = ev.zero_gradients(self.correct)
        # Two masks: what a weak attack breaks must not be kept from the strong ones, which are compared with it.
        self.left, self.worst = self.correct.copy(), self.correct.copy()
        self.broken_by = np.where(self.correct, "", "clean").astype(object)
        self._weak(sources, own)
        self.fgsm = self._alone(self._attack("fgsm", plan.fgsm(), self.correct))
        self._curves()
        for name in plan.attacks:
            if name not in _ALWAYS:
                self._further(name)

    def _weak(self, sources: Mapping[str, Model], own: Callable[[Tensor, Tensor], Tensor] | None) -> None:
        """Attacks without the model's gradient, and its own."""
        self.noise = self._alone(self._attack("noise", self.plan.noise(), self.correct, gradient=False))
        for name, source in sources.items():
            outcome = self._attack(f"transfer from {name}", self.plan.transfer(source), self.correct, gradient=False)
            self.black_box[name] = self._alone(outcome)
        if own is not None:
            attack = own  # a name of its own, for the type checker
            outcome = self._attack("own attack", lambda _, x, y, g: attack(x, y), self.correct, gradient=False)
            if outcome.changed:  # an attack that leaves every image as it is, is none
                self.own = self._alone(outcome)

    def _curves(self) -> None:
        """PGD over steps, restarts and epsilons."""
        plan, last = self.plan, max(self.plan.steps)
        for steps in plan.steps:
            self.by_steps.append(self._attack(f"pgd-{steps}", plan.pgd(steps), self.correct))
        alive, before = self.correct & ~self.by_steps[-1].broken, 1
        for restarts in plan.restarts:
            if restarts > before:
                attack = plan.pgd(last, restarts=restarts - before)
                alive &= ~self._attack(f"pgd-{last} x {restarts}", attack, alive).broken
                before = restarts
            self.by_restarts.append(float(alive.mean()))
        # An image that falls at a smaller epsilon falls at a larger one: the same perturbation is there.
        alive = self.correct.copy()
        for epsilon in plan.epsilons:
            if epsilon == plan.epsilon:
                alive &= ~self.by_steps[-1].broken
            else:
                alive &= ~self._at(f"pgd-{last}, epsilon {epsilon:.4g}", epsilon, alive)
            self.by_epsilon.append(float(alive.mean()))
        radius = whole_space(plan.norm, plan.bounds, self.evaluation.images)
        self.unbounded = float((alive & ~self._at(f"pgd-{last}, unbounded", radius, alive)).mean())

    def _at(self, name: str, epsilon: float, alive: np.ndarray) -> np.ndarray:
        outcome = self.evaluation.run(name, self.plan.pgd(max(self.plan.steps), epsilon), alive, epsilon)
        self.outside += outcome.outside
        return outcome.broken

    def _further(self, name: str) -> None:
        """An attack on what is left."""
        plan, last, restarts = self.plan, max(self.plan.steps), max(self.plan.restarts)
        if self.classes < _CLASSES.get(name, 2):
            self.skipped[name] = f"needs at least {_CLASSES[name]} classes, and there are {self.classes}"
        elif name == "pgd_margin":
            attack = plan.pgd(last, restarts=restarts, loss="margin")
            self._attack(f"pgd-{last} x {restarts}, margin", attack, self.left)
        elif name == "square":
            outcome = self._attack("square", plan.square(), self.left, gradient=False)
            self.square_gain = float(outcome.broken.mean())
        elif name == "autoattack":
            self._attack(name, plan.autoattack(self.evaluation.batch_size, self.evaluation.seed), self.left)
        else:
            self._attack(name, plan.apgd(name), self.left)

    def _attack(self, name: str, attack: Attack, chosen: np.ndarray, gradient: bool = True) -> Outcome:
        chosen = chosen.copy()
        outcome = self.evaluation.run(name, attack, chosen, self.plan.epsilon)
        self.outside += outcome.outside
        first = outcome.broken & self.worst
        self.broken_by[first] = name
        self.worst &= ~outcome.broken
        if gradient:
            self.left &= ~outcome.broken
        alone = self._alone(outcome) if (chosen == self.correct).all() else None
        self.rows.append(
            AttackRow(
                name, int(chosen.sum()), int(outcome.broken.sum()), float(self.worst.mean()), alone, outcome.seconds
            )
        )
        return outcome

    def _alone(self, outcome: Outcome) -> float:
        return float((self.correct & ~outcome.broken).mean())

    def report(self, settings: dict[str, Any], limits: Limits | None, seconds: float) -> RobustReport:
        """All of it, with the checks."""
        plan, clean = self.plan, float(self.correct.mean())
        losses = [float(np.nanmean(o.loss)) if o.faced.any() else 0.0 for o in self.by_steps]
        accuracies = [self._alone(outcome) for outcome in self.by_steps]
        evidence = Evidence(
            images=len(self.correct), clean=clean, fgsm=self.fgsm, steps=plan.steps, steps_accuracy=accuracies,
            steps_loss=losses, restarts=plan.restarts, restarts_accuracy=self.by_restarts,
            white_box=float(self.left.mean()), noise=self.noise, unbounded=self.unbounded,
            zero_gradients=self.zero_gradients, repeat_difference=self.repeat_difference,
            looks_like_probabilities=self.probabilities, outside=self.outside, transfer=self.black_box,
            square_gain=self.square_gain, own_attack=self.own,
        )  # fmt: skip
        return RobustReport(
            epsilon=plan.epsilon, norm=plan.norm, bounds=plan.bounds, classes=self.classes,
            labels=self.evaluation.labels.numpy(), correct=self.correct, robust=self.worst,
            broken_by=[str(name) for name in self.broken_by], attacks=self.rows,
            steps=np.array(plan.steps), steps_accuracy=np.array(accuracies), steps_loss=np.array(losses),
            restarts=np.array(plan.restarts), restarts_accuracy=np.array(self.by_restarts),
            epsilons=np.array(plan.epsilons), epsilons_accuracy=np.array(self.by_epsilon),
            unbounded_accuracy=self.unbounded, own_attack_accuracy=self.own,
            checks=masking_checks(evidence, limits), skipped=self.skipped, settings=settings, seconds=seconds,
        )  # fmt: skip


# -- arguments ---------------------------------------------------------------------------------------------------------


def _own_attack(model: Any, given: Callable[[Tensor, Tensor], Tensor] | bool | None) -> Any:
    if given is False:
        return None
    if callable(given):
        return given
    attack = getattr(model, "attack", None)
    if given is True and not callable(attack):
        raise ValueError(
            "Expected argument `own_attack` to be a callable, or True for a model with a method `attack(images, "
            f"labels)`, but got True and {type(model).__name__} has none."
        )
    return attack if callable(attack) else None


def _device(given: str | torch.device) -> torch.device:
    try:
        return torch.device(given)
    except RuntimeError as error:
        raise ValueError(f"Expected argument `device` to be a device of torch but got {given!r}.") from error


def _sources(transfer_from: Any) -> dict[str, Any]:
    if transfer_from is None:
        return {}
    sources = dict(transfer_from) if isinstance(transfer_from, Mapping) else {"another model": transfer_from}
    for name, source in sources.items():
        if not callable(source):
            raise ValueError(
                f"Expected argument `transfer_from` to be a model, or a dict of models, but got {source!r} ({name})."
            )
    return sources


def _check(
    epsilon: float,
    norm: str,
    bounds: tuple[float, float],
    lists: Mapping[str, Sequence[float]],
    attacks: Sequence[str],
) -> None:
    if not 0 < epsilon < float("inf"):
        raise ValueError(f"Expected argument `epsilon` to be above 0 (in pixel units) but got {epsilon!r}.")
    check_choice(_NORMS, norm=norm)
    if len(bounds) != 2 or not bounds[0] < bounds[1]:
        raise ValueError(f"Expected argument `bounds` to be a smallest and a larger pixel value but got {bounds!r}.")
    if norm == "linf" and epsilon > bounds[1] - bounds[0]:
        raise ValueError(
            f"Expected argument `epsilon` to be at most {bounds[1] - bounds[0]:g}, the width of `bounds`, but got "
            f"{epsilon!r}; it is in pixel units (8 / 255 for bounds 0 to 1)."
        )
    for name, values in lists.items():
        least = 0 if name == "epsilons" else 1
        if (not values and name != "epsilons") or not all(0 < v < float("inf") and v >= least for v in values):
            wanted = "numbers above 0" if name == "epsilons" else "at least one number, each at least 1"
            raise ValueError(f"Expected argument `{name}` to hold {wanted} but got {tuple(values)!r}.")
    for attack in attacks:
        if attack == "autoattack" and find_spec("autoattack") is None:  # now, and not after the other attacks
            raise ImportError("Attack 'autoattack' needs its package: pip install 'lightning-rectify[attacks]'.")
        if attack not in _KNOWN:
            raise ValueError(f"Expected argument `attacks` to hold names of {', '.join(_KNOWN)} but got {attack!r}.")
