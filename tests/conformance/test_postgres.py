"""The Postgres store and transport keep what `Store` and `Transport` promise, on a real server.

The suites set the time. What is done by the server's own clock is in tests/integration/test_postgres.py.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Iterator

import psycopg
import pytest
from tests.integration.postgres_tables import database_with_tables, empty
from tests.patience import PATIENCE

from paigeant.databases.postgres import PostgresDatabase
from paigeant.envelope import PlainEnvelope
from paigeant.slip import RunStatus
from paigeant.store import DeadLetter, Store
from paigeant.stores.memory import MemoryStore
from paigeant.stores.sql import SqlStore
from paigeant.testing.conformance import StoreConformance, TransportConformance
from paigeant.testing.conformance.transports import message
from paigeant.transport import Posting, Transport
from paigeant.transports.postgres import PostgresTransport


@pytest.fixture(scope="module")
def tables(postgres_server_url: str) -> Iterator[str]:
    """A database with tables for the tests of this module."""
    with database_with_tables(postgres_server_url) as url:
        yield url


class TestPostgresStore(StoreConformance):
    url: str

    @pytest.fixture(autouse=True)
    def _empty(self, tables: str) -> None:
        self.url = tables
        empty(tables)

    def make(self) -> Store:
        return SqlStore(PostgresDatabase(self.url, clock=self.clock), grace=self.grace)

    async def test_another_process_ends_a_wait(self, store: Store) -> None:
        """Who waits here is woken by the commit of another process."""
        await self.start(store)
        waiting = asyncio.create_task(store.wait_ended("r"))
        await asyncio.sleep(0)
        child = await asyncio.create_subprocess_exec(sys.executable, "-c", _CANCEL, self.url)
        assert await asyncio.wait_for(waiting, PATIENCE) is RunStatus.CANCELLED
        assert await child.wait() == 0


class TestPostgresTransport(TransportConformance):
    url: str

    @pytest.fixture(autouse=True)
    def _empty(self, tables: str) -> None:
        self.url = tables
        empty(tables)

    def make(self) -> Transport:
        return PostgresTransport(
            PostgresDatabase(self.url, clock=self.clock), envelope=PlainEnvelope(self.limit_bytes)
        )

    async def deliver_raw(self, transport: Transport, topic: str, message_id: str, body: bytes) -> None:
        assert isinstance(transport, PostgresTransport)
        await transport.database.write(transport._publish, Posting(topic, message_id, body))

    async def test_another_process_is_woken(self, transport: Transport) -> None:
        """A consumer that waits gets what another process publishes, and a killed consumer's message in time."""
        child = await asyncio.create_subprocess_exec(
            sys.executable, "-c", _HOLDER, self.url, stdout=asyncio.subprocess.PIPE
        )
        assert child.stdout is not None
        assert await asyncio.wait_for(child.stdout.readline(), PATIENCE) == b"waiting\n"
        await transport.publish("work", message("m"))
        assert await asyncio.wait_for(child.stdout.readline(), PATIENCE) == b"m\n"
        os.kill(child.pid, signal.SIGKILL)
        await child.wait()
        self.clock.advance(3e9)  # the child has taken it by the server's clock, which is ahead of ours
        assert await self.take(transport) == ["m"]

    async def test_a_message_that_somebody_keeps_locked_is_passed_over(self, transport: Transport) -> None:
        """Whoever takes messages waits for no other transaction that is just taking some: it takes those behind."""
        for message_id in ("first", "second"):
            await transport.publish("work", message(message_id))
        with psycopg.connect(self.url) as connection:
            connection.execute("SELECT 1 FROM messages WHERE message_id = 'first' FOR UPDATE")
            assert await self.take_and_ack(transport) == ["second"]
        assert await self.take(transport) == ["first"]

    async def test_a_store_is_joined_by_its_database(self, transport: Transport) -> None:
        """Only a store on the same open database has its messages published in its own transactions."""
        assert isinstance(transport, PostgresTransport)
        assert not transport.joins(MemoryStore())
        assert not transport.joins(SqlStore(PostgresDatabase(self.url)))
        assert transport.joins(SqlStore(transport.database))

    async def test_dead_letters_are_kept_without_a_store(self, transport: Transport) -> None:
        """Without `bury_with` the transport keeps dead letters in the database itself."""
        lone = PostgresTransport(PostgresDatabase(self.url, clock=self.clock))
        await lone.connect()
        await self.deliver_raw(lone, "work", "b", b"nonsense")
        assert await self.is_empty(lone)
        await lone.close()
        store = SqlStore(PostgresDatabase(self.url))
        await store.connect()
        letter = await store.load_dead_letter("b")
        await store.close()
        assert isinstance(letter, DeadLetter)
        assert (letter.reason, letter.body) == ("not_json", b"nonsense")


_CANCEL = """
import asyncio, sys
from paigeant.databases.postgres import PostgresDatabase
from paigeant.stores.sql import SqlStore

async def main():
    store = SqlStore(PostgresDatabase(sys.argv[1]))
    await store.connect()
    await store.cancel_run("r", "from afar")
    await store.close()

asyncio.run(main())
"""

_HOLDER = """
import asyncio, sys
from paigeant.transports.postgres import PostgresTransport

async def main():
    transport = PostgresTransport(sys.argv[1])
    await transport.connect()
    print("waiting", flush=True)
    async for received in transport.subscribe("work"):
        print(received.message_id, flush=True)
        await asyncio.Event().wait()

asyncio.run(main())
"""
