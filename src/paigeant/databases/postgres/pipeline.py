"""Transactions on Postgres in two round trips, through libpq's pipeline mode by psycopg's own interface to it.

A transaction sends what opens it along with its first question, and all that it writes along with its commit. psycopg's
cursors could do that as well, but take several times as long a statement and send each in a packet of its own.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import psycopg
from psycopg.abc import PQGen
from psycopg.adapt import Transformer
from psycopg.errors import lookup
from psycopg.pq import ConnStatus, DiagnosticField, ExecStatus, Format, PipelineStatus
from psycopg.pq.abc import PGconn, PGresult
from psycopg.waiting import Ready, Wait
from sqlalchemy import Connection, Dialect
from sqlalchemy.dialects.postgresql.psycopg import PGDialect_psycopg

from paigeant.green import Inlet, caught_up, is_green, until_ready
from paigeant.lane import Contended

__all__ = ["GreenConnection", "Pipeline", "ServerClock", "Transaction", "driver_of"]

_DIALECT: Dialect = PGDialect_psycopg(paramstyle="numeric_dollar")  # type: ignore[no-untyped-call]
"""Statements as the server itself takes them."""

_NOW = "SELECT extract(epoch FROM clock_timestamp())::float8"
_NOT_SYNCED = "SELECT set_config('synchronous_commit', 'off', true)"
_BEGIN = "BEGIN"

_DONE = frozenset({ExecStatus.COMMAND_OK, ExecStatus.TUPLES_OK})

_DRIFT = 0.001
"""By how much two clocks run differently at the most; while one of them is being put right, by half of that."""

_CLOCK_SECONDS = 10.0
"""How long two clocks are taken to run alike."""

Rows = list[tuple[Any, ...]]
Value = TypeVar("Value")


class GreenConnection(psycopg.Connection[Any]):
    """psycopg's connection, which lets the event loop go on while a lane waits for it.

    `inlet` is its socket for whoever waits by himself. libpq closes that together with what it reports.
    """

    def __init__(self, *given: Any, **more: Any) -> None:
        super().__init__(*given, **more)
        self.inlet = Inlet()

    def close(self) -> None:
        self.inlet.leave()
        caught_up()  # a child of this process may keep the socket open: closed here, the loop couldn't forget it
        super().close()

    def wait(self, gen: PQGen[Value], interval: float = 0.1, timeout: float | None = None) -> Value:
        if not is_green():
            return super().wait(gen, interval, timeout)
        self.inlet.leave()  # the loop has one who waits for each socket
        try:
            wanted = next(gen)
            while True:
                can_read = until_ready(self.pgconn.socket, write=wanted != Wait.R)
                wanted = gen.send(Ready.R if can_read else Ready.W)
        except StopIteration as exc:
            result: Value = exc.value
            return result


def driver_of(connection: Connection) -> GreenConnection:
    """psycopg's connection below SQLAlchemy's."""
    driver: Any = connection.connection.dbapi_connection
    assert isinstance(driver, GreenConnection)
    return driver


class Answer:
    """What the server owes us for a statement, or for having prepared one. `result` is None until it has said it."""

    __slots__ = ("prepares", "result")

    def __init__(self, prepares: str | None = None) -> None:
        self.prepares = prepares
        self.result: PGresult | None = None


class Pipeline:
    """The commands on one connection and their results, in their order.

    Each statement is prepared when it is first sent. Nothing else may use the connection between `send` and `leave`.
    Raises psycopg's errors, the first one of what was sent between two calls of `sync`: the server leaves the rest out.
    """

    def __init__(self, driver: GreenConnection) -> None:
        self._conn: PGconn = driver.pgconn
        self._inlet = driver.inlet
        self._loads = Transformer(driver)
        self._names: dict[str, bytes] = {}
        self._numbers = itertools.count()
        self._sent: deque[Answer | None] = deque()
        """What has no answer yet, in its order; None is a mark."""
        self._marks = 0

    @classmethod
    def of(cls, connection: Connection) -> Pipeline:
        """That of this connection."""
        found = connection.info.get("pipeline")
        if not isinstance(found, Pipeline):
            found = connection.info["pipeline"] = cls(driver_of(connection))
        return found

    def send(self, text: str, values: Sequence[Any] = ()) -> Answer:
        """Have a statement done, with the next `sync`; gives what will have its result."""
        if self._conn.pipeline_status == PipelineStatus.OFF:
            self._conn.enter_pipeline_mode()
        name = self._names.get(text)
        if name is None:
            name = self._names[text] = b"paigeant_%d" % next(self._numbers)
            self._conn.send_prepare(name, text.encode())
            self._sent.append(Answer(text))
        formats = None
        if bytes in map(type, values):
            formats = [Format.BINARY if type(value) is bytes else Format.TEXT for value in values]
        self._conn.send_query_prepared(name, [_WRITERS[type(value)](value) for value in values], formats)
        answer = Answer()
        self._sent.append(answer)
        return answer

    def rows(self, answer: Answer) -> Rows:
        """The rows that a statement gave."""
        if answer.result is None:
            self.sync()
        assert answer.result is not None, "a sync brings all results"
        self._loads.set_pgresult(answer.result)
        return self._loads.load_rows(0, answer.result.ntuples, tuple)

    def mark(self) -> None:
        """What was sent so far stands by itself: the server does what comes then even if this fails."""
        if self._conn.pipeline_status != PipelineStatus.OFF:
            self._conn.pipeline_sync()
            self._sent.append(None)
            self._marks += 1

    def sync(self) -> None:
        """Have what was sent done up to the first mark, or all of it, and wait for the results."""
        if not self._marks:
            self.mark()
        self._flush()
        trouble: psycopg.Error | None = None
        while self._sent:
            sent = self._sent.popleft()
            if sent is None:
                self._marks -= 1
                trouble = self._take_mark(trouble)
                break
            trouble = self._take(sent, trouble)
        if trouble is not None:
            raise trouble

    def settle_quietly(self) -> None:
        """Like `settle`, where an error means nothing to anyone."""
        if self._sent:
            try:
                self.settle()
            except psycopg.Error:
                self._inlet.leave()  # libpq may have closed the socket

    def settle(self) -> None:
        """Have all that was sent done, and wait for the results. Raises the first error there was."""
        trouble: psycopg.Error | None = None
        while self._sent:
            try:
                self.sync()
            except psycopg.Error as exc:
                trouble = trouble or exc
                if self._conn.status != ConnStatus.OK:
                    break
        if trouble is not None:
            raise trouble

    def leave(self) -> None:
        """The same, and let others use the connection."""
        try:
            self.settle()
        finally:
            if self._conn.status == ConnStatus.OK:
                self._conn.exit_pipeline_mode()

    def _take(self, sent: Answer, trouble: psycopg.Error | None) -> psycopg.Error | None:
        result = self._result()
        if result is None:
            raise psycopg.OperationalError("the server gave no answer")
        if result.status in _DONE:
            sent.result = result
        else:
            if sent.prepares is not None:
                self._names.pop(sent.prepares, None)
            if result.status == ExecStatus.FATAL_ERROR and trouble is None:
                trouble = _error(result)
        self._conn.get_result()  # the end of this one's results, which libpq knows by itself
        return trouble

    def _take_mark(self, trouble: psycopg.Error | None) -> psycopg.Error | None:
        result = self._result()
        if result is not None and result.status != ExecStatus.PIPELINE_SYNC:
            trouble = trouble or _error(result)  # what the mark would have committed, it couldn't
            self._conn.get_result()
            result = self._result()
        if result is None:
            raise psycopg.OperationalError("the server gave no answer")
        return trouble

    def _flush(self) -> None:
        while self._conn.flush() == 1:
            self._inlet.leave()
            if until_ready(self._conn.socket, write=True):
                self._conn.consume_input()

    def _result(self) -> PGresult | None:
        while self._conn.is_busy():
            self._inlet.until_readable(self._conn.socket)
            self._conn.consume_input()
        return self._conn.get_result()


class ServerClock:
    """The server's time between two transactions, by this process's steady clock: a little slow, never fast."""

    def __init__(self) -> None:
        self._ahead = -math.inf
        self._set = -math.inf

    def set(self, now: float, asked: float) -> None:
        """The server has said this, to a question that was sent at `asked` by the steady clock."""
        read = time.monotonic()
        # It said so at some instant between the two. An answer that was read late must not make the clock slow, as long
        # as what is known is possible: it isn't where somebody has set the server's clock back.
        known = self._ahead - _DRIFT * (read - self._set)
        self._ahead = now - read if known > now - asked else max(now - read, known)
        self._set = read

    @property
    def is_set(self) -> bool:
        """Whether it was set so lately that it need not be set again."""
        return time.monotonic() - self._set < _CLOCK_SECONDS / 2

    def now(self) -> float | None:
        """The time; None when the server hasn't told it for long."""
        now = time.monotonic()
        return now + self._ahead if now - self._set < _CLOCK_SECONDS else None


