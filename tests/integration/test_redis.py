"""RedisStreamTransport when things go wrong: servers that die, forget, freeze and fill up, and consumers that do."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import secrets
import shutil
import signal
import sys
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from redis.asyncio import Redis
from redis.exceptions import RedisError
from tests.integration.redis_servers import redis_cluster, redis_sentinels, redis_tls
from tests.patience import PATIENCE
from tests.services import RedisServer, free_port
from tests.services.proxy import Proxy

from paigeant import Paigeant, Settings, Workflow, loops
from paigeant.envelope import HEAD_BYTES
from paigeant.errors import ConfigurationError, TransportUnavailable
from paigeant.message import PaigeantMessage, encode
from paigeant.store import DeadLetter
from paigeant.testing.conformance.transports import message
from paigeant.transports.redis import RedisStreamTransport, lookout, reader

pytestmark = pytest.mark.asyncio

GROUP = "workers"

Open = Callable[..., Awaitable[RedisStreamTransport]]


@pytest.fixture
def server() -> Iterator[RedisServer]:
    """A server of this test's own."""
    with RedisServer() as server:
        yield server


@pytest_asyncio.fixture
async def client(server: RedisServer) -> AsyncIterator[Redis]:
    """A plain connection to `server`, for an operator's hand."""
    client = Redis(host=server.host, port=server.port)
    yield client
    await client.aclose()


@pytest_asyncio.fixture
async def opened() -> AsyncIterator[Open]:
    """Connects a transport to a URL; it is closed after the test."""
    async with contextlib.AsyncExitStack() as stack:

        async def opened(url: str, *, hold: float = 30.0, namespace: str = "t") -> RedisStreamTransport:
            transport = RedisStreamTransport(url, namespace=namespace, hold=hold)
            await transport.connect()
            stack.push_async_callback(transport.close)
            return transport

        yield opened


class Listening:
    """A subscription that goes on over the whole of a test. What comes is acked and can be waited for."""

    def __init__(self, transport: RedisStreamTransport, topic: str = "work", *, prefetch: int = 10) -> None:
        self.transport = transport
        self.topic = topic
        self.prefetch = prefetch
        self.came: list[str] = []
        self._news = asyncio.Event()

    async def __aenter__(self) -> Listening:
        self._task = asyncio.create_task(self._listen())
        return self

    async def __aexit__(self, *error: object) -> None:
        assert not self._task.done(), "the iterator has ended"
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task

    async def _listen(self) -> None:
        async for received in self.transport.subscribe(self.topic, prefetch=self.prefetch):
            self.came.append(received.message_id)
            await self.transport.ack(received.message_id)
            self._news.set()

    async def wait_for(self, *ids: str) -> None:
        async with asyncio.timeout(PATIENCE):
            while not set(ids) <= set(self.came):
                self._news.clear()
                await self._news.wait()


async def take(transport: RedisStreamTransport, count: int = 1, topic: str = "work") -> list[str]:
    """The ids of the next `count` messages, not acked."""
    messages = transport.subscribe(topic, prefetch=count)
    async with asyncio.timeout(PATIENCE), contextlib.aclosing(messages) as each:  # type: ignore[type-var]  # a generator
        return [(await anext(each)).message_id for _ in range(count)]


async def until(holds: Callable[[], Awaitable[object]]) -> None:
    """Return once `holds` gives something true."""
    async with asyncio.timeout(PATIENCE):
        while not await holds():  # noqa: ASYNC110  # a server has to be asked
            await asyncio.sleep(0.01)


async def publish_until_taken(transport: RedisStreamTransport, sent: PaigeantMessage) -> None:
    """Publish as a worker's sweeper does: again, until the server takes it."""
    async with asyncio.timeout(PATIENCE):
        while True:
            try:
                return await transport.publish("work", sent)
            except TransportUnavailable:
                await asyncio.sleep(0.05)


async def blocked(client: Redis) -> None:
    """Return once a subscriber is blocked in its read."""
    await until(lambda: _blocked(client))


async def _blocked(client: Redis) -> bool:
    return (await client.info("clients"))["blocked_clients"] > 0


async def consumers(client: Redis, transport: RedisStreamTransport, topic: str = "work") -> list[str]:
    """The names of those that the server knows in the topic's group."""
    found = await client.xinfo_consumers(transport.stream_key(topic), GROUP)
    return [each["name"].decode() for each in found]


# --- what the server forgets


async def _flush(client: Redis, stream: str) -> None:
    await client.flushall()


async def _delete(client: Redis, stream: str) -> None:
    await client.delete(stream)


async def _destroy(client: Redis, stream: str) -> None:
    await client.xgroup_destroy(stream, GROUP)


async def _script_flush(client: Redis, stream: str) -> None:
    await client.script_flush()


@pytest.mark.parametrize("forget", [_flush, _delete, _destroy, _script_flush])
async def test_a_subscription_outlives_what_the_server_forgets(
    server: RedisServer, client: Redis, opened: Open, forget: Callable[[Redis, str], Awaitable[None]]
) -> None:
    """FLUSHALL, a deleted key, a destroyed group, lost scripts: the same iterator gets what is published then."""
    transport = await opened(server.url)
    async with Listening(transport) as listening:
        await transport.publish("work", message("before"))
        await listening.wait_for("before")
        await blocked(client)
        await forget(client, transport.stream_key("work"))
        await transport.publish("work", message("after"))
        await transport.publish("work", message("later"), delay=0.05)
        await listening.wait_for("after", "later")


async def test_messages_without_a_group_are_delivered(
    server: RedisServer, client: Redis, opened: Open
) -> None:
    """A group that is made again begins with the first message that is there, not with the next to come."""
    transport = await opened(server.url)
    await transport.publish("work", message("first"))
    assert await take(transport) == ["first"]
    await transport.nack("first")
    await client.xgroup_destroy(transport.stream_key("work"), GROUP)
    assert await take(transport) == ["first"]


# --- connections that break


async def test_a_subscription_outlives_a_killed_server(server: RedisServer, opened: Open) -> None:
    """SIGKILL and a new start: the same iterator resumes, what was acknowledged is there, publishing works again."""
    transport = await opened(server.url)
    async with Listening(transport) as listening:
        await transport.publish("work", message("before"))
        await listening.wait_for("before")
        for round_ in range(3):
            await asyncio.to_thread(server.kill)
            with pytest.raises(TransportUnavailable, match=f"{server.port}"):
                await transport.publish("work", message("lost"))
            await asyncio.to_thread(server.start)
            await publish_until_taken(transport, message(f"after-{round_}"))
            await listening.wait_for(f"after-{round_}")


async def test_nothing_is_lost_while_connections_are_cut(
    server: RedisServer, client: Redis, opened: Open
) -> None:
    """What the server had given to a read whose answer got lost comes at once after the reconnection, not after the
    hold."""
    transport = await opened(server.url, hold=3600.0)
    ids = [f"m-{n}" for n in range(2000)]
    cutting = True

    async def cut() -> None:
        while cutting:
            await client.client_kill_filter(_type="normal", skipme=True)
            await asyncio.sleep(0.01)

    async with Listening(transport) as listening:
        knife = asyncio.create_task(cut())
        for message_id in ids:
            await publish_until_taken(transport, message(message_id))
        cutting = False
        await knife
        await listening.wait_for(*ids)


