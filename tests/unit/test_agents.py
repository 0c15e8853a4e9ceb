from __future__ import annotations

import socket
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel
from pydantic_ai import Agent, ModelMessage, ModelResponse, RunContext, TextPart, ToolCallPart
from pydantic_ai.messages import ModelRequest, UserPromptPart
from pydantic_ai.models.function import AgentInfo, FunctionModel
from pydantic_ai.models.test import TestModel
from pydantic_core import from_json

from paigeant.activity import ActivityRegistry
from paigeant.app import Paigeant
from paigeant.context import StepContext
from paigeant.errors import DuplicateActivity, InvalidDefinition, NonRetryableError
from paigeant.settings import Settings
from paigeant.slip import RunStatus, Step, StepStatus
from paigeant.store import RunDetail, StepRecord
from paigeant.workflow import Workflow


def prompts(messages: list[ModelMessage]) -> list[str]:
    """All that users have said in a conversation."""
    return [
        str(part.content)
        for message in messages
        if isinstance(message, ModelRequest)
        for part in message.parts
        if isinstance(part, UserPromptPart)
    ]


def answering(answer: Callable[[list[ModelMessage]], str]) -> FunctionModel:
    """A model that answers with what `answer` makes of the conversation."""

    def respond(messages: list[ModelMessage], _: AgentInfo) -> ModelResponse:
        return ModelResponse(parts=[TextPart(answer(messages))])

    return FunctionModel(respond)


ECHO = answering(lambda messages: prompts(messages)[-1])
"""A model that says again what it was asked."""


def calling(**arguments: Any) -> FunctionModel:
    """A model that gives `arguments` as its structured output."""

    def respond(_: list[ModelMessage], info: AgentInfo) -> ModelResponse:
        return ModelResponse(parts=[ToolCallPart(info.output_tools[0].name, arguments)])

    return FunctionModel(respond)


async def carry_out(
    activity: ActivityRegistry, steps: list[str | Step], payload: Any = None, **settings: Any
) -> RunDetail:
    """The run, after a worker in this process has done all of it."""
    urls = {"transport_url": "memory://", "store_url": "memory://", "retry_base": 0.0}
    async with Paigeant(Settings(**{**urls, **settings}), activities=activity) as app:
        run = await app.dispatch(Workflow("test", steps), payload)
        await app.worker().run(until_idle=True)
        return await run.detail()


def output(detail: RunDetail, step: str) -> Any:
    """What a step gave back."""
    return from_json(row(detail, step).output or b"null")


def row(detail: RunDetail, step: str) -> StepRecord:
    """The record of a step."""
    return next(entry for entry in detail.steps if entry.step == step)


# -- prompts


async def filled(prompt: str, payload: dict[str, Any]) -> Any:
    """What the agent was asked."""
    activity = ActivityRegistry()
    activity.agent(Agent(ECHO), name="echo", prompt=prompt)
    return output(await carry_out(activity, ["echo"], payload), "echo")


async def test_texts_go_into_a_prompt_as_they_are() -> None:
    """A text from the payload stands in the prompt without quotes or escapes."""
    assert await filled("Write to {name}.", {"name": 'Zoë "Z" O\'Hara\n'}) == 'Write to Zoë "Z" O\'Hara\n.'


async def test_other_values_go_into_a_prompt_as_json() -> None:
    """Numbers, truth values, None, lists and objects are written as JSON."""
    payload = {"n": 2, "yes": True, "none": None, "order": {"items": ["a", 1.5]}}
    assert await filled("{n} {yes} {none} {order}", payload) == '2 true null {"items":["a",1.5]}'


async def test_a_path_leads_into_objects_and_lists() -> None:
    """`{order.items.1.name}` is a part of a value."""
    payload = {"order": {"items": [{"name": "nut"}, {"name": "bolt"}]}}
    assert await filled("One {order.items.1.name}", payload) == "One bolt"


async def test_doubled_braces_are_braces() -> None:
    """`{{` and `}}` stand for themselves."""
    assert await filled('As {{"n": {n}}}', {"n": 3}) == 'As {"n": 3}'


async def test_what_is_put_in_is_no_template() -> None:
    """A value that holds fields is put in as it is: nobody can read other values through their input."""
    assert await filled("Say {text}", {"text": "{secret} {0} {", "secret": "s3cret"}) == "Say {secret} {0} {"


