"""Borrowing a module, its data and the random state, and giving them back bit for bit."""

import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import islice
from types import FunctionType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from lightning_rectify._lightning import Trainer

_GENERATORS = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)
_OPAQUE = (str, bytes, int, float, complex, type, Tensor, np.ndarray, nn.Module, ModuleType, FunctionType, Trainer)
_DEEPEST = 6  # loader, its sampler, data set, the data set inside, its transforms, one of those
_LONGEST = 1000  # a longer container holds samples


@contextmanager
def untouched(module: nn.Module) -> Iterator[None]:
    """What happens to a module inside this context is undone after it.

    Kept are the weights and buffers of all its submodules, their modes, gradients and ``requires_grad``, which
    submodules there are, and all other attributes that are numbers, tensors, arrays, random generators, or lists,
    tuples, sets and dicts of such (a metric's counts). Objects keep their identity: an optimizer's parameters are the
    same ones. Contents of other objects are not looked at. Costs one copy of the tensors.

    Args:
        module: any module whose weights are whole on this process.
    """
    seen: dict[int, Any] = {}
    give_back = [_keep(vars(part), seen) for part in module.modules()]
    flags = [(parameter, parameter.grad, parameter.requires_grad) for parameter in module.parameters()]
    try:
        yield
    finally:
        for each in give_back:
            each()
        for parameter, gradient, required in flags:
            parameter.grad = gradient
            parameter.requires_grad_(required)


@contextmanager
def random_state(seed: int, device: torch.device, holders: Iterable[object] = ()) -> Iterator[None]:
    """Seed everything random inside this context, and put it back as it was after it.

    That is Python's, numpy's and torch's global state (of the CPU and, if it is a CUDA device, of ``device``). Other
    generators that ``holders`` hold are not seeded, but put back.

    Args:
        seed: at least 0.
        device: of the module.
        holders: loaders, data sets; searched for generators a few attributes deep.
    """
    seen: dict[int, Any] = {}
    give_back = [_keep(generator, seen) for generator in _generators(holders)]
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            random.seed(seed)
            np.random.seed(seed % 2**32)
            # Not torch.manual_seed, which seeds all devices.
            torch.default_generator.manual_seed(seed)
            if device.type == "cuda":
                with torch.cuda.device(device):
                    torch.cuda.manual_seed(seed)
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        for each in give_back:
            each()


def _generators(holders: Iterable[object]) -> list[Any]:
    """The random generators that these objects, and what they hold, have."""
    found, seen = [], set()
    queue = deque((holder, 0) for holder in holders)
    while queue:
        value, depth = queue.popleft()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, _GENERATORS):
            found.append(value)
        if isinstance(value, (*_GENERATORS, *_OPAQUE)) or depth > _DEEPEST:
            continue
        held: Iterable[Any] = getattr(value, "__dict__", {}).values()
        if isinstance(value, dict):
            held = [*held, *islice(value.values(), _LONGEST)]
        elif isinstance(value, (list, tuple, set, deque)):
            held = [*held, *islice(value, _LONGEST)]
        elif hasattr(value, "__self__"):  # a method as collate_fn
            held = [*held, value.__self__]
        queue.extend((each, depth + 1) for each in held)
    return found


def _keep(value: Any, seen: dict[int, Any]) -> Callable[[], Any]:
    """A function that gives back this object with what it holds now."""
    if id(value) in seen:  # also ends circles; who came first gives back what it holds
        return lambda: value
    seen[id(value)] = value  # held, so that no other object gets its id
    if isinstance(value, Tensor):
        plain = value.layout == torch.strided and not isinstance(value, (UninitializedParameter, UninitializedBuffer))
        return partial(_tensor, value, value.detach().clone()) if plain else lambda: value
    if isinstance(value, np.ndarray):
        return partial(_array, value, value.copy())
    if isinstance(value, _GENERATORS):
        return _generator(value)
    if isinstance(value, dict):
        return partial(_dict, value, [(key, _keep(each, seen)) for key, each in value.items()])
    if isinstance(value, (list, deque)):
        return partial(_sequence, value, [_keep(each, seen) for each in value])
    if isinstance(value, set):
        return partial(_set, value, set(value))
    if isinstance(value, tuple):
        return partial(_tuple, value, [_keep(each, seen) for each in value])
    return lambda: value


def _generator(generator: Any) -> Callable[[], Any]:
    def give_back() -> Any:
        if isinstance(generator, torch.Generator):
            generator.set_state(state)
        elif isinstance(generator, np.random.Generator):
            generator.bit_generator.state = state
        elif isinstance(generator, np.random.RandomState):
            generator.set_state(state)
        else:
            generator.setstate(state)
        return generator

    state: Any
    if isinstance(generator, (torch.Generator, np.random.RandomState)):
        state = generator.get_state()
    elif isinstance(generator, np.random.Generator):
        state = generator.bit_generator.state
    else:
        state = generator.getstate()
    return give_back


def _tensor(tensor: Tensor, copy: Tensor) -> Tensor:
    with torch.inference_mode(tensor.is_inference()), torch.no_grad():
        if tensor.shape != copy.shape or tensor.dtype != copy.dtype or tensor.device != copy.device:
            tensor.data = copy
        elif not torch.equal(tensor, copy):  # what did not change keeps its version
            tensor.copy_(copy)
    return tensor


def _array(array: np.ndarray, copy: np.ndarray) -> np.ndarray:
    if array.flags.writeable:
        array[...] = copy
    return array


def _dict(held: dict[Any, Any], items: list[tuple[Any, Callable[[], Any]]]) -> dict[Any, Any]:
    before = {key: give_back() for key, give_back in items}
    if list(held) != list(before) or any(held[key] is not value for key, value in before.items()):
        held.clear()
        held.update(before)
    return held


def _sequence(held: Any, items: list[Callable[[], Any]]) -> Any:
    before = [give_back() for give_back in items]
    if len(held) != len(before) or any(a is not b for a, b in zip(held, before, strict=True)):
        held.clear()
        held.extend(before)
    return held


def _set(held: set[Any], before: set[Any]) -> set[Any]:
    if held != before:
        held.clear()
        held.update(before)
    return held


def _tuple(held: tuple[Any, ...], items: list[Callable[[], Any]]) -> tuple[Any, ...]:
    for give_back in items:
        give_back()
    return held
