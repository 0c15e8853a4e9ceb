"""Agents in the activities of real runs: their own steps, the code of plain activities, threads; and traces."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
from opentelemetry.context import Context
from opentelemetry.trace import (
    INVALID_SPAN_CONTEXT,
    NonRecordingSpan,
    Span,
    Tracer,
    TracerProvider,
    set_span_in_context,
)
from pydantic_ai import Agent, ModelMessage, ModelResponse, RunContext, TextPart, ToolCallPart
from pydantic_ai.capabilities import AbstractCapability, DynamicCapability, Hooks, Instrumentation
from pydantic_ai.exceptions import (
    ModelHTTPError,
    ModelQuotaExceededError,
    ModelRequestRejectedError,
    ModelUnavailableError,
)
from pydantic_ai.models.fallback import FallbackModel
from pydantic_ai.models.function import AgentInfo, FunctionModel
from pydantic_ai.models.instrumented import InstrumentationSettings, InstrumentedModel
from pydantic_ai.models.test import TestModel
from pydantic_ai.toolsets import DynamicToolset, FunctionToolset
from pydantic_core import from_json
from tests.agents.steps import Crash, Step, called, prompt_of, returned, scripted
from tests.patience import PATIENCE

from paigeant import ActivityRegistry, ItineraryPolicy, Paigeant, RunStatus, StepContext, Workflow
from paigeant.agents import PaigeantDurability, effect_key
from paigeant.errors import InvalidDefinition
from paigeant.parking import Parked
from paigeant.store import RunDetail, StepKey
from paigeant.testing import MemoryApp


async def carried_out(activity: ActivityRegistry, *steps: str, **payload: Any) -> tuple[RunDetail, list[str]]:
    """The run `r` of these steps once it has ended, and the names of the units of its first step."""
    async with MemoryApp(activity) as app:
        run = await app.dispatch(Workflow("w", list(steps)), payload, workflow_id="r")
        await app.drain()
        return await run.detail(), list(await app.store.load_units(StepKey("r", steps[0])))


def echo(*, fail: list[Exception] | None = None) -> tuple[FunctionModel, list[str]]:
    """A model that says what it is asked, and what it was asked; it raises each of `fail` first."""
    asked: list[str] = []

    def respond(messages: list[ModelMessage], _: AgentInfo) -> ModelResponse:
        asked.append(prompt_of(messages))
        if fail:
            raise fail.pop()
        return ModelResponse(parts=[TextPart(f"said {prompt_of(messages)}")])

    return FunctionModel(respond), asked


# -- steps of their own


async def test_an_agent_that_is_a_step_is_recorded_by_itself() -> None:
    """`activity.agent()` needs no engine on the agent: a further attempt asks and calls nothing again."""
    calls: list[str] = []
    failures = [ConnectionError("the last request")]

    def last(messages: list[ModelMessage]) -> str:
        if failures:
            raise failures.pop()
        return str(returned(messages)["c1"])

    model, requests = scripted(called("look", "c1"), last)
    agent = Agent(model, name="writer")

    @agent.tool_plain
    def look() -> str:
        calls.append(effect_key())
        return "seen"

    activity = ActivityRegistry()
    activity.agent(agent, prompt="Write", retries=1)
    detail, units = await carried_out(activity, "writer")
    [step] = detail.steps
    assert (step.output, step.attempt) == (b'"seen"', 2)
    assert from_json(step.usage or b"")["requests"] == 2
    assert (requests, len(calls)) == ([0, 1, 1], 1)
    assert calls[0].startswith("r:writer:")
    assert units == [
        "writer__model.request(writer:1,1)",
        'writer__function_toolset__<agent>.call_tool:look(writer:1,1,"c1")',
        "writer__model.request(writer:1,2)",
    ]


class Clock(AbstractCapability[Any]):
    """A capability that makes its toolset whenever it is asked for it."""

    def __init__(self, told: list[str]) -> None:
        self.told = told

    def get_toolset(self) -> FunctionToolset[Any]:
        toolset = FunctionToolset[Any](id="clock")

        @toolset.tool_plain
        def tell() -> str:
            self.told.append(effect_key())
            return "noon"

        return toolset


@pytest.mark.parametrize("carries", [False, True])
async def test_a_capability_may_make_its_toolset_anew_each_time(carries: bool) -> None:
    """What comes with a run, an engine or the tools of `may_add`, has the library ask each capability once more."""
    told: list[str] = []
    model, _ = scripted(called("tell", "c1"), lambda messages: str(returned(messages)["c1"]))
    engines = [PaigeantDurability[Any]()] if carries else []
    agent = Agent(model, name="teller", capabilities=[Clock(told), *engines])
    activity = ActivityRegistry()
    activity.agent(agent, prompt="When?", may_add=ItineraryPolicy(allowed=["teller"]) if carries else None)
    detail, units = await carried_out(activity, "teller")
    assert (detail.steps[0].output, detail.steps[0].error) == (b'"noon"', None)
    assert 'teller__function_toolset__clock.call_tool:tell(teller:1,1,"c1")' in units
    assert len(told) == 1


async def test_an_engine_of_the_agent_s_own_is_kept() -> None:
    """An agent that carries PaigeantDurability runs with it, under the name that it gives."""
    agent: Any = Agent(TestModel(), name="writer", capabilities=[PaigeantDurability(name="mine")])
    activity = ActivityRegistry()
    activity.agent(agent, prompt="Write")
    _, units = await carried_out(activity, "writer")
    assert units == ["mine__model.request(mine:1,1)"]


async def test_the_same_agent_runs_outside_of_steps_as_ever() -> None:
    """Registering an agent changes nothing of it: elsewhere it is asked each time."""
    model, asked = echo()
    agent = Agent(model, name="writer")
    activity = ActivityRegistry()
    activity.agent(agent, prompt="in a step")
    await carried_out(activity, "writer")
    for _ in range(2):
        assert (await agent.run("outside")).output == "said outside"
    assert asked == ["in a step", "outside", "outside"]


def test_an_agent_that_can_t_be_recorded_is_refused_before_it_runs() -> None:
    """A toolset without an id would have no name in the records: an error when the activity is built."""
    agent = Agent(TestModel(), name="writer", toolsets=[DynamicToolset(lambda _: FunctionToolset[Any]())])
    activity = ActivityRegistry()
    activity.agent(agent, prompt="Write")
    with pytest.raises(InvalidDefinition, match=r"activity 'writer': .*need to have a unique `id`"):
        activity.check()


async def test_tools_that_a_decorated_function_makes_are_recorded() -> None:
    """`@agent.toolset` comes after the agent and before its activity: what it offers and gives is a unit each."""
    model, requests = scripted(called("roll", "c1"), lambda messages: str(returned(messages)["c1"]))
    agent = Agent(model, name="player")
    rolled: list[str] = []

    @agent.toolset(id="dice")
    def dice(_: RunContext[Any]) -> FunctionToolset[Any]:
        toolset = FunctionToolset[Any]()

        @toolset.tool_plain
        def roll() -> str:
            rolled.append(effect_key())
            return "six"

        return toolset

    @agent.output_validator
    def fail(output: str) -> str:
        if len(rolled) == 1:
            rolled.append("failed")
            raise ConnectionError("another attempt is needed")
        return output

    activity = ActivityRegistry()
    activity.agent(agent, prompt="Play", retries=1)
    detail, units = await carried_out(activity, "player")
    assert (detail.run.status, detail.steps[0].output) == (RunStatus.COMPLETED, b'"six"')
    assert (requests, rolled[1:]) == ([0, 1], ["failed"])
    assert [unit for unit in units if "dynamic_toolset__dice.call_tool:roll" in unit]


# -- plain activities


async def test_agents_in_a_plain_activity_are_recorded() -> None:
    """Agents that carry the engine, one after the other, together and within `ctx.once`, resume in any activity."""
    failures: list[Exception] = []
    model, asked = echo(fail=failures)
    one: Any = Agent(model, name="one", capabilities=[PaigeantDurability()])
    other: Any = Agent(model, name="other", capabilities=[PaigeantDurability()])
    activity = ActivityRegistry()

    @activity.execute(retries=9)
    async def report(ctx: StepContext) -> list[str]:
        async def twice() -> str:
            return str((await one.run((await one.run("d")).output)).output)

        first = await one.run("a")
        both = await asyncio.gather(other.run("b"), one.run("c"))
        inner: str = await ctx.once("inner", twice)
        if ctx.attempt < 3:
            raise ConnectionError
        return [str(run.output) for run in (first, *both)] + [inner]

    detail, units = await carried_out(activity, "report")
    assert from_json(detail.steps[0].output or b"") == ["said a", "said b", "said c", "said said d"]
    assert sorted(asked) == ["a", "b", "c", "d", "said d"]
    assert len(units) == 6


async def test_agents_in_a_thread_are_recorded() -> None:
    """A plain function runs in a thread, its agent in an event loop of its own: its units are the step's too."""
    model, asked = echo()
    agent: Any = Agent(model, name="one", capabilities=[PaigeantDurability()])

    @agent.tool_plain
    def unused() -> int:
        return 1

    activity = ActivityRegistry()

    @activity.execute(retries=1)
    def report(ctx: StepContext) -> str:
        answer = str(asyncio.run(agent.run("a")).output)  # like `run_sync`, which leaves its loop open
        if ctx.attempt == 1:
            raise ConnectionError
        return answer

    detail, units = await carried_out(activity, "report")
    assert (detail.steps[0].output, asked) == (b'"said a"', ["a"])
    assert units == ["one__model.request(one:1,1)"]


