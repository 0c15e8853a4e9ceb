"""The workload on DBOS Transact, `store` being its system database. Runs in a virtual environment of its own.

Client and worker are one process, as in `chain.py`. `python -m benchmarks.chain_dbos '{...}'`, the same arguments.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import uvloop
from dbos import DBOS  # type: ignore[import-not-found]  # only in the peer's environment, which `make bench` makes

from benchmarks.workload import STEPS, WARM_UP, Order, all_at_once, one_by_one, raised


@DBOS.step()  # type: ignore[untyped-decorator]
async def step(order: Order) -> Order:
    """Each of the five steps."""
    return raised(order)


@DBOS.workflow()  # type: ignore[untyped-decorator]
async def chain(order: Order) -> Order:
    """The five steps, one after the other."""
    for _ in range(STEPS):
        order = await step(order)
    return order


async def one_run(order: Order) -> Order:
    """What the last step of a run with this order returned."""
    handle = await DBOS.start_workflow_async(chain, order)
    result: Order = await handle.get_result()
    return result


async def measure(*, store: str, runs: int, in_flight: int, alone: int) -> dict[str, Any]:
    """Steps a second of `runs` runs with so many in flight, then the milliseconds of `alone` runs one by one."""
    DBOS(config={"name": "chain", "system_database_url": store, "log_level": "WARNING"})
    DBOS.launch()
    await all_at_once(one_run, WARM_UP, in_flight=in_flight)
    steps = await all_at_once(one_run, runs, in_flight=in_flight) if runs else None
    took = await one_by_one(one_run, alone)
    DBOS.destroy()
    return {"steps": steps, "ms": took}


if __name__ == "__main__":
    print(json.dumps(uvloop.run(measure(**json.loads(sys.argv[1])))))
