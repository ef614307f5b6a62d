"""Precision, recall, density and coverage: one set of features against the balls around another."""

import torch
from torch import Tensor

_CHUNK = 2**22  # distances held at once: 32 MB


def precision_recall(real: Tensor, fake: Tensor, k: int) -> tuple[float, float]:
    """Improved precision and recall of generated features (arXiv:1904.06991, section 2).

    A set covers the balls around its points that reach to the point's k-th nearest neighbour in the set. Precision is
    the share of generated points that the real set covers, recall that of real points that the generated set covers. A
    point on the rim is inside, as in the paper, so that identical points count.

    Args:
        real: features of real images, shape (N, F).
        fake: features of generated images, shape (M, F).
        k: neighbours, at least 1 and below N and M.

    Returns:
        Precision and recall, in [0, 1].

    Raises:
        ValueError: if shapes or ``k`` do not fit.
    """
    check_pair(real, fake, k, smallest=min(len(real), len(fake)))
    precise, recalled = _balls_hit(real, fake, k)[0] > 0, _balls_hit(fake, real, k)[0] > 0
    return precise.double().mean().item(), recalled.double().mean().item()


def density_coverage(real: Tensor, fake: Tensor, k: int) -> tuple[float, float]:
    """Density and coverage of generated features (arXiv:2002.09797, section 3).

    Density is the mean number of real balls (see :func:`precision_recall`) that hold a generated point, over k; about 1
    if the two sets have one distribution, and (k + 1) / k for two identical sets. Coverage is the share of real balls
    that hold a generated point. The rim is inside; the authors' code leaves it out, and calls identical points 0.

    Args:
        real: features of real images, shape (N, F).
        fake: features of generated images, shape (M, F).
        k: neighbours, at least 1 and below N.

    Returns:
        Density, in [0, N / k], and coverage, in [0, 1].

    Raises:
        ValueError: if shapes or ``k`` do not fit.
    """
    check_pair(real, fake, k, smallest=len(real))
    hits, covered = _balls_hit(real, fake, k)
    return hits.double().mean().item() / k, covered.double().mean().item()


def _balls_hit(centres: Tensor, points: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """How many balls around the centres hold each point (M,), and whether each ball holds any point (N,)."""
    # From one origin, near the data: squared distances by matrix products lose digits with the distance from it.
    origin = centres.double().mean(dim=0)
    centres, points = centres.double() - origin, points.double() - origin
    rows = max(1, _CHUNK // len(centres))
    # The centre itself is the nearest of the k + 1.
    radii = torch.cat(
        [_squared_distances(part, centres).topk(k + 1, largest=False).values[:, -1] for part in centres.split(rows)]
    )
    # What counts as equal: features carry seven digits, the rounding here is some 1e-15 of the squared norms.
    radii += 1e-12 * torch.cat([centres, points]).square().sum(dim=1).max()
    hits, covered = [], torch.zeros(len(centres), dtype=torch.bool, device=centres.device)
    for part in points.split(rows):
        inside = _squared_distances(part, centres) <= radii
        hits.append(inside.sum(dim=1))
        covered |= inside.any(dim=0)
    return torch.cat(hits), covered


def _squared_distances(a: Tensor, b: Tensor) -> Tensor:
    return a.square().sum(dim=1, keepdim=True) - 2 * a @ b.T + b.square().sum(dim=1)


def check_pair(real: Tensor, fake: Tensor, k: int, smallest: int) -> None:
    """Refuse features and neighbours that do not fit; see the callers."""
    if real.ndim != 2 or fake.ndim != 2 or real.shape[1] != fake.shape[1] or not len(fake):
        raise ValueError(
            "Expected arguments `real` and `fake` to be features of shapes (N, F) and (M, F) but got "
            f"{tuple(real.shape)} and {tuple(fake.shape)}."
        )
    if not 1 <= k < smallest:
        raise ValueError(f"Expected argument `k` to be at least 1 and below the {smallest} features but got {k}.")
