"""The SQL store. It loads and writes rows; what may change is decided in `ledger.py`.

Each method hands a request to a handler; requests of one kind that meet in a transaction are done together, with one
multi-row statement for each kind of change.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from enum import StrEnum
from functools import lru_cache, partial
from operator import attrgetter
from typing import Any, NamedTuple

from pydantic_core import from_json
from sqlalchemy import (
    ColumnElement,
    Connection,
    LargeBinary,
    Select,
    Table,
    and_,
    bindparam,
    case,
    cast,
    delete,
    func,
    insert,
    literal_column,
    null,
    or_,
    select,
    tuple_,
    update,
)
from sqlalchemy.dialects.sqlite import insert as upsert

from paigeant import codec, ledger
from paigeant.database import Database, Prepared
from paigeant.errors import InputInvalid, InvalidTransition, PaigeantError, RunConflict, RunNotFound
from paigeant.lane import Tx
from paigeant.ledger import Changes, Head
from paigeant.slip import RUN_ENDED, Phase, RunStatus, StepStatus
from paigeant.store import (
    ClaimRequest,
    DeadLetter,
    Grant,
    NextStep,
    Recorded,
    Refused,
    RunDetail,
    RunRecord,
    Signal,
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
    workflow_runs,
    workflow_signals,
    workflow_variables,
)
from paigeant.transport import Posting, Transport

__all__ = ["SqlStore"]

Outbox = Callable[[Tx, Sequence[Posting]], None]
"""Writes messages within a transaction of the store: a transport's part, when both are one database."""

Running = Collection[tuple[StepKey, int]]

_LOOK_AGAIN_SECONDS = 2.0
_LOOK_OFTEN_SECONDS = 0.05
_KEY = (step_executions.c.workflow_id, step_executions.c.step, step_executions.c.phase)


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


