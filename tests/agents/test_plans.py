"""Agents that plan: what they are offered, what they may have, what hostile ones get. Real runs on one SQLite file."""

from __future__ import annotations

import asyncio
import logging
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import pytest
from pydantic import BaseModel, Field
from pydantic_ai import (
    Agent,
    ModelMessage,
    ModelResponse,
    ModelRetry,
    NativeOutput,
    RunContext,
    TextOutput,
    TextPart,
    ToolCallPart,
    ToolDefinition,
    ToolOutput,
)
from pydantic_ai.capabilities import AbstractCapability
from pydantic_ai.messages import ModelResponsePart
from pydantic_ai.models.function import AgentInfo, FunctionModel
from pydantic_ai.models.test import TestModel
from pydantic_core import core_schema
from tests.agents.steps import called, prompt_of, returned, scripted
from tests.observers import Seen
from tests.patience import PATIENCE
from typing_extensions import TypeAliasType

import paigeant
from paigeant import (
    ActivityRegistry,
    ItineraryPolicy,
    Paigeant,
    RetryPolicy,
    Settings,
    Step,
    StepContext,
    Workflow,
)
from paigeant.agents import Handoff
from paigeant.agents.plans import MAX_ARGUMENT_BYTES, MAX_ARGUMENT_DEPTH, hands_over
from paigeant.errors import InvalidDefinition
from paigeant.observer import Observer
from paigeant.store import RunDetail


class Letter(BaseModel):
    to: str
    copies: int = Field(1, ge=1, le=9)


class Odd:
    """Read from JSON by a function, which says nothing of what it takes."""

    def __init__(self, text: str) -> None:
        self.text = text

    @classmethod
    def __get_pydantic_core_schema__(cls, *_: Any) -> core_schema.CoreSchema:
        return core_schema.no_info_plain_validator_function(cls)


def helpers() -> ActivityRegistry:
    """What an agent may add: functions with arguments, one with the context, and one that takes all there is."""
    activity = ActivityRegistry()

    @activity.execute()
    async def shorten(text: str, most: int = 5) -> str:
        """Keep the first characters."""
        return text[:most]

    @activity.execute()
    async def send(letter: Letter, ctx: StepContext) -> str:
        """Send a letter."""
        return f"{letter.copies} to {letter.to} by {ctx.step_id}"

    @activity.execute()
    async def collect(**rest: Any) -> list[str]:
        return sorted(rest)

    return activity


def planner(model: FunctionModel, may_add: ItineraryPolicy, **options: Any) -> ActivityRegistry:
    """The agent `planner` beside the helpers, with what it may add."""
    activity = helpers()
    activity.agent(Agent(model, name="planner"), prompt="Plan", may_add=may_add, **options)
    return activity


def adds(call: str, *activities: str | dict[str, Any], **more: Any) -> ToolCallPart:
    """A model's request for steps."""
    steps = [{"activity": entry} if isinstance(entry, str) else entry for entry in activities]
    return called("add_steps", call, steps=steps, **more)


def told(messages: list[ModelMessage]) -> str:
    """A last turn that says what the calls gave."""
    return "\n".join(str(text) for text in returned(messages).values())


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """Settings for one file, transport and store alike."""
    url = f"sqlite:///{tmp_path}/p.db"
    return Settings(transport_url=url, store_url=url, retry_base=0.0, sweep_interval=0.05)


@asynccontextmanager
async def at_work(
    settings: Settings, *registries: ActivityRegistry, observers: Sequence[Observer] = ()
) -> AsyncIterator[Paigeant]:
    """An application without activities of its own, and beside it a worker for each registry, each in its own."""
    async with AsyncExitStack() as stack:
        app = await stack.enter_async_context(Paigeant(settings))
        for registry in registries:
            other = await stack.enter_async_context(
                Paigeant(settings, activities=registry, observers=observers)
            )
            worker = other.worker()
            task = asyncio.create_task(worker.run())
            stack.push_async_callback(asyncio.wait_for, task, PATIENCE)
            stack.push_async_callback(worker.stop, PATIENCE)
        yield app


async def carried_out(
    settings: Settings,
    activity: ActivityRegistry | list[ActivityRegistry],
    *steps: str | Step,
    policy: ItineraryPolicy | None = None,
    **payload: Any,
) -> RunDetail:
    """The run of these steps once it has ended. Each registry is one worker's."""
    registries = activity if isinstance(activity, list) else [activity]
    async with at_work(settings, *registries) as app:
        run = await app.dispatch(Workflow("w", list(steps), policy=policy), payload)
        await run.wait(timeout=PATIENCE)
        return await run.detail()


def outputs(detail: RunDetail) -> dict[str, str]:
    """What each step gave, in the order in which they were done."""
    return {row.key.step: (row.output or b"").decode() for row in detail.steps}


def said(detail: RunDetail) -> str:
    """What the planner gave."""
    return outputs(detail)["planner"]


# -- what is offered


