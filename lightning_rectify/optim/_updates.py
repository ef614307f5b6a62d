"""One RAdam update of a list of tensors, three ways, and the form that keeps step counts on the device.

Each function advances moments and parameters in place. Parameters, gradients and moments are real, of one device and,
but in the on-device form, share one step count; ``RectifiedAdam`` sees to that.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_rectify.optim._options import FUSED_DEVICES, Rule
from lightning_rectify.optim.variance import rectification

LOW_PRECISION = (torch.float16, torch.bfloat16)


class Tensors(NamedTuple):
    """The tensors of one update, index by index."""

    params: list[Tensor]
    grads: list[Tensor]
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]
    steps: list[Tensor]


def fused_update(tensors: Tensors, rule: Rule, step: float, rect: float) -> None:
    """A rectified step by torch's fused Adam kernel.

    The step is Adam's with learning rate lr * r_t and, since RAdam adds eps to sqrt(v) before the bias correction,
    epsilon eps / sqrt(1 - beta2^t). Decoupled decay must not shrink with r_t, so it is divided by it first.
    """
    device = tensors.params[0].device
    # The kernel wants counts beside the parameters; a fill does not make the host wait.
    steps = tensors.steps if device.type == "cpu" else [torch.full((), step, device=device)] * len(tensors.params)
    kernel = torch._fused_adamw_ if rule.decoupled else torch._fused_adam_
    kernel(
        tensors.params,
        tensors.grads,
        tensors.exp_avgs,
        tensors.exp_avg_sqs,
        [],
        steps,
        lr=float(rule.lr) * rect,
        beta1=rule.beta1,
        beta2=rule.beta2,
        weight_decay=rule.weight_decay / rect if rule.decoupled else rule.weight_decay,
        eps=rule.eps / math.sqrt(1.0 - rule.beta2**step),
        amsgrad=False,
        maximize=rule.maximize,
    )


def foreach_update(tensors: Tensors, rule: Rule, step: float, rect: float) -> None:
    """A step, adaptive (``rect > 0``) or not, by torch's multi-tensor operations."""
    params, grads, exp_avgs, exp_avg_sqs, _ = tensors
    lr = float(rule.lr)
    moves = rect > 0.0 or rule.early != "skip"
    if rule.maximize:
        grads = list(torch._foreach_neg(grads))
    if rule.weight_decay and rule.decoupled and moves:
        torch._foreach_mul_(params, 1.0 - lr * rule.weight_decay)
    elif rule.weight_decay and not rule.decoupled:
        grads = list(torch._foreach_add(grads, params, alpha=rule.weight_decay))
    torch._foreach_lerp_(exp_avgs, grads, 1.0 - rule.beta1)
    torch._foreach_mul_(exp_avg_sqs, rule.beta2)
    torch._foreach_addcmul_(exp_avg_sqs, grads, grads, 1.0 - rule.beta2)
    step_size = lr / (1.0 - rule.beta1**step)
    if rect > 0.0:
        denominators = torch._foreach_sqrt(exp_avg_sqs)
        torch._foreach_add_(denominators, rule.eps)
        scale = step_size * rect * math.sqrt(1.0 - rule.beta2**step)
        torch._foreach_addcdiv_(params, exp_avgs, denominators, value=-scale)
    elif moves:
        torch._foreach_add_(params, exp_avgs, alpha=-step_size)


def loop_update(tensors: Tensors, rule: Rule, step: float, rect: float) -> None:
    """The same step tensor by tensor; autograd may run through it, and ``rule.lr`` may be a tensor."""
    moves = rect > 0.0 or rule.early != "skip"
    for param, grad, exp_avg, exp_avg_sq in zip(*tensors[:4], strict=True):
        gradient = -grad if rule.maximize else grad
        if rule.weight_decay and rule.decoupled and moves:
            param.mul_(1.0 - rule.lr * rule.weight_decay)
        elif rule.weight_decay and not rule.decoupled:
            gradient = gradient.add(param, alpha=rule.weight_decay)
        exp_avg.lerp_(gradient, 1.0 - rule.beta1)
        exp_avg_sq.mul_(rule.beta2).addcmul_(gradient, gradient, value=1.0 - rule.beta2)
        step_size = rule.lr / (1.0 - rule.beta1**step)
        if rect > 0.0:
            scale = step_size * rect * math.sqrt(1.0 - rule.beta2**step)
            param.sub_(exp_avg * scale / (exp_avg_sq.sqrt() + rule.eps))
        elif moves:
            param.sub_(exp_avg * step_size)


