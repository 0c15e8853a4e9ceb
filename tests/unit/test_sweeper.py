"""What a sweep finds is sent as soon as that is possible."""

from __future__ import annotations

from paigeant.activity import ActivityRegistry
from paigeant.dispatcher import Dispatcher
from paigeant.errors import TransportUnavailable
from paigeant.forwarder import Forwarder
from paigeant.message import PaigeantMessage
from paigeant.store import WorkerRecord
from paigeant.stores.memory import MemoryStore
from paigeant.sweeper import Sweeper
from paigeant.testing import ManualClock
from paigeant.transports.memory import MemoryTransport
from paigeant.workflow import Workflow

GRACE = 10.0


class Broker(MemoryTransport):
    """A transport that can be away for some topics."""

    away: frozenset[str] = frozenset()
    tried = 0

    async def publish(self, topic: str, message: PaigeantMessage, *, delay: float = 0) -> None:
        self.tried += 1
        if topic in self.away:
            raise TransportUnavailable(f"{topic} is away")
        await super().publish(topic, message, delay=delay)

    async def depths(self) -> dict[str, int]:
        return {each.topic: each.waiting for each in await self.topics()}


async def test_what_a_broker_missed_is_sent_once_it_is_back(clock: ManualClock) -> None:
    """However long a broker was away, the sweep after its return sends all; meanwhile one message tries each topic."""
    store, broker = MemoryStore(clock=clock, grace=GRACE), Broker(clock=clock)
    await store.connect()
    await broker.connect()
    registry = ActivityRegistry()
    forwarder = Forwarder(store, broker, registry)
    dispatcher = Dispatcher(store, forwarder, registry)
    sweeper = Sweeper(store, forwarder, worker=WorkerRecord("me", "host", "1"), interval=1.0)
    broker.away = frozenset({"paid", "sent"})
    for number in range(20):
        await dispatcher.dispatch(Workflow("order", ["paid" if number % 2 else "sent"]), {})
    for _ in range(6):
        clock.advance(GRACE)
        await sweeper.sweep()
    broker.tried = 0
    clock.advance(1.0)
    await sweeper.sweep()
    assert broker.tried == 2
    broker.away = frozenset({"paid"})
    clock.advance(1.0)
    await sweeper.sweep()
    assert await broker.depths() == {"sent": 10}
    broker.away = frozenset()
    clock.advance(1.0)
    await sweeper.sweep()
    assert await broker.depths() == {"paid": 10, "sent": 10}
    broker.tried = 0
    clock.advance(1.0)
    await sweeper.sweep()
    assert broker.tried == 0
