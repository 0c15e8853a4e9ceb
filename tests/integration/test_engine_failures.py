"""Whole runs in which a step fails: what is tried again, for how long, and what the run says of it in the end."""

from __future__ import annotations

import asyncio
import time
from datetime import UTC, datetime
from typing import Any

import pytest
from tests.integration.runs import AT_ONCE, attempts, states, working
from tests.observers import Seen
from tests.patience import PATIENCE

from paigeant import (
    ActivityRegistry,
    NonRetryableError,
    Paigeant,
    RetryPolicy,
    Settings,
    Step,
    StepContext,
    Workflow,
)
from paigeant.clock import LAST_INSTANT
from paigeant.errors import ArgumentError
from paigeant.slip import StepStatus
from paigeant.store import ClaimRequest, Grant, StepKey, StepResult
from paigeant.testing import ManualClock

# -- attempts


async def test_a_failure_is_tried_again(settings: Settings) -> None:
    """With its attempts counted; what failed before leaves its error only until the step succeeds."""
    activity = ActivityRegistry()

    @activity.execute(retries=AT_ONCE)
    async def flaky(ctx: StepContext) -> int:
        if ctx.attempt < 3:
            raise RuntimeError(f"attempt {ctx.attempt}")
        return ctx.attempt

    async with working(settings, activity) as app:
        run = await app.dispatch(Workflow("w", ["flaky"]))
        result = await run.wait(PATIENCE)
        [row] = (await run.detail()).steps
    assert (result.output, row.attempt, row.error) == (3, 3, None)


async def test_a_wait_between_attempts_is_recorded(settings: Settings) -> None:
    """The step is ready, its not_before is when the next attempt may begin, and its error why."""
    activity = ActivityRegistry()

    @activity.execute(retries=RetryPolicy(attempts=2, base=500, cap=1000, jitter=0))
    async def fail() -> None:
        raise RuntimeError("not now")

    seen = Seen()
    async with working(settings, activity, observers=[seen]) as app:
        before = time.time()
        run = await app.dispatch(Workflow("w", ["fail"]))
        await seen.wait_for("step.retrying")
        [row] = (await run.detail()).steps
        assert (row.status, row.attempt, row.error) == ("ready", 1, "RuntimeError: not now")
        assert before + 500 <= row.not_before <= time.time() + 500
        assert await run.status() == "running"


async def test_the_last_failure_fails_the_run(settings: Settings) -> None:
    """failed: nothing had to be undone. The error has the step, the type and the text."""
    activity = ActivityRegistry()

    @activity.execute(retries=1)
    async def fail() -> None:
        raise KeyError("missing")

    async with working(settings, activity) as app:
        run = await app.dispatch(Workflow("w", [Step("fail", id="f"), "fail"]))
        result = await run.wait(PATIENCE)
        assert await states(run) == [("f", "do", "failed")]
        assert await attempts(run) == {"f": 2}
    assert (result.status, result.output) == ("failed", None)
    assert result.error == "f: KeyError: 'missing'"


@pytest.mark.parametrize(
    "raised",
    [
        NonRetryableError("no use"),
        ArgumentError("wrong"),
        ExceptionGroup(
            "of tasks", [ValueError("passes"), ExceptionGroup("in it", [NonRetryableError("no")])]
        ),
    ],
    ids=["said", "found", "in a group"],
)
async def test_some_failures_are_not_tried_again(settings: Settings, raised: Exception) -> None:
    """What no further attempt can help with fails the step at once."""
    activity = ActivityRegistry()

    @activity.execute(retries=5)
    async def fail() -> None:
        raise raised

    async with working(settings, activity) as app:
        run = await app.dispatch(Workflow("w", ["fail"]))
        assert (await run.wait(PATIENCE)).status == "failed"
        assert await attempts(run) == {"fail": 1}


@pytest.mark.parametrize(
    ("output", "said"),
    [(object(), "can't be written as JSON"), ("x", "isn't what its annotation says")],
    ids=["any", "typed"],
)
async def test_an_output_that_can_t_be_written_fails_the_step(
    settings: Settings, output: Any, said: str
) -> None:
    """For good: another attempt would return the like."""
    activity = ActivityRegistry()

    def give() -> Any:
        return output

    if output == "x":
        give.__annotations__["return"] = int
    activity.execute(retries=5)(give)
    async with working(settings, activity) as app:
        run = await app.dispatch(Workflow("w", ["give"]))
        result = await run.wait(PATIENCE)
        assert await attempts(run) == {"give": 1}
    assert said in str(result.error)


async def test_a_missing_argument_fails_a_later_step(settings: Settings) -> None:
    """For good, with the list of what was there."""
    activity = ActivityRegistry()
    activity.execute(name="first")(lambda: 1)

    @activity.execute(retries=5)
    async def second(sku: str) -> None: ...

    async with working(settings, activity) as app:
        run = await app.dispatch(Workflow("w", ["first", "second"]), {"n": 1})
        result = await run.wait(PATIENCE)
        assert await attempts(run) == {"first": 1, "second": 1}
    assert "'second' needs 'sku'" in str(result.error)
    assert "there is: first, n" in str(result.error)


class Unspeakable(Exception):
    """An error whose text can't be had."""

    def __str__(self) -> str:
        raise SystemExit(3)


def nested(depth: int) -> Exception:
    """Groups within groups, as recursion through task groups leaves them."""
    error = Exception("the innermost")
    for _ in range(depth):
        error = ExceptionGroup("nested", [error])
    return error


