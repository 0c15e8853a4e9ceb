"""The engine where things go wrong around it: other processes, a full disk, rows that can't be read, odd stops."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter
from tests.integration.workers import working
from tests.observers import Seen
from tests.patience import PATIENCE

from paigeant import (
    ActivityRegistry,
    Paigeant,
    PaigeantMessage,
    RunStatus,
    Settings,
    Sleep,
    WaitFor,
    Workflow,
    executor,
    worker,
)
from paigeant.errors import ConfigurationError, RunTimeout, StoreUnavailable, TransportUnavailable
from paigeant.stores.memory import MemoryStore
from paigeant.stores.sql import SqlStore
from paigeant.testing import ManualClock, MemoryApp

WORKER = """
import asyncio, sys
from paigeant import ActivityRegistry, Paigeant, Settings, StepContext

activity = ActivityRegistry()

@activity.execute()
async def one(n: int, ctx: StepContext) -> int:
    await ctx.save_variable("one by", sys.argv[1])
    return n + 1

@activity.execute()
async def two(one: int) -> int:
    return one * 2

async def main():
    async with Paigeant(Settings(), activities=activity) as app:
        worker = app.worker(concurrency=5)
        working = asyncio.create_task(worker.run())
        print("ready", flush=True)
        await asyncio.to_thread(sys.stdin.read)
        await worker.stop()
        await working

asyncio.run(main())
"""


FORKS = """
import asyncio, os, sys
from paigeant import Workflow, ActivityRegistry
from paigeant.testing import MemoryApp

activity = ActivityRegistry()

def fork(how):
    if child := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if how == "exits":
        sys.exit(3)
    if how == "raises":
        raise ValueError("in the child")
    return "in the child"

@activity.execute(retries=0)
def plain(how: str) -> int:
    return fork(how)

@activity.execute(retries=0)
async def awaited(how: str) -> int:
    ended = fork(how)
    await asyncio.sleep(0)
    return ended

async def main():
    async with MemoryApp(activity) as app:
        run = await app.dispatch(Workflow("w", [sys.argv[1]]), {"how": sys.argv[2]})
        print((await run.wait()).output, flush=True)

asyncio.run(main())
"""


class Logged(logging.Handler):
    """Waits for a log line."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text = text
        self.seen = asyncio.Event()
        self._loop = asyncio.get_running_loop()

    def emit(self, record: logging.LogRecord) -> None:
        if self.text in record.getMessage():
            self._loop.call_soon_threadsafe(self.seen.set)

    async def __aenter__(self) -> Logged:
        logging.getLogger("paigeant").addHandler(self)
        return self

    async def __aexit__(self, *error: object) -> None:
        logging.getLogger("paigeant").removeHandler(self)

    async def wait(self) -> None:
        """Wait until it was written."""
        await asyncio.wait_for(self.seen.wait(), PATIENCE)


@pytest.fixture(params=["memory://", "sqlite:///p.db"], ids=["memory", "sqlite"])
def settings(request: pytest.FixtureRequest) -> Settings:
    """Settings for memory, and for one file. Nothing comes from the sweeper: the grace time is too long for that."""
    return Settings(transport_url=request.param, store_url=request.param, grace=1000.0, retry_base=0.0)


async def test_two_processes_share_the_work_of_one_file() -> None:
    """Workers in other processes do the runs that are dispatched here, each step once, and this process hears of it."""
    children = [
        await asyncio.create_subprocess_exec(
            sys.executable,
            "-c",
            WORKER,
            f"child {n}",
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
        )
        for n in range(2)
    ]
    async with Paigeant() as app:
        for child in children:
            assert child.stdout is not None
            assert await asyncio.wait_for(child.stdout.readline(), PATIENCE) == b"ready\n"
        runs = await asyncio.gather(
            *(app.dispatch(Workflow("w", ["one", "two"]), {"n": n}) for n in range(100))
        )
        results = await asyncio.gather(*(run.wait(PATIENCE) for run in runs))
        workers = {(await app.store.list_variables(run.id))["one by"] for run in runs}
        attempts = {row.attempt for run in runs for row in (await run.detail()).steps}
    for child in children:
        await child.communicate(b"")  # ends its input, which it waits for
    assert [result.output for result in results] == [(n + 1) * 2 for n in range(100)]
    assert workers == {"child 0", "child 1"}
    assert attempts == {1}
    assert [child.returncode for child in children] == [0, 0]


