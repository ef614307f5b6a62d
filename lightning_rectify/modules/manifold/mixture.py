r"""``ChartMixture``: gated experts on charts, as one network that trains, compiles and exports; ours.

.. math:: \hat f(x) = \sum_i \rho_i(x)\, f_i(\phi_i(x)), \qquad
          \rho_i \propto \big(1 - u_i / \min(1, u_{(k+1)})\big)_+^2, \quad u_i = |x - c_i|^2 / r_i^2

The network of arXiv:1908.01842 has a sum of gates times functions, where f is cut up by a partition of unity before it
is approximated. Values at points of an unknown manifold cannot be cut up: here the normalised gates are the partition.
Averaging charts that overlap also averages their noise, which telescoping gates do not.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_rectify.modules.manifold.experts import EXPERTS, Expert, ExpertKind


class ChartMixture(nn.Module):
    """See the module's docstring. ``forward`` takes points (B, D), float, and gives values (B, K).

    Only the ``dispatch`` charts that are nearest, in units of their radius, are computed; the weights fall to 0 before
    the next one takes over, so that the function stays continuous. Distances and coordinates are computed in float32 or
    better also under autocast: with 8 bits a point would change its chart.

    Until :meth:`allocate` and values from a fit there is one chart around 0 and every value is 0.

    Args:
        in_features: D.
        outputs: K.
        expert: see ``experts.py``.
        size: of the experts.
        dispatch: charts that answer for a point, at most.
        trained_gate: whether centres and radii of the gates are parameters; coordinates stay as they are.
        outside: what a point in no chart gets: "nearest", the nearest chart's value at the end of its coordinates; or
            "mean", the mean of the training values (for classes: equal logits).
        dropout: of the experts.
        anchored: keep the experts' start (as buffers), for :meth:`distance_from_start`.
    """

    centers: Tensor
    log_radii: Tensor
    inner: Tensor
    bases: Tensor
    origins: Tensor
    shift: Tensor
    loc: Tensor
    scale: Tensor
    spans: Tensor
    size: Tensor
    count: Tensor

    def __init__(
        self,
        in_features: int,
        outputs: int,
        expert: ExpertKind,
        size: int,
        dispatch: int,
        trained_gate: bool,
        outside: str,
        dropout: float = 0.0,
        anchored: bool = False,
    ) -> None:
        super().__init__()
        self.anchored = anchored
        self.in_features, self.outputs, self.dispatch = in_features, outputs, dispatch
        self.trained_gate, self.outside = trained_gate, outside
        self.expert: Expert = EXPERTS[expert](size, outputs, dropout)
        self.register_buffer("inner", torch.tensor(0.75))  # radius of certain coverage, as a share of r
        self.register_buffer("shift", torch.zeros(in_features))
        self.register_buffer("loc", torch.zeros(outputs))
        self.register_buffer("scale", torch.ones(outputs))
        self.register_buffer("count", torch.tensor(0))  # of training points; 0 until fitted
        self.register_buffer("size", torch.tensor(size))  # of the experts, as found
        self.allocate(1, 1, size)

    @property
    def fitted(self) -> bool:
        """Whether charts were made from points."""
        return int(self.count) > 0

    @property
    def dim(self) -> int:
        """Dimension d of the coordinates."""
        return self.bases.shape[2]

    def __len__(self) -> int:
        """Number of charts C."""
        return self.bases.shape[0]

    def extra_repr(self) -> str:
        """Sizes for ``print``."""
        return f"charts={len(self)}, D={self.in_features}, d={self.dim}, outputs={self.outputs}"

    def allocate(self, charts: int, dim: int, size: int) -> None:
        """New tensors for so many charts; the gate's centres at 0 with radius 1, experts 0."""
        like: Any = {"dtype": self.shift.dtype, "device": self.shift.device}
        for name, shape in {"centers": (charts, self.in_features), "log_radii": (charts,)}.items():
            zeros = torch.zeros(shape, **like)
            if self.trained_gate:
                setattr(self, name, nn.Parameter(zeros))
            else:
                self.register_buffer(name, zeros)
        eye = torch.eye(self.in_features, **like)[:, :dim]
        self.register_buffer("bases", eye.expand(charts, -1, -1).clone())  # (C, D, d)
        self.register_buffer("origins", torch.zeros(charts, dim, **like))  # of the coordinates, (C, d)
        self.register_buffer("spans", torch.ones(charts, **like))  # half the length of their axes, (C,)
        self.size.fill_(size)
        self.expert.allocate(charts, dim, size)
        self.start_here()

    def start_here(self) -> None:
        """Take the experts' numbers as the start from which :meth:`distance_from_start` is measured."""
        if self.anchored:
            for name, value in self.expert.named_parameters():
                self.register_buffer(f"start_{name}", value.detach().clone())

    def distance_from_start(self) -> Tensor:
        """Sum of squares of all that the experts have moved from their start, a scalar."""
        moved = [
            (value - self.get_buffer(f"start_{name}")).square().sum() for name, value in self.expert.named_parameters()
        ]
        return torch.stack(moved).sum()

    def allocate_like(self, state: Mapping[str, Tensor]) -> None:
        """New tensors with the shapes of a state dict of another such network."""
        charts, _, dim = state["bases"].shape
        self.allocate(charts, dim, int(state["size"]))

    def forward(self, x: Tensor) -> Tensor:
        """Values (B, K) of points (B, D)."""
        device = x.device.type
        if torch.is_autocast_enabled(device):
            with torch.autocast(device, enabled=False):
                return self._values(x)
        return self._values(x)

    def _values(self, x: Tensor) -> Tensor:
        x = x.to(self.shift.dtype) - self.shift
        ids, weights = self._gates(x)
        z = self._coordinates(x).gather(1, ids[..., None].expand(-1, -1, self.dim))
        return (self.expert(z, ids) * weights[..., None]).sum(1) * self.scale + self.loc

    def _relative(self, x: Tensor) -> Tensor:
        """u, squared distances in units of the radii, (B, C), of shifted points."""
        squares = x.square().sum(1, keepdim=True) - 2.0 * x @ self.centers.t() + self.centers.square().sum(1)
        return squares.clamp(min=0.0) * (-2.0 * self.log_radii).exp()

    def _coordinates(self, x: Tensor) -> Tensor:
        """z, (B, C, d), of shifted points."""
        flat = self.bases.permute(1, 0, 2).reshape(self.in_features, -1)
        y = (x @ flat).view(-1, len(self), self.dim) - self.origins
        return y / (2.0 * self.spans[:, None]) + 0.5

    def _gates(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Charts (B, k) that answer and their weights (B, k), which sum to 1 (or 0 off the charts, with "mean")."""
        charts = len(self)
        near, ids = self._relative(x).topk(min(self.dispatch + 1, charts), dim=1, largest=False)
        if self.trained_gate:
            # By differences: the gradient for c of |x|^2 - 2 x c + |c|^2 is a small difference of large sums.
            near = (x[:, None] - self.centers[ids]).square().sum(2) * (-2.0 * self.log_radii[ids]).exp()
        cut = near[:, -1:].clamp(max=1.0) if charts > self.dispatch else torch.ones_like(near[:, :1])
        near, ids = near[:, : self.dispatch], ids[:, : self.dispatch]
        weights = (1.0 - near / cut.clamp(min=1e-30)).clamp(min=0.0).square()
        total = weights.sum(1, keepdim=True)
        first = torch.zeros_like(weights)
        if self.outside == "nearest":
            first = torch.cat([torch.ones_like(weights[:, :1]), first[:, 1:]], 1)
        return ids, torch.where(total > 0, weights / total.clamp(min=1e-30), first)

    # -- what the gate says alone --------------------------------------------------------------------------------------

    @torch.no_grad()
    def coverage(self, x: Tensor) -> Tensor:
        """How far inside the charts points (B, D) are, (B,): 1 within ``inner`` of a radius, 0 from the radius on."""
        nearest = self._relative(x.to(self.shift.dtype) - self.shift).amin(1)
        return ((1.0 - nearest) / (1.0 - self.inner**2)).clamp(0.0, 1.0)

    @torch.no_grad()
    def encode(self, x: Tensor, mask: bool = True) -> tuple[Tensor, Tensor]:
        """The nearest chart of points (B, D), int64 (B,), -1 in none; and z there, (B, d), NaN in none.

        Without ``mask`` z are the coordinates in the nearest chart also of points that it does not hold.
        """
        x = x.to(self.shift.dtype) - self.shift
        nearest, ids = self._relative(x).min(1)
        z = self._coordinates(x)[torch.arange(len(x), device=x.device), ids]
        outside = nearest >= 1.0
        return ids.masked_fill(outside, -1), z.masked_fill(outside[:, None], torch.nan) if mask else z