async def test_a_tool_that_is_given_the_step_records_on_its_own_account() -> None:
    """`ctx.once` within a tool belongs to that call of the tool: two calls have two records of one name."""
    model, _ = scripted([called("buy", "c1"), called("buy", "c2")], called("fail", "c3"), lambda _: "done")
    bought: list[str] = []
    agent = Agent(model, name="buyer", deps_type=StepContext)

    @agent.tool
    async def buy(ctx: RunContext[StepContext]) -> int:
        number: int = await ctx.deps.once("buy", lambda: bought.append(effect_key()) or len(bought))  # type: ignore[func-returns-value]  # None, so it goes on
        return number

    @agent.tool
    async def fail(ctx: RunContext[StepContext]) -> None:
        if ctx.deps.attempt == 1:
            raise ConnectionError

    def deps(step: StepContext) -> StepContext:
        return step

    activity = ActivityRegistry()
    activity.agent(agent, prompt="Buy", deps=deps, retries=1)
    detail, units = await carried_out(activity, "buyer")
    assert detail.steps[0].output == b'"done"'
    assert len(bought) == len(set(bought)) == 2
    assert sum(unit.endswith("/buy") for unit in units) == 2


async def test_a_compensation_has_units_of_its_own() -> None:
    """An agent that runs in an undo is recorded with the undo, not with what is undone."""
    failures: list[Exception] = []
    model, asked = echo(fail=failures)
    agent: Any = Agent(model, name="one", capabilities=[PaigeantDurability()])
    activity = ActivityRegistry()
    attempts: list[int] = []

    @activity.execute()
    async def do() -> str:
        return str((await agent.run("do")).output)

    @activity.compensate("do", retries=1)
    async def undo(ctx: StepContext) -> None:
        await agent.run("undo")
        attempts.append(ctx.attempt)
        if ctx.attempt == 1:
            raise ConnectionError

    @activity.execute(retries=0)
    async def fail() -> None:
        raise ConnectionError

    detail, _ = await carried_out(activity, "do", "fail")
    assert detail.run.status == "compensated"
    assert (asked, attempts) == (["do", "undo"], [1, 2])


