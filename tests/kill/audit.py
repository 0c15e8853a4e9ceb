"""Whether the file and the diary of a kill test agree that all was done, once, and in order."""

from __future__ import annotations

import contextlib
import sqlite3
from collections import Counter
from collections.abc import Collection
from pathlib import Path
from typing import Any

from tests.kill.roles import BEGAN, LOST, Record, diary, steps_of

__all__ = ["audit", "begun", "executions_of", "open_runs", "rows"]

Execution = tuple[int, int, int]
"""A run, the place of a step in it, and whether the step is undone."""


def rows(folder: Path, query: str) -> list[Any]:
    """What the file says."""
    with contextlib.closing(sqlite3.connect(folder / "runs.db", timeout=30.0)) as connection:
        return connection.execute(query).fetchall()


def open_runs(folder: Path) -> int:
    """Runs that haven't ended."""
    count: int = rows(folder, "SELECT count(*) FROM workflow_runs WHERE completed_at IS NULL")[0][0]
    return count


def executions_of(number: int) -> list[Execution]:
    """All that has to be executed for a run."""
    names = steps_of(number)
    undone = range(len(names) - 1) if names[-1] == "fail" else ()
    return [(number, place, 0) for place in range(len(names))] + [(number, place, 1) for place in undone]


def begun(folder: Path) -> Counter[Execution]:
    """How often each step and each undo was executed."""
    return Counter((entry.run, entry.step, entry.undo) for entry in diary(folder) if entry.what == BEGAN)


def audit(folder: Path, *, runs: Collection[int], killed: Collection[int] = ()) -> int:
    """Check it all for `runs`, while the processes `killed` were killed. Gives how many executions were repeats."""
    assert rows(folder, "PRAGMA integrity_check") == [("ok",)]
    records = [entry for entry in diary(folder) if entry.run in runs]
    tokens = {(e.run, e.step, f'"{e.process}.{e.number}"') for e in records if e.what == BEGAN}
    statuses = {int(run[1:]): status for run, status in rows(folder, "SELECT id, status FROM workflow_runs")}
    steps: dict[int, list[Any]] = {}
    query = "SELECT workflow_id, phase, step, status, output FROM step_executions ORDER BY workflow_id, seq"
    for run, phase, step, status, output in rows(folder, query):
        steps.setdefault(int(run[1:]), []).append((phase, int(step[1:]), status, output))
    for number in runs:
        _check_run(number, statuses.get(number), steps[number], tokens)
    return _count_repeats(records, runs, killed)


def _check_run(number: int, status: str | None, found: list[Any], tokens: set[Any]) -> None:
    """A run ended as it should, with one result for each step, each undone once, the last first."""
    names = steps_of(number)
    fails = names[-1] == "fail"
    good = range(len(names) - fails)
    assert status == ("compensated" if fails else "completed"), f"r{number} is {status}"
    expected = [("do", place, "compensated" if fails else "completed") for place in good]
    if fails:
        expected.append(("do", len(good), "failed"))
        expected += [("undo", place, "compensated") for place in reversed(good)]
    assert [row[:3] for row in found] == expected, f"r{number}"
    for phase, place, _, output in found:
        if phase == "do" and place in good:
            assert (number, place, output) in tokens, f"r{number}: {output} is not what s{place} gave"


def _count_repeats(records: list[Record], runs: Collection[int], killed: Collection[int]) -> int:
    """I16: each execution of a step but one was by a process that was killed.

    Or by one that heard that it had lost the step, as where a machine is too busy to renew a lease in time.
    """
    by: dict[Execution, list[int]] = {}
    for entry in records:
        if entry.what == BEGAN:
            by.setdefault((entry.run, entry.step, entry.undo), []).append(entry.process)
    lost = {(entry.run, entry.step) for entry in records if entry.what == LOST}
    for (run, step, undo), processes in by.items():
        unexplained = [pid for pid in processes if pid not in killed]
        assert len(unexplained) <= 1 or (run, step) in lost, f"r{run}/s{step}/{undo} was done by {processes}"
    assert set(by) == {execution for number in runs for execution in executions_of(number)}
    return sum(len(processes) - 1 for processes in by.values())
