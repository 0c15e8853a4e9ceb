"""RabbitMQ closes the channel of who holds a message for too long. Nobody here does, however long a step takes."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from tests.chaos.places import Place, Servers
from tests.kill.audit import audit, begun
from tests.kill.nursery import Nursery
from tests.kill.sql import make_tables
from tests.services import RabbitServer

SECONDS = 2
"""The broker's patience: 30 minutes by default, looked after once a minute."""


@pytest.fixture
def place(servers: Servers) -> Iterator[Place]:
    """A RabbitMQ without patience."""
    advanced = {"channel_tick_interval": "500"}
    with ExitStack() as stack:
        broker = stack.enter_context(
            RabbitServer(lines=[f"consumer_timeout = {SECONDS * 1000}"], advanced=advanced)
        )
        store = stack.enter_context(servers.store.database())
        make_tables(store)
        yield Place("rabbitmq", store, broker.url, servers.store, broker)


def test_a_step_may_take_longer_than_the_broker_waits(place: Place, tmp_path: Path) -> None:
    """Steps of three times the broker's patience are executed once, and it sees no consumer that is too slow."""
    with Nursery(tmp_path, **place.settings) as nursery:
        nursery.start("dispatcher", runs=10)
        nursery.start("worker", slow=("s1", False, 3.0 * SECONDS), settings={"local_steps": 1})
        nursery.until(lambda: bool(begun(tmp_path)))
        nursery.until_ended()
        nursery.stop(signal.SIGTERM)
        assert set(nursery.ended.values()) == {0}
    assert audit(nursery, runs=range(10)) == 0
    assert "delivery acknowledgement" not in place.broker.log.read_text()


def test_what_waits_behind_a_long_step_is_done_once_too(place: Place, tmp_path: Path) -> None:
    """Messages that a worker has fetched ahead of a long step outlast the broker's patience: nothing is done twice."""
    with Nursery(tmp_path, **place.settings) as nursery:
        nursery.start("dispatcher", runs=5)
        nursery.start("worker", concurrency=1, slow=("s1", False, 2.0 * SECONDS), settings={"local_steps": 1})
        nursery.until(lambda: bool(begun(tmp_path)))
        nursery.until_ended()
        nursery.stop(signal.SIGTERM)
        assert set(nursery.ended.values()) == {0}
    assert audit(nursery, runs=range(5)) == 0
