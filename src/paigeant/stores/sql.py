"""The SQL store. It loads and writes rows; what may change is decided in `ledger.py`.

Each method hands a request to a handler; requests of one kind that meet in a transaction are done together, with one
multi-row statement for each kind of change.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple, Protocol, runtime_checkable

from pydantic_core import from_json
from sqlalchemy import (
    Select,
    Text,
    and_,
    bindparam,
    cast,
    delete,
    func,
    insert,
    or_,
    select,
    tuple_,
)

from paigeant import codec, inbox, ledger
from paigeant.database import Database
from paigeant.errors import (
    InputInvalid,
    InvalidTransition,
    PaigeantError,
    RequestNotFound,
    RunConflict,
    RunNotFound,
)
from paigeant.lane import Tx, needing
from paigeant.ledger import Changes
from paigeant.message import MessageId
from paigeant.prepared import Prepared, upsert
from paigeant.rows import (
    KEY,
    NEW_RUN,
    NEW_STEP,
    STARTED,
    detail_of,
    details_of,
    due_steps,
    encoded,
    heads_of,
    is_in,
    key_of,
    late_runs,
    lock_runs,
    new_run,
    new_step,
    open_topics,
    orphan_steps,
    patch_rows,
    run_of,
    save_units,
    save_variables,
    statuses_of,
    unit_of,
    units_of,
    variable_in,
    waiting_steps,
)
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
    StepKey,
    StepRecord,
    StepResult,
    Swept,
    WorkerRecord,
)
from paigeant.tables import (
    dead_letters,
    step_executions,
    step_units,
    workers,
    workflow_requests,
    workflow_runs,
    workflow_signals,
    workflow_variables,
)
from paigeant.transport import Posting, Transport
from paigeant.waiters import Waiters, ended

__all__ = ["SqlStore"]


@runtime_checkable
class Outbox(Protocol):
    """The part of a transport that works within a store's transactions, when both are one database."""

    def post(self, tx: Tx, postings: Sequence[Posting]) -> None:
        """Write messages."""
        ...

    def waiting(self, tx: Tx, message_ids: Sequence[str]) -> set[str]:
        """Those of the messages that are still there, taken or not."""
        ...


Running = Collection[tuple[StepKey, int]]


_BEAT = upsert(
    workers,
    ["id", "host", "process", "lease_until"],
    key=["id"],
    update=lambda new: {"host": new.host, "process": new.process, "lease_until": new.lease_until},
)
_HELD = Prepared(
    select(*KEY, step_executions.c.epoch).where(
        is_in(StepStatus.RUNNING), step_executions.c.worker == bindparam("of_worker")
    ),
    ["of_worker"],
)
_BURY = upsert(dead_letters, [column.name for column in dead_letters.c], key=["id"], update=None)


class _Start(NamedTuple):
    run: RunRecord
    first: NextStep | None
    posting: Posting | None


class _Result(NamedTuple):
    result: StepResult
    posting: Posting | None


class _Beat(NamedTuple):
    worker: WorkerRecord
    lease: float
    running: Running
    forgotten: Running


_its_run = needing(lock_runs, lambda request: (request[0],))
"""Marks a handler of requests that begin with the id of a run."""


