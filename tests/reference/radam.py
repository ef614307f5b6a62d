"""RAdam written plainly in float64 from the paper (arXiv:1908.03265, algorithm 2), and the authors' released rule.

Slow on purpose: one number at a time, the formulas as printed. What the fast code is tested against.
"""

import math
from functools import cache

import mpmath
import numpy as np


def rho(step, beta2):
    return 2 / (1 - beta2) - 1 - 2 * step * beta2**step / (1 - beta2**step)


@cache
def variance(rho_t, order="exact"):
    """Theorem 1 (unit tau) as printed, in 50 digits since it overflows; or the first-order formula of section 4."""
    if order == "first_order":
        return rho_t / (2 * (rho_t - 2) * (rho_t - 4))
    with mpmath.workdps(50):
        r = mpmath.mpf(rho_t)
        beta = mpmath.beta((r - 1) / 2, (r - 1) / 2)
        return float(r / (r - 2) - r * mpmath.mpf(2) ** (2 * r - 5) / mpmath.pi * beta**2)


def rectification(step, beta2, order="first_order"):
    rho_t, rho_inf = rho(step, beta2), 2 / (1 - beta2) - 1
    if order == "exact":
        return math.sqrt(variance(rho_inf) / variance(rho_t))
    return math.sqrt((rho_t - 4) * (rho_t - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho_t))


def radam(
    theta,
    gradients,
    lr=1e-3,
    betas=(0.9, 0.999),
    eps=1e-8,
    weight_decay=0.0,
    decoupled=False,
    early_phase="momentum",
    threshold=5.0,
    rectifier="first_order",
):
    """The parameter after each step; ``gradients`` is a sequence of arrays like ``theta``."""
    theta = np.array(theta, dtype=np.float64)
    first, second = np.zeros_like(theta), np.zeros_like(theta)
    beta1, beta2 = betas
    path = []
    for step, gradient in enumerate(gradients, start=1):
        g = np.array(gradient, dtype=np.float64)
        rectified = rho(step, beta2) > threshold
        moves = rectified or early_phase != "skip"
        if weight_decay and not decoupled:
            g = g + weight_decay * theta
        first = beta1 * first + (1 - beta1) * g
        second = beta2 * second + (1 - beta2) * g**2
        m_hat = first / (1 - beta1**step)
        if weight_decay and decoupled and moves:
            theta = theta - lr * weight_decay * theta
        if rectified or early_phase == "adam":
            adaptive = math.sqrt(1 - beta2**step) / (np.sqrt(second) + eps)
            theta = theta - lr * m_hat * (rectification(step, beta2, rectifier) if rectified else 1.0) * adaptive
        elif moves:
            theta = theta - lr * m_hat
        path.append(theta.copy())
    return path


def authors_released(theta, gradients, lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0):
    """The authors' RAdam since 2021 (degenerated_to_sgd=False): no update at all until rho_t >= 5; decoupled decay.

    Written in their order of operations: a step size without lr, then decay, then the step.
    """
    theta = np.array(theta, dtype=np.float64)
    first, second = np.zeros_like(theta), np.zeros_like(theta)
    beta1, beta2 = betas
    path = []
    for step, gradient in enumerate(gradients, start=1):
        g = np.array(gradient, dtype=np.float64)
        second = second * beta2 + (1 - beta2) * g * g
        first = first * beta1 + (1 - beta1) * g
        n_sma_max = 2 / (1 - beta2) - 1
        n_sma = n_sma_max - 2 * step * beta2**step / (1 - beta2**step)
        if n_sma >= 5:
            step_size = math.sqrt(
                (1 - beta2**step)
                * (n_sma - 4) / (n_sma_max - 4)
                * (n_sma - 2) / n_sma
                * n_sma_max / (n_sma_max - 2)
            ) / (1 - beta1**step)  # fmt: skip
            theta = theta - weight_decay * lr * theta
            theta = theta - step_size * lr * first / (np.sqrt(second) + eps)
        path.append(theta.copy())
    return path
