"""Reporter: puts what happens to messages and steps into events for the observers."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from typing import Any, get_args

from pydantic_core import from_json

from paigeant.claim import Claim
from paigeant.errors import PaigeantError
from paigeant.message import PaigeantMessage
from paigeant.observer import (
    CURRENT,
    NOTHING_AROUND,
    NOTHING_MORE,
    Around,
    Event,
    EventName,
    Observers,
    quick,
)
from paigeant.routing import Move, Park, Retry
from paigeant.slip import Phase, RunStatus, StepStatus
from paigeant.store import StepResult, Store

__all__ = ["Reporter", "about_run"]

log = logging.getLogger("paigeant.reporter")

_STEP_EVENTS: dict[StepStatus, EventName] = {
    StepStatus.READY: "step.retrying",
    StepStatus.WAITING: "step.waiting",
    StepStatus.COMPLETED: "step.completed",
    StepStatus.SKIPPED: "step.skipped",
    StepStatus.FAILED: "step.failed",
    StepStatus.COMPENSATED: "step.compensated",
    StepStatus.COMPENSATION_FAILED: "step.compensation_failed",
}
_RUN_EVENTS: dict[RunStatus, EventName] = {
    RunStatus.COMPLETED: "run.completed",
    RunStatus.FAILED: "run.failed",
    RunStatus.COMPENSATED: "run.compensated",
    RunStatus.COMPENSATION_FAILED: "run.compensation_failed",
    RunStatus.CANCELLED: "run.cancelled",
}


async def about_run(store: Store, workflow_id: str) -> dict[str, Any]:
    """What an event says of a run besides its id, read from its record: for those who end it without a message of it.

    Nothing where that can't be read now, since what has happened is to be told all the same.
    """
    try:
        run = (await store.load_run(workflow_id, inline_bytes=0)).run
    except PaigeantError as exc:
        log.warning("can't tell which workflow run '%s' is of: %s", workflow_id, exc)
        return {}
    return {
        "workflow": run.workflow,
        "trace_id": run.trace_id,
        "correlation_id": run.correlation_id,
        "traceparent": run.headers.get("traceparent", ""),
        "tracestate": run.headers.get("tracestate", ""),
    }


class Reporter:
    """Tells the observers, in the name of one worker. Costs nothing where there are none."""

    def __init__(self, observers: Observers, worker_id: str) -> None:
        self.observers = observers
        self.worker_id = worker_id
        self._wanted = frozenset(name for name in get_args(EventName) if observers.want(name))
        self._tells_starts = "step.started" in self._wanted
        self._surrounds = observers.surrounds

    def tell(
        self,
        name: EventName,
        claim: Claim,
        *,
        seconds: float | None = None,
        error: str | None = None,
        at: float | None = None,
        more: Mapping[str, Any] = NOTHING_MORE,
    ) -> None:
        """`name` has happened to the step of `claim`."""
        if name in self._wanted:
            self._tell(name, claim, seconds, error, at, more)

    def _tell(
        self,
        name: EventName,
        claim: Claim,
        seconds: float | None,
        error: str | None,
        at: float | None,
        more: Mapping[str, Any],
    ) -> None:
        message = claim.message
        headers = message.headers
        event = quick(
            Event,
            (
                name,
                message.workflow_id,
                message.workflow,
                claim.key.step,
                claim.activity.name,
                claim.grant.attempt,
                message.trace_id,
                message.correlation_id,
                self.worker_id,
                seconds,
                error,
                at,
                more,
                headers.get("traceparent", ""),
                headers.get("tracestate", ""),
            ),
        )
        self.observers.observe(event)

    def begin(self, claim: Claim) -> Around:
        """The activity of `claim` is about to run; gives what it is to run in."""
        if self._tells_starts:
            self.tell("step.started", claim, at=claim.now, more=_phase(claim))
        if not self._surrounds:
            return NOTHING_AROUND
        return self.observers.around(claim.described(self.worker_id))

    def tell_claimed(self, claim: Claim) -> None:
        """A message was delivered and its step claimed, which had been due for so many seconds."""
        self.tell("delivery.claimed", claim, seconds=claim.grant.queued)

    def tell_here(self, name: EventName, *, error: str | None = None, more: Mapping[str, Any]) -> None:
        """`name` has happened in the step that the current task or thread works on."""
        if name in self._wanted and (ids := CURRENT.get()) is not None:
            self.observers.observe(Event(name, **ids, error=error, more=more))

    def tell_delivery(self, name: EventName, message: PaigeantMessage, reason: str) -> None:
        """A message was delivered and no step was claimed for it."""
        if name in self._wanted:
            event = Event(
                name,
                message.workflow_id,
                message.workflow,
                message.step_id,
                trace_id=message.trace_id,
                correlation_id=message.correlation_id,
                worker=self.worker_id,
                error=reason,
            )
            self.observers.observe(event)

    def tell_recorded(self, claim: Claim, result: StepResult, move: Move, at: float) -> None:
        """The end of an attempt is durable since the instant `at`, and perhaps the end of its run."""
        name = _STEP_EVENTS[result.status]
        if name in self._wanted:
            seconds = time.monotonic() - claim.claimed_at
            self._tell(name, claim, seconds, result.error, at, _recorded(claim, result, move))
        if result.run in _RUN_EVENTS:
            self.tell(_RUN_EVENTS[result.run], claim, error=result.run_error, at=at)


def _recorded(claim: Claim, result: StepResult, move: Move) -> Mapping[str, Any]:
    """What else there is to tell of the end of an attempt; of most there is nothing."""
    if result.status is StepStatus.COMPLETED and result.usage is None:
        return NOTHING_MORE
    more = _phase(claim)
    if isinstance(move, Retry):
        more = {**more, "delay": move.delay}
    elif isinstance(move, Park):
        more = {**more, "waits_for": list(move.waits_for), "until": move.until}
    if result.usage is not None:
        more = {**more, "usage": from_json(result.usage)}
    return more


def _phase(claim: Claim) -> Mapping[str, Any]:
    return _UNDO if claim.key.phase is Phase.UNDO else NOTHING_MORE


_UNDO: Mapping[str, Any] = {"phase": "undo"}
