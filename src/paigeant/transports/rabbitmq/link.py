"""A connection to the broker: where the URL says it is, how it is opened, and what keeps it from being opened.

Reconnecting is done here, on plain connections of aio-pika: its robust ones restore what they know after a lost
connection, but not a consumer that the broker has cancelled, and they don't tell when a delivery has become void.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from typing import Any, Generic, TypeVar

import aio_pika
from aio_pika.exceptions import (
    CONNECTION_EXCEPTIONS,
    AuthenticationError,
    InvalidFrameError,
    ProbableAuthenticationError,
)
from yarl import URL

from paigeant.errors import ConfigurationError, TransportUnavailable
from paigeant.transports.rabbitmq.channel import throwaway
from paigeant.transports.rabbitmq.headers import tolerate
from paigeant.transports.rabbitmq.wire import Closed, Connection, Wire
from paigeant.urls import check_parameters, check_readable

__all__ = [
    "CLOSE_SECONDS",
    "OPEN_SECONDS",
    "Link",
    "Single",
    "closings",
    "is_cancelled",
    "place",
    "read_url",
]

_HEARTBEAT_SECONDS = 10
"""A broker that has frozen is noticed after three of these. `?heartbeat=` in the URL overrides it."""

_MOST_HEARTBEAT_SECONDS = 65534
"""aiormq sends no heartbeats at all where it finds more, or no number."""

_CONNECT_SECONDS = 5.0
CLOSE_SECONDS = 5.0
OPEN_SECONDS = 15.0
"""How long it may take to declare a queue and consume from it: of a cluster that recovers, several seconds."""

_ANSWER_SECONDS = 2.0
"""How long a broker from which something doesn't come may take to show that it is there."""

_SETTINGS = ("namespace", "queue_type", "delivery_limit")
"""What the URL may say besides aio-pika's own parameters."""

_OF_LIBRARY = (
    "auth",
    "cafile",
    "capath",
    "certfile",
    "happy_eyeballs_delay",
    "heartbeat",
    "interleave",
    "keyfile",
    "name",
    "no_verify_ssl",
)
"""It reads them here and there, and passes over all others."""

_Opened = TypeVar("_Opened")

tolerate()


def place(url: URL) -> str:
    """host:port, for messages."""
    return f"{url.host}:{url.port or (5671 if url.scheme == 'amqps' else 5672)}"


def read_url(url: str) -> tuple[URL, dict[str, str]]:
    """The URL as aio-pika takes it, and the settings of ours that stood in it."""
    check_readable(url)
    try:
        parsed = URL(url)
        if parsed.scheme not in ("amqp", "amqps") or not parsed.host:
            raise ValueError
        place(parsed)
    except ValueError:
        raise ConfigurationError(
            "transport_url is not one of RabbitMQ; expected amqp://user:password@host:port/vhost, or amqps://"
        ) from None
    check_parameters(url, (*_SETTINGS, *_OF_LIBRARY))
    query = dict(parsed.query)
    told: dict[str, str] = {name: query.pop(name) for name in _SETTINGS if name in query}
    heartbeat = query.setdefault("heartbeat", str(_HEARTBEAT_SECONDS))
    if not (heartbeat.isascii() and heartbeat.isdecimal() and int(heartbeat) <= _MOST_HEARTBEAT_SECONDS):
        raise ConfigurationError(
            f"the parameter heartbeat of transport_url isn't a whole number of seconds up to {_MOST_HEARTBEAT_SECONDS}"
        )
    if query.get("no_verify_ssl", "0") not in ("0", "1"):
        # For aiormq each word but 0 is a yes, `false` as well.
        raise ConfigurationError("the parameter no_verify_ssl of transport_url is 1 or 0")
    if query.get("auth", "plain").lower() not in ("plain", "external"):
        raise ConfigurationError("the parameter auth of transport_url is plain or external")
    return parsed.with_query(query), told


class Single(Generic[_Opened]):
    """Does something once for all who ask for it at the same time."""

    def __init__(self, make: Callable[[], Awaitable[_Opened]]) -> None:
        self._make = make
        self._making: asyncio.Task[_Opened] | None = None

    async def get(self) -> _Opened:
        if self._making is None:
            self._making = asyncio.create_task(self._run())
            self._making.add_done_callback(self._done)
        return await asyncio.shield(self._making)

    async def cancel(self) -> None:
        if self._making is not None:
            self._making.cancel()
            await asyncio.gather(self._making, return_exceptions=True)

    async def _run(self) -> _Opened:
        return await self._make()

    def _done(self, making: asyncio.Task[_Opened]) -> None:
        self._making = None
        if not making.cancelled():
            making.exception()  # those who asked have it; it isn't lost when none is there any more


