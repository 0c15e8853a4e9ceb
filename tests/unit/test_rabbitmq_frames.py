"""What travels between us and RabbitMQ for each message: bytes of frames, their order, and messages made of them."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import pytest
from aio_pika.exceptions import AMQPConnectionError
from aiormq.abc import DeliveredMessage
from pamqp import frame
from pamqp.body import ContentBody
from pamqp.commands import Basic, Channel
from pamqp.header import ContentHeader
from yarl import URL

from paigeant.errors import ConfigurationError
from paigeant.transports.rabbitmq import frames
from paigeant.transports.rabbitmq.frames import Outgoing
from paigeant.transports.rabbitmq.passage import Passage
from paigeant.transports.rabbitmq.wire import Wire


def read(data: bytes) -> list[tuple[int, Any]]:
    """The frames in `data` as pamqp reads them, each with its channel."""
    found = []
    while data:
        size, channel, each = frame.unmarshal(data)
        found.append((channel, each))
        data = data[size:]
    return found


@pytest.mark.parametrize("headers", [None, {"paigeant-attempts": 3, "paigeant-topic": "pay"}])
def test_a_message_is_published_as_pamqp_reads_it(headers: dict[str, Any] | None) -> None:
    """Persistent and mandatory, with its id and its headers."""
    sent = frames.publishing(7, "paigeant.pay", Outgoing("r/pay/do/0", b"{}", headers), most_bytes=4096)
    (one, method), (two, header), (three, body) = read(sent)
    assert (one, two, three) == (7, 7, 7)
    assert dict(method) == dict(Basic.Publish(routing_key="paigeant.pay", mandatory=True))
    assert header.body_size == 2
    assert header.properties == Basic.Properties(
        content_type="application/json", delivery_mode=2, message_id="r/pay/do/0", headers=headers
    )
    assert body.value == b"{}"


@pytest.mark.parametrize(
    ("size", "most_bytes", "sizes"),
    [(0, 20, []), (12, 20, [12]), (13, 20, [12, 1]), (30, 20, [12, 12, 6]), (30, 0, [30])],
)
def test_a_body_is_cut_into_frames(size: int, most_bytes: int, sizes: list[int]) -> None:
    """No frame has more bytes than both sides have agreed on; 0 is no limit."""
    body = bytes(range(size))
    _, _, *parts = read(frames.publishing(1, "q", Outgoing("m", body), most_bytes=most_bytes))
    assert [len(part.value) for _, part in parts] == sizes
    assert b"".join(part.value for _, part in parts) == body


def test_a_message_is_settled_as_pamqp_reads_it() -> None:
    """An ack for one message, and a nack that has it delivered again."""
    [(channel, ack)] = read(frames.ack(7, 2**40))
    assert (channel, dict(ack)) == (7, dict(Basic.Ack(delivery_tag=2**40, multiple=False)))
    [(channel, nack)] = read(frames.give_back(7, 5))
    assert (channel, dict(nack)) == (7, dict(Basic.Nack(delivery_tag=5, multiple=False, requeue=True)))


@pytest.mark.parametrize("parts", [[], [b"all"], [b"in ", b"three ", b"parts"]])
async def test_messages_are_put_together_from_their_frames(parts: list[bytes]) -> None:
    """Nothing of a message gets to aiormq, and all else does, in its order."""
    messages: list[DeliveredMessage] = []
    channel, passage = passing(messages)
    others = channel.frames_before
    body = b"".join(parts)
    own = [Basic.Deliver(delivery_tag=1), ContentHeader(body_size=len(body)), *map(ContentBody, parts)]
    for each in (Basic.ConsumeOk(), *own, Basic.Cancel(), *own):
        await channel.frames.put((0, each))
    assert [message.body for message in messages] == [body, body]
    assert [type(others.get_nowait()[1]) for _ in range(others.qsize())] == [Basic.ConsumeOk, Basic.Cancel]
    assert not passage.is_closed


async def test_nothing_is_sent_on_a_channel_that_the_broker_has_closed() -> None:
    """From the frame that says so on, which aiormq reads later: RabbitMQ would end the whole connection."""
    channel, passage = passing([])
    passage.write(b"before")
    await channel.frames.put((0, Channel.Close(406, "no", 0, 0)))
    assert passage.is_closed
    with pytest.raises(RuntimeError, match="closed"):
        passage.write(b"after")
    assert channel.written == [b"before"]


async def test_nothing_is_sent_on_a_channel_that_is_being_closed() -> None:
    """From when the close is sent on."""
    channel, passage = passing([])
    closing = asyncio.create_task(passage.close())
    await channel.asked_to_close.wait()
    assert not channel.is_closed
    with pytest.raises(RuntimeError, match="closed"):
        passage.write(b"after")
    closing.cancel()


async def test_a_channel_is_closed_whose_answer_nobody_awaits() -> None:
    """By aiormq, or by us where it was given up before it was asked for: else its messages would never be settled."""
    channel, passage = passing([])
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0):
            await passage.ask(asyncio.sleep(3600))
    with pytest.raises(RuntimeError, match="closed"):
        passage.write(b"after")
    await channel.asked_to_close.wait()


async def test_a_close_that_the_end_of_the_connection_forestalls_is_no_trouble() -> None:
    """Nobody waits for it, so nobody would take its error, and the event loop would tell of that."""
    told: list[Any] = []
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _, trouble: told.append(trouble))
    channel, passage = passing([])
    asked = asyncio.Event()

    async def close(_: object) -> None:
        asked.set()
        raise AMQPConnectionError("gone")

    channel.close = close
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0):
            await passage.ask(asyncio.sleep(3600))
    await asked.wait()
    del passage, channel
    gc.collect()
    assert told == []


async def test_an_answer_that_comes_another_way_is_told() -> None:
    """Where a newer aiormq no longer uses what stands in the place of its queue, nothing would ever be confirmed."""
    channel, passage = passing([])
    with pytest.raises(ConfigurationError, match=r"aiormq \d.*install aiormq"):
        await passage.ask(asyncio.sleep(0))
    await channel.frames.put((0, Basic.QosOk()))
    await passage.ask(asyncio.sleep(0))


async def test_writes_of_one_turn_arrive_in_their_order() -> None:
    """The first goes at once, the others together, and before all that follows."""
    async with connected() as (wire, writer, received):
        for each in (b"1", b"2", b"3"):
            wire.write(each)
        await writer.drain()
        wire.write(b"4")
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        wire.write(b"5")
        wire.write(b"6")
        writer.close()
        assert await received == b"123456"


async def test_much_that_is_written_in_one_turn_is_kept_once() -> None:
    """However much a peer that doesn't read leaves here, only little of it waits for the end of the turn."""
    async with connected() as (wire, writer, received):
        sent = [bytes([number]) * 100_000 for number in range(100)]
        for each in sent:
            wire.write(each)
        assert writer.transport.get_write_buffer_size() > sum(map(len, sent)) // 2
        writer.close()
        assert await received == b"".join(sent)


