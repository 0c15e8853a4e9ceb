"""PaigeantDurability: answers that an agent gave up on, which are asked for again and which stand."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
from pydantic import BaseModel, Field
from pydantic_ai import ModelMessage, ModelResponse, ModelRetry, RunContext, TextPart
from pydantic_ai.capabilities import AbstractCapability
from pydantic_ai.exceptions import UnexpectedModelBehavior
from pydantic_ai.models import ModelRequestContext
from pydantic_ai.models.function import AgentInfo, FunctionModel
from pydantic_core import from_json, to_json
from tests.agents.durable import AnyAgent, both_answers, durable
from tests.agents.steps import Step, called, prompt_of, scripted

from paigeant import ActivityRegistry, Workflow
from paigeant.agents import effect_key
from paigeant.place import Unit, current_place, readable
from paigeant.testing import MemoryApp

# -- what an attempt can and can't mend


async def test_an_answer_that_the_agent_gave_up_on_is_asked_for_again() -> None:
    """An attempt that failed on what the model said isn't replayed to the same end: its last answer is asked for."""
    asked: list[int] = []

    def respond(messages: list[ModelMessage], info: AgentInfo) -> ModelResponse:
        asked.append(sum(isinstance(message, ModelResponse) for message in messages))
        size = 7 if len(asked) > 4 else -1
        return ModelResponse(parts=[called(info.output_tools[0].name, f"o{len(asked)}", size=size)])

    class Size(BaseModel):
        size: int = Field(gt=0)

    agent = durable(FunctionModel(respond), output_type=Size)
    step = Step()
    for _ in range(3):
        with pytest.raises(UnexpectedModelBehavior):
            await step.attempt(lambda: agent.run("go"))
    assert (await step.attempt(lambda: agent.run("go"))).output.size == 7
    assert asked == [0, 1, 1, 1, 1]
    assert (await step.attempt(lambda: agent.run("go"))).output.size == 7
    assert len(asked) == 5


@pytest.mark.parametrize("where", ["validator", "hook", "once"])
async def test_what_is_asked_about_an_answer_isn_t_told_of_the_one_in_its_place(where: str) -> None:
    """Another agent, or what is done once, judges the output: each answer of the model has a judgement of its own."""
    judged: list[str] = []

    def respond(messages: list[ModelMessage]) -> str:
        judged.append(prompt_of(messages))
        return "bad" if "wrong" in judged[-1] else "good"

    judge = durable(scripted(respond)[0], name="judge")
    outputs = iter(["wrong", "wrong again", "right"])
    keys: list[str] = []

    async def judgement(output: str) -> str:
        keys.append(effect_key())
        if where != "once":
            return str((await judge.run(output)).output)
        place = current_place()
        assert place is not None

        async def produce() -> bytes:
            judged.append(output)
            return to_json("bad" if "wrong" in output else "good")

        return str(from_json((await place.do(place.name("judge"), Unit("'judge'"), produce)).value))

    class Guard(AbstractCapability[Any]):
        async def after_model_request(
            self, ctx: RunContext[Any], *, request_context: ModelRequestContext, response: ModelResponse
        ) -> ModelResponse:
            if where == "hook" and await judgement(str(response.text)) == "bad":
                raise UnexpectedModelBehavior("a bad one")
            return response

    agent = durable(scripted(lambda _: next(outputs))[0], capabilities=[Guard()], retries=0)

    @agent.output_validator
    async def check(output: str) -> str:
        if where != "hook" and await judgement(output) == "bad":
            raise ModelRetry("do better")
        return output

    step = Step()
    for _ in range(2):
        with pytest.raises(UnexpectedModelBehavior):
            await step.attempt(lambda: agent.run("go"))
    assert (await step.attempt(lambda: agent.run("go"))).output == "right"
    assert judged == ["wrong", "wrong again", "right"]
    told = [name for name in readable(step.units).values() if " / " in name]
    assert [name.split(" / ")[0] for name in told] == [
        f"agent__model.request(agent:1,1){number}" for number in ("", "!2", "!3")
    ]
    assert (await step.attempt(lambda: agent.run("go"))).output == "right"
    assert len(judged) == 3
    assert len(set(keys)) == 3
    assert keys[-1] == keys[-2]


async def test_a_nested_agent_that_gave_up_is_asked_again_by_itself() -> None:
    """Only its own last answer is: the agent around it said nothing wrong."""
    asked: list[str] = []

    def respond(messages: list[ModelMessage], _: AgentInfo) -> ModelResponse:
        asked.append("inner")
        return ModelResponse(parts=[] if len(asked) < 4 else [TextPart("there")])

    inner = durable(FunctionModel(respond), name="inner", retries=0)
    model, requests = scripted(called("ask", "c1"), both_answers)
    outer = durable(model, name="outer")

    @outer.tool_plain
    async def ask() -> str:
        return str((await inner.run("go")).output)

    step = Step()
    with pytest.raises(UnexpectedModelBehavior):
        await step.attempt(lambda: outer.run("go"))
    failures = 1
    while len(asked) < 4:
        failures += 1
        with contextlib.suppress(UnexpectedModelBehavior):
            await step.attempt(lambda: outer.run("go"))
        assert failures < 5
    result = await step.attempt(lambda: outer.run("go"))
    assert (result.output, requests) == ("c1=there", [0, 1])


