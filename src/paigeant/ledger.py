"""What may change in the rows of a run. Pure: rows and a request in, changes or a refusal out.

Both stores lock and load the rows, ask here, and write what they are told, in one transaction. So the guards that keep
a run correct (compare-and-set on run state, cursor, step state and epoch) stand here once. Here is what workers and
sweeps ask for; what comes from outside of a run is in `interventions.py`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from typing import Any

from paigeant.slip import RUN_ENDED, Phase, RunStatus, StepStatus
from paigeant.store import (
    ClaimRequest,
    Grant,
    NextStep,
    Recorded,
    Refused,
    StepKey,
    StepRecord,
    StepResult,
)
from paigeant.values import value

__all__ = [
    "MOST_GRACES",
    "NEVER",
    "OPEN",
    "Changes",
    "Head",
    "Patch",
    "adopted",
    "claim",
    "foreseen_for_claim",
    "foreseen_for_record",
    "free",
    "is_due_once_more",
    "is_resendable",
    "life",
    "next_life",
    "postpone",
    "queued_since",
    "record",
    "release",
    "wake",
]

OPEN = frozenset({StepStatus.READY, StepStatus.RUNNING, StepStatus.WAITING})
"""A step in one of these states is the run's cursor: it has exactly one until it ends."""

Patch = dict[str, Any]

MOST_GRACES = 30
"""A ready step is looked at again at least every so many grace times, however long it has waited."""

NEVER = 253_402_300_800.0
"""The instant (the year 10000) at which a step is to be woken that waits without an end."""

_EARLY_SECONDS = 1.0
"""A message that comes so much too early is given back; who comes earlier has heard of something that is over."""

_LIFE = 1_000_000
"""Epochs of undos that a retry by an operator begins anew start at the next multiple of it: what was sent or claimed
before the retry can't be taken for what comes after it."""


@value
class Head:
    """What a decision needs to know of a step and its run."""

    key: StepKey
    seq: int
    run: RunStatus
    status: StepStatus
    epoch: int
    attempt: int
    worker: str | None
    not_before: float
    wake_at: float = 0.0
    created_at: float = 0.0


def foreseen_for_claim(request: ClaimRequest) -> Head | None:
    """The step as it is when nobody has claimed it yet; None where nothing is foreseen."""
    if request.place is None or request.key.phase is Phase.UNDO:
        return None
    run = RunStatus.RUNNING if request.place else RunStatus.PENDING
    return Head(request.key, request.place, run, StepStatus.READY, 0, 0, None, 0.0)


def foreseen_for_record(result: StepResult) -> Head | None:
    """The step as it is when the one who has a result for it still holds it; None where nothing is foreseen."""
    if result.place is None or result.key.phase is Phase.UNDO:
        return None
    held = (result.epoch, result.attempt, result.worker)
    return Head(result.key, result.place, RunStatus.RUNNING, StepStatus.RUNNING, *held, 0.0)


@dataclass(slots=True)
class Changes:
    """What is to be written: values of columns for existing rows, rows to add, rows to drop.

    Of the steps that are `renewed`, the units that are to be `done_anew` are dropped.
    """

    steps: list[tuple[StepKey, Patch]] = field(default_factory=list)
    runs: list[tuple[str, Patch]] = field(default_factory=list)
    added: list[StepRecord] = field(default_factory=list)
    dropped: list[StepKey] = field(default_factory=list)
    renewed: list[StepKey] = field(default_factory=list)
    variables: list[tuple[str, str, bytes]] = field(default_factory=list)


def claim(head: Head | None, request: ClaimRequest, changes: Changes, *, now: float) -> Grant | Refused:
    """T1: a ready step becomes the worker's, counted before it runs."""
    if head is None:
        return Refused("unknown")
    if head.run in RUN_ENDED or (head.run is RunStatus.COMPENSATING and head.key.phase is Phase.DO):
        return Refused("ended")
    match head.status:
        case StepStatus.RUNNING:
            return Refused("taken")
        case StepStatus.WAITING if head.wake_at > now:
            early = head.wake_at - now
            return Refused("not_due", retry_in=early) if early < _EARLY_SECONDS else Refused("taken")
        case StepStatus.READY | StepStatus.WAITING:
            pass
        case _:
            return Refused("recorded")
    if head.not_before > now:
        return Refused("not_due", retry_in=head.not_before - now)
    exhausted = head.attempt >= request.max_attempts
    attempt = head.attempt + (not exhausted)
    grant = Grant(head.epoch + 1, attempt, now, exhausted, _queued(head, now))
    changes.steps.append(
        (
            head.key,
            {
                "status": StepStatus.RUNNING,
                "epoch": grant.epoch,
                "attempt": grant.attempt,
                "worker": request.worker,
                # One process may know the time a little later than another that has made the step. Where a head is
                # foreseen, that is seen to with the row (`rows.patch_rows`).
                "started_at": max(now, head.created_at),
                **({"waits_for": None} if head.status is StepStatus.WAITING else {}),
                **({"wake_at": NEVER} if exhausted else {}),  # for `release`: this claim has counted nothing
            },
        )
    )
    if head.run in (RunStatus.PENDING, RunStatus.WAITING):
        patch: Patch = {"status": RunStatus.RUNNING}
        if head.run is RunStatus.PENDING:
            patch["started_at"] = now
        changes.runs.append((head.key.workflow_id, patch))
    return grant


