"""What the suites of stores have in common: a store on an empty place, and short ways to bring runs somewhere."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import pytest_asyncio

from paigeant import folding
from paigeant.slip import Phase, RoutingSlip, RunStatus, Step, StepStatus
from paigeant.store import (
    ClaimRequest,
    Grant,
    NextStep,
    Recorded,
    Refused,
    RunRecord,
    StepKey,
    StepResult,
    Store,
)
from paigeant.testing.clock import ManualClock

__all__ = ["PATIENCE", "StoreBench", "due", "run"]

PATIENCE = 120.0
"""Seconds for what must come: a bound against a test that hangs, met on a slow and busy machine as well."""


def run(run_id: str = "r", *steps: str, workflow: str = "w", **fields: Any) -> RunRecord:
    """A run of `steps`, by default of `a` and `b`."""
    slip = RoutingSlip(itinerary=tuple(Step(name, id=name) for name in steps or ("a", "b")))
    values: dict[str, Any] = {
        "status": RunStatus.PENDING,
        "input": b'{"n":1}',
        "input_hash": "hash",
        "correlation_id": "c",
        "trace_id": "t",
        "headers": {"traceparent": "p"},
    }
    return RunRecord(id=run_id, workflow=workflow, slip=folding.pack_slip(slip), **{**values, **fields})


def due(step: str = "a", run_id: str = "r", phase: Phase = Phase.DO) -> NextStep:
    """That `step` is next, in a topic of its name."""
    return NextStep(StepKey(run_id, step, phase), step, step)


class StoreBench:
    """A suite derives from it; an adapter derives from the suite, and says how to make a store."""

    pytestmark: ClassVar = [pytest.mark.asyncio]

    shared: ClassVar[bool] = True
    """Whether two stores made for the same place have the same runs, like two processes."""
    durable: ClassVar[bool] = True
    """Whether what was recorded outlives all stores of its place being closed."""

    clock: ManualClock
    place: Path
    grace: ClassVar[float] = 10.0
    """The grace time that `make` gives the store."""

    # -- what an adapter's class says

    def make(self) -> Store:
        """A store, not yet connected, for `place`: an empty folder of this test. Its time is `clock`."""
        raise NotImplementedError

    # -- fixtures and helpers

    @pytest_asyncio.fixture
    async def store(self, tmp_path: Path) -> AsyncIterator[Store]:
        """A connected store on an empty place."""
        self.clock = ManualClock()
        self.place = tmp_path
        store = self.make()
        await store.connect()
        yield store
        await store.close()

    @contextlib.asynccontextmanager
    async def other(self, store: Store) -> AsyncIterator[Store]:
        """Another store of the same place, where that has the same runs; else the same one."""
        if not self.shared:
            yield store
            return
        other = self.make()
        await other.connect()
        try:
            yield other
        finally:
            await other.close()

    async def start(self, store: Store, *steps: str, run_id: str = "r", **fields: Any) -> StepKey:
        """Record a run; gives the key of its first step."""
        record = run(run_id, *steps, **fields)
        first = (steps or ("a",))[0]
        assert await store.record_workflow_start(record, due(first, run_id))
        return StepKey(run_id, first)

    async def claim(self, store: Store, key: StepKey, worker: str = "mine", attempts: int = 9) -> Grant:
        """Claim a step that is free."""
        answer = await store.claim_step(ClaimRequest(key, worker, attempts))
        assert isinstance(answer, Grant), answer
        return answer

    async def refused(self, store: Store, key: StepKey, worker: str = "other", attempts: int = 9) -> Refused:
        """The reason why a step can't be claimed."""
        answer = await store.claim_step(ClaimRequest(key, worker, attempts))
        assert isinstance(answer, Refused), answer
        return answer

    def ending(
        self,
        key: StepKey,
        grant: Grant,
        status: StepStatus = StepStatus.COMPLETED,
        worker: str = "mine",
        **fields: Any,
    ) -> StepResult:
        """How the attempt of `grant` ended."""
        return StepResult(key, worker, grant.epoch, grant.attempt, status, **fields)

    async def record(self, store: Store, result: StepResult) -> Recorded:
        """Record a result that is accepted."""
        answer = await store.record_step_result(result)
        assert isinstance(answer, Recorded), answer
        return answer

    async def undoing(self, store: Store, run_id: str = "r") -> StepKey:
        """A run whose step `a` is recorded, whose step `b` failed, and which undoes `a`."""
        key = await self.start(store, run_id=run_id)
        grant = await self.claim(store, key)
        done = self.ending(key, grant, output=b'"a"', undo_topic="a", next=due("b", run_id))
        await self.record(store, done)
        failing = StepKey(run_id, "b")
        grant = await self.claim(store, failing)
        failed = self.ending(
            failing,
            grant,
            StepStatus.FAILED,
            error="E: no",
            run=RunStatus.COMPENSATING,
            ending="failed",
            run_error="b: E: no",
            next=due("a", run_id, Phase.UNDO),
        )
        await self.record(store, failed)
        return StepKey(run_id, "a", Phase.UNDO)

    async def failed(self, store: Store, run_id: str = "r") -> StepKey:
        """A run that has failed at its first step, with nothing to undo."""
        key = await self.start(store, run_id=run_id)
        grant = await self.claim(store, key)
        ended = {"run": RunStatus.FAILED, "ending": "failed", "run_error": "a: E: no"}
        await self.record(store, self.ending(key, grant, StepStatus.FAILED, error="E: no", **ended))
        return key

    async def completed(self, store: Store, run_id: str = "r") -> StepKey:
        """A run that has completed with its first step."""
        key = await self.start(store, "a", run_id=run_id)
        grant = await self.claim(store, key)
        await self.record(store, self.ending(key, grant, output=b"1", run=RunStatus.COMPLETED))
        return key
