r"""Local networks: one function of the coordinates z in [0, 1]^d for each of C charts.

All take ``forward(z, charts)``, P points z (P, d) with the chart of each, int64 (P,), and compute only the cells that
are not zero there; ``on`` places the units of all charts. Coordinates below 0 count as 0, as the units clip there.
"""

import itertools
from typing import Literal

import torch
from torch import Tensor, nn

from lightning_rectify.modules.manifold.blocks import Hat, Product, ProductForm, Trapezoid
from lightning_rectify.modules.manifold.graph import Affine, concatenated

LocalKind = Literal["taylor", "p1", "polynomial"]


def multi_indices(dim: int, degree: int) -> list[tuple[int, ...]]:
    """All exponents of d variables with a sum of at most ``degree``, by rising sum."""
    every = itertools.product(range(degree + 1), repeat=dim)
    return sorted((a for a in every if sum(a) <= degree), key=lambda a: (sum(a), tuple(-k for k in a)))


def grid_nodes(dim: int, grid: int) -> Tensor:
    """The points m/N of the grid {0, ..., N}^d, shape ((N + 1)^d, d); the last coordinate runs fastest."""
    axis = torch.arange(grid + 1, dtype=torch.float64) / grid
    return torch.stack(torch.meshgrid(*[axis] * dim, indexing="ij"), -1).reshape(-1, dim)