class SqlStore:
    """Runs, steps and variables in SQL tables. The database may be shared with a transport."""

    def __init__(self, database: Database, *, grace: float = 10.0, inline_bytes: int = 65536) -> None:
        self.database = database
        self.grace = grace
        self.inline_bytes = inline_bytes
        self.outbox: Outbox | None = None
        self._waiters = _Waiters(self)
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
        return self.database.clock.now()

    # -- a run's life

    async def record_workflow_start(
        self, run: RunRecord, first: NextStep | None, posting: Posting | None = None
    ) -> bool:
        new: bool = _unwrap(await self.database.write(self._start, _Start(run, first, posting)))
        return new

    def _start(self, tx: Tx, requests: Sequence[_Start]) -> list[bool | PaigeantError]:
        ids = json.dumps([request.run.id for request in requests])
        there = {run_id: (name, digest) for run_id, name, digest in _STARTED.rows(tx.connection, ids)}
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
            runs.append(_new_run(run, now=tx.now, ended=first is None))
            if first is None:
                tx.rings.add(_ended(run.id, RunStatus.COMPLETED))
                continue
            changes.added.append(
                StepRecord(
                    *first.key,
                    seq=0,
                    activity=first.activity,
                    topic=first.topic,
                    status=StepStatus.READY,
                    wake_at=tx.now + self.grace,
                    created_at=tx.now,
                )
            )
            if posting is not None:
                postings.append(posting)
        _NEW_RUN.each(tx.connection, runs)
        self._write(tx, changes, postings)
        return answers

    async def claim_step(self, request: ClaimRequest) -> Grant | Refused:
        # Lost with the power, it is claimed again; its result brings the fsync.
        return await self.database.write(self._claim, request, durable=False)

    def _claim(self, tx: Tx, requests: Sequence[ClaimRequest]) -> list[Grant | Refused]:
        heads = _heads(tx.connection, [request.key for request in requests])
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

    def _record(self, tx: Tx, requests: Sequence[_Result]) -> list[Recorded | Refused]:
        heads = _heads(tx.connection, [result.key for result, _ in requests])
        changes = Changes()
        postings: list[Posting] = []
        answers: list[Recorded | Refused] = []
        settled: set[StepKey] = set()
        for result, posting in requests:
            if result.key in settled:  # two workers of this process: the rows read above are no longer right
                answers.append(Refused("recorded"))
                continue
            written = len(changes.steps)
            answer = ledger.record(heads.get(result.key), result, changes, now=tx.now, grace=self.grace)
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

    def _release(self, tx: Tx, requests: Sequence[tuple[str, Running]]) -> list[list[StepKey]]:
        heads = _heads(tx.connection, [key for _, steps in requests for key, _ in steps])
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
            row = {"host": worker.host, "process": worker.process, "lease_until": tx.now + lease}
            statement = upsert(workers).values(id=worker.id, **row)
            tx.connection.execute(statement.on_conflict_do_update(index_elements=["id"], set_=row))
            query = select(*_KEY, step_executions.c.epoch).where(
                step_executions.c.status == StepStatus.RUNNING, step_executions.c.worker == worker.id
            )
            held = {(_key(row), row.epoch) for row in tx.connection.execute(query)}
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
        query = select(*_KEY, step_executions.c.epoch, step_executions.c.worker).where(
            step_executions.c.status == StepStatus.RUNNING, step_executions.c.worker.in_(requests)
        )
        held = [(_key(row), row.worker, row.epoch) for row in tx.connection.execute(query)]
        heads = _heads(tx.connection, [key for key, _, _ in held])
        changes = Changes()
        for key, worker, epoch in held:
            ledger.release(heads.get(key), worker, epoch, changes, now=tx.now, grace=0.0)
        self._write(tx, changes)
        tx.connection.execute(delete(workers).where(workers.c.id.in_(requests)))
        return [None] * len(requests)

    async def sweep(self, *, gone: Collection[str] = (), limit: int = 500) -> Swept:
        if not await self.database.ask(lambda connection: self._has_work(connection, gone)):
            return Swept()
        return await self.database.write(self._sweep, (gone, limit))

    def _has_work(self, connection: Connection, gone: Collection[str]) -> bool:
        # Sweeps are many and mostly find nothing: look without taking the write lock.
        now = self.database.clock.now()
        return bool(gone) or any(
            connection.execute(query.limit(1)).first() is not None
            for query in (
                select(workers.c.id).where(workers.c.lease_until <= now),
                _orphans(),
                _due(now),
                _late(now),
            )
        )

    def _sweep(self, tx: Tx, requests: Sequence[tuple[Collection[str], int]]) -> list[Swept]:
        return [self._sweep_once(tx, gone, limit) for gone, limit in requests]

    def _sweep_once(self, tx: Tx, gone: Collection[str], limit: int) -> Swept:
        execute = tx.connection.execute
        over = or_(workers.c.lease_until <= tx.now, workers.c.id.in_(list(gone)))
        lost = tuple(execute(delete(workers).where(over).returning(workers.c.id)).scalars())
        changes = Changes()
        freed = [_key(row) for row in execute(_orphans().limit(limit))]
        for key in freed:
            ledger.free(key, changes, now=tx.now)
        self._write(tx, changes)
        changes = Changes()
        expired = list(execute(_late(tx.now).limit(limit)).scalars())
        for run_id in expired:
            detail = _detail(tx.connection, run_id, self.inline_bytes)
            ledger.expire(detail, changes, now=tx.now, inline_bytes=self.inline_bytes)
        self._write(tx, changes)
        changes = Changes()
        due = [_key(row) for row in execute(_due(tx.now).limit(limit))]
        for key in due:
            ledger.postpone(key, changes, now=tx.now, grace=self.grace)
        self._write(tx, changes)
        return Swept(tuple(due), lost, tuple(freed), tuple(expired))

    # -- operators

    async def cancel_run(self, workflow_id: str, reason: str) -> RunStatus:
        status: RunStatus = _unwrap(await self.database.write(self._cancel, (workflow_id, reason)))
        return status

    def _cancel(self, tx: Tx, requests: Sequence[tuple[str, str]]) -> list[RunStatus | PaigeantError]:
        def stop(reason: str, detail: RunDetail, changes: Changes) -> RunStatus:
            limit = self.inline_bytes
            return ledger.stop(detail, RunStatus.CANCELLED, reason, changes, now=tx.now, inline_bytes=limit)

        return [self._turn(tx, run_id, partial(stop, reason)) for run_id, reason in requests]

    async def retry_run(self, workflow_id: str) -> RunStatus:
        status: RunStatus = _unwrap(await self.database.write(self._retry, workflow_id))
        return status

    def _retry(self, tx: Tx, requests: Sequence[str]) -> list[RunStatus | PaigeantError]:
        resume = partial(ledger.resume, now=tx.now, inline_bytes=self.inline_bytes)
        return [self._turn(tx, run_id, resume) for run_id in requests]

    def _turn(
        self, tx: Tx, run_id: str, decide: Callable[[RunDetail, Changes], RunStatus]
    ) -> RunStatus | PaigeantError:
        changes = Changes()
        try:
            status = decide(_detail(tx.connection, run_id, self.inline_bytes), changes)
        except PaigeantError as exc:
            return exc
        self._write(tx, changes)
        tx.rings.add("turned")
        return status

    async def open_steps(self, workflow_id: str) -> list[StepKey]:
        query = select(*_KEY).where(
            step_executions.c.workflow_id == workflow_id, step_executions.c.status == StepStatus.READY
        )
        return await self.database.ask(lambda connection: [_key(row) for row in connection.execute(query)])

    async def has_open(self, topics: Collection[str]) -> bool:
        steps = step_executions.c
        query = select(steps.step).where(steps.status.in_(sorted(ledger.OPEN)), steps.topic.in_(list(topics)))
        row = await self.database.ask(lambda connection: connection.execute(query.limit(1)).first())
        return row is not None

    def on_turn(self, heard: Callable[[], None]) -> Callable[[], None]:
        def listener(names: frozenset[str]) -> None:
            if "turned" in names or "*" in names:
                heard()

        return self.database.on_change(listener)

    def publish_with(self, transport: Transport) -> None:
        self.outbox = transport.post  # type: ignore[attr-defined]  # what `joins` says yes has it

    # -- values of a run

    async def load_output(self, workflow_id: str, step: str) -> bytes | None:
        query = select(step_executions.c.output).where(
            step_executions.c.workflow_id == workflow_id,
            step_executions.c.step == step,
            step_executions.c.phase == Phase.DO,
        )
        return _encoded(await self.database.ask(lambda connection: connection.execute(query).scalar()))

    async def save_variable(self, workflow_id: str, key: str, value: Any) -> None:
        try:
            text = codec.dump(value).decode()
        except codec.JsonInvalid as exc:
            raise InputInvalid(f"variable '{key}' can't be written as JSON: {exc}") from exc
        _unwrap(await self.database.write(self._save_variable, (workflow_id, key, text)))

    def _save_variable(self, tx: Tx, requests: Sequence[tuple[str, str, str]]) -> list[PaigeantError | None]:
        statuses = _statuses(tx.connection, [run_id for run_id, _, _ in requests])
        known = [request for request in requests if request[0] in statuses]
        _save_variables(tx.connection, known)
        return [None if run_id in statuses else RunNotFound(run_id) for run_id, _, _ in requests]

    async def load_variable(self, workflow_id: str, key: str, default: Any = None) -> Any:
        query = select(workflow_variables.c.value).where(
            workflow_variables.c.workflow_id == workflow_id, workflow_variables.c.key == key
        )
        text = await self.database.ask(lambda connection: connection.execute(query).scalar())
        return default if text is None else from_json(text)

    async def save_unit(self, key: StepKey, name: str, value: bytes) -> bytes:
        return await self.database.write(self._save_unit, (key, name, value))

    def _save_unit(self, tx: Tx, requests: Sequence[tuple[StepKey, str, bytes]]) -> list[bytes]:
        rows = [{**key._asdict(), "name": name, "value": value.decode()} for key, name, value in requests]
        tx.connection.execute(upsert(step_units).on_conflict_do_nothing(), rows)
        return [
            found if (found := _unit(tx.connection, key, name)) is not None else value
            for key, name, value in requests
        ]

    async def load_unit(self, key: StepKey, name: str) -> bytes | None:
        return await self.database.ask(lambda connection: _unit(connection, key, name))

    async def record_signal(self, workflow_id: str, name: str, value: bytes) -> None:
        _unwrap(await self.database.write(self._signal, (workflow_id, name, value)))

    def _signal(self, tx: Tx, requests: Sequence[tuple[str, str, bytes]]) -> list[PaigeantError | None]:
        statuses = _statuses(tx.connection, [run_id for run_id, _, _ in requests])
        answers: list[PaigeantError | None] = []
        for run_id, name, value in requests:
            status = statuses.get(run_id)
            if status is None:
                answers.append(RunNotFound(run_id))
            elif status in RUN_ENDED:
                answers.append(InvalidTransition(f"run '{run_id}' has ended {status}; it takes no signals"))
            else:
                tx.connection.execute(
                    insert(workflow_signals).values(
                        workflow_id=run_id, name=name, value=value.decode(), created_at=tx.now
                    )
                )
                answers.append(None)
        return answers

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
        found = _statuses(tx.connection, {run_id for ids in requests for run_id in ids})
        return [{run_id: found[run_id] for run_id in ids if run_id in found} for ids in requests]

    async def load_run(self, workflow_id: str, *, inline_bytes: int | None = None) -> RunDetail:
        answer = await self.database.read(self._load, (workflow_id, inline_bytes))
        detail: RunDetail = _unwrap(answer)
        return detail

    def _load(self, tx: Tx, requests: Sequence[tuple[str, int | None]]) -> list[RunDetail | RunNotFound]:
        answers: dict[tuple[str, int | None], RunDetail] = {}
        for limit in {limit for _, limit in requests}:
            ids = {run_id for run_id, wanted in requests if wanted == limit}
            found = _details(tx.connection, ids, limit)
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
            lambda connection: [_run(row._asdict()) for row in connection.execute(query.limit(limit))]
        )

    async def list_variables(self, workflow_id: str) -> dict[str, Any]:
        detail = await self.load_run(workflow_id, inline_bytes=0)
        return {name: from_json(value) for name, value in detail.variables.items()}

    async def list_workers(self) -> list[WorkerRecord]:
        return await self.database.ask(
            lambda connection: [WorkerRecord(**row._mapping) for row in connection.execute(select(workers))]
        )

    # -- dead letters

    async def bury(self, letter: DeadLetter) -> None:
        await self.database.write(self._bury, letter)

    def _bury(self, tx: Tx, requests: Sequence[DeadLetter]) -> list[None]:
        rows = [
            {column.name: getattr(letter, column.name) for column in dead_letters.c}
            | {"created_at": letter.created_at or tx.now}
            for letter in requests
        ]
        tx.connection.execute(upsert(dead_letters).on_conflict_do_nothing(), rows)
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
        execute = tx.connection.execute
        for key in changes.dropped:
            execute(delete(step_executions).where(*(c == v for c, v in zip(_KEY, key, strict=True))))
        _patch(tx.connection, step_executions, changes.steps)
        if changes.added:
            _NEW_STEP.each(tx.connection, [_new_step(row) for row in changes.added])
        _patch(tx.connection, workflow_runs, [((run_id,), patch) for run_id, patch in changes.runs])
        for run_id, patch in changes.runs:
            if patch.get("status") in RUN_ENDED:
                tx.rings.add(_ended(run_id, patch["status"]))
        _save_variables(
            tx.connection, [(run_id, name, value.decode()) for run_id, name, value in changes.variables]
        )
        if postings and self.outbox is not None:
            self.outbox(tx, postings)


