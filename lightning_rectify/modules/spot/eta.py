r"""eta, the largest slope that the multipliers may have: how large it must be, and how to tell that it is not.

With multipliers restricted to slope eta the game's value is

.. math:: \min_G E\, c(G_X, G_Y) + \eta\, W_1(G_X, \mu) + \eta\, W_1(G_Y, \nu),

which is the transport cost as soon as eta-Lipschitz potentials exist: eta at least the largest gradient of the cost on
the plan. Below that, pairs that lie too far apart pay for missing marginals instead: with the squared cost no
displacement exceeds eta / 2, and the reported cost is too *low* (the Huber function of the distances). A derivation of
ours; arXiv:1905.00158 is read as restricting the multipliers so, and its authors' code weighs the cost instead, by
1 / eta = 5e-4 in units of a clipped critic's unknown slope.
"""

import warnings

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from lightning_rectify.modules.spot.costs import CostFunction, costs_of, gradient_norms

#: eta = FACTOR * largest gradient on the small exact plan, whose few hundred points do not reach the tails
FACTOR = 2.5
_POINTS = 300
_NUMBERS = 2**28  # differences of all pairs, computed in all: keeps images to a second or two
_CHUNK = 2**22  # of which so many at one time


class EtaWarning(UserWarning):
    """eta is too small for the transport at hand: the reported cost is biased down."""


def exact_pairs(cost: CostFunction, x: Tensor, y: Tensor, points: int = _POINTS) -> tuple[Tensor, Tensor]:
    """The optimal pairs of a few samples, by the Hungarian method (scipy's ``linear_sum_assignment``).

    Args:
        cost: of x and y.
        x: samples, shape (N, ...); the first ``points`` are taken, fewer if they are large (images).
        y: samples, shape (M, ...); as many.
        points: at least 1.

    Returns:
        The same number of x and y, row by row the pairs of the plan.

    Raises:
        ValueError: without samples, and for a cost that is not finite.
    """
    largest = max(x[:1].numel(), y[:1].numel(), 1)
    count = min(len(x), len(y), points, max(int((_NUMBERS / largest) ** 0.5), 2))
    if count < 1:
        raise ValueError(f"Expected samples of both sides but got {len(x)} and {len(y)}.")
    x, y = x[:count], y[:count]
    rows = max(_CHUNK // (count * largest), 1)
    with torch.no_grad():
        matrix = torch.cat(
            [
                costs_of(cost, some.repeat_interleave(count, dim=0), y.repeat(len(some), *[1] * (y.ndim - 1)))
                for some in x.split(rows)
            ]
        ).view(count, count)
    if not torch.isfinite(matrix).all():
        raise ValueError("Expected argument `cost` to be finite on the samples but got NaN or infinity.")
    _, columns = linear_sum_assignment(matrix.double().cpu().numpy())
    return x, y[torch.as_tensor(columns, device=y.device)]


def largest_gradient(cost: CostFunction, x: Tensor, y: Tensor, points: int = _POINTS) -> float:
    """The largest gradient of the cost, in x or y, on the small exact plan of :func:`exact_pairs`.

    A lower bound of what eta must be: the plan of a few hundred points has no far tails.

    Args:
        cost: of x and y.
        x: samples, shape (N, ...).
        y: samples, shape (M, ...).
        points: samples taken, at least 1.
    """
    return float(gradient_norms(cost, *exact_pairs(cost, x, y, points)).max())


def automatic_eta(gradient: float, scale: float = 1.0) -> float:
    """Eta of ``eta="auto"``: 2.5 times the largest gradient on a small exact plan.

    Args:
        gradient: of :func:`largest_gradient`. Where it is 0 (both sides are the same points) any eta is large enough,
            and it is ``scale``.
        scale: above 0, in the units of a cost's gradient.

    Example:
        >>> automatic_eta(4.0)
        10.0
    """
    return FACTOR * gradient if gradient > 0 else scale


def huber_cost(distances: Tensor, eta: float) -> Tensor:
    r"""What a pair at optimal distance r costs in the end under eta, for the squared cost.

    The *reported* cost E c is that of displacements capped at eta / 2, :math:`\min(r, \eta/2)^2`. (The relaxed value,
    marginals paid for, is :math:`r^2` up to there and :math:`\eta r - \eta^2/4` beyond.)

    Args:
        distances: r of the optimal plan, any shape, at least 0.
        eta: above 0.

    Returns:
        The reported cost of each pair, the same shape. A prediction, not a bound: it takes the plan's directions as
        they are.

    Example:
        >>> huber_cost(torch.tensor([1.0, 3.0]), eta=4.0)
        tensor([1., 4.])
    """
    return distances.clamp(max=eta / 2).square()


def warn_if_binding(gradients: Tensor, eta: float) -> bool:
    """Warn if generated pairs are as steep as eta lets them be.

    That is: if the steepest exceeds eta, or more than 2 % of them 0.85 of it. (Critics reach about 0.9 of the slope
    they are allowed: pairs then pile up below eta.)

    Args:
        gradients: of the cost at generated pairs, shape (B,).
        eta: that training works with.

    Returns:
        Whether it warned.
    """
    steepest = float(gradients.max())
    if steepest <= eta and float((gradients > 0.85 * eta).double().mean()) <= 0.02:
        return False
    warnings.warn(
        f"The cost's gradient at generated pairs reaches {steepest:.3g} with eta = {eta:.3g}: eta holds them back, and "
        "the cost is biased down. Take a larger eta, 2 to 3 times the largest gradient, or 'auto'.",
        EtaWarning,
        stacklevel=2,
    )
    return True


def warn_if_small(gradient: float, eta: float) -> bool:
    """Warn if the small exact plan has steeper pairs than eta allows.

    Args:
        gradient: of :func:`largest_gradient`.
        eta: that training is to work with.

    Returns:
        Whether it warned.
    """
    if gradient <= eta:
        return False
    warnings.warn(
        f"eta = {eta:.3g} is below {gradient:.3g}, the largest gradient of the cost on an exact plan of a few samples: "
        f"the cost will be biased down. 'auto' would take {automatic_eta(gradient):.3g}.",
        EtaWarning,
        stacklevel=2,
    )
    return True
