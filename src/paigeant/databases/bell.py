"""A bell between the processes that share a Postgres database, by LISTEN and NOTIFY. It listens on its own connection.

A ring that is lost only costs time, since whoever waits for one also looks by itself now and then. A pooler that shares
connections between transactions swallows them all; that is noticed, and whoever waits looks more often.
"""

from __future__ import annotations

import asyncio
import logging
import random
import secrets
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import psycopg
from psycopg.pq.abc import PGconn

__all__ = ["PostgresBell"]

log = logging.getLogger("paigeant.bell")

_CHANNEL = "paigeant"
_ANYTHING = "*"
_LONGEST_BYTES = 7000
"""Below the 8000 bytes that Postgres allows."""

_LONGEST_PAUSE = 2.0

# It writes nothing that would have to be kept.
_RING = f"SELECT set_config('synchronous_commit', 'off', true), pg_notify('{_CHANNEL}', $1)"


class PostgresBell:
    """Rings for every other process on the database. `heard` gets what the others rang for.

    `works` is False until a ring has come through, and while the connection is lost.
    """

    def __init__(self, parameters: Mapping[str, Any], heard: Callable[[frozenset[str]], None]) -> None:
        self._parameters = parameters
        self._heard = heard
        self._name = secrets.token_hex(8)
        self._listening: asyncio.Task[None] | None = None
        self.works = False

    def open(self) -> None:
        """Listen from now on, in the running event loop."""
        self._listening = asyncio.create_task(self._forever())

    async def close(self) -> None:
        """Listen no more."""
        if self._listening is not None:
            self._listening.cancel()
            await asyncio.gather(self._listening, return_exceptions=True)
            self._listening = None
        self.works = False

    def rings(self, names: Collection[str]) -> list[tuple[str, list[str]]]:
        """The statements, with their values, that tell the others that something of each of `names` has happened."""
        return [(_RING, [f"{self._name}\n{payload}"]) for payload in _payloads(names)] if names else []

    async def _forever(self) -> None:
        pause = 0.05
        while True:
            try:
                connection = await psycopg.AsyncConnection.connect(**self._parameters, autocommit=True)
                async with connection:
                    pause = 0.05
                    await self._listen(connection)
            except (psycopg.Error, OSError) as exc:
                log.debug("the bell has lost its connection, will open another: %s", exc)
            self.works = False
            await asyncio.sleep(pause * (0.5 + random.random()))
            pause = min(pause * 2, _LONGEST_PAUSE)

    async def _listen(self, connection: psycopg.AsyncConnection[Any]) -> None:
        connection.add_notify_handler(lambda notify: self._rung(notify.payload))
        await connection.execute(f"LISTEN {_CHANNEL}")
        await connection.execute(f"NOTIFY {_CHANNEL}")  # its echo shows that rings come through
        self._heard(frozenset({_ANYTHING}))  # what was rung for before is not known
        loop = asyncio.get_running_loop()
        wire, lost = connection.fileno(), loop.create_future()
        # Read by ourselves: psycopg's own iteration takes the socket from the loop and gives it back for each ring.
        loop.add_reader(wire, self._read, connection.pgconn, lost)
        try:
            await lost
        finally:
            loop.remove_reader(wire)

    def _read(self, wire: PGconn, lost: asyncio.Future[None]) -> None:
        try:
            wire.consume_input()
            while (notify := wire.notifies()) is not None:
                self._rung(notify.extra.decode())
        except psycopg.Error as exc:
            if not lost.done():
                lost.set_exception(exc)

    def _rung(self, payload: str) -> None:
        self.works = True
        name, _, names = payload.partition("\n")
        if names and name != self._name:
            self._heard(frozenset(names.split("\n")))


def _payloads(names: Iterable[str]) -> list[str]:
    """The names in as few texts as may be."""
    payloads: list[list[str]] = [[]]
    room = _LONGEST_BYTES
    for name in names:
        size = len(name.encode()) + 1
        if size > _LONGEST_BYTES:
            name, size = _ANYTHING, 2
        if size > room:
            payloads.append([])
            room = _LONGEST_BYTES
        payloads[-1].append(name)
        room -= size
    return ["\n".join(part) for part in payloads]
