"""PaigeantDurability: what an agent did inside a step is never done again."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
from collections.abc import AsyncIterable, AsyncIterator, Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, Field, TypeAdapter
from pydantic_ai import (
    Agent,
    ApprovalRequired,
    BinaryContent,
    CallDeferred,
    CancellationToken,
    DeferredToolRequests,
    DeferredToolResults,
    ModelMessage,
    ModelResponse,
    ModelRetry,
    RunContext,
    RunUsage,
    TextPart,
    ToolCallPart,
    ToolDefinition,
    ToolFailed,
    ToolReturn,
)
from pydantic_ai._agent_graph import _agent_graph_sleep
from pydantic_ai.capabilities import (
    AbstractCapability,
    LocalWorkspace,
    ModelFallback,
    SelectModel,
    durable_operation,
)
from pydantic_ai.exceptions import (
    FallbackExceptionGroup,
    ModelHTTPError,
    RunCancelled,
    RunTimedOut,
    UnexpectedModelBehavior,
    UsageLimitExceeded,
    UserError,
)
from pydantic_ai.messages import AgentStreamEvent, FilePart, ModelRequest
from pydantic_ai.models import ModelRequestContext
from pydantic_ai.models.fallback import FallbackModel
from pydantic_ai.models.function import AgentInfo, DeltaToolCall, FunctionModel
from pydantic_ai.models.test import TestModel
from pydantic_ai.toolsets import (
    AbstractToolset,
    DynamicToolset,
    ExternalToolset,
    FunctionToolset,
    ToolsetTool,
)
from pydantic_ai.usage import RequestUsage, UsageLimits
from pydantic_core import from_json, to_json
from tests.agents.steps import (
    Crash,
    Step,
    asks,
    called,
    prompt_of,
    returned,
    scripted,
    without_moments,
)
from tests.patience import PATIENCE

from paigeant import ActivityRegistry, NonRetryableError, RetryPolicy, Workflow
from paigeant.agents import PaigeantDurability, effect_key, operations
from paigeant.errors import InvalidDefinition, OutcomeUnknown, OutputInvalid, StoreUnavailable, UnitUnreadable
from paigeant.parking import Parked
from paigeant.place import Unit, current_place, readable
from paigeant.store import StepKey
from paigeant.testing import ManualClock, MemoryApp

AnyAgent = Agent[Any, Any]


def durable(model: Any, *, name: str = "agent", **options: Any) -> AnyAgent:
    """An agent that carries the engine."""
    engine: PaigeantDurability[Any] = PaigeantDurability(**options.pop("engine", {}))
    return Agent(model, name=name, capabilities=[*options.pop("capabilities", []), engine], **options)


def both_answers(messages: list[ModelMessage]) -> str:
    """A turn that says what the tool calls gave, by their ids."""
    return " ".join(f"{call}={answer}" for call, answer in sorted(returned(messages).items()))


# -- units


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


class Till(AbstractToolset[Any]):
    """Tools of a kind that the library doesn't know. It notes what is asked of it; each run has one of its own."""

    def __init__(self, seen: list[str], id: str | None = "till", run: str = "none") -> None:
        self.seen = seen
        self.run = run
        self._id = id

    @property
    def id(self) -> str | None:
        return self._id

    async def for_run(self, ctx: RunContext[Any]) -> AbstractToolset[Any]:
        return Till(self.seen, self._id, run=str(ctx.prompt))

    async def __aenter__(self) -> Till:
        self.seen.append("entered")
        return self

    async def __aexit__(self, *_: object) -> None:
        self.seen.append("left")

    async def get_tools(self, ctx: RunContext[Any]) -> dict[str, ToolsetTool[Any]]:
        schema = {"type": "object", "properties": {"euros": {"type": "integer"}}}
        pay = ToolDefinition(name="pay", parameters_json_schema=schema)
        reads: Any = TypeAdapter(dict[str, int]).validator
        return {"pay": ToolsetTool(toolset=self, tool_def=pay, max_retries=1, args_validator=reads)}

    async def call_tool(
        self, name: str, tool_args: dict[str, Any], ctx: RunContext[Any], tool: ToolsetTool[Any]
    ) -> Any:
        self.seen.append(f"{name} {tool_args} for {self.run}")
        return "paid"


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


def test_toolsets_of_any_kind_need_an_id() -> None:
    """Their units are named after it."""
    with pytest.raises(UserError, match="unique `id`"):
        durable(TestModel(), toolsets=[Till([], id=None)])


# -- rule 1: nesting


def nesting(*, sequential: bool = False) -> tuple[AnyAgent, dict[str, list[Any]]]:
    """An agent whose tool `ask` runs another one, which has a tool of its own; and what was called."""
    seen: dict[str, list[Any]] = {"outer": [], "inner": [], "asked": [], "noted": []}

    def inner_respond(messages: list[ModelMessage], _: AgentInfo) -> ModelResponse:
        answers = returned(messages)
        seen["inner"].append((prompt_of(messages), len(answers)))
        if not answers:
            return ModelResponse(parts=[called("note", "n1", text=prompt_of(messages))])
        return ModelResponse(parts=[TextPart(f"ans-{answers['n1']}")])

    inner = durable(FunctionModel(inner_respond), name="inner")

    @inner.tool_plain
    async def note(text: str) -> str:
        seen["noted"].append((text, effect_key()))
        return text

    calls = [called("ask", "c1", number="0"), called("ask", "c2", number="1")]
    model, seen["outer"] = scripted(calls, called("ask", "c1", number="2"), both_answers)
    outer = durable(model, name="outer")

    @outer.tool(sequential=sequential)
    async def ask(ctx: RunContext[Any], number: str) -> str:
        seen["asked"].append(number)
        return str((await inner.run(number, usage=ctx.usage)).output)

    return outer, seen


@pytest.mark.parametrize("sequential", [False, True])
async def test_rule_1_nested_agents_get_their_own_answers(sequential: bool) -> None:
    """Agents within tools resume too: after a crash behind any unit each call has the answer that was made for it."""
    outer, seen = nesting(sequential=sequential)
    step = Step()
    result, crashes = await step.resumed(lambda: outer.run("go"))
    assert result.output == "c1=ans-2 c2=ans-1"
    assert returned(result.all_messages()[:3]) == {"c1": "ans-0", "c2": "ans-1"}
    assert crashes == len(step.units) == 3 + 3 * 4
    assert seen["outer"] == [0, 1, 2]
    if sequential:  # what runs beside a crash and isn't recorded yet is done again
        assert seen["inner"] == [("0", 0), ("0", 1), ("1", 0), ("1", 1), ("2", 0), ("2", 1)]
        assert [text for text, _ in seen["noted"]] == ["0", "1", "2"]


async def test_effect_keys_are_those_of_an_uninterrupted_run() -> None:
    """Every tool call, nested or not, has a key of its own, the same with crashes and without."""
    outer, seen = nesting()
    await Step().attempt(lambda: outer.run("go"), first=True)
    whole = sorted(seen["noted"])
    assert len({key for _, key in whole}) == 3
    outer, seen = nesting()
    await Step().resumed(lambda: outer.run("go"))
    assert sorted(set(seen["noted"])) == whole


async def test_usage_is_that_of_an_uninterrupted_run() -> None:
    """What nested agents used is counted once, whether their tool was called in this attempt or is replayed."""
    outer, _ = nesting()
    whole = (await outer.run("go")).usage  # outside of steps: the library's own count
    step = Step()
    for crash_after in [*range(1, 16), None]:
        usage = RunUsage()
        try:
            await step.attempt(partial(outer.run, "go", usage=usage), crash_after=crash_after)
        except Crash:
            continue
        assert usage == whole
    assert (whole.requests, whole.tool_calls) == (9, 6)


async def test_usage_limits_hold_across_nested_agents() -> None:
    """A nested agent that is handed its caller's usage is bound by what was used before it."""
    outer, seen = nesting()
    with pytest.raises(UsageLimitExceeded):
        await Step().attempt(lambda: outer.run("go", usage_limits=UsageLimits(request_limit=5)))
    assert len(seen["outer"]) < 3


# -- rule 2: identity


@pytest.mark.parametrize("slow_first", [True, False])
async def test_rule_2_two_calls_of_one_tool_keep_their_results_in_any_order(slow_first: bool) -> None:
    """A hook that holds up one call or the other, the other way round after the crash, mixes nothing up."""
    delays = {"a": 2, "b": 0} if slow_first else {"a": 0, "b": 2}

    class Hook(AbstractCapability[Any]):
        async def before_tool_execute(
            self, ctx: RunContext[Any], *, call: Any, tool_def: ToolDefinition, args: dict[str, Any]
        ) -> dict[str, Any]:
            for _ in range(delays[args["what"]]):
                await asyncio.sleep(0)
            return args

    model, _ = scripted([called("look", "c1", what="a"), called("look", "c2", what="b")], both_answers)
    agent = durable(model, capabilities=[Hook()])
    looked: list[str] = []

    @agent.tool_plain
    async def look(what: str) -> str:
        looked.append(what)
        return what.upper()

    step = Step()
    with pytest.raises(Crash):
        await step.attempt(lambda: agent.run("go"), crash_after=2)
    delays = {what: 2 - delay for what, delay in delays.items()}
    assert (await step.attempt(lambda: agent.run("go"))).output == "c1=A c2=B"
    assert sorted(looked) in (["a", "b"], ["a", "a", "b"], ["a", "b", "b"])


async def test_rule_2_a_provider_may_use_a_call_id_again() -> None:
    """The same id in a later response is another call."""
    rolled: list[Any] = []

    def roll_again(messages: list[ModelMessage]) -> Any:
        rolled.append(returned(messages)["same"])
        return called("roll", "same")

    model, _ = scripted(called("roll", "same"), roll_again, both_answers)
    agent = durable(model)
    rolls = iter(range(1, 10))

    @agent.tool_plain
    def roll() -> int:
        return next(rolls)

    step = Step()
    result, _ = await step.resumed(lambda: agent.run("go"))
    assert (result.output, rolled, next(rolls)) == ("same=2", [1], 3)


async def test_rule_2_the_library_hands_over_what_identifies_a_call() -> None:
    """The inputs of each operation hold its run's context, which has run id, run step and tool call id."""
    found: list[tuple[str, Any]] = []
    original = operations._identity

    def looked_into(
        place: Any, name: str, ctx: RunContext[Any] | None, cache_key: tuple[object, ...], line: str
    ) -> str:
        assert ctx is not None
        found.append((name.partition("__")[2], (ctx.run_id, ctx.run_step, ctx.tool_call_id)))
        return original(place, name, ctx, cache_key, line)

    outer, _ = nesting()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(operations, "_identity", looked_into)
        await Step().attempt(lambda: outer.run("go", run_id="R"))
    assert ("model.request", ("R", 1, None)) in found
    assert ("function_toolset__<agent>.call_tool:ask", ("R", 1, "c2")) in found
    assert ("function_toolset__<agent>.call_tool:ask", ("R", 2, "c1")) in found


