"""What agents use: counted with the unit, the step and the run, once however often it is met."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from datetime import timedelta
from decimal import Decimal
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from pydantic_ai import Agent, ModelMessage, ModelResponse, RequestUsage, RunContext, TextPart
from pydantic_ai.capabilities import BatchModelRequests
from pydantic_ai.exceptions import UnexpectedModelBehavior
from pydantic_ai.models.fallback import FallbackModel
from pydantic_ai.models.function import AgentInfo, FunctionModel
from pydantic_ai.usage import UsageLimits
from pydantic_core import from_json
from rich.console import Console
from tests.agents.steps import called, prompt_of, returned
from tests.integration.processes import call, shown
from tests.patience import PATIENCE

from paigeant import ActivityRegistry, Paigeant, RunResult, Settings, StepContext, Workflow
from paigeant.agents import PaigeantDurability
from paigeant.agents.usage import of_request
from paigeant.cli import report
from paigeant.cli.console import dollars
from paigeant.slip import RunStatus
from paigeant.store import ClaimRequest, RunDetail, StepKey
from paigeant.testing import MemoryApp
from paigeant.usage import Usage


def priced(
    name: str | None = "gpt-4o", *, answer: Callable[[list[ModelMessage]], Any] = prompt_of
) -> FunctionModel:
    """A model of that name whose every answer takes 1000 tokens in and 100 out; `answer` gives a text or tool calls."""

    def respond(messages: list[ModelMessage], _: AgentInfo) -> ModelResponse:
        found = answer(messages)
        parts = found if isinstance(found, list) else [TextPart(found)]
        usage = RequestUsage(input_tokens=1000, output_tokens=100)
        return ModelResponse(parts=parts, usage=usage, model_name=name, provider_name="openai")

    return FunctionModel(respond, model_name=name)


COST = Decimal("0.0035")
"""What one answer costs: 2.50 dollars for a million tokens in, 10 for a million out."""


def times(requests: int, *, tool_calls: int = 0) -> Usage:
    """The usage of so many answers of `priced`."""
    cost = COST * requests if requests else None
    return Usage(requests, tool_calls, 1000 * requests, 100 * requests, cost)


def durable(model: Any, name: str) -> Agent[Any, str]:
    """An agent that carries the engine."""
    return Agent(model, name=name, capabilities=[PaigeantDurability[Any]()])


async def carried_out(activity: ActivityRegistry, *steps: str, **payload: Any) -> tuple[RunResult, RunDetail]:
    """How the run of these steps ended, and its rows."""
    async with MemoryApp(activity) as app:
        run = await app.dispatch(Workflow("w", list(steps)), payload, workflow_id="r")
        await app.drain()
        return await run.wait(), await run.detail()


def used(detail: RunDetail, step: str = "report") -> Usage | None:
    """The usage that is recorded with a step."""
    return next(Usage.read(row.usage) for row in detail.steps if row.step == step)


# -- units and prices


async def test_a_request_is_recorded_with_its_tokens_and_its_price() -> None:
    """Unit, step and run tell the same of one request."""
    activity = ActivityRegistry()
    activity.agent(Agent(priced(), name="report"), prompt="go")
    async with MemoryApp(activity) as app:
        run = await app.dispatch(Workflow("w", ["report"]), workflow_id="r")
        await app.drain()
        [unit] = (await app.store.load_units(StepKey("r", "report"))).values()
        assert Usage.stamped(unit) == used(await run.detail()) == (await run.wait()).usage == times(1)
        assert list((await run.wait()).usage.models.values()) == [times(1)]
    assert from_json(unit)["value"]["usage"]["cost"] == "0.0035"


async def test_a_request_that_waits_for_its_batch_is_one_request() -> None:
    """However often the provider is asked whether it is done: as the library counts it."""
    counted: list[int] = []
    batches = BatchModelRequests(max_requests=1, poll_interval=timedelta(seconds=60))
    agent = Agent(priced(), name="report", capabilities=[batches])

    @agent.output_validator
    def count(ctx: RunContext[Any], output: str) -> str:
        counted.append(ctx.usage.requests)
        return output

    activity = ActivityRegistry()
    activity.agent(agent, prompt="go")
    async with MemoryApp(activity) as app:
        run = await app.dispatch(Workflow("w", ["report"]), workflow_id="r")
        await app.drain()
        assert (
            len(
                [
                    unit
                    for unit in await app.store.load_units(StepKey("r", "report"))
                    if "model.request" in unit
                ]
            )
            == 2
        )
        assert (await run.wait()).usage == times(1)
    assert counted == [1]


@pytest.mark.parametrize("name", ["a-model-of-our-own", None])
async def test_a_price_that_nobody_knows_is_none(name: str | None) -> None:
    """Tokens are counted whatever a model is called; the cost of an unknown one is None, not 0 and no error."""
    activity = ActivityRegistry()
    activity.agent(Agent(priced(name), name="report"), prompt="go")
    result, _ = await carried_out(activity, "report")
    assert result.usage == Usage(1, 0, 1000, 100, None)


async def test_a_run_costs_what_is_known_of_it() -> None:
    """The sum has the costs that are known, of whichever steps."""
    activity = ActivityRegistry()
    activity.agent(Agent(priced(), name="known"), prompt="go")
    activity.agent(Agent(priced("our-own"), name="unknown"), prompt="go")
    result, _ = await carried_out(activity, "known", "unknown")
    assert result.usage == Usage(2, 0, 2000, 200, COST)
    assert sorted(used.cost or 0 for used in result.usage.models.values()) == [0, COST]
    assert "our-own" in result.usage.models


async def test_a_run_without_agents_used_nothing() -> None:
    """Plain activities record no usage, and their run's is all zero."""
    activity = ActivityRegistry()

    @activity.execute()
    async def report() -> None: ...

    result, detail = await carried_out(activity, "report")
    assert (result.usage, detail.steps[0].usage) == (Usage(), None)
    assert not result.usage


