"""Single faults of real processes, each at its worst moment."""

from __future__ import annotations

import contextlib
import signal
import sqlite3
from pathlib import Path
from typing import Any

import pytest
from tests.kill.audit import audit, begun, open_runs, rows
from tests.kill.nursery import Nursery
from tests.kill.roles import BEGAN, LOST, diary, length

pytestmark = pytest.mark.timeout(300)

STEPS = "SELECT * FROM step_executions ORDER BY workflow_id, seq"
RUNS = "SELECT * FROM workflow_runs ORDER BY id"


def has(folder: Path, **wanted: Any) -> bool:
    """Whether the diary has such a record."""
    return any(
        all(getattr(entry, name) == value for name, value in wanted.items()) for entry in diary(folder)
    )


def freeze(nursery: Nursery, pid: int) -> None:
    """Stop a process, though not in the middle of a transaction: no other could write then."""
    while True:
        nursery.send(pid, signal.SIGSTOP)
        with contextlib.closing(sqlite3.connect(nursery.folder / "runs.db", timeout=0.5)) as connection:
            try:
                connection.execute("BEGIN IMMEDIATE")
                connection.rollback()
                return
            except sqlite3.OperationalError:
                nursery.send(pid, signal.SIGCONT)


def test_a_worker_that_was_stopped_changes_nothing_afterwards(tmp_path: Path) -> None:
    """A worker is stopped for longer than its lease and goes on when another has done its steps: no row changes."""
    runs = range(20, 30)
    with Nursery(tmp_path) as nursery:
        nursery.start("dispatcher", begin=20, runs=30)
        nursery.until(lambda: "dispatcher" not in nursery.alive.values())
        asleep = nursery.start("worker", slow=("s0", False))
        nursery.until(lambda: sum(begun(tmp_path).values()) == len(runs))
        freeze(nursery, asleep)
        nursery.start("worker")
        nursery.until(lambda: not open_runs(tmp_path))
        before = rows(tmp_path, STEPS), rows(tmp_path, RUNS)
        nursery.send(asleep, signal.SIGCONT)
        nursery.until(lambda: has(tmp_path, process=asleep, what=LOST))
        nursery.stop(signal.SIGTERM)
        assert set(nursery.ended.values()) == {0}
    assert (rows(tmp_path, STEPS), rows(tmp_path, RUNS)) == before
    assert audit(tmp_path, runs=runs, killed={asleep}) >= len(runs)


def test_a_step_that_kills_its_process_uses_up_its_attempts(tmp_path: Path) -> None:
    """An activity that ends the process is tried as often as it may, then its run is undone; the others go on."""
    runs = range(1, 60)
    with Nursery(tmp_path) as nursery:
        nursery.start("dispatcher", runs=60, first=["work", "poison"])
        nursery.until(lambda: "dispatcher" not in nursery.alive.values())
        while open_runs(tmp_path):
            for _ in range(2 - len(nursery.alive)):
                nursery.start("worker", concurrency=5, pause=0.02)
            nursery.until(lambda: len(nursery.alive) < 2 or not open_runs(tmp_path))
        died = {pid for pid, code in nursery.ended.items() if code == 3}
        nursery.stop(signal.SIGTERM)
    assert (len(died), begun(tmp_path)[0, 1, 0]) == (3, 3)
    assert rows(tmp_path, "SELECT status FROM workflow_runs WHERE id = 'r0'") == [("compensated",)]
    found = rows(
        tmp_path, "SELECT phase, step, status, attempt FROM step_executions WHERE workflow_id = 'r0'"
    )
    assert sorted(found)[:2] == [("do", "s0", "compensated", 1), ("do", "s1", "failed", 3)]
    assert sorted(found)[2][:3] == ("undo", "s0", "compensated")
    audit(tmp_path, runs=runs, killed=died)


def test_a_worker_killed_while_it_undoes(tmp_path: Path) -> None:
    """The second of three undos is cut off by a kill: another worker repeats it, each is recorded once, last first."""
    with Nursery(tmp_path) as nursery:
        nursery.start("dispatcher", runs=1, first=["work", "work", "work", "fail"])
        doomed = nursery.start("worker", slow=("s1", True))
        nursery.until(lambda: has(tmp_path, step=1, undo=1, what=BEGAN))
        nursery.kill(doomed)
        nursery.start("worker")
        nursery.until(lambda: not open_runs(tmp_path))
        nursery.stop(signal.SIGTERM)
    query = "SELECT step, status FROM step_executions WHERE phase = 'undo' ORDER BY seq"
    assert rows(tmp_path, query) == [(step, "compensated") for step in ("s2", "s1", "s0")]
    assert rows(tmp_path, "SELECT status FROM workflow_runs") == [("compensated",)]
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
            with contextlib.closing(sqlite3.connect(tmp_path / "runs.db", timeout=30.0)) as connection:
                connection.execute("DELETE FROM messages")
                connection.commit()
        nursery.until(lambda: "dispatcher" not in nursery.alive.values() and not open_runs(tmp_path))
        nursery.stop(signal.SIGTERM)
    audit(tmp_path, runs=range(500))
