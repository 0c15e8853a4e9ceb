"""PaigeantDurability: models that stream, that a run names, that take over, that work in the background."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterable, AsyncIterator
from functools import partial
from typing import Any

import pytest
from pydantic_ai import Agent, ModelMessage, ModelResponse, ModelRetry, RunContext, TextPart
from pydantic_ai.capabilities import AbstractCapability, ModelFallback, ResolveModelId, SelectModel
from pydantic_ai.exceptions import ModelHTTPError, UnexpectedModelBehavior, UserError
from pydantic_ai.messages import AgentStreamEvent
from pydantic_ai.models import Model, ModelRequestContext
from pydantic_ai.models.function import AgentInfo, FunctionModel
from pydantic_ai.models.test import TestModel
from tests.agents.durable import both_answers, durable
from tests.agents.steps import Crash, Step, called, prompt_of, returned, scripted
from tests.patience import PATIENCE

from paigeant.agents import PaigeantDurability, effect_key

# -- rule 7: streams


async def test_rule_7_a_stream_is_watched_once() -> None:
    """The handler sees the deltas while the model is asked, and nothing of them when the request is replayed."""
    seen: list[str] = []
    asked: list[int] = []

    async def watch(_: RunContext[Any], events: AsyncIterable[AgentStreamEvent]) -> None:
        async for event in events:
            seen.append(event.event_kind)

    async def stream(_: list[ModelMessage], __: AgentInfo) -> AsyncIterator[str]:
        asked.append(1)
        for word in ("one ", "two ", "three"):
            yield word

    agent = durable(FunctionModel(stream_function=stream), engine={"event_stream_handler": watch})
    step = Step()
    result, _ = await step.resumed(lambda: agent.run("go"))
    assert (result.output, len(asked)) == ("one two three", 1)
    assert seen.count("part_delta") == 2
    before = list(seen)
    assert (await step.attempt(lambda: agent.run("go"))).output == "one two three"
    assert seen == before


async def test_rule_7_who_reads_a_replayed_run_gets_it_condensed() -> None:
    """`run_stream` and `run_stream_events` give the recorded answer, without asking the model."""
    asked: list[int] = []

    async def stream(_: list[ModelMessage], __: AgentInfo) -> AsyncIterator[str]:
        asked.append(1)
        yield "one "
        yield "two"

    agent = durable(FunctionModel(stream_function=stream))

    async def text() -> str:
        async with agent.run_stream("go") as running:
            return str(await running.get_output())

    step = Step()
    assert await step.attempt(text) == await step.attempt(text) == "one two"
    assert len(asked) == 1


# -- rule 8: models of a run


async def test_rule_8_models_of_a_run_are_refused_unless_they_are_known() -> None:
    """A model object that isn't registered is refused; by its id in `models` it is taken."""
    other = scripted("other")[0]
    agent = durable(scripted("own")[0], engine={"models": {"other": other}})
    with pytest.raises(UserError, match="was not registered with `PaigeantDurability`"):
        await Step().attempt(lambda: agent.run("go", model=scripted("stranger")[0]))
    step = Step()
    assert (await step.attempt(lambda: agent.run("go", model="other"))).output == "other"
    assert (await step.attempt(lambda: agent.run("go", model=other))).output == "other"
    assert step.units == ["agent__model.request(agent:1,1)"]


async def test_rule_8_a_model_may_be_made_of_its_id_and_the_deps() -> None:
    """As for a tenant with a key of its own: by the agent's own id or that of a run, in each attempt anew."""
    model, requests = scripted(called("add", "c1"), both_answers)
    made: list[tuple[str, str]] = []

    def resolve(ctx: Any, model_id: str) -> Model | None:
        made.append((model_id, ctx.deps))
        return model if model_id.startswith("tenant:") else None

    agent = durable("tenant:own", deps_type=str, capabilities=[ResolveModelId[Any](resolve)])

    @agent.tool_plain
    def add() -> int:
        return 1

    for options in ({}, {"model": "tenant:other"}):
        step = Step()
        made.clear()
        requests.clear()
        run = partial(agent.run, "go", deps="ada", **options)
        result, crashes = await step.resumed(run)
        assert (result.output, crashes, requests) == ("c1=1", 3, [0, 1])
        assert set(made) == {(options.get("model", "tenant:own"), "ada")}
        assert (await step.attempt(run)).output == "c1=1"
        assert requests == [0, 1]


