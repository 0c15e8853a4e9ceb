"""Agents that carry the engine, for tests of it: one alone, one within another, and tools of an unknown kind."""

from __future__ import annotations

from typing import Any

from pydantic import TypeAdapter
from pydantic_ai import Agent, ModelMessage, ModelResponse, RunContext, TextPart, ToolDefinition
from pydantic_ai.models.function import AgentInfo, FunctionModel
from pydantic_ai.toolsets import AbstractToolset, ToolsetTool
from tests.agents.steps import called, prompt_of, returned, scripted

from paigeant.agents import PaigeantDurability, effect_key

__all__ = ["AnyAgent", "Till", "both_answers", "durable", "nesting"]

AnyAgent = Agent[Any, Any]


def durable(model: Any, *, name: str = "agent", **options: Any) -> AnyAgent:
    """An agent that carries the engine."""
    engine: PaigeantDurability[Any] = PaigeantDurability(**options.pop("engine", {}))
    return Agent(model, name=name, capabilities=[*options.pop("capabilities", []), engine], **options)


def both_answers(messages: list[ModelMessage]) -> str:
    """A turn that says what the tool calls gave, by their ids."""
    return " ".join(f"{call}={answer}" for call, answer in sorted(returned(messages).items()))


def nesting(*, sequential: bool = False) -> tuple[AnyAgent, dict[str, list[Any]]]:
    """An agent whose tool `ask` runs another one, which has a tool of its own; and what was called."""
    seen: dict[str, list[Any]] = {"outer": [], "inner": [], "asked": [], "noted": []}

    def inner_respond(messages: list[ModelMessage], _: AgentInfo) -> ModelResponse:
        answers = returned(messages)
        seen["inner"].append((prompt_of(messages), len(answers)))
        if not answers:
            return ModelResponse(parts=[called("note", "n1", text=prompt_of(messages))])
        return ModelResponse(parts=[TextPart(f"ans-{answers['n1']}")])

    inner = durable(FunctionModel(inner_respond), name="inner")

    @inner.tool_plain
    async def note(text: str) -> str:
        seen["noted"].append((text, effect_key()))
        return text

    calls = [called("ask", "c1", number="0"), called("ask", "c2", number="1")]
    model, seen["outer"] = scripted(calls, called("ask", "c1", number="2"), both_answers)
    outer = durable(model, name="outer")

    @outer.tool(sequential=sequential)
    async def ask(ctx: RunContext[Any], number: str) -> str:
        seen["asked"].append(number)
        return str((await inner.run(number, usage=ctx.usage)).output)

    return outer, seen


class Till(AbstractToolset[Any]):
    """Tools of a kind that the library doesn't know. It notes what is asked of it; each run has one of its own."""

    def __init__(self, seen: list[str], id: str | None = "till", run: str = "none") -> None:
        self.seen = seen
        self.run = run
        self._id = id

    @property
    def id(self) -> str | None:
        return self._id

    async def for_run(self, ctx: RunContext[Any]) -> AbstractToolset[Any]:
        return Till(self.seen, self._id, run=str(ctx.prompt))

    async def __aenter__(self) -> Till:
        self.seen.append("entered")
        return self

    async def __aexit__(self, *_: object) -> None:
        self.seen.append("left")

    async def get_tools(self, ctx: RunContext[Any]) -> dict[str, ToolsetTool[Any]]:
        schema = {"type": "object", "properties": {"euros": {"type": "integer"}}}
        pay = ToolDefinition(name="pay", parameters_json_schema=schema)
        reads: Any = TypeAdapter(dict[str, int]).validator
        return {"pay": ToolsetTool(toolset=self, tool_def=pay, max_retries=1, args_validator=reads)}

    async def call_tool(
        self, name: str, tool_args: dict[str, Any], ctx: RunContext[Any], tool: ToolsetTool[Any]
    ) -> Any:
        self.seen.append(f"{name} {tool_args} for {self.run}")
        return "paid"