async def test_what_was_given_to_a_lost_read_comes_again(server: RedisServer, opened: Open) -> None:
    """The server has handed a message over, its answer is swallowed: after the reconnection it comes again at once."""
    with Proxy(server.host, server.port) as proxy:
        transport = await opened(proxy.url(server.url), hold=3600.0)
        other = await opened(server.url)
        async with Listening(transport) as listening:
            await transport.publish("work", message("before"))
            await listening.wait_for("before")
            await until(lambda: _is_sent(transport))
            proxy.blackhole("to_client")
            await other.publish("work", message("m"))
            await until(lambda: _is_taken(other))
            proxy.cut()
            proxy.resume()
            await listening.wait_for("m")


async def test_a_connection_that_was_reset_while_idle_is_opened_again_on_uvloop(server: RedisServer) -> None:
    """There a write on it is a RuntimeError, which redis-py passes on as it is."""

    async def main() -> None:
        with Proxy(server.host, server.port) as proxy:
            transport = RedisStreamTransport(proxy.url(server.url))
            await transport.connect()
            try:
                proxy.cut()
                await asyncio.sleep(0.2)  # by then the event loop has closed it
                await transport.publish("work", message("m"))
                assert [depth.waiting for depth in await transport.topics()] == [1]
            finally:
                await transport.close()

    await asyncio.to_thread(loops.run, main())


async def _is_taken(transport: RedisStreamTransport) -> bool:
    return [depth.taken for depth in await transport.topics()] == [1]


async def test_what_a_forgotten_read_is_given_comes_again(
    server: RedisServer, client: Redis, opened: Open
) -> None:
    """A server that hasn't noticed a break goes on with the read and gives it a message: that comes again soon."""
    transport = await opened(server.url, hold=3600.0)
    async with Listening(transport) as listening:
        await transport.publish("work", message("before"))
        await listening.wait_for("before")
        await until(lambda: _readers(client))
        [reader] = await _readers(client)
        [name] = await consumers(client, transport)
        # What a server sees that holds a lost connection for alive: the consumer has another blocked read.
        stream = transport.stream_key("work")
        reading: Any = client.xreadgroup(GROUP, name, {stream: ">"}, block=4000)
        forgotten = asyncio.ensure_future(reading)
        await until(lambda: _count_readers(client, 2))
        await client.client_kill_filter(_id=reader)
        await until(lambda: _count_readers(client, 1))
        await until(lambda: _count_readers(client, 2))
        await transport.publish("work", message("m"))
        [[_, [[_, fields]]]] = await forgotten
        assert fields[b"id"] == b"m"
        await listening.wait_for("m")


async def _readers(client: Redis) -> list[str]:
    return [
        each["id"]
        for each in await client.client_list()
        if each["cmd"] == "xreadgroup" and "b" in each["flags"]
    ]


async def _count_readers(client: Redis, count: int) -> bool:
    return len(await _readers(client)) == count


async def test_a_frozen_server_is_told_of_and_waited_for(server: RedisServer, opened: Open) -> None:
    """A server that doesn't answer is an error for who publishes, in bounded time; later the iterator goes on."""
    transport = await opened(f"{server.url}?socket_timeout=2")
    async with Listening(transport) as listening:
        await transport.publish("work", message("before"))
        await listening.wait_for("before")
        server.freeze()
        try:
            async with asyncio.timeout(PATIENCE):
                with pytest.raises(TransportUnavailable, match="doesn't answer"):
                    await transport.publish("work", message("m"))
        finally:
            server.thaw()
        await publish_until_taken(transport, message("after"))
        await listening.wait_for("after")


async def test_a_server_that_loads_is_waited_for(server: RedisServer, client: Redis, opened: Open) -> None:
    """While a server reads its file, connect says so; a subscription that was there goes on when it has."""
    transport = await opened(server.url)
    async with Listening(transport) as listening:
        await transport.publish("work", message("before"))
        await listening.wait_for("before")
        pipe = client.pipeline(transaction=False)
        for n in range(60_000):
            pipe.set(f"filler-{n}", "x")
        await pipe.execute()
        await asyncio.to_thread(server.kill)
        with (server.folder / "redis.conf").open("a") as file:
            file.write("key-load-delay 800\n")  # most of a minute; it answers after each thousand keys
        starting = threading.Thread(target=server.start)
        starting.start()
        try:
            await until(lambda: _says_loading(server.url))
        finally:
            async with Redis(host=server.host, port=server.port) as hurrying:
                await hurrying.config_set("key-load-delay", 0)
            await asyncio.to_thread(starting.join)
        await publish_until_taken(transport, message("after"))
        await listening.wait_for("after")


async def _says_loading(url: str) -> bool:
    transport = RedisStreamTransport(url)
    try:
        await transport.connect()
    except TransportUnavailable as exc:
        return "still loading" in str(exc)
    await transport.close()
    raise AssertionError("the server had loaded before it was asked")


