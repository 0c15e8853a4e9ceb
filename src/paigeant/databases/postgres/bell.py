"""A bell between the processes that share a Postgres database, by LISTEN and NOTIFY. It listens on its own connection.

What is rung for often and concerns few has a channel for itself: messages of a topic wake none but those who serve it,
the ends of runs none but those who wait for some. Channels are those of a database: each schema with tables of Paigeant
has its own, for the same ids may stand for other runs there.

A ring that is lost only costs time, since whoever waits for one also looks by itself now and then. A pooler that shares
connections between transactions swallows them all; that is noticed, and whoever waits looks more often.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import os
import random
import secrets
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import psycopg
from psycopg.pq.abc import PGconn

from paigeant.database import ENDED, TOPIC
from paigeant.databases.postgres.session import limits

__all__ = ["PostgresBell"]

log = logging.getLogger("paigeant.bell")

_CHANNEL = "paigeant"
_USUAL_SCHEMA = "public"
_ANYTHING = "*"
_LONGEST_BYTES = 7000
"""Below the 8000 bytes that Postgres allows."""

_LONGEST_PAUSE = 2.0

# They write nothing that would have to be kept.
_RING = "SELECT set_config('synchronous_commit', 'off', true), pg_notify($1, $2)"
_RING_SEVERAL = (
    "SELECT set_config('synchronous_commit', 'off', true), count(pg_notify(ring ->> 0, ring ->> 1)) "
    "FROM json_array_elements(CAST($1 AS JSON)) AS ring"
)


class PostgresBell:
    """Rings for every other process on the database. `heard` gets what the others rang for.

    `works` is False until a ring has come through, and while the connection is lost. `schema` is that of the tables,
    to be said before it is opened.
    """

    def __init__(self, parameters: Mapping[str, Any], heard: Callable[[frozenset[str]], None]) -> None:
        self._parameters = parameters
        self._heard = heard
        self._name = secrets.token_hex(8)
        self._listening: asyncio.Task[None] | None = None
        self._attended: Counter[str] = Counter()
        self._changed = asyncio.Event()
        self.schema = _USUAL_SCHEMA
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

    def attend(self, name: str) -> Callable[[], None]:
        """Hear also of `name`, a topic's or ENDED for all ends of runs; gives what ends that."""
        self._attend(name, 1)
        return lambda: self._attend(name, -1)

    def rings(self, names: Collection[str]) -> list[tuple[str, Sequence[str]]]:
        """The statement, with its values, that tells the others that something of each of `names` has happened."""
        if not names:
            return []
        channels: dict[str, list[str]] = {}
        for name in names:
            channels.setdefault(self._channel(name), []).append(name)
        rings = [
            (channel, f"{self._name}\n{payload}")
            for channel, own in channels.items()
            for payload in _payloads(own)
        ]
        return [(_RING, rings[0])] if len(rings) == 1 else [(_RING_SEVERAL, [json.dumps(rings)])]

    def _attend(self, name: str, more: int) -> None:
        self._attended[name] += more
        if self._attended[name] == max(more, 0):  # the first one, or no one any more
            self._attended += Counter()  # which leaves out those of no one
            self._changed.set()

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
        listened: set[str] = set()
        for name in limits(connection.info.server_version):  # nothing may be rung for in hours
            await connection.execute(f"SET {name} = 0")
        await connection.execute(f"LISTEN {self._common}")
        await self._follow(connection, listened)
        await connection.execute(f"NOTIFY {self._common}")  # its echo shows that rings come through
        self._heard(frozenset({_ANYTHING}))  # what was rung for before is not known
        while True:
            await self._until_changed(connection)
            self._heard(await self._follow(connection, listened))

    async def _follow(self, connection: psycopg.AsyncConnection[Any], listened: set[str]) -> frozenset[str]:
        """Listen to the channels of what is attended; gives what is new: what was rung for before is not known."""
        self._changed.clear()
        attended = set(self._attended)
        new, old = attended - listened, listened - attended
        for verb, names in (("LISTEN", new), ("UNLISTEN", old)):
            for channel in {self._channel(name) for name in names}:
                await connection.execute(f"{verb} {channel}")
        listened |= new
        listened -= old
        return frozenset(new)

    async def _until_changed(self, connection: psycopg.AsyncConnection[Any]) -> None:
        """Hear, until something else is to be attended. Raises psycopg's errors when the connection is lost."""
        loop = asyncio.get_running_loop()
        lost = loop.create_future()
        changed = asyncio.create_task(self._changed.wait())
        # By a number of our own: libpq closes its own as soon as it learns that the server is gone. A loop can't forget
        # what is closed, and is told of it over and over as long as a forked process has the socket open too.
        wire = os.dup(connection.fileno())
        # Read by ourselves: psycopg's own iteration takes the socket from the loop and gives it back for each ring.
        loop.add_reader(wire, self._read, connection.pgconn, lost)
        try:
            await asyncio.wait({changed, lost}, return_when=asyncio.FIRST_COMPLETED)
            if lost.done():
                lost.result()
        finally:
            loop.remove_reader(wire)
            os.close(wire)
            changed.cancel()

    def _read(self, server: PGconn, lost: asyncio.Future[None]) -> None:
        try:
            server.consume_input()
            while (notify := server.notifies()) is not None:
                self._rung(notify.extra.decode())
        except psycopg.Error as exc:
            if not lost.done():  # and this is told once more before the loop goes on with who waits
                lost.set_exception(exc)

    def _rung(self, payload: str) -> None:
        self.works = True
        name, _, names = payload.partition("\n")
        if names and name != self._name:
            self._heard(frozenset(names.split("\n")))

    @property
    def _common(self) -> str:
        return _CHANNEL if self.schema == _USUAL_SCHEMA else f"{_CHANNEL}_{_digest(self.schema)}"

    def _channel(self, name: str) -> str:
        if name.startswith(ENDED):
            return f"{self._common}_ended"
        return f"{self._common}_{_digest(name)}" if name.startswith(TOPIC) else self._common


def _digest(name: str) -> str:
    """Two of them fit into the name of a channel, an identifier of at most 63 bytes."""
    return hashlib.sha256(name.encode()).hexdigest()[:24]


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