async def test_an_answer_that_a_fallback_rejected_was_paid_for() -> None:
    """Tokens of a model whose answer was not taken count; it is one request, as for limits."""

    def is_none(response: ModelResponse) -> bool:
        return response.text == "no"

    model = FallbackModel(priced(answer=lambda _: "no"), priced(), fallback_on=is_none)
    activity = ActivityRegistry()
    activity.agent(Agent(model, name="report"), prompt="go")
    result, _ = await carried_out(activity, "report")
    assert result.usage == Usage(1, 0, 2000, 200, 2 * COST)


# -- where agents are


def asking(inner: Agent[Any, str], *, shared: bool, own: dict[str, Any] | None = None) -> Agent[Any, str]:
    """An agent that asks another one twice, through a tool; `shared`: the other one is handed its usage."""

    def answer(messages: list[ModelMessage]) -> Any:
        if returned(messages):
            return "done"
        return [called("ask", "c1", text="a"), called("ask", "c2", text="b")]

    agent = Agent(priced(answer=answer), name="report")

    @agent.tool(metadata=own)
    async def ask(ctx: RunContext[Any], text: str) -> str:
        return (await inner.run(text, usage=ctx.usage if shared else None)).output

    return agent


@pytest.mark.parametrize("own", [None, {"paigeant": {"inline": True}}], ids=["recorded", "inline"])
@pytest.mark.parametrize(
    ("inner", "shared"),
    [(durable(priced(), "inner"), True), (durable(priced(), "inner"), False), (Agent(priced()), True)],
    ids=["durable, shared", "durable, apart", "not durable, shared"],
)
async def test_nested_agents_are_counted_once(inner: Any, shared: bool, own: Any) -> None:
    """However an agent within a tool is recorded and whoever adds it up, it is in the usage of the step, once."""
    activity = ActivityRegistry()
    activity.agent(asking(inner, shared=shared, own=own), prompt="go")
    result, _ = await carried_out(activity, "report")
    assert result.usage == times(4, tool_calls=2)


async def test_agents_of_a_plain_activity_are_counted() -> None:
    """Agents in sequence, at once, within `once` and in a thread: all of them are in the usage of the step."""
    one, other = durable(priced(), "one"), durable(priced(), "other")
    activity = ActivityRegistry()

    @activity.execute()
    async def report(ctx: StepContext) -> None:
        await one.run("a")
        await asyncio.gather(one.run("b"), other.run("c"))

        async def inner() -> str:
            return (await other.run("d")).output

        await ctx.once("inner", inner)

    @activity.execute()
    def threaded() -> None:
        asyncio.run(one.run("a"))

    result, detail = await carried_out(activity, "report", "threaded")
    assert (used(detail), used(detail, "threaded"), result.usage) == (times(4), times(1), times(5))


