"""Steps that do nothing but wait: for a while, or for a signal. Every worker knows them; none is kept busy by them."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from paigeant.activity import MISSING, ActivityRegistry
from paigeant.clock import is_duration
from paigeant.context import StepContext, check_signal
from paigeant.errors import InvalidDefinition, WaitTimeout
from paigeant.slip import Step

__all__ = ["WAITS", "Sleep", "WaitFor"]

WAITS = ActivityRegistry()
"""What the steps that wait have to do."""

_TOPIC = "paigeant.waits"
_RETRIES = 1000
"""Nothing here fails but with its worker, and however many of those are lost, a wait goes on."""


@WAITS.execute("paigeant.sleep", topic=_TOPIC, retries=_RETRIES)
async def _sleep(seconds: float, context: StepContext) -> None:
    await context.sleep(seconds)


@WAITS.execute("paigeant.wait_for", topic=_TOPIC, retries=_RETRIES)
async def _wait_for(
    signal: str, timeout: float | None, otherwise: dict[str, Any] | None, context: StepContext
) -> Any:
    try:
        return await context.wait_for(signal, timeout=timeout)
    except WaitTimeout:
        if otherwise is None:
            raise
        return otherwise["value"]


def Sleep(  # noqa: N802  # stands where a Step does
    duration: float | timedelta, *, id: str = "", when: str | None = None
) -> Step:
    """A step that lets `duration` (seconds, or a timedelta) pass before the next one: `sleep`, then `sleep_2`."""
    args = {"seconds": _seconds("a duration", duration)}
    return Step("paigeant.sleep", id=id, called="sleep", when=when, topic=_TOPIC, args=args)


def WaitFor(  # noqa: N802
    signal: str,
    *,
    timeout: float | timedelta | None = None,
    default: Any = MISSING,
    id: str | None = None,
    when: str | None = None,
) -> Step:
    """A step that waits for the next signal of a name, whose value is its output, under the signal's name.

    A second wait for that name is `name_2`, like any activity that is named twice.

    A signal that came before the run got here counts. After `timeout` (seconds, or a timedelta) its output is
    `default`; without one the step fails, and what was done is undone.
    """
    check_signal(signal)
    limit = None if timeout is None else _seconds("a timeout", timeout)
    if default is not MISSING and limit is None:
        raise InvalidDefinition(
            f"WaitFor('{signal}') has a default, but no timeout after which it would hold"
        )
    otherwise = None if default is MISSING else {"value": default}
    args = {"signal": signal, "timeout": limit, "otherwise": otherwise}
    return Step("paigeant.wait_for", id=id or "", called=signal, when=when, topic=_TOPIC, args=args)


def _seconds(what: str, given: object) -> float:
    seconds = given.total_seconds() if isinstance(given, timedelta) else given
    if not is_duration(seconds):
        raise InvalidDefinition(
            f"{what} is a number of seconds above 0 and below 100 years, or a timedelta, found {given!r}"
        )
    assert isinstance(seconds, (int, float)), "a duration is a number"
    return float(seconds)
