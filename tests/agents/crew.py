"""Agents that work for a step over the network, and real worker processes for them that die at a given moment.

Run as a program it forks a worker for each line of JSON on its input, waits for its end, and prints how it ended: with
everything imported a worker is at work within milliseconds.
"""

from __future__ import annotations

import asyncio
import gc
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import AsyncIterable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from fastmcp.client.transports import StdioTransport
from pydantic_ai import Agent, RunContext
from pydantic_ai.mcp import MCPToolset
from pydantic_ai.messages import AgentStreamEvent
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider
from tests.agents.chat_server import Answer, ChatServer
from tests.agents.sums_server import Nursery
from tests.patience import PATIENCE

from paigeant.activity import ActivityRegistry
from paigeant.agents import PaigeantDurability, effect_key
from paigeant.app import Paigeant
from paigeant.patience import PatientValues
from paigeant.settings import Settings
from paigeant.workflow import Workflow

__all__ = ["WORKFLOW", "Crew", "activities", "settings"]

ROOT = Path(__file__).parents[2]

BEFORE_THE_FORK = [
    "jsonschema",
    "openai.resources.chat.completions",
    "paigeant.agents.activity",
    "paigeant.databases.postgres",
    "paigeant.databases.sqlite",
    "paigeant.stores.sql",
    "paigeant.transports.postgres",
    "paigeant.transports.sqlite",
    "pydantic_ai.mcp",
]
"""What each worker would else load for itself, when it first needs it."""

WORKFLOW = Workflow("report", ["writer"])

TIMES: dict[str, Any] = {
    "lease": 20.0,
    "heartbeat": 5.0,
    "sweep_interval": 0.05,
    "grace": 1.0,
    "retries": 100,
    "retry_base": 0.0,
    "log_level": "error",
}


def settings(url: str) -> Settings:
    """Short times, and as many attempts as it takes."""
    return Settings(transport_url=url, store_url=url, **TIMES)


def activities(chat_url: str, folder: Path, nursery: str, *, streamed: bool) -> ActivityRegistry:
    """The activity `writer`: an agent with two tools, a tool that asks another agent, and one of an MCP server.

    `nursery` is where servers are forked. Each tool leaves a line in `effects` with its name and its effect key.
    """

    def model(name: str) -> OpenAIChatModel:
        return OpenAIChatModel(name, provider=OpenAIProvider(base_url=chat_url, api_key="none"))

    def effect(tool: str) -> None:
        with open(folder / "effects", "a") as effects:
            effects.write(f"{tool} {effect_key()}\n")

    async def watch(_: RunContext[Any], events: AsyncIterable[AgentStreamEvent]) -> None:
        async for event in events:
            if event.event_kind == "function_tool_result":
                effect(f"watched:{event.tool_call_id}")

    expert = Agent(model("expert"), name="expert", capabilities=[PaigeantDurability()])
    program = ["-S", str(ROOT / "tests/agents/sums_server.py")]
    sums = StdioTransport(sys.executable, [*program, str(folder / "sums"), nursery])
    own = [PaigeantDurability[Any](event_stream_handler=watch)] if streamed else []
    writer = Agent(model("writer"), name="writer", toolsets=[MCPToolset(sums, id="sums")], capabilities=own)

    @writer.tool_plain
    async def weather(city: str) -> str:
        effect(f"weather:{city}")
        return f"rain in {city}"

    @writer.tool_plain
    def price(item: str) -> dict[str, Any]:
        effect(f"price:{item}")
        return {"item": item, "cents": 250}

    @writer.tool
    async def ask(ctx: RunContext[Any], question: str) -> str:
        answer = await expert.run(question, usage=ctx.usage)
        effect(f"ask:{question}")
        return answer.output

    activity = ActivityRegistry()
    activity.agent(writer, prompt="Report on {city}.")
    return activity


async def work(
    url: str, chat_url: str, folder: str, nursery: str, run: str, streamed: bool, die_after: int | None = None
) -> None:
    """Work until the run has ended, or this process has made `die_after` records and is killed for it."""
    if die_after is not None:
        _die_after(die_after)
    activity = activities(chat_url, Path(folder), nursery, streamed=streamed)
    app = Paigeant(settings(url), activities=activity)
    async with app:
        await app.dispatch(WORKFLOW, {"city": "Ghent"}, workflow_id=run)
        worker = app.worker()
        working = asyncio.create_task(worker.run())
        await app.run(run).wait(timeout=PATIENCE)
        await worker.stop()
        await working


def _die_after(records: int) -> None:
    left = records
    save = PatientValues.save_unit

    async def counted(self: PatientValues, *args: Any) -> bytes:
        nonlocal left
        stands = await save(self, *args)
        left -= 1
        if left <= 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return stands

    PatientValues.save_unit = counted  # type: ignore[method-assign,assignment]  # this process has no other purpose


class Crew:
    """Worker processes, one after the other. Leaving the block ends the process that forks them."""

    def __init__(self) -> None:
        self.options: dict[str, Any] = {}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.agents.crew"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=ROOT,
            text=True,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()

    def tell(self, **options: Any) -> None:
        """What the workers are told from here on, beside the run: arguments of `work`."""
        self.options = options

    def work(self, run: str, die_after: int | None = None) -> int:
        """Have a new worker work on a run; its exit code, negative for a signal."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({**self.options, "run": run, "die_after": die_after}) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())


class _Brief(ChatServer):
    """One that keeps no connections, and so no threads either."""

    protocol = "HTTP/1.0"


def _warm_up(nursery: str) -> None:
    """Do one run, for all that is made when it is first needed, such as the schema of messages."""
    script = {"writer": [Answer(calls=[("c1", "weather", {"city": "Ghent"})]), Answer("done")]}
    with tempfile.TemporaryDirectory(prefix="paigeant-crew-") as folder, _Brief(script) as chat:
        url = f"sqlite:///{folder}/runs.db"
        asyncio.run(work(url, chat.url, folder, nursery, "warm", streamed=False))
    gc.freeze()
    assert threading.active_count() == 1, "threads don't survive a fork"


def main() -> None:
    """Fork a worker for each line."""
    for name in BEFORE_THE_FORK:
        importlib.import_module(name)
    with tempfile.TemporaryDirectory(prefix="paigeant-sums-") as folder:
        place = Path(folder) / "nursery"
        nursery = Nursery(place)
        _warm_up(str(place))
        for line in sys.stdin:
            pid = os.fork()
            if pid == 0:
                code = 1
                try:
                    nursery.leave()
                    asyncio.run(work(**json.loads(line), nursery=str(place)))
                    code = 0
                except BaseException:
                    traceback.print_exc()
                finally:
                    os._exit(code)
            _, status = os.waitpid(pid, 0)
            print(os.waitstatus_to_exitcode(status), flush=True)  # noqa: T201  # that is how it answers
        nursery.close()


if __name__ == "__main__":
    main()
