"""What users test with: MemoryApp, drain(), ManualClock."""

from __future__ import annotations

import asyncio
import doctest
import inspect
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from tests.patience import PATIENCE

import paigeant.testing
from paigeant import (
    ActivityRegistry,
    RetryPolicy,
    RunStatus,
    Sleep,
    Step,
    StepContext,
    WaitFor,
    Workflow,
)
from paigeant.errors import ConfigurationError
from paigeant.testing import ManualClock, MemoryApp, NotDrained

HOURLY = RetryPolicy(attempts=3, base=3600, cap=86400, jitter=0)


def failing(times: int) -> tuple[ActivityRegistry, list[int]]:
    """A registry with an activity `charge` that fails so many times, and the attempts it had."""
    activity = ActivityRegistry()
    attempts: list[int] = []

    @activity.execute(retries=HOURLY)
    async def charge(ctx: StepContext) -> str:
        attempts.append(ctx.attempt)
        if len(attempts) <= times:
            raise RuntimeError("declined")
        return "paid"

    return activity, attempts


async def test_the_example_of_the_docstring_runs() -> None:
    """The code in the docstring of `paigeant.testing` is a test that passes."""
    text = inspect.getdoc(paigeant.testing) or ""
    lines = [line for line in text.splitlines()[1:] if line.startswith("    ") or not line]
    code = inspect.cleandoc("\n".join(lines)).replace("-> str: ...", "-> str: return 'paid'")
    names: dict[str, object] = {}
    exec(compile(code, "docstring", "exec"), names)
    test = names["test_a_declined_card_is_tried_again"]
    assert callable(test)
    await test()


def test_the_docstring_has_no_other_examples() -> None:
    """No example in it goes untested as a doctest."""
    assert not doctest.DocTestFinder().find(paigeant.testing, "testing")[0].examples


async def test_drain_moves_the_clock_to_a_retry() -> None:
    """Waits of hours between attempts are passed by moving the clock exactly to them."""
    activity, attempts = failing(times=2)
    async with MemoryApp(activity) as app:
        began = app.clock.now()
        run = await app.dispatch(Workflow("pay", ["charge"]))
        await app.drain()
        result = await run.wait()
        assert (result.output, attempts) == ("paid", [1, 2, 3])
        assert app.clock.now() - began == 3600 + 7200


async def test_drain_can_leave_the_clock_where_it_is() -> None:
    """With advance=False what is due later stays undone until the test moves the clock."""
    activity, attempts = failing(times=1)
    async with MemoryApp(activity) as app:
        run = await app.dispatch(Workflow("pay", ["charge"]))
        await app.drain(advance=False)
        assert (await run.status(), attempts) == ("running", [1])
        app.clock.advance(3599)
        await app.drain(advance=False)
        assert attempts == [1]
        app.clock.advance(1)
        await app.drain(advance=False)
        assert (await run.status(), attempts) == ("completed", [1, 2])


async def test_a_moved_clock_needs_no_drain() -> None:
    """Moving the clock alone has the worker go on with what is due by then."""
    activity, _ = failing(times=1)
    async with MemoryApp(activity) as app:
        run = await app.dispatch(Workflow("pay", ["charge"]))
        await app.drain(advance=False)
        app.clock.advance(3600)
        assert (await run.wait(timeout=PATIENCE)).output == "paid"


async def test_a_deadline_passes_when_the_clock_moves_beyond_it() -> None:
    """A run that is over its deadline fails with the clock, whatever still lies ahead of it."""
    activity, _ = failing(times=9)
    async with MemoryApp(activity) as app:
        run = await app.dispatch(Workflow("pay", ["charge"], deadline=86400))
        await app.drain(advance=False)
        app.clock.advance(86400)
        result = await run.wait(timeout=PATIENCE)
    assert result.status == "failed"
    assert "DeadlineExceeded" in str(result.error)


