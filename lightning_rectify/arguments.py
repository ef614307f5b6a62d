"""Whether arguments are what their annotations say: the half of a check that is the same in every constructor.

What depends on other arguments is the constructor's own; it may rely on the types.
"""

import math
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from difflib import get_close_matches
from functools import cache
from itertools import repeat
from numbers import Integral, Real
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

_LONGEST = 120  # characters of a value in a message
_FEW = 3  # choices that a message joins by "or"


def check_types(owner: Callable[..., Any], values: Mapping[str, Any]) -> None:
    """Refuse arguments that are not of the type they are annotated with; call it first, with ``locals()``.

    Stricter than Python where a value would pass for another one silently: True is no integer, NaN is no number, a
    string is no sequence. Looser where nothing is lost: an integer is a number, lists and tuples are each other's like,
    and numpy's scalars are numbers. Of words (``Literal``) only that they are strings is looked at.

    Args:
        owner: the function, or the class whose constructor it is.
        values: arguments by name; names that are not annotated are not looked at.

    Raises:
        ValueError: naming the argument, what was expected and what came.

    Example:
        >>> def scaled(factor: float, times: int = 1) -> float:
        ...     check_types(scaled, locals())
        ...     return factor**times
        >>> scaled(2, times=3)
        8
        >>> scaled(2.0, times="3")
        Traceback (most recent call last):
        ValueError: Expected argument `times` to be an integer but got '3'.
    """
    for name, hint in _hints(owner):
        if name in values and not _fits(values[name], hint):
            raise ValueError(f"Expected argument `{name}` to be {_said(hint)} but got {came(values[name])}.")


def check_least(least: float, /, **numbers: float | None) -> None:
    """Refuse numbers below ``least``, and infinite ones; None passes.

    Args:
        least: the least value allowed.
        numbers: by name of the argument.

    Raises:
        ValueError: naming the argument, what was expected and what came.
    """
    for name, value in numbers.items():
        if value is not None and not least <= value < math.inf:
            raise ValueError(f"Expected argument `{name}` to be at least {least} but got {value!r}.")


def check_above(bound: float, /, **numbers: float | None) -> None:
    """Refuse numbers that are not above ``bound``, and infinite ones; None passes.

    Args:
        bound: what they have to exceed.
        numbers: by name of the argument.

    Raises:
        ValueError: naming the argument, what was expected and what came.
    """
    for name, value in numbers.items():
        if value is not None and not bound < value < math.inf:
            raise ValueError(f"Expected argument `{name}` to be a finite number above {bound} but got {value!r}.")


def check_fraction(**numbers: float | None) -> None:
    """Refuse numbers outside [0, 1): probabilities of dropping, decays of averages; None passes.

    Args:
        numbers: by name of the argument.

    Raises:
        ValueError: naming the argument, what was expected and what came.
    """
    for name, value in numbers.items():
        if value is not None and not 0 <= value < 1:
            raise ValueError(f"Expected argument `{name}` to be in [0, 1) but got {value!r}.")


def check_choice(choices: Iterable[str | None], /, **values: object) -> None:
    """Refuse a value that is not among the choices; the message names the one that is nearly the same, if there is one.

    Args:
        choices: words, and None if there need not be one.
        values: by name of the argument.

    Raises:
        ValueError: naming the argument, what was expected and what came.

    Example:
        >>> check_choice(("batch", "group", None), norm="grup")
        Traceback (most recent call last):
        ValueError: Expected argument `norm` to be 'batch', 'group' or None but got 'grup'. Did you mean 'group'?
    """
    known = list(choices)
    for name, value in values.items():
        if (value is not None and not isinstance(value, str)) or value not in known:
            *first, last = map(repr, known) if len(known) <= _FEW else map(str, known)
            said = f"{', '.join(first)} or {last}" if len(known) <= _FEW else f"one of {', '.join([*first, last])}"
            words = [word for word in known if word is not None]
            near = get_close_matches(value, words, n=1) if isinstance(value, str) else []
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"Expected argument `{name}` to be {said} but got {came(value)}.{hint}")


