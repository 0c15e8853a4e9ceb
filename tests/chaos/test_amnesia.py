"""A transport forgets all that was in it, with hundreds of runs in flight: all end, and nothing is done twice."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest
from tests.chaos.pace import Pace
from tests.chaos.places import AMNESIAS, Servers, bound, open_place
from tests.chaos.sizes import full, say, short
from tests.kill.audit import audit, longest_pause, open_runs, recoveries, stragglers
from tests.kill.loop import WORKERS, records_of
from tests.kill.nursery import Nursery
from tests.kill.roles import length

RUNS = 600


@pytest.mark.parametrize(("name", "how"), AMNESIAS)
@pytest.mark.parametrize("times", [short(1), full(10)])
def test_a_transport_forgets_everything(
    servers: Servers, pace: Pace, tmp_path: Path, name: str, how: str, times: int
) -> None:
    """500 runs are in flight, each step crossing the transport, when it forgets all: they all end nevertheless.

    Neither work as a whole nor any single run rests for longer than lease + sweep + 5 s, a run beyond the time to send
    as many messages and to wait for its turn behind them: a first round without a fault tells how long that is. There
    one came after the other; here each has half of the processors.
    """
    pauses, waits, seconds = [], [], []
    late: dict[str, float] = {}
    with (
        open_place(servers, name) as place,
        Nursery(tmp_path, local_steps=1, **place.settings) as nursery,
    ):
        usual = work_off(nursery)
        for number in range(1, times + 1):
            nursery.start("dispatcher", begin=number * RUNS, runs=(number + 1) * RUNS)
            nursery.until(lambda: not nursery.alive)
            forget = AMNESIAS[name, how](place)
            # Only now: their messages wait in line, so nearly all runs are in flight until most of the work is done.
            for _ in range(WORKERS):
                nursery.start("worker", concurrency=50)
            amount = records_of(number * RUNS) + 100  # some are under way
            nursery.until(lambda amount=amount: length(tmp_path) > amount)  # type: ignore[misc]
            in_flight = open_runs(nursery.store)
            forget()
            forgot = time.time()
            pace.look()
            nursery.until_ended()
            seconds.append(time.time() - forgot)
            assert in_flight >= 500
            pauses.append(longest_pause(nursery.store, forgot))
            waits += recoveries(nursery, [forgot])
            late |= stragglers(nursery, [forgot], within=bound(pace) + 2 * usual)
            nursery.stop(signal.SIGTERM)
        repeats = audit(nursery, runs=range((times + 1) * RUNS))
    say(
        f"{name}, {how}: longest pauses {', '.join(f'{pause:.1f}' for pause in pauses)} s; "
        f"each run went on after {', '.join(f'{wait:.1f}' for wait in waits)} s, usual {usual:.1f} s; "
        f"all ended after {', '.join(f'{each:.1f}' for each in seconds)} s; {repeats} repeats"
    )
    assert max(pauses) < bound(pace)
    assert late == {}


def work_off(nursery: Nursery) -> float:
    """Have the first runs done without a fault. Gives how long it took to send as many, and to wait for one's turn."""
    started = time.time()
    nursery.start("dispatcher", runs=RUNS)
    nursery.until(lambda: not nursery.alive)
    began = time.time()
    for _ in range(WORKERS):
        nursery.start("worker", concurrency=50)
    nursery.until_ended()
    nursery.stop(signal.SIGTERM)
    return began - started + recoveries(nursery, [began])[0]