async def test_rule_8_a_model_that_overrides_the_agent_s_own_is_taken() -> None:
    """`agent.override(model=...)`, as tests use it, stands for the model of the agent, also of one that has none."""
    for agent in (durable(scripted("own")[0]), Agent(name="agent")):
        engine: list[Any] = [] if agent.model is not None else [PaigeantDurability()]
        step = Step()
        with agent.override(model=scripted("other")[0]):
            result = await step.attempt(partial(agent.run, "go", capabilities=engine))
        assert result.output == "other"
        assert step.units == ["agent__model.request(agent:1,1)"]


async def test_rule_8_a_model_that_takes_over_is_recorded() -> None:
    """A request that goes on to another model, since its own failed, is a unit as well: that one is asked once."""

    def fail(_: list[ModelMessage]) -> str:
        raise ModelHTTPError(400, "own")

    spare, requests = scripted(called("add", "c1"), both_answers)
    agent = durable(
        scripted(fail, fail)[0], engine={"models": {"spare": spare}}, capabilities=[ModelFallback("spare")]
    )

    @agent.tool_plain
    def add() -> int:
        return 1

    step = Step()
    result, crashes = await step.resumed(lambda: agent.run("go"))
    assert (result.output, crashes, requests) == ("c1=1", 3, [0, 1])
    assert [name for name in step.units if "model.request" in name] == [step.units[0], step.units[2]]


async def test_an_answer_is_told_to_be_of_the_model_that_gave_it() -> None:
    """Its own id is recorded with it: an attempt that replays it hasn't asked a model that failed before that one."""
    is_down = [True]

    def own(_: list[ModelMessage]) -> str:
        if is_down[0]:
            raise ModelHTTPError(400, "own")
        return "own"

    spare, _ = scripted("spare")
    agent = durable(
        scripted(own)[0], engine={"models": {"spare": spare}}, capabilities=[ModelFallback("spare")]
    )
    step = Step()
    for _attempt in range(2):
        result = await step.attempt(lambda: agent.run("go"))
        assert (result.output, result.response.model_id) == ("spare", "spare")
        is_down[0] = False
    result = await Step().attempt(lambda: agent.run("go"))
    assert (result.output, result.response.model_id) == ("own", (await agent.run("go")).response.model_id)


async def test_rule_8_a_model_that_takes_over_may_be_any_id() -> None:
    """As in `run(model=...)`, it needn't be in `models`; a model object that nobody registered is refused still."""

    def fail(_: list[ModelMessage]) -> str:
        raise ModelHTTPError(400, "own")

    agent = durable(scripted(fail)[0], capabilities=[ModelFallback("test")])
    step = Step()
    assert (await step.attempt(lambda: agent.run("go"))).output == "success (no tool calls)"
    assert step.units == ["agent__model.request(agent:1,1)"]
    agent = durable(scripted(fail)[0], capabilities=[ModelFallback(TestModel())])
    with pytest.raises(UserError, match="was not registered with `PaigeantDurability`"):
        await Step().attempt(lambda: agent.run("go"))