@pytest.mark.parametrize(("asked_for", "waits"), [("90", 90.0), ("9000000", 86400.0)])
async def test_rule_13_a_step_waits_as_long_as_the_provider_asks(asked_for: str, waits: float) -> None:
    """What is too long to wait for within an attempt, the next one waits for, without a worker and a day at most."""
    busy = [ModelHTTPError(429, "m", headers={"retry-after": asked_for})]
    model, asked = echo(fail=list(busy))
    activity = ActivityRegistry()
    activity.agent(Agent(model, name="one"), prompt="go", retries=1)
    async with MemoryApp(activity) as app:
        began = app.clock.now()
        run = await app.dispatch(Workflow("w", ["one"]))
        await app.drain(advance=False)
        assert (await run.detail()).steps[0].not_before == began + waits
        assert len(asked) == 1
        await app.drain()
        assert (await run.wait()).status is RunStatus.COMPLETED
    assert len(asked) == 2


def refusal(category: Any, status: int, **more: Any) -> ModelHTTPError:
    """The error of a provider that says what is wrong, as the library's models raise it."""
    return ModelHTTPError.for_category(category, status_code=status, model_name="m", **more)


@pytest.mark.parametrize(
    ("errors", "attempts"),
    [
        ([refusal(ModelQuotaExceededError, 429)], 1),
        ([refusal(ModelRequestRejectedError, 400)], 1),
        ([refusal(ModelQuotaExceededError, 429), refusal(ModelRequestRejectedError, 400)], 1),
        ([refusal(ModelQuotaExceededError, 429, retry_after=3600.0)], 3),
        ([refusal(ModelQuotaExceededError, 429), refusal(ModelUnavailableError, 503)], 3),
    ],
    ids=["quota", "rejected", "both", "quota until then", "one may answer"],
)
@pytest.mark.parametrize("where", ["step", "plain activity", "tool of another agent"])
async def test_rule_13_what_a_provider_refuses_is_final(
    errors: list[ModelHTTPError], attempts: int, where: str
) -> None:
    """No further attempt sends the same request again, but where one of the models that were asked may answer it."""
    asked: list[int] = []

    def refusing(error: ModelHTTPError) -> FunctionModel:
        def respond(*_: Any) -> ModelResponse:
            asked.append(1)
            raise error

        return FunctionModel(respond)

    models = [refusing(error) for error in errors]
    engine: PaigeantDurability[Any] = PaigeantDurability(model_retries=0)
    agent = Agent(
        models[0] if len(models) == 1 else FallbackModel(*models), name="one", capabilities=[engine]
    )
    outer = Agent(TestModel(), name="outer")

    @outer.tool_plain
    async def ask() -> str:
        return (await agent.run("go")).output

    activity = ActivityRegistry()
    activity.agent(agent, prompt="go", name="step", retries=2)
    activity.agent(outer, prompt="go", name="tool of another agent", retries=2)

    @activity.execute(name="plain activity", retries=2)
    async def plain() -> str:
        return (await agent.run("go")).output

    async with MemoryApp(activity) as app:
        run = await app.dispatch(Workflow("w", [where]))
        await app.drain()
        result = await run.wait()
        assert result.status is RunStatus.FAILED
        assert ("would refuse the same request again" in str(result.error)) == (attempts == 1)
        assert (await run.detail()).steps[0].attempt == attempts
        assert len(asked) == attempts * len(errors)
        await run.retry()
        await app.drain()
    assert len(asked) == 2 * attempts * len(errors)