# -- rule 3: modes


@pytest.mark.parametrize("engine", [{}, {"sequential": True}])
async def test_rule_3_events_come_in_the_order_of_the_calls(engine: dict[str, Any]) -> None:
    """However long each tool takes, what is told of them comes in one order, so that it is the same on replay."""
    handled: list[str] = []
    running: list[int] = [0, 0]

    async def watch(_: RunContext[Any], events: AsyncIterable[AgentStreamEvent]) -> None:
        async for event in events:
            if event.event_kind == "function_tool_result":
                handled.append(event.tool_call_id)

    calls = [called("look", "c1", turns=5), called("look", "c2", turns=0)]
    agent = durable(TestModel(), engine={**engine, "event_stream_handler": watch})
    streamed: Any = iter([calls, ["done"]])

    async def stream(_: list[ModelMessage], __: AgentInfo) -> AsyncIterator[Any]:
        for part in next(streamed):
            if isinstance(part, str):
                yield part
            else:
                yield {
                    int(part.tool_call_id[1]): DeltaToolCall(
                        name=part.tool_name, json_args=part.args_as_json_str(), tool_call_id=part.tool_call_id
                    )
                }

    @agent.tool_plain
    async def look(turns: int) -> int:
        running[0] += 1
        running[1] = max(running)
        for _ in range(turns):
            await asyncio.sleep(0)
        running[0] -= 1
        return turns

    step = Step()
    with agent.override(model=FunctionModel(stream_function=stream)):
        await step.attempt(lambda: agent.run("go"))
    assert handled == ["c1", "c2"]
    assert running == [0, 1 if engine else 2]


async def test_rule_3_who_wants_tools_in_sequence_gets_that() -> None:
    """A mode that the caller has set is kept where replay allows it."""
    running: list[int] = [0, 0]
    model, _ = scripted([called("look", "c1"), called("look", "c2")], "done")
    agent = durable(model)

    @agent.tool_plain
    async def look() -> None:
        running[0] += 1
        running[1] = max(running)
        await asyncio.sleep(0)
        running[0] -= 1

    with agent.parallel_tool_call_execution_mode("sequential"):
        await Step().attempt(lambda: agent.run("go"))
    assert running == [0, 1]


# -- rule 4: several runs in one step


async def test_rule_4_agents_that_run_together_don_t_mix() -> None:
    """Two agents at once, and one agent twice at once, keep their answers over crashes behind every unit."""
    requests: list[str] = []

    def respond(messages: list[ModelMessage], _: AgentInfo) -> ModelResponse:
        requests.append(prompt_of(messages))
        return ModelResponse(parts=[TextPart(f"said {prompt_of(messages)}")])

    one, other = durable(FunctionModel(respond), name="one"), durable(FunctionModel(respond), name="other")

    async def work() -> list[str]:
        runs = await asyncio.gather(one.run("a"), other.run("b"), one.run("c"))
        return [str(run.output) for run in runs]

    step = Step()
    outputs, _ = await step.resumed(work)
    assert outputs == ["said a", "said b", "said c"]
    assert len(step.units) == 3
    assert await step.attempt(work) == outputs


# -- rule 5: ids and histories


async def test_rule_5_ids_and_usage_are_stable_moments_of_requests_are_not() -> None:
    """A replay has the ids, the usage and, but for the moments of what was asked, the messages of the first run."""
    outer, _ = nesting()
    step = Step()
    first = await step.attempt(lambda: outer.run("go"))
    again = await step.attempt(lambda: outer.run("go"))
    assert (first.run_id, first.conversation_id, first.usage) == (
        again.run_id,
        again.conversation_id,
        again.usage,
    )
    assert first.run_id == "run:step:outer:1"
    assert without_moments(first.all_messages_json()) == without_moments(again.all_messages_json())
    answers = [[m for m in run.all_messages() if isinstance(m, ModelResponse)] for run in (first, again)]
    assert answers[0] == answers[1]


# -- rule 7: streams


async def test_rule_7_a_stream_is_watched_once() -> None:
    """The handler sees the deltas while the model is asked, and nothing of them when the request is replayed."""
    seen: list[str] = []
    asked: list[int] = []

    async def watch(_: RunContext[Any], events: AsyncIterable[AgentStreamEvent]) -> None:
        async for event in events:
            seen.append(event.event_kind)

    async def stream(_: list[ModelMessage], __: AgentInfo) -> AsyncIterator[str]:
        asked.append(1)
        for word in ("one ", "two ", "three"):
            yield word

    agent = durable(FunctionModel(stream_function=stream), engine={"event_stream_handler": watch})
    step = Step()
    result, _ = await step.resumed(lambda: agent.run("go"))
    assert (result.output, len(asked)) == ("one two three", 1)
    assert seen.count("part_delta") == 2
    before = list(seen)
    assert (await step.attempt(lambda: agent.run("go"))).output == "one two three"
    assert seen == before


async def test_rule_7_who_reads_a_replayed_run_gets_it_condensed() -> None:
    """`run_stream` and `run_stream_events` give the recorded answer, without asking the model."""
    asked: list[int] = []

    async def stream(_: list[ModelMessage], __: AgentInfo) -> AsyncIterator[str]:
        asked.append(1)
        yield "one "
        yield "two"

    agent = durable(FunctionModel(stream_function=stream))

    async def text() -> str:
        async with agent.run_stream("go") as running:
            return str(await running.get_output())

    step = Step()
    assert await step.attempt(text) == await step.attempt(text) == "one two"
    assert len(asked) == 1


# -- rule 8: what is refused


async def test_rule_8_toolsets_of_a_run_are_refused() -> None:
    """Tools that come with one run have no recorded identity, of whatever kind they are: the error says what to do."""
    agent = durable(TestModel())
    extra = FunctionToolset[Any](id="extra")
    extra.add_function(lambda: 1, name="one")
    with pytest.raises(UserError, match="Paigeant"):
        await Step().attempt(lambda: agent.run("go", toolsets=[extra]))
    till = Till([])
    for toolset in (till, till.prefixed("my")):
        with pytest.raises(UserError, match=r"Till 'till' comes with a run of agent 'agent'"):
            await Step().attempt(partial(agent.run, "go", toolsets=[toolset]))
    with agent.override(toolsets=[till]), pytest.raises(UserError, match=r"or with an override"):
        await Step().attempt(lambda: agent.run("go"))


async def test_rule_8_a_run_may_bring_tools_that_are_done_elsewhere() -> None:
    """Nothing of them is called here."""
    output: Any = [str, DeferredToolRequests]
    agent = durable(scripted(called("ship", "c1"))[0], output_type=output)
    ship = ExternalToolset[Any]([ToolDefinition(name="ship")])
    found = await Step().attempt(lambda: agent.run("go", toolsets=[ship]))
    assert [call.tool_name for call in found.output.calls] == ["ship"]


async def test_rule_8_models_of_a_run_are_refused_unless_they_are_known() -> None:
    """A model object that isn't registered is refused; by its id in `models` it is taken."""
    other = scripted("other")[0]
    agent = durable(scripted("own")[0], engine={"models": {"other": other}})
    with pytest.raises(UserError, match="was not registered with `PaigeantDurability`"):
        await Step().attempt(lambda: agent.run("go", model=scripted("stranger")[0]))
    step = Step()
    assert (await step.attempt(lambda: agent.run("go", model="other"))).output == "other"
    assert (await step.attempt(lambda: agent.run("go", model=other))).output == "other"
    assert step.units == ["agent__model.request(agent:1,1)"]


async def test_rule_8_a_model_that_overrides_the_agent_s_own_is_taken() -> None:
    """`agent.override(model=...)`, as tests use it, stands for the model of the agent, also of one that has none."""
    for agent in (durable(scripted("own")[0]), Agent(name="agent")):
        engine: list[Any] = [] if agent.model is not None else [PaigeantDurability()]
        step = Step()
        with agent.override(model=scripted("other")[0]):
            result = await step.attempt(partial(agent.run, "go", capabilities=engine))
        assert result.output == "other"
        assert step.units == ["agent__model.request(agent:1,1)"]


async def test_rule_8_a_model_that_takes_over_is_recorded() -> None:
    """A request that goes on to another model, since its own failed, is a unit as well: that one is asked once."""

    def fail(_: list[ModelMessage]) -> str:
        raise ModelHTTPError(400, "own")

    spare, requests = scripted(called("add", "c1"), both_answers)
    agent = durable(
        scripted(fail, fail)[0], engine={"models": {"spare": spare}}, capabilities=[ModelFallback("spare")]
    )

    @agent.tool_plain
    def add() -> int:
        return 1

    step = Step()
    result, crashes = await step.resumed(lambda: agent.run("go"))
    assert (result.output, crashes, requests) == ("c1=1", 3, [0, 1])
    assert [name for name in step.units if "model.request" in name] == [step.units[0], step.units[2]]


async def test_an_answer_is_told_to_be_of_the_model_that_gave_it() -> None:
    """Its own id is recorded with it: an attempt that replays it hasn't asked a model that failed before that one."""
    is_down = [True]

    def own(_: list[ModelMessage]) -> str:
        if is_down[0]:
            raise ModelHTTPError(400, "own")
        return "own"

    spare, _ = scripted("spare")
    agent = durable(
        scripted(own)[0], engine={"models": {"spare": spare}}, capabilities=[ModelFallback("spare")]
    )
    step = Step()
    for _attempt in range(2):
        result = await step.attempt(lambda: agent.run("go"))
        assert (result.output, result.response.model_id) == ("spare", "spare")
        is_down[0] = False
    result = await Step().attempt(lambda: agent.run("go"))
    assert (result.output, result.response.model_id) == ("own", (await agent.run("go")).response.model_id)


async def test_rule_8_a_model_that_takes_over_may_be_any_id() -> None:
    """As in `run(model=...)`, it needn't be in `models`; a model object that nobody registered is refused still."""

    def fail(_: list[ModelMessage]) -> str:
        raise ModelHTTPError(400, "own")

    agent = durable(scripted(fail)[0], capabilities=[ModelFallback("test")])
    step = Step()
    assert (await step.attempt(lambda: agent.run("go"))).output == "success (no tool calls)"
    assert step.units == ["agent__model.request(agent:1,1)"]
    agent = durable(scripted(fail)[0], capabilities=[ModelFallback(TestModel())])
    with pytest.raises(UserError, match="was not registered with `PaigeantDurability`"):
        await Step().attempt(lambda: agent.run("go"))


