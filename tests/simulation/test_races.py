"""Races that the simulation meets less than once in a thousand seeds, each made to happen."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

from tests.patience import PATIENCE

from paigeant.activity import ActivityRegistry
from paigeant.dispatcher import Dispatcher
from paigeant.forwarder import Forwarder
from paigeant.heartbeat import Heartbeat
from paigeant.slip import RunStatus, Step, StepStatus
from paigeant.store import ClaimRequest, Grant, Recorded, Refused, StepKey, StepResult, WorkerRecord
from paigeant.stores.memory import MemoryStore
from paigeant.transports.memory import MemoryTransport
from paigeant.worker import ActivityWorker
from paigeant.workflow import Workflow

MINE = WorkerRecord("mine", "host", "1")


class Hand:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.instant = 1_800_000_000.0

    def now(self) -> float:
        return self.instant


class Scene:
    """A store, a transport and a dispatcher, with an activity that counts how often it was executed."""

    def __init__(self) -> None:
        self.clock = Hand()
        self.store = MemoryStore(clock=self.clock)
        self.transport = MemoryTransport(clock=self.clock)
        self.activity = ActivityRegistry()
        self.executed: list[str] = []
        for name in ("first", "second"):
            self.activity.execute(name)(self._execute(name))
        self.activity.execute("only_one", concurrency=1)(self._execute("only_one"))
        self.forwarder = Forwarder(self.store, self.transport, self.activity)
        self.dispatcher = Dispatcher(self.store, self.forwarder, self.activity)

    def _execute(self, name: str) -> Any:
        async def execute() -> str:
            self.executed.append(name)
            return name

        return execute

    def worker(self, **options: Any) -> ActivityWorker:
        """A worker for all activities."""
        return ActivityWorker(self.store, self.transport, self.activity, self.forwarder, **options)


async def test_a_late_result_is_nobody_elses() -> None:
    """When a worker did a step twice at once, the attempt that comes second isn't told that its result stands."""
    scene = Scene()
    run_id = await scene.dispatcher.dispatch(Workflow("w", ["first", "second"]), {})
    request = ClaimRequest(StepKey(run_id, "first"), "mine", 9)
    stale = await scene.store.claim_step(request)
    await scene.store.sweep()
    newest = await scene.store.claim_step(request)
    assert isinstance(stale, Grant)
    assert isinstance(newest, Grant)
    results = [
        StepResult(
            request.key, "mine", grant.epoch, grant.attempt, StepStatus.COMPLETED, run=RunStatus.COMPLETED
        )
        for grant in (stale, newest)
    ]
    assert await scene.store.record_step_result(results[0]) == Recorded()
    assert await scene.store.record_step_result(results[1]) == Refused("recorded")


async def test_beats_in_quick_succession_free_nothing() -> None:
    """A claim whose answer is still on its way to the worker's list is not taken for forgotten."""
    scene = Scene()
    run_id = await scene.dispatcher.dispatch(Workflow("w", ["first"]), {})
    beats = threading.Semaphore(0)
    beat = scene.store.beat

    def counted(*args: Any, **options: Any) -> Any:
        answer = beat(*args, **options)
        beats.release()
        return answer

    scene.store.beat = counted  # type: ignore[method-assign]
    heartbeat = Heartbeat(scene.store, MINE, lease=60.0, interval=60.0, running=list, lose=lambda steps: None)
    await heartbeat.start()
    beats.acquire()
    await scene.store.claim_step(ClaimRequest(StepKey(run_id, "first"), "mine", 9))
    for _ in range(5):
        heartbeat.soon()
        await asyncio.to_thread(beats.acquire)
    await heartbeat.stop()
    assert await scene.store.open_steps(run_id) == []


async def test_a_message_from_before_a_retry_tells_nothing() -> None:
    """A run that missed its deadline and was taken up again is done, though a message from before comes first."""
    scene = Scene()
    run_id = await scene.dispatcher.dispatch(Workflow("w", ["first"], deadline=60.0), {})
    old = await anext(scene.transport.subscribe("first"))
    scene.clock.instant += 61
    assert (await scene.store.sweep()).expired == (run_id,)
    await scene.store.retry_run(run_id)
    await scene.transport.publish("first", old)
    await scene.worker().run(until_idle=True)
    assert await scene.store.run_status(run_id) is RunStatus.COMPLETED


async def test_a_bound_is_not_waited_for_in_a_place() -> None:
    """A step that goes on to a bounded activity can't block the one that has the bound and waits for a place."""
    scene = Scene()
    for number in range(30):
        steps = [Step("only_one", id="a"), Step("first", id="b"), Step("only_one", id="c")]
        await scene.dispatcher.dispatch(Workflow("w", steps[number % 2 :]), {}, workflow_id=f"r{number}")
    await asyncio.wait_for(scene.worker(concurrency=1).run(until_idle=True), PATIENCE)
    assert {run.status for run in await scene.store.list_runs()} == {RunStatus.COMPLETED}


async def test_a_step_whose_record_breaks_is_not_kept() -> None:
    """A step that can't be recorded for an unforeseen reason leaves the worker's list, so that it is tried again."""
    scene = Scene()
    run_id = await scene.dispatcher.dispatch(Workflow("w", ["first"]), {})
    record, broken = scene.store.record_step_result, [RuntimeError("broken")]

    async def breaks_once(*args: Any, **options: Any) -> Any:
        if broken:
            raise broken.pop()
        return await record(*args, **options)

    scene.store.record_step_result = breaks_once  # type: ignore[method-assign]
    worker = scene.worker(heartbeat=0.02, sweep_interval=0.05)
    await asyncio.wait_for(worker.run(until_idle=True), PATIENCE)
    assert await scene.store.run_status(run_id) is RunStatus.COMPLETED
    assert scene.executed == ["first", "first"]
