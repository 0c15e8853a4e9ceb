"""The transport on RabbitMQ keeps what `Transport` promises, on quorum queues and on classic ones."""

from __future__ import annotations

import asyncio
import re
import secrets
from collections.abc import AsyncIterator
from typing import ClassVar, Literal

import aio_pika
import pytest
import pytest_asyncio
from tests.patience import PATIENCE

from paigeant.clock import Clock
from paigeant.envelope import PlainEnvelope
from paigeant.errors import ConfigurationError
from paigeant.store import DeadLetter
from paigeant.testing import ManualClock
from paigeant.testing.conformance import TransportConformance
from paigeant.testing.conformance.transports import message
from paigeant.transport import Transport
from paigeant.transports.rabbitmq import RabbitMQTransport
from paigeant.transports.rabbitmq.headers import count, instant


class TestQuorumQueues(TransportConformance):
    tells_topics = False  # it doesn't know what others hold, nor since when anything waits
    merges_repeats = False
    hold = None
    delay = 3.0
    queue_type: ClassVar[Literal["quorum", "classic"]] = "quorum"

    @pytest_asyncio.fixture(autouse=True)
    async def _own_queues(self, rabbitmq_url: str) -> AsyncIterator[None]:
        self.url = rabbitmq_url
        self.namespace = f"test-{secrets.token_hex(6)}"
        self.letter_came = asyncio.Event()
        self.made: list[RabbitMQTransport] = []
        yield
        names = {name for made in self.made for name in made.queues.names}
        async with await aio_pika.connect(self.url) as connection, connection.channel() as channel:
            for name in names:
                await channel.queue_delete(name)

    def make(self, clock: Clock | None = None) -> RabbitMQTransport:
        made = RabbitMQTransport(
            self.url,
            namespace=self.namespace,
            envelope=PlainEnvelope(self.limit_bytes),
            queue_type=self.queue_type,
            clock=clock,
        )
        self.made.append(made)
        return made

    async def pass_time(self, seconds: float) -> None:
        await asyncio.sleep(seconds)

    async def deliver_raw(self, transport: Transport, topic: str, message_id: str, body: bytes) -> None:
        assert isinstance(transport, RabbitMQTransport)
        queue = transport.queues.topic(topic)
        async with await aio_pika.connect(self.url) as connection, connection.channel() as channel:
            await channel.declare_queue(queue.name, durable=True, arguments=dict(queue.arguments))
            sent = aio_pika.Message(body, message_id=message_id)
            await channel.default_exchange.publish(sent, routing_key=queue.name)

    # -- what is said of RabbitMQ alone

    async def test_a_rejected_message_is_out_of_its_topic(self, transport: Transport) -> None:
        """dead_letter takes a message out for good and keeps it with its reason, its bytes and its attempts."""
        await super().test_a_rejected_message_is_out_of_its_topic(transport)

    async def test_known_topics_are_counted(self, transport: Transport) -> None:
        """topics() tells what waits in those that it is asked about or has used, and makes no queue by that."""
        await transport.publish("work", message("a"))
        await transport.publish("work", message("b"))
        await transport.publish("empty", message("c"))
        await self.take_and_ack(transport, topic="empty")
        await self.take(transport)
        async with self.other(transport) as other:
            depths = await other.topics(("empty", "nobody-ever", "work", "never"))
            assert [(depth.topic, depth.waiting, depth.oldest) for depth in depths] == [("work", 1, None)]
            assert await other.topics() == [], "it has used none"
        assert [depth.topic for depth in await transport.topics()] == ["work"]

    async def test_it_joins_no_store(self, transport: Transport) -> None:
        """Nothing is published inside a store's transaction."""
        from paigeant.stores.memory import MemoryStore

        assert not transport.joins(MemoryStore())

    async def test_a_message_twice_delivered_is_settled_twice(self, transport: Transport) -> None:
        """Each delivery of an id is settled for itself, the first one first."""
        await transport.publish("work", message("m"))
        await transport.publish("work", message("m"))
        assert await self.take(transport, 2) == ["m", "m"]
        await transport.ack("m")
        await transport.nack("m")
        assert await self.take_and_ack(transport) == ["m"]
        assert await self.is_empty(transport)

    async def test_an_id_may_be_longer_than_amqp_allows(self, transport: Transport) -> None:
        """Ids come out of the message itself, where that can be read."""
        long = "m" * 300
        await transport.publish("work", message(long))
        assert await self.take(transport) == [long]
        await transport.nack(long, delay=0.01)
        assert await self.take_and_ack(transport) == [long]
        assert await self.is_empty(transport)

    async def test_a_longer_delay_than_any_queue_holds_is_kept(self, transport: Transport) -> None:
        """A message that has further to go than a wait queue takes it goes another round, and is never early."""
        assert isinstance(transport, RabbitMQTransport)
        transport.queues.longest_wait = 0.1
        began = asyncio.get_running_loop().time()
        await transport.publish("work", message("later"), delay=0.45)
        assert await self.is_empty(transport)
        assert await self.take(transport) == ["later"]
        assert asyncio.get_running_loop().time() - began >= 0.45
        began = asyncio.get_running_loop().time()
        await transport.nack("later", delay=0.25)
        assert await self.take(transport) == ["later"]
        assert asyncio.get_running_loop().time() - began >= 0.25
        await transport.dead_letter("later", "enough")
        [letter] = self.letters
        assert letter.attempts == 2, "rounds are no attempts"

    async def test_the_clock_says_when_a_long_delay_is_over(self) -> None:
        """A message that goes round after round is delivered once the transport's clock has reached its time."""
        clock = ManualClock()
        transport = self.make(clock)
        transport.queues.longest_wait = 0.1
        await transport.connect()
        await transport.publish("work", message("next week"), delay=604_800)
        clock.advance(604_799)
        assert await self.is_empty(transport)
        clock.advance(1)
        assert await self.take_and_ack(transport) == ["next week"]
        await transport.close()

    async def test_what_is_returned_often_stays(self, transport: Transport) -> None:
        """However often a message is given back it is delivered again, beyond any limit of the broker."""
        await transport.publish("work", message("m"))
        for _ in range(25):
            assert await self.take(transport) == ["m"]
            await transport.nack("m")
        assert await self.take_and_ack(transport) == ["m"]
        assert self.letters == []
        assert await self.is_empty(transport)

    async def test_an_iteration_that_settles_nothing_goes_on(self, transport: Transport) -> None:
        """More consumers fetch for it; once all is settled no more is fetched ahead than was asked for."""
        ids = [f"m-{n}" for n in range(12)]
        for message_id in ids:
            await transport.publish("work", message(message_id))
        messages = transport.subscribe("work", prefetch=2)
        held = [(await anext(messages)).message_id for _ in range(6)]
        for message_id in held:
            await transport.ack(message_id)
        one = (await anext(messages)).message_id
        async with self.other(transport) as other:
            rest = await self.take(other, 3)
            assert len({*held, one, *rest}) == 10
            assert len(ids) - 10 == 2, "two are fetched ahead"
        await messages.aclose()  # type: ignore[attr-defined]

    async def test_dead_letters_are_kept_without_a_store(self, transport: Transport) -> None:
        """Without `bury_with` they wait in a queue, whole, for one that has a store."""
        lone = self.make()
        await lone.connect()
        await self.deliver_raw(lone, "work", "b", b"nonsense")
        await lone.publish("work", message("m"))
        assert await self.take(lone) == ["m"]
        await lone.dead_letter("m", "not_wanted")
        await lone.close()
        taking = asyncio.create_task(self.take(transport, topic="any"))
        await self.until_letters(2)
        taking.cancel()
        by_id = {letter.id: letter for letter in self.letters}
        assert (by_id["b"].reason, by_id["b"].topic, by_id["b"].body) == ("not_json", "work", b"nonsense")
        assert (by_id["m"].reason, by_id["m"].topic, by_id["m"].attempts) == ("not_wanted", "work", 1)
        assert b'"run-of-m"' in by_id["m"].body

    async def test_a_dead_letter_outlasts_a_store_that_is_away(
        self, transport: Transport, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """What can't be recorded is held and tried again, and is recorded once."""
        monkeypatch.setattr("paigeant.transports.rabbitmq.transport.LONGEST_PAUSE_SECONDS", 0.01)
        lone = self.make()
        await lone.connect()
        await self.deliver_raw(lone, "work", "b", b"nonsense")
        assert await self.is_empty(lone)
        await lone.close()
        refusals = 3

        async def bury(letter: DeadLetter) -> None:
            nonlocal refusals
            if refusals:
                refusals -= 1
                raise RuntimeError("no store")
            await self._bury(letter)

        transport.bury_with(bury)
        taking = asyncio.create_task(self.take(transport, topic="any"))
        await self.until_letters(1)
        taking.cancel()
        assert refusals == 0
        assert [letter.id for letter in self.letters] == ["b"]

    async def until_letters(self, count: int) -> None:
        async with asyncio.timeout(PATIENCE):
            while len(self.letters) < count:
                self.letter_came.clear()
                await self.letter_came.wait()

    async def _bury(self, letter: DeadLetter) -> None:
        await super()._bury(letter)
        self.letter_came.set()


class TestClassicQueues(TestQuorumQueues):
    queue_type = "classic"


def test_wait_queues_hold_at_least_as_long() -> None:
    """Each delay has a queue that holds it no shorter, at most a third longer, and ten queues serve a decade."""
    queues = RabbitMQTransport("amqp://host").queues

    def milliseconds(delay: float) -> int:
        return int(queues.wait(queues.topic("work"), delay).arguments["x-message-ttl"])

    waits = {}
    for step in range(1, 60_000):
        delay = step * 1.2345 / 1000
        waits[delay] = milliseconds(delay) / 1000
    assert all(wait >= delay for delay, wait in waits.items())
    assert all(wait <= delay * 1.3347 for delay, wait in waits.items() if delay >= 0.03)
    assert len({wait for wait in waits.values() if 0.1 < wait <= 1.0}) == 10
    for exact in (0.01, 0.5, 1.0, 2.0, 5.0, 15.0, 30.0, 60.0, 300.0, 600.0):
        assert milliseconds(exact) == exact * 1000
    assert milliseconds(0.0000001) == 10
    assert milliseconds(86_400) == 86_400_000


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("amqp://host/?queue_type=stream", "expected quorum or classic"),
        ("amqp://host/?namespace=a:b", "expected up to 100 letters"),
        ("amqp://host/?namespace=a.b", "expected up to 100 letters"),  # its topic c would be a's topic b.c
        ("amqp://host/?namespace=amq", "keeps for itself"),
        ("amqp://host/?queue_type=classic&delivery_limit=3", "for quorum queues"),
        ("amqp://host/?delivery_limit=many", "expected a whole number"),
        ("amqp://host/?delivery_limit=9999999999", "nine digits"),
        ("amqp://host/?heartbeat=abc", "whole number of seconds"),
        ("amqp://host/?heartbeat=65535", "whole number of seconds"),
        ("amqp://host/?heartbaet=5", "did you mean 'heartbeat'"),
        ("amqps://host/?no_verify_ssl=false", "no_verify_ssl of transport_url is 1 or 0"),
        ("amqp://host/?auth=amqplain", "auth of transport_url is plain or external"),
        ("amqp://", "expected amqp://"),
        ("amqp://host:many/", "expected amqp://"),
    ],
)
def test_a_setting_that_cannot_be_is_refused(url: str, said: str) -> None:
    """What is wrong in the URL is said at once, without its password."""
    with pytest.raises(ConfigurationError, match=said):
        RabbitMQTransport(url)


