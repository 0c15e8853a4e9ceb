"""Whole runs over each real broker, with stores of Postgres: dead letters requeued, runs adopted, messages returned."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import aio_pika
import pytest
from tests.integration.workers import working
from tests.kill.sql import make_tables
from tests.patience import PATIENCE
from tests.services import new_database

from paigeant import ActivityRegistry, NonRetryableError, Paigeant, Settings, Workflow
from paigeant.errors import InputInvalid
from paigeant.message import MessageId
from paigeant.observer import Event
from paigeant.slip import RunStatus, StepStatus
from paigeant.testing import ManualClock
from paigeant.transports.rabbitmq import publisher
from paigeant.transports.rabbitmq.queues import declare
from paigeant.transports.rabbitmq.wire import Connection

BROKERS = ("postgres", "redis", "rabbitmq")

flow = Workflow("flow", ["order", "ship", "bill"])


@dataclass
class Systems:
    """A broker, and two stores that share nothing but that."""

    broker: str
    ours: str
    theirs: str

    def settings(self, store: str, **more: Any) -> Settings:
        """Those of a process that uses this store."""
        times: dict[str, Any] = {"sweep_interval": 0.1, "grace": 0.5, "signing": "off"}
        return Settings(transport_url=self.broker, store_url=store, **{**times, **more})


@dataclass
class Work:
    """Activities that count what they did, and an observer that can be waited for."""

    done: Counter[str] = field(default_factory=Counter)
    events: list[Event] = field(default_factory=list)
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    def observe(self, event: Event) -> None:
        self.events.append(event)
        self.changed.set()

    async def until(self, name: str, count: int = 1) -> None:
        """Until so many events of this name were seen."""
        async with asyncio.timeout(PATIENCE):
            while sum(event.name == name for event in self.events) < count:
                self.changed.clear()
                await self.changed.wait()

    def registry(self) -> ActivityRegistry:
        activity = ActivityRegistry()

        @activity.execute()
        async def order(sku: str) -> dict[str, Any]:
            self.done["order"] += 1
            return {"sku": sku, "big": 12345678901234567890}

        @activity.compensate("order")
        async def unorder(output: dict[str, Any]) -> None:
            assert output == {"sku": "A-1", "big": 12345678901234567890}
            self.done["unorder"] += 1

        @activity.execute()
        async def ship(order: dict[str, Any]) -> str:
            self.done["ship"] += 1
            return f"{order['sku']} shipped"

        @activity.execute()
        async def bill(ship: str, fails: bool = False) -> str:
            self.done["bill"] += 1
            if fails:
                raise NonRetryableError("no money")
            return f"{ship} and billed"

        return activity


@pytest.fixture(params=BROKERS)
def systems(
    request: pytest.FixtureRequest, postgres_server_url: str, redis_url: str, rabbitmq_url: str
) -> Iterator[Systems]:
    """Each of the brokers with names of our own."""
    namespace = f"test-{secrets.token_hex(6)}"
    with ExitStack() as stack:
        urls = [stack.enter_context(new_database(postgres_server_url)) for _ in range(3)]
        for url in urls:
            make_tables(url)
        broker = {
            "postgres": urls[0],
            "redis": f"{redis_url}?namespace={namespace}",
            "rabbitmq": f"{rabbitmq_url}?namespace={namespace}",
        }[request.param]
        yield Systems(broker, urls[1], urls[2])


@pytest.mark.parametrize("fails", [False, True], ids=["completes", "is undone"])
async def test_a_run_of_another_store_is_adopted(systems: Systems, fails: bool) -> None:
    """The broker brings a run that this store has never seen: it goes on here with what was done there, once."""
    theirs_did, ours_did = Work(), Work()
    theirs, ours = systems.settings(systems.theirs, grace=1000), systems.settings(systems.ours, adopt=True)
    async with (
        Paigeant(theirs, activities=theirs_did.registry(), observers=[theirs_did]) as there,
        Paigeant(ours, activities=ours_did.registry(), observers=[ours_did]) as here,
    ):
        payload = {"sku": "A-1", "fails": fails}
        run = await there.dispatch(flow, payload, workflow_id="r")
        assert await here.store.list_runs() == []
        async with working(there.worker(topics=["order"])):
            await theirs_did.until("step.completed")
        async with working(here.worker()):
            await ours_did.until("run.compensated" if fails else "run.completed")
        result = await here.run("r").wait(PATIENCE)
        other = await run.detail()
    assert result.status is (RunStatus.COMPENSATED if fails else RunStatus.COMPLETED)
    assert theirs_did.done == {"order": 1}
    assert ours_did.done == {"ship": 1, "bill": 1, **({"unorder": 1} if fails else {})}
    assert [row.status for row in other.steps] == [StepStatus.COMPLETED, StepStatus.READY]
    if not fails:
        assert result.outputs["order"] == {"sku": "A-1", "big": 12345678901234567890}
        assert result.output == "A-1 shipped and billed"


async def test_without_the_setting_it_stays_where_it_was(
    systems: Systems, caplog: pytest.LogCaptureFixture
) -> None:
    """As any message for nothing here, whatever brought it. Of the first one the log says what may be wrong."""
    work = Work()
    async with (
        Paigeant(systems.settings(systems.theirs, grace=1000), activities=work.registry()) as there,
        Paigeant(systems.settings(systems.ours), activities=work.registry(), observers=[work]) as here,
    ):
        for run_id in ("r", "s"):
            await there.dispatch(flow, {"sku": "A-1"}, workflow_id=run_id)
        async with working(here.worker()):
            await work.until("delivery.duplicate", 2)
        assert await here.store.list_runs() == []
    assert not work.done
    assert caplog.text.count("isn't in this store") == 1
    assert "give each store a `namespace` of its own, or set `adopt`" in caplog.text


async def test_a_dead_letter_that_is_requeued_has_one_effect(systems: Systems) -> None:
    """What the broker brought couldn't be read and became a dead letter: requeued twice, its step is done once."""
    work = Work()
    settings = systems.settings(systems.ours, grace=1000)
    async with Paigeant(settings, activities=work.registry(), observers=[work]) as app:
        run = await app.dispatch(flow, {"sku": "A-1"}, workflow_id="r")
        async with asyncio.timeout(PATIENCE):
            async for message in app.transport.subscribe(
                "order"
            ):  # as a worker that can't do anything with it
                await app.transport.dead_letter(message.message_id, "not_json")
                break
        [letter] = await app.store.list_dead_letters()
        assert (letter.topic, letter.workflow_id) == ("order", "r")
        assert str(MessageId.read(letter.id)) == letter.id
        for _ in range(2):
            assert await app.control.requeue(letter) == "r"
        assert await app.store.list_dead_letters() == []
        async with working(app.worker()):
            assert (await run.wait(PATIENCE)).status is RunStatus.COMPLETED
            with pytest.raises(InputInvalid, match="doesn't wait any more"):
                await app.control.requeue(letter)
    assert work.done == {"order": 1, "ship": 1, "bill": 1}


