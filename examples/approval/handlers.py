"""An agent that answers a complaint. It may look at the order by itself; to pay money back it needs approval.

README.md, beside it, has the commands. It runs without a key, since a small function stands in for the language model;
with COMPLAINT_MODEL=openai:gpt-5-mini (or another of pydantic-ai's models) in the environment of the worker a real one
does it.
"""

import json
import os
import re
from pathlib import Path

from pydantic import BaseModel
from pydantic_ai import Agent, ModelMessage, ModelResponse, TextPart, ToolCallPart
from pydantic_ai.messages import ToolReturnPart, UserPromptPart
from pydantic_ai.models.function import AgentInfo, FunctionModel

from paigeant import ActivityRegistry, Workflow
from paigeant.agents import effect_key


class Complaint(BaseModel):
    """The input of a run."""

    order: str
    text: str


def offline(messages: list[ModelMessage], info: AgentInfo) -> ModelResponse:
    """Stands in for a language model: looks the order up, pays back what it cost, and says how that went."""
    parts = [part for message in messages for part in message.parts]
    returns = {part.tool_name: part for part in parts if isinstance(part, ToolReturnPart)}
    if "look_up" not in returns:
        prompt = next(str(part.content) for part in parts if isinstance(part, UserPromptPart))
        order = re.findall(r"order ([\w-]+)", prompt)[0]
        return ModelResponse(parts=[ToolCallPart("look_up", {"order": order})])
    order = json.loads(returns["look_up"].model_response_str())
    if "refund" not in returns:
        return ModelResponse(
            parts=[ToolCallPart("refund", {"order": order["order"], "cents": order["cents"]})]
        )
    said = returns["refund"].model_response_str()
    if returns["refund"].outcome == "denied":
        return ModelResponse(parts=[TextPart(f"We are sorry that we can't pay you back. {said}")])
    return ModelResponse(parts=[TextPart(f"We are sorry. {said}")])


model = os.environ.get("COMPLAINT_MODEL") or FunctionModel(offline, model_name="offline")
clerk = Agent(
    model, name="clerk", instructions="Look the order up first. Pay back what it cost if that is fair."
)


@clerk.tool_plain
def look_up(order: str) -> dict[str, str | int]:
    """What was ordered, and what it cost."""
    return {"order": order, "article": "teapot", "cents": 2400}


@clerk.tool_plain(requires_approval=True)
def refund(order: str, cents: int) -> str:
    """Pay money back. The key lets the bank tell a repeated call from a second refund."""
    with Path("refunds.txt").open("a", encoding="utf-8") as bank:
        bank.write(f"{order} {cents} {effect_key()}\n")
    return f"{cents / 100:.2f} for order {order} are on their way back."


activity = ActivityRegistry()
activity.agent(clerk, prompt="A complaint about order {order}: {text}")

complaint = Workflow("complaint", ["clerk"], input_model=Complaint)