class _Waiters:
    """Those who wait for runs to end: woken by commits of any process, and by a look now and then."""

    def __init__(self, store: SqlStore) -> None:
        self._store = store
        self._futures: dict[str, set[asyncio.Future[RunStatus]]] = {}
        self._looking: asyncio.Task[None] | None = None

    async def wait(self, workflow_id: str) -> RunStatus:
        future: asyncio.Future[RunStatus] = asyncio.get_running_loop().create_future()
        # Listen first, then look: an end in between is heard.
        self._futures.setdefault(workflow_id, set()).add(future)
        try:
            status = await self._store.run_status(workflow_id)
            if status in RUN_ENDED:
                return status
            if self._looking is None or self._looking.done():
                self._looking = asyncio.create_task(self._look_again())
            return await future
        finally:
            futures = self._futures.get(workflow_id, set())
            futures.discard(future)
            if not futures:
                self._futures.pop(workflow_id, None)

    def heard(self, names: frozenset[str]) -> None:
        if "*" in names and self._looking is not None:
            self._looking.cancel()
            self._looking = asyncio.create_task(self._look_again(at_once=True))
        for name in names:
            kind, _, rest = name.partition(" ")
            if kind == "ended":
                status, _, run_id = rest.partition(" ")
                self._end(run_id, RunStatus(status))

    def close(self) -> None:
        if self._looking is not None:
            self._looking.cancel()

    def _end(self, workflow_id: str, status: RunStatus) -> None:
        for future in self._futures.get(workflow_id, ()):
            if not future.done():
                future.set_result(status)

    async def _look_again(self, at_once: bool = False) -> None:
        pause = _LOOK_AGAIN_SECONDS if self._store.database.hears_others else _LOOK_OFTEN_SECONDS
        while self._futures:
            if not at_once:
                await asyncio.sleep(pause)
            at_once = False
            found = await self._store.statuses(list(self._futures))
            for run_id, status in found.items():
                if status in RUN_ENDED:
                    self._end(run_id, status)


