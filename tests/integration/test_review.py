"""What a review of the engine found: other versions of the code, messages from before, activities that mind no rule."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import itertools
import logging
import sqlite3
from collections.abc import AsyncIterator, Collection
from pathlib import Path
from typing import Any

import pytest
from tests.observers import Seen
from tests.patience import PATIENCE

from paigeant import (
    ActivityRegistry,
    ActivityWorker,
    NonRetryableError,
    Paigeant,
    PaigeantMessage,
    RunTimeout,
    Settings,
    Step,
    StepContext,
    Workflow,
)
from paigeant.database import ENDED
from paigeant.errors import InputInvalid, MessageTooLarge, RunNotFound, StoreUnavailable
from paigeant.slip import RunStatus
from paigeant.store import ClaimRequest, Grant, Refused
from paigeant.stores.sql import SqlStore
from paigeant.testing import ManualClock
from paigeant.waiters import Waiters, ended


@pytest.fixture(params=["memory://", "sqlite:///p.db"], ids=["memory", "sqlite"])
def settings(request: pytest.FixtureRequest) -> Settings:
    """Settings for memory, and for one file, with workers that beat often."""
    return Settings(
        transport_url=request.param,
        store_url=request.param,
        retry_base=0.0,
        heartbeat=0.05,
        sweep_interval=0.05,
        max_message_bytes=4096,
    )


@contextlib.asynccontextmanager
async def working(app: Paigeant, activity: ActivityRegistry, **options: Any) -> AsyncIterator[ActivityWorker]:
    """A worker of `app`, stopped at the end."""
    worker = app.worker(activity, **options)
    task = asyncio.create_task(worker.run())
    try:
        yield worker
    finally:
        await worker.stop(grace=0)
        await task


async def first_message(app: Paigeant, topic: str) -> PaigeantMessage:
    """The message that waits in `topic`, which is left there."""
    async with contextlib.aclosing(app.transport.subscribe(topic)) as messages:  # type: ignore[type-var]
        message = await asyncio.wait_for(anext(messages), PATIENCE)
    await app.transport.nack(message.message_id)
    assert isinstance(message, PaigeantMessage)
    return message


async def test_an_undo_is_left_to_workers_that_have_the_compensation(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker whose code knows the activity and not its compensation never does the activity in its place."""
    monkeypatch.setattr("paigeant.executor._UNKNOWN_ACTIVITY_PAUSE", 0.02)
    newer, older, calls = ActivityRegistry(), ActivityRegistry(), []

    @newer.execute(name="charge")
    async def charge() -> int:
        calls.append("charge")
        return 5

    @newer.compensate("charge")
    async def refund(output: int) -> None:
        calls.append(f"refund {output}")

    @older.execute(name="charge")
    async def charge_as_before() -> None:
        calls.append("charge again")

    @older.execute(retries=0)
    async def fail() -> None:
        raise NonRetryableError("no")

    seen = Seen()
    async with Paigeant(settings, observers=[seen]) as app:
        run = await app.dispatch(Workflow("w", ["charge", "fail"]), {})
        async with working(app, newer):
            await seen.wait_for("step.completed")
        async with working(app, older):
            await seen.wait_for("delivery.returned")
            async with working(app, newer):
                result = await run.wait(PATIENCE)
    assert (result.status, calls) == ("compensated", ["charge", "refund 5"])
    assert seen.named("delivery.returned")[0].error == "no compensation of activity 'charge' here"


async def test_a_message_from_before_does_no_other_step(settings: Settings) -> None:
    """A message whose payload is in the store is for its own step, also when that is long done."""
    activity, calls = ActivityRegistry(), []

    @activity.execute(topic="first")
    async def one(blob: str) -> int:
        calls.append("one")
        return 1

    @activity.execute(topic="second")
    async def two() -> int:
        calls.append("two")
        return 2

    async with Paigeant(settings, activities=activity) as app:
        run = await app.dispatch(Workflow("w", ["one", "two"]), {"blob": "x" * 4000})
        message = await first_message(app, "first")
        assert not message.payload
        worker = app.worker(topics=["first"])
        worker.executor.entitled = lambda: True
        await worker.executor.handle(message)
        await worker.executor.handle(message)
        assert calls == ["one"]
        async with working(app, activity):
            assert (await run.wait(PATIENCE)).outputs == {"one": 1, "two": 2}
    assert calls == ["one", "two"]


