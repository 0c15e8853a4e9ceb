"""Thousands of runs wait for people: they cost workers nothing, and what they wait for comes in any order."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TypeVar

import pytest
from tests.chaos.places import Servers, open_place
from tests.chaos.sizes import full, say, short
from tests.integration.processes import PAIGEANT
from tests.integration.warm import Forked
from tests.kill.sql import rows

from paigeant import Paigeant, Run, Settings, WaitFor, Workflow

Item = TypeVar("Item")
TIMES = {"lease": 3.0, "heartbeat": 0.5, "sweep_interval": 0.2, "grace": 2.0}
SLACK_BYTES = 8 * 1024 * 1024
"""What memory may differ by without any run: a garbage collection earlier or later."""
BYTES_PER_RUN = 400
LONGEST = 900.0

HANDLERS = """
from paigeant import ActivityRegistry, StepContext
activity = ActivityRegistry()

@activity.execute(retries=99)
async def confirm(number: int, filling: str, context: StepContext) -> int:
    drawn = await context.once("draw", lambda: number * 2)
    answer = await context.ask(f"number {number}?", about={"drawn": drawn})
    return drawn + answer
"""
FLOW = Workflow("flow", ["confirm", WaitFor("go")])


@pytest.fixture(params=["sqlite", "postgres"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """Where runs are recorded and messages travel."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path}/p.db"
        return
    servers: Servers = request.getfixturevalue("servers")
    with open_place(servers, "joined") as place:
        yield place.store_url


def settings_of(url: str) -> dict[str, str]:
    """What workers are told of their settings."""
    settings = {"transport_url": url, "store_url": url, "log_level": "warning", **TIMES}
    return {f"PAIGEANT_{name.upper()}": str(value) for name, value in settings.items()}