@pytest.mark.parametrize(
    "prompt",
    [
        "",
        " ",
        "{",
        "}",
        "a {b",
        "{}",
        "{ a }",
        "{a.}",
        "{.a}",
        "{a..b}",
        "{a!r}",
        "{a:>3}",
        "{a[0]}",
        '{"a": 1}',
        None,
        3,
    ],
)
def test_a_bad_template_is_refused_when_it_is_registered(prompt: Any) -> None:
    """An unclosed brace, an empty field, a conversion or a format is an error at registration."""
    with pytest.raises(InvalidDefinition, match="activity 'writer': "):
        ActivityRegistry().agent(Agent(ECHO), name="writer", prompt=prompt)


@pytest.mark.parametrize(
    "path", ["n.real", "text.__class__", "items.-1", "items.7", "items.x", "order.missing"]
)
async def test_a_path_reads_json_and_no_attributes(path: str) -> None:
    """What isn't a key or a position fails the step for good, and names the field."""
    activity = ActivityRegistry()
    activity.agent(Agent(ECHO), name="echo", prompt=f"Say {{{path}}}")
    detail = await carry_out(activity, ["echo"], {"n": 1, "text": "t", "items": [1], "order": {"id": 1}})
    assert f"asks for {{{path}}}" in (row(detail, "echo").error or "")


async def test_a_value_that_is_missing_is_named() -> None:
    """A prompt's field that the payload lacks fails the step and says what there is."""
    activity = ActivityRegistry()
    activity.agent(Agent(ECHO), name="echo", prompt="Say {text}")
    detail = await carry_out(activity, [Step("echo", when="true")], {"other": 1})
    assert "needs 'text', which isn't there; there is: other" in (row(detail, "echo").error or "")


async def test_the_output_of_a_step_goes_into_a_prompt() -> None:
    """`{reserve_stock.id}` is a part of what an earlier step returned."""
    activity = ActivityRegistry()

    @activity.execute()
    async def reserve_stock() -> dict[str, str]:
        return {"id": "R-7"}

    activity.agent(Agent(ECHO, name="letter"), prompt="About {reserve_stock.id}")
    assert output(await carry_out(activity, ["reserve_stock", "letter"]), "letter") == "About R-7"


# -- registration


def test_only_agents_are_agents() -> None:
    """Something else than an agent is refused."""
    with pytest.raises(InvalidDefinition, match=r"takes a pydantic_ai\.Agent, found 'writer'"):
        ActivityRegistry().agent("writer", prompt="Write")  # type: ignore[arg-type]  # that is what is tested


def test_an_agent_needs_a_name() -> None:
    """An agent without a name needs one in its registration."""
    with pytest.raises(InvalidDefinition, match="the agent has no name"):
        ActivityRegistry().agent(Agent(ECHO), prompt="Write")


def test_two_agents_of_one_name_are_refused() -> None:
    """The names of agents and of functions are the same kind of name."""
    activity = ActivityRegistry()
    activity.agent(Agent(ECHO, name="writer"), prompt="Write")
    with pytest.raises(DuplicateActivity, match="'writer' is defined twice"):
        activity.agent(Agent(ECHO, name="writer"), prompt="Write")


# -- deps


@dataclass
class Order:
    sku: str
    quantity: int = 1


class Tariff(BaseModel):
    rate: Decimal


def telling_deps(deps_type: type[Any] = object) -> Agent[Any, str]:
    """An agent whose answer is the repr of its deps."""

    def respond(messages: list[ModelMessage], info: AgentInfo) -> ModelResponse:
        return ModelResponse(parts=[TextPart((info.instructions or "").strip())])

    agent = Agent(FunctionModel(respond), name="teller", deps_type=deps_type)

    @agent.instructions
    def tell(ctx: RunContext[Any]) -> str:
        return repr(ctx.deps)

    return agent


async def deps_of(deps: Any, payload: dict[str, Any], prompt: str = "Tell") -> RunDetail:
    """The run of an agent that gives back the repr of its deps."""
    activity = ActivityRegistry()
    activity.agent(telling_deps(), prompt=prompt, deps=deps)
    return await carry_out(activity, [Step("teller", when="true")], payload)


async def test_deps_can_be_a_value() -> None:
    """A value is handed to each run of the agent as it is."""
    assert output(await deps_of(("a", 1), {}), "teller") == "('a', 1)"


async def test_deps_can_come_from_a_function() -> None:
    """A function's parameters are resolved and validated like those of an activity."""

    def make(quantity: Decimal, note: str = "-") -> Any:
        return quantity, note

    assert output(await deps_of(make, {"quantity": "2.50"}), "teller") == "(Decimal('2.50'), '-')"


