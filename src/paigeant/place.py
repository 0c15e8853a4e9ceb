"""Place: where in a step the code that runs now is, and the units that it does and the waits that it begins there.

A place is the step itself, or within a unit that is part of it. It hands out the names of units, the same ones to every
attempt that takes the same way: by them the journal knows what has been done.
"""

from __future__ import annotations

import asyncio
import functools
import hashlib
import heapq
import itertools
import re
import secrets
import uuid
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any

from pydantic_core import from_json, to_json

from paigeant import codec
from paigeant.errors import InvalidDefinition, OutcomeUnknown, OutsideStep, RequestDenied, WaitTimeout
from paigeant.failure import failure_text
from paigeant.journal import Journal
from paigeant.secret import refuse_tokens
from paigeant.store import Request, RequestKind

__all__ = ["Done", "Place", "Stages", "Unit", "current_place", "effect_key", "readable"]

_LONGEST_NAME = 300
_DIGEST_LENGTH = 32
_COUNTED = re.compile(r"#[0-9]+\Z")
_BEHIND = "!behind"
_SHORT_SECONDS = 1.0
"""What is over so soon isn't worth leaving the step for."""

_PLACE: ContextVar[Place | Stages | None] = ContextVar("paigeant.place", default=None)


def current_place() -> Place | None:
    """Where in a step the code that calls this is; None outside of steps."""
    place = _PLACE.get()
    return place.now if isinstance(place, Stages) else place


def effect_key() -> str:
    """A key for the effects of the call that asks for it, the same each time that call is repeated.

    In a tool it is the tool call's, in what `ctx.once` does that unit's, in an activity the step's own
    `idempotency_key`, in hooks and validators of an agent one for each answer of its model. Raises OutsideStep where
    there is no step.
    """
    place = current_place()
    if place is None:
        raise OutsideStep(
            "effect_key() was called outside of a step, where nothing is recorded and there is no key; "
            "a thread of your own needs contextvars.copy_context().run(...) to know the step that it works for"
        )
    return place.effect_key


@dataclass(frozen=True, slots=True)
class Unit:
    """How a unit is done. `label` names it to people.

    `delay` gives, for the number of a try that failed (from 1) and its error, the seconds until the next try; None
    when there is none. `timeout` is in seconds, for each try. `at_most_once`: that it begins is recorded first, and
    what began and left no result is begun again only if a person says so.
    """

    label: str
    delay: Callable[[int, Exception], float | None] = lambda *_: None
    timeout: float | None = None
    at_most_once: bool = False
    beside: bool = False
    """It goes on beside others like it, none of which relies on what another one has done."""
    about: Mapping[str, Any] = field(default_factory=dict)
    """What else tells a person which unit it is, in JSON; of one that may be done at most once."""

    def late(self) -> TimeoutError:
        """The error of a try that took longer than `timeout`."""
        return TimeoutError(f"{self.label} took longer than {self.timeout:g} s")


@dataclass(frozen=True, slots=True)
class Done:
    """The value of a unit (JSON), and whether it was `executed` for it or comes from the record."""

    value: bytes
    executed: bool