@pytest.mark.parametrize("how", ["is well again", "is another one", "is selected anew", "is streamed"])
async def test_an_answer_is_that_of_its_request_whichever_model_is_asked(how: str) -> None:
    """A model that is well again, another one, or a stream, isn't asked for what another has answered: it would have
    the tools do the same once more, under other keys."""
    paid: list[str] = []
    attempts: list[int] = []

    def own(_: list[ModelMessage]) -> Any:
        if how == "is well again" and len(attempts) == 1:
            raise ModelHTTPError(400, "own")
        return called("pay", "other")

    first, first_requests = scripted(called("pay", "c1"), "paid")
    other, other_requests = scripted(own, "paid by other")
    models = {"first": first, "other": other}

    def of(attempt: int) -> str:
        return "first" if attempt == 1 else "other"

    async def watch(_: RunContext[Any], events: AsyncIterable[AgentStreamEvent]) -> None:
        async for _event in events:
            pass

    async def work() -> str:
        attempts.append(len(attempts) + 1)
        engine: dict[str, Any] = {"models": models}
        capabilities: list[AbstractCapability[Any]] = []
        asked: str | None = None
        match how:
            case "is well again":
                capabilities, asked = [ModelFallback("first")], "other"
            case "is another one":
                asked = of(attempts[-1])
            case "is selected anew":
                capabilities = [SelectModel(lambda _: of(attempts[-1]))]
            case _:
                engine["event_stream_handler"] = watch if attempts[-1] > 1 else None
                asked = "first"
        agent = durable(TestModel(), engine=engine, capabilities=capabilities)

        @agent.tool_plain
        def pay() -> str:
            paid.append(effect_key())
            return "paid"

        return str((await agent.run("go", model=asked)).output)

    step = Step()
    with pytest.raises(Crash):
        await step.attempt(work, crash_after=2)
    if how == "is streamed":
        models["first"] = FunctionModel(stream_function=_says_paid)
    said = await step.attempt(work)
    assert len(paid) == 1, "the tool was called again"
    asked = {"is well again": [0, 1], "is streamed": []}.get(how, [1])
    assert (first_requests, other_requests) == ([0], asked)
    assert said == ("paid" if how == "is streamed" else "paid by other")


async def _says_paid(messages: list[ModelMessage], _: AgentInfo) -> AsyncIterator[str]:
    assert returned(messages), "this was answered before"
    yield "paid"


async def test_an_answer_that_was_rejected_is_in_nobody_s_way() -> None:
    """Another model gave the one that counts, and called the tool under the same id: that call is met, behind both."""
    paid: list[int] = []

    def cut_off(_: list[ModelMessage], __: AgentInfo) -> ModelResponse:
        return ModelResponse(parts=[called("pay", "c1", euros=9)], finish_reason="length")

    spare, requests = scripted(called("pay", "c1", euros=1), both_answers)
    # The answer to the second request is cut off as well.
    agent = durable(
        FunctionModel(cut_off), engine={"models": {"spare": spare}}, capabilities=[ModelFallback("spare")]
    )

    @agent.tool_plain
    def pay(euros: int) -> str:
        paid.append(euros)
        return f"paid {euros}"

    step = Step()
    result, _ = await step.resumed(lambda: agent.run("go"))
    assert (result.output, paid) == ("c1=paid 1", [1])
    assert len([unit for unit in step.units if "model.request" in unit]) == 4
    assert len(requests) == 2