@pytest.mark.parametrize("how", ["is well again", "is another one", "is selected anew", "is streamed"])
async def test_an_answer_is_that_of_its_request_whichever_model_is_asked(how: str) -> None:
    """A model that is well again, another one, or a stream, isn't asked for what another has answered: it would have
    the tools do the same once more, under other keys."""
    paid: list[str] = []
    attempts: list[int] = []

    def own(_: list[ModelMessage]) -> Any:
        if how == "is well again" and len(attempts) == 1:
            raise ModelHTTPError(400, "own")
        return called("pay", "other")

    first, first_requests = scripted(called("pay", "c1"), "paid")
    other, other_requests = scripted(own, "paid by other")
    models = {"first": first, "other": other}

    def of(attempt: int) -> str:
        return "first" if attempt == 1 else "other"

    async def watch(_: RunContext[Any], events: AsyncIterable[AgentStreamEvent]) -> None:
        async for _event in events:
            pass

    async def work() -> str:
        attempts.append(len(attempts) + 1)
        engine: dict[str, Any] = {"models": models}
        capabilities: list[AbstractCapability[Any]] = []
        asked: str | None = None
        match how:
            case "is well again":
                capabilities, asked = [ModelFallback("first")], "other"
            case "is another one":
                asked = of(attempts[-1])
            case "is selected anew":
                capabilities = [SelectModel(lambda _: of(attempts[-1]))]
            case _:
                engine["event_stream_handler"] = watch if attempts[-1] > 1 else None
                asked = "first"
        agent = durable(TestModel(), engine=engine, capabilities=capabilities)

        @agent.tool_plain
        def pay() -> str:
            paid.append(effect_key())
            return "paid"

        return str((await agent.run("go", model=asked)).output)

    step = Step()
    with pytest.raises(Crash):
        await step.attempt(work, crash_after=2)
    if how == "is streamed":
        models["first"] = FunctionModel(stream_function=_says_paid)
    said = await step.attempt(work)
    assert len(paid) == 1, "the tool was called again"
    asked = {"is well again": [0, 1], "is streamed": []}.get(how, [1])
    assert (first_requests, other_requests) == ([0], asked)
    assert said == ("paid" if how == "is streamed" else "paid by other")


async def test_an_answer_that_was_rejected_is_in_nobody_s_way() -> None:
    """Another model gave the one that counts, and called the tool under the same id: that call is met, behind both."""
    paid: list[int] = []

    def cut_off(_: list[ModelMessage], __: AgentInfo) -> ModelResponse:
        return ModelResponse(parts=[called("pay", "c1", euros=9)], finish_reason="length")

    spare, requests = scripted(called("pay", "c1", euros=1), both_answers)
    # The answer to the second request is cut off as well.
    agent = durable(
        FunctionModel(cut_off), engine={"models": {"spare": spare}}, capabilities=[ModelFallback("spare")]
    )

    @agent.tool_plain
    def pay(euros: int) -> str:
        paid.append(euros)
        return f"paid {euros}"

    step = Step()
    result, _ = await step.resumed(lambda: agent.run("go"))
    assert (result.output, paid) == ("c1=paid 1", [1])
    assert len([unit for unit in step.units if "model.request" in unit]) == 4
    assert len(requests) == 2


async def test_a_run_isn_t_given_the_answer_to_another_one_of_its_id() -> None:
    """The first had failed, and the code gone on to the second: the next attempt asks for the first once more."""
    is_down = [True]

    def respond(messages: list[ModelMessage]) -> str:
        if is_down[0] and prompt_of(messages) == "one":
            raise ModelHTTPError(400, "own")
        return f"said {prompt_of(messages)}"

    model, requests = scripted(respond)
    agent = durable(model)

    async def work() -> list[str]:
        said: list[str] = []
        for prompt in ("one", "two"):
            with contextlib.suppress(ModelHTTPError):
                said.append(str((await agent.run(prompt, run_id="mine")).output))
        return said

    step = Step()
    assert await step.attempt(work) == ["said two"]
    is_down[0] = False
    assert await step.attempt(work) == ["said one", "said two"]
    assert len(requests) == 3


@pytest.mark.parametrize("together", [True, False])
async def test_runs_of_one_id_have_answers_of_their_own(together: bool) -> None:
    """An id that code gives to several runs tells them apart by their order, each with its own answers."""
    model, requests = scripted(prompt_of)
    agent = durable(model)

    async def run(prompt: str) -> str:
        return str((await agent.run(prompt, run_id="mine")).output)

    async def work() -> list[str]:
        prompts = ("one", "two")
        return await asyncio.gather(*map(run, prompts)) if together else [await run(one) for one in prompts]

    step = Step()
    async with asyncio.timeout(PATIENCE):
        assert (await step.resumed(work))[0] == ["one", "two"]
    assert len(step.units) == 2
    assert together or requests == [0, 0]


async def _says_paid(messages: list[ModelMessage], _: AgentInfo) -> AsyncIterator[str]:
    assert returned(messages), "this was answered before"
    yield "paid"


async def test_rule_8_cancellation_tokens_are_refused() -> None:
    """A token would end a run at a moment that nobody records."""
    agent = durable(TestModel())
    with pytest.raises(UserError, match="Paigeant"):
        await Step().attempt(lambda: agent.run("go", cancellation_token=CancellationToken()))


# -- rule 9: what a tool can't do


@pytest.mark.parametrize("method", ["enqueue", "cancel"])
async def test_rule_9_a_tool_can_t_steer_its_run(method: str) -> None:
    """`ctx.enqueue()` and `ctx.cancel()` would be lost on replay, and raise inside a unit."""
    model, _ = scripted(called("steer", "c1"), "done")
    agent = durable(model)

    @agent.tool
    async def steer(ctx: RunContext[Any]) -> None:
        getattr(ctx, method)(*(["more"] if method == "enqueue" else []))

    with pytest.raises(UserError, match="unit"):
        await Step().attempt(lambda: agent.run("go"))


# -- rule 10: control flow is data


@pytest.mark.parametrize(
    ("raises", "told"),
    [
        (ModelRetry("once more"), "once more"),
        (ToolFailed("no way"), "no way"),
        (RunCancelled("stopped"), "stopped"),
    ],
    ids=lambda value: type(value).__name__,
)
async def test_rule_10_what_a_tool_tells_the_model_by_raising_is_recorded(
    raises: Exception, told: str
) -> None:
    """A tool that raised isn't called again on replay, and the model reads the same."""
    model, requests = scripted(called("look", "c1"), lambda messages: str(returned(messages)["c1"]))
    agent = durable(model)
    looked: list[int] = []

    @agent.tool_plain
    async def look() -> None:
        looked.append(1)
        raise raises

    step = Step()
    result, crashes = await step.resumed(lambda: agent.run("go"))
    assert (await step.attempt(lambda: agent.run("go"))).output == result.output
    assert told in result.output
    assert (len(looked), requests, crashes) == (1, [0, 1], 3)


@pytest.mark.parametrize("raises", [ApprovalRequired(metadata={"why": 1}), CallDeferred(metadata={"why": 1})])
async def test_rule_10_deferred_calls_are_recorded(raises: Exception) -> None:
    """A call that needs approval or is done elsewhere is the same output on replay, and its tool isn't called."""
    model, _ = scripted(called("pay", "c1"), "done")
    agent = durable(model, output_type=[str, DeferredToolRequests])
    paid: list[int] = []

    @agent.tool_plain
    async def pay() -> None:
        paid.append(1)
        raise raises

    step = Step()
    result, _ = await step.resumed(lambda: agent.run("go"))
    again = await step.attempt(lambda: agent.run("go"))
    assert again.output == result.output
    assert result.output.metadata == {"c1": {"why": 1}}
    assert len(paid) == 1


async def test_rule_10_arguments_that_a_tool_finds_invalid_are_recorded() -> None:
    """A validation error inside a tool is the model's to mend: recorded, told again, not raised at anybody."""

    class Size(BaseModel):
        size: int = Field(gt=0)

    model, _ = scripted(called("look", "c1"), lambda messages: str(returned(messages)["c1"]))
    agent = durable(model)
    looked: list[int] = []

    @agent.tool_plain
    async def look() -> None:
        looked.append(1)
        Size(size=-1)

    step = Step()
    result, _ = await step.resumed(lambda: agent.run("go"))
    assert "greater than 0" in result.output
    assert (await step.attempt(lambda: agent.run("go"))).output == result.output
    assert len(looked) == 1


# -- rule 11 and records that can't be written or read


async def test_rule_11_what_can_t_be_written_as_json_is_final() -> None:
    """A result that JSON can't hold can't be recorded: an error of ours that isn't tried again."""
    model, _ = scripted(called("look", "c1"), "done")
    agent = durable(model)

    @agent.tool_plain
    def look() -> Any:
        return {"socket": object()}

    with pytest.raises(OutputInvalid, match="can't be recorded as JSON"):
        await Step().attempt(lambda: agent.run("go"))


@pytest.mark.parametrize("streamed", [False, True])
async def test_half_of_a_surrogate_pair_is_recorded_as_a_letter_that_is_none(streamed: bool) -> None:
    """A model's answer is cut within a character: the run goes on with what is left of it, and each attempt alike."""
    half, used = "\ud83d", RequestUsage(input_tokens=1, output_tokens=1)
    requests: list[int] = []

    def answer(messages: list[ModelMessage], _: AgentInfo) -> ModelResponse:
        requests.append(len(messages))
        if len(messages) > 1:
            return ModelResponse([TextPart(f"{sorted(returned(messages).items())} {half}")], usage=used)
        call = ToolCallPart("look", {"at": f"a{half}", "with": ["\ud83d\ude00", half]}, tool_call_id="c1")
        return ModelResponse([TextPart(half), call], usage=used)

    async def stream(messages: list[ModelMessage], info: AgentInfo) -> AsyncIterator[Any]:
        for number, part in enumerate(answer(messages, info).parts):
            if isinstance(part, ToolCallPart):
                arguments = json.dumps(part.args, ensure_ascii=False)
                yield {number: DeltaToolCall(part.tool_name, arguments, tool_call_id="c1")}
            elif isinstance(part, TextPart):
                yield part.content

    async def watch(_: RunContext[Any], events: AsyncIterable[AgentStreamEvent]) -> None:
        async for _event in events:
            pass

    model = FunctionModel(answer, stream_function=stream)
    agent = durable(model, engine={"event_stream_handler": watch}) if streamed else durable(model)
    looked: list[Any] = []

    @agent.tool_plain
    async def look(at: str, **rest: list[str]) -> str:
        looked.append((at, rest))
        return f"seen{half}"

    async def work() -> str:
        return (await agent.run("go")).output

    step = Step()
    output, _ = await step.resumed(work)
    assert output == "[('c1', 'seen\ufffd')] \ufffd"
    assert await step.attempt(work) == output
    assert looked == [("a\ufffd", {"with": ["\U0001f600", "\ufffd"]})]
    assert len(requests) == 2