async def test_a_frozen_server_holds_up_a_sweep_once(
    server: RedisServer, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not for each topic to which steps go. What wasn't tried comes first the next time."""
    monkeypatch.setattr("paigeant.forwarder._AWAY_SECONDS", 0.1)
    url = f"{server.url}?socket_timeout=1"
    async with Paigeant(Settings(transport_url=url, store_url="memory://", signing="off")) as app:
        for topic in "abc":
            await app.dispatch(Workflow("w", [topic]), {}, workflow_id=topic)
        keys = [key for topic in "abc" for key in await app.store.open_steps(topic)]
        server.freeze()
        owed = dict.fromkeys(keys, "")
        tried = []
        try:
            for _ in range(3):
                caplog.clear()
                owed = await app.forwarder.send_again((), owed)
                tried.append(re.findall(r"not published to (\w)", caplog.text))
        finally:
            server.thaw()
        assert tried == [["a"], ["b"], ["c"]]
        assert set(owed) == set(keys)
        while owed:
            owed = await app.forwarder.send_again((), owed)
        assert {depth.topic for depth in await app.transport.topics()} == set("abc")


async def test_a_demoted_server_is_told_of_and_waited_for(
    server: RedisServer, client: Redis, opened: Open
) -> None:
    """READONLY after a failover: who publishes is told, and the iterator goes on once there is a primary again."""
    transport = await opened(server.url)
    async with Listening(transport) as listening:
        await transport.publish("work", message("before"))
        await listening.wait_for("before")
        await client.execute_command("REPLICAOF", "127.0.0.1", free_port())
        with pytest.raises(TransportUnavailable, match="replica"):
            await transport.publish("work", message("m"))
        with pytest.raises(ConfigurationError, match="primary"):
            await opened(server.url)
        await client.execute_command("REPLICAOF", "NO", "ONE")
        await publish_until_taken(transport, message("after"))
        await listening.wait_for("after")


async def test_a_server_that_cannot_save_is_told_of(opened: Open) -> None:
    """MISCONF: a server whose disk fails takes no messages, which is said, and takes them again when it can write."""
    with RedisServer(appendonly=False, lines=["save 3600 1", "enable-protected-configs yes"]) as server:
        client = Redis(host=server.host, port=server.port)
        transport = await opened(server.url)
        elsewhere = server.folder / "elsewhere"
        elsewhere.mkdir()
        await client.config_set("dir", str(elsewhere))
        shutil.rmtree(elsewhere)
        await client.set("changed", "1")
        await client.bgsave()
        await until(lambda: _bgsave_failed(client))
        async with Listening(transport) as listening:
            with pytest.raises(TransportUnavailable, match="MISCONF"):
                await transport.publish("work", message("m"))
            await client.config_set("dir", str(server.folder))
            await client.bgsave()
            await publish_until_taken(transport, message("after"))
            await listening.wait_for("after")
        await client.aclose()


async def _bgsave_failed(client: Redis) -> bool:
    return bool((await client.info("persistence"))["rdb_last_bgsave_status"] == "err")


async def test_a_full_server_refuses_messages_and_is_emptied(opened: Open) -> None:
    """At maxmemory publishing is an error that says so; taking, returning, delaying and acking go on."""
    with RedisServer(lines=["maxmemory-policy noeviction"]) as server:
        client = Redis(host=server.host, port=server.port)
        transport = await opened(server.url)
        for n in range(20):
            await transport.publish("work", message(f"m-{n}", text="x" * 10_000))
        await transport.publish("work", message("later", text="x" * 10_000), delay=0.3)
        await take(transport)  # makes the group, for which there would be no room
        await transport.nack("m-0")
        before = set(await client.keys("*"))
        await transport.check_room()
        assert set(await client.keys("*")) == before
        await client.config_set("maxmemory", 1)
        with pytest.raises(TransportUnavailable, match="maxmemory"):
            await transport.publish("work", message("too much"))
        with pytest.raises(TransportUnavailable, match="has no memory left: raise its maxmemory"):
            await transport.check_room()
        [first] = await take(transport)
        await transport.nack(first)
        [second] = await take(transport)
        await transport.nack(second, delay=0.1)
        async with Listening(transport) as listening:
            await listening.wait_for("later", *(f"m-{n}" for n in range(20)))
        assert await transport.topics() == []
        await client.config_set("maxmemory", 0)
        await transport.publish("work", message("room"))
        await client.aclose()


# --- consumers that die, and those that come back


async def test_what_went_to_another_cannot_be_settled(server: RedisServer, opened: Open) -> None:
    """A stale consumer's ack, return and rejection leave the entry with whoever has it now."""
    stale = await opened(server.url, hold=0.3)
    now = await opened(server.url, hold=0.3)
    letters: list[DeadLetter] = []

    async def bury(letter: DeadLetter) -> None:
        letters.append(letter)

    stale.bury_with(bury)
    for settle in (stale.ack, stale.nack, lambda message_id: stale.dead_letter(message_id, "stale")):
        await stale.publish("work", message("m"))
        assert await take(stale) == ["m"]
        assert await take(now) == ["m"]
        await settle("m")
        await until(lambda: _is_sent(stale))
        assert [(depth.waiting, depth.taken) for depth in await now.topics()] == [(0, 1)]
        await now.ack("m")
        await until(lambda: _is_empty(now))
    assert letters == []


async def _is_sent(transport: RedisStreamTransport) -> bool:
    await transport.topics()  # answered after all that was sent before on the same connection
    return not transport._hands.is_acking


async def _is_empty(transport: RedisStreamTransport) -> bool:
    return await transport.topics() == []


async def test_a_killed_process_gives_back_its_messages(
    server: RedisServer, client: Redis, opened: Open
) -> None:
    """What a killed process of this host held comes at once to who subscribes, and its consumer is deleted."""
    transport = await opened(server.url, hold=3600.0)
    await transport.publish("work", message("m"))
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-c", _HOLDER, server.url, stdout=asyncio.subprocess.PIPE
    )
    assert child.stdout is not None
    assert await asyncio.wait_for(child.stdout.readline(), PATIENCE) == b"m\n"
    [dead] = await consumers(client, transport)
    os.kill(child.pid, signal.SIGKILL)
    await child.wait()
    assert await take(transport) == ["m"]
    await transport.dead_letter("m", "enough")
    [letter] = await transport.kept_letters()
    assert letter.attempts == 2
    assert dead not in await consumers(client, transport)


_HOLDER = """
import asyncio, sys
from paigeant.transports.redis import RedisStreamTransport

async def main():
    transport = RedisStreamTransport(sys.argv[1], namespace="t", hold=3600.0)
    await transport.connect()
    async for received in transport.subscribe("work"):
        print(received.message_id, flush=True)
        await asyncio.Event().wait()

asyncio.run(main())
"""


async def test_a_lost_host_gives_back_its_messages_after_the_hold(
    server: RedisServer, client: Redis, opened: Open
) -> None:
    """What a consumer of another host held comes after the hold; the consumer is deleted when long silent, and not
    while it has anything."""
    transport = await opened(server.url, hold=0.2)
    stream = transport.stream_key("work")
    await transport.publish("work", message("m"))
    await transport.publish("work", message("n"))
    await client.xgroup_create(stream, GROUP, id="0")
    began = time.monotonic()
    assert await client.xreadgroup(GROUP, "elsewhere|1@1|x|0", {stream: ">"}, count=2)
    await client.xgroup_createconsumer(stream, GROUP, "silent|1@1|x|0")
    async with Listening(transport, prefetch=1) as listening:
        await listening.wait_for("m", "n")
        assert time.monotonic() - began > 0.1
        await until(lambda: _only_mine(client, transport))


async def _only_mine(client: Redis, transport: RedisStreamTransport) -> bool:
    return all(name.startswith(transport._name) for name in await consumers(client, transport))


async def test_a_consumer_that_holds_messages_is_not_deleted(
    server: RedisServer, client: Redis, opened: Open
) -> None:
    """However long it is silent, a consumer goes only once what it held was claimed away."""
    transport = await opened(server.url, hold=3600.0)
    stream = transport.stream_key("work")
    await transport.publish("work", message("m"))
    await client.xgroup_create(stream, GROUP, id="0")
    await client.xreadgroup(GROUP, "elsewhere|1@1|x|0", {stream: ">"})
    assert not await transport._streams.forget("work", "elsewhere|1@1|x|0")
    assert await consumers(client, transport) == ["elsewhere|1@1|x|0"]
    assert [depth.taken for depth in await transport.topics()] == [1]


async def test_a_consumer_that_was_heard_of_meanwhile_is_not_deleted(
    server: RedisServer, client: Redis, opened: Open
) -> None:
    """Between the look that found it silent and the deletion it may have come back: the server looks again."""
    transport = await opened(server.url)
    stream = transport.stream_key("work")
    await client.xgroup_create(stream, GROUP, id="0", mkstream=True)
    await client.xgroup_createconsumer(stream, GROUP, "elsewhere|1@1|x|0")
    assert not await transport._streams.forget("work", "elsewhere|1@1|x|0", 3600.0)
    assert await consumers(client, transport) == ["elsewhere|1@1|x|0"]
    assert await transport._streams.forget("work", "elsewhere|1@1|x|0")
    assert await consumers(client, transport) == []


async def test_a_deleted_consumer_that_lives_goes_on(
    server: RedisServer, client: Redis, opened: Open
) -> None:
    """A subscriber that somebody took for dead gets its messages all the same."""
    transport = await opened(server.url)
    async with Listening(transport) as listening:
        await blocked(client)
        for name in await consumers(client, transport):
            await client.xgroup_delconsumer(transport.stream_key("work"), GROUP, name)
        await transport.publish("work", message("m"))
        await listening.wait_for("m")
    assert await transport.topics() == []


async def test_closing_leaves_no_consumer(server: RedisServer, client: Redis, opened: Open) -> None:
    """What a closing transport held is there for others at once, and its consumers are gone."""
    transport = await opened(server.url, hold=3600.0)
    for n in range(5):
        await transport.publish("work", message(f"m-{n}"))
    assert await take(transport) == ["m-0"]
    messages = transport.subscribe("work", prefetch=4)
    assert [(await anext(messages)).message_id for _ in range(2)] == ["m-1", "m-2"]
    waiting = asyncio.create_task(take(transport, topic="other"))
    await blocked(client)
    await transport.close()
    assert await consumers(client, transport) == []
    assert await consumers(client, transport, "other") == []
    with pytest.raises(StopAsyncIteration):
        await anext(messages)
    with pytest.raises(StopAsyncIteration):
        await waiting
    other = await opened(server.url, hold=3600.0)
    assert sorted(await take(other, 5)) == [f"m-{n}" for n in range(5)]