async def test_a_compensation_is_counted_with_the_run() -> None:
    """What undoing took is recorded with the undo."""
    activity = ActivityRegistry()
    agent = durable(priced(), "one")

    @activity.execute()
    async def report() -> None: ...

    @activity.compensate("report")
    async def undo() -> None:
        await agent.run("undo")

    @activity.execute(retries=0)
    async def fail() -> None:
        await agent.run("fail")
        raise ValueError

    result, detail = await carried_out(activity, "report", "fail")
    assert (result.status, result.usage) == (RunStatus.COMPENSATED, times(2))
    assert [Usage.read(row.usage) for row in detail.steps] == [None, times(1), times(1)]


# -- attempts


async def test_what_failed_attempts_asked_is_counted_once() -> None:
    """Each attempt replays what those before it recorded and asks one thing more: all of it counts once."""
    agent = durable(priced(), "one")
    activity = ActivityRegistry()

    @activity.execute(retries=2)
    async def report(ctx: StepContext) -> None:
        for number in range(ctx.attempt):
            await agent.run(str(number))
        if ctx.attempt < 3:
            raise ConnectionError

    result, _ = await carried_out(activity, "report")
    assert result.usage == times(3)


async def test_what_only_an_earlier_attempt_asked_is_counted() -> None:
    """An attempt that meets none of the recorded units has them in its count as well, whether it succeeds or not."""
    agent = durable(priced(), "one")

    for succeeds in (True, False):
        activity = ActivityRegistry()

        @activity.execute(retries=1)
        async def report(ctx: StepContext, succeeds: bool) -> None:
            if ctx.attempt == 1:
                await agent.run("a")
            if ctx.attempt == 1 or not succeeds:
                raise ConnectionError

        result, _ = await carried_out(activity, "report", succeeds=succeeds)
        assert result.usage == times(1)


async def test_an_answer_that_an_agent_gave_up_on_was_paid_for() -> None:
    """The answer is asked for again by the next attempt: both count."""
    bad = [True]

    def answer(messages: list[ModelMessage]) -> Any:
        return [called("nothing", f"c{len(messages)}")] if bad else "done"

    agent = Agent(priced(answer=answer), name="report", retries=0)
    activity = ActivityRegistry()

    @activity.execute(retries=1)
    async def report() -> None:
        try:
            await agent.run("go", capabilities=[PaigeantDurability[Any]()])
        except UnexpectedModelBehavior:
            bad.clear()
            raise

    result, _ = await carried_out(activity, "report")
    assert (result.status, result.usage) == (RunStatus.COMPLETED, times(2))


async def test_a_nested_agent_is_counted_once_when_its_tool_is_replayed() -> None:
    """A replayed tool runs no agent: what it used is known from the units within it."""
    activity = ActivityRegistry()
    outer = asking(durable(priced(), "inner"), shared=True)

    @activity.execute(retries=1)
    async def report(ctx: StepContext) -> None:
        await outer.run("go", capabilities=[PaigeantDurability[Any]()])
        if ctx.attempt == 1:
            raise ConnectionError

    result, _ = await carried_out(activity, "report")
    assert result.usage == times(4, tool_calls=2)


async def test_limits_are_those_of_the_activity() -> None:
    """`usage_limits` stop an agent before the request that would go beyond them; what it used until then is told."""
    activity = ActivityRegistry()
    agent = asking(durable(priced(), "inner"), shared=True)
    activity.agent(agent, prompt="go", usage_limits=UsageLimits(cost_limit=Decimal("0.008")))
    result, _ = await carried_out(activity, "report")
    assert result.status is RunStatus.FAILED
    assert "UsageLimitExceeded: The next request would exceed the `cost_limit` of 0.008" in (
        result.error or ""
    )
    assert result.usage == times(3, tool_calls=2)


# -- runs that go on, or were cut short


async def test_a_step_that_goes_on_is_counted_so_far() -> None:
    """`Run.detail()` tells what a step that has no result has used; so does the result of a run that was cancelled."""
    agent = durable(priced(), "one")
    asked, over = asyncio.Event(), asyncio.Event()
    activity = ActivityRegistry()

    @activity.execute()
    async def report() -> None:
        await agent.run("a")
        asked.set()
        await over.wait()

    async with MemoryApp(activity) as app:
        run = await app.dispatch(Workflow("w", ["report"]))
        working = asyncio.create_task(app.drain())
        await asked.wait()
        assert used(await run.detail()) == times(1)
        await run.cancel()
        assert (await run.wait()).usage == times(1)
        over.set()
        await working
        assert (await run.wait()).usage == times(1)