@pytest.mark.parametrize(
    "record",
    [
        b'{"value": {"kind": "other"}}',
        b'{"value": 1}',
        b"7",
        b"null",
        b'{"value": {"kind": "tool_return"}, "usage": 1}',
    ],
)
async def test_a_record_that_can_t_be_read_calls_no_tool(record: bytes) -> None:
    """It is an error of ours, which ends the step, and none of the arguments, which would have the tool run again."""
    model, requests = scripted(called("pay", "c1"), "done")
    agent = durable(model)
    paid: list[int] = []

    @agent.tool_plain
    def pay() -> int:
        paid.append(1)
        return 1

    step = Step()
    with pytest.raises(Crash):
        await step.attempt(lambda: agent.run("go"), crash_after=1)
    await step.store.save_unit(
        step.key, 'agent__function_toolset__<agent>.call_tool:pay(agent:1,1,"c1")', record
    )
    with pytest.raises(UnitUnreadable, match="record"):
        await step.attempt(lambda: agent.run("go"))
    assert (paid, requests) == ([], [0])


@pytest.mark.parametrize("depth", range(194, 202))
async def test_what_is_recorded_can_be_read_however_deep_it_is_nested(depth: int) -> None:
    """A result that no later attempt could read is refused like one that JSON can't hold, and isn't recorded."""
    model, _ = scripted(called("look", "c1"), "done")
    agent = durable(model)

    @agent.tool_plain
    def look() -> Any:
        return from_json(b"[" * depth + b"]" * depth)

    step = Step()
    try:
        await step.attempt(lambda: agent.run("go"))
    except OutputInvalid:
        assert depth > 195
        assert not [unit for _, unit in step.store._units if "call_tool" in unit]
    else:
        assert depth < 200
        await step.attempt(lambda: agent.run("go"))


class Measured(BaseModel):
    at: float


@pytest.mark.parametrize("kind", [float, dict[str, float], Measured], ids=str)
def test_numbers_that_json_lacks_come_back(kind: Any) -> None:
    """Whatever the type that a capability's operation declares, nan and infinity are no null in the record."""
    for number in (float("nan"), float("-inf")):
        value = TypeAdapter(kind).validate_python(number if kind is float else {"at": number})
        loaded = operations.Codec().load(kind, operations.Codec().dump(kind, value))
        assert repr(loaded) == repr(value)
        assert b"null" not in operations.Codec().dump(kind, value).json


async def test_a_record_is_an_object_that_people_can_read() -> None:
    """First stands what the unit itself used, then the value; with a tool's call what its caller is to count."""
    inner = durable(scripted("inner")[0], name="inner")
    outer = durable(scripted(called("ask", "c1"), "done")[0], name="outer")

    @outer.tool
    async def ask(ctx: RunContext[None]) -> str:
        return (await inner.run("go", usage=ctx.usage)).output

    step = Step()
    await step.attempt(lambda: outer.run("go"))
    records = {
        unit.partition("(")[0].rpartition("__")[2]: from_json(record)
        for (_, unit), record in step.store._units.items()
    }
    assert list(records["model.request"]) == ["paigeant.used", "value"]
    assert records["model.request"]["value"]["kind"] == "response"
    call = records["<agent>.call_tool:ask"]
    assert list(call) == ["paigeant.used", "value", "usage"]
    assert call["value"] == {"result": "inner", "kind": "tool_return"}
    assert call["paigeant.used"]["tool_calls"] == 1
    assert call["usage"]["requests"] == 1


async def test_numbers_and_texts_come_back_as_at_the_first_time() -> None:
    """What a tool gave reads the same for the model in the first attempt and in a later one."""

    @dataclass
    class Thing:
        raw: bytes
        size: float

    seen: list[str] = []

    def tell(messages: list[ModelMessage]) -> str:
        seen.append(repr(returned(messages)["c1"]))
        return "done"

    model, _ = scripted(called("look", "c1"), tell)
    agent = durable(model)

    @agent.tool_plain
    def look() -> Any:
        return [
            Thing(b"raw", 1.0),
            float("nan"),
            float("inf"),
            1e22,
            -0.0,
            "ü\0",
            10**30,
            (1, {2: None}),
        ]

    step = Step()
    await step.attempt(lambda: agent.run("go"))
    # Take the answer to it away: it is asked for anew, of the recorded result.
    step.store._units.pop((step.key, "agent__model.request(agent:1,2)"))
    await step.attempt(lambda: agent.run("go"))
    assert len(set(seen)) == 1
    assert len(seen) == 2


# -- rule 12: at least once, or at most once


async def test_rule_12_a_crash_before_the_record_repeats_the_call_under_the_same_key() -> None:
    """Whoever has the effect can tell a repetition by the effect key."""
    model, _ = scripted(called("pay", "c1"), "done")
    agent = durable(model)
    keys: list[str] = []

    @agent.tool_plain
    async def pay() -> int:
        keys.append(effect_key())
        if len(keys) == 1:
            raise Crash
        return 1

    step = Step()
    with pytest.raises(Crash):
        await step.attempt(lambda: agent.run("go"))
    await step.attempt(lambda: agent.run("go"))
    assert len(keys) == 2
    assert len(set(keys)) == 1


@pytest.mark.parametrize("more", [{}, {"retries": RetryPolicy(attempts=1), "timeout": 9.0}])
async def test_rule_12_a_tool_that_is_called_once_at_most(more: dict[str, Any]) -> None:
    """Marked so in its metadata, it isn't called again when its outcome was lost: a person is asked."""
    model, _ = scripted(called("pay", "c1"), "done")
    agent = durable(model)
    paid: list[int] = []

    @agent.tool_plain(metadata={"paigeant": {"at_most_once": True, **more}})
    async def pay() -> int:
        paid.append(1)
        raise Crash

    step = Step()
    with pytest.raises(Crash):
        await step.attempt(lambda: agent.run("go"))
    with pytest.raises(Parked):
        await step.attempt(lambda: agent.run("go"))
    assert "Do tool 'pay' of agent 'agent' again?" in from_json((await step.asked()).asked)["question"]
    await step.answer(b'{"approved":false}')
    with pytest.raises(OutcomeUnknown, match="tool 'pay' of agent 'agent' may be done at most once"):
        await step.attempt(lambda: agent.run("go"))
    assert len(paid) == 1


# -- rule 13: retries


async def test_rule_13_tools_are_not_tried_again_unless_they_say_so() -> None:
    """An error of a tool fails the attempt at once; `retries` in the tool's metadata tries it again within it."""
    model, _ = scripted(called("look", "c1"), both_answers)
    failures = iter([ConnectionError(), ConnectionError(), ConnectionError()])

    def look() -> str:
        for failure in failures:
            raise failure
        return "there"

    agent = durable(model)
    agent.tool_plain(look)
    with pytest.raises(ConnectionError):
        await Step().attempt(lambda: agent.run("go"))
    agent = durable(model)
    agent.tool_plain(metadata={"paigeant": {"retries": RetryPolicy(attempts=3, base=0.0)}})(look)
    assert (await Step().attempt(lambda: agent.run("go"))).output == "c1=there"


async def test_rule_13_a_tool_is_not_tried_again_where_that_can_not_help() -> None:
    """An error may say so itself, also within the group that a task group raises."""
    for error in (NonRetryableError("declined"), ExceptionGroup("tasks", [NonRetryableError("declined")])):
        model, _ = scripted(called("pay", "c1"), "done")
        agent = durable(model)
        paid: list[int] = []

        @agent.tool_plain(metadata={"paigeant": {"retries": RetryPolicy(attempts=3, base=0.0)}})
        def pay() -> None:
            paid.append(1)  # noqa: B023  # it is called within this turn of the loop
            raise error  # noqa: B023

        with pytest.raises(type(error)):
            await Step().attempt(partial(agent.run, "go"))
        assert len(paid) == 1


async def test_rule_13_a_tool_s_timeout_is_for_each_try() -> None:
    """It ends a try, and the error says which tool it was."""
    model, _ = scripted(called("look", "c1"), "done")
    agent = durable(model)

    @agent.tool_plain(metadata={"paigeant": {"timeout": 0.01}})
    async def look() -> None:
        await asyncio.Event().wait()

    with pytest.raises(TimeoutError, match=r"tool 'look' of agent 'agent' took longer than 0\.01 s"):
        await Step().attempt(lambda: agent.run("go"))


async def test_rule_13_a_tool_may_run_inline() -> None:
    """Then nothing of it is recorded, and it is called again on replay; `False` says the same."""
    for metadata in ({"paigeant": {"inline": True}}, {"paigeant": False}):
        model, _ = scripted(called("look", "c1"), both_answers)
        agent = durable(model)
        looked: list[int] = []

        @agent.tool_plain(metadata=metadata)
        def look() -> int:
            looked.append(1)  # noqa: B023  # it is called within this turn of the loop
            return 1

        step = Step()
        await step.attempt(partial(agent.run, "go"))
        await step.attempt(partial(agent.run, "go"))
        assert len(looked) == 2
        assert len(step.units) == 2


@pytest.mark.parametrize(
    ("told", "says"),
    [
        ({"retry": 2}, "there is no 'retry'; did you mean 'retries'"),
        ({"retries": -1}, "retries is a number"),
        ({"timeout": 0}, "above 0"),
        ({"inline": "yes"}, "True or False"),
        ({"at_most_once": True, "retries": 1}, "not tried again"),
        ({"at_most_once": True, "inline": True}, "is recorded"),
        ("no", "a dict or False"),
        (True, "a dict or False"),
    ],
)
def test_options_of_tools_are_checked_when_the_engine_is_attached(told: Any, says: str) -> None:
    """A wrong one is an error where the agent is made, not in the middle of a run."""
    toolset = FunctionToolset[Any](id="tools")
    toolset.add_function(lambda: 1, name="look", metadata={"paigeant": told})
    with pytest.raises(InvalidDefinition, match=f"metadata 'paigeant' of tool 'look': .*{says}"):
        durable(TestModel(), toolsets=[toolset])


@pytest.mark.parametrize("whose", ["tool", "toolset"])
def test_the_library_s_timeout_isn_t_for_what_is_done_at_most_once(whose: str) -> None:
    """The model is told of it, and may ask for the same again."""
    toolset = FunctionToolset[Any](id="tools", timeout=1.0 if whose == "toolset" else None)
    timeout = 1.0 if whose == "tool" else None
    toolset.add_function(
        lambda: 1, name="pay", timeout=timeout, metadata={"paigeant": {"at_most_once": True}}
    )
    with pytest.raises(InvalidDefinition, match=r"'at_most_once': True, 'timeout': 1\.0"):
        durable(TestModel(), toolsets=[toolset])