class Link:
    """One connection to the broker: opened when it is asked for, and anew when it has gone."""

    def __init__(self, url: URL, role: str) -> None:
        self.url = url
        self._role = role
        self._connection: Connection | None = None
        self._wire = Wire()
        self._single = Single(self._open)
        self._looking = Single(self._look)
        self._tasks: set[asyncio.Task[None]] = set()
        self._apart: set[Link] = set()

    def apart(self) -> Link:
        """Another connection to the same broker, which `part` ends, or `close` with this one."""
        link = Link(self.url, self._role)
        self._apart.add(link)
        return link

    async def part(self, link: Link) -> None:
        """End one that `apart` gave."""
        await link.close()
        self._apart.discard(link)

    def start(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Have `work` go on by itself, for as long as the link isn't closed; it must not raise."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def open(self) -> Connection:
        """The connection. Raises TransportUnavailable, and ConfigurationError for what waiting can't mend."""
        if self._connection is not None and self._is_open(self._connection):
            return self._connection
        return await self._single.get()

    async def close(self) -> None:
        await self._single.cancel()
        await self._looking.cancel()
        connection, self._connection = self._connection, None
        if connection is not None:
            await self._dispose(connection, self._wire)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.gather(*map(self.part, tuple(self._apart)))

    def cut(self) -> None:
        """Break a connection that doesn't answer."""
        self._wire.cut()

    @property
    def is_blocked(self) -> bool:
        """Whether the broker has said that it takes no messages for now."""
        connection = self._connection
        return connection is not None and self._is_open(connection) and connection.is_blocked

    async def answers(self) -> bool:
        """Whether the broker answers on the connection that there is."""
        with contextlib.suppress(Closed), closings():
            return await self._looking.get()
        return False

    async def _look(self) -> bool:
        if self._connection is None:  # perhaps by `close`, after which none is to be opened
            return False
        with contextlib.suppress(*CONNECTION_EXCEPTIONS):
            async with asyncio.timeout(_ANSWER_SECONDS), throwaway(self._connection):
                return True
        return False

    @staticmethod
    def _is_open(connection: aio_pika.Connection) -> bool:
        return connection.transport is not None and bool(connection.transport.connection.is_opened)

    async def _open(self) -> Connection:
        gone, self._connection = self._connection, None
        if gone is not None:
            await self._dispose(gone, self._wire)
        self._wire = wire = Wire()
        connection = Connection(self.url, wire, f"paigeant {self._role}")
        try:
            await connection.connect(timeout=_CONNECT_SECONDS)
        except BaseException as exc:
            wire.cut()
            await connection.close()
            if isinstance(exc, CONNECTION_EXCEPTIONS):
                raise self._failure(exc) from exc
            raise
        self._connection = connection
        return connection

    @staticmethod
    async def _dispose(connection: aio_pika.Connection, wire: Wire) -> None:
        try:
            async with asyncio.timeout(CLOSE_SECONDS):
                await connection.close()
        except BaseException as exc:  # also when whoever closes it is cancelled
            wire.cut()
            if not isinstance(exc, CONNECTION_EXCEPTIONS):
                raise

    def _failure(self, exc: BaseException) -> TransportUnavailable | ConfigurationError:
        where, user = place(self.url), self.url.user or "guest"
        if isinstance(exc, AuthenticationError):
            asked = self.url.query.get("auth", "plain").upper()
            return ConfigurationError(
                f"RabbitMQ at {where} lets nobody log in by {asked}, but by {exc.args[0]}; correct the parameter auth "
                "of transport_url, or auth_mechanisms of RabbitMQ"
            )
        if isinstance(exc, ProbableAuthenticationError):
            return ConfigurationError(
                f"RabbitMQ at {where} refuses the user '{user}' or its password; correct transport_url, "
                "and mind that 'guest' may only connect from the broker's own host"
            )
        if isinstance(exc, InvalidFrameError) and "Connection.Close" in str(exc):
            vhost = self.url.path.removeprefix("/") or "/"
            return ConfigurationError(
                f"RabbitMQ at {where} doesn't open the virtual host '{vhost}' to the user '{user}'; correct the path "
                f"of transport_url, or create it (rabbitmqctl add_vhost {vhost}) and permit it "
                f"(rabbitmqctl set_permissions -p {vhost} {user} '.*' '.*' '.*'), or raise its limit of connections "
                "(rabbitmqctl list_vhost_limits)"
            )
        if isinstance(exc, TimeoutError):
            what = f"no answer within {_CONNECT_SECONDS:g} s"
        else:
            what = str(exc) or type(exc).__name__
        return TransportUnavailable(f"RabbitMQ at {where} can't be reached: {what}; {self._hint(what)}")

    def _hint(self, what: str) -> str:
        """What to do about a broker that can't be reached."""
        if "CERTIFICATE_VERIFY_FAILED" in what:
            return "check its certificate, and name the authority that signed it with cafile=/path"
        if "[SSL" in what:
            return "it seems not to speak TLS on this port (5671 is usual): correct it, or write amqp://"
        if "connection reset" in what or "unexpectedly closed" in what:
            return (
                f"check that it is RabbitMQ, and whether it speaks TLS ({self.url.scheme}:// was asked for)"
            )
        return "start it, or correct transport_url"


@contextlib.contextmanager
def closings() -> Iterator[None]:
    """Raises Closed where what is waited for is cancelled, and we are not: as a `Single` is when its link is closed.

    A task would take that for its own cancel, and end without a word.
    """
    try:
        yield
    except asyncio.CancelledError as exc:
        if is_cancelled():
            raise
        raise Closed("the connection was closed") from exc


def is_cancelled() -> bool:
    """Whether a CancelledError is for us."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
