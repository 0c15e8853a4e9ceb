"""Whole runs that are undone: in which order, with what, where, and when an undo fails."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from tests.integration.runs import AT_ONCE, Shop, states, working
from tests.patience import PATIENCE

from paigeant import ActivityRegistry, NonRetryableError, Paigeant, Settings, Step, StepContext, Workflow


async def test_a_failed_run_is_undone_backwards(settings: Settings) -> None:
    """Last recorded step first, each with what it returned; the failing step and steps without an undo aren't."""
    shop = Shop()
    shop.activity.execute(name="plain")(lambda: 1)
    workflow = Workflow("w", ["a", "plain", Step("b", when="false"), Step("a", id="x"), "c", "fail", "b"])
    async with working(settings, shop.activity) as app:
        run = await app.dispatch(workflow)
        result = await run.wait(PATIENCE)
        shown = await states(run)
    assert result.status == "compensated"
    assert result.error == "fail: RuntimeError: no"
    assert shop.undone == [("c", {"did": "c"}), ("x", {"did": "a"}), ("a", {"did": "a"})]
    assert shown == [
        ("a", "do", "compensated"),
        ("plain", "do", "completed"),
        ("b", "do", "skipped"),
        ("x", "do", "compensated"),
        ("c", "do", "compensated"),
        ("fail", "do", "failed"),
        ("c", "undo", "compensated"),
        ("x", "undo", "compensated"),
        ("a", "undo", "compensated"),
    ]


async def test_an_undo_is_retried_by_its_own_settings(settings: Settings) -> None:
    """Not by those of the step that it undoes."""
    activity = ActivityRegistry()
    tried: list[tuple[int, str]] = []

    activity.execute(name="a", retries=0)(lambda: 1)

    @activity.compensate("a", retries=AT_ONCE)
    async def undo(ctx: StepContext) -> None:
        tried.append((ctx.attempt, ctx.idempotency_key))
        if ctx.attempt < 3:
            raise RuntimeError("not yet")

    @activity.execute(retries=0)
    async def fail() -> None:
        raise RuntimeError("no")

    async with working(settings, activity) as app:
        result = await (await app.dispatch(Workflow("w", ["a", "fail"]), workflow_id="r")).wait(PATIENCE)
    assert result.status == "compensated"
    assert tried == [(1, "r:a:undo"), (2, "r:a:undo"), (3, "r:a:undo")]


@pytest.mark.parametrize(("rule", "undone"), [("continue", ["c", "a"]), ("stop", ["c"])])
async def test_an_undo_that_fails_for_good(settings: Settings, rule: Any, undone: list[str]) -> None:
    """The others are undone or not, as the workflow says; a retry goes on with what is left."""
    shop = Shop("b")
    workflow = Workflow("w", ["a", "b", "c", "fail"], on_compensation_failure=rule)
    async with working(settings, shop.activity) as app:
        run = await app.dispatch(workflow)
        assert (await run.wait(PATIENCE)).status == "compensation_failed"
        assert [step for step, _ in shop.undone] == undone
        shop.stuck.clear()
        assert await run.retry() == "compensating"
        result = await run.wait(PATIENCE)
    assert result.status == "compensated"
    assert result.error is not None, "it was undone for the same reason as before"
    assert result.error.startswith("fail: ")
    assert [step for step, _ in shop.undone] == ["c", "a", "b"] if rule == "continue" else ["c", "b", "a"]


@pytest.mark.parametrize("gives", ["what is no JSON", "a coroutine", "a generator"])
async def test_what_an_undo_gives_goes_nowhere(settings: Settings, gives: str) -> None:
    """So it may be anything, as the answer of a client; but for what has still to be run: nothing is undone yet."""
    activity = ActivityRegistry()

    activity.execute(name="a")(lambda: 1)

    async def later() -> None: ...

    @activity.compensate("a", retries=0)
    async def undo() -> Any:
        return {"a coroutine": later, "a generator": lambda: (each for each in [1])}.get(gives, object)()

    @activity.execute(retries=0)
    async def fail() -> None:
        raise RuntimeError("no")

    async with working(settings, activity) as app:
        run = await app.dispatch(Workflow("w", ["a", "fail"]))
        status = (await run.wait(PATIENCE)).status
        error = (await run.detail()).steps[-1].error or ""
    if gives == "what is no JSON":
        assert (status, error) == ("compensated", "")
    else:
        assert status == "compensation_failed"
        assert error.startswith("OutputInvalid: activity 'a' returned")


