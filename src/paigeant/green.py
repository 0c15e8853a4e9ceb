"""Transactions in the event loop's own thread: while one waits for its server or its disk, the loop goes on.

What they run in is a greenlet, as in SQLAlchemy's asyncio extension: code that waits needs no `await` on the way there.
A thread of their own would have to be woken for each and wake the loop again, and two threads of one interpreter on two
processors hinder each other; measured, a fifth of a step's time.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import queue
import select
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import TypeVar, cast

from greenlet import getcurrent, greenlet

__all__ = ["Green", "Hands", "Inlet", "TooSlow", "caught_up", "elsewhere", "is_green", "pause", "until_ready"]

log = logging.getLogger("paigeant.lane")

Result = TypeVar("Result")

_BEGIN_SECONDS = 0.01
"""How long the event loop waits at most for a thread to begin: one that isn't given a processor mustn't keep it."""

Wake = Callable[[], None]
Watch = Callable[[Wake], object]


class Green(greenlet):
    """Does what `do` is given in the thread of an event loop, and lets that go on whenever it has to wait.

    It is there for one thing after the other: each new one takes a piece of memory of the system's, and page faults.
    It never calls the loop itself: a loop of C keeps what it is just doing on its stack, which isn't there meanwhile.
    What it wants of the loop it hands to the loop's own side of it.
    """

    def __init__(self, hands: Hands) -> None:
        super().__init__(_serve, getcurrent())
        self.hands = hands
        self._calls: list[Callable[[], object]] = []
        self.switch()  # to where it rests; what it was started with would be kept to its end

    # -- the loop's side

    def do(self, work: Callable[[], None]) -> None:
        """Let it begin with `work`, after what it was given before."""
        self._go(partial(self.switch, work))

    def resume(self) -> None:
        """Let it go on until it has to wait again."""
        self._go(self.switch)

    def end(self) -> None:
        """Let it end, which rests. Else it would when the garbage is collected, in the midst of whatever runs then."""
        if not self.dead and self.parent is getcurrent():
            self.switch(None)

    def _go(self, on: Callable[[], Watch | None]) -> None:
        while True:
            try:
                watch = on()
            finally:  # what has been done is told, also if the rest failed
                self._call()
            if watch is None:
                return
            try:
                watch(self.resume)
                return
            except Exception as exc:
                # A socket that is gone can't be watched: whoever waits for it has to know.
                on = partial(self.throw, exc)

    def _call(self) -> None:
        calls, self._calls = self._calls, []
        for call in calls:
            try:
                call()
            except Exception:  # whoever is told, this has to go on
                log.exception("what waited for a transaction failed")

    # -- its own side

    def later(self, call: Callable[[], object]) -> None:
        """Have the loop call this, which doesn't let this go on, when it has to wait the next time or is done."""
        self._calls.append(call)

    def wait_for(self, watch: Watch) -> None:
        """Let the loop go on until it calls, in its thread, what it gave to `watch`."""
        assert self.parent is not None, "it was started by the loop's own greenlet"
        self.parent.switch(watch)


def _serve() -> None:
    """Do what is handed over. Nothing of it is kept while this rests: not even whose it is, who may be gone then."""
    while (work := _rested()) is not None:
        work()
        del work


def _rested() -> Callable[[], None] | None:
    parent = getcurrent().parent
    assert parent is not None, "it was started by the loop's own greenlet"
    work: Callable[[], None] | None = parent.switch(None)
    return work


class Hands:
    """A thread that does what blocks, one thing after the other. It begins with the first."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._asked: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def ask(self, work: Callable[[], None]) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
            self._thread.start()
        self._asked.put(work)

    def close(self) -> None:
        self._asked.put(None)

    def _run(self) -> None:
        while (work := self._asked.get()) is not None:
            work()


class TooSlow(Exception):
    """A transaction is nothing to keep the event loop with: it did nothing, and is to be done elsewhere."""


def is_green() -> bool:
    """Whether the event loop waits for whoever asks."""
    return isinstance(getcurrent(), Green)


def until_ready(wire: int, *, write: bool = False) -> bool:
    """Wait until there is something to read from the socket, or also room to write; gives whether it can be read."""
    me = getcurrent()
    if not isinstance(me, Green):
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


_BROKEN = getattr(select, "POLLRDHUP", 0)
"""Errors are told without being asked for, and that the other end has hung up; that it sends no more isn't."""


class Inlet:
    """A socket that is read from again and again: the event loop goes on watching it in between.

    To have it watched anew each time takes the loop some ten system calls. It is to be left before it is closed, for
    its number may be another one's then.
    """

    def __init__(self) -> None:
        self.wire: int | None = None
        """The socket that is watched."""
        self._loop: asyncio.AbstractEventLoop | None = None
        self._wake: Wake | None = None
        self._broken = select.poll()

    def until_readable(self, wire: int) -> None:
        """Wait until there is something to read from the socket."""
        me = getcurrent()
        if not isinstance(me, Green):
            until_ready(wire)
            return
        if self.wire != wire:
            self.leave()
        me.wait_for(partial(self._watch, wire))

    def leave(self) -> None:
        """Watch it no more, from the next time on that the loop goes on."""
        if self.wire is None or self._loop is None:
            return
        forget = partial(self._loop.remove_reader, self.wire)
        self.wire = None
        if isinstance(me := getcurrent(), Green):
            me.later(forget)
        else:
            forget()

    def _watch(self, wire: int, wake: Wake) -> None:
        self._wake = wake
        if self.wire is None:
            self._loop = asyncio.get_running_loop()
            self._loop.add_reader(wire, self._ready)
            self.wire = wire
            self._broken = select.poll()
            self._broken.register(wire, _BROKEN)

    def _ready(self) -> None:
        wake, self._wake = self._wake, None
        # What nobody wants to read now the loop would tell over and over. libuv ceases to watch a socket with an error,
        # without a word: whoever waits for what else comes has it watched anew. And libpq closes what has ended.
        if wake is None or self._broken.poll(0):
            self.leave()
        if wake is not None:
            wake()


def caught_up() -> None:
    """Have the event loop do at once what it was to do when it goes on."""
    if isinstance(me := getcurrent(), Green):
        me.wait_for(lambda wake: wake())


def elsewhere(work: Callable[[], Result]) -> Result:
    """What `work` gives, which blocks: in another thread, if the event loop would have to wait for it here.

    It has begun when the loop goes on. Else it would when Python pauses, and nothing would be done beside it.
    """
    me = getcurrent()
    if not isinstance(me, Green):
        return work()
    result: Result | None = None
    trouble: BaseException | None = None

    def watch(wake: Wake) -> None:
        loop = asyncio.get_running_loop()
        begun = threading.Lock()
        begun.acquire()

        def do() -> None:
            nonlocal result, trouble
            begun.release()
            try:
                result = work()
            except BaseException as exc:
                trouble = exc
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                loop.call_soon_threadsafe(wake)

        me.hands.ask(do)
        begun.acquire(timeout=_BEGIN_SECONDS)

    me.wait_for(watch)
    if trouble is not None:
        raise trouble
    return cast(Result, result)


def pause(seconds: float) -> None:
    """Sleep."""
    me = getcurrent()
    if not isinstance(me, Green):
        time.sleep(seconds)
        return
    me.wait_for(lambda wake: asyncio.get_running_loop().call_later(seconds, wake))
