"""Agents that ask people, or wait for what happens outside: their step is left, and nothing is asked twice."""

from __future__ import annotations

import asyncio
import gc
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Annotated, Any

import pytest
from pydantic import JsonValue
from pydantic_ai import (
    Agent,
    ApprovalRequired,
    CallDeferred,
    DeferredToolRequests,
    DeferredToolResults,
    RunContext,
)
from pydantic_ai.capabilities import AbstractCapability, RequestInput
from pydantic_ai.external_events import ExternalEventError, wait_for_external_event
from pydantic_ai.messages import ToolCallPart
from pydantic_core import from_json, to_json
from tests.agents.steps import called, returned, scripted
from tests.integration.workers import working
from tests.patience import PATIENCE
from typing_extensions import TypeAliasType

from paigeant import ActivityRegistry, Paigeant, Run, RunStatus, Settings, StepContext, Workflow
from paigeant.agents import PaigeantDurability, effect_key
from paigeant.errors import InputInvalid, InvalidTransition
from paigeant.store import ClaimRequest, Request, StepKey

SETTINGS = Settings(sweep_interval=0.2)


def tell(messages: list[Any]) -> str:
    """A turn that repeats what the tools gave."""
    return str(sorted(returned(messages).items()))


async def asked(app: Paigeant, run: Run, count: int = 1) -> list[Request]:
    """What the run asks, once it has nothing else to do."""
    async with asyncio.timeout(PATIENCE):
        while await run.status() is not RunStatus.WAITING or len(await run.requests()) != count:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    return await run.requests()


@asynccontextmanager
async def opened(activity: ActivityRegistry) -> AsyncIterator[Paigeant]:
    """An application on one SQLite file."""
    async with Paigeant(SETTINGS, activities=activity) as app:
        yield app


def banker(*turns: Any, **engine: Any) -> tuple[ActivityRegistry, list[Any], list[int]]:
    """An agent that pays only when somebody approves, what it paid, and the requests of its model."""
    model, requests = scripted(*turns)
    engines = [PaigeantDurability[Any](**engine)] if engine else []
    agent = Agent(model, name="banker", capabilities=engines)
    paid: list[Any] = []

    @agent.tool_plain(requires_approval=True)
    async def pay(euros: int) -> str:
        paid.append((euros, effect_key()))
        return f"paid {euros}"

    @agent.tool_plain
    async def note(text: str) -> str:
        paid.append(text)
        return "noted"

    activity = ActivityRegistry()
    activity.agent(agent, prompt="Pay.", retries=0)
    return activity, paid, requests


async def test_a_tool_waits_for_approval_over_any_restart() -> None:
    """The request tells the call; when it is approved another worker goes on, and the model is asked nothing again."""
    activity, paid, requests = banker([called("pay", "c1", euros=9), called("note", "c2", text="hm")], tell)
    async with opened(activity) as app:
        run = await app.dispatch(Workflow("w", ["banker"]))
        async with working(app.worker()):
            [request] = await asked(app, run)
    assert (requests, paid) == ([0], ["hm"])
    assert from_json(request.asked) == {"agent": "banker", "tool": "pay", "arguments": {"euros": 9}}
    assert (request.kind, request.name) == ("approval", "pay")
    async with opened(activity) as app:
        await app.approve(request.id, sender="ada")
        async with working(app.worker()):
            result = await app.run(run.id).wait(PATIENCE)
    assert result.output == "[('c1', 'paid 9'), ('c2', 'noted')]", result.error
    assert requests == [0, 1]
    assert [what[0] for what in paid] == ["h", 9]


async def test_all_calls_of_an_answer_are_asked_at_once() -> None:
    """Each is a request of its own; one that is denied is told to the model with the reason, another with its own
    arguments is done with those."""
    activity, paid, _ = banker([called("pay", f"c{n}", euros=n) for n in (1, 2, 3)], tell)
    async with opened(activity) as app, working(app.worker()):
        run = await app.dispatch(Workflow("w", ["banker"]))
        by_euros = {
            from_json(request.asked)["arguments"]["euros"]: request for request in await asked(app, run, 3)
        }
        await app.deny(by_euros[2].id, "too much", sender="bob")
        await app.answer(by_euros[3].id, {"approved": True, "arguments": {"euros": 30}})
        await asked(app, run, 1)
        await app.approve(by_euros[1].id)
        result = await run.wait(PATIENCE)
    assert result.output == "[('c1', 'paid 1'), ('c2', 'too much'), ('c3', 'paid 30')]", result.error
    assert sorted(euros for euros, _ in paid) == [1, 30]


