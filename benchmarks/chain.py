"""The workload on Paigeant. By default client and worker are one process, and the store is also the transport.

`python -m benchmarks.chain '{"store": ..., "runs": ..., "in_flight": ..., "alone": ...}'` prints the figures as JSON.
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

from benchmarks.workload import WARM_UP, Order, all_at_once, one_by_one, raised
from paigeant import ActivityRegistry, Paigeant, Settings, Workflow, loops
from paigeant.observer import Observer

__all__ = ["activity", "chain", "connected", "measure", "one_run"]

activity = ActivityRegistry()


@activity.execute()
async def reserve(order: Order) -> Order:
    """The first step."""
    return raised(order)


@activity.execute()
async def charge(reserve: Order) -> Order:
    """The second step."""
    return raised(reserve)


@activity.execute()
async def pack(charge: Order) -> Order:
    """The third step."""
    return raised(charge)


@activity.execute()
async def ship(pack: Order) -> Order:
    """The fourth step."""
    return raised(pack)


@activity.execute()
async def notify(ship: Order) -> Order:
    """The last step."""
    return raised(ship)


chain = Workflow("chain", ["reserve", "charge", "pack", "ship", "notify"])


def connected(store: str, transport: str | None = None, *, prints: bool = False) -> Paigeant:
    """An application on this store and this transport; without one the store is both. `prints`: it writes log lines."""
    observers: list[Observer] = []
    if prints:
        from paigeant.observers.logs import LogObserver

        observers = [LogObserver()]
    settings = Settings(store_url=store, transport_url=transport or store)
    return Paigeant(settings, activities=activity, observers=observers)


async def one_run(app: Paigeant, order: Order) -> Order:
    """What the last step of a run with this order returned."""
    run = await app.dispatch(chain, {"order": order})
    output: Order = (await run.wait()).output
    return output


async def measure(
    *,
    store: str,
    transport: str | None = None,
    works: bool = True,
    prints: bool = False,
    runs: int,
    in_flight: int,
    alone: int,
) -> dict[str, Any]:
    """Steps a second of `runs` runs with so many in flight, then the milliseconds of `alone` runs one by one.

    Where it doesn't work itself, worker processes do.
    """
    async with connected(store, transport, prints=prints) as app:
        worker = app.worker(concurrency=max(in_flight, app.settings.concurrency))
        working = asyncio.create_task(worker.run()) if works else None

        async def run(order: Order) -> Order:
            return await one_run(app, order)

        await all_at_once(run, WARM_UP, in_flight=in_flight)
        steps = await all_at_once(run, runs, in_flight=in_flight) if runs else None
        took = await one_by_one(run, alone)
        if working is not None:
            await worker.stop()
            await working
    return {"steps": steps, "ms": took}


if __name__ == "__main__":
    print(json.dumps(loops.run(measure(**json.loads(sys.argv[1])))))