@dataclass(slots=True, eq=False)  # not frozen, which takes long, see `values.py`
class Place:
    """A place in a step: the step itself (`within` is empty), or inside the unit of that name. Nobody changes it.

    `again`: what is done here may have been tried before by this very attempt. `is_once`: that unit may be done at most
    once. `is_unit`: it is recorded, so that what is done here isn't done again; else it is a place only, see `part`.
    """

    journal: Journal
    within: str = ""
    again: bool = False
    outer: Place | None = None
    is_once: bool = False
    is_unit: bool = True
    _counts: dict[str, Iterator[int]] = field(default_factory=dict)
    _left: dict[str, list[int]] = field(default_factory=dict)

    @property
    def effect_key(self) -> str:
        """The key of the effects of what is done here."""
        return f"{self.journal.effect}:{_digest(self.within)}" if self.within else self.journal.effect

    def count(self, what: str) -> int:
        """The how manieth `what` this is at this place, from 1."""
        # One step for threads, too: neither `setdefault` nor `next` is interrupted.
        return next(self._counts.setdefault(what, itertools.count(1)))

    def take(self, what: str) -> int:
        """Like `count`, for what may come to nothing: `give_back` makes the number the next one's."""
        if left := self._left.get(what):
            with suppress(IndexError):  # another thread has taken it
                return heapq.heappop(left)
        return self.count(what)

    def give_back(self, what: str, number: int) -> None:
        """See `take`."""
        heapq.heappush(self._left.setdefault(what, []), number)

    @property
    def is_recorded(self) -> bool:
        """Whether what is done here is done for a record: an attempt that finds that passes over all of it."""
        place: Place | None = self
        while place is not None and place.within:
            if place.is_unit:
                return True
            place = place.outer
        return False

    def part(self, what: str, *, number: int | None = None) -> Place:
        """The place inside of `what`, which has names and effects of its own and isn't recorded.

        It counts on where that occurs again, unless `number` says how manieth it is.
        """
        name = self.spelled(what, self.count(what) if number is None else number)
        return Place(self.journal, name, self.again, self, is_unit=False)

    def name(self, what: str) -> str:
        """The name of the next unit that is `what`; one that occurs again at this place counts on."""
        return self.spelled(what, self.count(what))

    def spelled(self, what: str, number: int = 1) -> str:
        """The name of the so manieth unit that is `what`. Raises OutputInvalid for one that holds a token."""
        if self.journal.secrets:
            # Looked through before it is cut, and before anything is recorded under it.
            written = what.encode(errors="replace")
            refuse_tokens("the name of a unit, a signal or a question", written, self.journal.secrets)
        # What ends like a counted one is counted from the first on: it would be the second of another.
        is_plain = number == 1 and not ("#" in what and _COUNTED.search(what))
        name = what if is_plain else f"{what}#{number}"
        if self.within:
            name = f"{_digest(self.within)}/{name}"
        return name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME - 40]}~{_digest(name)}"

    def entered(self) -> Entered:
        """The code inside is at this place."""
        return Entered(self)

    async def do(
        self, name: str, unit: Unit, produce: Callable[[], Awaitable[bytes]], *, soon: bool = False
    ) -> Done:
        """The record of the unit `name`, made from what `produce` gives when there is none.

        `soon`: what it gives may be used while it is being recorded, for whatever has no effect, see `settled`. That is
        so of units that go on `beside` others anyway.
        What `produce` raises is raised and not recorded. A unit that may be done at most once and was begun before, or
        fails now, waits for a person who decides whether it is done again; raises OutcomeUnknown when it isn't.
        """
        recorded = await self.journal.find(name, again=self.again)
        if recorded is not None:
            return Done(recorded, executed=False)
        if not self.journal.is_settled:
            await self.settled(beside=unit.beside)
        if unit.at_most_once:
            return await self._do_at_most_once(name, unit, produce)
        with self.journal.parking.working(name):
            value = await self._produce(name, unit, produce)
            if (soon or unit.beside) and self.journal.saves_soon and not self._is_in_once():
                self.journal.save_soon(name, value, beside=unit.beside)
                return Done(value, executed=True)
            return Done(await self.journal.save(name, value), executed=True)

    async def settled(self, *, beside: bool = False) -> None:
        """Wait until all that the attempt has done so far is recorded, but for what goes on `beside` this.

        Leaves the step, to begin anew, when another worker has recorded something else: that lasts no time. Raises
        Parked once the attempt is over.
        """
        self.journal.parking.check()
        if not await self.journal.settled(beside=beside) and not self._is_in_once():
            await self._leave((), self.journal.now())

    def _is_in_once(self) -> bool:
        """Whether this is within a unit that may be done at most once, and so can't be left."""
        place: Place | None = self
        while place is not None:
            if place.is_once:
                return True
            place = place.outer
        return False

    async def instant(self, name: str, *, offset: float = 0.0) -> float:
        """A recorded instant: `offset` seconds after this was first asked for under this name."""
        recorded = await self.journal.find(name, again=self.again)
        if recorded is None:
            recorded = await self.journal.save(name, to_json(self.journal.now() + offset))
        return float(from_json(recorded))

    async def sleep(self, name: str, seconds: float) -> None:
        """Let so many seconds pass since this was first asked for under this name, whoever asks again and where.

        Leaves the step meanwhile, unless it isn't long.
        """
        until = await self.instant(name, offset=seconds)
        left = until - self.journal.now()
        if left > _SHORT_SECONDS:
            await self._leave((), until)
        # Were the step left for another wait meanwhile, nobody would wake it for this one.
        with self.journal.parking.working(name):
            await asyncio.sleep(max(left, 0.0))

    async def signal(
        self,
        name: str,
        signal: str,
        *,
        timeout: float | None,
        what: str,
        ask: Callable[[float | None], Awaitable[None]] | None = None,
    ) -> dict[str, Any]:
        """The next signal of a name, as the unit `name`: an object with its `value`, `by` whom, and `at` which instant.

        Leaves the step until it is there, after `ask`, which gets the instant at which the time is up and may be done
        several times. Raises WaitTimeout when it isn't there after `timeout` seconds; `what` names it.
        """
        recorded = await self.journal.find(name, again=self.again)
        if recorded is None:
            recorded = await self.journal.take(name, signal)
        if recorded is None:
            until = None if timeout is None else await self.instant(f"{name}!until", offset=timeout)
            if until is None or self.journal.now() < until:
                if ask is not None:
                    await ask(until)
                await self._leave((signal,), until)
            # Up to now somebody was told that it will be heard: it counts, or from here on it doesn't, for all.
            recorded = await self.journal.take(name, signal, otherwise=b"null")
        found = None if recorded is None else from_json(recorded)
        if found is None:
            raise WaitTimeout(f"{what} has not come within {timeout:g} s")
        answer: dict[str, Any] = found
        return answer

    async def token(self, name: str) -> str:
        """A recorded text that nobody can guess, the same each time it is asked for under this name."""
        recorded = await self.journal.find(name, again=self.again)
        if recorded is None:
            # Only letters and digits: people pass it to commands, where a leading "-" would be an option.
            recorded = await self.journal.save(name, codec.dump(secrets.token_hex(12)))
        token: str = from_json(recorded)
        return token

    async def ask(
        self, kind: RequestKind, name: str, asked: bytes, *, timeout: float | None, unit: str | None = None
    ) -> dict[str, Any]:
        """The answer to a request, as the unit of this name or the next one at this place, see `answer`."""
        unit = self.name(f"{kind} {name}") if unit is None else unit
        return await self.answer(unit, await self.requested(unit, kind, name, asked), timeout=timeout)

    async def requested(self, unit: str, kind: RequestKind, name: str, asked: bytes) -> Request:
        """The request that `unit` makes, the same each time. `asked` (JSON) is what whoever answers is told."""
        return Request(await self.token(f"{unit}!token"), *self.journal.key[:2], kind, name, asked)

    async def answer(self, unit: str, request: Request, *, timeout: float | None) -> dict[str, Any]:
        """The answer to a request, as a unit: an object with its `value`, `by` whom, and `at` which instant.

        The step is left until somebody has answered. Raises WaitTimeout when nobody has after `timeout` seconds,
        RequestDenied for a question or an event to which the answer is that there will be none.
        """

        async def keep(until: float | None) -> None:
            await self.journal.request(replace(request, expires_at=until))

        what = f"the answer to '{request.name}'"
        found = await self.signal(unit, request.signal, timeout=timeout, what=what, ask=keep)
        if "denied" in found["value"]:
            by = f" by {found['by']}" if found["by"] else ""
            reason = found["value"]["denied"]
            raise RequestDenied(f"'{request.name}' was denied{by}{f': {reason}' if reason else ''}")
        return found

    async def standing(self, name: str) -> tuple[str, int]:
        """The name under which the unit `name` is done now, and the how manieth that is: one more for each `refuse`."""
        unit = name
        for number in itertools.count(1):
            if await self.journal.find(f"{unit}!refused", again=self.again) is None:
                return unit, number
            if await self.journal.find(f"{unit}!held", again=self.again) is not None:
                return unit, number
            unit = f"{name}!{number + 1}"
        raise AssertionError("unreachable")

    async def told(self, unit: str) -> None:
        """That there was no answer in time, or none at all, has become an answer itself: it stays one for all times."""
        if await self.journal.find(f"{unit}!told", again=True) is None:
            await self.journal.save(f"{unit}!told", b"true")

    async def refuse(self, unit: str, *, held: bool = False) -> None:
        """Have later attempts do this unit anew: what is recorded of it would have them fail in the same way.

        `held`: not before an operator takes the step up again.
        """
        if await self.journal.find(f"{unit}!refused", again=True) is not None:
            return
        if held:
            await self.journal.save(f"{unit}!held", b"true")
        await self.journal.save(f"{unit}!refused", b"true")

    def give_up(self, unit: str | None, error: BaseException, *, held: str = "") -> None:
        """Refuse this unit if the attempt ends with `error`, and not if somebody catches it and goes on.

        `held` says why it isn't to be done anew without an operator who wants that. None: there is no such record, and
        the attempt is the last one all the same.
        """
        self.journal.given_up(self, unit, error, held)

    async def _do_at_most_once(self, name: str, unit: Unit, produce: Callable[[], Awaitable[bytes]]) -> Done:
        # That it begins is recorded first. What began and left no result is for a person to look at.
        for number in itertools.count(1):
            begun = f"{name}!begun" if number == 1 else f"{name}!begun#{number}"
            mine = codec.dump({"by": uuid.uuid4().hex, "unit": unit.label, "about": unit.about})
            trouble = None
            with self.journal.parking.working(name):
                if await self.journal.save(begun, mine) == mine:
                    try:
                        value = await self._produce(name, unit, produce)
                    except InvalidDefinition:
                        raise  # it can't work, whoever lets it try again
                    except Exception as exc:
                        trouble = f"it failed: {failure_text(exc, self.journal.secrets)}"
                        # Kept: whoever decides, or reads of the decision later, wants to know.
                        await self.journal.save(f"{begun}!failed", codec.dump(trouble))
                    else:
                        return Done(await self.journal.save(name, value), executed=True)
            await self._decide(name, unit.label, unit.about, begun, trouble)
        raise AssertionError("unreachable")

    async def decide_lost(self) -> None:
        """Have a person decide about each unit whose outcome was lost: begun, with neither a record nor a decision.

        For a step whose attempts are used up, so that nobody comes to these units by themselves: whoever allows one
        to be begun once more allows one more attempt. Raises OutcomeUnknown when it isn't to be.
        """
        units = await self.journal.all()
        for begun, value in units.items():
            found = _BEGUN.fullmatch(begun)
            told = None if found is None else _told(value)
            if found is None or told is None:
                continue
            name, number = found[1], int(found[2] or 1)
            if not units.keys() & {name, f"{name}!begun#{number + 1}", f"{begun}!decision"}:
                await self._decide(name, *told, begun, None)

    async def _decide(
        self, name: str, label: str, about: Mapping[str, Any], begun: str, trouble: str | None
    ) -> None:
        """Have a person decide whether a unit is begun once more. Raises OutcomeUnknown when it isn't."""
        if trouble is None:
            failed = await self.journal.find(f"{begun}!failed", again=self.again)
            lost = "it was begun before, and how it ended was never recorded"
            trouble = lost if failed is None else from_json(failed)
        key = self._inner(name, again=False).effect_key
        asked = {
            **about,
            "question": f"Do {label} again? It may be done at most once; {trouble}",
            "effect_key": key,
        }
        answer = await self.ask(
            "approval", f"{label} again", codec.dump(asked), timeout=None, unit=f"{begun}!decision"
        )
        if not answer["value"]["approved"]:
            reason = answer["value"].get("reason")
            raise OutcomeUnknown(
                f"{label} may be done at most once; {trouble}; it is not to be done again"
                f"{f' ({reason})' if reason else ''}; see what came of it under the effect key {key!r}"
            )

    async def _produce(self, name: str, unit: Unit, produce: Callable[[], Awaitable[bytes]]) -> bytes:
        for number in itertools.count(1):
            self.journal.parking.check()
            limit = None if unit.timeout is None else asyncio.timeout(unit.timeout)
            try:
                inner = self._inner(name, again=self.again or number > 1, is_once=unit.at_most_once)
                with inner.entered():
                    if limit is None:
                        value = await produce()
                    else:
                        async with limit:
                            value = await produce()
                self.journal.parking.check_done(name)
                return value
            except Exception as exc:
                # No name for the error: this frame is part of its traceback, and would keep it in a circle.
                is_late = limit is not None and limit.expired() and isinstance(exc, TimeoutError)
                delay = None if unit.at_most_once else unit.delay(number, unit.late() if is_late else exc)
                if delay is None:
                    if is_late:
                        raise unit.late() from exc
                    raise
            await asyncio.sleep(delay)
        raise AssertionError("unreachable")

    def _inner(self, name: str, *, again: bool, is_once: bool = False) -> Place:
        return Place(self.journal, name, again, self, is_once)

    async def _leave(self, waits_for: tuple[str, ...], until: float | None) -> None:
        """Wait here, and in the units within which this is: they can't go on meanwhile."""
        around: list[str] = []
        place: Place | None = self
        while place is not None and place.within:
            if place.is_once:
                raise InvalidDefinition(
                    f"something inside of '{place.within}' waits, which may be done at most once: behind the wait it "
                    "would have to be begun again; wait before or after it"
                )
            around.append(place.within)
            place = place.outer
        await self.journal.park(waits_for, until, frozenset(around))


