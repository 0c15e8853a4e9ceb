"""The servers of a place, whatever there is: one, a primary that sentinels name, or the nodes of a cluster."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from typing import Any

from redis.asyncio import Connection, ConnectionPool, RedisCluster, Sentinel, SSLConnection
from redis.asyncio.cluster import ClusterNode
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import SentinelConnectionPool
from redis.backoff import NoBackoff
from redis.cluster import PRIMARY
from redis.exceptions import AskError, ClusterDownError, MovedError, TryAgainError
from redis.exceptions import TimeoutError as TimedOut

from paigeant.errors import ConfigurationError
from paigeant.transports.redis.line import Line
from paigeant.transports.redis.place import Place
from paigeant.transports.redis.trouble import LOST, TROUBLE

__all__ = ["ANSWER_SECONDS", "Servers"]

ANSWER_SECONDS = 5.0
"""How long a server may take to answer. `?socket_timeout=` in the URL overrides it."""

_SENTINEL_SECONDS = 2.0
"""A sentinel that takes longer is passed over for the next one."""

_MOVED = (MovedError, TryAgainError, ClusterDownError, TimedOut, *LOST)
"""After these errors a key may be on another node of the cluster."""


class _Cluster(RedisCluster):
    """redis-py's client of a cluster, for one whose nodes come and go."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._named = dict(self.nodes_manager.startup_nodes)

    async def initialize(self, *args: Any, **options: Any) -> RedisCluster:
        # The library goes by the addresses that it has found and forgets those that it was given. Where all nodes come
        # back at others, as pods do, only the names that were given lead to them.
        for name, node in self._named.items():
            self.nodes_manager.startup_nodes.setdefault(name, node)
        return await super().initialize(*args, **options)

    def get_node(
        self, host: str | None = None, port: int | None = None, node_name: str | None = None
    ) -> ClusterNode | None:
        found = super().get_node(host, port, node_name)
        if found is None and node_name:
            # A node to which the first of its slots is just moving. It is where the other one says that the key is, and
            # serves nothing yet, so that the library doesn't know it, and ends in an AttributeError.
            name, _, number = node_name.rpartition(":")
            manager = self.nodes_manager
            found = ClusterNode(name, int(number), PRIMARY, **manager.connection_kwargs)
            manager.set_nodes(manager.nodes_cache, {found.name: found})
        return found