async def test_deps_can_come_from_an_async_function() -> None:
    """An async function is awaited."""

    async def make(quantity: int) -> Any:
        return [quantity]

    assert output(await deps_of(make, {"quantity": 2}), "teller") == "[2]"


async def test_a_deps_function_gets_the_context_and_the_rest() -> None:
    """A parameter annotated StepContext gets the step's context, ** the rest of the payload."""

    def make(step: StepContext, **rest: Any) -> Any:
        return step.step_id, sorted(rest.items())

    assert (
        output(await deps_of(make, {"a": 1, "b": 2}, "Of {a}"), "teller")
        == "('teller', [('a', 1), ('b', 2)])"
    )


async def test_prompt_and_deps_can_name_the_same_value() -> None:
    """The prompt takes a value as JSON has it, the deps function as its annotation wants it."""

    def make(order: Order) -> Any:
        return order

    activity = ActivityRegistry()
    agent = Agent(ECHO, name="echo", deps_type=object)

    @agent.instructions
    def tell(ctx: RunContext[Any]) -> str:
        assert isinstance(ctx.deps, Order)
        return ""

    activity.agent(agent, prompt="For {order}", deps=make)
    assert output(await carry_out(activity, ["echo"], {"order": {"sku": "A"}}), "echo") == 'For {"sku":"A"}'


async def test_deps_of_a_type_come_from_the_field_deps() -> None:
    """A type is read from the payload's field `deps` where there is one."""
    payload = {"deps": {"sku": "A-1", "quantity": 2}, "sku": "other"}
    assert output(await deps_of(Order, payload), "teller").endswith("Order(sku='A-1', quantity=2)")


async def test_deps_of_a_type_come_from_the_fields_of_the_payload() -> None:
    """Without a field `deps` those fields of the payload are taken that the type has."""
    assert output(await deps_of(Tariff, {"rate": "1.10", "x": 1}), "teller") == "Tariff(rate=Decimal('1.10'))"


async def test_deps_that_do_not_fit_fail_the_step() -> None:
    """What the payload can't make of the type is named, and isn't tried again."""
    teller = row(await deps_of(Order, {"quantity": 2}), "teller")
    assert (teller.status, teller.attempt) == (StepStatus.FAILED, 1)
    assert "deps of activity 'teller' are a Order" in (teller.error or "")
    assert "sku: " in (teller.error or "")


def test_deps_that_are_no_data_are_refused() -> None:
    """A type that JSON can't give is refused before anything runs, with what to do instead."""
    activity = ActivityRegistry()
    activity.agent(telling_deps(), prompt="Tell", deps=socket.socket)
    with pytest.raises(InvalidDefinition, match="give a function that makes it"):
        activity.check()


def test_a_prompt_can_not_hold_the_context() -> None:
    """A field of the prompt that is the context in the deps function is refused."""

    def make(step: StepContext) -> Any:
        return step

    activity = ActivityRegistry()
    activity.agent(telling_deps(), prompt="Tell {step}", deps=make)
    with pytest.raises(InvalidDefinition, match="rename one of them"):
        activity.check()


async def test_a_tool_can_revise_the_itinerary() -> None:
    """An agent whose deps are the step's context decides through a tool what is done next."""

    def respond(messages: list[ModelMessage], info: AgentInfo) -> ModelResponse:
        called = any(isinstance(message, ModelResponse) for message in messages)
        return ModelResponse(parts=[TextPart("done") if called else ToolCallPart("more", {})])

    reviewer = Agent(FunctionModel(respond), name="review", deps_type=StepContext)

    @reviewer.tool(metadata={"paigeant": {"inline": True}})
    async def more(ctx: RunContext[StepContext]) -> str:
        ctx.deps.insert("extra")
        return "inserted"

    def context(step: StepContext) -> StepContext:
        return step

    activity = ActivityRegistry()
    activity.agent(reviewer, prompt="Review", deps=context)

    @activity.execute()
    async def extra() -> str:
        return "extra"

    @activity.execute()
    async def last(extra: str) -> str:
        return f"after {extra}"

    detail = await carry_out(activity, ["review", "last"])
    assert [entry.step for entry in detail.steps] == ["review", "review.1", "last"]


# -- outputs and usage


