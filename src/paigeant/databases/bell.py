"""A bell between the processes that share a Postgres database, by LISTEN and NOTIFY, on connections of its own.

A ring that is lost only costs time, since whoever waits for one also looks by itself now and then. A pooler that shares
connections between transactions swallows them all; that is noticed, and whoever waits looks more often.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import psycopg

__all__ = ["PostgresBell"]

log = logging.getLogger("paigeant.bell")

_CHANNEL = "paigeant"
_ANYTHING = "*"
_LONGEST_BYTES = 7000
"""Below the 8000 bytes that Postgres allows."""

_LONGEST_PAUSE = 2.0


class PostgresBell:
    """Rings for every other process on the database. `heard` gets what the others rang for.

    `works` is False until a ring has come through, and while the connection is lost.
    """

    def __init__(self, parameters: Mapping[str, Any], heard: Callable[[frozenset[str]], None]) -> None:
        self._parameters = parameters
        self._heard = heard
        self._names: set[str] = set()
        self._wanted = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._own = 0
        self.works = False

    def open(self) -> None:
        """Listen and ring from now on, in the running event loop."""
        self._wanted = asyncio.Event()
        self._tasks = [asyncio.create_task(self._forever(part)) for part in (self._listen, self._speak)]

    async def close(self) -> None:
        """Listen no more."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks = []
        self.works = False

    def ring(self, names: Iterable[str]) -> None:
        """Tell the others that something of each of `names` has happened. In the event loop; never blocks."""
        self._names.update(names)
        self._wanted.set()

    async def _forever(self, part: Callable[[psycopg.AsyncConnection[Any]], Any]) -> None:
        pause = 0.05
        while True:
            try:
                connection = await psycopg.AsyncConnection.connect(**self._parameters, autocommit=True)
                async with connection:
                    pause = 0.05
                    await part(connection)
            except (psycopg.Error, OSError) as exc:
                log.debug("the bell has lost its connection, will open another: %s", exc)
            self.works = False
            await asyncio.sleep(pause * (0.5 + random.random()))
            pause = min(pause * 2, _LONGEST_PAUSE)

    async def _listen(self, connection: psycopg.AsyncConnection[Any]) -> None:
        await connection.execute(f"LISTEN {_CHANNEL}")
        self.ring([])  # its echo shows that rings come through
        self._heard(frozenset({_ANYTHING}))  # what was rung for before is not known
        async for notification in connection.notifies():
            self.works = True
            if notification.pid != self._own and notification.payload:
                self._heard(frozenset(notification.payload.split("\n")))

    async def _speak(self, connection: psycopg.AsyncConnection[Any]) -> None:
        # Such a transaction writes nothing that would have to be kept.
        await connection.execute("SET synchronous_commit = off")
        self._own = connection.info.backend_pid
        while True:
            await self._wanted.wait()
            # Cleared before taking: a name that comes meanwhile is not slept over. What comes while one ring is under
            # way goes with the next.
            self._wanted.clear()
            names, self._names = self._names, set()
            try:
                await connection.execute(
                    f"SELECT pg_notify('{_CHANNEL}', payload) FROM unnest(%s::text[]) payload",
                    [_payloads(names)],
                    prepare=True,
                )
            except BaseException:
                self._names |= names
                self._wanted.set()
                raise


def _payloads(names: set[str]) -> list[str]:
    """The names in as few texts as may be; without any one that says nothing."""
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
