"""An event loop whose time is virtual: when nothing is ready, it jumps to the next timer. Nothing in it ever waits.

With the same work it does the same things in the same order: tasks hash by their number, so that sets of them have an
order that doesn't depend on addresses in memory.
"""

from __future__ import annotations

import asyncio
import heapq
from typing import Any

__all__ = ["Stalled", "VirtualLoop"]


class Stalled(Exception):
    """Nothing is ready and no timer is set, or the work goes on and on at one instant."""


class NumberedTask(asyncio.Task):
    """A task that hashes by its number."""

    def __init__(self, number: int, *args: Any, **options: Any) -> None:
        self._number = number
        super().__init__(*args, **options)

    __eq__ = object.__eq__

    def __hash__(self) -> int:
        return self._number


class VirtualLoop(asyncio.BaseEventLoop):
    """Runs callbacks first in, first out, as asyncio promises. `time` is 0 at the start and passes only in timers."""

    most_rounds = 200_000
    """Rounds after which the work is taken for endless."""

    def __init__(self) -> None:
        super().__init__()
        self._now = 0.0
        self._rounds = 0
        self._tasks = 0
        self.set_task_factory(self._make_task)
        self.set_exception_handler(lambda loop, context: None)

    def time(self) -> float:
        return self._now

    def call_soon_threadsafe(self, callback: Any, *args: Any, context: Any = None) -> Any:  # type: ignore[override]
        return self.call_soon(callback, *args, context=context)

    def _make_task(self, loop: asyncio.AbstractEventLoop, coro: Any, **options: Any) -> NumberedTask:
        self._tasks += 1
        return NumberedTask(self._tasks, coro, loop=loop, **options)

    def _run_once(self) -> None:
        timers: list[Any] = self._scheduled  # type: ignore[attr-defined]
        ready = self._ready  # type: ignore[attr-defined]
        while timers and timers[0]._cancelled:
            heapq.heappop(timers)._scheduled = False
        if not ready:
            if not timers:
                raise Stalled("nothing is left to happen")
            self._now = max(self._now, timers[0]._when)
        while timers and timers[0]._when <= self._now:
            timer = heapq.heappop(timers)
            timer._scheduled = False
            ready.append(timer)
        self._rounds += 1
        if self._rounds > self.most_rounds:
            raise Stalled(f"{self._rounds} rounds and no end, at {self._now:.1f} s")
        for _ in range(len(ready)):
            handle = ready.popleft()
            if not handle._cancelled:
                handle._run()