def came(value: Any) -> str:
    """How a message shows a value: as it prints, unless that is long; of arrays and networks, what they are."""
    if (shape := getattr(value, "shape", None)) is not None and getattr(value, "ndim", False):
        return f"a {type(value).__name__} of shape {tuple(shape)}"
    shown = repr(value)
    return shown if len(shown) <= _LONGEST and "\n" not in shown else f"a {type(value).__name__}"


@cache
def _hints(owner: Callable[..., Any]) -> tuple[tuple[str, Any], ...]:
    function = owner.__init__ if isinstance(owner, type) else owner  # type: ignore[misc]
    hints = get_type_hints(function)
    rest = {"return", "kwargs", "args"}
    return tuple((name, hint) for name, hint in hints.items() if name not in rest and hint is not Any)


def _parts(hint: Any) -> tuple[Any, ...] | None:
    """What a union is made of; None for all else."""
    if isinstance(hint, TypeVar):
        return hint.__constraints__ or ((hint.__bound__,) if hint.__bound__ else (Any,))
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else None


def _fits(value: Any, hint: Any) -> bool:
    if (parts := _parts(hint)) is not None:
        return any(_fits(value, part) for part in parts)
    kind, inner = get_origin(hint) or hint, get_args(hint)
    if kind is Any:
        return True
    if kind in (None, types.NoneType):
        return value is None
    if kind is Literal:
        return any(type(value) is type(word) for word in inner)
    if kind in (int, float):
        number = isinstance(value, Integral if kind is int else Real) and not isinstance(value, bool)
        return number and not math.isnan(value)
    if kind in (list, tuple, Sequence):
        return _is_list(value) and _items_fit(value, kind, inner)
    if isinstance(kind, type) and issubclass(kind, Mapping):
        return isinstance(value, Mapping) and (not inner or all(map(_fits_pair, value.items(), repeat(inner))))
    if kind is Callable:
        return callable(value)
    if kind is Iterable:
        return hasattr(value, "__iter__") or hasattr(value, "__getitem__")
    if not isinstance(kind, type) or getattr(kind, "_is_protocol", False):
        return True  # not for isinstance
    return isinstance(value, kind)


def _fits_pair(item: tuple[Any, Any], inner: tuple[Any, ...]) -> bool:
    return all(map(_fits, item, inner))


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes))


def _items_fit(value: Sequence[Any], kind: Any, inner: tuple[Any, ...]) -> bool:
    if kind is tuple and inner and inner[-1] is not Ellipsis:
        return len(value) == len(inner) and all(map(_fits, value, inner))
    return not inner or all(_fits(item, inner[0]) for item in value)


_WORDS: dict[Any, str] = {
    int: "an integer", float: "a number", bool: "True or False", str: "a string", None: "None",
    types.NoneType: "None", Callable: "callable", Iterable: "iterable",
}  # fmt: skip


def _said(hint: Any) -> str:
    """The annotation in words."""
    if (parts := _parts(hint)) is not None:
        words = list(dict.fromkeys(_said(part) for part in parts if not (part is int and float in parts)))
        return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"
    kind, inner = get_origin(hint) or hint, get_args(hint)
    if kind is Literal:
        return " or ".join(map(repr, inner))
    if kind is tuple and inner and inner[-1] is not Ellipsis:
        return f"{len(inner)} items ({', '.join(map(_said, inner))})"
    if kind in (list, tuple, Sequence):
        return f"a list (each item {_said(inner[0])})" if inner else "a list"
    if isinstance(kind, type) and issubclass(kind, Mapping):
        return f"a dict (each value {_said(inner[1])})" if inner and inner[1] is not Any else "a dict"
    return _WORDS.get(kind) or f"a {getattr(kind, '__name__', kind)}"
