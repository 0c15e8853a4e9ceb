"""What happens to runs as log lines, JSON or for a terminal; and the user's own logging with the ids of its step.

Nothing is configured at import. The command line calls `configure`; an application that has logging of its own passes
`LogObserver()` to `Paigeant` and leaves the rest alone.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping, MutableMapping
from typing import Any, Literal, TextIO

import structlog
from structlog.typing import EventDict, Processor, WrappedLogger

from paigeant.observer import CURRENT, Event, EventName

__all__ = ["LEVELS", "LogObserver", "configure", "with_step"]

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

_IDS = ("workflow_id", "workflow", "step", "activity", "attempt", "trace_id", "correlation_id", "worker")


class LogObserver:
    """Writes one line for each event, with the ids that it belongs to, to `stream` (standard error by default)."""

    def __init__(
        self, *, level: int | str = logging.INFO, format: Format = "json", stream: TextIO | None = None
    ) -> None:
        self._least = _number(level)
        to = sys.stderr if stream is None else stream
        self._log: Any = structlog.wrap_logger(
            structlog.WriteLogger(to), processors=_processors(format, to), wrapper_class=structlog.BoundLogger
        )

    def observe(self, event: Event) -> None:
        """Write the line of `event`, unless its level is too low: then nothing is built at all."""
        level = LEVELS.get(event.name, logging.INFO)
        if level < self._least:
            return
        fields: dict[str, Any] = {"level": logging.getLevelName(level).lower()}
        for name in _IDS:
            value = getattr(event, name)
            if value:
                fields[name] = value
        if event.seconds is not None:
            fields["seconds"] = round(event.seconds, 6)
        if event.error is not None:
            fields["error"] = event.error
        for name, value in event.more.items():
            fields.setdefault(name, value)
        self._log.msg(event.name, **fields)


def configure(
    *, level: int | str = logging.INFO, format: Format = "json", stream: TextIO | None = None
) -> LogObserver:
    """Write the logs of this process to `stream` (standard error by default); gives the observer that joins them.

    What Paigeant and the activities log through `logging` or `structlog` gets the ids of the step that it belongs to.
    Where the application has set up its own handlers (or structlog) already, those stay, and only Paigeant's own lines
    are written here. Meant for a process that does nothing but work: it changes the logging of the whole process.
    """
    to = sys.stderr if stream is None else stream
    handler = logging.StreamHandler(to)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[
                with_step,
                structlog.stdlib.add_log_level,
                structlog.stdlib.add_logger_name,
                structlog.stdlib.ExtraAdder(),
            ],
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                *_processors(format, to),
            ],
        )
    )
    own = logging.getLogger("paigeant")
    root = logging.getLogger()
    for old in [old for old in own.handlers + root.handlers if getattr(old, "_is_paigeant", False)]:
        own.removeHandler(old)
        root.removeHandler(old)
    handler._is_paigeant = True  # type: ignore[attr-defined]  # so that configuring again replaces it
    logger = own if root.handlers else root
    own.propagate = logger is root
    logger.addHandler(handler)
    logger.setLevel(_number(level))
    if not structlog.is_configured():
        structlog.configure(
            processors=[
                with_step,
                structlog.stdlib.add_log_level,
                structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
            ],
            wrapper_class=structlog.make_filtering_bound_logger(_number(level)),
            logger_factory=structlog.stdlib.LoggerFactory(),
        )
    return LogObserver(level=level, format=format, stream=to)


def with_step(_: WrappedLogger, __: str, fields: EventDict) -> EventDict:
    """A structlog processor: the ids of the step that the current task or thread works on, if it works on one."""
    ids = CURRENT.get()
    if ids is not None:
        for name, value in ids.items():
            fields.setdefault(name, value)
    return fields


def _processors(format: Format, stream: TextIO) -> list[Processor]:
    if format == "json":
        return [
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            _ordered,
            structlog.processors.JSONRenderer(),
        ]
    return [
        structlog.processors.TimeStamper(fmt="%H:%M:%S", utc=False),
        _brief,
        structlog.dev.ConsoleRenderer(
            colors=stream.isatty(),
            pad_event_to=16,
            pad_level=False,
            sort_keys=False,
            exception_formatter=structlog.dev.plain_traceback,
        ),
    ]


def _ordered(_: WrappedLogger, __: str, fields: EventDict) -> EventDict:
    """When, how bad and what come first in every line."""
    first = {name: fields.pop(name) for name in ("timestamp", "level", "event") if name in fields}
    return {**first, **fields}


def _brief(_: WrappedLogger, __: str, fields: EventDict) -> EventDict:
    """Without what a person at a terminal can do without: what says nothing that another field doesn't say."""
    _drop_equal(fields, "correlation_id", "workflow_id")
    _drop_equal(fields, "activity", "step")
    if "step" in fields:
        fields.pop("worker", None)
    if fields.get("event") == "worker.started":
        fields.pop("topics", None)  # the command has told them
    if isinstance(fields.get("seconds"), float):
        fields["seconds"] = round(fields["seconds"], 3)
    return fields


def _drop_equal(fields: MutableMapping[str, Any], name: str, other: str) -> None:
    if fields.get(name) == fields.get(other):
        fields.pop(name, None)


def _number(level: int | str) -> int:
    if isinstance(level, int):
        return level
    number = logging.getLevelNamesMapping().get(level.upper())
    if number is None:
        raise ValueError(f"no log level {level!r}; expected debug, info, warning or error")
    return number
