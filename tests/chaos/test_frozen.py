"""Workers are stopped for longer than their lease and then go on: nothing of what they do afterwards has an effect."""

from __future__ import annotations

import random
import signal
import time
from pathlib import Path

import pytest
from tests.chaos.pace import Pace
from tests.chaos.places import Place, bound
from tests.chaos.sizes import full, say
from tests.kill.audit import audit, open_runs, recoveries, stragglers, usual_wait
from tests.kill.loop import WORKERS, records_of
from tests.kill.nursery import Nursery
from tests.kill.roles import TIMES, length
from tests.kill.scenes import stop_a_worker_for_longer_than_its_lease


def test_a_worker_that_was_stopped_changes_nothing_afterwards(place: Place, tmp_path: Path) -> None:
    """A worker is stopped for longer than its lease and goes on when another has done its steps: no row changes."""
    with Nursery(tmp_path, **place.settings) as nursery:
        stop_a_worker_for_longer_than_its_lease(nursery, lambda pid: nursery.send(pid, signal.SIGSTOP))


@pytest.mark.parametrize(("runs", "stops"), [full(4_000, 20)])
def test_workers_are_stopped_again_and_again(
    place: Place, pace: Pace, tmp_path: Path, runs: int, stops: int
) -> None:
    """Under load one worker after the other is stopped for longer than its lease, at any moment, and goes on.

    All ends right, one result a step; while one is stopped, its runs go on within lease + sweep + 5 s.
    """
    chance = random.Random(4)
    stopped: list[float] = []
    with Nursery(tmp_path, **place.settings) as nursery:
        for number in range(WORKERS):
            nursery.start("worker", pause=0.02, settings={"local_steps": 50 if number else 1})
        nursery.start("dispatcher", runs=runs, flight=60)
        for number in range(1, stops + 1):
            amount = records_of(runs) * number // (stops + 1)
            nursery.until(lambda amount=amount: length(tmp_path) >= amount)  # type: ignore[misc]
            time.sleep(chance.random() * 0.05)
            pid = chance.choice([pid for pid, role in nursery.alive.items() if role == "worker"])
            nursery.send(pid, signal.SIGSTOP)
            stopped.append(time.time())
            time.sleep(TIMES["lease"] * 1.5)
            nursery.send(pid, signal.SIGCONT)
        nursery.until(lambda: "dispatcher" not in nursery.alive.values(), seconds=600)
        assert not open_runs(nursery.store)
        nursery.stop(signal.SIGTERM)
        assert set(nursery.ended.values()) == {0}, nursery.errors
    repeats = audit(nursery, runs=range(runs))
    waits, usual = recoveries(nursery, stopped), usual_wait(nursery, stopped[0])
    say(f"{place.name}: {stops} stops, {repeats} repeats; recovered within {max(waits):.1f} s")
    assert stragglers(nursery, stopped, within=bound(pace) + usual) == {}
