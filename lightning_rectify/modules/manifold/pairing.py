"""Pairing: a local network's value times the weight of its chart."""

import torch
from torch import Tensor, nn

from lightning_rectify.modules.manifold.blocks import Product, ProductForm
from lightning_rectify.modules.manifold.graph import Affine


class ProductPairing(nn.Module):
    r"""The approximate product of value and weight (arXiv:1908.01842, step 5); exactly 0 where the weight is 0.

    Args:
        levels: of the product.
        bound: F, at least the largest absolute value; the weight is in [0, 1].
        form: of the product.
        scaled: take :math:`F \cdot \hat\times(v/F, w)`, with an error of F times a unit product's (ours), in place of
            the paper's product on [-M, M] with M = max(F, 1) and an error that grows with M².
    """

    def __init__(self, levels: int, bound: float, form: ProductForm, scaled: bool) -> None:
        super().__init__()
        self.scale, self.scaled = (bound or 1.0) if scaled else 1.0, scaled
        self.product = Product(levels, 1.0 if scaled else max(bound, 1.0), form)

    @property
    def error(self) -> float:
        """Largest error where the value is within the bound."""
        return self.scale * self.product.error

    def forward(self, value: Tensor, weight: Tensor) -> Tensor:
        """The product (P,) of values (P,) and weights (P,)."""
        return self.scale * self.product(value / self.scale, weight)

    def on(self, value: Affine, weight: Affine) -> Affine:
        """Place the units; the value is first put on units of its own, as the squares read it four times."""
        value = (value * (1.0 / self.scale)).held(1.0 if self.scaled else None)
        return self.product.on(value, weight) * self.scale


class ClampPairing(nn.Module):
    r""":math:`\sigma(v - F(1 - w)) - \sigma(-v - F(1 - w))`: v at w = 1, 0 at w = 0, exactly; ours.

    Between, it is smaller than v in absolute value: right where v is 0 unless w = 1 (a buffered gate).

    Args:
        bound: F, at least the largest absolute value on all inputs; a smaller one leaks from far charts.
    """

    bound: Tensor

    def __init__(self, bound: float) -> None:
        super().__init__()
        self.register_buffer("bound", torch.tensor(bound, dtype=torch.float64))

    @property
    def error(self) -> float:
        """It is exact."""
        return 0.0

    def forward(self, value: Tensor, weight: Tensor) -> Tensor:
        """The gated values (P,) of values (P,) and weights (P,)."""
        shut = self.bound * (1.0 - weight)
        return (value - shut).relu() - (-value - shut).relu()

    def on(self, value: Affine, weight: Affine) -> Affine:
        """Place two units a chart."""
        levels = value.graph.levels
        if len(value.cols) and levels[value.cols].max() < levels[weight.cols].max():
            value = value.held(self.bound.item())  # one unit a chart waits, not all cells
        bound = self.bound.item()
        shut = weight * -bound + bound
        return (value - shut).relu() - (-value - shut).relu()
