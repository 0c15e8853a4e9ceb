"""Whole runs and their workers: how much each does at once, which steps it takes, and how it stops."""

from __future__ import annotations

import asyncio

import pytest
from tests.integration.runs import states, working
from tests.observers import Seen
from tests.patience import PATIENCE

from paigeant import (
    ActivityRegistry,
    ActivityWorker,
    Paigeant,
    RetryPolicy,
    Settings,
    Step,
    StepContext,
    Workflow,
)
from paigeant.errors import InvalidDefinition


def test_a_worker_that_can_t_work_is_refused(settings: Settings) -> None:
    """Before it takes anything."""
    for concurrency in (0, -1, True, 1.5, "2"):
        with pytest.raises(InvalidDefinition, match="concurrency"):
            Paigeant(settings).worker(ActivityRegistry(), concurrency=concurrency)  # type: ignore[arg-type]
    assert isinstance(Paigeant(settings).worker(ActivityRegistry()), ActivityWorker)


# -- bounds


async def test_an_activity_s_own_bound_holds(settings: Settings) -> None:
    """No more of it at once than it allows, while other activities go on beside it."""
    activity = ActivityRegistry()
    at_once = {"narrow": 0, "wide": 0}
    most = dict(at_once)
    full = asyncio.Event()

    async def enter(name: str) -> None:
        at_once[name] += 1
        most[name] = max(most[name], at_once[name])
        if at_once["wide"] == 10:
            full.set()
        await full.wait()
        await asyncio.sleep(0)
        at_once[name] -= 1

    @activity.execute(concurrency=2)
    async def narrow() -> None:
        await enter("narrow")

    @activity.execute()
    async def wide() -> None:
        await enter("wide")

    async with working(settings, activity, concurrency=20) as app:
        workflows = [Workflow("w", ["narrow", "narrow"])] * 10 + [Workflow("v", ["wide", "narrow"])] * 10
        runs = [await app.dispatch(workflow) for workflow in workflows]
        results = await asyncio.gather(*(run.wait(PATIENCE) for run in runs))
    assert {result.status for result in results} == {"completed"}
    assert most == {"narrow": 2, "wide": 10}


async def test_a_worker_does_no_more_than_its_bound(settings: Settings) -> None:
    """Over all activities."""
    activity = ActivityRegistry()
    now = most = 0

    @activity.execute()
    async def work() -> None:
        nonlocal now, most
        now += 1
        most = max(most, now)
        await asyncio.sleep(0.001)
        now -= 1

    async with working(settings, activity, concurrency=3) as app:
        runs = [await app.dispatch(Workflow("w", ["work", "work"])) for _ in range(20)]
        await asyncio.gather(*(run.wait(PATIENCE) for run in runs))
    assert most == 3


# -- who does what


async def test_a_step_of_others_is_left_to_them(settings: Settings) -> None:
    """A step whose activity nobody here knows waits for a worker that does."""
    mine, others = ActivityRegistry(), ActivityRegistry()
    mine.execute(name="a")(lambda: "mine")
    others.execute(name="b")(lambda a: f"{a} and theirs")
    seen = Seen()
    async with Paigeant(settings, activities=mine, observers=[seen]) as app:
        worker = app.worker(mine)
        tasks = [asyncio.create_task(worker.run())]
        run = await app.dispatch(Workflow("w", ["a", "b"]))
        await seen.wait_for("step.completed")
        assert (await states(run))[-1] == ("b", "do", "ready")
        other = app.worker(others)
        tasks.append(asyncio.create_task(other.run()))
        assert (await run.wait(PATIENCE)).output == "mine and theirs"
        await worker.stop()
        await other.stop()
        await asyncio.gather(*tasks)


async def test_steps_go_to_their_topics(settings: Settings) -> None:
    """The step's topic goes before the activity's; a worker can be limited to some topics."""
    activity = ActivityRegistry()
    done: list[tuple[str, str]] = []

    @activity.execute(topic="slow-lane")
    async def work(ctx: StepContext) -> None:
        done.append((ctx.step_id, "done"))

    async with Paigeant(settings, activities=activity) as app:
        run = await app.dispatch(Workflow("w", ["work", Step("work", id="urgent", topic="fast-lane")]))
        for topic, state in (("slow-lane", "running"), ("fast-lane", "completed")):
            await asyncio.wait_for(app.worker(topics=[topic]).run(until_idle=True), PATIENCE)
            assert await run.status() == state
    assert done == [("work", "done"), ("urgent", "done")]


