r"""Tangent charts: balls that cover a manifold, each with its linear coordinates; from a known manifold or from points.

Chart i is the ball of radius r around :math:`c_i` with :math:`z = (V_i^\top (x - c_i)/r + 1)/2 \in [0, 1]^d`
(arXiv:1908.01842, proof of theorem 1, step 1, with our centring). Two radii: the gate of a chart is 1 within
``inner_radius`` and 0 from ``radius`` on.
"""

import math
import warnings
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from lightning_rectify.arguments import check_types
from lightning_rectify.modules.manifold.manifolds import Manifold
from lightning_rectify.modules.manifold.sampling import estimated_reach, farthest_points, local_tangents, nearest_gap


class CoverageWarning(UserWarning):
    """Some inputs lie in no chart: a network over these charts knows nothing about them."""


@dataclass(frozen=True)
class CoverReport:
    """How well charts cover the points they were made from; lengths as in the data.

    Attributes:
        charts: number of charts.
        radius: r.
        reach: tau, known or estimated.
        covering_radius: largest distance of a point from its nearest centre.
        fill_distance: how far the manifold may be from the points: known for a manifold, for a sample the largest
            distance of a point from its nearest neighbour (an estimate).
        injectivity: smallest ratio of a projected to a true distance between two points of one chart; a chart whose
            ratio is near 0 folds.
        overlap: most charts that hold one point.
    """

    charts: int
    radius: float
    reach: float
    covering_radius: float
    fill_distance: float
    injectivity: float
    overlap: int


