"""A transport forgets all that was in it, with hundreds of runs in flight: all end, and nothing is done twice."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest
from tests.chaos.places import AMNESIAS, BOUND, Servers, open_place
from tests.chaos.sizes import full, say, short
from tests.kill.audit import audit, longest_pause, open_runs
from tests.kill.loop import WORKERS, records_of
from tests.kill.nursery import Nursery
from tests.kill.roles import length

RUNS = 600


@pytest.mark.parametrize(("name", "how"), AMNESIAS)
@pytest.mark.parametrize("times", [short(1), full(10)])
def test_a_transport_forgets_everything(
    servers: Servers, tmp_path: Path, name: str, how: str, times: int
) -> None:
    """500 runs are in flight, each step crossing the transport, when it forgets all: they all end nevertheless.

    Work never rests for longer than lease + sweep + 5 s. (How long all of it takes is the machine's affair.)
    """
    pauses, seconds = [], []
    with (
        open_place(servers, name) as place,
        Nursery(tmp_path, local_steps=1, **place.settings) as nursery,
    ):
        for number in range(times):
            nursery.start("dispatcher", begin=number * RUNS, runs=(number + 1) * RUNS)
            nursery.until(lambda: not nursery.alive)
            forget = AMNESIAS[name, how](place)
            # Only now: their messages wait in line, so nearly all runs are in flight until most of the work is done.
            for _ in range(WORKERS):
                nursery.start("worker", concurrency=50)
            amount = records_of(number * RUNS) + 100
            nursery.until(lambda amount=amount: length(tmp_path) > amount)  # type: ignore[misc]
            forget()
            forgot = time.time()
            in_flight = open_runs(nursery.store)
            nursery.until(lambda: not open_runs(nursery.store))
            seconds.append(time.time() - forgot)
            assert in_flight >= 500
            pauses.append(longest_pause(nursery.store, forgot))
            nursery.stop(signal.SIGTERM)
        repeats = audit(nursery, runs=range(times * RUNS))
    say(
        f"{name}, {how}: longest pauses {', '.join(f'{pause:.1f}' for pause in pauses)} s; "
        f"all ended after {', '.join(f'{each:.1f}' for each in seconds)} s; {repeats} repeats"
    )
    assert max(pauses) < BOUND