@pytest.mark.parametrize("systems", ["rabbitmq"], indirect=True)
async def test_a_step_whose_message_is_returned_stays_ready(
    systems: Systems, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """RabbitMQ returns what has no queue (NO_ROUTE): the step is ready until its message has one, and is done once."""
    work = Work()
    namespace = systems.broker.rpartition("=")[2]

    async def declare_and_delete(connection: Connection, queue: Any) -> None:
        await declare(connection, queue)
        if queue.name == f"{namespace}.ship":
            async with await aio_pika.connect(systems.broker.partition("?")[0]) as other:
                await (await other.channel()).queue_delete(queue.name)

    returned = asyncio.Event()

    def watch(record: logging.LogRecord) -> bool:
        if "NO_ROUTE" in record.getMessage():
            returned.set()
        return True

    caplog.handler.addFilter(watch)
    settings = systems.settings(systems.ours, local_steps=1)
    async with Paigeant(settings, activities=work.registry(), observers=[work]) as app:
        monkeypatch.setattr(publisher, "declare", declare_and_delete)
        run = await app.dispatch(flow, {"sku": "A-1"}, workflow_id="r")
        async with working(app.worker(topics=["order", "bill"])):  # who serves a topic declares its queue
            await work.until("step.completed")
            async with asyncio.timeout(PATIENCE):
                await returned.wait()
            rows = {row.step: row for row in (await run.detail()).steps}
            assert (rows["ship"].status, rows["ship"].attempt) == (StepStatus.READY, 0)
            assert work.done == {"order": 1}
            monkeypatch.undo()
            async with working(app.worker(topics=["ship"])):
                assert (await run.wait(PATIENCE)).output == "A-1 shipped and billed"
    assert work.done == {"order": 1, "ship": 1, "bill": 1}


async def test_steps_that_nobody_does_fill_no_broker(systems: Systems, clock: ManualClock) -> None:
    """A topic without a worker has a few messages of each step however long it waits; where they lack they are sent.

    The store goes by a clock that is set, so that hours of sweeps pass in a second.
    """
    settings = systems.settings("sqlite:///hours.db", grace=1.0)
    async with Paigeant(settings, clock=clock, activities=Work().registry()) as app:
        for _ in range(5):
            await app.dispatch(flow, {"sku": "A-1"})
        sweeper = app.worker(topics=["bill"]).sweeper

        async def wait(graces: int) -> int:
            for _ in range(graces // 10):
                clock.advance(10.0)
                await sweeper.sweep()
            [depth] = await app.transport.topics(["order"])
            return depth.waiting

        before = await wait(1500)
        assert before <= 5 * 20
        async with asyncio.timeout(PATIENCE):
            taken = 0
            async for message in app.transport.subscribe("order", prefetch=10):
                await app.transport.ack(message.message_id)
                taken += 1
                if taken == before - 1:
                    break
        assert await wait(60) >= 5
