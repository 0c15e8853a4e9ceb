"""PaigeantDurability: which units an agent's run is made of, how they are named, and that none is done again."""

from __future__ import annotations

from collections.abc import AsyncIterable
from pathlib import Path
from typing import Any

from pydantic_ai import Agent, CancellationToken, RunContext
from pydantic_ai.capabilities import AbstractCapability, LocalWorkspace, durable_operation
from pydantic_ai.messages import AgentStreamEvent
from pydantic_ai.models.test import TestModel
from pydantic_ai.toolsets import DynamicToolset, FunctionToolset
from tests.agents.durable import AnyAgent, Till, both_answers, durable
from tests.agents.steps import Step, called, scripted

from paigeant.agents import PaigeantDurability


async def test_an_agent_goes_on_behind_what_is_recorded() -> None:
    """After a crash behind each unit no model request and no tool call that was recorded is made again."""
    tools: list[str] = []
    model, requests = scripted([called("look", "c1", what="a"), called("look", "c2", what="b")], both_answers)
    agent = durable(model)

    @agent.tool_plain(sequential=True)
    async def look(what: str) -> str:
        tools.append(what)
        return what.upper()

    step = Step()
    result, crashes = await step.resumed(lambda: agent.run("go"))
    assert (result.output, crashes) == ("c1=A c2=B", 4)
    assert (requests, sorted(tools)) == ([0, 1], ["a", "b"])


async def test_an_agent_that_is_handed_the_engine_for_a_run_records_the_same_units() -> None:
    """`capabilities=[engine]` at a run makes the same units as the engine that an agent carries."""
    model, _ = scripted(called("look", "c1"), both_answers)
    agent: AnyAgent = Agent(model, name="agent")
    carrying = durable(model)
    for one in (agent, carrying):

        @one.tool_plain
        def look() -> str:
            return "seen"

    handed, carried = Step(), Step()
    engine: PaigeantDurability[Any] = PaigeantDurability()
    await handed.attempt(lambda: agent.run("go", capabilities=[engine]))
    await carried.attempt(lambda: carrying.run("go"))
    assert handed.units == carried.units
    assert len(handed.units) == 3


def test_an_engine_that_threads_hand_to_several_agents_is_bound_to_the_one_that_asks() -> None:
    """Threads may hand one engine to runs of different agents, and be interrupted anywhere."""
    one, other = (Agent[Any, Any](TestModel(), name=name) for name in ("one", "other"))

    class Interrupted(PaigeantDurability[Any]):
        def __setattr__(self, name: str, value: Any) -> None:
            super().__setattr__(name, value)
            if name == "_binding" and value is not None and value[0][0] is one:
                self.for_agent(other)  # as another thread does it, at the worst of all moments

    bound = Interrupted().for_agent(one)
    assert isinstance(bound, PaigeantDurability)
    assert bound.name == "one"


async def test_outside_of_a_step_the_engine_does_nothing() -> None:
    """An agent that carries it runs as if it didn't: ids are random, tools are called, runtime toolsets are taken."""
    model, requests = scripted(called("add", "c1"), both_answers)
    agent = durable(model)
    extra = FunctionToolset[Any](id="extra")

    @extra.tool_plain
    def add() -> int:
        return 1

    first = await agent.run("go", toolsets=[extra], cancellation_token=CancellationToken())
    second = await agent.run("go", toolsets=[extra])
    assert (first.output, second.output, requests) == ("c1=1", "c1=1", [0, 1, 0, 1])
    assert first.run_id != second.run_id


async def test_the_names_of_units_are_pinned() -> None:
    """These are stored: a name that changes makes running work begin anew. Never change them along with code."""
    counted = FunctionToolset[Any](id="counted")

    @counted.tool_plain
    def count() -> int:
        return 1

    def dynamic(_: RunContext[Any]) -> FunctionToolset[Any]:
        toolset = FunctionToolset[Any](id="inside")

        @toolset.tool_plain
        def pick() -> int:
            return 2

        return toolset

    def validate(ctx: RunContext[Any]) -> None:
        assert ctx.tool_name == "look"

    inner_model, _ = scripted("inner")
    inner = durable(inner_model, name="inner")
    calls = [called("look", "c1"), called("count", "c2"), called("pick", "c3"), called("ask", "c 4")]
    model, _ = scripted(calls, "done")

    async def watch(_: RunContext[Any], events: AsyncIterable[AgentStreamEvent]) -> None:
        async for _event in events:
            pass

    agent = durable(
        model,
        toolsets=[counted, DynamicToolset(dynamic, id="dyn")],
        capabilities=[Audit()],
        engine={"event_stream_handler": None},
    )

    @agent.tool_plain(args_validator=validate)
    def look() -> int:
        return 0

    @agent.tool_plain
    async def ask() -> str:
        return str((await inner.run("inner")).output)

    step = Step()
    await step.attempt(lambda: agent.run("go", timeout=60))
    parent = "86f715f6479c3cbcbc975a0fc89600c1"
    pinned = [
        "agent__run_start_time(agent:1)",
        "agent__capability__audit.record(agent:1,0)",
        "agent__dynamic_toolset__dyn.get_tools(agent:1,1)",
        "agent__model.request(agent:1,1)",
        'agent__function_toolset__<agent>.validate_args:look(agent:1,1,"c1")',
        'agent__function_toolset__<agent>.call_tool:look(agent:1,1,"c1")',
        'agent__function_toolset__counted.call_tool:count(agent:1,1,"c2")',
        'agent__dynamic_toolset__dyn.call_tool:pick(agent:1,1,"c3")',
        f"{parent}/inner__model.request(inner:1,1)",
        'agent__function_toolset__<agent>.call_tool:ask(agent:1,1,"c 4")',
        "agent__dynamic_toolset__dyn.get_tools(agent:1,2)",
        "agent__model.request(agent:1,2)",
    ]
    assert sorted(step.units) == sorted(pinned)
    streamed = Step()
    watched = durable(TestModel(), engine={"event_stream_handler": watch})
    watched.tool_plain(look)
    await streamed.attempt(lambda: watched.run("go", run_id="mine"))
    assert sorted(streamed.units) == sorted(
        [
            'agent__model.request("mine",1)',
            'agent__event_stream_handler("mine",1,"pyd_ai_tool_call_id__look")',
            'agent__function_toolset__<agent>.call_tool:look("mine",1,"pyd_ai_tool_call_id__look")',
            'agent__event_stream_handler("mine",1,"pyd_ai_tool_call_id__look")#2',
            'agent__model.request("mine",2)',
        ]
    )


