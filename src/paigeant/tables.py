"""Every SQL table, for stores, SQL transports and migrations alike.

What the columns mean stands with the records in `store.py`.
JSON comes back byte for byte as it was written, whatever the type of its column: in SQLite that is TEXT, in Postgres
JSON, which keeps the text. Variables, which other programs are to ask for, are JSONB there (`rows.py` says how what
JSONB would change is kept from it).
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import BigInteger, Column, Double, Index, Integer, LargeBinary, MetaData, Table, Text, text
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.types import UserDefinedType

__all__ = [
    "SCHEMA_VERSION",
    "VERSION_TABLE",
    "dead_letters",
    "messages",
    "metadata",
    "step_executions",
    "step_units",
    "workers",
    "workflow_logs",
    "workflow_requests",
    "workflow_runs",
    "workflow_signals",
    "workflow_variables",
]

SCHEMA_VERSION = "0001"
"""The newest migration. A test holds it against `migrations/versions`."""

VERSION_TABLE = "paigeant_version"
"""Where the migration stands that a database is at. Not in Alembic's own table, which may be that of the application
whose database it is: each of the two would take the other's migration for one of its own that it doesn't know."""

metadata = MetaData()


class Json(UserDefinedType[str]):
    """JSON that goes in and out as a text."""

    cache_ok = True

    def __init__(self, *, binary: bool = False) -> None:
        self.binary = binary

    def get_col_spec(self, **_: Any) -> str:
        """The type in a server's DDL."""
        return "JSONB" if self.binary else "JSON"


@compiles(Json, "sqlite")
def _json_in_sqlite(*_: Any, **__: Any) -> str:
    return "TEXT"


_Serial = BigInteger().with_variant(Integer, "sqlite")

# A row of these is changed soon after it was made, or soon deleted: room on its page saves the indexes from knowing,
# and the dead ones are taken away early.
_QUEUE = {"fillfactor": "70", "autovacuum_vacuum_scale_factor": "0.01", "autovacuum_vacuum_threshold": "1000"}
_HISTORY = {
    "fillfactor": "85",
    "autovacuum_vacuum_scale_factor": "0.02",
    "autovacuum_analyze_scale_factor": "0.02",
}

workflow_runs = Table(
    "workflow_runs",
    metadata,
    Column("id", Text, primary_key=True),
    Column("workflow", Text, nullable=False),
    Column("status", Text, nullable=False),
    Column("input", Json(), nullable=False),
    Column("input_hash", Text, nullable=False),
    Column("slip", Json(), nullable=False),
    Column("correlation_id", Text, nullable=False),
    Column("trace_id", Text, nullable=False),
    Column("headers", Json(), nullable=False),
    Column("ending", Text),
    Column("error", Text),
    Column("deadline", Double),
    Column("created_at", Double, nullable=False),
    Column("started_at", Double),
    Column("completed_at", Double),
    Index("workflow_runs_newest", "created_at", "id"),
    Index(
        "workflow_runs_deadline",
        "deadline",
        sqlite_where=text("deadline IS NOT NULL AND completed_at IS NULL"),
        postgresql_where=text("deadline IS NOT NULL AND completed_at IS NULL"),
    ),
    postgresql_with=_HISTORY,
)

step_executions = Table(
    "step_executions",
    metadata,
    Column("workflow_id", Text, primary_key=True),
    Column("step", Text, primary_key=True),
    Column("phase", Text, primary_key=True),
    Column("seq", Integer, nullable=False),
    Column("activity", Text, nullable=False),
    Column("topic", Text, nullable=False),
    Column("status", Text, nullable=False),
    Column("epoch", Integer, nullable=False),
    Column("attempt", Integer, nullable=False),
    Column("worker", Text),
    Column("not_before", Double, nullable=False),
    Column("wake_at", Double, nullable=False),
    Column("input", Json()),
    Column("output", Json()),
    Column("error", Text),
    Column("revision", Json()),
    Column("undo_topic", Text),
    Column("usage", Json()),
    Column("created_at", Double, nullable=False),
    Column("started_at", Double),
    Column("completed_at", Double),
    Column("waits_for", Json()),
    Index(
        "step_executions_ready",
        "wake_at",
        sqlite_where=text("status = 'ready'"),
        postgresql_where=text("status = 'ready'"),
    ),
    Index(
        "step_executions_running",
        "worker",
        sqlite_where=text("status = 'running'"),
        postgresql_where=text("status = 'running'"),
    ),
    Index(
        "step_executions_waiting",
        "wake_at",
        sqlite_where=text("status = 'waiting'"),
        postgresql_where=text("status = 'waiting'"),
    ),
    postgresql_with=_HISTORY,
)

