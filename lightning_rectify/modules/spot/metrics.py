"""What tells whether a generated plan is one: marginals against their finite-sample floor, regret, L2-UVP.

A cost alone says nothing: it falls as the marginals are missed. And with nearly right marginals a *bad* plan may cost
hardly more than the best (two far Gaussians: the independent coupling 4 %), which the regret shows.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from lightning_rectify.modules.spot.costs import CostFunction, costs_of


class Truth(Protocol):
    """What is known of a problem with a known answer; a data module's ``truth``.

    Attributes:
        cost: of the optimal plan.
        independent_cost: of the independent coupling.
        variance_y: E|Y - E Y|^2.
        map: x, shape (N, ...), to the optimal plan's y, where it is a map; else None.
    """

    @property
    def cost(self) -> float: ...  # noqa: D102
    @property
    def independent_cost(self) -> float: ...  # noqa: D102
    @property
    def variance_y(self) -> float: ...  # noqa: D102
    @property
    def map(self) -> Callable[[Tensor], Tensor] | None: ...  # noqa: D102


def sliced_w1(a: Tensor, b: Tensor, directions: int = 128, seed: int = 0) -> float:
    r"""The Wasserstein-1 distance of two samples, in one dimension exact, else the mean over random projections.

    .. math:: SW_1 = E_\theta\, W_1(\theta^\top A, \theta^\top B), \qquad \theta \text{ uniform on the sphere}

    At most W1 itself; in D dimensions a shift by t has about :math:`t \sqrt{2 / (\pi D)}`.

    Args:
        a: shape (N, ...), taken as vectors.
        b: the same shape: N sorted numbers against N.
        directions: projections, at least 1.
        seed: of the projections, which are the same on every device.

    Returns:
        At least 0, in the units of the data.

    Raises:
        ValueError: if the shapes differ.

    Example:
        >>> sliced_w1(torch.tensor([[0.0], [1.0]]), torch.tensor([[3.0], [2.0]]))
        2.0
    """
    if a.shape != b.shape:
        raise ValueError(
            f"Expected argument `b` to be of the shape of `a`, {tuple(a.shape)}, but got {tuple(b.shape)}."
        )
    a, b = a.flatten(1).double(), b.flatten(1).double()
    if a.shape[1] > 1:
        generator = torch.Generator().manual_seed(seed)
        theta = torch.randn(a.shape[1], directions, generator=generator, dtype=torch.float64)
        theta = (theta / theta.norm(dim=0)).to(a.device)
        a, b = a @ theta, b @ theta
    return (a.sort(dim=0).values - b.sort(dim=0).values).abs().mean().item()


def marginal_gap(generated: Tensor, real: Tensor) -> tuple[float, float]:
    """How far generated points are from real ones, and how far real ones are from each other.

    The real points are cut in two halves of m. The gap is the mean of the sliced W1 of m generated points and the one
    half, and of m others and the other half; the floor is that of the two halves. A perfect generator's gap is a draw
    like the floor, not 0.

    Args:
        generated: shape (N, ...); as many as there are real ones, or more.
        real: shape (N', ...), at least 2.

    Returns:
        Gap and floor.

    Raises:
        ValueError: for fewer than 2 points, or fewer generated than real ones.
    """
    half = len(real) // 2
    if half < 1 or len(generated) < 2 * half:
        raise ValueError(
            f"Expected at least 2 real points and as many generated ones but got {len(real)} and {len(generated)}."
        )
    first, second = real[:half], real[half : 2 * half]
    gap = (sliced_w1(generated[:half], first) + sliced_w1(generated[half : 2 * half], second)) / 2.0
    return gap, sliced_w1(first, second)


def l2_uvp(x: Tensor, y: Tensor, map: Callable[[Tensor], Tensor], variance_y: float) -> float:
    r"""Unexplained variance of a plan against the optimal map, in percent.

    .. math:: 100\, E \lVert Y - T(X) \rVert^2 / \mathrm{Var}(\nu)

    Korotin et al. 2021 (arXiv:2106.01954), there for maps; the constant prediction has 100. Here (X, Y) are generated
    pairs: a plan that is no map, or misses its marginals, shows as well.

    Args:
        x: generated, shape (N, ...).
        y: their partners, shape (N, ...).
        map: the optimal T.
        variance_y: :math:`\mathrm{Var}(\nu) = E \lVert Y - E Y \rVert^2`, above 0.
    """
    return 100.0 * (y - map(x)).flatten(1).double().square().sum(dim=1).mean().item() / variance_y


def regret(cost: float, truth: float, independent: float) -> float:
    """Where a cost lies between the best coupling, 0, and the independent one, 1; below 0 where marginals are missed.

    Example:
        >>> regret(6.0, truth=5.0, independent=9.0)
        0.25
    """
    return (cost - truth) / (independent - truth)


def independent_cost(cost: CostFunction, x: Tensor, y: Tensor, seed: int = 0, rounds: int = 8) -> float:
    """The cost of the independent coupling of two samples, from pairs drawn at random.

    Args:
        cost: of x and y.
        x: shape (N, ...).
        y: shape (M, ...).
        seed: of the pairs.
        rounds: pairs drawn, in multiples of min(N, M).
    """
    generator = torch.Generator().manual_seed(seed)
    count, total = min(len(x), len(y)), 0.0
    for _ in range(rounds):
        rows, columns = (torch.randperm(len(part), generator=generator)[:count] for part in (x, y))
        with torch.no_grad():
            total += costs_of(cost, x[rows.to(x.device)], y[columns.to(y.device)]).double().mean().item()
    return total / rounds


@dataclass(frozen=True)
class TransportEstimate:
    """A transport cost with what it takes to believe it.

    Attributes:
        value: mean cost of generated pairs.
        low: lower end of the 95 % interval of that mean. It speaks of the draw of latents alone: not of training, not
            of missed marginals, not of the data's own sampling.
        high: upper end.
        count: generated pairs.
        marginal_gap_x: distance of the generated x from the data, see :func:`marginal_gap`; None without data.
        marginal_floor_x: the same of two halves of the data.
        marginal_gap_y: of y.
        marginal_floor_y: of y.
        independent_cost: of pairing the data at random; None without data. A cost near it may be no coupling at all.
        eta: that it was trained with.
    """

    value: float
    low: float
    high: float
    count: int
    marginal_gap_x: float | None = None
    marginal_floor_x: float | None = None
    marginal_gap_y: float | None = None
    marginal_floor_y: float | None = None
    independent_cost: float | None = None
    eta: float | None = None

    def __float__(self) -> float:
        return self.value


def estimate(
    cost: CostFunction, pairs: tuple[Tensor, Tensor], data: tuple[Tensor, Tensor] | None, eta: float
) -> TransportEstimate:
    """The estimate from generated pairs and, for the marginals, samples of both sides.

    Args:
        cost: of x and y.
        pairs: generated x and y, shapes (N, ...), N at least 2.
        data: samples of both sides, or None.
        eta: that the plan was trained with.
    """
    with torch.no_grad():
        costs = torch.cat([costs_of(cost, *part) for part in zip(*(side.split(1000) for side in pairs), strict=True)])
    costs = costs.double()
    value, half = costs.mean().item(), 1.96 * costs.std().item() / len(costs) ** 0.5
    more: dict[str, Any] = {}
    if data is not None:
        for name, generated, real in zip(("x", "y"), pairs, data, strict=True):
            gap = marginal_gap(generated, real[: len(generated)].to(generated))
            more[f"marginal_gap_{name}"], more[f"marginal_floor_{name}"] = gap
        both = [real.to(pairs[0]) for real in data]
        more["independent_cost"] = independent_cost(cost, both[0], both[1])
    return TransportEstimate(value, value - half, value + half, len(costs), **more, eta=eta)