async def test_a_refusal_that_somebody_made_do_without_is_none() -> None:
    """Code that catches it may ask another model; what fails after that is tried again like anything else."""

    def refuse(*_: Any) -> ModelResponse:
        raise refusal(ModelRequestRejectedError, 400)

    agent = Agent(FunctionModel(refuse), name="one", capabilities=[PaigeantDurability()])
    activity = ActivityRegistry()

    @activity.execute(retries=1)
    async def review(ctx: StepContext) -> str:
        try:
            return (await agent.run("go")).output
        except ModelRequestRejectedError:
            if ctx.attempt == 1:
                raise ConnectionError("reset by peer") from None
            return "made do"

    detail, _ = await carried_out(activity, "review")
    assert (detail.run.status, detail.steps[0].output) == ("completed", b'"made do"')


@pytest.mark.parametrize(
    "odd",
    ["soon", True, -1, float("nan"), float("inf"), pytest.param(property(lambda _: 1 / 0), id="an error")],
    ids=str,
)
async def test_what_is_no_time_is_not_waited_for(odd: object) -> None:
    """An error of anybody's may have anything under that name."""
    activity = ActivityRegistry()

    class Busy(Exception):
        retry_after = odd

    @activity.execute(retries=1)
    async def one(ctx: StepContext) -> None:
        if ctx.attempt == 1:
            raise Busy

    async with MemoryApp(activity) as app:
        began = app.clock.now()
        run = await app.dispatch(Workflow("w", ["one"]))
        await app.drain()
        assert (await run.wait()).status is RunStatus.COMPLETED
        assert app.clock.now() - began == 0.5


# -- rule 6: traces


