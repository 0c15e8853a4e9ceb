"""The promises of `Transport`, as tests.

Whether something is *not* delivered is found out without waiting: a message that was published after it comes instead.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import ClassVar

import pytest
import pytest_asyncio

from paigeant.errors import MessageTooLarge, StoreUnavailable
from paigeant.message import PaigeantMessage
from paigeant.slip import RoutingSlip, Step
from paigeant.store import DeadLetter
from paigeant.testing.clock import ManualClock
from paigeant.testing.conformance.bench import PATIENCE
from paigeant.transport import BODY_KEPT_BYTES, Transport

__all__ = ["TransportConformance"]


def message(name: str, **payload: object) -> PaigeantMessage:
    """A message with the id `name`."""
    return PaigeantMessage(
        message_id=name,
        workflow_id=f"run-of-{name}",
        routing_slip=RoutingSlip(itinerary=(Step("work", id="work"),)),
        payload=payload,
    )


class TransportConformance:
    """Derive from it, give the class a name that begins with Test, and say how to make a transport."""

    pytestmark: ClassVar = [pytest.mark.asyncio]

    shared: ClassVar[bool] = True
    """Whether two transports made for the same place have the same messages, like two processes."""
    durable: ClassVar[bool] = True
    """Whether a message outlives all transports of its place being closed."""
    tells_topics: ClassVar[bool] = True
    """Whether `topics()` can count."""
    ordered: ClassVar[bool] = True
    """Whether messages come in the order in which they were published."""
    merges_repeats: ClassVar[bool] = True
    """Whether it knows a message that still waits when the same id is published again."""
    hold: ClassVar[float | None] = 30.0
    """Seconds after which an unsettled message comes back although its consumer lives; None: only when that is gone."""
    delay: ClassVar[float] = 60.0
    """Seconds for which the tests delay messages. Short where time can't be set."""
    limit_bytes: ClassVar[int] = 1024 * 1024
    """The size that `make` limits messages to."""

    clock: ManualClock
    place: Path

    # -- what an adapter's class says

    def make(self) -> Transport:
        """A transport, not yet connected, for `place`: an empty folder of this test. Its time is `clock`, if it can."""
        raise NotImplementedError

    async def deliver_raw(self, transport: Transport, topic: str, message_id: str, body: bytes) -> None:
        """Put `body` into the topic as it is, as a broken or foreign publisher would."""
        raise NotImplementedError

    async def pass_time(self, seconds: float) -> None:
        """Let time pass: sets the clock. An adapter with a clock of its own waits."""
        self.clock.advance(seconds)

    # -- fixtures and helpers

    @pytest_asyncio.fixture
    async def transport(self, tmp_path: Path) -> AsyncIterator[Transport]:
        """A connected transport on an empty place. It keeps its dead letters in `letters`."""
        self.clock = ManualClock()
        self.place = tmp_path
        self.letters: list[DeadLetter] = []
        transport = self.make()
        transport.bury_with(self._bury)
        await transport.connect()
        yield transport
        await transport.close()

    async def _bury(self, letter: DeadLetter) -> None:
        self.letters.append(letter)

    @contextlib.asynccontextmanager
    async def other(self, transport: Transport) -> AsyncIterator[Transport]:
        """Another transport of the same place, where that has the same messages; else the same one."""
        if not self.shared:
            yield transport
            return
        other = self.make()
        other.bury_with(self._bury)
        await other.connect()
        try:
            yield other
        finally:
            await other.close()

    async def take(
        self, transport: Transport, count: int = 1, *, topic: str = "work", prefetch: int = 1
    ) -> list[str]:
        """The ids of the next `count` messages, not yet acked."""
        async with (
            asyncio.timeout(PATIENCE),
            contextlib.aclosing(transport.subscribe(topic, prefetch=prefetch)) as messages,  # type: ignore[type-var]  # an async generator in every adapter
        ):
            return [(await anext(messages)).message_id for _ in range(count)]

    async def take_and_ack(self, transport: Transport, count: int = 1, *, topic: str = "work") -> list[str]:
        """The ids of the next `count` messages, which are gone then."""
        ids = await self.take(transport, count, topic=topic)
        for message_id in ids:
            await transport.ack(message_id)
        return ids

    async def is_empty(self, transport: Transport, topic: str = "work") -> bool:
        """Whether a message that is published now is the next to come."""
        await transport.publish(topic, message("marker"))
        return await self.take_and_ack(transport, topic=topic) == ["marker"]

    # -- publish and subscribe

    async def test_a_message_arrives_whole(self, transport: Transport) -> None:
        """What was published comes out equal: slip, payload, headers, ids."""
        sent = PaigeantMessage(
            message_id="m-1",
            workflow_id="run-1",
            routing_slip=RoutingSlip(
                itinerary=(Step("work", id="a", args={"n": 2**70}, when="n > 1", retries=2, timeout=1.5),)
            ),
            payload={"text": "ä\u2028 \U0001f600", "n": 2**70, "f": 0.1, "none": None, "": {"deep": [[]]}},
            workflow="w",
            correlation_id="c",
            trace_id="t",
            headers={"traceparent": "00-1-2-01"},
        )
        await transport.publish("work", sent)
        async with contextlib.aclosing(transport.subscribe("work")) as messages:  # type: ignore[type-var]  # an async generator in every adapter
            assert await asyncio.wait_for(anext(messages), PATIENCE) == sent

    async def test_a_waiting_subscriber_is_woken(self, transport: Transport) -> None:
        """Who waits for a message gets it when it is published."""
        taking = asyncio.create_task(self.take(transport))
        await asyncio.sleep(0)
        await transport.publish("work", message("m"))
        assert await taking == ["m"]

    async def test_a_message_goes_to_its_topic_only(self, transport: Transport) -> None:
        """A subscriber gets the messages of its topic, no others."""
        await transport.publish("other", message("elsewhere"))
        await transport.publish("work", message("here"))
        assert await self.take_and_ack(transport) == ["here"]
        assert await self.take_and_ack(transport, topic="other") == ["elsewhere"]

    async def test_a_topic_may_have_any_name(self, transport: Transport) -> None:
        """Names of topics are the user's: blanks, dots, colons, stars and other scripts."""
        for topic in ("a b", "a.b:c/d", "*", "ünïcödé", "a" * 200):
            await transport.publish(topic, message(f"for {topic}"))
            assert await self.take_and_ack(transport, topic=topic) == [f"for {topic}"]

    async def test_messages_come_in_order(self, transport: Transport) -> None:
        """What was published first comes first, where the transport keeps an order; else all of it comes."""
        ids = [f"m-{n}" for n in range(10)]
        for message_id in ids:
            await transport.publish("work", message(message_id))
        taken = await self.take_and_ack(transport, len(ids))
        assert taken == ids if self.ordered else sorted(taken) == ids

    async def test_a_message_has_one_consumer(self, transport: Transport) -> None:
        """A message that one subscriber holds is not given to another."""
        await transport.publish("work", message("first"))
        assert await self.take(transport) == ["first"]
        async with self.other(transport) as other:
            assert await self.is_empty(other)

    async def test_the_same_id_twice_is_one_message(self, transport: Transport) -> None:
        """Publishing a message whose id still waits in the topic adds none."""
        await transport.publish("work", message("m"))
        await transport.publish("work", message("m"))
        taken = await self.take_and_ack(transport)
        if not self.merges_repeats:
            taken += await self.take_and_ack(transport)
        assert set(taken) == {"m"}
        assert await self.is_empty(transport)

    async def test_an_id_may_come_again_after_its_ack(self, transport: Transport) -> None:
        """An id that was acked is free: a message that is sent again on purpose is delivered."""
        await transport.publish("work", message("m"))
        await self.take_and_ack(transport)
        await transport.publish("work", message("m"))
        assert await self.take(transport) == ["m"]

    async def test_a_message_above_the_limit_is_refused(self, transport: Transport) -> None:
        """A message that is too large is an error for who publishes it, and arrives nowhere."""
        with pytest.raises(MessageTooLarge):
            await transport.publish("work", message("large", text="x" * self.limit_bytes))
        assert await self.is_empty(transport)

    # -- delay

    async def test_a_delayed_message_does_not_come_early(self, transport: Transport) -> None:
        """What is published later without a delay comes first; the delayed one comes when its time has come."""
        await transport.publish("work", message("later"), delay=self.delay)
        assert await self.is_empty(transport)
        await self.pass_time(self.delay)
        assert await self.take(transport) == ["later"]

    async def test_a_shorter_delay_goes_before_a_longer_one(self, transport: Transport) -> None:
        """Delays run side by side: a message that is due earlier isn't held up by one before it."""
        await transport.publish("work", message("long"), delay=self.delay)
        await transport.publish("work", message("short"), delay=self.delay / 2)
        await self.pass_time(self.delay / 2)
        assert await self.take(transport) == ["short"]
        await self.pass_time(self.delay / 2)
        assert await self.take(transport) == ["long"]

    # -- ack

    async def test_an_acked_message_is_gone(self, transport: Transport) -> None:
        """Acked is forgotten: it comes neither to this transport nor to another, nor after the hold."""
        await transport.publish("work", message("m"))
        await self.take_and_ack(transport)
        assert await self.is_empty(transport)
        await self.pass_time((self.hold or 0) + 1)
        async with self.other(transport) as other:
            assert await self.is_empty(other)

    async def test_acking_what_is_not_held_changes_nothing(self, transport: Transport) -> None:
        """Acking twice, acking what is unknown, and acking what was returned are harmless."""
        await transport.publish("work", message("m"))
        await transport.ack("m")
        await transport.ack("unknown")
        assert await self.take(transport) == ["m"]
        await transport.nack("m")
        await transport.ack("m")
        assert await self.take_and_ack(transport) == ["m"]
        await transport.ack("m")
        assert await self.is_empty(transport)

    async def test_an_ack_of_another_transport_changes_nothing(self, transport: Transport) -> None:
        """Only who holds a message can ack, return or dead-letter it."""
        if not self.shared:
            return  # one object is one consumer there
        await transport.publish("work", message("m"))
        assert await self.take(transport) == ["m"]
        async with self.other(transport) as other:
            await other.ack("m")
            await other.nack("m")
            await other.dead_letter("m", "not mine")
            assert await self.is_empty(other)
        await transport.nack("m")
        assert await self.take(transport) == ["m"]
        assert self.letters == []

    # -- nack

    async def test_a_returned_message_comes_again(self, transport: Transport) -> None:
        """nack gives a message back, to whoever asks next."""
        await transport.publish("work", message("m"))
        await self.take(transport)
        await transport.nack("m")
        async with self.other(transport) as other:
            assert await self.take(other) == ["m"]

    async def test_a_message_can_be_returned_for_later(self, transport: Transport) -> None:
        """nack with a delay gives a message back that isn't due before that."""
        await transport.publish("work", message("m"))
        await self.take(transport)
        await transport.nack("m", delay=self.delay)
        assert await self.is_empty(transport)
        await self.pass_time(self.delay)
        assert await self.take(transport) == ["m"]

    async def test_a_return_wakes_a_waiting_subscriber(self, transport: Transport) -> None:
        """Who waits gets a message that another consumer returns."""
        await transport.publish("work", message("m"))
        await self.take(transport)
        async with self.other(transport) as other:
            taking = asyncio.create_task(self.take(other))
            await asyncio.sleep(0)
            await transport.nack("m")
            assert await taking == ["m"]

    # -- what is neither acked nor returned

    async def test_an_unsettled_message_comes_back_when_its_consumer_closes(
        self, transport: Transport
    ) -> None:
        """close() gives back what was delivered and not acked."""
        await transport.publish("work", message("m"))
        async with self.other(transport) as other:
            assert await self.take(other) == ["m"]
            await other.close()
            await transport.connect()
            assert await self.take(transport) == ["m"]

    async def test_an_unsettled_message_comes_back_by_itself(self, transport: Transport) -> None:
        """A message that its consumer forgot about is delivered again."""
        if self.hold is None:
            return  # it comes back when its consumer is gone, which is another test's fact
        await transport.publish("work", message("m"))
        assert await self.take(transport) == ["m"]
        await self.pass_time(self.hold + 1)
        assert await self.take(transport) == ["m"]

    async def test_an_ended_subscription_gives_back_what_it_fetched(self, transport: Transport) -> None:
        """What was fetched ahead and not yielded goes to others at once when the iteration ends."""
        ids = [f"m-{n}" for n in range(5)]
        for message_id in ids:
            await transport.publish("work", message(message_id))
        first = await self.take(transport, 2, prefetch=5)
        async with self.other(transport) as other:
            rest = await self.take(other, 3)
        assert sorted(first + rest) == ids

    async def test_a_dead_letter_that_can_t_be_kept_ends_no_subscription(self, transport: Transport) -> None:
        """While the store can't take a dead letter, the subscription goes on; the letter comes again, and is kept."""
        troubled = iter([True])

        async def bury(letter: DeadLetter) -> None:
            if next(troubled, False):
                raise StoreUnavailable("away")
            self.letters.append(letter)

        transport.bury_with(bury)
        await self.deliver_raw(transport, "work", "broken", b"no message")
        await transport.publish("work", message("whole"))
        assert await self.take_and_ack(transport) == ["whole"]
        await self.pass_time((self.hold or 0) + 1)
        async with asyncio.timeout(PATIENCE):
            while not self.letters:
                assert await self.is_empty(transport)
        assert [letter.body for letter in self.letters] == [b"no message"]

    async def test_prefetch_leaves_the_rest_to_others(self, transport: Transport) -> None:
        """No more than `prefetch` messages are fetched ahead of the one that is yielded."""
        ids = [f"m-{n}" for n in range(6)]
        for message_id in ids:
            await transport.publish("work", message(message_id))
        async with (
            asyncio.timeout(PATIENCE),
            contextlib.aclosing(transport.subscribe("work", prefetch=2)) as messages,  # type: ignore[type-var]  # an async generator in every adapter
            self.other(transport) as other,
        ):
            first = (await anext(messages)).message_id
            rest = await self.take(other, 3)
            assert len({first, *rest}) == 4

    # -- dead letters

    async def test_an_undecodable_body_becomes_a_dead_letter(self, transport: Transport) -> None:
        """It is kept with reason and bytes, and the iterator goes on with what is good."""
        bad = {
            "b-1": b"not json",
            "b-2": b'{"spec_version":"9.0"}',
            "b-3": b"\xff\xfe",
            "b-4": b'{"a":1,"a":2}',
        }
        for message_id, body in bad.items():
            await self.deliver_raw(transport, "work", message_id, body)
        await transport.publish("work", message("good"))
        assert await self.take_and_ack(transport) == ["good"]
        assert {letter.id: letter.body for letter in self.letters} == bad
        reasons = {letter.id: letter.reason for letter in self.letters}
        assert reasons == {
            "b-1": "not_json",
            "b-2": "unsupported_version",
            "b-3": "not_utf8",
            "b-4": "duplicate_key",
        }
        assert {letter.topic for letter in self.letters} == {"work"}

    async def test_a_dead_letter_keeps_a_bounded_part_of_its_body(self, transport: Transport) -> None:
        """A large rejected body doesn't fill the store."""
        await self.deliver_raw(transport, "work", "b", b"x" * (BODY_KEPT_BYTES + 1))
        assert await self.is_empty(transport)
        assert [len(letter.body) for letter in self.letters] == [BODY_KEPT_BYTES]

    async def test_a_rejected_message_is_out_of_its_topic(self, transport: Transport) -> None:
        """dead_letter takes a message out for good and keeps it with its reason, its bytes and its attempts."""
        await transport.publish("work", message("m"))
        await self.take(transport)
        await transport.nack("m")
        await self.take(transport)
        await transport.dead_letter("m", "signature_rejected")
        assert await self.is_empty(transport)
        [letter] = self.letters
        assert (letter.id, letter.topic, letter.reason) == ("m", "work", "signature_rejected")
        assert b'"run-of-m"' in letter.body
        assert letter.attempts == 2

    async def test_rejecting_twice_keeps_one_letter(self, transport: Transport) -> None:
        """dead_letter for what is gone changes nothing."""
        await transport.publish("work", message("m"))
        await self.take(transport)
        await transport.dead_letter("m", "first")
        await transport.dead_letter("m", "second")
        await transport.dead_letter("unknown", "third")
        assert [letter.reason for letter in self.letters] == ["first"]

    # -- topics

    async def test_topics_are_counted(self, transport: Transport) -> None:
        """topics() tells what waits, what is taken, and the age of the oldest, by name, and of no empty topic."""
        known = ("work", "nobody-ever", "also")
        assert await transport.topics(known) == []
        if not self.tells_topics:
            return
        await transport.publish("work", message("a"))
        await self.pass_time(5)
        await transport.publish("work", message("b"))
        await transport.publish("also", message("c"), delay=self.delay)
        await self.take(transport)
        also, work = await transport.topics(known)
        assert (also.topic, also.waiting, also.taken) == ("also", 1, 0)
        assert (work.topic, work.waiting, work.taken) == ("work", 1, 1)
        assert work.oldest == pytest.approx(5, abs=0.5)

    # -- opening and closing

    async def test_connecting_and_closing_twice_is_harmless(self, transport: Transport) -> None:
        """A second connect or close changes nothing, and a closed transport can be opened again."""
        await transport.connect()
        await transport.publish("work", message("m"))
        await transport.close()
        await transport.close()
        await transport.connect()
        await transport.publish("work", message("n"))
        assert "n" in await self.take(transport, 2 if self.durable or not self.shared else 1)

    async def test_closing_ends_subscriptions(self, transport: Transport) -> None:
        """An iteration that is under way ends when its transport is closed."""
        await transport.publish("work", message("m"))
        seen = []
        began = asyncio.Event()

        async def consume() -> None:
            async for received in transport.subscribe("work"):
                seen.append(received.message_id)
                await transport.ack(received.message_id)
                began.set()

        consuming = asyncio.create_task(consume())
        await asyncio.wait_for(began.wait(), PATIENCE)
        await transport.close()
        await asyncio.wait_for(consuming, PATIENCE)
        assert seen == ["m"]

    async def test_messages_outlive_their_transport(self, transport: Transport) -> None:
        """What was published is there for the next process, where the transport is durable."""
        if not self.durable:
            return
        await transport.publish("work", message("m"))
        await transport.publish("work", message("later"), delay=self.delay)
        await transport.close()
        async with self.other(transport) as other:
            assert await self.take_and_ack(other) == ["m"]
            await self.pass_time(self.delay)
            assert await self.take_and_ack(other) == ["later"]

    async def test_several_consumers_share_the_messages(self, transport: Transport) -> None:
        """Each of many messages goes to exactly one of several consumers."""
        ids = {f"m-{n}" for n in range(60)}
        for message_id in ids:
            await transport.publish("work", message(message_id))
        taken: list[str] = []
        done = asyncio.Event()

        async def consume(consumer: Transport) -> None:
            async for received in consumer.subscribe("work", prefetch=3):
                taken.append(received.message_id)
                await consumer.ack(received.message_id)
                if len(taken) >= len(ids):
                    done.set()

        async with self.other(transport) as other:
            consuming = [asyncio.create_task(consume(each)) for each in (transport, transport, other)]
            await asyncio.wait_for(done.wait(), PATIENCE)
            for task in consuming:
                task.cancel()
            await asyncio.gather(*consuming, return_exceptions=True)
        assert sorted(taken) == sorted(ids)
