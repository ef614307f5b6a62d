"""A layer's weight as a matrix, one row an output channel, and back."""

import torch
from torch import Tensor, nn

MATRIX_LAYERS = (
    nn.Linear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def is_transposed(layer: nn.Module) -> bool:
    """Whether the weight's first axis counts input channels."""
    return isinstance(layer, _TRANSPOSED)


def to_matrix(weight: Tensor, transposed: bool, groups: int) -> Tensor:
    """The weight (out, in/groups, ...), or (in, out/groups, ...) if transposed, as (out, in/groups * kernel)."""
    if not transposed:
        return weight.flatten(1)
    split = weight.unflatten(0, (groups, -1))  # (groups, in/groups, out/groups, ...)
    return split.transpose(1, 2).flatten(0, 1).flatten(1)


def from_matrix(matrix: Tensor, shape: torch.Size, transposed: bool, groups: int) -> Tensor:
    """The inverse of :func:`to_matrix` for a weight of this shape."""
    if not transposed:
        return matrix.view(shape)
    split = matrix.view(groups, shape[1], shape[0] // groups, *shape[2:])
    return split.transpose(1, 2).flatten(0, 1)


def in_double(tensor: Tensor) -> Tensor:
    """A detached copy in float64, on the CPU where the device has no float64."""
    return tensor.detach().to("cpu" if tensor.device.type == "mps" else tensor.device, torch.float64)
