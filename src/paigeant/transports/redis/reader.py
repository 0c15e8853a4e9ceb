"""The connection on which a consumer waits at the server for messages."""

from __future__ import annotations

import asyncio
import contextlib
import math
from typing import Any

from redis.exceptions import ResponseError

from paigeant.transports.redis.streams import GROUP, Streams
from paigeant.transports.redis.trouble import TROUBLE

__all__ = ["BLOCK_SECONDS", "Reader"]

BLOCK_SECONDS = 1.0
"""How long a read waits for messages before the next one. Where CLIENT UNBLOCK isn't allowed, leaving takes so long."""


class Reader:
    """Reads for one consumer of a topic, one at a time. A read that was cancelled goes on, until `drain`.

    Raises TransportUnavailable while `streams` isn't open; its methods raise what redis-py raises.
    """

    def __init__(self, streams: Streams, topic: str, consumer: str) -> None:
        self._servers = streams.servers
        self._stream = streams.stream_key(topic)
        self._consumer = consumer
        self._connection: Any = None
        self._client: int | None = None
        """By which number the server knows the connection, if it tells."""
        self._outstanding = False
        """Whether an answer to a read is still to come on the connection."""

    @property
    def is_open(self) -> bool:
        return self._connection is not None

    async def open(self, *, again: bool) -> None:
        """Open the connection unless it is. `again`: after a failure, so the server is to be looked for first."""
        if self._connection is not None:
            return
        if again:
            await self._servers.refresh(self._stream)
        self._connection = connection = self._servers.connection(self._stream)
        self._client = None
        async with asyncio.timeout(self._servers.timeout):
            await connection.connect()
            with contextlib.suppress(ResponseError):  # then a read isn't cut short when the iteration ends
                await connection.send_command("CLIENT", "ID")
                self._client = await connection.read_response(disconnect_on_error=False)

    async def read(self, count: int, seconds: float) -> list[Any]:
        """Up to `count` entries, once there are any; none when none came in `seconds`, or in BLOCK_SECONDS."""
        block = max(1, math.ceil(min(seconds, BLOCK_SECONDS) * 1000))
        connection = self._connection
        self._outstanding = True
        try:
            async with asyncio.timeout(block / 1000 + self._servers.timeout):
                command = ("XREADGROUP", "GROUP", GROUP, self._consumer, "COUNT", count)
                await connection.send_command(*command, "BLOCK", block, "STREAMS", self._stream, ">")
                # A cancelled read leaves the connection whole: `drain` takes what it was to bring.
                answer = await connection.read_response(timeout=math.inf, disconnect_on_error=False)
        except TROUBLE:
            self._outstanding = False
            raise
        self._outstanding = False
        return answer[0][1] if answer else []

    async def cut_short(self) -> None:
        """Have a read answered at once that is under way."""
        if self._outstanding and self._client is not None:
            with contextlib.suppress(ResponseError):  # not allowed: the read ends by itself
                await self._servers.tell(self._stream, "CLIENT", "UNBLOCK", self._client)

    async def drain(self) -> None:
        """Wait for the answer to a read that was cancelled: after that the server gives this consumer nothing more."""
        if self._outstanding:
            self._outstanding = False
            await self._connection.read_response(timeout=math.inf, disconnect_on_error=False)

    async def drop(self) -> None:
        """Close the connection. What the server has given to a read that was under way is this consumer's."""
        connection, self._connection = self._connection, None
        self._outstanding = False
        if connection is not None:
            with contextlib.suppress(*TROUBLE):
                await connection.disconnect(nowait=True)