async def test_a_step_whose_workers_died_is_counted() -> None:
    """When all attempts are used up by workers that died, what they asked for stands with the failed step."""
    activity = ActivityRegistry()

    @activity.execute(retries=0)
    async def report() -> None:
        raise AssertionError("there is no attempt left")

    key = StepKey("r", "report")
    urls = {"store_url": "memory://", "transport_url": "memory://"}
    async with Paigeant(
        Settings(**urls, lease=2.0, heartbeat=0.5, sweep_interval=0.05), activities=activity
    ) as app:
        run = await app.dispatch(Workflow("w", ["report"]), workflow_id="r")
        await app.store.claim_step(ClaimRequest(key, "lost", 1))
        record = times(1).stamp(b'{"value":null}')
        await app.store.save_unit(key, "one__model.request(one:1,1)", record)
        worker = app.worker()
        working = asyncio.create_task(worker.run())
        result = await run.wait(timeout=PATIENCE)
        await worker.stop()
        await working
        assert "WorkerLost" in (result.error or "")
        assert used(await run.detail()) == result.usage == times(1)
        [row] = (await app.store.load_run("r")).steps
        assert Usage.read(row.usage) == times(1)


# -- the command line


HANDLERS = """
from pydantic_ai import Agent, ModelResponse, RequestUsage, TextPart, ToolCallPart
from pydantic_ai.models.function import FunctionModel

from paigeant import ActivityRegistry, Workflow

def respond(messages, info):
    parts = [TextPart("Dear Ada")] if len(messages) > 1 else [ToolCallPart("look", {}, tool_call_id="c1")]
    usage = RequestUsage(input_tokens=1000, output_tokens=100)
    return ModelResponse(parts=parts, usage=usage, provider_name="openai")

writer = Agent(FunctionModel(respond, model_name="gpt-4o"), name="writer")

@writer.tool_plain
def look() -> str:
    return "x" * 5000

activity = ActivityRegistry()
activity.agent(writer, prompt="Write")

@activity.execute()
async def send(writer: str) -> str:
    return "sent"

letter = Workflow("letter", ["writer", "send"])
"""

USED = {"requests": 2, "tool_calls": 1, "input_tokens": 2000, "output_tokens": 200, "cost": "0.0070"}


@pytest.fixture
def letter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder in which the run `l` of an agent is done."""
    monkeypatch.chdir(tmp_path)
    Path("handlers.py").write_text(HANDLERS)
    assert (
        call("dispatch", "letter", "-", "--handlers", "handlers.py", "--id", "l", input="{}").returncode == 0
    )
    done = call("run", "handlers.py", "--until-idle")
    assert done.returncode == 0, done.stderr


@pytest.mark.usefixtures("letter")
def test_runs_show_tells_scripts_what_was_used() -> None:
    """Steps and the run have their usage; with `--units` each step has its units."""
    run = shown("l")
    assert run["usage"] == USED
    assert [step["usage"] for step in run["steps"]] == [USED, None]
    assert "units" not in run["steps"][0]
    run = json.loads(call("runs", "show", "l", "--units", "--json").stdout)
    [messages, *writer], send = [step["units"] for step in run["steps"]]
    assert send == []
    assert (messages["name"][:18], messages["usage"]) == ("paigeant.messages:", None)
    assert [unit["name"] for unit in writer] == [
        'writer__function_toolset__<agent>.call_tool:look(writer:1,1,"c1")',
        "writer__model.request(writer:1,1)",
        "writer__model.request(writer:1,2)",
    ]
    used = [Usage.read(json.dumps(unit["usage"]).encode()) for unit in writer]
    assert used == [Usage(tool_calls=1), times(1), times(1)]
    assert writer[0]["bytes"] > 5000


@pytest.mark.usefixtures("letter")
async def test_runs_show_tells_people_what_was_used() -> None:
    """On a terminal of 80 columns: a line for each step with agents and one for the run, then the units."""
    url = "sqlite:///paigeant.db"
    async with Paigeant(Settings(store_url=url, transport_url=url)) as app:
        detail = await app.run("l").detail()
        units = {row.key: await app.store.load_units(row.key) for row in detail.steps}
        console = Console(file=StringIO(), width=80)
        console.print(report.as_tables(detail, now=await app.store.now(), units=units))
    lines = [line.rstrip() for line in console.file.getvalue().splitlines()]  # type: ignore[attr-defined]  # the StringIO from above
    assert max(map(len, lines)) <= 80
    start = next(number for number, line in enumerate(lines) if line.startswith("usage"))
    assert [line.split() for line in lines[start : start + 3]] == [
        ["usage", "requests", "tool", "calls", "tokens", "in", "tokens", "out", "cost"],
        ["writer", "2", "1", "2,000", "200", "$0.0070"],
        ["run", "2", "1", "2,000", "200", "$0.0070"],
    ]
    assert lines[start + 4].split() == ["step", "unit", "size", "tokens", "cost"]
    words = lines[start + 7].split()
    assert words[:2] == ["writer", "writer__model.request(writer:1,1)"]
    assert words[-2:] == ["1,100", "$0.0035"]


@pytest.mark.parametrize(
    ("cost", "text"),
    [
        (None, ""),
        ("0", "$0.00"),
        ("0.0035", "$0.0035"),
        ("0.000012", "$0.000012"),
        ("0.256", "$0.26"),
        ("1234.567", "$1,234.57"),
    ],
)
def test_costs_are_shown_as_money(cost: str | None, text: str) -> None:
    """Two digits behind the point, or the first two that aren't 0; nothing where it isn't known."""
    assert dollars(None if cost is None else Decimal(cost)) == text


# -- the value


def test_usage_adds_up() -> None:
    """Numbers are added; a cost that isn't known is left out, and is None where none is."""
    some, more = Usage(1, 2, 3, 4, Decimal("0.1")), Usage(1, 1, 1, 1)
    assert some + more == Usage(2, 3, 4, 5, Decimal("0.1"))
    assert more + more == Usage(2, 2, 2, 2, None)
    assert Usage.total([]) == Usage()
    assert (some + more).beyond(more) == some
    assert more.beyond(some) == Usage()


