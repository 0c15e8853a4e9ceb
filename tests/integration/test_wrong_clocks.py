"""Hosts whose clocks are wrong by a day, ahead and behind, work on the same runs: nothing is early or stolen."""

from __future__ import annotations

import asyncio
import secrets
from collections import defaultdict
from pathlib import Path

import pytest
from tests.integration.processes import Command
from tests.patience import PATIENCE

from paigeant import Paigeant, RunResult, RunStatus, Settings, Sleep, Workflow
from paigeant.store import RunDetail

DAY = 86400
RUNS = 6
TIMES = {
    "lease": 5.0,
    "heartbeat": 0.2,
    "sweep_interval": 0.1,
    "grace": 1.0,
    "retry_base": 1.0,
    "retry_cap": 1.0,
}
BROKERS = ["joined", "redis", "rabbitmq"]

# The time since the host started is the same in all of its processes, whatever their clocks say.
HANDLERS = """
import asyncio, os, time
from pathlib import Path

told = time.time
time.time = lambda: told() + float(os.environ["CLOCK_AHEAD"])

from paigeant import ActivityRegistry, NonRetryableError, StepContext
activity = ActivityRegistry()

def note(ctx, what):
    with Path("effects").open("a") as effects:
        effects.write(f"{time.monotonic()} {what} {ctx.workflow_id} {ctx.attempt} {os.environ['CLOCK_AHEAD']}\\n")

@activity.execute()
async def long(ctx: StepContext) -> None:
    note(ctx, "long")
    await asyncio.sleep(7)  # longer than a lease: only its heartbeat keeps it

@activity.compensate("long")
async def unlong(ctx: StepContext) -> None:
    note(ctx, "unlong")

@activity.execute(retries=1)
async def flaky(ctx: StepContext) -> None:
    note(ctx, "flaky")
    if ctx.attempt == 1:
        raise ValueError("once more")

@activity.execute()
async def last(ctx: StepContext, doomed: bool) -> None:
    note(ctx, "last")
    if doomed:
        raise NonRetryableError("no")
"""


@pytest.fixture(params=BROKERS)
def settings(request: pytest.FixtureRequest, postgres_tables: str) -> Settings:
    """A store of Postgres, with messages in the same database or with a broker."""
    transport_url = postgres_tables
    if request.param != "joined":
        broker = request.getfixturevalue(f"{request.param}_url")
        transport_url = f"{broker}?namespace=clocks-{secrets.token_hex(4)}"
    return Settings(store_url=postgres_tables, transport_url=transport_url, signing="off", **TIMES)


async def done(settings: Settings) -> tuple[list[RunResult], list[RunDetail]]:
    """Results and rows of runs of which each third is undone at its end."""
    workflow = Workflow("clocks", ["long", Sleep(2), "flaky", "last"])
    async with Paigeant(settings) as app:
        runs = [
            await app.dispatch(workflow, {"doomed": number % 3 == 0}, workflow_id=f"r{number}")
            for number in range(RUNS)
        ]
        return [await run.wait(PATIENCE) for run in runs], [await run.detail() for run in runs]


def test_wrong_clocks_have_no_effect(settings: Settings) -> None:
    """Leases, waits and retries are by the database's clock: each step is done once, and none before its time."""
    Path("handlers.py").write_text(HANDLERS)
    told = {
        "store_url": settings.store_url,
        "transport_url": settings.transport_url,
        "signing": "off",
        **TIMES,
    }
    environment = {f"PAIGEANT_{name.upper()}": str(value) for name, value in told.items()}
    environment["PAIGEANT_LOCAL_STEPS"] = "1"

    def worker(ahead: int) -> Command:
        return Command("run", "handlers.py", environment={**environment, "CLOCK_AHEAD": str(ahead)})

    with worker(DAY) as early, worker(-DAY) as late:
        for each in (early, late):
            each.until("worker.started")
        results, details = asyncio.run(done(settings))
    assert [result.status for result in results] == [
        RunStatus.COMPLETED if number % 3 else RunStatus.COMPENSATED for number in range(RUNS)
    ]
    effects: dict[tuple[str, str], list[tuple[float, int]]] = defaultdict(list)
    hosts = set()
    for line in Path("effects").read_text().splitlines():
        at, what, run_id, attempt, ahead = line.split()
        effects[run_id, what].append((float(at), int(attempt)))
        hosts.add(float(ahead))
    assert hosts == {DAY, -DAY}
    for number in range(RUNS):
        run_id = f"r{number}"
        counts = {what: len(times) for (of, what), times in effects.items() if of == run_id}
        undone = {} if number % 3 else {"unlong": 1}
        assert counts == {"long": 1, "flaky": 2, "last": 1, **undone}, f"{run_id}: {counts}"
        (first, _), (second, _) = effects[run_id, "flaky"]
        assert second - first > 0.45  # one second, half of which is left to chance
        [(begun, _)] = effects[run_id, "long"]
        assert first - begun >= 7 + 2
    now = max(row.completed_at or 0.0 for detail in details for row in detail.steps)
    for detail in details:  # all instants are the database's
        for row in detail.steps:
            assert row.started_at is not None
            assert row.completed_at is not None
            assert now - DAY / 2 < row.created_at <= row.started_at <= row.completed_at
