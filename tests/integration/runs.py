"""Whole runs: an application with workers at work, what rows and observers tell, and activities that can be undone."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterable
from typing import Any

from tests.patience import PATIENCE

from paigeant import ActivityRegistry, Paigeant, RetryPolicy, Run, Settings, StepContext
from paigeant.slip import Phase
from paigeant.testing import ManualClock

__all__ = ["AT_ONCE", "Shop", "attempts", "states", "working"]

AT_ONCE = RetryPolicy(attempts=3, base=0)


@contextlib.asynccontextmanager
async def working(
    settings: Settings,
    activity: ActivityRegistry,
    *,
    workers: int = 1,
    observers: Iterable[Any] = (),
    clock: ManualClock | None = None,
    **options: Any,
) -> AsyncIterator[Paigeant]:
    """An open application with workers for `activity`, which are stopped at the end."""
    async with Paigeant(settings, activities=activity, observers=observers, clock=clock) as app:
        running = [app.worker(**options) for _ in range(workers)]
        tasks = [asyncio.create_task(worker.run()) for worker in running]
        try:
            yield app
        finally:
            for worker in running:
                await worker.stop(grace=PATIENCE)
            await asyncio.gather(*tasks)


async def states(run: Run) -> list[tuple[str, str, str]]:
    """Step, phase and state of each row, in their order."""
    return [(row.step, row.phase.value, row.status.value) for row in (await run.detail()).steps]


async def attempts(run: Run) -> dict[str, int]:
    """The attempts that each step took."""
    return {row.step: row.attempt for row in (await run.detail()).steps if row.phase is Phase.DO}


class Shop:
    """Activities that can be undone, and the order of what was undone."""

    def __init__(self, *stuck: str, retries: int = 0) -> None:
        self.activity = ActivityRegistry()
        self.stuck = set(stuck)
        self.undone: list[tuple[str, Any]] = []
        for name in ("a", "b", "c"):
            self.activity.execute(name=name)(lambda name=name: {"did": name})
            self.activity.compensate(name, retries=RetryPolicy(attempts=retries + 1, base=0))(
                self._undo(name)
            )

        @self.activity.execute(retries=0)
        async def fail() -> None:
            raise RuntimeError("no")

    def _undo(self, name: str) -> Any:
        async def undo(output: dict[str, str], ctx: StepContext) -> None:
            if name in self.stuck:
                raise RuntimeError(f"{name} is stuck")
            self.undone.append((ctx.step_id, output))

        return undo