@pytest.mark.parametrize(
    "raised",
    [SystemExit(3), asyncio.CancelledError("mine"), GeneratorExit(), Unspeakable(), nested(2000)],
    ids=["exit", "cancelled", "generator exit", "without a text", "nested groups"],
)
async def test_whatever_an_activity_raises_is_its_failure(settings: Settings, raised: Any) -> None:
    """What escapes from user code, an exit or a cancellation too, ends the step, not the worker."""
    activity = ActivityRegistry()

    @activity.execute(retries=0)
    async def odd() -> None:
        raise raised

    activity.execute(name="fine")(lambda: "fine")
    async with working(settings, activity) as app:
        result = await (await app.dispatch(Workflow("w", ["odd"]))).wait(PATIENCE)
        assert result.status == "failed"
        assert type(raised).__name__ in str(result.error)
        assert (await (await app.dispatch(Workflow("v", ["fine"]))).wait(PATIENCE)).output == "fine"


async def test_a_step_is_told_to_be_lost_for_its_last_attempt(settings: Settings) -> None:
    """Those before it may have failed by themselves: nobody is to look for workers that all died."""
    activity = ActivityRegistry()

    @activity.execute(retries=1)
    async def work() -> None:
        raise AssertionError("there is no attempt left")

    key = StepKey("r", "work")
    async with Paigeant(settings, activities=activity) as app:
        run = await app.dispatch(Workflow("w", ["work"]), workflow_id="r")
        first = await app.store.claim_step(ClaimRequest(key, "lost", 2))
        assert isinstance(first, Grant)
        failed = StepResult(key, "lost", first.epoch, first.attempt, StepStatus.READY, error="ValueError: no")
        await app.store.record_step_result(failed)
        await app.store.claim_step(ClaimRequest(key, "lost", 2))
        worker = app.worker()
        working = asyncio.create_task(worker.run())
        result = await run.wait(PATIENCE)
        await worker.stop()
        await working
    assert (
        result.error == "work: WorkerLost: attempt 2 was the last one, and didn't come back: its worker died"
    )


# -- timeouts and deadlines


async def test_an_attempt_has_its_time(settings: Settings) -> None:
    """Each attempt that takes longer is a failure; the step's timeout goes before the activity's."""
    activity = ActivityRegistry()

    @activity.execute(timeout=1000.0, retries=AT_ONCE)
    async def slow(ctx: StepContext) -> str:
        if ctx.attempt == 1:
            await asyncio.Event().wait()
        return "done"

    async with working(settings, activity) as app:
        run = await app.dispatch(Workflow("w", [Step("slow", timeout=0.01)]))
        result = await run.wait(PATIENCE)
        assert await attempts(run) == {"slow": 2}
    assert result.output == "done"


async def test_a_timeout_says_how_long_it_was(settings: Settings) -> None:
    """The error has the seconds."""
    activity = ActivityRegistry()

    @activity.execute(timeout=0.01, retries=0)
    async def slow() -> None:
        await asyncio.Event().wait()

    async with working(settings, activity) as app:
        result = await (await app.dispatch(Workflow("w", ["slow"]))).wait(PATIENCE)
    assert result.error == "slow: TimeoutError: the attempt took longer than 0.01 s"


async def test_a_timeout_is_told_also_where_the_activity_makes_another_error_of_it(
    settings: Settings,
) -> None:
    """As task groups within `except*` do, and clients that tell a broken connection."""
    activity = ActivityRegistry()

    @activity.execute(retries=0, timeout=0.05)
    async def late() -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError as exc:
            raise ConnectionError("broken") from exc

    async with working(settings, activity) as app:
        result = await (await app.dispatch(Workflow("w", ["late"]))).wait(PATIENCE)
    assert result.error == "late: ConnectionError: broken; the attempt took longer than 0.05 s"


async def test_a_timeout_of_the_activity_s_own_is_its_own(settings: Settings) -> None:
    """A TimeoutError that the activity raises isn't taken for the step's."""
    activity = ActivityRegistry()

    @activity.execute(timeout=1000.0, retries=0)
    async def ask() -> None:
        raise TimeoutError("the bank did not answer")

    async with working(settings, activity) as app:
        result = await (await app.dispatch(Workflow("w", ["ask"]))).wait(PATIENCE)
    assert result.error == "ask: TimeoutError: the bank did not answer"


async def test_a_run_has_its_deadline(settings: Settings, clock: ManualClock) -> None:
    """A run that isn't done by then fails while its step is still under way, and what was done is undone."""
    activity = ActivityRegistry()
    began = asyncio.Event()
    ended: list[str] = []

    activity.execute(name="first")(lambda: 1)
    activity.compensate("first")(lambda: ended.append("undone"))

    @activity.execute(retries=50)
    async def slow() -> None:
        began.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.append("interrupted")

    settings = settings.model_copy(update={"lease": 1000.0, "heartbeat": 0.05})
    async with working(settings, activity, clock=clock) as app:
        run = await app.dispatch(Workflow("w", ["first", "slow"], deadline=60))
        await asyncio.wait_for(began.wait(), PATIENCE)
        clock.advance(60)
        result = await run.wait(PATIENCE)
    assert result.status == "compensated"
    assert "deadline" in str(result.error)
    assert sorted(ended) == ["interrupted", "undone"]


async def test_a_deadline_is_a_date(settings: Settings) -> None:
    """Also that of a run that is to start when somebody says so, at the last date that there is."""
    async with Paigeant(settings) as app:
        never = datetime.max.replace(tzinfo=UTC)
        run = await app.dispatch(Workflow("w", ["a"], deadline=60), start_at=never)
        assert (await run.detail()).run.deadline == LAST_INSTANT
