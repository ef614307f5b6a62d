"""Transport problems whose answer is known: cost, map, independent coupling and steepest pair, in closed form.

All in float64 numpy and scipy; nothing here is estimated from samples but the two quantiles that say so.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import linalg, special
from torch import Tensor

from lightning_rectify.arguments import check_choice

Array = NDArray[np.float64]
_TAIL = 0.999  # of the displacement, where it has no bound: further out lies 1 pair in 1,000


@dataclass(frozen=True)
class TransportTruth:
    """What is known of the optimal plan for one cost.

    Attributes:
        cost_name: "squared" or "euclidean".
        cost: of the optimal plan.
        independent_cost: of the independent coupling.
        max_gradient: the largest norm of the cost's gradient on the plan; where it has no bound, that of the pair at
            the 99.9 % quantile of displacements.
        variance_y: E|Y - E Y|^2.
        map: x, shape (N, D), to the plan's y; None where the optimal plan is not unique.
    """

    cost_name: str
    cost: float
    independent_cost: float
    max_gradient: float
    variance_y: float
    map: Callable[[Tensor], Tensor] | None


@dataclass(frozen=True)
class TransportProblem:
    """Two distributions to draw from, and the truth.

    Attributes:
        dim: numbers D in a point of either side.
        draw_x: count and generator to points, shape (count, D), float64.
        draw_y: the same of y.
        truth: None where it is not known.
    """

    dim: int
    draw_x: Callable[[int, np.random.Generator], Array]
    draw_y: Callable[[int, np.random.Generator], Array]
    truth: TransportTruth | None


# -- Gaussians ---------------------------------------------------------------------------------------------------------


def gaussian_map(mean_x: Array, cov_x: Array, mean_y: Array, cov_y: Array) -> tuple[Array, Array]:
    r"""The optimal map of two Gaussians under the squared cost, :math:`T(x) = M x + b`.

    .. math:: M = A^{-1/2} (A^{1/2} B A^{1/2})^{1/2} A^{-1/2}, \qquad b = m_Y - M m_X

    with A and B the covariances (Peyre and Cuturi 2019, arXiv:1803.00567, remark 2.31).

    Args:
        mean_x: shape (D,).
        cov_x: positive definite, shape (D, D).
        mean_y: shape (D,).
        cov_y: positive semidefinite, shape (D, D).

    Returns:
        M, shape (D, D), and b, shape (D,).
    """
    values, vectors = linalg.eigh(cov_x)
    root, inverse = (vectors * values**power @ vectors.T for power in (0.5, -0.5))
    matrix = inverse @ _root(root @ cov_y @ root) @ inverse
    return matrix, mean_y - matrix @ mean_x


def bures_cost(mean_x: Array, cov_x: Array, mean_y: Array, cov_y: Array) -> float:
    r"""The squared Wasserstein-2 distance of two Gaussians.

    .. math:: \lVert m_X - m_Y \rVert^2 + \mathrm{tr}\big(A + B - 2 (A^{1/2} B A^{1/2})^{1/2}\big)

    Arguments as in :func:`gaussian_map`; A may be singular.
    """
    root = _root(cov_x)
    shared = np.trace(_root(root @ cov_y @ root))
    return float(np.sum((mean_x - mean_y) ** 2) + np.trace(cov_x) + np.trace(cov_y) - 2.0 * shared)


def gaussians(mean_x: Array, cov_x: Array, mean_y: Array, cov_y: Array, cost: str | None) -> TransportProblem:
    """Two Gaussians; the truth is known for the squared cost, and for the Euclidean one if one is the other, shifted.

    Args:
        mean_x: shape (D,).
        cov_x: positive definite, shape (D, D).
        mean_y: shape (D,).
        cov_y: positive definite, shape (D, D).
        cost: "squared", "euclidean", or None for no truth.
    """
    matrix, offset = gaussian_map(mean_x, cov_x, mean_y, cov_y)
    truth = None
    shift = mean_y - mean_x
    variance = float(np.trace(cov_y))
    affine = partial(_affine, matrix=matrix, offset=offset)
    if cost == "squared":
        truth = TransportTruth(
            cost,
            bures_cost(mean_x, cov_x, mean_y, cov_y),
            float(shift @ shift + np.trace(cov_x) + np.trace(cov_y)),
            2.0 * _displacement_quantile(mean_x, cov_x, matrix, offset),
            variance,
            affine,
        )
    elif cost == "euclidean" and np.allclose(cov_x, cov_y) and np.allclose(cov_x, cov_x[0, 0] * np.eye(len(cov_x))):
        independent = mean_distance(float(np.linalg.norm(shift)), float((2.0 * cov_x[0, 0]) ** 0.5), len(shift))
        # Points on one line may change partners at no cost: the plan is not unique, and there is no map to hold to.
        truth = TransportTruth(cost, float(np.linalg.norm(shift)), independent, 1.0, variance, None)
    draw_x, draw_y = (
        partial(_draw_gaussian, mean=mean, root=linalg.cholesky(cov, lower=True))
        for mean, cov in ((mean_x, cov_x), (mean_y, cov_y))
    )
    return TransportProblem(len(mean_x), draw_x, draw_y, truth)


def mean_distance(shift: float, sigma: float, dim: int) -> float:
    r""":math:`E \lVert Z \rVert` of a Gaussian around a point at distance ``shift`` with covariance sigma^2 I.

    .. math:: \sigma \sqrt2\, \frac{\Gamma((D + 1) / 2)}{\Gamma(D / 2)}\, {}_1F_1(-1/2;\, D/2;\, -s^2 / (2 \sigma^2))

    The mean of the noncentral chi distribution; what the independent coupling of two shifted Gaussians costs.
    """
    ratio = np.exp(special.gammaln((dim + 1) / 2) - special.gammaln(dim / 2))
    return float(sigma * 2**0.5 * ratio * special.hyp1f1(-0.5, dim / 2, -(shift**2) / (2 * sigma**2)))


def bures2(cost: str | None = "squared") -> TransportProblem:
    """The two-dimensional problem of the prototype: cost 5.6737, independent coupling 9.31."""
    return gaussians(
        np.array([-1.0, 0.0]), np.array([[1.0, 0.5], [0.5, 1.0]]),
        np.array([1.0, 1.0]), np.array([[1.5, -0.6], [-0.6, 0.8]]), cost,
    )  # fmt: skip


def random_gaussians(dim: int, seed: int = 0, cost: str | None = "squared") -> TransportProblem:
    """Two Gaussians with covariances in general position: eigenvalues uniform in [0.4, 2], means N(0, 1/D).

    Args:
        dim: D, at least 1.
        seed: of the instance, at least 0.
        cost: as in :func:`gaussians`.
    """
    generator = np.random.default_rng([seed, dim])
    sides: list[Array] = []
    for _ in range(2):
        basis = linalg.qr(generator.standard_normal((dim, dim)))[0]
        cov = basis * generator.uniform(0.4, 2.0, dim) @ basis.T
        sides += [generator.standard_normal(dim) / dim**0.5, (cov + cov.T) / 2.0]
    return gaussians(sides[0], sides[1], sides[2], sides[3], cost)


def shifted_gaussians(dim: int = 2, shift: float = 5.0, cost: str | None = "squared") -> TransportProblem:
    """N(-s/2 e_1, I) to N(s/2 e_1, I): easy to the point of proving nothing (independent coupling: 16 %, 4 % more)."""
    half = np.zeros(dim)
    half[0] = shift / 2.0
    return gaussians(-half, np.eye(dim), half, np.eye(dim), cost)


# -- one dimension -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mixture:
    """A mixture of normal distributions on the line.

    Attributes:
        weights: shape (K,), positive, of sum 1.
        means: shape (K,).
        stds: shape (K,), positive.
    """

    weights: Array
    means: Array
    stds: Array

    def cdf(self, x: Array) -> Array:
        """The distribution function, the shape of x."""
        return special.ndtr((x[..., None] - self.means) / self.stds) @ self.weights

    def quantile(self, u: Array) -> Array:
        """Its inverse on (0, 1), the shape of u, by bisection to 1e-13 of the width."""
        low = np.full_like(u, float(np.min(self.means - 40.0 * self.stds)))
        high = np.full_like(u, float(np.max(self.means + 40.0 * self.stds)))
        for _ in range(60):
            middle = (low + high) / 2.0
            below = self.cdf(middle) < u
            low, high = np.where(below, middle, low), np.where(below, high, middle)
        return (low + high) / 2.0

    def draw(self, count: int, generator: np.random.Generator) -> Array:
        """Points, shape (count, 1)."""
        parts = generator.choice(len(self.weights), count, p=self.weights)
        return (self.means[parts] + self.stds[parts] * generator.standard_normal(count))[:, None]

    @property
    def mean(self) -> float:
        """E X."""
        return float(self.weights @ self.means)

    @property
    def variance(self) -> float:
        """E (X - E X)^2."""
        return float(self.weights @ (self.means**2 + self.stds**2)) - self.mean**2


def mixtures(x: Mixture, y: Mixture, cost: str | None) -> TransportProblem:
    r"""Two mixtures on the line; under a convex cost the map is monotone, :math:`T = F_Y^{-1} \circ F_X`.

    The cost is :math:`\int_0^1 |F_X^{-1} - F_Y^{-1}|^p\,du`, by a quadrature with an error below 1e-6; for the
    independent coupling the squared cost is a sum of moments, the absolute one a sum over pairs of components.

    Args:
        x: the one side.
        y: the other.
        cost: "squared", "euclidean", or None for no truth.
    """
    truth = None
    if cost is not None:
        # Nodes dense at both ends: u = ndtr(t), so that tails are sampled as well as the middle.
        nodes = np.linspace(-8.5, 8.5, 20001)
        density = np.exp(-(nodes**2) / 2.0) / (2.0 * np.pi) ** 0.5
        u = special.ndtr(nodes)
        moved = np.abs(x.quantile(u) - y.quantile(u))
        power = 2 if cost == "squared" else 1
        # The trapezoidal rule on the whole line: exact to rounding for smooth integrands.
        best = float(np.sum(moved**power * density) * (nodes[1] - nodes[0]))
        tail = _weighted_quantile(moved, density, _TAIL)
        quantile_map = partial(_quantile_map, x=x, y=y)
        if cost == "squared":
            independent = (x.mean - y.mean) ** 2 + x.variance + y.variance
            truth = TransportTruth(cost, best, independent, 2.0 * tail, y.variance, quantile_map)
        else:
            independent = float(
                sum(
                    w * v * mean_distance(abs(m - n), float((s**2 + t**2) ** 0.5), 1)
                    for w, m, s in zip(x.weights, x.means, x.stds, strict=True)
                    for v, n, t in zip(y.weights, y.means, y.stds, strict=True)
                )
            )
            truth = TransportTruth(cost, best, independent, 1.0, y.variance, None)
    return TransportProblem(1, x.draw, y.draw, truth)


def mixture1(cost: str | None = "squared") -> TransportProblem:
    """N(0, 1) to N(1, 1/4) and N(4, 1/4), half each: squared 6.776 (independent 9.75), absolute 2.5 (2.61)."""
    return mixtures(
        Mixture(np.ones(1), np.zeros(1), np.ones(1)),
        Mixture(np.array([0.5, 0.5]), np.array([1.0, 4.0]), np.array([0.5, 0.5])),
        cost,
    )


def make_problem(name: str, dim: int | None = None, cost: str | None = "squared", seed: int = 0) -> TransportProblem:
    """A problem by name.

    Args:
        name: "bures2", "gaussians" (D = ``dim``, 8 if None, instance ``seed``), "shift" (D = ``dim``, 2 if None) or
            "mixture1".
        dim: D, where the problem has a choice.
        cost: whose truth is wanted, or None.
        seed: of the instance.

    Raises:
        ValueError: for another name, a ``dim`` that the problem does not have, or another cost.

    Example:
        >>> truth = make_problem("bures2").truth
        >>> round(truth.cost, 4), round(truth.independent_cost, 2)
        (5.6737, 9.3)
    """
    check_choice(("squared", "euclidean", None), cost=cost)
    fixed = {"bures2": 2, "mixture1": 1}
    if dim is not None and (dim < 1 or fixed.get(name, dim) != dim):
        wanted = f"{fixed[name]} or None" if name in fixed else "at least 1"
        raise ValueError(f"Expected argument `dim` of problem {name!r} to be {wanted} but got {dim!r}.")
    make: dict[str, Callable[[], TransportProblem]] = {
        "bures2": lambda: bures2(cost),
        "gaussians": lambda: random_gaussians(dim or 8, seed, cost),
        "shift": lambda: shifted_gaussians(dim or 2, cost=cost),
        "mixture1": lambda: mixture1(cost),
    }
    check_choice(make, problem=name)
    return make[name]()


# -- helpers, at the top level so that a problem can be pickled --------------------------------------------------------


def _root(matrix: Array) -> Array:
    values, vectors = linalg.eigh((matrix + matrix.T) / 2.0)
    return vectors * np.sqrt(np.clip(values, 0.0, None)) @ vectors.T


def _affine(x: Tensor, matrix: Array, offset: Array) -> Tensor:
    return (x.double() @ torch.from_numpy(matrix.T.copy()).to(x.device) + torch.from_numpy(offset).to(x.device)).to(x)


def _quantile_map(x_points: Tensor, x: Mixture, y: Mixture) -> Tensor:
    points = x_points.detach().cpu().double().numpy()
    # Beyond 8 standard deviations u would be 0 or 1 to rounding.
    u = np.clip(x.cdf(points), 1e-15, 1.0 - 1e-15)
    return torch.from_numpy(y.quantile(u)).to(x_points)


def _draw_gaussian(count: int, generator: np.random.Generator, mean: Array, root: Array) -> Array:
    return mean + generator.standard_normal((count, len(mean))) @ root.T


def _displacement_quantile(mean_x: Array, cov_x: Array, matrix: Array, offset: Array) -> float:
    """The 99.9 % quantile of |T(X) - X|, a Gaussian's norm, from 2^17 fixed draws (to about 1 %)."""
    x = _draw_gaussian(2**17, np.random.default_rng(0), mean_x, linalg.cholesky(cov_x, lower=True))
    return float(np.quantile(np.linalg.norm(x @ matrix.T + offset - x, axis=1), _TAIL))


def _weighted_quantile(values: Array, weights: Array, share: float) -> float:
    order = np.argsort(values)
    mass = np.cumsum(weights[order])
    return float(values[order][np.searchsorted(mass, share * mass[-1])])
