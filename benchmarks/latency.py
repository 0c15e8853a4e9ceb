"""How long one run takes from its dispatch to its result, one run after the other."""

from __future__ import annotations

import statistics

from benchmarks.bench import Bench
from benchmarks.report import Figure, of

__all__ = ["p95", "run", "took"]


def run(bench: Bench) -> list[Figure]:
    """The median and the 95th percentile of each round."""
    rounds = [took(bench) for _ in range(bench.many(5, 1))]
    return [
        of("median of a run", [statistics.median(ms) for ms in rounds], "ms", most=5),
        of("95 of 100 runs within", [p95(ms) for ms in rounds], "ms"),
    ]


def took(bench: Bench) -> list[float]:
    """Milliseconds of each run in a new process on a new file."""
    with bench.file() as file:
        alone = bench.many(300, 10)
        found = bench.fresh("benchmarks.chain", store=f"sqlite:///{file}", runs=0, in_flight=100, alone=alone)
        return list(found["ms"])


def p95(values: list[float]) -> float:
    """The value that 95 of 100 don't exceed."""
    return statistics.quantiles(values, n=20)[-1]
