r"""``ChartNet``: the network of the proof of arXiv:1908.01842, and what makes it practical.

.. math:: \hat f(x) = \sum_i \hat\times\big(\hat f_i(\phi_i(x)),\, \hat 1_\Delta(\hat d_i^2(x))\big)

Chart determination, a function on each chart, and their pairing. Every part exists twice, as fast torch and as explicit
units, and the two agree.
"""

from typing import Literal

import torch
from torch import Tensor, nn

from lightning_rectify.modules.manifold.blocks import Indicator
from lightning_rectify.modules.manifold.charts import TangentCharts
from lightning_rectify.modules.manifold.construction import Options, from_manifold, from_points
from lightning_rectify.modules.manifold.fitting import Function
from lightning_rectify.modules.manifold.gate import SquaredDistance
from lightning_rectify.modules.manifold.graph import Affine, ReluGraph
from lightning_rectify.modules.manifold.layered import LayeredNetwork
from lightning_rectify.modules.manifold.local import LocalNet
from lightning_rectify.modules.manifold.manifolds import Manifold
from lightning_rectify.modules.manifold.pairing import ClampPairing, ProductPairing
from lightning_rectify.modules.manifold.partitions import TelescopingPartition
from lightning_rectify.modules.manifold.recipes import Budget, ChartNetReport, Guarantee, Mode