async def test_agents_that_are_awaited_one_by_one_are_left_without_a_word() -> None:
    """The tasks of an agent's run have tasks of their own, in which it waits; of none is said that nobody looked."""
    said: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: said.append(context))
    model, _ = scripted(called("pay", "c1"), tell)
    agent = Agent(model, name="banker", capabilities=[PaigeantDurability()])

    @agent.tool_plain(requires_approval=True)
    async def pay() -> str:
        return "paid"

    activity = ActivityRegistry()

    @activity.execute()
    async def both() -> list[str]:
        tasks = [asyncio.create_task(agent.run("Pay.")) for _ in range(2)]
        return [(await task).output for task in tasks]

    async with opened(activity) as app, working(app.worker()):
        run = await app.dispatch(Workflow("w", ["both"]))
        for request in await asked(app, run, 2):
            await app.approve(request.id)
        assert (await run.wait(PATIENCE)).output == ["[('c1', 'paid')]"] * 2
    gc.collect()
    assert said == []


async def test_agents_within_a_tool_that_catches_all_they_raise_ask() -> None:
    """The model isn't told that they were left as if that were what came of them."""
    model, _ = scripted(called("pay", "c1"), tell)
    agent = Agent(model, name="banker", capabilities=[PaigeantDurability()])
    model, requests = scripted(called("both", "c1"), tell)
    boss = Agent(model, name="boss")

    @agent.tool_plain(requires_approval=True)
    async def pay() -> str:
        return "paid"

    @boss.tool_plain
    async def both() -> list[str]:
        ends = await asyncio.gather(agent.run("Pay."), agent.run("Pay."), return_exceptions=True)
        return [repr(end) if isinstance(end, BaseException) else end.output for end in ends]

    activity = ActivityRegistry()
    activity.agent(boss, prompt="Pay.")
    async with opened(activity) as app, working(app.worker()):
        run = await app.dispatch(Workflow("w", ["boss"]))
        for request in await asked(app, run, 2):
            await app.approve(request.id)
        result = await run.wait(PATIENCE)
    paid = "[('c1', 'paid')]"
    assert result.output == str([("c1", [paid, paid])]), result.error
    assert requests == [0, 1]


async def test_nobody_answers_in_time() -> None:
    """The call counts as denied, and the model is told why."""
    activity, paid, _ = banker([called("pay", "c1", euros=9)], tell, ask_timeout=0.3)
    async with opened(activity) as app, working(app.worker()):
        result = await (await app.dispatch(Workflow("w", ["banker"]))).wait(PATIENCE)
    assert "the answer to 'pay' has not come within 0.3 s" in result.output
    assert paid == []


def delegating(*capabilities: AbstractCapability[Any]) -> tuple[ActivityRegistry, list[int], list[list[int]]]:
    """An agent with a tool that has another agent pay, which needs approval; what was paid, and the requests of both
    models."""
    inner_model, inner_requests = scripted(called("pay", "c1", euros=5), tell)
    inner = Agent(inner_model, name="inner", capabilities=[PaigeantDurability(), *capabilities])
    outer_model, outer_requests = scripted(called("delegate", "o1"), tell)
    outer = Agent(outer_model, name="outer")
    paid: list[int] = []

    @inner.tool_plain(requires_approval=True)
    async def pay(euros: int) -> str:
        paid.append(euros)
        return f"paid {euros}"

    @outer.tool
    async def delegate(ctx: RunContext[Any]) -> str:
        return str((await inner.run("Pay.", usage=ctx.usage)).output)

    activity = ActivityRegistry()
    activity.agent(outer, prompt="Delegate.", retries=0)
    return activity, paid, [inner_requests, outer_requests]


