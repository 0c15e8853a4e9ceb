"""Workers and dispatchers are killed all the time; what they leave behind is right on every transport."""

from __future__ import annotations

import random
import signal
from pathlib import Path
from typing import Any

import pytest
from tests.chaos.pace import Pace
from tests.chaos.places import Place, bound
from tests.chaos.sizes import full, say, short
from tests.kill.audit import audit, longest_pause, recoveries, stragglers, usual_wait
from tests.kill.loop import kill_all_the_time, records_of
from tests.kill.nursery import Nursery
from tests.kill.sql import rows

CONCURRENCY = 20


def worker(chance: random.Random) -> dict[str, Any]:
    """Every second one continues nothing locally: its runs cross the transport at each step."""
    settings = {"local_steps": chance.choice([1, 50])}
    return {"concurrency": CONCURRENCY, "pause": 0.004, "settings": settings}


@pytest.mark.parametrize(("runs", "kills"), [short(300, 15), full(10_000, 300)])
def test_nothing_is_lost_or_done_twice_when_processes_are_killed(
    place: Place, pace: Pace, tmp_path: Path, runs: int, kills: int
) -> None:
    """While runs pass, a worker or the dispatcher is killed again and again: all end right, one result a step.

    Neither work as a whole nor any run in flight rests for longer than lease + sweep + 5 s after a kill, beyond what
    waiting for one's turn took before the first.
    """
    with Nursery(tmp_path, **place.settings) as nursery:
        killed = kill_all_the_time(
            nursery, runs=runs, kills=kills, chance=random.Random(3), worker=worker, flight=100
        )
        nursery.stop(signal.SIGTERM)
    repeats = audit(nursery, runs=range(runs), killed=killed.pids)
    pause = longest_pause(nursery.store, killed.at[0])
    waits = recoveries(nursery, killed.at, killed=killed.pids)
    say(
        f"{place.name}: {runs} runs in {killed.seconds:.1f} s; {len(killed.pids)} kills, {repeats} of "
        f"{records_of(runs) // 2} executions repeated; longest pause {pause:.1f} s; "
        f"every run in flight had gone on {max(waits):.1f} s after a kill"
    )
    assert len(killed.pids) >= kills
    assert repeats <= len(killed.pids) * CONCURRENCY
    assert rows(nursery.store, "SELECT count(*) FROM workflow_runs") == [(runs,)]
    within = bound(pace) + usual_wait(nursery, killed.at[0])
    assert pause < within
    assert stragglers(nursery, killed.at, within=within, killed=killed.pids) == {}
