"""What may change in the rows of a run. Pure: rows and a request in, changes or a refusal out.

Both stores lock and load the rows, ask here, and write what they are told, in one transaction. So the guards that keep
a run correct (compare-and-set on run state, cursor, step state and epoch) stand here once. `fold` gives back the slip
and the payload of a run from its rows alone: what a message carried is never needed to go on.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

from pydantic import TypeAdapter, ValidationError
from pydantic_core import from_json

from paigeant import codec
from paigeant.errors import InvalidDefinition, InvalidTransition, RequestNotFound
from paigeant.routing import Undo, turn_round
from paigeant.slip import RUN_ENDED, Compensation, Phase, Revision, RoutingSlip, RunStatus, StepStatus
from paigeant.store import (
    ClaimRequest,
    Grant,
    NextStep,
    Recorded,
    Refused,
    Request,
    RunDetail,
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
    "adopted",
    "answers",
    "claim",
    "done_anew",
    "expire",
    "fold",
    "foreseen_for_claim",
    "foreseen_for_record",
    "free",
    "grant",
    "is_due_once_more",
    "is_resendable",
    "life",
    "pack_revision",
    "pack_slip",
    "postpone",
    "queued_since",
    "record",
    "release",
    "resume",
    "stop",
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


def done_anew(units: Mapping[str, bytes]) -> list[str]:
    """The names of those units of a step that an operator who takes it up again wants to have done anew.

    They are waits whose time was up and requests that were denied, with all that belongs to them, so that the question
    is asked once more; and what keeps an answer from being asked for again. What a model was told stays as it is.
    """
    over = [
        name
        for name, value in units.items()
        if f"{name}!told" not in units
        and (
            (value == b"null" and f"{name}!until" in units)
            or (f"{name}!token" in units and _is_denied(name, value))
        )
    ]
    held = [name for name in units if name.endswith("!held") and f"{name[: -len('!held')]}!refused" in units]
    return held + [unit for unit in units for name in over if _belongs(unit, name)]


_MARK = re.compile(
    r"!(?:token|until|told|held|refused|decision|failed|begun(?:#\d+)?|\d+)(?:!.*)?", re.DOTALL
)


def _belongs(unit: str, name: str) -> bool:
    """Whether `unit` is the unit `name`, or tells of it; a name of another one may begin with all of this one's."""
    return unit.startswith(name) and (unit == name or _MARK.fullmatch(unit, len(name)) is not None)


def _is_denied(name: str, value: bytes) -> bool:
    """Whether a recorded answer to a request ended its step: there is to be none, or a lost outcome stays lost."""
    answer = from_json(value)
    found = answer.get("value") if isinstance(answer, dict) else None
    if not isinstance(found, dict):
        return False
    return "denied" in found or (name.endswith("!decision") and found.get("approved") is False)


def wake(key: StepKey, changes: Changes, *, now: float, grace: float = 0.0) -> None:
    """A waiting step is ready again, and due for a message at once: the sweep's, or after `grace` whoever's it is."""
    ready: Patch = {"status": StepStatus.READY, "waits_for": None, "not_before": now, "wake_at": now + grace}
    changes.steps.append((key, ready))


def grant(
    run: str,
    waiting: Sequence[StepKey],
    headers: Mapping[str, str] | None,
    changes: Changes,
    *,
    now: float,
    grace: float,
) -> None:
    """A fresh grant is there for the steps that wait for one: named by the run's new headers, or a token that is sent.

    Raises InvalidTransition when nobody is there to take a token.
    """
    if headers is None and not waiting:
        raise InvalidTransition(
            f"no step of run '{run}' waits for a grant now, and a token isn't kept; give it when `runs show` says that "
            "one does, or hand over a grant handle"
        )
    for key in waiting:
        wake(key, changes, now=now, grace=grace if headers is None else 0.0)
    if headers is not None:
        changes.runs.append((run, {"headers": dict(headers)}))


def answers(request_id: str, request: Request | None, answer: bytes) -> bool:
    """Whether this answer is to be kept; False when it is there already.

    Raises RequestNotFound, and InvalidTransition when there is another one, or nobody waits for it any more.
    """
    if request is None:
        raise RequestNotFound(request_id)
    if request.answer is not None:
        if codec.dump_sorted(from_json(request.answer)) == codec.dump_sorted(from_json(answer)):
            return False
        by = f" by {request.answered_by}" if request.answered_by else ""
        raise InvalidTransition(
            f"request '{request_id}' has been answered{by} already: {request.answer.decode()[:200]}"
        )
    if not request.is_open:
        raise InvalidTransition(
            f"nobody waits for an answer to request '{request_id}' any more: its time is up, or its step has ended"
        )
    return True


