"""What is read off the layers: all singular values of each, and what they come down to."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from lightning_rectify._lightning import LightningModule
from lightning_rectify.nn._layers import ORTHOGONAL_MARK
from lightning_rectify.nn.modes import evaluating
from lightning_rectify.nn.singular_values import (
    condition_number,
    convolution_norm,
    singular_values,
    stable_rank,
    weight_matrix,
)
from lightning_rectify.nn.spectral import controlled_layers, matrix_layers, orthogonality_error, spectrum


@dataclass(frozen=True)
class Reading:
    """One layer at one step.

    Attributes:
        values: its singular values, shape (r,), float64, descending; all NaN if the weight is not finite.
        quantities: what they come down to, by the name that log keys use.
    """

    values: np.ndarray
    quantities: dict[str, float]


def watched_layers(pl_module: LightningModule, path: str | None) -> dict[str, nn.Module]:
    """The layers to read, by the names that log keys use.

    Args:
        pl_module: the user's module.
        path: dotted name of the part to watch; None for all of it.

    Raises:
        ValueError: if there is no such part, or no layer in it.
    """
    root: nn.Module = pl_module
    if path is not None:
        try:
            root = pl_module.get_submodule(path)
        except AttributeError:
            raise ValueError(
                f"Expected argument `module` to name a part of {type(pl_module).__name__} but got {path!r}; its own "
                f"parts are {[name for name, _ in pl_module.named_children()]}."
            ) from None
    # A layer watched alone has no name inside itself.
    layers = {name or str(path): layer for name, layer in matrix_layers(root).items()}
    if not layers:
        raise ValueError(
            "Expected argument `module` to name a part with a Linear or (transposed) convolution but "
            f"{path or type(pl_module).__name__!r} has none."
        )
    return layers


def read_layers(layers: dict[str, nn.Module], image_size: int | None) -> dict[str, Reading]:
    """Read the layers without changing them; lazy layers without a weight, and empty weights, are passed over.

    Args:
        layers: name to Linear or (transposed) convolution.
        image_size: size for the norm of convolutions; None leaves it out.

    Returns:
        Name to reading, in the order of ``layers``.
    """
    readings = {}
    # In training mode torch's spectral_norm takes a power iteration whenever its weight is looked at.
    with evaluating(*layers.values()):
        for name, layer in layers.items():
            if any(isinstance(parameter, UninitializedParameter) for parameter in layer.parameters()):
                continue
            with _current_weight(layer):
                matrix = weight_matrix(layer)
                if matrix.numel():
                    readings[name] = _read(layer, matrix, image_size)
    return readings


def _read(layer: nn.Module, matrix: Tensor, image_size: int | None) -> Reading:
    finite = bool(torch.isfinite(matrix).all())  # eigenvalues of others do not converge
    s = singular_values(matrix) if finite else torch.full((min(matrix.shape),), torch.nan, dtype=torch.float64)
    quantities: dict[str, Tensor | float] = {
        "max": s[0],
        "min": s[-1],
        "mean": s.mean(),
        "stable_rank": stable_rank(s) if finite else torch.nan,
        "condition_number": condition_number(s) if finite else torch.nan,
    }
    controlled = bool(controlled_layers(layer))
    if controlled or hasattr(layer, ORTHOGONAL_MARK):
        quantities["orthogonality_error"] = orthogonality_error(layer)
    if controlled:
        quantities["deviation"] = (s - spectrum(layer).to(s)).abs().max()
    if image_size is not None and not isinstance(layer, nn.Linear):
        quantities["convolution_norm"] = _convolution_norm(layer, image_size) if finite else torch.nan
    return Reading(s.cpu().numpy(), {name: float(value) for name, value in quantities.items()})


def _convolution_norm(layer: Any, image_size: int) -> float:
    """The norm at this size, or at the next multiple of the stride."""
    if layer.transposed:
        return convolution_norm(layer, image_size)
    return convolution_norm(layer, tuple(-(-image_size // stride) * stride for stride in layer.stride))


@contextmanager
def _current_weight(layer: nn.Module) -> Iterator[None]:
    """Within this context ``layer.weight`` is that of the present parameters.

    torch.nn.utils' older spectral_norm, weight_norm and prune make it in a hook before each forward pass: after an
    optimizer step it is the one of the step before.
    """
    hooks = [hook for hook in layer._forward_pre_hooks.values() if type(hook).__module__.startswith("torch.nn.utils.")]
    before = layer.__dict__.get("weight")
    try:
        for hook in hooks:
            hook(layer, ())
        yield
    finally:
        if hooks and before is not None:
            layer.weight = before
