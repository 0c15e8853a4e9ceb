"""What SQLite itself does on this disk, and how much of that Paigeant reaches."""

from __future__ import annotations

import json
import sqlite3
import time
import uuid
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from benchmarks.bench import Bench
from benchmarks.report import Figure, of
from benchmarks.throughput import steps
from benchmarks.workload import order

__all__ = ["run"]

_BATCH = 100


def run(bench: Bench) -> list[Figure]:
    """Rows a second with a commit for each and for 100, and our steps a second over them, rounds in turn."""
    rounds = [(_singly(bench), _batched(bench), steps(bench, 500)) for _ in range(bench.many(3, 1))]
    single, batched, own = zip(*rounds, strict=True)
    return [
        of("insert and commit", single, "rows/s"),
        of(f"{_BATCH} inserts a commit", batched, "rows/s"),
        of("Paigeant, 500 in flight", own, "steps/s"),
        of("Paigeant over single commits", [mine / floor for floor, _, mine in rounds], "times"),
        of("Paigeant over batched inserts", [mine / floor for _, floor, mine in rounds], "times"),
    ]


def _singly(bench: Bench) -> float:
    count = bench.many(3000, 50)
    with bench.file() as file, _table(file) as connection:
        began = time.perf_counter()
        for _ in range(count):
            connection.execute(_INSERT, _row())
        return count / (time.perf_counter() - began)


def _batched(bench: Bench) -> float:
    count = bench.many(300, 5)
    with bench.file() as file, _table(file) as connection:
        began = time.perf_counter()
        for _ in range(count):
            connection.execute("BEGIN IMMEDIATE")
            connection.executemany(_INSERT, [_row() for _ in range(_BATCH)])
            connection.execute("COMMIT")
        return count * _BATCH / (time.perf_counter() - began)


@contextmanager
def _table(file: Path) -> Iterator[sqlite3.Connection]:
    with closing(sqlite3.connect(file, isolation_level=None)) as connection:
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=FULL")
        connection.execute(
            "CREATE TABLE steps (run TEXT, step TEXT, input TEXT, output TEXT, PRIMARY KEY (run, step))"
        )
        yield connection


_INSERT = "INSERT INTO steps VALUES (?, ?, ?, ?)"


def _row() -> tuple[str, str, str, str]:
    """As much as Paigeant records of a step."""
    text = json.dumps(order())
    return str(uuid.uuid4()), "reserve", text, text
