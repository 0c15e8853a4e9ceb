"""What 100,000 finished runs in the file add to the cost of a step."""

from __future__ import annotations

import asyncio
import sqlite3
import uuid
from contextlib import closing
from pathlib import Path

from benchmarks.bench import Bench
from benchmarks.chain import connected, one_run
from benchmarks.report import Figure, of
from benchmarks.workload import order
from paigeant import loops

__all__ = ["fill", "run"]


def run(bench: Bench) -> list[Figure]:
    """Steps a second on a new file and on a full one, rounds of both in turn, and their ratio."""
    finished = bench.many(100_000, 300)
    with bench.file("full.db") as full:
        fill(full, finished)
        size = full.stat().st_size / 1_000_000
        rounds = []
        for _ in range(bench.many(5, 1)):
            with bench.file("empty.db") as empty:
                rounds.append((_steps(bench, empty), _steps(bench, full)))
    empty_steps, full_steps = zip(*rounds, strict=True)
    slower = [(before / after - 1) * 100 for before, after in rounds]
    return [
        Figure(f"file with {finished:,} runs", size, "MB"),
        of("on an empty file", empty_steps, "steps/s"),
        of("on the full file", full_steps, "steps/s"),
        of("a step takes longer by", slower, "%", most=10),
    ]


def fill(file: Path, runs: int) -> None:
    """A file with so many finished runs: some that the engine did, and copies of their rows under other ids.

    The copies have older ids and times, as finished runs do: new rows go to the end of the indexes.
    """
    loops.run(_a_few_runs(file))
    with closing(sqlite3.connect(file, isolation_level=None)) as connection:
        connection.execute("PRAGMA synchronous=OFF")
        there = [row_id for (row_id,) in connection.execute("SELECT id FROM workflow_runs")]
        copies = [
            (str(uuid.UUID(int=number << 80 | 0x7 << 76)), there[number % len(there)])
            for number in range(runs)
        ]
        connection.execute("BEGIN")
        connection.execute("CREATE TEMP TABLE copies (new TEXT, old TEXT)")
        connection.executemany("INSERT INTO copies VALUES (?, ?)", copies)
        for table, key in (("workflow_runs", "id"), ("step_executions", "workflow_id")):
            _copy(connection, table, key)
        connection.execute("COMMIT")
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")


def _copy(connection: sqlite3.Connection, table: str, key: str) -> None:
    columns = [name for _, name, *_ in connection.execute(f"PRAGMA table_info({table})")]
    values = ["copies.new" if name == key else f"{table}.{name}" for name in columns]
    values = [f"{value} - 3600" if value.endswith("_at") else value for value in values]
    connection.execute(
        f"INSERT INTO {table} ({', '.join(columns)}) SELECT {', '.join(values)} "
        f"FROM copies JOIN {table} ON {table}.{key} = copies.old ORDER BY copies.rowid"
    )


async def _a_few_runs(file: Path) -> None:
    async with connected(f"sqlite:///{file}") as app:
        worker = app.worker()
        working = asyncio.create_task(worker.run())
        await asyncio.gather(*(one_run(app, order()) for _ in range(10)))
        await worker.stop()
        await working


def _steps(bench: Bench, file: Path) -> float:
    runs = bench.many(3000, 100)
    found = bench.fresh("benchmarks.chain", store=f"sqlite:///{file}", runs=runs, in_flight=500, alone=0)
    return float(found["steps"])
