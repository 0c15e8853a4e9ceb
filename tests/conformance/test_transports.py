"""Our transports keep what `Transport` promises."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path

import pytest
from tests.patience import PATIENCE

from paigeant.databases.sqlite import SqliteDatabase
from paigeant.envelope import PlainEnvelope
from paigeant.errors import TransportUnavailable
from paigeant.testing.conformance import TransportConformance
from paigeant.testing.conformance.transports import message
from paigeant.transport import Posting, Transport
from paigeant.transports.memory import MemoryTransport
from paigeant.transports.sqlite import SqliteTransport


class TestMemoryTransport(TransportConformance):
    shared = False
    durable = False

    def make(self) -> Transport:
        return MemoryTransport(clock=self.clock, envelope=PlainEnvelope(self.limit_bytes))

    async def deliver_raw(self, transport: Transport, topic: str, message_id: str, body: bytes) -> None:
        assert isinstance(transport, MemoryTransport)
        transport.put(topic, message_id, body)


class TestSqliteTransport(TransportConformance):
    def make(self) -> Transport:
        database = SqliteDatabase(f"sqlite:///{self.place}/q.db", clock=self.clock)
        return SqliteTransport(database, envelope=PlainEnvelope(self.limit_bytes))

    async def deliver_raw(self, transport: Transport, topic: str, message_id: str, body: bytes) -> None:
        assert isinstance(transport, SqliteTransport)
        posting = Posting(topic, message_id, body)
        await transport.database.write(_post(transport), posting)

    async def test_a_killed_process_gives_back_its_messages_at_once(self, transport: Transport) -> None:
        """What a killed consumer of this host held is delivered to others without waiting for the hold."""
        await transport.publish("work", message("m"))
        child = await asyncio.create_subprocess_exec(
            sys.executable,
            "-c",
            _HOLDER,
            f"sqlite:///{self.place}/q.db",
            stdout=asyncio.subprocess.PIPE,
        )
        assert child.stdout is not None
        assert await asyncio.wait_for(child.stdout.readline(), PATIENCE) == b"m\n"
        taking = asyncio.create_task(self.take(transport))
        assert not taking.done()
        os.kill(child.pid, signal.SIGKILL)
        await child.wait()
        assert await taking == ["m"]

    async def test_what_a_database_out_of_reach_is_asked_is_out_of_reach(self, tmp_path: Path) -> None:
        """Whoever only knows transports is told so in their words. One that shares no database is made of its URL."""
        lone = SqliteTransport(f"sqlite:///{tmp_path}/q.db")
        for ask in (
            lone.topics(),
            lone.publish("work", message("m")),
            lone.nack("m"),
            lone.dead_letter("m", "odd"),
        ):
            with pytest.raises(TransportUnavailable, match="is not open"):
                await ask

    async def test_a_memory_store_is_not_joined(self, transport: Transport) -> None:
        """Only a store on the same open file has its messages published in its own transactions."""
        from paigeant.stores.memory import MemoryStore
        from paigeant.stores.sql import SqlStore

        assert isinstance(transport, SqliteTransport)
        assert not transport.joins(MemoryStore())
        assert not transport.joins(SqlStore(SqliteDatabase(f"sqlite:///{self.place}/q.db")))
        assert transport.joins(SqlStore(transport.database))

    async def test_dead_letters_are_kept_without_a_store(self, transport: Transport) -> None:
        """Without `bury_with` the transport keeps dead letters in the file itself."""
        lone = SqliteTransport(SqliteDatabase(f"sqlite:///{self.place}/q.db", clock=self.clock))
        await lone.connect()
        await self.deliver_raw(lone, "work", "b", b"nonsense")
        assert await self.is_empty(lone)
        await lone.close()
        from paigeant.stores.sql import SqlStore

        store = SqlStore(SqliteDatabase(f"sqlite:///{self.place}/q.db"))
        await store.connect()
        letter = await store.load_dead_letter("b")
        await store.close()
        assert letter is not None
        assert (letter.reason, letter.body) == ("not_json", b"nonsense")


def _post(transport: SqliteTransport):
    def post(tx, postings):
        transport.post(tx, postings)
        return [None] * len(postings)

    return post


_HOLDER = """
import asyncio, sys
from datetime import UTC, datetime
from paigeant.databases.sqlite import SqliteDatabase
from paigeant.testing import ManualClock
from paigeant.transports.sqlite import SqliteTransport

async def main():
    transport = SqliteTransport(SqliteDatabase(sys.argv[1], clock=ManualClock()))
    await transport.connect()
    async for received in transport.subscribe("work"):
        print(received.message_id, flush=True)
        await asyncio.Event().wait()

asyncio.run(main())
"""


async def test_memory_dead_letters_are_kept_without_a_store() -> None:
    """Without `bury_with` the memory transport keeps dead letters in itself."""
    transport = MemoryTransport()
    transport.put("work", "b", b"nonsense")
    await transport.publish("work", message("m"))
    async with asyncio.timeout(PATIENCE):
        async for received in transport.subscribe("work"):
            assert received.message_id == "m"
            break
    assert [letter.reason for letter in transport.dead_letters] == ["not_json"]


@pytest.mark.parametrize("delay", [0.01, 0.05])
async def test_the_memory_transport_delivers_on_time_by_a_real_clock(delay: float) -> None:
    """With the host's clock a delayed message comes by itself."""
    transport = MemoryTransport()
    await transport.publish("work", message("m"), delay=delay)
    async with asyncio.timeout(PATIENCE):
        async for received in transport.subscribe("work"):
            assert received.message_id == "m"
            break