async def test_allowed_activities_are_described(settings: Settings) -> None:
    """Name, docstring and arguments of each, as the worker's registries know them; of an unknown one the name alone."""
    seen: list[AgentInfo] = []

    def respond(_: list[ModelMessage], info: AgentInfo) -> ModelResponse:
        seen.append(info)
        return ModelResponse(parts=[TextPart("nothing")])

    activity = ActivityRegistry()  # the helpers are in another registry of the same worker
    activity.agent(
        Agent(FunctionModel(respond), name="planner"),
        prompt="Plan",
        may_add=ItineraryPolicy(allowed=["shorten", "send", "collect", "elsewhere"]),
    )
    both = ActivityRegistry.merged([helpers(), activity])
    await carried_out(settings, both, "planner", Step("collect", id="last"))
    [info] = seen
    tools = {tool.name: tool for tool in info.function_tools}
    assert sorted(tools) == ["add_steps", "finish_run"]
    assert all(tool.metadata == {"paigeant": {"inline": True}} for tool in tools.values())
    schema = tools["add_steps"].parameters_json_schema
    kinds = {
        kind["properties"]["activity"]["const"]: kind
        for kind in schema["properties"]["steps"]["items"]["anyOf"]
    }
    assert kinds["shorten"]["description"] == "shorten: Keep the first characters."
    arguments = kinds["shorten"]["properties"]["arguments"]
    assert arguments["properties"] == {"text": {"type": "string"}, "most": {"type": "integer"}}
    assert (arguments["description"], arguments["additionalProperties"]) == ("without a default: text", False)
    letter = kinds["send"]["properties"]["arguments"]["properties"]
    assert letter == {"letter": {"$ref": "#/$defs/Letter"}}  # the context is nobody's to give
    assert schema["$defs"]["Letter"]["properties"]["copies"]["maximum"] == 9
    assert kinds["collect"]["properties"]["arguments"]["additionalProperties"] is True
    assert kinds["elsewhere"]["properties"]["arguments"] == {"type": "object"}
    assert "Steps that follow it: collect." in (info.instructions or "")


