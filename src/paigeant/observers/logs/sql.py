"""Log lines in the store's database: written in batches beside the work, which never waits for them, and read again.

Lines of several processes stand in the order in which things happened: each has the instant of the transaction that it
tells of, or else the database's time as this process knows it, never before what this process has told so far.
"""

from __future__ import annotations

import json
import logging
import re
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from pydantic_core import PydanticSerializationError, to_json
from sqlalchemy import Connection, Select, delete, insert, select, text, tuple_

from paigeant import codec
from paigeant.database import Database
from paigeant.errors import InputInvalid
from paigeant.host import at_fork
from paigeant.lane import Tx
from paigeant.observer import Event, LogLine
from paigeant.observers.logs.lines import LEVELS, level_name, level_number, short, text_of, wanted_at
from paigeant.prepared import Prepared
from paigeant.redaction import Redactor
from paigeant.tables import workflow_logs, workflow_runs

__all__ = ["SqlLog", "latest_lines", "lines_after", "prune_lines"]

log = logging.getLogger("paigeant.logs")

_GATHER_SECONDS = 0.25
"""How long lines gather: what a process that is killed takes with it."""

_BATCH = 200
"""Lines in one transaction: on SQLite all others wait for it, for a millisecond or two."""

_PAUSE_SECONDS = 0.005
"""Between two transactions, so that others have their turn."""

_MOST_LINES = 10_000
_MOST_BYTES = 8 * 1024 * 1024
"""What is kept while the database can't be written. Beyond it the oldest lines are lost, and counted."""

_LONGEST_PAUSE = 10.0
_CLOSE_SECONDS = 5.0
_SKEW_SECONDS = 1.0
_ORDER_LOCK = 0x706C6F67

_columns = workflow_logs.c
_INSERT = Prepared(insert(workflow_logs), ["at", "level", "event", "workflow_id", "step", "fields"])


class _Line(NamedTuple):
    at: float
    level: int
    event: str
    workflow_id: str | None
    step: str | None
    fields: str