workflow_variables = Table(
    "workflow_variables",
    metadata,
    Column("workflow_id", Text, primary_key=True),
    Column("key", Text, primary_key=True),
    Column("value", Json(binary=True), nullable=False),
)

workflow_signals = Table(
    "workflow_signals",
    metadata,
    Column("id", _Serial, primary_key=True),
    Column("workflow_id", Text, nullable=False, index=True),
    Column("name", Text, nullable=False),
    Column("value", Json(), nullable=False),
    Column("created_at", Double, nullable=False),
    Column("sender", Text, nullable=False),
    Column("taken_by", Text),
)

workflow_requests = Table(
    "workflow_requests",
    metadata,
    Column("id", Text, primary_key=True),
    Column("workflow_id", Text, nullable=False, index=True),
    Column("step", Text, nullable=False),
    Column("kind", Text, nullable=False),
    Column("name", Text, nullable=False),
    Column("asked", Json(), nullable=False),
    Column("created_at", Double, nullable=False, index=True),
    Column("expires_at", Double),
)

step_units = Table(
    "step_units",
    metadata,
    Column("workflow_id", Text, primary_key=True),
    Column("step", Text, primary_key=True),
    Column("phase", Text, primary_key=True),
    Column("name", Text, primary_key=True),
    Column("value", Json(), nullable=False),
)

workers = Table(
    "workers",
    metadata,
    Column("id", Text, primary_key=True),
    Column("host", Text, nullable=False),
    Column("process", Text, nullable=False),
    Column("lease_until", Double, nullable=False),
    postgresql_with=_QUEUE,
)

messages = Table(
    "messages",
    metadata,
    Column("id", _Serial, primary_key=True),
    Column("message_id", Text, nullable=False, unique=True),
    Column("topic", Text, nullable=False),
    Column("body", LargeBinary, nullable=False),
    Column("due_at", Double, nullable=False),
    Column("held_until", Double, nullable=False),
    Column("created_at", Double, nullable=False),
    Column("deliveries", Integer, nullable=False),
    Column("holder", Text),
    Index("messages_next", "topic", "due_at"),
    # In Postgres it would cost each taking of a message an entry in every index of the table.
    Index("messages_held", "holder", sqlite_where=text("holder IS NOT NULL")).ddl_if(dialect="sqlite"),
    postgresql_with=_QUEUE,
)

workflow_logs = Table(
    "workflow_logs",
    metadata,
    Column("id", _Serial, primary_key=True),
    Column("at", Double, nullable=False),
    Column("level", Integer, nullable=False),
    Column("event", Text, nullable=False),
    Column("workflow_id", Text),
    Column("step", Text),
    Column("fields", Json(), nullable=False),
    Index(
        "workflow_logs_of_run",
        "workflow_id",
        "at",
        sqlite_where=text("workflow_id IS NOT NULL"),
        postgresql_where=text("workflow_id IS NOT NULL"),
    ),
    Index("workflow_logs_at", "at"),
)

dead_letters = Table(
    "dead_letters",
    metadata,
    Column("id", Text, primary_key=True),
    Column("topic", Text, nullable=False),
    Column("reason", Text, nullable=False),
    Column("detail", Text, nullable=False),
    Column("body", LargeBinary, nullable=False),
    Column("attempts", Integer, nullable=False),
    Column("workflow_id", Text),
    Column("step", Text),
    Column("created_at", Double, nullable=False, index=True),
)