async def test_a_cancelled_read_takes_nothing_along(server: RedisServer, client: Redis, opened: Open) -> None:
    """A subscriber that leaves while it waits gets no message any more that others wait for."""
    transport = await opened(server.url, hold=3600.0)
    other = await opened(server.url, hold=3600.0)
    for n in range(30):
        leaving = asyncio.create_task(take(transport))
        await blocked(client)
        publishing = asyncio.create_task(other.publish("work", message(f"m-{n}")))
        for _ in range(n):
            await asyncio.sleep(0)
        leaving.cancel()
        await asyncio.gather(leaving, publishing, return_exceptions=True)
        await transport.nack(f"m-{n}")  # in case it got as far as its hands: then it was delivered
        assert await take(other) == [f"m-{n}"]
        await other.ack(f"m-{n}")


async def test_what_was_not_yielded_is_given_back_whatever_is_held(
    server: RedisServer, client: Redis, opened: Open
) -> None:
    """An iteration that ends gives back what it fetched, also when an entry of another topic has the same number."""
    transport = await opened(server.url, hold=3600.0)
    for topic, number in (("one", 2), ("other", 1), ("other", 2)):
        sent: Any = {"id": f"{topic}-{number}", "body": encode(message(f"{topic}-{number}"))}
        await client.xadd(transport.stream_key(topic), sent, id=f"5-{number}")
    assert await take(transport, topic="one") == ["one-2"]
    messages = transport.subscribe("other", prefetch=2)
    assert (await anext(messages)).message_id == "other-1"
    await messages.aclose()  # type: ignore[attr-defined]  # a generator
    assert await take(await opened(server.url), topic="other") == ["other-2"]


