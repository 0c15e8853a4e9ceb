"""Our stores keep what `Store` and `RunHistory` promise."""

from __future__ import annotations

import asyncio
import sys

from paigeant.databases.sqlite import SqliteDatabase
from paigeant.slip import RunStatus
from paigeant.store import Store
from paigeant.stores.memory import MemoryStore
from paigeant.stores.sql import SqlStore
from paigeant.testing.conformance import StoreConformance


class TestMemoryStore(StoreConformance):
    shared = False
    durable = False

    def make(self) -> Store:
        return MemoryStore(clock=self.clock, grace=self.grace)


class TestSqliteStore(StoreConformance):
    def make(self) -> Store:
        return SqlStore(SqliteDatabase(f"sqlite:///{self.place}/s.db", clock=self.clock), grace=self.grace)

    async def test_another_process_ends_a_wait(self, store: Store) -> None:
        """Who waits here is woken by the commit of another process."""
        await self.start(store)
        waiting = asyncio.create_task(store.wait_ended("r"))
        await asyncio.sleep(0)
        url = f"sqlite:///{self.place}/s.db"
        child = await asyncio.create_subprocess_exec(sys.executable, "-c", _CANCEL, url)
        assert await asyncio.wait_for(waiting, 60) is RunStatus.CANCELLED
        assert await child.wait() == 0


_CANCEL = """
import asyncio, sys
from paigeant.databases.sqlite import SqliteDatabase
from paigeant.stores.sql import SqlStore

async def main():
    store = SqlStore(SqliteDatabase(sys.argv[1]))
    await store.connect()
    await store.cancel_run("r", "from afar")
    await store.close()

asyncio.run(main())
"""
