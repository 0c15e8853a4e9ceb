"""The invariants, looked at after each effect on the store: what changed must be a change that may happen.

It knows the rows as they were before. It calls nothing of the engine to judge the engine but the tables of transitions
in `slip.py`, and `fold` where it compares that with its own reckoning (I4).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from paigeant import folding, ledger
from paigeant.ledger import OPEN
from paigeant.slip import RUN_ENDED, RUN_MOVES, STEP_MOVES, Phase, RunStatus, StepStatus
from paigeant.store import RunDetail, RunRecord, StepKey, StepRecord

__all__ = ["Violation", "Watch", "judge_end"]

RESULTS = frozenset(set(StepStatus) - OPEN)
GIVEN = ("input", "output", "revision", "undo_topic", "usage", "completed_at")
Rows = dict[StepKey, StepRecord]


class Violation(AssertionError):
    """An invariant doesn't hold."""


def need(holds: bool, invariant: str, *found: Any) -> None:
    """Raise Violation naming the invariant and what was found, unless it holds."""
    if not holds:
        raise Violation(f"{invariant}: {' '.join(str(part) for part in found)}")


class Watch:
    """Compares the rows of all runs with those of the last look."""

    def __init__(
        self, *, now: Callable[[], float], grace: float, attempts: Callable[[StepKey], int], inline_bytes: int
    ) -> None:
        self._now = now
        self._grace = grace
        self._attempts = attempts
        self._inline_bytes = inline_bytes
        self._runs: dict[str, RunRecord] = {}
        self._rows: dict[str, Rows] = {}
        self._variables: dict[str, dict[str, bytes]] = {}
        self.retried: set[str] = set()
        """Runs that an operator took up again."""
        self.freed: list[tuple[StepRecord, str]] = []
        """Steps that were taken from a worker, as they were before, with the operation that took them."""
        self.went_back: dict[StepKey, int] = {}
        """How often each step went from running to ready."""
        self._spent: dict[StepKey, int] = {}
        """The attempts of each step that failed or were lost."""

    def look(self, store: Any, operation: str) -> None:
        """Raise Violation unless all that `operation` changed is allowed."""
        for run_id in self._runs.keys() - store._runs.keys():
            pruned = operation == "prune_runs" and self._runs[run_id].status in RUN_ENDED
            need(pruned, "I1 a run is gone", run_id, "by", operation)
            self._forget(run_id)
        for run_id, run in store._runs.items():
            rows: Rows = store._steps[run_id]
            before = self._rows.get(run_id)
            if before is None:
                need(run.status in (RunStatus.PENDING, RunStatus.COMPLETED), "I1 a new run", run.status)
                before = {}
            elif (
                run is self._runs[run_id]
                and len(rows) == len(before)
                and all(rows[key] is row for key, row in before.items() if key in rows)
            ):
                continue
            self._changed(store, run, rows, before, operation)
            self._runs[run_id] = run
            self._rows[run_id] = dict(rows)
        for row in store.rows(StepStatus.WAITING):
            there = {
                signal.name
                for signal in store._signals.get(row.key.workflow_id, ())
                if signal.taken_by is None
            }
            missed = there.intersection(json.loads(row.waits_for))
            need(not missed, "I18 waits for what has come", row.key, missed, "after", operation)

    def _forget(self, run_id: str) -> None:
        """Another run may have its id later."""
        del self._runs[run_id], self._rows[run_id]
        for counts in (self._spent, self.went_back):
            for key in [key for key in counts if key.workflow_id == run_id]:
                del counts[key]
        self.retried.discard(run_id)

    def _changed(self, store: Any, run: RunRecord, rows: Rows, before: Rows, operation: str) -> None:
        old_run = self._runs.get(run.id, run)
        by_operator = operation == "retry_run"
        if by_operator and run is not old_run:
            self.retried.add(run.id)
        if run.status is not old_run.status:
            allowed = run.status in RUN_MOVES[old_run.status]
            need(allowed, "I5 the run's state", old_run.status, "to", run.status, "by", operation)
            if old_run.status in RUN_ENDED:
                need(by_operator, "I5 a run left its end", old_run.status, "by", operation)
        for key in before:
            need(key in rows or by_operator, "I2 a row is gone", key, "by", operation)
        for key, row in rows.items():
            if row is not before.get(key):
                self._row(row, before.get(key), run, old_run, rows, operation)
        _cursor(run, rows)
        _itinerary(run, rows)
        _undone(run, rows, retried=run.id in self.retried)
        _variables(store._variables[run.id], rows)
        _folded(store._detail(run.id), self._inline_bytes)
        for key, row in rows.items():
            # The others were looked at when they were written; the clock may have been set back since.
            if row.status is StepStatus.READY and row is not before.get(key):
                waited = min(max(self._now() - row.due_at, self._grace), 30 * self._grace)
                latest = max(self._now(), row.not_before) + waited
                need(row.wake_at <= latest, "I11 nobody looks at", row.key, "before", row.wake_at)
            need(row.status is not StepStatus.RUNNING or bool(row.worker), "I11 nobody runs", row.key)
            need(row.status is not StepStatus.WAITING or not row.worker, "I19 held while it waits", row.key)
            if row.status is StepStatus.WAITING:
                waits_for = json.loads(row.waits_for or b"[]")
                need(bool(waits_for) or row.wake_at < ledger.NEVER, "I11 nothing wakes", row.key)
                there = [
                    signal.name
                    for signal in store._signals.get(run.id, ())
                    if signal.name in waits_for and signal.taken_by is None
                ]
                need(not there, "I11 waits for what is there", row.key, there)

    def _row(
        self,
        row: StepRecord,
        old: StepRecord | None,
        run: RunRecord,
        old_run: RunRecord,
        rows: Rows,
        operation: str,
    ) -> None:
        by_operator = operation == "retry_run"
        if old is None or by_operator:
            self._spent.pop(row.key, None)
        if row.status is not StepStatus.SKIPPED:
            need(row.attempt <= self._attempts(row.key), "I9 attempts of", row.key, row.attempt)
            need(row.attempt >= self._spent.get(row.key, 0), "I9 attempts that ran are forgotten", row.key)
        if old is None:
            need(row.status in OPEN, "I2 a new row with a result", row)
            return
        if by_operator:
            return
        moves = row.status is old.status or row.status in STEP_MOVES[old.status]
        need(moves, "I2 the step's state", row.key, old.status, "to", row.status, "by", operation)
        taken = row.status is StepStatus.RUNNING and old.status in (StepStatus.READY, StepStatus.WAITING)
        if taken:
            need(row.epoch == old.epoch + 1, "I8 the epoch of a claim", old.epoch, "to", row.epoch)
            need(row.attempt in (old.attempt, old.attempt + 1), "I9 the attempt of a claim", row.key)
            due = old.wake_at if old.status is StepStatus.WAITING else old.not_before
            need(due <= self._now(), "I14 claimed before its time", row.key)
        else:
            need(row.epoch >= old.epoch, "I8 the epoch fell", row.key, old.epoch, "to", row.epoch)
            need(row.status is not StepStatus.RUNNING, "I8 taken without a claim", row.key, operation)
        if old.status in RESULTS:
            kept = all(getattr(row, name) == getattr(old, name) for name in GIVEN)
            need(kept, "I2 a result changed", row.key, "by", operation)
            if row.status is not old.status:
                undo = rows.get(row.key._replace(phase=Phase.UNDO))
                agrees = undo is not None and undo.status is row.status
                need(agrees, "I2 a result changed its state", row.key, old.status, row.status)
        elif row.status in RESULTS and row.status is not StepStatus.FAILED:
            left = RunStatus.RUNNING if row.phase is Phase.DO else RunStatus.COMPENSATING
            need(old_run.status is left, "I7 a result after the run left", left, row.key, old_run.status)
        if old.status is StepStatus.RUNNING and row.status in (StepStatus.READY, StepStatus.WAITING):
            self.went_back[row.key] = self.went_back.get(row.key, 0) + 1
            if operation != "record_step_result":
                self.freed.append((old, operation))
            if row.status is StepStatus.READY and operation not in ("release_steps", "sign_off"):
                self._spent[row.key] = old.attempt