class Transaction:
    """A transaction in a pipeline. `clock` goes before the server's, of which `server` knows what it said last.

    To the server all statements up to a mark are one transaction, also without BEGIN and COMMIT, which would cost a
    tenth of its time; they are sent where somebody has to have an answer before its end.
    `roughly`: its instant is the server's as this process knows it, if it does: perhaps a little before the true one.
    """

    __slots__ = (
        "_asked",
        "_asked_at",
        "_clock",
        "_connection",
        "_driver",
        "_is_open",
        "_is_over",
        "_now",
        "_pipeline",
        "_rough",
        "_roughly",
        "_server",
        "_unsent",
        "committing",
        "dialect",
    )

    def __init__(
        self,
        connection: Connection,
        clock: Callable[[], float] | None,
        server: ServerClock,
        *,
        roughly: bool = False,
    ) -> None:
        self.dialect = _DIALECT
        self.committing = False
        self._connection = connection
        self._driver = driver_of(connection)
        self._pipeline = Pipeline.of(connection)
        self._clock = clock
        self._server = server
        self._roughly = roughly
        self._asked: Answer | None = None
        self._asked_at = 0.0
        self._unsent: list[tuple[str, Sequence[tuple[Any, ...]]]] = []
        self._now: float | None = None
        self._rough: float | None = None
        self._is_open = False
        self._is_over = False

    def begin(self, opening: str | None = None, *, durable: bool) -> None:
        """Begin it, by this statement if need be; not `durable`, its commit doesn't wait for the disk."""
        self.settle()
        if opening is not None:
            self._open(opening)
        if not durable:
            self._pipeline.send(_NOT_SYNCED)
        if self._clock is not None:
            self._now = self._clock()
        elif not (self._roughly and self._server.is_set):
            self._ask_now()

    def settle(self) -> None:
        """Take the results of what was sent after the last commit, of which an error means nothing to anyone."""
        self._pipeline.settle_quietly()

    def rows(self, text: str, values: Sequence[Any]) -> Rows:
        self._send()
        return self._rows(self._pipeline.send(text, values))

    def ask(self, text: str, values: Sequence[Any]) -> Callable[[], Rows]:
        self._send()
        answer = self._pipeline.send(text, values)
        return lambda: self._rows(answer)

    def each(self, text: str, rows: Sequence[tuple[Any, ...]]) -> None:
        # Sent along with what is asked next, or with the commit. Until a sync the server takes us to be in the middle
        # of what we have to say, and waits for the rest, locks in its hands, without counting the time.
        self._unsent.append((text, rows))

    def plain(self) -> Connection:
        self._send()
        if self._now is None and self._asked is None:
            # Asked for later, it would take the connection away again.
            self._ask_now()
        self._open()
        self._pipeline.leave()
        return self._connection

    def now(self) -> float:
        if self._now is not None:
            return self._now
        if self._roughly and self._rough is None:
            self._rough = self._server.now()
        if self._rough is not None:
            return self._rough
        self._now = self._told(self._asked or self._ask_now())
        return self._now

    def _ask_now(self) -> Answer:
        self._asked_at = time.monotonic()
        self._asked = self._pipeline.send(_NOW)
        return self._asked

    def _told(self, asked: Answer) -> float:
        [(now,)] = self._rows(asked)
        self._server.set(now, self._asked_at)
        self._asked = None
        told: float = now
        return told

    def told_now(self) -> float | None:
        return self._now

    def commit(self, *after: tuple[str, Sequence[Any]]) -> None:
        """Commit it, and have the statements `after` it `follow` at once, which are done even if it is not.

        Raises Contended when the server has rolled it back instead.
        """
        self._send()
        self.committing = True
        done = self._pipeline.send("COMMIT") if self._is_open else None
        self._pipeline.mark()
        self._is_over = True
        self.follow(*after)
        self._pipeline.sync()
        if done is not None:
            assert done.result is not None, "a sync brings all results"
            answer = done.result.command_status
            if answer != b"COMMIT":
                said = "nothing" if answer is None else answer.decode()
                raise Contended(f"the server was asked to commit and answered {said}")
        if self._asked is not None:
            self._told(self._asked)

    def follow(self, *statements: tuple[str, Sequence[Any]]) -> None:
        """Send statements behind it, each on its own; `settle` waits for these."""
        for text, values in statements:
            self._pipeline.send(text, values)
            self._pipeline.mark()

    def abandon(self) -> None:
        """Have nothing of it done. A connection on which that fails is closed, which does it as well."""
        self._driver.inlet.leave()  # before anything is waited for: libpq may have closed the socket
        with contextlib.suppress(psycopg.Error):
            if not self._is_over:
                self._open()  # what was sent must not be committed by the mark that ends the pipeline
            self._pipeline.leave()
        try:
            self._driver.rollback()
        except psycopg.Error:
            self.close()

    def close(self) -> None:
        """End the connection."""
        self._driver.close()

    def _rows(self, answer: Answer) -> Rows:
        if answer.result is None and not self._is_over:
            self._open()
        return self._pipeline.rows(answer)

    def _open(self, opening: str = _BEGIN) -> None:
        """Go on beyond the next mark. What was sent before belongs to the transaction as well."""
        if not self._is_open:
            self._is_open = True
            self._pipeline.send(opening)

    def _send(self) -> None:
        unsent, self._unsent = self._unsent, []
        for text, rows in unsent:
            for values in rows:
                self._pipeline.send(text, values)


def _text(value: str) -> bytes:
    if "\0" in value:
        raise psycopg.DataError("a text can't contain a NUL (0x00) in Postgres")
    return value.encode()


class _Writers(dict[type, Callable[[Any], bytes | None]]):
    """For each type what gives a value as the server reads it; it knows from the statement what it has to be."""

    def __missing__(self, kind: type) -> Callable[[Any], bytes | None]:
        for base in kind.__mro__[1:]:
            if base in self:
                self[kind] = self[base]
                return self[base]
        raise TypeError(f"a parameter is a {kind.__name__}; expected text, bytes, a number or None")


_WRITERS = _Writers(
    {
        str: _text,
        int: lambda value: b"%d" % value,
        float: lambda value: repr(value).encode(),
        bool: lambda value: b"true" if value else b"false",
        bytes: lambda value: value,
        type(None): lambda value: None,
    }
)


def _error(result: PGresult) -> psycopg.Error:
    state = result.error_field(DiagnosticField.SQLSTATE)
    message = result.get_error_message()
    if state is None:  # libpq's own: the connection is gone
        return psycopg.OperationalError(message)
    try:
        kind = lookup(state.decode())
    except KeyError:
        kind = psycopg.DatabaseError
    return kind(message)
