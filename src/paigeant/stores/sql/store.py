"""The SQL store. It loads and writes rows; what may change is decided in `ledger.py`.

Each method hands a request to a handler; requests of one kind that meet in a transaction are done together, with one
multi-row statement for each kind of change.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

from sqlalchemy import Select, Text, and_, cast, delete, func, insert, or_, select

from paigeant import interventions, ledger
from paigeant.database import Database
from paigeant.errors import PaigeantError, RunConflict
from paigeant.heads import foreseen_heads, heads_of, lock_runs
from paigeant.lane import Later, Tx, needing
from paigeant.ledger import Changes, Head
from paigeant.rows import KEY, NEW_RUN, STARTED, detail_of, key_of, new_run
from paigeant.slip import RUN_ENDED, RunStatus, StepStatus
from paigeant.store import (
    ClaimRequest,
    Grant,
    NextStep,
    Recorded,
    Refused,
    RunDetail,
    RunRecord,
    StepKey,
    StepRecord,
    StepResult,
)
from paigeant.stores.sql import inbox
from paigeant.stores.sql.history import SqlHistory
from paigeant.stores.sql.leases import SqlLeases
from paigeant.stores.sql.outside import SqlOutside
from paigeant.stores.sql.part import Outbox, bytes_of, its_run, one_by_one, unwrapped
from paigeant.stores.sql.values import SqlValues
from paigeant.tables import (
    dead_letters,
    step_executions,
    step_units,
    workflow_logs,
    workflow_requests,
    workflow_runs,
    workflow_signals,
    workflow_variables,
)
from paigeant.transport import Posting, Transport
from paigeant.waiters import ended

__all__ = ["SqlStore"]


_FEW_CLAIMS = 4
"""Up to so many claims in a transaction go by what is foreseen: of many one is soon wrong, and then all are redone."""


class _Start(NamedTuple):
    run: RunRecord
    first: NextStep | None
    posting: Posting | None
    is_new: bool


class _Result(NamedTuple):
    result: StepResult
    posting: Posting | None


class SqlStore(SqlValues, SqlOutside, SqlHistory, SqlLeases):
    """Runs, steps and variables in SQL tables. The database may be shared with a transport."""

    def __init__(self, database: Database, *, grace: float = 10.0, inline_bytes: int = 65536) -> None:
        super().__init__(database, grace=grace, inline_bytes=inline_bytes)
        self._forget: Callable[[], None] | None = None

    @property
    def publishes(self) -> bool:
        """Whether postings are written by its own transactions."""
        return self.outbox is not None

    async def connect(self) -> None:
        if self._forget is None:
            await self.database.connect()
            self._forget = self.database.on_change(self.waiters.heard)

    async def close(self) -> None:
        if self._forget is not None:
            self._forget()
            self._forget = None
            self.waiters.close()
            await self.database.close()

    # -- a run's life

    async def record_workflow_start(
        self, run: RunRecord, first: NextStep | None, posting: Posting | None = None, *, is_new: bool = False
    ) -> bool:
        start = _Start(run, first, posting, is_new)
        size = bytes_of(run.input, run.slip, posting.body if posting else None)
        new: bool = unwrapped(await self.database.write(self._start, start, size=size))
        if new and first is not None:
            self.waiters.started(run.id)
        return new

    def _start(self, tx: Tx, requests: Sequence[_Start]) -> list[bool | PaigeantError]:
        # An id that is there all the same violates its key, and the transaction is done again.
        doubtful = [request.run.id for request in requests if not (request.is_new and tx.foresees)]
        there: dict[str, tuple[str, str]] = {}
        if doubtful:
            found = STARTED.rows(tx, doubtful)
            there = {run_id: (name, digest) for run_id, name, digest in found}
        answers: list[bool | PaigeantError] = []
        runs: list[tuple[Any, ...]] = []
        changes = Changes()
        postings: list[Posting] = []
        for run, first, posting, _ in requests:
            mine = (run.workflow, run.input_hash)
            known = there.setdefault(run.id, mine)
            if known is not mine:
                answers.append(_conflict(run, known[0]) if known != mine else False)
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
                    wake_at=max(tx.now, first.not_before) + (self.grace if first.is_sent else 0.0),
                    created_at=tx.now,
                )
            )
            if posting is not None:
                postings.append(posting)
        NEW_RUN.each(tx, sorted(runs))
        self.write(tx, changes, postings)
        return answers

    async def adopt_run(
        self, run: RunRecord, steps: Collection[StepRecord], variables: Mapping[str, bytes]
    ) -> bool:
        size = bytes_of(run.input, run.slip, *(row.output for row in steps), *variables.values())
        return await self.database.write(self._adopt, (run, steps, variables), size=size)

    def _adopt(
        self, tx: Tx, requests: Sequence[tuple[RunRecord, Collection[StepRecord], Mapping[str, bytes]]]
    ) -> list[bool]:
        return one_by_one(
            requests, lambda request: self._adopt_one(tx, *request), by=lambda request: request[0].id
        )

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
        self.write(tx, Changes(added=rows, variables=saved))
        # What a new row never has, one that was recorded elsewhere has.
        done = [row for row in rows if row.completed_at is not None]
        patches = [
            (
                row.key,
                {"output": row.output, "undo_topic": row.undo_topic, "completed_at": row.completed_at},
            )
            for row in done
        ]
        self.write(tx, Changes(steps=patches))
        return True

    async def claim_step(self, request: ClaimRequest) -> Grant | Refused:
        # Lost with the power, it is claimed again; its result brings the fsync.
        return await self.database.write(self._claim, request, durable=False)

    @needing(lock_runs, lambda request: (request.key.workflow_id,))
    def _claim(
        self, tx: Tx, requests: Sequence[ClaimRequest]
    ) -> Sequence[Grant | Refused | Later[Grant | Refused]]:
        foreseen = None
        if len(requests) <= _FEW_CLAIMS:
            foreseen = foreseen_heads(tx, [ledger.foreseen_for_claim(request) for request in requests])
        if foreseen is not None:
            heads, found = foreseen
            return [
                Later(partial(_as_found, answer, request.key, found))
                for request, answer in zip(requests, self._claimed(tx, heads, requests), strict=True)
            ]
        return self._claimed(tx, heads_of(tx, [request.key for request in requests]), requests)

    def _claimed(
        self, tx: Tx, heads: dict[StepKey, Head], requests: Sequence[ClaimRequest]
    ) -> list[Grant | Refused]:
        changes = Changes()
        answers: list[Grant | Refused] = []
        taken: set[StepKey] = set()
        for request in requests:
            if request.key in taken:  # in this transaction: the rows read above are no longer right
                answers.append(Refused("taken"))
                continue
            answer = ledger.claim(heads.get(request.key), request, changes, now=tx.now)
            if isinstance(answer, Grant):
                taken.add(request.key)
            answers.append(answer)
        self.write(tx, changes)
        return answers

    async def record_step_result(
        self, result: StepResult, posting: Posting | None = None
    ) -> Recorded | Refused:
        values = (result.input, result.output, result.revision, *result.variables.values())
        size = bytes_of(*values, posting.body if posting else None)
        return await self.database.write(self._record, _Result(result, posting), size=size)

    @needing(lock_runs, lambda request: (request.result.key.workflow_id,))
    def _record(self, tx: Tx, requests: Sequence[_Result]) -> list[Recorded | Refused]:
        foreseen = foreseen_heads(tx, [ledger.foreseen_for_record(result) for result, _ in requests])
        heads = heads_of(tx, [result.key for result, _ in requests]) if foreseen is None else foreseen[0]
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
        self.write(tx, changes, postings)
        return answers

    # -- operators

    async def cancel_run(self, workflow_id: str, reason: str) -> RunStatus:
        status: RunStatus = unwrapped(await self.database.write(self._cancel, (workflow_id, reason)))
        return status

    @its_run
    def _cancel(self, tx: Tx, requests: Sequence[tuple[str, str]]) -> list[RunStatus | PaigeantError]:
        def stop(reason: str, detail: RunDetail, changes: Changes) -> RunStatus:
            limit = self.inline_bytes
            return interventions.stop(
                detail, RunStatus.CANCELLED, reason, changes, now=tx.now, inline_bytes=limit
            )

        return [self._turn(tx, run_id, partial(stop, reason)) for run_id, reason in requests]

    async def retry_run(self, workflow_id: str) -> RunStatus:
        status: RunStatus = unwrapped(await self.database.write(self._retry, workflow_id))
        return status

    @needing(lock_runs, lambda workflow_id: (workflow_id,))
    def _retry(self, tx: Tx, requests: Sequence[str]) -> list[RunStatus | PaigeantError]:
        resume = partial(interventions.resume, now=tx.now, inline_bytes=self.inline_bytes)
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
        self.write(tx, changes)
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
            for table in (*theirs, workflow_logs):
                tx.connection.execute(delete(table).where(table.c.workflow_id.in_(gone)))
            # Nobody's lock on a run keeps its letters: one that somebody has is just being deleted.
            free = select(dead_letters.c.id).where(dead_letters.c.workflow_id.in_(gone))
            letters = free.with_for_update(skip_locked=True).cte("letters")
            tx.connection.execute(delete(dead_letters).where(dead_letters.c.id.in_(select(letters.c.id))))
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


def _as_found(
    answer: Grant | Refused, key: StepKey, found: Callable[[], dict[StepKey, Head]]
) -> Grant | Refused:
    """A grant with the time for which its step had really been due."""
    if isinstance(answer, Refused):
        return answer
    return ledger.queued_since(answer, found()[key])


def _conflict(run: RunRecord, workflow: str) -> RunConflict:
    other = f"workflow '{workflow}'" if workflow != run.workflow else "another input"
    return RunConflict(run.id, other)
