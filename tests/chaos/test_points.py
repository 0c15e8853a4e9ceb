"""A process dies right before or right behind each thing that it asks of the store or of the transport."""

from __future__ import annotations

import signal
import time
from pathlib import Path
from typing import Any

import pytest
from tests.chaos.places import Place
from tests.chaos.sizes import say
from tests.kill.audit import audit, open_runs
from tests.kill.mortal import Point, died
from tests.kill.nursery import ASKING, Nursery
from tests.kill.roles import length
from tests.patience import PATIENCE

POINTS = [
    Point("record_workflow_start", "before", "s0"),
    Point("record_workflow_start", "after", "s0"),
    Point("publish", "after", "s0"),
    *(
        Point(method, when, "s1", phase)
        for phase in ("do", "undo")
        for method, when in (
            ("claim_step", "before"),
            ("claim_step", "after"),
            ("ack", "after"),
            ("record_step_result", "before"),
            ("record_step_result", "after"),
            ("publish", "after"),
        )
    ),
]
"""Around a dispatch, and around all that a worker does for a step in the middle of a run, and for its undo."""

RUNS = [10 * number + 3 for number in range(len(POINTS))]
"""One for each point: all fail at their end and are undone (`roles.steps_of`)."""

TIMES: dict[str, Any] = {"lease": 3.0, "heartbeat": 0.1, "sweep_interval": 0.1, "grace": 0.3}


@pytest.mark.slow
def test_a_process_may_die_at_any_point(place: Place, tmp_path: Path) -> None:
    """At each point a process is killed, once: the run that it was about is done and undone all the same, each once.

    In the store's own database a message is published along with what it follows from: only a sweep publishes there.
    """
    points = {f"r{number}": point for number, point in zip(RUNS, POINTS, strict=True)}
    certain = {run for run, point in points.items() if place.name != "joined" or point.method != "publish"}
    options: dict[str, Any] = {"folder": str(tmp_path), "points": points}
    dispatcher: dict[str, Any] = {
        "begin": RUNS[0],
        "runs": RUNS[-1] + 1,
        "stride": 10,
        "flight": 1,
        **options,
    }
    with Nursery(tmp_path, local_steps=1, **TIMES, **place.settings) as nursery:
        while 0 not in nursery.ended.values():  # the dispatcher's end
            for pid, code in nursery.reap().items():
                assert code in (0, -signal.SIGKILL), f"process {pid} ended with {code}: {nursery.errors}"
            roles = list(nursery.alive.values())
            if "dispatcher" not in roles and 0 not in nursery.ended.values():
                nursery.start("dispatcher", **dispatcher)
            for _ in range(2 - roles.count("worker")):
                nursery.start("worker", **options)
            nursery.stalls(length(tmp_path), seconds=PATIENCE)
            time.sleep(ASKING)
        nursery.stop(signal.SIGTERM)
    assert not open_runs(nursery.store)
    killed = {pid for pid, code in nursery.ended.items() if code == -signal.SIGKILL}
    assert certain <= died(tmp_path)
    assert len(killed) == len(died(tmp_path))
    repeats = audit(nursery, runs=RUNS, killed=killed)
    say(f"{place.name}: {len(killed)} processes killed, each at another point; {repeats} repeats")