async def test_an_answer_that_somebody_made_do_without_stands() -> None:
    """Code that catches the error and goes on takes the same way in each attempt; what was asked stays asked."""
    asked: list[str] = []

    def respond(_: list[ModelMessage], __: AgentInfo) -> ModelResponse:
        asked.append("careless")
        return ModelResponse(parts=[] if len(asked) == 1 else [TextPart("yes")])

    agent = durable(FunctionModel(respond), name="careless", retries=0)
    model, requests = scripted("no")
    careful = durable(model, name="careful")

    async def work() -> str:
        try:
            return str((await agent.run("go")).output)
        except UnexpectedModelBehavior:
            return str((await careful.run("go")).output)

    step = Step()
    assert await step.resumed(work) == ("no", 2)
    assert (asked, requests) == (["careless"], [0])


async def test_an_error_that_was_raised_from_it_gives_up_as_well() -> None:
    """The attempt fails because of it, in whatever words."""
    asked: list[int] = []

    def respond(_: list[ModelMessage], __: AgentInfo) -> ModelResponse:
        asked.append(1)
        return ModelResponse(parts=[] if len(asked) == 1 else [TextPart("yes")])

    agent = durable(FunctionModel(respond), retries=0)

    async def work() -> str:
        try:
            return str((await agent.run("go")).output)
        except UnexpectedModelBehavior as exc:
            raise LookupError("nothing was found") from exc

    step = Step()
    with pytest.raises(LookupError):
        await step.attempt(work)
    assert await step.attempt(work) == "yes"


# -- what was done for such an answer


def careless(*, reuses: bool, **metadata: Any) -> tuple[AnyAgent, list[Any], list[int]]:
    """An agent whose first answer asks for a payment and for a check that fails for good; what it paid, the answers."""
    paid: list[Any] = []
    answers: list[int] = []

    def respond(messages: list[ModelMessage], _: AgentInfo) -> ModelResponse:
        answers.append(len(messages))
        call = "c" if reuses else f"c{len(answers)}"
        if len(messages) == 1:
            pay = called("pay", call, cents=len(answers))
            return ModelResponse(parts=[pay, called("check", f"{call}!", passes=len(answers) > 1)])
        return ModelResponse(parts=[TextPart(both_answers(messages))])

    agent = durable(FunctionModel(respond), retries=0)

    @agent.tool_plain(metadata=metadata)
    async def pay(cents: int) -> str:
        paid.append((cents, effect_key()))
        if cents < 0:
            raise ModelRetry("less than nothing")
        return f"paid {cents}"

    @agent.tool_plain
    async def check(passes: bool) -> str:
        if not passes:
            raise ModelRetry("no")
        return "fine"

    return agent, paid, answers


@pytest.mark.parametrize("reuses", [True, False], ids=["same call ids", "other call ids"])
@pytest.mark.parametrize("metadata", [{}, {"paigeant": {"at_most_once": True}}], ids=["tool", "at most once"])
async def test_an_answer_of_which_something_was_done_isn_t_asked_for_again(
    reuses: bool, metadata: dict[str, Any]
) -> None:
    """The new answer might ask for the same effect under another key: every attempt gives up in the same way."""
    agent, paid, answers = careless(reuses=reuses, **metadata)
    step = Step()
    for _ in range(3):
        with pytest.raises(UnexpectedModelBehavior):
            await step.attempt(lambda: agent.run("go"))
    assert (len(paid), len(answers)) == (1, 1)


@pytest.mark.parametrize("reuses", [True, False], ids=["same call ids", "other call ids"])
async def test_an_operator_s_retry_asks_for_that_answer_again(reuses: bool) -> None:
    """The run has failed at once, and says why. Taken up again, no record is handed to the calls of another answer."""
    agent, paid, answers = careless(reuses=reuses)
    activity = ActivityRegistry()
    activity.agent(agent, name="pay", prompt="go")
    async with MemoryApp(activity) as app:
        run = await app.dispatch(Workflow("w", ["pay"]), {})
        await app.drain()
        error = (await run.wait()).error
        assert "isn't asked for again, since what it asked of 'pay' was done" in str(error)
        assert ((await run.detail()).steps[0].attempt, len(answers)) == (1, 1)
        await run.retry()
        await app.drain()
        result = await run.wait()
    assert "paid 2" in str(result.output), result.error
    assert [cents for cents, _ in paid] == [1, 2]
    assert len({key for _, key in paid}) == 2


async def test_a_new_answer_gets_no_record_of_a_call_of_the_old_one() -> None:
    """A provider uses call ids again: what a tool told the old answer (to try again) isn't told to the new one."""
    answers: list[int] = []

    def respond(messages: list[ModelMessage], _: AgentInfo) -> ModelResponse:
        answers.append(len(messages))
        return ModelResponse(
            parts=[called("check", "c", passes=len(answers) > 1)]
            if len(messages) == 1
            else [TextPart(both_answers(messages))]
        )

    agent = durable(FunctionModel(respond), retries=0)

    @agent.tool_plain
    async def check(passes: bool) -> str:
        if not passes:
            raise ModelRetry("no")
        return "fine"

    step = Step()
    with pytest.raises(UnexpectedModelBehavior):
        await step.attempt(lambda: agent.run("go"))
    result, _ = await step.resumed(lambda: agent.run("go"))
    assert (result.output, answers) == ("c=fine", [1, 1, 3])
    assert 'agent__function_toolset__<agent>.call_tool:check(agent:1,1,1!2,"c")' in step.units
