"""What the processes of the kill tests do: dispatch runs, and work on them. Each execution leaves records in a diary.

All processes append to it, in records of one size, so that how long it is says how far the work is.
"""

from __future__ import annotations

import asyncio
import faulthandler
import logging
import os
import random
import signal
import struct
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from tests.kill.mortal import Point, die_at
from tests.kill.sql import rows

from paigeant.activity import ActivityRegistry
from paigeant.app import Paigeant
from paigeant.context import StepContext
from paigeant.errors import NonRetryableError, StoreUnavailable
from paigeant.observer import Event
from paigeant.retry import RetryPolicy
from paigeant.settings import Settings
from paigeant.slip import Step
from paigeant.workflow import Workflow

__all__ = [
    "BEGAN",
    "ENDED",
    "LOST",
    "TIMES",
    "Loser",
    "Record",
    "activity",
    "diary",
    "execute",
    "keep_diary",
    "length",
    "play",
    "steps_of",
]

TIMES = {"lease": 2.0, "heartbeat": 0.3, "sweep_interval": 0.2, "grace": 1.0}
"""Settings for tests in which leases end and messages are lost, so that these don't take long."""

BEGAN, ENDED, LOST = 0, 1, 2
_RECORD = struct.Struct("<dIIIHBBB3x")

activity = ActivityRegistry()
_diary = -1
_written = 0
_pause = 0.0
_slow: tuple[str, bool, float] = ("", False, 0.0)


class Record(NamedTuple):
    """An execution of a step or its undo began, or ended well, or its worker heard that it had lost the step.

    `at` is when, in seconds since 1970; `number` counts the records of the process.
    """

    at: float
    run: int
    process: int
    number: int
    attempt: int
    step: int
    undo: int
    what: int


def diary(folder: Path) -> list[Record]:
    """All records, in the order in which they were written."""
    if not length(folder):
        return []
    return [Record(*record) for record in _RECORD.iter_unpack((folder / "diary").read_bytes())]


def keep_diary(folder: Path) -> None:
    """Have what this process executes recorded in the diary of this folder."""
    global _diary
    if _diary >= 0:
        os.close(_diary)
    _diary = os.open(folder / "diary", os.O_WRONLY | os.O_CREAT | os.O_APPEND)


def length(folder: Path) -> int:
    """How many records there are."""
    try:
        return (folder / "diary").stat().st_size // _RECORD.size
    except FileNotFoundError:
        return 0


def steps_of(number: int) -> list[str]:
    """The activities of a run: 3 to 5 of them; the last of every tenth run fails for good, the others are undone."""
    names = ["work"] * (3 + number % 3)
    if number % 10 == 3:
        names[-1] = "fail"
    return names


def _write(run_id: str, step_id: str, attempt: int, undo: bool, what: int) -> int:
    global _written
    _written += 1
    record = (time.time(), int(run_id[1:]), os.getpid(), _written, attempt, int(step_id[1:]), undo, what)
    os.write(_diary, _RECORD.pack(*record))
    return _written


async def execute(context: StepContext, *, undo: bool = False) -> str:
    """Leave records of an execution in the diary, and say which one it was."""
    number = _write(context.workflow_id, context.step_id, context.attempt, undo, BEGAN)
    late = context.attempt == 1 and _slow[:2] == (context.step_id, undo)
    await asyncio.sleep(_slow[2] if late else random.random() * _pause)
    _write(context.workflow_id, context.step_id, context.attempt, undo, ENDED)
    return f"{os.getpid()}.{number}"


@activity.execute(retries=RetryPolicy(attempts=50, base=0.01, cap=0.1))
async def work(context: StepContext) -> str:
    """Leave a record, take a little time, and say which execution this was."""
    return await execute(context)


@activity.compensate("work", retries=RetryPolicy(attempts=50, base=0.01, cap=0.1))
async def unwork(context: StepContext, output: str) -> None:
    """Undo it, with a record of its own."""
    await execute(context, undo=True)


@activity.execute(retries=RetryPolicy(attempts=50))
async def fail(context: StepContext) -> str:
    """Fail for good."""
    await execute(context)
    raise NonRetryableError("planned")