async def test_a_structured_output_is_written_by_its_type() -> None:
    """The output is a model's JSON, decimals and all, and the next step reads it as its own type."""
    activity = ActivityRegistry()
    activity.agent(Agent(calling(rate="1.10"), name="tariff", output_type=Tariff), prompt="Price")

    @activity.execute()
    async def double(tariff: Tariff) -> Decimal:
        return 2 * tariff.rate

    detail = await carry_out(activity, ["tariff", "double"])
    assert (output(detail, "tariff"), output(detail, "double")) == ({"rate": "1.10"}, "2.20")


@pytest.mark.parametrize("output_type", [[Tariff, Order], Tariff | Order, [Tariff, str]])
async def test_one_of_several_output_types_is_written_as_what_it_is(output_type: Any) -> None:
    """An agent that may give this or that gives the JSON of what it gave."""
    activity = ActivityRegistry()
    activity.agent(Agent(calling(rate="3"), name="either", output_type=output_type), prompt="Choose")
    assert output(await carry_out(activity, ["either"]), "either") == {"rate": "3"}


async def test_usage_is_recorded_with_the_step() -> None:
    """Requests and tokens of the run of the agent stand with its step."""
    activity = ActivityRegistry()
    activity.agent(Agent(ECHO), name="echo", prompt="Say it")
    usage = from_json(row(await carry_out(activity, ["echo"]), "echo").usage or b"{}")
    [by_model] = usage.pop("models").values()
    assert (
        usage
        == by_model
        == {
            "requests": 1,
            "tool_calls": 0,
            "input_tokens": 52,
            "output_tokens": 2,
            "cost": None,
        }
    )


# -- failures


async def test_a_failure_of_the_model_is_retried() -> None:
    """An error of the model's is an attempt that failed."""
    failures = [ConnectionError("no route"), ConnectionError("no route")]

    def answer(_: list[ModelMessage]) -> str:
        if failures:
            raise failures.pop()
        return "there"

    activity = ActivityRegistry()
    activity.agent(Agent(answering(answer)), name="caller", prompt="Call")
    caller = row(await carry_out(activity, ["caller"]), "caller")
    assert (caller.status, caller.attempt) == (StepStatus.COMPLETED, 3)


async def test_a_usage_limit_is_not_tried_again() -> None:
    """A limit that was reached fails the step at its first attempt, with the usage it had."""

    def respond(messages: list[ModelMessage], info: AgentInfo) -> ModelResponse:
        return ModelResponse(parts=[ToolCallPart("again", {})])

    agent = Agent(FunctionModel(respond), name="looper")

    @agent.tool_plain
    def again() -> str:
        return "again"

    activity = ActivityRegistry()
    activity.agent(agent, prompt="Loop")
    looper = row(await carry_out(activity, ["looper"]), "looper")
    assert (looper.status, looper.attempt) == (StepStatus.FAILED, 1)
    assert "UsageLimitExceeded" in (looper.error or "")
    assert from_json(looper.usage or b"{}")["requests"] > 1


async def test_a_wrong_use_of_pydantic_ai_is_not_tried_again() -> None:
    """An agent without a model can't be helped by another attempt."""
    activity = ActivityRegistry()
    activity.agent(Agent(), name="mute", prompt="Speak")
    mute = row(await carry_out(activity, ["mute"]), "mute")
    assert (mute.status, mute.attempt) == (StepStatus.FAILED, 1)
    assert "UserError" in (mute.error or "")


async def test_a_tool_can_fail_for_good() -> None:
    """NonRetryableError from a tool ends the step, as from a function."""
    agent = Agent(TestModel(), name="seller")

    @agent.tool_plain
    def sell() -> str:
        raise NonRetryableError("sold out")

    activity = ActivityRegistry()
    activity.agent(agent, prompt="Sell")
    seller = row(await carry_out(activity, ["seller"]), "seller")
    assert (seller.attempt, seller.error) == (1, "NonRetryableError: sold out")


# -- conversations


HISTORY = answering(lambda messages: " / ".join(prompts(messages)))
"""A model that repeats all it has been asked so far."""


def conversation() -> ActivityRegistry:
    """Two agents, the second of which goes on where the first stopped, and a third that goes on after it."""
    activity = ActivityRegistry()
    activity.agent(Agent(HISTORY), name="outline", prompt="Outline {text}")
    activity.agent(Agent(HISTORY), name="brief", prompt="Be brief", message_history="outline")
    activity.agent(Agent(HISTORY), name="title", prompt="A title", message_history="brief")
    return activity


async def test_an_agent_continues_the_conversation_of_an_earlier_step() -> None:
    """`message_history` gives an agent all messages of the step that it names, with what that one continued."""
    detail = await carry_out(conversation(), ["outline", "brief", "title"], {"text": "T"})
    assert output(detail, "title") == "Outline T / Be brief / A title"


