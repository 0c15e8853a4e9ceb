"""What recording an agent's model requests and tool calls costs, next to the plain agent and to DBOSDurability.

What an engine adds is the median of `agent.run` inside a step or workflow, less that of the plain agent, which runs in
turn with it in the same process. DBOSDurability doesn't record plain function tools; what each has recorded is counted.
"""

from __future__ import annotations

import contextlib
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.agents_workload import Many
from benchmarks.bench import Bench, NotMeasured
from benchmarks.peer import PEER
from benchmarks.report import Figure, of
from benchmarks.services import Services, services

__all__ = ["run"]

_IN_FLIGHT = 20
_OURS = "benchmarks.agents_paigeant"
_PEERS = "benchmarks.agents_dbos"
_MOST_ADDED = {"SQLite": 3.0, "Postgres": 4.0}
"""Milliseconds."""


class _Round(NamedTuple):
    """Milliseconds of the plain agent, those that an engine adds to it, and those of a whole run with the engine.

    Then what many runs at once do without and with the engine, and how many units a run records.
    """

    plain: float
    added: float
    whole: float
    many_plain: Many
    many: Many
    units: float


def run(bench: Bench, python: Path = PEER) -> list[Figure]:
    """Both engines' figures on both stores, and their ratios. Each round of ours is followed by one of the peer's."""
    if not python.exists() or not _has_library(python):
        raise NotMeasured(
            f"{python} isn't there, or misses libraries; it runs the peer, and `make bench` makes it"
        )
    found: dict[str, list[tuple[_Round, _Round]]] = {store: [] for store in _MOST_ADDED}
    with services(bench) as started:
        for _ in range(bench.many(3, 1)):
            for store, rounds in found.items():
                ours = _measured(bench, started, store, _OURS, sys.executable)
                rounds.append((ours, _measured(bench, started, store, _PEERS, str(python))))
    return [figure for store, rounds in found.items() for figure in _figures(store, rounds)]


def _figures(store: str, rounds: list[tuple[_Round, _Round]]) -> list[Figure]:
    ours, peers = zip(*rounds, strict=True)
    return [
        of(f"{store}: plain agent", [own.plain for own in ours], "ms"),
        of(f"{store}: Paigeant adds", [own.added for own in ours], "ms", most=_MOST_ADDED[store]),
        of(f"{store}: DBOS adds", [peer.added for peer in peers], "ms"),
        of(f"{store}: adds, over DBOS", [own.added / peer.added for own, peer in rounds], "times"),
        of(f"{store}: a whole run, Paigeant", [own.whole for own in ours], "ms"),
        of(f"{store}: a whole run, DBOS", [peer.whole for peer in peers], "ms"),
        of(f"{store}: a whole run, over DBOS", [own.whole / peer.whole for own, peer in rounds], "times"),
        of(f"{store}: plain agent, {_IN_FLIGHT} in flight", [own.many_plain.runs for own in ours], "runs/s"),
        of(
            f"{store}: Paigeant, {_IN_FLIGHT} in flight", [own.many.runs for own in ours], "runs/s", least=180
        ),
        of(f"{store}: DBOS, {_IN_FLIGHT} in flight", [peer.many.runs for peer in peers], "runs/s"),
        of(f"{store}: in flight, over plain", [own.many.runs / own.many_plain.runs for own in ours], "times"),
        of(
            f"{store}: in flight, over DBOS",
            [own.many.runs / peer.many.runs for own, peer in rounds],
            "times",
        ),
        # The neighbours of a machine that isn't idle change this less than the clock's time.
        of(f"{store}: processor, plain agent", [own.many_plain.cpu_ms for own in ours], "ms/run"),
        of(f"{store}: processor, Paigeant", [own.many.cpu_ms for own in ours], "ms/run"),
        of(f"{store}: processor, DBOS", [peer.many.cpu_ms for peer in peers], "ms/run"),
        # Two model requests and two tool calls.
        of(f"{store}: units that Paigeant records", [own.units for own in ours], "units", least=4),
        of(f"{store}: units that DBOS records", [peer.units for peer in peers], "units"),
    ]


def _measured(bench: Bench, started: Services, store: str, module: str, python: str) -> _Round:
    with _opened(bench, started, store, ours=module == _OURS) as url:
        found: dict[str, Any] = bench.fresh(
            module,
            python=python,
            store=url,
            runs=bench.many(200, 10),
            in_flight=_IN_FLIGHT,
            alone=bench.many(100, 5),
        )
    plain, inside, whole = (statistics.median(found[name]) for name in ("plain", "inside", "whole"))
    return _Round(
        plain, inside - plain, whole, Many(*found["many_plain"]), Many(*found["many"]), found["units"]
    )


@contextlib.contextmanager
def _opened(bench: Bench, started: Services, store: str, *, ours: bool) -> Iterator[str]:
    if store == "SQLite":
        with bench.file() as file:
            yield f"sqlite:///{file}"
    else:
        with started.store() if ours else started.database() as url:
            yield url


def _has_library(python: Path) -> bool:
    """Whether the peers' environment is new enough to have what this one needs of it."""
    asked = [str(python), "-c", "import pydantic_ai.durable_exec.dbos"]
    return subprocess.run(asked, capture_output=True, check=False).returncode == 0