class ChartNet(nn.Module):
    r"""A function on a low dimensional manifold in R^D as a ReLU network over charts (arXiv:1908.01842, theorem 1).

    ``forward`` takes points (B, D) and returns values (B,). It evaluates only the charts that hold a point and the
    cells that are not zero there; :meth:`to_layered` gives the whole network as explicit units, equal up to rounding.
    Off the charts the value is 0: see :meth:`TangentCharts.coverage`. Coefficients are parameters and can be trained;
    the bounds inside the pairing are those of the start (the clamp is exact only while no value exceeds its bound:
    :meth:`refresh` sets it anew).

    Modes: "paper" is the proof's network. The others depart from it, all ours: "lean" shares squares between
    charts and powers between cells, has two-square products, a steep gate, a bump that ends inside the ramp and an
    exact clamp for the pairing; "p1" is lean with linear interpolation on simplices; "telescope" has a partition of
    unity made of the gates themselves, so that f and not f times a bump is approximated; "telescope_p1" both.

    Made by :meth:`from_manifold` and :meth:`from_points`.

    Args:
        charts: the charts.
        distance: squared distances to their centres.
        gate: 1 near a centre and 0 from r on, of the squared distance.
        local: functions of the coordinates.
        pairing: value and weight to product.
        telescope: make the weights of the gates by telescoping maxima.
        mode: for the report.
        guarantee: for the report.
    """

    def __init__(
        self,
        charts: TangentCharts,
        distance: SquaredDistance,
        gate: Indicator,
        local: LocalNet,
        pairing: ProductPairing | ClampPairing,
        telescope: bool,
        mode: str,
        guarantee: Guarantee | None = None,
    ) -> None:
        super().__init__()
        self.charts, self.distance, self.gate, self.local, self.pairing = charts, distance, gate, local, pairing
        self.partition = TelescopingPartition() if telescope else None
        self.mode, self.guarantee = mode, guarantee

    def forward(self, x: Tensor) -> Tensor:
        """Values (B,) at points (B, D)."""
        squares = self.charts.squared_distances(x)
        # Approximate distances are never below the true ones, so all other charts give exactly 0; a hair for rounding.
        rows, ids = (squares < self.charts.radius**2 * (1.0 + 1e-5)).nonzero(as_tuple=True)
        weights = self.gate(self.distance.at(x, rows, ids))
        if self.partition is not None:
            weights = self.partition(torch.zeros_like(squares).index_put((rows, ids), weights))[rows, ids]
        keep = weights > 0
        rows, ids, weights = rows[keep], ids[keep], weights[keep]
        values = self.local(self.charts.coordinates(x)[rows, ids], ids)
        return x.new_zeros(len(x)).index_add(0, rows, self.pairing(values, weights))

    def coverage(self, x: Tensor, warn: bool = True) -> Tensor:
        """As :meth:`TangentCharts.coverage`."""
        return self.charts.coverage(x, warn)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """As :meth:`TangentCharts.encode`."""
        return self.charts.encode(x)

    def refresh(self) -> None:
        """Set the clamp's bound by the coefficients as they are now, after training."""
        if isinstance(self.pairing, ClampPairing):
            self.pairing.bound.fill_(self.local.bound())

    def to_layered(self, prune: bool = True) -> LayeredNetwork:
        """The whole network as explicit ReLU units, (B, D) to (B, 1), in float64.

        Args:
            prune: leave out cells whose coefficients are zero, and units that nothing reads. Without it the
                architecture does not depend on f.
        """
        x = ReluGraph(self.charts.ambient_dim).input()
        weights = self.gate.on(self.distance.on(x))
        weights = weights.relu() if self.partition is None else self.partition.on(weights.relu())
        paired = self.pairing.on(self.local.on(self._coordinates_on(x), prune), weights)
        return LayeredNetwork(paired.summed(torch.zeros(len(self.charts), dtype=torch.int64), 1), prune)

    def report(self, prune: bool = True) -> ChartNetReport:
        """Exact counts of :meth:`to_layered`, as a whole and by part."""
        x, z = ReluGraph(self.charts.ambient_dim).input(), ReluGraph(len(self.charts) * self.charts.dim).input()
        whole, projection = self.to_layered(prune), self._coordinates_on(x)
        tensors = [*self.parameters(), *self.buffers()]
        return ChartNetReport(
            mode=self.mode,
            charts=len(self.charts),
            radius=self.charts.radius,
            dag=whole.size("dag"),
            layered=whole.size("layered"),
            local=LayeredNetwork(self.local.on(z, prune), prune).size().total,
            distance=LayeredNetwork(self.gate.on(self.distance.on(x))).size().total,
            projection=len(projection.values) + int((projection.bias != 0).sum()),
            stored=sum(tensor.numel() for tensor in tensors),
            guarantee=self.guarantee,
        )

    def _coordinates_on(self, x: Affine) -> Affine:
        """The C d coordinates as values of a graph, exactly affine."""
        bases, centers = self.charts.bases.double().cpu(), self.charts.centers.double().cpu()
        flat = bases.permute(0, 2, 1).reshape(-1, self.charts.ambient_dim) / (2.0 * self.charts.radius)
        offset = 0.5 - torch.einsum("cdk,cd->ck", bases, centers).flatten() / (2.0 * self.charts.radius)
        return x.times(flat) + offset

    @classmethod
    def from_manifold(
        cls,
        manifold: Manifold,
        f: Function,
        eps: float | None = None,
        *,
        grid: int | None = None,
        mode: Mode = "telescope_p1",
        degree: int | None = None,
        budget: Budget = "charts",
        radius: float | None = None,
        cover: float | None = None,
        levels: int | None = None,
        pairing_levels: int | None = None,
        distance_levels: int | None = None,
        shell: float | None = None,
        safety: float = 1.05,
    ) -> "ChartNet":
        r"""Construct the network of a known function on a known manifold; no training.

        Args:
            manifold: where.
            f: points (M, D) to values (M,), float64, differentiable by torch degree + 1 times.
            eps: the largest error that is allowed; all sizes follow from the bounds of the proof, see
                :class:`Guarantee`. Either this or ``grid``.
            grid: N, cells a coordinate in each chart, at least 1.
            mode: see the class.
            degree: of the Taylor polynomials, at least 1; 2 if left out. P1 is of degree 1.
            budget: of the guarantee: "charts" (paper) or "overlap".
            radius: r of the charts; 0.24 of the reach in mode "paper", 0.8 or 0.6 in the others, if left out.
            cover: greatest distance to the nearest centre as a share of r; smaller means more charts.
            levels: of the products in the local networks; with a grid, the fewest that cost at most a tenth of the
                error, if left out.
            pairing_levels: the same of the pairing.
            distance_levels: of the squares in the distances; what the gate's ramp needs, if left out.
            shell: the ramp's width Delta in units of r², in (0, 1), for mode "paper" with a grid.
            safety: factor on sampled constants, at least 1.

        Raises:
            ValueError: if an argument is out of its range, or both or neither of ``eps`` and ``grid`` are given.
        """
        options = Options(
            mode, grid, degree, eps, budget, radius, cover, levels, pairing_levels, distance_levels, shell, safety
        )
        parts = from_manifold(manifold, f, options)
        return cls(**parts.as_arguments(), telescope=parts.recipe.telescope, mode=mode)

    @classmethod
    def from_points(
        cls,
        x: Tensor,
        y: Tensor,
        d: int,
        *,
        r: float | Literal["auto"] = "auto",
        degree: int | Literal["auto"] = "auto",
        mode: Mode = "telescope",
        levels: int = 8,
        charts: TangentCharts | None = None,
    ) -> "ChartNet":
        r"""Fit values at points of an unknown manifold by least squares: one polynomial a chart; no training. Ours.

        Args:
            x: points, shape (N, D).
            y: their values, shape (N,).
            d: dimension of the manifold.
            r: radius of the charts, see :meth:`TangentCharts.from_points`.
            degree: of the polynomials, at least 0, or "auto": by leave-one-out error.
            mode: "telescope"; the partition of unity must come from the gates, as no bump can be divided out of data.
            levels: of the approximate products, at least 1.
            charts: charts already made from such points, in place of ``d`` and ``r``.

        Returns:
            A network in float64.

        Raises:
            ValueError: if an argument is out of its range.
        """
        parts = from_points(x, y, d, r, degree, mode, levels, charts)
        return cls(**parts.as_arguments(), telescope=True, mode=mode)
