"""Messages in the embedded SQLite file."""

from __future__ import annotations

from sqlalchemy import select

from paigeant import host
from paigeant.errors import StoreUnavailable
from paigeant.table_transport import TableTransport
from paigeant.tables import messages

__all__ = ["SqliteTransport"]


class SqliteTransport(TableTransport):
    """All that use the file run on one host, so what a process held that has ended is free at once."""

    async def _gone(self) -> tuple[str, ...]:
        query = select(messages.c.holder).where(messages.c.holder.is_not(None)).distinct()
        try:
            holders = await self.database.ask(lambda connection: connection.execute(query).scalars().all())
        except StoreUnavailable:
            return ()  # locked, or closed meanwhile: their hold runs out by itself
        return tuple(holder for holder in holders if holder and host.is_holder_gone(holder))
