"""PaigeantDurability: what it refuses, of agents as they are made, of a run as it begins, and of tools."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
from pydantic_ai import Agent, CancellationToken, DeferredToolRequests, RunContext, ToolDefinition
from pydantic_ai.exceptions import UserError
from pydantic_ai.models.test import TestModel
from pydantic_ai.toolsets import DynamicToolset, ExternalToolset, FunctionToolset
from tests.agents.durable import Till, durable
from tests.agents.steps import Step, called, scripted

from paigeant.agents import PaigeantDurability

# -- rule 8: what is refused


async def test_rule_8_toolsets_of_a_run_are_refused() -> None:
    """Tools that come with one run have no recorded identity, of whatever kind they are: the error says what to do."""
    agent = durable(TestModel())
    extra = FunctionToolset[Any](id="extra")
    extra.add_function(lambda: 1, name="one")
    with pytest.raises(UserError, match="Paigeant"):
        await Step().attempt(lambda: agent.run("go", toolsets=[extra]))
    till = Till([])
    for toolset in (till, till.prefixed("my")):
        with pytest.raises(UserError, match=r"Till 'till' comes with a run of agent 'agent'"):
            await Step().attempt(partial(agent.run, "go", toolsets=[toolset]))
    with agent.override(toolsets=[till]), pytest.raises(UserError, match=r"or with an override"):
        await Step().attempt(lambda: agent.run("go"))


async def test_rule_8_a_run_may_bring_tools_that_are_done_elsewhere() -> None:
    """Nothing of them is called here."""
    output: Any = [str, DeferredToolRequests]
    agent = durable(scripted(called("ship", "c1"))[0], output_type=output)
    ship = ExternalToolset[Any]([ToolDefinition(name="ship")])
    found = await Step().attempt(lambda: agent.run("go", toolsets=[ship]))
    assert [call.tool_name for call in found.output.calls] == ["ship"]


async def test_rule_8_cancellation_tokens_are_refused() -> None:
    """A token would end a run at a moment that nobody records."""
    agent = durable(TestModel())
    with pytest.raises(UserError, match="Paigeant"):
        await Step().attempt(lambda: agent.run("go", cancellation_token=CancellationToken()))


# -- rule 9: what a tool can't do


@pytest.mark.parametrize("method", ["enqueue", "cancel"])
async def test_rule_9_a_tool_can_t_steer_its_run(method: str) -> None:
    """`ctx.enqueue()` and `ctx.cancel()` would be lost on replay, and raise inside a unit."""
    model, _ = scripted(called("steer", "c1"), "done")
    agent = durable(model)

    @agent.tool
    async def steer(ctx: RunContext[Any]) -> None:
        getattr(ctx, method)(*(["more"] if method == "enqueue" else []))

    with pytest.raises(UserError, match="unit"):
        await Step().attempt(lambda: agent.run("go"))


# -- rule 14: names


def test_rule_14_an_agent_needs_a_name() -> None:
    """Its units are named after it."""
    with pytest.raises(UserError, match="unique `name`"):
        Agent(TestModel(), capabilities=[PaigeantDurability()])


def test_rule_14_toolsets_need_ids_of_their_own() -> None:
    """Two of the same id, or a dynamic one without, are found when the engine is attached."""
    with pytest.raises(UserError, match="same `id` 'x'"):
        durable(TestModel(), toolsets=[FunctionToolset[Any](id="x"), FunctionToolset[Any](id="x")])
    with pytest.raises(UserError, match="`id`"):
        durable(TestModel(), toolsets=[DynamicToolset(lambda _: FunctionToolset[Any]())])


def test_toolsets_of_any_kind_need_an_id() -> None:
    """Their units are named after it."""
    with pytest.raises(UserError, match="unique `id`"):
        durable(TestModel(), toolsets=[Till([], id=None)])


def test_only_one_engine_can_be_attached() -> None:
    """Two would take each other's work."""
    with pytest.raises(UserError, match="durable execution engine"):
        Agent(TestModel(), name="a", capabilities=[PaigeantDurability(), PaigeantDurability()])
