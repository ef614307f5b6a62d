"""Singular values of a layer as it stands, whatever trained it: of its matrix, and of the true convolution."""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lightning_rectify.arguments import check_types
from lightning_rectify.nn._matrices import MATRIX_LAYERS, in_double, is_transposed, to_matrix

_MOST_ENTRIES = 2**21  # complex entries of the symbol held at a time: 32 MB


def weight_matrix(layer: nn.Module) -> Tensor:
    """The layer's weight as the matrix whose singular values the spectral controls speak of.

    One row an output channel, one column an input channel and kernel position, as in the GAN spectrum paper's code
    (arXiv:1812.10912). Of a grouped layer: the columns of one group.

    Args:
        layer: a Linear, Conv1d to Conv3d or ConvTranspose1d to ConvTranspose3d, parametrized or not.

    Returns:
        Shape (out, in / groups * K), K the number of kernel positions; part of the graph of ``layer.weight``.

    Raises:
        ValueError: if the layer is of another kind.

    Example:
        >>> weight_matrix(nn.ConvTranspose2d(3, 8, 4)).shape
        torch.Size([8, 48])
    """
    check_types(weight_matrix, locals())
    _check_layer(layer)
    return to_matrix(layer.weight, is_transposed(layer), getattr(layer, "groups", 1))  # type: ignore[arg-type]


@torch.no_grad()
def singular_values(matrix: Tensor) -> Tensor:
    r"""All singular values of a matrix, by the eigenvalues of its smaller Gram matrix in float64.

    :math:`s_k = \sqrt{\lambda_k(W W^\top)}`, or of :math:`W^\top W` where that is smaller. Costs
    O(out * in * r + r^3) with r = min(out, in): on a CPU several times less than a singular value decomposition. The
    error is at most about 1e-8 of the largest value (squares lose half the digits), which only tiny values feel.

    Args:
        matrix: shape (out, in), of any floating dtype.

    Returns:
        Shape (min(out, in),), float64, descending, detached.

    Raises:
        ValueError: if ``matrix`` is not a matrix.

    Example:
        >>> singular_values(torch.tensor([[3.0, 0.0, 0.0], [0.0, -4.0, 0.0]])).tolist()
        [4.0, 3.0]
    """
    check_types(singular_values, locals())
    if matrix.dim() != 2:
        raise ValueError(f"Expected argument `matrix` to have two dimensions but got shape {tuple(matrix.shape)}.")
    wide = in_double(matrix)
    if wide.shape[0] > wide.shape[1]:
        wide = wide.T
    return torch.linalg.eigvalsh(wide @ wide.T).clamp_min(0.0).sqrt().flip(0).to(matrix.device)


def stable_rank(s: Tensor) -> Tensor:
    r"""Stable rank :math:`\|W\|_F^2 / \|W\|_2^2 = \sum_k s_k^2 / \max_k s_k^2`.

    Args:
        s: singular values, shape (..., r), in any order.

    Returns:
        Shape (...), between 1 and r; 0 where all values are 0.

    Example:
        >>> stable_rank(torch.tensor([2.0, 1.0, 1.0])).item()
        1.5
    """
    largest = s.abs().amax(-1, keepdim=True)
    relative = torch.where(largest > 0, s / largest, 0.0)  # first the quotient: squares may overflow
    return relative.square().sum(-1)


def condition_number(s: Tensor) -> Tensor:
    r"""Condition number :math:`\max_k s_k / \min_k s_k`.

    Args:
        s: singular values, shape (..., r), in any order.

    Returns:
        Shape (...), at least 1; infinite where the smallest value is 0.

    Example:
        >>> condition_number(torch.tensor([[2.0, 0.5], [1.0, 0.0]])).tolist()
        [4.0, inf]
    """
    smallest, largest = s.abs().amin(-1), s.abs().amax(-1)
    return torch.where(smallest > 0, largest / smallest, math.inf)