# -- stopping


async def test_a_stop_lets_steps_finish(settings: Settings) -> None:
    """Within the grace time what is under way is done and recorded; nothing more is begun."""
    activity = ActivityRegistry()
    began, go = asyncio.Event(), asyncio.Event()
    done: list[str] = []

    @activity.execute()
    async def slow(ctx: StepContext) -> str:
        began.set()
        await go.wait()
        done.append(ctx.step_id)
        return "done"

    async with Paigeant(settings, activities=activity) as app:
        worker = app.worker()
        working = asyncio.create_task(worker.run())
        run = await app.dispatch(Workflow("w", [Step("slow", id="x"), Step("slow", id="y")]))
        await asyncio.wait_for(began.wait(), PATIENCE)
        stopping = asyncio.create_task(worker.stop(grace=PATIENCE))
        await asyncio.sleep(0)
        go.set()
        await stopping
        await working
        assert done == ["x"]
        assert await states(run) == [("x", "do", "completed"), ("y", "do", "ready")]
        second = app.worker()
        working = asyncio.create_task(second.run())
        assert (await run.wait(PATIENCE)).status == "completed"
        await second.stop()
        await working


async def test_a_stop_ends_what_has_lost_its_cancel(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A library beneath may swallow a cancel, and its loop go on: it is cancelled until it has ended."""
    lost: list[str] = []

    async def forgetful() -> None:
        while len(lost) < 2:
            try:
                await asyncio.get_running_loop().create_future()
            except asyncio.CancelledError:
                lost.append("a cancel")
        await asyncio.get_running_loop().create_future()

    async with Paigeant(settings, activities=ActivityRegistry()) as app:
        worker = app.worker()
        monkeypatch.setattr(worker.sweeper, "run", forgetful)
        working = asyncio.create_task(worker.run())
        await asyncio.sleep(0)
        async with asyncio.timeout(PATIENCE):
            await worker.stop()
            await working
    assert len(lost) == 2


async def test_a_stop_gives_back_what_it_cuts_short(settings: Settings) -> None:
    """After the grace time a step is interrupted: it is free at once and its attempt doesn't count."""
    activity = ActivityRegistry()
    began = asyncio.Event()
    tried: list[int] = []

    @activity.execute(retries=0)
    async def slow(ctx: StepContext) -> str:
        tried.append(ctx.attempt)
        began.set()
        if len(tried) == 1:
            await asyncio.Event().wait()
        return "done"

    async with Paigeant(settings, activities=activity) as app:
        first = app.worker()
        working = asyncio.create_task(first.run())
        run = await app.dispatch(Workflow("w", ["slow"]))
        await asyncio.wait_for(began.wait(), PATIENCE)
        await first.stop(grace=0)
        await working
        [row] = (await run.detail()).steps
        assert (row.status, row.attempt, row.worker) == ("ready", 0, None)
        second = app.worker()
        working = asyncio.create_task(second.run())
        assert (await run.wait(PATIENCE)).output == "done"
        await second.stop()
        await second.stop()
        await working
    assert tried == [1, 1]


async def test_a_worker_may_stop_when_idle(settings: Settings) -> None:
    """Until idle means until no step waits in its topics: retries are waited for, others' steps aren't."""
    activity = ActivityRegistry()

    @activity.execute(retries=RetryPolicy(attempts=2, base=0.05))
    async def flaky(ctx: StepContext) -> None:
        if ctx.attempt == 1:
            raise RuntimeError("once")

    async with Paigeant(settings, activities=activity) as app:
        run = await app.dispatch(Workflow("w", ["flaky"]))
        other = await app.dispatch(Workflow("v", ["elsewhere"]))
        await asyncio.wait_for(app.worker().run(until_idle=True), PATIENCE)
        assert (await run.status(), await other.status()) == ("completed", "pending")
