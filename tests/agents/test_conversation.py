"""Conversations over several steps: what is kept of them, and how much that is."""

from __future__ import annotations

import contextlib
import random
import sqlite3
from pathlib import Path
from typing import Any

import pytest
from pydantic_ai import (
    Agent,
    BinaryContent,
    BinaryImage,
    DeferredToolRequests,
    DeferredToolResults,
    ModelMessage,
    ModelResponse,
    ModelRetry,
    RunContext,
    TextPart,
    ToolDenied,
    ToolReturn,
)
from pydantic_ai.capabilities import ProcessHistory
from pydantic_ai.exceptions import CallDeferred
from pydantic_ai.messages import ModelRequest, UserPromptPart
from pydantic_ai.models.function import AgentInfo, FunctionModel
from pydantic_ai.usage import UsageLimits
from pydantic_core import from_json
from tests.agents.steps import called, prompt_of, returned, scripted
from tests.integration.processes import call, shown

from paigeant import ActivityRegistry, RunResult, Step, Workflow
from paigeant.errors import InvalidDefinition
from paigeant.slip import RunStatus
from paigeant.store import RunDetail, StepKey
from paigeant.testing import MemoryApp


def talker(*, size: int = 0, image: int = 30, history_processor: Any = None) -> Agent[Any, str]:
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
        return ["x" * size, BinaryContent(random.Random(1).randbytes(image), media_type="image/png")]

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


async def test_images_are_kept_once_in_a_conversation() -> None:
    """Each step writes those that it added, however many came before them: to its own call's record and to its part."""
    size = 30_000
    detail, kept = await talk(6, image=size)
    assert detail.run.status == "completed"
    assert all(size * 1.3 < len(value) < size * 1.4 + 3_000 for value in kept.values())


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


# -- over processes


HANDLERS = """
from pydantic_ai import Agent, DeferredToolRequests, DeferredToolResults, ModelResponse, TextPart, ToolCallPart
from pydantic_ai.models.function import FunctionModel
from pydantic_ai.usage import UsageLimits

from paigeant import ActivityRegistry, Workflow

def respond(messages, info):
    calls = [part for message in messages for part in message.parts if part.part_kind == "tool-call"]
    if not calls:
        return ModelResponse(parts=[ToolCallPart("read", {}, tool_call_id="c1")])
    if len(calls) == 1:
        return ModelResponse(parts=[ToolCallPart("delete", {"path": "a"}, tool_call_id="c2")])
    texts = [str(part.content) for message in messages for part in message.parts if part.part_kind == "user-prompt"]
    deleted = [part.content for message in messages for part in message.parts if part.part_kind == "tool-return"][1]
    return ModelResponse(parts=[TextPart(f"{len(messages)} {deleted} {' / '.join(texts)}")])

cleaner = Agent(FunctionModel(respond), name="cleaner", output_type=[str, DeferredToolRequests])

@cleaner.tool_plain
def read() -> str:
    return "x" * 3_000_000

@cleaner.tool_plain(requires_approval=True)
def delete(path: str) -> str:
    return f"deleted {path}"

activity = ActivityRegistry()
activity.agent(cleaner, prompt="Clean up {folder}")

@activity.execute()
async def decide(cleaner: DeferredToolRequests) -> DeferredToolResults:
    return cleaner.build_results(approve_all=True)

activity.agent(cleaner, name="finish", message_history="cleaner", deferred_tool_results="decide")
activity.agent(
    cleaner, name="report", prompt="What was it?", message_history="finish", usage_limits=UsageLimits(request_limit=4)
)
activity.agent(
    cleaner, name="again", prompt="Again?", message_history="report", usage_limits=UsageLimits(request_limit=4)
)
clean = Workflow("clean", ["cleaner", "decide", "finish", "report", "again"])
"""


async def test_a_conversation_that_json_can_t_hold_is_final() -> None:
    """What an inline tool gave is recorded here first: no further attempt could record it either."""
    model, requests = scripted(called("look", "c1"), "done")
    looker: Agent[Any, str] = Agent(model, name="looker")

    @looker.tool_plain(metadata={"paigeant": {"inline": True}})
    def look() -> ToolReturn:
        return ToolReturn("seen", metadata=object())

    activity = ActivityRegistry()
    activity.agent(looker, prompt="x", retries=2)
    activity.agent(talker(), prompt="y", message_history="looker")
    async with MemoryApp(activity) as app:
        run = await app.dispatch(Workflow("w", ["looker", "talker"]))
        await app.drain()
        result, detail = await run.wait(), await run.detail()
    assert result.error is not None
    assert "OutputInvalid: what a model or a tool gave can't be recorded as JSON" in result.error
    assert detail.steps[0].attempt == 1
    assert requests == [0, 1]


