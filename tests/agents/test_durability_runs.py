"""PaigeantDurability: several runs of agents in one step, nested, at once or under one id, over any crashes."""

from __future__ import annotations

import asyncio
import contextlib
from functools import partial
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic_ai import Agent, ModelMessage, ModelResponse, RunContext, RunUsage, TextPart
from pydantic_ai.exceptions import ModelHTTPError, UsageLimitExceeded
from pydantic_ai.models.function import AgentInfo, FunctionModel
from pydantic_ai.usage import UsageLimits
from pydantic_core import from_json, to_json
from tests.agents.durable import AnyAgent, durable, nesting
from tests.agents.steps import Crash, Step, called, prompt_of, returned, scripted, without_moments
from tests.patience import PATIENCE

from paigeant import ActivityRegistry, Workflow
from paigeant.parking import Parked
from paigeant.store import StepKey
from paigeant.testing import MemoryApp

# -- rule 1: nesting


@pytest.mark.parametrize("sequential", [False, True])
async def test_rule_1_nested_agents_get_their_own_answers(sequential: bool) -> None:
    """Agents within tools resume too: after a crash behind any unit each call has the answer that was made for it."""
    outer, seen = nesting(sequential=sequential)
    step = Step()
    result, crashes = await step.resumed(lambda: outer.run("go"))
    assert result.output == "c1=ans-2 c2=ans-1"
    assert returned(result.all_messages()[:3]) == {"c1": "ans-0", "c2": "ans-1"}
    assert crashes == len(step.units) == 3 + 3 * 4
    assert seen["outer"] == [0, 1, 2]
    if sequential:  # what runs beside a crash and isn't recorded yet is done again
        assert seen["inner"] == [("0", 0), ("0", 1), ("1", 0), ("1", 1), ("2", 0), ("2", 1)]
        assert [text for text, _ in seen["noted"]] == ["0", "1", "2"]


async def test_effect_keys_are_those_of_an_uninterrupted_run() -> None:
    """Every tool call, nested or not, has a key of its own, the same with crashes and without."""
    outer, seen = nesting()
    await Step().attempt(lambda: outer.run("go"), first=True)
    whole = sorted(seen["noted"])
    assert len({key for _, key in whole}) == 3
    outer, seen = nesting()
    await Step().resumed(lambda: outer.run("go"))
    assert sorted(set(seen["noted"])) == whole


async def test_usage_is_that_of_an_uninterrupted_run() -> None:
    """What nested agents used is counted once, whether their tool was called in this attempt or is replayed."""
    outer, _ = nesting()
    whole = (await outer.run("go")).usage  # outside of steps: the library's own count
    step = Step()
    for crash_after in [*range(1, 16), None]:
        usage = RunUsage()
        try:
            await step.attempt(partial(outer.run, "go", usage=usage), crash_after=crash_after)
        except Crash:
            continue
        assert usage == whole
    assert (whole.requests, whole.tool_calls) == (9, 6)


async def test_usage_limits_hold_across_nested_agents() -> None:
    """A nested agent that is handed its caller's usage is bound by what was used before it."""
    outer, seen = nesting()
    with pytest.raises(UsageLimitExceeded):
        await Step().attempt(lambda: outer.run("go", usage_limits=UsageLimits(request_limit=5)))
    assert len(seen["outer"]) < 3


@settings(max_examples=40, deadline=None)
@given(crashes=st.lists(st.integers(1, 6), max_size=12), sequential=st.booleans())
def test_any_crashes_leave_the_outcome_of_none(crashes: list[int], sequential: bool) -> None:
    """Wherever attempts end, the result, the usage and the effect keys are those of a run that nothing ended."""

    async def outcome(crashes: list[int]) -> tuple[str, RunUsage, set[Any], list[str]]:
        outer, seen = nesting(sequential=sequential)
        step = Step()
        for crash_after in crashes:
            with contextlib.suppress(Crash):
                await step.attempt(lambda: outer.run("go"), crash_after=crash_after)
        result = await step.attempt(lambda: outer.run("go"))
        return str(result.output), result.usage, set(seen["noted"]), sorted(step.units)

    assert asyncio.run(outcome(crashes)) == asyncio.run(outcome([]))


# -- rule 4: several runs in one step


async def test_rule_4_agents_that_run_together_don_t_mix() -> None:
    """Two agents at once, and one twice at once, keep their ids and their answers over crashes behind every unit."""
    requests: list[str] = []

    def respond(messages: list[ModelMessage], _: AgentInfo) -> ModelResponse:
        requests.append(prompt_of(messages))
        return ModelResponse(parts=[TextPart(f"said {prompt_of(messages)}")])

    one, other = durable(FunctionModel(respond), name="one"), durable(FunctionModel(respond), name="other")

    async def work() -> list[str]:
        runs = await asyncio.gather(one.run("a"), other.run("b"), one.run("c"))
        ids.append([run.run_id for run in runs])
        assert len({run.conversation_id for run in runs}) == 3
        return [str(run.output) for run in runs]

    step = Step()
    ids: list[list[str]] = []
    outputs, _ = await step.resumed(work)
    assert outputs == ["said a", "said b", "said c"]
    assert len(step.units) == 3
    assert await step.attempt(work) == outputs
    assert ids == [["run:step:one:1", "run:step:other:1", "run:step:one:2"]] * len(ids)


