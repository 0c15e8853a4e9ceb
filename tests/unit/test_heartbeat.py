"""The heartbeat is there for as long as its event loop is."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Collection
from typing import Any

import pytest

from paigeant.heartbeat import Heartbeat
from paigeant.store import WorkerRecord
from paigeant.stores.memory import MemoryStore


def test_it_ends_with_its_event_loop(caplog: pytest.LogCaptureFixture) -> None:
    """Of a worker that nobody has stopped nothing goes on, and nothing is said of it."""
    heartbeat = Heartbeat(
        MemoryStore(),
        WorkerRecord("w", "host", "1@1"),
        lease=30.0,
        interval=0.01,
        running=list,
        lose=lambda _: None,
    )
    asyncio.run(heartbeat.start())
    until = time.monotonic() + 30.0
    while heartbeat.troubles() != ["the heartbeat has ended"]:
        assert time.monotonic() < until
        time.sleep(0.005)
    assert caplog.text == ""


class SlowStore(MemoryStore):
    """The beats after the first take until they are let go: its database is away."""

    def __init__(self) -> None:
        super().__init__()
        self.asked, self.answers = threading.Event(), threading.Event()
        self.beats = 0

    def beat(self, *args: Any, **options: Any) -> tuple[set[Any], Collection[Any]]:
        """Wait, and beat."""
        self.beats += 1
        if self.beats > 1:
            self.asked.set()
            assert self.answers.wait(30.0)
        return super().beat(*args, **options)


async def test_a_beat_that_takes_long_is_not_laid_to_the_loop(caplog: pytest.LogCaptureFixture) -> None:
    """While a store is away for longer than a lease, a worker is alive, and beats as soon as it is back."""
    store = SlowStore()
    heartbeat = Heartbeat(
        store, WorkerRecord("w", "host", "1@1"), lease=0.2, interval=0.01, running=list, lose=lambda _: None
    )
    await heartbeat.start()
    assert await asyncio.to_thread(store.asked.wait, 30.0)
    until = time.monotonic() + 0.3
    while time.monotonic() < until:
        assert heartbeat.troubles() == []
        await asyncio.sleep(0.01)
    store.answers.set()
    async with asyncio.timeout(30.0):
        while store.beats < 4:  # noqa: ASYNC110
            await asyncio.sleep(0.005)
    await heartbeat.stop()
    assert "event loop" not in caplog.text


async def test_a_loop_that_hangs_while_the_store_is_away_is_told() -> None:
    """Whoever asks for troubles has the loop asked."""
    store = SlowStore()
    heartbeat = Heartbeat(
        store, WorkerRecord("w", "host", "1@1"), lease=0.2, interval=0.01, running=list, lose=lambda _: None
    )
    await heartbeat.start()
    assert await asyncio.to_thread(store.asked.wait, 30.0)
    heartbeat.troubles()
    time.sleep(0.3)  # noqa: ASYNC251
    assert heartbeat.troubles() == ["the event loop hasn't answered for 0 s"]
    store.answers.set()
    await heartbeat.stop()