def test_a_conversation_goes_on_from_process_to_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each step is another process: messages, approval, usage and limits go on, and no message carries them."""
    monkeypatch.chdir(tmp_path)
    Path("handlers.py").write_text(HANDLERS)
    Path("paigeant.yaml").write_text("handlers: [handlers.py]\nmax_message_bytes: 8192\nretries: 0\n")
    sent = call("dispatch", "clean", "-", "--id", "c", input='{"folder": "tmp"}')
    assert sent.stdout == "c\n", sent.stderr
    largest = 0
    for topic in ("cleaner", "decide", "finish", "report", "again"):
        with contextlib.closing(sqlite3.connect("paigeant.db")) as connection, connection:
            [(size,)] = connection.execute("SELECT max(length(body)) FROM messages")
        connection.close()
        largest = max(largest, size)
        done = call("run", "--topics", topic, "--until-idle")
        assert done.returncode == 0, done.stderr
    assert 0 < largest <= 8192
    run = shown("c")
    steps = {step["id"]: step for step in run["steps"]}
    assert [call["tool_call_id"] for call in steps["cleaner"]["output"]["approvals"]] == ["c2"]
    assert steps["finish"]["output"] == "5 deleted a Clean up tmp"
    assert steps["report"]["output"] == "7 deleted a Clean up tmp / What was it?"
    assert "would exceed the request_limit of 4" in steps["again"]["error"]
    used = {name: step["usage"] and step["usage"]["requests"] for name, step in steps.items()}
    assert used == {"cleaner": 2, "decide": None, "finish": 1, "report": 1, "again": None}
    assert (run["usage"]["requests"], run["usage"]["tool_calls"]) == (4, 2)
    with contextlib.closing(sqlite3.connect("paigeant.db")) as connection, connection:
        [(stored,)] = connection.execute("SELECT sum(length(value)) FROM step_units")
    connection.close()
    assert stored < 7_000_000  # the tool's record, and the conversation once


# -- tool calls that wait for an answer


def deleter(seen: list[list[ModelMessage]] | None = None) -> Agent[Any, Any]:
    """An agent that wants to delete two files and ask for a third, whose model has `seen` what came of it."""

    def done(messages: list[ModelMessage]) -> str:
        if seen is not None:
            seen.append(messages)
        return " ".join(f"{call}={value}" for call, value in sorted(returned(messages).items()))

    calls = [called("delete", "c1", path="a"), called("delete", "c2", path="b"), called("find", "c3")]
    model, _ = scripted(calls, done)
    agent: Agent[Any, Any] = Agent(model, name="deleter", output_type=[str, DeferredToolRequests])

    @agent.tool_plain(requires_approval=True)
    def delete(path: str) -> str:
        return f"deleted {path}"

    @agent.tool_plain
    def find() -> str:
        raise CallDeferred

    return agent


async def decided(
    results: DeferredToolResults | None,
    *,
    steps: tuple[Any, ...] = ("deleter", "decide", "finish"),
    seen: list[list[ModelMessage]] | None = None,
    **more: Any,
) -> RunResult:
    """How a run ended in which `decide` answers the tool calls of `deleter` for `finish`."""
    activity = ActivityRegistry()
    agent = deleter(seen)
    activity.agent(agent, prompt="Clean up")

    @activity.execute()
    async def decide() -> DeferredToolResults | None:
        return results

    options = {"message_history": "deleter", "deferred_tool_results": "decide", **more}
    activity.agent(agent, name="finish", **options)
    async with MemoryApp(activity) as app:
        run = await app.dispatch(Workflow("w", ["deleter", "decide", "finish"]))
        await app.drain()
        return await run.wait()


ANSWERS = DeferredToolResults(
    approvals={"c1": True, "c2": ToolDenied("keep it")}, calls={"c3": {"at": "home"}}
)


async def test_a_later_step_answers_the_tool_calls_of_an_earlier_one() -> None:
    """What was approved is done then, what was denied isn't, what was done elsewhere is taken over."""
    result = await decided(ANSWERS)
    assert result.status is RunStatus.COMPLETED, result.error
    assert result.output == "c1=deleted a c2=keep it c3={'at': 'home'}"


IMAGE = BinaryImage(b"\x00\xff", media_type="image/png", identifier="cat")


@pytest.mark.parametrize(
    ("found", "told"),
    [
        (ToolReturn("a cat", content=["see", IMAGE]), "a cat"),
        (ToolReturn(IMAGE), IMAGE),
        (IMAGE, IMAGE),
        ({"kind": "binary", "of": [IMAGE, 1.0]}, {"kind": "binary", "of": [IMAGE, 1.0]}),
        (ModelRetry("look again"), "look again"),
    ],
)
async def test_an_answer_may_have_a_file_in_it(found: Any, told: Any) -> None:
    """It is there for the model as if the answer hadn't travelled, and not as the text of its bytes."""
    calls = DeferredToolResults(approvals={"c1": True, "c2": False}, calls={"c3": found})
    seen: list[list[ModelMessage]] = []
    result = await decided(calls, seen=seen)
    assert result.status is RunStatus.COMPLETED, result.error
    [messages] = seen
    assert returned(messages)["c3"] == told
    extra = [part.content for part in messages[-1].parts if isinstance(part, UserPromptPart)]
    assert extra == ([found.content] if isinstance(found, ToolReturn) and found.content else [])


