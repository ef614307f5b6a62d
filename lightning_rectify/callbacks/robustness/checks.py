"""Whether a robust accuracy can be believed: signs of masked gradients and of a collapsed attack.

Most broken defences of the literature had gradients that an attack could not follow, and looked robust for that reason
alone. Athalye, Carlini and Wagner (arXiv:1802.00420, section 3.1) list the signs; AutoAttack (Croce and Hein,
arXiv:2003.01690) warns of some more. Each is a number here, with a limit.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise


@dataclass(frozen=True)
class Limits:
    r"""Where a check fails; shares of the images unless said otherwise.

    Of those marked (N) a few images decide, so that two standard errors are allowed beside them:
    :math:`l + 2 \sqrt{l (1 - l) / N}` for a limit :math:`l` and N images, and one image in any case.

    Attributes:
        steps_gain: accuracy that the largest number of PGD's steps may take beyond the second largest (N).
        restarts_gain: accuracy that the largest number of restarts may take beyond the smallest (N).
        unbounded_accuracy: accuracy that may be left where every image may become any other.
        slack: images by which a weaker attack may beat a stronger one: AutoAttack's 0.2 points (N).
        zero_gradients: correctly classified images whose gradient may be zero or not finite.
        repeat_difference: how far the logits of one image may differ between two passes in batches of other sizes, of
            the largest logit. Rounding of float32 alone makes about 1e-6.
        loss_fall: how far the mean loss may fall as steps are added, of itself: the last step need not be the best.
        own_attack_gap: accuracy under the model's own attack minus accuracy under PGD.
    """

    steps_gain: float = 0.02
    restarts_gain: float = 0.02
    unbounded_accuracy: float = 0.01
    slack: float = 0.002
    zero_gradients: float = 0.01
    repeat_difference: float = 1e-3
    loss_fall: float = 0.01
    own_attack_gap: float = 0.10

    def of_images(self, limit: float, images: int) -> float:
        """A limit marked (N) with its two standard errors.

        Args:
            limit: a share.
            images: number of images N, at least 1.

        Example:
            >>> [round(Limits().of_images(0.02, count), 4) for count in (100, 1000, 10_000)]
            [0.048, 0.0289, 0.0228]
        """
        return max(limit + 2 * math.sqrt(limit * (1 - limit) / images), 1 / images)


@dataclass(frozen=True)
class Evidence:
    """What the checks look at; accuracies are shares of all images, those misclassified from the start included.

    Attributes:
        images: number of images N.
        clean: accuracy on the images themselves.
        fgsm: accuracy under FGSM.
        steps: numbers of PGD's steps, rising.
        steps_accuracy: accuracy under PGD with so many, one start each.
        steps_loss: mean cross-entropy under it of the images that are classified correctly without it.
        restarts: numbers of PGD's starts, rising.
        restarts_accuracy: accuracy with so many, at the largest number of steps.
        white_box: worst case over all attacks that use the gradient.
        noise: accuracy under random noise of size epsilon.
        unbounded: accuracy under PGD whose ball holds every image.
        zero_gradients: share of the correctly classified images whose gradient is zero or not finite.
        repeat_difference: largest difference of logits between two passes over the same images, of the largest logit.
        looks_like_probabilities: whether all outputs are at least 0 and sum to 1.
        outside: number of images that an attack left outside the ball or the bounds; they were not counted.
        transfer: accuracy under images made on other models, by the model's name.
        square_gain: share of the images that Square broke and no attack with the gradient did; None if it did not run.
        own_attack: accuracy under the model's own attack; None if it has none.
    """

    images: int
    clean: float
    fgsm: float
    steps: Sequence[int]
    steps_accuracy: Sequence[float]
    steps_loss: Sequence[float]
    restarts: Sequence[int]
    restarts_accuracy: Sequence[float]
    white_box: float
    noise: float
    unbounded: float
    zero_gradients: float
    repeat_difference: float
    looks_like_probabilities: bool
    outside: int = 0
    transfer: Mapping[str, float] = field(default_factory=dict)
    square_gain: float | None = None
    own_attack: float | None = None

    @property
    def pgd_steps(self) -> int:
        """The number of steps nearest to 10, with which the model's own attack is compared."""
        return min(self.steps, key=lambda steps: (abs(steps - 10), steps))

    @property
    def pgd(self) -> float:
        """Accuracy under PGD with that number of steps."""
        return self.steps_accuracy[list(self.steps).index(self.pgd_steps)]


@dataclass(frozen=True)
class Check:
    """One sign of masking.

    Attributes:
        name: short, as the JSON file has it.
        passed: whether the number keeps the limit; None if the check could not be made.
        value: the number; None if there is none.
        limit: the largest value that passes, for so many images.
        meaning: what was compared, with the numbers, and what a failure says.
    """

    name: str
    passed: bool | None
    value: float | None
    limit: float
    meaning: str


def masking_checks(evidence: Evidence, limits: Limits | None = None) -> list[Check]:
    """All checks, in the order in which a reader should look at them.

    Args:
        evidence: what was measured.
        limits: where they fail; None for the defaults.

    Returns:
        One check a sign: "deterministic", "logits", "inside", "zero_gradient", "loss_rises", "more_steps", "restarts",
        "fgsm_weaker", "noise_weaker", "transfer_weaker" (also "transfer_weaker:NAME"), "square_weaker", "unbounded"
        and "collapse".

    Example:
        >>> evidence = Evidence(
        ...     images=100, clean=0.9, fgsm=0.8, steps=(10, 50), steps_accuracy=(0.70, 0.64), steps_loss=(0.9, 1.0),
        ...     restarts=(1,), restarts_accuracy=(0.64,), white_box=0.64, noise=0.9, unbounded=0.0,
        ...     zero_gradients=0.0, repeat_difference=0.0, looks_like_probabilities=False, own_attack=0.85,
        ... )
        >>> [check.name for check in masking_checks(evidence) if check.passed is False]
        ['more_steps', 'collapse']
    """
    limits = limits or Limits()
    return [
        *_of_the_output(evidence, limits),
        *_of_the_gradient(evidence, limits),
        *_of_weaker_attacks(evidence, limits),
        _collapse(evidence, limits),
    ]