async def test_what_was_acked_before_the_end_does_not_come_again(server: RedisServer, opened: Open) -> None:
    """An iteration that ends while acks are on their way gives back none of the messages that were acked."""
    transport = await opened(server.url)
    for turns in range(30):
        await asyncio.gather(*(transport.publish("work", message(f"m-{n}")) for n in range(2)))
        messages = transport.subscribe("work", prefetch=2)
        for _ in range(2):
            await transport.ack((await anext(messages)).message_id)
            for _ in range(turns // 10):
                await asyncio.sleep(0)
        await messages.aclose()  # type: ignore[attr-defined]  # a generator
        await until(lambda: _is_sent(transport))
        assert await transport.topics() == []


# --- what is promised of messages


@pytest.fixture
def _told_or_never(monkeypatch: pytest.MonkeyPatch) -> None:
    """No subscriber looks by itself for as long as a test may last: what comes, comes because it is told of it."""
    monkeypatch.setattr(reader, "BLOCK_SECONDS", 3600.0)
    monkeypatch.setattr(lookout, "LOOK_SECONDS", 3600.0)


@pytest.mark.usefixtures("_told_or_never")
async def test_a_return_is_delivered_at_once(server: RedisServer, client: Redis, opened: Open) -> None:
    """nack wakes a blocked subscriber: it need not wait for the hold, nor for its next look."""
    one = await opened(server.url, hold=3600.0)
    other = await opened(server.url, hold=3600.0)
    await one.publish("work", message("m"))
    assert await take(one) == ["m"]
    taking = asyncio.create_task(take(other))
    await blocked(client)
    await one.nack("m")
    assert await taking == ["m"]


@pytest.mark.usefixtures("_told_or_never")
async def test_delays_are_kept_to_the_point(server: RedisServer, client: Redis, opened: Open) -> None:
    """A message published with a short delay while subscribers are blocked comes then: never early, and not only when
    they look the next time."""
    publisher = await opened(server.url)
    subscriber = await opened(server.url)
    came: dict[str, float] = {}
    done = asyncio.Event()
    delays = {f"m-{delay}": delay for delay in (0.9, 0.05, 0.3, 0.6, 0.1)}

    async def listen() -> None:
        async for received in subscriber.subscribe("work", prefetch=10):
            came[received.message_id] = time.monotonic()
            await subscriber.ack(received.message_id)
            if len(came) == len(delays):
                done.set()

    listening = asyncio.create_task(listen())
    await blocked(client)
    sent = {}
    for message_id, delay in delays.items():
        sent[message_id] = time.monotonic()
        await publisher.publish("work", message(message_id), delay=delay)
    await asyncio.wait_for(done.wait(), PATIENCE)
    listening.cancel()
    await asyncio.gather(listening, return_exceptions=True)
    assert all(came[message_id] - sent[message_id] >= delays[message_id] for message_id in delays)


async def test_a_bell_is_no_message(server: RedisServer, client: Redis, opened: Open) -> None:
    """What wakes subscribers for short delays is counted nowhere and delivered to nobody."""
    transport = await opened(server.url)
    await transport.publish("work", message("a"))
    assert await take(transport) == ["a"]
    await transport.ack("a")
    await transport.publish("work", message("b"), delay=0.8)
    assert await client.xlen(transport.stream_key("work")) == 1
    [depth] = await transport.topics()
    assert (depth.waiting, depth.taken) == (1, 0)
    assert await take(transport) == ["b"]
    await transport.ack("b")
    assert await transport.topics() == []
    assert await transport.kept_letters() == []


async def test_two_deliveries_of_an_id_are_settled_one_by_one(server: RedisServer, opened: Open) -> None:
    """A message that was sent twice and is held twice needs two acks, in whatever order they come."""
    transport = await opened(server.url)
    for _ in range(2):
        await transport.publish("work", message("m"))
    assert await take(transport, 2) == ["m", "m"]
    await transport.ack("m")
    await until(lambda: _is_sent(transport))
    assert [depth.taken for depth in await transport.topics()] == [1]
    await transport.nack("m")
    assert await take(transport) == ["m"]
    await transport.ack("m")
    await until(lambda: _is_empty(transport))


async def test_publishes_share_round_trips(server: RedisServer, client: Redis, opened: Open) -> None:
    """What is published in one turn of the event loop goes to the server together."""
    transport = await opened(server.url)
    await transport.publish("work", message("first"))
    before = (await client.info("stats"))["total_net_input_bytes"], await _reads(client)
    await asyncio.gather(*(transport.publish("work", message(f"m-{n}")) for n in range(200)))
    assert await _reads(client) - before[1] < 20
    assert await client.xlen(transport.stream_key("work")) == 201


async def _reads(client: Redis) -> int:
    return int((await client.info("stats"))["total_reads_processed"])


async def test_topics_are_listed_without_a_search(server: RedisServer, client: Redis, opened: Open) -> None:
    """Another transport finds the topics by name; one whose name was wiped by asking for it."""
    publisher = await opened(server.url)
    await publisher.publish("work", message("m"))
    await publisher.publish("{a} b", message("n"), delay=60)
    asking = await opened(server.url)
    assert [depth.topic for depth in await asking.topics()] == ["work", "{a} b"]
    await client.delete("t:topics")
    assert await asking.topics() == []
    assert [depth.topic for depth in await asking.topics(["work", "none"])] == ["work"]


async def test_a_namespace_may_have_any_name(server: RedisServer, opened: Open) -> None:
    """Braces in a namespace or a topic don't change which keys belong together."""
    for namespace in ("{}", "{a", "a}b{", "ä b"):
        transport = await opened(server.url, namespace=namespace)
        for topic in ("{}", "}", "{x}y", "", "a\nb"):
            await transport.publish(topic, message("m"), delay=0.01)
            assert await take(transport, topic=topic) == ["m"]


# --- dead letters


async def test_dead_letters_are_kept_without_a_store(
    server: RedisServer, client: Redis, opened: Open
) -> None:
    """Without `bury_with` the transport keeps them itself, a bounded part of each."""
    transport = await opened(server.url)
    stream = transport.stream_key("work")
    await client.xadd(
        stream, {"id": "a", "body": b"\xff" * (transport.envelope.limit_bytes + HEAD_BYTES + 1)}
    )
    await client.xadd(stream, {"foreign": "entry"})
    await transport.publish("work", message("good"))
    assert await take(transport) == ["good"]
    foreign, large = await transport.kept_letters()
    assert (large.id, large.reason, len(large.body), large.attempts) == ("a", "too_large", 64 * 1024, 1)
    assert (foreign.reason, foreign.body) == ("not_json", b"")


async def test_a_letter_that_is_not_kept_comes_again(
    server: RedisServer, client: Redis, opened: Open
) -> None:
    """While nobody can keep dead letters a bad message stays, and the iterator goes on with the others."""
    transport = await opened(server.url, hold=0.2)
    letters: list[DeadLetter] = []

    async def bury(letter: DeadLetter) -> None:
        letters.append(letter)
        if len(letters) == 1:
            raise OSError("the store is away")

    transport.bury_with(bury)
    await client.xadd(transport.stream_key("work"), {"id": "bad", "body": b"nonsense"})
    async with Listening(transport) as listening:
        await transport.publish("work", message("good"))
        await listening.wait_for("good")
        await until(lambda: _is_empty(transport))
    assert [letter.id for letter in letters] == ["bad", "bad"]


# --- what others have written


@pytest.mark.parametrize(
    ("told", "attempts"), [("abc", 1), ("-5", 1), ("nan", 1), ("1e300", 2**31 - 1), ("inf", 2**31 - 1)]
)
async def test_an_odd_count_of_deliveries_is_bounded(
    redis_url: str, opened: Open, told: str, attempts: int
) -> None:
    """Whoever may write to a stream chooses the field `n`: the dead letter is one that every store can hold."""
    transport = await opened(redis_url, namespace=f"test-{secrets.token_hex(6)}")
    async with Redis.from_url(redis_url) as client:
        await client.xadd(transport.stream_key("work"), {"id": "bad", "body": b"nonsense", "n": told})
    await transport.publish("work", message("good"))
    assert await take(transport) == ["good"]
    [letter] = await transport.kept_letters()
    assert (letter.id, letter.attempts) == ("bad", attempts)


@pytest.mark.parametrize("told", ["abc", "nan", "-1e300", "1e300"])
async def test_an_odd_time_hides_no_topic(redis_url: str, opened: Open, told: str) -> None:
    """An entry whose field `t` is no time is as old as its id says, also after it was given back."""
    transport = await opened(redis_url, namespace=f"test-{secrets.token_hex(6)}")
    body = transport.envelope.seal(message("m"), "odd")
    async with Redis.from_url(redis_url) as client:
        await client.xadd(transport.stream_key("odd"), {"id": "m", "body": body, "t": told})
    await transport.publish("work", message("n"))
    for _ in range(2):
        odd, work = await transport.topics(["odd"])
        assert (odd.topic, odd.waiting, work.topic, work.waiting) == ("odd", 1, "work", 1)
        assert odd.oldest == pytest.approx(0, abs=PATIENCE)
        assert await take(transport, topic="odd") == ["m"]
        await transport.nack("m", delay=0.01)


async def test_a_delayed_entry_without_its_fields_is_no_message(
    server: RedisServer, client: Redis, opened: Open
) -> None:
    """It becomes a dead letter, and what is due after it comes."""
    transport = await opened(server.url)
    stem = transport.stream_key("work").removesuffix("stream")
    await client.xadd(f"{stem}later", {"foreign": "entry"}, id="1-1")
    await client.zadd(f"{stem}due", {"1-1": 1})
    await transport.publish("work", message("good"), delay=0.01)
    assert await take(transport) == ["good"]
    assert [(letter.id, letter.body) for letter in await transport.kept_letters()] == [("1-1", b"")]


async def test_delayed_messages_outlive_the_set_that_says_when(
    server: RedisServer, client: Redis, opened: Open
) -> None:
    """Where somebody has deleted it they are delivered at once, and none lies about for good."""
    transport = await opened(server.url)
    for number in range(250):
        await transport.publish("work", message(str(number)), delay=3600)
    await client.delete("t:{work}:due")
    assert await transport.topics() == []  # what nothing can deliver yet
    await transport.publish("work", message("later"), delay=3600)
    async with Listening(transport) as listening:
        await listening.wait_for(*map(str, range(250)))
        assert "later" not in listening.came
    assert (await client.xlen("t:{work}:later"), await client.zcard("t:{work}:due")) == (1, 1)


async def test_delayed_messages_that_were_deleted_do_not_count(
    server: RedisServer, client: Redis, opened: Open
) -> None:
    """A topic that holds none any more is empty, so that its steps are sent again."""
    transport = await opened(server.url)
    await transport.publish("work", message("m"), delay=3600)
    assert [depth.waiting for depth in await transport.topics()] == [1]
    await client.delete("t:{work}:later")
    assert await transport.topics() == []


@pytest.mark.parametrize("part", ["stream", "due", "later"])
async def test_a_topic_with_a_broken_key_hides_no_other(
    server: RedisServer, client: Redis, opened: Open, caplog: pytest.LogCaptureFixture, part: str
) -> None:
    """Where a key holds something else the topic is left out of topics(), which is told once until it is well."""
    transport = await opened(server.url)
    await transport.publish("work", message("m"))
    await transport.publish("broken", message("n"))
    key = transport.stream_key("broken").removesuffix("stream") + part
    await client.delete(key)
    await client.set(key, "a string")
    for _ in range(2):
        assert [depth.topic for depth in await transport.topics()] == ["work"]
    assert [record.levelname for record in caplog.records if "topic broken" in record.message] == ["WARNING"]
    await client.delete(key)
    await transport.publish("broken", message("n"))
    assert [depth.topic for depth in await transport.topics()] == ["broken", "work"]


async def test_a_broken_topic_loses_nothing_that_is_due(
    server: RedisServer, client: Redis, opened: Open
) -> None:
    """While somebody's string stands in the place of the stream, what is delayed goes on to wait."""
    transport = await opened(server.url)
    await transport.publish("work", message("m"), delay=0.01)
    key = transport.stream_key("work")
    await client.set(key, "a string")
    async with Listening(transport) as listening:
        due = f"{key.removesuffix('stream')}due"
        tried = (await client.info("commandstats"))["cmdstat_evalsha"]["failed_calls"]
        await until(lambda: _failed_more(client, tried))
        assert await client.zcard(due) == 1
        await client.delete(key)
        await listening.wait_for("m")


async def _failed_more(client: Redis, tried: int) -> bool:
    return (await client.info("commandstats"))["cmdstat_evalsha"]["failed_calls"] > tried + 2


@pytest.mark.parametrize("part", ["due", "later"])
async def test_a_delay_that_cannot_be_kept_changes_nothing(
    server: RedisServer, client: Redis, opened: Open, part: str
) -> None:
    """Where delayed messages can't wait, one that is returned for later comes again, and none is left lying."""
    transport = await opened(server.url, hold=1.0)
    await transport.publish("work", message("m"))
    assert await take(transport) == ["m"]
    stem = transport.stream_key("work").removesuffix("stream")
    await client.set(f"{stem}{part}", "a string")
    with pytest.raises(TransportUnavailable, match="WRONGTYPE"):
        await transport.nack("m", delay=0.1)
    with pytest.raises(TransportUnavailable, match="WRONGTYPE"):
        await transport.publish("work", message("n"), delay=0.1)
    assert await take(transport) == ["m"]
    await transport.nack("m")
    assert await take(transport) == ["m"]
    await client.delete(f"{stem}{part}")
    assert await client.exists(f"{stem}due", f"{stem}later") == 0


# --- what connect finds out


async def test_an_evicting_policy_is_refused(server: RedisServer, client: Redis) -> None:
    """A server that drops keys when memory is short isn't used; what to do is said."""
    await client.config_set("maxmemory-policy", "allkeys-lru")
    with pytest.raises(ConfigurationError, match=r"allkeys-lru.*noeviction"):
        await RedisStreamTransport(server.url).connect()


async def test_a_policy_that_evicts_expiring_keys_only_is_accepted(
    server: RedisServer, client: Redis, opened: Open
) -> None:
    """None of the transport's keys expires, so that a volatile policy takes none of them away."""
    await client.config_set("maxmemory-policy", "volatile-lru")
    transport = await opened(server.url)
    await transport.publish("work", message("m"))
    await transport.publish("work", message("n"), delay=60)
    for key in await client.keys("t:*"):
        assert await client.ttl(key) == -1


@pytest.mark.parametrize("forbidden", ["-config", "-info"])
async def test_the_policy_is_found_out_where_commands_are_forbidden(
    server: RedisServer, client: Redis, forbidden: str
) -> None:
    """INFO or CONFIG GET: one of them is enough."""
    await client.config_set("maxmemory-policy", "allkeys-lfu")
    await client.execute_command("ACL", "SETUSER", "app", "on", ">pw", "~*", "+@all", forbidden)
    with pytest.raises(ConfigurationError, match="allkeys-lfu"):
        await RedisStreamTransport(f"redis://app:pw@{server.host}:{server.port}").connect()


async def test_an_unknown_policy_is_warned_of(
    server: RedisServer, client: Redis, opened: Open, caplog: pytest.LogCaptureFixture
) -> None:
    """Where neither INFO nor CONFIG GET is allowed, nor CLIENT, it works all the same."""
    await client.execute_command(
        "ACL", "SETUSER", "app", "on", ">pw", "~*", "+@all", "-config", "-info", "-client"
    )
    with caplog.at_level(logging.WARNING):
        transport = await opened(f"redis://app:pw@{server.host}:{server.port}")
    assert "maxmemory-policy is unknown" in caplog.text
    await transport.publish("work", message("m"))
    assert await take(transport) == ["m"]
    leaving = asyncio.create_task(take(transport))
    await blocked(client)
    leaving.cancel()
    await asyncio.gather(leaving, return_exceptions=True)
    await transport.publish("work", message("n"))
    assert await take(transport) == ["n"]


async def test_commands_of_operators_may_be_renamed(opened: Open) -> None:
    """As managed servers have it: what only tells of the server isn't needed."""
    with RedisServer(lines=[f'rename-command {name} ""' for name in ("INFO", "CONFIG", "CLIENT")]) as server:
        transport = await opened(server.url)
        await transport.publish("work", message("m"))
        assert await take(transport) == ["m"]


async def test_what_keeps_trouble_going_is_told(
    server: RedisServer, client: Redis, opened: Open, caplog: pytest.LogCaptureFixture
) -> None:
    """Whose connection breaks and who is then refused hears of both, and what to do about the latter."""
    transport = await opened(server.url)
    async with Listening(transport) as listening:
        await blocked(client)
        await client.config_set("requirepass", "new")
        await client.client_kill_filter(_type="normal", skipme=True)
        refusal = f"can't receive from work, will try again: redis at 127.0.0.1:{server.port} refuses the default user"

        async def is_told() -> bool:
            return refusal in caplog.text

        await until(is_told)
        with pytest.raises(TransportUnavailable, match="check the user name and password"):
            await transport.publish("work", message("m"))
        await client.config_set("requirepass", "")
        await publish_until_taken(transport, message("n"))
        await listening.wait_for("n")
    assert caplog.text.count(refusal) == 1


async def test_a_server_without_room_for_connections_is_told(
    server: RedisServer, client: Redis, opened: Open
) -> None:
    """It runs, and speaks plainly: what helps is another."""
    transport = await opened(server.url)
    await client.config_set("maxclients", 1)
    await client.client_kill_filter(_type="normal", skipme=True)
    with pytest.raises(TransportUnavailable, match="max number of clients reached; raise its maxclients"):
        await transport.publish("work", message("m"))


async def test_a_server_that_is_not_there_is_named() -> None:
    """The error says where it was looked for and what to do, and doesn't tell the password."""
    port = free_port()
    with pytest.raises(TransportUnavailable) as caught:
        await RedisStreamTransport(f"redis://user:pa%40ss@127.0.0.1:{port}/0").connect()
    text = str(caught.value)
    assert f"127.0.0.1:{port}" in text
    assert "check that it runs" in text
    assert "pa@ss" not in text
    assert "pa%40ss" not in text


@pytest.mark.parametrize("login", ["app:wrong-word@", "nobody:wrong-word@", ":wrong-word@", ""])
async def test_a_wrong_password_is_a_configuration_error(
    server: RedisServer, client: Redis, login: str
) -> None:
    """It says who was refused and where, and doesn't tell the password."""
    await client.execute_command("ACL", "SETUSER", "app", "on", ">right", "~*", "+@all")
    await client.config_set("requirepass", "right")
    with pytest.raises(ConfigurationError, match=f"127.0.0.1:{server.port} refuses") as caught:
        await RedisStreamTransport(f"redis://{login}{server.host}:{server.port}").connect()
    assert "wrong-word" not in str(caught.value)


@pytest.mark.parametrize("rights", [["~other:*", "+@all"], ["~*", "+@all", "-eval", "-evalsha"]])
async def test_missing_rights_are_a_configuration_error(
    server: RedisServer, client: Redis, rights: list[str]
) -> None:
    """A user who may not use the keys or the scripts is told so at the start."""
    await client.execute_command("ACL", "SETUSER", "app", "on", ">pw", *rights)
    with pytest.raises(ConfigurationError, match=r"user 'app'.*ACL"):
        await RedisStreamTransport(f"redis://app:pw@{server.host}:{server.port}").connect()


@pytest.mark.parametrize(
    "command",
    ["time", "xadd", "xlen", "xrange", "xreadgroup", "xautoclaim", "xpending", "xack", "xdel", "smembers", "zadd",
     "zcard", "zrange", "zrangebyscore", "zrem", "xgroup", "xinfo", "eval"],
)  # fmt: skip
async def test_a_command_that_is_not_permitted_is_named_at_the_start(
    server: RedisServer, client: Redis, opened: Open, command: str
) -> None:
    """Also where somebody else has had the scripts run before. Nothing is changed by looking."""
    await opened(server.url)
    keys = await client.keys()
    await client.execute_command("ACL", "SETUSER", "app", "on", ">pw", "~*", "+@all", f"-{command}")
    with pytest.raises(ConfigurationError, match=rf"(?i)user 'app'.*\b{command}\b.*ACL"):
        await RedisStreamTransport(f"redis://app:pw@{server.host}:{server.port}").connect()
    assert await client.keys() == keys


async def test_an_old_server_is_refused(server: RedisServer) -> None:
    """Before 6.2 there is no XAUTOCLAIM. A server that calls itself older is refused, with what to do."""

    ended: list[asyncio.Task[None]] = []

    async def forward(source: asyncio.StreamReader, target: asyncio.StreamWriter, *, older: bool) -> None:
        while data := await source.read(2**20):
            if older:  # by as many bytes as there were
                data = re.sub(
                    rb"(?<=redis_version:)[0-9.]+", lambda it: b"6.0.1".ljust(len(it[0]), b"0"), data
                )
            target.write(data)
        target.close()
        await target.wait_closed()

    async def between(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection(server.host, server.port)
        ended.append(asyncio.create_task(forward(reader, back, older=False)))
        ended.append(asyncio.create_task(forward(there, writer, older=True)))

    client = Redis(host=server.host, port=server.port)
    assert (await client.info())["redis_version"] >= "6.2"
    await client.aclose()
    async with await asyncio.start_server(between, "127.0.0.1", 0) as listening:
        port = listening.sockets[0].getsockname()[1]
        with pytest.raises(ConfigurationError, match=r"6\.0\.1.*6\.2"):
            await RedisStreamTransport(f"redis://127.0.0.1:{port}").connect()
        await asyncio.gather(*ended)


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("http://127.0.0.1", "redis://"),
        ("redis://a:6379,b:6379/0", "sentinel"),
        ("redis://a:6379/zero", "number of a database"),
        ("redis://a:6379/1?cluster=true", "database 0"),
        ("redis://a:26379?sentinel=main&cluster=true", "both"),
        ("redis://a:6379?colour=blue", "parameter no. 1"),
        ("redis://a:6379?socket_timeout=soon", "socket_timeout"),
        ("redis://a:6379?socket_timeout=nan", "socket_timeout of transport_url is in seconds"),
        ("redis://a:6379?socket_connect_timeout=-1", "socket_connect_timeout of transport_url is in seconds"),
        ("redis://user:secret/word@a:6379/0", "%2F"),
        ("redis://user:secret#word@a:6379/0", "%23"),
        ("redis://user:secret[word@a:6379/0", "%5B"),
    ],
)
async def test_a_url_that_cannot_work_is_a_configuration_error(url: str, says: str) -> None:
    """It says what is wrong with it without showing a password."""
    with pytest.raises(ConfigurationError) as caught:
        RedisStreamTransport(url)
    assert says in str(caught.value)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("encoding", ["nosuch", "utf-16"])
