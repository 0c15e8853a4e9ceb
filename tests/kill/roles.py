"""What the processes of the kill tests do: dispatch runs, and work on them. Each execution leaves records in a diary.

All processes append to it, in records of one size, so that how long it is says how far the work is.
"""

from __future__ import annotations

import asyncio
import contextlib
import faulthandler
import os
import random
import signal
import sqlite3
import struct
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, NamedTuple

from paigeant.activity import ActivityRegistry
from paigeant.app import Paigeant
from paigeant.context import StepContext
from paigeant.errors import NonRetryableError
from paigeant.observer import Event
from paigeant.retry import RetryPolicy
from paigeant.settings import Settings
from paigeant.slip import Step
from paigeant.workflow import Workflow

__all__ = ["BEGAN", "ENDED", "LOST", "Record", "diary", "length", "play", "steps_of"]

BEGAN, ENDED, LOST = 0, 1, 2
_RECORD = struct.Struct("<IIIHBBB3x")

activity = ActivityRegistry()
_diary = -1
_written = 0
_pause = 0.0
_slow = ("", False)


class Record(NamedTuple):
    """An execution of a step or its undo began, or ended well, or its worker heard that it had lost the step.

    `number` counts the records of the process.
    """

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
    record = (int(run_id[1:]), os.getpid(), _written, attempt, int(step_id[1:]), undo, what)
    os.write(_diary, _RECORD.pack(*record))
    return _written


async def _execute(context: StepContext, *, undo: bool = False) -> str:
    number = _write(context.workflow_id, context.step_id, context.attempt, undo, BEGAN)
    late = context.attempt == 1 and _slow == (context.step_id, undo)
    await asyncio.sleep(4.0 if late else random.random() * _pause)
    _write(context.workflow_id, context.step_id, context.attempt, undo, ENDED)
    return f"{os.getpid()}.{number}"


@activity.execute(retries=RetryPolicy(attempts=50, base=0.01, cap=0.1))
async def work(context: StepContext) -> str:
    """Leave a record, take a little time, and say which execution this was."""
    return await _execute(context)


@activity.compensate("work", retries=RetryPolicy(attempts=50, base=0.01, cap=0.1))
async def unwork(context: StepContext, output: str) -> None:
    """Undo it, with a record of its own."""
    await _execute(context, undo=True)


@activity.execute(retries=RetryPolicy(attempts=50))
async def fail(context: StepContext) -> str:
    """Fail for good."""
    await _execute(context)
    raise NonRetryableError("planned")


@activity.execute(retries=2)
async def poison(context: StepContext) -> str:
    """Take the whole process down with it."""
    _write(context.workflow_id, context.step_id, context.attempt, False, BEGAN)
    os._exit(3)


activity.check()


def _settings(folder: Path) -> Settings:
    url = f"sqlite:///{folder / 'runs.db'}"
    return Settings(transport_url=url, store_url=url, lease=2.0, heartbeat=0.3, sweep_interval=0.2, grace=1.0)


class _Loser:
    """Notes which steps their worker lost without dying: they may be executed again."""

    def observe(self, event: Event) -> None:
        """Leave a record."""
        if event.name == "step.lost":
            _write(event.workflow_id, event.step, event.attempt, False, LOST)


async def _worker(folder: Path, options: dict[str, Any]) -> None:
    global _pause, _slow
    _pause = options.get("pause", 0.0)
    _slow = tuple(options.get("slow", ("", False)))
    app = Paigeant(_settings(folder), activities=activity, observers=[_Loser()])
    async with app:
        worker = app.worker(concurrency=options.get("concurrency", 20))
        stopping: list[asyncio.Task[None]] = []
        asyncio.get_running_loop().add_signal_handler(
            signal.SIGTERM, lambda: stopping.append(asyncio.create_task(worker.stop(grace=5.0)))
        )
        await worker.run()
        await asyncio.gather(*stopping)


async def _dispatcher(folder: Path, options: dict[str, Any]) -> None:
    async with Paigeant(_settings(folder), activities=activity) as app:
        with contextlib.closing(sqlite3.connect(folder / "runs.db")) as connection:
            there = {run_id for (run_id,) in connection.execute("SELECT id FROM workflow_runs")}
        numbers = range(options.get("begin", 0), options["runs"])
        missing = [number for number in numbers if f"r{number}" not in there]
        first = options.get("first")
        for start in range(0, len(missing), 200):
            await asyncio.gather(*(_dispatch(app, number, first) for number in missing[start : start + 200]))


async def _dispatch(app: Paigeant, number: int, first: list[str] | None) -> None:
    names = steps_of(number) if number or first is None else first
    steps = [Step(name, id=f"s{place}") for place, name in enumerate(names)]
    await app.dispatch(Workflow("killed", steps), {"number": number}, workflow_id=f"r{number}")


Role = Callable[[Path, dict[str, Any]], Coroutine[Any, Any, None]]
ROLES: dict[str, Role] = {"worker": _worker, "dispatcher": _dispatcher}


def play(role: str, folder: Path, options: dict[str, Any]) -> None:
    """Be this role in this process, until it ends."""
    global _diary
    random.seed(os.getpid())
    errors = (folder / "errors").open("a")
    faulthandler.register(signal.SIGUSR1, file=errors, all_threads=True)
    _diary = os.open(folder / "diary", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    asyncio.run(ROLES[role](folder, options))
