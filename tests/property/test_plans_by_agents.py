"""Itineraries that agents revise, at random: within the policy, and the same whatever attempts failed on the way."""

from __future__ import annotations

import asyncio
from collections import Counter
from random import Random
from typing import Any

import hypothesis.strategies as st
from hypothesis import Phase, given, settings
from pydantic_ai import Agent, ModelMessage, ModelResponse, TextPart, ToolCallPart
from pydantic_ai.messages import ModelResponsePart
from pydantic_ai.models.function import AgentInfo, FunctionModel
from tests.patience import PATIENCE

from paigeant import ActivityRegistry, ItineraryPolicy, RetryPolicy, Step, StepContext, Workflow
from paigeant.testing import MemoryApp

KNOWN = ["plan", "work", "rest"]
UNKNOWN = ["rob", "paigeant.sleep"]
TURNS = 4


class Planners:
    """Agents whose model asks for something else at each turn of each step: what, follows from `seed` alone."""

    def __init__(self, seed: int, policy: ItineraryPolicy, *, fails: bool) -> None:
        self.seed, self.policy, self.fails = seed, policy, fails
        self.step: StepContext | None = None
        self.requests: Counter[tuple[str, int]] = Counter()
        self.activity = ActivityRegistry()
        agent = Agent(FunctionModel(self.respond), name="plan", deps_type=StepContext)
        retries = RetryPolicy(attempts=TURNS + 2)
        self.activity.agent(agent, prompt="Plan.", deps=self.take, may_add=policy, retries=retries)

        @self.activity.execute()
        async def work(ctx: StepContext) -> str:
            return ctx.step_id

        @self.activity.execute()
        async def rest(ctx: StepContext) -> str:
            await ctx.sleep(60)
            return ctx.step_id

    async def take(self, ctx: StepContext) -> StepContext:
        """One step is done at a time: this one now."""
        self.step = ctx
        return ctx

    def respond(self, messages: list[ModelMessage], _: AgentInfo) -> ModelResponse:
        """The model: it adds, ends the run or is done; and its server fails now and then."""
        assert self.step is not None, "a step makes its deps before its agent runs"
        turn = sum(isinstance(message, ModelResponse) for message in messages)
        chance = Random(f"{self.seed}:{self.step.step_id}:{turn}")
        unlucky = Random(f"{self.seed}:{self.step.step_id}:{turn}:fails").random() < 0.5
        if self.fails and self.step.attempt <= turn and unlucky:
            raise ConnectionError("reset by peer")
        self.requests[self.step.step_id, turn] += 1
        kind = chance.choice(["add", "add", "add", "both", "finish", "done"])
        if kind == "done" or turn == TURNS:
            return ModelResponse(parts=[TextPart(f"{turn} turns")])
        parts: list[ModelResponsePart] = []
        if kind in ("add", "both"):
            steps = [
                {"activity": chance.choice(KNOWN + UNKNOWN[: chance.random() < 0.2])}
                for _ in range(chance.choice([1, 1, 2, 9]))
            ]
            parts.append(ToolCallPart("add_steps", {"steps": steps, "place": chance.choice(["next", "end"])}))
        if kind in ("finish", "both") and self.policy.may_remove:
            parts.append(ToolCallPart("finish_run", {"reason": "enough"}))
        return ModelResponse(parts=parts or [TextPart("nothing to finish")])

    async def carried_out(self) -> list[tuple[str, str, bytes | None, int]]:
        """What became of the run: its steps, in the order in which they were done."""
        # The policy of the run is wider than that of the agents, which can't widen theirs by it.
        workflow = Workflow(
            "w",
            ["plan", "work", Step("plan", when="work != 'nothing'")],
            policy=ItineraryPolicy(max_total=40),
        )
        async with MemoryApp(self.activity) as app:
            run = await app.dispatch(workflow, {})
            await app.drain()
            result = await run.wait(PATIENCE)
            assert result.status == "completed", result.error
            rows = (await run.detail()).steps
        assert len({row.key.step for row in rows}) == len(rows)
        return [(row.key.step, row.activity, row.output, row.seq) for row in rows]


policies: st.SearchStrategy[dict[str, Any]] = st.fixed_dictionaries(
    {
        "allowed": st.lists(st.sampled_from(KNOWN), min_size=1, unique=True),
        "max_added": st.integers(0, 4),
        "max_depth": st.integers(1, 3),
        "max_total": st.integers(3, 12),
        "max_each": st.none() | st.integers(2, 4),
        "may_remove": st.booleans(),
    }
)


@settings(max_examples=8, deadline=None, phases=[Phase.explicit, Phase.generate])
@given(seed=st.integers(0, 2**32), options=policies)
def test_what_agents_plan_is_within_the_policy_and_is_planned_once(
    seed: int, options: dict[str, Any]
) -> None:
    """Failures between any two turns leave the itinerary of none, and each turn of a model is asked for once."""
    policy = ItineraryPolicy(**{name: value for name, value in options.items() if value is not None})
    calm, rough = (Planners(seed, policy, fails=fails) for fails in (False, True))
    done = asyncio.run(calm.carried_out())
    assert asyncio.run(rough.carried_out()) == done
    assert rough.requests == calm.requests
    assert set(calm.requests.values()) == {1}
    added = [activity for step, activity, _, _ in done if step not in ("plan", "work", "plan_2")]
    assert set(added) <= set(options["allowed"])
    assert len(done) <= max(options["max_total"], 3)
    assert max(step.count(".") for step, *_ in done) <= options["max_depth"]
    assert policy.may_remove or {"plan", "work", "plan_2"} <= {step for step, *_ in done}
    if policy.max_each is not None:
        assert max(Counter(activity for _, activity, _, _ in done).values()) <= policy.max_each
