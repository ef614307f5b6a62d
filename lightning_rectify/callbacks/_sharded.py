"""What callbacks that look at weights can work with."""

from collections.abc import Iterable

from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parameter import UninitializedParameter

from lightning_rectify.nn._matrices import MATRIX_LAYERS


def refuse_sharded(modules: Iterable[nn.Module], callback: str) -> None:
    """Raise if a weight is spread over processes; to be called on all of them.

    Args:
        modules: what will be looked at.
        callback: who asks, for the message.

    Raises:
        ValueError: if a parameter is a DTensor, or the weight of a layer is not in the layer's own shape.
    """
    for module in modules:
        for name, parameter in module.named_parameters():
            if isinstance(parameter, UninitializedParameter):  # lazy
                continue
            if isinstance(parameter, DTensor):
                found = f"{name!r} is a DTensor"
            elif parameter.dim() < 2 and _is_weight(module, name):  # FSDP 1 and ZeRO 3 leave flat pieces
                found = f"{name!r} has shape {tuple(parameter.shape)}"
            else:
                continue
            raise ValueError(
                f"Expected the weights that {callback} looks at to be whole on each process but got sharded ones "
                f"({found}); use a strategy that replicates them, such as 'ddp', or leave {callback} out."
            )


def reshard(module: nn.Module) -> None:
    """Put FSDP2's shards, which the optimizer has, back in the place of whole weights that an evaluation left."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


def _is_weight(module: nn.Module, name: str) -> bool:
    path, _, last = name.rpartition(".")
    return last == "weight" and isinstance(module.get_submodule(path), MATRIX_LAYERS)
