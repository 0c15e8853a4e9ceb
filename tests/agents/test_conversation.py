"""Conversations over several steps: what is kept of them, and how much that is."""

from __future__ import annotations

from typing import Any

from pydantic_ai import Agent, BinaryContent, ModelMessage, ModelResponse, RunContext, TextPart
from pydantic_ai.capabilities import ProcessHistory
from pydantic_ai.messages import ModelRequest
from pydantic_ai.models.function import AgentInfo, FunctionModel
from pydantic_core import from_json
from tests.agents.steps import called, returned

from paigeant import ActivityRegistry, Workflow
from paigeant.store import RunDetail, StepKey
from paigeant.testing import MemoryApp


def talker(*, size: int = 0, history_processor: Any = None) -> Agent[Any, str]:
    """An agent that looks at a large thing and says how many messages it has seen."""

    def respond(messages: list[ModelMessage], _: AgentInfo) -> ModelResponse:
        last = messages[-1]
        assert isinstance(last, ModelRequest)
        if returned([last]):
            return ModelResponse(parts=[TextPart(f"{len(messages)}")])
        return ModelResponse(parts=[called("look", f"c{len(messages)}")])

    capabilities = [] if history_processor is None else [history_processor]
    agent = Agent(FunctionModel(respond), name="talker", capabilities=capabilities)

    @agent.tool
    def look(ctx: RunContext[Any]) -> list[Any]:
        return ["x" * size, BinaryContent(b"\x00\xff\xfe" * 10, media_type="image/png")]

    return agent


def chain(length: int, **options: Any) -> tuple[ActivityRegistry, list[str]]:
    """So many steps, each of which continues the conversation of the one before it."""
    activity = ActivityRegistry()
    names = [f"talk{number}" for number in range(length)]
    for number, name in enumerate(names):
        before = names[number - 1] if number else None
        activity.agent(talker(**options), name=name, prompt=f"Part {number}", message_history=before)

    @activity.execute()
    async def last() -> None:
        """So that the last agent's messages are kept as well."""

    return activity, [*names, "last"]


async def talk(length: int, **options: Any) -> tuple[RunDetail, dict[str, bytes]]:
    """The run of such a chain, and what is kept of the conversation, by step."""
    activity, names = chain(length, **options)
    async with MemoryApp(activity) as app:
        run = await app.dispatch(Workflow("w", list(names)), workflow_id="r")
        await app.drain()
        kept = {}
        for name in names[:-1]:
            units = await app.store.load_units(StepKey("r", name))
            [kept[name]] = [value for unit, value in units.items() if unit.startswith("paigeant.messages:")]
        return await run.detail(), kept


async def test_each_step_keeps_what_it_added() -> None:
    """A chain of steps sees the whole conversation, and writes each message of it once."""
    detail, kept = await talk(6, size=10_000)
    outputs = [from_json(step.output or b"") for step in detail.steps[:6]]
    assert outputs == ["3", "7", "11", "15", "19", "23"]
    sizes = [len(value) for value in kept.values()]
    assert max(sizes) < 1.2 * min(sizes)
    assert all(b"\\u0000" not in value for value in kept.values())


async def test_a_history_that_was_changed_is_kept_whole() -> None:
    """What an agent makes of its history before it goes on isn't what the earlier step kept: it stands by itself."""

    def shorten(messages: list[ModelMessage]) -> list[ModelMessage]:
        return messages[-3:] if len(messages) > 4 else messages

    detail, kept = await talk(2, history_processor=ProcessHistory(shorten))
    assert detail.run.status == "completed"
    records = [from_json(value) for value in kept.values()]
    assert [(len(record["conversation"]["messages"]), record["step"]) for record in records] == [
        (4, None),
        (4, None),
    ]
