"""What the monitor computes from sampled second moments and gradients: numpy in float64, no framework."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from lightning_rectify.optim.moments import RectifierOptions
from lightning_rectify.optim.variance import (
    adaptive_rate_mean,
    adaptive_rate_variance,
    log_adaptive_rate_variance,
    rectification,
    sma_length,
    sma_limit,
)

QUANTILES = {
    "gradient_q05": 0.05,
    "gradient_q25": 0.25,
    "gradient_median": 0.5,
    "gradient_q75": 0.75,
    "gradient_q95": 0.95,
}
#: the quantities of one point, in the order of the CSV's columns
QUANTITIES = (
    "rho",
    "rectification",
    "variance",
    "theory_variance",
    "log_variance",
    "theory_log_variance",
    "mean",
    "update_surprise",
    "effective_lr",
    "eps_share",
    *QUANTILES,
)


@dataclass
class Block:
    """Sampled readings of consecutive points; S points, n coordinates.

    Attributes:
        v: second moments after the step, shape (S, n).
        g: gradients that the step used, shape (S, n); NaN where there was none.
        t: step count of each coordinate's parameter, shape (S, n).
        lr: learning rate of the step, shape (S,).
        beta2: decay of the second moment, in (0, 1).
        eps: added to the denominator.
        corrected: whether v is divided by 1 - beta2^t.
        eps_before_correction: whether eps joins sqrt(v) before that.
        rectifier: the optimizer's rule, or None if it does not rectify.
    """

    v: np.ndarray
    g: np.ndarray
    t: np.ndarray
    lr: np.ndarray
    beta2: float
    eps: float
    corrected: bool
    eps_before_correction: bool
    rectifier: RectifierOptions | None


@dataclass
class Points:
    """The quantities of S points and, for histograms and alarms, what they were made from.

    Attributes:
        values: for each of ``QUANTITIES`` an array of shape (S,), all finite.
        step: the group's step number, shape (S,).
        rate: adaptive rate per coordinate, shape (S, n).
        live: which coordinates are not ruled by eps, shape (S, n).
        zero_share: share of coordinates whose second moment is exactly zero, shape (S,).
    """

    values: dict[str, np.ndarray]
    step: np.ndarray
    rate: np.ndarray
    live: np.ndarray
    zero_share: np.ndarray


def measure(block: Block) -> Points:
    r"""Compute the points of a block.

    The adaptive rate of a coordinate is :math:`\psi = 1/(\sqrt{\hat v} + \epsilon)`, as the optimizer has it. Moments
    of it are taken over live coordinates, those with :math:`\sqrt{\hat v} > \epsilon`: a coordinate that never had a
    gradient has rate :math:`1/\epsilon` and would be all that a variance shows. ``eps_share`` is the share left out.

    ``theory_variance`` is what the variance would be if all live coordinates had gradients of one scale, that scale
    taken from the measured second moment of the rate: mean(psi^2) * Var[psi]/E[psi^2] with the paper's law at rho_t.
    Where rho_t <= 2 the ratio has the limit 1. Measured above theory is spread of gradient scales.

    ``update_surprise`` is mean(g^2 / v_hat before the step), divided by its expectation rho/(rho - 2): 1 if gradients
    come from the distribution that v remembers, above 1 if they grow. 0 while that expectation is infinite (the first
    three steps). Gradients that weight decay was added to are read without it.

    Args:
        block: readings; at least one point.
    """
    v, g, t = block.v.astype(np.float64), block.g.astype(np.float64), block.t.astype(np.float64)
    step = t.max(axis=1)
    if (
        t == t[:, :1]
    ).all():  # the usual case: no parameter came late; what depends on t alone is computed once a point
        t = t[:, :1]
    correction = np.where(t > 0, -np.expm1(t * np.log(block.beta2)), 1.0)
    v_hat = v / correction if block.corrected else v
    root = np.sqrt(v_hat)
    eps = block.eps / np.sqrt(correction) if block.eps_before_correction else block.eps
    seen = np.broadcast_to(t > 0, v.shape)
    live = seen & (root > eps)
    live |= ~live.any(axis=1, keepdims=True) & seen  # nothing is live: show the rate that eps makes
    with np.errstate(divide="ignore"):
        rate = np.where(live, 1.0 / np.maximum(root + eps, np.finfo(np.float64).tiny), 0.0)
    count = np.maximum(live.sum(axis=1), 1)
    mean = rate.sum(axis=1) / count
    second = (rate**2).sum(axis=1) / count
    log_rate = np.log(np.where(live, rate, 1.0))
    log_mean = log_rate.sum(axis=1) / count
    values = {
        "rho": _of_step(step, sma_length, block.beta2),
        "rectification": _rectification(step, block),
        "variance": (np.where(live, rate - mean[:, None], 0.0) ** 2).sum(axis=1) / count,
        "log_variance": (np.where(live, log_rate - log_mean[:, None], 0.0) ** 2).sum(axis=1) / count,
        "theory_variance": second * _of_step(step, _variance_share, block.beta2),
        "theory_log_variance": _of_step(step, lambda s, b: log_adaptive_rate_variance(sma_length(s, b)), block.beta2),
        "mean": mean,
        "update_surprise": _surprise(v, g, t, live, block),
        "eps_share": 1.0 - (seen & (root > eps)).sum(axis=1) / np.maximum(seen.sum(axis=1), 1),
    }
    values["effective_lr"] = block.lr * _share_of_rate(values["rectification"], block)
    values |= _gradient_quantiles(block.g)  # as they came: float32 sorts faster
    zero_share = (seen & (v == 0.0)).sum(axis=1) / np.maximum(seen.sum(axis=1), 1)
    return Points({name: values[name] for name in QUANTITIES}, step, rate, live, zero_share)


def _of_step(step: np.ndarray, function: Callable[[torch.Tensor, float], torch.Tensor], beta2: float) -> np.ndarray:
    tensor = torch.from_numpy(np.maximum(step, 1).astype(np.float64))
    result: np.ndarray = function(tensor, beta2).numpy()
    return result


def _variance_share(step: torch.Tensor, beta2: float) -> torch.Tensor:
    """Var[psi] / E[psi^2] at a step."""
    rho = sma_length(step, beta2)
    variance = adaptive_rate_variance(rho)
    return torch.where(rho > 2.0, variance / (variance + adaptive_rate_mean(rho) ** 2), 1.0)


def _rectification(step: np.ndarray, block: Block) -> np.ndarray:
    """r_t: the optimizer's own, or for one that does not rectify what it would need; 0 before the first such step."""
    options = block.rectifier or RectifierOptions(5.0, "first_order", "momentum")
    if sma_limit(block.beta2) <= options.threshold:
        return np.zeros(len(step))

    def r(steps: torch.Tensor, beta2: float) -> torch.Tensor:
        return rectification(steps, beta2, threshold=options.threshold, rectifier=options.rectifier)

    return _of_step(step, r, block.beta2)