def queued_since(grant: Grant, head: Head) -> Grant:
    """`grant` with the time for which the step, as it was before, had been due."""
    return replace(grant, queued=_queued(head, grant.now))


def _queued(head: Head, now: float) -> float:
    due_at = head.wake_at if head.status is StepStatus.WAITING else max(head.not_before, head.created_at)
    return max(now - due_at, 0.0)


def record(
    head: Head | None,
    result: StepResult,
    changes: Changes,
    *,
    now: float,
    grace: float,
    arrived: Collection[str] = (),
) -> Recorded | Refused:
    """T3: an attempt's end, and what follows, guarded by the state of the run and the epoch.

    `arrived`: names of the run's signals that nobody has taken. A step that would wait for one of them isn't parked.
    """
    if head is None:
        return Refused("unknown")
    mine = head.epoch == result.epoch and head.worker == result.worker
    grant = Grant(life(head.epoch) + 1, 1, now) if result.take_next else None
    if head.status not in OPEN:
        # A commit whose answer was lost is asked for again: it stands, and so does what it took along.
        return Recorded(grant, now) if mine and head.status is result.status else Refused("recorded")
    if head.status is StepStatus.WAITING:
        return Refused("stale")  # its attempt goes on when it is woken, and by no claim from before
    forward = result.key.phase is Phase.DO
    # A claim needn't be on the disk: a database that crashed may know neither of it nor of the run's beginning.
    begins = forward and head.run is RunStatus.PENDING
    if not begins and head.run is not (RunStatus.RUNNING if forward else RunStatus.COMPENSATING):
        return Refused("ended")
    held = mine and head.status is StepStatus.RUNNING
    succeeded = result.status in (StepStatus.COMPLETED, StepStatus.SKIPPED, StepStatus.COMPENSATED)
    if not held and (result.strict or not succeeded):
        return Refused("stale")
    if result.status is StepStatus.WAITING:
        if arrived and set(result.waits_for).intersection(arrived):
            return Refused("arrived")
        _park(head, result, changes, forward=forward)
        return Recorded(at=now)
    if result.status is StepStatus.READY:
        _put_back(head, result, changes, now=now, grace=grace)
        return Recorded(at=now)
    _end(head, result, changes, now=now, held=held)
    if patch := _of_run(result, now=now, begins=begins):
        changes.runs.append((head.key.workflow_id, patch))
    if result.next is not None:
        _open(result.next, head, result, changes, now=now, grace=grace)
    workflow_id = head.key.workflow_id
    changes.variables.extend((workflow_id, name, value) for name, value in result.variables.items())
    return Recorded(grant, now)


def _put_back(head: Head, result: StepResult, changes: Changes, *, now: float, grace: float) -> None:
    """The attempt has failed, and there will be another one."""
    not_before = now + result.delay
    changes.steps.append(
        (
            head.key,
            {
                "status": StepStatus.READY,
                "worker": None,
                "not_before": not_before,
                "wake_at": not_before + grace,
                "error": result.error,
            },
        )
    )


def _end(head: Head, result: StepResult, changes: Changes, *, now: float, held: bool) -> None:
    """The step is over; where it was undone, so is what was done."""
    skipped = result.status is StepStatus.SKIPPED
    changes.steps.append(
        (
            head.key,
            {
                "status": result.status,
                "worker": result.worker,
                "attempt": 0 if skipped else max(head.attempt, result.attempt),
                "input": result.input,
                "output": result.output,
                # A late result ends whatever claim holds the step now: without a new epoch that claim, when it is the
                # same worker's, would take this result for its own.
                "epoch": head.epoch if held else head.epoch + 1,
                "error": result.error,
                "revision": result.revision,
                "undo_topic": result.undo_topic,
                "usage": result.usage,
                "completed_at": now,
            },
        )
    )
    if result.key.phase is Phase.UNDO:
        changes.steps.append((head.key._replace(phase=Phase.DO), {"status": result.status}))


def _of_run(result: StepResult, *, now: float, begins: bool) -> Patch:
    """What the end of its step changes of the run itself."""
    patch: Patch = {"status": RunStatus.RUNNING, "started_at": now} if begins else {}
    if result.run is None:
        return patch
    patch["status"] = result.run
    if result.ending is not None:
        patch["ending"] = result.ending
    if result.run_error is not None:
        patch["error"] = result.run_error
    if result.run in RUN_ENDED:
        patch["completed_at"] = now
    return patch


