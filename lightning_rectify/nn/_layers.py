"""What ``spectral_control`` and ``bake`` do to one layer."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils import parametrizations, parametrize

from lightning_rectify.nn._factors import (
    Factors,
    Settings,
    SpectralFactors,
    load_plain_weight,
    semi_orthogonal,
)
from lightning_rectify.nn._matrices import from_matrix, is_transposed
from lightning_rectify.nn.controls import Divergence
from lightning_rectify.nn.singular_values import weight_matrix

ORTHOGONAL_MARK = "_spectral_orthogonality"  # attribute of a layer of the baseline "orthogonal": the penalty's weight


def check_layers(module: nn.Module, layers: dict[str, nn.Module]) -> None:
    """Raise ValueError for layers whose weight cannot be replaced."""
    if not layers:
        raise ValueError(
            "Expected argument `module` to have a Linear or (transposed) convolution that is not excluded but got none."
        )
    for name, layer in layers.items():
        replaced = parametrize.is_parametrized(layer, "weight") or not isinstance(layer.weight, nn.Parameter)
        if replaced or hasattr(layer, ORTHOGONAL_MARK):
            raise ValueError(
                f"Expected argument `module` to have plain weights but the one of {name!r} is parametrized or under "
                f"control already; use `exclude`, or `bake` the network first."
            )
        if isinstance(layer.weight, UninitializedParameter):
            raise ValueError(f"Expected argument `module` to have initialized weights but {name!r} is lazy.")
    holders: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        holders.setdefault(id(parameter), []).append(name)
    for layer in layers.values():
        shared = holders.get(id(layer.weight), [])
        # A layer that is registered twice is one layer; a weight that two modules hold would be torn apart.
        if len({id(module.get_submodule(path.rpartition(".")[0])) for path in shared}) > 1:
            raise ValueError(f"Expected argument `module` to have a weight for each layer but {shared} are one.")


def factorize(layer: nn.Module, settings: Settings, start: str) -> None:
    """Register the factors on a layer, with their start."""
    fresh = None if start == "weight" else _fresh(layer, settings, start)
    parametrize.register_parametrization(layer, "weight", SpectralFactors(layer, settings, fresh))
    layer.register_load_state_dict_pre_hook(load_plain_weight)


def _fresh(layer: nn.Module, settings: Settings, start: str) -> Factors:
    weight = weight_matrix(layer).detach()
    out, into = weight.shape
    r = min(out, into)
    e = torch.ones(r) if start == "ones" else _spread(settings, r)
    return semi_orthogonal((out, r), weight), e.to(weight), semi_orthogonal((into, r), weight)


def _spread(settings: Settings, count: int) -> Tensor:
    for control in settings.controls:
        if (quantiles := control.quantiles(count)) is not None:
            return quantiles
    return Divergence().quantiles(count)


def mark_orthogonal(layer: Any, weight: float) -> None:
    """Give a layer the start of orthogonal regularization, and note its penalty's weight."""
    matrix = semi_orthogonal(weight_matrix(layer).shape, layer.weight)
    shape, groups = layer.weight.shape, getattr(layer, "groups", 1)
    with torch.no_grad():
        layer.weight.copy_(from_matrix(matrix, shape, is_transposed(layer), groups))
    setattr(layer, ORTHOGONAL_MARK, weight)


def upright(matrix: Tensor) -> Tensor:
    """The matrix or its transpose, whichever is not wider than high."""
    return matrix if matrix.shape[0] >= matrix.shape[1] else matrix.T


def has_spectral_norm(layer: nn.Module) -> bool:
    """Whether the weight has torch's spectral_norm (the parametrization) and nothing else."""
    if not parametrize.is_parametrized(layer, "weight"):
        return False
    held: Any = layer.parametrizations.weight  # type: ignore[union-attr]
    return len(held) == 1 and isinstance(held[0], parametrizations._SpectralNorm)


def bake_layer(layer: Any) -> None:
    """Replace the parametrized weight by its value, as a parameter in its old place."""
    held = layer.parametrizations.weight
    held.eval()  # spectral_norm in training mode would take another power iteration
    trains = any(parameter.requires_grad for parameter in held.parameters())
    with torch.no_grad():
        value = layer.weight.detach().clone(memory_format=torch.contiguous_format)
    # A deep copy shares the class that torch made for its original, and removal takes the property off that class.
    shared = type(layer)
    layer.__class__ = type(shared.__name__, shared.__bases__, dict(vars(shared)))
    parametrize.remove_parametrizations(layer, "weight")
    bias = layer.bias
    del layer.weight, layer.bias  # torch puts the weight last; optimizer states go by the order of the parameters
    layer.register_parameter("weight", nn.Parameter(value, requires_grad=trains))
    layer.register_parameter("bias", bias)
    hooks = layer._load_state_dict_pre_hooks
    for key in [key for key, hook in hooks.items() if getattr(hook, "hook", hook) is load_plain_weight]:
        del hooks[key]