class Servers:
    """Commands, and connections for reads, go to the server that has a key, wherever that is now."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self.timeout = float(place.options.get("socket_timeout") or ANSWER_SECONDS)
        # Timeouts are for whole batches and reads, set where these are: a timer for each answer costs as much as the
        # answer. The older protocol has one shape of answers on all servers. Retries are decided here.
        self._options = {
            **place.options,
            "socket_timeout": None,
            "socket_connect_timeout": place.options.get("socket_connect_timeout") or self.timeout,
            "protocol": 2,
            "retry": Retry(NoBackoff(), 0),
            "driver_info": None,
        }
        self._lines: dict[str, Line] = {}
        self._cluster: RedisCluster | None = None
        self._sentinel: Sentinel | None = None
        self._pool: ConnectionPool | None = None

    async def open(self) -> None:
        """Raises ConfigurationError for a parameter that doesn't fit, and what redis-py raises."""
        if self.place.is_tls:
            self._check_certificates()
        if self.place.is_cluster:
            await self._open_cluster()
        elif self.place.service is not None:
            self._open_sentinel(self.place.service)
        else:
            [(name, port)] = self.place.nodes
            kind = SSLConnection if self.place.is_tls else Connection
            self._pool = ConnectionPool(kind, host=name, port=port, **self._options)

    def _check_certificates(self) -> None:
        # Read at the first connection, a file that isn't there would be told as a server that can't be reached.
        try:
            SSLConnection(**self._options).ssl_context.get()
        except (OSError, TypeError, ValueError) as exc:  # errors of ssl are among them
            raise ConfigurationError(
                f"TLS can't be set up as transport_url says: {exc}; "
                "correct ssl_ca_certs, ssl_certfile and ssl_keyfile"
            ) from exc

    async def _open_cluster(self) -> None:
        options = {**self._options, "socket_timeout": self.timeout, "ssl": self.place.is_tls}
        options["retry"] = Retry(NoBackoff(), 3)
        options.pop("db", None)
        nodes = [ClusterNode(name, port) for name, port in self.place.nodes]
        try:
            self._cluster = _Cluster(startup_nodes=nodes, **options)
        except TypeError as exc:
            raise ConfigurationError(f"transport_url has a parameter that no cluster takes: {exc}") from exc
        await self._cluster.initialize()

    def _open_sentinel(self, service: str) -> None:
        timeout = min(self.timeout, _SENTINEL_SECONDS)
        shared = {name: self._options[name] for name in ("protocol", "retry", "driver_info")}
        of_sockets: dict[str, Any] = {
            name: value for name, value in self.place.options.items() if name.startswith(("ssl_", "socket_"))
        }
        of_sentinels: dict[str, Any] = {
            **of_sockets,
            **self.place.sentinel_options,
            **shared,
            "socket_timeout": timeout,
            "socket_connect_timeout": timeout,
            "ssl": self.place.is_tls,
        }
        self._sentinel = Sentinel(  # type: ignore[no-untyped-call]
            list(self.place.nodes), sentinel_kwargs=of_sentinels
        )
        self._pool = SentinelConnectionPool(  # type: ignore[no-untyped-call]
            service, self._sentinel, ssl=self.place.is_tls, **self._options
        )

    async def close(self) -> None:
        """End all connections but those that `connection` gave."""
        for line in self._lines.values():
            await line.close()
        self._lines.clear()
        for each in (self._cluster, self._sentinel, self._pool):
            if each is not None:
                with contextlib.suppress(*TROUBLE):
                    await each.aclose()
        if self._cluster is not None:
            # After a failure it counts as closed already, though it has connections to the nodes.
            for nodes in ("nodes_cache", "startup_nodes"):
                with contextlib.suppress(*TROUBLE):
                    await self._cluster.nodes_manager.aclose(nodes)

    # -- asking

    async def ask(self, key: str, *command: str | bytes | int) -> Any:
        """The answer to `command`, sent to the server that has `key`."""
        if self._cluster is None:
            return await self._line(None).call(command)
        try:
            return await self._line(self._node(key)).call(command)
        except _MOVED:
            # The slow way knows how to follow the key, and learns the cluster's new shape by that.
            return await self._cluster.execute_command(*command)
        except AskError as moving:
            return await self._ask_ahead(moving, command)

    async def _ask_ahead(self, moving: AskError, command: Sequence[str | bytes | int]) -> Any:
        """The answer of the node to which the key is moving, which gives one to whoever says ASKING right before."""
        assert self._cluster is not None
        # Not by the library, which says it on one connection and asks on another one if it has two.
        line = self._line(self._cluster.get_node(node_name=f"{moving.host}:{moving.port}"))
        _, answer = await asyncio.gather(line.call(("ASKING",)), line.call(command))
        return answer

    async def tell(self, key: str, *command: str | bytes | int) -> Any:
        """Like `ask`, for a command that is about that server and not about the key."""
        return await self._line(self._node(key)).call(command)

    async def refresh(self, key: str) -> None:
        """Find out where `key` is now, after a connection to its server has failed."""
        if self._cluster is not None:
            await self.ask(key, "EXISTS", key)

    def connection(self, key: str) -> Any:
        """A connection, not yet open, to the server that has `key`."""
        return self._connection(self._node(key))

    def lines(self) -> list[tuple[str, Line]]:
        """A line to the server, or to each primary of the cluster, with its address."""
        if self._cluster is None:
            return [(self.place.where, self._line(None))]
        return [(node.name, self._line(node)) for node in self._cluster.get_primaries()]

    # -- nodes: None stands for the one server where there is no cluster

    def _node(self, key: str) -> ClusterNode | None:
        if self._cluster is None:
            return None
        node = self._cluster.get_node_from_key(key)
        if node is None:
            raise ClusterDownError("no node of the cluster serves this key now")
        return node

    def _line(self, node: ClusterNode | None) -> Line:
        name = "" if node is None else node.name
        line = self._lines.get(name)
        if line is None:
            line = self._lines[name] = Line(lambda: self._connection(node), self.timeout)
        return line

    def _connection(self, node: ClusterNode | None) -> Any:
        if node is None:
            assert self._pool is not None
            return self._pool.make_connection()  # type: ignore[no-untyped-call]
        options = {**node.connection_kwargs, "socket_timeout": None, "retry": self._options["retry"]}
        return node.connection_class(**options)
