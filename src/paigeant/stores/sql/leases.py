"""Leases in SQL: heartbeats, and the sweep that puts back to work what nobody works on any more."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

from sqlalchemy import Select, and_, bindparam, delete, func, or_, select

from paigeant import interventions, ledger
from paigeant.due import due_steps, is_in, late_runs, orphan_steps, waiting_steps
from paigeant.heads import heads_of, lock_runs
from paigeant.lane import Tx, needing
from paigeant.ledger import Changes
from paigeant.message import MessageId
from paigeant.prepared import Prepared, upsert
from paigeant.rows import KEY, detail_of, key_of
from paigeant.slip import Phase, RunStatus, StepStatus
from paigeant.store import StepKey, Swept, WorkerRecord
from paigeant.stores.sql.part import SqlPart
from paigeant.tables import step_executions, workers

__all__ = ["Running", "SqlLeases"]

Running = Collection[tuple[StepKey, int]]


_LATE_SECONDS = 1.0
"""How long a sweep reads runs that are over their deadline, of which each may be large; the next one goes on with the
others. A database lets no transaction take longer than some seconds, and all that a sweep does would fail with it."""


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


def _held(tx: Tx, worker: str) -> set[tuple[StepKey, int]]:
    rows = _HELD.rows(tx, worker)
    return {(StepKey(run_id, step, Phase(phase)), epoch) for run_id, step, phase, epoch in rows}


def _runs_of(request: tuple[str, Running]) -> list[str]:
    return [key.workflow_id for key, _ in request[1]]


class _Beat(NamedTuple):
    worker: WorkerRecord
    lease: float
    running: Running
    forgotten: Running


class SqlLeases(SqlPart):
    """Who works on what, and what is left behind."""

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
            held = _held(tx, worker.id)
            changes = Changes()
            for step in set(forgotten) & held:
                ledger.free(step[0], changes, now=tx.now)
                held.discard(step)
            self.write(tx, changes)
            answers.append((set(running) - held, held - set(running)))
        return answers

    async def release_steps(self, worker: str, steps: Running) -> list[StepKey]:
        return await self.database.write(self._release, (worker, steps))

    @needing(lock_runs, _runs_of)
    def _release(self, tx: Tx, requests: Sequence[tuple[str, Running]]) -> list[list[StepKey]]:
        return self._let_go(tx, requests, self.grace)

    async def sign_off(self, worker_id: str) -> None:
        held = await self.database.read(self._held_by, worker_id)
        await self.database.write(self._sign_off, (worker_id, held))

    def _held_by(self, tx: Tx, requests: Sequence[str]) -> list[set[tuple[StepKey, int]]]:
        return [_held(tx, worker) for worker in requests]

    @needing(lock_runs, _runs_of)
    def _sign_off(self, tx: Tx, requests: Sequence[tuple[str, Running]]) -> list[None]:
        self._let_go(tx, requests, grace=0.0)
        # What it has claimed since it was looked for is freed by a sweep: its worker isn't there any more.
        tx.connection.execute(delete(workers).where(workers.c.id.in_([worker for worker, _ in requests])))
        return [None] * len(requests)

    def _let_go(self, tx: Tx, requests: Sequence[tuple[str, Running]], grace: float) -> list[list[StepKey]]:
        heads = heads_of(tx, [key for _, steps in requests for key, _ in steps])
        changes = Changes()
        answers = [
            [
                key
                for key, epoch in steps
                if ledger.release(heads.get(key), worker, epoch, changes, now=tx.now, grace=grace)
            ]
            for worker, steps in requests
        ]
        self.write(tx, changes)
        return answers

    async def sweep(
        self,
        *,
        gone: Collection[str] = (),
        spare: Collection[str] = (),
        empty: Collection[str] = (),
        topics: Collection[str] | None = None,
        limit: int = 500,
    ) -> Swept:
        if not gone and not empty and not await self.database.read(self._has_work, None):
            return Swept()
        return await self.database.write(self._sweep, (gone, spare, empty, topics, limit))

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

    def _sweep(self, tx: Tx, requests: Sequence[tuple[Any, ...]]) -> list[Swept]:
        return [self._sweep_once(tx, *request) for request in requests]

    def _sweep_once(
        self,
        tx: Tx,
        gone: Collection[str],
        spare: Collection[str],
        empty: Collection[str],
        topics: Collection[str] | None,
        limit: int,
    ) -> Swept:
        # It never waits: whose row somebody else has, is alive, or is being swept.
        lost = self._lost(tx, gone, spare)
        freed = self._freed(tx, limit)
        expired, failed = self._expired(tx, limit)
        self._wake(tx, limit)
        due = self._due(tx, empty, topics, limit, has_lost=bool(lost))
        return Swept(due, lost, freed, expired, failed, tx.now)

    def _lost(self, tx: Tx, gone: Collection[str], spare: Collection[str]) -> tuple[str, ...]:
        over = or_(
            and_(workers.c.lease_until <= tx.now, workers.c.id.not_in(list(spare))),
            workers.c.id.in_(list(gone)),
        )
        free = select(workers.c.id).where(over).with_for_update(skip_locked=True).cte("free")
        left = delete(workers).where(workers.c.id.in_(select(free.c.id))).returning(workers.c.id)
        return tuple(tx.connection.execute(left).scalars())

    def _freed(self, tx: Tx, limit: int) -> tuple[StepKey, ...]:
        """The steps whose worker is no more; they are put back to work."""
        changes = Changes()
        freed = tuple(key_of(row) for row in self._locked(tx, orphan_steps().limit(limit)))
        for key in freed:
            ledger.free(key, changes, now=tx.now)
        self.write(tx, changes)
        return freed

    def _expired(self, tx: Tx, limit: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The runs that are over their deadline; they turn round, and those of them that have failed with it."""
        changes = Changes()
        expired: dict[str, RunStatus] = {}
        # In no order: those with a slip of newer code can't be ended, and would else keep it from the others for ever.
        overdue = late_runs(tx.now).order_by(func.random()).limit(limit)
        late = tx.connection.execute(overdue).scalars().all()
        locked = lock_runs(tx, late, only_free=True)
        until = self.database.elapsed() + _LATE_SECONDS
        for run_id in filter(locked.__contains__, late):
            if self.database.elapsed() > until:
                break
            detail = detail_of(tx, run_id, self.inline_bytes)
            status = interventions.expire(detail, changes, now=tx.now, inline_bytes=self.inline_bytes)
            if status is not None:
                expired[run_id] = status
                tx.rings.add("turned")
        self.write(tx, changes)
        return tuple(expired), tuple(run_id for run_id in expired if expired[run_id] is RunStatus.FAILED)

    def _wake(self, tx: Tx, limit: int) -> None:
        """Have the steps whose wait is over done."""
        changes = Changes()
        for row in self._locked(tx, waiting_steps(tx.now).limit(limit)):
            ledger.wake(key_of(row), changes, now=tx.now)
        self.write(tx, changes)

    def _due(
        self,
        tx: Tx,
        empty: Collection[str],
        topics: Collection[str] | None,
        limit: int,
        *,
        has_lost: bool,
    ) -> tuple[StepKey, ...]:
        """The steps whose message may be lost; nobody looks for them again before their time."""
        changes = Changes()
        due = {}
        # A worker that is lost had fetched messages, the oldest first, and which ones nobody knows.
        overdue_since = tx.now - self.grace if has_lost else None
        wanted = due_steps(tx.now, overdue_since, empty, topics=topics, grace=self.grace)
        for row in self._locked(tx, wanted.limit(limit)):
            key = key_of(row)
            due[key] = row.epoch
            ledger.postpone(key, changes, now=tx.now, due_at=row.due_at, grace=self.grace)
        self.write(tx, changes)
        if self.outbox is not None and due:
            # A long queue is no lost message: what waits in this very database needn't be sent again.
            ids = {str(MessageId(*key, epoch)): key for key, epoch in due.items()}
            for message_id in self.outbox.waiting(tx, list(ids)):
                del due[ids[message_id]]
        return tuple(due)

    def _locked(self, tx: Tx, query: Select[Any]) -> list[Any]:
        """The rows of steps that `query` finds, as they are once their runs are locked, without those being changed."""
        found = tx.connection.execute(query).all()
        locked = lock_runs(tx, {row.workflow_id for row in found}, only_free=True)
        # What was found before the lock may have been changed since.
        again = tx.connection.execute(query).all() if found and tx.driver.dialect.name != "sqlite" else found
        return [row for row in again if row.workflow_id in locked]
