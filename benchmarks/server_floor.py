"""What the servers and their client libraries do by themselves, and how much of that Paigeant reaches.

One process, one connection for each job, a message of about 1 KB: as much as our own.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
import uuid
from collections.abc import Awaitable, Callable
from typing import Any

import aio_pika
import psycopg
import redis.asyncio as redis

from benchmarks.bench import Bench
from benchmarks.report import Figure, of
from benchmarks.servers import CROSSING, LOCALLY, measured
from benchmarks.services import TRANSPORTS, services
from benchmarks.workload import order

__all__ = ["measure", "run"]

_BATCH = 100
_BODY = b"x" * 1024


def run(bench: Bench) -> list[Figure]:
    """Rows or messages a second, one by one and 100 at a time, and our steps a second over them, rounds in turn."""
    bare: dict[str, list[tuple[float, float]]] = {transport: [] for transport in TRANSPORTS}
    ours: dict[str, list[float]] = {transport: [] for transport in TRANSPORTS}
    with services(bench) as started:
        for _ in range(bench.many(3, 1)):
            for transport in TRANSPORTS:
                with started.database() as database:
                    url = started.transport(transport, database)
                    found = bench.fresh("benchmarks.server_floor", url=url, count=bench.many(2000, 100))
                bare[transport].append((found["single"], found["batched"]))
                layout = LOCALLY if transport == "postgres" else CROSSING
                ours[transport].append(measured(bench, started, transport, layout, alone=2).steps)
    figures = []
    for transport, what in (
        ("postgres", "insert and commit"),
        ("redis", "XADD, XREADGROUP, XACK"),
        ("rabbitmq", "publish, confirm, deliver, ack"),
    ):
        layout = LOCALLY if transport == "postgres" else CROSSING
        single, batched = zip(*bare[transport], strict=True)
        figures += [
            of(f"{transport}: {what}", single, "/s"),
            of(f"{transport}: the same, {_BATCH} at a time", batched, "/s"),
            of(f"Paigeant, {transport}, {layout.name}", ours[transport], "steps/s"),
            of(
                "over one by one",
                [own / floor for own, floor in zip(ours[transport], single, strict=True)],
                "times",
            ),
            of(
                "over batched",
                [own / floor for own, floor in zip(ours[transport], batched, strict=True)],
                "times",
            ),
        ]
    return figures


async def measure(*, url: str, count: int) -> dict[str, float]:
    """How many a second on the server at `url`, one by one and in batches."""
    jobs = {"postgresql": _postgres, "redis": _redis, "amqp": _rabbitmq}
    return await jobs[url.partition("://")[0]](url, count)


async def _rate(count: int, job: Callable[[], Awaitable[object]], each: int = 1) -> float:
    began = time.perf_counter()
    for _ in range(count):
        await job()
    return count * each / (time.perf_counter() - began)


async def _postgres(url: str, count: int) -> dict[str, float]:
    text = json.dumps(order())
    insert = "INSERT INTO steps VALUES (%s, %s, %s, %s)"

    def row() -> tuple[str, str, str, str]:
        return str(uuid.uuid4()), "reserve", text, text

    async with await psycopg.AsyncConnection.connect(url, autocommit=True) as connection:
        await connection.execute(
            "CREATE TABLE steps (run TEXT, step TEXT, input JSON, output JSON, PRIMARY KEY (run, step))"
        )

        async def single() -> None:
            await connection.execute(insert, row())

        async def batched() -> None:
            async with connection.transaction(), connection.cursor() as cursor:
                await cursor.executemany(insert, [row() for _ in range(_BATCH)])

        return {"single": await _rate(count, single), "batched": await _rate(count // 10, batched, _BATCH)}


async def _redis(url: str, count: int) -> dict[str, float]:
    stream, group = "bare", "workers"
    async with redis.Redis.from_url(url) as client:
        await client.delete(stream)
        await client.xgroup_create(stream, group, mkstream=True)

        async def take() -> None:
            read: Any = await client.xreadgroup(group, "one", {stream: ">"}, count=_BATCH)
            [[_, found]] = read
            await client.xack(stream, group, *(entry for entry, _ in found))

        async def single() -> None:
            await client.xadd(stream, {"body": _BODY})
            await take()

        async def batched() -> None:
            async with client.pipeline(transaction=False) as pipeline:
                for _ in range(_BATCH):
                    pipeline.xadd(stream, {"body": _BODY})
                await pipeline.execute()
            await take()

        found = {"single": await _rate(count, single), "batched": await _rate(count // 10, batched, _BATCH)}
        await client.delete(stream)
        return found


async def _rabbitmq(url: str, count: int) -> dict[str, float]:
    async with await aio_pika.connect(url) as sending, await aio_pika.connect(url) as receiving:
        sender, receiver = await sending.channel(), await receiving.channel()
        await receiver.set_qos(prefetch_count=_BATCH)
        queue = await receiver.declare_queue("bare", durable=True, arguments={"x-queue-type": "quorum"})
        taken: asyncio.Queue[Any] = asyncio.Queue()
        await queue.consume(taken.put)

        async def publish() -> None:
            message = aio_pika.Message(_BODY, delivery_mode=aio_pika.DeliveryMode.PERSISTENT)
            await sender.default_exchange.publish(message, routing_key=queue.name)

        async def take() -> None:
            await (await taken.get()).ack()

        async def single() -> None:
            await publish()
            await take()

        async def batched() -> None:
            await asyncio.gather(*(publish() for _ in range(_BATCH)))
            await asyncio.gather(*(take() for _ in range(_BATCH)))

        found = {"single": await _rate(count, single), "batched": await _rate(count // 10, batched, _BATCH)}
        await queue.delete(if_unused=False, if_empty=False)
        return found


if __name__ == "__main__":
    print(json.dumps(asyncio.run(measure(**json.loads(sys.argv[1])))))
