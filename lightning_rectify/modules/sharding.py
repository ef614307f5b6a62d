"""FSDP2 for a LightningModule: every weight is a row-wise shard of its own on each process, whole while it is used."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import wraps
from typing import Any

from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lightning_rectify._lightning import LightningModule

_EVALUATION = ("validation_step", "test_step", "predict_step")


def shard(module: LightningModule, layers: Iterable[nn.Module], mesh: DeviceMesh) -> None:
    """Shard a module in place (``torch.distributed.fsdp.fully_shard``), once.

    All weights are gathered at the beginning of each step, but in training those of ``layers``, each of which is
    gathered while it is called. After the backward pass, and after a step of evaluation, every process holds its rows
    alone again, and the mean gradient's; so does the optimizer.

    Args:
        module: what Lightning trains; its class becomes a subclass of ``FSDPModule``.
        layers: submodules that training uses by calling them, equally often on all processes, and in no other way.
        mesh: ``data_parallel`` and ``tensor_parallel``, as Lightning's ``ModelParallelStrategy`` makes it.

    Raises:
        ValueError: for a mesh with more than one process along ``tensor_parallel``.
    """
    if (size := mesh["tensor_parallel"].size()) > 1:
        raise ValueError(
            f"Expected argument `tensor_parallel_size` of ModelParallelStrategy to be 1 for {type(module).__name__}, "
            f"whose layers are not split, but got {size} ('auto' is all devices of a node): use "
            f"ModelParallelStrategy(data_parallel_size={mesh.size()}, tensor_parallel_size=1)."
        )
    if isinstance(module, FSDPModule):
        return
    parts = list(layers)
    for layer in parts:
        fully_shard(layer, mesh=mesh["data_parallel"])
    fully_shard(module, mesh=mesh["data_parallel"])
    # Lightning calls the steps, not the module: they must gather the weights as `forward` does.
    register_fsdp_forward_method(module, "training_step")
    for name in _EVALUATION:
        if getattr(type(module), name) is not getattr(LightningModule, name):
            setattr(module, name, _inside(lambda: _whole(parts), getattr(module, name)))
            register_fsdp_forward_method(module, name)
            setattr(module, name, _inside(lambda: _then_sharded([module]), getattr(module, name)))


def class_of(module: nn.Module) -> type:
    """The class of a module as it was before :func:`shard`."""
    return next(cls for cls in type(module).__mro__ if not issubclass(cls, FSDPModule))


def whole_state(network: nn.Module) -> dict[str, Tensor]:
    """A copy of the state dict, of whole tensors on every process; to be called on all of them."""
    state = {name: value.detach() for name, value in network.state_dict().items()}
    return {name: v.full_tensor() if isinstance(v, DTensor) else v.clone() for name, v in state.items()}


def load_whole_state(network: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load what :func:`whole_state` gave, sharded or not; to be called on all processes."""
    if any(isinstance(parameter, DTensor) for parameter in network.parameters()):
        set_model_state_dict(network, dict(state), options=StateDictOptions(full_state_dict=True))
    else:
        network.load_state_dict(state)


def number_as_module(module: nn.Module, optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """The optimizer's state dict with each parameter's number that of its place in ``module.parameters()``.

    That is how Lightning's ``ModelParallelStrategy`` reads numbers, whatever the groups; elsewhere torch goes by the
    order within the groups, which stays. So a run can go on sharded that was not.
    """
    if isinstance(module, FSDPModule):  # numbered so already
        return state
    places = {parameter: i for i, parameter in enumerate(module.parameters())}
    members = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    old = [number for group in state.get("param_groups", ()) for number in group["params"]]
    if len(old) != len(members) or not all(parameter in places for parameter in members):
        return state  # an optimizer of other things
    new = {number: places[parameter] for number, parameter in zip(old, members, strict=True)}
    return {
        **state,
        "state": {new[number]: value for number, value in state["state"].items()},
        "param_groups": [{**group, "params": [new[n] for n in group["params"]]} for group in state["param_groups"]],
    }


def _inside(context: Callable[[], AbstractContextManager[None]], step: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(step)
    def run(*args: Any, **kwargs: Any) -> Any:
        with context():
            return step(*args, **kwargs)

    return run


@contextmanager
def _whole(layers: Sequence[Any]) -> Iterator[None]:
    # Once, however often a step calls them: a search of translations takes more steps on one process than on another.
    for layer in layers:
        layer.set_reshard_after_forward(False, recurse=False)
        layer.unshard()
    with _then_sharded(layers):
        yield
    for layer in layers:
        layer.set_reshard_after_forward(True, recurse=False)


@contextmanager
def _then_sharded(modules: Sequence[Any]) -> Iterator[None]:
    # No backward pass comes that would do it: the optimizer would step on shards that the module does not read.
    try:
        yield
    finally:
        for module in modules:
            module.reshard()
