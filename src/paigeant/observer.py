"""Observer: what may watch a dispatch or a step, and may never change it.

What happens to a run is told once, here, so that logs, traces, metrics and audit agree. The words are fixed.
"""

from __future__ import annotations

import logging
from asyncio import CancelledError
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType, TracebackType
from typing import Any, Literal, NamedTuple, Protocol, get_args, runtime_checkable

__all__ = [
    "CURRENT",
    "NOTHING_AROUND",
    "NOTHING_MORE",
    "STEP_IDS",
    "Around",
    "Event",
    "EventName",
    "Harmless",
    "LogLine",
    "Observer",
    "Observers",
    "Surrounding",
    "Work",
    "quick",
]

EventName = Literal[
    "run.dispatched",
    "run.adopted",
    "run.completed",
    "run.failed",
    "run.compensated",
    "run.compensation_failed",
    "run.cancelling",
    "run.cancelled",
    "run.expired",
    "delivery.claimed",
    "run.retried",
    "request.opened",
    "request.answered",
    "request.denied",
    "signal.received",
    "plan.refused",
    "delivery.duplicate",
    "delivery.returned",
    "delivery.rejected",
    "delivery.requeued",
    "step.started",
    "step.completed",
    "step.skipped",
    "step.retrying",
    "step.waiting",
    "step.failed",
    "step.compensated",
    "step.compensation_failed",
    "step.released",
    "step.lost",
    "step.swept",
    "worker.started",
    "worker.stopping",
    "worker.stopped",
    "worker.lost",
]

_ALL: tuple[EventName, ...] = get_args(EventName)

CURRENT: ContextVar[Mapping[str, Any] | None] = ContextVar("paigeant_step", default=None)
"""The ids of the step that the current task or thread works on: workflow_id, step, attempt, trace_id ..."""


STEP_IDS = "paigeant_step"
"""The attribute of a log record with the same ids: one for all, since logging lets nobody set what is set already."""

NOTHING_MORE: Mapping[str, Any] = MappingProxyType({})


class Event(NamedTuple):
    """Something that has happened, with the ids it belongs to, and the seconds it took where that means something.

    `traceparent` is the W3C trace context that the run was dispatched in, `tracestate` what vendors add to that.
    `at` is the instant by the store's clock of what was recorded: what follows from it anywhere is later. None where
    nothing was recorded: it is told as it happens. A tuple, for it is made at each step, and a frozen dataclass takes
    five times as long.
    """

    name: EventName
    workflow_id: str = ""
    workflow: str = ""
    step: str = ""
    activity: str = ""
    attempt: int = 0
    trace_id: str = ""
    correlation_id: str = ""
    worker: str = ""
    seconds: float | None = None
    error: str | None = None
    at: float | None = None
    more: Mapping[str, Any] = NOTHING_MORE
    traceparent: str = ""
    tracestate: str = ""


class Work(NamedTuple):
    """What is about to be done: the dispatch of a run, or an attempt to do or undo one of its steps.

    `traceparent` is the context it belongs to: the caller's for a dispatch, the run's for an attempt; `tracestate` is
    what vendors add to that. `message_id` is empty where the worker went on from the step before without one; `queued`
    is for how long the step had been due.
    """

    kind: Literal["dispatch", "do", "undo"]
    workflow_id: str
    workflow: str
    step: str = ""
    activity: str = ""
    topic: str = ""
    attempt: int = 0
    correlation_id: str = ""
    worker: str = ""
    message_id: str = ""
    queued: float = 0.0
    traceparent: str = ""
    tracestate: str = ""


quick = tuple.__new__
"""`quick(Event, (...))` is the event with these fields, all of them, at half the cost of `Event(...)`; so of Work."""

Around = AbstractContextManager[str | None]
"""Is entered before a work and left after it, in its own task. Gives the traceparent for a new run, or None.
Behind the traceparent, after a space, its tracestate may stand."""


@dataclass(frozen=True, slots=True)
class LogLine:
    """A log line as it was recorded, `at` the instant by the store's clock. Ids rise in the order of the writing."""

    id: int
    at: float
    level: str
    event: str
    fields: Mapping[str, Any]


