"""Where the time of a step goes, part by part, in the event loop.

Each part's own time is taken, without the parts inside it. Taking it costs about a microsecond a part, which makes
everything a little slower than it is: compare the parts with one another, not with the other benchmarks.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import json
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Generator
from typing import Any, NamedTuple

from benchmarks.bench import Bench
from benchmarks.chain import connected, one_run
from benchmarks.report import Figure
from benchmarks.workload import STEPS, WARM_UP, Order, all_at_once
from paigeant import loops

__all__ = ["PARTS", "measure", "run"]


class Part(NamedTuple):
    """A function whose time is counted under a name."""

    name: str
    module: str
    function: str


_COMMIT = "begin, commit, sync"

PARTS = (
    Part("dispatch", "paigeant.dispatcher", "Dispatcher.dispatch"),
    Part("encode the message", "paigeant.forwarder", "encode"),
    Part("decode the message", "paigeant.envelope", "decode"),
    Part("take and hand over", "paigeant.worker", "ActivityWorker._take"),
    Part("claim", "paigeant.executor", "Executor.claim"),
    Part("accept", "paigeant.executor", "Executor._accept"),
    Part("go from step to step", "paigeant.executor", "Executor._do"),
    Part("perform", "paigeant.performer", "Performer.perform"),
    Part("resolve the arguments", "paigeant.performer", "resolve"),
    Part("validate an argument", "paigeant.activity", "Parameter.read"),
    Part("merge the payload", "paigeant.folding", "merged"),
    Part("route", "paigeant.executor", "route"),
    Part("record", "paigeant.executor", "Executor.record"),
    Part("hand to the lanes", "paigeant.lane", "Lane.submit"),
    Part("answer from the lanes", "paigeant.lane", "Lane._done"),
    Part("fetch the result", "paigeant.run", "Run.wait"),
    # In its transactions.
    Part("record: rows to change", "paigeant.stores.sql", "SqlStore._record"),
    Part("claim: rows to change", "paigeant.stores.sql", "SqlStore._claim"),
    Part("start: rows to change", "paigeant.stores.sql", "SqlStore._start"),
    Part("fetch messages", "paigeant.table_transport", "TableTransport._fetch"),
    Part("decide in the ledger", "paigeant.ledger", "record"),
    Part("make rows of changes", "paigeant.stores.sql", "SqlStore.write"),
    Part("SQL that reads", "paigeant.prepared", "Prepared.rows"),
    Part("SQL that writes", "paigeant.prepared", "Prepared.each"),
    Part(_COMMIT, "paigeant.lane", "transact"),
    Part("rows to results", "paigeant.stores.sql", "SqlStore._load"),
)


def run(bench: Bench) -> list[Figure]:
    """Microseconds a step: what each part takes of the processor, and of a commit also what it waits for."""
    with bench.file() as file:
        found = bench.fresh(
            "benchmarks.cost", store=f"sqlite:///{file}", runs=bench.many(4000, 100), in_flight=500
        )
    figures = [Figure("while it is measured", found["steps"], "steps/s")]
    figures += [Figure(name, micros, "us/step") for name, micros in found["parts"].items()]
    return figures


class _Clock:
    """Own times of nested parts in one thread, in nanoseconds; other threads aren't counted."""

    def __init__(self) -> None:
        self.cpu: dict[str, int] = {}
        self.wall: dict[str, int] = {}
        self._thread = threading.get_ident()
        self._stack: list[tuple[str, int, int]] = []

    def enter(self, name: str) -> None:
        if threading.get_ident() == self._thread:
            now = self._charged()
            self._stack.append((name, *now))

    def leave(self) -> None:
        if threading.get_ident() == self._thread:
            now = self._charged()
            self._stack.pop()
            if self._stack:
                self._stack[-1] = (self._stack[-1][0], *now)

    def _charged(self) -> tuple[int, int]:
        """Now, up to which what was going on is charged with the time."""
        now = (time.thread_time_ns(), time.perf_counter_ns())
        if self._stack:
            name, cpu, wall = self._stack[-1]
            self.cpu[name] = self.cpu.get(name, 0) + now[0] - cpu
            self.wall[name] = self.wall.get(name, 0) + now[1] - wall
        return now


class _Timed:
    """A coroutine whose time is counted while it runs, and not while it waits."""

    def __init__(self, clock: _Clock, name: str, inner: Awaitable[Any]) -> None:
        self._clock = clock
        self._name = name
        self._inner = inner

    def __await__(self) -> Generator[Any, Any, Any]:
        steps = self._inner.__await__()
        error: BaseException | None = None
        while True:
            self._clock.enter(self._name)
            try:
                waits_for = next(steps) if error is None else steps.throw(error)
            except StopIteration as done:
                return done.value
            finally:
                self._clock.leave()
            try:
                error = None
                yield waits_for
            except BaseException as exc:
                error = exc


def _timed(clock: _Clock, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    if inspect.iscoroutinefunction(function):

        @functools.wraps(function)
        async def waiting(*args: Any, **kwargs: Any) -> Any:
            return await _Timed(clock, name, function(*args, **kwargs))

        return waiting

    @functools.wraps(function)
    def calling(*args: Any, **kwargs: Any) -> Any:
        clock.enter(name)
        try:
            return function(*args, **kwargs)
        finally:
            clock.leave()

    return calling


def _watch(clock: _Clock) -> None:
    for part in PARTS:
        owner: Any = __import__(part.module, fromlist=["*"])
        *path, name = part.function.split(".")
        for attribute in path:
            owner = getattr(owner, attribute)
        setattr(owner, name, _timed(clock, part.name, getattr(owner, name)))


async def measure(*, store: str, runs: int, in_flight: int) -> dict[str, Any]:
    """Steps a second, and the microseconds a step of each part."""
    clock = _Clock()
    _watch(clock)
    async with connected(store) as app:
        worker = app.worker(concurrency=in_flight)
        working = asyncio.create_task(worker.run())

        async def run(order: Order) -> Order:
            return await one_run(app, order)

        await all_at_once(run, WARM_UP, in_flight=in_flight)
        clock.cpu.clear()
        clock.wall.clear()
        began, busy = time.perf_counter_ns(), time.thread_time_ns()
        steps = await all_at_once(run, runs, in_flight=in_flight)
        took, busy = time.perf_counter_ns() - began, time.thread_time_ns() - busy
        cpu, wall = dict(clock.cpu), dict(clock.wall)
        await worker.stop()
        await working

    def micros(nanoseconds: int) -> float:
        return nanoseconds / 1000 / STEPS / runs

    parts = {name: micros(spent) for name, spent in sorted(cpu.items(), key=lambda item: -item[1])}
    parts["asyncio, and all else"] = micros(busy - sum(cpu.values()))
    parts["sum"] = micros(busy)
    parts[f"{_COMMIT}, with waiting"] = micros(wall.get(_COMMIT, 0))
    parts["a step, by the clock"] = micros(took)
    return {"steps": steps, "parts": parts}


if __name__ == "__main__":
    print(json.dumps(loops.run(measure(**json.loads(sys.argv[1])))))