async def test_a_type_without_a_schema_is_offered_all_the_same(settings: Settings) -> None:
    """What pydantic can read but not describe has an empty schema."""
    activity = ActivityRegistry()
    seen: list[dict[str, Any]] = []

    @activity.execute()
    async def odd(value: Odd, n: int = 0) -> str:
        return value.text

    def respond(messages: list[ModelMessage], info: AgentInfo) -> ModelResponse:
        seen.append(info.function_tools[0].parameters_json_schema)
        answers: list[ModelResponsePart] = [
            adds("c1", {"activity": "odd", "arguments": {"value": "b"}}),
            TextPart("done"),
        ]
        return ModelResponse(parts=[answers[len(messages) // 2]])

    agent = Agent(FunctionModel(respond), name="planner")
    activity.agent(agent, prompt="Plan", may_add=ItineraryPolicy(allowed=["odd"]))
    detail = await carried_out(settings, activity, "planner")
    assert outputs(detail) == {"planner": '"done"', "planner.1": '"b"'}
    arguments = seen[0]["properties"]["steps"]["items"]["properties"]["arguments"]
    assert arguments["properties"] == {"value": {}, "n": {"type": "integer"}}


async def test_only_the_agent_of_the_step_may_plan(settings: Settings) -> None:
    """An agent within its tools, and the same agent in a plain activity, have no tools for plans."""
    seen: dict[str, list[str]] = {}

    def respond(messages: list[ModelMessage], info: AgentInfo) -> ModelResponse:
        seen.setdefault(prompt_of(messages), [tool.name for tool in info.function_tools])
        outer = "delegate" in [tool.name for tool in info.function_tools]
        if outer and len(messages) == 1:
            return ModelResponse(parts=[called("delegate", "c1")])
        return ModelResponse(parts=[TextPart("done")])

    inner: Agent[None, str] = Agent(FunctionModel(respond), name="inner")
    outer = Agent(FunctionModel(respond), name="planner")

    @outer.tool_plain
    async def delegate() -> str:
        return (await inner.run("inside")).output

    activity = helpers()
    activity.agent(outer, prompt="a step", may_add=ItineraryPolicy(allowed=["shorten"]))

    @activity.execute()
    async def plain() -> str:
        return (await outer.run("plain")).output

    await carried_out(settings, activity, "planner", "plain")
    assert seen == {
        "a step": ["delegate", "add_steps", "finish_run"],
        "inside": [],
        "plain": ["delegate"],
    }


# -- what is done


async def test_steps_are_put_next_or_at_the_end(settings: Settings) -> None:
    """Next: right after the agent's own step, behind what it put there already. End: behind all others."""
    model, _ = scripted(
        [
            adds("c1", {"activity": "shorten", "arguments": {"most": 2}}, place="next"),
            adds("c2", {"activity": "send", "arguments": {"letter": {"to": "Ada"}}}, place="end"),
            adds("c3", {"activity": "shorten", "arguments": {"most": 3}}),
        ],
        told,
    )
    activity = planner(model, ItineraryPolicy(allowed=["shorten", "send"], max_added=3))
    detail = await carried_out(settings, activity, "planner", "collect", text="abcdef")
    assert list(outputs(detail)) == ["planner", "planner.1", "planner.3", "collect", "planner.2"]
    assert (outputs(detail)["planner.1"], outputs(detail)["planner.3"]) == ('"ab"', '"abc"')
    assert outputs(detail)["planner.2"] == '"1 to Ada by planner.2"'
    assert said(detail).count("Added: ") == 3
    assert "After this step: planner.1 (shorten), planner.3 (shorten), collect, planner.2 (send)." in said(
        detail
    )


async def test_a_run_is_finished_early(settings: Settings) -> None:
    """The rest of the itinerary isn't done, and what is added after that is all that is left."""
    model, _ = scripted(
        [called("finish_run", "c1", reason="enough"), adds("c2", "shorten")],
        told,
    )
    activity = planner(model, ItineraryPolicy(allowed=["shorten"]))
    detail = await carried_out(settings, activity, "planner", "collect", text="abcdef")
    assert (detail.run.status, list(outputs(detail))) == ("completed", ["planner", "planner.1"])
    assert "The run ends with this step. After this step: nothing." in said(detail)


async def test_another_worker_goes_on(settings: Settings) -> None:
    """The worker of the agent knows an activity by name alone; the one that has it does it."""
    model, _ = scripted(adds("c1", {"activity": "shorten", "arguments": {"most": 1}}), "planned")
    activity = ActivityRegistry()
    activity.agent(Agent(model, name="planner"), prompt="Plan", may_add=ItineraryPolicy(allowed=["shorten"]))
    detail = await carried_out(settings, [activity, helpers()], "planner", text="abcdef")
    assert outputs(detail) == {"planner": '"planned"', "planner.1": '"a"'}
    assert len({row.worker for row in detail.steps}) == 2


# -- what is refused


async def test_the_policy_of_the_run_is_never_widened(settings: Settings) -> None:
    """What the agent may do and the run may not is neither offered nor done."""
    model, _ = scripted([adds("c1", "collect"), adds("c2", "shorten", "shorten")], told)
    wide = ItineraryPolicy(allowed=["shorten", "collect"], max_added=9, max_total=99)
    narrow = ItineraryPolicy(allowed=["shorten"], max_added=1, may_remove=False)
    detail = await carried_out(settings, planner(model, wide), "planner", policy=narrow, text="abc")
    assert list(outputs(detail)) == ["planner"]
    assert "activity 'collect' may not be added; known: shorten" in said(detail)
    assert "this would make 2 added steps, the policy allows 1" in said(detail)
    assert (
        said(detail).count("Nothing was changed. Allowed activities: shorten; room for more steps: 1.") == 2
    )


async def test_a_run_that_may_not_be_shortened_goes_on(settings: Settings) -> None:
    """`may_remove=False`, of the agent or of the run: the tool that ends it isn't there."""
    model, _ = scripted(called("finish_run", "c1"), told)
    policy = ItineraryPolicy(allowed=["shorten"], may_remove=False)
    detail = await carried_out(settings, planner(model, policy), "planner", "collect")
    assert list(outputs(detail)) == ["planner", "collect"]
    assert "Unknown tool name: 'finish_run'" in said(detail)


def deep(levels: int) -> Any:
    """Lists in lists."""
    value: Any = 1
    for _ in range(levels):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"steps": [{"activity": "shortn"}]}, "activity 'shortn' may not be added; did you mean 'shorten'?"),
        ({"steps": [{"activity": "planner"}]}, "activity 'planner' may not be added"),
        (
            {"steps": [{"activity": "shorten", "arguments": {"most": "many"}}]},
            "'most' of activity 'shorten' doesn't",
        ),
        (
            {"steps": [{"activity": "send", "arguments": {"letter": {"to": "x", "copies": 99}}}]},
            "'letter.copies' of activity 'send' doesn't fit: Input should be less than or equal to 9",
        ),
        (
            {"steps": [{"activity": "shorten", "arguments": {"least": 3}}]},
            "activity 'shorten' has no parameter \\\"least\\\"; it has: text, most",
        ),
        (
            {"steps": [{"activity": "send", "arguments": {"ctx": {}}}]},
            'no parameter \\"ctx\\"; it has: letter',
        ),
        ({"steps": [{"activity": "shorten", "id": "text"}]}, "steps.0.id"),
        ({"steps": [{"activity": "shorten", "when": "true"}]}, "steps.0.when"),
        ({"steps": [{"activity": "shorten", "arguments": "most=3"}]}, "steps.0.arguments"),
        ({"steps": [{"activity": 7}]}, "steps.0.activity"),
        ({"steps": [{"activity": "\x1b[31m"}]}, "no control characters"),
        ({"steps": [{"activity": "x" * 100_000}]}, "at most 200 characters"),
        ({"steps": "shorten"}, "steps"),
        ({"steps": [{"activity": "shorten"}], "place": "before"}, "place"),
        ({}, "steps"),
        (
            {"steps": [{"activity": "collect", "arguments": {"x": deep(MAX_ARGUMENT_DEPTH + 1)}}]},
            f"nested deeper than {MAX_ARGUMENT_DEPTH}",
        ),
        (
            {"steps": [{"activity": "collect", "arguments": {"x": "x" * MAX_ARGUMENT_BYTES}}]},
            f"the limit is {MAX_ARGUMENT_BYTES:,}",
        ),
        (
            {"steps": [{"activity": "shorten", "arguments": {"most": float("nan")}}]},
            "'most' of activity 'shorten'",
        ),
    ],
    ids=lambda value: None if isinstance(value, str) else "",
)
async def test_what_can_t_be_done_is_refused_with_the_reason(
    settings: Settings, caplog: pytest.LogCaptureFixture, arguments: dict[str, Any], reason: str
) -> None:
    """The model reads why, as the result of its call, and goes on; the log has it; the run is as it was."""
    caplog.set_level(logging.INFO, "paigeant.step")
    model, requests = scripted(called("add_steps", "c1", **arguments), told)
    activity = planner(model, ItineraryPolicy(allowed=["shorten", "send", "collect"]))
    detail = await carried_out(settings, activity, "planner", "collect")
    assert (detail.run.status, list(outputs(detail))) == ("completed", ["planner", "collect"])
    assert said(detail).startswith('"Refused: ')
    assert reason in said(detail)
    assert len(said(detail)) < 1000
    assert requests == [0, 1]
    assert [record.levelname for record in caplog.records if "planned was refused" in record.message] == [
        "WARNING"
    ]


