"""RedisStreamTransport keeps what `Transport` promises, on a real server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import ClassVar
from uuid import uuid4

import pytest_asyncio
from redis.asyncio import Redis

from paigeant.testing.conformance import TransportConformance
from paigeant.transport import Transport
from paigeant.transports.redis import RedisStreamTransport


class TestRedisStreamTransport(TransportConformance):
    merges_repeats: ClassVar[bool] = False
    hold: ClassVar[float | None] = 1.0
    delay: ClassVar[float] = 0.4

    server: Redis
    url: str
    namespace: str

    @pytest_asyncio.fixture(autouse=True)
    async def _namespace(self, redis_url: str) -> AsyncIterator[None]:
        self.url = redis_url
        self.namespace = f"test-{uuid4().hex}"
        self.server = Redis.from_url(redis_url)
        yield
        keys = [key async for key in self.server.scan_iter(f"{self.namespace}:*")]
        if keys:
            await self.server.delete(*keys)
        await self.server.aclose()

    def make(self) -> Transport:
        return RedisStreamTransport(
            self.url, namespace=self.namespace, limit_bytes=self.limit_bytes, hold=1.0
        )

    async def pass_time(self, seconds: float) -> None:
        await asyncio.sleep(seconds)

    async def deliver_raw(self, transport: Transport, topic: str, message_id: str, body: bytes) -> None:
        assert isinstance(transport, RedisStreamTransport)
        await self.server.xadd(transport.stream_key(topic), {"id": message_id, "body": body})