def _ended(workflow_id: str, status: RunStatus) -> str:
    return f"ended {status.value} {workflow_id}"


def _conflict(run: RunRecord, workflow: str) -> RunConflict:
    other = f"workflow '{workflow}'" if workflow != run.workflow else "another input"
    return RunConflict(run.id, other)


def _unwrap(answer: Any) -> Any:
    if isinstance(answer, PaigeantError):
        raise answer
    return answer


def _encoded(text: str | None) -> bytes | None:
    return None if text is None else text.encode()


def _plain(value: Any) -> Any:
    """`value` as the driver takes it without a detour: texts for JSON and for states."""
    if isinstance(value, bytes):
        return value.decode()
    return value.value if isinstance(value, StrEnum) else value


def _key(row: Any) -> StepKey:
    return StepKey(row.workflow_id, row.step, Phase(row.phase))


# -- statements


def _head_query() -> Select[Any]:
    # A join with the keys as a table: SQLite answers `(a, b, c) IN (...)` with a scan of the whole index.
    keys = func.json_each(bindparam("keys")).table_valued("value")
    steps = step_executions.c
    places = ("$[0]", "$[1]", "$[2]")
    same = (
        column == func.json_extract(keys.c.value, literal_column(f"'{place}'"))
        for place, column in zip(places, _KEY, strict=True)
    )
    return (
        select(
            *_KEY,
            steps.seq,
            workflow_runs.c.status,
            steps.status,
            steps.epoch,
            steps.attempt,
            steps.worker,
            steps.not_before,
        )
        .select_from(keys)
        .join(step_executions, and_(*same))
        .join(workflow_runs, workflow_runs.c.id == steps.workflow_id)
    )


