"""``FactoredTaylorNet``: the sum of Taylor polynomials with one product a cell in place of one a coefficient; ours."""

import math
from typing import Any

import torch
from torch import Tensor

from lightning_rectify.modules.manifold.blocks import ProductForm
from lightning_rectify.modules.manifold.graph import Affine
from lightning_rectify.modules.manifold.local import TaylorNet, _parent, grid_nodes


class FactoredTaylorNet(TaylorNet):
    r""":math:`\sum_m \zeta_m(z)\, P_m(z)` with :math:`P_m` a linear map of powers of z that all cells have in common.

    The proof computes each :math:`\zeta_m (z - m/N)^a` by a chain of products of its own. Here a chart computes
    :math:`z^a` once, for all its cells; a polynomial around m/N is then a unit with A weights, and a cell needs d
    products and not :math:`d - 1 + A - 1` or more. For d = 2 and degree 2 that is a third of the weights.

    The arguments are those of :class:`TaylorNet`, with shared chains.
    """

    moves: Tensor

    def __init__(self, coefficients: Tensor, dim: int, grid: int, degree: int, levels: int, form: ProductForm) -> None:
        super().__init__(coefficients, dim, grid, degree, levels, form, shared=True)
        #: coordinates are divided by this, so that all that a trapezoid reaches is in [0, 1]
        self.span = 1.0 + 2.0 / (3.0 * grid)
        self.register_buffer("moves", self._moves().to(coefficients), persistent=False)

    def _moves(self) -> Tensor:
        """Matrices (cells, A, A) from coefficients of (z - m/N)^a to those of (z / span)^b."""
        nodes = grid_nodes(self.dim, self.grid)
        moves = torch.zeros(len(nodes), len(self.exponents), len(self.exponents), dtype=torch.float64)
        for target, b in enumerate(self.exponents):
            for source, a in enumerate(self.exponents):
                if all(low <= high for low, high in zip(b, a, strict=True)):
                    factor = math.prod(math.comb(high, low) for low, high in zip(b, a, strict=True))
                    powers = [(-nodes[:, k]) ** (a[k] - b[k]) for k in range(self.dim)]
                    moves[:, target, source] = factor * self.span ** sum(b) * torch.stack(powers).prod(0)
        return moves

    def forward(self, z: Tensor, charts: Tensor) -> Tensor:
        """See :meth:`LocalNet.forward`."""
        z = z.clamp(min=0.0)
        powers = torch.stack(self._powers([z[:, k] / self.span for k in range(self.dim)], torch.ones_like(z[:, 0])), 1)
        scale, low, total = self._scale(), (z.detach() * self.grid).floor(), z.new_zeros(len(z))
        for corner in torch.cartesian_prod(*[torch.arange(2)] * self.dim).reshape(-1, self.dim).to(z):
            node = low + corner
            inside = (node <= self.grid).all(1)
            node = node.clamp(max=self.grid)
            psi = [self.trapezoid(3.0 * (self.grid * z[:, k] - node[:, k])) for k in range(self.dim)]
            zeta = self._chains(psi, [], self.product, only=(0,) * self.dim)[0]
            zeta = zeta.relu() if self.dim > 1 else zeta
            cell = node.long() @ self._strides(z.device)
            moved = torch.einsum("pba,pa->pb", self.moves[cell], self.coefficients[charts, cell])
            value = scale * self.product(zeta, (moved * powers).sum(1) / scale)
            total = total + torch.where(inside, value, torch.zeros_like(value))
        return total

    def on(self, z: Affine, prune: bool = True) -> Affine:
        """See :meth:`LocalNet.on`."""
        charts, cells = self._alive(prune)
        z, count, scale = z.relu(), len(self.coefficients), self._scale()
        columns = [z[torch.arange(count) * self.dim + k] * (1.0 / self.span) for k in range(self.dim)]
        powers = self._powers(columns, z.graph.constant(torch.ones(count)))
        moved = torch.einsum("pba,pa->pb", self.moves[cells], self.coefficients.detach()[charts, cells])
        moved = moved.double().cpu() / scale
        value = z.graph.constant(torch.zeros(len(cells)))
        for index, power in enumerate(powers):
            value = value + power[charts] * moved[:, index]
        node = torch.stack([cells // stride % (self.grid + 1) for stride in self._strides("cpu").tolist()], 1)
        coordinate = charts[:, None] * self.dim + torch.arange(self.dim)
        all_psi = self._trapezoids(z)
        psi = [all_psi[coordinate[:, k] * (self.grid + 1) + node[:, k]] for k in range(self.dim)]
        zeta = self._chains(psi, [], self.product.on, only=(0,) * self.dim)[0]
        paired = self.product.on(zeta, value.held(1.0))
        return (paired * scale).summed(charts, count)

    def bound(self) -> float:
        """Where trapezoids are not 0 no polynomial exceeds this, and their weights sum to at most 1."""
        return self._largest() + self.error()

    def error(self) -> float:
        """Of up to 2^d cells: their polynomial's by the powers, and d products of numbers within the scale."""
        return 2.0**self.dim * (self._powers_error() + self.dim * self._scale() * self.product.error)

    def _powers(self, coordinates: list, one: Tensor | Affine) -> list:
        """All monomials, each from one of a lower degree; of tensors, or of values of a graph."""
        product: Any = self.product.on if isinstance(one, Affine) else self.product
        done = {(0,) * self.dim: one}
        for a in self.exponents[1:]:
            before, k = _parent(a)
            # not negative, so the units between cost one each
            done[a] = coordinates[k] if sum(a) == 1 else product(done[before], coordinates[k]).relu()
        return list(done.values())

    def _largest(self) -> float:
        """Largest value of an exact polynomial where its trapezoids are not 0."""
        size = torch.tensor([(2.0 / (3.0 * self.grid)) ** sum(a) for a in self.exponents]).to(self.coefficients)
        return (self.coefficients.detach().abs() @ size).max().item()

    def _powers_error(self) -> float:
        """Largest error of a polynomial by its approximate powers, one product's for each factor after the first."""
        chain = torch.tensor([max(sum(a) - 1.0, 0.0) for a in self.exponents]).to(self.coefficients)
        moved = torch.einsum("mba,cma->cmb", self.moves, self.coefficients.detach())
        return (moved.abs() @ chain).max().item() * self.product.error

    def _scale(self) -> float:
        """What polynomials are divided by, so that a product takes them."""
        return self._largest() + self._powers_error() or 1.0