@pytest.mark.parametrize(
    ("results", "says"),
    [
        (None, "'decide', which is to answer them, isn't there"),
        (
            DeferredToolResults(approvals={"c1": True}, calls={"c3": 1}),
            "'decide' has in its approvals c1, and should have c1, c2",
        ),
        (
            DeferredToolResults(approvals={"c1": True, "c2": True, "c3": True}),
            "'decide' has in its approvals c1, c2, c3, and should have c1, c2",
        ),
        (
            DeferredToolResults(approvals={"c1": True, "c2": True}),
            "'decide' has in its calls none, and should have c3",
        ),
    ],
)
async def test_each_call_needs_its_answer(results: DeferredToolResults | None, says: str) -> None:
    """Answers that are missing, too many or of the wrong kind end the step at once, with the calls that wait."""
    result = await decided(results)
    assert result.status is RunStatus.FAILED
    assert "tool calls wait for an answer: c1 (delete), c2 (delete), c3 (find)" in (result.error or "")
    assert says in (result.error or "")


async def test_answers_have_to_be_named() -> None:
    """A step that continues a conversation with open calls and names no answers says how to."""
    result = await decided(ANSWERS, prompt="Go on", deferred_tool_results=None)
    assert "name what answers them: activity.agent(..., deferred_tool_results='decide')" in (
        result.error or ""
    )


async def test_answers_that_are_none_don_t_fit() -> None:
    """A value that is no DeferredToolResults is told as such."""
    result = await decided(ANSWERS, deferred_tool_results="deleter")
    assert "'deleter" in (result.error or "")
    assert "doesn't fit" in (result.error or "")


async def test_answers_where_nobody_asked_are_an_error() -> None:
    """A conversation that waits for nothing takes no answers; the step goes on with its prompt where there are none."""
    activity = ActivityRegistry()
    agent = Agent(FunctionModel(lambda messages, _: ModelResponse(parts=[TextPart(prompt_of(messages))])))
    activity.agent(agent, name="one", prompt="First")

    @activity.execute()
    async def decide(answered: bool) -> DeferredToolResults | None:
        return ANSWERS if answered else None

    activity.agent(agent, name="two", prompt="Second", message_history="one", deferred_tool_results="decide")
    async with MemoryApp(activity) as app:
        runs = [await app.dispatch(Workflow("w", ["one", "decide", "two"]), {"answered": a}) for a in (0, 1)]
        await app.drain()
        fine, wrong = [await run.wait() for run in runs]
    assert fine.output == "Second"
    assert "'decide' answers tool calls of activity 'two' (c1, c2, c3)" in (wrong.error or "")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (
            {"deferred_tool_results": "decide"},
            "but no message_history: name the step whose tool calls they answer",
        ),
        ({"deferred_tool_results": 1, "message_history": "a"}, "is the name of a value in the payload"),
        ({"message_history": "a"}, "an agent needs a prompt"),
    ],
)
def test_wrong_answers_are_refused_when_they_are_registered(options: dict[str, Any], says: str) -> None:
    """What names no answer, or answers nothing, is an error of the definition; so is no prompt without answers."""
    with pytest.raises(InvalidDefinition, match=says):
        ActivityRegistry().agent(deleter(), **options)


async def test_limits_count_the_whole_conversation() -> None:
    """Three steps of two requests each: a limit of five ends the third one, whatever its own share is."""
    activity, names = chain(2)
    activity.agent(
        talker(),
        name="third",
        prompt="More",
        message_history="talk1",
        usage_limits=UsageLimits(request_limit=5),
    )
    async with MemoryApp(activity) as app:
        run = await app.dispatch(Workflow("w", [*names[:2], Step("third", retries=0)]))
        await app.drain()
        result = await run.wait()
    assert "would exceed the request_limit of 5" in (result.error or "")
    assert result.usage.requests == 5


async def test_the_steps_of_a_conversation_share_its_id() -> None:
    """All messages tell the same conversation, so that traces of several workers can be joined."""
    _, kept = await talk(3)
    records = [from_json(value)["conversation"] for value in kept.values()]
    ids = {message["conversation_id"] for record in records for message in record["messages"]}
    assert ids == {record["conversation_id"] for record in records}
    assert len(ids) == 1
