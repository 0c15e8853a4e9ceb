"""Single faults of real processes, each at its worst moment."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sqlite3
from pathlib import Path

from tests.kill.audit import audit, begun, open_runs
from tests.kill.nursery import ASKING, Nursery
from tests.kill.roles import BEGAN, diary, length
from tests.kill.scenes import has, stop_a_worker_for_longer_than_its_lease
from tests.kill.sql import rows, sqlite_file, write
from tests.patience import PATIENCE

from paigeant.activity import ActivityRegistry
from paigeant.app import Paigeant
from paigeant.context import StepContext
from paigeant.observer import Event
from paigeant.settings import Settings
from paigeant.slip import Step
from paigeant.workflow import Workflow


def freeze(nursery: Nursery, pid: int) -> None:
    """Stop a process, though not in the middle of a transaction: no other could write then."""
    while True:
        nursery.send(pid, signal.SIGSTOP)
        with contextlib.closing(sqlite3.connect(sqlite_file(nursery.store), timeout=0.5)) as connection:
            try:
                connection.execute("BEGIN IMMEDIATE")
                connection.rollback()
                return
            except sqlite3.OperationalError:
                nursery.send(pid, signal.SIGCONT)


def test_a_worker_that_was_stopped_changes_nothing_afterwards(tmp_path: Path) -> None:
    """A worker is stopped for longer than its lease and goes on when another has done its steps: no row changes."""
    with Nursery(tmp_path) as nursery:
        stop_a_worker_for_longer_than_its_lease(nursery, lambda pid: freeze(nursery, pid))


def test_a_step_that_kills_its_process_uses_up_its_attempts(tmp_path: Path) -> None:
    """An activity that ends the process is tried as often as it may, then its run is undone; the others go on."""
    runs = range(1, 60)
    with Nursery(tmp_path) as nursery:
        nursery.start("dispatcher", runs=60, first=["work", "poison"])
        nursery.until(lambda: "dispatcher" not in nursery.alive.values())
        while open_runs(nursery.store):
            for _ in range(2 - len(nursery.alive)):
                nursery.start("worker", concurrency=5, pause=0.02)
            nursery.until(lambda: len(nursery.alive) < 2 or not open_runs(nursery.store), pause=ASKING)
        died = {pid for pid, code in nursery.ended.items() if code == 3}
        nursery.stop(signal.SIGTERM)
    assert (len(died), begun(tmp_path)[0, 1, 0]) == (3, 3)
    assert rows(nursery.store, "SELECT status FROM workflow_runs WHERE id = 'r0'") == [("compensated",)]
    query = "SELECT phase, step, status, attempt FROM step_executions WHERE workflow_id = 'r0'"
    found = rows(nursery.store, query)
    assert sorted(found)[:2] == [("do", "s0", "compensated", 1), ("do", "s1", "failed", 3)]
    assert sorted(found)[2][:3] == ("undo", "s0", "compensated")
    audit(nursery, runs=runs, killed=died)


def test_a_worker_killed_while_it_undoes(tmp_path: Path) -> None:
    """The second of three undos is cut off by a kill: another worker repeats it, each is recorded once, last first."""
    with Nursery(tmp_path) as nursery:
        nursery.start("dispatcher", runs=1, first=["work", "work", "work", "fail"])
        doomed = nursery.start("worker", slow=("s1", True, 30.0))
        nursery.until(lambda: has(nursery, step=1, undo=1, what=BEGAN))
        nursery.kill(doomed)
        nursery.start("worker")
        nursery.until_ended()
        nursery.stop(signal.SIGTERM)
    query = "SELECT step, status FROM step_executions WHERE phase = 'undo' ORDER BY seq"
    assert rows(nursery.store, query) == [(step, "compensated") for step in ("s2", "s1", "s0")]
    assert rows(nursery.store, "SELECT status FROM workflow_runs") == [("compensated",)]
    undone = [
        (entry.step, entry.process == doomed)
        for entry in diary(tmp_path)
        if entry.undo and entry.what == BEGAN
    ]
    assert undone == [(2, True), (1, True), (1, False), (0, False)]


def test_all_messages_are_lost(tmp_path: Path) -> None:
    """With 500 runs in flight the messages are wiped, three times: all runs end, and no step is done twice for it."""
    with Nursery(tmp_path) as nursery:
        nursery.start("dispatcher", runs=500)
        for _ in range(2):
            nursery.start("worker", pause=0.01)
        for amount in (200, 1000, 2000):
            nursery.until(lambda amount=amount: length(tmp_path) >= amount)  # type: ignore[misc]
            write(nursery.store, "DELETE FROM messages")
        nursery.until(lambda: "dispatcher" not in nursery.alive.values())
        nursery.until_ended()
        nursery.stop(signal.SIGTERM)
    audit(nursery, runs=range(500))


async def test_a_claim_that_a_crash_undid_is_taken_up_and_not_doubled(tmp_path: Path) -> None:
    """A claim isn't synced: a crash of the database may undo it. Its worker goes on with the step and begins none."""
    began: list[int] = []
    has_begun, goes_on, claimed_again = asyncio.Event(), asyncio.Event(), asyncio.Event()
    activity = ActivityRegistry()

    class Drops:
        def observe(self, event: Event) -> None:
            if event.name == "delivery.duplicate":
                claimed_again.set()

    @activity.execute()
    async def work(context: StepContext) -> int:
        began.append(context.attempt)
        has_begun.set()
        await goes_on.wait()
        return len(began)

    url = f"sqlite:///{tmp_path / 'runs.db'}"
    settings = Settings(store_url=url, transport_url=url, sweep_interval=0.05, grace=0.1, local_steps=1)
    async with Paigeant(settings, activities=activity, observers=[Drops()]) as app:
        worker = app.worker()
        working = asyncio.create_task(worker.run())
        run = await app.dispatch(Workflow("crash", ["work", Step("work", id="more")]))
        async with asyncio.timeout(PATIENCE):
            await has_begun.wait()
            write(
                url,
                "UPDATE step_executions SET status = 'ready', worker = NULL, epoch = 0, attempt = 0, wake_at = 0",
            )
            await claimed_again.wait()
            goes_on.set()
            result = await run.wait()
        await worker.stop()
        await working
    assert began == [1, 1]  # one attempt for each of the two steps
    assert result.outputs == {"work": 1, "more": 2}
