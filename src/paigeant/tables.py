"""Every SQL table, for stores, SQL transports and migrations alike.

What the columns mean stands with the records in `store.py`.
JSON is kept as text exactly as it was written: what was recorded comes back byte for byte.
"""

from __future__ import annotations

from sqlalchemy import (
    Column,
    Double,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    Table,
    Text,
    text,
)

__all__ = [
    "SCHEMA_VERSION",
    "dead_letters",
    "messages",
    "metadata",
    "step_executions",
    "step_units",
    "workers",
    "workflow_runs",
    "workflow_signals",
    "workflow_variables",
]

SCHEMA_VERSION = "0001"
"""The newest migration. A test holds it against `migrations/versions`."""

metadata = MetaData()

workflow_runs = Table(
    "workflow_runs",
    metadata,
    Column("id", Text, primary_key=True),
    Column("workflow", Text, nullable=False),
    Column("status", Text, nullable=False),
    Column("input", Text, nullable=False),
    Column("input_hash", Text, nullable=False),
    Column("slip", Text, nullable=False),
    Column("correlation_id", Text, nullable=False),
    Column("trace_id", Text, nullable=False),
    Column("headers", Text, nullable=False),
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
    Column("input", Text),
    Column("output", Text),
    Column("error", Text),
    Column("revision", Text),
    Column("undo_topic", Text),
    Column("usage", Text),
    Column("created_at", Double, nullable=False),
    Column("started_at", Double),
    Column("completed_at", Double),
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
)

workflow_variables = Table(
    "workflow_variables",
    metadata,
    Column("workflow_id", Text, primary_key=True),
    Column("key", Text, primary_key=True),
    Column("value", Text, nullable=False),
)

workflow_signals = Table(
    "workflow_signals",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("workflow_id", Text, nullable=False, index=True),
    Column("name", Text, nullable=False),
    Column("value", Text, nullable=False),
    Column("created_at", Double, nullable=False),
)

step_units = Table(
    "step_units",
    metadata,
    Column("workflow_id", Text, primary_key=True),
    Column("step", Text, primary_key=True),
    Column("phase", Text, primary_key=True),
    Column("name", Text, primary_key=True),
    Column("value", Text, nullable=False),
)

workers = Table(
    "workers",
    metadata,
    Column("id", Text, primary_key=True),
    Column("host", Text, nullable=False),
    Column("process", Text, nullable=False),
    Column("lease_until", Double, nullable=False),
)

messages = Table(
    "messages",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("message_id", Text, nullable=False, unique=True),
    Column("topic", Text, nullable=False),
    Column("body", LargeBinary, nullable=False),
    Column("visible_at", Double, nullable=False),
    Column("created_at", Double, nullable=False),
    Column("deliveries", Integer, nullable=False),
    Column("holder", Text),
    Index("messages_next", "topic", "visible_at"),
    Index(
        "messages_held",
        "holder",
        sqlite_where=text("holder IS NOT NULL"),
        postgresql_where=text("holder IS NOT NULL"),
    ),
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
