"""Steps that are taken from the worker that does them: whose result counts, and how often a step is begun."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import psycopg
import pytest
from tests.integration.workers import working
from tests.kill.sql import rows, write
from tests.patience import PATIENCE

from paigeant import ActivityRegistry, Paigeant, Settings, StepContext, Workflow
from paigeant.observer import Event


class Attempts:
    """Attempts at one step, each of which goes on when it is told to."""

    def __init__(self) -> None:
        self.begun: list[int] = []
        self._changed = asyncio.Event()
        self._ends = {number: asyncio.Event() for number in (1, 2)}
        self.events: list[str] = []

    async def attempt(self, number: int) -> int:
        """Begin the attempt of this number, and end it when it may."""
        self.begun.append(number)
        self._changed.set()
        await self._ends[number].wait()
        return number

    def end(self, number: int) -> None:
        """Let this attempt end."""
        self._ends[number].set()

    async def until(self, fact: Callable[[], bool]) -> None:
        """Wait until it is so."""
        async with asyncio.timeout(PATIENCE):
            while not fact():
                self._changed.clear()
                await self._changed.wait()

    def observe(self, event: Event) -> None:
        """Note what is told of the step."""
        self.events.append(event.name)
        self._changed.set()


@pytest.fixture(params=["memory://", "sqlite:///p.db", "postgres"], ids=["memory", "sqlite", "postgres"])
def settings(request: pytest.FixtureRequest) -> Settings:
    """Stores and transports of each kind. A heartbeat that would cut a lost attempt off comes much later."""
    url = request.getfixturevalue("postgres_tables") if request.param == "postgres" else request.param
    return Settings(
        transport_url=url, store_url=url, sweep_interval=0.05, grace=0.2, heartbeat=500, lease=1000
    )


@pytest.mark.parametrize("strict", [False, True])
async def test_whose_late_success_counts(settings: Settings, strict: bool) -> None:
    """That of the first one to succeed; with `strict_fencing` only that of the newest attempt."""
    activity, attempts = ActivityRegistry(), Attempts()

    @activity.execute(strict_fencing=strict)
    async def pay(ctx: StepContext) -> int:
        return await attempts.attempt(ctx.attempt)

    async with Paigeant(settings, activities=activity, observers=[attempts]) as app:
        async with working(app.worker()):
            run = await app.dispatch(Workflow("w", ["pay"]))
            await attempts.until(lambda: attempts.begun == [1])
            await app.store.sweep(gone=[worker.id for worker in await app.store.list_workers()])
            await attempts.until(lambda: attempts.begun == [1, 2])
            attempts.end(1)
            await attempts.until(
                lambda: "step.lost" in attempts.events or "step.completed" in attempts.events
            )
            assert ("step.lost" in attempts.events) is strict
            attempts.end(2)
            result = await run.wait(PATIENCE)
            assert result.output == (2 if strict else 1)
            await attempts.until(lambda: "step.lost" in attempts.events)
        assert (await run.detail()).steps[0].attempt == 2


@pytest.fixture
def forgetful(request: pytest.FixtureRequest, settings: Settings) -> Settings:
    """Those of them that are databases, whose claims a crash may take away."""
    if settings.store_url == "memory://":
        return settings.model_copy(update={"store_url": "sqlite:///p.db"})
    return settings


async def test_a_claim_that_a_database_has_forgotten_begins_nothing_twice(forgetful: Settings) -> None:
    """Claims aren't synced: after a crash the same claim is granted again to who does the step already."""
    activity, attempts = ActivityRegistry(), Attempts()

    @activity.execute(retries=0)
    async def pay(ctx: StepContext) -> int:
        return await attempts.attempt(ctx.attempt)

    forget = (
        "UPDATE step_executions SET status = 'ready', epoch = 0, attempt = 0, worker = NULL, started_at = NULL, "
        "wake_at = 0"
    )
    claimed = "SELECT status, epoch, attempt FROM step_executions"
    async with Paigeant(forgetful, activities=activity, observers=[attempts]) as app, working(app.worker()):
        run = await app.dispatch(Workflow("w", ["pay"]))
        await attempts.until(lambda: attempts.begun == [1])
        await asyncio.to_thread(write, forgetful.store_url, forget)
        await attempts.until(lambda: "delivery.duplicate" in attempts.events)
        found: Any = await asyncio.to_thread(rows, forgetful.store_url, claimed)
        assert [tuple(row) for row in found] == [("running", 1, 1)]
        attempts.end(1)
        assert (await run.wait(PATIENCE)).output == 1
    assert attempts.begun == [1]


async def test_a_worker_that_cannot_renew_its_lease_begins_nothing(postgres_tables: str) -> None:
    """Nor does it take the next step along: whatever it began now, the next sweep would take away from it again."""
    activity, attempts = ActivityRegistry(), Attempts()

    @activity.execute()
    async def first() -> int:
        return await attempts.attempt(1)

    @activity.execute()
    async def second() -> int:
        return await attempts.attempt(2)

    attempts.end(2)
    settings = Settings(
        transport_url=postgres_tables,
        store_url=postgres_tables,
        lease=1.0,
        heartbeat=0.2,
        sweep_interval=500,
        grace=500,
    )
    async with Paigeant(settings, activities=activity, observers=[attempts]) as app:
        worker = app.worker()
        async with working(worker):
            under_way = await app.dispatch(Workflow("w", ["first", "second"]))
            await attempts.until(lambda: attempts.begun == [1])
            with psycopg.connect(postgres_tables) as other:
                other.execute("LOCK TABLE workers")
                async with asyncio.timeout(PATIENCE):
                    while not worker.idleness():  # noqa: ASYNC110  # nobody is told
                        await asyncio.sleep(0.01)
                new = await app.dispatch(Workflow("v", ["second"]))
                await attempts.until(lambda: attempts.events.count("delivery.returned") >= 1)
                attempts.end(1)
                await attempts.until(lambda: "step.completed" in attempts.events)
                returned = attempts.events.count("delivery.returned")
                await attempts.until(lambda: attempts.events.count("delivery.returned") >= returned + 4)
                assert attempts.begun == [1]
            results = [await run.wait(PATIENCE) for run in (under_way, new)]
    assert [result.output for result in results] == [2, 2]
    assert attempts.begun == [1, 2, 2]
