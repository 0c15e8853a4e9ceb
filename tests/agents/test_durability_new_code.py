"""PaigeantDurability: records that new code meets after a deploy: tools and agents that were changed or renamed."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import pytest
from pydantic_ai import DeferredToolResults, ModelMessage, ModelResponse, RunContext, TextPart, ToolCallPart
from pydantic_ai.exceptions import UnexpectedModelBehavior
from pydantic_ai.messages import ModelRequest
from pydantic_ai.models.function import AgentInfo, FunctionModel
from pydantic_ai.models.test import TestModel
from pydantic_ai.toolsets import FunctionToolset
from tests.agents.durable import AnyAgent, both_answers, durable
from tests.agents.steps import Crash, Step, called, returned, scripted

from paigeant.agents import effect_key
from paigeant.errors import InvalidDefinition, UnitUnreadable
from paigeant.parking import Parked


@pytest.mark.parametrize("change", ["type", "gone", "type, no retries", "gone, no retries"])
async def test_a_recorded_call_that_new_code_would_not_make_is_an_error(change: str) -> None:
    """A deploy has changed the tool: no model is told that its arguments are wrong, which would have it pay again."""
    paid: list[Any] = []
    requests: list[int] = []

    def respond(messages: list[ModelMessage], _: AgentInfo) -> ModelResponse:
        requests.append(len(messages))
        return ModelResponse(parts=[called("pay", f"c{len(requests)}", to=1)])

    def agent(to: Any, name: str = "pay") -> AnyAgent:
        made = durable(FunctionModel(respond), retries=0 if "retries" in change else 1)

        async def pay(to: Any) -> str:
            paid.append(to)
            return "paid"

        pay.__annotations__["to"] = to
        made.tool_plain(name=name)(pay)
        return made

    before, after = agent(int), agent(int, "transfer") if "gone" in change else agent(str)
    step = Step()
    with pytest.raises(Crash):
        await step.attempt(lambda: before.run("go"), crash_after=2)
    for _ in range(2):
        error: type[Exception] = UnexpectedModelBehavior if "retries" in change else UnitUnreadable
        with pytest.raises(error, match=r"tool 'pay' is recorded as done|exceeded max retries"):
            await step.attempt(lambda: after.run("go"))
    assert (paid, requests) == ([1], [1])


@pytest.mark.parametrize("name", ["my_pay", "settle"])
async def test_a_recorded_call_is_known_by_the_name_that_the_model_has_said(name: str) -> None:
    """A toolset around the tool's own gives it another one: what is recorded of it is found, and missed, by that."""
    paid: list[Any] = []
    requests: list[int] = []

    def respond(messages: list[ModelMessage], _: AgentInfo) -> ModelResponse:
        requests.append(len(messages))
        if returned(messages):
            return ModelResponse(parts=[TextPart("done")])
        return ModelResponse(parts=[called(name, "c1", to=1)])

    def agent(to: Any) -> AnyAgent:
        bank = FunctionToolset[Any](id="bank")

        async def pay(to: Any) -> str:
            paid.append(to)
            return "paid"

        pay.__annotations__["to"] = to
        bank.add_function(pay)
        outside = bank.prefixed("my") if name == "my_pay" else bank.renamed({name: "pay"})
        return durable(FunctionModel(respond), toolsets=[outside])

    step = Step()
    with pytest.raises(Crash):
        await step.attempt(lambda: agent(int).run("go"), crash_after=2)
    with pytest.raises(UnitUnreadable, match=f"tool '{name}' is recorded as done"):
        await step.attempt(lambda: agent(str).run("go"))
    assert (await step.attempt(lambda: agent(int).run("go"))).output == "done"
    assert (paid, requests) == ([1], [1, 3])
    assert f'agent__function_toolset__bank.call_tool:{name}(agent:1,1,"c1")' in step.units


@pytest.mark.parametrize("mode", ["recorded", "inline", "once", "asked"])
async def test_a_tool_that_was_renamed_goes_on_with_its_records(mode: str) -> None:
    """Wherever the deploy came: the same requests, effects and keys as if it had kept its name."""
    metadata: dict[str, Any] = {"inline": mode == "inline", "at_most_once": mode == "once"}

    def agent(name: str, **more: Any) -> tuple[AnyAgent, list[int], list[str]]:
        keys: list[str] = []

        async def pay(ctx: RunContext[Any], to: int) -> str:
            keys.append(f"{to} {effect_key()}")
            return f"paid {to}"

        turns = [called(name, f"c{to}", to=to) for to in (1, 2)], called(name, "c1", to=3), both_answers
        model, requests = scripted(*turns)
        made = durable(model)
        options: dict[str, Any] = {
            "metadata": {"paigeant": {**metadata, **more}},
            "requires_approval": mode == "asked",
        }
        made.tool(name=name, **options)(pay)
        return made, requests, keys

    async def done(agent: AnyAgent, step: Step, crash_after: int | None = None) -> Any:
        """What the agent gives; None when it crashed before that. People are asked, and allow it."""
        for _ in range(10):
            with contextlib.suppress(Parked):
                return await step.attempt(lambda: agent.run("go"), crash_after=crash_after)
            await asyncio.gather(
                *(
                    step.store.answer_request(request.id, b'{"approved":true}')
                    for request in await step.store.list_requests()
                )
            )
        raise AssertionError("it has no end")

    async def started() -> Step:
        step = Step()
        await step.start()
        return step

    (old, _, plain), (new, _, other) = agent("pay"), agent("transfer")
    output = (await done(old, await started())).output
    await done(new, await started())
    assert set(plain).isdisjoint(other)
    for crash_after in range(1, 12):
        (old, first, old_keys), (new, second, new_keys) = agent("pay"), agent("transfer", was="pay")
        step = await started()
        with contextlib.suppress(Crash):
            await done(old, step, crash_after)
        result = await done(new, step)
        assert result.output == output
        assert first + second == [0, 1, 2]
        keys = {*old_keys, *new_keys}
        assert len(keys) == 3, "a call has two keys"
        # Those of an answer that the old code recorded are that one's, whoever calls.
        kept = 0 if not first else 2 if len(first) == 1 else 3
        assert len(keys & set(plain)) == kept
        assert keys - set(plain) <= set(other)
        assert {call.tool_name for call in _calls(result.all_messages())} == {"transfer"}