@pytest.mark.parametrize(
    ("activity", "how", "code", "said"),
    [
        ("plain", "exits", 3, ""),
        ("plain", "raises", 1, "in the child"),
        ("plain", "returns", 0, ""),
        ("awaited", "exits", 3, ""),
        ("awaited", "raises", 1, "in the child"),
        ("awaited", "goes on", 1, "can't wait in the event loop"),
    ],
)
def test_what_an_activity_forks_off_does_no_step(activity: str, how: str, code: int, said: str) -> None:
    """It ends where the activity does, like a program, and is no second worker on the connections of its parent."""
    child = subprocess.Popen(
        [sys.executable, "-c", FORKS, activity, how],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        output, errors = child.communicate(timeout=PATIENCE)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
    assert (output, child.returncode) == (f"{code}\n", 0)
    assert said in errors


async def test_what_is_recorded_is_no_error_where_it_can_t_be_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    """A queue with other settings, say: whoever dispatches again for an error would have the work done twice."""
    activity = ActivityRegistry()
    done: list[str] = []

    @activity.execute()
    async def one() -> None:
        done.append("one")

    @activity.execute(topic="other")
    async def two() -> None:
        done.append("two")

    async with MemoryApp(activity, local_steps=1) as app:
        publish, refused = app.transport.publish, set[str]()

        async def refuse_once(topic: str, message: PaigeantMessage, *, delay: float = 0) -> None:
            if topic not in refused:
                refused.add(topic)
                raise ConfigurationError(f"the queue of '{topic}' is there with other settings")
            await publish(topic, message, delay=delay)

        monkeypatch.setattr(app.transport, "publish", refuse_once)
        run = await app.dispatch(Workflow("w", ["one", "two"]))
        await app.drain()
        assert (await run.wait()).status is RunStatus.COMPLETED
    assert (done, refused) == (["one", "two"], {"one", "other"})


@pytest.mark.parametrize("failures", [2, 3])
async def test_a_message_that_can_t_be_handled_doesn_t_come_for_ever(
    settings: Settings, failures: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error that nobody foresaw may pass. After the third time the message is a dead letter that says it."""
    activity = ActivityRegistry()

    @activity.execute()
    async def work() -> str:
        return "done"

    seen = Seen()
    async with Paigeant(settings, activities=activity, observers=[seen]) as app:
        claim, tried = app.store.claim_step, 0

        async def claim_step(request: Any) -> Any:
            nonlocal tried
            if request.key.workflow_id == "odd" and tried < failures:
                tried += 1
                raise RuntimeError("nobody thought of this")
            return await claim(request)

        monkeypatch.setattr(app.store, "claim_step", claim_step)
        odd = await app.dispatch(Workflow("w", ["work"]), workflow_id="odd")
        async with working(app.worker()):
            good = await app.dispatch(Workflow("w", ["work"]), workflow_id="good")
            assert (await good.wait(PATIENCE)).output == "done"
            if failures < 3:
                assert (await odd.wait(PATIENCE)).output == "done"
            else:
                await seen.wait_for("delivery.rejected")
        letters = await app.store.list_dead_letters()
    if failures < 3:
        assert letters == []
    else:
        [letter] = letters
        assert letter.reason == "unhandled"
        assert "it failed 3 times, at last with RuntimeError: nobody thought of this" in letter.detail


async def test_a_message_that_waits_for_its_bound_is_given_back(settings: Settings) -> None:
    """A worker that stops while a message waits for the activity's own bound leaves it to others at once."""
    activity = ActivityRegistry()
    began, go = asyncio.Event(), asyncio.Event()

    @activity.execute(concurrency=1)
    async def narrow() -> str:
        began.set()
        await go.wait()
        return "done"

    async with Paigeant(settings, activities=activity) as app:
        first = app.worker()
        working = asyncio.create_task(first.run())
        runs = [await app.dispatch(Workflow("w", ["narrow"])) for _ in range(3)]
        await asyncio.wait_for(began.wait(), PATIENCE)
        await _taken(app, 1)
        await first.stop(grace=0)
        await working
        go.set()
        second = app.worker()
        working = asyncio.create_task(second.run())
        results = await asyncio.gather(*(run.wait(PATIENCE) for run in runs))
        await second.stop()
        await working
    assert {result.output for result in results} == {"done"}


async def test_the_time_of_an_attempt_begins_with_its_function(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More plain functions than there are threads wait for one, and have all of their time when they have it."""
    monkeypatch.setattr(worker, "_MOST_THREADS", 1)
    activity = ActivityRegistry()
    begun, go = threading.Event(), threading.Event()

    @activity.execute()
    def first() -> None:
        begun.set()
        assert go.wait(PATIENCE)

    @activity.execute(timeout=1.5, retries=0)
    def second() -> str:
        return "done"

    async with Paigeant(settings, activities=activity) as app, working(app.worker(concurrency=5)):
        runs = [await app.dispatch(Workflow("w", ["first"]))]
        assert await asyncio.to_thread(begun.wait, PATIENCE)
        runs.append(await app.dispatch(Workflow("w", ["second"])))
        with pytest.raises(RunTimeout):
            await runs[1].wait(2.0)
        go.set()
        results = [await run.wait(PATIENCE) for run in runs]
    assert [(result.status, result.error) for result in results] == [("completed", None)] * 2


async def test_functions_that_never_return_keep_no_other_from_being_done(settings: Settings) -> None:
    """A plain function can't be interrupted; as many as a worker has places are given up, and the next is done."""
    activity, go = ActivityRegistry(), threading.Event()

    @activity.execute(retries=0, timeout=0.05)
    def stuck() -> None:
        go.wait(PATIENCE)

    @activity.execute(retries=0, timeout=PATIENCE)
    def fine() -> str:
        return "done"

    try:
        async with Paigeant(settings, activities=activity) as app, working(app.worker(concurrency=2)):
            runs = [await app.dispatch(Workflow("w", ["stuck"])) for _ in range(2)]
            assert {(await run.wait(PATIENCE)).status for run in runs} == {RunStatus.FAILED}
            run = await app.dispatch(Workflow("w", ["fine"]))
            assert (await run.wait(PATIENCE)).output == "done"
    finally:
        go.set()


async def test_a_worker_that_was_suspended_goes_on_with_its_steps(
    settings: Settings, clock: ManualClock
) -> None:
    """As a host that sleeps for hours: its lease is over by then, but if nobody else has its steps, it has."""
    activity, go = ActivityRegistry(), asyncio.Event()
    began = asyncio.Event()

    @activity.execute(retries=0)
    async def long() -> str:
        began.set()
        await go.wait()
        return "done"

    settings.sweep_interval = 0.01
    async with Paigeant(settings, activities=activity, clock=clock) as app, working(app.worker()):
        run = await app.dispatch(Workflow("w", ["long"]))
        await asyncio.wait_for(began.wait(), PATIENCE)
        asleep = await app.dispatch(Workflow("asleep", [Sleep(3600)]))
        async with asyncio.timeout(PATIENCE):
            while await asleep.status() is not RunStatus.WAITING:  # noqa: ASYNC110  # nobody is told
                await asyncio.sleep(0.001)
            clock.advance(7200)
            await asleep.wait(PATIENCE)  # a sweep has woken it
        go.set()
        assert (await run.wait(PATIENCE)).output == "done"


async def _taken(app: Paigeant, count: int) -> None:
    """Wait until the worker holds so many messages that it hasn't acked."""
    async with asyncio.timeout(PATIENCE):
        while sum(depth.taken for depth in await app.transport.topics()) < count:  # noqa: ASYNC110  # nobody is told
            await asyncio.sleep(0.001)


async def test_a_full_disk_is_waited_out(tmp_path: Path) -> None:
    """A result that can't be written is kept and tried again: the step isn't done twice."""
    activity = ActivityRegistry()
    done: list[str] = []

    @activity.execute(retries=0)
    async def make() -> str:
        await app.store.save_variable(run.id, "begun", True)
        await pragma(app, "max_page_count=1")  # SQLite takes the size it has
        done.append("make")
        return "x" * 500_000

    async with Paigeant(Settings(), activities=activity) as app, Logged("has to wait") as logged:
        worker = app.worker()
        working = asyncio.create_task(worker.run())
        run = await app.dispatch(Workflow("w", ["make"]), workflow_id="r")
        await logged.wait()
        assert await run.status() == "running"
        await pragma(app, "max_page_count=1000000")
        assert len((await run.wait(PATIENCE)).output) == 500_000
        await worker.stop()
        await working
    assert done == ["make"]


async def pragma(app: Paigeant, text: str) -> None:
    """Set something of the writing connection."""
    assert isinstance(app.store, SqlStore)

    def handler(tx: Any, requests: Any) -> list[None]:
        for request in requests:
            tx.connection.exec_driver_sql(f"PRAGMA {request}")
        return [None] * len(requests)

    await app.store.database.write(handler, text)


async def test_a_run_that_can_t_be_read_hinders_no_other() -> None:
    """A sweeper that meets rows that make no sense says so and goes on with the next."""
    activity = ActivityRegistry()
    activity.execute(name="work")(lambda: "done")
    settings = Settings(transport_url="memory://", store_url="memory://", grace=0.05, sweep_interval=0.02)
    async with Paigeant(settings, activities=activity) as app, Logged("broken") as logged:
        store = app.store
        assert isinstance(store, MemoryStore)
        publish = app.transport.publish

        async def lose(topic: str, message: Any, *, delay: float = 0) -> None:
            """The transport loses what is dispatched: only the sweeper can find it."""

        app.transport.publish = lose  # type: ignore[method-assign]
        await app.dispatch(Workflow("w", ["work"]), workflow_id="broken")
        run = await app.dispatch(Workflow("w", ["work"]), workflow_id="sound")
        app.transport.publish = publish  # type: ignore[method-assign]
        from dataclasses import replace

        store._runs["broken"] = replace(store._runs["broken"], slip=b"{nonsense")
        worker = app.worker()
        working = asyncio.create_task(worker.run())
        assert (await run.wait(PATIENCE)).output == "done"
        await logged.wait()
        await worker.stop()
        await working


async def test_a_run_whose_rows_are_of_newer_code_waits_for_that(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its message is given back as often as it comes, and is no dead letter: others can read the rows."""
    monkeypatch.setattr(executor, "_UNKNOWN_ACTIVITY_PAUSE", 0.01)
    activity = ActivityRegistry()
    activity.execute(name="work")(lambda: "done")
    settings = Settings(transport_url="memory://", store_url="memory://")
    async with Paigeant(settings, activities=activity) as app:
        readable, times = app.forwarder.payload, iter(range(5))

        async def payload(message: PaigeantMessage) -> PaigeantMessage:
            for _ in times:
                TypeAdapter(int).validate_python("of newer code")
            return await readable(message)

        monkeypatch.setattr(app.forwarder, "payload", payload)
        worker = app.worker()
        working = asyncio.create_task(worker.run())
        run = await app.dispatch(Workflow("w", ["work"]))
        assert (await run.wait(PATIENCE)).output == "done"
        assert next(times, None) is None
        assert await app.store.count_dead_letters() == 0
        await worker.stop()
        await working


async def test_a_worker_that_could_not_start_can_be_stopped(tmp_path: Path) -> None:
    """When the store can't be reached run() raises, and stop() returns."""
    app = Paigeant(Settings(), activities=ActivityRegistry())
    worker = app.worker()
    with pytest.raises(StoreUnavailable):
        await worker.run()
    await asyncio.wait_for(worker.stop(), PATIENCE)


async def test_a_worker_that_never_ran_can_be_stopped(settings: Settings) -> None:
    """Stopping it is harmless, and running it then ends at once."""
    async with Paigeant(settings, activities=ActivityRegistry()) as app:
        worker = app.worker()
        await asyncio.wait_for(worker.stop(), PATIENCE)
        await asyncio.wait_for(worker.run(), PATIENCE)


def _one_file(folder: Path, **more: Any) -> Settings:
    url = f"sqlite:///{folder}/p.db"
    return Settings(store_url=url, transport_url=url, **more)


def _endless() -> tuple[ActivityRegistry, asyncio.Event]:
    """An activity `work` that ends when it is cancelled only, and what tells that it has begun."""
    activity, begun = ActivityRegistry(), asyncio.Event()

    @activity.execute()
    async def work() -> None:
        begun.set()
        await asyncio.Event().wait()

    return activity, begun


@pytest.mark.parametrize("fails", [False, True])
async def test_who_leaves_an_application_stops_its_workers(tmp_path: Path, fails: bool) -> None:
    """A step that has begun ends first, unless it is left by an error: then the step is given back, uncounted."""
    settings = _one_file(tmp_path)
    activity = ActivityRegistry()
    begun, left = asyncio.Event(), asyncio.Event()

    @activity.execute()
    async def work() -> str:
        begun.set()
        await left.wait()
        return "done"

    with pytest.raises(ZeroDivisionError) if fails else contextlib.nullcontext():
        async with Paigeant(settings, activities=activity) as app:
            working = asyncio.create_task(app.worker().run())
            run = await app.dispatch(Workflow("w", ["work"]))
            await begun.wait()
            if fails:
                raise ZeroDivisionError
            asyncio.get_running_loop().call_soon(left.set)
    await working
    async with Paigeant(settings) as app:
        [row] = (await app.run(run.id).detail()).steps
    assert (row.status, row.attempt) == (("ready", 0) if fails else ("completed", 1))


@pytest.mark.parametrize("error", [TransportUnavailable("gone"), asyncio.CancelledError()])
async def test_a_transport_that_can_t_be_closed_leaves_no_store_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    """Nobody else would close its connections."""

    async def close() -> None:
        raise error

    urls = [f"sqlite:///{tmp_path / name}.db" for name in ("store", "transport")]
    app = Paigeant(Settings(store_url=urls[0], transport_url=urls[1]))
    with pytest.raises(type(error)):
        async with app:
            monkeypatch.setattr(app.transport, "close", close)
    with pytest.raises(StoreUnavailable, match="is not open"):
        await app.run("r").status()
    monkeypatch.undo()
    await app.transport.close()


async def test_a_worker_that_is_cancelled_twice_has_ended(tmp_path: Path) -> None:
    """As by a second Ctrl-C while its steps are waited for: the application can be left, and the step is free."""
    settings = _one_file(tmp_path)
    activity, begun = _endless()
    async with Paigeant(settings, activities=activity) as app:
        worker = app.worker()
        working = asyncio.create_task(worker.run())
        run = await app.dispatch(Workflow("w", ["work"]))
        await begun.wait()
        working.cancel()
        await asyncio.wait([working], timeout=0.2)
        assert not working.done(), "it waits for the step"
        working.cancel()
        with pytest.raises(asyncio.CancelledError):
            await working
        assert not worker.is_running
    async with Paigeant(settings) as app:
        assert (await app.run(run.id).detail()).steps[0].status == "ready"


async def test_the_grace_that_was_asked_for_stays_where_the_application_is_left(tmp_path: Path) -> None:
    """A worker that stops within a short time doesn't get a longer one; nor does one that is about to begin."""
    settings = _one_file(tmp_path, shutdown_grace=3600)
    activity, begun = _endless()
    async with asyncio.timeout(PATIENCE):
        async with Paigeant(settings, activities=activity) as app:
            worker = app.worker()
            working = asyncio.create_task(worker.run())
            await app.dispatch(Workflow("w", ["work"]))
            await begun.wait()
            stopping = asyncio.create_task(worker.stop(grace=0.1))
            await asyncio.sleep(0)  # so that it has been asked for
            late = app.worker()
            beginning = asyncio.create_task(late.run())
        assert not worker.is_running
        assert not late.is_running
        await asyncio.gather(working, stopping, beginning)


async def test_a_function_that_returns_a_coroutine_keeps_no_thread(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As under a decorator that isn't async: it is awaited in the event loop, and its thread does the next one."""
    monkeypatch.setattr(worker, "_MOST_THREADS", 1)
    activity = ActivityRegistry()
    go = asyncio.Event()

    @activity.execute()
    def first() -> Any:
        return go.wait()

    @activity.execute()
    def second() -> str:
        return "done"

    async with Paigeant(settings, activities=activity) as app, working(app.worker(concurrency=5)):
        waits = await app.dispatch(Workflow("w", ["first"]))
        assert (await (await app.dispatch(Workflow("w", ["second"]))).wait(PATIENCE)).output == "done"
        go.set()
        assert (await waits.wait(PATIENCE)).output is True


async def test_a_lost_message_is_sent_again(settings: Settings) -> None:
    """A dispatch whose message is lost is found by the sweeper, though nobody tells it."""
    activity = ActivityRegistry()
    activity.execute(name="work")(lambda: "done")
    settings = settings.model_copy(
        update={"transport_url": "memory://", "grace": 0.05, "sweep_interval": 0.02}
    )
    async with Paigeant(settings) as lone:
        run = await lone.dispatch(Workflow("w", ["work"]), workflow_id="r")
        async with Paigeant(settings, activities=activity) as app:
            if isinstance(lone.store, MemoryStore):
                app.store._runs, app.store._steps = lone.store._runs, lone.store._steps  # type: ignore[attr-defined]
                app.store._open, app.store._variables = lone.store._open, lone.store._variables  # type: ignore[attr-defined]
            worker = app.worker()
            working = asyncio.create_task(worker.run())
            assert (await app.run(run.id).wait(PATIENCE)).output == "done"
            await worker.stop()
            await working


async def test_a_signal_whose_sender_dies_before_it_wakes_the_step_is_heard_at_once() -> None:
    """The message for the end of the wait is in the same database, and due later: it is no reason to send none."""
    url = "sqlite:///p.db"
    async with (
        Paigeant(Settings(store_url=url, transport_url=url, sweep_interval=0.1)) as app,
        working(app.worker()),
    ):
        run = await app.dispatch(Workflow("w", [WaitFor("paid", timeout=50)]))
        async with asyncio.timeout(PATIENCE):
            while await run.status() is not RunStatus.WAITING:  # noqa: ASYNC110  # it tells only of its end
                await asyncio.sleep(0.01)
        await app.store.record_signal(run.id, "paid", b"1")
        assert (await run.wait(PATIENCE)).output == 1


async def test_the_errors_of_a_group_are_told() -> None:
    """What a TaskGroup raises says by itself only how many went wrong; at night one wants to know what."""
    activity = ActivityRegistry()

    @activity.execute(retries=0)
    async def ask() -> None:
        async def reach(number: int) -> None:
            raise ConnectionError(f"no route to db-{number}, password=hunter2")

        async with asyncio.TaskGroup() as outer:
            outer.create_task(reach(1))
            async with asyncio.TaskGroup() as inner:
                inner.create_task(reach(2))

    async with MemoryApp(activity) as app:
        run = await app.dispatch(Workflow("one", ["ask"]))
        await app.drain()
        error = (await app.store.load_run(run.id)).run.error
    assert error is not None
    assert error.startswith("ask: ExceptionGroup: unhandled errors in a TaskGroup (")
    assert "ConnectionError: no route to db-1, password=***" in error
    assert "ConnectionError: no route to db-2, password=***" in error
