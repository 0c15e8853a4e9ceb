"""What a run waits for, as commands show it: its signals, the requests to people, the steps that wait for them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pydantic_core import from_json

from paigeant import ledger
from paigeant.cli import console
from paigeant.identity import GRANT_SIGNAL
from paigeant.slip import Phase, StepStatus
from paigeant.store import REQUEST_SIGNAL, Request, Signal, StepRecord

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.text import Text

__all__ = [
    "COLUMNS",
    "facts_of",
    "outcome",
    "request_as_json",
    "rows_of",
    "signal_as_json",
    "tables_of",
    "waiting",
    "waits_for",
    "wakes_at",
]

COLUMNS = ["id", "kind", "asked", "run", "step", "since", "until"]
"""What a listing of requests shows of each."""


def signal_as_json(signal: Signal) -> dict[str, Any]:
    """A signal, with who sent it and the step that took it."""
    return {
        "name": signal.name,
        "value": from_json(signal.value),
        "created_at": console.instant(signal.created_at),
        "sender": signal.sender,
        "taken_by": signal.taken_by,
    }


def request_as_json(request: Request) -> dict[str, Any]:
    """A request as it stands. `answer` is null until somebody has answered; `open`: its step still waits for it."""
    return {
        "id": request.id,
        "kind": request.kind,
        "workflow_id": request.workflow_id,
        "step": request.step,
        "name": request.name,
        "asked": from_json(request.asked),
        "created_at": console.instant(request.created_at),
        "expires_at": console.instant(request.expires_at),
        "open": request.is_open,
        "answer": None if request.answer is None else from_json(request.answer),
        "answered_by": request.answered_by or None,
        "answered_at": console.instant(request.answered_at),
    }


def rows_of(requests: Iterable[Request], now: float) -> list[list[Text | str]]:
    """Requests as rows of a listing: id, kind, what is asked, run, step, since when, until when."""
    return [
        [
            console.plain(request.id),
            console.plain(request.kind),
            console.plain(_asked(request)),
            console.plain(request.workflow_id),
            console.plain(request.step),
            _roughly(now - request.created_at),
            _left(request, now),
        ]
        for request in requests
    ]


def facts_of(request: Request) -> dict[str, Text | str]:
    """A request whole, by the names of its parts."""
    found: dict[str, Text | str] = {
        "id": console.plain(request.id),
        "kind": console.plain(request.kind),
        "run": console.plain(request.workflow_id),
        "step": console.plain(request.step),
        "asked": console.plain(request.name),
    }
    asked = from_json(request.asked)
    about = asked.get("about") if _is_question(asked) else asked
    if about is not None:
        found["about"] = console.plain(console.shown(about, 100_000))
    found["since"] = console.local(request.created_at)
    if request.expires_at is not None:
        found["until"] = console.local(request.expires_at)
    found["state"] = console.plain(outcome(request))
    if request.answered_at is not None:
        found["answered"] = console.local(request.answered_at)
    if request.answer is not None:
        found["answer"] = console.plain(console.shown(from_json(request.answer), 100_000))
    return found


def outcome(request: Request) -> str:
    """In a few words: whether it is open, or how it was answered and by whom."""
    if request.answer is None:
        return "open" if request.is_open else "closed: nobody waits for an answer any more"
    answer = from_json(request.answer)
    word = "answered"
    if request.kind == "approval" and isinstance(answer, Mapping):
        word = "approved" if answer.get("approved") is True else "denied"
    elif isinstance(answer, Mapping) and "denied" in answer:
        word = "denied"
    return f"{word} by {request.answered_by}" if request.answered_by else word


def tables_of(signals: Iterable[Signal], requests: Sequence[Request]) -> list[RenderableType]:
    """What a run asked, and the signals that it got, for a person; nothing where there are none."""
    tables: list[RenderableType] = []
    if requests:
        asked = [
            [console.plain(request.id), console.plain(_asked(request)), console.plain(outcome(request))]
            for request in requests
        ]
        tables.append(console.table(["request", "asked", "state"], asked, cut=["asked", "state"]))
    sent = [
        [
            console.plain(signal.name),
            console.plain(console.shown(from_json(signal.value), 120)),
            console.plain(signal.sender),
            console.plain(signal.taken_by or "not taken"),
        ]
        for signal in signals
        if not signal.name.startswith(REQUEST_SIGNAL)  # an answer, which stands with its request
    ]
    if sent:
        tables.append(console.table(["signal", "value", "sender", "taken by"], sent, cut=["value", "sender"]))
    return tables


def waits_for(row: StepRecord) -> list[str]:
    """The names of the signals of which one wakes a step that waits; none for one that doesn't, or that sleeps."""
    if row.status is not StepStatus.WAITING or row.waits_for is None:
        return []
    return list(from_json(row.waits_for))


def wakes_at(row: StepRecord) -> float | None:
    """The instant at which a step that waits goes on at the latest; None without one."""
    return row.wake_at if row.status is StepStatus.WAITING and row.wake_at < ledger.NEVER else None


def waiting(row: StepRecord, requests: Iterable[Request], *, now: float) -> str:
    """What a step waits for, in words; empty for one that doesn't wait.

    One that is ready waits for its time, and then for a worker: which one can do it, an operator who looks for it is
    told, since of a worker without the code nothing but its log tells.
    """
    if row.status is StepStatus.READY:
        if row.due_at > now:
            return f"until {console.local(row.due_at)}"
        code = "the compensation of" if row.phase is Phase.UNDO else "activity"
        since = _roughly(now - row.due_at)
        return f"a worker in topic '{row.topic}' that has {code} '{row.activity}', for {since} so far"
    if row.status is not StepStatus.WAITING:
        return ""
    asked = {request.signal: request.name for request in requests}
    names = [
        f"an answer to '{asked.get(name, name)}'"
        if name.startswith(REQUEST_SIGNAL)
        else "a fresh grant"
        if name == GRANT_SIGNAL
        else f"signal '{name}'"
        for name in waits_for(row)
    ]
    until = wakes_at(row)
    time = "" if until is None else f"until {console.local(until)}"
    return ", ".join(part for part in (" or ".join(names), time) if part)


def _is_question(asked: Any) -> bool:
    """Whether it is what `StepContext` asks: a question, and perhaps what it is about."""
    return isinstance(asked, Mapping) and set(asked) <= {"question", "about"}


def _asked(request: Request) -> str:
    asked = from_json(request.asked)
    return request.name if _is_question(asked) else f"{request.name} {console.shown(asked, 200)}"


def _left(request: Request, now: float) -> str:
    if not request.is_open:
        return outcome(request)
    return "" if request.expires_at is None else f"in {_roughly(request.expires_at - now)}"


def _roughly(seconds: float) -> str:
    """A time span in its largest unit alone, as whoever answers needs to know it."""
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds // length:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"