def _cursor(run: RunRecord, rows: Rows) -> None:
    opened = [row for row in rows.values() if row.status in OPEN]
    need(len(opened) == (run.status not in RUN_ENDED), "I4 open steps of a run", run.status, opened)
    for row in opened:
        phase = Phase.UNDO if run.status is RunStatus.COMPENSATING else Phase.DO
        need(row.phase is phase, "I4 a run that is", run.status, "has open", row.key)


def _itinerary(run: RunRecord, rows: Rows) -> None:
    """I3, I4, I17: the recorded steps are the itinerary's, in its order, revised by recorded results alone."""
    left = [step["id"] for step in json.loads(run.slip).get("itinerary", ())]
    done = sorted((row for row in rows.values() if row.phase is Phase.DO), key=lambda row: row.seq)
    for row in done:
        need(bool(left) and left[0] == row.step, "I3 the itinerary says", left[:1], "the rows say", row.step)
        if row.status in OPEN or row.status is StepStatus.FAILED:
            need(row is done[-1], "I3 something follows", row.key, "which is", row.status)
        if row.revision is not None:
            need(row.status not in OPEN, "I17 a revision without a result", row.key)
            left = [step["id"] for step in json.loads(row.revision).get("itinerary", ())]
        elif row.status not in OPEN and row.status is not StepStatus.FAILED:
            left = left[1:]
    need(run.status is not RunStatus.COMPLETED or not left, "I3 completed with steps left:", left)


