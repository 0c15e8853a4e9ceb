"""The agent as a step of Paigeant. Client and worker are one process, and the store is also the transport.

`python -m benchmarks.agents_paigeant '{"store": ..., "runs": ..., "in_flight": ..., "alone": ...}'` prints the figures.
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

from benchmarks.agents_workload import PROMPT, Asked, asked, checked, made, many, one_by_one, settled
from paigeant import ActivityRegistry, Paigeant, Settings, Workflow, loops
from paigeant.agents import PaigeantDurability
from paigeant.store import StepKey

__all__ = ["measure"]

activity = ActivityRegistry()
plain = made("plain")
durable = made("durable", PaigeantDurability())
activity.agent(made("helper"), name="helper", prompt="{question}")


@activity.execute()
async def ask() -> Asked:
    """The agent inside a step, where `PaigeantDurability` records what it does."""
    return await asked(durable)


by_step = Workflow("by_step", ["helper"])
by_code = Workflow("by_code", ["ask"])


async def measure(*, store: str, runs: int, in_flight: int, alone: int) -> dict[str, Any]:
    """The times of `alone` runs in each way, in turn and one by one; then of `runs` runs with so many in flight.

    `plain` is the agent without an engine, `inside` is `agent.run` in a step, `whole` a run of which the agent is the
    only step, from its dispatch to its result: milliseconds of each. `units` is how many units such a run has recorded.
    `many_plain` and `many` are a `Many` each, without and with the engine.
    """
    async with Paigeant(Settings(store_url=store, transport_url=store), activities=activity) as app:
        worker = app.worker(concurrency=max(in_flight, app.settings.concurrency))
        working = asyncio.create_task(worker.run())
        inside: list[float] = []

        async def alone_plain() -> None:
            checked((await asked(plain)).answer)

        async def in_code() -> None:
            run = await app.dispatch(by_code)
            answer, ms = (await run.wait()).output
            checked(answer)
            inside.append(ms)

        async def in_step() -> str:
            run = await app.dispatch(by_step, {"question": PROMPT})
            checked((await run.wait()).output)
            return run.id

        units = await app.store.load_units(StepKey(await in_step(), "helper"))
        settled()
        took, _, whole = await one_by_one([alone_plain, in_code, in_step], alone)
        found = {
            "plain": took,
            "inside": inside[-alone:],
            "whole": whole,
            "units": len(units),
            "many_plain": await many(alone_plain, runs, in_flight=in_flight),
            "many": await many(in_step, runs, in_flight=in_flight),
        }
        await worker.stop()
        await working
    return found


if __name__ == "__main__":
    print(json.dumps(loops.run(measure(**json.loads(sys.argv[1])))))
