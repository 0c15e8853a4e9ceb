"""The shape of our transactions, by a driver's own means: psycopg 3 or asyncpg. For `drivers.py`; knows no Paigeant.

A transaction asks for the time, locks runs, reads the heads of their steps, updates these, inserts the next ones, and
commits. psycopg does it in a thread, by its own pipeline, the writes along with the commit.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
import uuid
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import uvloop

__all__ = ["measure"]

_TABLES = """
CREATE TABLE IF NOT EXISTS runs (id TEXT PRIMARY KEY, status TEXT NOT NULL) WITH (fillfactor = 85);
CREATE TABLE IF NOT EXISTS steps (
    run TEXT, step INTEGER, status TEXT NOT NULL, worker TEXT, output JSON, completed_at DOUBLE PRECISION,
    PRIMARY KEY (run, step)
) WITH (fillfactor = 85);
"""
_NOW = "SELECT extract(epoch FROM clock_timestamp())::float8"
_LOCK = (
    "SELECT runs.id FROM json_array_elements_text({0}::json) wanted JOIN runs ON runs.id = wanted "
    "ORDER BY runs.id FOR NO KEY UPDATE OF runs"
)
_HEADS = (
    "SELECT steps.run, steps.step, runs.status, steps.status, steps.worker "
    "FROM json_array_elements_text({0}::json) wanted JOIN runs ON runs.id = wanted "
    "JOIN steps ON steps.run = runs.id AND steps.status = 'running'"
)
_UPDATE = (
    "UPDATE steps SET status = 'completed', output = {0}, completed_at = {1} WHERE run = {2} AND step = {3}"
)
_INSERT = "INSERT INTO steps (run, step, status, worker) VALUES ({0}, {1}, 'running', 'one')"
_STATEMENTS = (_LOCK, _HEADS, _UPDATE, _INSERT)
_OUTPUT = json.dumps({"n": 1, "note": "x" * 180})

Transaction = Callable[[], Awaitable[None]]


async def measure(*, driver: str, url: str, batch: int, count: int) -> dict[str, float]:
    """Milliseconds of a transaction with so many runs in it, and runs a second."""
    make = {"psycopg": _psycopg, "asyncpg": _asyncpg}[driver]
    transact, close = await make(url, batch)
    for _ in range(20):
        await transact()
    began = time.perf_counter()
    for _ in range(count):
        await transact()
    took = time.perf_counter() - began
    await close()
    return {"ms": took * 1000 / count, "rows": count * batch / took}


def _ids(batch: int) -> list[str]:
    return sorted(str(uuid.uuid4()) for _ in range(batch))


async def _psycopg(url: str, batch: int) -> tuple[Transaction, Callable[[], Awaitable[None]]]:
    import psycopg

    lock, heads, update, insert = (text.format("%s", "%s", "%s", "%s") for text in _STATEMENTS)
    connection: Any = psycopg.connect(url, autocommit=True)
    connection.execute(_TABLES, prepare=False)
    connection.prepare_threshold = 0
    ids = _ids(batch)
    with connection.cursor() as cursor:
        cursor.executemany("INSERT INTO runs VALUES (%s, 'running')", [(run,) for run in ids])
        cursor.executemany(insert, [(run, 0) for run in ids])
    wanted = json.dumps(ids)
    thread = ThreadPoolExecutor(1)

    def each(text: str, rows: list[tuple[Any, ...]]) -> None:
        if len(rows) == 1:
            connection.execute(text, rows[0])
        else:
            connection.cursor().executemany(text, rows)

    def work() -> None:
        with connection.pipeline() as pipeline:
            connection.execute("BEGIN")
            asked = connection.execute(_NOW)
            connection.execute(lock, [wanted])
            reading = connection.execute(heads, [wanted])
            pipeline.sync()
            [[now]] = asked.fetchall()
            rows = reading.fetchall()
            assert len(rows) == batch
            each(update, [(_OUTPUT, now, row[0], row[1]) for row in rows])
            each(insert, [(row[0], row[1] + 1) for row in rows])
            connection.execute("COMMIT")

    async def transact() -> None:
        await asyncio.get_running_loop().run_in_executor(thread, work)

    async def close() -> None:
        thread.shutdown()
        connection.close()

    return transact, close


async def _asyncpg(url: str, batch: int) -> tuple[Transaction, Callable[[], Awaitable[None]]]:
    import asyncpg  # type: ignore[import-not-found]  # only in the peers' environment, which `make bench` makes

    lock, heads, update, insert = (text.format("$1", "$2", "$3", "$4") for text in _STATEMENTS)
    connection = await asyncpg.connect(url)
    await connection.execute(_TABLES)
    ids = _ids(batch)
    await connection.executemany("INSERT INTO runs VALUES ($1, 'running')", [(run,) for run in ids])
    await connection.executemany(insert, [(run, 0) for run in ids])
    wanted = json.dumps(ids)

    async def each(text: str, rows: list[tuple[Any, ...]]) -> None:
        if len(rows) == 1:
            await connection.execute(text, *rows[0])
        else:
            await connection.executemany(text, rows)

    async def transact() -> None:
        async with connection.transaction():
            now = await connection.fetchval(_NOW)
            await connection.fetch(lock, wanted)
            rows = await connection.fetch(heads, wanted)
            assert len(rows) == batch
            await each(update, [(_OUTPUT, now, row[0], row[1]) for row in rows])
            await each(insert, [(row[0], row[1] + 1) for row in rows])

    return transact, connection.close


if __name__ == "__main__":
    print(json.dumps(uvloop.run(measure(**json.loads(sys.argv[1])))))