async def test_chance_places_the_wait_within_its_jitter() -> None:
    """Waits are exact by default; `chance` makes them shorter in a way that a test decides."""
    activity = ActivityRegistry()

    @activity.execute(retries=RetryPolicy(attempts=2, base=100, jitter=0.5))
    async def flaky(ctx: StepContext) -> None:
        if ctx.attempt == 1:
            raise RuntimeError("once")

    waited = {}
    for chance in (0.0, 1.0):
        async with MemoryApp(activity, chance=lambda chance=chance: chance) as app:  # type: ignore[misc]
            began = app.clock.now()
            await app.dispatch(Workflow("w", ["flaky"]))
            await app.drain()
            waited[chance] = app.clock.now() - began
    assert waited == {0.0: 60.0, 1.0: 30.0}


async def test_drain_names_a_step_that_nobody_can_do() -> None:
    """A step whose activity isn't registered is an error that names the step and the nearest activity."""
    activity, _ = failing(times=0)
    async with MemoryApp(activity) as app:
        await app.dispatch(Workflow("pay", [Step("chrage", id="first")]), workflow_id="order-1")
        with pytest.raises(
            NotDrained, match=r"step 'first' of run 'order-1'.*'chrage'.*did you mean 'charge'"
        ):
            await app.drain()


async def test_drain_names_a_step_in_a_topic_where_nobody_listens() -> None:
    """A step that was sent elsewhere is an error that names its topic."""
    activity, _ = failing(times=0)
    async with MemoryApp(activity) as app:
        await app.dispatch(Workflow("pay", [Step("charge", topic="billing")]))
        with pytest.raises(NotDrained, match=r"'charge'.*topic 'billing', where nobody listens"):
            await app.drain()


async def test_drain_does_what_it_can_before_it_complains() -> None:
    """Runs that can end have ended when drain() reports one that can't."""
    activity, _ = failing(times=1)
    async with MemoryApp(activity) as app:
        await app.dispatch(Workflow("stuck", ["elsewhere"]))
        run = await app.dispatch(Workflow("pay", ["charge"]))
        with pytest.raises(NotDrained, match="elsewhere"):
            await app.drain()
        assert await run.status() == "completed"


async def test_drain_names_a_step_that_takes_too_long() -> None:
    """A step that never ends is an error that names it, after the time the caller gave."""
    activity = ActivityRegistry()
    began = asyncio.Event()

    @activity.execute()
    async def hang() -> None:
        began.set()
        await asyncio.Event().wait()

    async with MemoryApp(activity) as app:
        await app.dispatch(Workflow("w", [Step("hang", id="h")]), workflow_id="w-1")
        await began.wait()
        with pytest.raises(NotDrained, match=r"step 'h' of run 'w-1' \(running\)"):
            await app.drain(timeout=0.01)


async def test_drain_waits_for_an_activity_that_waits_for_the_test() -> None:
    """drain() returns only after a step that is under way has ended."""
    activity = ActivityRegistry()
    began, go = asyncio.Event(), asyncio.Event()

    @activity.execute()
    async def wait() -> str:
        began.set()
        await go.wait()
        return "went"

    async with MemoryApp(activity) as app:
        run = await app.dispatch(Workflow("w", ["wait"]))
        draining = asyncio.create_task(app.drain())
        await began.wait()
        assert not draining.done()
        go.set()
        await draining
        assert await run.status() == "completed"


async def test_an_hour_that_passes_inside_a_step_costs_no_lease() -> None:
    """A test may let any time pass while a step is being done: its worker keeps the step."""
    activity = ActivityRegistry()
    began, go = asyncio.Event(), asyncio.Event()
    attempts = []

    @activity.execute()
    async def slow(ctx: StepContext) -> None:
        attempts.append(ctx.attempt)
        began.set()
        await go.wait()

    async with MemoryApp(activity) as app:
        run = await app.dispatch(Workflow("w", ["slow"]))
        await began.wait()
        app.clock.advance(365 * 86400)
        go.set()
        await app.drain()
        assert (await run.status(), attempts) == ("completed", [1])


