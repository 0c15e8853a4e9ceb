"""Steps a second of one process on one SQLite file, with many runs in flight."""

from __future__ import annotations

from benchmarks.bench import Bench
from benchmarks.report import Figure, of

__all__ = ["run", "steps"]


def run(bench: Bench) -> list[Figure]:
    """Steps a second with 500 and with 50 runs in flight, rounds of both in turn."""
    rounds = [(steps(bench, 500), steps(bench, 50)) for _ in range(bench.many(5, 1))]
    many, few = zip(*rounds, strict=True)
    return [
        of("500 runs in flight", many, "steps/s", least=5000),
        of("50 runs in flight", few, "steps/s"),
    ]


def steps(bench: Bench, in_flight: int) -> float:
    """Steps a second in a new process on a new file."""
    with bench.file() as file:
        runs = bench.many(4000, 100)
        found = bench.fresh(
            "benchmarks.chain", store=f"sqlite:///{file}", runs=runs, in_flight=in_flight, alone=0
        )
        return float(found["steps"])
