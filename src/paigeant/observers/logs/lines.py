"""Lines: what an event or a record of `logging` says, as fields that any destination can write, without secrets."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from functools import lru_cache
from json.encoder import encode_basestring_ascii as quoted
from typing import Any, Literal, Protocol

import structlog
from structlog.typing import EventDict, Processor, WrappedLogger

from paigeant.clock import as_datetime
from paigeant.errors import ConfigurationError
from paigeant.observer import CURRENT, STEP_IDS, Event, EventName
from paigeant.redaction import Redactor
from paigeant.texts import printable

__all__ = [
    "HAD",
    "HEADS",
    "IDS",
    "LEVELS",
    "RECORD",
    "Destination",
    "Format",
    "encoded",
    "fields_of",
    "level_name",
    "level_number",
    "redacting",
    "renderer",
    "short",
    "text_of",
    "wanted_at",
    "with_extra",
    "with_step",
]

Format = Literal["console", "json"]

LEVELS: Mapping[EventName, int] = {
    "run.dispatched": logging.INFO,
    "run.adopted": logging.INFO,
    "run.completed": logging.INFO,
    "run.failed": logging.ERROR,
    "run.compensated": logging.WARNING,
    "run.compensation_failed": logging.ERROR,
    "run.cancelling": logging.INFO,
    "run.cancelled": logging.INFO,
    "run.expired": logging.WARNING,
    "run.retried": logging.INFO,
    "request.opened": logging.INFO,
    "request.answered": logging.INFO,
    "request.denied": logging.INFO,
    "signal.received": logging.INFO,
    "plan.refused": logging.WARNING,
    "delivery.claimed": logging.DEBUG,
    "delivery.duplicate": logging.DEBUG,
    "delivery.returned": logging.INFO,
    "delivery.rejected": logging.WARNING,
    "delivery.requeued": logging.INFO,
    "step.started": logging.DEBUG,
    "step.completed": logging.INFO,
    "step.skipped": logging.INFO,
    "step.retrying": logging.WARNING,
    "step.waiting": logging.INFO,
    "step.failed": logging.ERROR,
    "step.compensated": logging.INFO,
    "step.compensation_failed": logging.ERROR,
    "step.released": logging.INFO,
    "step.lost": logging.WARNING,
    "step.swept": logging.INFO,
    "worker.started": logging.INFO,
    "worker.stopping": logging.INFO,
    "worker.stopped": logging.INFO,
    "worker.lost": logging.WARNING,
}
"""How much each event matters."""

IDS = ("workflow_id", "workflow", "step", "activity", "attempt", "trace_id", "correlation_id", "worker")
"""What lines belong to."""

_ID_CHARACTERS = 200
_FIELD_CHARACTERS = 16_000
"""A longer text is cut, so that a line stays a line."""

_NAMES = {number: logging.getLevelName(number).lower() for number in (10, 20, 30, 40, 50)}


class Destination(Protocol):
    """Where lines go. Its `least` level is what it takes, `lost` counts what it could not write, in all."""

    least: int
    lost: int

    @property
    def place(self) -> str:
        """What it is, in a word."""
        ...

    def write(self, level: int, fields: Mapping[str, Any]) -> None:
        """Write a line by its fields, which are others' as well."""
        ...

    def tell(self, event: Event, at: float, redactor: Redactor) -> None:
        """Write the line of an event of its `least` level or above, which was told `at` by this process's clock."""
        ...


def text_of(event: Event, redactor: Redactor) -> str:
    """The line of an event behind time, level and name: the JSON text of members, each with a comma before it.

    A step has one line at least, so this is put together as text, without a dictionary or an encoder in between. It
    says what `fields_of` does. Ids are ours, and hold no secrets.
    """
    _, run, workflow, step, activity, attempt, trace, correlation, worker, seconds, error, _, more, _, _ = (
        event
    )
    # Others choose these, and their lines are kept for a while.
    is_short = (
        len(run) <= _ID_CHARACTERS
        and len(workflow) <= _ID_CHARACTERS
        and len(trace) <= _ID_CHARACTERS
        and len(correlation) <= _ID_CHARACTERS
    )
    if attempt and step and trace and is_short:
        before, behind = _of_run(run, workflow, trace, correlation, worker)
        text = f"{before}{_of_step(step, activity, attempt)}{behind}"
    else:
        ids = [(name, quoted(id) if isinstance(id, str) else id) for name, id in _ids(event)]
        text = "".join([f', "{name}": {id}' for name, id in ids])
    if seconds is not None:
        text = f'{text}, "seconds": {seconds:.6f}'
    if more or error is not None:
        text = f"{text}, {encoded(_beside(event, redactor))[1:-1]}"
    return text