async def test_an_agent_within_a_tool_asks() -> None:
    """What the outer tool did as units isn't done again, and both agents go on where they were."""
    activity, paid, requests = delegating()
    async with opened(activity) as app, working(app.worker()):
        run = await app.dispatch(Workflow("w", ["outer"]))
        [request] = await asked(app, run)
        await app.approve(request.id)
        result = await run.wait(PATIENCE)
    assert "paid 5" in str(result.output), result.error
    assert (requests, paid) == ([[0, 1], [0, 1]], [5])


async def test_questions_and_calls_to_the_outside() -> None:
    """A tool that asks a question gets its answer as result, and so does one whose work is done elsewhere."""
    model, _ = scripted([called("colour", "c1"), called("ship", "c2")], tell)
    agent = Agent(model, name="clerk")

    @agent.tool_plain
    async def colour() -> str:
        raise CallDeferred(kind="question", metadata={"question": "Which colour?"})

    @agent.tool_plain
    async def ship() -> str:
        raise CallDeferred

    @agent.tool
    async def refund(ctx: RunContext[Any]) -> str:
        if not ctx.tool_call_approved:
            raise ApprovalRequired
        return "refunded"

    activity = ActivityRegistry()
    activity.agent(agent, prompt="Go.", retries=0)
    async with opened(activity) as app, working(app.worker()):
        run = await app.dispatch(Workflow("w", ["clerk"]))
        kinds = {request.kind: request for request in await asked(app, run, 2)}
        assert from_json(kinds["question"].asked)["about"] == {"question": "Which colour?"}
        await app.answer(kinds["question"].id, "red")
        await app.answer(kinds["external"].id, {"tracking": 7})
        result = await run.wait(PATIENCE)
    assert result.output == "[('c1', 'red'), ('c2', {'tracking': 7})]", result.error


async def test_calls_that_are_approved_and_then_deferred_are_asked_again() -> None:
    """Each is a second request with the arguments that were approved; its answer is the result, over any restart."""
    model, requests = scripted([called("ship", f"c{n}", item=f"{n}") for n in (1, 2, 3)], tell)
    agent = Agent(model, name="clerk")
    shipped: list[tuple[str, str]] = []

    @agent.tool
    async def ship(ctx: RunContext[Any], item: str) -> str:
        if not ctx.tool_call_approved:
            raise ApprovalRequired
        shipped.append((item, effect_key()))
        raise CallDeferred({"parcel": item}, kind="question" if item == "2" else "external")

    activity = ActivityRegistry()
    activity.agent(agent, prompt="Go.", retries=0)
    async with opened(activity) as app, working(app.worker()):
        run = await app.dispatch(Workflow("w", ["clerk"]))
        approvals = {
            from_json(request.asked)["arguments"]["item"]: request for request in await asked(app, run, 3)
        }
        await app.answer(approvals["1"].id, {"approved": True, "arguments": {"item": "one"}})
        await app.approve(approvals["2"].id)
        await app.approve(approvals["3"].id)
        await asked(app, run, 3)
    async with opened(activity) as app, working(app.worker()):
        run = app.run(run.id)
        kept = {from_json(request.asked)["about"]["parcel"]: request for request in await asked(app, run, 3)}
        assert {parcel: request.kind for parcel, request in kept.items()} == {
            "one": "external",
            "2": "question",
            "3": "external",
        }
        assert from_json(kept["one"].asked)["arguments"] == {"item": "one"}
        await app.answer(kept["one"].id, {"tracking": 7})
        await app.deny(kept["3"].id, "lost")
        await app.answer(kept["2"].id, "by air")
        result = await run.wait(PATIENCE)
    assert result.output is not None, result.error
    assert "('c1', {'tracking': 7})" in result.output
    assert "('c2', 'by air')" in result.output
    assert "lost" in result.output
    assert requests == [0, 1]
    assert sorted(item for item, _ in shipped) == ["2", "3", "one"]
    assert len({key for _, key in shipped}) == 3