async def test_no_encoding_in_a_url_changes_what_is_said(
    server: RedisServer, opened: Open, encoding: str
) -> None:
    """Commands are bytes."""
    transport = await opened(f"{server.url}?encoding={encoding}")
    await transport.publish("work", message("m"))
    assert await take(transport) == ["m"]


async def test_names_that_cannot_be_written_keep_no_message(
    server: RedisServer, client: Redis, opened: Open, caplog: pytest.LogCaptureFixture
) -> None:
    """Somebody else's key where the names of topics belong: messages are sent and counted all the same."""
    await client.set("t:topics", "something else")
    transport = await opened(server.url)
    await transport.publish("work", message("m"))
    await transport.publish("work", message("n"))
    assert caplog.text.count("can't be written") == 1
    other = await opened(server.url)
    assert [(depth.topic, depth.waiting) for depth in await other.topics(["work"])] == [("work", 2)]
    assert await take(transport, 2) == ["m", "n"]


async def test_names_on_a_node_that_is_away_keep_no_message(opened: Open) -> None:
    """In a cluster that serves what it has, topics of the other nodes go on."""
    with redis_cluster() as cluster:
        for node in cluster.nodes:
            with cluster.client(node) as client:
                client.config_set("cluster-require-full-coverage", "no")
        transport = await opened(cluster.url)
        away = cluster.primary("t:topics")
        topic = next(
            name for name in map(str, range(100)) if cluster.primary(transport.stream_key(name)) is not away
        )
        await asyncio.to_thread(away.kill)
        async with Listening(transport, topic) as listening, asyncio.timeout(PATIENCE):
            await transport.publish(topic, message("m"))
            await listening.wait_for("m")