async def test_what_is_refused_is_an_event_of_the_step(settings: Settings) -> None:
    """Steps and handoffs alike, for whoever counts them or looks at the logs of a run."""

    def respond(messages: list[ModelMessage], info: AgentInfo) -> ModelResponse:
        turn = sum(isinstance(message, ModelResponse) for message in messages)
        parts: list[ModelResponsePart] = [
            adds("c1", "shortn"),
            called(info.output_tools[0].name, "c2", activity="nobody", message="Go on."),
            TextPart("done"),
        ]
        return ModelResponse(parts=parts[turn : turn + 1])

    activity = helpers()
    activity.agent(
        Agent(FunctionModel(respond), name="planner", output_type=[str, Handoff]),
        prompt="Plan",
        may_add=ItineraryPolicy(allowed=["shorten", "collect"]),
    )
    seen = Seen()
    async with at_work(settings, activity, observers=[seen]) as app:
        run = await app.dispatch(Workflow("w", ["planner"]))
        await run.wait(timeout=PATIENCE)
    known = "known: collect, shorten"
    assert [(event.workflow_id, event.step, event.error) for event in seen.named("plan.refused")] == [
        (run.id, "planner", f"activity 'shortn' may not be added; did you mean 'shorten'? {known}"),
        (run.id, "planner", f"activity 'nobody' may not be added; {known}"),
    ]


@pytest.mark.parametrize("levels", [1, MAX_ARGUMENT_DEPTH])
async def test_arguments_up_to_the_bound_travel(settings: Settings, levels: int) -> None:
    """What isn't refused arrives at another worker, whatever it is."""
    value = {"x": deep(levels), "y": "x" * (MAX_ARGUMENT_BYTES - 1000), "z": "\0 ü"}
    model, _ = scripted(adds("c1", {"activity": "collect", "arguments": value}), "planned")
    activity = ActivityRegistry()
    activity.agent(Agent(model, name="planner"), prompt="Plan", may_add=ItineraryPolicy(allowed=["collect"]))
    detail = await carried_out(settings, [activity, helpers()], "planner")
    assert outputs(detail)["planner.1"] == '["planner","x","y","z"]'


async def test_ids_that_collide_are_refused(settings: Settings) -> None:
    """A workflow may have a step called like the one that an agent would add."""
    model, _ = scripted(adds("c1", "shorten"), told)
    activity = planner(model, ItineraryPolicy(allowed=["shorten"]))
    detail = await carried_out(settings, activity, "planner", Step("collect", id="planner.1"))
    assert list(outputs(detail)) == ["planner", "planner.1"]
    assert "step id 'planner.1' occurs twice" in said(detail)


# -- hostile plans


async def test_a_thousand_steps_are_too_many(settings: Settings) -> None:
    """At once, or one at a time in one response: no more than the policy allows are added, and the run ends."""
    every = [adds(f"c{number}", "shorten") for number in range(1000)]
    model, _ = scripted([adds("all", *["shorten"] * 1000), *every], told)
    activity = planner(model, ItineraryPolicy(allowed=["shorten"], max_added=3))
    detail = await carried_out(settings, activity, "planner", text="abcdef")
    assert (detail.run.status, list(outputs(detail))) == (
        "completed",
        ["planner", "planner.1", "planner.2", "planner.3"],
    )
    assert "this would make 1000 added steps, the policy allows 3" in said(detail)
    assert (said(detail).count("Added: "), said(detail).count("Refused: ")) == (3, 998)


LIMITS = [
    (ItineraryPolicy(allowed=["planner"], max_added=4), None, 5),
    (ItineraryPolicy(allowed=["planner"], max_depth=3), None, 4),
    (ItineraryPolicy(allowed=["planner"], max_each=3), None, 3),
    (ItineraryPolicy(allowed=["planner"], max_total=6), None, 6),
    (ItineraryPolicy(allowed=["planner"]), ItineraryPolicy(max_total=7), 7),
    (ItineraryPolicy(allowed=["planner"]), ItineraryPolicy(max_depth=2), 3),
    (ItineraryPolicy(allowed=["planner"]), ItineraryPolicy(max_each=2), 2),
]


