"""What happens to runs as log lines: at a terminal, in a file, in the store's database; and users' own logging with it.

Nothing is configured at import. The command line calls `configure`; an application that has logging of its own passes
`LogObserver()` to `Paigeant` and leaves the rest alone. The lines and what is hidden in them are in `lines.py`, streams
and files in `destinations.py`, the table in `sql.py`.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import threading
from collections.abc import Iterable
from typing import TextIO

import structlog
from structlog.typing import EventDict, WrappedLogger

from paigeant.clock import SystemClock
from paigeant.observer import Event
from paigeant.observers.logs.destinations import LogFile, StreamLog
from paigeant.observers.logs.lines import (
    HAD,
    LEVELS,
    RECORD,
    Destination,
    Format,
    level_number,
    redacting,
    wanted_at,
    with_extra,
    with_step,
)
from paigeant.redaction import Redactor

__all__ = ["LEVELS", "LogFile", "LogHandler", "LogObserver", "configure", "with_step"]


_CLOCK = SystemClock()

_TOLD_BY_US = {"aiormq": logging.CRITICAL, "aio_pika": logging.CRITICAL, "alembic": logging.WARNING}
"""Libraries, and from which level on they are heard: aiormq tells each attempt to open a connection as an error, and of
one that was lost a traceback, where a transport says it once with what to do."""

log = logging.getLogger("paigeant.logs")


class LogObserver:
    """Writes one line for each event, with the ids that it belongs to, to `stream` (standard error by default).

    `also` are other destinations. `redactor` hides what is secret. `shared`: other processes write their lines to the
    same stream.
    """

    def __init__(
        self,
        *,
        level: int | str = logging.INFO,
        format: Format = "json",
        stream: TextIO | None = None,
        also: Iterable[Destination] = (),
        redactor: Redactor | None = None,
        shared: bool = False,
    ) -> None:
        to = sys.stderr if stream is None else stream
        own = StreamLog(to, least=level_number(level), format=format, shared=shared)
        self.destinations: tuple[Destination, ...] = (own, *also)
        self.redactor = redactor or Redactor()
        self._least = min(destination.least for destination in self.destinations)
        self.wants = wanted_at(self._least)

    def observe(self, event: Event) -> None:
        """Write the line of `event`, unless its level is too low: then nothing is built at all."""
        name = event.name
        if name not in self.wants:
            return
        level, now = LEVELS[name], _CLOCK.now()
        for destination in self.destinations:
            if level >= destination.least:
                destination.tell(event, now, self.redactor)


class LogHandler(logging.Handler):
    """Hands what is logged through `logging` or `structlog` on to `destinations`, with the ids of its step.

    Several of them may get the same record, by ways of their own: each destination is handed it once.
    """

    def __init__(self, destinations: Iterable[Destination], redactor: Redactor | None = None) -> None:
        self.destinations = tuple(destinations)
        super().__init__(min(destination.least for destination in self.destinations))
        self.setFormatter(
            structlog.stdlib.ProcessorFormatter(
                foreign_pre_chain=[
                    with_step,
                    structlog.stdlib.add_log_level,
                    structlog.stdlib.add_logger_name,
                    with_extra,
                ],
                processors=[
                    _kept_record,
                    structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                    structlog.processors.format_exc_info,
                    redacting(redactor or Redactor()),
                    self._hand_over,
                ],
            )
        )

    def emit(self, record: logging.LogRecord) -> None:
        """Write the lines of a record; of one that can't be made, that it can't, see `logging.raiseExceptions`."""
        vars(record).setdefault(HAD, [])  # shared by the copies that formatters make
        try:
            self.format(record)
        except Exception as exc:
            if logging.raiseExceptions:
                self._complain(record, exc)

    def _complain(self, record: logging.LogRecord, exc: Exception) -> None:
        """What logging itself would say has the record's arguments as they are, with whatever secret is in them."""
        told = logging.makeLogRecord({**vars(record), "args": None, "exc_info": None, "stack_info": None})
        text = f" {record.msg!r}" if isinstance(record.msg, str) else ""
        told.msg = f"the line{text} of {record.pathname}:{record.lineno} can't be made: {type(exc).__name__}"
        with contextlib.suppress(Exception):  # whatever else is wrong with it, the work goes on
            self.format(told)

    def _hand_over(self, _: WrappedLogger, __: str, fields: EventDict) -> str:
        record: logging.LogRecord = fields.pop(RECORD)
        fields.pop(HAD, None)
        if "timestamp" in fields:  # the line has its own
            fields["timestamp_"] = fields.pop("timestamp")
        had = vars(record)[HAD]
        for destination in self.destinations:
            if record.levelno >= destination.least and destination not in had:
                had.append(destination)
                destination.write(record.levelno, fields)
        return ""