@torch.no_grad()
def convolution_norm(layer: nn.Module, size: int | tuple[int, ...]) -> float:
    r"""Operator norm of a layer's convolution on an image of a size, with circular padding.

    The norm of :func:`weight_matrix` is not the norm of the convolution: it bounds it only up to the square root of the
    number of kernel positions (a matrix norm of 1 goes with 1.9 or so for 3 x 3 kernels). The circular convolution is
    block diagonal in the Fourier basis (Sedghi, Gupta and Long, arXiv:1805.10408), with blocks

    .. math:: \hat W(f) = \sum_k W_k\, e^{-2 \pi i \langle f, k d / n \rangle}, \qquad
              \|W\| = s^{-D/2} \max_g \sigma_{\max}\big([\hat W(g + a n / s)]_a\big)

    over kernel positions k, dilation d, frequencies f of an image of n positions in each of D axes; a stride s (ours)
    makes the s^D frequencies that alias to one g into one block. Grouped layers are block diagonal in their groups. A
    transposed convolution is the adjoint of a convolution from its output image, and has its norm. Zero padding gives
    at most this norm on an image larger by the padding. Float64; the blocks are computed in slices of 32 MB.

    Args:
        layer: a Conv1d to Conv3d or ConvTranspose1d to ConvTranspose3d, parametrized or not.
        size: positions of the layer's input along each axis, one number for all or a tuple of D.

    Returns:
        The norm.

    Raises:
        ValueError: if the layer is no convolution, or ``size`` is not positive, has not D entries or is (unless
            transposed) no multiple of the stride.

    Example:
        >>> layer = nn.Conv2d(1, 1, 3, bias=False)
        >>> _ = nn.init.constant_(layer.weight, 1.0)  # matrix norm 3
        >>> round(convolution_norm(layer, 8), 6)
        9.0
    """
    check_types(convolution_norm, locals())
    _check_layer(layer)
    if isinstance(layer, nn.Linear):
        raise ValueError(f"Expected argument `layer` to be a convolution but got {layer!r}.")
    conv: Any = layer
    weight, stride = in_double(conv.weight), conv.stride
    sizes = _sizes(size, weight.dim() - 2)
    if is_transposed(conv):
        sizes = tuple(n * s for n, s in zip(sizes, stride, strict=True))
    elif any(n % s for n, s in zip(sizes, stride, strict=True)):
        raise ValueError(f"Expected argument `size` to be a multiple of the stride {stride} but got {size!r}.")
    largest = max(
        torch.linalg.eigvalsh(gram)[..., -1].max().item()
        for group in weight.unflatten(0, (conv.groups, -1))
        for gram in _symbol_grams(group, sizes, stride, conv.dilation)
    )
    return math.sqrt(max(largest, 0.0) / math.prod(stride))


def _symbol_grams(
    kernel: Tensor, sizes: tuple[int, ...], stride: tuple[int, ...], dilation: tuple[int, ...]
) -> Iterator[Tensor]:
    """The smaller Gram matrices of the blocks, in slices; (G, r, r) each. Kernel: (out, in, ...)."""
    out, into = kernel.shape[:2]
    coarse = [n // s for n, s in zip(sizes, stride, strict=True)]
    half = [*coarse[:-1], coarse[-1] // 2 + 1]  # the kernel is real: the other half are conjugates
    length = torch.tensor(coarse, dtype=torch.float64, device=kernel.device)
    taps = _grid(kernel.shape[2:], kernel) * torch.tensor(dilation, device=kernel.device)  # (T, D)
    aliases = _grid(stride, kernel) * length  # (A, D)
    flat = kernel.flatten(2).permute(2, 0, 1).flatten(1).to(torch.complex128)  # (T, out * in)
    entries = out * into * aliases.shape[0]
    for slice_ in _grid(half, kernel).split(max(1, _MOST_ENTRIES // entries)):
        frequencies = (slice_[:, None] + aliases) / torch.tensor(sizes, dtype=torch.float64, device=kernel.device)
        angles = -2.0 * math.pi * (frequencies @ taps.T)  # (G, A, T)
        blocks = torch.polar(torch.ones_like(angles), angles) @ flat  # (G, A, out * in)
        rows = blocks.unflatten(-1, (out, into)).transpose(1, 2).flatten(2)  # (G, out, A * in)
        if rows.shape[1] > rows.shape[2]:
            rows = rows.mH
        yield rows @ rows.mH


def _grid(shape: tuple[int, ...] | list[int] | torch.Size, like: Tensor) -> Tensor:
    axes = [torch.arange(n, dtype=torch.float64, device=like.device) for n in shape]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, -2)


def _sizes(size: int | tuple[int, ...], axes: int) -> tuple[int, ...]:
    sizes = (size,) * axes if isinstance(size, int) else tuple(size)
    if len(sizes) != axes or not all(isinstance(n, int) and n > 0 for n in sizes):
        raise ValueError(f"Expected argument `size` to be one or {axes} positive integers but got {size!r}.")
    return sizes


def _check_layer(layer: nn.Module) -> None:
    if not isinstance(layer, MATRIX_LAYERS):
        raise ValueError(f"Expected argument `layer` to be a Linear or (transposed) convolution but got {layer!r}.")