@pytest.mark.parametrize(("mine", "whole", "steps"), LIMITS)
async def test_an_agent_that_adds_itself_for_ever_is_stopped(
    settings: Settings, mine: ItineraryPolicy, whole: ItineraryPolicy | None, steps: int
) -> None:
    """At every hop, on whichever of two workers it runs: the limits hold for the whole run."""
    model, _ = scripted(adds("c1", "planner"), told)
    two = [planner(model, mine), planner(model, mine)]
    detail = await carried_out(settings, two, "planner", policy=whole)
    assert detail.run.status == "completed"
    assert list(outputs(detail)) == ["planner" + ".1" * number for number in range(steps)]
    *others, last = outputs(detail).values()
    assert all("Added: " in text for text in others)
    assert "Refused: " in last


async def test_agents_that_multiply_are_stopped(settings: Settings) -> None:
    """Each asks for two more of itself: no more are done than the run may have."""
    model, _ = scripted([adds("c1", "planner"), adds("c2", "planner", place="end")], told)
    mine = ItineraryPolicy(allowed=["planner"])
    detail = await carried_out(
        settings, planner(model, mine), "planner", policy=ItineraryPolicy(max_total=20)
    )
    assert (detail.run.status, len(detail.steps)) == ("completed", 20)


COLLECT = '{"steps":[{"activity":"collect","arguments":{"x":%s}}]}'


@pytest.mark.parametrize(
    "sent",
    ["[1]", '"shorten"', "7", "null", '{"steps":', "\0", "[" * 10_000]
    + [COLLECT % value for value in (r'"\ud800"', "9" * 5000, "[" * 40 + "]" * 40)],
    ids=lambda sent: sent[:50].replace("\0", "0"),
)
async def test_arguments_that_are_no_object_do_no_harm(settings: Settings, sent: str) -> None:
    """Whatever text stands where the arguments should be: the model is told, and goes on."""
    model, _ = scripted(ToolCallPart("add_steps", sent, tool_call_id="c1"), told)
    activity = planner(model, ItineraryPolicy(allowed=["shorten"]))
    detail = await carried_out(settings, activity, "planner", "collect")
    assert (detail.run.status, list(outputs(detail))) == ("completed", ["planner", "collect"])
    assert "Refused: " in said(detail) or "Invalid JSON" in said(detail)


async def test_a_tool_of_the_agent_with_the_same_name_is_an_error(settings: Settings) -> None:
    """It is found out before the model is asked, and says which of them it is."""
    model, requests = scripted("never")
    agent = Agent(model, name="planner")

    @agent.tool_plain
    def add_steps() -> str:
        return "mine"

    activity = helpers()
    activity.agent(agent, prompt="Plan", may_add=ItineraryPolicy(allowed=["shorten"]))
    detail = await carried_out(settings, activity, "planner")
    assert (detail.run.status, requests, detail.steps[0].attempt) == ("failed", [], 1)
    assert "toolset of may_add defines a tool whose name conflicts" in (detail.run.error or "")
    assert "'add_steps'" in (detail.run.error or "")


async def test_a_step_that_waits_makes_its_plan_once(settings: Settings) -> None:
    """A plan outlives the waits of its step: the step is left and begun again, and the plan with it."""
    model, requests = scripted([adds("c1", "shorten"), called("ask", "c2")], [adds("c3", "shorten")], told)
    agent: Agent[StepContext, str] = Agent(model, name="planner", deps_type=StepContext)

    @agent.tool(metadata={"paigeant": {"inline": True}})
    async def ask(ctx: RunContext[StepContext]) -> str:
        return str(await ctx.deps.wait_for("answer"))

    def deps(ctx: StepContext) -> StepContext:
        return ctx

    activity = helpers()
    activity.agent(agent, prompt="Plan", deps=deps, may_add=ItineraryPolicy(allowed=["shorten"]))
    seen = Seen()
    async with at_work(settings, activity, activity, observers=[seen]) as app:
        run = await app.dispatch(Workflow("w", ["planner"]), {"text": "abcdef"})
        await seen.wait_for("step.waiting")
        await run.signal("answer", "yes")
        await run.wait(timeout=PATIENCE)
        detail = await run.detail()
    assert list(outputs(detail)) == ["planner", "planner.1", "planner.2"]
    assert requests == [0, 1, 2]


async def test_a_model_that_never_stops_asking_ends_its_run(settings: Settings) -> None:
    """A refusal is no failure, so it is the limit of requests that ends it: the step fails for good."""

    def respond(messages: list[ModelMessage], _: AgentInfo) -> ModelResponse:
        return ModelResponse(parts=[adds(f"c{len(messages)}", "nothing")])

    activity = planner(FunctionModel(respond), ItineraryPolicy(allowed=["shorten"]))
    detail = await carried_out(settings, activity, "planner")
    assert detail.run.status == "failed"
    assert "request_limit of 50" in (detail.run.error or "")
    assert [row.attempt for row in detail.steps] == [1]


# -- replay


def plans_and_fails(failures: list[Exception]) -> tuple[FunctionModel, list[int]]:
    """A model that plans, is refused something, calls a tool of its own, and fails."""

    def last(messages: list[ModelMessage]) -> str:
        if failures:
            raise failures.pop()
        return told(messages)

    return scripted(
        [adds("c1", "shorten"), called("look", "c2"), adds("c3", "nothing")],
        [called("finish_run", "c4"), adds("c5", {"activity": "shorten", "arguments": {"most": 2}})],
        last,
    )


