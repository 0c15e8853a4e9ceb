"""The slip and the payload of a run, from its rows alone: what a message carried is never needed to go on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import cache
from typing import Any

from pydantic import TypeAdapter
from pydantic_core import from_json

from paigeant.ledger import OPEN
from paigeant.slip import Compensation, Phase, Revision, RoutingSlip, StepStatus
from paigeant.store import RunDetail, StepRecord

__all__ = ["fold", "merged", "pack_revision", "pack_slip"]


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