@pytest.mark.parametrize(
    "topic", ["work", "a b", "a.b:c/d", "*", "50%+~", "ünïcödé \U0001f600", "", "a\x00b\n", "ü" * 200]
)
def test_a_queue_tells_its_topic(topic: str) -> None:
    """The name of a queue is one that AMQP and pamqp allow, belongs to one topic, and says which."""
    queues = RabbitMQTransport("amqp://host").queues
    queue = queues.topic(topic)
    for each in (queue, queues.wait(queue, 60.0)):
        assert re.fullmatch(r"[a-zA-Z0-9-_.:@#,/+ ]{1,255}", each.name)
    assert queues.topic_of(queue.name, {"other", topic}) == topic
    assert queue.name != queues.topic("other").name


def test_the_url_names_settings_of_ours() -> None:
    """Namespace, type of the queues and limit may stand in the URL, which aio-pika gets without them."""
    made = RabbitMQTransport("amqp://u:p@host/v?namespace=mine&delivery_limit=7&heartbeat=3")
    assert made.queues.topic("t").name == "mine.t"
    assert made.queues.topic("t").arguments["x-delivery-limit"] == 7
    classic = RabbitMQTransport("amqp://host?queue_type=classic").queues.topic("t")
    assert classic.arguments["x-queue-type"] == "classic"


@pytest.mark.parametrize("found", ["1", None, True, -1, 2**31, 2**63, 1.0, float("nan"), [1], b"1"])
def test_a_header_that_is_no_count_is_the_default(found: object) -> None:
    """Only a whole number that is no larger than others can hold is believed."""
    assert count({"name": found}, "name", 7) == 7
    assert count({"name": 2**31 - 1}, "name", 7) == 2**31 - 1


@pytest.mark.parametrize("found", ["1", None, True, float("nan"), float("inf"), 10**400, [1], b"1"])
def test_a_header_that_is_no_instant_is_none(found: object) -> None:
    """Only a finite number is believed."""
    assert instant({"name": found}, "name") is None
    assert instant({"name": 1500}, "name") == 1.5
