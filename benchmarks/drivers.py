"""Our transaction on psycopg 3, pipelined in a thread, and on asyncpg, in the event loop: which driver suits us."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

from tests.services.proxy import Proxy

from benchmarks.bench import Bench, NotMeasured
from benchmarks.peer import PEER
from benchmarks.report import Figure, of
from benchmarks.services import services

__all__ = ["run"]

_DRIVERS = ("psycopg", "asyncpg")


class _Case(NamedTuple):
    """Runs in a transaction, how many transactions, and the milliseconds that a round trip to the server takes more."""

    name: str
    batch: int
    transactions: int
    away: float = 0.0


_CASES = (
    _Case("1 in a transaction", 1, 2000),
    _Case("10 in a transaction", 10, 1000),
    _Case("100 in a transaction", 100, 200),
    _Case("1 in a transaction, the server 2 ms away", 1, 200, away=2.0),
)


def run(bench: Bench, python: Path = PEER) -> list[Figure]:
    """Milliseconds of a transaction with 1, 10 and 100 runs in it, and runs a second; rounds of both in turn."""
    if not python.exists():
        raise NotMeasured(f"{python} isn't there, which has asyncpg; `make bench` makes it")
    found: dict[tuple[_Case, str], list[dict[str, float]]] = {}
    with services(bench) as started:
        for _ in range(bench.many(5, 1)):
            for case in _CASES:
                for driver in _DRIVERS:
                    with started.database() as url, _away(url, case.away) as seen:
                        one = bench.fresh(
                            "benchmarks.transactions",
                            python=str(python),
                            driver=driver,
                            url=seen,
                            batch=case.batch,
                            count=bench.many(case.transactions, 5),
                        )
                    found.setdefault((case, driver), []).append(one)
    figures = []
    for case in _CASES:
        for driver in _DRIVERS:
            rounds = found[case, driver]
            figures += [
                of(f"{driver}, {case.name}", [one["ms"] for one in rounds], "ms"),
                of(f"{driver}, {case.name}: runs", [one["rows"] for one in rounds], "/s"),
            ]
        pairs = zip(*(found[case, driver] for driver in _DRIVERS), strict=True)
        ratios = [ours["ms"] / other["ms"] for ours, other in pairs]
        figures.append(of(f"psycopg over asyncpg, {case.name}", ratios, "times"))
    return figures


@contextlib.contextmanager
def _away(url: str, milliseconds: float) -> Iterator[str]:
    """The URL by which a server seems to be so far away, there and back."""
    if not milliseconds:
        yield url
        return
    where = urlsplit(url)
    assert where.hostname is not None
    assert where.port is not None
    with Proxy(where.hostname, where.port) as proxy:
        proxy.delay(milliseconds / 2000)
        yield proxy.url(url)
