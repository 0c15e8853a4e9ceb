"""Our transaction on psycopg 3, pipelined in a thread, and on asyncpg, in the event loop: which driver suits us."""

from __future__ import annotations

from pathlib import Path

from benchmarks.bench import Bench, NotMeasured
from benchmarks.peer import PEER
from benchmarks.report import Figure, of
from benchmarks.services import services

__all__ = ["run"]

_DRIVERS = ("psycopg", "asyncpg")
_BATCHES = {1: 2000, 10: 1000, 100: 200}
"""Runs in a transaction, and how many transactions."""


def run(bench: Bench, python: Path = PEER) -> list[Figure]:
    """Milliseconds of a transaction with 1, 10 and 100 runs in it, and runs a second; rounds of both in turn."""
    if not python.exists():
        raise NotMeasured(f"{python} isn't there, which has asyncpg; `make bench` makes it")
    found: dict[tuple[int, str], list[dict[str, float]]] = {}
    with services(bench) as started:
        for _ in range(bench.many(5, 1)):
            for batch, count in _BATCHES.items():
                for driver in _DRIVERS:
                    with started.database() as url:
                        one = bench.fresh(
                            "benchmarks.transactions",
                            python=str(python),
                            driver=driver,
                            url=url,
                            batch=batch,
                            count=bench.many(count, 5),
                        )
                    found.setdefault((batch, driver), []).append(one)
    figures = []
    for batch in _BATCHES:
        for driver in _DRIVERS:
            rounds = found[batch, driver]
            figures += [
                of(f"{driver}, {batch} in a transaction", [one["ms"] for one in rounds], "ms"),
                of(f"{driver}, {batch} in a transaction, runs", [one["rows"] for one in rounds], "/s"),
            ]
        pairs = zip(*(found[batch, driver] for driver in _DRIVERS), strict=True)
        figures.append(
            of(f"psycopg over asyncpg, {batch}", [ours["ms"] / other["ms"] for ours, other in pairs], "times")
        )
    return figures
