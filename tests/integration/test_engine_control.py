"""Whole runs that are steered from outside: cancelled, taken up again, sent a signal, waited for."""

from __future__ import annotations

import asyncio
import contextlib
import json

import pytest
from tests.integration.runs import AT_ONCE, Shop, states, working
from tests.observers import Seen
from tests.patience import PATIENCE

from paigeant import ActivityRegistry, Paigeant, Settings, StepContext, Workflow
from paigeant.errors import InputInvalid, InvalidTransition, RunNotFound, RunTimeout


async def test_a_running_step_is_cancelled(settings: Settings) -> None:
    """Cancelling a run interrupts its step, undoes what was done, and leaves the worker fit for others."""
    shop = Shop()
    began, interrupted = asyncio.Event(), asyncio.Event()

    @shop.activity.execute()
    async def slow() -> None:
        began.set()
        try:
            await asyncio.Event().wait()
        finally:
            interrupted.set()

    async with working(settings, shop.activity) as app:
        run = await app.dispatch(Workflow("w", ["a", "slow", "b"]))
        await asyncio.wait_for(began.wait(), PATIENCE)
        assert await run.cancel("not wanted") == "compensating"
        result = await run.wait(PATIENCE)
        await asyncio.wait_for(interrupted.wait(), PATIENCE)
        assert (result.status, result.error) == ("cancelled", "not wanted")
        assert await states(run) == [
            ("a", "do", "compensated"),
            ("slow", "do", "failed"),
            ("a", "undo", "compensated"),
        ]
        assert (await (await app.dispatch(Workflow("v", ["b"]))).wait(PATIENCE)).status == "completed"
    assert [step for step, _ in shop.undone] == ["a"]


async def test_a_cancelled_run_takes_no_result(settings: Settings) -> None:
    """A step that doesn't let itself be interrupted may finish: what it returns comes too late."""
    activity = ActivityRegistry()
    began, go = asyncio.Event(), asyncio.Event()
    seen = Seen()

    @activity.execute()
    async def stubborn() -> str:
        began.set()
        while not go.is_set():
            with contextlib.suppress(asyncio.CancelledError):
                await go.wait()
        return "too late"

    async with working(settings, activity, observers=[seen]) as app:
        run = await app.dispatch(Workflow("w", ["stubborn"]))
        await asyncio.wait_for(began.wait(), PATIENCE)
        assert await run.cancel() == "cancelled"
        go.set()
        await seen.wait_for("step.lost")
        result = await run.wait(PATIENCE)
    assert (result.status, result.outputs) == ("cancelled", {})


async def test_a_run_can_be_cancelled_before_anybody_works_on_it(settings: Settings) -> None:
    """It is cancelled at once; asked again it says that it has ended."""
    async with Paigeant(settings) as app:
        run = await app.dispatch(Workflow("w", ["a"]))
        assert await run.cancel() == "cancelled"
        with pytest.raises(InvalidTransition, match="cancelled"):
            await run.cancel()
        assert (await run.wait(PATIENCE)).status == "cancelled"


async def test_a_failed_run_can_be_taken_up(settings: Settings) -> None:
    """From the step that failed, with fresh attempts; what was recorded isn't done again."""
    activity = ActivityRegistry()
    broken = True
    done: list[str] = []

    @activity.execute()
    async def first() -> int:
        done.append("first")
        return 1

    @activity.execute(retries=AT_ONCE)
    async def second(first: int, ctx: StepContext) -> int:
        done.append(f"second {ctx.attempt}")
        if broken:
            raise RuntimeError("no")
        return first + 1

    async with working(settings, activity) as app:
        run = await app.dispatch(Workflow("w", ["first", "second"]))
        assert (await run.wait(PATIENCE)).status == "failed"
        broken = False
        assert await run.retry() == "running"
        assert (await run.wait(PATIENCE)).output == 2
    assert done == ["first", "second 1", "second 2", "second 3", "second 1"]


async def test_a_signal_is_kept(settings: Settings) -> None:
    """For the run it was sent to, while that is open."""
    async with Paigeant(settings) as app:
        run = await app.dispatch(Workflow("w", ["a"]))
        await run.signal("approved", {"by": "me"})
        [signal] = (await run.detail()).signals
        assert (signal.name, json.loads(signal.value)) == ("approved", {"by": "me"})
        with pytest.raises(InputInvalid, match="JSON"):
            await run.signal("bad", object())


async def test_waiting_has_an_end(settings: Settings) -> None:
    """Who waits too long gets an error that says the run goes on."""
    async with Paigeant(settings) as app:
        run = await app.dispatch(Workflow("w", ["a"]), workflow_id="r")
        with pytest.raises(RunTimeout, match=r"'r' has not ended within 0\.01 s; it goes on"):
            await run.wait(0.01)
        assert await run.status() == "pending"


async def test_asking_about_no_run_is_an_error(settings: Settings) -> None:
    """Whatever is asked."""
    async with Paigeant(settings) as app:
        run = app.run("nobody")
        for ask in (run.status, run.wait, run.detail, run.cancel, run.retry, lambda: run.signal("go")):
            with pytest.raises(RunNotFound, match="nobody"):
                await ask()
