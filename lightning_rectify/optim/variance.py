r"""The variance of the adaptive learning rate, in closed form.

Adam divides by :math:`\sqrt{\hat v_t}`; :math:`\psi_t = 1/\sqrt{\hat v_t}` is its adaptive learning rate. The RAdam
paper (arXiv:1908.03265, section 3) takes gradients to be independent :math:`N(0, \sigma^2)` and the exponential moving
average of their squares to be a simple average of length :math:`\rho`. Then :math:`\psi^2` follows a scaled inverse
:math:`\chi^2` law with :math:`\rho` degrees of freedom and scale :math:`\tau^2 = 1/\sigma^2`. Every function here is
for :math:`\tau = 1`: multiply a mean by :math:`\tau` and a variance by :math:`\tau^2`.

All functions take a float or a tensor (any shape, kept) and return the same; they compute in float64.
"""

import math
from numbers import Real
from typing import Literal, TypeVar

import torch
from torch import Tensor

from lightning_rectify.arguments import came, check_choice

Order = Literal["exact", "first_order"]
Number = TypeVar("Number", float, Tensor)

# Var[psi] = u/2 + 15u^2/8 + ... in u = 1/rho, highest power first; the expansion of the closed form below.
_SERIES = (250819 / 2048, 60795 / 1024, 7163 / 256, 1605 / 128, 83 / 16, 15 / 8, 1 / 2)
_SERIES_FROM = 100.0


def sma_limit(beta2: float) -> float:
    r"""Length :math:`\rho_\infty = 2/(1-\beta_2) - 1` of the simple average that matches Adam's, as steps grow.

    Args:
        beta2: decay of the second moment, in (0, 1).

    Raises:
        ValueError: if ``beta2`` is outside (0, 1).
    """
    if not _is_number(beta2) or not 0.0 < beta2 < 1.0:
        raise ValueError(f"Expected argument `beta2` to be in (0, 1) but got {came(beta2)}.")
    return (1.0 + beta2) / (1.0 - beta2)


def sma_length(step: Number, beta2: float) -> Number:
    r"""Length of the simple average with the same centre of mass as the moving average at a step.

    .. math:: \rho_t = \rho_\infty - \frac{2 t \beta_2^t}{1 - \beta_2^t}

    RAdam paper, equation 4; here as :math:`\rho_\infty - 2t/(e^{-t \ln \beta_2} - 1)`, which does not cancel.

    Args:
        step: number :math:`t \ge 1` of the step; float or tensor.
        beta2: decay of the second moment, in (0, 1).

    Returns:
        :math:`\rho_t`, from 1 at the first step up to :math:`\rho_\infty`.

    Raises:
        ValueError: if ``beta2`` is outside (0, 1) or a float ``step`` is below 1.

    Example:
        >>> [round(sma_length(t, 0.999), 4) for t in (1, 4, 5)]
        [1.0, 3.9975, 4.996]
    """
    limit, decay = sma_limit(beta2), -math.log(beta2)
    if isinstance(step, Tensor):
        step = step.double()
        return limit - 2.0 * step / torch.expm1(step * decay)
    _check_step(step)
    if step * decay > 700.0:  # expm1 overflows a float; the term is below 1e-300
        return limit
    return limit - 2.0 * step / math.expm1(step * decay)


def variance_matched_length(step: Number, beta2: float) -> Number:
    r"""Length of the simple average with the same variance as the moving average at a step.

    .. math:: n_t = \frac{(\sum_i w_i)^2}{\sum_i w_i^2} = \rho_\infty \tanh(t\,|\ln \beta_2|/2)

    Not in the paper: it matches the second moment of the weights :math:`w_i` where the paper matches their centre of
    mass. Simulated variances follow it more closely (at step 1000 and beta2 = .999 within 0.1 %, against 11 %).

    Args:
        step: number :math:`t \ge 1` of the step; float or tensor.
        beta2: decay of the second moment, in (0, 1).

    Returns:
        :math:`n_t`, at least ``sma_length(step, beta2)``.

    Raises:
        ValueError: if ``beta2`` is outside (0, 1) or a float ``step`` is below 1.
    """
    limit, half_decay = sma_limit(beta2), -math.log(beta2) / 2.0
    if isinstance(step, Tensor):
        return limit * torch.tanh(step.double() * half_decay)
    _check_step(step)
    return limit * math.tanh(step * half_decay)