async def test_a_run_that_is_cancelled_while_a_step_is_claimed_undoes_only_what_was_done(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The compensation of a step that never ran isn't called, whenever the cancelling comes."""
    activity, calls = ActivityRegistry(), []

    @activity.execute()
    async def book() -> None:
        calls.append("book")

    @activity.compensate("book")
    async def unbook() -> None:
        calls.append("unbook")

    async with Paigeant(settings, activities=activity) as app:
        run = await app.dispatch(Workflow("w", ["book"]), {})
        message = await first_message(app, "book")
        worker = app.worker()
        worker.executor.entitled = lambda: True
        claim_step = app.store.claim_step

        async def claim_and_cancel(request: ClaimRequest) -> Grant | Refused:
            answer = await claim_step(request)
            await run.cancel()
            return answer

        monkeypatch.setattr(app.store, "claim_step", claim_and_cancel)
        # An id that wasn't made here: the worker asks the store how things stand.
        await worker.executor.handle(message.evolve(message_id="of another time"))
        assert await run.status() == "cancelled"
        assert not worker.executor.running
    assert calls == []


async def test_a_step_that_cancels_its_own_task_comes_to_an_end(settings: Settings) -> None:
    """Nobody works on it any more, so it is given back and tried again, and not held for ever."""
    activity, calls = ActivityRegistry(), []

    @activity.execute(retries=1)
    async def odd() -> None:
        calls.append(1)
        task = asyncio.current_task()
        assert task is not None
        task.cancel()
        await asyncio.sleep(0)

    async with Paigeant(settings, activities=activity) as app, working(app, activity):
        result = await (await app.dispatch(Workflow("w", ["odd"]), {})).wait(PATIENCE)
    assert (result.status, len(calls)) == ("failed", 2)


async def test_a_shutdown_in_other_words_is_no_failure(settings: Settings) -> None:
    """An activity that turns its being cancelled into an error of its own keeps its attempts."""
    activity, began = ActivityRegistry(), asyncio.Event()

    @activity.execute(retries=0)
    async def fetch() -> None:
        began.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError as exc:
            raise ConnectionError("the connection was closed") from exc

    async with Paigeant(settings, activities=activity) as app:
        run = await app.dispatch(Workflow("w", ["fetch"]), {})
        async with working(app, activity):
            await asyncio.wait_for(began.wait(), PATIENCE)
        [row] = (await run.detail()).steps
    assert (row.status, row.attempt, row.error) == ("ready", 0, None)


async def test_a_worker_ends_though_an_activity_does_not(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The step of an activity that ignores being cancelled is given back, and stop() returns."""
    monkeypatch.setattr("paigeant.worker._CANCEL_SECONDS", 0.05)
    activity, began, freed = ActivityRegistry(), asyncio.Event(), asyncio.Event()

    @activity.execute(retries=0)
    async def stubborn() -> None:
        began.set()
        while not freed.is_set():
            with contextlib.suppress(asyncio.CancelledError):
                await freed.wait()

    async with Paigeant(settings, activities=activity) as app:
        run = await app.dispatch(Workflow("w", ["stubborn"]), {})
        with caplog.at_level(logging.ERROR, "paigeant.worker"):
            async with asyncio.timeout(PATIENCE), working(app, activity) as worker:
                await began.wait()
        [row] = (await run.detail()).steps
        assert (row.status, row.attempt) == ("ready", 0)
        assert "1 steps go on although they were cancelled" in caplog.text
        freed.set()
        await asyncio.gather(*worker._tasks, return_exceptions=True)


async def test_a_bound_is_free_once_its_step_is_over(settings: Settings) -> None:
    """The bound of an activity is for its own steps, not for those that follow them in the same worker."""
    activity, together = ActivityRegistry(), asyncio.Barrier(3)

    @activity.execute(concurrency=1)
    async def quick() -> None:
        pass

    @activity.execute()
    async def slow() -> None:
        await together.wait()

    async with Paigeant(settings, activities=activity) as app, working(app, activity):
        runs = [await app.dispatch(Workflow("w", ["quick", "slow"]), {}) for _ in range(3)]
        results = [await run.wait(PATIENCE) for run in runs]
    assert {result.status for result in results} == {RunStatus.COMPLETED}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"headers": {"tenant": 7}}, "headers are texts"),
        ({"headers": {"tenant": "\ud800"}}, "headers are texts"),
        ({"headers": ["tenant"]}, "headers are a mapping"),
        ({"correlation_id": 7}, "a correlation id is a text"),
    ],
)
async def test_what_could_not_travel_is_refused(settings: Settings, given: Any, said: str) -> None:
    """Headers that every worker would refuse to read don't start a run that would never end."""
    async with Paigeant(settings) as app:
        with pytest.raises(InputInvalid, match=said):
            await app.dispatch(Workflow("w", [Step("a")]), {}, workflow_id="r", **given)
        assert await app.store.list_runs() == []


async def test_who_waits_outlives_a_store_that_fails_for_a_while() -> None:
    """A look that fails isn't the last one."""
    answers: list[dict[str, RunStatus] | StoreUnavailable] = [
        {"r": RunStatus.RUNNING},
        StoreUnavailable("locked"),
        {"r": RunStatus.COMPLETED},
    ]

    async def look(_: Collection[str]) -> dict[str, RunStatus]:
        answer = answers.pop(0)
        if isinstance(answer, StoreUnavailable):
            raise answer
        return answer

    waiters = Waiters(look, hears_others=lambda: False, hear=lambda: lambda: None)
    assert await asyncio.wait_for(waiters.wait("r"), PATIENCE) == "completed"
    assert answers == []


Looks = asyncio.Queue[asyncio.Future[dict[str, RunStatus]]]


def looked_by_hand() -> tuple[Waiters, Looks]:
    """Those who wait, and the answers that their looks wait for."""
    looks = Looks()

    async def look(_: Collection[str]) -> dict[str, RunStatus]:
        looks.put_nowait(answer := asyncio.get_running_loop().create_future())
        return await answer

    waiters = Waiters(look, hears_others=lambda: False, hear=lambda: lambda: None)
    waiters.attend()
    return waiters, looks


@pytest.mark.parametrize("began", ["here", "elsewhere"])
async def test_a_look_from_before_a_run_began_loses_nobody(began: str) -> None:
    """That it doesn't find the run says nothing to who knows that there is one by now."""
    waiters, looks = looked_by_hand()
    waiters.started("other")
    waiting = [asyncio.create_task(waiters.wait(run_id)) for run_id in ("other", "r")]
    own, early = await looks.get(), await looks.get()
    if began == "here":
        waiters.started("r")
        waiting.append(asyncio.create_task(waiters.wait("r")))
        await asyncio.sleep(0)
    early.set_result({"other": RunStatus.RUNNING})
    later = await looks.get()
    own.set_result({"r": RunStatus.RUNNING})
    later.set_result({"other": RunStatus.COMPLETED, "r": RunStatus.COMPLETED})
    async with asyncio.timeout(PATIENCE):
        assert set(await asyncio.gather(*waiting)) == {"completed"}


async def test_only_who_hears_of_ends_relies_on_that() -> None:
    """A run that was started before anybody waited is looked at; what is heard of from now on needs no look."""
    waiters, looks = looked_by_hand()
    waiters.close()
    waiters.started("early")
    early = asyncio.create_task(waiters.wait("early"))
    (await looks.get()).set_result({"early": RunStatus.COMPLETED})
    assert await asyncio.wait_for(early, PATIENCE) == "completed"
    waiters.started("late")
    late = asyncio.create_task(waiters.wait("late"))
    await asyncio.sleep(0)
    waiters.heard(frozenset({ended("late", RunStatus.FAILED)}))
    assert await asyncio.wait_for(late, PATIENCE) == "failed"


async def test_what_ends_while_a_store_is_closed_is_looked_at() -> None:
    """Nobody hears of it then, so a run that was started before isn't taken to be open still."""
    waiters, looks = looked_by_hand()
    waiters.started("r")
    waiters.close()
    waiting = asyncio.create_task(waiters.wait("r"))
    await asyncio.sleep(0)
    looks.get_nowait().set_result({"r": RunStatus.COMPLETED})
    assert await asyncio.wait_for(waiting, PATIENCE) == "completed"


async def test_who_begins_to_hear_of_ends_looks_what_has_ended_before() -> None:
    """Also where a look is under way that was too early to find it."""
    waiters, looks = looked_by_hand()
    waiting = asyncio.create_task(waiters.wait("r"))
    own = await looks.get()
    waiters.heard(frozenset({ENDED}))
    again = await looks.get()
    again.set_result({"r": RunStatus.COMPLETED})
    own.set_result({"r": RunStatus.RUNNING})
    assert await asyncio.wait_for(waiting, PATIENCE) == "completed"


async def test_whoever_finds_the_end_as_a_store_is_closed_has_it(caplog: pytest.LogCaptureFixture) -> None:
    """Nothing is logged of what is told to all who still wait."""
    waiters, looks = looked_by_hand()
    waiting = asyncio.create_task(waiters.wait("r"))
    own = await looks.get()
    waiters.close()
    own.set_result({"r": RunStatus.COMPLETED})
    assert await asyncio.wait_for(waiting, PATIENCE) == "completed"
    gc.collect()
    assert caplog.records == []


async def test_who_finds_no_run_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    """By his own look: what another one finds meanwhile would be an error that nobody asks for."""
    waiters, looks = looked_by_hand()
    waiters.started("other")
    others, waiting = (asyncio.create_task(waiters.wait(run_id)) for run_id in ("other", "r"))
    own, its = await looks.get(), await looks.get()
    its.set_result({"other": RunStatus.COMPLETED})
    assert await asyncio.wait_for(others, PATIENCE) == "completed"
    own.set_result({})
    await asyncio.wait([waiting])
    assert isinstance(waiting.exception(), RunNotFound)
    del waiting
    gc.collect()  # what nobody has asked for is logged then
    assert caplog.records == []


async def test_an_itinerary_that_no_message_can_carry_fails_the_step_once(tmp_path: Path) -> None:
    """Recorded, it would stop the run for ever; retried, it would only be done again."""
    began: list[int] = []
    registry = ActivityRegistry()

    @registry.execute(retries=3)
    async def plan(ctx: StepContext) -> None:
        began.append(ctx.attempt)
        ctx.insert(Step("elsewhere", args={"text": "a" * 2_000_000}))

    url = f"sqlite:///{tmp_path}/paigeant.db"
    async with Paigeant(Settings(transport_url=url, store_url=url)) as app:
        worker = app.worker(registry)
        working = asyncio.create_task(worker.run())
        result = await (await app.dispatch(Workflow("planned", ["plan"]))).wait(timeout=PATIENCE)
        await worker.stop()
        await working
    assert (result.status, began) == ("failed", [1])
    assert "MessageTooLarge" in (result.error or "")


async def test_a_workflow_that_no_message_can_carry_is_refused(tmp_path: Path) -> None:
    """At dispatch, on every transport, since no worker would ever hear of it."""
    async with Paigeant(Settings(transport_url="memory://", store_url="memory://")) as app:
        with pytest.raises(MessageTooLarge):
            await app.dispatch(Workflow("huge", [Step("work", args={"text": "a" * 2_000_000})]))


async def test_tokens_are_not_recorded(tmp_path: Path) -> None:
    """Headers are recorded with the run, so a token among them is refused."""
    async with Paigeant(Settings(transport_url="memory://", store_url="memory://")) as app:
        with pytest.raises(InputInvalid, match="obo_token"):
            await app.dispatch(Workflow("empty"), headers={"obo_token": "secret"})


async def test_an_end_that_is_told_after_a_retry_ends_no_wait(tmp_path: Path) -> None:
    """Word of it comes from another process, and may be late: what was taken up again is waited for."""
    url = f"sqlite:///{tmp_path}/paigeant.db"
    activity, calls = ActivityRegistry(), itertools.count()

    @activity.execute(retries=0)
    async def charge() -> str:
        if not next(calls):
            raise ConnectionError("the bank is away")
        return "paid"

    async with Paigeant(Settings(transport_url=url, store_url=url), activities=activity) as app:
        assert isinstance(app.store, SqlStore)
        waiters = app.store.waiters
        run = await app.dispatch(Workflow("w", ["charge"]))
        async with working(app, activity):
            assert (await run.wait(PATIENCE)).status == "failed"
        await run.retry()
        waiting = asyncio.create_task(run.wait(PATIENCE))
        while not waiters._known:  # noqa: ASYNC110  # nothing else tells
            await asyncio.sleep(0)
        waiters.heard(frozenset({ended(run.id, RunStatus.FAILED)}))
        async with working(app, activity):
            assert (await waiting).output == "paid"


async def test_waiting_for_no_time_finds_a_run_that_has_ended(tmp_path: Path) -> None:
    """A timeout of 0 asks whether it has."""
    url = f"sqlite:///{tmp_path}/paigeant.db"
    async with Paigeant(Settings(transport_url=url, store_url=url)) as app:
        run = await app.dispatch(Workflow("empty"))
        assert (await run.wait(timeout=0)).status == "completed"
        open_run = await app.dispatch(Workflow("one", ["nobody_has_it"]))
        with pytest.raises(RunTimeout):
            await open_run.wait(timeout=0)


async def test_a_sweep_sends_nothing_that_still_waits(tmp_path: Path) -> None:
    """A long queue is no lost message; one that is gone is sent again."""
    url = f"sqlite:///{tmp_path}/paigeant.db"
    clock = ManualClock()
    async with Paigeant(Settings(transport_url=url, store_url=url, grace=10.0), clock=clock) as app:
        for number in range(3):
            await app.dispatch(Workflow("one", ["nobody_has_it"]), workflow_id=f"r{number}")
        clock.advance(10)
        assert (await app.store.sweep()).due == ()
        lost = sqlite3.connect(tmp_path / "paigeant.db")
        lost.execute("DELETE FROM messages WHERE message_id LIKE 'r1/%'")
        lost.commit()
        lost.close()
        clock.advance(10)
        assert [key.workflow_id for key in (await app.store.sweep()).due] == ["r1"]


async def test_those_who_wait_are_told_that_the_store_closes(tmp_path: Path) -> None:
    """Nobody would wake them any more."""
    url = f"sqlite:///{tmp_path}/paigeant.db"
    async with Paigeant(Settings(transport_url=url, store_url=url)) as app:
        run = await app.dispatch(Workflow("one", ["nobody_has_it"]))
        waiting = asyncio.create_task(run.wait())
        await asyncio.sleep(0)
    with pytest.raises(StoreUnavailable):
        await waiting
