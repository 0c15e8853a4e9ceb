"""PaigeantDurability: what is tried again within an attempt, tools and models, and how long each try may take."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterable, AsyncIterator, Callable
from functools import partial
from typing import Any

import pytest
from pydantic_ai import ModelMessage, ModelResponse, RunContext, TextPart
from pydantic_ai.exceptions import (
    FallbackExceptionGroup,
    ModelContextWindowExceededError,
    ModelHTTPError,
    ModelQuotaExceededError,
)
from pydantic_ai.messages import AgentStreamEvent
from pydantic_ai.models.fallback import FallbackModel
from pydantic_ai.models.function import AgentInfo, FunctionModel
from pydantic_ai.models.test import TestModel
from pydantic_ai.toolsets import FunctionToolset
from tests.agents.durable import both_answers, durable
from tests.agents.steps import Step, called, scripted

from paigeant import NonRetryableError, RetryPolicy
from paigeant.errors import InvalidDefinition

# -- rule 13: tools


async def test_rule_13_tools_are_not_tried_again_unless_they_say_so() -> None:
    """An error of a tool fails the attempt at once; `retries` in the tool's metadata tries it again within it."""
    model, _ = scripted(called("look", "c1"), both_answers)
    failures = iter([ConnectionError(), ConnectionError(), ConnectionError()])

    def look() -> str:
        for failure in failures:
            raise failure
        return "there"

    agent = durable(model)
    agent.tool_plain(look)
    with pytest.raises(ConnectionError):
        await Step().attempt(lambda: agent.run("go"))
    agent = durable(model)
    agent.tool_plain(metadata={"paigeant": {"retries": RetryPolicy(attempts=3, base=0.0)}})(look)
    assert (await Step().attempt(lambda: agent.run("go"))).output == "c1=there"


async def test_rule_13_a_tool_is_not_tried_again_where_that_can_not_help() -> None:
    """An error may say so itself, also within the group that a task group raises."""
    for error in (NonRetryableError("declined"), ExceptionGroup("tasks", [NonRetryableError("declined")])):
        model, _ = scripted(called("pay", "c1"), "done")
        agent = durable(model)
        paid: list[int] = []

        @agent.tool_plain(metadata={"paigeant": {"retries": RetryPolicy(attempts=3, base=0.0)}})
        def pay() -> None:
            paid.append(1)  # noqa: B023  # it is called within this turn of the loop
            raise error  # noqa: B023

        with pytest.raises(type(error)):
            await Step().attempt(partial(agent.run, "go"))
        assert len(paid) == 1


async def test_rule_13_a_tool_s_timeout_is_for_each_try() -> None:
    """It ends a try, and the error says which tool it was."""
    model, _ = scripted(called("look", "c1"), "done")
    agent = durable(model)

    @agent.tool_plain(metadata={"paigeant": {"timeout": 0.01}})
    async def look() -> None:
        await asyncio.Event().wait()

    with pytest.raises(TimeoutError, match=r"tool 'look' of agent 'agent' took longer than 0\.01 s"):
        await Step().attempt(lambda: agent.run("go"))


async def test_rule_13_a_tool_may_run_inline() -> None:
    """Then nothing of it is recorded, and it is called again on replay; `False` says the same."""
    for metadata in ({"paigeant": {"inline": True}}, {"paigeant": False}):
        model, _ = scripted(called("look", "c1"), both_answers)
        agent = durable(model)
        looked: list[int] = []

        @agent.tool_plain(metadata=metadata)
        def look() -> int:
            looked.append(1)  # noqa: B023  # it is called within this turn of the loop
            return 1

        step = Step()
        await step.attempt(partial(agent.run, "go"))
        await step.attempt(partial(agent.run, "go"))
        assert len(looked) == 2
        assert len(step.units) == 2


@pytest.mark.parametrize(
    ("told", "says"),
    [
        ({"retry": 2}, "there is no 'retry'; did you mean 'retries'"),
        ({"retries": -1}, "retries is a number"),
        ({"timeout": 0}, "above 0"),
        ({"inline": "yes"}, "True or False"),
        ({"at_most_once": True, "retries": 1}, "not tried again"),
        ({"at_most_once": True, "inline": True}, "is recorded"),
        ("no", "a dict or False"),
        (True, "a dict or False"),
    ],
)
def test_options_of_tools_are_checked_when_the_engine_is_attached(told: Any, says: str) -> None:
    """A wrong one is an error where the agent is made, not in the middle of a run."""
    toolset = FunctionToolset[Any](id="tools")
    toolset.add_function(lambda: 1, name="look", metadata={"paigeant": told})
    with pytest.raises(InvalidDefinition, match=f"metadata 'paigeant' of tool 'look': .*{says}"):
        durable(TestModel(), toolsets=[toolset])


@pytest.mark.parametrize("whose", ["tool", "toolset"])
def test_the_library_s_timeout_isn_t_for_what_is_done_at_most_once(whose: str) -> None:
    """The model is told of it, and may ask for the same again."""
    toolset = FunctionToolset[Any](id="tools", timeout=1.0 if whose == "toolset" else None)
    timeout = 1.0 if whose == "tool" else None
    toolset.add_function(
        lambda: 1, name="pay", timeout=timeout, metadata={"paigeant": {"at_most_once": True}}
    )
    with pytest.raises(InvalidDefinition, match=r"'at_most_once': True, 'timeout': 1\.0"):
        durable(TestModel(), toolsets=[toolset])


