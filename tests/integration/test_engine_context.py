"""Whole runs whose steps use their context: variables, what is done once, keys, and where a step is."""

from __future__ import annotations

import asyncio
from contextvars import ContextVar
from typing import Any

from tests.integration.runs import AT_ONCE, working
from tests.patience import PATIENCE

from paigeant import ActivityRegistry, RetryPolicy, Settings, Step, StepContext, Workflow


async def test_variables_reach_later_steps(settings: Settings) -> None:
    """As arguments and through the context; an output goes before a variable of its name."""
    activity = ActivityRegistry()

    @activity.execute()
    async def save(ctx: StepContext) -> str:
        await ctx.save_variable("colour", "red")
        await ctx.save_variable("save", "hidden")
        return "output"

    @activity.execute()
    async def load(colour: str, save: str, ctx: StepContext) -> list[Any]:
        return [colour, save, await ctx.load_variable("colour"), await ctx.load_variable("none", 0)]

    async with working(settings, activity) as app:
        result = await (await app.dispatch(Workflow("w", ["save", "load"]), {"colour": "blue"})).wait(
            PATIENCE
        )
    assert result.output == ["red", "output", "red", 0]


async def test_a_plain_function_may_ask_its_context_in_an_event_loop_of_its_own(settings: Settings) -> None:
    """As what `agent.run_sync` calls does: variables and units come from the worker's loop all the same."""
    activity = ActivityRegistry()

    @activity.execute()
    async def save(ctx: StepContext) -> None:
        await ctx.save_variable("colour", "red")

    @activity.execute(retries=0)
    def load(ctx: StepContext) -> list[Any]:
        async def look() -> list[Any]:
            return [await ctx.load_variable("colour"), await ctx.once("five", lambda: 5)]

        return asyncio.run(look())

    async with working(settings, activity) as app:
        result = await (await app.dispatch(Workflow("w", ["save", "load"]))).wait(PATIENCE)
    assert (result.output, result.error) == (["red", 5], None)


async def test_once_is_done_once_over_all_attempts(settings: Settings) -> None:
    """A unit of work that was recorded isn't repeated when its step is; the key for outside systems is the same."""
    activity = ActivityRegistry()
    charged: list[str] = []
    keys: set[str] = set()

    @activity.execute(retries=AT_ONCE)
    async def pay(ctx: StepContext) -> str:
        keys.add(ctx.idempotency_key)

        async def charge() -> str:
            charged.append("5")
            return f"receipt {len(charged)}"

        receipt = await ctx.once("charge", charge)
        if ctx.attempt < 3:
            raise RuntimeError("after the charge")
        return str(receipt)

    async with working(settings, activity) as app:
        result = await (await app.dispatch(Workflow("w", ["pay"]), workflow_id="r")).wait(PATIENCE)
    assert (result.output, charged, keys) == ("receipt 1", ["5"], {"r:pay"})


async def test_no_two_steps_of_a_run_have_one_key(settings: Settings) -> None:
    """Also where one is called like the undo of another: whoever is asked for both would take them for one."""
    activity = ActivityRegistry()
    keys: list[str] = []

    @activity.execute(name="pay")
    async def pay(ctx: StepContext) -> None:
        keys.append(ctx.idempotency_key)

    @activity.compensate("pay")
    async def pay_back(ctx: StepContext) -> None:
        keys.append(ctx.idempotency_key)

    @activity.execute(retries=0)
    async def fail() -> None:
        raise RuntimeError("no")

    names = ["pay", "pay:undo", "pay%3Aundo"]
    workflow = Workflow("w", [*(Step("pay", id=name) for name in names), "fail"])
    async with working(settings, activity) as app:
        await (await app.dispatch(workflow, workflow_id="r")).wait(PATIENCE)
    assert keys[0] == "r:pay"
    assert len(set(keys)) == len(keys) == 2 * len(names)


async def test_the_context_tells_where_it_is(settings: Settings) -> None:
    """Run, workflow, step, activity, attempt, ids, and the deadline as an aware datetime."""
    activity = ActivityRegistry()

    @activity.execute()
    def tell(ctx: StepContext) -> list[Any]:
        aware = ctx.deadline is not None and ctx.deadline.tzinfo is not None
        return [
            ctx.workflow_id,
            ctx.workflow,
            ctx.step_id,
            ctx.activity,
            ctx.attempt,
            ctx.correlation_id,
            aware,
        ]

    async with working(settings, activity) as app:
        workflow = Workflow("w", [Step("tell", id="t")], deadline=60)
        run = await app.dispatch(workflow, workflow_id="r", correlation_id="order 7")
        assert (await run.wait(PATIENCE)).output == ["r", "w", "t", "tell", 1, "order 7", True]


TENANT: ContextVar[str] = ContextVar("tenant", default="nobody")


async def test_what_a_step_sets_in_its_context_ends_with_it(settings: Settings) -> None:
    """A context variable is the attempt's own: no step, attempt or undo behind it finds what another one set."""
    activity = ActivityRegistry()
    found: list[str] = []

    async def set_it() -> None:
        found.append(TENANT.get())
        TENANT.set("somebody")
        await asyncio.sleep(0)
        found.append(TENANT.get())

    @activity.execute()
    async def first() -> None:
        await set_it()

    @activity.compensate("first")
    async def undo() -> None:
        await set_it()

    @activity.execute()
    def second() -> None:
        asyncio.run(set_it())

    @activity.execute(retries=RetryPolicy(attempts=2, base=0))
    async def third() -> None:
        await set_it()
        raise RuntimeError("for good")

    async with working(settings, activity) as app:
        result = await (await app.dispatch(Workflow("w", ["first", "second", "third"]))).wait(PATIENCE)
    assert (result.status, found) == ("compensated", ["nobody", "somebody"] * 5)
