"""What a step costs the database: commits, syncs of its log, and bytes in it, on Postgres; DBOS beside it.

A run alone commits its start and its five results, synced, and its claims and what it fetches, not synced. The delay of
the log's own writer is set to 10 s here, so that the syncs are those that commits wait for.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from benchmarks.bench import Bench
from benchmarks.peer import PEER
from benchmarks.report import Figure
from benchmarks.servers import CROSSING, LOCALLY, worked
from benchmarks.services import Services, counted, services
from benchmarks.workload import STEPS, WARM_UP

__all__ = ["run"]

_TRANSPORTS = ("postgres", "redis")
"""One that is the database itself, and one that isn't."""


def run(bench: Bench, python: Path = PEER) -> list[Figure]:
    """For each transport and layout a step's share: one run after the other, and with 500 in flight."""
    alone, many = bench.many(800, 10), bench.many(4000, 100)
    figures = []
    with services(bench, postgres=["wal_writer_delay = 10s"]) as started:
        for layout in (CROSSING,) if bench.quick else (LOCALLY, CROSSING):
            for transport in _TRANSPORTS:
                with started.store() as store:
                    work = partial(worked, bench, store, started.transport(transport, store), layout)
                    figures += _shares(
                        f"{transport}, {layout.name}, alone",
                        store,
                        partial(work, runs=0, in_flight=1, alone=alone),
                        alone,
                        most=1.2,
                    )
                    figures += _shares(
                        f"{transport}, {layout.name}, 500 in flight",
                        store,
                        partial(work, runs=many, in_flight=500, alone=0),
                        many,
                        most=0.1,
                    )
        if python.exists():
            figures += _peers(bench, started, python, alone)
    return figures


def _peers(bench: Bench, started: Services, python: Path, alone: int) -> list[Figure]:
    def work(runs: int) -> object:
        return bench.fresh(
            "benchmarks.chain_dbos", python=str(python), store=store, runs=0, in_flight=1, alone=runs
        )

    with started.database() as store:
        work(0)  # makes its tables
        return _shares("DBOS, alone", store, partial(work, alone), alone)


def _shares(
    name: str, store: str, work: Callable[[], object], runs: int, *, most: float | None = None
) -> list[Figure]:
    before = counted(store)
    work()
    after = counted(store)
    steps = STEPS * (runs + WARM_UP)
    share = {key: (after[key] - before[key]) / steps for key in before}
    return [
        # A heartbeat now and then is a commit, too, so not exact to more than this.
        Figure(f"{name}: synced commits", round(share["syncs"], 2), "a step", most=most),
        Figure(f"{name}: commits that write", share["writing commits"], "a step"),
        Figure(f"{name}: log", share["bytes"], "bytes/step"),
    ]
