"""Journal: what a step has done so far, recorded unit by unit, so that its next attempt goes on behind the last one.

A unit is a piece of work inside a step: what `ctx.once` does, or a model request or tool call of an agent. Its value
is recorded once it is there, and the first record stands: whoever asks for the unit again gets it, in any attempt and
on any worker. What units there are, `place.py` knows.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from paigeant.parking import Parking
from paigeant.secret import SecretToken, refuse_tokens
from paigeant.store import Request, RunValues, StepKey

if TYPE_CHECKING:
    from paigeant.place import Place

__all__ = ["Journal"]

Value = TypeVar("Value")


class Journal:
    """The records of one step. `effect` is the key of the step's own effects.

    `is_fresh`: nobody has begun this step before, so that there is nothing to read. Otherwise all of its records are
    read at once, before the first is needed. `now` gives the store's time.
    """

    __slots__ = (
        "_awaited",
        "_beside",
        "_given_up",
        "_is_behind",
        "_loop",
        "_reading",
        "_recorded",
        "_store",
        "_trouble",
        "_unsettled",
        "effect",
        "key",
        "now",
        "parking",
        "secrets",
    )

    def __init__(
        self,
        key: StepKey,
        store: RunValues,
        effect: str,
        *,
        is_fresh: bool = False,
        now: Callable[[], float] = time.time,
    ) -> None:
        self.effect = effect
        self.now = now
        self.parking = Parking()
        self.secrets: Sequence[SecretToken] = ()
        """The tokens that the attempt has had so far. What has one of them in it isn't recorded."""
        self.key = key
        self._store = store
        self._recorded: dict[str, bytes] | None = {} if is_fresh else None
        self._reading: asyncio.Lock | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._given_up: list[_GivenUp] = []
        self._unsettled: set[asyncio.Task[None]] = set()
        """The records that are being made, see `save_soon`; those of units that are `beside` each other once more."""
        self._beside: set[asyncio.Task[None]] = set()
        self._awaited: dict[asyncio.Future[None], set[asyncio.Task[None]]] = {}
        """Those who wait for records, and for which still."""
        self._trouble: BaseException | None = None
        self._is_behind = False
        """Whether another worker was the first to record what was done here, and did it in another way."""

    def open(self) -> None:
        """The event loop that runs now is the store's: code in others has what it asks for done here."""
        self._loop = asyncio.get_running_loop()

    async def find(self, unit: str, *, again: bool = False) -> bytes | None:
        """The record of a unit; None when there is none. `again`: it may have been made by this very attempt.

        Raises Parked once the attempt is over, or the step left: what still runs of it begins nothing more.
        """
        if self._recorded is None or again:
            found = await self._ask(self._find(unit, again))
        else:
            found = self._recorded.pop(unit, None)
        self.parking.check()
        return found

    async def _find(self, unit: str, again: bool) -> bytes | None:
        if again:
            await self._written()
        if self._recorded is None:
            if self._reading is None:
                self._reading = asyncio.Lock()
            async with self._reading:
                if self._recorded is None:
                    self._recorded = await self._store.load_units(self.key)
        found = self._recorded.pop(unit, None)  # each is asked for once: large ones needn't stay
        if found is None and again:
            found = await self._store.load_unit(self.key, unit)
        return found

    async def variable(self, name: str, default: Any) -> Any:
        """The variable of the step's run, as it is recorded now, or `default`."""
        return await self._ask(self._store.load_variable(self.key.workflow_id, name, default))

    async def all(self) -> dict[str, bytes]:
        """All records of the step, by the names of their units."""
        return await self._ask(self._store.load_units(self.key))

    def is_left(self, unit: str) -> bool:
        """Whether there is a record of this unit from an earlier attempt that nobody has asked for in this one."""
        return self._recorded is not None and unit in self._recorded

    def may_replay(self) -> bool:
        """Whether there are records from an earlier attempt that nobody has asked for in this one, or may be some."""
        return self._recorded is None or bool(self._recorded)

    def given_up(self, place: Place, unit: str | None, error: BaseException, held: str) -> None:
        """See `Place.give_up`."""
        self._given_up.append(_GivenUp(place, unit, error, held))

    async def failed(self, error: BaseException) -> str:
        """The attempt ends with `error`: a unit that it was `given_up` with is done anew by the next attempt.

        That is so when `error` is the one with which it was, or was raised from it. Gives the reason why no further
        attempt is to be made by itself; empty when there is none.
        """
        if not self._given_up:
            return ""
        reached = set(_causes(error))
        for given_up in self._given_up:
            if id(given_up.error) in reached:
                if given_up.unit is not None:
                    await given_up.place.refuse(given_up.unit, held=bool(given_up.held))
                if given_up.held:
                    return given_up.held
        return ""

    def leave(self) -> None:
        """The attempt is over."""
        self.parking.leave()
        self._given_up.clear()  # their errors have tracebacks, in whose frames this journal is

    async def save(self, unit: str, value: bytes) -> bytes:
        """Record a unit, durably; gives the record that stands, which may be another worker's.

        Raises OutputInvalid for one that holds a token.
        """
        if self.secrets:
            refuse_tokens(f"'{unit}'", value, self.secrets)
        return await self._ask(self._store.save_unit(self.key, unit, value))

    def save_soon(self, unit: str, value: bytes, *, beside: bool = False) -> None:
        """Begin to record a unit: what comes then and can have no effect needn't wait for the store, see `settled`.

        Units that are `beside` each other needn't wait for each other either. Raises OutputInvalid for one that holds a
        token.
        """
        if self.secrets:
            refuse_tokens(f"'{unit}'", value, self.secrets)
        saving = asyncio.get_running_loop().create_task(self._save_soon(unit, value))
        self._unsettled.add(saving)
        if beside:
            self._beside.add(saving)
        self.parking.begin(saving)
        saving.add_done_callback(self._saved)

    async def _save_soon(self, unit: str, value: bytes) -> None:
        try:
            if await self._store.save_unit(self.key, unit, value) != value:
                self._is_behind = True
        except asyncio.CancelledError:
            raise  # nobody but the end of the event loop cancels this
        except BaseException as exc:  # whoever has to wait for this record hears of it
            self._trouble = exc

    def _saved(self, saving: asyncio.Task[None]) -> None:
        self._unsettled.discard(saving)
        self._beside.discard(saving)
        for written, left in list(self._awaited.items()):
            left.discard(saving)
            if not left:
                del self._awaited[written]
                if not written.done():  # whoever waited may have been cancelled
                    written.set_result(None)
        self.parking.end(saving)

    async def _written(self, *, beside: bool = False) -> None:
        """Wait for the records that are being made. Raises what kept one from being made, from then on each time."""
        if self._unsettled and not (beside and self._unsettled == self._beside):
            await self.at_home(self._wait_until_written(beside))
        if self._trouble is not None:
            raise self._trouble

    async def _wait_until_written(self, beside: bool) -> None:
        left = self._unsettled - self._beside if beside else set(self._unsettled)
        if left:  # whoever asks in another thread comes here later, when they may all have been made
            # `asyncio.wait` does the same, and takes ten times as long.
            written: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._awaited[written] = left
            await written

    @property
    def saves_soon(self) -> bool:
        """Whether `save_soon` can be used here, which is so in the event loop of the worker only."""
        return self._loop is None or self._loop is asyncio.get_running_loop()

    @property
    def is_settled(self) -> bool:
        """Whether `settled` has nothing to do, which it mostly has not."""
        return not self._unsettled and self._trouble is None and not self._is_behind

    async def settled(self, *, beside: bool = False) -> bool:
        """Wait until all that was done so far is recorded: what has an effect begins only then, and a run ends.

        Gives whether the attempt may go on. Otherwise another worker has taken another way, and was the first to
        record it: then this is to begin anew, behind what is recorded. Raises StoreUnavailable when something can't be.
        What is `beside` others doesn't wait for theirs.
        """
        await self._written(beside=beside)
        return not self._is_behind

    async def take(self, unit: str, signal: str, *, otherwise: bytes | None = None) -> bytes | None:
        """Record the oldest signal of this name that nobody has taken, or else `otherwise`.

        Gives the record that stands, None without.
        """
        await self._written()
        return await self._ask(self._store.take_signal(self.key, unit, signal, otherwise=otherwise))

    async def request(self, request: Request) -> None:
        """Keep what is asked of somebody outside. One of the same id stays as it is."""
        await self._written()
        if self.secrets:
            refuse_tokens(f"what '{request.name[:40]}' asks", request.asked, self.secrets)
        await self._ask(self._store.open_request(request))

    async def park(self, waits_for: tuple[str, ...], until: float | None, around: frozenset[str]) -> None:
        """Wait for one of the signals, or for an instant; see `Parking.wait`."""
        await self.at_home(self.parking.wait(waits_for, until, around))

    async def _ask(self, work: Coroutine[Any, Any, Value]) -> Value:
        # Whatever the store is asked for comes before a wait or belongs to a unit: the step isn't left meanwhile.
        with self.parking.working(work):
            return await self.at_home(work)

    async def at_home(self, work: Coroutine[Any, Any, Value]) -> Value:
        """What `work` gives, done in the event loop of the worker, from whichever this is asked."""
        if self._loop is None or self._loop is asyncio.get_running_loop():
            return await work
        # `agent.run_sync` in a thread has an event loop of its own, which the store's connections know nothing of.
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work, self._loop))


@dataclass(frozen=True, slots=True)
class _GivenUp:
    """A unit whose record made whoever asked for it give up with `error`; None where there is no record to blame."""

    place: Place
    unit: str | None
    error: BaseException
    held: str


def _causes(error: BaseException) -> Iterator[int]:
    """The identities of an error, of those that it holds, and of those that they were raised from."""
    seen: set[int] = set()
    ahead: list[BaseException | None] = [error]
    while ahead:
        found = ahead.pop()
        if found is None or id(found) in seen:
            continue
        seen.add(id(found))
        yield id(found)
        ahead.append(found.__cause__)
        if isinstance(found, BaseExceptionGroup):
            ahead.extend(found.exceptions)
