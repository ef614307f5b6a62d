"""Square Attack: random search by forward passes alone, of Andriushchenko et al. (arXiv:1912.00049)."""

import math

import torch
from torch import Tensor

from lightning_rectify.arguments import check_least, check_types
from lightning_rectify.attacks.ball import Ball, Norm, uniform
from lightning_rectify.attacks.common import Model, Worst, attacking, logits_of, modules_of, prepare
from lightning_rectify.attacks.losses import loss_function

# Of 10,000 queries, those after which the size p of squares is halved.
_HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
_TINY = 1e-12


def square(
    model: Model,
    images: Tensor,
    labels: Tensor,
    epsilon: float,
    *,
    queries: int = 5000,
    p_init: float = 0.8,
    norm: Norm = "linf",
    bounds: tuple[float, float] = (0.0, 1.0),
    generator: torch.Generator | None = None,
    rescale: bool = True,
) -> Tensor:
    r"""Square Attack: changes to random squares of the image, kept where they raise the margin loss.

    Andriushchenko et al. (arXiv:1912.00049, algorithms 1 to 3). In linf the search starts at vertical stripes of
    :math:`\pm\epsilon`, and a query sets one square of each channel to :math:`+\epsilon` or :math:`-\epsilon`. In l2 it
    starts at a grid of small pyramids, and a query takes the mass of two windows into one. It asks for no gradient, so
    it sees through models that mask theirs: where it breaks what gradient attacks do not, those are not to be believed.

    Each sample has squares of its own (the released AutoAttack: one a batch). A query that would change nothing takes
    the opposite signs (the paper draws again). The model is treated as in :func:`lightning_rectify.attacks.pgd`.

    Args:
        model: from images (N, C, H, W) in pixel units to logits (N, K), K at least 2; it need not be differentiable.
        images: inside ``bounds``, shape (N, C, H, W); below float32 they are taken to float32.
        labels: right classes, shape (N,), int64.
        epsilon: radius of the ball in pixel units, at least 0, in linf at most the width of ``bounds``.
        queries: forward passes a sample, at least 1, beside the one that finds which samples are right at all.
        p_init: share of the pixels, in (0, 1], in the first squares. It falls by the schedule of :func:`area`.
        norm: "linf" or "l2", over all pixels of an image.
        bounds: least and largest pixel value.
        generator: of the search, on any device; None: torch's own.
        rescale: stretch the schedule from 10,000 to ``queries``, as the attack on its own does; the released
            AutoAttack does not, so its 5,000 queries end with larger squares.

    Returns:
        Adversarial images (N, C, H, W), detached; inside the ball and the bounds exactly. A sample that the model gets
        wrong as it is comes back unchanged, and a search ends with the first misclassified image.

    Raises:
        ValueError: for an argument out of its range, naming it.
    """
    check_types(square, locals())
    check_least(1, queries=queries)
    if not 0.0 < p_init <= 1.0:
        raise ValueError(f"Expected argument `p_init` to be in (0, 1] but got {p_init!r}.")
    loss = loss_function("margin", check_labels=True)
    with attacking(*modules_of(model)), torch.no_grad():
        ball, labels = prepare(images, labels, epsilon, norm, bounds)
        worst, everything = Worst(ball.images, labels), torch.arange(len(labels), device=labels.device)
        clean = logits_of(model, ball.images)
        loss(clean, labels)  # checks labels and number of classes
        worst.wrong = clean.argmax(1) != labels
        for query in range(queries):
            left = everything[~worst.wrong]
            if not len(left):
                break
            part, now = ball.select(left), worst.images[left]
            share = area(query, queries if rescale else 10_000, p_init)
            if norm == "linf":
                tried = _square(part, now, share, generator) if query else _stripes(part, generator)
            else:
                tried = _windows(part, now, share, generator) if query else _grid(part, generator)
            logits = logits_of(model, tried)
            worst.offer(tried, loss(logits, labels[left]), logits, left)
        return worst.images


def area(query: int, queries: int, p_init: float) -> float:
    """Share of the pixels in a square at a query: ``p_init``, halved after 10, 50, 200, 500, ... of 10,000 queries.

    The schedule of the released code.

    Args:
        query: number of the query, from 0.
        queries: how many there are in all; the schedule is stretched to it.
        p_init: the first share.
    """
    place = query * 10_000 // queries
    return p_init / 2 ** sum(place > halving for halving in _HALVINGS)


# -- linf --------------------------------------------------------------------------------------------------------------


def _stripes(ball: Ball, generator: torch.Generator | None) -> Tensor:
    return torch.where(uniform(ball.images[:, :, :1, :], generator) < 0.5, ball.low, ball.high)


def _square(ball: Ball, now: Tensor, share: float, generator: torch.Generator | None) -> Tensor:
    height, width = now.shape[2:]
    side = min(max(round(math.sqrt(share * height * width)), 1), height, width)
    inside = _mask(_corner(now, side, generator), side, now)
    low = uniform(now[:, :, :1, :1], generator) < 0.5
    tried = torch.where(inside, torch.where(low, ball.low, ball.high), now)
    same = (tried == now).all(3).all(2).all(1)[:, None, None, None]
    return torch.where(same & inside, torch.where(low, ball.high, ball.low), tried)