def _share_of_rate(r: np.ndarray, block: Block) -> np.ndarray:
    """What multiplies lr in the step: r_t, before it 1 (momentum, adam) or 0 (skip); 1 without rectification."""
    if block.rectifier is None:
        return np.ones_like(r)
    return np.where(r > 0.0, r, 0.0 if block.rectifier.early_phase == "skip" else 1.0)


def _surprise(v: np.ndarray, g: np.ndarray, t: np.ndarray, live: np.ndarray, block: Block) -> np.ndarray:
    # v before the step need not be kept: the update of v is undone.
    before = (v - (1.0 - block.beta2) * g**2) / block.beta2
    rho = sma_length(torch.from_numpy(np.maximum(t - 1, 1).astype(np.float64)), block.beta2).numpy()
    # Undoing a float32 update leaves 1e-7 of v: what is below that is rounding, not a moment.
    usable = live & np.isfinite(g) & (rho > 2.0) & (before > 1e-6 * v)
    with np.errstate(divide="ignore", invalid="ignore"):
        correction = -np.expm1((t - 1) * np.log(block.beta2))
        normalised = g**2 * correction / before * (rho - 2.0) / rho
    return np.where(usable, normalised, 0.0).sum(axis=1) / np.maximum(usable.sum(axis=1), 1)


def _gradient_quantiles(g: np.ndarray) -> dict[str, np.ndarray]:
    size, levels = np.abs(g), list(QUANTILES.values())
    if np.isnan(size).any():
        rows = [np.quantile(row[~np.isnan(row)], levels) if not np.isnan(row).all() else np.zeros(5) for row in size]
        quantiles = np.stack(rows, axis=1)
    else:
        quantiles = np.quantile(size, levels, axis=1)
    return dict(zip(QUANTILES, quantiles, strict=True))
