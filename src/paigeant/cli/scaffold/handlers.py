"""An order: stock is reserved, a card is charged, an agent writes to the customer.

`paigeant run handlers.py` does the steps, `paigeant dispatch fulfil_order input.json --wait` starts a run. Change the
card in input.json to one that ends in 0000: it is declined, and the reservation is taken back.
"""

from paigeant import ActivityRegistry, NonRetryableError, Step, StepContext, Workflow
from pydantic import BaseModel
from pydantic_ai import Agent, ModelMessage, ModelResponse, TextPart, UserPromptPart
from pydantic_ai.models.function import AgentInfo, FunctionModel

activity = ActivityRegistry()


class Order(BaseModel):
    """What a run is given; input that doesn't fit is refused when it is dispatched."""

    sku: str
    quantity: int
    card: str
    customer: str


class Reservation(BaseModel):
    """What reserve_stock returns, and what is needed to take it back."""

    id: str
    sku: str
    quantity: int


@activity.execute(retries=3, timeout=30)
async def reserve_stock(sku: str, quantity: int, ctx: StepContext) -> Reservation:
    """Arguments come by name from the input and from the outputs of earlier steps."""
    ctx.log.info("reserving %d of %s", quantity, sku)
    # The key is the same for all attempts: an outside system that is given it does a thing only once.
    return Reservation(id=ctx.idempotency_key, sku=sku, quantity=quantity)


@activity.compensate("reserve_stock")
async def release_stock(output: Reservation, ctx: StepContext) -> None:
    """Runs when a later step fails for good; `output` is what reserve_stock returned."""
    ctx.log.info("releasing %d of %s", output.quantity, output.sku)


@activity.execute()
async def charge_card(card: str, reserve_stock: Reservation) -> str:
    """Other errors are tried again; this one says that no further attempt can help."""
    if card.endswith("0000"):
        raise NonRetryableError(f"the card ending in {card[-4:]} was declined")
    return f"receipt for {reserve_stock.quantity} x {reserve_stock.sku}"


def offline(messages: list[ModelMessage], info: AgentInfo) -> ModelResponse:
    """Stands in for a language model, so that this works without a key. Put "openai:..." in its place."""
    prompt = messages[-1].parts[-1]
    assert isinstance(prompt, UserPromptPart)
    text = str(prompt.content).removeprefix("Write to the customer: ")
    return ModelResponse(parts=[TextPart(text)])


letter = Agent(FunctionModel(offline), name="letter")
activity.agent(
    letter,
    prompt="Write to the customer: Dear {customer}, your order is on its way ({charge_card}).",
)

# Only larger orders get a letter: `when` is an expression over the input and the outputs so far.
fulfil_order = Workflow(
    "fulfil_order",
    ["reserve_stock", "charge_card", Step("letter", when="quantity > 1")],
    input_model=Order,
)
