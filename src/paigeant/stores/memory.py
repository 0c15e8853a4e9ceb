"""Runs in the memory of this process: for tests, and for work that may be lost with the process.

It loads and writes values in dicts; what may change is decided in `ledger.py`, the same as for SQL.
"""

from __future__ import annotations

import asyncio
import math
import threading
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Any

from pydantic_core import from_json

from paigeant import codec, interventions, ledger
from paigeant.clock import Clock, SystemClock
from paigeant.errors import InputInvalid, InvalidTransition, RunConflict, RunNotFound
from paigeant.identity import GRANT_SIGNAL
from paigeant.ledger import OPEN, Changes, Head
from paigeant.slip import RUN_ENDED, Phase, RunStatus, StepStatus
from paigeant.store import (
    ClaimRequest,
    DeadLetter,
    Grant,
    NextStep,
    OpenTopic,
    Recorded,
    Refused,
    Request,
    RunDetail,
    RunRecord,
    Signal,
    StepKey,
    StepRecord,
    StepResult,
    Swept,
    WorkerRecord,
)
from paigeant.transport import Posting, Transport

__all__ = ["MemoryStore"]

Running = Collection[tuple[StepKey, int]]


class MemoryStore:
    """Records runs in this object. No method awaits while it works, and one at a time changes anything."""

    publishes = False

    def __init__(self, *, clock: Clock | None = None, grace: float = 10.0, inline_bytes: int = 65536) -> None:
        self.clock = clock or SystemClock()
        self.grace = grace
        self.inline_bytes = inline_bytes
        self._runs: dict[str, RunRecord] = {}
        self._steps: dict[str, dict[StepKey, StepRecord]] = {}
        self._variables: dict[str, dict[str, bytes]] = {}
        self._signals: dict[str, list[Signal]] = {}
        self._units: dict[tuple[StepKey, str], bytes] = {}
        self._requests: dict[str, Request] = {}
        self._workers: dict[str, WorkerRecord] = {}
        self._letters: dict[str, DeadLetter] = {}
        self._ended: dict[str, asyncio.Event] = {}
        self._turned: list[Callable[[], None]] = []
        self._open: dict[StepKey, StepRecord] = {}
        # `beat` comes from a thread of its own, all else from the event loop.
        self._lock = threading.RLock()

    async def connect(self) -> None:
        """Nothing to open."""

    async def close(self) -> None:
        """Nothing to close."""

    async def now(self) -> float:
        return self.clock.now()

    # -- a run's life

    async def record_workflow_start(
        self, run: RunRecord, first: NextStep | None, posting: Posting | None = None, *, is_new: bool = False
    ) -> bool:
        with self._lock:
            there = self._runs.get(run.id)
            if there is not None:
                if (there.workflow, there.input_hash) == (run.workflow, run.input_hash):
                    return False
                same = there.workflow == run.workflow
                raise RunConflict(run.id, "another input" if same else f"workflow '{there.workflow}'")
            now = self.clock.now()
            self._runs[run.id] = replace(run, created_at=now)
            self._steps[run.id] = {}
            self._variables[run.id] = {}
            if first is None:
                patch = {"status": RunStatus.COMPLETED, "started_at": now, "completed_at": now}
                self._write(Changes(runs=[(run.id, patch)]))
                return True
            row = StepRecord(
                *first.key,
                seq=0,
                activity=first.activity,
                topic=first.topic,
                status=StepStatus.READY,
                not_before=first.not_before,
                wake_at=max(now, first.not_before) + (self.grace if first.is_sent else 0.0),
                created_at=now,
            )
            self._write(Changes(added=[row]))
            return True

    async def adopt_run(
        self, run: RunRecord, steps: Collection[StepRecord], variables: Mapping[str, bytes]
    ) -> bool:
        with self._lock:
            if run.id in self._runs:
                return False
            now = self.clock.now()
            self._runs[run.id] = replace(run, created_at=now, started_at=now)
            self._steps[run.id] = {}
            self._variables[run.id] = dict(variables)
            self._write(Changes(added=[ledger.adopted(row, now=now, grace=self.grace) for row in steps]))
            return True

    async def claim_step(self, request: ClaimRequest) -> Grant | Refused:
        with self._lock:
            changes = Changes()
            answer = ledger.claim(self._head(request.key), request, changes, now=self.clock.now())
            self._write(changes)
            return answer

    async def record_step_result(
        self, result: StepResult, posting: Posting | None = None
    ) -> Recorded | Refused:
        with self._lock:
            changes = Changes()
            head = self._head(result.key)
            untaken = [
                signal.name
                for signal in self._signals.get(result.key.workflow_id, ())
                if signal.taken_by is None
            ]
            answer = ledger.record(
                head, result, changes, now=self.clock.now(), grace=self.grace, arrived=untaken
            )
            self._write(changes)
            return answer

    async def release_steps(self, worker: str, steps: Running) -> list[StepKey]:
        with self._lock:
            changes = Changes()
            now = self.clock.now()
            released = [
                key
                for key, epoch in steps
                if ledger.release(self._head(key), worker, epoch, changes, now=now, grace=self.grace)
            ]
            self._write(changes)
            return released

    # -- leases

    def beat(
        self, worker: WorkerRecord, *, lease: float, running: Running, forgotten: Running = ()
    ) -> tuple[set[tuple[StepKey, int]], set[tuple[StepKey, int]]]:
        with self._lock:
            now = self.clock.now()
            self._workers[worker.id] = replace(worker, lease_until=now + lease)
            held = {(row.key, row.epoch) for row in self.rows(StepStatus.RUNNING) if row.worker == worker.id}
            changes = Changes()
            for step in set(forgotten) & held:
                ledger.free(step[0], changes, now=now)
                held.discard(step)
            self._write(changes)
            return set(running) - held, held - set(running)

    async def sign_off(self, worker_id: str) -> None:
        with self._lock:
            changes = Changes()
            now = self.clock.now()
            for row in self.rows(StepStatus.RUNNING):
                ledger.release(self._head(row.key), worker_id, row.epoch, changes, now=now, grace=0.0)
            self._write(changes)
            self._workers.pop(worker_id, None)

    async def sweep(
        self,
        *,
        gone: Collection[str] = (),
        spare: Collection[str] = (),
        empty: Collection[str] = (),
        topics: Collection[str] | None = None,
        limit: int = 500,
    ) -> Swept:
        with self._lock:
            now = self.clock.now()
            lost = self._lost(now, gone, spare)
            freed = self._freed(now, limit)
            expired, failed = self._expired(now, limit)
            self._wake(now, limit)
            due = self._due(now, empty, topics, limit, has_lost=bool(lost))
            return Swept(due, lost, freed, expired, failed, now)

    def _lost(self, now: float, gone: Collection[str], spare: Collection[str]) -> tuple[str, ...]:
        lost = tuple(
            worker.id
            for worker in self._workers.values()
            if (worker.lease_until <= now and worker.id not in spare) or worker.id in gone
        )
        for worker_id in lost:
            del self._workers[worker_id]
        return lost

    def _freed(self, now: float, limit: int) -> tuple[StepKey, ...]:
        """The steps whose worker is no more; they are put back to work."""
        changes = Changes()
        orphans = [row.key for row in self.rows(StepStatus.RUNNING) if row.worker not in self._workers]
        for key in orphans[:limit]:
            ledger.free(key, changes, now=now)
        self._write(changes)
        return tuple(orphans[:limit])

    def _expired(self, now: float, limit: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The runs that are over their deadline; they turn round, and those of them that have failed with it."""
        expired: dict[str, RunStatus] = {}
        late = [run.id for run in self._runs.values() if run.deadline is not None and run.deadline <= now]
        for run_id in late[:limit]:
            changes = Changes()
            status = interventions.expire(
                self._detail(run_id), changes, now=now, inline_bytes=self.inline_bytes
            )
            if status is not None:
                expired[run_id] = status
                self._write(changes)
        return tuple(expired), tuple(run_id for run_id in expired if expired[run_id] is RunStatus.FAILED)

    def _wake(self, now: float, limit: int) -> None:
        """Have the steps whose wait is over done."""
        changes = Changes()
        for row in [row for row in self.rows(StepStatus.WAITING) if row.wake_at <= now][:limit]:
            ledger.wake(row.key, changes, now=now)
        self._write(changes)

    def _due(
        self,
        now: float,
        empty: Collection[str],
        topics: Collection[str] | None,
        limit: int,
        *,
        has_lost: bool,
    ) -> tuple[StepKey, ...]:
        """The steps whose message may be lost; nobody looks for them again before their time."""
        # A worker that is lost had fetched messages, the oldest first, and which ones nobody knows.
        overdue_since = now - self.grace if has_lost else -math.inf

        def is_due(row: StepRecord) -> bool:
            if row.wake_at <= now or row.due_at <= overdue_since:
                return True
            return row.topic in empty and ledger.is_resendable(
                wake_at=row.wake_at, due_at=row.due_at, now=now, grace=self.grace
            )

        changes = Changes()
        ready = [
            row
            for row in self.rows(StepStatus.READY)
            if (topics is None or row.topic in topics) and is_due(row)
        ]
        oldest_first = has_lost or bool(empty)
        due = sorted(ready, key=lambda row: row.due_at if oldest_first else row.wake_at)[:limit]
        for row in due:
            ledger.postpone(row.key, changes, now=now, due_at=row.due_at, grace=self.grace)
        self._write(changes)
        return tuple(row.key for row in due)

    # -- operators

    async def cancel_run(self, workflow_id: str, reason: str) -> RunStatus:
        with self._lock:
            changes = Changes()
            status = interventions.stop(
                self._detail(workflow_id),
                RunStatus.CANCELLED,
                reason,
                changes,
                now=self.clock.now(),
                inline_bytes=self.inline_bytes,
            )
            self._write(changes)
            for heard in tuple(self._turned):
                heard()
            return status

    async def retry_run(self, workflow_id: str) -> RunStatus:
        with self._lock:
            changes = Changes()
            detail = self._detail(workflow_id)
            status = interventions.resume(
                detail, changes, now=self.clock.now(), inline_bytes=self.inline_bytes
            )
            self._write(changes)
            self._ended.pop(workflow_id, None)
            return status

    async def count_ended(self, *, before: float, statuses: Collection[RunStatus] | None = None) -> int:
        return len(self._ended_runs(before, statuses))

    async def prune_runs(
        self, *, before: float, statuses: Collection[RunStatus] | None = None, limit: int = 500
    ) -> int:
        with self._lock:
            gone = set(self._ended_runs(before, statuses)[:limit])
            for run_id in gone:
                for kept in (self._runs, self._steps, self._variables, self._signals, self._ended):
                    kept.pop(run_id, None)
            self._requests = {
                id_: asked for id_, asked in self._requests.items() if asked.workflow_id not in gone
            }
            self._units = {key: value for key, value in self._units.items() if key[0].workflow_id not in gone}
            self._letters = {
                id_: letter for id_, letter in self._letters.items() if letter.workflow_id not in gone
            }
            return len(gone)

    def _ended_runs(self, before: float, statuses: Collection[RunStatus] | None) -> list[str]:
        found = [
            run
            for run in self._runs.values()
            if run.status in RUN_ENDED
            and (statuses is None or run.status in statuses)
            and run.completed_at is not None
            and run.completed_at < before
        ]
        return [run.id for run in sorted(found, key=lambda run: (run.created_at, run.id))]

    async def open_steps(self, workflow_id: str) -> list[StepKey]:
        rows = self._steps.get(workflow_id, {}).values()
        return [row.key for row in rows if row.status is StepStatus.READY]

    async def has_open(self, topics: Collection[str]) -> bool:
        with self._lock:
            return any(row.topic in topics and not _waits_for_others(row) for row in self._open.values())

    def on_turn(self, heard: Callable[[], None]) -> Callable[[], None]:
        self._turned.append(heard)
        return lambda: self._turned.remove(heard)

    def publish_with(self, transport: Transport) -> None:
        raise NotImplementedError("no transport joins a store in memory")

    # -- values of a run

    async def load_output(self, workflow_id: str, step: str) -> bytes | None:
        row = self._steps.get(workflow_id, {}).get(StepKey(workflow_id, step, Phase.DO))
        return None if row is None else row.output

    async def save_variable(self, workflow_id: str, key: str, value: Any) -> None:
        try:
            text = codec.dump(value)
        except codec.JsonInvalid as exc:
            raise InputInvalid(f"variable '{key}' can't be written as JSON: {exc}") from exc
        self._run(workflow_id)
        self._variables[workflow_id][key] = text

    async def load_variable(self, workflow_id: str, key: str, default: Any = None) -> Any:
        text = self._variables.get(workflow_id, {}).get(key)
        return default if text is None else from_json(text)

    async def save_unit(self, key: StepKey, name: str, value: bytes) -> bytes:
        return self._units.setdefault((key, name), value)

    async def load_unit(self, key: StepKey, name: str) -> bytes | None:
        return self._units.get((key, name))

    async def load_units(self, key: StepKey) -> dict[str, bytes]:
        return {name: value for (owner, name), value in self._units.items() if owner == key}

    async def take_signal(
        self, key: StepKey, unit: str, name: str, *, otherwise: bytes | None = None
    ) -> bytes | None:
        with self._lock:
            if (key, unit) not in self._units:
                signals = self._signals.get(key.workflow_id, [])
                for place, signal in enumerate(signals):
                    if signal.name == name and signal.taken_by is None:
                        signals[place] = replace(signal, taken_by=key.step)
                        self._units[key, unit] = signal.envelope
                        break
                else:
                    if otherwise is not None:
                        self._units[key, unit] = otherwise
            return self._units.get((key, unit))

    async def record_signal(self, workflow_id: str, name: str, value: bytes, *, sender: str = "") -> None:
        with self._lock:
            run = self._run(workflow_id)
            if run.status in RUN_ENDED:
                raise InvalidTransition(
                    f"run '{workflow_id}' has ended {run.status.value}; it takes no signals"
                )
            now = self.clock.now()
            self._signals.setdefault(workflow_id, []).append(Signal(name, value, now, sender))
            changes = Changes()
            for row in self._steps[workflow_id].values():
                if row.status is StepStatus.WAITING and name in from_json(row.waits_for or b"[]"):
                    ledger.wake(row.key, changes, now=now)
            self._write(changes)

    async def record_grant(
        self, workflow_id: str, *, headers: Mapping[str, str] | None = None, sender: str = ""
    ) -> list[StepKey]:
        with self._lock:
            run = self._run(workflow_id)
            if run.status in RUN_ENDED:
                raise InvalidTransition(
                    f"run '{workflow_id}' has ended {run.status.value}; it takes no grants"
                )
            now = self.clock.now()
            waiting = [
                row.key
                for row in self._steps[workflow_id].values()
                if row.status is StepStatus.WAITING and GRANT_SIGNAL in from_json(row.waits_for or b"[]")
            ]
            changes = Changes()
            interventions.grant(workflow_id, waiting, headers, changes, now=now, grace=self.grace)
            if headers is not None:
                signals = self._signals.setdefault(workflow_id, [])
                signals.append(Signal(GRANT_SIGNAL, b"null", now, sender))
            self._write(changes)
            return waiting

    # -- requests

    async def open_request(self, request: Request) -> bool:
        is_new = request.id not in self._requests
        self._requests.setdefault(request.id, replace(request, created_at=self.clock.now()))
        return is_new

    async def load_request(self, request_id: str) -> Request | None:
        request = self._requests.get(request_id)
        return None if request is None else self._as_it_stands(request)

    async def list_requests(
        self, *, workflow_id: str | None = None, only_open: bool = True, limit: int = 100
    ) -> list[Request]:
        found = [
            self._as_it_stands(request)
            for request in sorted(
                self._requests.values(), key=lambda request: (request.created_at, request.id)
            )
            if workflow_id is None or request.workflow_id == workflow_id
        ]
        return [request for request in found if request.is_open or not only_open][:limit]

    async def answer_request(self, request_id: str, answer: bytes, *, sender: str = "") -> Request:
        with self._lock:
            request = await self.load_request(request_id)
            if interventions.answers(request_id, request, answer):
                assert request is not None, "it can be answered"
                await self.record_signal(request.workflow_id, request.signal, answer, sender=sender)
            answered = await self.load_request(request_id)
            assert answered is not None, "it is there"
            return answered

    def _as_it_stands(self, request: Request) -> Request:
        rows = self._steps.get(request.workflow_id, {}).values()
        waits = any(row.step == request.step and row.status in OPEN for row in rows)
        answers = [
            signal for signal in self._signals.get(request.workflow_id, ()) if signal.name == request.signal
        ]
        return request.with_answer(answers[0] if answers else None, self.clock.now(), waits=waits)

    # -- history

    async def wait_ended(self, workflow_id: str) -> RunStatus:
        while (status := self._run(workflow_id).status) not in RUN_ENDED:
            await self._ended.setdefault(workflow_id, asyncio.Event()).wait()
        return status

    async def run_status(self, workflow_id: str) -> RunStatus:
        return self._run(workflow_id).status

    async def load_run(self, workflow_id: str, *, inline_bytes: int | None = None) -> RunDetail:
        detail = self._detail(workflow_id)
        if inline_bytes is None:
            return detail
        large = {row.step for row in detail.steps if len(row.output or b"") > inline_bytes}
        steps = tuple(replace(row, output=None) if row.step in large else row for row in detail.steps)
        return replace(detail, steps=steps, stored=frozenset(large))

    async def list_runs(
        self,
        *,
        status: RunStatus | None = None,
        workflow: str | None = None,
        limit: int = 50,
        before: tuple[float, str] | None = None,
    ) -> list[RunRecord]:
        found = [
            replace(run, input=b"", slip=b"")
            for run in self._runs.values()
            if (status is None or run.status is status)
            and (workflow is None or run.workflow == workflow)
            and (before is None or (run.created_at, run.id) < before)
        ]
        return sorted(found, key=lambda run: (run.created_at, run.id), reverse=True)[:limit]

    async def list_variables(self, workflow_id: str) -> dict[str, Any]:
        return {name: from_json(value) for name, value in self._detail(workflow_id).variables.items()}

    async def list_workers(self) -> list[WorkerRecord]:
        return list(self._workers.values())

    async def open_topics(self) -> list[OpenTopic]:
        now = self.clock.now()
        found = []
        with self._lock:
            ready, running = self.rows(StepStatus.READY), self.rows(StepStatus.RUNNING)
            for topic in sorted({row.topic for row in ready + running}):
                instants = [row.due_at for row in ready if row.topic == topic]
                due = [instant for instant in instants if instant <= now]
                busy = sum(row.topic == topic for row in running)
                oldest = now - min(due) if due else None
                found.append(OpenTopic(topic, len(due), len(instants) - len(due), busy, oldest))
        return found

    # -- dead letters

    async def bury(self, letter: DeadLetter) -> None:
        created = letter.created_at or self.clock.now()
        self._letters.setdefault(letter.id, replace(letter, created_at=created))

    async def list_dead_letters(self, *, limit: int = 100) -> list[DeadLetter]:
        letters = sorted(self._letters.values(), key=lambda letter: letter.created_at, reverse=True)
        return [replace(letter, body=b"") for letter in letters[:limit]]

    async def count_dead_letters(self) -> int:
        return len(self._letters)

    async def count_stray_letters(self, *, before: float) -> int:
        return len(self._strays(before))

    async def prune_stray_letters(self, *, before: float, limit: int = 500) -> int:
        gone = self._strays(before)[:limit]
        for letter in gone:
            del self._letters[letter]
        return len(gone)

    def _strays(self, before: float) -> list[str]:
        return [
            letter.id
            for letter in self._letters.values()
            if letter.created_at < before and letter.workflow_id not in self._runs
        ]

    async def load_dead_letter(self, letter_id: str) -> DeadLetter | None:
        return self._letters.get(letter_id)

    async def delete_dead_letter(self, letter_id: str) -> bool:
        return self._letters.pop(letter_id, None) is not None

    # -- rows

    def rows(self, status: StepStatus) -> list[StepRecord]:
        """The open steps in this state."""
        with self._lock:
            return [row for row in self._open.values() if row.status is status]

    def _run(self, workflow_id: str) -> RunRecord:
        if workflow_id not in self._runs:
            raise RunNotFound(workflow_id)
        return self._runs[workflow_id]

    def _head(self, key: StepKey) -> Head | None:
        row = self._steps.get(key.workflow_id, {}).get(key)
        if row is None:
            return None
        run = self._runs[key.workflow_id].status
        return Head(
            key,
            row.seq,
            run,
            row.status,
            row.epoch,
            row.attempt,
            row.worker,
            row.not_before,
            row.wake_at,
            row.created_at,
        )

    def _detail(self, workflow_id: str) -> RunDetail:
        run = self._run(workflow_id)
        steps = sorted(self._steps[workflow_id].values(), key=lambda row: row.seq)
        signals = tuple(self._signals.get(workflow_id, ()))
        return RunDetail(run, tuple(steps), dict(self._variables[workflow_id]), signals)

    def _write(self, changes: Changes) -> None:
        for key in changes.dropped:
            del self._steps[key.workflow_id][key]
        for key in changes.renewed:
            units = {name: value for (owner, name), value in self._units.items() if owner == key}
            for name in interventions.done_anew(units):
                del self._units[key, name]
        for key, patch in changes.steps:
            self._put(replace(self._steps[key.workflow_id][key], **patch))
        for row in changes.added:
            assert row.key not in self._steps[row.workflow_id], f"{row.key} is there already"
            self._put(row)
        for workflow_id, patch in changes.runs:
            run = replace(self._runs[workflow_id], **patch)
            self._runs[workflow_id] = run
            if run.status in RUN_ENDED and workflow_id in self._ended:
                self._ended[workflow_id].set()
        for workflow_id, name, value in changes.variables:
            self._variables[workflow_id][name] = value
        for workflow_id in {key.workflow_id for key, _ in changes.steps}:
            cursors = [row.key for row in self._steps[workflow_id].values() if row.status in OPEN]
            assert len(cursors) <= 1, f"a run has one cursor, found {cursors}"

    def _put(self, row: StepRecord) -> None:
        self._steps[row.workflow_id][row.key] = row
        if row.status in OPEN:
            self._open[row.key] = row
        else:
            self._open.pop(row.key, None)


def _waits_for_others(row: StepRecord) -> bool:
    """Whether a step waits for somebody outside, and not only for its time."""
    return row.status is StepStatus.WAITING and row.waits_for not in (None, b"[]")