# -- l2 ----------------------------------------------------------------------------------------------------------------


def _grid(ball: Ball, generator: torch.Generator | None) -> Tensor:
    """Start of l2: five by five pyramids of random signs, together of norm epsilon."""
    images = ball.images
    height, width = images.shape[2:]
    side = max(min(height, width) // 5, 1)
    down, across = height // side, width // side
    sign = _signs(images[:, :, :1, :1].expand(-1, -1, down, across), generator)
    tiles = sign.repeat_interleave(side, 2).repeat_interleave(side, 3) * _pyramids(side, images).repeat(down, across)
    offset = torch.zeros_like(images)
    top, left = (height - down * side) // 2, (width - across * side) // 2
    offset[:, :, top : top + down * side, left : left + across * side] = tiles
    return ball.project(images + offset * ball.epsilon / _norm(offset, (1, 2, 3)).clamp_min(_TINY))


def _windows(ball: Ball, now: Tensor, share: float, generator: torch.Generator | None) -> Tensor:
    """A query of l2 (algorithm 3): all the mass of two windows, and what is unused of epsilon, goes into the first."""
    offset = now - ball.images
    channels, height, width = now.shape[1:]
    side = min(max(round(math.sqrt(share * height * width)), 3) | 1, height, width)  # odd where it can be
    first, second = _corner(now, side, generator), _corner(now, side, generator)
    where_first, where_second = _mask(first, side, now), _mask(second, side, now)
    unused = (ball.epsilon**2 - offset.square().sum((1, 2, 3), keepdim=True)).clamp_min(0.0)
    both = (offset.square() * (where_first | where_second)).sum((2, 3), keepdim=True)
    available = (both + unused / channels).sqrt()
    shape = _pyramids(side, now)
    turned = uniform(now[:, :1, :1, :1], generator) < 0.5
    shape = torch.where(turned, shape.T, shape)
    held = _cut(offset, first, side)
    mixed = _signs(now[:, :, :1, :1], generator) * shape / _norm(shape, (2, 3))
    mixed = mixed + held / _norm(held, (2, 3)).clamp_min(_TINY)
    mixed = mixed / _norm(mixed, (2, 3)).clamp_min(_TINY) * available
    offset = offset.masked_fill(where_second, 0.0)
    return ball.project(ball.images + _paste(offset, mixed, first))


def _pyramids(side: int, like: Tensor) -> Tensor:
    """Two pyramids of opposite signs side by side, shape (side, side) (equation 3)."""
    half = side // 2
    parts = [_pyramid(side, half, like), -_pyramid(side, side - half, like)]
    return torch.cat(parts, 1)


def _pyramid(height: int, width: int, like: Tensor) -> Tensor:
    half = height // 2
    rows = (torch.arange(height, device=like.device) - half).abs()
    columns = (torch.arange(width, device=like.device) - width // 2).abs()
    layers = half - torch.maximum(rows[:, None], columns[None, :])  # M(r, s)
    steps = torch.arange(half + 1, dtype=like.dtype, device=like.device)
    sums = (1.0 / (half + 1 - steps).square()).cumsum(0)
    return sums[layers.clamp_min(0)] * (layers >= 0)


# -- windows of each sample --------------------------------------------------------------------------------------------


def _corner(like: Tensor, side: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """Top and left of a window of each sample, each of shape (n,)."""
    height, width = like.shape[2:]
    places = uniform(like[:, :1, :1, :1].expand(-1, 2, 1, 1), generator).flatten(1)
    top, left = (places[:, i] * (size - side + 1) for i, size in enumerate((height, width)))
    return top.long().clamp_max(height - side), left.long().clamp_max(width - side)


def _mask(corner: tuple[Tensor, Tensor], side: int, like: Tensor) -> Tensor:
    """Which pixels are inside the windows, booleans (n, 1, H, W)."""
    in_rows, in_columns = (
        (place := torch.arange(size, device=like.device) - first[:, None]).ge(0) & place.lt(side)
        for size, first in zip(like.shape[2:], corner, strict=True)
    )
    return (in_rows[:, :, None] & in_columns[:, None, :])[:, None]


def _index(corner: tuple[Tensor, Tensor], side: int, like: Tensor) -> tuple[Tensor, ...]:
    steps = torch.arange(side, device=like.device)
    samples, channels = (torch.arange(size, device=like.device) for size in like.shape[:2])
    rows, columns = (first[:, None] + steps for first in corner)
    return (
        samples[:, None, None, None],
        channels[None, :, None, None],
        rows[:, None, :, None],
        columns[:, None, None, :],
    )


def _cut(values: Tensor, corner: tuple[Tensor, Tensor], side: int) -> Tensor:
    return values[_index(corner, side, values)]


def _paste(values: Tensor, window: Tensor, corner: tuple[Tensor, Tensor]) -> Tensor:
    return values.index_put(_index(corner, window.shape[-1], values), window)


def _signs(like: Tensor, generator: torch.Generator | None) -> Tensor:
    return 1.0 - 2.0 * (uniform(like, generator) < 0.5).to(like.dtype)


def _norm(values: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Euclidean norm over some axes, kept; a pattern of shape (side, side) counts as one window of one channel."""
    return values.reshape((1,) * (4 - values.ndim) + values.shape).square().sum(dims, keepdim=True).sqrt()
