"""Worker processes and their dispatcher at work, while one after the other is killed at a random moment."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from tests.kill.audit import executions_of, open_runs
from tests.kill.nursery import Nursery
from tests.kill.roles import length
from tests.patience import PATIENCE

__all__ = ["Killed", "kill_all_the_time", "records_of"]

WORKERS = 3


class Killed(NamedTuple):
    """Who was killed, how many seconds all took, and when (seconds since 1970) each was dead."""

    pids: set[int]
    seconds: float
    at: list[float]


def records_of(runs: int) -> int:
    """How many records the diary has at least when all is done: two for each execution."""
    return sum(2 * len(executions_of(number)) for number in range(runs))


def kill_all_the_time(
    nursery: Nursery,
    *,
    runs: int,
    kills: int,
    chance: random.Random,
    worker: Callable[[random.Random], dict[str, Any]],
    flight: int | None = None,
) -> Killed:
    """Have `runs` runs done by processes that are killed at least `kills` times, in all, and replaced.

    `worker` gives the options of each new worker. The kills are spread over all of the work, however fast that is done.
    Returns when all runs have ended; the last processes are still there.
    """
    records = records_of(runs)
    interval = records / (kills * 1.05)
    killed: set[int] = set()
    at: list[float] = []
    began = time.monotonic()
    dispatcher: dict[str, Any] = {"runs": runs} if flight is None else {"runs": runs, "flight": flight}
    nursery.start("dispatcher", **dispatcher)
    next_at, dispatched, ended = interval, False, False
    while not ended or len(killed) < kills:
        for pid, code in nursery.reap().items():
            assert code == 0, f"process {pid} ended with {code}: {nursery.errors}"
            dispatched = True
        roles = list(nursery.alive.values())
        for _ in range(WORKERS - roles.count("worker")):
            nursery.start("worker", **worker(chance))
        if "dispatcher" not in roles and not dispatched:
            nursery.start("dispatcher", **dispatcher)
        done = length(nursery.folder)
        if ended or done >= next_at:
            time.sleep(chance.random() * 0.01)
            pid = chance.choice(list(nursery.alive))
            if nursery.kill(pid):
                killed.add(pid)
                at.append(time.time())
            next_at += interval * chance.uniform(0.5, 1.4)
        ended = dispatched and done >= records and not open_runs(nursery.store)
        nursery.stalls(done, seconds=2 * PATIENCE)
        # From one kill to the next it takes a tenth of a second or more, and looking takes time from the workers.
        time.sleep(0.005)
    return Killed(killed, time.monotonic() - began, at)
