"""One slip over several brokers: `routes` sends the messages of some topics to another one."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import aio_pika
import pytest
from redis.asyncio import Redis
from tests.integration.workers import working
from tests.patience import PATIENCE
from tests.services import RedisServer

from paigeant import ActivityRegistry, Paigeant, Settings, Workflow
from paigeant.errors import TransportUnavailable
from paigeant.message import PaigeantMessage
from paigeant.slip import RoutingSlip, RunStatus, Step
from paigeant.transports.memory import MemoryTransport
from paigeant.transports.rabbitmq import RabbitMQTransport
from paigeant.transports.redis import RedisStreamTransport
from paigeant.transports.routed import Route, RoutedTransport

HERE, THERE = "sqlite:///here.db", "sqlite:///there.db"
FAST = {"grace": 0.3, "sweep_interval": 0.1, "store_url": HERE}


def message(message_id: str) -> PaigeantMessage:
    """A message for a step of a run of its own."""
    return PaigeantMessage(message_id, f"run-{message_id}", RoutingSlip(itinerary=(Step("a", id="a"),)))


async def test_a_run_goes_to_and_fro_between_two_brokers() -> None:
    """Steps alternate between two brokers and two workers, each of which receives from its own alone."""
    ours, theirs = ActivityRegistry(), ActivityRegistry()

    @ours.execute(topic="our.count")
    async def count(n: int = 0, add: int = 0) -> int:
        return n + add + 1

    @ours.compensate("count")
    async def uncount(output: int) -> None:
        undone.append(output)

    @theirs.execute(topic="partner.double", retries=0)
    async def double(count: int, fail: bool) -> int:
        if fail:
            raise ValueError("no")
        return count * 2

    undone: list[int] = []
    steps = ["count", "double"] * 3
    here = Settings(transport_url=HERE, routes={"partner.*": THERE}, **FAST)
    there = Settings(transport_url=THERE, routes={"our.*": HERE}, **FAST)
    async with (
        Paigeant(here, activities=[ours, theirs]) as app,
        Paigeant(there, activities=[theirs, ours]) as partner,
        working(app.worker(ours)),
        working(partner.worker(theirs)),
    ):
        good = [
            await app.dispatch(Workflow("w", steps), {"fail": False}, workflow_id=f"r{n}") for n in range(20)
        ]
        bad = await partner.dispatch(Workflow("w", steps), {"fail": True})
        for run in good:
            result = await run.wait(PATIENCE)
            assert (result.status, result.error) == (RunStatus.COMPLETED, None)
        assert (await bad.wait(PATIENCE)).status is RunStatus.COMPENSATED
        rows = [row for run in good for row in (await run.detail()).steps]
        assert Counter(row.topic for row in rows) == {"our.count": 60, "partner.double": 60}
        assert {row.attempt for row in rows} == {1}
        by_topic = {
            topic: {row.worker for row in rows if row.topic == topic}
            for topic in (rows[0].topic, rows[1].topic)
        }
        assert [len(workers) for workers in by_topic.values()] == [1, 1]
        assert len(set().union(*by_topic.values())) == 2
    assert undone == [1]


@pytest.mark.parametrize(
    ("one", "other"),
    [("rabbitmq", "redis"), ("redis", "postgres"), ("postgres", "rabbitmq")],
    ids=lambda name: str(name),
)
async def test_a_run_goes_over_real_brokers(
    one: str, other: str, postgres_store_url: str, redis_url: str, rabbitmq_url: str
) -> None:
    """One slip over two kinds of broker, with its rows in Postgres; what waits is told of both by name."""
    ours, theirs = ActivityRegistry(), ActivityRegistry()

    @ours.execute(topic="our.count")
    async def count(n: int = 0) -> int:
        return n + 1

    @theirs.execute(topic="partner.double")
    async def double(count: int) -> int:
        return count * 2

    urls = {"postgres": postgres_store_url, "redis": redis_url, "rabbitmq": rabbitmq_url}
    common = {"store_url": postgres_store_url, "namespace": f"routes-{secrets.token_hex(4)}"}
    here = Settings(transport_url=urls[one], routes={"partner.*": urls[other]}, **common)
    there = Settings(transport_url=urls[other], routes={"our.*": urls[one]}, **common)
    async with (
        Paigeant(here, activities=[ours, theirs]) as app,
        Paigeant(there, activities=[theirs, ours]) as partner,
    ):
        async with working(app.worker(ours)), working(partner.worker(theirs)):
            runs = [await app.dispatch(Workflow("w", ["count", "double"] * 3)) for _ in range(20)]
            for run in runs:
                assert (await run.wait(PATIENCE)).outputs["double_3"] == 2
        waiting = await app.dispatch(Workflow("v", ["double"]), {"count": 1})
        [topic] = await app.transport.topics(["partner.double", "our.count"])
        assert (topic.topic, topic.waiting) == ("partner.double", 1)
        await partner.worker(theirs).run(until_idle=True)
        assert await waiting.status() is RunStatus.COMPLETED


async def test_what_waits_is_told_of_both_brokers() -> None:
    """Topics of the other broker are counted there, and only those that are routed to it."""
    async with Paigeant(Settings(transport_url=HERE, routes={"partner.*": THERE}, store_url=HERE)) as app:
        await app.transport.publish("partner.a", message("1"))
        await app.transport.publish("mine", message("2"))
        async with Paigeant(Settings(transport_url=THERE, store_url=HERE)) as partner:
            await partner.transport.publish("theirs alone", message("3"))
            assert [depth.topic for depth in await partner.transport.topics()] == [
                "partner.a",
                "theirs alone",
            ]
        found = await app.transport.topics()
        assert [(depth.topic, depth.waiting) for depth in found] == [("mine", 1), ("partner.a", 1)]


async def test_a_partner_out_of_reach_holds_nobody_up(caplog: pytest.LogCaptureFixture) -> None:
    """A worker starts and does its own steps; those for the partner wait in the store until it is there."""
    activity = ActivityRegistry()

    @activity.execute()
    async def mine() -> str:
        return "mine"

    @activity.execute(topic="partner.theirs")
    async def theirs() -> str:
        return "theirs"

    url = "sqlite:///away/there.db"  # a folder that isn't there yet
    here = Settings(transport_url=HERE, routes={"partner.*": url}, **FAST)
    async with Paigeant(here, activities=activity) as app:
        with caplog.at_level(logging.WARNING, "paigeant"):
            waits = await app.dispatch(Workflow("w", ["theirs", "mine"]))
            async with working(app.worker(activity, topics=["mine"])):
                assert (await (await app.dispatch(Workflow("v", ["mine"]))).wait(PATIENCE)).output == "mine"
                assert await waits.status() is RunStatus.PENDING
                [topic] = await app.store.open_topics()
                assert (topic.topic, topic.ready) == ("partner.theirs", 1)
                assert "out of reach" in caplog.text
                Path("away").mkdir()  # noqa: ASYNC240  # a test may block
                partner = Settings(transport_url=url, routes={"mine": HERE}, **FAST)
                async with (
                    Paigeant(partner, activities=activity) as other,
                    working(other.worker(topics=["partner.theirs"])),
                ):
                    assert (await waits.wait(PATIENCE)).outputs == {"theirs": "theirs", "mine": "mine"}


async def test_what_is_to_be_corrected_is_the_route() -> None:
    """A transport takes its URL for that of `transport_url`; of a route's another setting is wrong."""
    there = Route("there", RabbitMQTransport("amqp://127.0.0.1:1/"))
    with pytest.raises(TransportUnavailable, match=r"there is out of reach: .* or correct routes"):
        await there.do(lambda transport: transport.topics())
    await there.close()


