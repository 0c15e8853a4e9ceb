"""Every message comes twenty times, in any order, to three workers: everything is done once, and the counts add up."""

from __future__ import annotations

import asyncio
import random
import secrets
from collections import Counter
from contextlib import AsyncExitStack
from typing import Any

import pytest
from tests.integration.workers import working
from tests.patience import PATIENCE

from paigeant import (
    ActivityRegistry,
    NonRetryableError,
    Paigeant,
    PaigeantMessage,
    RunStatus,
    Settings,
    StepContext,
    Workflow,
)
from paigeant.observer import Event

COPIES = 20
RUNS = 12
WORKERS = 3


class World:
    """What three applications did and were told."""

    def __init__(self) -> None:
        self.chance = random.Random(9)
        self.executed: Counter[tuple[str, str, bool]] = Counter()
        self.told: Counter[str] = Counter()
        self.sent = 0
        self._changed = asyncio.Event()
        self.activity = ActivityRegistry()

        @self.activity.execute()
        async def work(ctx: StepContext) -> None:
            self.executed[ctx.workflow_id, ctx.step_id, False] += 1

        @self.activity.compensate("work")
        async def unwork(ctx: StepContext) -> None:
            self.executed[ctx.workflow_id, ctx.step_id, True] += 1

        @self.activity.execute()
        async def end(ctx: StepContext, fails: bool) -> None:
            self.executed[ctx.workflow_id, ctx.step_id, False] += 1
            if fails:
                raise NonRetryableError("planned")

    def observe(self, event: Event) -> None:
        """Count what became of deliveries."""
        if event.name.startswith("delivery."):
            self.told[event.name.removeprefix("delivery.")] += 1

        self._changed.set()

    async def until_settled(self) -> None:
        """Wait until all that was sent has come to something, what is late too."""
        async with asyncio.timeout(PATIENCE):
            while self.told["claimed"] + self.told["duplicate"] < self.sent:
                self._changed.clear()
                await self._changed.wait()

    def multiply(self, app: Paigeant) -> None:
        """Have each message that `app` sends come again and again, some at once and some behind later ones."""
        publish = app.transport.publish

        async def published(topic: str, message: PaigeantMessage, *, delay: float = 0) -> None:
            self.sent += COPIES
            late = [delay + self.chance.choice([0.0, self.chance.uniform(0.0, 0.5)]) for _ in range(COPIES)]
            await asyncio.gather(*(publish(topic, message, delay=each) for each in late))

        transport: Any = app.transport
        transport.publish = published


@pytest.mark.parametrize("broker", ["redis", "rabbitmq"])
async def test_what_comes_twenty_times_is_done_once(
    broker: str, request: pytest.FixtureRequest, postgres_tables: str
) -> None:
    """Each delivery ends as claimed or as a duplicate, or is given back and comes again; none is lost track of."""
    transport_url = f"{request.getfixturevalue(f'{broker}_url')}?namespace=twenty-{secrets.token_hex(4)}"
    settings = Settings(
        store_url=postgres_tables, transport_url=transport_url, signing="off", local_steps=1, concurrency=5
    )
    world = World()
    async with AsyncExitStack() as stack:
        apps = [
            await stack.enter_async_context(Paigeant(settings, activities=world.activity, observers=[world]))
            for _ in range(WORKERS)
        ]
        for app in apps:
            world.multiply(app)
            await stack.enter_async_context(working(app.worker()))
        workflow = Workflow("twenty", ["work", "work", "end"])
        runs = [await apps[0].dispatch(workflow, {"fails": n % 2 == 0}) for n in range(RUNS)]
        results = [await run.wait(PATIENCE) for run in runs]
        await world.until_settled()
    assert [result.status for result in results] == [
        RunStatus.COMPLETED if n % 2 else RunStatus.COMPENSATED for n in range(RUNS)
    ]
    expected = Counter(
        (run.id, step, undo)
        for n, run in enumerate(runs)
        for step, undo in [
            *(("work", False), ("work_2", False), ("end", False)),
            *([] if n % 2 else [("work_2", True), ("work", True)]),
        ]
    )
    assert world.executed == expected
    assert world.told["rejected"] == 0
    assert world.told["claimed"] == len(expected)
    assert world.told["claimed"] + world.told["duplicate"] == world.sent