def on_device_update(tensors: Tensors, rule: Rule) -> None:
    """The same step without a branch on a number, for ``torch.compile`` and CUDA graphs.

    Counts are advanced here. The gate and r_t are computed from them in float64: in the counts' own float32,
    1 - beta2^t cancels and torch.optim.RAdam rectifies steps that it must not (from beta2 = .9995 on).
    """
    torch._foreach_add_(tensors.steps, 1.0)
    step = torch.stack(tensors.steps).double()
    rect = rectification(step, rule.beta2, threshold=rule.threshold, rectifier=rule.rectifier)
    if rule.early == "adam":
        rect = torch.where(rect > 0.0, rect, 1.0)
    adaptive = rect > 0.0
    early = 0.0 if rule.early == "skip" else 1.0
    step_size = (
        rule.lr / (1.0 - torch.exp(step * math.log(rule.beta1))) if rule.beta1 else rule.lr * torch.ones_like(step)
    )
    scale = step_size * torch.where(adaptive, rect * torch.sqrt(-torch.expm1(step * math.log(rule.beta2))), early)
    keep = 1.0 - rule.lr * rule.weight_decay * torch.where(adaptive, 1.0, early).double()
    # By name: torch.compile of torch 2.6 cannot cut a named tuple.
    columns = zip(tensors.params, tensors.grads, tensors.exp_avgs, tensors.exp_avg_sqs, strict=True)
    for i, (param, grad, exp_avg, exp_avg_sq) in enumerate(columns):
        gradient = -grad if rule.maximize else grad
        if rule.weight_decay and rule.decoupled:
            param.mul_(keep[i].to(param.dtype))
        elif rule.weight_decay:
            gradient = gradient.add(param, alpha=rule.weight_decay)
        exp_avg.lerp_(gradient, 1.0 - rule.beta1)
        exp_avg_sq.mul_(rule.beta2).addcmul_(gradient, gradient, value=1.0 - rule.beta2)
        denominator = torch.where(adaptive[i], exp_avg_sq.sqrt() + rule.eps, 1.0)
        param.sub_(exp_avg * scale[i].to(param.dtype) / denominator)


def working_copies(batch: Tensors) -> Tensors:
    """Real tensors in at least float32 to work on; :func:`write_back` ends the work."""
    if batch.params[0].dtype in LOW_PRECISION:
        params = [param.float() for param in batch.params]
        return batch._replace(params=params, grads=[grad.float() for grad in batch.grads])
    if batch.params[0].is_complex():
        real = [[torch.view_as_real(tensor) for tensor in column] for column in batch[:4]]
        return Tensors(real[0], real[1], real[2], real[3], batch.steps)
    return batch


def write_back(batch: Tensors, work: Tensors) -> None:
    """Round to the parameters where ``work`` is a copy in more digits."""
    # Two calls and no context manager: torch.compile of torch 2.6 cannot follow a generator.
    if batch.params[0].dtype in LOW_PRECISION:
        torch._foreach_copy_(batch.params, work.params)


def fused_serves(work: Tensors) -> bool:
    """Whether the fused kernels can take these tensors.

    They walk memory: wrapper tensors, and gradients laid out unlike their parameter, must go another way.
    """
    return work.params[0].device.type in FUSED_DEVICES and all(
        type(param) in (Tensor, torch.nn.Parameter)
        and param.stride() == grad.stride() == exp_avg.stride() == exp_avg_sq.stride()
        for param, grad, exp_avg, exp_avg_sq, _ in zip(*work, strict=True)
    )
