r"""Critics, the multipliers of the two marginals, and what keeps their slope at most 1.

A critic f maps x, shape (B, ...), to scores (B,). With 1-Lipschitz critics the game's value is the relaxed one,
:math:`E\,c + \eta\,(W_1 + W_1)` (see ``eta.py``). No constraint here makes a critic's loss a Wasserstein distance:
"spectral" attenuates, "gradient_penalty" is soft, "clip" bounds by an unknown constant.
"""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lightning_rectify.arguments import check_choice, check_least
from lightning_rectify.modules.spot.networks import dcgan_start, image_side, make_norm
from lightning_rectify.nn.spectral import matrix_layers, spectral_control

Constraint = Literal["spectral", "gradient_penalty", "groupsort", "clip"]
CONSTRAINTS = ("spectral", "gradient_penalty", "groupsort", "clip")


class GroupSort(nn.Module):
    """Sorts each pair of neighbouring channels, larger first: 1-Lipschitz, and keeps the gradient's norm.

    Anil et al. 2019 (arXiv:1811.05381), section 4.1, with groups of two (there also called MaxMin).
    """

    def forward(self, x: Tensor) -> Tensor:
        """Features of shape (B, C, ...), C even, sorted by pairs along C."""
        first, second = x.unflatten(1, (-1, 2)).unbind(2)
        return torch.stack([torch.maximum(first, second), torch.minimum(first, second)], dim=2).flatten(1, 2)


class Bjorck(nn.Module):
    r"""A layer's weight, brought near an orthonormal matrix by Bjorck and Bowie's iteration; never above norm 1.

    .. math:: W \leftarrow W \left(\tfrac32 I - \tfrac12 W^\top W\right), \qquad
        W_0 = W / \sqrt{\lVert W \rVert_1 \lVert W \rVert_\infty}

    Anil et al. 2019 (arXiv:1811.05381), section 4.2, order 1. The start has singular values of at most 1, and from
    there none passes 1, however few the iterations. A convolution's matrix has a row an output channel; each input
    value enters at most ceil(k / stride) outputs along an axis, and the weight is divided by the square root of their
    number, so that the convolution has norm at most 1 as well (ours).

    Args:
        iterations: at least 1.
        overlap: windows that one input value is in; 1 for a linear layer.
    """

    def __init__(self, iterations: int = 12, overlap: int = 1) -> None:
        super().__init__()
        self.iterations, self.overlap = iterations, overlap

    def forward(self, weight: Tensor) -> Tensor:
        """The weight that the layer works with, of the same shape."""
        matrix = weight.flatten(1)
        wide = matrix.shape[0] < matrix.shape[1]
        matrix = matrix.T if wide else matrix  # the Gram matrix of the shorter side
        bound = (matrix.abs().sum(dim=0).max() * matrix.abs().sum(dim=1).max()).sqrt()
        matrix = matrix / bound.clamp_min(torch.finfo(matrix.dtype).tiny)
        for _ in range(self.iterations):
            matrix = 1.5 * matrix - 0.5 * matrix @ (matrix.T @ matrix)
        return (matrix.T if wide else matrix).reshape(weight.shape) / math.sqrt(self.overlap)


