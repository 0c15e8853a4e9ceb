"""What a sweep finds is sent as soon as that is possible."""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from dataclasses import replace
from types import SimpleNamespace

import pytest
from tests.patience import PATIENCE

from paigeant.activity import ActivityRegistry
from paigeant.dispatcher import Dispatcher
from paigeant.errors import ConfigurationError, TransportUnavailable
from paigeant.forwarder import Forwarder
from paigeant.message import PaigeantMessage
from paigeant.store import ClaimRequest, Grant, StepKey, WorkerRecord
from paigeant.stores.memory import MemoryStore
from paigeant.sweeper import Sweeper
from paigeant.testing import ManualClock
from paigeant.transport import TopicDepth
from paigeant.transports.memory import MemoryTransport
from paigeant.workflow import Workflow

GRACE = 10.0


class Hand:
    """A clock that is set by hand, also back."""

    instant = 1_800_000_000.0

    def now(self) -> float:
        return self.instant


class Broker(MemoryTransport):
    """A transport that can be away for some topics."""

    away: frozenset[str] = frozenset()
    tried = 0
    refuses = False
    ahead = 0
    """So many messages of each topic has somebody fetched whose steps aren't claimed yet."""
    tells = True
    """Whether it tells of them."""

    async def publish(self, topic: str, message: PaigeantMessage, *, delay: float = 0) -> None:
        self.tried += 1
        if topic in self.away:
            raise TransportUnavailable(f"{topic} is away")
        await super().publish(topic, message, delay=delay)

    async def topics(self, known: Collection[str] = ()) -> list[TopicDepth]:
        if self.refuses:
            raise ConfigurationError("it doesn't let the user look")
        return [
            replace(each, waiting=each.waiting - self.ahead, taken=self.ahead if self.tells else 0)
            for each in await super().topics(known)
        ]

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
    sweeper = Sweeper(store, forwarder, worker=WorkerRecord("me", "host", "1"), topics=("a",), interval=1.0)
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


@pytest.mark.parametrize("back", [0.0, 86400.0])
async def test_what_a_wiped_broker_has_lost_is_sent_before_its_time(back: float) -> None:
    """A step that waits for long is sent again two graces after its topic was emptied, not after its own age again.

    So also where the clock was set back before.
    """
    clock = Hand()
    store, broker = MemoryStore(clock=clock, grace=GRACE), Broker(clock=clock)
    forwarder = Forwarder(store, broker, ActivityRegistry())
    sweeper = Sweeper(
        store,
        forwarder,
        worker=WorkerRecord("me", "host", "1"),
        topics=("a",),
        interval=1.0,
        chance=lambda: 0.0,
    )
    await sweeper.sweep()
    clock.instant -= back
    await Dispatcher(store, forwarder, ActivityRegistry()).dispatch(Workflow("order", ["paid"]), {})
    for _ in range(8):  # sent after 10, 20, 40 and 80 s, and next after 160
        clock.instant += GRACE
        await sweeper.sweep()
    broker.tried = 0
    clock.instant += GRACE
    await sweeper.sweep()
    assert broker.tried == 0  # the message is there
    for message_id in await _taken(broker):
        await broker.ack(message_id)
    for _ in range(2):
        clock.instant += GRACE
        await sweeper.sweep()
    assert await broker.depths() == {"paid": 1}


async def test_a_broker_that_was_wiped_just_now_is_found_out(clock: ManualClock) -> None:
    """A step whose turn it is to be sent again is sent, though its topic had all messages when last looked at."""
    store, broker = MemoryStore(clock=clock, grace=GRACE), Broker(clock=clock)
    forwarder = Forwarder(store, broker, ActivityRegistry())
    sweeper = Sweeper(store, forwarder, worker=WorkerRecord("me", "host", "1"), topics=("a",), interval=1.0)
    await Dispatcher(store, forwarder, ActivityRegistry()).dispatch(Workflow("order", ["paid"]), {})
    # It is looked at after 212 graces, and not to be sent then: those of powers of two are 152 and 182.
    for _ in range(211):
        clock.advance(GRACE)
        broker.tried = 0
        await sweeper.sweep()
    assert broker.tried == 0
    for message_id in await _taken(broker):
        await broker.ack(message_id)
    clock.advance(GRACE)
    await sweeper.sweep()
    assert await broker.depths() == {"paid": 1}


