"""Whether the store and the diary of a test agree that all was done, once, and in order."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from itertools import pairwise
from pathlib import Path
from typing import Protocol

from tests.kill.roles import BEGAN, LOST, Record, diary, steps_of
from tests.kill.sql import rows

__all__ = [
    "audit",
    "begun",
    "executions_of",
    "longest_pause",
    "open_runs",
    "recoveries",
    "stragglers",
    "usual_wait",
    "violations",
]

Execution = tuple[int, int, int]
"""A run, the place of a step in it, and whether the step is undone."""

# What may not be, by the rows alone. The number of a run says what it had to do (`steps_of`), that of a step where it
# stands. Each line has the run, and what is wrong with it.
_VIOLATIONS = """
WITH numbered AS (
    SELECT id, status, completed_at, CAST(substr(id, 2) AS INTEGER) AS number FROM workflow_runs
), run AS (
    SELECT id, status, completed_at, 3 + number % 3 AS steps, CASE WHEN number % 10 = 3 THEN 1 ELSE 0 END AS fails
    FROM numbered WHERE number BETWEEN {first} AND {last}
), step AS (
    SELECT workflow_id AS id, phase, CAST(substr(step, 2) AS INTEGER) AS place, seq, status, output, created_at,
        started_at, completed_at
    FROM step_executions WHERE workflow_id IN (SELECT id FROM run)
), done AS (
    SELECT id, count(*) AS steps, count(DISTINCT place) AS places, min(place) AS first, max(place) AS last
    FROM step WHERE phase = 'do' AND status IN ('completed', 'compensated') AND output IS NOT NULL GROUP BY id
), undone AS (
    SELECT id, count(*) AS steps, count(DISTINCT place) AS places
    FROM step WHERE phase = 'undo' AND status = 'compensated' GROUP BY id
)
SELECT id, 'is lost' FROM run WHERE completed_at IS NULL
UNION ALL
SELECT id, 'ended as ' || status FROM run
WHERE status <> CASE fails WHEN 1 THEN 'compensated' ELSE 'completed' END
UNION ALL
SELECT run.id, 'has not one result for each step' FROM run LEFT JOIN done ON done.id = run.id
WHERE done.id IS NULL OR done.steps <> run.steps - run.fails OR done.places <> done.steps
    OR done.first <> 0 OR done.last <> done.steps - 1
UNION ALL
SELECT run.id, 'was not undone once' FROM run LEFT JOIN undone ON undone.id = run.id
WHERE coalesce(undone.steps, 0) <> run.fails * (run.steps - 1) OR undone.places <> undone.steps
UNION ALL
SELECT run.id, 'has ' || count(step.id) || ' rows of steps' FROM run LEFT JOIN step ON step.id = run.id
GROUP BY run.id, run.steps, run.fails HAVING count(step.id) <> run.steps + run.fails * (run.steps - 1)
UNION ALL
SELECT step.id, 'has ' || phase || ' of s' || place || ' ' || step.status FROM step JOIN run ON run.id = step.id
WHERE step.status <> CASE
    WHEN fails = 0 THEN 'completed' WHEN phase = 'do' AND place = steps - 1 THEN 'failed' ELSE 'compensated' END
UNION ALL
SELECT later.id, later.phase || ' of s' || later.place || ' was before ' || earlier.phase || ' of s' || earlier.place
FROM step AS earlier JOIN step AS later ON later.id = earlier.id AND (
    (earlier.phase = 'do' AND later.phase = 'do' AND earlier.place < later.place)
    OR (earlier.phase = 'do' AND later.phase = 'undo')
    OR (earlier.phase = 'undo' AND later.phase = 'undo' AND earlier.place > later.place))
WHERE earlier.seq >= later.seq OR earlier.completed_at > later.started_at
"""


def open_runs(store: str) -> int:
    """Runs that haven't ended."""
    count: int = rows(store, "SELECT count(*) FROM workflow_runs WHERE completed_at IS NULL")[0][0]
    return count


def violations(store: str, runs: Collection[int]) -> list[tuple[str, str]]:
    """All that is wrong by the rows alone with these runs: all that there are from the first to the last of them."""
    first, last = min(runs), max(runs)
    wrong = rows(store, _VIOLATIONS.format(first=first, last=last))
    numbers = f"CAST(substr(id, 2) AS INTEGER) BETWEEN {first} AND {last}"
    [(there,)] = rows(store, f"SELECT count(*) FROM workflow_runs WHERE {numbers}")
    return [*wrong, *([] if there == len(runs) else [("all", f"are {there} runs instead of {len(runs)}")])]


