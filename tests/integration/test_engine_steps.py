"""Whole runs that go forward: step by step, with values of every type, and with conditions."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

from pydantic import BaseModel
from tests.integration.runs import AT_ONCE, attempts, states, working
from tests.patience import PATIENCE

from paigeant import ActivityRegistry, Paigeant, Settings, Step, StepContext, Workflow


async def test_a_run_is_done_step_by_step(settings: Settings) -> None:
    """Inputs and outputs of earlier steps reach later ones; the result has the last output and all by step."""
    activity = ActivityRegistry()

    @activity.execute()
    async def double(n: int) -> int:
        return n * 2

    @activity.execute()
    def add(double: int, n: int, more: int = 1) -> int:
        return double + n + more

    async with working(settings, activity) as app:
        workflow = Workflow(
            "w", ["double", "add", Step("add", args={"double": 100}), Step("double", args={"n": 0})]
        )
        result = await (await app.dispatch(workflow, {"n": 5})).wait(PATIENCE)
    assert (result.status, result.output, result.error) == ("completed", 0, None)
    assert result.outputs == {"double": 10, "add": 16, "add_2": 106, "double_2": 0}


async def test_a_workflow_without_steps_completes_at_once(settings: Settings) -> None:
    """Without any worker."""
    async with Paigeant(settings) as app:
        result = await (await app.dispatch(Workflow("w"))).wait(PATIENCE)
    assert (result.status, result.outputs) == ("completed", {})


async def test_many_runs_at_once(settings: Settings) -> None:
    """Hundreds of runs with several workers: each gets its own result, no step is done twice."""
    activity = ActivityRegistry()
    done: list[tuple[str, str]] = []

    @activity.execute()
    async def one(n: int, ctx: StepContext) -> int:
        done.append((ctx.workflow_id, ctx.step_id))
        return n + 1

    @activity.execute()
    async def two(one: int, ctx: StepContext) -> int:
        done.append((ctx.workflow_id, ctx.step_id))
        return one * 2

    async with working(settings, activity, workers=3, concurrency=20) as app:
        workflow = Workflow("w", ["one", "two"])
        runs = await asyncio.gather(*(app.dispatch(workflow, {"n": n}) for n in range(200)))
        results = await asyncio.gather(*(run.wait(PATIENCE) for run in runs))
    assert [result.output for result in results] == [(n + 1) * 2 for n in range(200)]
    assert len(done) == len(set(done)) == 400


# -- values


class Order(BaseModel):
    sku: str
    price: Decimal
    at: datetime


@dataclass
class Receipt:
    order: Order
    raw: bytes
    ratio: float


async def test_values_keep_their_types_between_steps(settings: Settings) -> None:
    """Models, dataclasses, decimals, bytes, aware datetimes and infinities arrive as they were."""
    activity = ActivityRegistry()
    made = Receipt(
        Order(sku="A", price=Decimal("0.10"), at=datetime(2026, 1, 1, tzinfo=UTC)), b"\x00\xff", float("inf")
    )
    arrived: list[Receipt] = []

    @activity.execute()
    async def make() -> Receipt:
        return made

    @activity.execute()
    async def take(make: Receipt, big: int) -> int:
        arrived.append(make)
        return big

    async with working(settings, activity, concurrency=1) as app:
        workflow = Workflow("w", ["make", "take"])
        result = await (await app.dispatch(workflow, {"big": 2**100})).wait(PATIENCE)
    assert arrived == [made]
    assert result.output == 2**100


async def test_what_an_activity_does_to_its_arguments_is_its_own_affair(settings: Settings) -> None:
    """Further attempts and later steps get the values of the run as they are recorded, wherever they are done."""
    activity = ActivityRegistry()

    @activity.execute(retries=AT_ONCE)
    async def take(order: Any, ctx: StepContext) -> int:
        order["items"].pop()
        if ctx.attempt < 3:
            raise ValueError("once more")
        return len(order["items"])

    @activity.execute()
    def count(**values: Any) -> int:
        return len(values["order"]["items"])

    async with working(settings, activity) as app:
        run = await app.dispatch(Workflow("w", ["take", "count"]), {"order": {"items": [1, 2, 3]}})
        result = await run.wait(timeout=PATIENCE)
    assert result.outputs == {"take": 2, "count": 3}


async def test_a_result_is_plain_json(settings: Settings) -> None:
    """What wait() gives can be written as JSON by anybody."""
    activity = ActivityRegistry()

    @activity.execute()
    async def make() -> Order:
        return Order(sku="A", price=Decimal("1.10"), at=datetime(2026, 1, 1, tzinfo=UTC))

    async with working(settings, activity) as app:
        result = await (await app.dispatch(Workflow("w", ["make"]))).wait(PATIENCE)
    assert json.loads(json.dumps(result.output)) == {
        "sku": "A",
        "price": "1.10",
        "at": "2026-01-01T00:00:00Z",
    }


# -- conditions


async def test_a_false_condition_skips_a_step(settings: Settings) -> None:
    """A step whose `when` is false isn't done; conditions see inputs, earlier outputs, null for what was skipped."""
    activity = ActivityRegistry()

    @activity.execute()
    async def check(quantity: int) -> dict[str, bool]:
        return {"large": quantity > 10}

    @activity.execute()
    async def letter() -> str:
        return "sent"

    workflow = Workflow(
        "w",
        [
            "check",
            Step("letter", id="big", when="check.large"),
            Step("letter", id="any", when="quantity > 1"),
            Step("letter", id="after", when="big == null && any == 'sent'"),
            Step("letter", id="never", when="big != null && big == 'sent'"),
        ],
    )
    async with working(settings, activity) as app:
        run = await app.dispatch(workflow, {"quantity": 2})
        result = await run.wait(PATIENCE)
        assert await states(run) == [
            ("check", "do", "completed"),
            ("big", "do", "skipped"),
            ("any", "do", "completed"),
            ("after", "do", "completed"),
            ("never", "do", "skipped"),
        ]
        assert await attempts(run) == {"check": 1, "big": 0, "any": 1, "after": 1, "never": 0}
    assert result.outputs == {"check": {"large": False}, "any": "sent", "after": "sent"}


async def test_a_condition_that_can_t_be_computed_fails_the_step(settings: Settings) -> None:
    """At its first attempt, with an error that names what is missing."""
    activity = ActivityRegistry()
    activity.execute(name="a")(lambda: 1)
    activity.execute(name="large")(lambda: "x" * 1000)
    settings = settings.model_copy(update={"inline_bytes": 100})
    async with working(settings, activity) as app:
        run = await app.dispatch(Workflow("w", ["large", Step("a", when="nothing > 1")]), {"n": 1})
        result = await run.wait(PATIENCE)
        assert await attempts(run) == {"large": 1, "a": 1}
    assert result.status == "failed"
    assert "names 'nothing'; there is large, n" in str(result.error)
