"""A TCP proxy between a client and a server that cuts, delays and swallows what passes, at the byte it is told."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import socket
import struct
import termios
import threading
from collections.abc import Coroutine
from types import TracebackType
from typing import Any, Literal, Self
from urllib.parse import urlsplit, urlunsplit

from tests.patience import PATIENCE
from tests.services.server import free_port

__all__ = ["Direction", "Ending", "Proxy"]

Direction = Literal["to_server", "to_client"]
Ending = Literal["reset", "close", "blackhole"]
"""How connections end: with RST, with FIN, or in silence: they stay open, and nothing passes either way."""

DIRECTIONS: tuple[Direction, Direction] = ("to_server", "to_client")
CHUNK = 65536


class Proxy:
    """A proxy that listens on `host:port`, and passes on to the server until it is told otherwise.

        with Proxy(server.host, server.port) as proxy:
            client = connect(proxy.url(server.url))
            proxy.cut()                         # all connections are reset; new ones pass
            proxy.blackhole()                   # nothing passes; connections stay open, bytes wait
            proxy.delay(0.05)                   # everything arrives so much later, in each direction
            proxy.refuse()                      # connections are reset, and new ones refused
            proxy.resume()                      # all as at the beginning; what has waited arrives
            proxy.cut_after("to_server", 17)    # 17 bytes more, then cut
            proxy.wait_for_cut()                # until that has happened

    It works in a thread of its own, so that a test may block. What it is told holds when the method returns.
    `passed` counts the bytes that were passed on in each direction, `connections` those that were accepted,
    `cuts` how often it has cut. A server that refuses is seen by the client as one that resets. In a blackhole, other
    than behind a pulled cable, connecting succeeds; only then there is silence.
    """

    def __init__(self, host: str, port: int, *, listen: str = "127.0.0.1") -> None:
        self.target = (host, port)
        self.host = listen
        self.port = free_port(listen)
        self.connections = 0
        self.passed: dict[Direction, int] = dict.fromkeys(DIRECTIONS, 0)
        self.cuts = 0
        self._delays: dict[Direction, float] = dict.fromkeys(DIRECTIONS, 0.0)
        self._rule: _Rule | None = None
        self._open: set[_Connection] = set()
        self._cut = threading.Event()
        self._loop = asyncio.new_event_loop()
        self._gates: dict[Direction, asyncio.Event] = {direction: asyncio.Event() for direction in DIRECTIONS}
        self._listener: asyncio.Task[None] | None = None
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True)

    # --- what it can be told ---

    def url(self, of: str) -> str:
        """This url of the server, with the address of the proxy in it."""
        parts = urlsplit(of)
        account = f"{parts.netloc.rpartition('@')[0]}@" if "@" in parts.netloc else ""
        return urlunsplit(parts._replace(netloc=f"{account}{self.host}:{self.port}"))

    def cut(self, ending: Literal["reset", "close"] = "reset") -> None:
        """End all connections that there are."""
        self._tell(self._end_all(ending))

    def blackhole(self, direction: Direction | None = None) -> None:
        """Let nothing pass in this direction, or in both: not even that a side has closed."""

        async def close() -> None:
            for each in [direction] if direction else DIRECTIONS:
                self._gates[each].clear()

        self._tell(close())

    def delay(self, seconds: float, direction: Direction | None = None) -> None:
        """Let all that comes in from now on pass so much later, in this direction or in both, in its order."""

        async def set_delay() -> None:
            for each in [direction] if direction else DIRECTIONS:
                self._delays[each] = seconds

        self._tell(set_delay())

    def refuse(self) -> None:
        """Reset all connections, and have new ones refused."""

        async def refuse() -> None:
            await self._stop_listening()
            await self._end_all("reset")

        self._tell(refuse())

    def resume(self) -> None:
        """Forget all that it was told. What has waited in a blackhole passes now."""

        async def resume() -> None:
            self._delays = dict.fromkeys(DIRECTIONS, 0.0)
            self._rule = None
            for gate in self._gates.values():
                gate.set()
            await self._listen()

        self._tell(resume())

    def cut_after(
        self, direction: Direction, count: int, *, ending: Ending = "reset", each: bool = False
    ) -> None:
        """Let exactly `count` bytes more pass in this direction, and have them arrive; then end all connections.

        With 0 that is when the next byte wants to pass. It happens once: connections made afterwards pass. With
        `each`, every connection has a count of its own, new ones too, and only that one ends, until `resume`.
        """

        async def set_rule() -> None:
            self._rule = _Rule(direction, count, ending, each)
            self._cut.clear()

        self._tell(set_rule())

    def wait_for_cut(self, timeout: float = PATIENCE) -> None:
        """Return when the cut that `cut_after` asked for has happened. Raises TimeoutError."""
        if not self._cut.wait(timeout):
            raise TimeoutError(f"no cut after {timeout:.0f} s; so far passed: {self.passed}")

    @property
    def open_connections(self) -> int:
        """How many connections there are now."""
        return len(self._open)

    def start(self) -> None:
        """Listen; this is what entering a `with` block does."""
        self._thread.start()
        self.resume()

    def close(self) -> None:
        """End all, in a moment."""
        if self._thread.is_alive():
            self.refuse()
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
        if not self._loop.is_closed():
            self._loop.close()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _tell(self, what: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(what, self._loop).result(timeout=PATIENCE)

    # --- in its own thread ---

    async def _listen(self) -> None:
        if self._listener is None:
            one = socket.socket()
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            one.setblocking(False)
            one.bind((self.host, self.port))
            one.listen(128)
            self._listener = self._loop.create_task(self._accept(one))

    async def _stop_listening(self) -> None:
        if self._listener is not None:
            await _cancel(self._listener)
            self._listener = None

    async def _accept(self, listener: socket.socket) -> None:
        with listener:
            while True:
                client, _ = await self._loop.sock_accept(listener)
                client.setblocking(False)
                self.connections += 1
                connection = _Connection(self, client)
                self._open.add(connection)
                connection.start()

    async def _end_all(self, ending: Literal["reset", "close"]) -> None:
        for connection in list(self._open):
            await connection.end(ending)

    async def _spend(self, rule: _Rule, connection: _Connection) -> None:
        """Have the cut of a rule made, once; return after it, for a connection that has survived it."""
        cut = rule.cuts.get(rule.counted(connection))
        if cut is None:
            # A task of its own, for it ends the one that asks.
            cut = rule.cuts[rule.counted(connection)] = self._loop.create_task(
                self._carry_out(rule, connection)
            )
        await asyncio.shield(cut)

    async def _carry_out(self, rule: _Rule, connection: _Connection) -> None:
        """All bytes that the rule lets pass are sent: when they have arrived, the cut."""
        ended = [connection] if rule.each else list(self._open)
        for one in ended:
            await one.arrived(rule.direction)
        if self._rule is not rule:
            return  # it was told to forget that meanwhile
        self.cuts += 1
        if rule.ending == "blackhole":
            for gate in self._gates.values():
                gate.clear()
        else:
            for one in ended:
                await one.end(rule.ending)
        if not rule.each:
            self._rule = None
        self._cut.set()


class _Rule:
    """How many bytes may pass, before what."""

    def __init__(self, direction: Direction, count: int, ending: Ending, each: bool) -> None:
        self.direction = direction
        self.count = count
        self.ending = ending
        self.each = each
        self.cuts: dict[_Connection | None, asyncio.Task[None]] = {}
        self._left: dict[_Connection | None, int] = {}

    def counted(self, connection: _Connection) -> _Connection | None:
        """What has a count: the connection, or all together."""
        return connection if self.each else None

    def allow(self, connection: _Connection, wanted: int) -> int:
        """How many of these bytes may pass. They count as passed."""
        left = self._left.get(self.counted(connection), self.count)
        allowed = min(left, wanted)
        self._left[self.counted(connection)] = left - allowed
        return allowed

    def is_spent(self, connection: _Connection) -> bool:
        """Whether no further byte may pass."""
        return self._left.get(self.counted(connection)) == 0


_Item = tuple[float, bytes | OSError]
"""When something may pass, and what: bytes, none for an orderly end, an error for another."""


class _Connection:
    """A client's connection and the one to the server that was made for it."""

    def __init__(self, proxy: Proxy, client: socket.socket) -> None:
        self.proxy = proxy
        self.client = client
        self.server = socket.socket()
        self.server.setblocking(False)
        self._loop = proxy._loop
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = self._loop.create_task(self._serve())

    async def end(self, ending: Literal["reset", "close"]) -> None:
        """Break both halves, whatever is under way."""
        if self._task is not None:
            await _cancel(self._task)
        self._close(ending)

    async def arrived(self, direction: Direction) -> None:
        """Return when the receiving system has all that was sent this way: a reset would take back the rest.

        So it does for a connection that has ended meanwhile.
        """
        sink = self.server if direction == "to_server" else self.client
        with contextlib.suppress(OSError, TimeoutError):
            async with asyncio.timeout(5.0):
                while sink.fileno() >= 0 and _unacknowledged(sink):  # noqa: ASYNC110  # nobody tells when
                    await asyncio.sleep(0.0005)

    async def _serve(self) -> None:
        ending: Literal["reset", "close"] = "close"
        try:
            await self.proxy._gates["to_server"].wait()
            await self._loop.sock_connect(self.server, self.proxy.target)
            for one in (self.client, self.server):
                one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            async with asyncio.TaskGroup() as group:
                self._pump(group, "to_server", self.client, self.server)
                self._pump(group, "to_client", self.server, self.client)
        except* OSError:
            ending = "reset"  # one side was broken; so is the other now
        self._close(ending)

    def _pump(
        self, group: asyncio.TaskGroup, direction: Direction, source: socket.socket, sink: socket.socket
    ) -> None:
        queue: asyncio.Queue[_Item] = asyncio.Queue(maxsize=16)
        group.create_task(self._take(direction, source, queue))
        group.create_task(self._give(direction, queue, sink))

    async def _take(self, direction: Direction, source: socket.socket, queue: asyncio.Queue[_Item]) -> None:
        data: bytes | OSError = b"more"
        while data and not isinstance(data, OSError):
            try:
                data = await self._loop.sock_recv(source, CHUNK)
            except OSError as error:
                data = error  # it has to pass the delay and the blackhole like any byte
            await queue.put((self._loop.time() + self.proxy._delays[direction], data))

    async def _give(self, direction: Direction, queue: asyncio.Queue[_Item], sink: socket.socket) -> None:
        while True:
            when, data = await queue.get()
            await asyncio.sleep(when - self._loop.time())
            await self.proxy._gates[direction].wait()
            if isinstance(data, OSError):
                raise data
            if not data:
                sink.shutdown(socket.SHUT_WR)
                return
            await self._pass_on(direction, data, sink)

    async def _pass_on(self, direction: Direction, data: bytes, sink: socket.socket) -> None:
        while data:
            await self.proxy._gates[direction].wait()
            rule = self.proxy._rule
            if rule is None or rule.direction != direction:
                allowed = len(data)
                rule = None
            else:
                allowed = rule.allow(self, len(data))
            part, data = data[:allowed], data[allowed:]
            self.proxy.passed[direction] += len(part)  # before anybody can have them
            await self._loop.sock_sendall(sink, part)
            if rule is not None and rule.is_spent(self):
                await self.proxy._spend(rule, self)

    def _close(self, ending: Literal["reset", "close"]) -> None:
        self.proxy._open.discard(self)
        for one in (self.client, self.server):
            with one, contextlib.suppress(OSError):
                if ending == "reset":
                    one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                else:
                    one.shutdown(socket.SHUT_WR)
                    while one.recv(CHUNK):  # what is left unread turns a close into a reset
                        pass


async def _cancel(task: asyncio.Task[None]) -> None:
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


def _unacknowledged(one: socket.socket) -> int:
    """How many bytes that we have sent the other system hasn't confirmed."""
    count: int = struct.unpack("i", fcntl.ioctl(one, termios.TIOCOUTQ, b"\0" * 4))[0]
    return count