def _undone(run: RunRecord, rows: Rows, *, retried: bool) -> None:
    """I6: only recorded steps are undone, last first, and the run's end says how that went."""
    done = sorted((row for row in rows.values() if row.phase is Phase.DO), key=lambda row: row.seq)
    to_undo = [
        row.step
        for row in reversed(done)
        if row.undo_topic is not None and row.status not in OPEN and row.status is not StepStatus.FAILED
    ]
    undos = sorted((row for row in rows.values() if row.phase is Phase.UNDO), key=lambda row: row.seq)
    steps = [row.step for row in undos]
    if retried:
        need(set(steps) <= set(to_undo), "I6 undone", steps, "of", to_undo)
    else:
        need(steps == to_undo[: len(steps)], "I6 undone", steps, "of", to_undo)
    finished = [row.step for row in undos if row.status is StepStatus.COMPENSATED]
    match run.status:
        case RunStatus.COMPLETED:
            need(not undos, "I5 completed and undone", steps)
            need(run.ending is None, "I5 completed, ending", run.ending)
        case RunStatus.COMPENSATED:
            need(bool(to_undo) and set(finished) == set(to_undo), "I6 compensated", finished, "of", to_undo)
            need(run.ending == "failed", "I5 compensated, ending", run.ending)
        case RunStatus.CANCELLED:
            need(set(finished) == set(to_undo), "I6 cancelled, undone", finished, "of", to_undo)
            need(run.ending == "cancelled", "I5 cancelled, ending", run.ending)
        case RunStatus.FAILED:
            need(not to_undo, "I6 failed with steps to undo", to_undo)
            need(run.ending == "failed", "I5 failed, ending", run.ending)
        case RunStatus.COMPENSATION_FAILED:
            need(len(finished) < len(steps), "I6 compensation_failed, but undone are", finished)


def _variables(variables: dict[str, bytes], rows: Rows) -> None:
    """A variable is that of the recorded result, and there is none without it."""
    for name, value in variables.items():
        row = rows.get(StepKey(next(iter(rows)).workflow_id, name.removeprefix("v_"), Phase.DO))
        need(row is not None and row.output == value, "I17 a variable without its result", name, value)


def _folded(detail: RunDetail, inline_bytes: int) -> None:
    if detail.run.status in RUN_ENDED:
        return
    slip, _ = folding.fold(detail, inline_bytes=inline_bytes)
    due = slip.next_step() or slip.next_undo()
    opened = next(row for row in detail.steps if row.status in OPEN)
    named = getattr(due, "id", None) or getattr(due, "step_id", None)
    need(named == opened.step, "I4 the rows fold to", named, "the cursor is", opened.key)


def judge_end(store: Any) -> None:
    """I1: once faults have stopped, each run ends."""
    for run in store._runs.values():
        rows = [(row.step, row.phase.value, row.status.value) for row in store._steps[run.id].values()]
        need(run.status in RUN_ENDED, "I1 lost:", run.id, "is", run.status, "with", rows)
