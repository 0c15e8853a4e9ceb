"""What follows a step. Every decision on a slip's future is here; nothing here waits, writes or sends."""

from __future__ import annotations

from dataclasses import field, replace
from typing import assert_never

from paigeant.retry import RetryPolicy
from paigeant.slip import Compensation, Revision, RoutingSlip, RunStatus, Step, StepStatus
from paigeant.values import value

__all__ = [
    "Failed",
    "Finish",
    "Forward",
    "Move",
    "Outcome",
    "Park",
    "Parked",
    "Retry",
    "Skipped",
    "Succeeded",
    "Undo",
    "route",
    "turn_round",
]


@value
class Succeeded:
    """The attempt gave a result. `stored`: its output is too large to travel."""

    revision: Revision | None = None
    compensation: Compensation | None = None
    stored: bool = False


@value
class Skipped:
    """The step's condition was false."""


@value
class Failed:
    """The attempt gave no result. `attempt` counts from 1; `chance` (0 to 1) places the wait within its jitter.

    `permanent`: no further attempt can help. `after`: seconds from now before which none is made, whatever the policy.
    """

    error: str
    attempt: int
    retry: RetryPolicy = field(default_factory=RetryPolicy)
    permanent: bool = False
    chance: float = 0.0
    after: float = 0.0


@value
class Parked:
    """The attempt is to go on when one of the signals `waits_for` is there, or at the instant `until`."""

    waits_for: tuple[str, ...] = ()
    until: float | None = None


Outcome = Succeeded | Skipped | Failed | Parked


@value
class Forward:
    """The step is recorded with `status`; `step` is next."""

    slip: RoutingSlip
    status: StepStatus
    step: Step


@value
class Retry:
    """The same step again, `delay` seconds from now."""

    slip: RoutingSlip
    delay: float
    error: str


@value
class Park:
    """The same step goes on when one of the signals `waits_for` is there, or at the instant `until`."""

    slip: RoutingSlip
    waits_for: tuple[str, ...]
    until: float | None


@value
class Undo:
    """The step ends with `status`; undoing `undo` is next. `error`: why the step failed, where it did."""

    slip: RoutingSlip
    status: StepStatus
    undo: Compensation
    error: str | None = None


@value
class Finish:
    """The step ends with `status` and the run with `run`."""

    slip: RoutingSlip
    status: StepStatus
    run: RunStatus
    error: str | None = None


Move = Forward | Retry | Park | Undo | Finish


def route(slip: RoutingSlip, outcome: Outcome, now: float) -> Move:
    """What follows when what was due on `slip` had this `outcome` at the instant `now`."""
    match outcome:
        case Failed():
            return _after_failure(slip, outcome, now)
        case Succeeded() if slip.ending is not None:
            return _next_undo(slip.mark_undone(succeeded=True), StepStatus.COMPENSATED)
        case Succeeded(revision=revision, compensation=compensation, stored=stored):
            done = slip.mark_complete(compensation=compensation, revision=revision, stored=stored)
            return _next_step(done, StepStatus.COMPLETED)
        case Parked(waits_for=waits_for, until=until):
            return Park(slip, waits_for, until)
        case Skipped():
            return _next_step(slip.mark_complete(status=StepStatus.SKIPPED), StepStatus.SKIPPED)
        case _:
            assert_never(outcome)


def turn_round(slip: RoutingSlip, ending: RunStatus) -> Undo | Finish:
    """What follows when a run is to end as `ending` (failed or cancelled) before its next step is done."""
    undoing = slip.begin_undo("cancelled" if ending is RunStatus.CANCELLED else "failed")
    return _next_undo(undoing, StepStatus.FAILED)


def _next_step(slip: RoutingSlip, status: StepStatus) -> Forward | Finish:
    step = slip.next_step()
    return Finish(slip, status, RunStatus.COMPLETED) if step is None else Forward(slip, status, step)


def _next_undo(slip: RoutingSlip, status: StepStatus, error: str | None = None) -> Undo | Finish:
    undo = slip.next_undo()
    stopped = bool(slip.not_undone) and slip.on_compensation_failure == "stop"
    return (
        Finish(slip, status, _end(slip), error)
        if undo is None or stopped
        else Undo(slip, status, undo, error)
    )


def _end(slip: RoutingSlip) -> RunStatus:
    if slip.not_undone:
        return RunStatus.COMPENSATION_FAILED
    if slip.ending == "cancelled":
        return RunStatus.CANCELLED
    return RunStatus.COMPENSATED if slip.undone else RunStatus.FAILED


def _after_failure(slip: RoutingSlip, failed: Failed, now: float) -> Move:
    retry = _retry(slip, failed, now)
    if retry is not None:
        return retry
    if slip.ending is not None:
        return _next_undo(slip.mark_undone(succeeded=False), StepStatus.COMPENSATION_FAILED, failed.error)
    return replace(turn_round(slip, RunStatus.FAILED), error=failed.error)


def _retry(slip: RoutingSlip, failed: Failed, now: float) -> Retry | None:
    if failed.permanent or failed.attempt >= failed.retry.attempts:
        return None
    delay = max(failed.retry.next_delay(failed.attempt, chance=failed.chance), failed.after)
    # A deadline bounds what is done, not what is undone: a run that is late must still be put right.
    late = slip.ending is None and slip.deadline is not None and now + delay >= slip.deadline
    return None if late else Retry(slip, delay, failed.error)
