"""Parking: how an attempt that only waits leaves its worker, to go on when what it waits for is there.

An attempt may do several things at once, of which some wait for an answer, a signal or an hour while others work. It
is parked once all that it does is wait: each wait then ends with `Parked`, which no activity should catch. What works
is known by its units: code that is in none is left beside a wait, and goes on at most until its next unit. So does
what an attempt that has ended in any other way has left running. A unit that was left is not done, whatever code in it
that catches `Parked` makes of that.
"""

from __future__ import annotations

import asyncio
import contextlib
from contextvars import Context, ContextVar
from typing import NamedTuple
from weakref import WeakSet

__all__ = ["Parked", "Parking"]

_SETTLE_SECONDS = 0.02
"""How long nothing but waiting must have gone on: what begins right after a wait may have something to ask as well."""

_UNITS: ContextVar[tuple[str, ...]] = ContextVar("paigeant.units", default=())
"""The units within which the code is that runs now."""


class Parked(BaseException):
    """The step is left, and its activity is called again later. Like a cancellation it is no error."""


class _Wait(NamedTuple):
    waits_for: tuple[str, ...]
    until: float | None
    around: frozenset[str]


class Parking:
    """The waits of one attempt, and the work that goes on beside them."""

    def __init__(self) -> None:
        self.is_parked = False
        self._is_over = False
        self.waits_for: tuple[str, ...] = ()
        """Names of the signals of which one ends the waiting, once it `is_parked`."""
        self.until: float | None = None
        """The instant at which it ends at the latest; None when there is none."""
        self._waits: dict[asyncio.Future[None], _Wait] = {}
        self._working: set[object] = set()
        self._left: set[str] = set()
        self._settling: asyncio.TimerHandle | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    def check(self) -> None:
        """Raise Parked once the attempt is parked or over: what still runs of it begins nothing more."""
        if self.is_parked or self._is_over:
            self._left.update(_UNITS.get())
            raise Parked

    def check_done(self, unit: str) -> None:
        """Raise Parked if a wait in this unit was left, or something that it had still to begin."""
        if unit in self._left:
            raise Parked

    def leave(self) -> None:
        """The attempt is over. What it has left running would do the same as the next one, or what is being undone."""
        self._is_over = True
        self._unsettle()
        self._end_waits()

    def working(self, what: object) -> Working:
        """The code inside works, in any thread: at `what`, which is a unit by its name, or anything else."""
        return Working(self, what)

    def begin(self, what: object) -> None:
        """Work at `what` begins, see `working`."""
        self._working.add(what)
        if self._waits:
            self._changed()

    def end(self, what: object) -> None:
        """Work at `what` has ended."""
        self._working.discard(what)
        if self._waits:
            self._changed()

    async def wait(
        self, waits_for: tuple[str, ...], until: float | None, around: frozenset[str] = frozenset()
    ) -> None:
        """Wait for one of the signals, or for an instant. It ends with Parked and in no other way.

        The units `around` are those that can't go on without it.
        """
        self.check()
        self._loop = asyncio.get_running_loop()
        over: asyncio.Future[None] = self._loop.create_future()
        self._waits[over] = _Wait(waits_for, until, around)
        self._changed()
        try:
            await over
        except Parked:
            self._left.update(_UNITS.get())
            raise
        finally:
            # It has the error, whose traceback has this frame: in a circle they would keep all that the attempt had.
            del self._waits[over], over

    def _changed(self) -> None:
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: there is nothing left to park
                self._loop.call_soon_threadsafe(self._settle)

    def _settle(self) -> None:
        self._unsettle()
        assert self._loop is not None, "there is a wait"
        self._settling = self._loop.call_later(_SETTLE_SECONDS, self._park)

    def _unsettle(self) -> None:
        if self._settling is not None:
            self._settling.cancel()
        self._settling = None  # it knows what it is to call: in a circle the two would keep the whole attempt

    def _park(self) -> None:
        self._unsettle()
        waits = list(self._waits.values())
        if not waits or not self._working.issubset(frozenset().union(*(wait.around for wait in waits))):
            return
        self.is_parked = True
        self.waits_for = tuple(dict.fromkeys(name for wait in waits for name in wait.waits_for))
        self.until = min((wait.until for wait in waits if wait.until is not None), default=None)
        self._end_waits()

    def _end_waits(self) -> None:
        if self._loop is None or not self._waits:
            return
        if self._loop not in _LOOKING:
            # Not in the context of here: each task would keep all that the attempt has, for as long as it goes on.
            self._loop.call_soon(_look, self._loop, context=Context())
            _LOOKING.add(self._loop)
        for over in self._waits:
            if not over.done():
                over.set_exception(Parked())


class Working:
    """The block of `Parking.working`; a generator would cost each unit several times as much."""

    __slots__ = ("_parking", "_token", "_what")

    def __init__(self, parking: Parking, what: object) -> None:
        self._parking = parking
        self._what = what

    def __enter__(self) -> None:
        self._parking.begin(self._what)
        if isinstance(self._what, str):
            self._token = _UNITS.set((*_UNITS.get(), self._what))

    def __exit__(self, *_: object) -> None:
        if isinstance(self._what, str):
            _UNITS.reset(self._token)
        self._parking.end(self._what)


_LOOKING: WeakSet[asyncio.AbstractEventLoop] = WeakSet()
"""The loops that go through their tasks in this turn: once, however many attempts are left in it."""


def _look(loop: asyncio.AbstractEventLoop) -> None:
    """See to it that somebody looks at how each task ends, before any of them goes on.

    A wait may be several tasks deep, and nobody may await any of them but one.
    """
    _LOOKING.discard(loop)
    for task in asyncio.all_tasks(loop):
        task.remove_done_callback(_retrieved)  # many attempts are left in the lifetime of a worker's own
        task.add_done_callback(_retrieved)


def _retrieved(task: asyncio.Task[object]) -> None:
    """Look at how a task ended if that is by leaving waits: nobody awaiting it is no error that was overlooked."""
    error = getattr(task, "_exception", None)  # whoever asks for it has looked at it, whatever it is
    others = error.split(Parked)[1] if isinstance(error, BaseExceptionGroup) else None
    if others is None and isinstance(error, Parked | BaseExceptionGroup):
        task.exception()