_ids = func.json_each(bindparam("ids")).table_valued("value")
_STARTED = Prepared(
    select(workflow_runs.c.id, workflow_runs.c.workflow, workflow_runs.c.input_hash).join(
        _ids, workflow_runs.c.id == _ids.c.value
    ),
    ["ids"],
)
_HEADS = Prepared(_head_query(), ["keys"])


def _heads(connection: Connection, keys: Sequence[StepKey]) -> dict[StepKey, Head]:
    heads = {}
    for workflow_id, step, phase, seq, run, status, epoch, attempt, worker, not_before in _HEADS.rows(
        connection, json.dumps(keys)
    ):
        key = StepKey(workflow_id, step, _PHASES[phase])
        heads[key] = Head(key, seq, _RUNS[run], _STEPS[status], epoch, attempt, worker, not_before)
    return heads


_PHASES = {phase.value: phase for phase in Phase}
_RUNS = {status.value: status for status in RunStatus}
_STEPS = {status.value: status for status in StepStatus}


def _orphans() -> Select[Any]:
    alive = select(workers.c.id)
    return select(*_KEY).where(
        step_executions.c.status == StepStatus.RUNNING, step_executions.c.worker.not_in(alive)
    )


def _due(now: float) -> Select[Any]:
    return (
        select(*_KEY)
        .where(step_executions.c.status == StepStatus.READY, step_executions.c.wake_at <= now)
        .order_by(step_executions.c.wake_at)
    )


