"""The servers are killed and started again under load; what was under way goes on, and nothing is done twice for it."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.chaos.pace import Pace
from tests.chaos.places import Place, bound
from tests.chaos.sizes import full, say, short
from tests.kill.audit import audit, open_runs, recoveries, stragglers, usual_wait
from tests.kill.loop import WORKERS, records_of
from tests.kill.nursery import ASKING, Nursery
from tests.kill.roles import length
from tests.kill.sql import rows
from tests.patience import PATIENCE

FLIGHT = 60
"""Runs that are open at once: load, and not so much that waiting for one's turn passes for an outage."""

STUCK = """
SELECT count(*) FROM workflow_runs run WHERE created_at < {at} AND (completed_at IS NULL) AND NOT EXISTS (
    SELECT * FROM step_executions step
    WHERE step.workflow_id = run.id AND (step.started_at > {at} OR step.completed_at > {at}))
"""

LEFT = """
SELECT step.* FROM workflow_runs run JOIN step_executions step ON step.workflow_id = run.id
WHERE run.completed_at IS NULL AND step.completed_at IS NULL
"""


def restart_all_the_time(
    nursery: Nursery,
    *,
    runs: int,
    restarts: int,
    local: bool,
    stop: Callable[[], None],
    start: Callable[[], None],
    settle: Callable[[], None] | None = None,
    pause: float = 0.02,
) -> tuple[float, list[float]]:
    """Have runs done while `stop` and `start` are called again and again.

    Gives when the first stop came, and when each start was done.

    Steps take `pause` seconds. Unless `local`, each crosses the transport. The next stop comes when all that was in
    flight has gone on, and a part of the work is done.
    """
    chance = random.Random(restarts)
    settings = {} if local else {"local_steps": 1}
    for _ in range(WORKERS):
        nursery.start("worker", pause=pause, settings=settings)
    if settle is not None:  # the first runs have all queues made
        nursery.start("dispatcher", runs=10, flight=10)
        nursery.until(lambda: "dispatcher" not in nursery.alive.values())
        settle()
    nursery.start("dispatcher", runs=runs, flight=FLIGHT)
    stopped: list[float] = []
    healed: list[float] = []
    for number in range(1, restarts + 1):
        amount = records_of(runs) * number // (restarts + 1)
        nursery.until(lambda amount=amount: length(nursery.folder) >= amount)  # type: ignore[misc]
        time.sleep(chance.random() * 0.05)
        assert open_runs(nursery.store), "all was done before the fault"
        stopped.append(time.time())
        stop()
        time.sleep(chance.random())
        start()
        healed.append(time.time())
        query = STUCK.format(at=healed[-1])
        try:
            nursery.until(
                lambda query=query: rows(nursery.store, query) == [(0,)],  # type: ignore[misc]
                seconds=PATIENCE,
                pause=ASKING,
            )
        except AssertionError as error:
            error.add_note(f"at {healed[-1]} s they stood so: {rows(nursery.store, LEFT)}")
            raise
    nursery.until(lambda: "dispatcher" not in nursery.alive.values(), seconds=600)
    assert not open_runs(nursery.store)
    nursery.stop(signal.SIGTERM)
    assert set(nursery.ended.values()) == {0}, nursery.errors
    return stopped[0], healed


@pytest.mark.parametrize(("runs", "restarts"), [short(150, 1), full(2_000, 10)])
def test_the_broker_is_killed_and_started_again(
    place: Place, pace: Pace, tmp_path: Path, runs: int, restarts: int
) -> None:
    """SIGKILL to the broker under load, each step crossing it: within lease + sweep + 5 s all goes on, once each."""
    began = time.monotonic()
    with Nursery(tmp_path, **place.settings) as nursery:
        first, healed = restart_all_the_time(
            nursery,
            runs=runs,
            restarts=restarts,
            local=False,
            stop=place.broker.kill,
            start=place.broker.start,
            settle=place.settle,
        )
    repeats = audit(nursery, runs=range(runs))
    waits, usual = recoveries(nursery, healed), usual_wait(nursery, first)
    say(
        f"{place.name}: broker killed {restarts} times in {time.monotonic() - began:.1f} s and {runs} runs; "
        f"{repeats} repeats; recovered within {', '.join(f'{wait:.1f}' for wait in waits)} s, usual {usual:.1f} s"
    )
    assert stragglers(nursery, healed, within=bound(pace) + usual) == {}
    if place.name != "joined":
        assert repeats == 0


@pytest.mark.parametrize(("runs", "restarts", "pause"), [short(150, 1, 0.02), full(6_000, 10, 0.1)])
def test_postgres_is_stopped_at_once(
    place: Place, pace: Pace, tmp_path: Path, runs: int, restarts: int, pause: float
) -> None:
    """`immediate` stops of the store under load: within lease + sweep + 5 s all goes on, and results stay single.

    Steps last long enough, and are so many, that there is work left at the last stop on a quick machine, too.
    """
    began = time.monotonic()
    with Nursery(tmp_path, **place.settings) as nursery:
        first, healed = restart_all_the_time(
            nursery,
            runs=runs,
            restarts=restarts,
            local=True,
            stop=lambda: place.store.stop("immediate"),
            start=place.store.start,
            pause=pause,
        )
    repeats = audit(nursery, runs=range(runs))
    waits, usual = recoveries(nursery, healed), usual_wait(nursery, first)
    say(
        f"{place.name}: Postgres stopped {restarts} times in {time.monotonic() - began:.1f} s and {runs} runs; "
        f"{repeats} repeats; recovered within {', '.join(f'{wait:.1f}' for wait in waits)} s, usual {usual:.1f} s"
    )
    assert stragglers(nursery, healed, within=bound(pace) + usual) == {}