class Spans(TracerProvider, Tracer):
    """Notes the names of spans when they end, which is when they would be exported, and when they begin."""

    def __init__(self) -> None:
        self.began: list[str] = []
        self.ended: list[str] = []

    def get_tracer(self, *_: Any, **__: Any) -> Tracer:
        return self

    def start_span(self, name: str, *_: Any, **__: Any) -> Span:
        ended = self.ended
        self.began.append(name.partition(" ")[0])

        class Noted(NonRecordingSpan):
            def is_recording(self) -> bool:
                return True

            def end(self, end_time: int | None = None) -> None:
                ended.append(name.partition(" ")[0])

        return Noted(INVALID_SPAN_CONTEXT)

    @contextmanager
    def start_as_current_span(self, name: str, *_: Any, **__: Any) -> Iterator[Span]:  # type: ignore[override]  # a generator will do
        from opentelemetry.context import attach, detach

        span = self.start_span(name)
        token = attach(set_span_in_context(span, Context()))
        try:
            yield span
        finally:
            detach(token)
            span.end()


def traced(model: Any) -> tuple[Any, Spans]:
    """An agent whose spans are noted, and the notes."""
    spans = Spans()
    settings = InstrumentationSettings(tracer_provider=spans)
    agent = Agent(model, name="one", capabilities=[Instrumentation(settings=settings), PaigeantDurability()])
    return agent, spans


async def test_rule_6_a_replay_tells_no_trace_of_what_was_told() -> None:
    """A full replay has no span; one that goes on has those of what it did, and of the run around it."""
    model, _ = scripted(called("look", "c1"), lambda _: "done")
    agent, spans = traced(model)

    @agent.tool_plain
    def look() -> int:
        return 1

    step = Step()
    with pytest.raises(Crash):
        await step.attempt(lambda: agent.run("go"), crash_after=2)
    spans.began.clear()
    spans.ended.clear()
    await step.attempt(lambda: agent.run("go"))
    assert spans.ended == ["chat", "invoke_agent"]
    assert sorted(spans.began) == spans.ended
    spans.began.clear()
    spans.ended.clear()
    await step.attempt(lambda: agent.run("go"))
    assert spans.began == spans.ended == []


@pytest.mark.parametrize("where", ["the agent's own", "by id", "for a run", "override"])
async def test_rule_6_a_model_that_tells_spans_itself_tells_each_once(where: str) -> None:
    """As Logfire makes it of any model. Its requests are recorded, wherever it is given."""
    spans = Spans()
    plain, asked = echo()
    told = InstrumentedModel(plain, InstrumentationSettings(tracer_provider=spans))
    own = where == "the agent's own"
    engine = PaigeantDurability[Any](models={"told": told} if where in ("by id", "for a run") else {})
    agent: Agent[Any, str] = Agent(told if own else TestModel(), name="one", capabilities=[engine])
    chosen: Any = {"by id": "told", "for a run": told}.get(where)
    step = Step()
    with agent.override(model=told) if where == "override" else nullcontext():
        for _ in range(2):
            assert (await step.attempt(lambda: agent.run("go", model=chosen))).output == "said go"
    assert asked == ["go"]
    assert spans.ended == ["chat", "invoke_agent"]
    assert spans.began == ["invoke_agent", "chat"]


@pytest.mark.parametrize("whence", ["the agent's", "the run's", "a function's", "all agents'"])
async def test_rule_6_wherever_spans_come_from_a_replay_begins_none(whence: str) -> None:
    """What makes them comes with the agent or the run, as it is or by a function, or is the same for all agents."""
    spans = Spans()
    settings = InstrumentationSettings(tracer_provider=spans)
    given: list[Any] = [Instrumentation(settings=settings)]
    if whence == "a function's":
        given = [DynamicCapability(lambda _: Instrumentation(settings=settings), id="spans")]
    elif whence == "all agents'":
        given = []
        Agent.instrument_all(settings)
    before = settings.tracer
    own, of_run = ([], given) if whence == "the run's" else (given, [])
    agent: Agent[Any, str] = Agent(echo()[0], name="one", capabilities=[*own, PaigeantDurability()])
    step = Step()
    try:
        for _ in range(3):
            assert (await step.attempt(lambda: agent.run("go", capabilities=of_run))).output == "said go"
    finally:
        Agent.instrument_all(False)
    assert spans.began == ["invoke_agent", "chat"]
    assert spans.ended == ["chat", "invoke_agent"]
    assert settings.tracer is before, "the settings are those of other runs, too"