@pytest.mark.parametrize("tells", [True, False])
async def test_what_is_fetched_ahead_is_not_taken_for_lost(clock: ManualClock, tells: bool) -> None:
    """Who does steps of a topic has messages of others in hand: its long queue is sent as seldom as an idle one."""
    store, broker = MemoryStore(clock=clock, grace=GRACE), Broker(clock=clock)
    forwarder = Forwarder(store, broker, ActivityRegistry())
    sweeper = Sweeper(store, forwarder, worker=WorkerRecord("me", "host", "1"), topics=("a",), interval=1.0)
    dispatcher = Dispatcher(store, forwarder, ActivityRegistry())
    for number in range(4):
        await dispatcher.dispatch(Workflow("order", ["paid"]), {}, workflow_id=f"r{number}")
    broker.ahead, broker.tells = 1, tells
    done = StepKey("r0", "paid")
    claim = await store.claim_step(ClaimRequest(done, "other", 3))
    assert isinstance(claim, Grant)
    other = WorkerRecord("other", "another host", "1")
    await asyncio.to_thread(store.beat, other, lease=1e9, running=[(done, claim.epoch)])
    await broker.ack((await _taken(broker))[0])
    for graces in range(2000):
        if graces == 64:
            broker.tried = 0
        clock.advance(GRACE)
        await sweeper.sweep()
    assert 3 * 5 <= broker.tried <= 2 * 3 * 5  # at one look or two of each doubling


async def test_leases_are_freed_though_the_broker_can_t_be_asked(clock: ManualClock) -> None:
    """What a lost worker held is free whatever the transport says of its topics."""
    store, broker = MemoryStore(clock=clock, grace=GRACE), Broker(clock=clock)
    broker.refuses = True
    forwarder = Forwarder(store, broker, ActivityRegistry())
    sweeper = Sweeper(store, forwarder, worker=WorkerRecord("me", "host", "1"), topics=("a",), interval=1.0)
    dispatcher = Dispatcher(store, forwarder, ActivityRegistry())
    for name in ("held", "waits"):
        await dispatcher.dispatch(Workflow("order", ["paid"]), {}, workflow_id=name)
    await asyncio.to_thread(store.beat, WorkerRecord("lost", "host", "2"), lease=5.0, running=[])
    await store.claim_step(ClaimRequest(StepKey("held", "paid"), "lost", 3))
    for _ in range(3):
        clock.advance(2 * GRACE)
        await sweeper.sweep()
    assert await store.open_steps("held") == [StepKey("held", "paid")]


async def _taken(broker: Broker) -> list[str]:
    async with asyncio.timeout(PATIENCE):
        async for message in broker.subscribe("paid"):
            return [message.message_id]
    return []


@pytest.mark.parametrize("back", [False, True], ids=["", "set back"])
@pytest.mark.parametrize("beats", [False, True], ids=["", "beaten"])
async def test_whoever_was_late_itself_gives_all_others_time_to_beat(
    monkeypatch: pytest.MonkeyPatch, beats: bool, back: bool
) -> None:
    """A host that was suspended, or a clock that was set: all leases are over, and nobody has died.

    So also where its own beat comes before its sweep; and for no longer where the clock is set right again.
    """
    clock, steady = Hand(), Hand()
    monkeypatch.setattr("paigeant.sweeper.time", SimpleNamespace(monotonic=steady.now))
    store, broker = MemoryStore(clock=clock, grace=GRACE), MemoryTransport()
    await store.connect()
    await broker.connect()
    registry = ActivityRegistry()
    me, other = WorkerRecord("me", "host", "1"), WorkerRecord("other", "elsewhere", "2")
    sweeper = Sweeper(
        store,
        Forwarder(store, broker, registry),
        worker=me,
        topics=("a",),
        interval=1.0,
        lease=30.0,
    )
    for worker in (me, other):
        store.beat(worker, lease=30.0, running=())
    assert (await sweeper.sweep()).lost == ()
    clock.instant += 7200
    if beats:
        store.beat(me, lease=30.0, running=())
    for seconds, lost in ((0, ()), (29, ()), (1, ("other",))):
        clock.instant += seconds
        steady.instant += seconds
        assert (await sweeper.sweep()).lost == lost
        store.beat(me, lease=30.0, running=())
        if back and seconds == 29:
            clock.instant -= 7200
            store.beat(other, lease=1.0, running=())
