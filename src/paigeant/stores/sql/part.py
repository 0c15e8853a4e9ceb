"""Part: what the parts of the SQL store have in common, and how changes are written."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar, runtime_checkable

from sqlalchemy import delete

from paigeant import interventions
from paigeant.database import Database
from paigeant.errors import PaigeantError
from paigeant.heads import lock_runs
from paigeant.lane import Tx, needing
from paigeant.ledger import Changes
from paigeant.rows import KEY, NEW_STEP, new_step, patch_rows, save_variables, units_of
from paigeant.slip import RUN_ENDED
from paigeant.store import StepKey
from paigeant.tables import step_executions, step_units, workflow_runs
from paigeant.transport import Posting
from paigeant.waiters import ended

__all__ = ["Outbox", "SqlPart", "bytes_of", "its_run", "one_by_one", "unwrapped"]


@runtime_checkable
class Outbox(Protocol):
    """The part of a transport that works within a store's transactions, when both are one database."""

    def post(self, tx: Tx, postings: Sequence[Posting]) -> None:
        """Write messages."""
        ...

    def waiting(self, tx: Tx, message_ids: Sequence[str]) -> set[str]:
        """Those of the messages that can be taken now. One that was taken, or is due later, is not among them."""
        ...


Request = TypeVar("Request")
Answer = TypeVar("Answer")

its_run = needing(lock_runs, lambda request: (request[0],))
"""Marks a handler of requests that begin with the id of a run."""


class SqlPart:
    """A part of the store: it knows the database, and writes what the ledger says."""

    def __init__(self, database: Database, *, grace: float = 10.0, inline_bytes: int = 65536) -> None:
        self.database = database
        self.grace = grace
        self.inline_bytes = inline_bytes
        self.outbox: Outbox | None = None

    async def now(self) -> float:
        """The store's time."""
        return await self.database.now()

    def write(self, tx: Tx, changes: Changes, postings: Sequence[Posting] = ()) -> None:
        """Write all changes, one statement for each kind."""
        for key in changes.dropped:  # rarely any: SQLAlchemy's connection ends the pipeline
            tx.connection.execute(
                delete(step_executions).where(*(c == v for c, v in zip(KEY, key, strict=True)))
            )
        for key in changes.renewed:
            self._forget_waits(tx, key)
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

    def _forget_waits(self, tx: Tx, key: StepKey) -> None:
        gone = interventions.done_anew(units_of(tx, key))
        if gone:
            of = step_units.c
            its = (of.workflow_id == key.workflow_id, of.step == key.step, of.phase == key.phase)
            tx.connection.execute(delete(step_units).where(*its, of.name.in_(gone)))


def one_by_one(
    requests: Sequence[Request], do: Callable[[Request], Answer], *, by: Callable[[Request], str]
) -> list[Answer]:
    """What `do` gives for each of the requests, done in the order of what each is `by`.

    In one order, so that no two transactions wait for each other.
    """
    places = sorted(range(len(requests)), key=lambda place: by(requests[place]))
    answers = {place: do(requests[place]) for place in places}
    return [answers[place] for place in range(len(requests))]


def bytes_of(*values: bytes | None) -> int:
    """The bytes of those of the values that there are: the size of a request to write them."""
    return sum(len(value) for value in values if value is not None)


def unwrapped(answer: Any) -> Any:
    """What a handler answered, which it raises here if it is an error."""
    if isinstance(answer, PaigeantError):
        raise answer
    return answer