@pytest.mark.parametrize("inline", [False, True])
async def test_what_a_tool_tells_of_a_call_has_to_be_json(inline: bool) -> None:
    """No further attempt could ask somebody with anything else, whether the tool's calls are recorded or not."""
    model, requests = scripted(called("pay", "c1"), tell)
    agent = Agent(model, name="banker")

    @agent.tool_plain(metadata={"paigeant": {"inline": inline}})
    async def pay() -> str:
        raise ApprovalRequired(metadata={"account": object()})

    activity = ActivityRegistry()
    activity.agent(agent, prompt="Pay.", retries=5)
    async with opened(activity) as app, working(app.worker()):
        run = await app.dispatch(Workflow("w", ["banker"]))
        result = await run.wait(PATIENCE)
        [step] = (await run.detail()).steps
    assert "can't be recorded as JSON: Unable to serialize" in (result.error or "")
    assert (step.attempt, requests) == (1, [0])


async def test_a_tool_that_is_never_content_with_an_approval_fails_its_step() -> None:
    """What it does wrong is said; it isn't asked for over and over."""
    model, _ = scripted(called("pay", "c1"), tell)
    agent = Agent(model, name="clerk")

    @agent.tool_plain
    async def pay() -> str:
        raise ApprovalRequired

    activity = ActivityRegistry()
    activity.agent(agent, prompt="Go.", retries=3)
    async with opened(activity) as app, working(app.worker()):
        run = await app.dispatch(Workflow("w", ["clerk"]))
        [request] = await asked(app, run)
        await app.approve(request.id)
        result = await run.wait(PATIENCE)
    assert result.status is RunStatus.FAILED
    assert "tool 'pay' asks for approval of a call that has been approved" in str(result.error)


_ALIAS: Any = TypeAliasType("_ALIAS", str | DeferredToolRequests)


@pytest.mark.parametrize(
    "output_type",
    [
        [str, DeferredToolRequests],
        str | DeferredToolRequests,
        _ALIAS,
        [int, _ALIAS],
        Annotated[str | DeferredToolRequests, "paid"],
    ],
    ids=["list", "union", "alias", "list of an alias", "annotated"],
)
async def test_an_agent_that_ends_with_its_requests_does(output_type: Any) -> None:
    """Who has DeferredToolRequests among its outputs gets them as the output of the step, however it is spelled."""
    model, _ = scripted(called("pay", "c1", euros=9))
    agent: Agent[None, Any] = Agent(model, name="banker", output_type=output_type)

    @agent.tool_plain(requires_approval=True)
    async def pay(euros: int) -> str:
        raise AssertionError(f"nobody approved of {euros}")

    activity = ActivityRegistry()
    activity.agent(agent, prompt="Pay.", retries=0)
    async with opened(activity) as app, working(app.worker()):
        result = await (await app.dispatch(Workflow("w", ["banker"]))).wait(PATIENCE)
    assert result.status is RunStatus.COMPLETED, result.error
    assert "c1" in str(result.output)


class Desk:
    """Where an agent's questions are delivered."""

    def __init__(self, answer: DeferredToolResults | None = None) -> None:
        self.tokens: list[str] = []
        self.answer = answer

    async def ask(
        self, ctx: RunContext[Any], requests: DeferredToolRequests, token: str
    ) -> DeferredToolResults | None:
        """Take the question, and perhaps answer at once."""
        self.tokens.append(token)
        return self.answer


def asking(desk: Desk, **options: Any) -> tuple[ActivityRegistry, list[int], list[int]]:
    """An agent that asks by a RequestInput of its own; what it paid, and the requests of its model."""
    model, requests = scripted(called("pay", "c1", euros=9), tell)
    agent = Agent(model, name="banker", capabilities=[RequestInput(desk.ask, **options)])
    paid: list[int] = []

    @agent.tool_plain(requires_approval=True)
    async def pay(euros: int) -> str:
        paid.append(euros)
        return f"paid {euros}"

    activity = ActivityRegistry()
    activity.agent(agent, prompt="Pay.", retries=0)
    return activity, paid, requests


