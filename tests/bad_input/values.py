"""Which values an argument takes: said in a table, drawn by hypothesis. Nothing here reads the package's code."""

import math
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor, nn

INF, NAN = float("inf"), float("nan")
HUGE = 10**18  # no count of anything that is kept in memory

#: Values by kind. What an annotation does not name is wrong for it.
KINDS: dict[str, st.SearchStrategy[Any]] = {
    "none": st.none(),
    "bool": st.booleans(),
    "int": st.integers(-HUGE, HUGE),
    "float": st.floats(-1e6, 1e6).filter(lambda value: value != int(value)),
    "nan": st.just(NAN),
    "str": st.sampled_from(["", " ", "1", "nonsense", "None", "nan", "../..", "\n", "é"]) | st.text(max_size=5),
    "bytes": st.just(b"nonsense"),
    "list": st.sampled_from([[], [None], [[]], ["a", 1], [NAN], (), (None,)]),
    "dict": st.sampled_from([{}, {"a": 1}, {1: None}]),
    "set": st.just({1, 2}),
    "complex": st.just(1 + 2j),
    "object": st.builds(object),
    "tensor": st.sampled_from([torch.zeros(2, 3), torch.tensor([1.0, NAN])]),
    "array": st.just(np.ones(3)),
    "path": st.just(Path("nowhere") / "at" / "all"),
    "module": st.builds(nn.Flatten),
    "callable": st.sampled_from([max, partial(print, 1)]),
}
_OF_TYPE: dict[Any, set[str]] = {
    None: {"none"}, types.NoneType: {"none"}, bool: {"bool"}, int: {"int"}, float: {"int", "float"}, str: {"str"},
    bytes: {"bytes"}, list: {"list"}, tuple: {"list"}, Sequence: {"list", "array"}, Mapping: {"dict"}, dict: {"dict"},
    Tensor: {"tensor"}, np.ndarray: {"array"}, nn.Module: {"module"}, Callable: {"callable", "module"},
    PathLike: {"path"}, Path: {"path"}, Any: set(KINDS),
    Iterable: {"list", "dict", "set", "str", "bytes", "array", "tensor", "path"},
}  # fmt: skip


def kinds_of(hint: Any) -> set[str]:
    """The kinds of value that an annotation names."""
    if isinstance(hint, TypeVar):
        return set().union(*map(kinds_of, hint.__constraints__ or (hint.__bound__ or Any,)))
    if get_origin(hint) in (Union, types.UnionType):
        return set().union(*map(kinds_of, get_args(hint)))
    if get_origin(hint) is Literal:
        return set().union(*(_OF_TYPE[type(word)] for word in get_args(hint)))
    return _OF_TYPE.get(get_origin(hint) or hint, set())


def of_wrong_type(hint: Any) -> st.SearchStrategy[Any]:
    """Values of every kind that the annotation does not name; NaN always, unless anything will do."""
    return st.one_of([values for kind, values in KINDS.items() if kind not in kinds_of(hint)])


@dataclass(frozen=True)
class Values:
    """What one argument takes.

    Attributes:
        right: some values that are accepted, the ends of the range among them.
        wrong: values of the right type that are not; None if there are none besides ``edges``.
        edges: some of them that are always tried.
    """

    right: tuple[Any, ...] = ()
    wrong: st.SearchStrategy[Any] | None = None
    edges: tuple[Any, ...] = ()

    def __or__(self, other: "Values") -> "Values":
        """Either; for unions of types, whose wrong values do not meet."""
        both = [values for values in (self.wrong, other.wrong) if values is not None]
        return Values(self.right + other.right, st.one_of(both) if both else None, self.edges + other.edges)


def whole(low: int, high: int | None = None, right: tuple[Any, ...] | None = None) -> Values:
    """Integers from ``low``, up to ``high`` if there is an end; None may be among ``right``."""
    wrong: st.SearchStrategy[int] = st.integers(-HUGE, low - 1)
    edges: tuple[int, ...] = (low - 1, -HUGE)
    if high is not None:
        wrong, edges = wrong | st.integers(high + 1, HUGE), (*edges, high + 1, HUGE)
    return Values((low,) if right is None else right, wrong, edges)


def number(low: float, high: float = INF, ends: str = "[)", right: tuple[Any, ...] | None = None) -> Values:
    """Numbers between ``low`` and ``high``; of the ends, "[" and "]" belong to them (of infinity, too)."""
    closed = ends[0] == "[", ends[1] == "]"
    wrong = st.floats(-1e9, low, exclude_max=closed[0])
    edges = [math.nextafter(low, -INF) if closed[0] else low, low - 1.0, -INF]
    if high < INF:
        wrong = wrong | st.floats(high, 1e9, exclude_min=closed[1])
        edges += [math.nextafter(high, INF) if closed[1] else high, high + 1.0]
    if high < INF or not closed[1]:
        edges.append(INF)
    inside = tuple(end for end, belongs in zip((low, high), closed, strict=True) if belongs)
    return Values(inside if right is None else right, wrong, tuple(edges))


def words(*choices: str, right: tuple[Any, ...] | None = None) -> Values:
    """These strings alone."""
    near = [f"{choices[0]} ", choices[0].upper(), "", "nonsense"]
    return Values(
        choices if right is None else right,
        st.text(max_size=4).filter(lambda word: word not in choices),
        tuple(word for word in near if word not in choices),
    )


def flag() -> Values:
    """True and False."""
    return Values((True, False))


def listing(*wrong: Any, right: tuple[Any, ...] = ()) -> Values:
    """All but some; for lists and dicts above all."""
    return Values(right, edges=wrong)


def free(*right: Any) -> Values:
    """Anything of the annotated type."""
    return Values(right)


#: Arguments that many classes share.
OPTIMIZER = free(partial(torch.optim.SGD, lr=0.1))
SCHEDULE = free(None, partial(torch.optim.lr_scheduler.StepLR, step_size=1))
SHARE = number(0, 1, "[)", right=(0.0, 0.3))
SEED = whole(0, right=(0, 3))
