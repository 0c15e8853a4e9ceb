"""Several processes on the same few runs in Postgres: whatever they do at the same moment, each step has one result."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator

import psycopg
import pytest
from tests.integration.postgres_hammer import FINISH_SECONDS, LIMIT_SECONDS, faults
from tests.integration.postgres_tables import database_with_tables
from tests.integration.warm import Forked

from paigeant.databases.postgres import PostgresDatabase
from paigeant.store import RunDetail
from paigeant.stores.sql import SqlStore

PROCESSES = 3
RUNS = 12
LONGEST_SECONDS = LIMIT_SECONDS + FINISH_SECONDS + 10.0

Facts = list[tuple[str, ...]]

_END_ONE = """
SELECT pg_terminate_backend(pid) FROM pg_stat_activity
WHERE datname = current_database() AND application_name = 'paigeant' ORDER BY random() LIMIT 1
"""


@pytest.fixture
def url(postgres_server_url: str) -> Iterator[str]:
    """A new database with tables."""
    with database_with_tables(postgres_server_url) as url:
        yield url


async def hammer(url: str, *how: str, seconds: float = LONGEST_SECONDS) -> tuple[list[int | None], Facts]:
    """Let several processes hammer on the runs of a database; gives how they ended, and what was told in all of them.

    One that doesn't come to an end is killed.
    """
    processes = [
        Forked(url, str(number), str(RUNS), *how, module="tests.integration.postgres_hammer", stderr=2)
        for number in range(PROCESSES)
    ]
    talking = asyncio.gather(*(asyncio.to_thread(process.stdout.read) for process in processes))
    try:
        told = await asyncio.wait_for(asyncio.shield(talking), seconds)
    except TimeoutError:
        for process in processes:
            process.kill()
        told = await talking
    facts = [tuple(fact) for said in told if said for fact in json.loads(said)]
    for process in processes:
        process.close()
    return [process.returncode for process in processes], facts


async def all_runs(url: str) -> list[RunDetail]:
    """Every run with all of its rows."""
    store = SqlStore(PostgresDatabase(url))
    await store.connect()
    try:
        return [await store.load_run(run.id) for run in await store.list_runs(limit=100_000)]
    finally:
        await store.close()


async def test_processes_on_the_same_runs_do_everything_once(url: str) -> None:
    """Claims, results, cancels, retries, sweeps and releases of three processes leave one history of each run.

    And none of them ever waits for one that waits for it.
    """
    codes, told = await hammer(url)
    assert codes == [0] * PROCESSES
    details = await all_runs(url)
    assert len(details) >= RUNS
    assert faults(details, told) == []
    with psycopg.connect(url) as connection:
        [deadlocks] = connection.execute(
            "SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()"
        ).fetchone() or [None]
    assert deadlocks == 0


async def test_so_do_they_while_their_connections_are_ended(url: str) -> None:
    """The same when the server ends their sessions, one after the other, in the middle of whatever they do."""

    async def end_sessions() -> None:
        async with await psycopg.AsyncConnection.connect(url, autocommit=True) as connection:
            while True:
                await connection.execute(_END_ONE)
                await asyncio.sleep(0.05)

    ending = asyncio.create_task(end_sessions())
    codes, told = await hammer(url)
    assert codes == [0] * PROCESSES
    ending.cancel()
    await asyncio.gather(ending, return_exceptions=True)
    details = await all_runs(url)
    assert len(details) >= RUNS
    assert faults(details, told) == []


async def test_without_locks_the_audit_finds_what_went_wrong(url: str) -> None:
    """Processes that don't lock the runs do things twice: what holds above holds because of the locks."""
    codes, told = await hammer(url, "no-locks", seconds=40.0)  # what is entangled then needn't end
    assert codes != [0] * PROCESSES or faults(await all_runs(url), told) != []
