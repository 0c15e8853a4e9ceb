"""Reporter: puts what happens to messages and steps into events for the observers."""

from __future__ import annotations

import time
from typing import Any

from pydantic_core import from_json

from paigeant.claim import Claim
from paigeant.message import PaigeantMessage
from paigeant.observer import NOTHING_AROUND, Around, Event, EventName, Observers
from paigeant.routing import Move, Park, Retry
from paigeant.slip import RunStatus, StepStatus
from paigeant.store import StepResult

__all__ = ["Reporter"]

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


class Reporter:
    """Tells the observers, in the name of one worker. Costs nothing where there are none."""

    def __init__(self, observers: Observers, worker_id: str) -> None:
        self.observers = observers
        self.worker_id = worker_id

    def tell(self, name: EventName, claim: Claim, **more: Any) -> None:
        """`name` has happened to the step of `claim`."""
        if self.observers.want(name):
            parent = claim.message.headers.get("traceparent", "")
            self.observers.observe(Event(name, traceparent=parent, **claim.ids(self.worker_id), **more))

    def begin(self, claim: Claim) -> Around:
        """The activity of `claim` is about to run; gives what it is to run in."""
        observers = self.observers
        if not observers:
            return NOTHING_AROUND
        self.tell("step.started", claim)
        return observers.around(claim.described(self.worker_id)) if observers.surrounds else NOTHING_AROUND

    def tell_claimed(self, claim: Claim) -> None:
        """A message was delivered and its step claimed, which had been due for so many seconds."""
        self.tell("delivery.claimed", claim, seconds=claim.grant.queued)

    def tell_delivery(self, name: EventName, message: PaigeantMessage, reason: str) -> None:
        """A message was delivered and no step was claimed for it."""
        if self.observers:
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

    def tell_recorded(self, claim: Claim, result: StepResult, move: Move) -> None:
        """The end of an attempt is durable, and perhaps the end of its run."""
        if not self.observers:
            return
        seconds = time.monotonic() - claim.claimed_at
        more: dict[str, Any] = {}
        match move:
            case Retry(delay=delay):
                more = {"delay": delay}
            case Park(waits_for=waits_for, until=until):
                more = {"waits_for": list(waits_for), "until": until}
        if result.usage is not None:
            more["usage"] = from_json(result.usage)
        self.tell(_STEP_EVENTS[result.status], claim, seconds=seconds, error=result.error, more=more)
        if result.run is not None and result.run in _RUN_EVENTS:
            self.tell(_RUN_EVENTS[result.run], claim, error=result.run_error)