@contextmanager
def worker(url: str, folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A worker process with an interpreter and a memory of its own, killed at the end."""
    with (folder / "worker.log").open("ab") as log:
        process = subprocess.Popen(
            [*PAIGEANT, "run", "handlers.py"],
            cwd=folder,
            env={**os.environ, **settings_of(url)},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def memory_bytes(process: subprocess.Popen[bytes]) -> int:
    """What a process has in memory."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) * 1024


async def count(url: str, query: str) -> int:
    """The number that a query gives."""
    return int((await asyncio.to_thread(rows, url, query))[0][0])


async def until_all(url: str, query: str, wanted: int) -> None:
    """Wait until a query gives this number."""
    async with asyncio.timeout(LONGEST):
        while await count(url, query) != wanted:  # noqa: ASYNC110  # other processes do it
            await asyncio.sleep(0.1)


PARKED = (
    "SELECT count(*) FROM step_executions AS s JOIN workflow_requests AS q "
    "ON q.workflow_id = s.workflow_id WHERE s.status = 'waiting'"
)


@pytest.mark.parametrize(("first", "runs", "kills"), [short(200, 500, 5), full(2_000, 10_000, 60)])
async def test_parked_runs_cost_nothing_and_each_is_asked_once(
    url: str, tmp_path: Path, first: int, runs: int, kills: int
) -> None:
    """A worker's memory doesn't grow with them, once the `first` have filled its caches.

    Signals and answers come in any order, early, and some twice. Meanwhile workers are killed again and again. All runs
    complete with what they were told, each was asked once, and each signal was taken by one wait.
    """
    (tmp_path / "handlers.py").write_text(HANDLERS)
    chance = random.Random(11)
    settings = Settings(transport_url=url, store_url=url, **TIMES)
    async with Paigeant(settings) as app:
        with worker(url, tmp_path) as process:
            begun = list(await asyncio.gather(*(dispatched(app, number) for number in range(first))))
            await until_all(url, PARKED, first)
            before = memory_bytes(process)
            early: set[str] = set()
            for numbers in portions(range(first, first + runs), 100):
                found = await asyncio.gather(*(dispatched(app, number) for number in numbers))
                begun += found
                sent = [run for run in found if chance.random() < 0.3]  # before or while they are asked
                await asyncio.gather(*(run.signal("go", run.id) for run in sent))
                early |= {run.id for run in sent}
            await until_all(url, PARKED, first + runs)
            grown = memory_bytes(process) - before
        asked = {request.workflow_id: request for request in await app.requests(limit=2 * len(begun))}
        assert len(asked) == first + runs

        started = time.monotonic()
        with Crew(url, tmp_path, chance) as crew:
            told = [(run, "answer") for run in begun]
            told += chance.sample(told, len(told) // 5)
            told += [(run, "go") for run in begun if run.id not in early]
            chance.shuffle(told)

            async def tell(run: Run, what: str) -> None:
                if what == "go":
                    await run.signal("go", run.id)
                else:
                    await app.answer(asked[run.id].id, int(run.id.removeprefix("r")), sender="ada")

            for some in portions(told, len(told) // kills):
                telling = asyncio.gather(*(tell(*one) for one in some))
                await crew.kill_one()
                await telling
            await until_all(url, "SELECT count(*) FROM workflow_runs WHERE status = 'completed'", len(begun))
        took = time.monotonic() - started

    outputs = dict(rows(url, "SELECT workflow_id, output FROM step_executions WHERE step = 'confirm'"))
    assert {run_id: int(text) for run_id, text in outputs.items()} == {
        run.id: 3 * number for number, run in enumerate(begun)
    }
    taken = rows(url, "SELECT workflow_id, taken_by, count(*) FROM workflow_signals GROUP BY 1, 2")
    assert sorted(taken) == sorted((run.id, step, 1) for run in begun for step in ("confirm", "go"))
    assert await count(url, "SELECT count(*) FROM workflow_requests") == len(begun)
    say(
        f"{runs} parked runs: {grown / 1024:.0f} KiB more in a worker of {before / 2**20:.0f} MiB; "
        f"{len(told)} signals and answers with {crew.killed} kills in {took:.1f} s"
    )
    assert grown < SLACK_BYTES + BYTES_PER_RUN * runs


def portions(all_of_them: Sequence[Item], size: int) -> Iterator[Sequence[Item]]:
    """So many at a time."""
    for place in range(0, len(all_of_them), size):
        yield all_of_them[place : place + size]


async def dispatched(app: Paigeant, number: int) -> Run:
    """A run with something to carry."""
    return await app.dispatch(FLOW, {"number": number, "filling": "x" * 2000}, workflow_id=f"r{number}")


_WORKERS = "SELECT count(*) FROM workers"


class Crew:
    """Two workers, one of which is killed now and then, wherever it is, and replaced."""

    def __init__(self, url: str, folder: Path, chance: random.Random) -> None:
        self.killed = 0
        self._url, self._folder, self._chance = url, folder, chance
        self._stack = ExitStack()
        self._workers: list[Forked] = []

    def __enter__(self) -> Crew:
        self._workers = [self._new() for _ in range(2)]
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    async def kill_one(self) -> None:
        """Kill one as soon as the other one works, so that there is always somebody to kill at work."""
        victim = self._workers.pop(0)
        async with asyncio.timeout(LONGEST):
            while not await count(self._url, _WORKERS):  # noqa: ASYNC110  # other processes' affair
                await asyncio.sleep(0.02)
        await asyncio.sleep(self._chance.uniform(0.0, 0.2))  # whatever it is at then
        victim.send_signal(signal.SIGKILL)
        self.killed += 1
        self._workers.append(self._new())

    def _new(self) -> Forked:
        log = self._stack.enter_context((self._folder / "worker.log").open("ab"))
        process = Forked(
            "run", "handlers.py", environment=settings_of(self._url), folder=self._folder, stderr=log.fileno()
        )
        self._stack.callback(process.close)
        self._stack.callback(process.kill)
        return process
