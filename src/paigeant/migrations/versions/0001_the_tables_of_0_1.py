"""The tables of 0.1.

They are written out here and not taken from `tables.py`: a migration stays as it is when the tables go on.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision: str = "0001"
down_revision: str | None = None
branch_labels: None = None
depends_on: None = None


_JSON = sa.Text().with_variant(postgresql.JSON(), "postgresql")
_JSONB = sa.Text().with_variant(postgresql.JSONB(), "postgresql")
_SERIAL = sa.Integer().with_variant(sa.BigInteger(), "postgresql")
_QUEUE = {"fillfactor": "70", "autovacuum_vacuum_scale_factor": "0.01", "autovacuum_vacuum_threshold": "1000"}
_HISTORY = {
    "fillfactor": "85",
    "autovacuum_vacuum_scale_factor": "0.02",
    "autovacuum_analyze_scale_factor": "0.02",
}


def upgrade() -> None:
    """Make all tables."""
    op.create_table(
        "workflow_runs",
        sa.Column("id", sa.Text, primary_key=True),
        sa.Column("workflow", sa.Text, nullable=False),
        sa.Column("status", sa.Text, nullable=False),
        sa.Column("input", _JSON, nullable=False),
        sa.Column("input_hash", sa.Text, nullable=False),
        sa.Column("slip", _JSON, nullable=False),
        sa.Column("correlation_id", sa.Text, nullable=False),
        sa.Column("trace_id", sa.Text, nullable=False),
        sa.Column("headers", _JSON, nullable=False),
        sa.Column("ending", sa.Text),
        sa.Column("error", sa.Text),
        sa.Column("deadline", sa.Double),
        sa.Column("created_at", sa.Double, nullable=False),
        sa.Column("started_at", sa.Double),
        sa.Column("completed_at", sa.Double),
        postgresql_with=_HISTORY,
    )
    op.create_index("workflow_runs_newest", "workflow_runs", ["created_at", "id"])
    _index(
        "workflow_runs_deadline",
        "workflow_runs",
        ["deadline"],
        "deadline IS NOT NULL AND completed_at IS NULL",
    )

    op.create_table(
        "step_executions",
        sa.Column("workflow_id", sa.Text, primary_key=True),
        sa.Column("step", sa.Text, primary_key=True),
        sa.Column("phase", sa.Text, primary_key=True),
        sa.Column("seq", sa.Integer, nullable=False),
        sa.Column("activity", sa.Text, nullable=False),
        sa.Column("topic", sa.Text, nullable=False),
        sa.Column("status", sa.Text, nullable=False),
        sa.Column("epoch", sa.Integer, nullable=False),
        sa.Column("attempt", sa.Integer, nullable=False),
        sa.Column("worker", sa.Text),
        sa.Column("not_before", sa.Double, nullable=False),
        sa.Column("wake_at", sa.Double, nullable=False),
        sa.Column("input", _JSON),
        sa.Column("output", _JSON),
        sa.Column("error", sa.Text),
        sa.Column("revision", _JSON),
        sa.Column("undo_topic", sa.Text),
        sa.Column("usage", _JSON),
        sa.Column("created_at", sa.Double, nullable=False),
        sa.Column("started_at", sa.Double),
        sa.Column("completed_at", sa.Double),
        sa.Column("waits_for", _JSON),
        postgresql_with=_HISTORY,
    )
    _index("step_executions_ready", "step_executions", ["wake_at"], "status = 'ready'")
    _index("step_executions_running", "step_executions", ["worker"], "status = 'running'")
    _index("step_executions_waiting", "step_executions", ["wake_at"], "status = 'waiting'")

    op.create_table(
        "workflow_variables",
        sa.Column("workflow_id", sa.Text, primary_key=True),
        sa.Column("key", sa.Text, primary_key=True),
        sa.Column("value", _JSONB, nullable=False),
    )

    op.create_table(
        "workflow_signals",
        sa.Column("id", _SERIAL, primary_key=True),
        sa.Column("workflow_id", sa.Text, nullable=False),
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("value", _JSON, nullable=False),
        sa.Column("created_at", sa.Double, nullable=False),
        sa.Column("sender", sa.Text, nullable=False),
        sa.Column("taken_by", sa.Text),
    )
    op.create_index("ix_workflow_signals_workflow_id", "workflow_signals", ["workflow_id"])

    op.create_table(
        "workflow_requests",
        sa.Column("id", sa.Text, primary_key=True),
        sa.Column("workflow_id", sa.Text, nullable=False),
        sa.Column("step", sa.Text, nullable=False),
        sa.Column("kind", sa.Text, nullable=False),
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("asked", _JSON, nullable=False),
        sa.Column("created_at", sa.Double, nullable=False),
        sa.Column("expires_at", sa.Double),
    )
    op.create_index("ix_workflow_requests_workflow_id", "workflow_requests", ["workflow_id"])
    op.create_index("ix_workflow_requests_created_at", "workflow_requests", ["created_at"])

    op.create_table(
        "step_units",
        sa.Column("workflow_id", sa.Text, primary_key=True),
        sa.Column("step", sa.Text, primary_key=True),
        sa.Column("phase", sa.Text, primary_key=True),
        sa.Column("name", sa.Text, primary_key=True),
        sa.Column("value", _JSON, nullable=False),
    )

    op.create_table(
        "workers",
        sa.Column("id", sa.Text, primary_key=True),
        sa.Column("host", sa.Text, nullable=False),
        sa.Column("process", sa.Text, nullable=False),
        sa.Column("lease_until", sa.Double, nullable=False),
        postgresql_with=_QUEUE,
    )

    op.create_table(
        "messages",
        sa.Column("id", _SERIAL, primary_key=True),
        sa.Column("message_id", sa.Text, nullable=False, unique=True),
        sa.Column("topic", sa.Text, nullable=False),
        sa.Column("body", sa.LargeBinary, nullable=False),
        sa.Column("due_at", sa.Double, nullable=False),
        sa.Column("held_until", sa.Double, nullable=False),
        sa.Column("created_at", sa.Double, nullable=False),
        sa.Column("deliveries", sa.Integer, nullable=False),
        sa.Column("holder", sa.Text),
        postgresql_with=_QUEUE,
    )
    op.create_index("messages_next", "messages", ["topic", "due_at"])
    if op.get_bind().dialect.name == "sqlite":
        _index("messages_held", "messages", ["holder"], "holder IS NOT NULL")

    op.create_table(
        "workflow_logs",
        sa.Column("id", _SERIAL, primary_key=True),
        sa.Column("at", sa.Double, nullable=False),
        sa.Column("level", sa.Integer, nullable=False),
        sa.Column("event", sa.Text, nullable=False),
        sa.Column("workflow_id", sa.Text),
        sa.Column("step", sa.Text),
        sa.Column("fields", _JSON, nullable=False),
    )
    _index("workflow_logs_of_run", "workflow_logs", ["workflow_id", "at"], "workflow_id IS NOT NULL")
    op.create_index("workflow_logs_at", "workflow_logs", ["at"])

    op.create_table(
        "dead_letters",
        sa.Column("id", sa.Text, primary_key=True),
        sa.Column("topic", sa.Text, nullable=False),
        sa.Column("reason", sa.Text, nullable=False),
        sa.Column("detail", sa.Text, nullable=False),
        sa.Column("body", sa.LargeBinary, nullable=False),
        sa.Column("attempts", sa.Integer, nullable=False),
        sa.Column("workflow_id", sa.Text),
        sa.Column("step", sa.Text),
        sa.Column("created_at", sa.Double, nullable=False),
    )
    op.create_index("ix_dead_letters_created_at", "dead_letters", ["created_at"])


def downgrade() -> None:
    """Drop all tables, with what is in them."""
    for table in (
        "workflow_logs",
        "dead_letters",
        "messages",
        "workers",
        "step_units",
        "workflow_requests",
        "workflow_signals",
        "workflow_variables",
        "step_executions",
        "workflow_runs",
    ):
        op.drop_table(table)


def _index(name: str, table: str, columns: list[str], where: str) -> None:
    op.create_index(name, table, columns, sqlite_where=sa.text(where), postgresql_where=sa.text(where))
