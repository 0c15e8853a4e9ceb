"""MCP servers that end, begin anew, or answer too late."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import pytest
from fastmcp.client.transports import StdioTransport
from pydantic_ai import Agent, ModelMessage, ModelResponse, TextPart
from pydantic_ai.mcp import MCPToolset
from pydantic_ai.models.function import AgentInfo, FunctionModel
from tests.agents.steps import Step, called, prompt_of, returned
from tests.patience import PATIENCE
from tests.services.server import free_port

from paigeant import ActivityRegistry, Workflow
from paigeant.agents import PaigeantDurability
from paigeant.testing import MemoryApp

SERVER = Path(__file__).with_name("mortal_server.py")
ARGUMENTS: dict[str, dict[str, Any]] = {"add": {"first": 1, "second": 2}}


def one_call(messages: list[ModelMessage], _: AgentInfo) -> ModelResponse:
    """Calls each of the tools that the prompt names, one after the other, and says what they gave."""
    tools, done = prompt_of(messages).split(), returned(messages)
    if len(done) < len(tools):
        tool = tools[len(done)]
        return ModelResponse(parts=[called(tool, f"c{len(done)}", **ARGUMENTS.get(tool, {}))])
    return ModelResponse(parts=[TextPart(", ".join(str(answer) for answer in done.values()))])


def agent_of(toolset: Any) -> Agent[Any, str]:
    """An agent with the engine and the tools of this toolset."""
    agent: Agent[Any, str] = Agent(
        FunctionModel(one_call), name="agent", toolsets=[toolset], capabilities=[PaigeantDurability()]
    )
    return agent


@asynccontextmanager
async def over_stdio(calls: Path, **options: Any) -> AsyncIterator[MCPToolset[Any]]:
    """The toolset of a server that is begun when it is needed, and ends with the block."""
    transport = StdioTransport(sys.executable, [str(SERVER), str(calls)])
    try:
        yield MCPToolset(transport, id="mortal", init_timeout=PATIENCE, **options)
    finally:
        await transport.close()


@contextmanager
def over_http(calls: Path, port: int) -> Iterator[subprocess.Popen[str]]:
    """A server at this port, once it takes connections."""
    command = [sys.executable, str(SERVER), str(calls), str(port)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr is not None
        try:
            assert any("running on" in line for line in server.stderr)
            yield server
        finally:
            server.kill()


async def test_a_lost_connection_is_no_answer_of_the_tool(tmp_path: Path) -> None:
    """A server that ends in a call fails the attempt; the next one begins it anew and makes the same call again."""
    step, calls = Step(), tmp_path / "calls"
    async with over_stdio(calls) as mortal:
        agent = agent_of(mortal)
        with pytest.raises(ConnectionError, match="the connection to MCP server 'mortal' was lost"):
            await step.attempt(lambda: agent.run("pay"))
        assert not any("call_tool" in unit for unit in step.units)
        assert (await step.attempt(lambda: agent.run("pay"))).output == "paid"
    assert calls.read_text().split() == ["pay", "pay"]


async def test_a_server_is_reached_again_while_others_hold_the_lost_connection(tmp_path: Path) -> None:
    """Runs that have a connection in common don't keep each other from having a new one, and go on with it."""
    began, goes_on = asyncio.Event(), asyncio.Event()
    async with over_stdio(tmp_path / "calls") as mortal:
        agent = agent_of(mortal)

        @agent.tool_plain
        async def hold() -> str:
            began.set()
            await goes_on.wait()
            return "held"

        holding = asyncio.create_task(Step().attempt(lambda: agent.run("add hold add")))
        await began.wait()
        with pytest.raises(ConnectionError):
            await Step().attempt(lambda: agent.run("pay"))
        assert (await Step().attempt(lambda: agent.run("add pay"))).output == "3, paid"
        goes_on.set()
        assert (await holding).output == "3, held, 3"


async def test_a_server_that_is_begun_anew_is_reached_by_http(tmp_path: Path) -> None:
    """So it is by HTTP; a run that needs no more of it isn't failed by the lost connection either."""
    began, goes_on = asyncio.Event(), asyncio.Event()
    port, calls = free_port(), tmp_path / "calls"
    agent = agent_of(MCPToolset(f"http://127.0.0.1:{port}/mcp", id="mortal"))

    @agent.tool_plain
    async def hold() -> str:
        began.set()
        await goes_on.wait()
        return "held"

    with over_http(calls, port) as server:
        holding = asyncio.create_task(Step().attempt(lambda: agent.run("add hold")))
        await began.wait()
        with pytest.raises(ConnectionError):
            await Step().attempt(lambda: agent.run("pay"))
        server.wait()
    with over_http(calls, port):
        assert (await Step().attempt(lambda: agent.run("pay"))).output == "paid"
    goes_on.set()
    assert (await holding).output == "3, held"


async def test_outside_of_steps_a_lost_connection_is_told_to_the_model(tmp_path: Path) -> None:
    """There an agent that carries the engine does what any other does."""
    async with over_stdio(tmp_path / "calls") as mortal:
        assert "Connection closed" in (await agent_of(mortal).run("pay")).output


@pytest.mark.parametrize("tool", ["pay", "dawdle"])
async def test_a_lost_answer_of_what_is_done_at_most_once_goes_to_a_person(tmp_path: Path, tool: str) -> None:
    """Neither a connection that was lost nor an answer that is late is told to a model that would call it again."""
    activity, calls = ActivityRegistry(), tmp_path / "calls"
    async with over_stdio(calls, read_timeout=5) as mortal:
        activity.agent(agent_of(mortal.with_metadata(paigeant={"at_most_once": True})), prompt="{tool}")
        async with MemoryApp(activity) as app:
            run = await app.dispatch(Workflow("w", ["agent"]), {"tool": tool})
            await app.drain()
            [request] = await run.requests()
            assert request.name == f"tool '{tool}' of agent 'agent' again"
            await run.cancel()
    assert calls.read_text().split() == [tool]
