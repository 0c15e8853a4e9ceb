"""RedisStreamTransport keeps what `Transport` promises, on one server and on a cluster."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Iterator
from typing import ClassVar

import pytest
import pytest_asyncio
from redis.asyncio import Redis, RedisCluster
from tests.integration.redis_servers import Cluster, redis_cluster

from paigeant.envelope import PlainEnvelope
from paigeant.testing.conformance import TransportConformance
from paigeant.transport import Transport
from paigeant.transports.redis import RedisStreamTransport


class _OnRedis(TransportConformance):
    merges_repeats: ClassVar[bool] = False
    hold: ClassVar[float | None] = 3.0  # longer than a busy machine takes between two calls
    delay: ClassVar[float] = 1.5

    url: str
    namespace: str
    client: Redis | RedisCluster

    def make(self) -> Transport:
        return RedisStreamTransport(
            self.url,
            namespace=self.namespace,
            envelope=PlainEnvelope(self.limit_bytes),
            hold=self.hold or 3.0,
        )

    async def pass_time(self, seconds: float) -> None:
        await asyncio.sleep(seconds)

    async def deliver_raw(self, transport: Transport, topic: str, message_id: str, body: bytes) -> None:
        assert isinstance(transport, RedisStreamTransport)
        await self.client.xadd(transport.stream_key(topic), {"id": message_id, "body": body})


class TestRedisStreamTransport(_OnRedis):
    @pytest_asyncio.fixture(autouse=True)
    async def _place(self, redis_url: str) -> AsyncIterator[None]:
        self.url = redis_url
        self.namespace = f"test-{secrets.token_hex(8)}"
        self.client = Redis.from_url(redis_url)
        yield
        keys = [key async for key in self.client.scan_iter(f"{self.namespace}:*")]
        if keys:
            await self.client.delete(*keys)
        await self.client.aclose()


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A cluster for the tests of this module. Its namespace is new for each test, so it need not be emptied."""
    with redis_cluster() as cluster:
        yield cluster


class TestRedisCluster(_OnRedis):
    @pytest_asyncio.fixture(autouse=True)
    async def _place(self, cluster: Cluster) -> AsyncIterator[None]:
        self.url = cluster.url
        self.namespace = f"test-{secrets.token_hex(8)}"
        self.client = RedisCluster(host=cluster.nodes[0].host, port=cluster.nodes[0].port)
        yield
        await self.client.aclose()
