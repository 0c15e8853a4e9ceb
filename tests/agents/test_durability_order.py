"""PaigeantDurability: what waits for the records that are being made while the agent goes on."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from pydantic_ai import ModelMessage, ModelResponse, TextPart
from pydantic_ai.capabilities import AbstractCapability
from pydantic_ai.models.function import AgentInfo, FunctionModel
from tests.agents.durable import both_answers, durable
from tests.agents.steps import Step, called, scripted

from paigeant.errors import StoreUnavailable


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