def failing(error: Callable[[], Exception], times: int) -> tuple[FunctionModel, list[int]]:
    """A model that fails so many times before it answers."""
    asked: list[int] = []

    def respond(_: list[ModelMessage], __: AgentInfo) -> ModelResponse:
        asked.append(1)
        if len(asked) <= times:
            raise error()
        return ModelResponse(parts=[TextPart("there")])

    return FunctionModel(respond), asked


QUICK = RetryPolicy(attempts=3, base=0.0)


async def test_rule_13_a_model_is_asked_again_when_the_trouble_may_pass() -> None:
    """Some tries within the attempt, so that a long run doesn't use up the step's; then the attempt fails."""
    model, asked = failing(lambda: ModelHTTPError(503, "m"), 2)
    agent = durable(model, engine={"model_retries": QUICK})
    assert (await Step().attempt(lambda: agent.run("go"))).output == "there"
    assert len(asked) == 3
    model, asked = failing(lambda: ModelHTTPError(429, "m"), 3)
    agent = durable(model, engine={"model_retries": QUICK})
    with pytest.raises(ModelHTTPError):
        await Step().attempt(lambda: agent.run("go"))
    assert len(asked) == 3


@pytest.mark.parametrize(("spare", "times"), [(503, 3), (400, 3), (None, 1)])
async def test_rule_13_models_that_stand_in_are_asked_again_when_one_may_answer(
    spare: int | None, times: int
) -> None:
    """Each has failed in a way of its own. Where none may answer the attempt fails at once."""
    own = 503 if spare is not None else 404
    first, asked = failing(lambda: ModelHTTPError(own, "m"), 9)
    second, spared = failing(lambda: ModelHTTPError(spare or 400, "m"), 9)
    agent = durable(FallbackModel(first, second), engine={"model_retries": QUICK})
    with pytest.raises(FallbackExceptionGroup):
        await Step().attempt(lambda: agent.run("go"))
    assert (len(asked), len(spared)) == (times, times)


@pytest.mark.parametrize("status", [400, 401, 402, 404, 422])
async def test_rule_13_a_model_is_not_asked_again_for_what_stays(status: int) -> None:
    """A request that is rejected, not allowed or not paid for isn't sent again."""
    model, asked = failing(lambda: ModelHTTPError(status, "m"), 3)
    agent = durable(model, engine={"model_retries": QUICK})
    with pytest.raises(ModelHTTPError):
        await Step().attempt(lambda: agent.run("go"))
    assert len(asked) == 1


@pytest.mark.parametrize(("asks_for", "times"), [("50", 2), ("3600000", 1)])
async def test_rule_13_retry_after_is_honoured(asks_for: str, times: int) -> None:
    """No try comes before the time that the provider asks for; one that asks for too long has the step wait."""
    model, asked = failing(lambda: ModelHTTPError(429, "m", headers={"retry-after-ms": asks_for}), 1)
    agent = durable(model, engine={"model_retries": QUICK})
    began = asyncio.get_running_loop().time()
    if times == 1:
        with pytest.raises(ModelHTTPError):
            await Step().attempt(lambda: agent.run("go"))
    else:
        await Step().attempt(lambda: agent.run("go"))
        assert asyncio.get_running_loop().time() - began >= 0.05
    assert len(asked) == times


async def test_rule_13_a_stream_that_broke_is_not_begun_again_in_the_same_attempt() -> None:
    """Somebody has seen a part of it: the attempt fails, and the next one is told apart by its number."""
    asked: list[int] = []

    async def stream(_: list[ModelMessage], __: AgentInfo) -> AsyncIterator[str]:
        asked.append(1)
        yield "one"
        raise ModelHTTPError(503, "m")

    async def watch(_: RunContext[Any], events: AsyncIterable[AgentStreamEvent]) -> None:
        async for _event in events:
            pass

    engine = {"model_retries": QUICK, "event_stream_handler": watch}
    agent = durable(FunctionModel(stream_function=stream), engine=engine)
    with pytest.raises(ModelHTTPError):
        await Step().attempt(lambda: agent.run("go"))
    assert len(asked) == 1


# -- rule 14: names


def test_rule_14_an_agent_needs_a_name() -> None:
    """Its units are named after it."""
    with pytest.raises(UserError, match="unique `name`"):
        Agent(TestModel(), capabilities=[PaigeantDurability()])


def test_rule_14_toolsets_need_ids_of_their_own() -> None:
    """Two of the same id, or a dynamic one without, are found when the engine is attached."""
    with pytest.raises(UserError, match="same `id` 'x'"):
        durable(TestModel(), toolsets=[FunctionToolset[Any](id="x"), FunctionToolset[Any](id="x")])
    with pytest.raises(UserError, match="`id`"):
        durable(TestModel(), toolsets=[DynamicToolset(lambda _: FunctionToolset[Any]())])


def test_only_one_engine_can_be_attached() -> None:
    """Two would take each other's work."""
    with pytest.raises(UserError, match="durable execution engine"):
        Agent(TestModel(), name="a", capabilities=[PaigeantDurability(), PaigeantDurability()])


# -- rule 15: size


async def test_rule_15_what_is_written_grows_with_the_conversation() -> None:
    """Requests carry the whole history each time, records only what is new: twice the turns, twice the bytes."""

    async def written(turns: int) -> int:
        calls = [called("look", f"c{turn}") for turn in range(turns)]
        model, _ = scripted(*calls, "done")
        agent = durable(model)

        @agent.tool_plain
        def look() -> str:
            return "x" * 10_000

        step = Step()
        await step.attempt(lambda: agent.run("go", usage_limits=UsageLimits(request_limit=None)))
        return sum(len(value) for value in (await step.store.load_units(step.key)).values())

    ten, forty = await written(10), await written(40)
    assert ten < 200_000
    assert forty < 4.2 * ten


async def test_rule_15_images_are_written_once() -> None:
    """Those of tools and those of models: each in the record of what gave it, and in no other one."""
    size = 30_000

    def image(number: int) -> BinaryContent:
        return BinaryContent(random.Random(number).randbytes(size), media_type="image/png")

    async def written(turns: int) -> int:
        seen: list[int] = []

        def respond(messages: list[ModelMessage], _: AgentInfo) -> ModelResponse:
            seen.append(sum(isinstance(part, FilePart) for message in messages for part in message.parts))
            number = len(seen)
            if number > turns:
                return ModelResponse(parts=[TextPart("done")])
            return ModelResponse(parts=[FilePart(image(number)), called("look", f"c{number}")])

        agent = durable(FunctionModel(respond))

        @agent.tool_plain
        def look() -> ToolReturn:
            number = 100 + len(seen)
            return ToolReturn(return_value=["seen", image(number)], content=["Here:", image(200 + number)])

        step = Step()
        await step.attempt(lambda: agent.run(["go", image(0)]))
        assert seen == list(range(turns + 1))
        units = await step.store.load_units(step.key)
        result = await step.attempt(lambda: agent.run(["go", image(0)]))
        images = [part for part in _binaries(result.all_messages()) if len(part.data) == size]
        assert len(images) == 1 + 3 * turns
        assert len(seen) == turns + 1
        return sum(len(value) for value in units.values())

    five, twenty = await written(5), await written(20)
    assert five < 5 * 3 * size * 1.4
    assert twenty < 4.1 * five


def _binaries(messages: list[ModelMessage]) -> list[BinaryContent]:
    """All images in these messages."""
    found: list[BinaryContent] = []
    for message in messages:
        for part in message.parts:
            content = getattr(part, "content", None)
            parts = content if isinstance(content, list) else [content]
            found.extend(one for one in parts if isinstance(one, BinaryContent))
    return found


# -- rule 16: deadlines and pauses


async def test_rule_16_a_deadline_counts_from_the_first_attempt() -> None:
    """`timeout=` of a run is over when it is over, however many attempts there were."""
    clock = ManualClock(datetime.now(UTC) - timedelta(seconds=1000))
    model, requests = scripted("done")
    agent = durable(model)
    step = Step(clock)
    with pytest.raises(Crash):
        await step.attempt(lambda: agent.run("go", timeout=500), crash_after=1)
    clock.advance(1000)
    with pytest.raises(RunTimedOut):
        await step.attempt(lambda: agent.run("go", timeout=500))
    assert requests == []
    assert (await step.attempt(lambda: agent.run("go", timeout=5000))).output == "done"


async def test_rule_16_nested_runs_inherit_the_deadline() -> None:
    """An agent that a tool runs has no more time than the run that it works for."""
    deadlines: list[datetime | None] = []
    inner = durable(scripted("done")[0], name="inner")

    @inner.instructions
    def note(ctx: RunContext[Any]) -> str:
        deadlines.append(ctx.deadline)
        return ""

    outer = durable(scripted(called("ask", "c1"), "done")[0], name="outer")

    @outer.tool
    async def ask(ctx: RunContext[Any]) -> str:
        deadlines.append(ctx.deadline)
        return str((await inner.run("go", timeout=5000)).output)

    await Step().attempt(lambda: outer.run("go", timeout=500))
    assert deadlines[0] is not None
    assert deadlines == deadlines[:1] * 2


async def test_rule_16_a_pause_of_the_library_isn_t_begun_anew() -> None:
    """Between two polls of a response the run waits until a recorded instant, its step left: it goes on then."""
    clock = ManualClock()

    class Pausing(AbstractCapability[Any]):
        async def before_model_request(self, ctx: RunContext[Any], request_context: Any) -> Any:
            await _agent_graph_sleep(60.0)
            return request_context

    model, requests = scripted("done")
    agent = durable(model, capabilities=[Pausing()])
    step = Step(clock)
    for seconds in (0, 45):
        clock.advance(seconds)
        with pytest.raises(Parked):
            await step.attempt(lambda: agent.run("go"))
    assert requests == []
    clock.advance(15)
    assert (await step.attempt(lambda: agent.run("go"))).output == "done"


