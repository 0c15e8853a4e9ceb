"""Agents whose processes are killed at random moments: each intended effect has one key, and each run its output."""

from __future__ import annotations

import asyncio
import random
import time
from pathlib import Path
from typing import Any

import pytest
from pydantic_core import from_json
from tests.agents.clerks import EFFECTS, OUTPUT, REQUESTS, WORKFLOW, effects, make_file
from tests.chaos.sizes import full, say, short
from tests.kill.nursery import Nursery
from tests.kill.sql import rows

from paigeant import Paigeant, Settings

TIMES = {"lease": 3.0, "heartbeat": 0.5, "sweep_interval": 0.05, "grace": 1.0, "retry_base": 0.0}
WORKERS, CONCURRENCY, BATCH = 2, 8, 40


@pytest.fixture(params=["sqlite", "postgres"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A new store with its tables."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'runs.db'}"
    return str(request.getfixturevalue("postgres_store_url"))


@pytest.mark.parametrize("kills", [short(40), full(1500)])
async def test_each_intended_effect_has_one_key(url: str, tmp_path: Path, kills: int) -> None:
    """However often a worker dies, a tool's effect comes under the key that it would have had without that."""
    settings: dict[str, Any] = {"store_url": url, "transport_url": url, **TIMES}
    chance = random.Random(kills)
    make_file(tmp_path)
    killed, dispatched, began = 0, 0, time.monotonic()
    pace, before, moved = 1.0, 0, began
    with Nursery(tmp_path, roles="tests.agents.clerks", **settings) as nursery:
        async with Paigeant(Settings(**settings)) as app:
            while True:
                done = "SELECT count(*) FROM workflow_runs WHERE completed_at IS NOT NULL"
                [(ended,)] = rows(url, done)
                if ended == dispatched:
                    if killed >= kills:
                        break
                    for _ in range(BATCH):
                        await app.dispatch(WORKFLOW, workflow_id=f"r{dispatched}")
                        dispatched += 1
                for pid, code in nursery.reap().items():
                    assert code < 0, f"worker {pid} ended with {code}: {nursery.errors}"
                for _ in range(WORKERS - len(nursery.alive)):
                    nursery.start("worker", concurrency=CONCURRENCY)
                # On a machine that is busy with other things no worker would live for long enough to do anything.
                [(units,)] = rows(url, "SELECT count(*) FROM step_units")
                if units != before:
                    pace, before, moved = max(pace * 0.9, 1.0), units, time.monotonic()
                elif time.monotonic() - moved > 2.0:
                    pace = min(pace * 1.2, 40.0)
                await asyncio.sleep(chance.uniform(0.02, 0.25) * pace)
                if killed < kills:
                    killed += nursery.kill(chance.choice(list(nursery.alive)))
                nursery.stalls(ended, seconds=60.0)
    seconds = time.monotonic() - began
    found = effects(tmp_path)
    intended = {(f"r{number}", tool) for number in range(dispatched) for tool in EFFECTS}
    assert sorted((run, tool) for run, tool, _, _ in found) == sorted(intended), "an effect has several keys"
    query = "SELECT status, CAST(output AS TEXT), CAST(usage AS TEXT) FROM step_executions"
    steps = [(status, from_json(output), from_json(usage)) for status, output, usage in rows(url, query)]
    assert {(status, output) for status, output, _ in steps} == {("completed", OUTPUT)}
    assert {usage["requests"] for _, _, usage in steps} == {REQUESTS}
    again = sum(count - 1 for *_, count in found)
    assert again <= killed * CONCURRENCY
    say(f"{dispatched} runs, {killed} kills in {seconds:.0f} s; {again} of {len(found)} effects came again")
