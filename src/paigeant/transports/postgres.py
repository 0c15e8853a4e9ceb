"""Messages in a table of a Postgres database, best in the store's own, whose transactions then send them."""

from __future__ import annotations

from paigeant.table_transport import TableTransport

__all__ = ["PostgresTransport"]


class PostgresTransport(TableTransport):
    """Takes messages with SKIP LOCKED in transactions of milliseconds; what a lost process held comes back in time."""
