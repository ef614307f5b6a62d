"""The map from one side of a plan to the other, as a network of its own: from pairs of the plan, by nearest ones."""

import torch
from torch import Tensor, nn


class TransportMap(nn.Module):
    """Carries points (B, *shape_x) to (B, *shape_y) by the mean of the nearest of P pairs of a plan.

    Where both sides have one shape, a point moves by the mean displacement y - x of those pairs, which does not shrink
    towards them; else it goes to the mean of their y. Pairs are buffers: state dict and export hold all there is.

    Args:
        x: shape (P, *shape_x).
        y: shape (P, *shape_y).
        neighbours: pairs taken, in [1, P].

    Raises:
        ValueError: for ``neighbours`` outside its range.
    """

    x: Tensor
    y: Tensor

    def __init__(self, x: Tensor, y: Tensor, neighbours: int = 10) -> None:
        super().__init__()
        if not 1 <= neighbours <= len(x):
            raise ValueError(
                f"Expected argument `neighbours` to be from 1 to the pool, {len(x)}, but got {neighbours!r}."
            )
        self.register_buffer("x", x)
        self.register_buffer("y", y)
        self.neighbours = neighbours

    def nearest(self, points: Tensor) -> Tensor:
        """Numbers of the pairs nearest to points (B, *shape_x) by Euclidean distance, int64, (B, neighbours)."""
        # By products, as cdist chooses from 26 pairs on; left to choose, an export would hold for the batches it saw.
        distances = torch.cdist(points.flatten(1), self.x.flatten(1), compute_mode="use_mm_for_euclid_dist")
        return distances.topk(self.neighbours, dim=1, largest=False).indices

    def forward(self, points: Tensor) -> Tensor:
        """Where points (B, *shape_x) go, (B, *shape_y)."""
        nearest = self.nearest(points)
        if self.x.shape == self.y.shape:
            return points + (self.y[nearest] - self.x[nearest]).mean(dim=1)
        return self.y[nearest].mean(dim=1)
