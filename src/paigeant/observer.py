"""Observer: what may watch a dispatch or a step, and may never change it.

What happens to a run is told once, here, so that logs, traces, metrics and audit agree. The words are fixed.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, get_args

__all__ = ["CURRENT", "Event", "EventName", "LogLine", "Observer", "Observers"]

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

CURRENT: ContextVar[Mapping[str, Any] | None] = ContextVar("paigeant_step", default=None)
"""The ids of the step that the current task or thread works on: workflow_id, step, attempt, trace_id ..."""


@dataclass(frozen=True, slots=True)
class Event:
    """Something that has happened, with the ids it belongs to, and the seconds it took where that means something.

    `at` is the instant by the store's clock of what was recorded: what follows from it anywhere is later. None where
    nothing was recorded: it is told as it happens.
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
    more: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class LogLine:
    """A log line as it was recorded, `at` the instant by the store's clock. Ids rise in the order of the writing."""

    id: int
    at: float
    level: str
    event: str
    fields: Mapping[str, Any]


class Observer(Protocol):
    """Is told what happens. It must not block; what it raises is logged and goes no further.

    One that has an attribute `wants`, a set of events' names, cares for no others. An event that nobody wants isn't
    made; one that is made for another observer may come to this one as well.
    """

    def observe(self, event: Event) -> None:
        """`event` has happened, and is durable where it is about a result."""
        ...


_ALL = frozenset(get_args(EventName))


class Observers:
    """Several observers as one; none of them can disturb the work or the others."""

    def __init__(self, observers: Sequence[Observer] = ()) -> None:
        self._observers = tuple(observers)
        self.wanted: frozenset[str] = frozenset[str]().union(
            *(getattr(observer, "wants", _ALL) for observer in self._observers)
        )
        """The events that are worth being made."""

    def __bool__(self) -> bool:
        return bool(self._observers)

    def observe(self, event: Event) -> None:
        """Tell all of them."""
        for observer in self._observers:
            try:
                observer.observe(event)
            except Exception:  # an observer's trouble is never the run's
                logging.getLogger("paigeant").exception("observer failed at %s", event.name)
