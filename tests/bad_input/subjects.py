"""What is called with bad input, and how its answer is judged."""

import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, get_type_hints

from hypothesis import strategies as st

from tests.bad_input.values import Values, kinds_of, of_wrong_type

#: What a wrong argument may raise.
REFUSALS = (ValueError, FileNotFoundError)


@dataclass(frozen=True)
class Subject:
    """A class or a function, and the values of its arguments.

    Attributes:
        make: called with keyword arguments.
        values: of each argument.
        base: arguments that every call has.
        beside: arguments that a call has beside a certain one.
        named: by argument, other names that the message may have in its place.
        left: by argument, why it is not tried.
        of: whose signature it is, if not that of ``make``.
    """

    make: Callable[..., Any]
    values: Mapping[str, Values]
    base: Mapping[str, Any] = field(default_factory=dict)
    beside: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    named: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    left: Mapping[str, str] = field(default_factory=dict)
    of: Callable[..., Any] | None = None

    @property
    def name(self) -> str:
        """For the test's id."""
        return (self.of or self.make).__name__

    def call(self, argument: str, value: Any) -> Any:
        """The call with that argument."""
        return self.make(**{**self.base, **self.beside.get(argument, {}), argument: value})

    def arguments(self) -> list[str]:
        """All arguments of the signature but ``*args`` and ``**kwargs``."""
        parameters = inspect.signature(self.of or self.make).parameters.values()
        spread = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
        return [parameter.name for parameter in parameters if parameter.kind not in spread]

    def tried(self) -> list[str]:
        """The arguments that there is something to try of."""
        return [name for name in self.arguments() if name not in self.left and self.wrong(name) != ((), None)]

    def least(self, argument: str) -> int:
        """How many different values a test tries at least: those of the table, and two that hypothesis draws."""
        edges, strategy = self.wrong(argument)
        return len(edges) + (0 if strategy is None else 2)

    def wrong(self, argument: str) -> tuple[tuple[Any, ...], st.SearchStrategy[Any] | None]:
        """Values that the argument must not take: some that are always tried, and a strategy for more.

        The strategy draws what the annotation does not name, and what the table says is out of range.
        """
        function = self.of or self.make
        hint = get_type_hints(function.__init__ if isinstance(function, type) else function).get(argument, Any)
        values = self.values[argument]
        drawn = [] if kinds_of(hint) >= kinds_of(Any) else [of_wrong_type(hint)]
        drawn += [] if values.wrong is None else [values.wrong]
        return values.edges, st.one_of(drawn) if drawn else None

    def complaint(self, argument: str, value: Any) -> str | None:
        """What is wrong with how the call refuses the value; None if nothing is."""
        try:
            self.call(argument, value)
        except REFUSALS as error:
            return None if self._clear(argument, str(error)) else f"unclear: {type(error).__name__}: {error}"
        except Exception as error:
            return f"no message of ours: {type(error).__name__}: {error}"
        return "accepted silently"

    def _clear(self, argument: str, message: str) -> bool:
        """Whether a message names the argument, says what was expected, and what came."""
        names = "|".join((argument, *self.named.get(argument, ())))
        return (
            re.search(rf"(?s)^Expected arguments? .*`[^`]*\b({names})\b[^`]*`.* (but|got|found) .", message) is not None
        )