def release(
    head: Head | None, worker: str, epoch: int, changes: Changes, *, now: float, grace: float
) -> bool:
    """Give a claimed step back unharmed: the attempt that a shutdown cut short doesn't count."""
    if head is None or (head.worker, head.epoch, head.status) != (worker, epoch, StepStatus.RUNNING):
        return False
    changes.steps.append(
        (
            head.key,
            {
                "status": StepStatus.READY,
                "worker": None,
                "attempt": max(head.attempt - 1, 0),
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


def stop(
    detail: RunDetail, ending: RunStatus, error: str, changes: Changes, *, now: float, inline_bytes: int
) -> RunStatus:
    """Turn a run round: its open step ends failed, what was recorded is undone, last first. Gives the run's state.

    Raises InvalidTransition when the run has ended. A run that is being undone already goes on being undone.
    """
    run = detail.run
    if run.status in RUN_ENDED:
        raise InvalidTransition(
            f"run '{run.id}' has ended {run.status.value}; only an open run can be cancelled"
        )
    if run.status is RunStatus.COMPENSATING:
        return run.status
    slip, _ = fold(detail, inline_bytes=inline_bytes)
    last = max((row.seq for row in detail.steps), default=-1)
    for row in detail.steps:
        if row.status in OPEN:
            changes.steps.append(
                (
                    row.key,
                    # A new epoch: the worker that holds the step must not take this end for its own.
                    {
                        "status": StepStatus.FAILED,
                        "epoch": row.epoch + 1,
                        "error": error,
                        "completed_at": now,
                    },
                )
            )
    move = turn_round(slip, ending)
    if isinstance(move, Undo):
        status = RunStatus.COMPENSATING
        changes.added.append(_ready_undo(run.id, move.undo, seq=last + 1, now=now))
    else:
        status = move.run
    patch: Patch = {"status": status, "ending": ending.value, "error": error}
    if status in RUN_ENDED:
        patch["completed_at"] = now
    changes.runs.append((run.id, patch))
    return status


def expire(detail: RunDetail, changes: Changes, *, now: float, inline_bytes: int) -> RunStatus | None:
    """End a run that is over its deadline like one whose step failed; gives its state, None when it isn't over."""
    run = detail.run
    late = run.deadline is not None and run.deadline <= now
    if not late or run.status in RUN_ENDED or run.status is RunStatus.COMPENSATING:
        return None
    try:
        return stop(
            detail,
            RunStatus.FAILED,
            "DeadlineExceeded: the run was not done by its deadline",
            changes,
            now=now,
            inline_bytes=inline_bytes,
        )
    except (ValidationError, InvalidDefinition):
        return None  # a slip that newer code has written: for that to end, and no reason to end no other run


def resume(detail: RunDetail, changes: Changes, *, now: float, inline_bytes: int) -> RunStatus:
    """Take an ended run up again where it stopped, with fresh attempts: an operator's `runs retry`.

    The only exit from an ended state. Raises InvalidTransition unless the run is failed or compensation_failed.
    """
    run = detail.run
    ready: Patch = {
        "status": StepStatus.READY,
        "attempt": 0,
        "worker": None,
        "not_before": now,
        "wake_at": now,
        "error": None,
        "completed_at": None,
    }
    reopened: Patch = {"error": None, "completed_at": None}
    if run.status is RunStatus.FAILED:
        failed = [row for row in detail.steps if row.status is StepStatus.FAILED]
        if not failed:
            raise InvalidTransition(f"run '{run.id}' failed before its first step; dispatch it again")
        # A new epoch: what was sent before tells of the deadline, and must not pass for what is sent now.
        changes.steps.append((failed[-1].key, {**ready, "epoch": failed[-1].epoch + 1}))
        changes.renewed.append(failed[-1].key)
        # The deadline has had its say; an operator who retries wants the run done.
        changes.runs.append(
            (run.id, {**reopened, "status": RunStatus.RUNNING, "ending": None, "deadline": None})
        )
        return RunStatus.RUNNING
    if run.status is RunStatus.COMPENSATION_FAILED:
        unsettled = {
            row.step
            for row in detail.steps
            if row.phase is Phase.UNDO and row.status is StepStatus.COMPENSATION_FAILED
        }
        for step in unsettled:
            changes.dropped.append(StepKey(run.id, step, Phase.UNDO))
            changes.renewed.append(StepKey(run.id, step, Phase.UNDO))
            changes.steps.append((StepKey(run.id, step, Phase.DO), {"status": StepStatus.COMPLETED}))
        rows = tuple(
            replace(row, status=StepStatus.COMPLETED) if row.step in unsettled else row
            for row in detail.steps
            if not (row.phase is Phase.UNDO and row.step in unsettled)
        )
        slip, _ = fold(replace(detail, steps=rows), inline_bytes=inline_bytes)
        undo = slip.compensations[-1]
        last = max(row.seq for row in detail.steps)
        epoch = life(max(row.epoch for row in detail.steps)) + _LIFE
        changes.added.append(_ready_undo(run.id, undo, seq=last + 1, now=now, epoch=epoch))
        changes.runs.append((run.id, {**reopened, "status": RunStatus.COMPENSATING}))
        return RunStatus.COMPENSATING
    hint = "dispatch it again under another id" if run.status in RUN_ENDED else "it is still open"
    raise InvalidTransition(
        f"run '{run.id}' is {run.status.value}; only failed and compensation_failed runs can be retried: {hint}"
    )


def life(epoch: int) -> int:
    """The epoch at which steps start that follow one with `epoch`."""
    return epoch - epoch % _LIFE


def _ready_undo(workflow_id: str, undo: Compensation, *, seq: int, now: float, epoch: int = 0) -> StepRecord:
    return StepRecord(
        workflow_id,
        undo.step_id,
        Phase.UNDO,
        seq=seq,
        activity=undo.activity,
        topic=undo.topic,
        status=StepStatus.READY,
        epoch=epoch,
        wake_at=now,
        created_at=now,
    )


@cache
def _slips() -> TypeAdapter[RoutingSlip]:
    return TypeAdapter(RoutingSlip)


@cache
def _revisions() -> TypeAdapter[Revision]:
    return TypeAdapter(Revision)


def pack_slip(slip: RoutingSlip) -> bytes:
    """The plan of a run as it is stored."""
    return _slips().dump_json(slip, exclude_defaults=True)


def pack_revision(revision: Revision) -> bytes:
    """What a step decided about the rest of its run, as it is stored."""
    return _revisions().dump_json(revision, exclude_defaults=True)


def fold(detail: RunDetail, *, inline_bytes: int) -> tuple[RoutingSlip, dict[str, Any]]:
    """The slip and the payload of a run, from its rows. Outputs above `inline_bytes` are left to be read when used."""
    slip = _slips().validate_json(detail.run.slip)
    # The row's deadline is the one that counts: a retry by an operator takes it away.
    slip = replace(slip, deadline=detail.run.deadline)
    outputs: dict[str, Any] = {}
    undone: list[StepRecord] = []
    for row in sorted(detail.steps, key=lambda row: row.seq):
        if row.phase is Phase.UNDO:
            undone.append(row)
        elif row.status not in OPEN and row.status is not StepStatus.FAILED:
            stored = row.step in detail.stored or len(row.output or b"") > inline_bytes
            slip = slip.mark_complete(
                status=StepStatus.SKIPPED if row.status is StepStatus.SKIPPED else StepStatus.COMPLETED,
                compensation=Compensation(row.step, row.activity, row.undo_topic)
                if row.undo_topic is not None
                else None,
                revision=None if row.revision is None else _revisions().validate_json(row.revision),
                stored=stored,
            )
            if row.output is not None and not stored:
                outputs[row.step] = from_json(row.output)
    match detail.run.ending:
        case "failed" | "cancelled" as ending:
            slip = slip.begin_undo(ending)
        case _:
            pass
    for row in undone:
        if row.status not in OPEN:
            slip = slip.mark_undone(succeeded=row.status is StepStatus.COMPENSATED, step_id=row.step)
    return slip, merged(from_json(detail.run.input), detail.variables, outputs)


def merged(
    payload: Mapping[str, Any],
    variables: Mapping[str, bytes],
    outputs: Mapping[str, Any],
    taken: Iterable[str] = (),
) -> dict[str, Any]:
    """`payload` with variables and outputs of steps put over it; an output stands above a variable of its name.

    `taken`: ids of steps whose outputs are in `payload` already.
    """
    kept = set(taken)
    fresh = {name: from_json(value) for name, value in variables.items() if name not in kept}
    return {**payload, **fresh, **outputs}