_BEGUN = re.compile(r"(.*)!begun(?:#([1-9][0-9]{0,8}))?", re.DOTALL)


def _told(value: bytes) -> tuple[str, Mapping[str, Any]] | None:
    """What people call the unit of which this is recorded to have begun, and what else tells it.

    None where it records something else: a name may look like that of such a record, for there are call ids and
    questions of models in names.
    """
    match from_json(value):
        case {"by": _, "unit": str(label), "about": dict(about), **rest} if not rest:
            return label, about
    return None


class Stages:
    """A place inside of `outer` that isn't recorded and moves on: at each stage it has names and effects of its own.

    For code that may be called in one attempt and not in another, or more often, as hooks of an agent are when its
    model has failed or another answer was asked for: nothing that a later stage does is taken for what they did.
    """

    __slots__ = ("now", "outer")

    def __init__(self, outer: Place, first: str) -> None:
        self.outer = outer
        self._begin(outer.spelled(first))

    def move(self, unit: str) -> None:
        """From here on it is the stage behind this unit of `outer`."""
        self._begin(f"{unit}{_BEHIND}")

    def _begin(self, name: str) -> None:
        self.now = Place(self.outer.journal, name, self.outer.again, self.outer, is_unit=False)

    def entered(self) -> Entered:
        """The code inside is at whichever stage this is at."""
        return Entered(self)


class Entered:
    """The block of `Place.entered`; a generator would cost each unit several times as much."""

    __slots__ = ("_place", "_token")

    def __init__(self, place: Place | Stages) -> None:
        self._place = place

    def __enter__(self) -> None:
        self._token = _PLACE.set(self._place)

    def __exit__(self, *_: object) -> None:
        _PLACE.reset(self._token)


def readable(names: Iterable[str]) -> dict[str, str]:
    """The names of a step's units as people can read them, each by its own.

    What is within a unit, or at the stage behind it, has that one's name before its own. A unit that isn't
    recorded yet, and a call that isn't recorded at all, is told by the first characters of a digest.
    """
    units = list(names)
    known = {_digest(f"{name}{end}"): name for name in units for end in ("", _BEHIND)}

    def told(name: str) -> str:
        within, slash, own = name.partition("/")
        if not slash or len(within) != _DIGEST_LENGTH or not set(within) <= set("0123456789abcdef"):
            return name
        return f"{told(known[within]) if within in known else f'{within[:8]}...'} / {own}"

    return {name: told(name) for name in units}


@functools.lru_cache(maxsize=1024)
def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:_DIGEST_LENGTH]
