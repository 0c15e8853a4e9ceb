"""The agent that every engine here is measured with, and how its time is taken. Knows no engine.

The agent's model is a test model: it asks for both of the agent's tools in its first answer, and gives what they
returned in its second. So a run is two model requests and two tool calls, none of which takes any time of its own.
"""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, NamedTuple

from pydantic_ai import Agent
from pydantic_ai.capabilities import AbstractCapability
from pydantic_ai.models.test import TestModel

__all__ = ["PROMPT", "Asked", "Many", "OneRun", "asked", "checked", "made", "many", "one_by_one", "settled"]

PROMPT = "Where is my order?"
_ANSWER = '{"add":0,"look_up":{"name":"a","n":1}}'
_WARM_UP = 20


class Asked(NamedTuple):
    """What an agent answered, and the milliseconds that `agent.run` alone took."""

    answer: str
    ms: float


class Many(NamedTuple):
    """Runs a second, and the milliseconds of processor time that each took in this process."""

    runs: float
    cpu_ms: float


OneRun = Callable[[], Awaitable[Any]]
"""Runs the agent once, however the engine does that."""


def made(name: str, *engines: AbstractCapability[None]) -> Agent[None, str]:
    """An agent with two plain function tools."""
    agent = Agent(TestModel(), name=name, capabilities=engines)

    @agent.tool_plain
    async def add(a: int, b: int) -> int:
        return a + b

    @agent.tool_plain
    async def look_up(name: str) -> dict[str, Any]:
        return {"name": name, "n": 1}

    return agent


async def asked(agent: Agent[None, str]) -> Asked:
    """Run the agent once."""
    began = time.perf_counter()
    result = await agent.run(PROMPT)
    return Asked(result.output, (time.perf_counter() - began) * 1000)


def checked(answer: str) -> str:
    """The answer. Raises AssertionError for one that this agent doesn't give."""
    if answer != _ANSWER:
        raise AssertionError(f"an agent answered {answer!r}")
    return answer


def settled() -> None:
    """Take what is loaded out of the garbage collector's sight, as `paigeant run` does; it is done for all alike."""
    gc.collect()
    gc.freeze()


async def one_by_one(ways: Sequence[OneRun], runs: int) -> list[list[float]]:
    """Milliseconds that each of so many runs took, for each of the `ways`: one after the other, the ways in turn."""
    took: list[list[float]] = [[] for _ in ways]
    for number in range(_WARM_UP + runs):
        for way, times in zip(ways, took, strict=True):
            began = time.perf_counter()
            await way()
            if number >= _WARM_UP:
                times.append((time.perf_counter() - began) * 1000)
    return took


async def many(way: OneRun, runs: int, *, in_flight: int) -> Many:
    """What so many runs took, of which at most `in_flight` have begun and not ended."""
    left = iter(range(runs))

    async def client() -> None:
        for _ in left:
            await way()

    began, busy = time.perf_counter(), time.process_time()
    await asyncio.gather(*(client() for _ in range(in_flight)))
    took, busy = time.perf_counter() - began, time.process_time() - busy
    return Many(runs / took, busy * 1000 / runs)
