"""Whole runs as their observers see them."""

from __future__ import annotations

import asyncio

import pytest
from tests.integration.runs import Shop, working
from tests.observers import Seen
from tests.patience import PATIENCE

from paigeant import ActivityRegistry, Settings, Workflow
from paigeant.observer import Around, Event, Work


async def test_what_happens_is_told_in_order(settings: Settings) -> None:
    """Each event once, with its ids."""
    shop = Shop()
    seen = Seen()
    async with working(settings, shop.activity, observers=[seen]) as app:
        run = await app.dispatch(Workflow("w", ["a", "fail"]), workflow_id="r")
        await run.wait(PATIENCE)
        await seen.wait_for("run.compensated")
    told = [event for event in seen.events if event.workflow_id]
    assert [(event.name, event.step) for event in told if not event.name.startswith("delivery.")] == [
        ("run.dispatched", ""),
        ("step.started", "a"),
        ("step.completed", "a"),
        ("step.started", "fail"),
        ("step.failed", "fail"),
        ("step.started", "a"),
        ("step.compensated", "a"),
        ("run.compensated", "a"),
    ]
    assert {event.workflow_id for event in told} == {"r"}
    assert seen.names("worker.started", "worker.stopping", "worker.stopped") == [
        "worker.started",
        "worker.stopping",
        "worker.stopped",
    ]


@pytest.mark.parametrize(
    "raised", [RuntimeError("observer"), asyncio.CancelledError()], ids=["error", "cancelled"]
)
async def test_an_observer_can_t_disturb(settings: Settings, raised: BaseException) -> None:
    """What an observer raises goes no further, be it that it looks at a task which was cancelled."""

    class Broken:
        def observe(self, event: Event) -> None:
            raise raised

        def around(self, work: Work) -> Around:
            raise raised

    activity = ActivityRegistry()
    activity.execute(name="a")(lambda: 1)
    async with working(settings, activity, observers=[Broken()]) as app:
        assert (await (await app.dispatch(Workflow("w", ["a"]))).wait(PATIENCE)).output == 1
