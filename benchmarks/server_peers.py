"""The same work on peers that use the same servers, in turn with Paigeant: DBOS on Postgres, dramatiq on its brokers.

DBOS works in the client's process, and so do we then. dramatiq records nothing durably: it is what a queue alone can
do. Its two worker processes are compared with our two.
"""

from __future__ import annotations

import contextlib
import statistics
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from benchmarks.bench import ROOT, Bench, NotMeasured, environment
from benchmarks.latency import p95
from benchmarks.peer import PEER
from benchmarks.report import Figure, of
from benchmarks.servers import CROSSING, TOGETHER, Round, measured
from benchmarks.services import Services, services

__all__ = ["run"]

_DBOS_IN_FLIGHT = 8


def run(bench: Bench, python: Path = PEER) -> list[Figure]:
    """Both engines' figures and their ratios. Each round of ours is compared with the peer's round right after it."""
    if not python.exists():
        raise NotMeasured(f"{python} isn't there, which runs the peers; `make bench` makes it")
    figures = []
    with services(bench) as started:
        rounds = [
            [
                (measured(bench, started, "postgres", TOGETHER), _dbos(bench, started, python)),
                (measured(bench, started, "redis", CROSSING), _dramatiq(bench, started, python, "redis")),
                (
                    measured(bench, started, "rabbitmq", CROSSING),
                    _dramatiq(bench, started, python, "rabbitmq"),
                ),
            ]
            for _ in range(bench.many(3, 1))
        ]
    names = [
        ("Paigeant, postgres, in one process", "DBOS, Postgres"),
        ("Paigeant, redis, crossing", "dramatiq, redis"),
        ("Paigeant, rabbitmq, crossing", "dramatiq, rabbitmq"),
    ]
    for (own, peer), found in zip(names, zip(*rounds, strict=True), strict=True):
        short = peer.partition(",")[0]
        figures += [
            of(own, [ours.steps for ours, _ in found], "steps/s"),
            of(peer, [theirs.steps for _, theirs in found], "steps/s"),
            of(f"over {short}", [ours.steps / theirs.steps for ours, theirs in found], "times"),
            of(f"{own}, median of a run", [ours.median for ours, _ in found], "ms"),
            of(f"{peer}, median of a run", [theirs.median for _, theirs in found], "ms"),
            of(f"over {short}, median", [ours.median / theirs.median for ours, theirs in found], "times"),
        ]
    return figures


def _dbos(bench: Bench, started: Services, python: Path) -> Round:
    with started.database() as store:
        found = bench.fresh(
            "benchmarks.chain_dbos",
            python=str(python),
            store=store,
            runs=bench.many(400, 20),
            in_flight=_DBOS_IN_FLIGHT,
            alone=bench.many(200, 10),
        )
    return Round(found["steps"], statistics.median(found["ms"]), p95(found["ms"]))


def _dramatiq(bench: Bench, started: Services, python: Path, kind: str) -> Round:
    settings = {
        "BENCH_BROKER": started.transport(kind, ""),
        "BENCH_RESULTS": started.transport("redis", ""),
    }
    with _dramatiq_workers(python, settings):
        found = bench.fresh(
            "benchmarks.chain_dramatiq",
            python=str(python),
            settings=settings,
            runs=bench.many(1000, 20),
            alone=bench.many(100, 10),
        )
    return Round(found["steps"], statistics.median(found["ms"]), p95(found["ms"]))


@contextlib.contextmanager
def _dramatiq_workers(python: Path, settings: dict[str, str]) -> Iterator[None]:
    command = [str(python), "-m", "dramatiq", "benchmarks.chain_dramatiq", "--processes", "2"]
    with (
        tempfile.TemporaryFile("w+") as said,
        subprocess.Popen(
            [*command, "--threads", "8"],
            cwd=ROOT,
            env=environment(**settings),
            stdout=said,
            stderr=said,
            text=True,
        ) as process,
    ):
        try:
            yield
        finally:
            process.terminate()
