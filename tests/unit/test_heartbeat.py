"""The heartbeat is there for as long as its event loop is."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from tests.patience import PATIENCE

from paigeant.activity import ActivityRegistry
from paigeant.dispatcher import Dispatcher
from paigeant.forwarder import Forwarder
from paigeant.heartbeat import Heartbeat
from paigeant.store import ClaimRequest, Grant, StepKey, Store, WorkerRecord
from paigeant.stores.memory import MemoryStore
from paigeant.testing import ManualClock
from paigeant.transports.memory import MemoryTransport
from paigeant.workflow import Workflow

LEASE = 30.0


def heartbeat_of(store: Store) -> Heartbeat:
    """That of a worker which has nothing on its list."""
    worker = WorkerRecord("w", "host", "1@1")
    return Heartbeat(store, worker, lease=LEASE, interval=0.01, running=list, lose=lambda _: None)


def test_it_ends_with_its_event_loop(caplog: pytest.LogCaptureFixture) -> None:
    """Of a worker that nobody has stopped nothing goes on, and nothing is said of it."""
    heartbeat = heartbeat_of(MemoryStore())
    asyncio.run(heartbeat.start())
    until = time.monotonic() + PATIENCE
    while heartbeat.troubles() != ["the heartbeat has ended"]:
        assert time.monotonic() < until
        time.sleep(0.005)
    assert caplog.text == ""


@pytest.fixture
def pass_lease(monkeypatch: pytest.MonkeyPatch, clock: ManualClock) -> Callable[[], None]:
    """Lets more than a lease pass, for the heartbeat alone."""
    monkeypatch.setattr("paigeant.heartbeat.time", SimpleNamespace(monotonic=clock.now))
    return lambda: clock.advance(LEASE + 1)


async def test_what_was_asked_before_it_began_is_no_silence(pass_lease: Callable[[], None]) -> None:
    """A worker that has waited for its servers for longer than a lease is told alive as soon as they are there."""
    heartbeat = heartbeat_of(MemoryStore())
    assert heartbeat.troubles() == ["the heartbeat hasn't begun yet"]
    pass_lease()
    await heartbeat.start()
    assert heartbeat.troubles() == []
    await heartbeat.stop()
    assert heartbeat.troubles() == ["the heartbeat has ended"]


class SlowStore(MemoryStore):
    """From the first on for which `is_away`, beats take until they are let go. By default that is the second."""

    def __init__(self) -> None:
        super().__init__()
        self.is_away: Callable[[], bool] = lambda: self.beats > 1
        self.asked, self.answers = threading.Event(), threading.Event()
        self.beats = 0

    def beat(self, *args: Any, **options: Any) -> tuple[set[Any], set[Any]]:
        """Wait, and beat."""
        self.beats += 1
        if self.is_away():
            self.asked.set()
            assert self.answers.wait(PATIENCE)
        return super().beat(*args, **options)


async def test_a_beat_that_takes_long_is_not_laid_to_the_loop(
    caplog: pytest.LogCaptureFixture, pass_lease: Callable[[], None]
) -> None:
    """While a store is away for longer than a lease, a worker is alive, and beats as soon as it is back."""
    store = SlowStore()
    heartbeat = heartbeat_of(store)
    await heartbeat.start()
    assert await asyncio.to_thread(store.asked.wait, PATIENCE)
    for _ in range(3):
        pass_lease()
        assert heartbeat.troubles() == []
        await asyncio.sleep(0)  # the loop answers
    store.answers.set()
    async with asyncio.timeout(PATIENCE):
        while store.beats < 4:  # noqa: ASYNC110
            await asyncio.sleep(0.005)
    await heartbeat.stop()
    assert "event loop" not in caplog.text


async def test_a_loop_that_hangs_while_the_store_is_away_is_told(pass_lease: Callable[[], None]) -> None:
    """Whoever asks for troubles has the loop asked."""
    store = SlowStore()
    heartbeat = heartbeat_of(store)
    await heartbeat.start()
    assert await asyncio.to_thread(store.asked.wait, PATIENCE)
    heartbeat.troubles()
    pass_lease()  # and the loop hasn't had its turn
    [trouble] = heartbeat.troubles()
    assert trouble.startswith("the event loop hasn't answered for ")
    store.answers.set()
    await heartbeat.stop()


@pytest.mark.parametrize("forgets", [False, True])
async def test_only_what_is_held_still_was_forgotten(forgets: bool, caplog: pytest.LogCaptureFixture) -> None:
    """Of a step that was claimed in the moment of a beat, and isn't its worker's at the next, nothing is said."""
    store, transport, registry = SlowStore(), MemoryTransport(), ActivityRegistry()
    await store.connect()
    await transport.connect()
    forwarder = Forwarder(store, transport, registry)
    await Dispatcher(store, forwarder, registry).dispatch(Workflow("one", ["work"]), {}, workflow_id="r")
    key = StepKey("r", "work")
    assert isinstance(await store.claim_step(ClaimRequest(key, "w", 3)), Grant)
    heartbeat = heartbeat_of(store)
    # Its beat may find the step forgotten only when the loop has answered since the one that met it.
    store.is_away = lambda: any(heartbeat._heard > met for met in heartbeat._unlisted.values())
    await heartbeat.start()
    assert await asyncio.to_thread(store.asked.wait, PATIENCE)
    beats = store.beats
    if not forgets:
        assert await store.release_steps("w", [(key, 1)]) == [key]
    store.answers.set()
    async with asyncio.timeout(PATIENCE):
        while store.beats < beats + 3 or (forgets and not caplog.text):  # noqa: ASYNC110
            await asyncio.sleep(0.005)
    await heartbeat.stop()
    assert ("claimed and forgotten" in caplog.text) is forgets
    assert isinstance(await store.claim_step(ClaimRequest(key, "other", 3)), Grant)