async def test_request_input_hands_out_a_token_once() -> None:
    """The token is the id of a request; resolved in another process, the run goes on and asks nobody again."""
    desk = Desk()
    activity, paid, requests = asking(desk)
    async with opened(activity) as app:
        run = await app.dispatch(Workflow("w", ["banker"]))
        async with working(app.worker()):
            [request] = await asked(app, run)
    assert desk.tokens == [request.id]
    assert (request.kind, request.name) == ("external", "deferred_tool_calls")
    [call] = from_json(request.asked)["calls"]
    assert call == {"id": "c1", "kind": "approval", "tool": "pay", "arguments": {"euros": 9}}
    async with opened(activity) as app:
        await app.answer(request.id, {"approvals": {"c1": True}}, sender="ada")
        async with working(app.worker()):
            result = await app.run(run.id).wait(PATIENCE)
    assert result.output == "[('c1', 'paid 9')]", result.error
    assert (desk.tokens, paid, requests) == ([request.id], [9], [0, 1])


async def test_request_input_that_answers_at_once_waits_for_nobody() -> None:
    """The step isn't left."""
    desk = Desk(DeferredToolResults(approvals={"c1": True}))
    activity, paid, _ = asking(desk)
    async with opened(activity) as app, working(app.worker()):
        run = await app.dispatch(Workflow("w", ["banker"]))
        assert (await run.wait(PATIENCE)).output == "[('c1', 'paid 9')]"
        assert (await run.detail()).steps[0].epoch == 1
    assert (len(desk.tokens), paid) == (1, [9])


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ("yes", "Input should be a dictionary"),
        (True, "Input should be a dictionary"),
        ({}, 'answered: {"approvals":[],"calls":[]}'),
        ({"approvals": {"c1": "yes"}}, "approvals.c1.bool: Input should be a valid boolean"),
        ({"approvals": {"c1": True, "c2": True}}, '"approvals":["c1","c2"]'),
        ({"calls": {"c1": True}}, '"calls":["c1"]'),
        ({"approvals": {"c1": True}, "answered_by": {"c2": "eve"}}, "nobody asked about: ['c2']"),
    ],
    ids=str,
)
async def test_what_request_input_can_t_read_is_no_answer(answer: JsonValue, said: str) -> None:
    """It is refused when it is given, with what is expected: recorded, it would fail the run, and each retry of it."""
    activity, paid, _ = asking(Desk())
    async with opened(activity) as app, working(app.worker()):
        run = await app.dispatch(Workflow("w", ["banker"]))
        [request] = await asked(app, run)
        with pytest.raises(InputInvalid, match=re.escape(said)):
            await app.answer(request.id, answer)
        await app.answer(request.id, {"approvals": {"c1": True}}, sender="ada")
        assert (await run.wait(PATIENCE)).status is RunStatus.COMPLETED
    assert paid == [9]


async def test_request_input_of_one_run_asks_for_it() -> None:
    """It may come with the run, in the code of an activity: then that asks, and nobody else."""
    desk = Desk()
    model, _ = scripted(called("pay", "c1", euros=9), tell)
    agent: Agent[Any, str] = Agent(model, name="banker", capabilities=[PaigeantDurability()])

    @agent.tool_plain(requires_approval=True)
    async def pay(euros: int) -> str:
        return f"paid {euros}"

    activity = ActivityRegistry()

    @activity.execute(retries=0)
    async def shop() -> str:
        return (await agent.run("Pay.", capabilities=[RequestInput(desk.ask)])).output

    async with opened(activity) as app, working(app.worker()):
        run = await app.dispatch(Workflow("w", ["shop"]))
        [request] = await asked(app, run)
        assert desk.tokens == [request.id]
        await app.answer(request.id, {"approvals": {"c1": True}})
        assert (await run.wait(PATIENCE)).output == "[('c1', 'paid 9')]"


