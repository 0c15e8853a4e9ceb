"""The same work on DBOS, in turn with Paigeant: ratios of one session on one machine mean more than figures alone."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import NamedTuple

from benchmarks.bench import ROOT, Bench, NotMeasured
from benchmarks.latency import p95
from benchmarks.report import Figure, of

__all__ = ["PEER", "run"]

PEER = ROOT / ".bench" / "venv" / "bin" / "python"
"""The interpreter that has DBOS. `make bench` makes it from requirements-peer.txt."""

_PEER_IN_FLIGHT = 8
"""DBOS does as much with 8 runs in flight as with 50, and a little more than with 500."""


class _Round(NamedTuple):
    steps: float
    median: float
    p95: float


def run(bench: Bench, python: Path = PEER) -> list[Figure]:
    """Both engines' figures and their ratios. Each round of ours is compared with the peer's round right after it."""
    if not python.exists():
        raise NotMeasured(f"{python} isn't there, which runs the peer; `make bench` makes it")
    rounds = [(_ours(bench), _peers(bench, python)) for _ in range(bench.many(5, 1))]
    ours, peers = zip(*rounds, strict=True)
    return [
        of("Paigeant, 500 in flight", [own.steps for own in ours], "steps/s"),
        of(f"DBOS, {_PEER_IN_FLIGHT} in flight", [peer.steps for peer in peers], "steps/s"),
        of("Paigeant over DBOS", [own.steps / peer.steps for own, peer in rounds], "times", least=15),
        of("Paigeant, median of a run", [own.median for own in ours], "ms"),
        of("DBOS, median of a run", [peer.median for peer in peers], "ms"),
        of(
            "Paigeant over DBOS, median",
            [own.median / peer.median for own, peer in rounds],
            "times",
            most=0.3,
        ),
        of("Paigeant, 95 of 100 runs", [own.p95 for own in ours], "ms"),
        of("DBOS, 95 of 100 runs", [peer.p95 for peer in peers], "ms"),
    ]


def _ours(bench: Bench) -> _Round:
    with bench.file() as file:
        runs, alone = bench.many(4000, 100), bench.many(200, 10)
        found = bench.fresh(
            "benchmarks.chain", store=f"sqlite:///{file}", runs=runs, in_flight=500, alone=alone
        )
    return _Round(found["steps"], statistics.median(found["ms"]), p95(found["ms"]))


def _peers(bench: Bench, python: Path) -> _Round:
    with bench.file() as file:
        found = bench.fresh(
            "benchmarks.chain_dbos",
            python=str(python),
            store=f"sqlite:///{file}",
            runs=bench.many(400, 20),
            in_flight=_PEER_IN_FLIGHT,
            alone=bench.many(200, 10),
        )
    return _Round(found["steps"], statistics.median(found["ms"]), p95(found["ms"]))