async def test_rule_6_what_makes_spans_for_all_runs_is_changed_once() -> None:
    """One that is the same for each run of its agent; and not at all while there is nothing to replay."""

    class Shared(Instrumentation):
        async def for_run(self, ctx: RunContext[Any]) -> Instrumentation:
            return self

    shared = Shared(settings=InstrumentationSettings(tracer_provider=Spans()))
    agent: Agent[Any, str] = Agent(echo()[0], name="one", capabilities=[shared, PaigeantDurability()])
    step, tracers = Step(), [shared.settings.tracer]
    for number in range(3):
        await step.attempt(lambda: agent.run("go"), first=number == 0)
        tracers.append(shared.settings.tracer)
    plain, first, second, third = tracers
    assert first is plain
    assert second is third is not plain


async def test_rule_6_a_worker_tells_each_span_once() -> None:
    """A further attempt of a step replays what its agents did without a span."""
    agent, spans = traced(echo()[0])
    activity = ActivityRegistry()

    @activity.execute(retries=1)
    async def one(ctx: StepContext) -> None:
        await agent.run("go")
        if ctx.attempt == 1:
            raise ConnectionError

    detail, _ = await carried_out(activity, "one")
    assert detail.steps[0].attempt == 2
    assert spans.ended == ["chat", "invoke_agent"]
    assert spans.began == ["invoke_agent", "chat"]


@pytest.mark.parametrize("change", ["insert", "terminate", "save_variable"])
async def test_what_would_be_lost_when_a_record_is_found_is_refused(change: str) -> None:
    """In a recorded tool, or in what `once` does, a step can't be changed: an attempt with the record wouldn't."""
    agent = Agent(scripted(called("plan", "c1"), "done")[0], name="planner")
    inline = Agent(scripted(called("plan", "c1"), "done")[0], name="inline")
    contexts: list[StepContext] = []
    registry = ActivityRegistry()

    async def plan() -> str:
        match change:
            case "insert":
                contexts[-1].insert("after")
            case "terminate":
                contexts[-1].terminate()
            case _:
                await contexts[-1].save_variable("plan", 1)
        return "planned"

    agent.tool_plain(plan)
    inline.tool_plain(metadata={"paigeant": {"inline": True}})(plan)

    async def runs(of: Agent[Any, str]) -> str:
        return (await of.run("go", capabilities=[PaigeantDurability[Any]()])).output

    @registry.execute(retries=0)
    async def recorded(context: StepContext) -> str:
        contexts.append(context)
        return await runs(agent)

    @registry.execute(retries=0)
    async def within_once(context: StepContext) -> str:
        contexts.append(context)
        return str(await context.once("plan", plan))

    @registry.execute(retries=0)
    async def allowed(context: StepContext) -> str:
        contexts.append(context)
        return await runs(inline)

    @registry.execute()
    async def after() -> str:
        return "after"

    async with MemoryApp(registry) as app:
        for step, ends in (("recorded", False), ("within_once", False), ("allowed", True)):
            run = await app.dispatch(Workflow("w", [step]))
            await app.drain()
            error = str((await run.detail()).run.error)
            assert ("inside of something that is recorded" in error) is not ends, error


@pytest.mark.parametrize("inline", [True, False])
async def test_an_agent_that_a_failed_attempt_has_left_running_calls_nothing(inline: bool) -> None:
    """Neither its model is asked nor its tool called, recorded or not, once the attempt is over."""
    over, began = asyncio.Event(), asyncio.Event()
    asked: list[int] = []
    paid: list[str] = []
    left: list[asyncio.Task[Any]] = []

    async def respond(messages: list[ModelMessage], _: AgentInfo) -> ModelResponse:
        asked.append(len(messages))
        began.set()
        await over.wait()
        return ModelResponse(parts=[ToolCallPart("pay", {})])

    payer = Agent(FunctionModel(respond), name="payer", capabilities=[PaigeantDurability()])

    @payer.tool_plain(metadata={"paigeant": {"inline": inline}})
    def pay() -> None:
        paid.append("pay")

    activity = ActivityRegistry()

    @activity.execute(retries=0)
    async def leave() -> None:
        left.append(asyncio.create_task(payer.run("Pay.")))
        await began.wait()
        raise ConnectionError("no answer")

    async with MemoryApp(activity) as app:
        run = await app.dispatch(Workflow("w", ["leave"]))
        await app.drain()
        assert (await run.wait(PATIENCE)).status is RunStatus.FAILED
        over.set()
        with pytest.raises(Parked):
            await left[0]
    assert (asked, paid) == ([1], [])


