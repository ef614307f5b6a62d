"""Reads the second moment of any Adam-like optimizer, whatever it is called and however it is wrapped."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_rectify.optim.variance import Order

SUPPORTED = (
    "RectifiedAdam, torch.optim.Adam, AdamW, NAdam, RAdam, RMSprop and any other optimizer that keeps `exp_avg_sq`"
)
# Under which name an optimizer keeps its second moment, and its decay in the group.
_KEYS = ("exp_avg_sq", "square_avg")


class SecondMoment(NamedTuple):
    """The second moment of one parameter.

    Attributes:
        param: the parameter, shape (*).
        name: its name, or "param<i>" where none is known.
        group: index of its group.
        step: how many steps it took; a tensor where it lives on the device.
        beta2: decay of the second moment.
        eps: what the optimizer adds to the denominator.
        value: v, as the optimizer keeps it, shape (*).
        corrected: whether the optimizer divides v by 1 - beta2^t (RMSprop does not).
        eps_before_correction: whether eps joins sqrt(v) before that division (RAdam) or after (Adam).
    """

    param: Tensor
    name: str
    group: int
    step: float | Tensor
    beta2: float
    eps: float
    value: Tensor
    corrected: bool
    eps_before_correction: bool


class RectifierOptions(NamedTuple):
    """How a group of a rectified optimizer chooses its steps; see :class:`RectifiedAdam`."""

    threshold: float
    rectifier: Order
    early_phase: str


def unwrap(optimizer: Any) -> Optimizer:
    """The torch optimizer inside Lightning's, DeepSpeed's or another wrapper that has it as ``optimizer``."""
    while isinstance(inner := getattr(optimizer, "optimizer", None), Optimizer) or hasattr(inner, "optimizer"):
        optimizer = inner
    return optimizer


def check_supported(optimizer: Any) -> Optimizer:
    """The unwrapped optimizer, if it can have a second moment.

    Raises:
        ValueError: naming the optimizer and what is supported.
    """
    optimizer = unwrap(optimizer)
    for group in getattr(optimizer, "param_groups", [{}]):
        if "alpha" not in group and len(group.get("betas", ())) < 2:
            raise ValueError(
                f"Expected argument `optimizer` to keep a second moment ({SUPPORTED}) but got "
                f"{type(optimizer).__name__}."
            )
    return optimizer


def beta2_of(group: Mapping[str, Any]) -> float:
    """Decay of the second moment in a parameter group."""
    return float(group["betas"][1] if "betas" in group else group["alpha"])


def rectifier_options(optimizer: Any, group: Mapping[str, Any]) -> RectifierOptions | None:
    """The options of a rectified optimizer's group; None for an optimizer that does not rectify."""
    if not isinstance(unwrap(optimizer), torch.optim.RAdam):
        return None
    return RectifierOptions(
        threshold=group.get("threshold", 5.0),
        rectifier=group.get("rectifier", "first_order"),
        early_phase=group.get("early_phase", "momentum"),
    )


def second_moments(optimizer: Any, names: Mapping[Tensor, str] | None = None) -> list[SecondMoment]:
    """The second moments of all parameters that took a step.

    Works for the for-loop, foreach, fused and capturable forms alike; tensors are the optimizer's own, not copies.

    Args:
        optimizer: a torch optimizer, or a wrapper around one.
        names: a name per parameter; by default those the optimizer was given, else "param<i>".

    Returns:
        One entry a parameter, in the order of the groups.

    Raises:
        ValueError: if the optimizer keeps no second moment.
    """
    optimizer = check_supported(optimizer)
    radam = isinstance(optimizer, torch.optim.RAdam)
    found, index = [], -1
    for number, group in enumerate(optimizer.param_groups):
        given = group.get("param_names", [None] * len(group["params"]))
        for param, own_name in zip(group["params"], given, strict=True):
            index += 1
            state = optimizer.state.get(param)
            if not state:
                continue
            key = next((key for key in _KEYS if key in state), None)
            if key is None or "step" not in state:
                raise ValueError(
                    f"Expected argument `optimizer` to keep a second moment and a step count for each parameter "
                    f"({SUPPORTED}) but {type(optimizer).__name__} keeps {sorted(state)}."
                )
            found.append(
                SecondMoment(
                    param=param,
                    name=(names or {}).get(param) or own_name or f"param{index}",
                    group=number,
                    step=state["step"],
                    beta2=beta2_of(group),
                    eps=float(group.get("eps", 0.0)),
                    value=state[key],
                    corrected=key == "exp_avg_sq",
                    eps_before_correction=radam,
                )
            )
    return found
