r"""Transport costs c(x, y) of pairs, one number a pair, and how a batch of them becomes a loss.

A cost is any callable of x, shape (B, ...), and y, shape (B, ...), that returns shape (B,) and that autograd follows.
arXiv:1905.00158 takes E c(G_X(Z), G_Y(Z)) for its objective; the authors' code has the Euclidean and the contour cost
of images, reduced otherwise (see :func:`reduce_cost`).
"""

from collections.abc import Callable
from copy import deepcopy
from importlib import import_module
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_rectify.arguments import check_choice, check_types

CostFunction = Callable[[Tensor, Tensor], Tensor]
Reduction = Literal["mean", "released"]


def squared_cost(x: Tensor, y: Tensor) -> Tensor:
    r""":math:`c = \lVert x - y \rVert_2^2` of tensors of one shape (B, ...); shape (B,)."""
    _same_shape(x, y)
    return (x - y).flatten(1).square().sum(dim=1)


def euclidean_cost(x: Tensor, y: Tensor) -> Tensor:
    r""":math:`c = \lVert x - y \rVert_2` of tensors of one shape (B, ...); shape (B,). Flat where x = y."""
    _same_shape(x, y)
    return torch.linalg.vector_norm((x - y).flatten(1), dim=1)


class ContourCost(nn.Module):
    r"""The distance of two images' contours: of what the two Sobel filters make of them.

    .. math:: c(x, y) = \sum_{f \in \{\text{horizontal}, \text{vertical}\}} \lVert f * (x - y) \rVert_2

    The cost that keeps the drawing and leaves the colours free. As in the authors' code of arXiv:1905.00158 the
    channels are summed and borders are left out; there only for three channels, and with one norm for the whole batch.
    """

    kernels: Tensor

    def __init__(self) -> None:
        super().__init__()
        horizontal = torch.tensor([[1.0, 0.0, -1.0], [2.0, 0.0, -2.0], [1.0, 0.0, -1.0]])
        self.register_buffer("kernels", torch.stack([horizontal, horizontal.T])[:, None], persistent=False)

    def contours(self, images: Tensor) -> Tensor:
        """Both filters' answers to images (B, C, H, W), shape (B, 2, H - 2, W - 2).

        Raises:
            ValueError: for tensors that are no images, or smaller than 3 by 3.
        """
        if images.ndim != 4 or min(images.shape[2:]) < 3:
            raise ValueError(
                "Expected the `contour` cost's tensors to be images of shape (B, C, H, W), H and W at least 3, but got "
                f"{tuple(images.shape)}."
            )
        return F.conv2d(images.sum(dim=1, keepdim=True), self.kernels.to(images))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Costs (B,) of images of one shape (B, C, H, W)."""
        _same_shape(x, y)
        return torch.linalg.vector_norm(self.contours(x - y).flatten(2), dim=2).sum(dim=1)


class FeatureCost(nn.Module):
    r""":math:`c = \lVert \phi_X(x) - \phi_Y(y) \rVert_2^2` of features; x and y may have different shapes.

    Args:
        features: x, shape (B, ...), to features of x (B, ...); copied and frozen, in evaluation mode.
        features_y: the same of y; None for ``features``.
    """

    def __init__(self, features: nn.Module, features_y: nn.Module | None = None) -> None:
        check_types(FeatureCost, locals())
        super().__init__()
        self.features_x = deepcopy(features).requires_grad_(False).eval()
        self.features_y = self.features_x if features_y is None else deepcopy(features_y).requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "FeatureCost":
        """Stays in evaluation mode: a cost that changes with the batch is none."""
        return super().train(False)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Costs (B,)."""
        return squared_cost(self.features_x(x), self.features_y(y))


#: the costs that have a name
COSTS: dict[str, Callable[[], CostFunction]] = {
    "squared": lambda: squared_cost,
    "euclidean": lambda: euclidean_cost,
    "contour": ContourCost,
}