@pytest.mark.parametrize("denied", [False, True], ids=["late", "denied"])
async def test_request_input_to_which_there_is_no_answer(denied: bool) -> None:
    """The calls count as denied, with the reason."""
    activity, paid, _ = asking(Desk(), timeout=timedelta(seconds=60 if denied else 0.3))
    async with opened(activity) as app, working(app.worker()):
        run = await app.dispatch(Workflow("w", ["banker"]))
        if denied:
            [request] = await asked(app, run)
            await app.deny(request.id, "nobody is there", sender="ada")
        result = await run.wait(PATIENCE)
    expected = "was denied by ada: nobody is there" if denied else "has not come within 0.3 s"
    assert expected in result.output
    assert paid == []


async def test_a_tool_waits_for_an_event_outside() -> None:
    """One that is done inline can: the library has no waits in a unit. A token is answered once."""
    model, _ = scripted(called("deliver", "c1"), tell)
    agent = Agent(model, name="carrier")
    tokens: list[str] = []

    @agent.tool_plain(metadata={"paigeant": {"inline": True}})
    async def deliver() -> JsonValue:
        try:
            return await wait_for_external_event("delivered", ask=tokens.append, timeout=timedelta(hours=1))
        except ExternalEventError as exc:
            return str(exc)

    activity = ActivityRegistry()
    activity.agent(agent, prompt="Go.", retries=0)
    async with opened(activity) as app, working(app.worker()):
        run = await app.dispatch(Workflow("w", ["carrier"]))
        [request] = await asked(app, run)
        assert from_json(request.asked)["tool"] == "deliver"
        assert request.expires_at is not None, "nobody is to answer when its time is up"
        await app.answer(request.id, {"at": "noon"})
        result = await run.wait(PATIENCE)
        with pytest.raises(InvalidTransition):
            await app.answer(request.id, "other")
    assert result.output == "[('c1', {'at': 'noon'})]", result.error
    assert tokens == [request.id]


async def test_a_recorded_tool_that_waits_outside_is_told_how_to() -> None:
    """Nothing has been asked of anybody by then. Within an agent that a tool runs, the inner tool is named."""
    waits, _ = scripted(called("deliver", "c1"), tell)
    inner = Agent(waits, name="inner", capabilities=[PaigeantDurability()])
    asking, _ = scripted(called("ask", "c1"), tell)
    outer = Agent(asking, name="outer")

    @inner.tool_plain
    async def deliver() -> JsonValue:
        return await wait_for_external_event("delivered", ask=lambda token: None)

    @outer.tool_plain
    async def ask() -> str:
        return str((await inner.run("go")).output)

    activity = ActivityRegistry()
    activity.agent(outer, prompt="Go.", retries=9)
    async with opened(activity) as app, working(app.worker()):
        run = await app.dispatch(Workflow("w", ["outer"]))
        result = await run.wait(PATIENCE)
        [step] = (await run.detail()).steps
        assert await run.requests() == []
    assert "tool 'deliver' calls wait_for_external_event()" in str(result.error)
    assert 'metadata={"paigeant": {"inline": True}}' in str(result.error)
    assert step.attempt == 1


def cut_off() -> tuple[ActivityRegistry, list[str], list[int]]:
    """An agent whose tool may be done at most once and is cut off the first time, the effect keys with which it was
    tried, and the requests of its model."""
    model, requests = scripted(called("transfer", "c1"), tell)
    agent = Agent(model, name="banker")
    tried: list[str] = []

    @agent.tool_plain(metadata={"paigeant": {"at_most_once": True}})
    async def transfer() -> str:
        tried.append(effect_key())
        if len(tried) == 1:
            raise ConnectionError("reset by peer")
        return "transferred"

    activity = ActivityRegistry()
    activity.agent(agent, prompt="Go.", retries=0)
    return activity, tried, requests


@pytest.mark.parametrize("again", [True, False])
async def test_a_lost_outcome_goes_to_a_person(again: bool) -> None:
    """A tool that may be done at most once and failed on the way is done again only when somebody says so."""
    activity, tried, requests = cut_off()
    async with opened(activity) as app, working(app.worker()):
        run = await app.dispatch(Workflow("w", ["banker"]))
        [request] = await asked(app, run)
        question = from_json(request.asked)
        assert "reset by peer" in question["question"]
        assert question["effect_key"] == tried[0]
        if again:
            await app.approve(request.id)
        else:
            await app.deny(request.id, "it went through")
        result = await run.wait(PATIENCE)
    if again:
        assert result.output == "[('c1', 'transferred')]", result.error
        assert (len(set(tried)), len(tried), requests) == (1, 2, [0, 1])
    else:
        assert result.status is RunStatus.FAILED
        assert "it is not to be done again (it went through)" in str(result.error)
        assert len(tried) == 1


