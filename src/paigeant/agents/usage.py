"""What agents use inside a step: counted unit by unit, so that each request is counted once however often it is met.

The record of a unit tells what the unit itself used: that of a model request its answer, with the price of its day;
that of a tool call the call, and what agents that aren't recorded used within it. The usage of a step is that of all
its units together, whichever attempt made them: what failed attempts asked for has been paid, too. A replay makes no
unit, and adds nothing.
"""

from __future__ import annotations

import contextlib
import contextvars
from typing import Any, Self

from pydantic_ai import ModelResponse, RunUsage

from paigeant.errors import StoreUnavailable
from paigeant.store import RunValues, StepKey
from paigeant.usage import Usage, money, tokens

__all__ = ["Counting", "Part", "count", "of_request", "of_run", "put_price"]


class Counting:
    """What the units of a step use that are met in this attempt, by their names. Use it as a context manager."""

    def __init__(self) -> None:
        self._used: dict[str, Usage] = {}

    def __enter__(self) -> Self:
        self._token = _COUNTING.set(self)
        return self

    def __exit__(self, *_: object) -> None:
        _COUNTING.reset(self._token)
        del self._token  # it knows the context in which this was set

    def add(self, unit: str, used: Usage) -> None:
        """A unit of that name, done or replayed, used so much itself."""
        if used:
            self._used[unit] = used

    async def total(self, store: RunValues, key: StepKey, *, is_fresh: bool) -> bytes | None:
        """All that the step used, as JSON; None when it used nothing. What earlier attempts did is read in `store`."""
        used = self._used
        if not is_fresh:
            try:
                units = await store.load_units(key)
            except StoreUnavailable:
                units = {}  # what this attempt has seen is better than nothing
            stamps = {name: Usage.stamped(record) for name, record in units.items()}
            used = {**used, **{name: stamp for name, stamp in stamps.items() if stamp is not None}}
        total = Usage.total(used.values())
        return total.dump() if total else None


class Part:
    """A piece of a step that adds up what it uses in `usage`, and how much of that its units tell of.

    Use it as a context manager: the code inside is that piece, and agents that are handed `usage` there add to it.
    `before` is what stood in `usage` before that.
    """

    __slots__ = ("_before", "_token", "told", "usage")

    def __init__(self, usage: RunUsage, before: RunUsage) -> None:
        self.usage = usage
        self.told: list[Usage] = []
        self._before = before

    def __enter__(self) -> Self:
        self._token = _PART.set(self)
        return self

    def __exit__(self, *_: object) -> None:
        _PART.reset(self._token)
        del self._token

    def rest(self) -> Usage:
        """What was used here that no unit tells of: by agents without an engine, in tools that aren't recorded."""
        return of_run(self.usage).beyond(Usage.total((of_run(self._before), *self.told)))


_COUNTING: contextvars.ContextVar[Counting | None] = contextvars.ContextVar("paigeant.counting", default=None)
_PART: contextvars.ContextVar[Part | None] = contextvars.ContextVar("paigeant.part", default=None)


def count(unit: str, used: Usage, added: Usage, *, to: RunUsage | None) -> None:
    """A unit of that name, done or replayed, used so much itself; so much is `added` `to` the count of its run."""
    counting, piece = _COUNTING.get(), _PART.get()
    if counting is not None:
        counting.add(unit, used)
    if piece is not None and to is piece.usage:
        piece.told.append(added)


def of_run(usage: RunUsage) -> Usage:
    """The library's count as ours."""
    return Usage(
        usage.requests,
        usage.tool_calls,
        tokens(usage.input_tokens),
        tokens(usage.output_tokens),
        money(usage.cost),
    )


def of_request(answer: object) -> Usage:
    """What a model request used, as its answer tells, which is one that is about to be recorded."""
    if not isinstance(answer, dict) or not isinstance(answer.get("usage"), dict):
        return Usage(requests=1)
    # What a provider works on still is asked for by and by, which is one request, counted when the answer is there.
    used = _request(answer["usage"], requests=0 if answer.get("state") == "suspended" else 1)
    model = answer.get("model_name")
    # Models that a fallback gave up on before this one may have billed something, too.
    for one in answer.get("failed_attempts") or ():
        if (found := one.get("usage")) is not None:
            used += _request(found, requests=0)
    return used.by(model) if isinstance(model, str) and model else used


def _request(found: dict[str, Any], *, requests: int = 1) -> Usage:
    return Usage(
        requests,
        input_tokens=tokens(found.get("input_tokens")),
        output_tokens=tokens(found.get("output_tokens")),
        cost=money(found.get("cost")),
    )


def put_price(answer: ModelResponse) -> None:
    """Put what an answer cost in US dollars into its usage, where that is known.

    Prices change: it is that of the day on which it was asked, for replays and for limits as well. Numbers that
    can't be added up, as a server may tell them, are put right: counting never fails a step.
    """
    used = answer.usage
    used.input_tokens, used.output_tokens = tokens(used.input_tokens), tokens(used.output_tokens)
    used.cost = money(used.cost)
    if used.cost is None:
        # A model that has no price list, and whatever a list may hold.
        with contextlib.suppress(Exception):
            used.cost = money(answer.cost().total_price)
