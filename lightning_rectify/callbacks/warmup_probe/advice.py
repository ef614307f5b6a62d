r"""From measured variances to a warmup.

All curves are of the relative variance V(t) of the adaptive rate. Up to step T they are measured. Beyond it they go on
as the theory at a length shorter by the measured factor, :math:`V(\rho_t / \mathrm{factor})`: a coordinate whose second
moment has fewer degrees of freedom is like a younger one.
"""

import math
from dataclasses import dataclass, field

import numpy as np
import torch

from lightning_rectify.optim.variance import (
    effective_warmup,
    rectification,
    relative_variance,
    sma_length,
    sma_limit,
)

_TIME_CONSTANTS = 40.0  # of the moving average; what is left after them no float64 sees
_THRESHOLD = 5.0  # of RectifiedAdam


@dataclass(eq=False)
class LayerProbe:
    """What was measured in one layer (or over a whole player).

    Attributes:
        name: the module that owns the parameters.
        player: whose layer it is.
        coordinates: number of them.
        sampled: number of them that were measured.
        relative_variance: at steps 1 to T, median over coordinates, shape (T,); infinite where more than half of the
            coordinates have no gradient yet in some stream; NaN where none has one in any.
        log_variance: of the logarithm of the adaptive rate, likewise, shape (T,).
        unseen_share: share of coordinates and streams without a gradient up to this step, shape (T,).
        zero_share: share of gradients that are exactly zero.
        dead_share: share of coordinates that never had a gradient, in any stream.
        factor: how many times more steps than in theory it takes to the same variance, median over coordinates; 1 for
            Gaussian noise.
        worst_factor: its 90 % quantile.
        steps: number of steps until the relative variance is within ``tolerance`` times the theory's floor; infinite if
            it never is.
        warmup: length of the linear warmup that holds back as many steps' worth of learning rate as multiplying it by
            sqrt(floor / V(t)) would, with the layer's own floor.
        rectified_excess: largest r_t^2 V(t), over the theory's floor, at the steps that RectifiedAdam rectifies (NaN
            if it rectifies none of the T).
        needs_more: whether ``factor`` is at least ``worse_than``.
    """

    name: str
    player: str
    coordinates: int
    sampled: int
    relative_variance: np.ndarray
    log_variance: np.ndarray
    unseen_share: np.ndarray
    zero_share: float
    dead_share: float
    factor: float
    worst_factor: float
    steps: float = math.nan
    warmup: float = math.nan
    rectified_excess: float = math.nan
    needs_more: bool = False


@dataclass(eq=False)
class PlayerProbe:
    """What was measured of one player, beside its theory.

    Attributes:
        name: of the player; "model" if there is but one.
        beta2: decay of its second moment.
        tolerance: how many times the floor counts as near enough.
        step: 1 to T, shape (T,).
        theory: relative variance at rho_t, shape (T,); infinite at the first two steps.
        theory_log: variance of the logarithm at rho_t, shape (T,).
        bias: what medians over so few streams were multiplied by, shape (2, T): relative and log variance.
        whole: all layers together.
        layers: in the order of the module.
        theory_steps: ``steps`` by theory alone.
        theory_warmup: ``warmup`` by theory alone.
        rectified_warmup: length of the linear warmup that holds back what RectifiedAdam does by itself,
            2 * sum(1 - r_t) + 1; NaN if beta2 is so small that it never rectifies.
        notes: what a reader should know.
    """

    name: str
    beta2: float
    tolerance: float
    step: np.ndarray
    theory: np.ndarray
    theory_log: np.ndarray
    bias: np.ndarray
    whole: LayerProbe
    layers: list[LayerProbe]
    theory_steps: float = math.nan
    theory_warmup: float = math.nan
    rectified_warmup: float = math.nan
    notes: list[str] = field(default_factory=list)

    @property
    def floor(self) -> float:
        """Relative variance that theory tends to."""
        return variance_floor(self.beta2, 1.0)

    @property
    def worse(self) -> list[LayerProbe]:
        """Layers that need more than the theory, the worst first."""
        return sorted((layer for layer in self.layers if layer.needs_more), key=lambda layer: -layer.factor)