_TROUBLE = (Exception, CancelledError)
"""An observer's trouble, which is never the run's. Nobody is cancelled in there, since it doesn't wait: a cancellation
is the result of something else that it looked at, as of a task that was cancelled."""


class Observer(Protocol):
    """Is told what happens. It must not block; what it raises is logged and goes no further.

    One that has a set `wants` of names is told of these events alone; what nobody wants isn't even put together.
    """

    def observe(self, event: Event) -> None:
        """`event` has happened, and is durable where it is about a result."""
        ...


@runtime_checkable
class Surrounding(Protocol):
    """An observer that also wants to be around a work, as a trace must be: its span is the current one meanwhile."""

    def around(self, work: Work) -> Around:
        """What `work` is done in. It must not block; what it raises is logged and goes no further."""
        ...


class Observers:
    """Several observers as one; none of them can disturb the work or the others."""

    def __init__(self, observers: Sequence[Observer] = ()) -> None:
        self._observers = tuple(observers)
        self._telling: dict[EventName, tuple[Observer, ...]] = {
            name: tuple(each for each in observers if name in getattr(each, "wants", _ALL)) for name in _ALL
        }
        makers = [each.around for each in observers if isinstance(each, Surrounding)]
        self.surrounds = bool(makers)
        """Whether one of them wants to be around a work. Otherwise none need be described."""
        self.around: Callable[[Work], Around] = (
            partial(_guarded, makers[0]) if len(makers) == 1 else partial(_all_around, makers)
        )
        """What all of them want a work to be done in."""

    def __bool__(self) -> bool:
        return bool(self._observers)

    def want(self, name: EventName) -> bool:
        """Whether one of them is to be told of such an event."""
        return bool(self._telling[name])

    def observe(self, event: Event) -> None:
        """Tell all that want to know."""
        for observer in self._telling[event.name]:
            try:
                observer.observe(event)
            except _TROUBLE:
                logging.getLogger("paigeant").exception("observer failed at %s", event.name)


NOTHING_AROUND: Around = nullcontext()


class Harmless:
    """An `Around` that sees to it itself that neither its beginning nor its end raises."""

    __slots__ = ()


class _Guarded(AbstractContextManager[str | None]):
    """What one observer wants a work to be done in, without the trouble that it may have."""

    __slots__ = ("_around", "_kind")

    def __init__(self, around: Around, kind: str) -> None:
        self._around: Around | None = around
        self._kind = kind

    def __enter__(self) -> str | None:
        assert self._around is not None
        try:
            return self._around.__enter__()
        except _TROUBLE:
            self._around = None  # what wasn't entered isn't left
            _log_failure(self._kind)
            return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._around is not None:
            try:
                self._around.__exit__(kind, error, traceback)
            except _TROUBLE:
                _log_failure(self._kind)


def _guarded(make: Callable[[Work], Around], work: Work) -> Around:
    """What one observer wants `work` to be done in; nothing where it fails to say so."""
    try:
        around = make(work)
    except _TROUBLE:
        _log_failure(work.kind)
        return NOTHING_AROUND
    return around if isinstance(around, Harmless) else _Guarded(around, work.kind)


def _all_around(makers: Sequence[Callable[[Work], Around]], work: Work) -> Around:
    return _Surroundings([_guarded(make, work) for make in makers]) if makers else NOTHING_AROUND


def _log_failure(kind: str) -> None:
    logging.getLogger("paigeant").exception("observer failed around %s", kind)


class _Surroundings(AbstractContextManager[str | None]):
    """Several surroundings as one, the first outermost. A new run gets the traceparent of the innermost."""

    def __init__(self, surroundings: Sequence[Around]) -> None:
        self._surroundings = surroundings

    def __enter__(self) -> str | None:
        given = None
        for each in self._surroundings:
            given = each.__enter__() or given
        return given

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for each in reversed(self._surroundings):
            each.__exit__(kind, error, traceback)
