"""One connection for commands, which share round trips."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from redis.exceptions import ConnectionError as Disconnected
from redis.exceptions import ReadOnlyError, ResponseError

from paigeant.transports.redis.trouble import LOST, TROUBLE

__all__ = ["Line"]

_BATCH_COMMANDS, _BATCH_BYTES = 256, 1024 * 1024

Command = Sequence[str | bytes | int]
Batch = deque[tuple[Command, asyncio.Future[Any]]]


class Line:
    """One connection for commands. Those of one turn of the event loop share a round trip, and so do those that come
    while others are under way.

    `make` gives a connection of redis-py, not yet open; `timeout` is how many seconds a batch may take.
    """

    def __init__(self, make: Callable[[], Any], timeout: float) -> None:
        self._make = make
        self._timeout = timeout
        self._connection: Any = None
        self._queue: Batch = deque()
        self._sending: asyncio.Task[None] | None = None
        self._closed = False

    def call(self, command: Command) -> asyncio.Future[Any]:
        """The answer to `command`. Raises what redis-py raises."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Any] = loop.create_future()
        if self._closed:
            future.set_exception(Disconnected("the transport was closed"))
            return future
        self._queue.append((command, future))
        if self._sending is None:
            self._sending = loop.create_task(self._send())
        return future

    async def close(self) -> None:
        """Returns when all that was asked before is answered, or has failed."""
        self._closed = True
        if self._sending is not None:
            await asyncio.wait([self._sending])
        await self._drop()

    async def _send(self) -> None:
        try:
            while self._queue:
                batch = self._next_batch()
                try:
                    await self._exchange(batch)
                except Exception as exc:  # whatever it is, whoever waits must be told
                    for _, future in batch:
                        if not future.done():
                            future.set_exception(exc)
        finally:
            self._sending = None

    def _next_batch(self) -> Batch:
        batch: Batch = deque()
        size = 0
        while self._queue and len(batch) < _BATCH_COMMANDS and size < _BATCH_BYTES:
            command, future = self._queue.popleft()
            if not future.cancelled():
                batch.append((command, future))
                size += sum(len(part) for part in command if isinstance(part, bytes))
        return batch

    async def _exchange(self, batch: Batch) -> None:
        """Send `batch` and take the answers. Commands that were answered are off it, also when this raises."""
        while batch:
            was_open = self._connection is not None and self._connection.is_connected
            try:
                async with asyncio.timeout(self._timeout):
                    await self._try(batch)
            except Exception as exc:
                await self._drop()
                # A connection that the server closed while it was idle shows only now. Doing a command twice is
                # harmless: a message may be doubled.
                was_lost = isinstance(exc, LOST) and not isinstance(exc, TimeoutError)
                if not (was_open and was_lost):
                    raise

    async def _try(self, batch: Batch) -> None:
        if self._connection is None:
            self._connection = self._make()
        connection = self._connection
        if not connection.is_connected:
            await connection.connect()
        await connection.send_packed_command(connection.pack_commands([command for command, _ in batch]))
        is_replica = False
        while batch:
            _, future = batch[0]
            try:
                answer = await connection.read_response(disconnect_on_error=False)
            except ResponseError as exc:
                is_replica = is_replica or isinstance(exc, ReadOnlyError)
                if not future.done():
                    future.set_exception(exc)
            else:
                if not future.done():
                    future.set_result(answer)
            batch.popleft()
        if is_replica:
            await self._drop()  # the name may stand for another server by now

    async def _drop(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            with contextlib.suppress(*TROUBLE):
                await connection.disconnect(nowait=True)
