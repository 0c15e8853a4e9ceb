"""What log lines cost: steps a second on one SQLite file with lines as JSON, in the store, and without any, in turn."""

from __future__ import annotations

from collections.abc import Mapping

from benchmarks.bench import Bench
from benchmarks.report import Figure, of

__all__ = ["run", "steps"]

_WAYS: Mapping[str, tuple[str, bool]] = {
    "no lines": ("off", False),
    "JSON on standard error": ("off", True),
    "in the store, info": ("info", False),
    "in the store, debug": ("debug", False),
    "both, info": ("info", True),
}
"""The setting `log_sql`, and whether lines are written to standard error, by what a figure is called."""


def run(bench: Bench) -> list[Figure]:
    """Steps a second of each way, and the share of those without lines in each round: machines change their pace."""
    rounds = [
        {name: steps(bench, kept, prints) for name, (kept, prints) in _WAYS.items()}
        for _ in range(bench.many(5, 1))
    ]
    figures = [of(name, [found[name] for found in rounds], "steps/s") for name in _WAYS]
    for name in list(_WAYS)[1:]:
        shares = [100 * found[name] / found["no lines"] for found in rounds]
        figures.append(of(f"{name}, of the speed without", shares, "%"))
    return figures


def steps(bench: Bench, kept: str, prints: bool) -> float:
    """Steps a second in a new process on a new file, with 500 runs in flight."""
    with bench.file() as file:
        found = bench.fresh(
            "benchmarks.chain",
            store=f"sqlite:///{file}",
            runs=bench.many(4000, 100),
            in_flight=500,
            alone=0,
            prints=prints,
            settings={"PAIGEANT_LOG_SQL": kept},
        )
        return float(found["steps"])
