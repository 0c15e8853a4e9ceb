"""What a worker makes of its attempts at steps: the results that stores are asked to record."""

from __future__ import annotations

from dataclasses import dataclass, replace

from paigeant import folding
from paigeant.identity import GRANT_SIGNAL
from paigeant.retry import RetryPolicy
from paigeant.routing import (
    Failed,
    Finish,
    Forward,
    Outcome,
    Park,
    Parked,
    Retry,
    Skipped,
    Succeeded,
    Undo,
    route,
)
from paigeant.slip import Compensation, Phase, Revision, RoutingSlip, RunStatus, Step, StepStatus
from paigeant.store import REQUEST_SIGNAL, Grant, NextStep, StepKey, StepResult

__all__ = ["ATTEMPTS", "INLINE", "WAITS", "Held", "attempted"]

INLINE, ATTEMPTS = 40, 3
WAITS: dict[str, tuple[tuple[str, ...], float | None]] = {
    "sleeps": ((), 8.0),
    "waits": (("go", GRANT_SIGNAL, f"{REQUEST_SIGNAL}q0"), None),
    "waits a while": ((f"{REQUEST_SIGNAL}q1", "go"), 12.0),
}
"""The attempts that end with waiting: for which signals, and for how many seconds at most."""
RETRY = RetryPolicy(attempts=ATTEMPTS, base=4.0, cap=8.0)


@dataclass(frozen=True)
class Held:
    """What a worker knows of a step that it claimed, however long ago."""

    worker: str
    key: StepKey
    grant: Grant
    slip: RoutingSlip


def attempted(
    held: Held,
    end: str,
    now: float,
    *,
    undo: bool = True,
    edit: str | None = None,
    strict: bool = False,
    on: bool = False,
) -> StepResult:
    """What the executor makes of an attempt that ended so."""
    key, forward = held.key, held.key.phase is Phase.DO
    outcome = _outcome(held, end, now, undo=undo, edit=edit)
    move = route(held.slip, outcome, now)
    failed = isinstance(outcome, Failed)
    error = outcome.error if isinstance(outcome, Failed) else None
    result = StepResult(
        key,
        held.worker,
        held.grant.epoch,
        held.grant.attempt,
        StepStatus.READY,
        strict=strict,
        error=error,
    )
    if isinstance(move, Retry):
        return replace(result, delay=move.delay)
    if isinstance(move, Park):
        return replace(result, status=StepStatus.WAITING, waits_for=move.waits_for, until=move.until)
    succeeded = isinstance(outcome, Succeeded)
    revision = outcome.revision if isinstance(outcome, Succeeded) else None
    turned = forward and failed
    return replace(
        result,
        status=move.status,
        run=_run_status(move, forward=forward),
        ending="failed" if turned else None,
        run_error=f"{key.step}: {error}" if turned else None,
        input=b'{"x":1}',
        output=_output(held, end) if succeeded and forward else None,
        revision=None if revision is None else folding.pack_revision(revision),
        undo_topic="undo" if succeeded and forward and undo else None,
        variables={f"v_{key.step}": _output(held, end)} if succeeded and forward and on else {},
        next=_next(key.workflow_id, move),
        take_next=on,
        place=held.slip.place,  # as the worker knew it: perhaps long ago
    )


def _output(held: Held, end: str) -> bytes:
    size = INLINE if end == "large" else 1
    return f'"{held.key.step}#{held.grant.epoch}{"." * size}"'.encode()


def _outcome(held: Held, end: str, now: float, *, undo: bool, edit: str | None) -> Outcome:
    forward = held.key.phase is Phase.DO
    if held.grant.exhausted:
        return Failed("WorkerLost", held.grant.attempt, RETRY, permanent=True)
    if end in ("failed", "hopeless"):
        return Failed(end, held.grant.attempt, RETRY, permanent=end == "hopeless", chance=0.5)
    if end in WAITS:
        waits_for, seconds = WAITS[end]
        return Parked(waits_for, None if seconds is None else now + seconds)
    if not forward:
        return Succeeded()
    if end == "skipped":
        return Skipped()
    left = held.slip.itinerary[1:]
    revision = None
    if edit == "insert" and len(held.slip.executed) < 4:
        revision = Revision((Step("a0", id=f"{held.key.step}.1"), *left), 1)
    elif edit == "terminate":
        revision = Revision(())
    compensation = Compensation(held.key.step, "a0", "undo") if undo else None
    return Succeeded(revision, compensation, stored=end == "large")


def _run_status(move: Finish | Forward | Undo, *, forward: bool) -> RunStatus | None:
    if isinstance(move, Finish):
        return move.run
    return RunStatus.COMPENSATING if forward and isinstance(move, Undo) else None


def _next(run: str, move: Finish | Forward | Undo) -> NextStep | None:
    match move:
        case Forward(step=step):
            return NextStep(StepKey(run, step.id), step.activity, step.activity)
        case Undo(undo=undo):
            return NextStep(StepKey(run, undo.step_id, Phase.UNDO), undo.activity, undo.topic)
        case Finish():
            return None
