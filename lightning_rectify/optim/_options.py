"""The options of a parameter group: checked when it is added, and read at each step."""

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_rectify.arguments import came, check_choice
from lightning_rectify.optim.variance import Order, check_rectifies, rectification

FUSED_DEVICES = ("cpu", "cuda")


class Rule(NamedTuple):
    """What an update does besides its tensors; a group's options at one step."""

    lr: Any  # float, or a 0-dim tensor in the for-loop and on-device forms
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    decoupled: bool
    maximize: bool
    early: str  # "momentum", "skip" or "adam"
    threshold: float
    rectifier: Order


def rule_of(group: dict[str, Any], dtype: torch.dtype) -> Rule:
    """What a step of this group does, in arithmetic of this dtype."""
    return Rule(
        lr=group["lr"],
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        # Zero over (zero + eps) must be zero also with eps = 0; the smallest normal number changes nothing else.
        eps=max(group["eps"], torch.finfo(dtype).tiny),
        weight_decay=group["weight_decay"],
        decoupled=group["decoupled_weight_decay"],
        maximize=group["maximize"],
        early=group["early_phase"],
        threshold=group["threshold"],
        rectifier=group["rectifier"],
    )


def rectification_of(group: dict[str, Any], step: float) -> float:
    """The group's r_t; 0 before its first rectified step."""
    return rectification(step, group["betas"][1], threshold=group["threshold"], rectifier=group["rectifier"])


def checked_params(params: Any) -> list[Any]:
    """The parameters of a constructor, once it is sure that torch understands them.

    Raises:
        ValueError: unless they are an iterable of tensors, pairs of name and tensor, or groups with ``params``.
    """
    given = list(params) if isinstance(params, Iterable) and not isinstance(params, (Tensor, str, bytes)) else []
    wrong = [each for each in given if not _is_param(each)] if given else [params]
    if wrong:
        raise ValueError(
            f"Expected argument `params` to be tensors, pairs of a name and a tensor, or groups (dicts with `params`), "
            f"at least one, but got {came(wrong[0])}."
        )
    return given


def _is_param(each: Any) -> bool:
    if isinstance(each, dict):
        return "params" in each
    tensor = each[1] if isinstance(each, tuple) and len(each) == 2 and isinstance(each[0], str) else each
    return isinstance(tensor, Tensor)


def check_options(group: dict[str, Any]) -> None:
    """Raise ValueError for an option of a group that is out of its range."""
    lr, (beta1, beta2) = group["lr"], group["betas"]
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError(
            f"Expected argument `lr` to be a number or a 1-element tensor but got shape {tuple(lr.shape)}."
        )
    for name, value in (("lr", lr), ("eps", group["eps"]), ("weight_decay", group["weight_decay"])):
        if not (value >= 0.0 and math.isfinite(value)):
            raise ValueError(f"Expected argument `{name}` to be a number >= 0 but got {value}.")
    if not 0.0 <= beta1 < 1.0:
        raise ValueError(f"Expected argument `betas[0]` to be in [0, 1) but got {beta1}.")
    if not 0.0 < beta2 < 1.0:
        raise ValueError(f"Expected argument `betas[1]` to be in (0, 1) but got {beta2}.")
    check_rectifies(beta2, group["threshold"], group["rectifier"])
    check_choice(("momentum", "skip", "adam"), early_phase=group["early_phase"])
    excluded = [name for name in ("foreach", "capturable", "differentiable") if group[name]]
    if group["fused"] and excluded:
        raise ValueError(f"Expected argument `fused` to be False or None with {excluded[0]}=True but got True.")
    if group["foreach"] and group["differentiable"]:
        raise ValueError("Expected argument `foreach` to be False or None with differentiable=True but got True.")
    if group["fused"]:
        devices = {param.device.type for param in group["params"]} - set(FUSED_DEVICES)
        if devices:
            raise ValueError(
                f"Expected argument `fused` to be False or None for parameters on {sorted(devices)[0]!r} (there are "
                f"kernels for {', '.join(FUSED_DEVICES)}) but got True."
            )
