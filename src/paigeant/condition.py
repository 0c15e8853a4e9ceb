"""Conditions of steps: CEL expressions, compiled once and evaluated over the payload."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from functools import cache, lru_cache
from types import ModuleType
from typing import TYPE_CHECKING, Any

from paigeant.errors import InvalidCondition

if TYPE_CHECKING:
    from cel import Program

__all__ = ["check", "evaluate", "names"]


_LONGEST = 2000
"""Characters of an expression. The library reads it by recursion: a chain of 20,000 operators overflows a stack of
8 MiB and so ends the process. For as many as this, whichever they are, 1 MiB is enough."""


@cache
def _library() -> Any:
    """The library, without its own command line: importing that along takes five times as long, and nobody uses it."""
    command_line = ModuleType("cel.cli")
    if "cel" not in sys.modules:
        sys.modules.setdefault(command_line.__name__, command_line)
    try:
        import cel  # here, because importing it takes longer than all of the rest of the core
    finally:
        if sys.modules.get(command_line.__name__) is command_line:
            del sys.modules[command_line.__name__]
    return cel


@lru_cache(maxsize=1024)
def _compiled(expression: str) -> Program:
    if len(expression) > _LONGEST:
        raise InvalidCondition(
            f"when={expression[:40]!r}... has {len(expression):,} characters, at most {_LONGEST:,} are allowed; "
            "have a step before this one work out what the condition asks"
        )

    try:
        program: Program = _library().compile(expression)
        return program
    except ValueError as exc:
        reason = " ".join(str(exc).split("\n")[0].split())
        raise InvalidCondition(f"when={expression!r} is not a CEL expression: {reason}") from exc


def check(expression: str) -> None:
    """Raise InvalidCondition unless `expression` compiles."""
    if not isinstance(expression, str) or not expression.strip():
        raise InvalidCondition(f"`when` is a CEL expression such as 'quantity > 1', found {expression!r}")
    _compiled(expression)


def names(expression: str) -> list[str]:
    """The variables that `expression` refers to, sorted."""
    return _compiled(expression).variables()


def evaluate(
    expression: str, payload: Mapping[str, Any], *, besides: Callable[[], Iterable[str]] = tuple
) -> bool:
    """Whether `expression` holds for `payload`.

    `besides` gives names that there are as well: who asks for one that isn't there is told of them.
    Raises InvalidCondition when it names what isn't there, can't be computed, or gives no truth value.
    """
    program = _compiled(expression)
    try:
        value = program.execute(dict(payload))
    except KeyError as exc:
        told, cause = _about(payload, str(exc), exc)
        raise InvalidCondition(f"when={expression!r} asks for {told}, which isn't there") from cause
    except (
        Exception
    ) as exc:  # the library raises RuntimeError, TypeError and ValueError for what it can't compute
        # What a comprehension names (`i` of `items.all(i, ...)`) isn't there either, and need not be.
        missing = [name for name in program.variables() if name not in payload and _lacks(exc, name)]
        if missing:
            there = ", ".join(sorted({*payload, *besides()})) or "nothing"
            raise InvalidCondition(f"when={expression!r} names '{missing[0]}'; there is {there}") from exc
        told, cause = _about(payload, str(exc), exc)
        reason = " ".join(told.split())  # a pattern's errors are told in several lines
        raise InvalidCondition(f"when={expression!r} can't be computed: {reason}") from cause
    if not isinstance(value, bool):
        told, _ = _about(payload, repr(value))
        raise InvalidCondition(f"when={expression!r} gives {told}, expected true or false")
    return value


def _lacks(error: Exception, name: str) -> bool:
    """Whether it is `name` that the library looked for and didn't find."""
    return str(error).startswith(f"Undefined variable or function: '{name}'")


def _about(
    payload: Mapping[str, Any], text: str, cause: Exception | None = None
) -> tuple[str, Exception | None]:
    """`text` without what is secret in `payload`, and `cause` if there is nothing."""
    from paigeant.redaction import secrets_in, without  # here, because it loads pydantic

    secrets = secrets_in(payload)
    return without(text, secrets), None if secrets else cause
