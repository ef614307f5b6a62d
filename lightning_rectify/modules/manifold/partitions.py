r"""Partitions of unity over charts.

The bump partition multiplies the function before it is approximated (arXiv:1908.01842, step 2) and is no part of the
network. The telescoping one is made by the network from its gates.
"""

import torch
from torch import Tensor, nn

from lightning_rectify.arguments import check_least
from lightning_rectify.modules.manifold.graph import Affine, concatenated


class BumpPartition(nn.Module):
    r""":math:`\rho_i = b_i/\sum_k b_k` with :math:`b_i(x) = (1 - |x - c_i|^2/s^2)_+^p`.

    The paper takes any smooth partition and gives none; a polynomial bump is smooth enough (:math:`C^{p-1}`) and has
    far smaller derivatives than :math:`e^{-1/(1-t)}`: ours.

    Args:
        centers: c, shape (C, D).
        support: s: :math:`\rho_i = 0` at this distance from :math:`c_i` and beyond; positive.
        power: p, at least 2.

    Raises:
        ValueError: if ``support`` or ``power`` is out of its range.
    """

    centers: Tensor

    def __init__(self, centers: Tensor, support: float, power: int = 4) -> None:
        super().__init__()
        if not support > 0.0:
            raise ValueError(f"Expected argument `support` to be positive but got {support!r}.")
        check_least(2, power=power)
        self.support, self.power = support, power
        self.register_buffer("centers", centers)

    def forward(self, x: Tensor) -> Tensor:
        """Weights (B, C) of points (B, D); they sum to 1 where a ball holds the point, else all are 0."""
        squares = (x.square().sum(1, keepdim=True) - 2.0 * x @ self.centers.t() + self.centers.square().sum(1)).clamp(
            min=0.0
        )
        bumps = (1.0 - squares / self.support**2).clamp(min=0.0) ** self.power
        total = bumps.sum(1, keepdim=True)
        return bumps / torch.where(total > 0, total, torch.ones_like(total))


class TelescopingPartition(nn.Module):
    r""":math:`\rho_i = \sigma(\chi_i - \max_{k<i} \chi_k)` of gates :math:`\chi_i \in [0, 1]`; ours.

    :math:`\sum_i \rho_i = \max_i \chi_i`, so the weights sum to 1 wherever one gate is fully open, and
    :math:`0 \le \rho_i \le \chi_i`. The local functions need not vanish at the edge of their chart, which makes them
    far easier to approximate than f times a bump.
    """

    def forward(self, gates: Tensor) -> Tensor:
        """Weights (B, C) of gates (B, C)."""
        highest = gates.cummax(1).values
        return (gates - torch.cat([torch.zeros_like(highest[:, :1]), highest[:, :-1]], 1)).clamp(min=0.0)

    def on(self, gates: Affine) -> Affine:
        """Two units a chart, one after the other: the running maximum and what the next gate adds to it."""
        highest = gates[0].relu()
        parts = [highest]
        for chart in range(1, len(gates)):
            added = (gates[chart] - highest).relu()
            parts.append(added)
            if chart < len(gates) - 1:
                highest = (highest + added).relu()
        return concatenated(parts)
