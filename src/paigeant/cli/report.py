"""A run as commands show it: as one JSON object, and as tables for people."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pydantic_core import from_json

from paigeant import folding
from paigeant.cli import console, usage, waiting
from paigeant.identity import Mandate
from paigeant.run import result_of, usage_of
from paigeant.slip import Phase
from paigeant.store import Request, RunDetail, RunRecord, StepRecord

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.text import Text

__all__ = ["as_json", "as_row", "as_tables", "summary"]


def as_json(
    detail: RunDetail, requests: Sequence[Request] = (), *, units: usage.Units | None = None
) -> dict[str, Any]:
    """The run with its steps, undos, variables, signals and requests. A step that is still to come isn't among them.

    With `units` each step has those that it recorded.
    """
    run = detail.run
    return {
        "id": run.id,
        "workflow": run.workflow,
        "status": run.status.value,
        "input": from_json(run.input),
        "output": result_of(detail).output,
        "error": run.error,
        "trace_id": run.trace_id,
        "usage": usage_of(detail).as_json(),
        "steps": [_step(row, units) for row in detail.steps if row.phase is Phase.DO],
        "compensations": [_undo(row, units) for row in detail.steps if row.phase is Phase.UNDO],
        "variables": {name: from_json(value) for name, value in detail.variables.items()},
        "signals": [waiting.signal_as_json(signal) for signal in detail.signals],
        "requests": [waiting.request_as_json(request) for request in requests],
        "on_behalf_of": _person(run),
        "correlation_id": run.correlation_id,
        "deadline": console.instant(run.deadline),
        "created_at": console.instant(run.created_at),
        "started_at": console.instant(run.started_at),
        "completed_at": console.instant(run.completed_at),
    }


def _person(run: RunRecord) -> dict[str, Any] | None:
    """For whom the run acts, as its dispatch said."""
    mandate = Mandate.read(run.headers)
    if mandate is None:
        return None
    return {
        "subject": mandate.subject,
        "issuer": mandate.issuer,
        "scopes": mandate.scopes,
        "handle": mandate.handle,
    }


def summary(run: RunRecord) -> dict[str, Any]:
    """The run without its steps, input and output, for listings."""
    return {
        "id": run.id,
        "workflow": run.workflow,
        "status": run.status.value,
        "error": run.error,
        "trace_id": run.trace_id,
        "correlation_id": run.correlation_id,
        "created_at": console.instant(run.created_at),
        "started_at": console.instant(run.started_at),
        "completed_at": console.instant(run.completed_at),
    }


def as_row(run: RunRecord) -> list[Text | str]:
    """The run as a row of a listing: id, workflow, status, when it was created, how long it took, error."""
    took = None if run.completed_at is None else run.completed_at - run.created_at
    return [
        console.plain(run.id),
        console.plain(run.workflow),
        console.status(run.status),
        console.local(run.created_at),
        console.seconds(took),
        console.plain(run.error),
    ]


def as_tables(
    detail: RunDetail, requests: Sequence[Request] = (), *, now: float, units: usage.Units | None = None
) -> RenderableType:
    """The run for a person: what it is and waits for, its steps with attempts and times, what is to come, its values.

    What agents used stands below that, and the `units` that steps have recorded.
    """
    from rich.console import Group
    from rich.text import Text

    run = detail.run
    took = console.seconds((run.completed_at or now) - run.created_at)
    output = result_of(detail).output
    found: dict[str, Text | str] = {
        "run": console.plain(run.id),
        "workflow": console.plain(run.workflow),
        "status": console.status(run.status),
        "created": f"{console.local(run.created_at)}, {took}{'' if run.completed_at else ' so far'}",
        "input": console.plain(console.shown(from_json(run.input), 200)),
    }
    if (person := _person(run)) is not None:
        found["on behalf of"] = console.plain(f"{person['subject']} ({person['issuer']})")
    if output is not None:
        found["output"] = console.plain(console.shown(output, 200))
    if run.error:
        found["error"] = console.plain(run.error, "red")
    for row in detail.steps:
        if (waits := waiting.waiting(row, requests, now=now)) and not detail.run.completed_at:
            found["waits for"] = console.plain(waits)
    parts: list[RenderableType] = [console.facts(found), Text()]
    rows = [*(_row(row, now) for row in detail.steps), *_to_come(detail)]
    columns = ["step", "activity", "status", "attempts", "took", "result"]
    parts.append(console.table(columns, rows, cut=["activity", "result"]))
    for table in waiting.tables_of(detail.signals, requests):
        parts += [Text(), table]
    if detail.variables:
        variables = [
            [console.plain(name), console.plain(console.shown(from_json(value), 120))]
            for name, value in sorted(detail.variables.items())
        ]
        parts += [Text(), console.table(["variable", "value"], variables, cut=["value"])]
    for table in usage.tables_of(detail, units):
        parts += [Text(), table]
    return Group(*parts)


def _step(row: StepRecord, units: usage.Units | None) -> dict[str, Any]:
    return {
        "id": row.step,
        "activity": row.activity,
        "status": row.status.value,
        "attempts": row.attempt,
        "output": None if row.output is None else from_json(row.output),
        "error": row.error,
        "started_at": console.instant(row.started_at),
        "completed_at": console.instant(row.completed_at),
        "input": None if row.input is None else from_json(row.input),
        "usage": usage.step_as_json(row),
        "worker": row.worker,
        "waits_for": waiting.waits_for(row),
        "wakes_at": console.instant(waiting.wakes_at(row)),
        **usage.units_as_json(row, units),
    }


def _undo(row: StepRecord, units: usage.Units | None) -> dict[str, Any]:
    return {
        "id": row.step,
        "activity": row.activity,
        "status": row.status.value,
        "attempts": row.attempt,
        "error": row.error,
        "started_at": console.instant(row.started_at),
        "completed_at": console.instant(row.completed_at),
        "usage": usage.step_as_json(row),
        **usage.units_as_json(row, units),
    }


def _row(row: StepRecord, now: float) -> list[Text | str]:
    undo = row.phase is Phase.UNDO
    took = None if row.started_at is None else (row.completed_at or now) - row.started_at
    if row.error:
        found = console.plain(row.error, "red")
    else:
        found = console.plain("" if row.output is None else console.shown(from_json(row.output)))
    return [
        console.plain(f"undo {row.step}" if undo else row.step, "magenta" if undo else ""),
        console.plain(row.activity),
        console.status(row.status),
        str(row.attempt) if row.attempt else "",
        console.seconds(took),
        found,
    ]


def _to_come(detail: RunDetail) -> list[list[Text | str]]:
    if detail.run.completed_at is not None:
        return []
    slip, _ = folding.fold(detail, inline_bytes=0)
    there = {row.step for row in detail.steps if row.phase is Phase.DO}
    left = [step for step in slip.itinerary if step.id not in there] if slip.ending is None else []
    return [
        [
            console.plain(step.id, "dim"),
            console.plain(step.activity, "dim"),
            console.plain("to come", "dim"),
            "",
            "",
            "",
        ]
        for step in left
    ]