def _kept_record(_: WrappedLogger, __: str, fields: EventDict) -> EventDict:
    fields[RECORD] = fields["_record"]
    return fields


def configure(
    *,
    level: int | str = logging.INFO,
    format: Format = "json",
    stream: TextIO | None = None,
    also: Iterable[Destination] = (),
    redactor: Redactor | None = None,
    kept: int | str | None = None,
    shared: bool = False,
) -> LogObserver:
    """Write the logs of this process to `stream` (standard error by default); gives the observer that joins them.

    What Paigeant and the activities log through `logging` or `structlog` gets the ids of the step that it belongs to.
    Where the application has set up its own handlers (or structlog) already, those stay, and only Paigeant's own lines
    are written here. `also` are other destinations, such as a `LogFile`; `redactor` hides what is secret. `kept` is the
    level that a handler wants which comes later, the store's: loggers let that through, but `debug` only Paigeant's.
    `shared`: other processes write their lines to the same stream.
    Python's warnings, errors that end a thread, and those that Python ignores become lines as well. Meant for a process
    that does nothing but work: it changes the logging of the whole process.
    """
    observer = LogObserver(
        level=level, format=format, stream=stream, also=also, redactor=redactor, shared=shared
    )
    handler = LogHandler(observer.destinations, observer.redactor)
    own = logging.getLogger("paigeant")
    root = logging.getLogger()
    for old in [old for old in own.handlers + root.handlers if getattr(old, "_is_paigeant", False)]:
        own.removeHandler(old)
        root.removeHandler(old)
    handler._is_paigeant = True  # type: ignore[attr-defined]  # so that configuring again replaces it
    logger = own if root.handlers else root
    own.propagate = logger is root
    logger.addHandler(handler)
    wanted = handler.level if kept is None else min(handler.level, level_number(kept))
    # What libraries tell at `debug` would crowd out of the store what happened.
    others = min(handler.level, max(wanted, logging.INFO))
    logger.setLevel(others)
    own.setLevel(wanted)
    if logger is root:
        for library, least in _TOLD_BY_US.items():
            theirs = logging.getLogger(library)
            if theirs.level in (logging.NOTSET, least):  # and not what a handler module wants
                theirs.setLevel(logging.NOTSET if handler.level <= logging.DEBUG else least)
    for name in [name for name in root.manager.loggerDict if f"{name}.".startswith("paigeant.")]:
        # `logging.config` disables what is there already, by default: a handler module that calls it means others.
        logging.getLogger(name).disabled = False
    logging.captureWarnings(True)
    if threading.excepthook is threading.__excepthook__:
        threading.excepthook = _tell_end
    if sys.unraisablehook is sys.__unraisablehook__:
        sys.unraisablehook = _tell_ignored
    if not structlog.is_configured():
        structlog.configure(
            processors=[
                with_step,
                structlog.stdlib.add_log_level,
                structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
            ],
            wrapper_class=structlog.make_filtering_bound_logger(others),
            logger_factory=structlog.stdlib.LoggerFactory(),
        )
    return observer


def _tell_end(args: threading.ExceptHookArgs) -> None:
    """A thread of the user's has ended with an error: Python writes that raw, with whatever secret is in its text."""
    if args.exc_value is not None and not isinstance(args.exc_value, SystemExit):
        name = "unknown" if args.thread is None else args.thread.name
        error = (args.exc_type, args.exc_value, args.exc_traceback)
        log.error("the thread %s has ended with an error", name, exc_info=error)


def _tell_ignored(args: sys.UnraisableHookArgs) -> None:
    """An error in a `__del__` or a callback of the user's, which Python writes in the same way."""
    where = getattr(args.object, "__qualname__", type(args.object).__qualname__)
    if args.exc_value is not None:
        error = (args.exc_type, args.exc_value, args.exc_traceback)
        log.error("an error in %s was ignored", where, exc_info=error)