class LocalNet(nn.Module):
    """What all local networks have.

    Args:
        coefficients: one row of numbers a chart and cell, shape (C, cells, A).
        dim: d.
    """

    def __init__(self, coefficients: Tensor, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.coefficients = nn.Parameter(coefficients)

    def forward(self, z: Tensor, charts: Tensor) -> Tensor:
        """Values (P,) at P points."""
        raise NotImplementedError

    def on(self, z: Affine, prune: bool = True) -> Affine:
        """Place the units on C d coordinates (all of chart 0 first); C values.

        Args:
            z: the coordinates.
            prune: leave out cells whose coefficients are all zero. Without it the architecture does not depend on f.
        """
        raise NotImplementedError

    def bound(self) -> float:
        """At least the largest absolute value on all inputs, inside [0, 1]^d or not."""
        raise NotImplementedError

    def _alive(self, prune: bool) -> tuple[Tensor, Tensor]:
        """Chart and cell of all cells that get units."""
        used = (self.coefficients.detach() != 0).any(2) if prune else torch.ones_like(self.coefficients[:, :, 0]).bool()
        charts, cells = used.cpu().nonzero(as_tuple=True)
        return charts, cells


class TaylorNet(LocalNet):
    r"""Sums of Taylor polynomials by trapezoids, :math:`\sum_m \zeta_m(z) \sum_a c_{m,a} (z - m/N)^a`.

    :math:`\zeta_m(z) = \prod_k \psi(3N(z_k - m_k/N))`; each :math:`\zeta_m (z - m/N)^a` is a chain of d + |a| - 1
    approximate products (arXiv:1908.01842, step 3).

    Args:
        coefficients: c, shape (C, (N + 1)^d, A) with A = ``len(multi_indices(dim, degree))``.
        dim: d.
        grid: N, at least 1.
        degree: of the polynomials, at least 0.
        levels: of each product.
        form: of each product.
        shared: compute each :math:`\zeta_m` and each power once and use it in all chains that start with it; ours,
            with the same values. Without it every chain has its own units, as in the paper.
    """

    def __init__(
        self, coefficients: Tensor, dim: int, grid: int, degree: int, levels: int, form: ProductForm, shared: bool
    ) -> None:
        super().__init__(coefficients, dim)
        self.grid, self.degree, self.shared = grid, degree, shared
        self.exponents = multi_indices(dim, degree)
        self.trapezoid, self.product = Trapezoid(), Product(levels, 1.0, form)

    def forward(self, z: Tensor, charts: Tensor) -> Tensor:
        """See :meth:`LocalNet.forward`."""
        z = z.clamp(min=0.0)
        low = (z.detach() * self.grid).floor()
        total = z.new_zeros(len(z))
        for corner in itertools.product((0.0, 1.0), repeat=self.dim):
            node = low + torch.tensor(corner, dtype=z.dtype, device=z.device)
            inside = (node <= self.grid).all(1)
            node = node.clamp(max=self.grid)
            powers = self._chains(
                [self.trapezoid(3.0 * (self.grid * z[:, k] - node[:, k])) for k in range(self.dim)],
                [z[:, k] - node[:, k] / self.grid for k in range(self.dim)],
                self.product,
            )
            cell = node.long() @ self._strides(z.device)
            value = (self.coefficients[charts, cell] * torch.stack(powers, 1)).sum(1)
            total = total + torch.where(inside, value, torch.zeros_like(value))
        return total

    def on(self, z: Affine, prune: bool = True) -> Affine:
        """See :meth:`LocalNet.on`."""
        charts, cells = self._alive(prune)
        z = z.relu()
        node = torch.stack([cells // stride % (self.grid + 1) for stride in self._strides("cpu").tolist()], 1)
        coordinate = charts[:, None] * self.dim + torch.arange(self.dim)
        all_psi = self._trapezoids(z)
        psi = [all_psi[coordinate[:, k] * (self.grid + 1) + node[:, k]] for k in range(self.dim)]
        offset = [z[coordinate[:, k]] - node[:, k].double() / self.grid for k in range(self.dim)]
        if self.shared:
            powers = self._chains(psi, offset, self.product.on)
        else:
            powers = [self._chains(psi, offset, self.product.on, only=a)[-1] for a in self.exponents]
        values = self.coefficients.detach().double().cpu()[charts, cells]
        count = len(self.coefficients)
        total = z.graph.constant(torch.zeros(count))
        for index, power in enumerate(powers):
            total = total + power.summed(charts, count, values[:, index])
        return total

    def bound(self) -> float:
        """The exact sum, whose cells have |z_k - m_k/N| < 2/(3N) and weights that sum to at most 1, and the error."""
        size = torch.tensor([(2.0 / (3.0 * self.grid)) ** sum(a) for a in self.exponents]).to(self.coefficients)
        return (self.coefficients.detach().abs() @ size).max().item() + self.error()

    def error(self) -> float:
        """Largest error by the approximate products: 2^d max sum |c_a| (d + |a| - 1) times that of one product."""
        chain = torch.tensor([self.dim + sum(a) - 1.0 for a in self.exponents]).to(self.coefficients)
        return 2.0**self.dim * (self.coefficients.detach().abs() @ chain).max().item() * self.product.error

    def _strides(self, device: torch.device | str) -> Tensor:
        return torch.tensor([(self.grid + 1) ** (self.dim - 1 - k) for k in range(self.dim)], device=device)

    def _trapezoids(self, z: Affine) -> Affine:
        """The trapezoids of all coordinates and m: C d (N + 1) values."""
        count, nodes = len(z), self.grid + 1
        if not self.shared:
            of, m = torch.arange(count).repeat_interleave(nodes), torch.arange(nodes).repeat(count)
            return self.trapezoid.on(z[of] * (3.0 * self.grid) - 3.0 * m.double())
        # Neighbours have two of their four bends in common, and one unit then carries each trapezoid (ours).
        bends = 2 * (nodes + 1)
        of, j = torch.arange(count).repeat_interleave(bends), torch.arange(bends).repeat(count)
        ramps = (z[of] * (3.0 * self.grid) - (3 * (j // 2) - 2 + j % 2).double()).relu()
        first = (torch.arange(count)[:, None] * bends + 2 * torch.arange(nodes)).flatten()
        return (ramps[first] - ramps[first + 1] - ramps[first + 2] + ramps[first + 3]).relu()

    def _chains(self, psi: list, offset: list, product, only: tuple[int, ...] | None = None) -> list:  # type: ignore[no-untyped-def]  # noqa: ANN001
        """The weight zeta times each power, each from the one before; of tensors, or of values of a graph."""
        zeta = psi[0]
        for factor in psi[1:]:
            zeta = product(zeta, factor)
        if isinstance(zeta, Affine) and self.shared and self.dim > 1:
            zeta = zeta.relu()  # products of two squares of what is not negative are not negative
        done = {(0,) * self.dim: zeta}
        for a in self.exponents if only is None else _below(only):
            if a not in done:
                before, k = _parent(a)
                done[a] = product(done[before], offset[k])
        return list(done.values())


class P1Net(LocalNet):
    r"""Linear interpolation of node values on Kuhn's triangulation, exactly; ours, of order 2.

    For d = 1 one unit a bend. For d = 2 the hat is
    :math:`\sigma(1 - \sigma(-t_1) - \sigma(t_2) - \sigma(t_1 - t_2))`, as the range of three numbers is the sum of the
    positive parts of their cyclic differences. The inner units, :math:`\sigma(1 - \sigma(-t_1))` for the first two
    terms, belong to whole rows of nodes, so a node costs 4 weights and not the 12 of :class:`Hat`. For d > 2 it is
    :class:`Hat`. Beyond the grid the function falls to 0 within one cell.

    Args:
        coefficients: node values, shape (C, (N + 1)^d, 1).
        dim: d.
        grid: N, at least 1.
    """

    def __init__(self, coefficients: Tensor, dim: int, grid: int) -> None:
        super().__init__(coefficients, dim)
        self.grid, self.hat = grid, Hat(dim)

    def forward(self, z: Tensor, charts: Tensor) -> Tensor:
        """See :meth:`LocalNet.forward`."""
        t = z.clamp(min=0.0) * self.grid
        low = t.detach().floor()
        strides = torch.tensor([(self.grid + 1) ** (self.dim - 1 - k) for k in range(self.dim)], device=z.device)
        total = z.new_zeros(len(z))
        for corner in itertools.product((0.0, 1.0), repeat=self.dim):
            node = low + torch.tensor(corner, dtype=z.dtype, device=z.device)
            inside = (node <= self.grid).all(1)
            cell = node.clamp(max=self.grid).long() @ strides
            value = self.hat(*(t - node).unbind(1)) * self.coefficients[charts, cell, 0]
            total = total + torch.where(inside, value, torch.zeros_like(value))
        return total

    def on(self, z: Affine, prune: bool = True) -> Affine:
        """See :meth:`LocalNet.on`."""
        z = z.relu() * float(self.grid)
        if self.dim == 1:
            return self._bends(z)
        charts, cells = self._alive(prune)
        values = self.coefficients.detach().double().cpu()[charts, cells, 0]
        hats = self._shared_hats(z, charts, cells) if self.dim == 2 else self._hats(z, charts, cells)
        return hats.summed(charts, len(self.coefficients), values)

    def bound(self) -> float:
        """Hats are a partition of unity: no value exceeds the largest node value."""
        return self.coefficients.detach().abs().max().item()

    def _bends(self, t: Affine) -> Affine:
        """Start value, start slope, and one unit where the slope changes."""
        values = self.coefficients.detach().double().cpu()[:, :, 0]
        none = torch.zeros(len(values), 1, dtype=torch.float64)
        slopes = torch.cat([values, none], 1).diff(dim=1)
        changes = torch.cat([slopes, none], 1).diff(dim=1)  # at nodes 1, ..., N + 1; the last makes it flat
        charts, bends = (changes != 0).nonzero(as_tuple=True)
        units = (t[charts] - (bends + 1).double()).relu()
        return units.summed(charts, len(values), changes[charts, bends]) + t * slopes[:, 0] + values[:, 0]

    def _shared_hats(self, t: Affine, charts: Tensor, cells: Tensor) -> Affine:
        first, second = cells // (self.grid + 1), cells % (self.grid + 1)
        parts: list[Affine] = []
        for of, node in (
            (-t[2 * charts], -first),
            (t[2 * charts + 1], second),
            (t[2 * charts] - t[2 * charts + 1], first - second),
        ):
            keys, which = torch.unique(charts * (4 * self.grid + 4) + node + 2 * self.grid, return_inverse=True)
            example = torch.zeros(len(keys), dtype=torch.int64).scatter_(0, which, torch.arange(len(which)))
            units = (of[example] - node[example].double()).relu()
            if not parts:
                units = (-units + 1.0).relu()  # takes the 1 along; where it is cut off, the hat is 0 anyway
            parts.append(units[which])
        return (parts[0] - parts[1] - parts[2]).relu()

    def _hats(self, t: Affine, charts: Tensor, cells: Tensor) -> Affine:
        strides = [(self.grid + 1) ** (self.dim - 1 - k) for k in range(self.dim)]
        return self.hat.on(
            *[t[charts * self.dim + k] - (cells // s % (self.grid + 1)).double() for k, s in enumerate(strides)]
        )


class PolynomialNet(LocalNet):
    r"""One polynomial a chart, in :math:`t = 2z - 1` clipped to [-1, 1]; ours, for points without a known function.

    Args:
        coefficients: of the monomials ``multi_indices(dim, degree)``, shape (C, 1, A).
        dim: d.
        degree: at least 0.
        levels: of each product.
    """

    def __init__(self, coefficients: Tensor, dim: int, degree: int, levels: int) -> None:
        super().__init__(coefficients, dim)
        self.degree, self.exponents, self.product = degree, multi_indices(dim, degree), Product(levels)

    def forward(self, z: Tensor, charts: Tensor) -> Tensor:
        """See :meth:`LocalNet.forward`."""
        t = 2.0 * z.clamp(0.0, 1.0) - 1.0
        powers = self._powers(list(t.unbind(1)), torch.ones_like(t[:, 0]), self.product)
        return (self.coefficients[charts, 0] * torch.stack(powers, 1)).sum(1)

    def on(self, z: Affine, prune: bool = True) -> Affine:
        """See :meth:`LocalNet.on`."""
        count = len(self.coefficients)
        t = (z.relu() - (z - 1.0).relu()) * 2.0 - 1.0
        columns = [t[torch.arange(count) * self.dim + k] for k in range(self.dim)]
        powers = self._powers(columns, z.graph.constant(torch.ones(count)), self.product.on)
        values = self.coefficients.detach().double().cpu()[:, 0]
        return concatenated(powers).summed(torch.arange(count).repeat(len(powers)), count, values.t().flatten())

    def bound(self) -> float:
        """No approximate monomial exceeds 1."""
        return self.coefficients.detach().abs().sum(2).max().item()

    def _powers(self, t: list, one, product) -> list:  # type: ignore[no-untyped-def]  # noqa: ANN001
        done = {(0,) * self.dim: one}
        for a in self.exponents[1:]:
            before, k = _parent(a)
            done[a] = t[k] if sum(a) == 1 else product(done[before], t[k])
        return [done[a] for a in self.exponents]


def _parent(a: tuple[int, ...]) -> tuple[tuple[int, ...], int]:
    """The exponents with one factor less, and which variable that is: the last."""
    k = max(index for index, power in enumerate(a) if power)
    return (*a[:k], a[k] - 1, *a[k + 1 :]), k


def _below(a: tuple[int, ...]) -> list[tuple[int, ...]]:
    """The way from 1 to a monomial, factor by factor."""
    way = [a]
    while sum(way[0]):
        way.insert(0, _parent(way[0])[0])
    return way