@activity.execute(retries=2)
async def poison(context: StepContext) -> str:
    """Take the whole process down with it."""
    _write(context.workflow_id, context.step_id, context.attempt, False, BEGAN)
    os._exit(3)


activity.check()


class Loser:
    """Notes which steps their worker lost without dying: they may be executed again."""

    def observe(self, event: Event) -> None:
        """Leave a record."""
        if event.name == "step.lost":
            _write(event.workflow_id, event.step, event.attempt, False, LOST)


async def _worker(settings: Settings, options: dict[str, Any]) -> None:
    global _pause, _slow
    _pause = options.get("pause", 0.0)
    _slow = tuple(options.get("slow", _slow))
    app = Paigeant(settings, activities=activity, observers=[Loser()])
    async with app:
        _die_at_points(app, options)
        worker = app.worker(concurrency=options.get("concurrency", 20))
        stopping: list[asyncio.Task[None]] = []
        asyncio.get_running_loop().add_signal_handler(
            signal.SIGTERM, lambda: stopping.append(asyncio.create_task(worker.stop(grace=5.0)))
        )
        await worker.run()
        await asyncio.gather(*stopping)


async def _dispatcher(settings: Settings, options: dict[str, Any]) -> None:
    """Dispatch those of the runs that aren't there yet; with `flight` so that at most this many are open at once."""
    async with Paigeant(settings, activities=activity) as app:
        _die_at_points(app, options)
        waits = "flight" in options
        # One that was killed has a successor, which takes over what is open: dispatching it again changes nothing.
        done = "SELECT id FROM workflow_runs" + (" WHERE completed_at IS NOT NULL" if waits else "")
        there = {run for (run,) in rows(settings.store_url, done)}
        missing = iter(
            [
                n
                for n in range(options.get("begin", 0), options["runs"], options.get("stride", 1))
                if f"r{n}" not in there
            ]
        )
        first = options.get("first")

        async def lane() -> None:
            for number in missing:
                await _patiently(lambda number=number: _dispatch(app, number, first))  # type: ignore[misc]
                if waits:
                    await _patiently(lambda number=number: app.run(f"r{number}").wait())  # type: ignore[misc]

        await asyncio.gather(*(lane() for _ in range(options.get("flight", 200))))


def _die_at_points(app: Paigeant, options: dict[str, Any]) -> None:
    points = {run: Point(*point) for run, point in options.get("points", {}).items()}
    die_at(app, points, Path(options.get("folder", ".")))


async def _patiently(what: Callable[[], Coroutine[Any, Any, Any]]) -> None:
    """As a user would: what failed for want of a store is tried again."""
    while True:
        try:
            await what()
            return
        except StoreUnavailable:
            await asyncio.sleep(0.1)


async def _dispatch(app: Paigeant, number: int, first: list[str] | None) -> None:
    names = steps_of(number) if number or first is None else first
    steps = [Step(name, id=f"s{place}") for place, name in enumerate(names)]
    await app.dispatch(Workflow("killed", steps), {"number": number}, workflow_id=f"r{number}")


Role = Callable[[Settings, dict[str, Any]], Coroutine[Any, Any, None]]
ROLES: dict[str, Role] = {"worker": _worker, "dispatcher": _dispatcher}


def play(role: str, folder: Path, settings: dict[str, Any], options: dict[str, Any]) -> None:
    """Be this role in this process, until it ends."""
    random.seed(os.getpid())
    stacks = (folder / f"stacks.{os.getpid()}").open("a")
    faulthandler.register(signal.SIGUSR1, file=stacks, all_threads=True)
    keep_diary(folder)
    logs = logging.FileHandler(folder / "log")
    logs.setFormatter(logging.Formatter("%(asctime)s %(process)d %(name)s: %(message)s"))
    logging.getLogger("paigeant").addHandler(logs)

    async def main() -> None:
        asyncio.get_running_loop().add_signal_handler(signal.SIGUSR2, _write_tasks, stacks)
        await ROLES[role](Settings(**{**TIMES, **settings}), options)

    asyncio.run(main())


def _write_tasks(file: TextIO) -> None:
    for task in asyncio.all_tasks():
        task.print_stack(limit=5, file=file)
    file.flush()
