"""The settings that hold for a step: its own over its activity's over the default."""

from __future__ import annotations

import pytest
from tests.patience import PATIENCE

from paigeant import ActivityRegistry, RetryPolicy, RunStatus, Step, StepContext, Workflow
from paigeant.testing import MemoryApp

SLOW = RetryPolicy(attempts=9, base=30.0, jitter=0)
SLOWER = RetryPolicy(attempts=2, base=50.0, jitter=0)


@pytest.mark.parametrize(
    ("activity", "step", "attempts", "waited"),
    [
        (None, None, 3, 7 + 14),
        (1, None, 2, 7),
        (None, 1, 2, 7),
        (5, 1, 2, 7),
        (1, 0, 1, 0),
        (SLOW, 1, 2, 30),
        (SLOW, SLOWER, 2, 50),
        (5, SLOWER, 2, 50),
    ],
)
async def test_a_number_of_retries_leaves_the_waits_to_what_it_stands_above(
    activity: int | RetryPolicy | None, step: int | RetryPolicy | None, attempts: int, waited: float
) -> None:
    """A number says how often: of the step, of the activity, or of the settings. A policy says both."""
    registry, begun = ActivityRegistry(), list[int]()

    @registry.execute(retries=activity)
    async def fail(ctx: StepContext) -> None:
        begun.append(ctx.attempt)
        raise ValueError("never")

    async with MemoryApp(registry, retries=2, retry_base=7.0) as app:
        began = app.clock.now()
        run = await app.dispatch(Workflow("w", [Step("fail", retries=step)]))
        await app.drain()
        assert (await run.wait(PATIENCE)).status is RunStatus.FAILED
        assert begun == list(range(1, attempts + 1))
        assert app.clock.now() - began == pytest.approx(waited)


async def test_an_undo_is_tried_as_its_own_settings_say() -> None:
    """Its number of retries leaves the waits to the settings, too, and not to the activity that it undoes."""
    registry, begun = ActivityRegistry(), list[int]()

    @registry.execute(retries=SLOW)
    async def reserve() -> None:
        return None

    @registry.compensate("reserve", retries=1)
    async def release(ctx: StepContext) -> None:
        begun.append(ctx.attempt)
        raise ValueError("never")

    @registry.execute(retries=0)
    async def fail() -> None:
        raise ValueError("never")

    async with MemoryApp(registry, retry_base=7.0) as app:
        began = app.clock.now()
        run = await app.dispatch(Workflow("w", ["reserve", "fail"]))
        await app.drain()
        assert (await run.wait(PATIENCE)).status is RunStatus.COMPENSATION_FAILED
        assert begun == [1, 2]
        assert app.clock.now() - began == pytest.approx(7)