def advise(probe: PlayerProbe, worse_than: float) -> None:
    """Fill in what follows from the measurements, for the whole, the layers and the theory.

    Args:
        probe: with its curves and factors.
        worse_than: factor from which a layer needs more.
    """
    beta2, level = probe.beta2, probe.tolerance * probe.floor
    r = None
    if sma_limit(beta2) > _THRESHOLD:
        r = rectification(torch.from_numpy(probe.step.astype(np.float64)), beta2, threshold=_THRESHOLD).numpy()
        probe.rectified_warmup = 2.0 * effective_warmup(beta2, threshold=_THRESHOLD) + 1.0
    probe.theory_steps = steps_until(probe.theory, 1.0, beta2, level)
    probe.theory_warmup = linear_warmup(probe.theory, 1.0, beta2)
    for layer in (probe.whole, *probe.layers):
        layer.needs_more = bool(layer.factor >= worse_than)
        layer.steps = steps_until(layer.relative_variance, layer.factor, beta2, level)
        layer.warmup = linear_warmup(layer.relative_variance, layer.factor, beta2)
        if r is not None and (r > 0.0).any():
            layer.rectified_excess = float(np.max(r[r > 0.0] ** 2 * layer.relative_variance[r > 0.0]) / probe.floor)


def extended_variance(step: torch.Tensor, factor: float, beta2: float) -> torch.Tensor:
    """Theory at a length that is shorter by a factor.

    Args:
        step: at least 1, any shape.
        factor: above 0.
        beta2: decay of the second moment.

    Returns:
        Relative variance, float64, the shape of ``step``; infinite where the length is at most 2.
    """
    length = sma_length(step.double(), beta2) / factor
    return torch.where(length > 2.0, relative_variance(length.clamp(min=2.1)), torch.inf)


def variance_floor(beta2: float, factor: float) -> float:
    """Relative variance to which :func:`extended_variance` tends; infinite if the length never exceeds 2."""
    length = sma_limit(beta2) / factor
    return relative_variance(length) if length > 2.0 else math.inf


def steps_until(curve: np.ndarray, factor: float, beta2: float, level: float) -> float:
    """The first step from which on the relative variance is at most ``level``.

    Args:
        curve: as measured at steps 1 to T, shape (T,).
        factor: by which it goes on.
        beta2: decay of the second moment.
        level: above 0.

    Returns:
        The step; infinite if there is none, NaN if the factor is.
    """
    if math.isnan(factor):
        return math.nan
    factor = max(factor, 1e-9)
    if variance_floor(beta2, factor) > level:
        return math.inf
    above = np.flatnonzero(~(curve <= level))
    last_above = int(above[-1]) + 1 if len(above) else 0
    if last_above < len(curve):
        return float(last_above + 1)
    low, high = len(curve), len(curve) + int(_TIME_CONSTANTS / (1.0 - beta2)) + 1
    while high - low > 1:
        middle = (low + high) // 2
        reached = extended_variance(torch.tensor(middle), factor, beta2).item() <= level
        low, high = (low, middle) if reached else (middle, high)
    return float(high)


def linear_warmup(curve: np.ndarray, factor: float, beta2: float) -> float:
    r"""Length of the linear warmup with the protection that the variance asks for.

    Rectification multiplies the rate by :math:`r_t = \sqrt{V(\infty)/V(t)}` (RAdam paper, section 4) and so holds back
    :math:`W = \sum_t (1 - r_t)` steps' worth; a linear warmup over L steps holds back (L - 1)/2 (the measure of Ma and
    Yarats, arXiv:1910.04209, section 4).

    Args:
        curve: V at steps 1 to T, shape (T,).
        factor: by which it goes on.
        beta2: decay of the second moment.

    Returns:
        L = 2 W + 1; infinite if V never becomes finite, NaN if the factor is.
    """
    if math.isnan(factor):
        return math.nan
    factor = max(factor, 1e-9)
    floor = variance_floor(beta2, factor)
    if math.isinf(floor):
        return math.inf
    count = len(curve)
    held = float(np.sum(1.0 - _rate(curve, floor)))
    steps = np.unique(np.geomspace(count + 0.5, count + _TIME_CONSTANTS / (1.0 - beta2), 4000))
    beyond = extended_variance(torch.from_numpy(steps), factor, beta2).numpy()
    missing = 1.0 - _rate(beyond, floor)
    held += float(np.sum((missing[1:] + missing[:-1]) / 2.0 * np.diff(steps)))
    return 2.0 * held + 1.0


def _rate(curve: np.ndarray, floor: float) -> np.ndarray:
    """r_t, at most 1, and 0 where the variance is infinite or not known yet."""
    known = np.where(np.isnan(curve), np.inf, curve)
    return np.sqrt(np.minimum(1.0, floor / np.maximum(known, np.finfo(np.float64).tiny)))