async def test_what_a_hook_asked_for_each_model_is_told_at_its_own_request() -> None:
    """It is called once more for a model that takes over, and not where that one's answer is replayed."""
    is_down = [True]
    told: list[tuple[int, str]] = []
    guard = durable(scripted(lambda messages: f"about {prompt_of(messages)}")[0], name="guard")

    class Guard(AbstractCapability[Any]):
        async def prepare_model_request(
            self, ctx: RunContext[Any], request_context: ModelRequestContext
        ) -> ModelRequestContext:
            told.append((ctx.run_step, str((await guard.run(f"{ctx.run_step}")).output)))
            return request_context

    def own(_: list[ModelMessage]) -> str:
        if is_down[0]:
            raise ModelHTTPError(400, "own")
        return "own"

    spare, _ = scripted(called("add", "c1"), "spare")
    agent = durable(
        scripted(own, own)[0],
        engine={"models": {"spare": spare}},
        capabilities=[Guard(), ModelFallback("spare")],
    )

    @agent.tool_plain
    def add() -> int:
        return 1

    async def work() -> list[str]:
        return [str((await agent.run("go")).output), str((await guard.run("after")).output)]

    step = Step()
    assert await step.attempt(work) == ["spare", "about after"]
    assert told == [(1, "about 1"), (1, "about 1"), (2, "about 2"), (2, "about 2")]
    told.clear()
    is_down[0] = False
    assert await step.attempt(work) == ["spare", "about after"]
    assert told == [(1, "about 1"), (2, "about 2")]


# -- providers that work in the background


class Background(FunctionModel):
    """A model whose provider works on its answers in the background: `texts`, a job each."""

    def __init__(self, *texts: str, pause: float = 0.001) -> None:
        super().__init__(lambda *_: ModelResponse(parts=[]))
        self.texts, self.pause = texts, pause
        self.asked: list[str] = []
        self.is_given_up = False
        self.held: asyncio.Event | None = None
        """Set by whoever asks after a job while this is there, which then waits for ever."""
        self.fails = False

    def continuation_delay(self, response: ModelResponse) -> float | None:
        return self.pause

    async def request(self, messages: list[ModelMessage], *_: Any) -> ModelResponse:
        last = messages[-1]
        if not isinstance(last, ModelResponse) or last.state != "suspended":
            self.asked.append("begun")
            job = f"{self.asked.count('begun')}"
            return ModelResponse(parts=[], state="suspended", provider_response_id=job)
        self.asked.append("looked")
        if self.held is not None:
            self.held.set()
            await asyncio.Event().wait()
        if self.fails:
            raise ModelHTTPError(400, "background")
        assert not self.is_given_up, "its provider has given it up"
        if self.asked[-2] != "looked":
            return last
        assert last.provider_response_id is not None, "it was begun"
        text = self.texts[int(last.provider_response_id) - 1]
        return ModelResponse(parts=[TextPart(text)], provider_response_id=last.provider_response_id)

    async def cancel_suspended_response(self, response: ModelResponse) -> None:
        self.is_given_up = True


@pytest.mark.parametrize("how", ["ended from outside", "failed"])
async def test_what_a_provider_works_on_is_there_for_the_next_attempt(how: str) -> None:
    """An attempt that ends meanwhile doesn't have it given up: the record says that it is to be asked after."""
    model = Background("done")
    agent = durable(model)
    step = Step()
    if how == "failed":
        model.fails = True
        with pytest.raises(ModelHTTPError):
            await step.attempt(lambda: agent.run("go"))
    else:
        model.held = asyncio.Event()
        attempt = asyncio.create_task(step.attempt(lambda: agent.run("go")))
        async with asyncio.timeout(PATIENCE):
            await model.held.wait()
        attempt.cancel()
        with pytest.raises(asyncio.CancelledError):
            await attempt
    model.held, model.fails = None, False
    result = await step.attempt(lambda: agent.run("go"))
    assert (result.output, model.asked.count("begun"), model.is_given_up) == ("done", 1, False)


async def test_a_bad_answer_of_the_background_is_begun_anew() -> None:
    """To ask after the same job again would give the same answer, in each attempt."""
    model = Background("bad", "good")
    agent = durable(model, retries=0)

    @agent.output_validator
    def check(output: str) -> str:
        if output == "bad":
            raise ModelRetry("do better")
        return output

    step = Step()
    with pytest.raises(UnexpectedModelBehavior):
        await step.attempt(lambda: agent.run("go"))
    for _ in range(2):
        assert (await step.attempt(lambda: agent.run("go"))).output == "good"
    assert model.asked == ["begun", "looked", "looked"] * 2