class Broken(MemoryTransport):
    """Counts how often it is asked, and can't be reached, or never answers."""

    hangs = False
    asked = 0
    closed = 0

    async def connect(self) -> None:
        self.asked += 1
        if self.hangs:
            await asyncio.Event().wait()
        raise TransportUnavailable("refused")

    async def close(self) -> None:
        self.closed += 1


@pytest.mark.parametrize("hangs", [False, True])
async def test_a_broker_out_of_reach_is_asked_seldom(hangs: bool) -> None:
    """After a failure publishing there fails at once for a while, so that a thousand steps don't each wait for it."""
    broken = Broken()
    broken.hangs = hangs
    routed = RoutedTransport(MemoryTransport(), {"p.*": Route("that broker", broken, patience=0.05)})
    await routed.connect()
    assert broken.asked == 0, "it is opened when it is first needed"
    for n in range(50):
        with pytest.raises(TransportUnavailable, match="that broker is out of reach"):
            await routed.publish("p.a", message(str(n)))
    await routed.publish("mine", message("m"))
    assert [depth.topic for depth in await routed.topics()] == ["mine"]
    assert broken.asked == 1
    await routed.close()
    assert broken.closed == 1


async def test_one_alone_waits_for_a_broker_that_may_be_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of those that publish to one that still hangs the others fail at once: a worker goes on with its own steps."""
    monkeypatch.setattr("paigeant.transports.routed._FIRST_PAUSE", 1e-6)
    broken = Broken()
    broken.hangs = True
    routed = RoutedTransport(MemoryTransport(), {"p.*": Route("that broker", broken, patience=0.05)})
    with pytest.raises(TransportUnavailable):
        await routed.publish("p.a", message("first"))
    for asked in (2, 3):
        publishing = (routed.publish("p.a", message(str(n))) for n in range(50))
        failed = Counter(map(str, await asyncio.gather(*publishing, return_exceptions=True)))
        assert failed == {
            "that broker is out of reach: no answer within 0.05 s": 1,
            "that broker is out of reach, and is just asked again": 49,
        }
        assert broken.asked == asked


class Reluctant(MemoryTransport):
    """Is long in closing."""

    def __init__(self) -> None:
        super().__init__()
        self.closing, self.may_end = asyncio.Event(), asyncio.Event()

    async def close(self) -> None:
        self.closing.set()
        await self.may_end.wait()
        await super().close()


async def test_a_broker_that_is_long_in_closing_keeps_none_waiting() -> None:
    """What one's own transport holds is given back at once, and the other brokers are closed meanwhile."""
    brokers = [Reluctant() for _ in range(3)]
    own, *others = brokers
    routed = RoutedTransport(own, {f"{n}.*": Route(str(n), other) for n, other in enumerate(others)})
    for topic in ("0.a", "1.a"):
        await routed.publish(topic, message(topic))
    closing = asyncio.create_task(routed.close())
    async with asyncio.timeout(PATIENCE):
        for broker in brokers:
            await broker.closing.wait()
    for broker in brokers:
        broker.may_end.set()
    await closing