def _calls(messages: list[ModelMessage]) -> list[ToolCallPart]:
    return [part for message in messages for part in message.parts if isinstance(part, ToolCallPart)]


@pytest.mark.parametrize("approved", [True, False], ids=["approved", "open"])
@pytest.mark.parametrize("change", ["renamed", "gone", "arguments"])
async def test_new_code_knows_the_calls_that_a_history_brings(approved: bool, change: str) -> None:
    """They may have waited for days in an earlier run: what is recorded of them is met by new code, or missed."""
    history: list[ModelMessage] = [
        ModelRequest.user_text_prompt("go"),
        ModelResponse([called("pay", "c1", to=1)]),
    ]
    results = DeferredToolResults(approvals={"c1": True}) if approved else None
    paid: list[str] = []

    def agent(name: str, to: type = int, **metadata: Any) -> tuple[AnyAgent, list[int]]:
        model, requests = scripted("", both_answers)
        made = durable(model)

        async def pay(to: Any) -> str:
            paid.append(effect_key())
            return "paid"

        pay.__annotations__["to"] = to
        made.tool_plain(name=name, requires_approval=approved, metadata={"paigeant": metadata})(pay)
        return made, requests

    def run(agent: AnyAgent) -> Any:
        return agent.run(message_history=history, deferred_tool_results=results)

    (before, _), (after, requests) = (
        agent("pay"),
        {"renamed": agent("transfer", was="pay"), "gone": agent("transfer"), "arguments": agent("pay", str)}[
            change
        ],
    )
    step = Step()
    with pytest.raises(Crash):
        await step.attempt(lambda: run(before), crash_after=1)
    if change == "renamed":
        for there in (step, Step()):  # whether it was done, or nobody has done it yet
            assert (await there.attempt(lambda: run(after))).output == "c1=paid"
        assert len(paid) == 2
    else:
        with pytest.raises(UnitUnreadable, match="tool 'pay' is recorded as done"):
            await step.attempt(lambda: run(after))
        assert (len(paid), requests) == (1, [])
    assert _calls(history)[0].tool_name == "pay", "what the caller has was changed"


async def test_an_agent_that_was_renamed_goes_on_with_its_records() -> None:
    """An engine of the old name stands for it."""

    def agent(called_now: str, **options: Any) -> tuple[AnyAgent, list[int]]:
        model, requests = scripted(called("look", "c1"), both_answers)
        made = durable(model, name=called_now, engine=options)

        @made.tool_plain
        def look() -> str:
            return effect_key()

        return made, requests

    before, first = agent("writer")
    after, second = agent("author", name="writer")
    step = Step()
    with pytest.raises(Crash):
        await step.attempt(lambda: before.run("go"), crash_after=2)
    resumed = await step.attempt(lambda: after.run("go"))
    whole = await Step().attempt(lambda: agent("writer")[0].run("go"))
    assert (resumed.output, resumed.run_id) == (whole.output, whole.run_id)
    assert (first, second) == ([0], [1])


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"one": {"was": 1}}, "was is a name that the tool had"),
        ({"one": {"was": ["x", ""]}}, "was is a name that the tool had"),
        ({"one": {"was": "two"}, "two": {}}, "tool 'one' says that it was 'two', and so is tool 'two'"),
        (
            {"one": {"was": "x"}, "two": {"was": ["y", "x"]}},
            "tool 'two' says that it was 'x', and so is tool 'one'",
        ),
    ],
)
def test_names_that_tools_had_are_checked(options: dict[str, Any], says: str) -> None:
    """When the engine is attached: a name stands for one tool."""
    toolset = FunctionToolset[Any](id="tools")
    for name, told in options.items():

        @toolset.tool_plain(name=name, metadata={"paigeant": told})
        def tool() -> None:
            """Nothing."""

    with pytest.raises(InvalidDefinition, match=says):
        durable(TestModel(), toolsets=[toolset])
