"""Far more work than is done: what a worker holds of it is bounded, whatever waits, and no broker fills up with it."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import pytest
from tests.chaos.places import Place
from tests.chaos.sizes import full, say, short
from tests.integration.processes import PAIGEANT, Command
from tests.kill.roles import TIMES
from tests.patience import PATIENCE

from paigeant import Paigeant, Settings, Workflow

HANDLERS = """
import asyncio
from pathlib import Path
from paigeant import ActivityRegistry
activity = ActivityRegistry()

@activity.execute()
async def dawdle(filling: str) -> None:
    with Path("begun").open("a") as begun:
        begun.write(".")
    await asyncio.sleep(0.2)
"""
CONCURRENCY = 10
LIMIT_MIB = 200


def most_mib(pid: int) -> float:
    """The most memory that a process has ever had."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


@pytest.mark.slow
@pytest.mark.parametrize(("runs", "seconds"), [short(2_000, 5.0), full(100_000, 120.0)])
async def test_a_slow_worker_is_not_flooded(place: Place, tmp_path: Path, runs: int, seconds: float) -> None:
    """Tens of thousands of messages wait: it fetches as many as it has places, and its sweeps send each a few times."""
    (tmp_path / "handlers.py").write_text(HANDLERS)
    options: dict[str, Any] = {**place.settings, **TIMES, "signing": "off", "concurrency": CONCURRENCY}
    told = {f"PAIGEANT_{name.upper()}": str(value) for name, value in options.items()}
    begun = tmp_path / "begun"
    began = time.monotonic()
    async with Paigeant(Settings(**options)) as app:
        gate = asyncio.Semaphore(500)

        async def dispatch() -> None:
            async with gate:
                await app.dispatch(Workflow("w", ["dawdle"]), {"filling": "x" * 2000})

        await asyncio.gather(*(dispatch() for _ in range(runs)))
        dispatched = time.monotonic() - began
        environment = {**told, "PAIGEANT_LOG_LEVEL": "warning"}
        with Command("run", "handlers.py", program=PAIGEANT, environment=environment) as worker:
            async with asyncio.timeout(PATIENCE):
                while not begun.exists():  # noqa: ASYNC110  # another process makes it
                    await asyncio.sleep(0.05)
            depths, done = [], 0
            until = time.monotonic() + seconds
            while time.monotonic() < until:
                await asyncio.sleep(0.5)
                done = begun.stat().st_size
                [depth] = await app.transport.topics(["dawdle"])
                depths.append((depth.taken, depth.waiting + depth.taken + done))
            most = most_mib(worker.process.pid)
    say(
        f"{place.name}: {runs} runs dispatched in {dispatched:.0f} s, {done} begun; a worker had {most:.0f} MiB "
        f"at most and {max(taken for taken, _ in depths)} messages in hand; {depths[-1][1]} were there at the end"
    )
    assert most < LIMIT_MIB
    assert max(taken for taken, _ in depths) <= 2 * CONCURRENCY  # RabbitMQ tells of none
    assert max(there for _, there in depths) <= 8 * runs  # `ledger.is_due_once_more`
