"""What a report holds: arrays, a table, a figure, files."""

import csv
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from lightning_rectify.callbacks._logs import replacing
from lightning_rectify.callbacks.robustness.checks import Check

STEM = "robust_report"
_ARRAYS = {
    "labels": np.int64, "correct": np.bool_, "robust": np.bool_, "steps": np.int64, "steps_accuracy": np.float64,
    "steps_loss": np.float64, "restarts": np.int64, "restarts_accuracy": np.float64, "epsilons": np.float64,
    "epsilons_accuracy": np.float64,
}  # fmt: skip
_WORDS = {True: "pass", False: "FAIL", None: "-"}


@dataclass(frozen=True)
class AttackRow:
    """One attack at the report's epsilon.

    Attributes:
        name: with numbers of steps and starts.
        faced: images it was run on.
        broken: of them, those misclassified after it.
        worst: accuracy under the worst of this and all attacks before it, image by image.
        alone: accuracy under this attack alone; None if it faced only what others had left.
        seconds: wall clock.
    """

    name: str
    faced: int
    broken: int
    worst: float
    alone: float | None
    seconds: float


@dataclass(frozen=True, eq=False)
class RobustReport:
    """What :func:`robust_report` returns; accuracies are shares in 0 to 1 of all N images.

    Attributes:
        epsilon: radius of the ball, in pixel units.
        norm: "linf" or "l2".
        bounds: smallest and largest pixel.
        classes: number of logits K.
        labels: int64 (N,).
        correct: images classified correctly without an attack, bool (N,).
        robust: images classified correctly after every attack, bool (N,).
        broken_by: for each image the first attack that broke it, "clean" if none was needed, "" if none did.
        attacks: one row an attack, in the order in which they ran.
        steps: numbers of PGD's steps, int64 (S,).
        steps_accuracy: accuracy under PGD with so many and one start, float64 (S,).
        steps_loss: mean cross-entropy under it of the images of ``correct``, float64 (S,).
        restarts: numbers of PGD's starts, int64 (R,).
        restarts_accuracy: accuracy with so many, at the largest number of steps, float64 (R,).
        epsilons: radii, float64 (E,).
        epsilons_accuracy: accuracy under PGD with the largest number of steps and one start, float64 (E,); an image
            that falls at one radius counts as fallen at all larger ones.
        unbounded_accuracy: accuracy under PGD whose ball holds every image.
        own_attack_accuracy: accuracy under the model's own attack; None if it has none.
        checks: signs of masked gradients and of a collapsed attack.
        skipped: attacks that were asked for but could not run, with the reason.
        settings: what the attacks were given.
        seconds: wall clock.
    """

    epsilon: float
    norm: str
    bounds: tuple[float, float]
    classes: int
    labels: np.ndarray
    correct: np.ndarray
    robust: np.ndarray
    broken_by: list[str]
    attacks: list[AttackRow]
    steps: np.ndarray
    steps_accuracy: np.ndarray
    steps_loss: np.ndarray
    restarts: np.ndarray
    restarts_accuracy: np.ndarray
    epsilons: np.ndarray
    epsilons_accuracy: np.ndarray
    unbounded_accuracy: float
    own_attack_accuracy: float | None
    checks: list[Check]
    skipped: dict[str, str] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0

    # -- what it comes down to -----------------------------------------------------------------------------------------

    @property
    def images(self) -> int:
        """Number of images N."""
        return len(self.correct)

    @property
    def clean_accuracy(self) -> float:
        """Accuracy without an attack."""
        return float(self.correct.mean())

    @property
    def robust_accuracy(self) -> float:
        """Accuracy under the worst of all attacks, image by image: the number to believe, if the checks pass."""
        return float(self.robust.mean())

    @property
    def failed(self) -> list[Check]:
        """The checks that failed."""
        return [check for check in self.checks if check.passed is False]

    @property
    def passed(self) -> bool:
        """Whether no check failed."""
        return not self.failed

    def check(self, name: str) -> Check:
        """The check of this name.

        Raises:
            KeyError: if there is none.
        """
        for check in self.checks:
            if check.name == name:
                return check
        raise KeyError(name)

    def standard_error(self, accuracy: float) -> float:
        """Standard error of an accuracy over so many images: of a binomial, ``sqrt(a (1 - a) / N)``."""
        return math.sqrt(max(accuracy * (1 - accuracy), 0.0) / self.images)

    # -- for people ----------------------------------------------------------------------------------------------------

    def table(self) -> str:
        """The report in words and numbers, for a terminal; accuracies in percent with their standard errors."""
        low, high = self.bounds
        lines = [
            f"Robustness of {self.images:,} images at epsilon {self.epsilon:.4g} ({self.norm}, pixels {low:g} to "
            f"{high:g})",
            f"  clean accuracy  {self._percent(self.clean_accuracy)}",
            f"  worst case      {self._percent(self.robust_accuracy)}   over all attacks, image by image",
            "",
            f"  {'attack':<28}{'faced':>7}{'broken':>8}{'alone':>14}{'worst so far':>16}",
        ]
        for row in self.attacks:
            alone = "" if row.alone is None else self._percent(row.alone)
            lines.append(f"  {row.name:<28}{row.faced:>7,}{row.broken:>8,}{alone:>14}{self._percent(row.worst):>16}")
        lines += [f"  {name:<28} not run: {reason}" for name, reason in self.skipped.items()]
        largest = int(self.steps[-1])
        for title, values, accuracies in (
            ("PGD steps", self.steps, self.steps_accuracy),
            (f"starts of PGD-{largest}", self.restarts, self.restarts_accuracy),
            (f"epsilon of PGD-{largest}", self.epsilons, self.epsilons_accuracy),
        ):
            lines += ["", f"  {title:<20}" + "".join(f"{value:>14.4g}" for value in values)]
            lines.append(f"  {'accuracy':<20}" + "".join(f"{self._percent(accuracy):>14}" for accuracy in accuracies))
            if values is self.steps:
                lines.append(f"  {'mean loss':<20}" + "".join(f"{loss:>14.4g}" for loss in self.steps_loss))
        verdict = (
            "all passed"
            if self.passed
            else f"{len(self.failed)} FAILED: attack harder before you believe the worst case"
        )
        if self.failed and all(check.name == "collapse" for check in self.failed):
            verdict = "the training attack has collapsed"
        lines += ["", f"  Checks: {verdict}"]
        for check in self.checks:
            value = "" if check.value is None else f"{check.value:.3g} (at most {check.limit:.3g})"
            said = "" if check.passed else check.meaning
            lines.append(f"  {_WORDS[check.passed]:<5}{check.name:<18}{value:<27}{said}".rstrip())
        return "\n".join(lines)

    def plot(self) -> Figure:
        """The figure: accuracy over epsilon, over steps with the loss, and under each attack."""
        from lightning_rectify.callbacks.robustness.figures import draw_report

        return draw_report(self)

    def _percent(self, accuracy: float) -> str:
        return f"{100 * accuracy:.1f} ± {100 * self.standard_error(accuracy):.1f}"

    # -- files ---------------------------------------------------------------------------------------------------------

    def save(self, folder: str | Path) -> Path:
        """Write ``robust_report.json``, ``.csv`` (attacks and curves), ``.txt`` (the table) and ``.png``.

        Files of an earlier report are overwritten; each appears whole or not at all.

        Args:
            folder: made if it is not there.

        Returns:
            The folder.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(folder / f"{STEM}.json") as path:
            path.write_text(json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n", encoding="utf-8")
        with replacing(folder / f"{STEM}.csv") as path, path.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("kind", "name", "accuracy", "standard_error", "loss"), *self._rows()])
        with replacing(folder / f"{STEM}.txt") as path:
            path.write_text(self.table() + "\n", encoding="utf-8")
        with replacing(folder / f"{STEM}.png") as path:
            self.plot().savefig(path, dpi=110, format="png")
        return folder

    @classmethod
    def load(cls, path: str | Path) -> "RobustReport":
        """Read what :meth:`save` wrote: its folder, or the JSON file itself."""
        path = Path(path)
        path = path / f"{STEM}.json" if path.is_dir() else path
        return cls.from_dict(json.loads(path.read_text(encoding="utf-8")))

    def to_dict(self) -> dict[str, Any]:
        """Plain lists and numbers, None for what is not finite, as the JSON file has them."""
        plain = {name: getattr(self, name) for name in self.__dataclass_fields__}
        plain |= {name: _plain(getattr(self, name)) for name in _ARRAYS}
        plain |= {"attacks": [asdict(row) for row in self.attacks], "checks": [asdict(check) for check in self.checks]}
        summary = {
            "images": self.images,
            "clean_accuracy": self.clean_accuracy,
            "robust_accuracy": self.robust_accuracy,
            "robust_standard_error": self.standard_error(self.robust_accuracy),
            "passed": self.passed,
        }
        return {**summary, **plain, "bounds": list(self.bounds)}

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> "RobustReport":
        """The report that :meth:`to_dict` made this of."""
        fields = {name: plain[name] for name in cls.__dataclass_fields__}
        for name, kind in _ARRAYS.items():
            values = [math.nan if value is None else value for value in fields[name]]
            fields[name] = np.array(values, dtype=kind)
        fields["attacks"] = [AttackRow(**row) for row in fields["attacks"]]
        fields["checks"] = [Check(**check) for check in fields["checks"]]
        fields["bounds"] = (float(plain["bounds"][0]), float(plain["bounds"][1]))
        return cls(**fields)

    def _rows(self) -> Iterator[Sequence[Any]]:
        """The rows of the CSV file."""
        yield self._row("worst case", "clean", self.clean_accuracy)
        for attack in self.attacks:
            yield self._row("worst case", attack.name, attack.worst)
        for attack in self.attacks:
            if attack.alone is not None:
                yield self._row("alone", attack.name, attack.alone)
        for i, steps in enumerate(self.steps):
            yield self._row("steps", int(steps), self.steps_accuracy[i], f"{self.steps_loss[i]:.9g}")
        for i, restarts in enumerate(self.restarts):
            yield self._row("restarts", int(restarts), self.restarts_accuracy[i])
        for i, epsilon in enumerate(self.epsilons):
            yield self._row("epsilon", f"{epsilon:.9g}", self.epsilons_accuracy[i])
        yield self._row("epsilon", "unbounded", self.unbounded_accuracy)

    def _row(self, kind: str, name: str | int, accuracy: float, loss: str = "") -> list[Any]:
        return [kind, name, f"{accuracy:.9g}", f"{self.standard_error(accuracy):.9g}", loss]


def _plain(values: np.ndarray) -> list[Any]:
    listed: list[Any] = values.tolist()
    return [None if isinstance(value, float) and not math.isfinite(value) else value for value in listed]