def test_usage_comes_back_as_it_was_written() -> None:
    """The cost keeps all of its digits, and is written without an exponent."""
    usage = Usage(1, 2, 3, 4, Decimal("0.00000001234567890123456789"))
    assert Usage.read(usage.dump()) == usage
    assert usage.as_json()["cost"] == "0.00000001234567890123456789"


@pytest.mark.parametrize(
    "record", [b'{"paigeant.used":1}', b'{"paigeant.used":{"requests":"x"}}', b"{}", b'"x"']
)
def test_a_record_that_tells_no_usage_counts_nothing(record: bytes) -> None:
    """Units are of whoever calls `once` as well: what isn't a usage is no error."""
    assert Usage.stamped(record) is None


@pytest.mark.parametrize(
    ("told", "used"),
    [
        ({"input_tokens": 10**4299}, Usage(1, input_tokens=2**53)),
        ({"output_tokens": -5}, Usage(1)),
        ({"input_tokens": "7"}, Usage(1)),
        ({"cost": "NaN"}, Usage(1)),
        ({"cost": "sNaN"}, Usage(1)),
        ({"cost": "9E+999999"}, Usage(1)),
        ({"cost": "1E-999999"}, Usage(1)),
        ({"cost": "dear"}, Usage(1)),
        ({"cost": "0.25", "input_tokens": 3}, Usage(1, input_tokens=3, cost=Decimal("0.25"))),
    ],
    ids=["4,300 digits", "below 0", "a text", "nan", "signalling", "huge", "tiny", "a word", "right"],
)
def test_numbers_that_cannot_be_added_up_count_for_nothing(told: dict[str, Any], used: Usage) -> None:
    """A server or a model of one's own may tell any number: what is recorded can be added up and read again."""
    found = of_request({"usage": told})
    assert found == used
    total = found + found
    assert Usage.read(total.dump()) == total


def test_a_record_of_odd_numbers_is_read() -> None:
    """One that was made by other code, too."""
    assert Usage.read(b'{"requests":1,"cost":"sNaN"}') == Usage(1)


@pytest.mark.parametrize("cost", ["sNaN", "9E+999999"])
async def test_an_odd_cost_fails_no_step(cost: str) -> None:
    """What a model of one's own says of its price is counted where it is a price."""

    def respond(messages: list[Any], _: AgentInfo) -> ModelResponse:
        answer = ModelResponse(parts=[TextPart("done")])
        answer.usage.cost = Decimal(cost)
        return answer

    activity = ActivityRegistry()
    activity.agent(Agent(FunctionModel(respond), name="one"), prompt="Go.", retries=0)
    async with MemoryApp(activity) as app:
        run = await app.dispatch(Workflow("w", ["one"]))
        await app.drain()
        result = await run.wait()
        assert result.output == "done", result.error
        assert result.usage.requests == 1
        assert result.usage.cost is None