class Background(FunctionModel):
    """A model whose provider works on its answers in the background: `texts`, a job each."""

    def __init__(self, *texts: str, pause: float = 0.001) -> None:
        super().__init__(lambda *_: ModelResponse(parts=[]))
        self.texts, self.pause = texts, pause
        self.asked: list[str] = []
        self.is_given_up = False
        self.held: asyncio.Event | None = None
        """Set by whoever asks after a job while this is there, which then waits for ever."""
        self.fails = False

    def continuation_delay(self, response: ModelResponse) -> float | None:
        return self.pause

    async def request(self, messages: list[ModelMessage], *_: Any) -> ModelResponse:
        last = messages[-1]
        if not isinstance(last, ModelResponse) or last.state != "suspended":
            self.asked.append("begun")
            job = f"{self.asked.count('begun')}"
            return ModelResponse(parts=[], state="suspended", provider_response_id=job)
        self.asked.append("looked")
        if self.held is not None:
            self.held.set()
            await asyncio.Event().wait()
        if self.fails:
            raise ModelHTTPError(400, "background")
        assert not self.is_given_up, "its provider has given it up"
        if self.asked[-2] != "looked":
            return last
        assert last.provider_response_id is not None, "it was begun"
        text = self.texts[int(last.provider_response_id) - 1]
        return ModelResponse(parts=[TextPart(text)], provider_response_id=last.provider_response_id)

    async def cancel_suspended_response(self, response: ModelResponse) -> None:
        self.is_given_up = True


@pytest.mark.parametrize("how", ["ended from outside", "failed"])
async def test_what_a_provider_works_on_is_there_for_the_next_attempt(how: str) -> None:
    """An attempt that ends meanwhile doesn't have it given up: the record says that it is to be asked after."""
    model = Background("done")
    agent = durable(model)
    step = Step()
    if how == "failed":
        model.fails = True
        with pytest.raises(ModelHTTPError):
            await step.attempt(lambda: agent.run("go"))
    else:
        model.held = asyncio.Event()
        attempt = asyncio.create_task(step.attempt(lambda: agent.run("go")))
        async with asyncio.timeout(PATIENCE):
            await model.held.wait()
        attempt.cancel()
        with pytest.raises(asyncio.CancelledError):
            await attempt
    model.held, model.fails = None, False
    result = await step.attempt(lambda: agent.run("go"))
    assert (result.output, model.asked.count("begun"), model.is_given_up) == ("done", 1, False)


async def test_a_bad_answer_of_the_background_is_begun_anew() -> None:
    """To ask after the same job again would give the same answer, in each attempt."""
    model = Background("bad", "good")
    agent = durable(model, retries=0)

    @agent.output_validator
    def check(output: str) -> str:
        if output == "bad":
            raise ModelRetry("do better")
        return output

    step = Step()
    with pytest.raises(UnexpectedModelBehavior):
        await step.attempt(lambda: agent.run("go"))
    for _ in range(2):
        assert (await step.attempt(lambda: agent.run("go"))).output == "good"
    assert model.asked == ["begun", "looked", "looked"] * 2


# -- what an attempt can and can't mend


async def test_an_answer_that_the_agent_gave_up_on_is_asked_for_again() -> None:
    """An attempt that failed on what the model said isn't replayed to the same end: its last answer is asked for."""
    asked: list[int] = []

    def respond(messages: list[ModelMessage], info: AgentInfo) -> ModelResponse:
        asked.append(sum(isinstance(message, ModelResponse) for message in messages))
        size = 7 if len(asked) > 4 else -1
        return ModelResponse(parts=[called(info.output_tools[0].name, f"o{len(asked)}", size=size)])

    class Size(BaseModel):
        size: int = Field(gt=0)

    agent = durable(FunctionModel(respond), output_type=Size)
    step = Step()
    for _ in range(3):
        with pytest.raises(UnexpectedModelBehavior):
            await step.attempt(lambda: agent.run("go"))
    assert (await step.attempt(lambda: agent.run("go"))).output.size == 7
    assert asked == [0, 1, 1, 1, 1]
    assert (await step.attempt(lambda: agent.run("go"))).output.size == 7
    assert len(asked) == 5


@pytest.mark.parametrize("where", ["validator", "hook", "once"])
async def test_what_is_asked_about_an_answer_isn_t_told_of_the_one_in_its_place(where: str) -> None:
    """Another agent, or what is done once, judges the output: each answer of the model has a judgement of its own."""
    judged: list[str] = []

    def respond(messages: list[ModelMessage]) -> str:
        judged.append(prompt_of(messages))
        return "bad" if "wrong" in judged[-1] else "good"

    judge = durable(scripted(respond)[0], name="judge")
    outputs = iter(["wrong", "wrong again", "right"])
    keys: list[str] = []

    async def judgement(output: str) -> str:
        keys.append(effect_key())
        if where != "once":
            return str((await judge.run(output)).output)
        place = current_place()
        assert place is not None

        async def produce() -> bytes:
            judged.append(output)
            return to_json("bad" if "wrong" in output else "good")

        return str(from_json((await place.do(place.name("judge"), Unit("'judge'"), produce)).value))

    class Guard(AbstractCapability[Any]):
        async def after_model_request(
            self, ctx: RunContext[Any], *, request_context: ModelRequestContext, response: ModelResponse
        ) -> ModelResponse:
            if where == "hook" and await judgement(str(response.text)) == "bad":
                raise UnexpectedModelBehavior("a bad one")
            return response

    agent = durable(scripted(lambda _: next(outputs))[0], capabilities=[Guard()], retries=0)

    @agent.output_validator
    async def check(output: str) -> str:
        if where != "hook" and await judgement(output) == "bad":
            raise ModelRetry("do better")
        return output

    step = Step()
    for _ in range(2):
        with pytest.raises(UnexpectedModelBehavior):
            await step.attempt(lambda: agent.run("go"))
    assert (await step.attempt(lambda: agent.run("go"))).output == "right"
    assert judged == ["wrong", "wrong again", "right"]
    told = [name for name in readable(step.units).values() if " / " in name]
    assert [name.split(" / ")[0] for name in told] == [
        f"agent__model.request(agent:1,1){number}" for number in ("", "!2", "!3")
    ]
    assert (await step.attempt(lambda: agent.run("go"))).output == "right"
    assert len(judged) == 3
    assert len(set(keys)) == 3
    assert keys[-1] == keys[-2]


async def test_what_a_hook_asked_for_each_model_is_told_at_its_own_request() -> None:
    """It is called once more for a model that takes over, and not where that one's answer is replayed."""
    is_down = [True]
    told: list[tuple[int, str]] = []
    guard = durable(scripted(lambda messages: f"about {prompt_of(messages)}")[0], name="guard")

    class Guard(AbstractCapability[Any]):
        async def prepare_model_request(
            self, ctx: RunContext[Any], request_context: ModelRequestContext
        ) -> ModelRequestContext:
            told.append((ctx.run_step, str((await guard.run(f"{ctx.run_step}")).output)))
            return request_context

    def own(_: list[ModelMessage]) -> str:
        if is_down[0]:
            raise ModelHTTPError(400, "own")
        return "own"

    spare, _ = scripted(called("add", "c1"), "spare")
    agent = durable(
        scripted(own, own)[0],
        engine={"models": {"spare": spare}},
        capabilities=[Guard(), ModelFallback("spare")],
    )

    @agent.tool_plain
    def add() -> int:
        return 1

    async def work() -> list[str]:
        return [str((await agent.run("go")).output), str((await guard.run("after")).output)]

    step = Step()
    assert await step.attempt(work) == ["spare", "about after"]
    assert told == [(1, "about 1"), (1, "about 1"), (2, "about 2"), (2, "about 2")]
    told.clear()
    is_down[0] = False
    assert await step.attempt(work) == ["spare", "about after"]
    assert told == [(1, "about 1"), (2, "about 2")]


async def test_a_nested_agent_that_gave_up_is_asked_again_by_itself() -> None:
    """Only its own last answer is: the agent around it said nothing wrong."""
    asked: list[str] = []

    def respond(messages: list[ModelMessage], _: AgentInfo) -> ModelResponse:
        asked.append("inner")
        return ModelResponse(parts=[] if len(asked) < 4 else [TextPart("there")])

    inner = durable(FunctionModel(respond), name="inner", retries=0)
    model, requests = scripted(called("ask", "c1"), both_answers)
    outer = durable(model, name="outer")

    @outer.tool_plain
    async def ask() -> str:
        return str((await inner.run("go")).output)

    step = Step()
    with pytest.raises(UnexpectedModelBehavior):
        await step.attempt(lambda: outer.run("go"))
    failures = 1
    while len(asked) < 4:
        failures += 1
        with contextlib.suppress(UnexpectedModelBehavior):
            await step.attempt(lambda: outer.run("go"))
        assert failures < 5
    result = await step.attempt(lambda: outer.run("go"))
    assert (result.output, requests) == ("c1=there", [0, 1])


async def test_two_workers_at_once_go_on_with_the_same_records() -> None:
    """A worker that was given up and one that took over reach the same result, whoever recorded what.

    The one that is behind begins anew, behind what the other one has recorded.
    """
    outer, _ = nesting()
    step = Step()

    async def worker() -> Any:
        while True:
            with contextlib.suppress(Parked):
                return await step.attempt(lambda: outer.run("go"))

    one, other = await asyncio.gather(worker(), worker())
    assert one.output == other.output == "c1=ans-2 c2=ans-1"
    assert without_moments(one.all_messages_json()) == without_moments(other.all_messages_json())
    assert one.usage == other.usage


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


@settings(max_examples=40, deadline=None)
@given(crashes=st.lists(st.integers(1, 6), max_size=12), sequential=st.booleans())
def test_any_crashes_leave_the_outcome_of_none(crashes: list[int], sequential: bool) -> None:
    """Wherever attempts end, the result, the usage and the effect keys are those of a run that nothing ended."""

    async def outcome(crashes: list[int]) -> tuple[str, RunUsage, set[Any], list[str]]:
        outer, seen = nesting(sequential=sequential)
        step = Step()
        for crash_after in crashes:
            with contextlib.suppress(Crash):
                await step.attempt(lambda: outer.run("go"), crash_after=crash_after)
        result = await step.attempt(lambda: outer.run("go"))
        return str(result.output), result.usage, set(seen["noted"]), sorted(step.units)

    assert asyncio.run(outcome(crashes)) == asyncio.run(outcome([]))


# -- answers that were given up on


def careless(*, reuses: bool, **metadata: Any) -> tuple[AnyAgent, list[Any], list[int]]:
    """An agent whose first answer asks for a payment and for a check that fails for good; what it paid, the answers."""
    paid: list[Any] = []
    answers: list[int] = []

    def respond(messages: list[ModelMessage], _: AgentInfo) -> ModelResponse:
        answers.append(len(messages))
        call = "c" if reuses else f"c{len(answers)}"
        if len(messages) == 1:
            pay = called("pay", call, cents=len(answers))
            return ModelResponse(parts=[pay, called("check", f"{call}!", passes=len(answers) > 1)])
        return ModelResponse(parts=[TextPart(both_answers(messages))])

    agent = durable(FunctionModel(respond), retries=0)

    @agent.tool_plain(metadata=metadata)
    async def pay(cents: int) -> str:
        paid.append((cents, effect_key()))
        if cents < 0:
            raise ModelRetry("less than nothing")
        return f"paid {cents}"

    @agent.tool_plain
    async def check(passes: bool) -> str:
        if not passes:
            raise ModelRetry("no")
        return "fine"

    return agent, paid, answers