def adaptive_rate_variance(rho: Number, order: Order = "exact") -> Number:
    r"""Variance of the adaptive learning rate for gradients of unit variance.

    .. math::
        \mathrm{exact:}\quad \frac{\rho}{\rho-2}
            - \frac{\rho}{2}\left(\frac{\Gamma((\rho-1)/2)}{\Gamma(\rho/2)}\right)^2
        \qquad \mathrm{first\ order:}\quad \frac{\rho}{2(\rho-2)(\rho-4)}

    RAdam paper, theorem 1 (there with a beta function, which overflows above :math:`\rho = 515`) and section 4. The
    exact value is finite for every :math:`\rho > 2`, not only above 4. Computed by log-gamma below 100 and by a series
    in :math:`1/\rho` above; relative error at most 2e-11 up to 1e6.

    Args:
        rho: length of the simple average; float or tensor, positive.
        order: "exact", or "first_order" for the approximation that RAdam's rectifier is made of.

    Returns:
        The variance; infinite where :math:`\rho \le 2` (first order: where :math:`\rho \le 4`).

    Raises:
        ValueError: if ``order`` is unknown or a float ``rho`` is not positive.

    Example:
        >>> round(adaptive_rate_variance(5.0), 6), round(adaptive_rate_variance(5.0, "first_order"), 6)
        (0.251956, 0.833333)
    """
    check_choice(("exact", "first_order"), order=order)
    first_finite = 2.0 if order == "exact" else 4.0
    if isinstance(rho, Tensor):
        rho = rho.double()
        if order == "first_order":
            value = rho / (2.0 * (rho - 2.0) * (rho - 4.0))
        else:
            value = torch.where(rho < _SERIES_FROM, _tensor_closed_form(rho), _series(rho))
        return torch.where(rho > first_finite, value, math.inf)
    _check_rho(rho)
    if rho <= first_finite:
        return math.inf
    if order == "first_order":
        return rho / (2.0 * (rho - 2.0) * (rho - 4.0))
    if rho >= _SERIES_FROM:
        return _series(rho)
    log_ratio = math.log((rho - 2.0) / 2.0) + 2.0 * (math.lgamma((rho - 1.0) / 2.0) - math.lgamma(rho / 2.0))
    return -(rho / (rho - 2.0)) * math.expm1(log_ratio)


def adaptive_rate_mean(rho: Number) -> Number:
    r"""Mean of the adaptive learning rate for gradients of unit variance.

    .. math:: E[\psi] = \sqrt{\rho/2}\;\Gamma((\rho-1)/2)/\Gamma(\rho/2)

    RAdam paper, proof of theorem 1.

    Args:
        rho: length of the simple average; float or tensor, positive.

    Returns:
        The mean; infinite where :math:`\rho \le 1`.

    Raises:
        ValueError: if a float ``rho`` is not positive.
    """
    if isinstance(rho, Tensor):
        rho = rho.double()
        small = torch.exp(torch.log(rho / 2.0) / 2.0 + torch.lgamma((rho - 1.0) / 2.0) - torch.lgamma(rho / 2.0))
        large = torch.sqrt(rho / (rho - 2.0) - _series(rho))
        return torch.where(rho > 1.0, torch.where(rho < _SERIES_FROM, small, large), math.inf)
    _check_rho(rho)
    if rho <= 1.0:
        return math.inf
    if rho >= _SERIES_FROM:  # log-gammas of large numbers cancel; E[psi]^2 = E[psi^2] - Var[psi] does not
        return math.sqrt(rho / (rho - 2.0) - _series(rho))
    return math.exp(math.log(rho / 2.0) / 2.0 + math.lgamma((rho - 1.0) / 2.0) - math.lgamma(rho / 2.0))


def relative_variance(rho: Number, order: Order = "exact") -> Number:
    r"""Squared coefficient of variation :math:`\mathrm{Var}[\psi]/E[\psi]^2`, which no scale of gradients changes.

    Args:
        rho: length of the simple average; float or tensor, positive.
        order: as in :func:`adaptive_rate_variance`.

    Returns:
        The relative variance; infinite where the variance is.
    """
    return adaptive_rate_variance(rho, order) / adaptive_rate_mean(rho) ** 2


def log_adaptive_rate_variance(rho: Number) -> Number:
    r"""Variance of the logarithm, :math:`\mathrm{Var}[\ln \psi] = \psi_1(\rho/2)/4` with the trigamma function.

    Follows from the paper's model: :math:`\ln \hat v` is the logarithm of a scaled :math:`\chi^2_\rho`. Finite for
    every positive :math:`\rho`, so it can be watched from the first step on.

    Args:
        rho: length of the simple average; float or tensor, positive.

    Returns:
        The variance of the log.
    """
    if isinstance(rho, Tensor):
        return torch.special.polygamma(1, rho.double() / 2.0) / 4.0
    _check_rho(rho)
    return torch.special.polygamma(1, torch.tensor(rho / 2.0, dtype=torch.float64)).item() / 4.0


