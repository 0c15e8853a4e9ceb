"""Worker processes on one SQLite file that are killed all the time; what they leave behind is right."""

from __future__ import annotations

import random
import signal
from pathlib import Path

import pytest
from tests.chaos.sizes import full, say, short
from tests.kill.audit import audit
from tests.kill.loop import kill_all_the_time, records_of
from tests.kill.nursery import ASKING, Nursery
from tests.kill.sql import rows

CONCURRENCY = 20


@pytest.mark.parametrize(("runs", "kills"), [short(2_500, 75), full(10_000, 300)])
def test_nothing_is_lost_or_done_twice_when_workers_are_killed(tmp_path: Path, runs: int, kills: int) -> None:
    """While runs pass, a worker or the dispatcher is killed again and again: all end right, one result a step."""
    worker = {"concurrency": CONCURRENCY, "pause": 0.004}
    with Nursery(tmp_path) as nursery:
        killed = kill_all_the_time(
            nursery, runs=runs, kills=kills, chance=random.Random(2), worker=lambda _: worker
        )
        # What the dead had fetched and not acked comes back, is found to be done, and goes.
        nursery.until(lambda: rows(nursery.store, "SELECT count(*) FROM messages") == [(0,)], pause=ASKING)
        nursery.stop(signal.SIGTERM)
    repeats = audit(nursery, runs=range(runs), killed=killed.pids)
    say(
        f"{runs} runs in {killed.seconds:.1f} s, {runs / killed.seconds:.0f} a second; {len(killed.pids)} kills, "
        f"{repeats} of {records_of(runs) // 2} executions repeated"
    )
    assert len(killed.pids) >= kills
    assert repeats <= len(killed.pids) * CONCURRENCY
    assert rows(nursery.store, "SELECT count(*) FROM workflow_runs") == [(runs,)]