def get_cost(cost: str | CostFunction) -> tuple[str, CostFunction]:
    """A cost and its name.

    Args:
        cost: "squared", "euclidean", "contour"; a callable, which is named after itself; or a callable's import path.

    Raises:
        ValueError: if it is neither.

    Example:
        >>> name, cost = get_cost("euclidean")
        >>> cost(torch.tensor([[0.0, 0.0]]), torch.tensor([[3.0, 4.0]]))
        tensor([5.])
    """
    if isinstance(cost, str) and cost in COSTS:
        return cost, COSTS[cost]()
    if isinstance(cost, str) and "." in cost:
        module, _, attribute = cost.rpartition(".")
        try:
            cost = getattr(import_module(module), attribute)
        except (ImportError, AttributeError) as error:
            raise ValueError(f"Expected argument `cost` to be a function's import path but got {cost!r}.") from error
    if isinstance(cost, str) or not callable(cost):
        raise ValueError(
            f"Expected argument `cost` to be one of {', '.join(COSTS)} or a function of x and y but got {cost!r}."
        )
    for name, function in (("squared", squared_cost), ("euclidean", euclidean_cost)):
        if cost is function:
            return name, cost
    if isinstance(cost, ContourCost):
        return "contour", cost
    return getattr(cost, "__qualname__", type(cost).__qualname__), cost


def check_reduction(reduction: str, name: str) -> None:
    """Raise unless ``reduction`` is known, and for this cost.

    Args:
        reduction: of :func:`reduce_cost`.
        name: of the cost.

    Raises:
        ValueError: if not.
    """
    check_choice(("mean", "released"), reduction=reduction)
    if reduction == "released" and name not in ("euclidean", "contour"):
        raise ValueError(
            "Expected argument `reduction` to be 'mean' for a cost that the authors' code does not have (it has "
            f"euclidean and contour) but got 'released' with cost {name!r}."
        )


def costs_of(cost: CostFunction, x: Tensor, y: Tensor) -> Tensor:
    """The cost of each pair, shape (B,), checked.

    Args:
        cost: of x and y.
        x: shape (B, ...).
        y: shape (B, ...).

    Raises:
        ValueError: if the cost does not return one number a pair.
    """
    values = cost(x, y)
    if not isinstance(values, Tensor) or values.shape != (len(x),):
        got = tuple(values.shape) if isinstance(values, Tensor) else values
        raise ValueError(f"Expected argument `cost` to return one number a pair, shape ({len(x)},), but got {got!r}.")
    return values


def reduce_cost(cost: CostFunction, x: Tensor, y: Tensor, reduction: Reduction = "mean") -> Tensor:
    r"""The batch's cost, a scalar.

    "mean" is the paper's :math:`E\, c(X, Y)`. "released" is what the authors' code minimises instead: the norm of the
    difference of the *whole batch*, :math:`(\sum_b \lVert x_b - y_b \rVert^2)^{1/2}`, and so for each filter of the
    contour cost. It grows with the square root of the batch and is no mean of any cost: for parity only.

    Args:
        cost: of x and y.
        x: shape (B, ...).
        y: shape (B, ...).
        reduction: which of the two.

    Raises:
        ValueError: for another reduction, or "released" with another cost than Euclidean and contour.
    """
    name, cost = get_cost(cost)
    check_reduction(reduction, name)
    if reduction == "mean":
        return costs_of(cost, x, y).mean()
    if isinstance(cost, ContourCost):
        return torch.linalg.vector_norm(cost.contours(x - y).transpose(0, 1).flatten(1), dim=1).sum()
    _same_shape(x, y)
    return torch.linalg.vector_norm(x - y)


def gradient_norms(cost: CostFunction, x: Tensor, y: Tensor) -> Tensor:
    r"""How steep the cost is at each pair: the norm of its gradient, in x or in y, whichever is larger.

    Args:
        cost: of x and y.
        x: shape (B, ...); its graph is not followed.
        y: shape (B, ...); the same.

    Returns:
        Shape (B,), detached.
    """
    with torch.inference_mode(False), torch.enable_grad():
        x, y = (part.detach().clone().requires_grad_() for part in (x, y))
        slopes = torch.autograd.grad(costs_of(cost, x, y).sum(), (x, y))
    return torch.stack([slope.flatten(1).norm(dim=1) for slope in slopes]).amax(dim=0)


def _same_shape(x: Tensor, y: Tensor) -> None:
    if x.shape != y.shape:
        raise ValueError(
            f"Expected x and y of this cost to be of one shape but got {tuple(x.shape)}, {tuple(y.shape)}."
        )
