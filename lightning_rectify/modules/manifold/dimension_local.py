"""What three estimators of the intrinsic dimension make of the neighbours of single points; see ``dimension.py``."""

import math
from typing import Literal

import torch
from torch import Tensor

from lightning_rectify.modules.manifold.geometry import checked_points, nearest_neighbors

Method = Literal["local_pca", "twonn", "mle"]
_FLOOR = 0.01
_BLOCKS = 50  # pieces of the sample that are drawn together


class Neighborhoods:
    """The neighbours of some points, and what each estimator makes of them."""

    def __init__(self, points: Tensor, k: int, queries: int, seed: int, most: int) -> None:
        points = checked_points(points).double()
        points = torch.unique(points, dim=0) if len(points) > 1 else points
        if len(points) < 4:
            raise ValueError(f"Expected argument `points` to hold at least 4 different points but got {len(points)}.")
        # `unique` sorts, so the draw does not depend on the order of the points
        order = torch.randperm(len(points), generator=torch.Generator().manual_seed(seed)).to(points.device)
        self.points, self.queries, self.memory = points, order[:queries], most
        self.most = len(points) - 1
        self.distances, self.indices = nearest_neighbors(points, min(k, self.most), self.queries, most=most)
        self.distances = self.distances.clamp(min=1e-300)

    def checked(self, k: int) -> int:
        """k, if there are as many neighbours.

        Raises:
            ValueError: if not.
        """
        if k > self.most:
            raise ValueError(
                f"Expected argument `neighbors` to be less than the {self.most + 1} different points but got {k}."
            )
        return k

    def length(self, k: int) -> float:
        """Median distance to the k-th neighbour."""
        return self.distances[:, k - 1].median().item()

    def resampled(self, bootstrap: int, seed: int) -> Tensor:
        """Weights (1 + B, Q): first all ones, then how often each point is drawn, with all of its block."""
        count = len(self.queries)
        blocks = min(_BLOCKS, count)
        some = self.points[self.queries]
        own = torch.cat([torch.cdist(part, some[:blocks]).argmin(1) for part in some.split(1000)]).cpu()
        drawn = torch.randint(blocks, (bootstrap, blocks), generator=torch.Generator().manual_seed(seed + 1))
        ones = torch.ones(bootstrap, blocks, dtype=torch.float64)
        times = torch.zeros_like(ones).scatter_add_(1, drawn, ones)[:, own]
        return torch.cat([torch.ones(1, count, dtype=torch.float64), times])

    def estimates(self, method: Method, k: int, weights: Tensor) -> Tensor:
        """Estimates (1 + B,) for weights (1 + B, Q) of the points."""
        weights = weights.to(self.points.device)
        if method == "twonn":
            return ratio_estimates((self.distances[:, k - 1] / self.distances[:, k // 2 - 1]).log(), k, weights)
        if method == "mle":
            logs = (self.distances[:, k - 1, None] / self.distances[:, : k - 1]).log().mean(1)
            return weights.sum(1) / (weights @ logs).clamp(min=1e-300)
        return gaps(weights @ self._spectra(k) / weights.sum(1, keepdim=True)).double()

    def _spectra(self, k: int) -> Tensor:
        """Eigenvalues (Q, min(k, D)) of the covariance of each point's neighbours and itself, as shares, descending."""
        dim = self.points.shape[1]
        # of k + 1 points around their mean at most k directions are left: singular values are all that is needed
        shares = []
        near = torch.cat([self.queries[:, None], self.indices[:, :k]], 1)
        for block in near.split(max(self.memory // ((k + 1) * dim), 1)):
            cloud = self.points[block]
            cloud = cloud - cloud.mean(1, keepdim=True)
            gram = cloud @ cloud.mT if dim > k + 1 else cloud.mT @ cloud
            values = torch.linalg.eigvalsh(gram).flip(1).clamp(min=0.0)[:, : min(k, dim)]
            shares.append(values / values.sum(1, keepdim=True).clamp(min=1e-300))
        return torch.cat(shares)


def ratio_estimates(logs: Tensor, k: int, weights: Tensor) -> Tensor:
    r"""Maximum likelihood d (B,) of ratios r_k / r_n, n = k // 2, given as logarithms (Q,), with weights (B, Q).

    Their density is that of :math:`\mu^{-d}`, which is beta distributed with parameters n and k - n.
    """
    count, inner = weights.sum(1), k // 2
    total = (weights @ logs).clamp(min=1e-300)
    if k == 2:
        return (count - 1.0) / total
    low, high = torch.full_like(count, math.log(1e-3)), torch.full_like(count, math.log(1e5))
    for _ in range(50):  # the score falls in d
        middle = 0.5 * (low + high)
        d = middle.exp()[:, None]
        tails = torch.stack(
            [weight @ (logs / -torch.expm1(-rate * logs)) for weight, rate in zip(weights, d, strict=True)]
        )
        score = count / d[:, 0] + (k - inner - 1) * tails - (k - 1) * total
        low, high = torch.where(score > 0, middle, low), torch.where(score > 0, high, middle)
    return (0.5 * (low + high)).exp()


def gaps(spectra: Tensor) -> Tensor:
    """Place (B,) of the largest ratio of neighbouring values in spectra (B, K), of which the last is followed by 0."""
    floor = _FLOOR * spectra[:, :1]
    following = torch.nn.functional.pad(spectra[:, 1:], (0, 1))
    return ((spectra + floor) / (following + floor)).argmax(1) + 1
