"""Where the runs of a test are recorded and where their messages travel: a transport, and a store of Postgres.

The servers are private ones, so that they may be killed. They serve one test after the other.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import aio_pika
import redis
from tests.chaos.pace import Pace
from tests.kill.roles import TIMES, activity
from tests.kill.sql import make_tables, write
from tests.services import PostgresServer, RabbitServer, RedisServer, Server

__all__ = ["AMNESIAS", "NAMES", "Place", "Servers", "bound", "open_place"]

NAMES = ("joined", "postgres", "redis", "rabbitmq")
"""The transports: a table in the store's own database, one in a database of another server, and the two brokers."""


def bound(pace: Pace) -> float:
    """Seconds after a fault within which everything goes on: lease + sweep + 5, these as long as this machine takes."""
    return TIMES["lease"] + TIMES["sweep_interval"] + pace.seconds(5.0)


@dataclass
class Place:
    """A store and a transport, both new and empty."""

    name: str
    store_url: str
    transport_url: str
    store: PostgresServer
    broker: Server

    @property
    def settle(self) -> Callable[[], None] | None:
        """What has to be done once its queues are there, before the broker may be killed; see `RabbitServer`."""
        return self.broker.write_down if isinstance(self.broker, RabbitServer) else None

    @property
    def settings(self) -> dict[str, Any]:
        """What is told to the processes of a test."""
        return {"store_url": self.store_url, "transport_url": self.transport_url}


@dataclass
class Servers:
    """Private servers, started when first asked for and again where a test has left them stopped."""

    host: str = "127.0.0.1"
    _stack: ExitStack = field(default_factory=ExitStack)
    _servers: dict[str, Any] = field(default_factory=dict)

    @property
    def store(self) -> PostgresServer:
        """For the store."""
        server: PostgresServer = self._running("store", lambda: PostgresServer(host=self.host))
        return server

    def broker(self, name: str) -> Any:
        """For messages on this transport."""
        makers: dict[str, Callable[[], Server]] = {
            "postgres": lambda: PostgresServer(host=self.host),
            "redis": lambda: RedisServer(host=self.host),
            "rabbitmq": lambda: RabbitServer(host=self.host),
        }
        return self.store if name == "joined" else self._running(name, makers[name])

    def _running(self, name: str, make: Callable[[], Server]) -> Any:
        if name not in self._servers:
            self._servers[name] = self._stack.enter_context(make())
        server = self._servers[name]
        if not server.is_running:
            server.start()
        return server

    def close(self) -> None:
        """Kill them all."""
        self._stack.close()


@contextmanager
def open_place(servers: Servers, name: str) -> Iterator[Place]:
    """A place with this transport."""
    store, broker = servers.store, servers.broker(name)
    with ExitStack() as stack:
        store_url = transport_url = stack.enter_context(store.database())
        make_tables(store_url)
        if name == "postgres":
            transport_url = stack.enter_context(broker.database())
            make_tables(transport_url)
        elif name == "redis":
            transport_url = broker.url
            _flush_all(transport_url)
        elif name == "rabbitmq":
            transport_url = f"{broker.url}?namespace=chaos-{secrets.token_hex(3)}"
        yield Place(name, store_url, transport_url, store, broker)
        for server in {id(each): each for each in (store, broker)}.values():
            if not server.is_running:  # a test that has failed between stop and start
                server.start()


# --- how a transport can forget everything: each makes ready for it, and gives what then does it at once ---


def _empty_table(place: Place) -> Callable[[], None]:
    return lambda: write(place.transport_url, "DELETE FROM messages")


def _flush(place: Place) -> Callable[[], None]:
    return lambda: _flush_all(place.transport_url)


def _flush_all(url: str) -> None:
    with redis.Redis.from_url(url) as client:
        client.flushall()


def _destroy_groups(place: Place) -> Callable[[], None]:
    def destroy() -> None:
        with redis.Redis.from_url(place.transport_url) as client:
            groups = 0
            for key in client.scan_iter(_type="stream"):
                for group in client.xinfo_groups(key):
                    groups += client.xgroup_destroy(key, group["name"])
        assert groups, "there was no group to destroy"

    return destroy


def _delete_queues(place: Place) -> Callable[[], None]:
    assert isinstance(place.broker, RabbitServer)
    known = place.broker.ctl("list_queues", "name").split()[1:]
    prefix = next(name for name in known if name.endswith(".work")).removesuffix("work")
    names = {
        *known,
        *(prefix + name for name in activity),
    }  # the workers' topics, which they may yet have to make

    async def delete() -> None:
        async with await aio_pika.connect(place.broker.url) as connection:
            channel = await connection.channel()
            for name in names:
                await channel.queue_delete(name)

    return lambda: asyncio.run(delete())


AMNESIAS: dict[tuple[str, str], Callable[[Place], Callable[[], None]]] = {
    ("joined", "table emptied"): _empty_table,
    ("postgres", "table emptied"): _empty_table,
    ("redis", "FLUSHALL"): _flush,
    ("redis", "groups destroyed"): _destroy_groups,
    ("rabbitmq", "queues deleted"): _delete_queues,
}
"""By transport and how."""
