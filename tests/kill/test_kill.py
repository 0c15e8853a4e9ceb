"""Worker processes on one SQLite file that are killed all the time; what they leave behind is right."""

from __future__ import annotations

import random
import signal
import sys
from pathlib import Path

import pytest
from tests.kill.audit import audit
from tests.kill.loop import kill_all_the_time, records_of
from tests.kill.nursery import Nursery
from tests.kill.sql import rows

RUNS, KILLS, CONCURRENCY = 10_000, 300, 20


@pytest.mark.timeout(600)
def test_nothing_is_lost_or_done_twice_when_workers_are_killed(tmp_path: Path) -> None:
    """10,000 runs pass while 300 times a worker or the dispatcher is killed: all end right, with one result a step."""
    worker = {"concurrency": CONCURRENCY, "pause": 0.004}
    with Nursery(tmp_path) as nursery:
        killed = kill_all_the_time(
            nursery, runs=RUNS, kills=KILLS, chance=random.Random(2), worker=lambda _: worker
        )
        # What the dead had fetched and not acked comes back, is found to be done, and goes.
        nursery.until(lambda: rows(nursery.store, "SELECT count(*) FROM messages") == [(0,)])
        nursery.stop(signal.SIGTERM)
    repeats = audit(nursery, runs=range(RUNS), killed=killed.pids)
    sys.stdout.write(
        f"{RUNS} runs in {killed.seconds:.1f} s, {RUNS / killed.seconds:.0f} a second; {len(killed.pids)} kills, "
        f"{repeats} of {records_of(RUNS) // 2} executions repeated\n"
    )
    assert len(killed.pids) >= KILLS
    assert repeats <= len(killed.pids) * CONCURRENCY
    assert rows(nursery.store, "SELECT count(*) FROM workflow_runs") == [(RUNS,)]