def rectification(step: Number, beta2: float, *, threshold: float = 5.0, rectifier: Order = "first_order") -> Number:
    r"""RAdam's factor that gives every rectified step the variance of the last.

    .. math::
        r_t = \sqrt{\frac{\mathrm{Var}[\psi]|_{\rho_\infty}}{\mathrm{Var}[\psi]|_{\rho_t}}}
        \;\overset{\mathrm{first\ order}}{=}\;
        \sqrt{\frac{(\rho_t-4)(\rho_t-2)\,\rho_\infty}{(\rho_\infty-4)(\rho_\infty-2)\,\rho_t}}

    RAdam paper, section 4, algorithm 2. The paper rectifies where :math:`\rho_t > 4`, torch and the authors' code where
    it is above 5. The exact rectifier is ours: the paper's formula before its first-order approximation, which
    over-damps the first rectified steps (by 1.5 at step 6).

    Args:
        step: number :math:`t \ge 1` of the step; float or tensor.
        beta2: decay of the second moment, in (0, 1).
        threshold: :math:`\rho_t` up to which there is no rectified step; at least 4 ("exact": at least 2).
        rectifier: "first_order" or "exact".

    Returns:
        :math:`r_t` in (0, 1), and 0 before the first rectified step.

    Raises:
        ValueError: if ``beta2`` is so small that no step is ever rectified, or another argument is out of its range.

    Example:
        >>> [round(rectification(t, 0.999), 5) for t in (5, 6, 1000)]
        [0.0, 0.02582, 0.64533]
    """
    check_rectifies(beta2, threshold, rectifier)
    rho, limit = sma_length(step, beta2), sma_limit(beta2)
    floor = adaptive_rate_variance(limit, rectifier)
    if isinstance(rho, Tensor):
        ratio = torch.sqrt(floor / adaptive_rate_variance(rho, rectifier))
        return torch.where(rho > threshold, ratio, 0.0)
    return math.sqrt(floor / adaptive_rate_variance(rho, rectifier)) if rho > threshold else 0.0


def check_rectifies(beta2: float, threshold: float, rectifier: Order) -> None:
    """Refuse a setting under which RAdam never takes an adaptive step.

    Args:
        beta2: decay of the second moment.
        threshold: as in :func:`rectification`.
        rectifier: as in :func:`rectification`.

    Raises:
        ValueError: naming the argument, what was expected and what came.
    """
    check_choice(("first_order", "exact"), rectifier=rectifier)
    lowest = 4.0 if rectifier == "first_order" else 2.0
    if not _is_number(threshold) or not lowest <= threshold < math.inf:
        raise ValueError(
            f"Expected argument `threshold` to be at least {lowest:g} with rectifier {rectifier!r} (below it the "
            f"variance is infinite) but got {came(threshold)}."
        )
    if sma_limit(beta2) <= threshold:
        smallest = (threshold - 1.0) / (threshold + 1.0)
        raise ValueError(
            f"Expected argument `beta2` to be above {smallest:.4g} with threshold {threshold:g} but got {beta2}: "
            f"rho tends to {sma_limit(beta2):.4g}, so no step would ever be rectified and all would be plain momentum."
        )


def effective_warmup(beta2: float, *, threshold: float = 5.0, rectifier: Order = "first_order") -> float:
    r"""Steps' worth of learning rate that rectification holds back, :math:`\sum_t (1 - r_t)`.

    The measure of Ma and Yarats (arXiv:1910.04209, section 4); a linear warmup over :math:`2/(1-\beta_2)` steps gives
    :math:`1/(1-\beta_2) - 1/2`.

    Args:
        beta2: decay of the second moment, in (0, 1).
        threshold: as in :func:`rectification`.
        rectifier: as in :func:`rectification`.

    Returns:
        The sum over all steps.

    Example:
        >>> round(effective_warmup(0.999), 1)
        1033.3
    """
    check_rectifies(beta2, threshold, rectifier)
    # 1 - r_t falls like t * beta2^t, so 40 time constants leave nothing that a float64 sum could see.
    steps = torch.arange(1, int(40.0 / (1.0 - beta2)) + 2, dtype=torch.float64)
    return (1.0 - rectification(steps, beta2, threshold=threshold, rectifier=rectifier)).sum().item()


def _series(rho: Number) -> Number:
    u = 1.0 / rho
    total: Number = u * _SERIES[0]
    for coefficient in _SERIES[1:]:
        total = (total + coefficient) * u
    return total


def _tensor_closed_form(rho: Tensor) -> Tensor:
    log_ratio = torch.log((rho - 2.0) / 2.0) + 2.0 * (torch.lgamma((rho - 1.0) / 2.0) - torch.lgamma(rho / 2.0))
    return -(rho / (rho - 2.0)) * torch.expm1(log_ratio)


def _check_step(step: float) -> None:
    if not _is_number(step) or not step >= 1.0:
        raise ValueError(f"Expected argument `step` to be at least 1 but got {came(step)}.")


def _check_rho(rho: float) -> None:
    if not _is_number(rho) or not rho > 0.0:
        raise ValueError(f"Expected argument `rho` to be positive but got {came(rho)}.")


def _is_number(value: object) -> bool:  # cheaper than `check_types`: the optimizer asks at each step
    return isinstance(value, Real) and not isinstance(value, bool)