def executions_of(number: int) -> list[Execution]:
    """All that has to be executed for a run."""
    names = steps_of(number)
    undone = range(len(names) - 1) if names[-1] == "fail" else ()
    return [(number, place, 0) for place in range(len(names))] + [(number, place, 1) for place in undone]


def begun(folder: Path) -> Counter[Execution]:
    """How often each step and each undo was executed."""
    return Counter((entry.run, entry.step, entry.undo) for entry in diary(folder) if entry.what == BEGAN)


class Audited(Protocol):
    """What has been done: recorded in a store, and in a diary."""

    folder: Path

    @property
    def store(self) -> str:
        """The url of the store."""


def audit(done: Audited, *, runs: Collection[int], killed: Collection[int] = ()) -> int:
    """Check it all for `runs`, while the processes `killed` were killed. Gives how many executions were repeats."""
    store = done.store
    if store.startswith("sqlite:"):
        assert rows(store, "PRAGMA integrity_check") == [("ok",)]
    wrong = violations(store, runs)
    assert not wrong, f"{len(wrong)} violations: {wrong[:20]}"
    records = [entry for entry in diary(done.folder) if entry.run in runs]
    _check_outputs(store, records, runs)
    return _count_repeats(records, runs, killed)


def recoveries(done: Audited, healed: Collection[float], *, killed: Collection[int] = ()) -> list[float]:
    """For each instant at which a fault was over: how long until every run in flight then had gone on.

    A run goes on when one of its steps is claimed or recorded, or with its end. The row of a step keeps its last claim
    only: of one whose worker is among the processes `killed` the diary tells. Instants are seconds since 1970.
    """
    moves = _moves(done, killed)
    return [max(_waits(moves, heal).values(), default=0.0) for heal in healed]


def stragglers(
    done: Audited, faults: Collection[float], *, within: float, killed: Collection[int] = ()
) -> dict[str, float]:
    """The runs that, after one of these faults with which they were in flight, went on later than `within` seconds.

    By run how long it took, the longest where there were several. What going on is, see `recoveries`.
    """
    late: dict[str, float] = {}
    moves = _moves(done, killed)
    for fault in faults:
        for run, wait in _waits(moves, fault).items():
            if wait > max(within, late.get(run, 0.0)):
                late[run] = wait
    return late


def _waits(moves: dict[str, list[float]], since: float) -> dict[str, float]:
    """For each run that was in flight then, how long it took to go on."""
    in_flight = {run: at for run, at in moves.items() if at[0] < since < at[-1]}
    return {run: min(one for one in at if one > since) - since for run, at in in_flight.items()}


def usual_wait(done: Audited, until: float) -> float:
    """The longest time that a run didn't go on before any fault: what waiting for one's turn takes on this machine."""
    return max(
        (
            later - earlier
            for run in _moves(done, ()).values()
            for earlier, later in pairwise(run)
            if later < until
        ),
        default=0.0,
    )


def _moves(done: Audited, killed: Collection[int]) -> dict[str, list[float]]:
    """For each run the instants at which it began, went on, and ended."""
    moves = {
        run: [created, ended]
        for run, created, ended in rows(done.store, "SELECT id, created_at, completed_at FROM workflow_runs")
    }
    for run, *instants in rows(
        done.store, "SELECT workflow_id, started_at, completed_at FROM step_executions"
    ):
        moves[run] += instants
    for entry in diary(done.folder) if killed else ():
        if entry.what == BEGAN and entry.process in killed:
            moves[f"r{entry.run}"].append(entry.at)
    return {run: sorted(at for at in found if at is not None) for run, found in moves.items()}


def longest_pause(store: str, since: float) -> float:
    """The longest time since then, an instant in seconds since 1970, in which no step was claimed or recorded."""
    query = "SELECT started_at, completed_at FROM step_executions"
    moves = {at for row in rows(store, query) for at in row if at is not None and at > since}
    return max(later - earlier for earlier, later in pairwise(sorted({since, *moves})))


def _check_outputs(store: str, records: list[Record], runs: Collection[int]) -> None:
    """What is recorded as a result is what an execution of this very step gave."""
    tokens = {(e.run, e.step, f'"{e.process}.{e.number}"') for e in records if e.what == BEGAN}
    query = "SELECT workflow_id, step, CAST(output AS TEXT) FROM step_executions WHERE output IS NOT NULL"
    for run, step, output in rows(store, query):
        if int(run[1:]) in runs:
            assert (int(run[1:]), int(step[1:]), output) in tokens, f"{run}: {output} is not what {step} gave"


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