# -- rule 13: models


def failing(error: Callable[[], Exception], times: int) -> tuple[FunctionModel, list[int]]:
    """A model that fails so many times before it answers."""
    asked: list[int] = []

    def respond(_: list[ModelMessage], __: AgentInfo) -> ModelResponse:
        asked.append(1)
        if len(asked) <= times:
            raise error()
        return ModelResponse(parts=[TextPart("there")])

    return FunctionModel(respond), asked


QUICK = RetryPolicy(attempts=3, base=0.0)


async def test_rule_13_a_model_is_asked_again_when_the_trouble_may_pass() -> None:
    """Some tries within the attempt, so that a long run doesn't use up the step's; then the attempt fails."""
    model, asked = failing(lambda: ModelHTTPError(503, "m"), 2)
    agent = durable(model, engine={"model_retries": QUICK})
    assert (await Step().attempt(lambda: agent.run("go"))).output == "there"
    assert len(asked) == 3
    model, asked = failing(lambda: ModelHTTPError(429, "m"), 3)
    agent = durable(model, engine={"model_retries": QUICK})
    with pytest.raises(ModelHTTPError):
        await Step().attempt(lambda: agent.run("go"))
    assert len(asked) == 3


@pytest.mark.parametrize(("spare", "times"), [(503, 3), (400, 3), (None, 1)])
async def test_rule_13_models_that_stand_in_are_asked_again_when_one_may_answer(
    spare: int | None, times: int
) -> None:
    """Each has failed in a way of its own. Where none may answer the attempt fails at once."""
    own = 503 if spare is not None else 404
    first, asked = failing(lambda: ModelHTTPError(own, "m"), 9)
    second, spared = failing(lambda: ModelHTTPError(spare or 400, "m"), 9)
    agent = durable(FallbackModel(first, second), engine={"model_retries": QUICK})
    with pytest.raises(FallbackExceptionGroup):
        await Step().attempt(lambda: agent.run("go"))
    assert (len(asked), len(spared)) == (times, times)


@pytest.mark.parametrize("status", [400, 401, 402, 404, 422])
async def test_rule_13_a_model_is_not_asked_again_for_what_stays(status: int) -> None:
    """A request that is rejected, not allowed or not paid for isn't sent again."""
    model, asked = failing(lambda: ModelHTTPError(status, "m"), 3)
    agent = durable(model, engine={"model_retries": QUICK})
    with pytest.raises(ModelHTTPError):
        await Step().attempt(lambda: agent.run("go"))
    assert len(asked) == 1


@pytest.mark.parametrize("category", [ModelQuotaExceededError, ModelContextWindowExceededError])
async def test_rule_13_what_a_provider_says_counts_for_more_than_its_status(category: Any) -> None:
    """An exhausted quota comes as 429 as well, and a history that is too long as 500: neither passes by waiting."""
    status = 429 if category is ModelQuotaExceededError else 500
    model, asked = failing(
        lambda: ModelHTTPError.for_category(category, status_code=status, model_name="m"), 3
    )
    agent = durable(model, engine={"model_retries": QUICK})
    with pytest.raises(category):
        await Step().attempt(lambda: agent.run("go"))
    assert len(asked) == 1


@pytest.mark.parametrize(("asks_for", "times"), [("50", 2), ("3600000", 1)])
async def test_rule_13_retry_after_is_honoured(asks_for: str, times: int) -> None:
    """No try comes before the time that the provider asks for; one that asks for too long has the step wait."""
    model, asked = failing(lambda: ModelHTTPError(429, "m", headers={"retry-after-ms": asks_for}), 1)
    agent = durable(model, engine={"model_retries": QUICK})
    began = asyncio.get_running_loop().time()
    if times == 1:
        with pytest.raises(ModelHTTPError):
            await Step().attempt(lambda: agent.run("go"))
    else:
        await Step().attempt(lambda: agent.run("go"))
        assert asyncio.get_running_loop().time() - began >= 0.05
    assert len(asked) == times


async def test_rule_13_a_stream_that_broke_is_not_begun_again_in_the_same_attempt() -> None:
    """Somebody has seen a part of it: the attempt fails, and the next one is told apart by its number."""
    asked: list[int] = []

    async def stream(_: list[ModelMessage], __: AgentInfo) -> AsyncIterator[str]:
        asked.append(1)
        yield "one"
        raise ModelHTTPError(503, "m")

    async def watch(_: RunContext[Any], events: AsyncIterable[AgentStreamEvent]) -> None:
        async for _event in events:
            pass

    engine = {"model_retries": QUICK, "event_stream_handler": watch}
    agent = durable(FunctionModel(stream_function=stream), engine=engine)
    with pytest.raises(ModelHTTPError):
        await Step().attempt(lambda: agent.run("go"))
    assert len(asked) == 1