async def test_drain_ends_sleeps_and_leaves_what_others_have_to_answer() -> None:
    """A day passes at once; a wait without a timeout is the test's to end, one with a timeout if the clock stays."""
    activity = ActivityRegistry()

    @activity.execute(retries=0)
    async def ask(context: StepContext) -> str:
        await context.sleep(86400)
        return str(await context.ask("Go on?"))

    async with MemoryApp(activity) as app:
        begun = app.clock.now()
        run = await app.dispatch(
            Workflow("w", [Sleep(3600), "ask", WaitFor("done", timeout=60, default="late")])
        )
        await app.drain()
        assert app.clock.now() - begun >= 3600 + 86400
        assert await run.status() is RunStatus.WAITING
        [request] = await run.requests()
        await app.answer(request.id, "yes")
        await app.drain(advance=False)
        assert await run.status() is RunStatus.WAITING
        await app.drain()
        result = await run.wait()
        assert result.outputs == {"sleep": None, "ask": "yes", "done": "late"}


async def test_drain_without_work_returns() -> None:
    """Nothing to do is done at once."""
    async with MemoryApp(ActivityRegistry()) as app:
        await app.drain()


async def test_drain_needs_an_open_application() -> None:
    """drain() outside of `async with` says how to open the application."""
    with pytest.raises(NotDrained, match="async with MemoryApp"):
        await MemoryApp(ActivityRegistry()).drain()


async def test_many_runs_drain() -> None:
    """Hundreds of runs with several steps each, and fails among them, all end."""
    activity = ActivityRegistry()

    @activity.execute(retries=1)
    async def one(n: int, ctx: StepContext) -> int:
        if n % 7 == 0 and ctx.attempt == 1:
            raise RuntimeError("first time")
        return n

    @activity.execute()
    def two(one: int) -> int:
        return one * 2

    async with MemoryApp(activity) as app:
        runs = [await app.dispatch(Workflow("w", ["one", "two"]), {"n": n}) for n in range(300)]
        await app.drain()
        assert [(await run.wait()).output for run in runs] == [n * 2 for n in range(300)]


async def test_settings_can_be_given() -> None:
    """Fields of Settings are passed on; an unknown one is an error with the nearest name."""
    assert MemoryApp(ActivityRegistry(), retries=0).settings.retries == 0
    with pytest.raises(ConfigurationError, match="did you mean 'retries'"):
        MemoryApp(ActivityRegistry(), retires=0)


async def test_the_configuration_of_a_deployment_needs_nothing_in_a_test(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tests of a project run in its folder: neither its keys, nor its database, nor its brokers are there."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "paigeant.yaml").write_text(
        "store_url: postgresql://db.example/x\n"
        "transport_url: amqps://rabbit.example/\n"
        "routes: {charge: 'rediss://redis.example/0'}\n"
        "signing: require\n"
        "log_sql: info\n"
    )
    monkeypatch.setenv("PAIGEANT_LOG_SQL", "debug")
    activity, attempts = failing(0)
    async with MemoryApp(activity) as app:
        run = await app.dispatch(Workflow("w", ["charge"]))
        await app.drain()
        assert (await run.wait()).output == "paid"
    assert attempts == [1]


def test_a_clock_is_set_by_seconds_and_by_datetime() -> None:
    """advance() takes seconds, set() an aware datetime or seconds since 1970."""
    clock = ManualClock(datetime(2030, 1, 1, tzinfo=UTC))
    clock.advance(1.5)
    assert clock.now() == datetime(2030, 1, 1, tzinfo=UTC).timestamp() + 1.5
    clock.set(datetime(2030, 1, 1, tzinfo=UTC) + timedelta(days=1))
    assert clock.now() == datetime(2030, 1, 2, tzinfo=UTC).timestamp()
    assert "2030-01-02" in repr(clock)


def test_a_clock_does_not_run_backwards() -> None:
    """A move into the past, or by something that is no number, is refused."""
    clock = ManualClock()
    with pytest.raises(ValueError, match="forward"):
        clock.advance(-1)
    with pytest.raises(ValueError, match="forward"):
        clock.advance(float("nan"))
    with pytest.raises(ValueError, match="forward"):
        clock.set(clock.now() - 1)