@pytest.mark.parametrize("reuses", [True, False], ids=["same call ids", "other call ids"])
@pytest.mark.parametrize("metadata", [{}, {"paigeant": {"at_most_once": True}}], ids=["tool", "at most once"])
async def test_an_answer_of_which_something_was_done_isn_t_asked_for_again(
    reuses: bool, metadata: dict[str, Any]
) -> None:
    """The new answer might ask for the same effect under another key: every attempt gives up in the same way."""
    agent, paid, answers = careless(reuses=reuses, **metadata)
    step = Step()
    for _ in range(3):
        with pytest.raises(UnexpectedModelBehavior):
            await step.attempt(lambda: agent.run("go"))
    assert (len(paid), len(answers)) == (1, 1)


@pytest.mark.parametrize("reuses", [True, False], ids=["same call ids", "other call ids"])
async def test_an_operator_s_retry_asks_for_that_answer_again(reuses: bool) -> None:
    """The run has failed at once, and says why. Taken up again, no record is handed to the calls of another answer."""
    agent, paid, answers = careless(reuses=reuses)
    activity = ActivityRegistry()
    activity.agent(agent, name="pay", prompt="go")
    async with MemoryApp(activity) as app:
        run = await app.dispatch(Workflow("w", ["pay"]), {})
        await app.drain()
        error = (await run.wait()).error
        assert "isn't asked for again, since what it asked of 'pay' was done" in str(error)
        assert ((await run.detail()).steps[0].attempt, len(answers)) == (1, 1)
        await run.retry()
        await app.drain()
        result = await run.wait()
    assert "paid 2" in str(result.output), result.error
    assert [cents for cents, _ in paid] == [1, 2]
    assert len({key for _, key in paid}) == 2


async def test_a_new_answer_gets_no_record_of_a_call_of_the_old_one() -> None:
    """A provider uses call ids again: what a tool told the old answer (to try again) isn't told to the new one."""
    answers: list[int] = []

    def respond(messages: list[ModelMessage], _: AgentInfo) -> ModelResponse:
        answers.append(len(messages))
        return ModelResponse(
            parts=[called("check", "c", passes=len(answers) > 1)]
            if len(messages) == 1
            else [TextPart(both_answers(messages))]
        )

    agent = durable(FunctionModel(respond), retries=0)

    @agent.tool_plain
    async def check(passes: bool) -> str:
        if not passes:
            raise ModelRetry("no")
        return "fine"

    step = Step()
    with pytest.raises(UnexpectedModelBehavior):
        await step.attempt(lambda: agent.run("go"))
    result, _ = await step.resumed(lambda: agent.run("go"))
    assert (result.output, answers) == ("c=fine", [1, 1, 3])
    assert 'agent__function_toolset__<agent>.call_tool:check(agent:1,1,1!2,"c")' in step.units


async def test_an_answer_that_somebody_made_do_without_stands() -> None:
    """Code that catches the error and goes on takes the same way in each attempt; what was asked stays asked."""
    asked: list[str] = []

    def respond(_: list[ModelMessage], __: AgentInfo) -> ModelResponse:
        asked.append("careless")
        return ModelResponse(parts=[] if len(asked) == 1 else [TextPart("yes")])

    agent = durable(FunctionModel(respond), name="careless", retries=0)
    model, requests = scripted("no")
    careful = durable(model, name="careful")

    async def work() -> str:
        try:
            return str((await agent.run("go")).output)
        except UnexpectedModelBehavior:
            return str((await careful.run("go")).output)

    step = Step()
    assert await step.resumed(work) == ("no", 2)
    assert (asked, requests) == (["careless"], [0])


async def test_an_error_that_was_raised_from_it_gives_up_as_well() -> None:
    """The attempt fails because of it, in whatever words."""
    asked: list[int] = []

    def respond(_: list[ModelMessage], __: AgentInfo) -> ModelResponse:
        asked.append(1)
        return ModelResponse(parts=[] if len(asked) == 1 else [TextPart("yes")])

    agent = durable(FunctionModel(respond), retries=0)

    async def work() -> str:
        try:
            return str((await agent.run("go")).output)
        except UnexpectedModelBehavior as exc:
            raise LookupError("nothing was found") from exc

    step = Step()
    with pytest.raises(LookupError):
        await step.attempt(work)
    assert await step.attempt(work) == "yes"


# -- calls that aren't recorded


@pytest.mark.parametrize("recorded", [True, False], ids=["recorded", "inline"])
async def test_calls_that_aren_t_recorded_keep_their_places(recorded: bool) -> None:
    """Two calls of one tool have keys and agents of their own, and swap nothing when they begin in another order."""
    seen: list[tuple[str, str]] = []
    inner_model, _ = scripted(asks("answer to"))
    inner = durable(inner_model, name="inner")
    model, _ = scripted([called("ask", "a", what="a"), called("ask", "b", what="b")], both_answers)
    outer = durable(model, name="outer")
    slow = ["a"]

    @outer.tool_plain(metadata={} if recorded else {"paigeant": False})
    async def ask(what: str) -> str:
        if what in slow:
            await asyncio.sleep(0.02)
        seen.append((what, effect_key()))
        return str((await inner.run(what)).output)

    step = Step()
    with contextlib.suppress(Crash):
        await step.attempt(lambda: outer.run("go"), crash_after=3)
    slow[:] = ["b"]
    result = await step.attempt(lambda: outer.run("go"))
    assert result.output == "a=answer to a b=answer to b"
    assert len(set(seen)) == 2


async def test_an_output_function_has_a_key_of_its_own() -> None:
    """It isn't recorded: each attempt calls it, with the same key, which no other run of the agent has."""
    sent: list[str] = []

    async def send(to: str) -> str:
        sent.append(effect_key())
        return f"sent to {to}"

    agent = durable(TestModel(custom_output_args={"to": "ada"}), output_type=send)

    async def work() -> list[str]:
        return [(await agent.run("one")).output, (await agent.run("two")).output]

    step = Step()
    for _ in range(2):
        assert await step.attempt(work) == ["sent to ada"] * 2
    assert sent[:2] == sent[2:]
    assert len(set(sent)) == 2


@pytest.mark.parametrize("change", ["type", "gone", "type, no retries", "gone, no retries"])
async def test_a_recorded_call_that_new_code_would_not_make_is_an_error(change: str) -> None:
    """A deploy has changed the tool: no model is told that its arguments are wrong, which would have it pay again."""
    paid: list[Any] = []
    requests: list[int] = []

    def respond(messages: list[ModelMessage], _: AgentInfo) -> ModelResponse:
        requests.append(len(messages))
        return ModelResponse(parts=[called("pay", f"c{len(requests)}", to=1)])

    def agent(to: Any, name: str = "pay") -> AnyAgent:
        made = durable(FunctionModel(respond), retries=0 if "retries" in change else 1)

        async def pay(to: Any) -> str:
            paid.append(to)
            return "paid"

        pay.__annotations__["to"] = to
        made.tool_plain(name=name)(pay)
        return made

    before, after = agent(int), agent(int, "transfer") if "gone" in change else agent(str)
    step = Step()
    with pytest.raises(Crash):
        await step.attempt(lambda: before.run("go"), crash_after=2)
    for _ in range(2):
        error: type[Exception] = UnexpectedModelBehavior if "retries" in change else UnitUnreadable
        with pytest.raises(error, match=r"tool 'pay' is recorded as done|exceeded max retries"):
            await step.attempt(lambda: after.run("go"))
    assert (paid, requests) == ([1], [1])


@pytest.mark.parametrize("name", ["my_pay", "settle"])
async def test_a_recorded_call_is_known_by_the_name_that_the_model_has_said(name: str) -> None:
    """A toolset around the tool's own gives it another one: what is recorded of it is found, and missed, by that."""
    paid: list[Any] = []
    requests: list[int] = []

    def respond(messages: list[ModelMessage], _: AgentInfo) -> ModelResponse:
        requests.append(len(messages))
        if returned(messages):
            return ModelResponse(parts=[TextPart("done")])
        return ModelResponse(parts=[called(name, "c1", to=1)])

    def agent(to: Any) -> AnyAgent:
        bank = FunctionToolset[Any](id="bank")

        async def pay(to: Any) -> str:
            paid.append(to)
            return "paid"

        pay.__annotations__["to"] = to
        bank.add_function(pay)
        outside = bank.prefixed("my") if name == "my_pay" else bank.renamed({name: "pay"})
        return durable(FunctionModel(respond), toolsets=[outside])

    step = Step()
    with pytest.raises(Crash):
        await step.attempt(lambda: agent(int).run("go"), crash_after=2)
    with pytest.raises(UnitUnreadable, match=f"tool '{name}' is recorded as done"):
        await step.attempt(lambda: agent(str).run("go"))
    assert (await step.attempt(lambda: agent(int).run("go"))).output == "done"
    assert (paid, requests) == ([1], [1, 3])
    assert f'agent__function_toolset__bank.call_tool:{name}(agent:1,1,"c1")' in step.units


@pytest.mark.parametrize("mode", ["recorded", "inline", "once", "asked"])
async def test_a_tool_that_was_renamed_goes_on_with_its_records(mode: str) -> None:
    """Wherever the deploy came: the same requests, effects and keys as if it had kept its name."""
    metadata: dict[str, Any] = {"inline": mode == "inline", "at_most_once": mode == "once"}

    def agent(name: str, **more: Any) -> tuple[AnyAgent, list[int], list[str]]:
        keys: list[str] = []

        async def pay(ctx: RunContext[Any], to: int) -> str:
            keys.append(f"{to} {effect_key()}")
            return f"paid {to}"

        turns = [called(name, f"c{to}", to=to) for to in (1, 2)], called(name, "c1", to=3), both_answers
        model, requests = scripted(*turns)
        made = durable(model)
        options: dict[str, Any] = {
            "metadata": {"paigeant": {**metadata, **more}},
            "requires_approval": mode == "asked",
        }
        made.tool(name=name, **options)(pay)
        return made, requests, keys

    async def done(agent: AnyAgent, step: Step, crash_after: int | None = None) -> Any:
        """What the agent gives; None when it crashed before that. People are asked, and allow it."""
        for _ in range(10):
            with contextlib.suppress(Parked):
                return await step.attempt(lambda: agent.run("go"), crash_after=crash_after)
            await asyncio.gather(
                *(
                    step.store.answer_request(request.id, b'{"approved":true}')
                    for request in await step.store.list_requests()
                )
            )
        raise AssertionError("it has no end")

    async def started() -> Step:
        step = Step()
        await step.start()
        return step

    (old, _, plain), (new, _, other) = agent("pay"), agent("transfer")
    output = (await done(old, await started())).output
    await done(new, await started())
    assert set(plain).isdisjoint(other)
    for crash_after in range(1, 12):
        (old, first, old_keys), (new, second, new_keys) = agent("pay"), agent("transfer", was="pay")
        step = await started()
        with contextlib.suppress(Crash):
            await done(old, step, crash_after)
        result = await done(new, step)
        assert result.output == output
        assert first + second == [0, 1, 2]
        keys = {*old_keys, *new_keys}
        assert len(keys) == 3, "a call has two keys"
        # Those of an answer that the old code recorded are that one's, whoever calls.
        kept = 0 if not first else 2 if len(first) == 1 else 3
        assert len(keys & set(plain)) == kept
        assert keys - set(plain) <= set(other)
        assert {call.tool_name for call in _calls(result.all_messages())} == {"transfer"}


