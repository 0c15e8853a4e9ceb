"""The work that every engine here is measured with, and how its time is taken. Knows no engine.

A run has five steps. A step takes an order of about 200 bytes of JSON and gives it back with one number raised by
one; the engine records each result in its usual durable way, and the last one is fetched and checked.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

__all__ = ["STEPS", "WARM_UP", "OneRun", "Order", "all_at_once", "one_by_one", "order", "raised"]

STEPS = 5
WARM_UP = 20
"""Runs before anything is measured: statements are compiled, connections opened, memory taken."""

Order = dict[str, Any]
OneRun = Callable[[Order], Awaitable[Order]]
"""Starts a run with this order and gives what its last step returned."""


def order() -> Order:
    """What a run begins with."""
    return {
        "n": 0,
        "customer": "c-000042",
        "kind": "order.created",
        "note": "Leave it with the neighbours on the second floor when nobody opens; they know about it. "
        "Ring twice, please.",
        "tags": ["a", "b", "c"],
    }


def raised(order: Order) -> Order:
    """What a step makes of an order."""
    return {**order, "n": order["n"] + 1}


async def all_at_once(one_run: OneRun, runs: int, *, in_flight: int) -> float:
    """Steps a second of so many runs, of which at most `in_flight` have begun and not ended."""
    left = iter(range(runs))

    async def client() -> None:
        for _ in left:
            await _checked(one_run)

    began = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(in_flight)))
    return STEPS * runs / (time.perf_counter() - began)


async def one_by_one(one_run: OneRun, runs: int) -> list[float]:
    """Milliseconds that each of so many runs took from its start to its result, one after the other."""
    took = []
    for _ in range(runs):
        began = time.perf_counter()
        await _checked(one_run)
        took.append((time.perf_counter() - began) * 1000)
    return took


async def _checked(one_run: OneRun) -> None:
    result = await one_run(order())
    if result != {**order(), "n": STEPS}:
        raise AssertionError(f"a run gave {result!r}")