def with_a_look(model: FunctionModel, looked: list[str]) -> ActivityRegistry:
    """A planner with a tool of its own, and a second attempt one second after the first."""
    agent = Agent(model, name="planner")

    @agent.tool_plain
    def look() -> str:
        looked.append("looked")
        return "seen"

    activity = helpers()
    activity.agent(
        agent,
        prompt="Plan",
        retries=RetryPolicy(attempts=2, base=1.0),
        may_add=ItineraryPolicy(allowed=["shorten"], max_added=2),
    )
    return activity


PLANNED = {"planner.2": '"ab"'}


async def test_plans_come_in_the_order_of_the_answer(settings: Settings) -> None:
    """Whichever of them a hook holds up: the ids of steps follow from the order, and a replay is held up otherwise."""

    class Hook(AbstractCapability[Any]):
        async def before_tool_execute(
            self, ctx: RunContext[Any], *, call: Any, tool_def: ToolDefinition, args: dict[str, Any]
        ) -> dict[str, Any]:
            for _ in range(5 if call.tool_call_id == "c1" else 0):
                await asyncio.sleep(0)
            return args

    model, _ = scripted([adds("c1", "shorten", place="end"), adds("c2", "collect", place="end")], told)
    activity = helpers()
    may_add = ItineraryPolicy(allowed=["shorten", "collect"])
    activity.agent(Agent(model, name="planner", capabilities=[Hook()]), prompt="Plan", may_add=may_add)
    detail = await carried_out(settings, activity, "planner", text="abc")
    assert [(step.key.step, step.activity) for step in detail.steps[1:]] == [
        ("planner.1", "shorten"),
        ("planner.2", "collect"),
    ]


async def test_a_further_attempt_makes_the_same_plan_once(settings: Settings) -> None:
    """The model isn't asked again for what is recorded, and what it asked for is there once."""
    looked: list[str] = []
    model, requests = plans_and_fails([ConnectionError("the last request")])
    detail = await carried_out(settings, with_a_look(model, looked), "planner", "collect", text="abcdef")
    assert (requests, looked) == ([0, 1, 2, 2], ["looked"])
    assert outputs(detail) == {"planner": said(detail), **PLANNED}
    assert (detail.steps[0].attempt, said(detail).count("Added: "), said(detail).count("Refused: ")) == (
        2,
        2,
        1,
    )


async def test_another_worker_makes_the_same_plan_once(settings: Settings) -> None:
    """The same when the worker is gone after the plan was made and before the step has ended."""
    looked: list[str] = []
    seen = Seen()
    model, requests = plans_and_fails([ConnectionError("the last request")])
    async with Paigeant(settings, activities=with_a_look(model, looked), observers=[seen]) as first:
        worker = first.worker()
        task = asyncio.create_task(worker.run())
        run = await first.dispatch(Workflow("w", ["planner", "collect"]), {"text": "abcdef"})
        await seen.wait_for("step.retrying")
        await worker.stop(0)
        await asyncio.wait_for(task, PATIENCE)
    async with at_work(settings, with_a_look(model, looked)) as app:
        again = app.run(run.id)
        await again.wait(timeout=PATIENCE)
        detail = await again.detail()
    assert (requests, looked) == ([0, 1, 2, 2], ["looked"])
    assert outputs(detail) == {"planner": said(detail), **PLANNED}
    assert detail.steps[0].attempt == 2


# -- handing over


def hands(activity: str, message: str) -> Callable[[list[ModelMessage], AgentInfo], ModelResponse]:
    """A model that hands its work over, and does so again when it is told to try again."""

    def respond(_: list[ModelMessage], info: AgentInfo) -> ModelResponse:
        [tool] = info.output_tools
        return ModelResponse(
            parts=[ToolCallPart(tool.name, {"activity": activity, "message": message}, tool_call_id="c1")]
        )

    return respond


def triage(
    respond: Callable[[list[ModelMessage], AgentInfo], ModelResponse], *allowed: str, **limits: Any
) -> ActivityRegistry:
    """The agent `planner`, which answers or hands over, and `billing`, which says what it was asked."""
    activity = helpers()
    agent: Agent[None, Any] = Agent(FunctionModel(respond), name="planner", output_type=[str, Handoff])
    activity.agent(agent, prompt="Sort", may_add=ItineraryPolicy(allowed=allowed, **limits))
    echo = FunctionModel(lambda messages, _: ModelResponse(parts=[TextPart(prompt_of(messages))]))
    billing: Agent[None, str] = Agent(echo, name="billing", description="Knows all invoices.")
    activity.agent(billing, prompt="About {customer}: {message}")
    return activity


async def test_an_agent_hands_its_work_over(settings: Settings) -> None:
    """The activity that it names is the next step, with the message as its argument; then the run goes on."""
    activity = triage(hands("billing", "refund 7"), "billing", "shorten")
    detail = await carried_out(settings, activity, "planner", "collect", customer="Ada")
    assert outputs(detail) == {
        "planner": '{"activity":"billing","message":"refund 7"}',
        "planner.1": '"About Ada: refund 7"',
        "collect": '["customer","planner","planner.1"]',
    }


