"""Agents for processes that are killed at any moment, and the file in which each effect of their tools has its key.

A run is an agent that asks for two tools at once, then for one that asks another agent, which has a tool of its own:
five model requests, four effects.
"""

from __future__ import annotations

import asyncio
import os
import random
import sqlite3
import tempfile
from contextlib import closing
from pathlib import Path
from typing import Any

from pydantic_ai import Agent, ModelMessage, ModelResponse, RunContext, TextPart, ToolCallPart
from pydantic_ai.models.function import AgentInfo, FunctionModel
from tests.agents.steps import called, returned
from tests.patience import PATIENCE

from paigeant.activity import ActivityRegistry
from paigeant.agents import PaigeantDurability, effect_key
from paigeant.app import Paigeant
from paigeant.settings import Settings
from paigeant.slip import RunStatus
from paigeant.testing import MemoryApp
from paigeant.workflow import Workflow

__all__ = ["EFFECTS", "OUTPUT", "REQUESTS", "WORKFLOW", "effects", "make_file", "play", "warm_up"]

WORKFLOW = Workflow("clerk", ["clerk"])
EFFECTS = {"charge", "note", "delegate", "pay"}
REQUESTS = 5
OUTPUT = "charged 7, noted, delegated: paid"
PAUSE = 0.01

_FILE = "effects.db"


def make_file(folder: Path) -> None:
    """The file of effects, empty."""
    with closing(sqlite3.connect(folder / _FILE)) as file:
        file.execute("PRAGMA journal_mode=WAL")
        file.execute("CREATE TABLE effects (run TEXT, tool TEXT, key TEXT)")


def effects(folder: Path) -> list[tuple[str, str, str, int]]:
    """What was done: run, tool and effect key, and how often."""
    with closing(sqlite3.connect(folder / _FILE)) as file:
        return list(file.execute("SELECT run, tool, key, count(*) FROM effects GROUP BY run, tool, key"))


async def _pause() -> None:
    await asyncio.sleep(random.random() * PAUSE)


def activities(folder: Path) -> ActivityRegistry:
    """The activity `clerk`."""

    async def effect(tool: str) -> None:
        await _pause()
        key = effect_key()
        with closing(sqlite3.connect(folder / _FILE, timeout=PATIENCE, isolation_level=None)) as file:
            file.execute("INSERT INTO effects VALUES (?, ?, ?)", (key.split(":")[0], tool, key))
        await _pause()

    def model(*turns: Any) -> FunctionModel:
        async def respond(messages: list[ModelMessage], _: AgentInfo) -> ModelResponse:
            await _pause()
            turn = turns[sum(isinstance(message, ModelResponse) for message in messages)]
            answer = turn(messages) if callable(turn) else turn
            parts = answer if isinstance(answer, list) else [answer]
            return ModelResponse(
                [part if isinstance(part, ToolCallPart) else TextPart(part) for part in parts]
            )

        return FunctionModel(respond)

    expert = Agent(
        model(called("pay", "e1"), lambda messages: returned(messages)["e1"]),
        name="expert",
        capabilities=[PaigeantDurability()],
    )
    clerk = Agent(
        model(
            [called("charge", "c1", euros=7), called("note", "c2")],
            called("delegate", "c3"),
            lambda messages: ", ".join(str(returned(messages)[call]) for call in ("c1", "c2", "c3")),
        ),
        name="clerk",
    )

    @expert.tool_plain
    async def pay() -> str:
        await effect("pay")
        return "paid"

    @clerk.tool_plain
    async def charge(euros: int) -> str:
        await effect("charge")
        return f"charged {euros}"

    @clerk.tool_plain
    async def note() -> str:
        await effect("note")
        return "noted"

    @clerk.tool
    async def delegate(ctx: RunContext[Any]) -> str:
        answer = await expert.run("Pay.", usage=ctx.usage)
        await effect("delegate")
        return f"delegated: {answer.output}"

    activity = ActivityRegistry()
    activity.agent(clerk, prompt="Go.", retries=10_000)
    return activity


def warm_up() -> None:
    """Do one run, for all that is made when it is first needed, such as the schema of messages."""

    async def work() -> None:
        with tempfile.TemporaryDirectory(prefix="paigeant-clerks-") as folder:
            make_file(Path(folder))
            async with MemoryApp(activities(Path(folder))) as app:
                run = await app.dispatch(WORKFLOW)
                await app.drain()
                assert (await run.status()) is RunStatus.COMPLETED

    asyncio.run(work())


def play(role: str, folder: Path, settings: dict[str, Any], options: dict[str, Any]) -> None:
    """Be a worker in this process, for as long as it lives."""
    random.seed(os.getpid())

    async def work() -> None:
        async with Paigeant(Settings(**settings), activities=activities(folder)) as app:
            await app.worker(concurrency=options["concurrency"]).run()

    asyncio.run(work())
