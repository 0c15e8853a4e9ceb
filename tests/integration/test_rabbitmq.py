"""The transport on RabbitMQ when something breaks: the broker, a connection, a channel, a queue, or a setting."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import itertools
import logging
import re
import secrets
import shutil
import subprocess
import time
import weakref
from collections.abc import AsyncIterator, Coroutine, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import aio_pika
import aiormq
import pytest
from aio_pika.exceptions import ChannelInvalidStateError, ChannelNotFoundEntity
from pamqp import frame
from pamqp.body import ContentBody
from pamqp.commands import Basic
from pamqp.commands import Queue as Queues
from pamqp.header import ContentHeader
from tests.integration.workers import working
from tests.patience import PATIENCE
from tests.services import RabbitServer, free_port
from tests.services.proxy import Proxy

from paigeant import ActivityRegistry, Paigeant, Settings, Workflow
from paigeant.envelope import PlainEnvelope
from paigeant.errors import ConfigurationError, MessageTooLarge, TopicUnavailable, TransportUnavailable
from paigeant.message import PaigeantMessage
from paigeant.store import DeadLetter
from paigeant.testing.conformance.transports import message
from paigeant.transport import BODY_KEPT_BYTES
from paigeant.transports.rabbitmq import RabbitMQTransport, feed, letters, publisher, queues
from paigeant.transports.rabbitmq.channel import Channel, throwaway
from paigeant.transports.rabbitmq.frames import Outgoing
from paigeant.transports.rabbitmq.line import Line
from paigeant.transports.rabbitmq.link import Link, read_url
from paigeant.transports.rabbitmq.outlet import Outlet
from paigeant.transports.rabbitmq.queues import declare
from paigeant.transports.rabbitmq.wire import Closed, Connection

RECOVERY = 10.0
HELD_UP = 65.0
"""For so many seconds RabbitMQ reads nothing from a channel that brings a quorum queue a first message."""
"""Seconds after which all must go on, once the broker is there again, beside as many as it took to start: so there are
more on a machine that is slow or busy. On an idle one it is one or two."""

CONSUMER_TIMEOUT = 1.0


@pytest.fixture(scope="module")
def own_server() -> Iterator[RabbitServer]:
    """A broker for these tests alone, which may kill it. It soon closes channels that hold deliveries."""
    lines = [f"consumer_timeout = {int(CONSUMER_TIMEOUT * 1000)}"]
    with RabbitServer(lines=lines, advanced={"channel_tick_interval": "200"}) as server:
        yield server


@pytest.fixture
def server(own_server: RabbitServer) -> RabbitServer:
    """It, running."""
    if not own_server.is_running:
        own_server.start()
    return own_server


@contextlib.asynccontextmanager
async def opened(
    url: str, namespace: str | None = None, *, publish_timeout: float = PATIENCE, **settings
) -> AsyncIterator[RabbitMQTransport]:
    """A connected transport with queues of its own, which are deleted afterwards."""
    transport = RabbitMQTransport(
        url,
        namespace=namespace or f"test-{secrets.token_hex(6)}",
        publish_timeout=publish_timeout,
        **settings,
    )
    await transport.connect()
    try:
        yield transport
    finally:
        await transport.close()
        async with await aio_pika.connect(url) as connection, connection.channel() as channel:
            for name in transport.queues.names:
                await channel.queue_delete(name)


class Listener:
    """Receives from a topic all the time, in one iteration that must never end, and acks."""

    def __init__(self, transport: RabbitMQTransport, topic: str = "work", *, ack: bool = True) -> None:
        self.transport = transport
        self._acks = ack
        self.seen: list[str] = []
        self._came = asyncio.Event()
        self._task = asyncio.create_task(self._listen(topic))

    async def _listen(self, topic: str) -> None:
        async for received in self.transport.subscribe(topic):
            self.seen.append(received.message_id)
            if self._acks:
                await self.transport.ack(received.message_id)
            self._came.set()

    async def ended(self) -> None:
        """Wait until its iteration is over."""
        await asyncio.shield(self._task)

    async def until(self, message_id: str) -> None:
        """Wait until it has come."""
        async with asyncio.timeout(PATIENCE):
            while message_id not in self.seen:
                self._came.clear()
                await self._came.wait()
        assert not self._task.done()


@contextlib.contextmanager
def hurried(transport: RabbitMQTransport, seconds: float) -> Iterator[None]:
    """What is published meanwhile waits for its confirm no longer than that, other than before and afterwards."""
    publishing = transport._publisher
    usual, publishing._timeout = publishing._timeout, seconds
    try:
        yield
    finally:
        publishing._timeout = usual


async def publish_until_taken(transport: RabbitMQTransport, message_id: str, topic: str = "work") -> None:
    """Publish as often as it takes."""
    while True:
        with contextlib.suppress(TransportUnavailable):
            return await transport.publish(topic, message(message_id))
        await asyncio.sleep(0.05)


async def test_a_killed_broker_is_survived(server: RabbitServer) -> None:
    """The same iteration and the same publisher go on when it is back; what was confirmed before is not lost."""
    async with opened(server.url, publish_timeout=2 * PATIENCE) as transport:
        listener = Listener(transport)
        await transport.publish("work", message("first"))
        await listener.until("first")
        await transport.publish("elsewhere", message("kept"))
        await asyncio.to_thread(server.write_down)
        await asyncio.to_thread(server.kill)
        async with asyncio.timeout(PATIENCE):  # it is said at once
            with pytest.raises(TransportUnavailable, match=rf"127\.0\.0\.1:{server.port}"):
                await transport.publish("work", message("never"))
        starts = time.monotonic()
        await asyncio.to_thread(server.start)
        began = time.monotonic()
        await publish_until_taken(transport, "second")
        await listener.until("second")
        assert time.monotonic() - began < RECOVERY + (began - starts)
        assert await take(transport, "elsewhere") == "kept"
        await transport.publish("work", message("delayed"), delay=0.1)
        await listener.until("delayed")
        assert "never" not in listener.seen


async def test_an_outage_is_told_once(server: RabbitServer, caplog: pytest.LogCaptureFixture) -> None:
    """However often a queue can't be received from, each reason is one line, and its end is another."""
    async with opened(server.url) as transport:
        listener = Listener(transport)
        await transport.publish("work", message("before"))
        await listener.until("before")
        await asyncio.to_thread(server.write_down)
        queue = transport.queues.topic("work").name
        with caplog.at_level(logging.DEBUG, "paigeant.transport"):
            await asyncio.to_thread(server.kill)
            await until_logged(caplog, f"can't receive from '{queue}'", 4)
            await asyncio.to_thread(server.start)
            await until_logged(caplog, f"receiving from '{queue}' again", 1)
        told = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
        failures = [text for text in told if "can't receive" in text]
        assert failures
        assert len(set(failures)) == len(failures)


async def until_logged(caplog: pytest.LogCaptureFixture, text: str, times: int) -> None:
    """Wait until it was logged so often."""
    async with asyncio.timeout(PATIENCE):
        while caplog.text.count(text) < times:  # noqa: ASYNC110  # nothing else tells
            await asyncio.sleep(0.02)


async def test_a_broker_that_was_emptied_is_survived(server: RabbitServer) -> None:
    """With all queues gone the publisher and the iteration make them anew."""
    async with opened(server.url) as transport:
        listener = Listener(transport)
        await transport.publish("work", message("first"))
        await listener.until("first")
        await asyncio.to_thread(server.kill)
        shutil.rmtree(server.folder / "mnesia")
        await asyncio.to_thread(server.start)
        await publish_until_taken(transport, "second")
        await listener.until("second")
        await transport.publish("work", message("third"), delay=0.1)
        await listener.until("third")


async def test_cut_connections_are_opened_again(server: RabbitServer) -> None:
    """A message published after its connections were closed by the broker arrives in the same iteration."""
    async with opened(server.url) as transport:
        listener = Listener(transport)
        for turn in range(3):
            await transport.publish("work", message(f"m-{turn}"))
            await listener.until(f"m-{turn}")
            await asyncio.to_thread(server.ctl, "close_all_connections", "a test")
        await transport.publish("work", message("last"))
        await listener.until("last")