def _late(now: float) -> Select[Any]:
    return select(workflow_runs.c.id).where(
        workflow_runs.c.deadline.is_not(None),
        workflow_runs.c.completed_at.is_(None),
        workflow_runs.c.deadline <= now,
        workflow_runs.c.status != RunStatus.COMPENSATING,
    )


@lru_cache(maxsize=64)
def _update(table: Table, columns: tuple[str, ...]) -> Prepared:
    keys = list(table.primary_key)
    places = [f"_key{place}" for place in range(len(keys))]
    statement = (
        update(table)
        .where(and_(*(column == bindparam(place) for column, place in zip(keys, places, strict=True))))
        .values({table.c[name]: bindparam(f"_{name}") for name in columns})
    )
    # The statement names its columns in the order of the table.
    ordered = [f"_{column.name}" for column in table.c if column.name in columns]
    return Prepared(statement, [*ordered, *places])


@lru_cache(maxsize=64)
def _order(table: Table, columns: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(column.name for column in table.c if column.name in columns)


def _patch(
    connection: Connection, table: Table, patches: Iterable[tuple[Sequence[str], dict[str, Any]]]
) -> None:
    kinds: dict[tuple[str, ...], list[tuple[Any, ...]]] = {}
    for key, patch in patches:
        columns = _order(table, tuple(patch))
        values = (*[_plain(patch[name]) for name in columns], *map(_plain, key))
        kinds.setdefault(columns, []).append(values)
    for columns, rows in kinds.items():
        _update(table, columns).each(connection, rows)


def _insert(table: Table, columns: Sequence[str]) -> Prepared:
    ordered = [column.name for column in table.c if column.name in columns]
    return Prepared(insert(table), ordered)


def _save_variables(connection: Connection, rows: Sequence[tuple[str, str, str]]) -> None:
    if not rows:
        return
    statement = upsert(workflow_variables)
    connection.execute(
        statement.on_conflict_do_update(
            index_elements=["workflow_id", "key"], set_={"value": statement.excluded.value}
        ),
        [{"workflow_id": run_id, "key": name, "value": value} for run_id, name, value in rows],
    )


_STATUSES = Prepared(
    select(workflow_runs.c.id, workflow_runs.c.status).join(_ids, workflow_runs.c.id == _ids.c.value), ["ids"]
)


def _statuses(connection: Connection, workflow_ids: Collection[str]) -> dict[str, RunStatus]:
    rows = _STATUSES.rows(connection, json.dumps(list(workflow_ids)))
    return {run_id: _RUNS[status] for run_id, status in rows}


def _unit(connection: Connection, key: StepKey, name: str) -> bytes | None:
    query = select(step_units.c.value).where(
        step_units.c.workflow_id == key.workflow_id,
        step_units.c.step == key.step,
        step_units.c.phase == key.phase,
        step_units.c.name == name,
    )
    return _encoded(connection.execute(query).scalar())


# -- rows


_NEW_RUN = _insert(workflow_runs, [column.name for column in workflow_runs.c])


def _new_run(run: RunRecord, *, now: float, ended: bool) -> tuple[Any, ...]:
    run = replace(run, created_at=now)
    if ended:
        run = replace(run, status=RunStatus.COMPLETED, started_at=now, completed_at=now)
    values = [_plain(getattr(run, column.name)) for column in workflow_runs.c]
    values[_HEADERS] = json.dumps(dict(run.headers))
    return tuple(values)


_HEADERS = [column.name for column in workflow_runs.c].index("headers")


def _run(row: Mapping[str, Any]) -> RunRecord:
    values = dict(row)
    values["status"] = RunStatus(values["status"])
    values["headers"] = json.loads(values["headers"])
    values["input"] = (values.get("input") or "").encode()
    values["slip"] = (values.get("slip") or "").encode()
    return RunRecord(**values)


_NEW_STEP_COLUMNS = (
    "workflow_id",
    "step",
    "phase",
    "seq",
    "activity",
    "topic",
    "status",
    "epoch",
    "attempt",
    "worker",
    "not_before",
    "wake_at",
    "created_at",
    "started_at",
)
_NEW_STEP = _insert(step_executions, _NEW_STEP_COLUMNS)
_new_step_values = attrgetter(*_NEW_STEP_COLUMNS)


def _new_step(step: StepRecord) -> tuple[Any, ...]:
    return tuple(map(_plain, _new_step_values(step)))


def _step(values: dict[str, Any]) -> StepRecord:
    values["phase"], values["status"] = _PHASES[values["phase"]], _STEPS[values["status"]]
    for name in ("input", "output", "revision", "usage"):
        values[name] = _encoded(values[name])
    return StepRecord(**values)


def _of_runs(table: Table, *columns: ColumnElement[Any]) -> Select[Any]:
    """The rows of `table` that belong to the runs asked for."""
    own = table.c.id if table is workflow_runs else table.c.workflow_id
    return select(*(columns or table.c)).join_from(_ids, table, own == _ids.c.value)


_DETAIL_RUNS = Prepared(_of_runs(workflow_runs), ["ids"])
# Of a text SQLite counts characters.
_output_bytes = func.length(cast(step_executions.c.output, LargeBinary))
_too_large = _output_bytes > bindparam("limit")
_DETAIL_STEPS = Prepared(
    _of_runs(
        step_executions,
        _too_large.label("too_large"),
        case((_output_bytes > bindparam("same"), null()), else_=step_executions.c.output),
        *(column for column in step_executions.c if column.name != "output"),
    ).order_by(step_executions.c.seq),
    ["limit", "same", "ids"],
)
_DETAIL_STEP_FIELDS = ("output", *(column.name for column in step_executions.c if column.name != "output"))
_RUN_FIELDS = [column.name for column in workflow_runs.c]
_DETAIL_VARIABLES = Prepared(_of_runs(workflow_variables), ["ids"])
_DETAIL_SIGNALS = Prepared(_of_runs(workflow_signals).order_by(workflow_signals.c.id), ["ids"])


def _details(
    connection: Connection, workflow_ids: Collection[str], inline_bytes: int | None
) -> dict[str, RunDetail]:
    """The runs that there are, with all of their rows."""
    ids = json.dumps(list(workflow_ids))
    limit = sys.maxsize if inline_bytes is None else inline_bytes
    steps: dict[str, list[StepRecord]] = {}
    stored: dict[str, set[str]] = {}
    for too_large, *values in _DETAIL_STEPS.rows(connection, limit, limit, ids):
        step = _step(dict(zip(_DETAIL_STEP_FIELDS, values, strict=True)))
        steps.setdefault(step.workflow_id, []).append(step)
        if too_large:
            stored.setdefault(step.workflow_id, set()).add(step.step)
    variables: dict[str, dict[str, bytes]] = {}
    for run_id, name, value in _DETAIL_VARIABLES.rows(connection, ids):
        variables.setdefault(run_id, {})[name] = value.encode()
    signals: dict[str, list[Signal]] = {}
    for _, run_id, name, value, created_at in _DETAIL_SIGNALS.rows(connection, ids):
        signals.setdefault(run_id, []).append(Signal(name, value.encode(), created_at))
    runs = [_run(dict(zip(_RUN_FIELDS, row, strict=True))) for row in _DETAIL_RUNS.rows(connection, ids)]
    return {
        run.id: RunDetail(
            run,
            tuple(steps.get(run.id, ())),
            variables.get(run.id, {}),
            tuple(signals.get(run.id, ())),
            frozenset(stored.get(run.id, ())),
        )
        for run in runs
    }


def _detail(connection: Connection, workflow_id: str, inline_bytes: int | None) -> RunDetail:
    found = _details(connection, [workflow_id], inline_bytes)
    if workflow_id not in found:
        raise RunNotFound(workflow_id)
    return found[workflow_id]