async def test_a_wire_that_is_cut_takes_what_is_written_with_it() -> None:
    """Nobody hears an error from the end of the turn: the end of the connection tells."""
    async with connected() as (wire, writer, received):
        wire.write(b"1")
        wire.write(b"2")
        wire.cut()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert writer.is_closing()
        assert b"2" not in await received


def passing(messages: list[DeliveredMessage]) -> tuple[Any, Passage]:
    """A channel as far as a passage needs one, and its passage, which puts messages into that list."""
    queue: asyncio.Queue[Any] = asyncio.Queue()
    written: list[bytes] = []
    asked_to_close = asyncio.Event()

    async def close(_: object) -> None:
        asked_to_close.set()
        await asyncio.sleep(0)

    channel: Any = SimpleNamespace(
        frames=queue,
        frames_before=queue,
        is_closed=False,
        written=written,
        close=close,
        asked_to_close=asked_to_close,
    )
    connection: Any = SimpleNamespace(wire=SimpleNamespace(write=written.append))
    return channel, Passage(connection, channel, messages.append)


@asynccontextmanager
async def connected() -> AsyncIterator[tuple[Wire, asyncio.StreamWriter, asyncio.Future[bytes]]]:
    """A wire, what aiormq would write to it by, and all that comes at its other end."""
    received: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            received.set_result(await reader.read())
        except ConnectionError:
            received.set_result(b"")
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1")
    async with server:
        wire = Wire()
        url = URL(f"amqp://127.0.0.1:{server.sockets[0].getsockname()[1]}")
        _, writer = await wire.create(url, ssl_context_provider=None)
        yield wire, writer, received
        writer.close()
