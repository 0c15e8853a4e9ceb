"""Worker processes on one SQLite file that are killed all the time; what they leave behind is right."""

from __future__ import annotations

import random
import signal
import sys
import time
from pathlib import Path

import pytest
from tests.kill.audit import audit, executions_of, open_runs, rows
from tests.kill.nursery import Nursery
from tests.kill.roles import length

RUNS, KILLS, WORKERS, CONCURRENCY = 10_000, 300, 3, 20


@pytest.mark.timeout(600)
def test_nothing_is_lost_or_done_twice_when_workers_are_killed(tmp_path: Path) -> None:
    """10,000 runs pass while 300 times a worker or the dispatcher is killed: all end right, with one result a step."""
    chance = random.Random(2)
    # Two records for each execution: the kills are spread over all of the work, however fast it is done.
    records = sum(2 * len(executions_of(number)) for number in range(RUNS))
    interval = records / (KILLS * 1.05)
    killed: set[int] = set()
    began = time.monotonic()
    with Nursery(tmp_path) as nursery:
        nursery.start("dispatcher", runs=RUNS)
        nursery.until((tmp_path / "runs.db").exists)
        next_at, dispatched, ended = interval, False, False
        while not ended or len(killed) < KILLS:
            for pid, code in nursery.reap().items():
                assert code == 0, f"process {pid} ended with {code}: {nursery.errors}"
                dispatched = True
            roles = list(nursery.alive.values())
            for _ in range(WORKERS - roles.count("worker")):
                nursery.start("worker", concurrency=CONCURRENCY, pause=0.004)
            if "dispatcher" not in roles and not dispatched:
                nursery.start("dispatcher", runs=RUNS)
            if ended or length(tmp_path) >= next_at:
                time.sleep(chance.random() * 0.01)
                pid = chance.choice(list(nursery.alive))
                if nursery.kill(pid):
                    killed.add(pid)
                next_at += interval * chance.uniform(0.5, 1.4)
            ended = dispatched and length(tmp_path) >= records and not open_runs(tmp_path)
            nursery.stalls(length(tmp_path), seconds=120.0)
            time.sleep(0.001)
        # What the dead had fetched and not acked comes back, is found to be done, and goes.
        nursery.until(lambda: rows(tmp_path, "SELECT count(*) FROM messages") == [(0,)])
        seconds = time.monotonic() - began
        nursery.stop(signal.SIGTERM)
    repeats = audit(tmp_path, runs=range(RUNS), killed=killed)
    sys.stdout.write(
        f"{RUNS} runs in {seconds:.1f} s, {RUNS / seconds:.0f} a second; {len(killed)} kills, "
        f"{repeats} of {records // 2} executions repeated\n"
    )
    assert len(killed) >= KILLS
    assert repeats <= len(killed) * CONCURRENCY
    assert rows(tmp_path, "SELECT count(*) FROM workflow_runs") == [(RUNS,)]