async def test_what_fails_together_is_one_failure() -> None:
    """A broker that was away for a moment, with many publishes to it under way, is asked again a second later."""
    with RedisServer() as server:
        route = Route("that broker", RedisStreamTransport(server.url))
        routed = RoutedTransport(MemoryTransport(), {"p.*": route})
        await routed.publish("p.a", message("before"))
        server.freeze()
        under_way = [asyncio.create_task(routed.publish("p.a", message(str(n)))) for n in range(50)]
        await asyncio.sleep(0)  # all of them have begun
        server.kill()
        failed = await asyncio.gather(*under_way, return_exceptions=True)
        assert {type(each) for each in failed} == {TransportUnavailable}
        await asyncio.to_thread(server.start)
        async with asyncio.timeout(PATIENCE):
            while True:
                with contextlib.suppress(TransportUnavailable):
                    await routed.publish("p.a", message("after"))
                    break
                await asyncio.sleep(0.05)
        await routed.close()


async def _hold_a_key(url: str, namespace: str) -> RedisStreamTransport:
    """Something else stands where the messages of p.bad would."""
    transport = RedisStreamTransport(url, namespace=namespace)
    async with Redis.from_url(url) as client:
        await client.set(transport.stream_key("p.bad"), "a string")
    return transport


async def _forbid_a_key(url: str, namespace: str) -> RedisStreamTransport:
    """The user may write to p.good alone."""
    transport = RedisStreamTransport(url.replace("://", f"://{namespace}:pw@"), namespace=namespace)
    async with Redis.from_url(url) as client:
        keys = [f"~{namespace}:{{{tag}}}:*" for tag in ("%", "p.good")]
        await client.execute_command("ACL", "SETUSER", namespace, "on", ">pw", "+@all", *keys)
    return transport


async def _declare_a_queue(url: str, namespace: str) -> RabbitMQTransport:
    """The queue of p.bad is there with other settings."""
    transport = RabbitMQTransport(url, namespace=namespace)
    async with await aio_pika.connect(url) as connection, connection.channel() as channel:
        await channel.declare_queue(transport.queues.topic("p.bad").name, durable=True)
    return transport


@pytest.mark.parametrize(
    "spoiled", [_hold_a_key, _forbid_a_key, _declare_a_queue], ids=["key", "acl", "queue"]
)
async def test_a_topic_that_is_refused_holds_up_no_other(
    spoiled: Callable[[str, str], Awaitable[Any]], redis_url: str, rabbitmq_url: str
) -> None:
    """A broker that takes no message for one topic is not out of reach for what goes to the others."""
    url = rabbitmq_url if spoiled is _declare_a_queue else redis_url
    transport = await spoiled(url, f"routes-{secrets.token_hex(4)}")
    routed = RoutedTransport(MemoryTransport(), {"p.*": Route("that broker", transport)})
    for n in range(3):
        with pytest.raises(TransportUnavailable, match="that broker refuses this: "):
            await routed.publish("p.bad", message(f"bad-{n}"))
        await routed.publish("p.good", message(f"good-{n}"))
    await routed.close()


async def test_the_first_pattern_that_fits_counts() -> None:
    """In the order in which they stand, with case; a pattern may lead back to one's own broker."""
    special, other = Route("special", MemoryTransport()), Route("other", MemoryTransport())
    routed = RoutedTransport(MemoryTransport(), {"p.own": None, "p.[ab]*": special, "p.*": other})
    found = [routed.route(topic) for topic in ("p.own", "p.a1", "p.c", "P.c", "x")]
    assert found == [None, special, other, None, None]


async def test_a_route_to_ones_own_broker_stays_there() -> None:
    """The URL of one's own transport makes an exception from a later pattern; its store publishes as before."""
    settings = Settings(transport_url=HERE, store_url=HERE, routes={"partner.ours": HERE, "partner.*": THERE})
    async with Paigeant(settings) as app:
        run = await app.dispatch(Workflow("w", [Step("a", topic="partner.ours")]))
        assert await run.status() is RunStatus.PENDING
        assert not Path("there.db").exists()  # noqa: ASYNC240  # a test may block
        assert [depth.topic for depth in await app.transport.topics()] == ["partner.ours"]


async def test_serving_a_routed_topic_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    """A worker that listens where no message comes is told so."""
    routed = RoutedTransport(MemoryTransport(), {"p.*": Route("that broker", MemoryTransport())})
    routed.subscribe("p.a")
    routed.subscribe("mine")
    assert [record.getMessage() for record in caplog.records if "topic p.a" in record.getMessage()]
    assert "topic mine" not in caplog.text
