"""What can be wrong with an adaptive learning rate, said once, with the numbers and the remedy."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from lightning_rectify.callbacks.adaptive_rate.quantities import Block, Points
from lightning_rectify.optim.moments import RectifierOptions
from lightning_rectify.optim.variance import effective_warmup, rectification, sma_limit

_JUMP = 30.0  # momentum steps this many times larger than the first rectified one: median |g| of about 0.8
_EPS_SHARE = 0.5  # of the coordinates, for this many points in a row:
_EPS_POINTS = 10
_STALLED_SHARE = 0.5
_HELD_BACK = 10.0  # steps' worth of learning rate that make a rising schedule a warmup
# Times smaller median gradient than at the first step that moves a weight, by the step after it (at the 10th, runs that
# go on to learn have fallen too). From benchmarks/papers/translation.py, 6+6 layers: at the 50th at most 97 where it
# trained, thousands where it failed, in between where it half stalled; at the 100th at most 43 and at least 264.
_COLLAPSE = {50: 500.0, 100: 100.0}
# And the 95 % quantile so many times smaller. There at least 19 where it failed; in a language model (the same folder),
# whose median is that of the softmax's rare words and is 0 for a while, at most 4.
_COLLAPSE_HIGH = 15.0
_SETTLED = 10  # steps without a new highest learning rate after which a warmup is over


class AdaptiveRateWarning(UserWarning):
    """A finding of :class:`AdaptiveRateMonitor` about the optimizer's settings."""


Gradients = tuple[float, float]  # median and 95 % quantile of abs(g)


def collapsed(first: Gradients, later: Gradients, step: int) -> bool:
    """Whether the network has been driven to where it no longer learns.

    Args:
        first: of the first step that moves a weight.
        later: of ``step``.
        step: counted from the first that moves a weight, 50 or 100.
    """
    return first[0] > 0.0 and first[0] >= _COLLAPSE[step] * later[0] and first[1] >= _COLLAPSE_HIGH * later[1]


