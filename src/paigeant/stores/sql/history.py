"""What surfaces read of runs in SQL. Nothing here changes anything but dead letters."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from pydantic_core import from_json
from sqlalchemy import Select, delete, func, select, tuple_

from paigeant import codec
from paigeant.database import ENDED, Database
from paigeant.due import open_topics
from paigeant.errors import RunNotFound
from paigeant.lane import Later, Tx
from paigeant.prepared import upsert
from paigeant.rows import details_of, run_of, statuses_of
from paigeant.slip import RunStatus
from paigeant.store import DeadLetter, OpenTopic, RunDetail, RunRecord, WorkerRecord
from paigeant.stores.sql.part import SqlPart, one_by_one, unwrapped
from paigeant.tables import dead_letters, workers, workflow_runs
from paigeant.waiters import Waiters

__all__ = ["SqlHistory"]

_BURY = upsert(dead_letters, [column.name for column in dead_letters.c], key=["id"], update=None)


class SqlHistory(SqlPart):
    """Runs, workers, topics and dead letters, as they stand."""

    def __init__(self, database: Database, *, grace: float = 10.0, inline_bytes: int = 65536) -> None:
        super().__init__(database, grace=grace, inline_bytes=inline_bytes)
        self.waiters = Waiters(
            self.statuses,
            hears_others=lambda: database.hears_others,
            hear=lambda: database.attend(ENDED),
        )

    async def wait_ended(self, workflow_id: str) -> RunStatus:
        self.database.check_loop()
        return await self.waiters.wait(workflow_id)

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
        answer: RunDetail | RunNotFound = await self.database.read(self._load, (workflow_id, inline_bytes))
        detail: RunDetail = unwrapped(answer)
        return detail

    def _load(
        self, tx: Tx, requests: Sequence[tuple[str, int | None]]
    ) -> list[RunDetail | RunNotFound | Later[RunDetail | RunNotFound]]:
        wanted: dict[int | None, set[str]] = {}
        for run_id, limit in requests:
            wanted.setdefault(limit, set()).add(run_id)
        found = {limit: _Details(details_of(tx, ids, limit)) for limit, ids in wanted.items()}
        return [Later(partial(found[limit].of, run_id)) for run_id, limit in requests]

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
        await self.database.write(self._bury, letter, size=len(letter.body))

    def _bury(self, tx: Tx, requests: Sequence[DeadLetter]) -> list[None]:
        # Whoever writes to a broker chooses ids and names: none of them may keep a letter from being kept.
        letters = [replace(letter, created_at=letter.created_at or tx.now) for letter in requests]
        rows = [[getattr(letter, column.name) for column in dead_letters.c] for letter in letters]
        kept = [tuple(codec.storable(v) if isinstance(v, str) else v for v in row) for row in rows]
        _BURY.each(tx, sorted(kept, key=lambda row: row[0]))
        return [None] * len(requests)

    async def list_dead_letters(self, *, limit: int = 100) -> list[DeadLetter]:
        columns = [column for column in dead_letters.c if column.name != "body"]
        query = select(*columns).order_by(dead_letters.c.created_at.desc()).limit(limit)
        return await self.database.ask(
            lambda connection: [DeadLetter(**row._mapping, body=b"") for row in connection.execute(query)]
        )

    async def count_dead_letters(self) -> int:
        query = select(func.count()).select_from(dead_letters)
        return await self.database.ask(lambda connection: connection.execute(query).scalar_one())

    async def count_stray_letters(self, *, before: float) -> int:
        query = select(func.count()).select_from(_strays(before).subquery())
        count: int = await self.database.ask(lambda connection: connection.execute(query).scalar_one())
        return count

    async def prune_stray_letters(self, *, before: float, limit: int = 500) -> int:
        return await self.database.write(self._prune_strays, (before, limit))

    def _prune_strays(self, tx: Tx, requests: Sequence[tuple[float, int]]) -> list[int]:
        def prune(request: tuple[float, int]) -> int:
            before, limit = request
            # One that somebody has locked is just being deleted.
            query = _strays(before).limit(limit).with_for_update(skip_locked=True, of=dead_letters)
            gone = tx.connection.execute(query).scalars().all()
            if gone:
                tx.connection.execute(delete(dead_letters).where(dead_letters.c.id.in_(gone)))
            return len(gone)

        return [prune(request) for request in requests]

    async def load_dead_letter(self, letter_id: str) -> DeadLetter | None:
        query = select(dead_letters).where(dead_letters.c.id == letter_id)
        row = await self.database.ask(lambda connection: connection.execute(query).first())
        return None if row is None else DeadLetter(**row._mapping)

    async def delete_dead_letter(self, letter_id: str) -> bool:
        return await self.database.write(self._delete_dead_letter, letter_id)

    def _delete_dead_letter(self, tx: Tx, requests: Sequence[str]) -> list[bool]:
        def forget(letter: str) -> bool:
            gone = delete(dead_letters).where(dead_letters.c.id == letter)
            return tx.connection.execute(gone).rowcount > 0

        return one_by_one(requests, forget, by=str)


def _strays(before: float) -> Select[tuple[str]]:
    """The ids of the dead letters of before then that belong to no run here, the oldest first."""
    letters = dead_letters.c
    run = select(workflow_runs.c.id).where(workflow_runs.c.id == letters.workflow_id)
    return (
        select(letters.id)
        .where(letters.created_at < before, ~run.exists())
        .order_by(letters.created_at, letters.id)
    )


class _Details:
    """Runs that were asked for together. They are read once, whichever of them is looked at first."""

    def __init__(self, read: Callable[[], Mapping[str, RunDetail]]) -> None:
        self._read = read
        self._found: Mapping[str, RunDetail] | None = None

    def of(self, run_id: str) -> RunDetail | RunNotFound:
        if self._found is None:
            self._found = self._read()
        return self._found.get(run_id) or RunNotFound(run_id)
