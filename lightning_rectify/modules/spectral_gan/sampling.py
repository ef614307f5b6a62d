"""Latents and what is looked at: truncation, interpolation, nearest neighbours, grids."""

import math
from typing import Literal

import torch
from torch import Tensor

from lightning_rectify.arguments import check_choice, check_least

Distribution = Literal["uniform", "normal"]

_DISTRIBUTIONS = ("uniform", "normal")
_PARALLEL = 1e-4  # angle in radians below which an arc is a straight line to float32


def draw_latents(
    count: int,
    latent_size: int,
    distribution: Distribution = "normal",
    generator: torch.Generator | None = None,
    truncation: float | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Draw latents.

    Args:
        count: number B of latents, at least 0.
        latent_size: numbers L in a latent, at least 1.
        distribution: "uniform" on [-1, 1] (the paper's CNN) or "normal" with mean 0 and variance 1 (its ResNet).
        generator: source of random numbers; None takes torch's default, of ``device``.
        truncation: threshold of :func:`truncated`, None for the whole law.
        device: where the latents are to be. They are drawn where ``generator`` is, so that a seed gives the same
            latents on every device; without one, on ``device``.

    Returns:
        The latents, shape (B, L), float32.

    Raises:
        ValueError: for an argument outside its range.
    """
    check_least(0, count=count)
    check_least(1, latent_size=latent_size)
    check_choice(_DISTRIBUTIONS, distribution=distribution)
    shape = (count, latent_size)
    source = generator.device if generator is not None else device
    if truncation is not None:
        latents = truncated(shape, truncation, generator, distribution, source)
    elif distribution == "uniform":
        latents = torch.rand(shape, generator=generator, device=source, dtype=torch.float32) * 2.0 - 1.0
    else:
        latents = torch.randn(shape, generator=generator, device=source, dtype=torch.float32)
    return latents if device is None else latents.to(device)


def truncated(
    shape: tuple[int, ...],
    threshold: float,
    generator: torch.Generator | None = None,
    distribution: Distribution = "normal",
    device: torch.device | str | None = None,
) -> Tensor:
    r"""Draw latents near the middle of their law: the truncation trick (arXiv:1809.11096, section 3.1).

    Normal latents are redrawn until :math:`|z| \le c`. That law is drawn at once by its inverse distribution function,
    :math:`z = \Phi^{-1}(1/2 + u\,(\Phi(c) - 1/2))` with u uniform on [-1, 1], in float64. Uniform latents are scaled to
    :math:`[-c, c]`, which is the same: uniform latents redrawn until :math:`|z| \le c`.

    Args:
        shape: of the latents.
        threshold: largest size c of a number in a latent, positive; for "uniform" at most 1.
        generator: source of random numbers; None takes torch's default.
        distribution: "uniform" on [-1, 1] or "normal" with mean 0 and variance 1.
        device: where to draw, None: where ``generator`` is.

    Returns:
        The latents, float32.

    Raises:
        ValueError: for an argument outside its range.
    """
    check_choice(_DISTRIBUTIONS, distribution=distribution)
    if not threshold > 0.0:
        raise ValueError(f"Expected argument `threshold` to be positive but got {threshold}.")
    if distribution == "uniform" and threshold > 1.0:
        raise ValueError(
            f"Expected argument `threshold` to be at most 1 with uniform latents (they lie in [-1, 1]) but got "
            f"{threshold}."
        )
    if device is None and generator is not None:
        device = generator.device
    signed = torch.rand(shape, generator=generator, device=device, dtype=torch.float64) * 2.0 - 1.0
    if distribution == "uniform":
        return (signed * threshold).float()
    half_mass = math.erf(threshold / math.sqrt(2.0)) / 2.0  # of [0, c]
    # The ends, at which rounding may step over c.
    return torch.special.ndtri(0.5 + signed * half_mass).clamp(-threshold, threshold).float()


def lerp(a: Tensor, b: Tensor, t: Tensor) -> Tensor:
    r"""Points on the straight line, :math:`(1 - t)\,a + t\,b`.

    For uniform latents: it stays in the cube [-1, 1]. The middle of two normal latents is too short, by about
    :math:`\sqrt{1/2}`; for them :func:`slerp`.

    Args:
        a: starts, shape (B, L).
        b: ends, shape (B, L).
        t: shares of the way, shape (T,); outside [0, 1] the line goes on.

    Returns:
        Points, shape (B, T, L).

    Raises:
        ValueError: if the shapes do not fit.
    """
    _check_ends(a, b, t)
    share = t.to(a)[None, :, None]
    return (1.0 - share) * a[:, None] + share * b[:, None]


def slerp(a: Tensor, b: Tensor, t: Tensor) -> Tensor:
    r"""Points on the arc between two vectors: spherical interpolation.

    .. math:: \frac{\sin((1-t)\,\omega)}{\sin \omega}\, a + \frac{\sin(t\,\omega)}{\sin \omega}\, b,
        \qquad \omega = \angle(a, b)

    For normal latents, all of about one length: every point has it too, where the middle of a straight line would be
    shorter than any latent the generator has seen (arXiv:1609.04468). Vectors nearly parallel, or one of them zero,
    are joined by a straight line, and so are nearly opposite ones, between which no arc is the shortest. Points may
    leave the cube of uniform latents: for those :func:`lerp`.

    Args:
        a: starts, shape (B, L).
        b: ends, shape (B, L).
        t: shares of the way, shape (T,).

    Returns:
        Points, shape (B, T, L).

    Raises:
        ValueError: if the shapes do not fit.

    Example:
        >>> slerp(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]]), torch.tensor([0.5]))
        tensor([[[0.7071, 0.7071]]])
    """
    _check_ends(a, b, t)
    lengths_a, lengths_b = (x.norm(dim=1, keepdim=True) for x in (a, b))
    # The half-angle form: arccos of the inner product would lose half the digits of small angles.
    u, v = a * lengths_b, b * lengths_a
    angle = 2.0 * torch.atan2((u - v).norm(dim=1), (u + v).norm(dim=1))[:, None, None]
    share = t.to(a)[None, :, None]
    straight = torch.sin(angle) < _PARALLEL
    sine = torch.where(straight, 1.0, torch.sin(angle))
    arc = (torch.sin((1.0 - share) * angle) * a[:, None] + torch.sin(share * angle) * b[:, None]) / sine
    return torch.where(straight, lerp(a, b, t), arc)


def nearest_neighbours(queries: Tensor, reference: Tensor, k: int = 1, chunk: int = 1024) -> tuple[Tensor, Tensor]:
    """Find the nearest reference of each query: has the generator learned its training images by heart?

    Exact Euclidean distances between flattened tensors (differences are squared, not norms and inner products, whose
    rounding hides small distances), in blocks of ``chunk`` x ``chunk``, at least in float32. References go to the
    queries' device block by block. Which of several at the same distance is named is left open.

    Args:
        queries: N tensors, shape (N, ...).
        reference: M tensors, shape (M, ...), of the same size, in the same units.
        k: neighbours of each query, from 1 to M.
        chunk: queries and references taken at once, at least 1; changes memory, not the values.

    Returns:
        Distances, shape (N, k), rising, and the indices of the neighbours in ``reference``, int64, shape (N, k).

    Raises:
        ValueError: if the sizes do not fit or an argument is outside its range.
    """
    if queries.shape[1:] != reference.shape[1:]:
        raise ValueError(
            f"Expected argument `queries` to hold tensors of the shape of those in `reference`, "
            f"{tuple(reference.shape[1:])}, but got {tuple(queries.shape[1:])}."
        )
    if not 1 <= k <= len(reference):
        raise ValueError(f"Expected argument `k` to be from 1 to {len(reference)}, the references, but got {k}.")
    check_least(1, chunk=chunk)
    # Bytes would overflow and half precision would not resolve.
    dtype = torch.promote_types(torch.promote_types(queries.dtype, reference.dtype), torch.float32)
    blocks = queries.detach().flatten(1).split(chunk)
    found = [_nearest_of(block.to(dtype), reference.detach().flatten(1), k, chunk) for block in blocks]
    distances, indices = zip(*found, strict=True)
    return torch.cat(distances), torch.cat(indices)


def _nearest_of(queries: Tensor, reference: Tensor, k: int, chunk: int) -> tuple[Tensor, Tensor]:
    """The best so far, block of references by block of references."""
    distances = queries.new_full((len(queries), 0), math.inf)
    indices = torch.zeros(len(queries), 0, dtype=torch.int64, device=queries.device)
    for start in range(0, len(reference), chunk):
        block = reference[start : start + chunk].to(queries)
        new = torch.cdist(queries, block, compute_mode="donot_use_mm_for_euclid_dist")
        numbers = torch.arange(start, start + len(block), device=queries.device).expand(len(queries), -1)
        distances, indices = torch.cat([distances, new], dim=1), torch.cat([indices, numbers], dim=1)
        distances, order = distances.topk(min(k, distances.shape[1]), dim=1, largest=False)
        indices = indices.gather(1, order)
    return distances, indices


def image_grid(images: Tensor, columns: int = 10, padding: int = 2) -> Tensor:
    """Lay images out in rows, from left to right and from top to bottom.

    Args:
        images: shape (N, C, H, W), in [-1, 1]; what is outside is clipped.
        columns: images in a row, at least 1.
        padding: black pixels around every image, at least 0.

    Returns:
        One image, shape (C, H', W'), in [0, 1]; with one channel it stays one.

    Raises:
        ValueError: for an argument outside its range.
    """
    if images.dim() != 4 or len(images) == 0:
        raise ValueError(
            f"Expected argument `images` to be of shape (N, C, H, W), N > 0, but got {tuple(images.shape)}."
        )
    check_least(1, columns=columns)
    check_least(0, padding=padding)
    count, channels, height, width = images.shape
    columns = min(columns, count)
    rows = -(-count // columns)
    grid = images.new_zeros(channels, rows * (height + padding) + padding, columns * (width + padding) + padding)
    for i, image in enumerate((images.detach().clamp(-1.0, 1.0) + 1.0) / 2.0):
        top, left = (i // columns) * (height + padding) + padding, (i % columns) * (width + padding) + padding
        grid[:, top : top + height, left : left + width] = image
    return grid


def to_bytes(images: Tensor) -> Tensor:
    """Images in [-1, 1] as bytes, any shape: -1 is 0, 1 is 255, rounded to the nearest, clipped outside.

    Example:
        >>> to_bytes(torch.tensor([-1.0, 0.0, 1.0, 1.5]))
        tensor([  0, 128, 255, 255], dtype=torch.uint8)
    """
    return ((images.detach().clamp(-1.0, 1.0) + 1.0) * 127.5).round().to(torch.uint8)


def _check_ends(a: Tensor, b: Tensor, t: Tensor) -> None:
    if a.dim() != 2:
        raise ValueError(f"Expected argument `a` to be of shape (B, L) but got {tuple(a.shape)}.")
    if a.shape != b.shape:
        raise ValueError(
            f"Expected argument `b` to be of the shape of `a`, {tuple(a.shape)}, but got {tuple(b.shape)}."
        )
    if t.dim() != 1:
        raise ValueError(f"Expected argument `t` to be of shape (T,) but got {tuple(t.shape)}.")