@dataclass
class GroupAlarms:
    """Watches the points of one parameter group.

    Args:
        key: the group's name in the dashboard.
        optimizer: class name of the optimizer.
        beta2: decay of its second moment.
        rectifier: its rule, or None if it does not rectify.
        frozen_steps: first steps in which no weight moves.
    """

    key: str
    optimizer: str
    beta2: float
    rectifier: RectifierOptions | None
    frozen_steps: int = 0
    _first_step: float | None = None
    _last_step: float = 0.0
    _last_r: float = 0.0
    _first_lr: float = 0.0
    _peak_lr: float = 0.0
    _peak_step: float = 0.0
    _at_peak: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)
    _sums: np.ndarray = field(default_factory=lambda: np.zeros(4))  # steps, lr, r, r * lr
    _eps_run: int = 0
    _first_gradient: Gradients = (0.0, 0.0)
    _collapse_looks: list[int] = field(default_factory=lambda: list(_COLLAPSE))

    def at_start(self) -> Iterator[tuple[str, str]]:
        """Findings that need no training: (alarm, message)."""
        if self.rectifier is not None and sma_limit(self.beta2) <= self.rectifier.threshold:
            yield (
                "never_rectifies",
                f"beta2 = {self.beta2:g} never rectifies: rho tends to {sma_limit(self.beta2):.3g}, not above the "
                f"threshold {self.rectifier.threshold:g}, so {self.optimizer} takes plain momentum steps for ever. "
                f"Use a beta2 above {(self.rectifier.threshold - 1) / (self.rectifier.threshold + 1):.3g} (the usual "
                "one is 0.999).",
            )

    def feed(self, block: Block, points: Points, low_precision: bool) -> Iterator[tuple[str, str]]:
        """Findings in the next points: (alarm, message).

        Args:
            block: the readings.
            points: what was measured from them.
            low_precision: whether the second moment is kept in float16 or bfloat16.
        """
        r, eps_share = points.values["rectification"], points.values["eps_share"]
        for i, step in enumerate(points.step):
            if self._first_step is None:
                self._first_step, self._first_lr = step, float(block.lr[i])
            yield from self._early_jump(step, r[i], points.rate[i])
            self._follow_schedule(step, float(block.lr[i]), r[i])
            yield from self._double_warmup(step)
            yield from self._no_warmup(step)
            median, high = (float(points.values[f"gradient_{name}"][i]) for name in ("median", "q95"))
            yield from self._collapse(step, (median, high))
            yield from self._eps_ruled(step, eps_share[i], points.zero_share[i])
            if low_precision and i and points.step[i] == points.step[i - 1] + 1:
                yield from self._stalled(step, block.v[i], block.v[i - 1], block.g[i])
            self._last_step, self._last_r = step, r[i]

    def _early_jump(self, step: float, r: float, rate: np.ndarray) -> Iterator[tuple[str, str]]:
        momentum = self.rectifier is not None and self.rectifier.early_phase == "momentum"
        if not momentum or r <= 0.0 or self._last_r > 0.0 or self._last_step != step - 1 or not rate.any():
            return
        jump = float(np.median(1.0 / rate[rate > 0.0])) / r  # a momentum step over a rectified one
        if jump > _JUMP:
            yield (
                "early_jump",
                f"the unrectified steps 1 to {step - 1:.0f} were {jump:.3g} times larger (median coordinate) than "
                f"the first rectified step {step:.0f}: they scale with the gradient, rectified steps do not. Use "
                "RectifiedAdam(early_phase='skip'), or scale the loss or the inputs down.",
            )

    def _follow_schedule(self, step: float, lr: float, r: float) -> None:
        weight = step - self._last_step if self._last_step else 1.0
        self._sums += weight * np.array([1.0, lr, r, r * lr])
        if lr > self._peak_lr * (1.0 + 1e-6):
            self._peak_lr, self._peak_step, self._at_peak = lr, step, tuple(self._sums)

    def _held_back(self) -> tuple[float, float]:
        """Steps' worth of learning rate held back before the peak: by the schedule alone, and of the rectified rate."""
        steps, lr, r, r_lr = self._at_peak
        return steps - lr / self._peak_lr, r - r_lr / self._peak_lr

    def _double_warmup(self, step: float) -> Iterator[tuple[str, str]]:
        watched = self.rectifier is not None and self._from_the_start() and self._peak_lr > 0.0
        if not watched or step < self._peak_step + _SETTLED or self._rectifier_is_off():
            return
        alone, on_top = self._held_back()
        if alone < _HELD_BACK or self.rectifier is None:
            return
        own = effective_warmup(self.beta2, threshold=self.rectifier.threshold, rectifier=self.rectifier.rectifier)
        yield (
            "double_warmup",
            f"the learning rate warmed up over {self._peak_step:.0f} steps on top of rectification: the schedule "
            f"alone holds back {alone:.0f} steps' worth, rectification alone {own:.0f}, both {own + on_top:.0f}, "
            f"against 2/(1-beta2) = {2 / (1 - self.beta2):.0f} that the variance asks for at most. Start at the full "
            "learning rate, or use AdamW with the warmup.",
        )

    def _no_warmup(self, step: float) -> Iterator[tuple[str, str]]:
        if self.rectifier is not None or step < _SETTLED or not self._from_the_start() or self._peak_lr == 0.0:
            return
        if self._first_lr < 0.5 * self._peak_lr or self._rectifier_is_off():
            return
        r = {t: rectification(float(t), self.beta2) for t in (6, 100, 1000)}
        yield (
            "no_warmup",
            f"{self.optimizer} runs without warmup: for its adaptive rate to have the variance it ends with, its "
            f"learning rate would have to be multiplied by {r[6]:.3g} at step 6, {r[100]:.3g} at 100, {r[1000]:.3g} "
            f"at 1000 (beta2 = {self.beta2:g}). Use RectifiedAdam, or a linear warmup over 2/(1-beta2) = "
            f"{2 / (1 - self.beta2):.0f} steps.",
        )

    def _collapse(self, step: float, gradient: Gradients) -> Iterator[tuple[str, str]]:
        moved = step - self.frozen_steps
        if step == self._first_step or moved <= 1:
            self._first_gradient = gradient
        if not self._collapse_looks or moved < self._collapse_looks[0]:
            return
        look = self._collapse_looks.pop(0)
        if not self._from_the_start() or moved >= 2 * look or not collapsed(self._first_gradient, gradient, look):
            return
        self._collapse_looks.clear()
        yield (
            "collapse",
            f"the median gradient fell from {self._first_gradient[0]:.2g} at the first step to {gradient[0]:.2g} at "
            f"step {step:.0f}: the first, too large steps have driven most of the network to where it no longer learns "
            "(arXiv:1908.03265, figure 2). Start again with RectifiedAdam, a warmup, or a smaller learning rate.",
        )

    def _eps_ruled(self, step: float, share: float, zero_share: float) -> Iterator[tuple[str, str]]:
        self._eps_run = self._eps_run + 1 if share >= _EPS_SHARE and step >= _SETTLED else 0
        if self._eps_run >= _EPS_POINTS:
            yield (
                "eps_ruled",
                f"eps rules {share:.0%} of the coordinates at step {step:.0f} (sqrt(v_hat) <= eps; {zero_share:.0%} "
                "never had a gradient): there the step is momentum divided by eps, not adaptive. Lower eps, scale "
                "the loss up, or look for dead units and unused parameters.",
            )

    def _stalled(self, step: float, v: np.ndarray, before: np.ndarray, g: np.ndarray) -> Iterator[tuple[str, str]]:
        moving = np.isfinite(g) & (g != 0.0)
        share = float((v == before)[moving].mean()) if moving.any() else 0.0
        if share > _STALLED_SHARE:
            yield (
                "stalled",
                f"the second moment stands still in {share:.0%} of the coordinates that have a gradient at step "
                f"{step:.0f}: its change of (1-beta2) = {1 - self.beta2:.2g} of itself is below half a unit of its "
                "low precision. Use RectifiedAdam (it keeps float32 moments), bf16-mixed in place of bf16-true, or "
                "a smaller beta2.",
            )

    def _from_the_start(self) -> bool:
        return self._first_step is not None and self._first_step <= 2

    def _rectifier_is_off(self) -> bool:
        """Whether beta2 is so small that there is nothing to rectify."""
        return sma_limit(self.beta2) <= (self.rectifier.threshold if self.rectifier is not None else 5.0)
