"""``GaussianPlanData``: two Gaussians whose entropic plan, and so its density, is known."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy import linalg
from torch import Tensor

from lightning_rectify.arguments import check_above
from lightning_rectify.data.transport import TransportData
from lightning_rectify.data.transport_truths import Array, TransportProblem, TransportTruth, gaussians


@dataclass(frozen=True)
class GaussianPlanTruth(TransportTruth):
    """The entropic plan of two Gaussians, a Gaussian itself; ``cost`` is its own E c, without the entropy.

    Attributes:
        entropy: eps, in units of the cost.
        mean: of (x, y), joined, shape (2 D,).
        cov: shape (2 D, 2 D).
    """

    entropy: float
    mean: Array
    cov: Array

    def plan_log_prob(self, x: Tensor, y: Tensor) -> Tensor:
        """Log-densities of pairs, shapes (N, D), in nats: float64, shape (N,), on the CPU."""
        joined = torch.cat([x, y], dim=1).detach().cpu().double().numpy() - self.mean
        root = linalg.cholesky(self.cov, lower=True)
        white = linalg.solve_triangular(root, joined.T, lower=True)
        constant = np.log(np.diag(root)).sum() + 0.5 * len(self.mean) * math.log(2.0 * math.pi)
        return torch.from_numpy(-0.5 * (white**2).sum(axis=0) - constant)

    def sample_plan(self, count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
        """Pairs of the plan, float32, shapes (count, D)."""
        noise = np.random.default_rng([seed, 1]).standard_normal((count, len(self.mean)))
        joined = torch.from_numpy(self.mean + noise @ linalg.cholesky(self.cov, lower=True).T).float()
        x, y = joined.chunk(2, dim=1)
        return x, y


def entropic_covariance(cov_x: Array, cov_y: Array, entropy: float) -> Array:
    r"""Cov(X, Y) under the entropic plan of two Gaussians with the squared cost.

    .. math:: C = \tfrac12 A^{1/2} (4 A^{1/2} B A^{1/2} + \tfrac{\varepsilon^2}{4} I)^{1/2} A^{-1/2}
        - \tfrac{\varepsilon}{4} I

    for the minimiser of :math:`E \lVert X - Y \rVert^2 + \varepsilon\, \mathrm{KL}(\gamma \,\|\, \mu \otimes \nu)`
    (Janati et al. 2020, arXiv:2006.02572, theorem 1, with :math:`\varepsilon = 2 \sigma^2`).

    Args:
        cov_x: A, positive definite, shape (D, D).
        cov_y: B, positive definite, shape (D, D).
        entropy: eps, above 0.

    Example:
        >>> round(float(entropic_covariance(np.eye(1), 0.49 * np.eye(1), 1.0)[0, 0]), 4)
        0.4933
    """
    values, vectors = linalg.eigh(cov_x)
    root, inverse = (vectors * values**power @ vectors.T for power in (0.5, -0.5))
    inner, basis = linalg.eigh(4.0 * root @ cov_y @ root + (entropy / 2.0) ** 2 * np.eye(len(cov_x)))
    shared = basis * np.sqrt(inner) @ basis.T
    return 0.5 * root @ shared @ inverse - entropy / 4.0 * np.eye(len(cov_x))


def gaussian_plan(mean_x: Array, cov_x: Array, mean_y: Array, cov_y: Array, entropy: float) -> TransportProblem:
    """Two Gaussians with the entropic plan of the squared cost for their truth.

    Args:
        mean_x: shape (D,).
        cov_x: positive definite, shape (D, D).
        mean_y: shape (D,).
        cov_y: positive definite, shape (D, D).
        entropy: eps, above 0.
    """
    plain = gaussians(mean_x, cov_x, mean_y, cov_y, "squared")
    assert plain.truth is not None
    cross = entropic_covariance(cov_x, cov_y, entropy)
    shift = mean_y - mean_x
    truth = GaussianPlanTruth(
        cost_name="squared",
        cost=float(shift @ shift + np.trace(cov_x) + np.trace(cov_y) - 2.0 * np.trace(cross)),
        independent_cost=plain.truth.independent_cost,
        max_gradient=plain.truth.max_gradient,
        variance_y=plain.truth.variance_y,
        map=None,  # the plan is not concentrated on one
        entropy=entropy,
        mean=np.concatenate([mean_x, mean_y]),
        cov=np.block([[cov_x, cross], [cross.T, cov_y]]),
    )
    return TransportProblem(plain.dim, plain.draw_x, plain.draw_y, truth)


class GaussianPlanData(TransportData):
    """Two Gaussians to transport one to the other, with the *entropic* plan of the squared cost for the truth.

    ``truth`` then also has ``entropy``, ``plan_log_prob(x, y)`` and ``sample_plan(count, seed)``; its cost is E c of
    the entropic plan. The rest is as in :class:`TransportData`.

    Args:
        entropy: eps of E c + eps KL(plan, product of the marginals), above 0, in units of the cost.
        mean_x: D numbers.
        cov_x: D lists of D numbers, symmetric and positive definite.
        mean_y: D numbers.
        cov_y: the same as ``cov_x``.
        **kwargs: of :class:`TransportData`, but ``problem``, ``dim``, ``cost``, ``x`` and ``y``.

    Raises:
        ValueError: for an argument outside its range.

    Example:
        >>> round(GaussianPlanData(entropy=1.0).truth.cost, 4)
        4.5034
    """

    def __init__(
        self,
        entropy: float = 1.0,
        mean_x: Sequence[float] = (0.0,),
        cov_x: Sequence[Sequence[float]] = ((1.0,),),
        mean_y: Sequence[float] = (2.0,),
        cov_y: Sequence[Sequence[float]] = ((0.49,),),
        batch_size: int = 640,
        epoch_size: int = 64_000,
        train_size: int | None = None,
        val_size: int = 2000,
        eval_batch_size: int = 1000,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(
            batch_size=batch_size, epoch_size=epoch_size, train_size=train_size, val_size=val_size,
            eval_batch_size=eval_batch_size, num_workers=num_workers, seed=seed,
        )  # fmt: skip
        check_above(0, entropy=entropy)
        given: dict[str, Any] = {"mean_x": mean_x, "cov_x": cov_x, "mean_y": mean_y, "cov_y": cov_y}
        sides = {name: np.asarray(value, dtype=np.float64) for name, value in given.items()}
        dim = len(np.atleast_1d(sides["mean_x"]))
        for name, value in sides.items():
            shape = (dim,) if name.startswith("mean") else (dim, dim)
            good = value.shape == shape and np.isfinite(value).all()
            if good and len(shape) == 2:
                good = np.allclose(value, value.T) and linalg.eigvalsh(value)[0] > 0
            if not good:
                wanted = "finite" if len(shape) == 1 else "symmetric and positive definite"
                raise ValueError(
                    f"Expected argument `{name}` to be {wanted}, of shape {shape}, but got {given[name]!r}."
                )
        self.problem = gaussian_plan(**sides, entropy=float(entropy))