class Audit(AbstractCapability[Any]):
    """A capability with an operation of its own, which is called before each run."""

    id = "audit"

    def __init__(self) -> None:
        self.records: list[str] = []

    @durable_operation(name="record")
    async def record(self, ctx: RunContext[Any], text: str) -> str:
        self.records.append(text)
        return text

    async def before_run(self, ctx: RunContext[Any]) -> None:
        await self.record(ctx, "begun")


async def test_operations_of_capabilities_are_units() -> None:
    """What a capability declares durable is done once; on replay its record is given."""
    audit = Audit()
    agent = durable(scripted("done")[0], capabilities=[audit])
    step = Step()
    _, crashes = await step.resumed(lambda: agent.run("go"))
    assert (audit.records, crashes) == (["begun"], 2)


async def test_dynamic_toolsets_are_found_and_called_once() -> None:
    """What a dynamic toolset offers, and what its tools gave, comes from the record on replay."""
    built: list[int] = []
    picked: list[int] = []

    def dynamic(ctx: RunContext[Any]) -> FunctionToolset[Any]:
        built.append(ctx.run_step)
        toolset = FunctionToolset[Any](id="inside")

        @toolset.tool_plain
        def pick() -> str:
            picked.append(1)
            return "picked"

        return toolset

    model, requests = scripted(called("pick", "c1"), both_answers)
    agent = durable(model, toolsets=[DynamicToolset(dynamic, id="dyn")])
    step = Step()
    result, _ = await step.resumed(lambda: agent.run("go"))
    before = len(built)
    assert (await step.attempt(lambda: agent.run("go"))).output == result.output == "c1=picked"
    assert (len(built), len(picked), requests) == (before, 1, [0, 1])


async def test_toolsets_of_any_kind_are_recorded() -> None:
    """What one of the user's own offers and gives is a unit each; a full replay neither asks nor enters it."""
    seen: list[str] = []
    model, _ = scripted(called("pay", "c1", euros="many"), called("pay", "c2", euros="9"), both_answers)
    agent = durable(model, toolsets=[Till(seen)])
    step = Step()
    result, _ = await step.resumed(lambda: agent.run("ada"))
    assert [call for call in seen if call.startswith("pay")] == ["pay {'euros': 9} for ada"]
    assert "unable to parse" in result.output
    assert result.output.endswith("c2=paid")
    seen.clear()
    assert (await step.attempt(lambda: agent.run("ada"))).output == result.output
    assert seen == []
    assert (await agent.run("bob")).output == result.output
    assert seen == ["entered", "pay {'euros': 9} for bob", "left"]


async def test_what_is_read_of_a_workspace_is_a_unit(tmp_path: Path) -> None:
    """A resumed run sees the files as they were, outside of tools; what a tool does with them belongs to its call."""
    (tmp_path / "note").write_text("before")
    model, _ = scripted(called("write", "c1"), lambda messages: "done")
    agent = durable(model, capabilities=[LocalWorkspace(tmp_path)])
    seen: list[str] = []

    @agent.instructions
    async def read(ctx: RunContext[Any]) -> str:
        seen.append(await ctx.workspace.read_text("note"))
        return seen[-1]

    @agent.tool
    async def write(ctx: RunContext[Any]) -> None:
        await ctx.workspace.write_text("note", "after")

    step = Step()
    _, crashes = await step.resumed(lambda: agent.run("go"))
    assert crashes == len(step.units)
    assert seen[-1] == "after"
    seen.clear()
    (tmp_path / "note").write_text("much later")
    await step.attempt(lambda: agent.run("go"))
    assert seen == ["before", "after"]