async def test_any_node_of_a_cluster_may_be_full(opened: Open) -> None:
    """It is looked for on all primaries: each has its topics."""
    with redis_cluster() as cluster:
        transport = await opened(cluster.url)
        await transport.check_room()
        for node in cluster.nodes:
            with cluster.client(node) as client:
                client.config_set("maxmemory", "1")
                with pytest.raises(TransportUnavailable, match="no memory left"):
                    await transport.check_room()
                client.config_set("maxmemory", "0")
        await transport.check_room()


async def test_a_url_may_name_the_namespace(server: RedisServer, opened: Open) -> None:
    """namespace= in the URL stands above what the code says."""
    transport = await opened(f"{server.url}?namespace=mine")
    assert transport.stream_key("work") == "mine:{work}:stream"


async def test_a_transport_that_is_not_open_says_so() -> None:
    """Before connect and after close it can't be used, and closing is harmless."""
    transport = RedisStreamTransport("redis://127.0.0.1:6379/0")
    await transport.close()
    with pytest.raises(TransportUnavailable, match="not connected"):
        await transport.publish("work", message("m"))
    with pytest.raises(TransportUnavailable, match="not connected"):
        await take(transport)


async def test_databases_are_apart(
    server: RedisServer, opened: Open, caplog: pytest.LogCaptureFixture
) -> None:
    """The path of the URL is the number of the database."""
    first = await opened(server.url)
    second = await opened(f"redis://{server.host}:{server.port}/3")
    await second.publish("work", message("m"))
    assert await first.topics() == []
    with pytest.raises(ConfigurationError, match="no such database"):
        await opened(f"redis://{server.host}:{server.port}/99")
    assert "maxmemory-policy" not in caplog.text, "that is something else"


# --- TLS, sentinels, a cluster


async def test_tls(tmp_path: Path, opened: Open) -> None:
    """rediss:// works with a server whose certificate is trusted, and not with one that isn't; files are looked at."""
    with redis_tls(tmp_path) as (server, certificate):
        address = f"rediss://{server.host}:{server.port}/0"
        transport = await opened(f"{address}?ssl_ca_certs={certificate}")
        await transport.publish("work", message("m"))
        assert await take(transport) == ["m"]
        with pytest.raises(TransportUnavailable, match="ssl_ca_certs"):
            await opened(address)
        with pytest.raises(TransportUnavailable, match="rediss://"):
            await opened(f"redis://{server.host}:{server.port}/0")
        (tmp_path / "words.pem").write_text("words")
        for wrong in (f"ssl_ca_certs={tmp_path}/none.pem", f"ssl_certfile={tmp_path}/words.pem"):
            with pytest.raises(ConfigurationError, match=r"TLS can't be set up .*; correct ssl_ca_certs"):
                await opened(f"{address}?{wrong}")


async def test_a_subscription_follows_the_sentinels(opened: Open) -> None:
    """The primary dies, the sentinels name another: the same iterator goes on there, and so does publishing."""
    with redis_sentinels() as servers:
        transport = await opened(servers.url)
        async with Listening(transport) as listening:
            await transport.publish("work", message("before"))
            await listening.wait_for("before")
            await transport.publish("work", message("later"), delay=0.5)
            await asyncio.to_thread(servers.first.kill)
            await publish_until_taken(transport, message("after"))
            await listening.wait_for("after")
        assert servers.primary() == servers.second.port
        unknown = servers.url.replace("=main", "=other")
        with pytest.raises(TransportUnavailable, match="'other'") as caught:
            await opened(unknown)
        assert servers.password not in str(caught.value)
        with pytest.raises(ConfigurationError, match=r"is a sentinel.*sentinel=name"):
            await opened(f"redis://127.0.0.1:{servers.sentinel.port}/0")