async def test_whom_it_may_hand_over_to_is_told(settings: Settings) -> None:
    """Those of the allowed activities that take a message, with what they are; and those that nobody here knows."""
    seen: list[str] = []

    def respond(_: list[ModelMessage], info: AgentInfo) -> ModelResponse:
        seen.append(info.instructions or "")
        return ModelResponse(parts=[TextPart("mine")])

    detail = await carried_out(settings, triage(respond, "billing", "shorten", "elsewhere"), "planner")
    assert said(detail) == '"mine"'
    assert seen[0].splitlines()[1:] == [
        "You may hand your work over to one of these activities:",
        "- billing: Knows all invoices.",
        "- elsewhere",
    ]


async def test_a_handoff_goes_before_what_was_planned(settings: Settings) -> None:
    """Next means next, whatever the agent put there before."""

    def respond(messages: list[ModelMessage], info: AgentInfo) -> ModelResponse:
        if len(messages) == 1:
            return ModelResponse(parts=[adds("c0", "collect")])
        return hands("billing", "now")(messages, info)

    detail = await carried_out(settings, triage(respond, "billing", "collect"), "planner", customer="Ada")
    assert list(outputs(detail)) == ["planner", "planner.2", "planner.1"]


@pytest.mark.parametrize("limits", [{"max_added": 1}, {"max_total": 2}, {}], ids=str)
async def test_a_handoff_keeps_its_room(
    settings: Settings, caplog: pytest.LogCaptureFixture, limits: dict[str, int]
) -> None:
    """What the same answer asks for behind it is refused where only one of them has room, and doesn't end the run."""
    letter = "x" * (MAX_ARGUMENT_BYTES // 2)

    def respond(messages: list[ModelMessage], info: AgentInfo) -> ModelResponse:
        large = {"activity": "shorten", "arguments": {"text": letter}}
        answer = hands("billing", letter if not limits else "now")(messages, info)
        return replace(answer, parts=[*answer.parts, adds("c2", large if not limits else "collect")])

    activity = triage(respond, "billing", "collect", "shorten", **limits)
    detail = await carried_out(settings, activity, "planner", customer="Ada")
    assert detail.run.status == "completed", detail.run.error
    assert list(outputs(detail)) == ["planner", "planner.1"]
    assert [row.activity for row in detail.steps] == ["planner", "billing"]
    assert any("planned was refused" in record.message for record in caplog.records)


async def test_a_handoff_that_a_validator_refuses_keeps_no_room(settings: Settings) -> None:
    """The agent goes on, and may have what is left of the policy."""

    def respond(messages: list[ModelMessage], info: AgentInfo) -> ModelResponse:
        if len(messages) == 1:
            return hands("billing", "now")(messages, info)
        wanted: list[ModelResponsePart] = [adds("c2", "collect"), TextPart("collected")]
        return ModelResponse(parts=wanted[:1] if len(messages) == 3 else wanted[1:])

    activity = helpers()
    agent: Agent[None, Any] = Agent(FunctionModel(respond), name="planner", output_type=[str, Handoff])

    @agent.output_validator
    def keeps_it(output: Any) -> Any:
        if isinstance(output, Handoff):
            raise ModelRetry("do it yourself")
        return output

    allowed = ["billing", "collect"]
    activity.agent(agent, prompt="Sort", may_add=ItineraryPolicy(allowed=allowed, max_added=1))
    detail = await carried_out(settings, activity, "planner")
    assert list(outputs(detail)) == ["planner", "planner.1"], detail.run.error
    assert detail.steps[1].activity == "collect"


async def test_the_next_agent_may_go_on_with_the_conversation(settings: Settings) -> None:
    """With `message_history` it has all messages of the one that handed over, beside what it was told."""
    seen: list[list[str]] = []

    def respond(messages: list[ModelMessage], _: AgentInfo) -> ModelResponse:
        seen.append([str(getattr(part, "content", "")) for message in messages for part in message.parts])
        return ModelResponse(parts=[TextPart("done")])

    activity = triage(hands("expert", "look at it"), "expert")
    activity.agent(
        Agent(FunctionModel(respond), name="expert"), prompt="{message}!", message_history="planner"
    )
    detail = await carried_out(settings, activity, "planner")
    assert outputs(detail)["planner.1"] == '"done"'
    assert (seen[0][0], seen[0][-1]) == ("Sort", "look at it!")


@pytest.mark.parametrize(
    ("activity", "reason"),
    [
        ("planner", "activity 'planner' may not be added; known: billing, shorten"),
        ("shorten", "activity 'shorten' has no parameter 'message' to take it over with"),
        ("", "the activity of a step"),
        ("billing", "the policy allows 1"),
    ],
)
async def test_a_handoff_that_is_refused_can_be_made_otherwise(
    settings: Settings, caplog: pytest.LogCaptureFixture, activity: str, reason: str
) -> None:
    """The model is told why and asked again; here it then answers by itself."""

    def respond(messages: list[ModelMessage], info: AgentInfo) -> ModelResponse:
        if len(messages) == 1:
            return hands(activity, "take it")(messages, info)
        return ModelResponse(parts=[TextPart(told(messages))])

    limits = {"max_each": 1} if activity == "billing" else {}
    registry = triage(respond, "billing", "shorten", **limits)
    steps = ["planner", "billing"] if limits else ["planner"]
    detail = await carried_out(settings, registry, *steps, customer="Ada", message="mine")
    assert list(outputs(detail)) == steps
    assert "Not handed over: " in said(detail)
    assert reason in said(detail)
    assert "Allowed activities: billing; " in said(detail)
    assert any("planned was refused" in record.message for record in caplog.records)


async def test_a_handoff_that_is_refused_again_and_again_ends_the_run(settings: Settings) -> None:
    """After the retries for outputs the attempt fails, and then the step."""
    activity = triage(hands("planner", "again"), "billing")
    async with at_work(settings, activity) as app:
        run = await app.dispatch(Workflow("w", [Step("planner", retries=1)]), {})
        await run.wait(timeout=PATIENCE)
        detail = await run.detail()
    assert (detail.run.status, detail.steps[0].attempt) == ("failed", 2)
    assert "not handed over: activity 'planner' may not be added" in str(detail.run.error)


async def test_two_that_hand_over_to_each_other_are_stopped(settings: Settings) -> None:
    """Back and forth on two workers, until the policy of the run ends it."""

    def agent(name: str, other: str) -> ActivityRegistry:
        def respond(messages: list[ModelMessage], info: AgentInfo) -> ModelResponse:
            if len(messages) == 1:
                return hands(other, f"from {name}")(messages, info)
            return ModelResponse(parts=[TextPart("I'll keep it")])

        activity = ActivityRegistry()
        made: Agent[None, Any] = Agent(FunctionModel(respond), name=name, output_type=[str, Handoff])
        activity.agent(made, prompt="{message}", may_add=ItineraryPolicy(allowed=[other]))
        return activity

    two = [agent("ping", "pong"), agent("pong", "ping")]
    policy = ItineraryPolicy(max_added=5)
    detail = await carried_out(settings, two, "ping", policy=policy, message="go")
    assert (detail.run.status, len(detail.steps)) == ("completed", 6)
    assert list(outputs(detail).values())[-1] == '"I\'ll keep it"'


async def test_nobody_to_hand_over_to_is_an_error(settings: Settings) -> None:
    """When none of the activities takes a message, the step fails before the model is asked, and says what to do."""
    activity = triage(hands("shorten", "x"), "shorten")
    detail = await carried_out(settings, activity, "planner")
    assert detail.run.status == "failed"
    assert "none of shorten takes it: give one a parameter 'message'" in (detail.run.error or "")


async def test_a_handoff_nobody_allowed_fails_its_step(settings: Settings) -> None:
    """A function among the agent's outputs may make one, which its types don't tell."""

    def escalate(message: str) -> Any:
        return Handoff(activity="billing", message=message)

    model = FunctionModel(
        lambda _, info: ModelResponse(parts=[ToolCallPart(info.output_tools[0].name, {"message": "help"})])
    )
    activity = ActivityRegistry()
    activity.agent(Agent(model, name="planner", output_type=escalate), prompt="Sort")
    detail = await carried_out(settings, activity, "planner")
    assert detail.run.status == "failed"
    assert "may end with a Handoff; say to whom" in (detail.run.error or "")


# -- definitions


@dataclass(frozen=True)
class Escalation(Handoff):
    """A Handoff with more to it."""

    urgent: bool = False


EITHER: Any = NativeOutput([Letter, Handoff])
NAMED: Any = TypeAliasType("NAMED", str | Handoff)


def forwarded(message: str) -> Handoff:
    """An output function: what the model says goes to one and the same desk."""
    return Handoff("desk", message)


@pytest.mark.parametrize(
    ("output_type", "expected"),
    [
        (str, False),
        ([str, Letter], False),
        (Handoff, True),
        ([str, Handoff], True),
        ([str, Escalation], True),
        (str | Handoff, True),
        (ToolOutput(Handoff, name="hand_over"), True),
        ([str, ToolOutput(Handoff)], True),
        (EITHER, True),
        (NAMED, True),
        ([Letter, NAMED], True),
        (Annotated[str | Handoff, "how it ends"], True),
        (forwarded, True),
        (TextOutput(forwarded), True),
    ],
    ids=lambda value: str(value).split(" at 0x")[0],  # the same in all processes
)
def test_output_types_that_hand_over(output_type: Any, expected: bool) -> None:
    """However the agent's output type says so; without `may_add` such an agent is refused."""
    assert hands_over(output_type) is expected
    agent: Any = Agent(TestModel(), name="planner", output_type=output_type)
    if not expected:
        ActivityRegistry().agent(agent, prompt="Sort")
        return
    with pytest.raises(
        InvalidDefinition, match=r"activity 'planner' may end with a Handoff; say to whom: may_add="
    ):
        ActivityRegistry().agent(agent, prompt="Sort")


@pytest.mark.parametrize("may_add", [ItineraryPolicy(max_added=3), ["shorten"], 3], ids=str)
def test_activities_are_named_one_by_one(may_add: Any) -> None:
    """A model never gets at an activity that nobody named for it."""
    agent = Agent(TestModel(), name="planner")
    with pytest.raises(InvalidDefinition, match=r"may_add of activity 'planner' .* names the activities"):
        ActivityRegistry().agent(agent, prompt="Plan", may_add=may_add)


def test_handoff_is_a_public_name() -> None:
    """It comes from either place, and only whoever asks for it loads the library of agents."""
    assert paigeant.Handoff is Handoff
    code = "import sys, paigeant; print('pydantic_ai' in sys.modules, paigeant.Handoff.__name__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "Handoff"]