class SqlStore:
    """Runs, steps and variables in SQL tables. The database may be shared with a transport."""

    def __init__(self, database: Database, *, grace: float = 10.0, inline_bytes: int = 65536) -> None:
        self.database = database
        self.grace = grace
        self.inline_bytes = inline_bytes
        self.outbox: Outbox | None = None
        self._waiters = Waiters(self.statuses, hears_others=lambda: database.hears_others)
        self._forget: Callable[[], None] | None = None

    @property
    def publishes(self) -> bool:
        """Whether postings are written by its own transactions."""
        return self.outbox is not None

    async def connect(self) -> None:
        if self._forget is None:
            await self.database.connect()
            self._forget = self.database.on_change(self._waiters.heard)

    async def close(self) -> None:
        if self._forget is not None:
            self._forget()
            self._forget = None
            self._waiters.close()
            await self.database.close()

    async def now(self) -> float:
        return await self.database.now()

    # -- a run's life

    async def record_workflow_start(
        self, run: RunRecord, first: NextStep | None, posting: Posting | None = None
    ) -> bool:
        new: bool = _unwrap(await self.database.write(self._start, _Start(run, first, posting)))
        if new and first is not None:
            self._waiters.started(run.id)
        return new

    def _start(self, tx: Tx, requests: Sequence[_Start]) -> list[bool | PaigeantError]:
        ids = json.dumps([request.run.id for request in requests])
        there = {run_id: (name, digest) for run_id, name, digest in STARTED.rows(tx, ids)}
        answers: list[bool | PaigeantError] = []
        runs: list[tuple[Any, ...]] = []
        changes = Changes()
        postings: list[Posting] = []
        for run, first, posting in requests:
            mine = (run.workflow, run.input_hash)
            found = there.setdefault(run.id, mine)
            if found is not mine:
                answers.append(_conflict(run, found[0]) if found != mine else False)
                continue
            answers.append(True)
            runs.append(new_run(run, now=tx.now, ended=first is None))
            if first is None:
                tx.rings.add(ended(run.id, RunStatus.COMPLETED))
                continue
            changes.added.append(
                StepRecord(
                    *first.key,
                    seq=0,
                    activity=first.activity,
                    topic=first.topic,
                    status=StepStatus.READY,
                    not_before=first.not_before,
                    wake_at=max(tx.now, first.not_before) + self.grace,
                    created_at=tx.now,
                )
            )
            if posting is not None:
                postings.append(posting)
        NEW_RUN.each(tx, sorted(runs))
        self._write(tx, changes, postings)
        return answers

    async def adopt_run(
        self, run: RunRecord, steps: Collection[StepRecord], variables: Mapping[str, bytes]
    ) -> bool:
        return await self.database.write(self._adopt, (run, steps, variables))

    def _adopt(
        self, tx: Tx, requests: Sequence[tuple[RunRecord, Collection[StepRecord], Mapping[str, bytes]]]
    ) -> list[bool]:
        return [self._adopt_one(tx, *request) for request in requests]

    def _adopt_one(
        self, tx: Tx, run: RunRecord, steps: Collection[StepRecord], variables: Mapping[str, bytes]
    ) -> bool:
        there = select(workflow_runs.c.id).where(workflow_runs.c.id == run.id)
        if tx.connection.execute(there).first() is not None:
            return False
        names = [column.name for column in workflow_runs.c]
        values = new_run(replace(run, started_at=tx.now), now=tx.now, ended=False)
        tx.connection.execute(insert(workflow_runs).values(dict(zip(names, values, strict=True))))
        rows = [ledger.adopted(row, now=tx.now, grace=self.grace) for row in steps]
        saved = [(run.id, name, value) for name, value in variables.items()]
        self._write(tx, Changes(added=rows, variables=saved))
        # What a new row never has, one that was recorded elsewhere has.
        done = [row for row in rows if row.completed_at is not None]
        patches = [
            (
                row.key,
                {"output": row.output, "undo_topic": row.undo_topic, "completed_at": row.completed_at},
            )
            for row in done
        ]
        self._write(tx, Changes(steps=patches))
        return True

    async def claim_step(self, request: ClaimRequest) -> Grant | Refused:
        # Lost with the power, it is claimed again; its result brings the fsync.
        return await self.database.write(self._claim, request, durable=False)

    @needing(lock_runs, lambda request: (request.key.workflow_id,))
    def _claim(self, tx: Tx, requests: Sequence[ClaimRequest]) -> list[Grant | Refused]:
        heads = heads_of(tx, [request.key for request in requests])
        changes = Changes()
        answers: list[Grant | Refused] = []
        for request in requests:
            # What one request of this transaction took, the next can't have.
            head = heads.get(request.key)
            answer = ledger.claim(head, request, changes, now=tx.now)
            if isinstance(answer, Grant) and head is not None:
                heads[request.key] = replace(
                    head, status=StepStatus.RUNNING, epoch=answer.epoch, worker=request.worker
                )
            answers.append(answer)
        self._write(tx, changes)
        return answers

    async def record_step_result(
        self, result: StepResult, posting: Posting | None = None
    ) -> Recorded | Refused:
        return await self.database.write(self._record, _Result(result, posting))

    @needing(lock_runs, lambda request: (request.result.key.workflow_id,))
    def _record(self, tx: Tx, requests: Sequence[_Result]) -> list[Recorded | Refused]:
        heads = heads_of(tx, [result.key for result, _ in requests])
        changes = Changes()
        postings: list[Posting] = []
        answers: list[Recorded | Refused] = []
        settled: set[StepKey] = set()
        for result, posting in requests:
            if result.key in settled:  # two workers of this process: the rows read above are no longer right
                answers.append(Refused("recorded"))
                continue
            written = len(changes.steps)
            waits = result.status is StepStatus.WAITING and result.waits_for
            answer = ledger.record(
                heads.get(result.key),
                result,
                changes,
                now=tx.now,
                grace=self.grace,
                arrived=inbox.untaken(tx, result.key.workflow_id) if waits else (),
            )
            answers.append(answer)
            if len(changes.steps) == written:
                continue
            settled.add(result.key)
            if posting is not None:
                postings.append(posting)
        self._write(tx, changes, postings)
        return answers

    async def release_steps(self, worker: str, steps: Running) -> list[StepKey]:
        return await self.database.write(self._release, (worker, steps))

    @needing(lock_runs, lambda request: [key.workflow_id for key, _ in request[1]])
    def _release(self, tx: Tx, requests: Sequence[tuple[str, Running]]) -> list[list[StepKey]]:
        heads = heads_of(tx, [key for _, steps in requests for key, _ in steps])
        changes = Changes()
        answers = [
            [
                key
                for key, epoch in steps
                if ledger.release(heads.get(key), worker, epoch, changes, now=tx.now, grace=self.grace)
            ]
            for worker, steps in requests
        ]
        self._write(tx, changes)
        return answers

    # -- leases

    def beat(
        self, worker: WorkerRecord, *, lease: float, running: Running, forgotten: Running = ()
    ) -> tuple[set[tuple[StepKey, int]], set[tuple[StepKey, int]]]:
        return self.database.write_now(self._beat, _Beat(worker, lease, running, forgotten))

    def _beat(
        self, tx: Tx, requests: Sequence[_Beat]
    ) -> list[tuple[set[tuple[StepKey, int]], set[tuple[StepKey, int]]]]:
        answers = []
        for worker, lease, running, forgotten in requests:
            lock_runs(tx, [key.workflow_id for key, _ in forgotten])
            _BEAT.each(tx, [(worker.id, worker.host, worker.process, tx.now + lease)])
            held = {
                (StepKey(run_id, step, Phase(phase)), epoch)
                for run_id, step, phase, epoch in _HELD.rows(tx, worker.id)
            }
            changes = Changes()
            for step in set(forgotten) & held:
                ledger.free(step[0], changes, now=tx.now)
                held.discard(step)
            self._write(tx, changes)
            answers.append((set(running) - held, held - set(running)))
        return answers

    async def sign_off(self, worker_id: str) -> None:
        await self.database.write(self._sign_off, worker_id)

    def _sign_off(self, tx: Tx, requests: Sequence[str]) -> list[None]:
        query = select(*KEY, step_executions.c.epoch, step_executions.c.worker).where(
            is_in(StepStatus.RUNNING), step_executions.c.worker.in_(requests)
        )
        held = [(key_of(row), row.worker, row.epoch) for row in tx.connection.execute(query)]
        heads = heads_of(tx, [key for key, _, _ in held])
        changes = Changes()
        for key, worker, epoch in held:
            ledger.release(heads.get(key), worker, epoch, changes, now=tx.now, grace=0.0)
        self._write(tx, changes)
        tx.connection.execute(delete(workers).where(workers.c.id.in_(requests)))
        return [None] * len(requests)

    async def sweep(
        self, *, gone: Collection[str] = (), empty: Collection[str] = (), limit: int = 500
    ) -> Swept:
        if not gone and not empty and not await self.database.read(self._has_work, None):
            return Swept()
        return await self.database.write(self._sweep, (gone, empty, limit))

    def _has_work(self, tx: Tx, requests: Sequence[None]) -> list[bool]:
        # Sweeps are many and mostly find nothing: look without taking any lock.
        now, execute = tx.now, tx.connection.execute
        has_work = any(
            execute(query.limit(1)).first() is not None
            for query in (
                select(workers.c.id).where(workers.c.lease_until <= now),
                orphan_steps(),
                due_steps(now),
                waiting_steps(now),
                late_runs(now),
            )
        )
        return [has_work] * len(requests)

    def _sweep(self, tx: Tx, requests: Sequence[tuple[Collection[str], Collection[str], int]]) -> list[Swept]:
        return [self._sweep_once(tx, *request) for request in requests]

    def _sweep_once(self, tx: Tx, gone: Collection[str], empty: Collection[str], limit: int) -> Swept:
        execute = tx.connection.execute
        over = or_(workers.c.lease_until <= tx.now, workers.c.id.in_(list(gone)))
        lost = tuple(execute(delete(workers).where(over).returning(workers.c.id)).scalars())
        changes = Changes()
        freed = [key_of(row) for row in self._locked(tx, orphan_steps().limit(limit))]
        for key in freed:
            ledger.free(key, changes, now=tx.now)
        self._write(tx, changes)
        changes = Changes()
        expired = []
        late = execute(late_runs(tx.now).limit(limit)).scalars().all()
        for run_id in sorted(lock_runs(tx, late, only_free=True)):
            detail = detail_of(tx, run_id, self.inline_bytes)
            if ledger.expire(detail, changes, now=tx.now, inline_bytes=self.inline_bytes):
                expired.append(run_id)
                tx.rings.add("turned")
        self._write(tx, changes)
        changes = Changes()
        for row in self._locked(tx, waiting_steps(tx.now).limit(limit)):
            ledger.wake(key_of(row), changes, now=tx.now)
        self._write(tx, changes)
        changes = Changes()
        due = {}
        # A worker that is lost had fetched messages, the oldest first, and which ones nobody knows.
        overdue_since = tx.now - self.grace if lost else None
        wanted = due_steps(tx.now, overdue_since, empty, grace=self.grace)
        for row in self._locked(tx, wanted.limit(limit)):
            key = key_of(row)
            due[key] = row.epoch
            ledger.postpone(key, changes, now=tx.now, due_at=row.due_at, grace=self.grace)
        self._write(tx, changes)
        if self.outbox is not None and due:
            # A long queue is no lost message: what waits in this very database needn't be sent again.
            ids = {str(MessageId(*key, epoch)): key for key, epoch in due.items()}
            for message_id in self.outbox.waiting(tx, list(ids)):
                del due[ids[message_id]]
        return Swept(tuple(due), lost, tuple(freed), tuple(expired))

    def _locked(self, tx: Tx, query: Select[Any]) -> list[Any]:
        """The rows of steps that `query` finds, as they are once their runs are locked, without those being changed."""
        found = tx.connection.execute(query).all()
        locked = lock_runs(tx, {row.workflow_id for row in found}, only_free=True)
        # What was found before the lock may have been changed since.
        again = tx.connection.execute(query).all() if found and tx.driver.dialect.name != "sqlite" else found
        return [row for row in again if row.workflow_id in locked]

    # -- operators

    async def cancel_run(self, workflow_id: str, reason: str) -> RunStatus:
        status: RunStatus = _unwrap(await self.database.write(self._cancel, (workflow_id, reason)))
        return status

    @_its_run
    def _cancel(self, tx: Tx, requests: Sequence[tuple[str, str]]) -> list[RunStatus | PaigeantError]:
        def stop(reason: str, detail: RunDetail, changes: Changes) -> RunStatus:
            limit = self.inline_bytes
            return ledger.stop(detail, RunStatus.CANCELLED, reason, changes, now=tx.now, inline_bytes=limit)

        return [self._turn(tx, run_id, partial(stop, reason)) for run_id, reason in requests]

    async def retry_run(self, workflow_id: str) -> RunStatus:
        status: RunStatus = _unwrap(await self.database.write(self._retry, workflow_id))
        return status

    @needing(lock_runs, lambda workflow_id: (workflow_id,))
    def _retry(self, tx: Tx, requests: Sequence[str]) -> list[RunStatus | PaigeantError]:
        resume = partial(ledger.resume, now=tx.now, inline_bytes=self.inline_bytes)
        return [self._turn(tx, run_id, resume) for run_id in requests]

    def _turn(
        self, tx: Tx, run_id: str, decide: Callable[[RunDetail, Changes], RunStatus]
    ) -> RunStatus | PaigeantError:
        changes = Changes()
        try:
            lock_runs(tx, [run_id])
            status = decide(detail_of(tx, run_id, self.inline_bytes), changes)
        except PaigeantError as exc:
            return exc
        self._write(tx, changes)
        tx.rings.add("turned")
        return status

    async def count_ended(self, *, before: float, statuses: Collection[RunStatus] | None = None) -> int:
        query = select(func.count()).select_from(_ended_runs(before, statuses).subquery())
        count: int = await self.database.ask(lambda connection: connection.execute(query).scalar_one())
        return count

    async def prune_runs(
        self, *, before: float, statuses: Collection[RunStatus] | None = None, limit: int = 500
    ) -> int:
        return await self.database.write(self._prune, (before, statuses, limit))

    def _prune(
        self, tx: Tx, requests: Sequence[tuple[float, Collection[RunStatus] | None, int]]
    ) -> list[int]:
        return [self._prune_once(tx, *request) for request in requests]

    def _prune_once(self, tx: Tx, before: float, statuses: Collection[RunStatus] | None, limit: int) -> int:
        # Locked, where a server has other writers: one that is just being retried is left alone.
        query = _ended_runs(before, statuses).limit(limit).with_for_update(skip_locked=True)
        gone = tx.connection.execute(query).scalars().all()
        if gone:
            theirs = (step_executions, step_units, workflow_variables, workflow_signals, workflow_requests)
            for table in (*theirs, dead_letters):
                tx.connection.execute(delete(table).where(table.c.workflow_id.in_(gone)))
            tx.connection.execute(delete(workflow_runs).where(workflow_runs.c.id.in_(gone)))
        return len(gone)

    async def open_steps(self, workflow_id: str) -> list[StepKey]:
        query = select(*KEY).where(
            step_executions.c.workflow_id == workflow_id, step_executions.c.status == StepStatus.READY
        )
        return await self.database.ask(lambda connection: [key_of(row) for row in connection.execute(query)])

    async def has_open(self, topics: Collection[str]) -> bool:
        steps = step_executions.c
        # One that waits for somebody outside goes on when that comes, whoever works then.
        goes_on = or_(
            steps.status.in_([StepStatus.READY, StepStatus.RUNNING]),
            and_(steps.status == StepStatus.WAITING, cast(steps.waits_for, Text) == "[]"),
        )
        query = select(steps.step).where(goes_on, steps.topic.in_(list(topics)))
        row = await self.database.ask(lambda connection: connection.execute(query.limit(1)).first())
        return row is not None

    def on_turn(self, heard: Callable[[], None]) -> Callable[[], None]:
        def listener(names: frozenset[str]) -> None:
            if "turned" in names or "*" in names:
                heard()

        return self.database.on_change(listener)

    def publish_with(self, transport: Transport) -> None:
        assert isinstance(transport, Outbox), "what joins a store can write into its transactions"
        self.outbox = transport

    # -- values of a run

    async def load_output(self, workflow_id: str, step: str) -> bytes | None:
        query = select(step_executions.c.output).where(
            step_executions.c.workflow_id == workflow_id,
            step_executions.c.step == step,
            step_executions.c.phase == Phase.DO,
        )
        return encoded(await self.database.ask(lambda connection: connection.execute(query).scalar()))

    async def save_variable(self, workflow_id: str, key: str, value: Any) -> None:
        try:
            text = codec.dump(value).decode()
        except codec.JsonInvalid as exc:
            raise InputInvalid(f"variable '{key}' can't be written as JSON: {exc}") from exc
        _unwrap(await self.database.write(self._save_variable, (workflow_id, key, text)))

    @_its_run
    def _save_variable(self, tx: Tx, requests: Sequence[tuple[str, str, str]]) -> list[PaigeantError | None]:
        lock_runs(tx, {run_id for run_id, _, _ in requests})
        statuses = statuses_of(tx, [run_id for run_id, _, _ in requests])
        known = [request for request in requests if request[0] in statuses]
        save_variables(tx, known)
        return [None if run_id in statuses else RunNotFound(run_id) for run_id, _, _ in requests]

    async def load_variable(self, workflow_id: str, key: str, default: Any = None) -> Any:
        query = select(workflow_variables.c.value).where(
            workflow_variables.c.workflow_id == workflow_id, workflow_variables.c.key == key
        )
        text = await self.database.ask(lambda connection: connection.execute(query).scalar())
        return default if text is None else from_json(variable_in(text))

    async def save_unit(self, key: StepKey, name: str, value: bytes) -> bytes:
        return await self.database.write(self._save_unit, (key, name, value))

    def _save_unit(self, tx: Tx, requests: Sequence[tuple[StepKey, str, bytes]]) -> list[bytes]:
        save_units(tx, requests)
        return [
            found if (found := unit_of(tx, key, name)) is not None else value for key, name, value in requests
        ]

    async def load_unit(self, key: StepKey, name: str) -> bytes | None:
        return await self.database.read(self._load_unit, (key, name))

    def _load_unit(self, tx: Tx, requests: Sequence[tuple[StepKey, str]]) -> list[bytes | None]:
        return [unit_of(tx, key, name) for key, name in requests]

    async def load_units(self, key: StepKey) -> dict[str, bytes]:
        return await self.database.read(self._load_units, key)

    def _load_units(self, tx: Tx, requests: Sequence[StepKey]) -> list[dict[str, bytes]]:
        return [units_of(tx, key) for key in requests]

    # -- from outside

    async def take_signal(self, key: StepKey, unit: str, name: str) -> bytes | None:
        return await self.database.write(self._take_signal, (key, unit, name))

    @needing(lock_runs, lambda request: (request[0].workflow_id,))
    def _take_signal(self, tx: Tx, requests: Sequence[tuple[StepKey, str, str]]) -> list[bytes | None]:
        lock_runs(tx, {key.workflow_id for key, _, _ in requests})
        return [inbox.take(tx, key, unit, name) for key, unit, name in requests]

    async def record_signal(self, workflow_id: str, name: str, value: bytes, *, sender: str = "") -> None:
        _unwrap(await self.database.write(self._signal, (workflow_id, name, value, sender)))

    @_its_run
    def _signal(self, tx: Tx, requests: Sequence[tuple[str, str, bytes, str]]) -> list[PaigeantError | None]:
        lock_runs(tx, {run_id for run_id, *_ in requests})
        statuses = statuses_of(tx, [run_id for run_id, *_ in requests])
        answers: list[PaigeantError | None] = []
        for run_id, name, value, sender in requests:
            status = statuses.get(run_id)
            if status is None:
                answers.append(RunNotFound(run_id))
            elif status in RUN_ENDED:
                answers.append(InvalidTransition(f"run '{run_id}' has ended {status}; it takes no signals"))
            else:
                self._write(tx, inbox.put(tx, run_id, name, value, sender))
                answers.append(None)
        return answers

    async def open_request(self, request: Request) -> None:
        await self.database.write(self._open_request, request)

    def _open_request(self, tx: Tx, requests: Sequence[Request]) -> list[None]:
        for request in sorted(requests, key=lambda request: request.id):
            inbox.keep_request(tx, request)
        return [None] * len(requests)

    async def answer_request(self, request_id: str, answer: bytes, *, sender: str = "") -> Request:
        known = await self.load_request(request_id)
        if known is None:
            raise RequestNotFound(request_id)
        answered: Request = _unwrap(
            await self.database.write(self._answer, (known.workflow_id, request_id, answer, sender))
        )
        return answered

    @_its_run
    def _answer(
        self, tx: Tx, requests: Sequence[tuple[str, str, bytes, str]]
    ) -> list[Request | PaigeantError]:
        return [self._answer_one(tx, *request) for request in requests]

    def _answer_one(
        self, tx: Tx, run_id: str, request_id: str, answer: bytes, sender: str
    ) -> Request | PaigeantError:
        lock_runs(tx, [run_id])
        found = inbox.requests_of(tx, request_id=request_id)
        request = found[0] if found else None
        try:
            if not ledger.answers(request_id, request, answer):
                return found[0]
        except PaigeantError as exc:
            return exc
        self._write(tx, inbox.put(tx, run_id, found[0].signal, answer, sender))
        return inbox.requests_of(tx, request_id=request_id)[0]

    async def load_request(self, request_id: str) -> Request | None:
        found = await self.database.read(self._requests, (request_id, None, False, 1))
        return found[0] if found else None

    async def list_requests(
        self, *, workflow_id: str | None = None, only_open: bool = True, limit: int = 100
    ) -> list[Request]:
        return await self.database.read(self._requests, (None, workflow_id, only_open, limit))

    def _requests(
        self, tx: Tx, requests: Sequence[tuple[str | None, str | None, bool, int]]
    ) -> list[list[Request]]:
        return [
            inbox.requests_of(
                tx, request_id=request_id, workflow_id=workflow_id, only_open=only_open, limit=limit
            )
            for request_id, workflow_id, only_open, limit in requests
        ]

    # -- history

    async def wait_ended(self, workflow_id: str) -> RunStatus:
        return await self._waiters.wait(workflow_id)

    async def run_status(self, workflow_id: str) -> RunStatus:
        found = await self.statuses([workflow_id])
        if workflow_id not in found:
            raise RunNotFound(workflow_id)
        return found[workflow_id]

    async def statuses(self, workflow_ids: Collection[str]) -> dict[str, RunStatus]:
        """The states of those of the runs that exist."""
        return await self.database.read(self._find_statuses, workflow_ids)

    def _find_statuses(self, tx: Tx, requests: Sequence[Collection[str]]) -> list[dict[str, RunStatus]]:
        found = statuses_of(tx, {run_id for ids in requests for run_id in ids})
        return [{run_id: found[run_id] for run_id in ids if run_id in found} for ids in requests]

    async def load_run(self, workflow_id: str, *, inline_bytes: int | None = None) -> RunDetail:
        answer = await self.database.read(self._load, (workflow_id, inline_bytes))
        detail: RunDetail = _unwrap(answer)
        return detail

    def _load(self, tx: Tx, requests: Sequence[tuple[str, int | None]]) -> list[RunDetail | RunNotFound]:
        answers: dict[tuple[str, int | None], RunDetail] = {}
        for limit in {limit for _, limit in requests}:
            ids = {run_id for run_id, wanted in requests if wanted == limit}
            found = details_of(tx, ids, limit)
            answers.update(((run_id, limit), detail) for run_id, detail in found.items())
        return [answers.get(request) or RunNotFound(request[0]) for request in requests]

    async def list_runs(
        self,
        *,
        status: RunStatus | None = None,
        workflow: str | None = None,
        limit: int = 50,
        before: tuple[float, str] | None = None,
    ) -> list[RunRecord]:
        columns = [column for column in workflow_runs.c if column.name not in ("input", "slip")]
        query = select(*columns).order_by(workflow_runs.c.created_at.desc(), workflow_runs.c.id.desc())
        if status is not None:
            query = query.where(workflow_runs.c.status == status)
        if workflow is not None:
            query = query.where(workflow_runs.c.workflow == workflow)
        if before is not None:
            query = query.where(tuple_(workflow_runs.c.created_at, workflow_runs.c.id) < before)
        return await self.database.ask(
            lambda connection: [run_of(row._asdict()) for row in connection.execute(query.limit(limit))]
        )

    async def list_variables(self, workflow_id: str) -> dict[str, Any]:
        detail = await self.load_run(workflow_id, inline_bytes=0)
        return {name: from_json(value) for name, value in detail.variables.items()}

    async def list_workers(self) -> list[WorkerRecord]:
        return await self.database.ask(
            lambda connection: [WorkerRecord(**row._mapping) for row in connection.execute(select(workers))]
        )

    async def open_topics(self) -> list[OpenTopic]:
        now = await self.now()
        return await self.database.ask(lambda connection: open_topics(connection, now))

    # -- dead letters

    async def bury(self, letter: DeadLetter) -> None:
        await self.database.write(self._bury, letter)

    def _bury(self, tx: Tx, requests: Sequence[DeadLetter]) -> list[None]:
        # Whoever writes to a broker chooses ids and names: none of them may keep a letter from being kept.
        letters = [replace(letter, created_at=letter.created_at or tx.now) for letter in requests]
        rows = [[getattr(letter, column.name) for column in dead_letters.c] for letter in letters]
        _BURY.each(tx, [tuple(codec.storable(v) if isinstance(v, str) else v for v in row) for row in rows])
        return [None] * len(requests)

    async def list_dead_letters(self, *, limit: int = 100) -> list[DeadLetter]:
        columns = [column for column in dead_letters.c if column.name != "body"]
        query = select(*columns).order_by(dead_letters.c.created_at.desc()).limit(limit)
        return await self.database.ask(
            lambda connection: [DeadLetter(**row._mapping, body=b"") for row in connection.execute(query)]
        )

    async def load_dead_letter(self, letter_id: str) -> DeadLetter | None:
        query = select(dead_letters).where(dead_letters.c.id == letter_id)
        row = await self.database.ask(lambda connection: connection.execute(query).first())
        return None if row is None else DeadLetter(**row._mapping)

    async def delete_dead_letter(self, letter_id: str) -> bool:
        return await self.database.write(self._delete_dead_letter, letter_id)

    def _delete_dead_letter(self, tx: Tx, requests: Sequence[str]) -> list[bool]:
        return [
            tx.connection.execute(delete(dead_letters).where(dead_letters.c.id == letter)).rowcount > 0
            for letter in requests
        ]

    # -- writing

    def _write(self, tx: Tx, changes: Changes, postings: Sequence[Posting] = ()) -> None:
        """Write all changes, one statement for each kind."""
        for key in changes.dropped:  # rarely any: SQLAlchemy's connection ends the pipeline
            tx.connection.execute(
                delete(step_executions).where(*(c == v for c, v in zip(KEY, key, strict=True)))
            )
        patch_rows(tx, step_executions, changes.steps)
        if changes.added:
            NEW_STEP.each(tx, [new_step(row) for row in changes.added])
        patch_rows(tx, workflow_runs, [((run_id,), patch) for run_id, patch in changes.runs])
        for run_id, patch in changes.runs:
            if patch.get("status") in RUN_ENDED:
                tx.rings.add(ended(run_id, patch["status"]))
        save_variables(tx, [(run_id, name, value.decode()) for run_id, name, value in changes.variables])
        if postings and self.outbox is not None:
            self.outbox.post(tx, postings)


def _ended_runs(before: float, statuses: Collection[RunStatus] | None) -> Select[tuple[str]]:
    """The ids of the runs that ended before then, the oldest first."""
    runs = workflow_runs.c
    # Which were created before then, too: so the index of the listings finds the oldest at once.
    return (
        select(runs.id)
        .where(
            runs.created_at < before,
            runs.completed_at < before,
            runs.status.in_(sorted(RUN_ENDED if statuses is None else RUN_ENDED.intersection(statuses))),
        )
        .order_by(runs.created_at, runs.id)
    )


def _conflict(run: RunRecord, workflow: str) -> RunConflict:
    other = f"workflow '{workflow}'" if workflow != run.workflow else "another input"
    return RunConflict(run.id, other)


def _unwrap(answer: Any) -> Any:
    if isinstance(answer, PaigeantError):
        raise answer
    return answer
