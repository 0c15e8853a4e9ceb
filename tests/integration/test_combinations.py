"""Whatever moves the messages and whatever records the runs: what users see is the same."""

from __future__ import annotations

import asyncio
import secrets
from collections import Counter
from itertools import pairwise, product

import pytest
from tests.integration.workers import working
from tests.patience import PATIENCE

from paigeant import (
    ActivityRegistry,
    NonRetryableError,
    Paigeant,
    RetryPolicy,
    RunConflict,
    Settings,
    StepContext,
    WaitFor,
    Workflow,
)

TRANSPORTS = ("sqlite", "postgres", "redis", "rabbitmq")
STORES = ("sqlite", "postgres")

flow = Workflow("flow", ["reserve", WaitFor("paid"), "flaky", "ship"])


@pytest.fixture(params=product(TRANSPORTS, STORES), ids=lambda pair: " with ".join(pair))
def settings(
    request: pytest.FixtureRequest, postgres_store_url: str, redis_url: str, rabbitmq_url: str
) -> Settings:
    """Each pair; where both are of one kind they are one database. Each step crosses the transport."""
    transport, store = request.param
    urls = {
        "sqlite": "sqlite:///p.db",
        "postgres": postgres_store_url,
        "redis": redis_url,
        "rabbitmq": rabbitmq_url,
    }
    return Settings(
        transport_url=urls[transport],
        store_url=urls[store],
        namespace=f"pairs-{secrets.token_hex(6)}",
        local_steps=1,
        signing="off",
    )


async def test_runs_end_alike(settings: Settings) -> None:
    """Runs wait, try again, are undone and cancelled, and one id is one run; in the end no message is left."""
    activity = ActivityRegistry()
    done: Counter[str] = Counter()

    @activity.execute()
    async def reserve(n: int) -> dict[str, int]:
        return {"n": n}

    @activity.compensate("reserve")
    async def release(output: dict[str, int], context: StepContext) -> None:
        done[f"{context.workflow_id} released {output['n']}"] += 1

    @activity.execute(retries=RetryPolicy(attempts=3, base=0.05))
    async def flaky(context: StepContext) -> int:
        if context.attempt < 3:
            raise ConnectionError("not yet")
        return context.attempt

    @activity.execute()
    async def ship(n: int, paid: int) -> str:
        if paid < n:
            raise NonRetryableError("too little")
        return f"{n} for {paid}"

    async with Paigeant(settings, activities=activity) as app, working(app.worker()):
        enough = await app.dispatch(flow, {"n": 3}, workflow_id="enough")
        assert (await app.dispatch(flow, {"n": 3}, workflow_id="enough")).id == enough.id
        with pytest.raises(RunConflict):
            await app.dispatch(flow, {"n": 4}, workflow_id="enough")
        little = await app.dispatch(flow, {"n": 5}, workflow_id="little")
        never = await app.dispatch(flow, {"n": 7}, workflow_id="never")
        for run, value in ((enough, 3), (little, 4)):
            await run.signal("paid", value)
        ended = [await run.wait(PATIENCE) for run in (enough, little)]
        async with asyncio.timeout(PATIENCE):
            while [step.step for step in (await never.detail()).steps] != ["reserve", "paid"]:  # noqa: ASYNC110  # nothing else tells
                await asyncio.sleep(0.01)
        await never.cancel()
        ended.append(await never.wait(PATIENCE))
        left = await app.transport.topics(["reserve", "flaky", "ship"])
    assert [result.status for result in ended] == ["completed", "compensated", "cancelled"]
    assert ended[0].outputs == {"reserve": {"n": 3}, "paid": 3, "flaky": 3, "ship": "3 for 3"}
    assert ended[1].error is not None
    assert done == {"little released 5": 1, "never released 7": 1}
    assert sum(depth.waiting for depth in left) == 0


@pytest.mark.parametrize(("old", "new"), list(pairwise((*TRANSPORTS, TRANSPORTS[0]))))
async def test_runs_in_flight_go_on_over_another_transport(
    old: str, new: str, postgres_store_url: str, redis_url: str, rabbitmq_url: str
) -> None:
    """Only the URL is changed: what waits is sent there."""
    activity = ActivityRegistry()
    done: Counter[str] = Counter()

    @activity.execute()
    async def one(n: int) -> int:
        done["one"] += 1
        return n

    @activity.execute()
    async def two(one: int) -> int:
        done["two"] += 1
        return one * 2

    urls = {
        "sqlite": "sqlite:///p.db",
        "postgres": postgres_store_url,
        "redis": redis_url,
        "rabbitmq": rabbitmq_url,
    }

    def over(transport: str) -> Settings:
        return Settings(
            transport_url=urls[transport],
            store_url=postgres_store_url,
            namespace=namespace,
            grace=0.3,
            sweep_interval=0.1,
            signing="off",
        )

    namespace = f"pairs-{secrets.token_hex(6)}"
    async with Paigeant(over(old), activities=activity) as app:
        ids = [(await app.dispatch(Workflow("w", ["one", "two"]), {"n": n})).id for n in range(5)]
        await app.worker(topics=["one"]).run(until_idle=True)
        await app.dispatch(Workflow("w", ["one", "two"]), {"n": 5}, workflow_id="last")
    async with Paigeant(over(new), activities=activity) as app, working(app.worker()):
        ended = [await app.run(run_id).wait(PATIENCE) for run_id in (*ids, "last")]
    assert [result.output for result in ended] == [0, 2, 4, 6, 8, 10]
    assert done == {"one": 6, "two": 6}
