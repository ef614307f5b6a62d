r"""Experts: one trainable function of the coordinates z in [0, 1]^d for each of C charts, with K outputs; ours.

The construction's local networks (``local.py``) have one output and units that can be counted; these are for training.
All take ``forward(z, ids)``: coordinates (B, k, d) in the charts ``ids``, int64 (B, k), to values (B, k, K).
Coordinates outside [0, 1] count as the nearest that is inside, so that no expert runs away off its chart.
"""

import math
from typing import Literal

import torch
from torch import Tensor, nn

from lightning_rectify.modules.manifold.local import multi_indices
from lightning_rectify.nn.dropout import Dropout

ExpertKind = Literal["polynomial", "p1", "mlp"]


class Expert(nn.Module):
    """What all experts have: tensors that :meth:`allocate` makes anew once the charts are known.

    Args:
        size: what the kind takes: degree, cells a coordinate, or hidden units; at least 0, 1, 1.
        outputs: K.
        dropout: share of hidden units left out in training (of "mlp").
    """

    def __init__(self, size: int, outputs: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.size, self.outputs, self.dim = size, outputs, 1
        self.dropout = Dropout(dropout)

    def shapes(self, charts: int, dim: int) -> dict[str, tuple[int, ...]]:
        """Shapes of the parameters by name."""
        raise NotImplementedError

    def forward(self, z: Tensor, ids: Tensor) -> Tensor:
        """See the module's docstring."""
        raise NotImplementedError

    def features(self, z: Tensor, chart: int) -> Tensor:
        """What the output is linear in, shape (M, A), at coordinates (M, d) of one chart."""
        raise NotImplementedError

    def linear(self) -> list[Tensor]:
        """The parameters that the output is linear in, each (C, ..., K); together A rows a chart."""
        raise NotImplementedError

    def randomize(self, generator: torch.Generator) -> None:
        """Draw all parameters."""
        raise NotImplementedError

    def allocate(self, charts: int, dim: int, size: int) -> None:
        """New parameters, all zero, for so many charts of dimension ``dim``."""
        self.dim, self.size = dim, size
        old = next(self.parameters(), torch.zeros(0))
        for name, shape in self.shapes(charts, dim).items():
            zeros = torch.zeros(shape, dtype=old.dtype, device=old.device)
            setattr(self, name, nn.Parameter(zeros, requires_grad=True))

    @torch.no_grad()
    def set_linear(self, chart: int, values: Tensor) -> None:
        """Set the linear parameters of one chart from rows (A, K)."""
        start = 0
        for part in self.linear():
            rows = part[chart].reshape(-1, self.outputs)
            part[chart] = values[start : start + len(rows)].reshape(part[chart].shape)
            start += len(rows)


class PolynomialExpert(Expert):
    r"""A polynomial of degree ``size`` in :math:`t = 2z - 1`; see :class:`Expert`."""

    coefficients: nn.Parameter

    def shapes(self, charts: int, dim: int) -> dict[str, tuple[int, ...]]:
        """See :class:`Expert`."""
        self.exponents = multi_indices(dim, self.size)
        return {"coefficients": (charts, len(self.exponents), self.outputs)}

    def forward(self, z: Tensor, ids: Tensor) -> Tensor:
        """See :class:`Expert`."""
        return (self.coefficients[ids] * self._monomials(z)[..., None]).sum(-2)

    def features(self, z: Tensor, chart: int) -> Tensor:
        """See :class:`Expert`."""
        return self._monomials(z)

    def linear(self) -> list[Tensor]:
        """See :class:`Expert`."""
        return [self.coefficients]

    @torch.no_grad()
    def randomize(self, generator: torch.Generator) -> None:
        """See :class:`Expert`."""
        draw = torch.randn(self.coefficients.shape, generator=generator, dtype=torch.float64)
        self.coefficients.copy_(draw / math.sqrt(len(self.exponents)))

    def _monomials(self, z: Tensor) -> Tensor:
        t = (2.0 * z.clamp(0.0, 1.0) - 1.0).unbind(-1)
        done = {(0,) * self.dim: torch.ones_like(t[0])}
        for a in self.exponents[1:]:
            k = max(index for index, power in enumerate(a) if power)
            done[a] = done[(*a[:k], a[k] - 1, *a[k + 1 :])] * t[k]
        return torch.stack([done[a] for a in self.exponents], -1)


class P1Expert(Expert):
    """Linear interpolation of node values on Kuhn's triangulation of the grid with ``size`` cells a coordinate.

    The function of :class:`~lightning_rectify.modules.manifold.local.P1Net` on [0, 1]^d; a point costs d + 1 nodes, not
    2^d: those of its simplex, found by the order of its coordinates within the cell.
    """

    values: nn.Parameter

    def shapes(self, charts: int, dim: int) -> dict[str, tuple[int, ...]]:
        """See :class:`Expert`."""
        return {"values": (charts, (self.size + 1) ** dim, self.outputs)}

    def forward(self, z: Tensor, ids: Tensor) -> Tensor:
        """See :class:`Expert`."""
        nodes, weights = self._simplex(z)
        return (self.values[ids[..., None], nodes] * weights[..., None]).sum(-2)

    def features(self, z: Tensor, chart: int) -> Tensor:
        """See :class:`Expert`."""
        nodes, weights = self._simplex(z)
        return torch.zeros(len(z), (self.size + 1) ** self.dim, dtype=z.dtype).scatter_add(1, nodes, weights)

    def linear(self) -> list[Tensor]:
        """See :class:`Expert`."""
        return [self.values]

    @torch.no_grad()
    def randomize(self, generator: torch.Generator) -> None:
        """See :class:`Expert`."""
        self.values.copy_(torch.randn(self.values.shape, generator=generator, dtype=torch.float64))

    def _simplex(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Nodes (..., d + 1) of a point's simplex, and the weights of its corners."""
        t = z.clamp(0.0, 1.0) * self.size
        # of NaN there is no cell; the weights still are NaN
        low = t.detach().nan_to_num().floor().clamp(max=self.size - 1)
        inside, order = (t - low).sort(dim=-1, descending=True)
        strides = torch.tensor([(self.size + 1) ** (self.dim - 1 - k) for k in range(self.dim)], device=z.device)
        first = (low.long() * strides).sum(-1, keepdim=True)
        nodes = torch.cat([first, first + strides[order].cumsum(-1)], -1)
        ends = torch.ones_like(inside[..., :1])
        return nodes, torch.cat([ends, inside], -1) - torch.cat([inside, 0.0 * ends], -1)


class MLPExpert(Expert):
    """A hidden layer of ``size`` ReLU units in t = 2z - 1; see :class:`Expert`."""

    weight: nn.Parameter
    bias: nn.Parameter
    out_weight: nn.Parameter
    out_bias: nn.Parameter

    def shapes(self, charts: int, dim: int) -> dict[str, tuple[int, ...]]:
        """See :class:`Expert`."""
        return {
            "weight": (charts, dim, self.size),
            "bias": (charts, self.size),
            "out_weight": (charts, self.size, self.outputs),
            "out_bias": (charts, 1, self.outputs),
        }

    def forward(self, z: Tensor, ids: Tensor) -> Tensor:
        """See :class:`Expert`."""
        t = 2.0 * z.clamp(0.0, 1.0) - 1.0
        hidden = ((t[..., None] * self.weight[ids]).sum(-2) + self.bias[ids]).relu()
        return (self.dropout(hidden)[..., None] * self.out_weight[ids]).sum(-2) + self.out_bias[ids].squeeze(-2)

    def features(self, z: Tensor, chart: int) -> Tensor:
        """See :class:`Expert`."""
        t = 2.0 * z.clamp(0.0, 1.0) - 1.0
        hidden = (t @ self.weight[chart].to(t.dtype) + self.bias[chart].to(t.dtype)).relu()
        return torch.cat([hidden, torch.ones_like(hidden[:, :1])], 1)

    def linear(self) -> list[Tensor]:
        """See :class:`Expert`."""
        return [self.out_weight, self.out_bias]

    @torch.no_grad()
    def randomize(self, generator: torch.Generator) -> None:
        """Units of random directions whose bends cross the chart, and small outputs."""
        draw = torch.randn(self.weight.shape, generator=generator, dtype=torch.float64)
        self.weight.copy_(draw / draw.norm(dim=1, keepdim=True))
        self.bias.copy_(2.0 * torch.rand(self.bias.shape, generator=generator, dtype=torch.float64) - 1.0)
        draw = torch.randn(self.out_weight.shape, generator=generator, dtype=torch.float64)
        self.out_weight.copy_(draw / math.sqrt(self.size))
        self.out_bias.zero_()


EXPERTS: dict[str, type[Expert]] = {"polynomial": PolynomialExpert, "p1": P1Expert, "mlp": MLPExpert}
