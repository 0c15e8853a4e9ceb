"""What watching costs: steps a second with nothing, with logs, with traces, with metrics, and with all three.

Lines of logs go nowhere, and spans to a collector that forgets them. First on one SQLite file, where client and worker
are one process; then in the speed benchmark on servers, where one worker process serves all topics.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.bench import Bench
from benchmarks.chain import activity, chain, one_run
from benchmarks.collector import collector
from benchmarks.report import Figure, of
from benchmarks.servers import LOCALLY, Watched, worked
from benchmarks.services import TRANSPORTS, services
from benchmarks.workload import STEPS, WARM_UP, Order, all_at_once
from paigeant import Paigeant, Settings, loops
from paigeant.observer import Observer

__all__ = ["KINDS", "measure", "run"]

KINDS = {"nothing": (), "logs": ("logs",), "traces": ("traces",), "metrics": ("metrics",)} | {
    "all three": ("logs", "traces", "metrics")
}
_ENDPOINT = "OTEL_EXPORTER_OTLP_ENDPOINT"
_IN_FLIGHT = 200
_LEAST = 85.0
"""Percent of the throughput that logs, traces and metrics together have to leave."""


def run(bench: Bench) -> list[Figure]:
    """Steps a second, each kind in turn, and what is left of the throughput without."""
    with collector() as url:
        return [*_in_one_process(bench, url), *_on_servers(bench, url)]


def _in_one_process(bench: Bench, url: str) -> list[Figure]:
    with bench.file("x") as place:
        rounds = bench.fresh(
            "benchmarks.observers",
            settings={_ENDPOINT: url},
            folder=str(place.parent),
            runs=bench.many(1500, 40),
            rounds=bench.many(5, 1),
        )
    figures = [of(kind, [each[kind]["steps"] for each in rounds], "steps/s") for kind in KINDS]
    figures += [
        of(f"{kind}: processor", [each[kind]["cpu_us"] for each in rounds], "us/step") for kind in KINDS
    ]
    for kind in list(KINDS)[1:]:
        left = [100 * each[kind]["steps"] / each["nothing"]["steps"] for each in rounds]
        figures.append(
            of(f"{kind}: of the throughput", left, "%", least=_LEAST if kind == "all three" else None)
        )
    return figures


def _on_servers(bench: Bench, url: str) -> list[Figure]:
    """Here the worker is `paigeant run` with all three, as a user would have it."""
    watched = Watched(
        {_ENDPOINT: url, "PAIGEANT_TRACES": "true", "PAIGEANT_LOG_FORMAT": "json"}, ["--metrics-port", "0"]
    )
    transports = TRANSPORTS[:1] if bench.quick else TRANSPORTS
    found: dict[str, list[tuple[float, float]]] = {transport: [] for transport in transports}
    with services(bench) as started:

        def steps(transport: str, watched: Watched | None) -> float:
            with started.store() as store:
                on = started.transport(transport, store)
                amounts: dict[str, Any] = {"runs": bench.many(LOCALLY.runs, 40), "alone": 0}
                return float(
                    worked(
                        bench, store, on, LOCALLY, watched=watched, in_flight=bench.many(500, 40), **amounts
                    )["steps"]
                )

        for number in range(bench.many(5, 1)):
            for transport, rounds in found.items():
                if number % 2:
                    with_all = steps(transport, watched)
                    rounds.append((steps(transport, None), with_all))
                else:
                    rounds.append((steps(transport, None), steps(transport, watched)))
    figures = []
    for transport, rounds in found.items():
        figures += [
            of(f"{transport}, continued locally: nothing", [each[0] for each in rounds], "steps/s"),
            of(f"{transport}, continued locally: all three", [each[1] for each in rounds], "steps/s"),
            of(
                f"{transport}, continued locally: of the throughput",
                [100 * watched / nothing for nothing, watched in rounds],
                "%",
                least=_LEAST,
            ),
        ]
    return figures


@contextmanager
def _watching(names: Sequence[str]) -> Iterator[list[Observer]]:
    """The observers of these names, as `paigeant run` has them."""
    found: list[Observer] = []
    ends: list[Callable[[], object]] = []
    try:
        for name in names:
            match name:
                case "logs":
                    from paigeant.observers.logs import LogObserver

                    stream = open(os.devnull, "w")  # noqa: SIM115  # closed with the others
                    ends.append(stream.close)
                    found.append(LogObserver(stream=stream))
                case "traces":
                    from opentelemetry.sdk.trace import TracerProvider

                    from paigeant.observers.otlp import QuickProvider, to_collector
                    from paigeant.observers.otlp.spans import OwnIds
                    from paigeant.observers.traces import TraceObserver

                    provider = TracerProvider(shutdown_on_exit=False, id_generator=OwnIds())
                    processor = to_collector(provider.resource)
                    provider.add_span_processor(processor)
                    ends.append(provider.shutdown)
                    found.append(TraceObserver(QuickProvider(provider, processor)))
                case "metrics":
                    from paigeant.observers.metrics import MetricsObserver

                    found.append(MetricsObserver(activities=list(activity), workflows=[chain.name]))
        yield found
    finally:
        for end in ends:
            end()


async def _once(store: str, names: Sequence[str], runs: int) -> dict[str, float]:
    with _watching(names) as observers:
        settings = Settings(store_url=store, transport_url=store)
        async with Paigeant(settings, activities=activity, observers=observers) as app:
            worker = app.worker(concurrency=_IN_FLIGHT)
            working = asyncio.create_task(worker.run())

            async def one(order: Order) -> Order:
                return await one_run(app, order)

            await all_at_once(one, WARM_UP, in_flight=_IN_FLIGHT)
            gc.collect()
            gc.freeze()  # as `paigeant run` does, and the next line
            gc.set_threshold(10_000)
            began = time.process_time()
            steps = await all_at_once(one, runs, in_flight=_IN_FLIGHT)
            took = time.process_time() - began
            await worker.stop()
            await working
    return {"steps": steps, "cpu_us": 1e6 * took / (runs * STEPS)}


async def measure(*, folder: str, runs: int, rounds: int) -> list[dict[str, Any]]:
    """Figures by kind, for each round; each on a new file. The order turns, so that no kind is always the first."""
    found = []
    kinds = list(KINDS)
    for number in range(rounds):
        figures = {}
        for kind in kinds[number % len(kinds) :] + kinds[: number % len(kinds)]:
            file = Path(folder) / f"{number}-{kind.replace(' ', '-')}.db"
            figures[kind] = await _once(f"sqlite:///{file}", KINDS[kind], runs)
        found.append(figures)
    return found


if __name__ == "__main__":
    print(json.dumps(loops.run(measure(**json.loads(sys.argv[1])))))