async def test_a_run_isn_t_given_the_answer_to_another_one_of_its_id() -> None:
    """The first had failed, and the code gone on to the second: the next attempt asks for the first once more."""
    is_down = [True]

    def respond(messages: list[ModelMessage]) -> str:
        if is_down[0] and prompt_of(messages) == "one":
            raise ModelHTTPError(400, "own")
        return f"said {prompt_of(messages)}"

    model, requests = scripted(respond)
    agent = durable(model)

    async def work() -> list[str]:
        said: list[str] = []
        for prompt in ("one", "two"):
            with contextlib.suppress(ModelHTTPError):
                said.append(str((await agent.run(prompt, run_id="mine")).output))
        return said

    step = Step()
    assert await step.attempt(work) == ["said two"]
    is_down[0] = False
    assert await step.attempt(work) == ["said one", "said two"]
    assert len(requests) == 3


@pytest.mark.parametrize("together", [True, False])
async def test_runs_of_one_id_have_answers_of_their_own(together: bool) -> None:
    """An id that code gives to several runs tells them apart by their order, each with its own answers."""
    model, requests = scripted(prompt_of)
    agent = durable(model)

    async def run(prompt: str) -> str:
        return str((await agent.run(prompt, run_id="mine")).output)

    async def work() -> list[str]:
        prompts = ("one", "two")
        return await asyncio.gather(*map(run, prompts)) if together else [await run(one) for one in prompts]

    step = Step()
    async with asyncio.timeout(PATIENCE):
        assert (await step.resumed(work))[0] == ["one", "two"]
    assert len(step.units) == 2
    assert together or requests == [0, 0]


# -- rule 5: ids and histories


async def test_rule_5_ids_and_usage_are_stable_moments_of_requests_are_not() -> None:
    """A replay has the ids, the usage and, but for the moments of what was asked, the messages of the first run."""
    outer, _ = nesting()
    step = Step()
    first = await step.attempt(lambda: outer.run("go"))
    again = await step.attempt(lambda: outer.run("go"))
    assert (first.run_id, first.conversation_id, first.usage) == (
        again.run_id,
        again.conversation_id,
        again.usage,
    )
    assert first.run_id == "run:step:outer:1"
    assert without_moments(first.all_messages_json()) == without_moments(again.all_messages_json())
    answers = [[m for m in run.all_messages() if isinstance(m, ModelResponse)] for run in (first, again)]
    assert answers[0] == answers[1]


# -- two workers


async def test_two_workers_at_once_go_on_with_the_same_records() -> None:
    """A worker that was given up and one that took over reach the same result, whoever recorded what.

    The one that is behind begins anew, behind what the other one has recorded.
    """
    outer, _ = nesting()
    step = Step()

    async def worker() -> Any:
        while True:
            with contextlib.suppress(Parked):
                return await step.attempt(lambda: outer.run("go"))

    one, other = await asyncio.gather(worker(), worker())
    assert one.output == other.output == "c1=ans-2 c2=ans-1"
    assert without_moments(one.all_messages_json()) == without_moments(other.all_messages_json())
    assert one.usage == other.usage


async def test_an_attempt_that_is_behind_begins_anew_behind_what_is_recorded() -> None:
    """Another worker has recorded another answer meanwhile: that one stands, no tool is called for this one's."""
    tools: list[str] = []
    asked: list[int] = []
    activity = ActivityRegistry()

    async def respond(messages: list[ModelMessage], _: AgentInfo) -> ModelResponse:
        number = sum(isinstance(message, ModelResponse) for message in messages)
        asked.append(number)
        if number == 1:
            return ModelResponse(parts=[TextPart(f"{returned(messages)}")])
        theirs, mine = (
            ModelResponse(parts=[called("look", call)], run_id=messages[-1].run_id)
            for call in ("theirs", "mine")
        )
        value = to_json({"value": theirs})
        await app.store.save_unit(StepKey(run.id, "agent"), "agent__model.request(agent:1,1)", value)
        return mine

    agent: AnyAgent = Agent(FunctionModel(respond), name="agent")

    @agent.tool
    def look(ctx: RunContext[Any]) -> str:
        tools.append(str(ctx.tool_call_id))
        return "seen"

    activity.agent(agent, prompt="go", retries=0)
    async with MemoryApp(activity) as app:
        run = await app.dispatch(Workflow("w", ["agent"]))
        await app.drain()
        detail = await run.detail()
    assert detail.run.status == "completed", detail.run.error
    assert from_json(detail.steps[0].output or b"") == "{'theirs': 'seen'}"
    assert (tools, asked) == (["theirs"], [0, 1])
    assert detail.steps[0].attempt == 1
