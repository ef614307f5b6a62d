"""The arguments of ``L2LDefense``: what a preset fills in, and which values are refused."""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

ATTACKS = ("l2l", "fgsm", "pgd", "trades", "none")
_REMEMBERED = ("l2l", "fgsm", "pgd")


def adam_of_attackers(params: Any) -> Optimizer:
    """Adam with lr 3e-3, which did better for the small attacker than the authors' 1e-3."""
    return torch.optim.Adam(params, lr=3e-3)


# What an argument that is left at None becomes; of the released scripts, all that an argument can say.
_PRESETS: dict[str | None, dict[str, Any]] = {
    None: {
        "attacker": "strided",
        "gradient_scale": "sample_std",
        "order": "joint",
        "attack_bn": "eval",
        "warm_start": None,
        "classifier_optimizer": None,
        "attacker_optimizer": adam_of_attackers,
    },
    "released": {
        "attacker": "wide",
        "gradient_scale": "batch_max",
        "order": "alternate",
        "attack_bn": "train",
        "warm_start": False,
        "classifier_optimizer": partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=2e-4),
        "attacker_optimizer": partial(torch.optim.Adam, lr=1e-3, weight_decay=2e-4),
    },
}


def fill_in(preset: str | None, given: dict[str, Any]) -> dict[str, Any]:
    """Arguments that were given, and the preset's for those that are None.

    Args:
        preset: None or "released".
        given: by name.

    Raises:
        ValueError: for an unknown preset.
    """
    if preset not in _PRESETS:
        raise ValueError(f"Expected argument `preset` to be None or 'released' but got {preset!r}.")
    return {name: _PRESETS[preset][name] if value is None else value for name, value in given.items()}


def check_ball(epsilon: float, bounds: Sequence[float], step_size: float | None, random_start: float | None) -> None:
    """Refuse a ball that is not inside what pixels can be, or steps and starts that make no sense in it.

    Args:
        epsilon: radius, in pixel units.
        bounds: least and largest pixel value.
        step_size: length of a step, in pixel units, or None.
        random_start: share of epsilon, or None.
    """
    if len(bounds) != 2 or not -math.inf < bounds[0] < bounds[1] < math.inf:
        raise ValueError(f"Expected argument `bounds` to be two finite numbers, the lower first, but got {bounds!r}.")
    width = bounds[1] - bounds[0]
    if not 0 < epsilon <= width:
        raise ValueError(
            f"Expected argument `epsilon` to be above 0 and at most {width:g}, the width of `bounds` (pixel units: "
            f"8/255 and not 8 for pixels in [0, 1]), but got {epsilon!r}."
        )
    if step_size is not None and not 0 < step_size < math.inf:
        raise ValueError(f"Expected argument `step_size` to be above 0 or None but got {step_size!r}.")
    if random_start is not None and not 0 <= random_start <= 1:
        raise ValueError(f"Expected argument `random_start` to be in [0, 1] or None but got {random_start!r}.")


def check_memory(attack: str, random_start: float | None) -> None:
    """Refuse a memory for attacks that have a start of their own, or none.

    Args:
        attack: what training attacks with.
        random_start: share of epsilon, or None.
    """
    if attack not in _REMEMBERED:
        raise ValueError(
            f"Expected argument `memory` to be False for `attack` {attack!r} but got True: it is for "
            f"{', '.join(map(repr, _REMEMBERED))}."
        )
    if random_start:
        raise ValueError(
            f"Expected argument `random_start` to be None or 0 with `memory`, which is where attacks start, but got "
            f"{random_start!r}."
        )


def check_channels(channels: int, **values: Sequence[float] | float | None) -> None:
    """Refuse lists of numbers that are not one for all channels or one for each.

    Args:
        channels: how many there are.
        values: by name of the argument.
    """
    for name, value in values.items():
        if isinstance(value, (list, tuple)) and len(value) not in (1, channels):
            raise ValueError(
                f"Expected argument `{name}` to be one number, or one for each of {channels} channels, but got "
                f"{value!r}."
            )


def check_pixels(images: Tensor, bounds: Sequence[float], owner: str) -> bool:
    """Refuse images outside the bounds, such as normalized ones; reads two numbers.

    Args:
        images: any shape.
        bounds: least and largest pixel value.
        owner: whose bounds they are, for the message.

    Returns:
        Whether all pixels are finite: NaN and infinite ones are the business of the check of the loss.

    Raises:
        ValueError: for finite pixels outside the bounds.
    """
    low, high = torch.stack(torch.aminmax(images.detach())).tolist()
    if math.isfinite(low) and math.isfinite(high) and not bounds[0] <= low <= high <= bounds[1]:
        raise ValueError(
            f"Expected images inside `bounds` = {tuple(bounds)} of {owner}, in pixel units, but got values from "
            f"{low:g} to {high:g}. Normalized images? {owner} normalizes inside (`mean`, `std`): give it pixels "
            "(ImageData: `normalization: unit`)."
        )
    return math.isfinite(low) and math.isfinite(high)


def check_pixel_range(datamodule: Any, bounds: Sequence[float], owner: str) -> None:
    """Refuse a datamodule whose images are not pixels inside the bounds, if it says what they are.

    Args:
        datamodule: any object, or None.
        bounds: least and largest pixel value.
        owner: whose arguments are checked, for the message.

    Raises:
        ValueError: naming the argument.
    """
    pixel_range = getattr(datamodule, "pixel_range", None)
    if pixel_range is None:
        return
    allowed, theirs = 1e-6 * (bounds[1] - bounds[0]), type(datamodule).__name__
    for values, bound in zip(pixel_range, bounds, strict=True):
        if any(abs(value - bound) > allowed for value in values):
            raise ValueError(
                f"Expected argument `normalization` of the datamodule {theirs} to give pixels in {tuple(bounds)}, the "
                f"`bounds` of {owner} ('unit' for (0.0, 1.0)), which normalizes itself, but got "
                f"{getattr(datamodule, 'normalization', None)!r}: pixels from {pixel_range[0]} to {pixel_range[1]}."
            )