class MLPCritic(nn.Module):
    """A multilayer perceptron of x, flat.

    The last layer has no bias: scores of data and of generated points cancel it, and an optimizer that divides by the
    gradient's size would make a random walk of its rounding.

    Args:
        shape: of one x.
        width: of each hidden layer, at least 1; even with ``activation=GroupSort``.
        depth: hidden layers, at least 1.
        activation: makes one activation, of slope at most 1.
    """

    def __init__(
        self, shape: Sequence[int], width: int, depth: int, activation: Callable[[], nn.Module] = nn.ReLU
    ) -> None:
        super().__init__()
        sizes = [math.prod(shape), *[width] * depth]
        layers: list[nn.Module] = []
        for into, out in pairwise(sizes):
            layers += [nn.Linear(into, out), activation()]
        self.layers = nn.Sequential(*layers, nn.Linear(width, 1, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        """Scores (B,) of x, shape (B, *shape)."""
        return self.layers(x.flatten(1))[:, 0]


class ConvCritic(nn.Module):
    """DCGAN's critic of images: convolutions of 4 x 4 that halve the side down to 4, and one that is left.

    Channels double from ``width`` up. The authors' code of arXiv:1905.00158 has width 64, LeakyReLU(0.2) and batch
    norm behind all layers but the first and the last.

    Args:
        shape: (C, S, S), S a power of two, at least 8.
        width: channels of the first layer, at least 1; even with ``activation=GroupSort``.
        norm: "batch" or "none".
        activation: makes one activation, of slope at most 1.
    """

    def __init__(
        self, shape: Sequence[int], width: int, norm: str, activation: Callable[[], nn.Module] = nn.ReLU
    ) -> None:
        super().__init__()
        side = image_side("shape", shape)
        layers: list[nn.Module] = [nn.Conv2d(shape[0], width, 4, 2, 1, bias=norm == "none"), activation()]
        while (side := side // 2) > 4:
            norms = [make_norm(norm, 2 * width)] if norm != "none" else []
            layers += [nn.Conv2d(width, 2 * width, 4, 2, 1, bias=norm == "none"), *norms, activation()]
            width *= 2
        self.layers = nn.Sequential(*layers, nn.Conv2d(width, 1, 4, bias=False))
        self.apply(dcgan_start)

    def forward(self, x: Tensor) -> Tensor:
        """Scores (B,) of images (B, C, S, S)."""
        return self.layers(x).flatten()


class CriticPair(nn.Module):
    """Both critics, one player.

    Args:
        x: critic of x: shape (B, ...) to scores (B,).
        y: critic of y.
    """

    def __init__(self, x: nn.Module, y: nn.Module) -> None:
        super().__init__()
        self.x, self.y = x, y

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Scores of x and of y."""
        return self.x(x), self.y(y)


def build_critics(
    network: str | nn.Module,
    shape_x: Sequence[int],
    shape_y: Sequence[int],
    constraint: Constraint = "spectral",
    width: int = 64,
    depth: int = 2,
    norm: str = "none",
) -> nn.Module:
    """A pair of critics by name, or one of the user's, under a constraint.

    Args:
        network: "mlp", "conv", or a module that maps x and y to a tuple of their scores.
        shape_x: of one x.
        shape_y: of one y.
        constraint: of :func:`constrain`. The critics by name take GroupSort under "groupsort", LeakyReLU(0.2) else.
        width: of hidden layers, or channels of the first convolution.
        depth: hidden layers of the "mlp".
        norm: of the "conv" critic, "batch" or "none".

    Raises:
        ValueError: for an argument outside its range.
    """
    check_constraint(constraint)
    check_least(1, critic_width=width, critic_depth=depth)
    if constraint == "groupsort" and width % 2:
        raise ValueError(f"Expected argument `critic_width` to be even with `groupsort` but got {width!r}.")
    check_choice(("batch", "none"), critic_norm=norm)
    if norm == "batch" and constraint != "clip":
        raise ValueError(
            "Expected argument `critic_norm` to be 'none' unless the constraint is 'clip' (a batch norm has no bounded "
            f"slope, and a penalty on each gradient has no meaning with it) but got 'batch' with {constraint!r}."
        )
    if isinstance(network, nn.Module):
        return constrain(network, constraint)
    activation: Callable[[], nn.Module] = GroupSort if constraint == "groupsort" else _leaky
    if network == "mlp":
        pair = CriticPair(*(MLPCritic(shape, width, depth, activation) for shape in (shape_x, shape_y)))
    elif network == "conv":
        pair = CriticPair(*(ConvCritic(shape, width, norm, activation) for shape in (shape_x, shape_y)))
    else:
        raise ValueError(f"Expected argument `critic` to be 'mlp', 'conv' or a module but got {network!r}.")
    return constrain(pair, constraint)


def _leaky() -> nn.Module:
    return nn.LeakyReLU(0.2)


def check_constraint(constraint: str) -> None:
    """Raise unless the constraint is known.

    Raises:
        ValueError: if it is not.
    """
    check_choice(CONSTRAINTS, constraint=constraint)


def constrain(network: nn.Module, constraint: Constraint) -> nn.Module:
    """Put the layers of a network under a constraint, in place.

    - "spectral": torch's spectral norm, one power iteration a forward. Bounds linear layers by 1; of a convolution it
      bounds the kernel as a matrix, and the layer by up to ceil(k / stride) times as much. As in the authors' code
      (SVHN to MNIST).
    - "groupsort": :class:`Bjorck` weights, started orthogonal; activations should be :class:`GroupSort`.
    - "gradient_penalty" and "clip": nothing here; see :func:`gradient_penalty` and :func:`clip_weights`.

    Args:
        network: with linear layers or convolutions.
        constraint: which.

    Returns:
        The same network.
    """
    check_constraint(constraint)
    if constraint == "spectral":
        spectral_control(network, "spectral_norm")
    elif constraint == "groupsort":
        for layer in matrix_layers(network).values():
            weight = layer.weight
            assert isinstance(weight, Tensor)
            nn.init.orthogonal_(weight)
            overlap = 1
            if isinstance(layer, nn.Conv2d):
                sizes = zip(layer.kernel_size, layer.stride, strict=True)
                overlap = math.prod(math.ceil(size / stride) for size, stride in sizes)
            elif not isinstance(layer, nn.Linear):
                raise ValueError(
                    "Expected argument `constraint` to be another than 'groupsort' for a critic with a "
                    f"{type(layer).__name__} but got 'groupsort', which knows Linear and Conv2d."
                )
            parametrize.register_parametrization(layer, "weight", Bjorck(overlap=overlap))
    return network


@torch.no_grad()
def clip_weights(network: nn.Module, bound: float) -> None:
    """Clip every parameter to [-bound, bound], gains and biases too, as the authors' code does (bound 0.01).

    Args:
        network: changed in place.
        bound: above 0.
    """
    for parameter in network.parameters():
        parameter.clamp_(-bound, bound)


def gradient_penalty(
    critics: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    real: tuple[Tensor, Tensor],
    fake: tuple[Tensor, Tensor],
    mix: Tensor,
) -> Tensor:
    r"""Mean of max(0, norm of the gradient - 1)^2 between real and generated points, of both critics together.

    .. math:: E[\max(0, \lVert \nabla f(\hat x) \rVert_2 - 1)^2], \qquad \hat x = u\, x + (1 - u)\, G(z)

    The one-sided form (Petzka et al. 2018, arXiv:1709.08894) of Gulrajani et al. 2017 (arXiv:1704.00028): a multiplier
    may be flatter than 1. Without its weight (10 there). The authors of arXiv:1905.00158 use none.

    Args:
        critics: x and y, shapes (B, ...), to scores (B,) each, each score of its own point only.
        real: x and y of the data; their graph is not followed.
        fake: generated x and y, the same shapes; their graph is not followed.
        mix: share u of the real point, uniform in [0, 1], shape (B,).

    Returns:
        A scalar; its gradient reaches the critics' parameters.
    """
    points = []
    for data, generated in zip(real, fake, strict=True):
        share = mix.view(-1, *[1] * (data.ndim - 1))
        points.append((share * data.detach() + (1.0 - share) * generated.detach()).requires_grad_())
    with torch.enable_grad():
        scores = critics(*points)
        slopes = torch.autograd.grad(scores[0].sum() + scores[1].sum(), points, create_graph=True)
    excess = [(slope.flatten(1).norm(dim=1) - 1.0).clamp_min(0.0).square().mean() for slope in slopes]
    return excess[0] + excess[1]