class TangentCharts(nn.Module):
    """Charts that cover a manifold in R^D; see the module's docstring for the coordinates.

    Args:
        centers: c, shape (C, D).
        bases: V, orthonormal columns, shape (C, D, d).
        radius: r, positive.
        inner_radius: within it a chart's gate is fully open, in [0, r).
        report: how the charts cover what they were made from.

    Raises:
        ValueError: if shapes or radii do not fit.

    Example:
        >>> from lightning_rectify.modules.manifold.manifolds import Sphere
        >>> charts = TangentCharts.from_manifold(Sphere(1), radius=0.6, inner_radius=0.45)
        >>> ids, z = charts.encode(charts.centers[2:4])
        >>> ids.tolist(), z.flatten().tolist()
        ([2, 3], [0.5, 0.5])
    """

    centers: Tensor
    bases: Tensor

    def __init__(
        self,
        centers: Tensor,
        bases: Tensor,
        radius: float,
        inner_radius: float,
        report: CoverReport | None = None,
    ) -> None:
        check_types(TangentCharts, locals())
        super().__init__()
        if bases.ndim != 3 or bases.shape[:2] != centers.shape:
            raise ValueError(
                f"Expected argument `bases` to be of shape ({', '.join(map(str, centers.shape))}, d) but got "
                f"{tuple(bases.shape)}."
            )
        if not bool(centers.isfinite().all()):
            raise ValueError("Expected argument `centers` to be finite but got NaN or infinity among them.")
        grams = bases.mT @ bases - torch.eye(bases.shape[2]).to(bases)
        if not bool((grams.abs() <= 1e-3).all()):  # far above what float32 leaves; columns that are not even near
            raise ValueError(
                f"Expected argument `bases` to have orthonormal columns but got Gram matrices up to "
                f"{grams.abs().max().item():.3g} away from the identity."
            )
        if not 0.0 < radius < math.inf:
            raise ValueError(f"Expected argument `radius` to be a positive number but got {radius!r}.")
        if not 0.0 <= inner_radius < radius:
            raise ValueError(f"Expected argument `inner_radius` to be in [0, {radius}) but got {inner_radius!r}.")
        self.radius, self.inner_radius, self.report = radius, inner_radius, report
        self.register_buffer("centers", centers)
        self.register_buffer("bases", bases)

    def __len__(self) -> int:
        return self.centers.shape[0]

    def extra_repr(self) -> str:
        """Sizes for ``print``."""
        return f"charts={len(self)}, D={self.ambient_dim}, d={self.dim}, radius={self.radius:.4g}"

    @property
    def dim(self) -> int:
        """Dimension d of the coordinates."""
        return self.bases.shape[2]

    @property
    def ambient_dim(self) -> int:
        """Dimension D of the points."""
        return self.bases.shape[1]

    def squared_distances(self, x: Tensor) -> Tensor:
        """Squared distances (B, C) of points (B, D) from the centres."""
        squares = x.square().sum(1, keepdim=True) - 2.0 * x @ self.centers.t() + self.centers.square().sum(1)
        return squares.clamp(min=0.0)

    def coordinates(self, x: Tensor) -> Tensor:
        """Coordinates z (B, C, d) of points (B, D) in every chart; in [0, 1] within the chart's ball."""
        flat = self.bases.permute(1, 0, 2).reshape(self.ambient_dim, -1)
        origin = torch.einsum("cdk,cd->ck", self.bases, self.centers)
        y = (x @ flat).view(len(x), len(self), self.dim) - origin
        return y / (2.0 * self.radius) + 0.5

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The nearest chart of each point and the coordinates there; linear in x within a chart.

        Args:
            x: points, shape (B, D).

        Returns:
            Chart ids, int64, shape (B,), -1 for points in no chart; and z, shape (B, d), NaN for these.
        """
        nearest, ids = self.squared_distances(x).min(1)
        z = self.coordinates(x)[torch.arange(len(x), device=x.device), ids]
        outside = nearest >= self.radius**2
        return ids.masked_fill(outside, -1), z.masked_fill(outside[:, None], math.nan)

    def coverage(self, x: Tensor, warn: bool = True) -> Tensor:
        r"""How far each point is inside the cover: :math:`\max_i \mathrm{clip}((r^2 - d_i^2)/(r^2 - r_{in}^2), 0, 1)`.

        Args:
            x: points, shape (B, D).
            warn: warn where points lie in no chart.

        Returns:
            Shape (B,): 1 within the inner radius of a centre, 0 at distance r or more from all of them.

        Warns:
            CoverageWarning: if the coverage of a point is 0.
        """
        squares = self.squared_distances(x).amin(1)
        inside = ((self.radius**2 - squares) / (self.radius**2 - self.inner_radius**2)).clamp(0.0, 1.0)
        missed = int((inside == 0).sum())
        if warn and missed:
            warnings.warn(
                f"{missed} of {len(x)} points lie in no chart (coverage 0), where a network over them gives 0.",
                CoverageWarning,
                stacklevel=2,
            )
        return inside

    @classmethod
    def from_manifold(
        cls, manifold: Manifold, radius: float, inner_radius: float, cover: float | None = None, density: float = 1.0
    ) -> "TangentCharts":
        """Charts with exact tangents, their centres by farthest point sampling from a grid.

        Args:
            manifold: where.
            radius: r.
            inner_radius: as in the class.
            cover: distance from every point of the manifold to the nearest centre, at most; ``inner_radius`` if left
                out. The grid's fill distance is part of it, so the whole manifold is covered.
            density: factor of the grid's spacing; less than 1 is a finer grid.

        Raises:
            ValueError: if a chart is not injective on the grid: ``radius`` is too large.
        """
        cover = inner_radius if cover is None else cover
        points, fill = manifold.points(cover * (0.2 if manifold.dim > 1 else 0.04) * density)
        centers = manifold.centers(cover, points, fill)
        charts = cls(centers, manifold.tangent(centers), radius, inner_radius)
        charts.report = charts._examined(points, manifold.reach, fill)
        if charts.report.injectivity < 0.1:
            raise ValueError(
                f"Expected argument `radius` to leave every chart injective but got {radius}: two points project to "
                f"{charts.report.injectivity:.2g} of their distance (the reach is {manifold.reach:.4g})."
            )
        return charts

    @classmethod
    def from_points(
        cls,
        x: Tensor,
        d: int,
        r: float | Literal["auto"] = "auto",
        *,
        inner: float = 0.75,
        neighbourhood: float = 0.5,
        quantile: float = 0.05,
    ) -> "TangentCharts":
        """Charts from a sample: centres by farthest point sampling, tangents by local PCA.

        Args:
            x: points, shape (N, D), N > d + 1; float.
            d: dimension of the manifold, from 1 to D.
            r: radius; "auto" takes 0.6 of the estimated reach (less than its half is safe, ours; the theorem asks for a
                quarter), at most a third of the sample's extent.
            inner: inner radius as a share of r; centres are that far apart at most, less the sample's fill distance.
            neighbourhood: radius of the local PCA as a share of r.
            quantile: of the reach estimate, see :func:`reach_of`; more than 0 forgives outliers.

        Raises:
            ValueError: if an argument is out of its range.
        """
        if x.ndim != 2 or not x.is_floating_point() or len(x) < 2:
            raise ValueError(f"Expected argument `x` to be float points of shape (N, D) but got {tuple(x.shape)}.")
        if not 1 <= d <= x.shape[1] or len(x) <= d + 1:
            raise ValueError(
                f"Expected argument `d` to be in [1, {x.shape[1]}] with more than d + 1 points but got {d}."
            )
        x = x.detach().to(torch.float64)
        reach = estimated_reach(x, d, quantile)
        extent = (x - x.mean(0)).norm(dim=1).max().item()
        radius = min(0.6 * reach, extent * 2.0 / 3.0) if r == "auto" else float(r)
        if not 0.0 < radius < math.inf:
            raise ValueError(f"Expected argument `r` to be 'auto' or a positive number but got {r!r}.")
        fill = nearest_gap(x)
        cover = max(inner * radius - fill, 0.5 * inner * radius)
        centers = x[farthest_points(x, cover)]
        bases = local_tangents(x, centers, d, neighbourhood * radius)
        charts = cls(centers, bases, radius, inner * radius)
        charts.report = charts._examined(x, reach, fill)
        return charts

    def _examined(self, points: Tensor, reach: float, fill: float) -> CoverReport:
        squares = self.squared_distances(points)
        injectivity = 1.0
        for chart, basis in enumerate(self.bases):
            inside = points[squares[:, chart] < self.radius**2]
            inside = inside[torch.linspace(0, len(inside) - 1, min(len(inside), 300)).long()] if len(inside) else inside
            apart = torch.pdist(inside)
            # near pairs of a noisy sample differ in any direction
            far = apart > 0.5 * self.radius
            if far.any():
                injectivity = min(injectivity, (torch.pdist(inside @ basis)[far] / apart[far]).min().item())
        return CoverReport(
            charts=len(self),
            radius=self.radius,
            reach=reach,
            covering_radius=squares.amin(1).max().sqrt().item(),
            fill_distance=fill,
            injectivity=injectivity,
            overlap=int((squares < self.radius**2).sum(1).max()),
        )
