"""The work on servers: a store in Postgres, each transport, and a client, alone or with worker processes apart from it.

In one process: the client's does the work, as with peers that are libraries. Continued locally: one worker process
serves all topics. Crossing: two serve alternate topics, so that every step goes over the broker.
"""

from __future__ import annotations

import contextlib
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from benchmarks.bench import ROOT, Bench, environment
from benchmarks.latency import p95
from benchmarks.report import Figure, of
from benchmarks.services import TRANSPORTS, Services, services

__all__ = [
    "CROSSING",
    "LOCALLY",
    "TOGETHER",
    "Layout",
    "Round",
    "Watched",
    "measured",
    "run",
    "worked",
    "workers",
]


class Layout(NamedTuple):
    """How the work is laid out: the topics of each worker process; None are all. Without any, the client works."""

    name: str
    topics: Sequence[str | None]
    runs: int


TOGETHER = Layout("in one process", [], 4000)
LOCALLY = Layout("continued locally", [None], 4000)
CROSSING = Layout("crossing", ["reserve,pack,notify", "charge,ship"], 2000)

_LEAST: dict[str, dict[str, float]] = {
    TOGETHER.name: {},
    LOCALLY.name: dict.fromkeys(TRANSPORTS, 5000),
    CROSSING.name: {"postgres": 2500, "redis": 2500, "rabbitmq": 1800},
}
_MOST: dict[str, dict[str, float]] = {
    TOGETHER.name: dict.fromkeys(TRANSPORTS, 5),
    LOCALLY.name: dict.fromkeys(TRANSPORTS, 5),
    CROSSING.name: {"postgres": 10, "redis": 10, "rabbitmq": 15},
}


class Watched(NamedTuple):
    """What has worker processes tell what they do: variables of their environment, and options."""

    settings: Mapping[str, str]
    options: Sequence[str]


class Round(NamedTuple):
    """Steps a second of many runs at once; milliseconds of a run alone."""

    steps: float
    median: float
    p95: float


def run(bench: Bench) -> list[Figure]:
    """Steps a second with 500 runs in flight, and milliseconds of a run alone; rounds of all in turn."""
    cases = [(transport, layout) for layout in (TOGETHER, LOCALLY, CROSSING) for transport in TRANSPORTS]
    if bench.quick:
        cases = cases[5:]  # a process takes long to start, and each case has several
    with services(bench) as started:
        rounds = [
            [measured(bench, started, transport, layout) for transport, layout in cases]
            for _ in range(bench.many(3, 1))
        ]
    figures = []
    for (transport, layout), found in zip(cases, zip(*rounds, strict=True), strict=True):
        name, least, most = f"{transport}, {layout.name}", _LEAST[layout.name], _MOST[layout.name]
        figures += [
            of(f"{name}", [own.steps for own in found], "steps/s", least=least.get(transport)),
            of(f"{name}, median of a run", [own.median for own in found], "ms", most=most.get(transport)),
            of(f"{name}, 95 of 100 runs", [own.p95 for own in found], "ms"),
        ]
    return figures


def measured(
    bench: Bench, started: Services, transport: str, layout: Layout, *, alone: int | None = None
) -> Round:
    """One round, on new databases: many runs at once, then runs one by one, 300 unless told otherwise."""
    runs, alone = bench.many(layout.runs, 40), alone or bench.many(300, 10)
    parts: list[dict[str, Any]] = [{"runs": runs, "alone": alone, "in_flight": 40}]
    if not bench.quick:
        parts = [{"runs": runs, "alone": 0, "in_flight": 500}, {"runs": 0, "alone": alone, "in_flight": 1}]
    found: dict[str, Any] = {}
    for part in parts:
        with started.store() as store:
            got = worked(bench, store, started.transport(transport, store), layout, **part)
        found |= {name: value for name, value in got.items() if value}
    return Round(found["steps"], statistics.median(found["ms"]), p95(found["ms"]))


def worked(
    bench: Bench,
    store: str,
    transport: str,
    layout: Layout,
    *,
    watched: Watched | None = None,
    **amounts: Any,
) -> dict[str, Any]:
    """What `benchmarks.chain` measures with these amounts."""
    with workers(store, transport, layout.topics, watched):
        found: dict[str, Any] = bench.fresh(
            "benchmarks.chain", store=store, transport=transport, works=not layout.topics, **amounts
        )
    return found


@contextlib.contextmanager
def workers(
    store: str, transport: str, topics: Sequence[str | None], watched: Watched | None = None
) -> Iterator[None]:
    """A worker process for each of the topics, all of them for None; stopped at the end, and checked."""
    servers = {"PAIGEANT_STORE_URL": store, "PAIGEANT_TRANSPORT_URL": transport}
    settings = environment(**servers, **(watched.settings if watched else {"PAIGEANT_LOG_LEVEL": "warning"}))
    command = [sys.executable, "-m", "paigeant.cli", "run", "benchmarks.chain", "--concurrency", "500"]
    command += watched.options if watched else ()
    with contextlib.ExitStack() as stack:
        processes = []
        for own in topics:
            errors = stack.enter_context(tempfile.TemporaryFile("w+"))
            process = subprocess.Popen(
                [*command, *(["--topics", own] if own else [])],
                cwd=ROOT,
                env=settings,
                stdout=subprocess.DEVNULL,
                stderr=errors,
            )
            processes.append((process, errors))
            stack.callback(process.kill)
        yield
        for process, _ in processes:
            process.terminate()
        for process, errors in processes:
            if code := process.wait(60):
                errors.seek(0)
                raise RuntimeError(f"a worker ended with {code}:\n{errors.read()[-4000:]}")
