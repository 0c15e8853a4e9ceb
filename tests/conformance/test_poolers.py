"""Postgres behind PgBouncer: all holds where a client keeps its connection, and the other mode is refused."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import ExitStack

import psycopg
import pytest
from tests.integration.postgres_tables import database_with_tables, empty
from tests.integration.workers import working
from tests.patience import PATIENCE
from tests.services import new_database
from tests.services.pgbouncer import PgBouncer

from paigeant import ActivityRegistry, Paigeant, Settings, Workflow
from paigeant.databases.postgres import PostgresDatabase
from paigeant.errors import ConfigurationError
from paigeant.slip import RunStatus
from paigeant.store import Store
from paigeant.stores.sql import SqlStore
from paigeant.testing.conformance import StoreConformance


@pytest.fixture(scope="module")
def pooler(postgres_server_url: str) -> Iterator[PgBouncer]:
    """One that gives a client a connection of its own."""
    with PgBouncer(postgres_server_url, mode="session", lines=["default_pool_size = 50"]) as pooler:
        yield pooler


@pytest.fixture(scope="module")
def tables(postgres_server_url: str) -> Iterator[str]:
    """A database with tables for the tests of this module."""
    with database_with_tables(postgres_server_url) as url:
        yield url


class TestStoreBehindPgBouncer(StoreConformance):
    url: str

    @pytest.fixture(autouse=True)
    def _empty(self, tables: str, pooler: PgBouncer) -> None:
        self.url = pooler.of(tables)
        empty(tables)

    def make(self) -> Store:
        return SqlStore(PostgresDatabase(self.url, clock=self.clock), grace=self.grace)


async def test_runs_pass_through_pgbouncer(postgres_store_url: str, pooler: PgBouncer) -> None:
    """Store, messages and notifications behind a pooler in session mode: runs end, woken at once."""
    activity = ActivityRegistry()

    @activity.execute()
    async def one() -> str:
        return "one"

    @activity.execute()
    async def two(one: str) -> str:
        return f"{one} two"

    url = pooler.of(postgres_store_url)
    settings = Settings(store_url=url, transport_url=url, local_steps=1)
    async with Paigeant(settings, activities=activity) as app, working(app.worker()):
        runs = [await app.dispatch(Workflow("w", ["one", "two"])) for _ in range(50)]
        async with asyncio.timeout(PATIENCE):
            assert {(await run.wait()).output for run in runs} == {"one two"}
        assert {await run.status() for run in runs} == {RunStatus.COMPLETED}


async def test_a_pooler_that_hands_connections_on_is_refused(postgres_store_url: str) -> None:
    """With pool_mode = transaction statements would be mixed up: it is told at the start, not found out under load."""
    with (
        PgBouncer(postgres_store_url, mode="transaction") as pooler,
        pytest.raises(ConfigurationError, match="set pool_mode = session"),
    ):
        await SqlStore(PostgresDatabase(pooler.of(postgres_store_url))).connect()


async def test_it_is_refused_however_busy_the_pooler_is(postgres_server_url: str) -> None:
    """Others use the pooler, so that its connections go round."""
    with ExitStack() as stack:
        url = stack.enter_context(new_database(postgres_server_url))
        pooler = stack.enter_context(PgBouncer(url, mode="transaction"))
        others = [stack.enter_context(psycopg.connect(pooler.of(url))) for _ in range(5)]
        for other in others:
            other.execute("SELECT 1")  # each in a transaction that stays open
        with pytest.raises(ConfigurationError, match="set pool_mode = session"):
            await SqlStore(PostgresDatabase(pooler.of(url))).connect()
