"""PaigeantDurability: which call of a tool is which, in what order they are made, how often, and what they raise."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterable, AsyncIterator
from datetime import date
from typing import Any

import pytest
from pydantic import Base64Bytes, BaseModel, Field
from pydantic_ai import (
    Agent,
    ApprovalRequired,
    CallDeferred,
    DeferredToolRequests,
    ModelMessage,
    ModelRetry,
    RunContext,
    ToolDefinition,
    ToolFailed,
)
from pydantic_ai.capabilities import AbstractCapability
from pydantic_ai.exceptions import RunCancelled
from pydantic_ai.messages import AgentStreamEvent
from pydantic_ai.models.function import AgentInfo, DeltaToolCall, FunctionModel
from pydantic_ai.models.test import TestModel
from pydantic_core import from_json
from tests.agents.durable import both_answers, durable, nesting
from tests.agents.steps import Crash, Step, asks, called, returned, scripted

from paigeant import RetryPolicy
from paigeant.agents import PaigeantDurability, effect_key, operations
from paigeant.errors import OutcomeUnknown
from paigeant.parking import Parked

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
    """Marked so in its metadata, it isn't called again when its outcome was lost: a person is asked about that call."""
    model, _ = scripted(called("pay", "c1", euros=9, on=date(2026, 1, 2).isoformat()), "done")
    agent = durable(model)
    paid: list[str] = []

    @agent.tool_plain(metadata={"paigeant": {"at_most_once": True, **more}})
    async def pay(euros: int, on: date) -> int:
        paid.append(effect_key())
        raise Crash

    step = Step()
    with pytest.raises(Crash):
        await step.attempt(lambda: agent.run("go"))
    with pytest.raises(Parked) as left:
        await step.attempt(lambda: agent.run("go"))
    assert RunCancelled.from_cancellation(left.value) is not None, "to the library it is a cancelled run"
    asked = from_json((await step.asked()).asked)
    assert "Do tool 'pay' of agent 'agent' again?" in asked.pop("question")
    call = {"agent": "agent", "tool": "pay", "arguments": {"euros": 9, "on": "2026-01-02"}}
    assert asked == {**call, "effect_key": paid[0]}
    await step.answer(b'{"approved":false}')
    with pytest.raises(OutcomeUnknown, match="tool 'pay' of agent 'agent' may be done at most once"):
        await step.attempt(lambda: agent.run("go"))
    assert len(paid) == 1


async def test_whoever_decides_is_told_what_the_model_asked() -> None:
    """And not what a hook has put in besides, such as a password; that is in no record either."""

    class Enriched(AbstractCapability[Any]):
        async def before_tool_execute(self, ctx: Any, *, call: Any, tool_def: Any, args: Any) -> Any:
            return {**args, "password": "hunter2"}

    model, _ = scripted(called("send", "c1", raw="/w=="), "done")
    agent = Agent(model, name="agent", capabilities=[PaigeantDurability(), Enriched()])

    @agent.tool_plain(metadata={"paigeant": {"at_most_once": True}})
    async def send(raw: Base64Bytes, password: str = "") -> int:
        assert (raw, password) == (b"\xff", "hunter2")
        raise Crash

    step = Step()
    with pytest.raises(Crash):
        await step.attempt(lambda: agent.run("go"))
    with pytest.raises(Parked):
        await step.attempt(lambda: agent.run("go"))
    assert from_json((await step.asked()).asked)["arguments"] == {"raw": "/w=="}
    units = await step.store.load_units(step.key)
    assert [unit for unit in units if unit.endswith("!begun")]
    assert b"hunter2" not in b"".join(units.values())


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