def _open(
    step: NextStep, head: Head, result: StepResult, changes: Changes, *, now: float, grace: float
) -> None:
    """The step that follows is the run's cursor: ready for whoever claims it, or taken by who has the result."""
    taken = result.take_next
    changes.added.append(
        StepRecord(
            *step.key,
            seq=head.seq + 1,
            activity=step.activity,
            topic=step.topic,
            status=StepStatus.RUNNING if taken else StepStatus.READY,
            epoch=life(head.epoch) + taken,
            attempt=1 if taken else 0,
            worker=result.worker if taken else None,
            wake_at=now + grace,
            created_at=now,
            started_at=now if taken else None,
        )
    )


def _park(head: Head, result: StepResult, changes: Changes, *, forward: bool) -> None:
    """Nobody works on the step until what it waits for is there. The attempt goes on then: it doesn't count twice."""
    changes.steps.append(
        (
            head.key,
            {
                "status": StepStatus.WAITING,
                "worker": None,
                "attempt": max(head.attempt - 1, 0),
                "waits_for": json.dumps(result.waits_for).encode(),
                "wake_at": NEVER if result.until is None else result.until,
            },
        )
    )
    if forward:
        changes.runs.append((head.key.workflow_id, {"status": RunStatus.WAITING}))


def wake(key: StepKey, changes: Changes, *, now: float, grace: float = 0.0) -> None:
    """A waiting step is ready again, and due for a message at once: the sweep's, or after `grace` whoever's it is."""
    ready: Patch = {"status": StepStatus.READY, "waits_for": None, "not_before": now, "wake_at": now + grace}
    changes.steps.append((key, ready))


def release(
    head: Head | None, worker: str, epoch: int, changes: Changes, *, now: float, grace: float
) -> bool:
    """Give a claimed step back unharmed: the attempt that a shutdown cut short doesn't count.

    One that was claimed only to be recorded as lost keeps its attempts: they did run.
    """
    if head is None or (head.worker, head.epoch, head.status) != (worker, epoch, StepStatus.RUNNING):
        return False
    changes.steps.append(
        (
            head.key,
            {
                "status": StepStatus.READY,
                "worker": None,
                "attempt": head.attempt if head.wake_at == NEVER else max(head.attempt - 1, 0),
                "not_before": now,
                "wake_at": now + grace,
            },
        )
    )
    return True


def free(key: StepKey, changes: Changes, *, now: float) -> None:
    """A running step whose worker is lost is ready again, and due for a message at once. Its attempt counts."""
    changes.steps.append(
        (key, {"status": StepStatus.READY, "worker": None, "not_before": now, "wake_at": now})
    )


def postpone(key: StepKey, changes: Changes, *, now: float, due_at: float, grace: float) -> None:
    """A ready step whose message is being sent now: the sweeper looks at it again after the grace time.

    The longer nobody has claimed it since `due_at`, the later: it is sent at doubling intervals, up to 30 grace times,
    and beyond these where its message can't be lost, see `is_due_once_more`.
    A transport that can't tell a repeated message would else hold as many of each as its backlog has grace times.
    """
    changes.steps.append((key, {"wake_at": now + min(max(now - due_at, grace), MOST_GRACES * grace)}))


def is_resendable(*, wake_at: float, due_at: float, now: float, grace: float) -> bool:
    """Whether a ready step that was sent again may be sent once more before its time, since its message is lost.

    Once in a grace time, that is. When it was sent last follows from when it is to be sent next, see `postpone`:
    max(wake_at - 30 graces, min(wake_at - grace, halfway from due_at to wake_at)).
    """
    return wake_at <= now + (MOST_GRACES - 1) * grace and wake_at + due_at <= 2 * (now - grace)


def is_due_once_more(*, due_at: float, now: float, grace: float) -> bool:
    """Whether a ready step is to be sent again though its topic has a message for each of its steps.

    One of them is mostly its own, so it goes on at doubling intervals beyond 30 grace times: sent at those looks before
    which its age has passed another power of two, at one or two of them. Else a topic that nobody serves would fill its
    broker. Never sending it would be wrong: another step may have two.
    """
    age = now - due_at
    before = age - 2 * MOST_GRACES * grace  # also of a sweep that is late by half of that
    return before < grace or math.frexp(age / grace)[1] > math.frexp(before / grace)[1]


def adopted(row: StepRecord, *, now: float, grace: float) -> StepRecord:
    """A row of a run that began in another store, whose instants mean nothing here: what is done is done now."""
    if row.status in OPEN:
        return replace(row, created_at=now, not_before=0.0, wake_at=now + grace)
    return replace(row, created_at=now, completed_at=now)


def life(epoch: int) -> int:
    """The epoch at which steps start that follow one with `epoch`."""
    return epoch - epoch % _LIFE


def next_life(epoch: int) -> int:
    """The epoch at which undos start that an operator has begun anew, where that of any step is at most `epoch`."""
    return life(epoch) + _LIFE