async def test_a_conversation_is_continued_in_another_process(tmp_path: Path) -> None:
    """The messages are in the store: a worker that knows only the second agent continues what another one began."""
    url = f"sqlite:///{tmp_path}/paigeant.db"
    settings = Settings(transport_url=url, store_url=url)
    everything = conversation()
    for topic in ("outline", "brief"):
        async with Paigeant(settings) as app:
            if topic == "outline":
                await app.dispatch(Workflow("talk", ["outline", "brief"]), {"text": "T"}, workflow_id="one")
            alone = ActivityRegistry()
            alone._activities[topic] = everything._activities[topic]
            await app.worker(alone).run(until_idle=True)
    async with Paigeant(settings) as app:
        detail = await app.run("one").detail()
    assert output(detail, "brief") == "Outline T / Be brief"


async def test_messages_do_not_travel() -> None:
    """A conversation is neither in the variables nor in the payload of a run."""
    detail = await carry_out(conversation(), ["outline", "brief"], {"text": "T"})
    assert not detail.variables


async def test_an_attempt_that_failed_is_in_the_conversation_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """When an attempt fails after it kept its messages, the next one asks nothing again and leaves the same ones."""
    answers = iter(["first", "second"])
    activity = ActivityRegistry()
    activity.agent(Agent(answering(lambda _: next(answers))), name="outline", prompt="Outline")

    def replies(messages: list[ModelMessage]) -> str:
        return " ".join(
            part.content
            for message in messages
            if isinstance(message, ModelResponse)
            for part in message.parts
            if isinstance(part, TextPart)
        )

    activity.agent(Agent(answering(replies)), name="brief", prompt="Be brief", message_history="outline")
    troubles = [ConnectionError("after the messages were kept")]

    def fail(step: str) -> None:
        if troubles:
            raise troubles.pop()

    settings = Settings(transport_url="memory://", store_url="memory://", retry_base=0.0)
    async with Paigeant(settings, activities=activity) as app:
        monkeypatch.setattr(app.store, "save_unit", messages_are_saved(app.store.save_unit, fail))
        run = await app.dispatch(Workflow("talk", ["outline", "brief"]))
        await app.worker().run(until_idle=True)
        detail = await run.detail()
    assert row(detail, "outline").attempt == 2
    assert output(detail, "brief") == "first"
    assert next(answers) == "second"


async def test_a_skipped_step_leaves_no_conversation() -> None:
    """Where the earlier step was skipped, the agent begins anew."""
    detail = await carry_out(conversation(), [Step("outline", when="false"), "brief"], {"text": "T"})
    assert output(detail, "brief") == "Be brief"


async def test_a_conversation_with_nobody_is_an_error() -> None:
    """A `message_history` that names no earlier step fails for good and says what was done."""
    detail = await carry_out(conversation(), [Step("brief")], {"text": "T"})
    assert detail.run.status is RunStatus.FAILED
    assert "no such step was done before it; done: none" in (row(detail, "brief").error or "")


async def test_a_function_has_no_conversation() -> None:
    """A `message_history` that names a step which no agent did fails for good and says so."""
    activity = ActivityRegistry()

    @activity.execute()
    async def outline() -> str:
        return "by hand"

    activity.agent(Agent(HISTORY), name="brief", prompt="Be brief", message_history="outline")
    brief = row(await carry_out(activity, ["outline", "brief"]), "brief")
    assert brief.attempt == 1
    assert "was not done by an agent" in (brief.error or "")


async def test_nothing_is_kept_where_nothing_follows(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last step of a run keeps no messages: nobody could continue them."""
    kept: list[str] = []
    settings = Settings(transport_url="memory://", store_url="memory://")
    async with Paigeant(settings, activities=conversation()) as app:
        save = app.store.save_unit

        monkeypatch.setattr(app.store, "save_unit", messages_are_saved(save, kept.append))
        await app.dispatch(Workflow("talk", ["outline", "brief"]), {"text": "T"})
        await app.worker().run(until_idle=True)
    assert kept == ["outline"]


def messages_are_saved(save: Any, then: Callable[[Any], Any]) -> Any:
    """A `save_unit` that hands the step of each conversation which it keeps to `then`."""

    async def saved(key: Any, name: str, value: bytes) -> bytes:
        stands: bytes = await save(key, name, value)
        if name.startswith("paigeant.messages:"):
            then(key.step)
        return stands

    return saved