async def test_a_lost_outcome_goes_to_a_person_when_all_attempts_are_used_up() -> None:
    """The only worker died within the tool: that doesn't end the step; who allows it allows one more attempt."""
    model, _ = scripted(called("transfer", "c1"), tell)
    agent = Agent(model, name="banker")
    keys: list[str] = []

    @agent.tool_plain(metadata={"paigeant": {"at_most_once": True}})
    async def transfer() -> str:
        keys.append(effect_key())
        return "transferred"

    activity = ActivityRegistry()
    activity.agent(agent, prompt="Go.", retries=0)
    key = StepKey("r", "banker")
    unit = 'banker__function_toolset__<agent>.call_tool:transfer(banker:1,1,"c1")'
    settings = Settings(lease=2.0, heartbeat=0.5, sweep_interval=0.05)
    async with Paigeant(settings, activities=activity) as app:
        run = await app.dispatch(Workflow("w", ["banker"]), workflow_id="r")
        await app.store.claim_step(ClaimRequest(key, "lost", 1))
        begun = {"by": "lost", "unit": "the transfer", "about": {"arguments": {"euros": 900}}}
        await app.store.save_unit(key, f"{unit}!begun", to_json(begun))
        async with working(app.worker()):
            [request] = await asked(app, run)
            assert request.name == "the transfer again"
            assert from_json(request.asked)["arguments"] == {"euros": 900}
            assert keys == []
            await app.approve(request.id)
            result = await run.wait(PATIENCE)
    assert result.output == "[('c1', 'transferred')]", result.error
    assert len(keys) == 1


async def test_a_denied_request_is_asked_once_more_when_the_run_is_retried() -> None:
    """As one whose time was up is; the error of the run tells what had happened to the tool."""
    activity, tried, requests = cut_off()
    async with opened(activity) as app, working(app.worker()):
        run = await app.dispatch(Workflow("w", ["banker"]))
        [request] = await asked(app, run)
        await app.deny(request.id, "not now")
        error = str((await run.wait(PATIENCE)).error)
        assert "reset by peer" in error and "not now" in error  # noqa: PT018
        await run.retry()
        [other] = await asked(app, run)
        assert other.id != request.id
        await app.approve(other.id)
        result = await run.wait(PATIENCE)
    assert result.output == "[('c1', 'transferred')]", result.error
    assert (requests, len(set(tried)), len(tried)) == ([0, 1], 1, 2)


async def test_what_a_model_was_told_stays_so_when_the_run_is_retried() -> None:
    """A request that was denied is an answer for a model: its later answers, which are recorded, rest on it."""
    told: list[str] = []

    def fails(messages: list[Any]) -> str:
        told.append(tell(messages))
        if len(told) == 1:
            raise ConnectionError("reset by peer")
        return told[-1]

    model, _ = scripted(called("ship", "c1"), fails)
    agent = Agent(model, name="clerk")

    @agent.tool_plain
    async def ship() -> str:
        raise CallDeferred

    activity = ActivityRegistry()
    activity.agent(agent, prompt="Go.", retries=0)
    async with opened(activity) as app, working(app.worker()):
        run = await app.dispatch(Workflow("w", ["clerk"]))
        [request] = await asked(app, run)
        await app.deny(request.id, "out of stock")
        assert "reset by peer" in str((await run.wait(PATIENCE)).error)
        await run.retry()
        result = await run.wait(PATIENCE)
    assert "out of stock" in str(result.output), result.error
    assert told[0] == told[1]