def _check(name: str, value: float | None, limit: float, meaning: str) -> Check:
    if value is not None and not math.isfinite(value):
        return Check(name, False, None, limit, meaning)
    # A difference of two shares is rounded in its last digit.
    return Check(name, None if value is None else value <= limit + 1e-9, value, limit, meaning)


def _of_the_output(e: Evidence, limits: Limits) -> list[Check]:
    return [
        _check(
            "deterministic",
            e.repeat_difference,
            limits.repeat_difference,
            "the same images give the same logits, in batches of other sizes too (largest difference, of the largest "
            "logit); else average over the randomness, or evaluate in eval mode",
        ),
        _check(
            "logits",
            float(e.looks_like_probabilities),
            0.0,
            "outputs are logits; probabilities (at least 0, sum 1) saturate and hide the gradient: leave the softmax "
            "out",
        ),
        _check(
            "inside", float(e.outside), 0.0, "number of attacked images outside the ball or the bounds (not counted)"
        ),
    ]


def _of_the_gradient(e: Evidence, limits: Limits) -> list[Check]:
    falls = [(before - after) / max(abs(before), 1e-12) for before, after in pairwise(e.steps_loss)]
    losses = ", ".join(f"{loss:.4g}" for loss in e.steps_loss)
    return [
        _check(
            "zero_gradient",
            e.zero_gradients,
            limits.zero_gradients,
            "correctly classified images whose gradient is zero or not finite: attacks that follow it stand still",
        ),
        _check(
            "loss_rises",
            max(falls) if falls else None,
            limits.loss_fall,
            f"the mean loss rises with PGD's steps ({_numbers(e.steps)}: {losses}); largest fall, of itself",
        ),
        _check(
            "more_steps",
            e.steps_accuracy[-2] - e.steps_accuracy[-1] if len(e.steps) > 1 else None,
            limits.of_images(limits.steps_gain, e.images),
            f"accuracy that {e.steps[-1]} steps take beyond {e.steps[-2] if len(e.steps) > 1 else 'fewer'} "
            f"({_percents(e.steps_accuracy)} % at {_numbers(e.steps)}); if it still falls, attack with more",
        ),
        _check(
            "restarts",
            e.restarts_accuracy[0] - e.restarts_accuracy[-1] if len(e.restarts) > 1 else None,
            limits.of_images(limits.restarts_gain, e.images),
            f"accuracy that {e.restarts[-1]} starts take beyond {e.restarts[0]} ({_percents(e.restarts_accuracy)} %); "
            "a rugged loss needs many",
        ),
        _check(
            "unbounded",
            e.unbounded,
            limits.unbounded_accuracy,
            "accuracy where every image may become any other; what is left is where the attack fails, not where the "
            "model is robust",
        ),
    ]


def _of_weaker_attacks(e: Evidence, limits: Limits) -> list[Check]:
    slack = limits.of_images(limits.slack, e.images)
    pgd = e.steps_accuracy[-1]
    checks = [
        _check(
            "fgsm_weaker",
            pgd - e.fgsm,
            slack,
            f"one step does not beat {e.steps[-1]} (FGSM {100 * e.fgsm:.1f} %, PGD {100 * pgd:.1f} %); it does where "
            "training collapsed on one-step attacks (arXiv:2001.03994), or the gradient is masked",
        ),
        _check(
            "noise_weaker",
            e.white_box - e.noise,
            slack,
            f"random noise does not beat attacks with the gradient (clean {100 * e.clean:.1f} %, noise "
            f"{100 * e.noise:.1f} %, with the gradient {100 * e.white_box:.1f} %)",
        ),
    ]
    for name, accuracy in e.transfer.items():
        checks.append(
            _check(
                f"transfer_weaker:{name}" if len(e.transfer) > 1 else "transfer_weaker",
                e.white_box - accuracy,
                slack,
                f"images made on {name} do not beat attacks with the model's own gradient (transfer "
                f"{100 * accuracy:.1f} %, with the gradient {100 * e.white_box:.1f} %)",
            )
        )
    if not e.transfer:
        checks.append(_check("transfer_weaker", None, slack, "not made: give `transfer_from`, another trained model"))
    missing = "" if e.square_gain is not None else " (not made: 'square' is not among the attacks)"
    checks.append(
        _check(
            "square_weaker",
            e.square_gain,
            slack,
            f"images that Square breaks without the gradient, and none with it{missing}",
        )
    )
    return checks


def _collapse(e: Evidence, limits: Limits) -> Check:
    if e.own_attack is None:
        return _check("collapse", None, limits.own_attack_gap, "not made: the model has no attack of its own")
    return _check(
        "collapse",
        e.own_attack - e.pgd,
        limits.own_attack_gap,
        f"accuracy under the attack it trains with ({100 * e.own_attack:.1f} %) minus under PGD-{e.pgd_steps} "
        f"({100 * e.pgd:.1f} %); a wide gap: the attack became too weak, or the model reads its fingerprint",
    )


def _numbers(values: Sequence[int]) -> str:
    return ", ".join(map(str, values))


def _percents(values: Sequence[float]) -> str:
    return ", ".join(f"{100 * value:.1f}" for value in values)