async def test_a_cancel_that_is_lost_while_the_queue_is_opened_ends_the_iteration(
    server: RabbitServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """aiormq waits with `asyncio.wait_for`, which in Python 3.11 forgets a cancel when what it waits for has come."""
    asked = asyncio.Event()

    async def forgetful(*args) -> None:
        asked.set()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.get_running_loop().create_future()
        await declare(*args)

    monkeypatch.setattr(feed, "declare", forgetful)
    async with opened(server.url) as transport:
        taking = asyncio.create_task(take(transport, "work"))
        await asked.wait()
        taking.cancel()
        async with asyncio.timeout(PATIENCE):
            with pytest.raises(asyncio.CancelledError):
                await taking


async def test_an_iteration_that_ends_while_it_asks_for_more_disturbs_no_other(
    server: RabbitServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The answer passes unheard, and what was handed out before is settled as ever: it doesn't come again."""
    asked = asyncio.Event()
    write = Channel.write

    def writing(channel: Channel, sent: bytes) -> None:
        write(channel, sent)
        if isinstance(frame.unmarshal(sent)[2], Basic.Consume):
            asked.set()

    with Proxy(server.host, server.port) as proxy:
        async with opened(proxy.url(server.url)) as transport:
            for message_id in ("first", "second"):
                await transport.publish("work", message(message_id))
            holding = transport.subscribe("work")
            await anext(holding)
            connections = proxy.connections
            (line,) = {each.line for each in transport._held["first"]}
            monkeypatch.setattr(Channel, "write", writing)
            following = asyncio.ensure_future(anext(holding))
            proxy.blackhole("to_client")
            await asked.wait()
            following.cancel()
            while not line.is_ending:  # noqa: ASYNC110  # nothing else tells
                await asyncio.sleep(0)
            await transport.ack("first")
            proxy.resume()
            await asyncio.wait([following])
            await transport.publish("work", message("last"))
            came = [await take(transport)]
            while came[-1] != "last":
                came.append(await take(transport))
            assert "first" not in came
            assert proxy.connections == connections


async def test_publishes_under_way_fail_or_arrive_when_the_broker_dies(server: RabbitServer) -> None:
    """None of many outstanding publishes hangs, and each that returned is there afterwards."""
    async with opened(server.url) as transport:
        confirmed: set[str] = set()

        async def publish_until_it_fails(own: int) -> None:
            with contextlib.suppress(TransportUnavailable):
                for number in itertools.count():
                    await transport.publish("work", message(f"m-{own}-{number}"))
                    confirmed.add(f"m-{own}-{number}")

        await transport.publish("work", message("warm"))
        await asyncio.to_thread(server.write_down)
        publishing = asyncio.gather(*map(publish_until_it_fails, range(500)))
        while not confirmed:  # noqa: ASYNC110  # nothing else tells
            await asyncio.sleep(0.001)
        await asyncio.to_thread(server.kill)
        async with asyncio.timeout(PATIENCE):
            await publishing
        await asyncio.to_thread(server.start)
        listener = Listener(transport)
        await publish_until_taken(transport, "last")
        for message_id in confirmed:
            await listener.until(message_id)


async def test_a_frozen_broker_is_told_from_a_working_one(server: RabbitServer) -> None:
    """A publish ends in time, and when the broker goes on so do publisher and iteration."""
    async with opened(f"{server.url}?heartbeat=1") as transport:
        listener = Listener(transport)
        await transport.publish("work", message("first"))
        await listener.until("first")
        server.freeze()
        try:
            with hurried(transport, 5.0), pytest.raises(TransportUnavailable, match=r"within 5 s"):
                async with asyncio.timeout(PATIENCE):
                    await transport.publish("work", message("second"))
            await asyncio.sleep(3.0)  # the heartbeats have been missed by now
        finally:
            server.thaw()
        await publish_until_taken(transport, "third")
        await listener.until("third")


async def test_a_frozen_broker_ends_nobody_s_task(server: RabbitServer) -> None:
    """Who waits for an answer when the heartbeats stop gets our error and no cancel: a sweep that asks what waits, one
    that connects again, and an iteration in which nothing is settled, which goes on."""
    async with opened(f"{server.url}?heartbeat=1") as transport:
        for number in range(3):
            await transport.publish("work", message(f"m-{number}"))
        messages = transport.subscribe("work")
        async with contextlib.aclosing(messages):  # type: ignore[type-var]  # a generator
            seen = [(await anext(messages)).message_id]
            server.freeze()
            try:
                following = asyncio.ensure_future(anext(messages))  # asks for more: nothing is settled
                results = await asyncio.gather(
                    transport.topics(["work"]), transport.connect(), return_exceptions=True
                )
            finally:
                server.thaw()
            assert [type(result) for result in results] == [TransportUnavailable] * 2
            assert "no heartbeat" in str(results[0])
            async with asyncio.timeout(PATIENCE):
                seen.append((await following).message_id)
                while set(seen) != {"m-0", "m-1", "m-2"}:
                    seen.append((await anext(messages)).message_id)


async def test_a_closed_transport_ends_its_publishes(rabbitmq_url: str) -> None:
    """Who publishes while the transport is closed gets our error, not a cancellation that nobody asked for."""
    async with opened(rabbitmq_url) as transport:
        await transport.publish("work", message("first"))
        publishing = [
            asyncio.create_task(transport.publish("work", message(f"m-{number}"))) for number in range(50)
        ]
        await asyncio.sleep(0)
        await transport.close()
        results = await asyncio.wait_for(asyncio.gather(*publishing, return_exceptions=True), PATIENCE)
        assert all(result is None or isinstance(result, TransportUnavailable) for result in results)


async def test_a_closed_transport_opens_no_connection(rabbitmq_url: str) -> None:
    """Nobody would close it: who publishes too late, or asks what waits, hears that, until somebody connects again. An
    iteration that begins too late is over."""
    async with opened(rabbitmq_url) as transport:
        await transport.publish("work", message("first"))
        late = [asyncio.create_task(transport.publish(topic, message("late"))) for topic in ("work", "other")]
        listener = Listener(transport)
        await transport.close()
        async with asyncio.timeout(PATIENCE):
            await listener.ended()
        late.append(asyncio.create_task(transport.publish("work", message("later"))))
        refused = await asyncio.gather(
            *late, transport.topics(), transport.check_room(), return_exceptions=True
        )
        assert {type(each) for each in refused} == {TransportUnavailable}
        assert [link._connection for link in (transport._publisher._link, transport._receiving)] == [
            None,
            None,
        ]
        await transport.connect()
        await transport.publish("work", message("second"))
        await Listener(transport).until("second")


@pytest.mark.parametrize("prefetch", [0, 70_000])
async def test_a_prefetch_that_amqp_has_no_number_for_is_a_near_one(rabbitmq_url: str, prefetch: int) -> None:
    """None would be any number to RabbitMQ."""
    async with opened(rabbitmq_url) as transport:
        for message_id in ("first", "second"):
            await transport.publish("work", message(message_id))
        messages = transport.subscribe("work", prefetch=prefetch)
        async with contextlib.aclosing(messages), asyncio.timeout(PATIENCE):  # type: ignore[type-var]  # a generator
            assert (await anext(messages)).message_id == "first"
            waiting = [depth.waiting for depth in await transport.topics()]
            assert waiting == ([1] if prefetch == 0 else [])
            assert (await anext(messages)).message_id == "second"


async def test_a_queue_deleted_under_its_consumer_is_made_anew(
    rabbitmq_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The broker cancels the consumer; the same iteration goes on with a new queue, and the log says why."""
    async with opened(rabbitmq_url) as transport:
        listener = Listener(transport)
        for turn in range(3):
            await transport.publish("work", message(f"m-{turn}"))
            await listener.until(f"m-{turn}")  # within seconds, even if the broker has forgotten the consumer
            await delete(rabbitmq_url, transport.queues.topic("work").name)
        assert f"'{transport.queues.topic('work').name}' was deleted" in caplog.text


async def test_a_consumer_that_the_broker_has_forgotten_is_noticed(rabbitmq_url: str) -> None:
    """When somebody deletes a queue and declares it at once, its consumers soon receive again."""
    async with opened(rabbitmq_url) as transport:
        listener = Listener(transport)
        await transport.publish("work", message("first"))
        await listener.until("first")
        queue = transport.queues.topic("work")
        async with await aio_pika.connect(rabbitmq_url) as connection, connection.channel() as channel:
            for turn in range(3):
                await channel.queue_delete(queue.name)
                await channel.declare_queue(queue.name, durable=True, arguments=dict(queue.arguments))
                async with opened(rabbitmq_url, transport.queues.namespace) as other:
                    await other.publish("work", message(f"m-{turn}"))
                    await listener.until(f"m-{turn}")


async def test_who_rests_while_the_transport_is_closed_opens_nothing_anew(
    rabbitmq_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A subscription whose queue was deleted waits before it looks again; nobody would close what it opened then."""
    monkeypatch.setattr(feed, "DELETED_SECONDS", PATIENCE)
    async with opened(rabbitmq_url) as transport:
        listener = Listener(transport)
        await transport.publish("work", message("first"))
        await listener.until("first")
        (own,) = transport._feeds
        await delete(rabbitmq_url, transport.queues.topic("work").name)
        async with asyncio.timeout(PATIENCE):
            while own._line is not None:  # noqa: ASYNC110  # nothing else tells
                await asyncio.sleep(0.01)
            await transport.close()
            await listener.ended()
        assert transport._receiving._connection is None


async def test_what_was_fetched_stays_with_an_iteration_that_takes_its_time(
    rabbitmq_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Given back whenever nothing comes for long, each would come again as often as the delivery limit lets it."""
    async with opened(rabbitmq_url, delivery_limit=2) as transport:
        sent = [f"m-{number}" for number in range(6)]
        for message_id in sent:
            await transport.publish("work", message(message_id))
        messages = transport.subscribe("work", prefetch=len(sent))
        async with contextlib.aclosing(messages), asyncio.timeout(PATIENCE):  # type: ignore[type-var]  # a generator
            seen = []
            for _ in sent:
                seen.append((await anext(messages)).message_id)
                (held,) = transport._held[seen[-1]]
                assert held.returns == 0
                if len(seen) == 1:  # from when all are here, it looks all the time
                    while held.line.received < len(sent):  # noqa: ASYNC110  # nothing else tells
                        await asyncio.sleep(0.01)
                    monkeypatch.setattr(feed, "LOOK_SECONDS", 0.01)
                    (receiving,) = transport._feeds
                    monkeypatch.setattr(receiving, "_idle", 0.05)
                await transport.ack(seen[-1])
                await asyncio.sleep(0.3)  # what it is busy with
        assert seen == sent


async def test_what_was_acked_just_before_an_iteration_ends_does_not_come_again(
    rabbitmq_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """RabbitMQ hands a quorum queue 32 acks of a channel, and the others when these are written down: not any more when
    the channel is closed in that moment."""
    monkeypatch.setattr(feed, "CLOSE_SECONDS", PATIENCE)  # a broker that has much to do takes long to agree
    async with opened(rabbitmq_url) as transport:
        sent = [f"m-{number}" for number in range(200)]
        await asyncio.gather(*(transport.publish("work", message(message_id)) for message_id in sent))
        messages = transport.subscribe("work", prefetch=len(sent))
        async with contextlib.aclosing(messages), asyncio.timeout(PATIENCE):  # type: ignore[type-var]  # a generator
            seen = [(await anext(messages)).message_id for _ in sent]
            for message_id in seen:
                await transport.ack(message_id)
        await transport.publish("work", message("last"))
        listener = Listener(transport)
        await listener.until("last")
        assert listener.seen == ["last"]


async def test_a_queue_without_a_leader_disturbs_no_other(caplog: pytest.LogCaptureFixture) -> None:
    """RabbitMQ ends the connection of whoever consumes from it. What others hold doesn't come again each time."""
    with RabbitServer() as server:  # no consumer timeout: a message is held for long
        async with opened(server.url) as transport:
            await transport.publish("stuck", message("stuck"))
            await transport.publish("work", message("held"))
            stuck = transport.queues.topic("stuck").name
            await asyncio.to_thread(server.write_down)
            await asyncio.to_thread(act, server, stuck, "stop")
            holding = Listener(transport, ack=False)
            await holding.until("held")
            listener = Listener(transport, "stuck")
            with caplog.at_level(logging.DEBUG, "paigeant.transport"):  # where each attempt is told
                async with asyncio.timeout(PATIENCE):
                    while caplog.text.count(f"can't receive from '{stuck}'") < 6:  # noqa: ASYNC110  # nothing else tells
                        await asyncio.sleep(0.02)
            # again for each of the first two: until then nobody knows whose fault it is
            assert holding.seen.count("held") <= 3
            await transport.ack("held")
            await transport.publish("work", message("next"))
            await holding.until("next")
            await asyncio.to_thread(act, server, stuck, "restart")
            await listener.until("stuck")
        assert "paigeant" not in await asyncio.to_thread(server.ctl, "list_connections", "client_properties")


async def test_more_topics_than_a_connection_may_have_channels_are_received_from() -> None:
    """Those that have no room on the one that all share have others; RabbitMQ ends one that has a channel too many."""
    with RabbitServer(lines=["channel_max = 4"]) as server:
        async with opened(server.url) as transport:
            first = Listener(transport, "a")
            await publish_until_taken(transport, "m", "a")
            await first.until("m")
            connection = transport._receiving._connection
            others = {topic: Listener(transport, topic) for topic in "bcdef"}
            for topic, listener in others.items():
                await publish_until_taken(transport, "m", topic)
                await listener.until("m")
            assert transport._receiving._connection is connection


async def test_a_connection_that_ends_whenever_a_message_comes_is_not_opened_without_a_pause(
    rabbitmq_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What its other topics hold comes again each time, and RabbitMQ 4 drops what has come back 20 times."""
    ended: list[float] = []

    def fails(*_: object) -> None:
        ended.append(time.monotonic())
        raise ZeroDivisionError

    async with opened(rabbitmq_url) as transport:
        monkeypatch.setattr(Line, "_take", fails)
        await transport.publish("work", message("m"))
        listener = Listener(transport)
        async with asyncio.timeout(PATIENCE):
            while len(ended) < 8:  # noqa: ASYNC110  # nothing else tells
                await asyncio.sleep(0.01)
        monkeypatch.undo()
        await listener.until("m")
        assert ended[7] - ended[0] > 1.0


async def test_a_blip_gives_no_topic_a_connection_of_its_own(
    server: RabbitServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A queue that is opened when the connection breaks for another reason is opened anew over the next."""
    async with opened(server.url) as transport:
        breaking(monkeypatch, server, 1)
        listener = Listener(transport)
        await publish_until_taken(transport, "first")
        await listener.until("first")
        assert not transport._receiving._apart


async def test_a_queue_that_works_again_comes_back_to_the_shared_connection(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In a busy feed, too; what it holds doesn't come again, and is settled where it came."""
    monkeypatch.setattr(feed, "APART_SECONDS", 1.0)
    with RabbitServer() as server:  # no consumer timeout: a message is held for long
        async with opened(server.url) as transport:
            breaking(monkeypatch, server, 2)
            holding = Listener(transport, ack=False)
            await publish_until_taken(transport, "held")
            await holding.until("held")
            (apart,) = transport._receiving._apart
            await asyncio.sleep(1.0)
            for number in range(5):
                await transport.publish("work", message(str(number)))
            for number in range(5):
                await holding.until(str(number))
            assert await receiving(server) == 2
            await transport.ack("held")
            async with asyncio.timeout(PATIENCE):
                while apart in transport._receiving._apart:  # noqa: ASYNC110  # nothing else tells
                    await asyncio.sleep(0.02)
            assert await receiving(server) == 1
            assert sorted(holding.seen) == ["0", "1", "2", "3", "4", "held"]


async def test_the_last_message_that_is_settled_ends_the_connection_it_came_over(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where its queue had one of its own, and its subscription is over."""
    with RabbitServer() as server:  # no consumer timeout: a message is held for long
        async with opened(server.url) as transport:
            await transport.publish("work", message("held"))
            breaking(monkeypatch, server, 2)
            assert await take(transport, ack=False) == "held"
            assert await receiving(server) == 1
            await transport.ack("held")
            async with asyncio.timeout(PATIENCE):
                while transport._receiving._apart:  # noqa: ASYNC110  # nothing else tells
                    await asyncio.sleep(0.02)
            assert await receiving(server) == 0


async def test_a_shared_connection_that_answers_nothing_is_opened_anew(
    server: RabbitServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though its heartbeats go on. No topic gets a connection of its own for that."""
    monkeypatch.setattr(feed, "OPEN_SECONDS", 2.0)
    async with opened(server.url) as transport:
        await transport.publish("work", message("first"))
        await transport.publish("other", message("second"))
        assert await take(transport) == "first"
        is_receiving = 'string:find(io_lib:format("~p", [Info]), "paigeant receiving") =/= nomatch'
        info = "rabbit_networking:connection_info(Pid, [client_properties])"
        pids = "Pid <- rabbit_networking:connections()"
        suspend = f"[sys:suspend(Pid) || {pids}, Info <- [{info}], {is_receiving}]."
        await asyncio.to_thread(server.ctl, "eval", suspend)
        try:
            listener = Listener(transport, "other")
            await listener.until("second")
            assert not transport._receiving._apart
        finally:
            await asyncio.to_thread(server.ctl, "eval", f"[sys:resume(Pid) || {pids}].")


async def test_queues_that_are_deleted_while_somebody_looks_end_no_connection(
    rabbitmq_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """RabbitMQ closes the channel on which it is asked about a queue that is gone, and its consumer is none any more at
    the same moment; what others hold doesn't come again for that."""
    monkeypatch.setattr(feed, "LOOK_SECONDS", 0.005)
    topics = [f"work-{number}" for number in range(20)]
    async with opened(rabbitmq_url) as transport:
        listeners = [Listener(transport, topic) for topic in topics]
        for listener, topic in zip(listeners, topics, strict=True):
            await publish_until_taken(transport, "first", topic)
            await listener.until("first")
        connection = transport._receiving._connection
        assert connection is not None
        await delete(rabbitmq_url, *(transport.queues.topic(topic).name for topic in topics))
        for listener, topic in zip(listeners, topics, strict=True):
            await publish_until_taken(transport, "second", topic)
            await listener.until("second")
        # A broker that has much to do may end it by a fault of its own, and says so; what we do wrong has other names.
        assert transport._receiving._connection is connection or isinstance(
            connection.reason, aiormq.exceptions.ConnectionInternalError
        )


async def test_many_queues_with_other_settings_end_no_connection(rabbitmq_url: str) -> None:
    """Each closes the channel on which it is declared, and the broker must be told that this has come, also when many
    are declared at once: else it ends the connection when a number is used again."""
    others = [f"other-{number}" for number in range(50)]
    async with opened(rabbitmq_url) as transport:
        async with await aio_pika.connect(rabbitmq_url) as foreign, foreign.channel() as channel:
            for topic in others:
                await channel.declare_queue(transport.queues.topic(topic).name, durable=True)
        connection = transport._publisher._connection
        refused = await asyncio.gather(
            *(transport.publish(topic, message("m")) for topic in others), return_exceptions=True
        )
        assert {type(each) for each in refused} == {TopicUnavailable}
        await asyncio.gather(*(transport.publish(f"work-{number}", message("m")) for number in range(50)))
        assert transport._publisher._connection is connection


async def test_queues_that_two_declare_at_the_same_moment_take_their_first_messages(
    rabbitmq_url: str,
) -> None:
    """RabbitMQ refuses what comes to a quorum queue before that has begun, which only the first of them waits for."""
    async with opened(rabbitmq_url) as one, opened(rabbitmq_url, one.queues.namespace) as other:
        for number in range(80):
            await asyncio.gather(*(each.publish(f"work-{number}", message("m")) for each in (one, other)))


async def test_a_broker_that_is_asked_all_the_time_takes_no_memory(rabbitmq_url: str) -> None:
    """A sweep asks what waits every few seconds, for as long as a worker lives, on a new channel each time."""
    async with opened(rabbitmq_url) as transport:
        await transport.publish("work", message("m"))

        async def kept(times: int) -> int:
            for _ in range(times):
                await transport.topics()
            gc.collect()
            return len(gc.get_objects())

        before = await kept(20)
        assert await kept(200) - before < 200


async def test_a_channel_that_was_left_is_forgotten_without_the_garbage_collector(rabbitmq_url: str) -> None:
    """A sweep has one for each time it asks what waits."""
    link = Link(read_url(rabbitmq_url)[0], "testing")
    gc.disable()
    try:
        connection = await link.open()
        async with throwaway(connection) as channel:
            await channel.ask(Basic.Qos())
        await channel.close()
        left = weakref.ref(channel)
        del channel
        await Channel.open(connection)  # until the next frame the reader has the channel of the one before
        assert left() is None
    finally:
        gc.enable()
        await link.close()


async def test_who_publishes_at_the_moment_the_connection_ends_is_served(rabbitmq_url: str) -> None:
    """It is over before its channels have heard of that."""
    parts = urlsplit(rabbitmq_url)
    with Proxy(parts.hostname or "", parts.port or 5672) as proxy:
        async with opened(proxy.url(rabbitmq_url)) as transport:
            await transport.publish("work", message("first"))
            connection = transport._publisher._connection
            assert connection is not None
            proxy.cut()
            while not connection.gone.done():  # noqa: ASYNC110  # a moment later it would be too late
                await asyncio.sleep(0)
            await transport.publish("work", message("second"))


async def test_who_waits_for_room_hears_of_the_end_of_the_connection() -> None:
    """A broker that dies while an alarm stops publishers never says that it is over."""
    with RabbitServer() as server:
        async with opened(server.url) as transport:
            await transport.publish("work", message("first"))
            await asyncio.to_thread(server.write_down)
            await asyncio.to_thread(server.ctl, "set_vm_memory_high_watermark", "0.000001")
            publishing = [asyncio.create_task(transport.publish("work", message("unread")))]
            async with asyncio.timeout(PATIENCE):
                while not transport._publisher._link.is_blocked:  # noqa: ASYNC110  # nothing else tells
                    await asyncio.sleep(0.01)
            publishing.append(asyncio.create_task(transport.publish("work", message("unsent"))))
            await asyncio.sleep(0)
            await asyncio.to_thread(server.kill)
            async with asyncio.timeout(PATIENCE):
                failed = await asyncio.gather(*publishing, return_exceptions=True)
            assert {type(each) for each in failed} == {TransportUnavailable}
            await asyncio.to_thread(server.start)
            await publish_until_taken(transport, "last")


async def test_who_waits_on_a_channel_that_is_left_hears_that(rabbitmq_url: str) -> None:
    """At once, though the broker is too busy to agree: for one that never answers another channel is opened."""
    parts = urlsplit(rabbitmq_url)
    with Proxy(parts.hostname or "", parts.port or 5672) as proxy:
        async with channel_over(proxy.url(rabbitmq_url)) as channel:
            proxy.blackhole("to_client")
            asking = [asyncio.ensure_future(channel.ask(Basic.Qos())) for _ in range(2)]
            await asyncio.sleep(0)
            channel.leave()
            async with asyncio.timeout(PATIENCE):
                heard = await asyncio.gather(*asking, return_exceptions=True)
            assert [type(each) for each in heard] == [Closed, ChannelInvalidStateError]
            assert not channel.ended.done()
            proxy.resume()
            await channel.close()
            assert channel.ended.done()


async def test_channels_that_both_close_at_the_same_moment_give_their_numbers_free(rabbitmq_url: str) -> None:
    """Of some that are given up just when RabbitMQ refuses what was asked. It ends a channel when its close is agreed
    to, and would then now and then lose the answer to ours, without which the number stays taken."""
    link = Link(read_url(rabbitmq_url)[0], "testing")
    connection = await link.open()

    async def give_up_often() -> None:
        for turn in range(150):
            async with throwaway(connection) as channel:
                with contextlib.suppress(TimeoutError, ChannelNotFoundEntity):
                    async with asyncio.timeout(turn % 10 / 1000):
                        await channel.ask(Queues.Declare(queue="no such queue", passive=True))

    try:
        await asyncio.gather(*(give_up_often() for _ in range(30)))
        async with asyncio.timeout(PATIENCE):
            while connection._client.channels:  # noqa: ASYNC110  # nothing else tells
                await asyncio.sleep(0.01)
        assert not connection.gone.done()
    finally:
        await link.close()


async def test_a_reason_that_is_cut_within_a_letter_ends_no_connection(server: RabbitServer) -> None:
    """RabbitMQ names the queue that isn't there and the virtual host, and keeps 252 bytes of that.

    4.0 fails at it, and ends the connection by itself: the next one is as good.
    """
    vhost = "\u00fc" * 40
    await asyncio.to_thread(server.ctl, "add_vhost", vhost)
    await asyncio.to_thread(server.ctl, "set_permissions", "-p", vhost, "guest", ".*", ".*", ".*")
    fails = not (await asyncio.to_thread(server.ctl, "version")).startswith("3.")
    async with opened(server.url + quote(vhost), "test") as transport:
        await transport.publish("work", message("m"))
        connection = transport._publisher._connection
        assert connection is not None
        with (
            pytest.raises(TransportUnavailable, match="INTERNAL_ERROR") if fails else contextlib.nullcontext()
        ):
            depths = await transport.topics(["t" * 160, "t" * 161])
            assert [depth.topic for depth in depths] == ["work"]
        assert connection.gone.done() == fails
        assert [depth.topic for depth in await transport.topics(["t"])] == ["work"]
    await asyncio.to_thread(server.ctl, "delete_vhost", vhost)


async def test_who_asks_on_a_channel_that_the_broker_has_closed_hears_why(rabbitmq_url: str) -> None:
    """Whoever's question it was closed for, and also who asks only then."""
    async with channel_over(rabbitmq_url) as channel:
        questions = (Queues.Declare(queue="no such queue", passive=True), Basic.Qos())
        heard = await asyncio.gather(*map(channel.ask, questions), return_exceptions=True)
        assert [type(each) for each in heard] == [ChannelNotFoundEntity] * 2
        with pytest.raises(ChannelNotFoundEntity, match="no such queue"):
            await channel.ask(Basic.Qos())


async def test_wait_queues_that_are_over_are_forgotten(
    rabbitmq_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker that delays messages all its life remembers the wait queues of now, not those of each hour before."""
    monkeypatch.setattr(queues, "_WAIT_SPAN", 0.1)
    async with opened(rabbitmq_url) as transport:
        names: set[str] = set()
        async with asyncio.timeout(PATIENCE):
            while len(names) < 20:
                names.add(transport.queues.wait(transport.queues.topic("work"), 0.01).name)
                await transport.publish("work", message(f"m-{len(names)}"), delay=0.01)
        remembered = {*transport.queues.names, *transport._publisher._declared}
        assert len(remembered & names) < 5
        await delete(rabbitmq_url, *names)


async def test_a_queue_deleted_under_its_publisher_is_made_anew(rabbitmq_url: str) -> None:
    """No message goes nowhere: what the broker returns is published again, into a new queue, delayed or not."""
    async with opened(rabbitmq_url) as transport:
        await transport.publish("work", message("gone"))
        await transport.publish("work", message("also gone"), delay=0.2)
        wait = transport.queues.wait(transport.queues.topic("work"), 0.2)
        await delete(rabbitmq_url, *transport.queues.names, wait.name)
        together = [f"m-{number}" for number in range(20)]
        await asyncio.gather(*(transport.publish("work", message(each)) for each in [*together, "m-1"]))
        listener = Listener(transport)
        for message_id in together:
            await listener.until(message_id)
        await delete(rabbitmq_url, *transport.queues.names)
        await transport.publish("work", message("delayed"), delay=0.2)
        await listener.until("delayed")
        assert "gone" not in listener.seen


async def test_what_was_given_up_comes_back_for_nobody(rabbitmq_url: str) -> None:
    """A message that is sent again isn't taken for its first copy, which went nowhere."""
    async with opened(rabbitmq_url) as transport:
        await transport.publish("work", message("m"))
        outlet = await transport._publisher._outlets.common()
        assert outlet is not None
        await give_up(outlet.publish("nowhere", Outgoing("m", b"")))
        await outlet.publish(transport.queues.topic("work").name, Outgoing("m", b""))


async def test_a_message_that_goes_nowhere_is_not_confirmed_on_a_channel_that_was_left(
    rabbitmq_url: str,
) -> None:
    """Its return and its confirm are on their way then: one isn't heard without the other."""
    async with opened(rabbitmq_url) as transport:
        outlet = await transport._publisher._outlets.common()
        assert outlet is not None
        publishing = asyncio.create_task(outlet.publish("nowhere", Outgoing("m", b"")))
        await asyncio.sleep(0)
        outlet.leave()
        async with asyncio.timeout(PATIENCE):
            with pytest.raises(Closed):
                await publishing


async def test_a_message_that_goes_nowhere_is_an_error(
    rabbitmq_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When the queue is deleted again as often as it is declared, publishing says so."""

    async def declare_and_delete(connection, queue) -> None:
        await declare(connection, queue)
        if queue.needs:
            await delete(rabbitmq_url, queue.name)

    async with opened(rabbitmq_url) as transport:
        monkeypatch.setattr(publisher, "declare", declare_and_delete)
        with pytest.raises(TransportUnavailable, match="NO_ROUTE"):
            await transport.publish("work", message("m"))
        monkeypatch.undo()
        await transport.publish("work", message("n"))
        assert await take(transport) == "n"


async def test_a_queue_that_is_full_is_an_error(server: RabbitServer) -> None:
    """What the broker refuses to keep is not taken for sent."""
    async with opened(server.url) as transport:
        await transport.publish("work", message("m"))
        await asyncio.to_thread(
            server.ctl, "set_policy", "full", "^test-", '{"max-length":1,"overflow":"reject-publish"}'
        )
        refused: TransportUnavailable | None = None
        try:
            for number in range(200):  # a quorum queue takes some more than its limit
                try:
                    await transport.publish("work", message(f"m-{number}"))
                except TransportUnavailable as exc:
                    refused = exc
                    break
        finally:
            await asyncio.to_thread(server.ctl, "clear_policy", "full")
        assert "it is full" in str(refused)
        assert isinstance(refused, TopicUnavailable)


async def test_a_queue_that_confirms_nothing_holds_up_no_other(server: RabbitServer) -> None:
    """Without a majority of its replicas a queue takes no message; the broker does, also over the same connection."""
    async with opened(server.url) as transport:
        await transport.publish("stuck", message("first"))
        await transport.publish("work", message("m"))
        stuck = transport.queues.topic("stuck").name
        await asyncio.to_thread(act, server, stuck, "suspend")
        try:
            with hurried(transport, 1.0):
                publishes = (transport.publish("stuck", message(str(number))) for number in range(100))
                failed = await asyncio.gather(*publishes, return_exceptions=True)
            assert {(type(each), "but it answers" in str(each)) for each in failed} == {
                (TopicUnavailable, True)
            }
            await transport.publish("work", message("n"))
        finally:
            await asyncio.to_thread(act, server, stuck, "resume")
        await publish_until_taken(transport, "last", "stuck")


async def test_a_queue_whose_publishers_give_up_early_holds_up_no_other(server: RabbitServer) -> None:
    """Nobody waits for as long as would show that it confirms nothing, and still it doesn't fill the channel."""
    async with (
        opened(server.url, publish_timeout=2 * PATIENCE) as transport,
        suspended(server, transport, "stuck"),
    ):
        for number in range(50):
            await give_up(transport.publish("stuck", message(str(number))), 0.1)
        async with asyncio.timeout(HELD_UP / 2):
            await transport.publish("work", message("m"))


async def test_a_queue_that_confirms_nothing_holds_up_no_other_again_and_again(server: RabbitServer) -> None:
    """However often it is tried: RabbitMQ reads nothing more from the channel that brings it a first message."""
    async with opened(server.url, publish_timeout=6.0) as transport:
        outlets = transport._publisher._outlets
        own = transport.queues.topic("stuck").name
        async with suspended(server, transport, "stuck"):
            outlets.retire(await outlets.common())
            for number in range(3):
                stuck = asyncio.create_task(transport.publish("stuck", message(str(number))))
                # Not before it is known: till then it may hold the others up.
                if number == 0:
                    with pytest.raises(TransportUnavailable, match="for the queue"):
                        await stuck
                else:
                    while not stuck.done():
                        await transport.publish("work", message("m"))
                        await asyncio.sleep(0.1)
                    assert isinstance(stuck.exception(), TopicUnavailable)
            spoiled = await outlets.common()
            assert await outlets.of(own) is not spoiled
            # It was about to be sent when the queue was set apart.
            outlets.watch()
            late = asyncio.create_task(spoiled.publish(own, Outgoing("late", b"")))
            async with asyncio.timeout(HELD_UP / 2):
                while await outlets.common() is spoiled:  # noqa: ASYNC110  # nothing else tells
                    await asyncio.sleep(0.05)
                await transport.publish("work", message("last"))
        await late
        await transport.publish("stuck", message("at last"))
        assert await outlets.of(own) is await outlets.common()


async def test_a_queue_that_is_not_declared_holds_up_no_other(
    rabbitmq_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A topic gets its first message while the queue of another waits to be declared, which is asked for once."""
    asked: list[str] = []

    async def never(connection: Connection, queue: queues.Queue) -> None:
        asked.append(queue.name)
        if queue.name == transport.queues.topic("stuck").name:
            await asyncio.get_running_loop().create_future()
        await declare(connection, queue)

    async with opened(rabbitmq_url, publish_timeout=5.0) as transport:
        monkeypatch.setattr(publisher, "declare", never)
        publishes = (transport.publish("stuck", message(str(number))) for number in range(5))
        stuck = asyncio.gather(*publishes, return_exceptions=True)
        await asyncio.sleep(0)
        await transport.publish("work", message("m"))
        assert not stuck.done()
        assert [transport.queues.topic(topic).name for topic in ("stuck", "work")] == asked
        assert {type(each) for each in await stuck} == {TopicUnavailable}


async def test_a_slow_broker_that_confirms_is_not_cut_off(server: RabbitServer) -> None:
    """Though one queue confirms nothing, and the broker takes longer than it should to answer."""
    with Proxy(server.host, server.port) as proxy:
        async with opened(proxy.url(server.url), publish_timeout=6.0) as transport:
            await transport.publish("work", message("first"))
            async with suspended(server, transport, "stuck"):
                connections = proxy.connections
                try:
                    proxy.delay(1.2)
                    late = asyncio.create_task(transport.publish("stuck", message("late")))
                    for number in range(3):
                        await transport.publish("work", message(str(number)))
                    with pytest.raises(TransportUnavailable, match=r"within 6 s"):
                        await late
                finally:
                    proxy.resume()
            await transport.publish("work", message("last"))
            assert proxy.connections == connections


async def test_publishers_that_give_up_cost_no_channel_each(
    server: RabbitServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor does their queue have to be declared anew for those that come after them."""
    async with opened(server.url) as transport:
        await transport.publish("work", message("first"))
        monkeypatch.setattr(publisher, "declare", failing)
        for number in range(200):
            await give_up(transport.publish("work", message(str(number))))
            await asyncio.sleep(0.005)
        await transport.publish("work", message("last"))
        channels = await asyncio.to_thread(server.ctl, "list_channels", "pid")
        assert len(channels.splitlines()) < 10


async def test_a_message_too_large_for_the_broker_holds_up_no_other() -> None:
    """It is told apart from those that are under way with it, though RabbitMQ closes the channel of all of them."""
    with RabbitServer(lines=["max_message_size = 20000"]) as server:
        async with opened(server.url) as transport:
            sent = [message(str(number)) for number in range(20)]
            sent.insert(10, message("large", text="x" * 20_000))
            publishes = (transport.publish("work", each) for each in sent)
            outcomes = await asyncio.gather(*publishes, return_exceptions=True)
            failed = {
                each.message_id: type(outcome)
                for each, outcome in zip(sent, outcomes, strict=True)
                if outcome
            }
            assert failed == {"large": MessageTooLarge}


async def test_a_broker_that_takes_no_more_queues_is_waited_for(server: RabbitServer) -> None:
    """A virtual host may have a limit of queues: that is told as what it is, and over when there is room again."""
    async with opened(server.url) as transport:
        listener = Listener(transport)
        await transport.publish("work", message("first"))
        await listener.until("first")
        await asyncio.to_thread(server.ctl, "set_vhost_limits", "-p", "/", '{"max-queues":1}')
        try:
            for topic, delay in (("work", 0.2), ("other", 0.0)):
                with pytest.raises(TransportUnavailable, match="takes no more queues"):
                    await transport.publish(topic, message("refused"), delay=delay)
            other = Listener(transport, "other")
            with pytest.raises(TransportUnavailable, match="takes no more queues") as unopened:
                async with opened(server.url):
                    pass
            assert not isinstance(unopened.value, TopicUnavailable)
            await transport.publish("work", message("second"))
            await listener.until("second")
        finally:
            await asyncio.to_thread(server.ctl, "clear_vhost_limits", "-p", "/")
        await transport.publish("other", message("third"))
        await other.until("third")


async def test_a_channel_closed_for_a_slow_consumer_is_opened_again(
    server: RabbitServer, caplog: pytest.LogCaptureFixture
) -> None:
    """After consumer_timeout the message comes again in the same iteration, and its late ack is harmless. The log says
    why that was."""
    async with opened(server.url) as transport:
        messages = transport.subscribe("work", prefetch=2)
        await transport.publish("work", message("slow"))
        await transport.publish("work", message("next"))
        async with asyncio.timeout(PATIENCE):
            assert (await anext(messages)).message_id == "slow"
            came = [(await anext(messages)).message_id]
            # Nothing is settled, until the broker has had enough of it.
            while "slow" not in came:
                came.append((await anext(messages)).message_id)
            await transport.ack("slow")
            await transport.ack("slow")
            await transport.ack("next")
            await transport.publish("work", message("last"))
            while "last" not in came:
                came.append((await anext(messages)).message_id)
            await transport.ack("last")
        await messages.aclose()  # type: ignore[attr-defined]
        assert "delivery acknowledgement on channel" in caplog.text


async def test_a_message_whose_consumers_die_becomes_a_dead_letter(rabbitmq_url: str) -> None:
    """RabbitMQ takes it out at the delivery limit, and it is recorded like our own dead letters."""
    letters: list[DeadLetter] = []
    came = asyncio.Event()

    async def bury(letter: DeadLetter) -> None:
        letters.append(letter)
        came.set()

    namespace = f"test-{secrets.token_hex(6)}"
    async with opened(rabbitmq_url, namespace, delivery_limit=2) as transport:
        await transport.publish("wörk", message("poison"))
        for _ in range(3):
            victim = RabbitMQTransport(rabbitmq_url, namespace=namespace, delivery_limit=2)
            await victim.connect()
            assert await take(victim, "wörk", ack=False) == "poison"
            await victim.close()
        transport.bury_with(bury)
        listener = Listener(transport, "wörk")
        await asyncio.wait_for(came.wait(), PATIENCE)
        [letter] = letters
        assert (letter.id, letter.topic, letter.reason, letter.attempts) == (
            "poison",
            "wörk",
            "delivery_limit",
            3,
        )
        assert b'"run-of-poison"' in letter.body
        assert listener.seen == []


async def test_what_is_returned_on_purpose_does_not_reach_the_limit(rabbitmq_url: str) -> None:
    """nack counts no delivery of a dead consumer: the message comes again, however low the limit is."""
    async with opened(rabbitmq_url, delivery_limit=2) as transport:
        await transport.publish("work", message("m"))
        for _ in range(8):
            assert await take(transport, ack=False) == "m"
            await transport.nack("m")
        assert await take(transport) == "m"


async def test_an_alarm_stops_publishers_only(server: RabbitServer) -> None:
    """While the broker takes no messages a publish ends in time and says why, consumers go on, and who asks what waits
    is told."""
    async with opened(server.url) as transport:
        await transport.publish("other", message("m"))
        for number in range(3):
            await transport.publish("work", message(f"m-{number}"))
        await asyncio.to_thread(server.ctl, "set_vm_memory_high_watermark", "0.000001")
        try:
            listener = Listener(transport)
            with hurried(transport, 5.0):
                with pytest.raises(TransportUnavailable, match="within 5 s"):
                    await transport.publish("work", message("refused"))
                with pytest.raises(TransportUnavailable, match="memory or disk alarm"):
                    await transport.publish("work", message("refused as well"))
            await listener.until("m-2")
            # It reads nothing more from who has published, no ack either. From who hasn't ("blocking") it does.
            states = await asyncio.to_thread(server.ctl, "list_connections", "state", "client_properties")
            for role, state in (("publishing", "blocked"), ("receiving", "blocking")):
                assert re.search(rf"^{state}\t.*paigeant {role}", states, re.M), states
            async with opened(server.url) as other:
                with pytest.raises(TransportUnavailable, match=r"memory or disk alarm .*; give it room"):
                    await other.check_room()
            [depth] = await transport.topics()
            assert (depth.topic, depth.waiting) == ("other", 1)
            assert not transport._publisher._link._apart
        finally:
            await asyncio.to_thread(server.ctl, "set_vm_memory_high_watermark", "0.6")
        await publish_until_taken(transport, "after")
        await listener.until("after")
        await transport.check_room()
        assert [depth.topic for depth in await transport.topics()] == ["other"]


# -- what others have written


ODD_HEADERS: list[dict[str, Any]] = [
    {"paigeant-attempts": "abc"},
    {"paigeant-attempts": 10**18},
    {"paigeant-attempts": -5},
    {"paigeant-attempts": None},
    {"x-delivery-count": "abc"},
    {"x-delivery-count": 2**62},
    {"paigeant-due-ms": "abc"},
    {"paigeant-due-ms": 2**62},
    {"paigeant-due-ms": [1]},
]

ODD_DEATHS: list[dict[str, Any]] = [
    {"x-death": "abc"},
    {"x-death": [1]},
    {"x-death": [{"queue": 3, "reason": [1]}]},
    {"paigeant-reason": 1, "paigeant-detail": [2], "paigeant-topic": {"a": 3}},
    {"paigeant-reason": "word", "paigeant-attempts": "abc"},
    {"paigeant-reason": "word", "paigeant-attempts": 10**18},
]


async def test_odd_headers_stop_nobody(rabbitmq_url: str) -> None:
    """Whoever may write to a queue chooses the headers: none ends an iteration, delays a message or hides a letter."""
    graveyard = Graveyard()
    async with opened(rabbitmq_url) as transport:
        transport.bury_with(graveyard.bury)
        listener = Listener(transport)
        await transport.publish("work", message("first"))
        await listener.until("first")
        queue = transport.queues.topic("work").name
        for number, headers in enumerate(ODD_HEADERS):
            good = transport.envelope.seal(message(f"m-{number}"), "work")
            await send(rabbitmq_url, queue, good, headers)
            await send(rabbitmq_url, queue, b"nonsense", headers, message_id=f"bad-{number}")
            await listener.until(f"m-{number}")
        for number, headers in enumerate(ODD_DEATHS):
            dead = transport.queues.dead.name
            await send(rabbitmq_url, dead, b"nonsense", headers, message_id=f"dead-{number}")
        await graveyard.until(len(ODD_HEADERS) + len(ODD_DEATHS))
        bad = [letter.attempts for letter in graveyard.letters if letter.id.startswith("bad")]
        assert bad == [1] * len(ODD_HEADERS), "what can't be read counts for nothing"


UNREADABLE = {
    "an id that is no UTF-8": b"\x00\x80" + b"\x03\xff\xfe\xfd",
    "a header whose name is no UTF-8": b"\x20\x00" + b"\x00\x00\x00\x04" + b"\x01\xff" + b"t\x01",
    "a time behind all dates": b"\x00\x40" + b"\x7f" + b"\xff" * 7,
}
"""Properties as they stand in a frame: the flags of those that are there, and their values."""


@pytest.mark.parametrize("properties", UNREADABLE.values(), ids=UNREADABLE.keys())
async def test_properties_that_nobody_can_read_hold_nothing_up(rabbitmq_url: str, properties: bytes) -> None:
    """Neither the connection nor what waits behind them in the queue: what is no message is a dead letter."""
    graveyard = Graveyard()

    class Unreadable(Basic.Properties):
        def marshal(self) -> bytes:
            return properties

    async with opened(rabbitmq_url) as transport:
        transport.bury_with(graveyard.bury)
        await transport.publish("work", message("first"))
        queue = transport.queues.topic("work").name
        connection = await aiormq.connect(rabbitmq_url)
        channel = await connection.channel()
        await channel.basic_publish(b"nonsense", routing_key=queue, properties=Unreadable())
        await connection.close()
        await transport.publish("work", message("last"))
        listener = Listener(transport)
        await listener.until("last")
        await graveyard.until(1)
        assert listener.seen == ["first", "last"]
        assert graveyard.letters[0].body == b"nonsense"


async def test_of_long_bodies_the_beginning_is_kept_and_the_length(rabbitmq_url: str) -> None:
    """By both each is known that says no id of its own: none is lost for another that begins alike."""
    graveyard = Graveyard()

    class Nameless(Basic.Properties):
        """Of a message without any: aiormq gives each an id."""

        def marshal(self) -> bytes:
            return bytes(2)

    async with opened(rabbitmq_url, envelope=PlainEnvelope(1_000)) as transport:
        transport.bury_with(graveyard.bury)
        await transport.publish("work", message("first"))
        queue = transport.queues.topic("work").name
        connection = await aiormq.connect(rabbitmq_url)
        channel = await connection.channel()
        for length in (100_000, 100_001):
            await channel.basic_publish(b"[" * length, routing_key=queue, properties=Nameless())
        await connection.close()
        await transport.publish("work", message("last"))
        await Listener(transport).until("last")
        await graveyard.until(2)
    assert [letter.reason for letter in graveyard.letters] == ["too_large"] * 2
    assert [letter.body for letter in graveyard.letters] == [b"[" * BODY_KEPT_BYTES] * 2
    for letter, told in zip(graveyard.letters, ("100,000", "100,001"), strict=True):
        assert f"has {told} bytes" in letter.detail
    assert len({letter.id for letter in graveyard.letters}) == 2


async def test_a_routing_key_that_nobody_can_read_holds_nothing_up(rabbitmq_url: str) -> None:
    """A header has RabbitMQ send a message to further queues, whatever it was addressed to."""
    graveyard = Graveyard()

    class Unreadable(Basic.Publish):
        def marshal(self) -> bytes:
            return b"\x00\x00" + b"\x00" + b"\x03\xff\xfe\xfd" + b"\x00"

    async with opened(rabbitmq_url) as transport:
        transport.bury_with(graveyard.bury)
        await transport.publish("work", message("first"))
        listener = Listener(transport)
        await listener.until("first")
        connection = transport._receiving._connection
        header = ContentHeader(body_size=8, properties=Basic.Properties())
        header.properties.headers = {"CC": [transport.queues.topic("work").name]}
        async with channel_over(rabbitmq_url) as channel:
            for each in (Unreadable(), header, ContentBody(b"nonsense")):
                channel.write(frame.marshal(each, channel.number))
            await channel.ask(Basic.Qos())
        await graveyard.until(1)
        assert graveyard.letters[0].body == b"nonsense"
        await transport.publish("work", message("last"))
        await listener.until("last")
        assert transport._receiving._connection is connection


async def test_a_letter_that_is_not_kept_comes_again(rabbitmq_url: str) -> None:
    """Whatever the keeper of dead letters raises, the message is given back and the iteration goes on."""
    graveyard = Graveyard(failures=2)
    async with opened(rabbitmq_url) as transport:
        transport.bury_with(graveyard.bury)
        listener = Listener(transport)
        await transport.publish("work", message("first"))
        await listener.until("first")
        await send(rabbitmq_url, transport.queues.topic("work").name, b"nonsense", {}, message_id="bad")
        await graveyard.until(1)
        await transport.publish("work", message("last"))
        await listener.until("last")
        assert [letter.id for letter in graveyard.letters] == ["bad"]


async def test_a_letter_is_kept_whatever_its_reason_says(caplog: pytest.LogCaptureFixture) -> None:
    """As much of it as a frame holds and UTF-8 can say. RabbitMQ ends the connection for more."""
    with RabbitServer(lines=["frame_max = 4096"]) as server:
        async with opened(server.url) as transport:
            await transport.publish("work", message("m"))
            assert await take(transport, ack=False) == "m"
            await transport.dead_letter("m", "r\ud800" * 3000 + ": " + "\u00e4" * 5000)
            graveyard = Graveyard()
            transport.bury_with(graveyard.bury)
            listener = Listener(transport)
            await graveyard.until(1)
            await transport.publish("work", message("next"))
            await listener.until("next")
    assert [letter.id for letter in graveyard.letters] == ["m"]
    assert graveyard.letters[0].reason.startswith("r?r?")


async def test_a_message_that_is_lost_while_it_is_opened_comes_once(rabbitmq_url: str) -> None:
    """Who gets it could settle it no more, and another in its place: it comes again."""
    opening, go_on = asyncio.Event(), asyncio.Event()

    class Slow(PlainEnvelope):
        async def open(self, topic: str, wire: bytes) -> PaigeantMessage:
            opening.set()
            await go_on.wait()
            return await super().open(topic, wire)

    async with opened(rabbitmq_url, envelope=Slow()) as transport:
        await transport.publish("work", message("m"))
        listener = Listener(transport)
        await opening.wait()
        transport._receiving.cut()
        (line,) = (each._line for each in transport._feeds)
        assert line is not None
        await line.channel.ended
        await asyncio.sleep(0)
        go_on.set()
        await listener.until("m")
        await transport.publish("work", message("last"))
        await listener.until("last")
        assert listener.seen == ["m", "last"]


async def test_a_message_whose_opening_fails_is_given_back(
    rabbitmq_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is raised, the next iteration gets the message, and no channel stays behind."""
    async with opened(rabbitmq_url) as transport:
        await transport.publish("work", message("m"))
        monkeypatch.setattr(transport.envelope, "open", failing)
        with pytest.raises(ZeroDivisionError):
            await take(transport)
        monkeypatch.undo()
        async with asyncio.timeout(PATIENCE):
            assert await take(transport) == "m"


async def test_the_broker_s_dead_letters_outlive_any_error(
    rabbitmq_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that can't be told about is given back, and those that come later are recorded as well."""
    monkeypatch.setattr("paigeant.transports.rabbitmq.transport.LONGEST_PAUSE_SECONDS", 0.05)
    graveyard = Graveyard()
    async with opened(rabbitmq_url) as transport:
        transport.bury_with(graveyard.bury)
        unpacked, calls = letters.unpacked, 0

        def fails_first(*args: Any) -> DeadLetter:
            nonlocal calls
            calls += 1
            if calls == 1:
                raise ZeroDivisionError
            return unpacked(*args)

        monkeypatch.setattr(letters, "unpacked", fails_first)
        for name in ("one", "two"):
            await send(rabbitmq_url, transport.queues.dead.name, b"nonsense", {}, message_id=name)
        listener = Listener(transport)
        await graveyard.until(2)
        assert {letter.id for letter in graveyard.letters} == {"one", "two"}
        assert listener.seen == []


async def test_a_return_that_is_refused_settles_the_message(rabbitmq_url: str) -> None:
    """Where the wait queue can't be declared nack raises, and the message comes again."""
    async with opened(rabbitmq_url) as transport:
        await transport.publish("work", message("m"))
        await spoil(rabbitmq_url, transport, 1.0)
        async with asyncio.timeout(PATIENCE), contextlib.aclosing(transport.subscribe("work")) as messages:  # type: ignore[type-var]
            assert (await anext(messages)).message_id == "m"
            with pytest.raises(TopicUnavailable, match="other settings"):
                await transport.nack("m", delay=1.0)
            assert (await anext(messages)).message_id == "m"
            await transport.ack("m")


async def test_a_return_that_is_refused_does_not_come_at_once(server: RabbitServer) -> None:
    """A message that can't wait in a queue waits here, else it would come hundreds of times in a second."""
    async with opened(server.url) as transport:
        await transport.publish("work", message("m"))
        await asyncio.to_thread(server.ctl, "set_vhost_limits", "-p", "/", '{"max-queues":1}')
        returned: list[float] = []
        try:
            async with asyncio.timeout(PATIENCE):
                async for received in transport.subscribe("work"):
                    if returned:
                        assert time.monotonic() - returned[-1] >= 0.2
                    if len(returned) == 3:
                        break
                    returned.append(time.monotonic())
                    with pytest.raises(TransportUnavailable):
                        await transport.nack(received.message_id, delay=0.2)
        finally:
            await asyncio.to_thread(server.ctl, "clear_vhost_limits", "-p", "/")


async def test_a_rejection_that_fails_does_not_come_at_once(rabbitmq_url: str) -> None:
    """While dead letters can't be kept a message that is to become one doesn't go round and round."""
    graveyard = Graveyard(failures=2)
    async with opened(rabbitmq_url) as transport:
        transport.bury_with(graveyard.bury)
        await transport.publish("work", message("m"))
        failed: list[float] = []
        async with asyncio.timeout(PATIENCE):
            async for received in transport.subscribe("work"):
                if failed:
                    assert time.monotonic() - failed[-1] >= 0.5
                try:
                    await transport.dead_letter(received.message_id, "unwanted")
                except OSError:
                    failed.append(time.monotonic())
                else:
                    break
        assert (len(failed), [letter.id for letter in graveyard.letters]) == (2, ["m"])


async def test_a_round_that_is_refused_settles_the_message(
    rabbitmq_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a message that isn't due can't go on to wait it is given back; once it can it comes when it is due."""
    async with opened(rabbitmq_url) as transport:
        transport.queues.longest_wait = 0.2
        await transport.publish("work", message("m"), delay=1.0)
        async with asyncio.timeout(PATIENCE):
            monkeypatch.setattr(transport, "_post", refusing)
            with pytest.raises(ConfigurationError):
                await take(transport)
            monkeypatch.undo()
            assert await take(transport) == "m"


# -- settings


async def test_a_user_needs_the_rights_that_the_guide_names(server: RabbitServer) -> None:
    """With configure and read on our queues and write on the default exchange all works; without, it is told."""
    namespace = f"test-{secrets.token_hex(6)}"
    ours = f"^{namespace}[.:]"
    await asyncio.to_thread(server.ctl, "add_user", "orders", "word")
    await asyncio.to_thread(server.ctl, "set_permissions", "orders", ours, r"^amq\.default$", ours)
    url = f"amqp://orders:word@127.0.0.1:{server.port}/"
    transport = RabbitMQTransport(url, namespace=namespace)
    await transport.connect()
    try:
        listener = Listener(transport)
        await transport.publish("work", message("m"))
        await transport.publish("work", message("delayed"), delay=0.1)
        await listener.until("m")
        await listener.until("delayed")
        assert await transport.topics() == []
        stranger = RabbitMQTransport(url, namespace="others")
        with pytest.raises(ConfigurationError, match="may not declare the queue 'others:dead-letters'"):
            await stranger.connect()
        await stranger.close()
    finally:
        await transport.close()
        await delete(server.url, *transport.queues.names)


@pytest.mark.parametrize(("write", "read"), [("^$", "{ours}"), (r"^amq\.default$", "^$")])
async def test_a_right_that_lacks_is_told_at_the_start(server: RabbitServer, write: str, read: str) -> None:
    """Without write or read no queue of a topic can be declared: connect() says so, not the first message."""
    namespace = f"test-{secrets.token_hex(6)}"
    ours = f"^{namespace}[.:]"
    await asyncio.to_thread(server.ctl, "add_user", namespace, "word")
    rights = (ours, write, read.format(ours=ours))
    await asyncio.to_thread(server.ctl, "set_permissions", namespace, *rights)
    transport = RabbitMQTransport(f"amqp://{namespace}:word@127.0.0.1:{server.port}/", namespace=namespace)
    with pytest.raises(
        ConfigurationError, match=r"may not declare the queue.*configure and read.*amq\.default"
    ):
        await transport.connect()
    await transport.close()
    await delete(server.url, *transport.queues.names)


async def test_a_failed_start_leaves_no_connection(server: RabbitServer) -> None:
    """Whoever opens an application again and again until it may has no more connections than before."""
    await asyncio.to_thread(server.ctl, "add_user", "barred", "word")
    await asyncio.to_thread(server.ctl, "set_permissions", "barred", "^$", "^$", "^$")
    url = f"amqp://barred:word@127.0.0.1:{server.port}/"
    with Proxy(server.host, server.port) as proxy:
        settings = Settings(transport_url=proxy.url(url), store_url="sqlite:///store.db", signing="off")
        for _ in range(3):
            with pytest.raises(ConfigurationError, match="may not declare"):
                async with Paigeant(settings):
                    pass
        assert proxy.connections == 3
        async with asyncio.timeout(PATIENCE):
            while proxy.open_connections:  # noqa: ASYNC110  # nobody tells when
                await asyncio.sleep(0.01)


async def test_a_second_start_that_fails_closes_nothing_for_good(server: RabbitServer) -> None:
    """Connecting twice is harmless, also to a broker that is away: who publishes when it is back is served."""
    with Proxy(server.host, server.port) as proxy:
        async with opened(proxy.url(server.url)) as transport:
            proxy.refuse()
            with pytest.raises(TransportUnavailable):
                await transport.connect()
            proxy.resume()
            await transport.publish("work", message("m"))
            assert await take(transport) == "m"


async def test_an_aiormq_that_works_in_another_way_is_told(
    rabbitmq_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """connect() says so where it asks for what our channels don't have: nothing would ever be confirmed."""
    monkeypatch.delattr(Channel, "put")
    transport = RabbitMQTransport(rabbitmq_url)
    with pytest.raises(ConfigurationError, match="install aiormq"):
        await transport.connect()
    await transport.close()


@pytest.mark.parametrize(
    "error", [AttributeError("a word"), TypeError("a word"), ZeroDivisionError("a word")]
)
async def test_an_error_of_our_own_is_told_as_what_it_is(
    rabbitmq_url: str, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """No other aiormq would mend it, and no heartbeat was missed."""

    def fails(*_: object) -> None:
        raise error

    monkeypatch.setattr(Outlet, "_confirmed", fails)
    async with opened(rabbitmq_url) as transport:
        with pytest.raises(TransportUnavailable, match=f"{type(error).__name__}.*a word"):
            await transport.publish("work", message("first"))
        monkeypatch.undo()
        await transport.publish("work", message("second"))


async def test_wrong_passwords_are_told(server: RabbitServer) -> None:
    """connect() says whom the broker refuses, and shows no password."""
    transport = RabbitMQTransport(f"amqp://guest:secret-word@127.0.0.1:{server.port}/")
    with pytest.raises(
        ConfigurationError, match=rf"127.0.0.1:{server.port} refuses the user 'guest'"
    ) as caught:
        await transport.connect()
    assert "secret-word" not in str(caught.value)
    await transport.close()


async def test_a_way_to_log_in_that_the_broker_lacks_is_told(rabbitmq_url: str) -> None:
    """connect() doesn't take it for a wrong password."""
    transport = RabbitMQTransport(f"{rabbitmq_url}?auth=external")
    with pytest.raises(
        ConfigurationError, match=r"by EXTERNAL, but by .*PLAIN.*; correct the parameter auth"
    ):
        await transport.connect()
    await transport.close()


async def test_a_wrong_virtual_host_is_told(rabbitmq_url: str) -> None:
    """connect() names the virtual host and how to make it."""
    transport = RabbitMQTransport(f"{rabbitmq_url}nowhere")
    with pytest.raises(ConfigurationError, match="add_vhost nowhere"):
        await transport.connect()
    await transport.close()


@pytest.mark.parametrize(
    ("url", "said"),
    [
        (
            "amqp://guest:secret-word@127.0.0.1:{port}/",
            r"127.0.0.1:{port} can't be reached: .*Connect call failed",
        ),
        ("amqp://guest:secret-word@nowhere.invalid/", r"nowhere.invalid:5672 can't be reached"),
        ("amqps://guest:secret-word@127.0.0.1:{port}/", r"127.0.0.1:{port} can't be reached"),
    ],
)
async def test_a_broker_that_is_not_there_is_told(url: str, said: str) -> None:
    """connect() says where it looked, and shows no password."""
    port = free_port()
    transport = RabbitMQTransport(url.format(port=port))
    with pytest.raises(TransportUnavailable, match=said.format(port=port)) as caught:
        await transport.connect()
    assert "secret-word" not in str(caught.value)
    with pytest.raises(TransportUnavailable):
        await transport.publish("work", message("m"))
    with pytest.raises(TransportUnavailable):
        await transport.topics(["work"])
    await transport.close()


async def test_another_server_on_the_port_is_told(redis_url: str) -> None:
    """What answers nothing that AMQP knows is not waited for without end."""
    transport = RabbitMQTransport(redis_url.replace("redis://", "amqp://").partition("/0")[0])
    with pytest.raises(TransportUnavailable, match="can't be reached"):
        await asyncio.wait_for(transport.connect(), PATIENCE)
    await transport.close()


async def test_a_queue_of_another_type_is_told(rabbitmq_url: str) -> None:
    """Publishing, subscribing and connecting say which setting doesn't fit, and what to do."""
    namespace = f"test-{secrets.token_hex(6)}"
    async with opened(rabbitmq_url, namespace) as quorum:
        await quorum.publish("work", message("m"))
        classic = RabbitMQTransport(rabbitmq_url, namespace=namespace, queue_type="classic")
        with pytest.raises(ConfigurationError, match=f"'{namespace}:dead-letters'.*Set queue_type"):
            await classic.connect()
        await delete(rabbitmq_url, f"{namespace}:dead-letters")
        await classic.connect()
        with pytest.raises(TopicUnavailable, match=f"'{namespace}.work'.*Set queue_type"):
            await classic.publish("work", message("n"))
        with pytest.raises(ConfigurationError, match=f"'{namespace}.work'.*Set queue_type"):
            await anext(classic.subscribe("work"))
        await classic.publish("other", message("n"))
        assert await take(classic, "other") == "n"
        await classic.close()


async def test_tls_is_verified(tmp_path: Path) -> None:
    """amqps works with the authority that the URL names, and with no other, and amqp not on its port; a file that is
    missing, or isn't what it should be, is told."""
    make_certificate(tmp_path)
    port = free_port()
    lines = [
        f"listeners.ssl.1 = 127.0.0.1:{port}",
        f"ssl_options.cacertfile = {tmp_path}/cert.pem",
        f"ssl_options.certfile = {tmp_path}/cert.pem",
        f"ssl_options.keyfile = {tmp_path}/key.pem",
    ]
    with RabbitServer(lines=lines) as server:
        server.ctl("await_startup")  # RabbitMQ 4 opens this port some time after the other
        url = f"amqps://guest:guest@127.0.0.1:{port}/"
        transport = RabbitMQTransport(f"{url}?cafile={tmp_path}/cert.pem")
        await transport.connect()
        listener = Listener(transport)
        await transport.publish("work", message("m"))
        await listener.until("m")
        await asyncio.to_thread(server.restart)
        await publish_until_taken(transport, "n")
        await listener.until("n")
        await transport.close()
        stranger = RabbitMQTransport(url)
        with pytest.raises(TransportUnavailable, match=r"CERTIFICATE_VERIFY_FAILED.*with cafile=/path"):
            await stranger.connect()
        await stranger.close()
        for wrong, said in (
            (url.replace("amqps:", "amqp:"), r"whether it speaks TLS \(amqp:// was asked for\)"),
            (server.url.replace("amqp:", "amqps:"), "it seems not to speak TLS on this port"),
        ):
            mixed_up = RabbitMQTransport(wrong)
            with pytest.raises(TransportUnavailable, match=said):
                await mixed_up.connect()
            await mixed_up.close()
        mistaken = RabbitMQTransport(f"{url}?cafile={tmp_path}/none.pem")
        with pytest.raises(ConfigurationError, match="cafile"):
            await mistaken.connect()
        await mistaken.close()
        (tmp_path / "words.pem").write_text("words")
        for wrong in (f"cafile={tmp_path}/words.pem", f"cafile={tmp_path}", f"certfile={tmp_path}/cert.pem"):
            unreadable = RabbitMQTransport(f"{url}?{wrong}")
            with pytest.raises(ConfigurationError, match=r"can't be read: .*; correct cafile"):
                await unreadable.connect()
            await unreadable.close()
        careless = RabbitMQTransport(f"{url}?no_verify_ssl=1")
        await careless.connect()
        await careless.close()


# -- what isn't broken


async def test_many_publishes_are_under_way_at_once(rabbitmq_url: str) -> None:
    """A thousand at the same time, many of them of one id, are all confirmed and all there."""
    async with opened(rabbitmq_url) as transport:
        await asyncio.gather(
            *(transport.publish("work", message(f"m-{number % 500}")) for number in range(1000))
        )
        [depth] = await transport.topics()
        assert depth.waiting == 1000


async def test_a_dispatcher_needs_no_worker(rabbitmq_url: str) -> None:
    """What is published before anybody has ever subscribed is there for who comes first."""
    namespace = f"test-{secrets.token_hex(6)}"
    async with opened(rabbitmq_url, namespace) as transport:
        await transport.publish("work", message("m"))
    # `opened` has deleted the queues; a publisher that closes leaves them
    async with opened(rabbitmq_url, namespace) as transport:
        await transport.publish("work", message("m"))
        await transport.close()
        async with opened(rabbitmq_url, namespace) as worker:
            assert await take(worker) == "m"


async def take(transport: RabbitMQTransport, topic: str = "work", *, ack: bool = True) -> str:
    """The id of the next message."""
    async with asyncio.timeout(PATIENCE), contextlib.aclosing(transport.subscribe(topic)) as messages:  # type: ignore[type-var]
        received: PaigeantMessage = await anext(messages)
    if ack:
        await transport.ack(received.message_id)
    return received.message_id


class Graveyard:
    """Keeps dead letters, after `failures` attempts in which it doesn't."""

    def __init__(self, failures: int = 0) -> None:
        self.letters: list[DeadLetter] = []
        self._failures = failures
        self._came = asyncio.Event()

    async def bury(self, letter: DeadLetter) -> None:
        if self._failures:
            self._failures -= 1
            raise OSError("the store is away")
        self.letters.append(letter)
        self._came.set()

    async def until(self, count: int) -> None:
        """Wait until so many have come."""
        async with asyncio.timeout(PATIENCE):
            while len(self.letters) < count:
                self._came.clear()
                await self._came.wait()


@contextlib.asynccontextmanager
async def channel_over(url: str) -> AsyncIterator[Channel]:
    """A channel on a connection of its own."""
    link = Link(read_url(url)[0], "testing")
    try:
        yield await Channel.open(await link.open())
    finally:
        await link.close()


async def failing(*_: object) -> PaigeantMessage:
    """In the place of what opens a message."""
    raise ZeroDivisionError


async def give_up(publishing: Coroutine[Any, Any, None], seconds: float = 0.0) -> None:
    """Publish, and wait for a confirm no longer than that."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await publishing


def act(server: RabbitServer, queue: str, how: str) -> None:
    """Have the one replica that a quorum queue has on one node suspended, resumed, stopped or restarted."""
    found = f'rabbit_amqqueue:lookup(rabbit_misc:r(<<"/">>, queue, <<"{queue}">>))'
    acts = {
        "suspend": "sys:suspend(Name)",
        "resume": "sys:resume(Name)",
        "stop": "ra:stop_server(quorum_queues, {Name, node()})",
        "restart": "ra:restart_server(quorum_queues, {Name, node()})",
    }
    server.ctl("eval", f"{{ok, Queue}} = {found}, {{Name, _}} = amqqueue:get_pid(Queue), {acts[how]}.")


@contextlib.asynccontextmanager
async def suspended(server: RabbitServer, transport: RabbitMQTransport, topic: str) -> AsyncIterator[None]:
    """The queue of `topic` has taken a message, and takes no other meanwhile."""
    await transport.publish(topic, message("first"))
    queue = transport.queues.topic(topic).name
    await asyncio.to_thread(act, server, queue, "suspend")
    try:
        yield
    finally:
        await asyncio.to_thread(act, server, queue, "resume")


def breaking(monkeypatch: pytest.MonkeyPatch, server: RabbitServer, times: int) -> None:
    """Have the broker close all connections so often when a queue is opened to receive from it."""

    async def breaks(connection: Connection, queue: queues.Queue) -> None:
        nonlocal times
        if times:
            times -= 1
            await asyncio.to_thread(server.ctl, "close_all_connections", "a test")
        await declare(connection, queue)

    monkeypatch.setattr(feed, "declare", breaks)
    monkeypatch.setattr(feed, "OPEN_SECONDS", 60.0)  # which on a busy machine that command may take


async def receiving(server: RabbitServer) -> int:
    """How many connections to receive over there are."""
    listed = await asyncio.to_thread(server.ctl, "list_connections", "client_properties")
    return listed.count("paigeant receiving")


async def refusing(*_: object) -> None:
    """In the place of what sends a message."""
    raise ConfigurationError("the queue is there with other settings")


async def send(url: str, queue: str, body: bytes, headers: dict[str, Any], **properties: Any) -> None:
    """Put a message into a queue as a foreign publisher would."""
    async with await aio_pika.connect(url) as connection, connection.channel() as channel:
        sent = aio_pika.Message(body, headers=headers, **properties)
        await channel.default_exchange.publish(sent, routing_key=queue)


async def spoil(url: str, transport: RabbitMQTransport, delay: float) -> None:
    """Declare the wait queue for `delay` in another way than the transport would."""
    queue = transport.queues.wait(transport.queues.topic("work"), delay)
    async with await aio_pika.connect(url) as connection, connection.channel() as channel:
        await channel.declare_queue(queue.name, durable=True, arguments={"x-queue-type": "classic"})


async def delete(url: str, *names: str) -> None:
    """Delete these queues."""
    async with await aio_pika.connect(url) as connection, connection.channel() as channel:
        for name in names:
            await channel.queue_delete(name)


def make_certificate(folder: Path) -> None:
    """A key and a certificate signed with it, for 127.0.0.1."""
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"),
            *("-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"),
            *("-keyout", str(folder / "key.pem"), "-out", str(folder / "cert.pem")),
        ],
        check=True,
        capture_output=True,
    )
    for file in folder.iterdir():
        file.chmod(0o644)


@contextlib.asynccontextmanager
async def other_settings(rabbitmq_url: str) -> AsyncIterator[tuple[Settings, RabbitMQTransport]]:
    """The settings of an application whose queue of the topic `work` is there with other settings, and whose it is."""
    namespace = f"test-{secrets.token_hex(6)}"
    settings = Settings(transport_url=rabbitmq_url, store_url="memory://", namespace=namespace, signing="off")
    other = RabbitMQTransport(rabbitmq_url, namespace=namespace, delivery_limit=5)
    await other.connect()
    try:
        await other.publish("work", message("m"))
        yield settings, other
    finally:
        await other.close()
        await delete(rabbitmq_url, *other.queues.names)


async def test_a_worker_says_which_queue_has_other_settings(
    rabbitmq_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """It goes on without that topic, and tries again: what to do is one line, and no traceback."""
    activity = ActivityRegistry()

    @activity.execute()
    async def work() -> None: ...

    async with (
        other_settings(rabbitmq_url) as (settings, _),
        Paigeant(settings, activities=activity) as app,
        asyncio.timeout(PATIENCE),
    ):
        with caplog.at_level(logging.WARNING):
            async with working(app.worker()):
                while "can't receive from work" not in caplog.text:  # noqa: ASYNC110  # nothing else tells
                    await asyncio.sleep(0.02)
    assert "is there with other settings" in caplog.text
    assert "Traceback" not in caplog.text


async def test_a_step_whose_queue_has_other_settings_is_owed(
    rabbitmq_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """It is sent as soon as the queue is mended, like one whose broker was away, and the log says what is wrong."""
    async with other_settings(rabbitmq_url) as (settings, other), Paigeant(settings) as app:
        run = await app.dispatch(Workflow("w", ["work"]), {})
        caplog.clear()
        owed = await app.forwarder.send_again(await app.store.open_steps(run.id))
        assert list(owed.values()) == ["work"]
        assert "not published to work, will be sent again: the queue" in caplog.text
        await delete(rabbitmq_url, other.queues.topic("work").name)
        assert await app.forwarder.send_again([], owed) == {}
        assert [topic.topic for topic in await app.transport.topics(["work"])] == ["work"]
