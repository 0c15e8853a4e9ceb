"""What a monitor makes of the rows of a store, and how it answers whoever asks."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import socket
import time
from collections.abc import AsyncIterator

import pytest
from tests.patience import PATIENCE

from paigeant import ActivityRegistry, Workflow, monitor
from paigeant import worker as worker_module
from paigeant.errors import ConfigurationError, TransportUnavailable
from paigeant.message import PaigeantMessage
from paigeant.monitor import Monitor, _of_store
from paigeant.observers.metrics import MetricsObserver
from paigeant.store import WorkerRecord
from paigeant.testing import MemoryApp
from paigeant.worker import ActivityWorker

LEASE = 10.0


@pytest.mark.parametrize(
    ("beaten", "expected"),
    [((), 0.0), ((0.0,), 0.0), ((LEASE,), 0.0), ((LEASE + 3,), 3.0), ((LEASE + 3, LEASE + 8, 1.0), 8.0)],
    ids=["no worker", "one at work", "just over", "one over", "two over and one at work"],
)
async def test_the_lease_that_ended_first_counts(beaten: tuple[float, ...], expected: float) -> None:
    """`expired_lease` is how long ago it ended, of workers that have beaten so many seconds ago; 0 while all hold."""
    async with MemoryApp(ActivityRegistry()) as app:
        begun = app.clock.now()
        for ago in sorted(beaten, reverse=True):
            app.clock.set(begun + 100 - ago)
            app.store.beat(WorkerRecord(f"beat {ago} s ago", "host", "1"), lease=LEASE, running=())
        app.clock.set(begun + 100)
        assert (await _of_store(app.store)).expired_lease == pytest.approx(expected)


async def until(worker: ActivityWorker, idleness: list[str]) -> None:
    """Wait until this is why a worker takes no messages: nobody is told."""
    async with asyncio.timeout(PATIENCE):
        while worker.idleness() != idleness:  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def test_a_worker_is_not_ready_while_one_of_its_topics_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The others may be served well, and the store and the transport answer."""
    monkeypatch.setattr(worker_module, "_UNSERVED_SECONDS", 2.0)
    registry = ActivityRegistry()

    @registry.execute(topic="secret")
    async def work() -> int:
        return 1

    async with MemoryApp(registry) as app:
        worker = app.worker()
        subscribe = app.transport.subscribe

        async def refused(topic: str, *, prefetch: int = 1) -> AsyncIterator[PaigeantMessage]:
            if topic == "secret":
                raise TransportUnavailable("may not be read by this user")
            async for message in subscribe(topic, prefetch=prefetch):
                yield message

        monkeypatch.setattr(app.transport, "subscribe", refused)
        working = asyncio.create_task(worker.run())
        told = ["nothing is received from secret: may not be read by this user"]
        await until(worker, told)
        monkeypatch.setattr(app.transport, "subscribe", subscribe)
        await until(worker, [])
        assert (await (await app.dispatch(Workflow("w", ["work"]))).wait()).output == 1
        await worker.stop()
        await working


@contextlib.asynccontextmanager
async def served(host: str = "127.0.0.1", metrics: MetricsObserver | None = None) -> AsyncIterator[int]:
    """The port of a worker that has begun."""
    registry = ActivityRegistry()

    @registry.execute()
    async def nothing() -> None: ...

    async with MemoryApp(registry) as app:
        worker = app.worker()
        working = asyncio.create_task(worker.run())
        async with Monitor(worker, metrics or MetricsObserver(), host=host, port=0) as one:
            await until(worker, [])
            assert one.port is not None
            yield one.port
        await worker.stop()
        await working


async def asked(port: int, method: str = "GET", host: str = "127.0.0.1") -> tuple[int, bytes]:
    """The answer of `/live`."""

    def ask() -> tuple[int, bytes]:
        connection = http.client.HTTPConnection(host, port, timeout=PATIENCE)
        with contextlib.closing(connection):
            connection.request(method, "/live")
            response = connection.getresponse()
            return response.status, response.read()

    return await asyncio.to_thread(ask)


async def test_the_head_of_an_answer_can_be_asked_for() -> None:
    """As whoever only looks whether something answers does it."""
    async with served() as port:
        assert [await asked(port, method) for method in ("GET", "HEAD")] == [(200, b"ok\n"), (200, b"")]


@pytest.mark.parametrize(("host", "asks"), [("::1", "::1"), ("::", "::1"), ("::", "127.0.0.1")])
async def test_it_is_served_at_addresses_of_ipv6(host: str, asks: str) -> None:
    """In a network that has no others; at all addresses, both kinds are among them."""
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:  # a machine without
        with pytest.raises(ConfigurationError, match="choose another `metrics_port`, or `metrics_host`"):
            async with served(host):
                pass
        return
    async with served(host) as port:
        assert await asked(port, host=asks) == (200, b"ok\n")


async def test_the_start_waits_for_no_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """A DNS that doesn't answer would hold the event loop up for as long."""
    monkeypatch.setattr(socket, "getfqdn", lambda *_: pytest.fail("a name was asked for"))
    async with served("0.0.0.0") as port:  # this is the one that Python asks a name for
        assert (await asked(port))[0] == 200


async def test_who_says_little_keeps_no_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker whose places are all taken by slow ones looks dead to a probe, and would be started anew."""
    monkeypatch.setattr(monitor, "_MOST_CONNECTIONS", 2)
    monkeypatch.setattr(monitor, "_IDLE_SECONDS", 1.0)
    async with served() as port:
        slow = [socket.create_connection(("127.0.0.1", port)) for _ in range(2)]

        async def trickle() -> None:
            while True:
                for each in slow:
                    with contextlib.suppress(OSError):
                        each.sendall(b"x")
                await asyncio.sleep(0.1)

        trickling = asyncio.create_task(trickle())
        await asyncio.sleep(0.3)
        assert await asked(port) == (200, b"ok\n")
        trickling.cancel()
        for each in slow:
            each.close()


async def test_metrics_can_be_shown_in_the_workers_own_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing waits for what only that loop can answer: all steps would stand still meanwhile."""
    monkeypatch.setattr(monitor, "_ASK_SECONDS", PATIENCE)
    metrics = MetricsObserver()
    async with served(metrics=metrics):
        began = time.monotonic()
        first = metrics.exposition()[0].decode()
        assert time.monotonic() - began < PATIENCE
        assert "paigeant_worker_ready 1.0" in first
        await asyncio.sleep(0.2)
        assert "paigeant_dead_letters 0.0" in metrics.exposition()[0].decode()