async def test_a_thread_that_a_timeout_has_left_running_asks_no_model() -> None:
    """A function in a thread goes on without its step, and its agents don't."""
    over, ended = threading.Event(), threading.Event()
    asked: list[int] = []

    def respond(messages: list[ModelMessage], _: AgentInfo) -> ModelResponse:
        asked.append(len(messages))
        return ModelResponse(parts=[TextPart("done")])

    writer = Agent(FunctionModel(respond), name="writer", capabilities=[PaigeantDurability()])
    activity = ActivityRegistry()

    @activity.execute(retries=0, timeout=0.01)
    def write() -> str:
        try:
            over.wait()
            return asyncio.run(writer.run("Write.")).output
        finally:
            ended.set()

    async with MemoryApp(activity) as app:
        run = await app.dispatch(Workflow("w", ["write"]))
        await app.drain()
        assert (await run.wait(PATIENCE)).status is RunStatus.FAILED
        over.set()
        await asyncio.to_thread(ended.wait)
    assert asked == []


@pytest.mark.parametrize("inline", [True, False])
@pytest.mark.parametrize("ending", [SystemExit(3), KeyboardInterrupt()], ids=repr)
async def test_a_tool_that_exits_fails_its_step_and_not_the_worker(
    inline: bool, ending: BaseException
) -> None:
    """`sys.exit()`, as the code of commands calls it, is an error like any other."""
    model, _ = scripted(called("command", "c1"), "never")
    caller = Agent(model, name="caller")

    @caller.tool_plain(metadata={"paigeant": {"inline": inline}})
    def command() -> None:
        raise ending

    activity = ActivityRegistry()
    activity.agent(caller, prompt="Call it.")
    found, _ = await carried_out(activity, "caller")
    assert found.run.error == f"caller: RuntimeError: tool 'command' ended with {ending!r}"


@pytest.mark.parametrize("where", ["model", "output function", "output validator", "hook"])
@pytest.mark.parametrize("ending", [SystemExit(3), KeyboardInterrupt()], ids=repr)
async def test_what_else_exits_in_an_agent_fails_its_step_and_not_the_worker(
    where: str, ending: BaseException
) -> None:
    """Whatever code the agent is made of, and whichever task the library runs it in."""

    def leave(*_: object) -> Any:
        raise ending

    def send(to: str) -> str:
        return leave(to)

    async def before_run(_: RunContext[Any]) -> None:
        leave()

    caller: Any = Agent(
        FunctionModel(leave) if where == "model" else TestModel(),
        name="caller",
        output_type=send if where == "output function" else str,
        capabilities=[Hooks(before_run=before_run)] if where == "hook" else [],
    )
    if where == "output validator":
        caller.output_validator(leave)
    activity = ActivityRegistry()
    activity.agent(caller, prompt="Go.", retries=0)
    found, _ = await carried_out(activity, "caller")
    assert found.run.status is RunStatus.FAILED
    assert type(ending).__name__ in str(found.run.error)


def test_ctrl_c_in_a_tool_ends_a_worker_that_stops() -> None:
    """It is pressed for the second time, and isn't meant for the tool that happens to compute then."""
    model, _ = scripted(called("compute", "c1"), "never")
    caller = Agent(model, name="caller")
    activity = ActivityRegistry()
    activity.agent(caller, prompt="Call it.")
    stopping: list[asyncio.Task[None]] = []

    async def work() -> None:
        async with Paigeant(activities=activity) as app:
            worker = app.worker()

            @caller.tool_plain
            async def compute() -> None:
                stopping.append(asyncio.create_task(worker.stop()))
                while not worker.executor.stopping:  # noqa: ASYNC110
                    await asyncio.sleep(0)
                raise KeyboardInterrupt

            await app.dispatch(Workflow("w", ["caller"]))
            await worker.run()

    with pytest.raises(KeyboardInterrupt):
        asyncio.run(work())
