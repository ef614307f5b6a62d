r"""Chart determination: squared distances to the centres, made of sawtooth squares (arXiv:1908.01842, step 4).

Both forms are at least the true squared distance in their box, and at least r² wherever that is, also outside the box:
a gate that closes at r² never opens outside its ball.
"""

from typing import Literal

import torch
from torch import Tensor, nn

from lightning_rectify.arguments import check_choice
from lightning_rectify.modules.manifold.blocks import SignedSquare
from lightning_rectify.modules.manifold.graph import Affine

DistanceForm = Literal["per_chart", "shared"]


class SquaredDistance(nn.Module):
    r"""Approximate squared distances of a point to C centres.

    .. math::
        \mathrm{per\ chart:}\; 4B^2 \sum_j f_m\big(|x_j - c_{ij}|/(2B)\big)
        \qquad
        \mathrm{shared:}\; B^2 \sum_j f_m\big(|x_j - o_j|/B\big) - 2(c_i - o)\cdot(x - o) + |c_i - o|^2

    "per_chart" is the paper's, C D squares, error in [0, :math:`4B^2 D\,4^{-(m+1)}`]. "shared" is ours, D squares in
    all, a quarter of the error. Errors are for the box :math:`|x_j - o_j| \le B`. Outside it one square of the paper's
    form is above r² by itself; to the shared form we add :math:`(B/2 + 2r)\,\sigma(|x_j - o_j| - B)` a coordinate: its
    squares grow there with slope 3B/2, its linear part falls with at most 2B, and r² - (r - t)² <= 2rt at distance t
    from the box.

    Args:
        centers: c, shape (C, D), inside the box.
        bound: B, half a side of the box, positive.
        radius: r, of the balls; at most 2B.
        levels: m of each square, at least 1.
        form: "per_chart" or "shared".
        origin: o, the middle of the box, shape (D,); 0 if left out.

    Raises:
        ValueError: if an argument is out of its range.
    """

    centers: Tensor
    origin: Tensor

    def __init__(
        self,
        centers: Tensor,
        bound: float,
        radius: float,
        levels: int,
        form: DistanceForm = "shared",
        origin: Tensor | None = None,
    ) -> None:
        super().__init__()
        check_choice(("per_chart", "shared"), form=form)
        if not 0.0 < radius <= 2.0 * bound:
            raise ValueError(f"Expected argument `radius` to be in (0, {2.0 * bound}] but got {radius!r}.")
        origin = torch.zeros_like(centers[0]) if origin is None else origin
        self.form, self.bound, self.outside = form, bound, 0.5 * bound + 2.0 * radius
        self.square = SignedSquare(levels, 2.0 * bound if form == "per_chart" else bound)
        self.register_buffer("centers", centers - origin)
        self.register_buffer("origin", origin)

    @property
    def error(self) -> float:
        """Largest error in the box."""
        return self.centers.shape[1] * self.square.error

    def forward(self, x: Tensor) -> Tensor:
        """Approximate squared distances (B, C) of points (B, D)."""
        rows = torch.arange(len(x), device=x.device).repeat_interleave(len(self.centers))
        charts = torch.arange(len(self.centers), device=x.device).repeat(len(x))
        return self.at(x, rows, charts).view(len(x), -1)

    def at(self, x: Tensor, rows: Tensor, charts: Tensor, most: int = 2_000_000) -> Tensor:
        """Approximate squared distances (P,) of some pairs of a point and a centre.

        Args:
            x: points, shape (B, D).
            rows: the point of each pair, int64, shape (P,).
            charts: the centre of each pair, int64, shape (P,).
            most: numbers held at once, for memory.
        """
        x = x - self.origin
        if self.form == "shared":
            inner = (self._offsets() - 2.0 * x @ self.centers.t()).clamp(min=0.0)
            total = self.square(x).sum(1) + self.outside * (x.abs() - self.bound).clamp(min=0.0).sum(1)
            return total[rows] + inner[rows, charts] + self._constants()[charts]
        step = max(most // x.shape[1], 1)
        parts = [
            self.square(x[rows[k : k + step]] - self.centers[charts[k : k + step]]).sum(1)
            for k in range(0, len(rows), step)
        ]
        return torch.cat(parts) if parts else x.new_zeros(0)

    def on(self, x: Affine) -> Affine:
        """Place the units on D values; C values, each on one or two units."""
        count, dim = self.centers.shape
        centers, x = self.centers.double(), x - self.origin.double()
        if self.form == "shared":
            size = (x * (1.0 / self.bound)).absolute()
            squares = self.square.square.on(size) * self.bound**2
            beyond = (size - 1.0).relu() * (self.bound * self.outside)
            total = (squares + beyond).summed(torch.zeros(dim, dtype=torch.int64), 1).relu()
            # In the box this ReLU cuts nothing; it lets one unit wait in place of all inputs.
            inner = (x.times(-2.0 * centers) + self._offsets().double()).relu()
            return total[torch.zeros(count, dtype=torch.int64)] + inner + self._constants().double()
        pairs = torch.arange(dim).repeat(count)
        squares = self.square.on(x[pairs] - centers.flatten())
        return squares.summed(torch.arange(count).repeat_interleave(dim), count).relu()

    def _offsets(self) -> Tensor:
        return 2.0 * self.bound * self.centers.abs().sum(1)

    def _constants(self) -> Tensor:
        return self.centers.square().sum(1) - self._offsets()