class SqlLog:
    """Writes lines into the store's database, from a thread of its own. An observer, and a destination of lines.

    What can't be written waits, up to a bound of lines and of bytes; beyond it the oldest are lost, for those that led
    to what is now are worth more. How many that were is a line of its own once the database is back.
    """

    place = "store"

    def __init__(self, database: Database, *, level: int | str, redactor: Redactor | None = None) -> None:
        self.least = level_number(level)
        self.wants = wanted_at(self.least)
        self.lost = self._told = 0
        """Lines that were lost in all, and how many of them were told of."""
        self._database = database
        self._redactor = redactor or Redactor()
        self._lines: deque[_Line] = deque()
        self._bytes = 0
        self._on_the_way = 0
        """Lines that are being written just now."""
        self._lock = threading.RLock()  # see `_take`
        self._some = threading.Event()
        self._closing = threading.Event()
        self._latest = 0.0
        self._thread: threading.Thread | None = None
        at_fork(self._end)

    def _end(self) -> None:
        """In a process that an activity has forked off: the connection is its parent's, so it takes no lines."""
        self._lock = threading.RLock()
        self._some, self._closing = threading.Event(), threading.Event()
        self._closing.set()
        self._thread = None
        self._lines.clear()
        self._bytes = self._on_the_way = self.lost = self._told = 0

    # -- taking, in any thread

    def observe(self, event: Event) -> None:
        """Take the line of an event."""
        if event.name in self.wants:
            self.tell(event, 0.0, self._redactor)

    def tell(self, event: Event, at: float, redactor: Redactor) -> None:
        """Take the line of an event; the store's clock tells the time."""
        name, run, step = event.name, _fit(short(event.workflow_id)), _fit(short(event.step))
        self._take(event.at, LEVELS[name], name, run, step, _storable(f"{{{text_of(event, redactor)[2:]}}}"))

    def write(self, level: int, fields: Mapping[str, Any]) -> None:
        """Take a line. Never waits, and never raises for what it says."""
        told = dict(fields)
        told.pop("level", None)
        event, run, step = told.pop("event", ""), told.get("workflow_id"), told.get("step")
        self._take(None, level, _fit(event) or "", _fit(run), _fit(step), _text(told))

    def _take(self, at: float | None, *line: Any) -> None:
        if threading.current_thread() is self._thread:
            return  # what a driver logs about the writing of lines would have more of them written, for ever
        # The garbage collector may run at any line here, and what it finds may log: the error of a task that nobody has
        # asked, a session that wasn't closed. Such a line comes here in this very thread, and is taken in between.
        weight = _weight(line[-1])
        with self._lock:
            if self._closing.is_set():
                return
            is_first = not self._lines
            self._lines.append(_Line(self._instant(at), *line))
            self._bytes += weight
            self._hold_bound()
        if is_first and not self._some.is_set():
            self._some.set()

    def _instant(self, at: float | None) -> float:
        # In microseconds, as it is shown: what is asked for `since` a shown instant is there.
        if at is None:
            now = self._database.instant()
            # What is told later happened later, however the estimates of the server's clock vary. A clock that was
            # really set back is followed.
            at = self._latest if now is None else round(now, 6)
            if self._latest - _SKEW_SECONDS < at < self._latest:
                at = self._latest
            self._latest = at
        elif (at := round(at, 6)) > self._latest:
            self._latest = at
        return at

    def _hold_bound(self) -> None:
        while len(self._lines) > _MOST_LINES or self._bytes > _MOST_BYTES:
            weight = _weight(self._lines.popleft().fields)
            self._bytes -= weight
            self.lost += 1

    # -- writing, in its thread

    def start(self) -> None:
        """Begin to write; the database is open."""
        with self._lock:
            self._closing.clear()
            self._thread = threading.Thread(target=self._run, name="paigeant-logs", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """Write what was taken, as far as that can be done soon, and take no more."""
        thread, self._thread = self._thread, None
        if thread is None:
            return
        self._closing.set()
        self._some.set()
        thread.join(_CLOSE_SECONDS)
        if left := len(self._lines) + self._on_the_way:
            log.warning("%d log lines could not be written to %s", left, self._database.place)

    def _run(self) -> None:
        pause = 0.0
        ends = False
        while not ends:
            self._some.wait()
            self._closing.wait(max(pause, _GATHER_SECONDS))
            self._some.clear()
            ends = self._closing.is_set()
            pause = self._write_all(pause)
        self._database.close_beside()

    def _write_all(self, pause: float) -> float:
        """Write what there is; gives how long to wait before the next try, 0 if all went well."""
        while batch := self._next():
            try:
                self._write(batch)
            except Exception as exc:  # whatever it is, the lines to come are worth another try
                self._put_back(batch)
                if not pause:
                    log.warning("log lines can't be written to %s for now: %s", self._database.place, exc)
                self._some.set()
                return min(max(pause * 2, 0.5), _LONGEST_PAUSE)
            if pause:
                log.info("log lines can be written to %s again", self._database.place)
                pause = 0.0
            if lost := self.lost - self._told:
                self._told += lost
                self._tell_lost(lost)
            time.sleep(_PAUSE_SECONDS)
        return 0.0

    def _write(self, batch: list[_Line]) -> None:
        try:
            self._database.write_beside(_write, batch)
        except InputInvalid:
            # One that the database refuses must not keep back all others for ever.
            for line in batch:
                try:
                    self._database.write_beside(_write, [line])
                except InputInvalid:
                    self.lost += 1

    def _next(self) -> list[_Line]:
        with self._lock:
            batch = [self._lines.popleft() for _ in range(min(_BATCH, len(self._lines)))]
            weight = sum(_weight(line.fields) for line in batch)
            self._bytes -= weight
            self._on_the_way = len(batch)
            return batch

    def _put_back(self, batch: list[_Line]) -> None:
        with self._lock:
            self._lines.extendleft(reversed(batch))
            self._on_the_way = 0
            weight = sum(_weight(line.fields) for line in batch)
            self._bytes += weight
            self._hold_bound()

    def _tell_lost(self, lost: int) -> None:
        with self._lock:
            line = _Line(self._instant(None), logging.WARNING, "log.lost", None, None, _text({"lines": lost}))
            weight = _weight(line.fields)
            self._lines.append(line)
            self._bytes += weight


_OVERHEAD = 300
"""Bytes that a waiting line takes beside its text."""


def _weight(text: str) -> int:
    return len(text) + _OVERHEAD


def _fit(text: Any) -> str | None:
    """A text as every database can hold it; None for none."""
    if not text:
        return None
    text = text if isinstance(text, str) else str(text)
    return text if text.isascii() and "\0" not in text else codec.storable(text)


def _text(fields: Mapping[str, Any]) -> str:
    try:
        text = to_json(fields, fallback=repr, inf_nan_mode="strings").decode()
    except (PydanticSerializationError, ValueError):  # half a surrogate pair, which ASCII can express
        text = json.dumps(fields, default=repr, separators=(",", ":"))
    return _storable(text)


def _storable(text: str) -> str:
    """A JSON text that Postgres can hold as well."""
    return _NULL.sub(r"\1\\\\0", text) if "\\u0000" in text else text


_NULL = re.compile(r"(?<!\\)((?:\\\\)*)\\u0000")
"""A null character. Behind a backslash that is written out itself, the same characters are a text about one."""


def _write(tx: Tx, requests: Sequence[list[_Line]]) -> list[None]:
    if tx.driver.dialect.name == "postgresql":
        # One process after the other, so that ids are seen in their order: whoever follows them misses none.
        tx.connection.execute(text(f"SELECT pg_advisory_xact_lock({_ORDER_LOCK})"))
    for lines in requests:
        _INSERT.each(tx, [tuple(line) for line in lines])
    return [None] * len(requests)


# -- reading


async def latest_lines(
    database: Database,
    *,
    workflow_id: str | None = None,
    level: int | str = logging.DEBUG,
    step: str | None = None,
    since: float | None = None,
    limit: int = 1000,
) -> list[LogLine]:
    """The newest lines that fit, in the order of what happened."""
    query = _fitting(workflow_id, level, step, since)
    query = query.order_by(_columns.at.desc(), _columns.id.desc()).limit(limit)
    return (await database.ask(lambda connection: _lines_of(connection, query)))[::-1]


async def lines_after(
    database: Database,
    last: int,
    *,
    workflow_id: str | None = None,
    level: int | str = logging.DEBUG,
    step: str | None = None,
    since: float | None = None,
    limit: int = 1000,
) -> list[LogLine]:
    """The lines that were written after the one with the id `last`, in the order in which they were written."""
    query = _fitting(workflow_id, level, step, since).where(_columns.id > last)
    query = query.order_by(_columns.id).limit(limit)
    return await database.ask(lambda connection: _lines_of(connection, query))


async def prune_lines(database: Database, before: float, *, limit: int = 500) -> int:
    """Delete lines of before that instant that belong to no run, or to one that isn't there; gives how many.

    By short transactions, so that workers go on meanwhile. Lines of a run stay as long as it does.
    """
    pruned, last = 0, (0.0, 0)
    while True:
        found, last = await database.write(_prune, (before, last, limit))
        if found < 0:
            return pruned
        pruned += found


def _prune(tx: Tx, requests: Sequence[tuple[float, tuple[float, int], int]]) -> list[tuple[int, Any]]:
    return [_prune_once(tx.connection, *request) for request in requests]


def _prune_once(
    connection: Connection, before: float, last: tuple[float, int], limit: int
) -> tuple[int, tuple[float, int]]:
    query = (
        select(_columns.at, _columns.id, _columns.workflow_id)
        .where(_columns.at < before, tuple_(_columns.at, _columns.id) > last)
        .order_by(_columns.at, _columns.id)
        .limit(limit)
    )
    found = connection.execute(query).all()
    if not found:
        return -1, last
    named = {row.workflow_id for row in found if row.workflow_id is not None}
    runs = select(workflow_runs.c.id).where(workflow_runs.c.id.in_(named))
    there = set(connection.execute(runs).scalars())
    gone = [row.id for row in found if row.workflow_id not in there]
    if gone:
        connection.execute(delete(workflow_logs).where(_columns.id.in_(gone)))
    return len(gone), (found[-1].at, found[-1].id)


def _fitting(workflow_id: str | None, level: int | str, step: str | None, since: float | None) -> Select[Any]:
    query = select(workflow_logs)
    if workflow_id is not None:
        query = query.where(_columns.workflow_id == workflow_id)
    if level_number(level) > logging.DEBUG:
        query = query.where(_columns.level >= level_number(level))
    if step is not None:
        query = query.where(_columns.step == step)
    if since is not None:
        query = query.where(_columns.at >= since)
    return query


def _lines_of(connection: Connection, query: Select[Any]) -> list[LogLine]:
    return [
        LogLine(row.id, row.at, level_name(row.level), row.event, json.loads(row.fields))
        for row in connection.execute(query)
    ]
