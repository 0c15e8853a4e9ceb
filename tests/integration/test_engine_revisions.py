"""Whole runs whose steps revise the itinerary."""

from __future__ import annotations

import pytest
from tests.integration.runs import AT_ONCE, attempts, states, working
from tests.patience import PATIENCE

from paigeant import ActivityRegistry, ItineraryPolicy, Settings, Step, StepContext, Workflow


def revising() -> ActivityRegistry:
    """Activities that note their step ids; `plan` revises the itinerary as its arguments say."""
    activity = ActivityRegistry()

    @activity.execute(retries=AT_ONCE)
    async def plan(ctx: StepContext, how: str, fails: int = 0, adds: list[str] | None = None) -> str:
        steps = adds or ["note"]
        if how == "terminate":
            ctx.terminate()
        else:
            getattr(ctx, how)(*steps)
        await ctx.save_variable("tried", ctx.attempt)
        if ctx.attempt <= fails:
            raise RuntimeError("after all")
        return ctx.step_id

    @activity.execute()
    async def note(ctx: StepContext) -> str:
        return ctx.step_id

    return activity


@pytest.mark.parametrize(
    ("how", "order"),
    [
        ("insert", ["plan", "plan.1", "note"]),
        ("append", ["plan", "note", "plan.1"]),
        ("replace", ["plan", "plan.1"]),
        ("terminate", ["plan"]),
    ],
)
async def test_a_step_may_revise_what_is_left(settings: Settings, how: str, order: list[str]) -> None:
    """By inserting, appending, replacing and terminating; an early end is a success."""
    async with working(settings, revising()) as app:
        run = await app.dispatch(Workflow("w", ["plan", "note"]), {"how": how})
        result = await run.wait(PATIENCE)
        assert [step for step, _, _ in await states(run)] == order
    assert result.status == "completed"
    assert result.outputs == {step: step for step in order}


async def test_an_attempt_that_fails_leaves_no_revision(settings: Settings) -> None:
    """The steps of the attempt that succeeded are added once, with the same ids as ever; so are its variables."""
    async with working(settings, revising()) as app:
        run = await app.dispatch(
            Workflow("w", ["plan"]), {"how": "insert", "fails": 2, "adds": ["note", "note"]}
        )
        result = await run.wait(PATIENCE)
        assert list(result.outputs) == ["plan", "plan.1", "plan.2"]
        assert await app.store.list_variables(run.id) == {"tried": 3}


async def test_a_step_that_was_added_may_add_steps(settings: Settings) -> None:
    """Their ids tell who added whom."""
    async with working(settings, revising()) as app:
        workflow = Workflow("w", [Step("plan", args={"how": "insert", "adds": ["plan"]})])
        run = await app.dispatch(workflow, {"how": "append"})
        result = await run.wait(PATIENCE)
    assert list(result.outputs) == ["plan", "plan.1", "plan.1.1"]


@pytest.mark.parametrize(
    ("policy", "said"),
    [
        (ItineraryPolicy(allowed=("plan",)), "'note' may not be added"),
        (ItineraryPolicy(max_added=1), "2 added steps"),
        (ItineraryPolicy(max_total=2), "3 steps in all"),
    ],
)
async def test_a_revision_keeps_to_the_policy(settings: Settings, policy: ItineraryPolicy, said: str) -> None:
    """A step that goes beyond it fails for good, and nothing is added."""
    async with working(settings, revising()) as app:
        run = await app.dispatch(
            Workflow("w", ["plan"], policy=policy), {"how": "insert", "adds": ["note", "note"]}
        )
        result = await run.wait(PATIENCE)
        assert await states(run) == [("plan", "do", "failed")]
        assert await attempts(run) == {"plan": 1}
    assert said in str(result.error)


async def test_the_policy_counts_over_the_whole_run(settings: Settings) -> None:
    """Steps that an earlier step added count for a later one, whichever worker does it."""
    async with working(settings, revising(), workers=2) as app:
        workflow = Workflow("w", ["plan", Step("plan", id="again")], policy=ItineraryPolicy(max_added=1))
        result = await (await app.dispatch(workflow, {"how": "append"})).wait(PATIENCE)
    assert result.status == "failed"
    assert "2 added steps" in str(result.error)
