"""What comes from outside a run: cancel, deadline, retry, grants, answers. Pure, like the ledger; gives its changes."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

from pydantic import ValidationError
from pydantic_core import from_json

from paigeant import codec
from paigeant.errors import InvalidDefinition, InvalidTransition, RequestNotFound
from paigeant.folding import fold
from paigeant.ledger import OPEN, Changes, Patch, next_life, wake
from paigeant.routing import Undo, turn_round
from paigeant.slip import RUN_ENDED, Compensation, Phase, RunStatus, StepStatus
from paigeant.store import Request, RunDetail, StepKey, StepRecord

__all__ = ["answers", "done_anew", "expire", "grant", "resume", "stop"]


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
        # An answer that isn't about an approval is kept within an object, which nobody has given.
        found = from_json(request.answer)
        given = found["value"] if isinstance(found, dict) and found.keys() == {"value"} else found
        raise InvalidTransition(
            f"request '{request_id}' has been answered{by} already: {codec.dump(given).decode()[:200]}"
        )
    if not request.is_open:
        raise InvalidTransition(
            f"nobody waits for an answer to request '{request_id}' any more: its time is up, or its step has ended"
        )
    return True


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
    if run.status is RunStatus.FAILED:
        failed = [row for row in detail.steps if row.status is StepStatus.FAILED]
        if not failed:
            raise InvalidTransition(f"run '{run.id}' failed before its first step; dispatch it again")
        # A new epoch: what was sent before tells of the deadline, and must not pass for what is sent now.
        changes.steps.append((failed[-1].key, {**ready, "epoch": failed[-1].epoch + 1}))
        changes.renewed.append(failed[-1].key)
        # The deadline has had its say; an operator who retries wants the run done.
        changes.runs.append(
            (
                run.id,
                {
                    "status": RunStatus.RUNNING,
                    "ending": None,
                    "error": None,
                    "deadline": None,
                    "completed_at": None,
                },
            )
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
        epoch = next_life(max(row.epoch for row in detail.steps))
        changes.added.append(_ready_undo(run.id, undo, seq=last + 1, now=now, epoch=epoch))
        # It is undone for the same reason as before, which its error goes on telling.
        changes.runs.append((run.id, {"status": RunStatus.COMPENSATING, "completed_at": None}))
        return RunStatus.COMPENSATING
    hint = "dispatch it again under another id" if run.status in RUN_ENDED else "it is still open"
    raise InvalidTransition(
        f"run '{run.id}' is {run.status.value}; only failed and compensation_failed runs can be retried: {hint}"
    )


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