def fields_of(event: Event, redactor: Redactor) -> dict[str, Any]:
    """The line of an event as values, without the time."""
    fields: dict[str, Any] = {"level": level_name(LEVELS[event.name]), "event": event.name}
    fields |= _ids(event)
    if event.seconds is not None:
        fields["seconds"] = round(event.seconds, 6)
    return fields | _beside(event, redactor)


# Lines of a run come soon after each other, and those of a step are of an activity that has been done before.
@lru_cache(maxsize=1024)
def _of_run(run: str, workflow: str, trace: str, correlation: str, worker: str) -> tuple[str, str]:
    """The members of a line that are the same for all steps of a run: those before the step's, those behind."""
    return (
        f', "workflow_id": {quoted(run)}, "workflow": {quoted(workflow)}',
        f', "trace_id": {quoted(trace)}, "correlation_id": {quoted(correlation)}, "worker": {quoted(worker)}',
    )


@lru_cache(maxsize=1024)
def _of_step(step: str, activity: str, attempt: int) -> str:
    return f', "step": {quoted(step)}, "activity": {quoted(activity)}, "attempt": {attempt}'


def _beside(event: Event, redactor: Redactor) -> dict[str, Any]:
    """What an event tells beside ids and seconds: what others have written, and so may hold secrets."""
    beside: dict[str, Any] = {}
    if event.error is not None:
        beside["error"] = _cut(redactor.text(event.error))
    if event.more:
        for name, value in event.more.items():
            if name not in _OWN and name not in beside:
                beside[name] = _bounded(redactor.value(name, value))
    return beside


def _ids(event: Event) -> list[tuple[str, Any]]:
    """The ids of an event by their names, those that it has."""
    return [(name, short(value)) for name, value in zip(IDS, event[1:9], strict=True) if value]


def redacting(redactor: Redactor) -> Processor:
    """A structlog processor: stars for what is secret in a line, and no value without a bound."""

    def redact(_: WrappedLogger, __: str, fields: EventDict) -> EventDict:
        ids = CURRENT.get() or {}
        for name, value in fields.items():
            if name in IDS:
                # Ours hold no secrets; a `step` or `worker` of the user's is a field like any other.
                is_ours = value is ids.get(name)
                fields[name] = short(value if is_ours else _bounded(redactor.value(name, value)))
            elif name not in _OURS:
                shown = redactor.value(name, value)
                fields[name] = _cut_within(shown) if name == "exception" else _bounded(shown)
        return fields

    return redact


RECORD, HAD = "_paigeant_record", "_paigeant_had"
"""Fields on the way only: the record that a line is made of, and which destinations have had it."""

_OWN = frozenset((*IDS, "level", "event", "seconds", "timestamp"))
"""What each line of an event says in the same way; it has no other field of such a name."""

_OURS = frozenset({"level", RECORD, HAD})

_SAID_OF_ALL = ("event", "level", "logger")

_OF_FORMATTERS = ("message", "asctime")
"""What a formatter of another handler, which had the record before, has left in it; logging takes no such `extra`."""


def with_extra(logger: WrappedLogger, name: str, fields: EventDict) -> EventDict:
    """A structlog processor: what a record has as `extra`, which says neither what happened nor how bad that is."""
    extra = _extra_of(logger, name, {"_record": fields["_record"]})
    extra = {**(extra.pop(STEP_IDS, None) or {}), **extra}
    for known in _OF_FORMATTERS:
        extra.pop(known, None)
    for known in _SAID_OF_ALL:
        if known in extra:
            extra[f"{known}_"] = extra.pop(known)
    return {**fields, **extra}


_extra_of = structlog.stdlib.ExtraAdder()


def with_step(_: WrappedLogger, __: str, fields: EventDict) -> EventDict:
    """A structlog processor: the ids of the step that the current task or thread works on, if it works on one."""
    ids = CURRENT.get()
    if ids is not None:
        for name, value in ids.items():
            fields.setdefault(name, value)
    return fields


def renderer(format: Format, *, colors: bool = False) -> Callable[[Mapping[str, Any]], str]:
    """Makes the text of a line from its fields, one line whatever is in them; a traceback is indented."""
    if format == "json":
        return lambda fields: encoded(_ordered(fields))
    to_console = structlog.dev.ConsoleRenderer(
        colors=colors,
        pad_event_to=16,
        pad_level=False,
        sort_keys=False,
        exception_formatter=structlog.dev.plain_traceback,
    )
    return lambda fields: str(to_console(None, "", _unforged(_brief(dict(fields)))))


# structlog's own renderer makes an encoder for each line, which takes as long as the line itself.
encoded: Callable[[Any], str] = json.JSONEncoder(default=repr).encode
"""Fields or a value as JSON; what is none, as the text that it is shown by."""


