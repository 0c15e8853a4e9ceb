"""PaigeantDurability: how a record is written and read back, what can't be, and how large it is."""

from __future__ import annotations

import json
import random
from collections.abc import AsyncIterable, AsyncIterator
from dataclasses import dataclass
from typing import Any

import pytest
from pydantic import BaseModel, TypeAdapter
from pydantic_ai import (
    BinaryContent,
    ModelMessage,
    ModelResponse,
    RunContext,
    TextPart,
    ToolCallPart,
    ToolReturn,
)
from pydantic_ai.messages import AgentStreamEvent, FilePart
from pydantic_ai.models.function import AgentInfo, DeltaToolCall, FunctionModel
from pydantic_ai.usage import RequestUsage, UsageLimits
from pydantic_core import from_json
from tests.agents.durable import durable
from tests.agents.steps import Crash, Step, called, returned, scripted

from paigeant.agents import operations
from paigeant.errors import OutputInvalid, UnitUnreadable

# -- rule 11 and records that can't be written or read


async def test_rule_11_what_can_t_be_written_as_json_is_final() -> None:
    """A result that JSON can't hold can't be recorded: an error of ours that isn't tried again."""
    model, _ = scripted(called("look", "c1"), "done")
    agent = durable(model)

    @agent.tool_plain
    def look() -> Any:
        return {"socket": object()}

    with pytest.raises(OutputInvalid, match=r"what tool 'look' gave can't be recorded as JSON.*expected"):
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
