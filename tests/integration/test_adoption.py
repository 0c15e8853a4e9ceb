"""Runs of another system go on here, from what their messages tell; the other store and this one share nothing."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from tests.integration.workers import working
from tests.observers import Seen
from tests.patience import PATIENCE

from paigeant import (
    ActivityRegistry,
    NonRetryableError,
    Paigeant,
    Settings,
    StepContext,
    Workflow,
)
from paigeant.errors import KeysUnavailable
from paigeant.forwarder import STORED_PAYLOAD
from paigeant.message import PaigeantMessage
from paigeant.slip import Executed, RoutingSlip, RunStatus, Step, StepStatus

BROKER, THEIRS, OURS = "sqlite:///broker.db", "sqlite:///theirs.db", "sqlite:///ours.db"


def settings(store: str, **more: Any) -> Settings:
    """One broker for both, and a store for each."""
    return Settings(transport_url=BROKER, store_url=store, sweep_interval=0.1, **more)


done: list[tuple[str, Any]] = []


@pytest.fixture
def activity() -> ActivityRegistry:
    """What both systems know; which of them does it is told by topics."""
    registry = ActivityRegistry()
    done.clear()

    @registry.execute()
    async def order(sku: str, ctx: StepContext) -> dict:
        await ctx.save_variable("shelf", "B-7")
        return {"sku": sku, "big": 12345678901234567890}

    @registry.compensate("order")
    async def unorder(output: dict) -> None:
        done.append(("unorder", output))

    @registry.execute()
    async def ship(order: dict, shelf: str, ctx: StepContext) -> str:
        done.append(("ship", await ctx.load_variable("shelf")))
        return f"{order['sku']} from {shelf}"

    @registry.execute()
    async def bill(ship: str, fail: bool = False) -> str:
        if fail:
            raise NonRetryableError("no money")
        done.append(("bill", ship))
        return f"billed {ship}"

    return registry


flow = Workflow("flow", ["order", "ship", "bill"])


async def test_a_run_goes_on_in_the_store_that_adopts_it(activity: ActivityRegistry) -> None:
    """With input, variables and outputs of what was done elsewhere, to its end; its own store hears nothing of it."""
    seen = Seen()
    async with (
        Paigeant(settings(THEIRS), activities=activity) as theirs,
        Paigeant(settings(OURS, adopt=True), activities=activity, observers=[seen]) as ours,
        working(theirs.worker(topics=["order"])),
        working(ours.worker(topics=["ship", "bill"])),
    ):
        run = await theirs.dispatch(
            flow, {"sku": "A-1"}, workflow_id="r", correlation_id="c", headers={"x": "y"}
        )
        async with asyncio.timeout(PATIENCE):
            await seen.wait_for("run.completed")
        result = await ours.run("r").wait(PATIENCE)
        assert result.outputs == {
            "order": {"sku": "A-1", "big": 12345678901234567890},
            "ship": "A-1 from B-7",
            "bill": "billed A-1 from B-7",
        }
        assert result.status is RunStatus.COMPLETED
        detail, other = await ours.run("r").detail(), await run.detail()
        assert (detail.run.workflow, detail.run.correlation_id, detail.run.trace_id) == (
            "flow",
            "c",
            other.run.trace_id,
        )
        assert detail.run.headers == other.run.headers
        assert done == [("ship", "B-7"), ("bill", "A-1 from B-7")]
        assert [row.status for row in other.steps] == [StepStatus.COMPLETED, StepStatus.READY]
        [event] = seen.named("run.adopted")
        assert (event.workflow_id, event.workflow, event.step) == ("r", "flow", "ship")


async def test_a_run_that_fails_after_adoption_undoes_what_was_done_before(
    activity: ActivityRegistry,
) -> None:
    """The compensation of a step that another system did gets the output that it had there."""
    there, seen = Seen(), Seen()
    async with (
        Paigeant(settings(THEIRS), activities=activity, observers=[there]) as theirs,
        Paigeant(settings(OURS, adopt=True), activities=activity, observers=[seen]) as ours,
    ):
        await theirs.dispatch(flow, {"sku": "A-1", "fail": True}, workflow_id="r")
        async with working(theirs.worker(topics=["order"])):
            await there.wait_for("step.completed")
        async with working(ours.worker()):
            await seen.wait_for("run.compensated")
        assert await ours.run("r").status() is RunStatus.COMPENSATED
    assert done[-1] == ("unorder", {"sku": "A-1", "big": 12345678901234567890})


async def test_a_run_is_adopted_while_it_is_undone(activity: ActivityRegistry) -> None:
    """A message that wakes an undo brings the output of what is to be undone."""
    there, seen = Seen(), Seen()
    async with (
        Paigeant(settings(THEIRS), activities=activity, observers=[there]) as theirs,
        Paigeant(settings(OURS, adopt=True), activities=activity, observers=[seen]) as ours,
    ):
        run = await theirs.dispatch(flow, {"sku": "A-1"}, workflow_id="r")
        async with working(theirs.worker(topics=["order"])):
            await there.wait_for("step.completed")
        assert await run.cancel() is RunStatus.COMPENSATING
        async with working(ours.worker(topics=["order"])):
            await seen.wait_for("run.cancelled")
        assert await ours.run("r").status() is RunStatus.CANCELLED
    assert done == [("unorder", {"sku": "A-1", "big": 12345678901234567890})]


async def test_without_the_setting_an_unknown_run_is_dropped(activity: ActivityRegistry) -> None:
    """As any message that is for nothing here."""
    seen = Seen()
    async with (
        Paigeant(settings(THEIRS), activities=activity) as theirs,
        Paigeant(settings(OURS), activities=activity, observers=[seen]) as ours,
        working(ours.worker()),
    ):
        await theirs.dispatch(flow, {"sku": "A-1"}, workflow_id="r")
        await seen.wait_for("delivery.duplicate")
        assert seen.named("delivery.duplicate")[0].error == "unknown"
        assert await ours.store.list_runs() == []
        assert await ours.store.list_dead_letters() == []


async def test_a_message_that_comes_often_is_adopted_and_done_once(activity: ActivityRegistry) -> None:
    """Also by two workers at once; a dispatch of the same input under its id is the same run then."""
    seen = Seen()
    async with (
        Paigeant(settings(THEIRS), activities=activity) as theirs,
        Paigeant(settings(OURS, adopt=True), activities=activity, observers=[seen]) as ours,
        Paigeant(settings(OURS, adopt=True), activities=activity, observers=[seen]) as also,
    ):
        await theirs.dispatch(flow, {"sku": "A-1"}, workflow_id="r")
        detail = await theirs.run("r").detail()
        sent = PaigeantMessage(
            "r/order/do/0", "r", flow.slip(now=0), {"sku": "A-1"}, "flow", "r", detail.run.trace_id
        )
        for number in range(20):
            await ours.transport.publish("order", sent.evolve(message_id=f"again-{number}"))
        async with working(ours.worker()), working(also.worker()):
            await seen.wait_for("delivery.duplicate", 20)
            assert (
                await (await ours.dispatch(flow, {"sku": "A-1"}, workflow_id="r")).wait(PATIENCE)
            ).error is None
        assert len(seen.named("run.adopted")) == 1
        assert len(seen.named("step.completed")) == 3


@pytest.mark.parametrize(
    ("message", "said"),
    [
        (
            PaigeantMessage(
                "r/ship/do/0",
                "r",
                RoutingSlip(itinerary=(Step("ship", id="ship"),)),
                headers={STORED_PAYLOAD: "stored"},
            ),
            "its payload is too large to travel, and stayed in the store where the run began",
        ),
        (
            PaigeantMessage(
                "r/ship/do/0",
                "r",
                RoutingSlip(
                    itinerary=(Step("ship", id="ship"),), executed=(Executed("order", "order", stored=True),)
                ),
            ),
            "the output of step 'order' is too large to travel, and stayed in the store where the run began",
        ),
        (
            PaigeantMessage(
                "r/ship/do/0",
                "r",
                RoutingSlip(itinerary=(Step("ship", id="ship"),), executed=(Executed("ship", "ship"),)),
            ),
            "its slip doesn't say clearly what there is to do: something has no name, or occurs twice",
        ),
    ],
)
async def test_what_stayed_elsewhere_makes_a_dead_letter(
    message: PaigeantMessage, said: str, activity: ActivityRegistry
) -> None:
    """A run whose values can't be had here isn't begun; the letter says why."""
    seen = Seen()
    async with (
        Paigeant(settings(OURS, adopt=True), activities=activity, observers=[seen]) as ours,
        working(ours.worker()),
    ):
        await ours.transport.publish("ship", message)
        await seen.wait_for("delivery.rejected")
        [letter] = await ours.store.list_dead_letters()
        assert (letter.reason, letter.topic, letter.workflow_id) == ("not_adopted", "ship", "r")
        assert letter.detail.endswith(said)
        assert await ours.store.list_runs() == []
        assert done == []


async def test_a_run_is_adopted_later_where_its_sender_can_t_be_asked_about_now(
    activity: ActivityRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keys that can't be fetched at that moment make no message of a good sender a duplicate that is dropped."""
    seen = Seen()
    message = PaigeantMessage("r/ship/do/0", "r", RoutingSlip(itinerary=(Step("ship", id="ship"),)))
    asked: list[str] = []

    async def may_start(found: PaigeantMessage) -> bool:
        asked.append(found.workflow_id)
        if len(asked) == 1:
            raise KeysUnavailable("https://keys.example/")
        return True

    async with Paigeant(settings(OURS, adopt=True), activities=activity, observers=[seen]) as ours:
        monkeypatch.setattr(ours.forwarder.envelope, "may_start", may_start)
        async with working(ours.worker()):
            await ours.transport.publish("ship", message)
            await seen.wait_for("run.adopted")
        assert [run.id for run in await ours.store.list_runs()] == ["r"]
    assert asked == ["r", "r"]
