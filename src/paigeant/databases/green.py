"""Transactions in the event loop's own thread: while one waits for its server, the loop goes on with other work.

What they run in is a greenlet, as in SQLAlchemy's asyncio extension: code that waits needs no `await` on the way there.
A thread of their own would have to be woken for each and wake the loop again, and two threads of one interpreter on two
processors hinder each other; measured, a fifth of a step's time.
"""

from __future__ import annotations

import asyncio
import contextlib
import select
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import Any, TypeVar

import psycopg
from greenlet import getcurrent, greenlet
from psycopg.abc import PQGen
from psycopg.waiting import Ready, Wait

from paigeant.lane import Lane, Op

__all__ = ["GreenConnection", "GreenLane", "elsewhere", "pause", "until_ready"]

Result = TypeVar("Result")


Wake = Callable[[], None]


class _Green(greenlet):
    """Runs `work` in the thread of an event loop, and lets that go on whenever it has to wait.

    It never calls the loop itself: a loop of C keeps what it is just doing on its stack, which isn't there meanwhile.
    What it wants of the loop it hands to the loop's own side of it, to `resume`.
    """

    def __init__(self, work: Callable[[], None]) -> None:
        super().__init__(work, getcurrent())
        self._calls: list[Callable[[], object]] = []

    def resume(self) -> None:
        """Let it begin, or go on until it has to wait again. For the loop's own code only."""
        watch = self.switch()
        calls, self._calls = self._calls, []
        for call in calls:
            call()
        if watch is not None:
            watch(self.resume)

    def later(self, call: Callable[[], object]) -> None:
        """Have the loop call this, when it has to wait the next time or is done."""
        self._calls.append(call)

    def wait_for(self, watch: Callable[[Wake], object]) -> None:
        """Let the loop go on until it calls, in its thread, what it gave to `watch`."""
        assert self.parent is not None, "it was started by the loop's own greenlet"
        self.parent.switch(watch)


def until_ready(wire: int, *, write: bool = False) -> bool:
    """Wait until there is something to read from the socket, or also room to write; gives whether it can be read."""
    me = getcurrent()
    if not isinstance(me, _Green):
        poll = select.poll()
        poll.register(wire, select.POLLIN | select.POLLOUT if write else select.POLLIN)
        return any(event & ~select.POLLOUT for _, event in poll.poll())
    readable: bool | None = None

    def watch(wake: Wake) -> None:
        loop = asyncio.get_running_loop()

        def ready(can_read: bool) -> None:
            nonlocal readable
            if readable is not None:  # it can be read and written, and this is the second call
                return
            readable = can_read
            # Taken out first: libpq may close the socket as soon as it learns that the server is gone.
            loop.remove_reader(wire)
            if write:
                loop.remove_writer(wire)
            wake()

        loop.add_reader(wire, ready, True)
        if write:
            loop.add_writer(wire, ready, False)

    me.wait_for(watch)
    return bool(readable)


def elsewhere(work: Callable[[], Result]) -> Result:
    """What `work` gives, which blocks: in a thread of its own."""
    me = getcurrent()
    if not isinstance(me, _Green):
        return work()
    result: Future[Result] = Future()

    def watch(wake: Wake) -> None:
        loop = asyncio.get_running_loop()

        def do() -> None:
            try:
                result.set_result(work())
            except BaseException as exc:
                result.set_exception(exc)
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                loop.call_soon_threadsafe(wake)

        threading.Thread(target=do, daemon=True).start()

    me.wait_for(watch)
    return result.result()


def pause(seconds: float) -> None:
    """Sleep, in a transaction of a GreenLane."""
    _current().wait_for(lambda wake: asyncio.get_running_loop().call_later(seconds, wake))


def _current() -> _Green:
    me = getcurrent()
    assert isinstance(me, _Green), "a GreenLane's work runs in greenlets"
    return me


class GreenConnection(psycopg.Connection[Any]):
    """psycopg's connection, which lets the event loop go on while a GreenLane waits for it."""

    def wait(self, gen: PQGen[Result], interval: float = 0.1, timeout: float | None = None) -> Result:
        if not isinstance(getcurrent(), _Green):
            return super().wait(gen, interval, timeout)
        try:
            wanted = next(gen)
            while True:
                can_read = until_ready(self.pgconn.socket, write=wanted != Wait.R)
                wanted = gen.send(Ready.R if can_read else Ready.W)
        except StopIteration as exc:
            result: Result = exc.value
            return result


class GreenLane(Lane):
    """Runs its transactions in the event loop's thread. What they wait for has to be waited for by this module."""

    most = 250  # meanwhile nothing else runs
    pause = staticmethod(pause)

    def _open(self, name: str) -> None:
        self._batches: deque[list[Op] | None] = deque()
        self._working = False
        self._ended = asyncio.Event()

    def _hand(self, batch: list[Op] | None) -> None:
        self._batches.append(batch)
        if not self._working:
            self._working = True
            _Green(self._run).resume()

    def _run(self) -> None:
        try:
            while self._batches:
                if (batch := self._batches.popleft()) is not None:
                    self._work(batch)
                else:
                    self._disconnect()
                    self._later(self._ended.set)
        finally:
            self._working = False

    def _later(self, callback: Callable[..., object], *args: Any) -> None:
        _current().later(partial(callback, *args))

    async def _end(self) -> None:
        self._hand(None)
        await self._ended.wait()
