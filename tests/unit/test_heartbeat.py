"""The heartbeat is there for as long as its event loop is."""

from __future__ import annotations

import asyncio
import time

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
