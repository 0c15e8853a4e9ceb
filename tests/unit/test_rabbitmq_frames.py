"""What travels between us and RabbitMQ for each message: bytes of frames, their order, and messages made of them."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import pytest
from aio_pika.exceptions import AMQPConnectionError, ChannelPreconditionFailed
from pamqp import frame
from pamqp.body import ContentBody
from pamqp.commands import Basic, Confirm
from pamqp.commands import Channel as Channels
from pamqp.header import ContentHeader
from yarl import URL

from paigeant.transports.rabbitmq import frames
from paigeant.transports.rabbitmq.channel import Channel
from paigeant.transports.rabbitmq.frames import Outgoing
from paigeant.transports.rabbitmq.wire import Wire


def read(data: bytes) -> list[tuple[int, Any]]:
    """The frames in `data` as pamqp reads them, each with its channel."""
    found = []
    while data:
        size, channel, each = frame.unmarshal(data)
        found.append((channel, each))
        data = data[size:]
    return found


def test_an_address_that_is_no_text_is_an_empty_one() -> None:
    """pamqp is changed for the whole process: others in it, too, rely on a text."""
    found = Basic.Deliver()
    found.unmarshal(b"\x01c" + (5).to_bytes(8) + b"\x01" + b"\x00" + b"\x03\xff\xfe\xfd")
    assert dict(found) == {
        "consumer_tag": "c",
        "delivery_tag": 5,
        "redelivered": True,
        "exchange": "",
        "routing_key": "",
    }


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
    """What comes between two of them is heard in its order."""
    channel, _ = on_a_wire()
    came: list[Any] = []
    channel.take = came.append
    channel.hear = came.append
    body = b"".join(parts)
    own = [Basic.Deliver(delivery_tag=1), ContentHeader(body_size=len(body)), *map(ContentBody, parts)]
    cancel = Basic.Cancel("consumer")
    for each in (*own, cancel, *own):
        await channel.put((0, each))
    first, told, second = came
    assert told is cancel
    assert [first.body, second.body] == [body, body]


async def test_nothing_is_sent_on_a_channel_that_the_broker_has_closed() -> None:
    """But that this has come, at once: RabbitMQ ends the connection for what comes after that, or in its place."""
    channel, sent = on_a_wire()
    channel.write(b"before")
    await channel.put((0, Channels.Close(406, "no", 0, 0)))
    channel.leave()
    with pytest.raises(ChannelPreconditionFailed, match="no"):
        channel.write(b"after")
    with pytest.raises(ChannelPreconditionFailed, match="no"):
        await channel.ask(Basic.Qos())
    assert sent == [b"before", frame.marshal(Channels.CloseOk(), 1)]
    assert isinstance(channel.reason, ChannelPreconditionFailed)
    assert channel.ended.done()


async def test_nothing_is_sent_and_nothing_taken_on_a_channel_that_was_left() -> None:
    """RabbitMQ gives to others what is still under way, and ends the connection for what would settle it."""
    channel, sent = on_a_wire()
    came: list[Any] = []
    channel.take = came.append
    channel.leave()
    channel.leave()
    for each in (Basic.Deliver(delivery_tag=1), ContentHeader()):
        await channel.put((0, each))
    with pytest.raises(RuntimeError, match="closed"):
        channel.write(b"after")
    assert [dict(method)["reply_code"] for _, method in read(b"".join(sent))] == [200]
    assert came == []
    assert not channel.ended.done()
    await channel.put((0, Channels.CloseOk()))
    await channel.close()
    assert channel.ended.done()


async def test_the_number_of_a_channel_is_kept_until_both_closes_are_answered() -> None:
    """Where ours has crossed with the broker's: the answer to ours would end a new channel of the same number."""
    channel, sent = on_a_wire()
    channels = channel.connection.channels
    channel.leave()
    del channels[1]  # aiormq, for either of them
    await channel.put((0, Channels.Close(404, "gone", 0, 0)))
    assert channels == {1: channel}
    assert len(sent) == 1, "else the broker may lose its own answer"
    del channels[1]
    await channel.put((0, Channels.CloseOk()))
    assert channels == {}
    assert read(sent[-1])[0][1].name == "Channel.CloseOk"


async def test_an_answer_that_nobody_awaits_is_nobody_else_s() -> None:
    """Whoever asks next waits until it has come, and gets his own."""
    channel, sent = on_a_wire()
    first = asyncio.create_task(channel.ask(Basic.Qos()))
    await asyncio.sleep(0)
    first.cancel()
    second = asyncio.create_task(channel.ask(Confirm.Select()))
    await asyncio.sleep(0)
    assert len(sent) == 1
    await channel.put((0, Basic.QosOk()))
    while len(sent) == 1:  # noqa: ASYNC110  # nothing else tells
        await asyncio.sleep(0)
    own = Confirm.SelectOk()
    await channel.put((0, own))
    assert await second is own


async def test_the_end_of_the_connection_is_told_to_whoever_asks() -> None:
    """Also when he asks only then; nobody else hears of it."""
    told: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, trouble: told.append(trouble))
    channel, _ = on_a_wire()
    given_up = asyncio.create_task(channel.ask(Basic.Qos()))
    waiting = asyncio.create_task(channel.ask(Confirm.Select()))
    await asyncio.sleep(0)
    given_up.cancel()
    channel.connection.reason = AMQPConnectionError("gone")
    channel.connection.gone.set_result(None)
    await channel.ended
    with pytest.raises(AMQPConnectionError, match="gone"):
        await waiting
    asked, _ = on_a_wire()
    asking = asyncio.create_task(asked.ask(Basic.Qos()))
    await asyncio.sleep(0)
    asked.connection.reason = AMQPConnectionError("gone")
    asked.connection.gone.set_result(None)
    with pytest.raises(AMQPConnectionError, match="gone"):
        await asking
    del channel, asked, waiting, asking
    gc.collect()
    assert told == []


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


def on_a_wire() -> tuple[Any, list[bytes]]:
    """The channel 1 of a connection as far as a channel needs one, and what is sent on it."""
    sent: list[bytes] = []
    channels: dict[int, Any] = {}

    def keep(channel: Channel) -> None:
        channels[channel.number] = channel

    connection: Any = SimpleNamespace(
        wire=SimpleNamespace(write=sent.append),
        gone=asyncio.get_running_loop().create_future(),
        channels=channels,
        join=lambda channel: channels.setdefault(1, channel) and 1,
        keep=keep,
    )
    return Channel(connection), sent


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
