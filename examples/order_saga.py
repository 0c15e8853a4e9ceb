"""An order as a saga: what was done for it is undone when a later step fails.

In one process, for a look:

    python examples/order_saga.py

As services, in three terminals (each may run on another machine once the URLs in paigeant.yaml name a server):

    paigeant run examples/order_saga.py --topics reserve_stock
    paigeant run examples/order_saga.py --topics charge_card,ship
    paigeant dispatch order_saga order.json --handlers examples/order_saga.py --wait

with order.json holding {"sku": "A-1", "quantity": 2, "card": "4242", "address": "1 Main Street"}. No carrier goes to an
address with "Moon" in it, so that the card is refunded and the stock released, the last step first.
"""

import asyncio
import random

from pydantic import BaseModel, Field

from paigeant import (
    ActivityRegistry,
    NonRetryableError,
    Paigeant,
    RetryPolicy,
    Settings,
    StepContext,
    Workflow,
)

activity = ActivityRegistry()


class Order(BaseModel):
    """The input of a run."""

    sku: str
    quantity: int = Field(gt=0)
    card: str
    address: str


class Charge(BaseModel):
    """What charge_card returns."""

    reference: str
    cents: int


class CarrierUnreachable(Exception):
    """Passes by itself, so that a further attempt is worth while."""


@activity.execute()
async def reserve_stock(sku: str, quantity: int) -> str:
    """Set goods aside."""
    return f"{quantity} x {sku}"


@activity.compensate("reserve_stock")
async def release_stock(output: str, ctx: StepContext) -> None:
    """Put them back."""
    ctx.log.info("released %s", output)


@activity.execute(timeout=10)
async def charge_card(card: str, quantity: int, ctx: StepContext) -> Charge:
    """Take the money. The key makes the bank charge once, however often this step is tried."""
    return Charge(reference=f"{card}/{ctx.idempotency_key}", cents=1999 * quantity)


# Money has to go back, so its undo has more patience than the step.
@activity.compensate("charge_card", retries=RetryPolicy(attempts=10, base=1, cap=300))
async def refund(output: Charge, ctx: StepContext) -> None:
    """Give the money back."""
    ctx.log.info("refunded %d cents of %s", output.cents, output.reference)


@activity.execute(retries=RetryPolicy(attempts=5, base=0.1))
async def ship(address: str, ctx: StepContext) -> str:
    """Hand the parcel to a carrier. A carrier that doesn't answer is asked again; one that says no isn't."""
    if ctx.attempt == 1 and random.random() < 0.3:
        raise CarrierUnreachable("no answer")
    if "Moon" in address:
        raise NonRetryableError(f"no carrier goes to {address}")
    return f"on its way to {address}"


order_saga = Workflow("order_saga", ["reserve_stock", "charge_card", "ship"], input_model=Order)


async def main() -> None:
    """Two orders, one of which can't be shipped, with the worker in this process and all in memory."""
    settings = Settings(transport_url="memory://", store_url="memory://")
    async with Paigeant(settings, activities=activity, workflows=[order_saga]) as app:
        worker = app.worker()
        working = asyncio.create_task(worker.run())
        for address in ("1 Main Street", "Sea of Tranquility, Moon"):
            run = await app.dispatch(order_saga, Order(sku="A-1", quantity=2, card="4242", address=address))
            result = await run.wait(timeout=60)
            print(f"{address}: {result.status}, {result.output or result.error}")  # noqa: T201  # an example talks
        await worker.stop()
        await working


if __name__ == "__main__":
    asyncio.run(main())