@pytest.mark.parametrize("revise", ["insert", "append", "replace", "terminate"])
async def test_an_undo_can_revise_nothing(settings: Settings, revise: str) -> None:
    """A run that is undone does nothing more: an undo that adds steps fails, since they would never be done."""
    activity = ActivityRegistry()

    @activity.execute()
    async def work() -> None:
        pass

    @activity.compensate("work")
    async def undo(ctx: StepContext) -> None:
        assert ctx.remaining == ()
        getattr(ctx, revise)(*([] if revise == "terminate" else ["work"]))

    @activity.execute()
    async def fail() -> None:
        raise NonRetryableError("no")

    async with working(settings, activity) as app:
        run = await app.dispatch(Workflow("w", ["work", "fail", "work"]))
        assert (await run.wait(PATIENCE)).status == "compensation_failed"
        error = (await run.detail()).steps[-1].error
    said = "step 'work' is being undone: the run does nothing more that could be revised"
    assert error == f"PolicyViolation: {said}"


async def test_an_undo_has_the_args_of_its_step(settings: Settings) -> None:
    """They stand above the payload there, too, in a message that is made from the rows as well."""
    activity = ActivityRegistry()
    log: list[tuple[str, str]] = []
    works = False

    @activity.execute()
    async def reserve(warehouse: str) -> None:
        log.append(("in", warehouse))

    @activity.compensate("reserve", retries=0)
    async def release(warehouse: str, why: str = "") -> None:
        if not works:
            raise ConnectionError("down")
        log.append((f"out {why}".strip(), warehouse))

    @activity.execute()
    async def fail() -> None:
        raise NonRetryableError("no")

    steps = [
        Step("reserve"),
        Step("reserve", id="b", args={"warehouse": "B", "why": "moved"}),
        Step("reserve", id="c", args={"warehouse": "C"}),
        Step("fail"),
    ]
    async with working(settings, activity) as app:
        run = await app.dispatch(Workflow("w", steps), {"warehouse": "A"})
        assert (await run.wait(PATIENCE)).status == "compensation_failed"
        works = True
        await run.retry()  # its message is made from the rows
        assert (await run.wait(PATIENCE)).status == "compensated"
    assert log == [("in", "A"), ("in", "B"), ("in", "C"), ("out", "C"), ("out moved", "B"), ("out", "A")]


@pytest.mark.parametrize("local_steps", [1, 50], ids=["by message", "at once"])
async def test_variables_of_an_undo_reach_later_undos(settings: Settings, local_steps: int) -> None:
    """Like those of a step: as arguments and through the context; those of an attempt that fails don't."""
    activity = ActivityRegistry()
    seen: list[Any] = []

    activity.execute(name="pay")(lambda: 1)
    activity.execute(name="ship")(lambda: 2)

    @activity.compensate("ship", retries=AT_ONCE)
    async def take_back(ctx: StepContext) -> None:
        await ctx.save_variable("refund", ctx.attempt)
        if ctx.attempt == 1:
            raise RuntimeError("not yet")

    @activity.compensate("pay")
    async def pay_back(output: int, refund: int, ctx: StepContext) -> None:
        seen.extend([output, refund, await ctx.load_variable("refund")])

    @activity.execute(retries=0)
    async def fail() -> None:
        raise RuntimeError("no")

    settings = settings.model_copy(update={"local_steps": local_steps})
    async with working(settings, activity) as app:
        result = await (await app.dispatch(Workflow("w", ["pay", "ship", "fail"]))).wait(PATIENCE)
    assert (result.status, seen) == ("compensated", [1, 2, 2])


async def test_what_was_done_in_a_topic_is_undone_there(settings: Settings) -> None:
    """A step that has a topic of its own is undone by those who serve that, whether or not anybody serves its
    activity's."""
    activity = ActivityRegistry()
    undone: list[str] = []

    @activity.execute()
    async def book(ctx: StepContext) -> str:
        return ctx.step_id

    @activity.compensate("book")
    async def cancel(output: str) -> None:
        undone.append(output)

    @activity.execute()
    async def fail() -> None:
        raise NonRetryableError("no")

    steps = [
        Step("book", id="here"),
        Step("book", id="there", topic="partner"),
        Step("fail", topic="partner"),
    ]
    async with Paigeant(settings, activities=activity) as app:
        run = await app.dispatch(Workflow("w", steps))
        for topic, seen in (("book", []), ("partner", ["there"]), ("book", ["there", "here"])):
            await asyncio.wait_for(app.worker(topics=[topic]).run(until_idle=True), PATIENCE)
            assert undone == seen
        assert await run.status() == "compensated"