def wanted_at(least: int) -> frozenset[str]:
    """The events of this level and above."""
    return frozenset(name for name, level in LEVELS.items() if level >= least)


def level_number(level: int | str) -> int:
    """The number of a level. Raises ConfigurationError for a name that is none."""
    if isinstance(level, int):
        return level
    number = logging.getLevelNamesMapping().get(level.upper())
    if number is None:
        raise ConfigurationError(f"no log level {level!r}; expected debug, info, warning or error")
    return number


def level_name(level: int) -> str:
    """The name of a level."""
    return _NAMES.get(level) or logging.getLevelName(level).lower()


HEADS = {name: f', "level": "{level_name(level)}", "event": "{name}"' for name, level in LEVELS.items()}
"""How the line of each event begins, behind the time."""


def short(value: Any) -> Any:
    """An id as lines have it."""
    if isinstance(value, str) and len(value) > _ID_CHARACTERS:
        return f"{value[:_ID_CHARACTERS]}..."
    return value


def _cut(text: str) -> str:
    return text if len(text) <= _FIELD_CHARACTERS else f"{text[:_FIELD_CHARACTERS]}..."


def _cut_within(traceback: str) -> str:
    """A traceback without its middle: what went wrong stands at its end."""
    if len(traceback) <= _FIELD_CHARACTERS:
        return traceback
    return f"{traceback[: _FIELD_CHARACTERS // 4]}\n...\n{traceback[-_FIELD_CHARACTERS * 3 // 4 :]}"


def _bounded(shown: Any) -> Any:
    """A value as lines have it: a text is cut, and so is the JSON of what has too many parts."""
    if isinstance(shown, str):
        return _cut(shown)
    if isinstance(shown, (dict, list)) and len(text := encoded(shown)) > _FIELD_CHARACTERS:
        return _cut(text)
    return shown


_FIRST = ("timestamp", "level", "event")


def _ordered(fields: Mapping[str, Any]) -> Mapping[str, Any]:
    """When, how bad and what come first in every line."""
    found = iter(fields)
    if (next(found, None), next(found, None), next(found, None)) == _FIRST:
        return fields
    return {**{name: fields[name] for name in _FIRST if name in fields}, **fields}


def _unforged(fields: dict[str, Any]) -> dict[str, Any]:
    """With what a text might do to a terminal written out; a traceback keeps its lines, none of which begins a line."""
    made: dict[str, Any] = {}
    for name, value in fields.items():
        if name == "exception" and isinstance(value, str):
            value = "\n".join("    " + printable(line) for line in value.split("\n"))
        elif isinstance(value, str):
            value = printable(value)
        elif not isinstance(value, (bool, int, float, type(None))):
            value = printable(str(value))
        made[printable(name)] = value
    return made


def _brief(fields: dict[str, Any]) -> dict[str, Any]:
    """Without what a person at a terminal can do without: what says nothing that another field doesn't say."""
    fields = {name: value for name, value in fields.items() if value is not None}
    _drop_equal(fields, "correlation_id", "workflow_id")
    _drop_equal(fields, "activity", "step")
    if "workflow_id" in fields:
        fields.pop("trace_id", None)  # each run has its own, and 32 digits tell a person nothing
    if "step" in fields:
        fields.pop("worker", None)
    if fields.get("event") == "worker.started":
        fields.pop("topics", None)  # the command has told them
    if isinstance(fields.get("seconds"), float):
        fields["seconds"] = round(fields["seconds"], 3)
    if fields.get("event") == "step.waiting" and isinstance(until := fields.get("until"), float):
        fields["until"] = _local(until)
    if isinstance(usage := fields.get("usage"), Mapping):
        fields["usage"] = _used(usage)
    for name, value in fields.items():
        if isinstance(value, (list, tuple)) and all(isinstance(item, str) for item in value):
            fields[name] = ",".join(value)
    return fields


def _local(instant: float) -> str:
    try:
        moment = as_datetime(instant)
        return "" if moment is None else f"{moment.astimezone():%Y-%m-%d %H:%M:%S}"
    except (OSError, OverflowError, ValueError):  # no date that this place has
        return str(instant)


def _used(usage: Mapping[str, Any]) -> str:
    """What a step used, in one breath; which models took it is left to `paigeant runs show`."""
    cost = usage.get("cost")
    parts = [
        (usage.get("requests"), "requests"),
        (usage.get("tool_calls"), "tool calls"),
        (usage.get("input_tokens"), "tokens in"),
        (usage.get("output_tokens"), "tokens out"),
    ]
    told = [f"{count} {what}" for count, what in parts if count]
    return ", ".join(told if cost is None else [*told, f"${cost}"])


def _drop_equal(fields: dict[str, Any], name: str, other: str) -> None:
    if fields.get(name) == fields.get(other):
        fields.pop(name, None)