def _calls(messages: list[ModelMessage]) -> list[ToolCallPart]:
    return [part for message in messages for part in message.parts if isinstance(part, ToolCallPart)]


@pytest.mark.parametrize("approved", [True, False], ids=["approved", "open"])
@pytest.mark.parametrize("change", ["renamed", "gone", "arguments"])
async def test_new_code_knows_the_calls_that_a_history_brings(approved: bool, change: str) -> None:
    """They may have waited for days in an earlier run: what is recorded of them is met by new code, or missed."""
    history: list[ModelMessage] = [
        ModelRequest.user_text_prompt("go"),
        ModelResponse([called("pay", "c1", to=1)]),
    ]
    results = DeferredToolResults(approvals={"c1": True}) if approved else None
    paid: list[str] = []

    def agent(name: str, to: type = int, **metadata: Any) -> tuple[AnyAgent, list[int]]:
        model, requests = scripted("", both_answers)
        made = durable(model)

        async def pay(to: Any) -> str:
            paid.append(effect_key())
            return "paid"

        pay.__annotations__["to"] = to
        made.tool_plain(name=name, requires_approval=approved, metadata={"paigeant": metadata})(pay)
        return made, requests

    def run(agent: AnyAgent) -> Any:
        return agent.run(message_history=history, deferred_tool_results=results)

    (before, _), (after, requests) = (
        agent("pay"),
        {"renamed": agent("transfer", was="pay"), "gone": agent("transfer"), "arguments": agent("pay", str)}[
            change
        ],
    )
    step = Step()
    with pytest.raises(Crash):
        await step.attempt(lambda: run(before), crash_after=1)
    if change == "renamed":
        for there in (step, Step()):  # whether it was done, or nobody has done it yet
            assert (await there.attempt(lambda: run(after))).output == "c1=paid"
        assert len(paid) == 2
    else:
        with pytest.raises(UnitUnreadable, match="tool 'pay' is recorded as done"):
            await step.attempt(lambda: run(after))
        assert (len(paid), requests) == (1, [])
    assert _calls(history)[0].tool_name == "pay", "what the caller has was changed"


async def test_an_agent_that_was_renamed_goes_on_with_its_records() -> None:
    """An engine of the old name stands for it."""

    def agent(called_now: str, **options: Any) -> tuple[AnyAgent, list[int]]:
        model, requests = scripted(called("look", "c1"), both_answers)
        made = durable(model, name=called_now, engine=options)

        @made.tool_plain
        def look() -> str:
            return effect_key()

        return made, requests

    before, first = agent("writer")
    after, second = agent("author", name="writer")
    step = Step()
    with pytest.raises(Crash):
        await step.attempt(lambda: before.run("go"), crash_after=2)
    resumed = await step.attempt(lambda: after.run("go"))
    whole = await Step().attempt(lambda: agent("writer")[0].run("go"))
    assert (resumed.output, resumed.run_id) == (whole.output, whole.run_id)
    assert (first, second) == ([0], [1])


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"one": {"was": 1}}, "was is a name that the tool had"),
        ({"one": {"was": ["x", ""]}}, "was is a name that the tool had"),
        ({"one": {"was": "two"}, "two": {}}, "tool 'one' says that it was 'two', and so is tool 'two'"),
        (
            {"one": {"was": "x"}, "two": {"was": ["y", "x"]}},
            "tool 'two' says that it was 'x', and so is tool 'one'",
        ),
    ],
)
def test_names_that_tools_had_are_checked(options: dict[str, Any], says: str) -> None:
    """When the engine is attached: a name stands for one tool."""
    toolset = FunctionToolset[Any](id="tools")
    for name, told in options.items():

        @toolset.tool_plain(name=name, metadata={"paigeant": told})
        def tool() -> None:
            """Nothing."""

    with pytest.raises(InvalidDefinition, match=says):
        durable(TestModel(), toolsets=[toolset])


# -- records that are being made while the agent goes on


class Slow(Step):
    """A step whose store takes its time. `said` tells what happened, in that order."""

    def __init__(self) -> None:
        super().__init__()
        self.said: list[str] = []

    async def save_unit(self, key: Any, name: str, value: bytes) -> bytes:
        for _ in range(100):  # longer than the agent takes to do what it does by itself
            await asyncio.sleep(0)
        stands = await super().save_unit(key, name, value)
        self.said.append("recorded")
        return stands


@pytest.mark.parametrize("inline", [False, True], ids=["recorded", "inline"])
async def test_nothing_is_done_before_what_led_to_it_is_recorded(inline: bool) -> None:
    """Neither a request nor a tool, whether it is recorded or not, nor an output function; nor does a run end."""
    step = Slow()

    def respond(messages: list[ModelMessage], info: AgentInfo) -> ModelResponse:
        number = sum(isinstance(message, ModelResponse) for message in messages)
        step.said.append("asked")
        part = (
            called(info.output_tools[0].name, "o1", text="x") if number == 2 else called("look", f"c{number}")
        )
        return ModelResponse(parts=[part])

    async def send(text: str) -> str:
        step.said.append("sent")
        return text

    agent = durable(FunctionModel(respond), output_type=send)

    @agent.tool_plain(metadata={"paigeant": {"inline": inline}})
    async def look() -> str:
        step.said.append("looked")
        return "seen"

    await step.attempt(lambda: agent.run("go"))
    looked = ["looked"] if inline else ["looked", "recorded"]
    assert step.said == [*(["asked", "recorded", *looked] * 2), "asked", "recorded", "sent"]
    step, agent = Slow(), durable(FunctionModel(lambda *_: ModelResponse(parts=[TextPart("done")])))
    await step.attempt(lambda: agent.run("go"))
    assert step.said == ["recorded"]


@pytest.mark.parametrize("one_by_one", ["", "tool", "engine"])
async def test_only_tools_that_run_together_don_t_wait_for_each_other(one_by_one: str) -> None:
    """They wait for their answer, and the next request for all of them; in sequence one may rely on the other."""
    step = Slow()
    calls: list[int] = []

    def respond(messages: list[ModelMessage], _: AgentInfo) -> ModelResponse:
        step.said.append("asked")
        calls.append(1)
        both = [called("look", "c1"), called("look", "c2")]
        return ModelResponse(parts=both if len(calls) == 1 else [TextPart("done")])

    agent = durable(FunctionModel(respond), engine={"sequential": one_by_one == "engine"})

    @agent.tool_plain(sequential=one_by_one == "tool")
    async def look() -> str:
        step.said.append("looked")
        return "seen"

    await step.attempt(lambda: agent.run("go"))
    looked = ["looked", "recorded"] * 2 if one_by_one else ["looked", "looked", "recorded", "recorded"]
    assert step.said == ["asked", "recorded", *looked, "asked", "recorded"]


async def test_tools_that_a_tool_calls_wait_for_each_other() -> None:
    """Code that calls tools may rely on what one gave to call the next."""
    step = Slow()
    model, _ = scripted(called("both", "c1"), both_answers)

    class Twice(AbstractCapability[Any]):
        async def wrap_tool_execute(self, ctx: Any, *, handler: Any, args: Any, **_: Any) -> Any:
            return [await handler(args), await handler(args)]

    agent = durable(model, capabilities=[Twice()])

    @agent.tool_plain
    async def both() -> str:
        step.said.append("looked")
        return "seen"

    await step.attempt(lambda: agent.run("go"))
    assert step.said == ["recorded", "looked", "recorded", "looked", "recorded", "recorded"]


@pytest.mark.parametrize("catches", [False, True], ids=["lets it fail", "catches it"])
async def test_a_record_that_can_t_be_made_ends_what_comes_after_it(catches: bool) -> None:
    """No tool is called for an answer that isn't recorded, and whoever catches the error starts no other agent."""
    tools: list[str] = []

    class Broken(Step):
        async def save_unit(self, key: Any, name: str, value: bytes) -> bytes:
            raise StoreUnavailable("gone")

    model, requests = scripted(called("look", "c1"), both_answers)
    agent = durable(model)

    @agent.tool_plain
    def look() -> str:
        tools.append("looked")
        return "seen"

    async def work() -> None:
        if catches:
            with pytest.raises(StoreUnavailable):
                await agent.run("go")
        await agent.run("go")

    with pytest.raises(StoreUnavailable):
        await Broken().attempt(work)
    assert (tools, requests) == ([], [0])


async def test_an_attempt_that_is_behind_begins_anew_behind_what_is_recorded() -> None:
    """Another worker has recorded another answer meanwhile: that one stands, no tool is called for this one's."""
    tools: list[str] = []
    asked: list[int] = []
    activity = ActivityRegistry()

    async def respond(messages: list[ModelMessage], _: AgentInfo) -> ModelResponse:
        number = sum(isinstance(message, ModelResponse) for message in messages)
        asked.append(number)
        if number == 1:
            return ModelResponse(parts=[TextPart(f"{returned(messages)}")])
        theirs, mine = (
            ModelResponse(parts=[called("look", call)], run_id=messages[-1].run_id)
            for call in ("theirs", "mine")
        )
        value = to_json({"value": theirs})
        await app.store.save_unit(StepKey(run.id, "agent"), "agent__model.request(agent:1,1)", value)
        return mine

    agent: AnyAgent = Agent(FunctionModel(respond), name="agent")

    @agent.tool
    def look(ctx: RunContext[Any]) -> str:
        tools.append(str(ctx.tool_call_id))
        return "seen"

    activity.agent(agent, prompt="go", retries=0)
    async with MemoryApp(activity) as app:
        run = await app.dispatch(Workflow("w", ["agent"]))
        await app.drain()
        detail = await run.detail()
    assert detail.run.status == "completed", detail.run.error
    assert from_json(detail.steps[0].output or b"") == "{'theirs': 'seen'}"
    assert (tools, asked) == (["theirs"], [0, 1])
    assert detail.steps[0].attempt == 1
