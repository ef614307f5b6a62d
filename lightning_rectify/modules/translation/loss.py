"""The softmax layer and its cross-entropy in one: no matrix of tokens times vocabulary is kept."""

from typing import Any

import torch
from torch import Tensor

from lightning_rectify.arguments import check_fraction, check_least

# Scores of a block, so many numbers: small enough for the cache's sake, large enough for the matrix products'.
_BLOCK = {"cpu": 2**21}
_BLOCK_ELSEWHERE = 2**25


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, label_smoothing: float = 0.0, block: int | None = None
) -> tuple[Tensor, Tensor]:
    r"""Cross-entropy of a linear layer's softmax with smoothed labels, summed over rows.

    .. math:: \sum_n \Bigl((1 - e) (-\log p_{n, y_n}) + \frac{e}{V} \sum_v -\log p_{nv}\Bigr),
        \qquad p_n = \mathrm{softmax}(W h_n)

    The value and the gradients of ``cross_entropy(linear(hidden, weight), labels, label_smoothing=e,
    reduction="sum")`` (Szegedy et al. 2016, arXiv:1512.00567, section 7, as torch writes it). Rows are done a block
    at a time, the gradients along with the loss, as the backward pass can only scale them: a block's scores are all
    the memory it needs beside the size of its arguments. Sums are kept in float32 (float64 for float64); the products
    run in autocast's type where autocast is on. Derivatives of first order only.

    Args:
        hidden: floating point, shape (N, D); N may be 0. Drop padding before.
        weight: floating point, shape (V, D).
        labels: int64, shape (N,), in [0, V).
        label_smoothing: e, probability taken from the true class and spread over all, in [0, 1).
        block: rows at a time, at least 1; None: chosen by V.

    Returns:
        The sum of the smoothed losses, and that of :math:`-\log p_{n, y_n}` alone, without a gradient; both 0-d.

    Raises:
        ValueError: for shapes that do not fit or an argument outside its range.
        RuntimeError: in the backward pass, if that is to be differentiated again.
    """
    _check(hidden, weight, labels, label_smoothing, block)
    if block is None:
        block = max(1, _BLOCK.get(hidden.device.type, _BLOCK_ELSEWHERE) // len(weight))
    if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        loss, nll = _LinearCrossEntropy.apply(hidden, weight, labels, label_smoothing, block)
        return loss, nll
    with torch.no_grad():
        loss, nll, _, _ = _blockwise(hidden, weight, labels, label_smoothing, block, False, False)
    return loss, nll


class _LinearCrossEntropy(torch.autograd.Function):
    """See :func:`linear_cross_entropy`."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, label_smoothing: float, block: int
    ) -> tuple[Tensor, Tensor]:
        loss, nll, grad_hidden, grad_weight = _blockwise(
            hidden, weight, labels, label_smoothing, block, *ctx.needs_input_grad[:2]
        )
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.dtypes = hidden.dtype, weight.dtype
        ctx.mark_non_differentiable(nll)
        return loss, nll

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        # once_differentiable would say nothing here: it looks for derivatives by grad_loss only.
        if torch.is_grad_enabled():
            raise RuntimeError("linear_cross_entropy has first derivatives only: call backward without create_graph.")
        scaled = [
            None if grad is None else (grad * grad_loss).to(dtype)
            for grad, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return (*scaled, None, None, None)


def _blockwise(
    hidden: Tensor, weight: Tensor, labels: Tensor, smoothing: float, block: int, of_hidden: bool, of_weight: bool
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Loss, negative log-likelihood, and the loss's gradients that are asked for, in the sums' type."""
    device, rows, classes = hidden.device, len(hidden), len(weight)
    sums = torch.float64 if torch.float64 in (hidden.dtype, weight.dtype) else torch.float32
    products = torch.promote_types(hidden.dtype, weight.dtype)
    if torch.is_autocast_enabled(device.type) and products != torch.float64:
        products = torch.get_autocast_dtype(device.type)
    with torch.autocast(device.type, enabled=False):
        low, matrix = hidden.to(products), weight.to(products)
        # The mean of a row's scores is the score under the mean weight: no pass over the block for it.
        means = hidden.to(sums) @ weight.to(sums).mean(dim=0)
        grad_hidden = torch.empty(hidden.shape, dtype=sums, device=device) if of_hidden else None
        grad_weight = torch.zeros(weight.shape, dtype=sums, device=device) if of_weight else None
        scores = torch.empty(min(block, rows), classes, dtype=products, device=device)
        exact = scores if products == sums else torch.empty_like(scores, dtype=sums)
        log_sums, picked = torch.empty_like(means), torch.empty_like(means)
        for start in range(0, rows, block):
            part = slice(start, min(start + block, rows))
            count, label = part.stop - start, labels[part, None]
            torch.mm(low[part], matrix.T, out=scores[:count])
            z = exact[:count] if exact is scores else exact[:count].copy_(scores[:count])
            picked[part] = z.gather(1, label).squeeze(1)
            top = z.amax(dim=1, keepdim=True)
            total = z.sub_(top).exp_().sum(dim=1, keepdim=True)
            log_sums[part] = (top + total.log()).squeeze(1)
            if grad_hidden is None and grad_weight is None:
                continue
            # p - (1 - e) [v = y]. The share of e / V that each class has is constant: it is added after the loop.
            z.mul_(total.reciprocal_()).scatter_add_(1, label, z.new_full(label.shape, smoothing - 1.0))
            gradient = z if exact is scores else scores[:count].copy_(z)
            if grad_hidden is not None:
                grad_hidden[part] = gradient @ matrix
            if grad_weight is not None:
                _add_product(grad_weight, gradient.T, low[part])
        if smoothing and grad_hidden is not None:
            grad_hidden -= smoothing / classes * weight.to(sums).sum(dim=0)
        if smoothing and grad_weight is not None:
            grad_weight -= smoothing / classes * hidden.to(sums).sum(dim=0)
        nll = (log_sums - picked).sum()
        loss = (1.0 - smoothing) * nll + smoothing * (log_sums - means).sum()
    return loss, nll, grad_hidden, grad_weight


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right


def _check(hidden: Tensor, weight: Tensor, labels: Tensor, label_smoothing: float, block: int | None) -> None:
    if hidden.dim() != 2:
        raise ValueError(f"Expected argument `hidden` to have shape (N, D) but got {tuple(hidden.shape)}.")
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[1] or not len(weight):
        raise ValueError(
            f"Expected argument `weight` to have shape (V, {hidden.shape[1]}) with V at least 1 but got "
            f"{tuple(weight.shape)}."
        )
    if labels.shape != hidden.shape[:1]:
        raise ValueError(
            f"Expected argument `labels` to have shape ({len(hidden)},), a label for each row of `hidden`, but got "
            f"{tuple(labels.shape)}."
        )
    check_fraction(label_smoothing=label_smoothing)
    check_least(1, block=block)