async def test_a_subscription_follows_a_slot_that_moves(
    opened: Open, caplog: pytest.LogCaptureFixture
) -> None:
    """A topic's keys go to another node of the cluster while it is in use: the same iterator goes on there.

    Nobody is told of a refusal: a cluster that is balanced anew is well.
    """
    with redis_cluster() as cluster:
        transport = await opened(cluster.url)
        async with Listening(transport) as listening:
            await transport.publish("work", message("before"))
            await listening.wait_for("before")
            for round_ in range(3):
                await transport.publish("work", message(f"later-{round_}"), delay=0.3)
                await asyncio.to_thread(cluster.move_slot, transport.stream_key("work"))
                await publish_until_taken(transport, message(f"after-{round_}"))
                await listening.wait_for(f"later-{round_}", f"after-{round_}")
        assert "refuses" not in caplog.text
        with pytest.raises(ConfigurationError, match="cluster=true"):
            await opened(cluster.nodes[0].url)


async def test_a_slot_may_move_to_a_node_that_is_new(opened: Open) -> None:
    """A cluster grows: while a topic's first keys are on their way to a node that served nothing before, messages are
    taken there, and the same iterator finds them."""
    with redis_cluster() as cluster, cluster.joined() as new:
        transport = await opened(cluster.url)
        async with Listening(transport) as listening:
            await transport.publish("work", message("before"))
            await listening.wait_for("before")
            end = await asyncio.to_thread(cluster.hand_over, transport.stream_key("work"), new)
            meanwhile = [f"meanwhile-{n}" for n in range(600)]
            await asyncio.gather(*(transport.publish("work", message(each)) for each in meanwhile))
            await asyncio.to_thread(end)
            await publish_until_taken(transport, message("after"))
            await listening.wait_for(*meanwhile, "after")


async def test_a_subscription_outlives_a_cluster_node(opened: Open) -> None:
    """A node that is killed and comes back is used again."""
    with redis_cluster() as cluster:
        transport = await opened(cluster.url)
        async with contextlib.AsyncExitStack() as stack:
            topics = [f"topic-{n}" for n in range(6)]
            listeners = [await stack.enter_async_context(Listening(transport, topic)) for topic in topics]
            for topic, listening in zip(topics, listeners, strict=True):
                await transport.publish(topic, message("before"))
                await listening.wait_for("before")
            for node in cluster.nodes:
                await asyncio.to_thread(node.kill)
                await asyncio.to_thread(node.start)
            for topic, listening in zip(topics, listeners, strict=True):
                await until(lambda topic=topic: _published(transport, topic))  # type: ignore[misc]
                await listening.wait_for("after")


async def _published(transport: RedisStreamTransport, topic: str) -> bool:
    try:
        await transport.publish(topic, message("after"))
    except (TransportUnavailable, RedisError):
        return False
    return True


async def test_a_subscription_follows_a_failover_of_the_cluster(opened: Open) -> None:
    """The primary of a topic dies and its replica takes over: the same iterator goes on there."""
    with redis_cluster(replicas=1) as cluster:
        transport = await opened(cluster.url)
        async with Listening(transport) as listening:
            await transport.publish("work", message("before"))
            await listening.wait_for("before")
            primary = cluster.primary(transport.stream_key("work"))
            await asyncio.to_thread(primary.kill)
            await publish_until_taken(transport, message("after"))
            await listening.wait_for("after")
            assert cluster.primary(transport.stream_key("work")) is not primary


async def test_a_cluster_is_found_again_at_other_addresses(opened: Open) -> None:
    """All nodes come back elsewhere, as pods do: the name in the URL leads to them, and all goes on there."""
    async with contextlib.AsyncExitStack() as stack:
        name = stack.enter_context(Proxy("127.0.0.1", free_port()))
        with redis_cluster() as cluster:
            name.target = (cluster.nodes[0].host, cluster.nodes[0].port)
            transport = await opened(f"redis://{name.host}:{name.port}?cluster=true")
            listening = await stack.enter_async_context(Listening(transport))
            await transport.publish("work", message("before"))
            await listening.wait_for("before")
        cluster = stack.enter_context(redis_cluster())
        name.target = (cluster.nodes[1].host, cluster.nodes[1].port)
        await publish_until_taken(transport, message("after"))
        await listening.wait_for("after")


async def test_a_cluster_takes_the_rights_of_the_guide(opened: Open) -> None:
    """With them all works on each node, also while a slot moves. Whoever lacks some, or has a wrong password, is told
    so, and not that it were no cluster."""
    guide = (Path(__file__).parents[2] / "docs/operations.md").read_text()
    [(user, rules)] = re.findall(r"ACL SETUSER (\w+) (.+)", guide)
    [more] = re.findall(r"On the nodes of a cluster it needs `(.+?)`", guide)
    with redis_cluster() as cluster, cluster.joined() as new:
        url = cluster.url.replace("redis://", f"redis://{user}:password@")

        def permit(*rules: str) -> None:
            for node in (*cluster.nodes, new):
                with cluster.client(node) as client:
                    client.execute_command("ACL SETUSER", user, *rules)

        await asyncio.to_thread(permit, *rules.split())
        with pytest.raises(ConfigurationError, match=f"refuses user '{user}'.*cluster"):
            await opened(url, namespace="paigeant")
        await asyncio.to_thread(permit, *more.split())
        with pytest.raises(ConfigurationError, match=f"refuses user '{user}'"):
            await opened(url.replace(":password@", ":wrong@"), namespace="paigeant")
        transport = await opened(url, namespace="paigeant")
        async with Listening(transport) as listening:
            await transport.publish("work", message("m"))
            await listening.wait_for("m")
            end = await asyncio.to_thread(cluster.hand_over, transport.stream_key("work"), new)
            await transport.publish("work", message("meanwhile"))
            await asyncio.to_thread(end)
            await listening.wait_for("meanwhile")


async def test_closing_leaves_no_connection_to_a_cluster(opened: Open) -> None:
    """Also after a node has failed, a closed transport has no connection to the others."""
    async with contextlib.AsyncExitStack() as stack:
        cluster = stack.enter_context(redis_cluster())
        dead, *others = cluster.nodes
        clients = [Redis(host=node.host, port=node.port) for node in others]
        for client in clients:
            stack.push_async_callback(client.aclose)
        before = await _connections(clients)
        transport = await opened(cluster.url)
        await asyncio.to_thread(dead.kill)
        failures = [await _published(transport, f"topic-{n}") for n in range(6)].count(False)
        assert 0 < failures < 6
        await transport.close()
        await until(lambda: _are_only(clients, before))


async def _are_only(clients: list[Redis], connections: list[set[str]]) -> bool:
    return await _connections(clients) == connections


async def _connections(clients: list[Redis]) -> list[set[str]]:
    return [{each["id"] for each in await client.client_list()} for client in clients]


async def test_one_server_is_no_cluster(server: RedisServer) -> None:
    """cluster=true for a server that is none is said to be wrong."""
    with pytest.raises(ConfigurationError, match="no cluster"):
        await RedisStreamTransport(f"{server.url}?cluster=true").connect()


async def test_a_server_is_no_sentinel(server: RedisServer) -> None:
    """sentinel= with the address of a server is said to be wrong, and not waited for."""
    with pytest.raises(ConfigurationError, match=r"is no sentinel.*without sentinel=main"):
        await RedisStreamTransport(f"{server.url}?sentinel=main").connect()


async def test_many_namespaces_share_a_server(redis_url: str, opened: Open) -> None:
    """Two deployments with different namespaces see nothing of each other."""
    names = [f"test-{secrets.token_hex(8)}" for _ in range(2)]
    one, other = [await opened(redis_url, namespace=name) for name in names]
    await one.publish("work", message("m"))
    assert await other.topics(["work"]) == []
    assert await take(one) == ["m"]
    await one.ack("m")
    async with Redis.from_url(redis_url) as client:
        await client.delete(one.stream_key("work"), f"{names[0]}:topics")