async def test_request_input_of_an_agent_within_a_tool_waits() -> None:
    """It leaves the step like any other, and the outer agent goes on behind it."""
    desk = Desk()
    activity, paid, requests = delegating(RequestInput(desk.ask))
    async with opened(activity) as app, working(app.worker()):
        run = await app.dispatch(Workflow("w", ["outer"]))
        [request] = await asked(app, run)
        await app.answer(request.id, {"approvals": {"c1": True}})
        result = await run.wait(PATIENCE)
    assert "paid 5" in str(result.output), result.error
    assert (desk.tokens, paid) == ([request.id], [5])
    assert requests == [[0, 1], [0, 1]]


@pytest.mark.parametrize("arguments", ["9", 9, [9]])
async def test_arguments_that_are_no_object_are_refused_when_they_are_given(arguments: Any) -> None:
    """Whoever answers is told, and the request is still open; it is not the run that fails later."""
    activity, paid, _ = banker([called("pay", "c1", euros=9)], tell)
    async with opened(activity) as app, working(app.worker()):
        run = await app.dispatch(Workflow("w", ["banker"]))
        [request] = await asked(app, run)
        with pytest.raises(InputInvalid, match="arguments"):
            await app.answer(request.id, {"approved": True, "arguments": arguments})
        await app.answer(request.id, {"approved": True, "arguments": {"euros": 8}})
        await run.wait(PATIENCE)
    assert [euros for euros, _ in paid] == [8]


@pytest.mark.parametrize("store", ["sqlite", "postgres"])
@pytest.mark.parametrize(
    ("arguments", "call", "told"),
    [
        ('{"x": NaN}', "c1", {"x": "NaN"}),
        ('{"x": -1e400}', "c1", {"x": "-Infinity"}),
        ('{"x": "a\\u0000b"}', "c1", {"x": "a\0b"}),
        ('{"x": 1}', "c\0\x1b[2K", {"x": 1}),
        ('{"x": 1}', "x!begun#y", {"x": 1}),
    ],
    ids=["nan", "infinity", "null in a text", "control characters in the id", "a mark of ours in the id"],
)
async def test_odd_calls_are_asked_and_done_like_any_other(
    store: str, arguments: str, call: str, told: dict[str, Any], request: pytest.FixtureRequest
) -> None:
    """What a model writes into a call that needs approval is data, on each store."""
    url = request.getfixturevalue("postgres_store_url") if store == "postgres" else "sqlite:///odd.db"
    model, _ = scripted(ToolCallPart("pay", arguments, tool_call_id=call), "done")
    agent = Agent(model, name="banker")
    paid: list[Any] = []

    @agent.tool_plain(requires_approval=True)
    async def pay(x: Any) -> str:
        paid.append(x)
        return "paid"

    activity = ActivityRegistry()
    activity.agent(agent, prompt="Pay.", retries=0)
    settings = Settings(store_url=url, transport_url=url, sweep_interval=0.2)
    async with Paigeant(settings, activities=activity) as app, working(app.worker()):
        run = await app.dispatch(Workflow("w", ["banker"]))
        [question] = await asked(app, run)
        assert from_json(question.asked)["arguments"] == told
        await app.approve(question.id)
        result = await run.wait(PATIENCE)
    assert (result.output, len(paid)) == ("done", 1), result.error


@pytest.mark.parametrize("store", ["sqlite", "postgres"])
async def test_an_odd_question_is_asked(store: str, request: pytest.FixtureRequest) -> None:
    """A question may be a model's text: what no database holds in a name is written out there."""
    url = request.getfixturevalue("postgres_store_url") if store == "postgres" else "sqlite:///odd.db"
    activity = ActivityRegistry()

    @activity.execute(retries=0)
    async def choose(context: StepContext) -> str:
        return str(await context.ask("red\0 or blue?"))

    settings = Settings(store_url=url, transport_url=url, sweep_interval=0.2)
    async with Paigeant(settings, activities=activity) as app, working(app.worker()):
        run = await app.dispatch(Workflow("w", ["choose"]))
        [question] = await asked(app, run)
        assert question.name == "red\\0 or blue?"
        assert from_json(question.asked)["question"] == "red\0 or blue?"
        await app.answer(question.id, "red")
        assert (await run.wait(PATIENCE)).output == "red"
