"""Random itineraries, revised by code and by agents, that wait, fail and are cancelled: the invariants hold throughout.

The engine is the real one, over the store and transport in memory. How a step behaves stands in its arguments, so that
steps which others have added behave in any way, too. What is looked at after each effect on the store, `Watch` says.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import Phase as Stage
from hypothesis import given, settings
from pydantic_ai import Agent, ModelMessage, ModelResponse, TextPart, ToolCallPart
from pydantic_ai.messages import ModelResponsePart
from pydantic_ai.models.function import AgentInfo, FunctionModel
from tests.chaos.sizes import full, say, short
from tests.patience import PATIENCE
from tests.simulation.mutants import mutated
from tests.simulation.watch import Watch, judge_end

from paigeant import (
    ActivityRegistry,
    ItineraryPolicy,
    NonRetryableError,
    RetryPolicy,
    Run,
    Sleep,
    Step,
    StepContext,
    WaitFor,
    WaitTimeout,
    Workflow,
)
from paigeant.errors import InvalidTransition, PolicyViolation
from paigeant.observer import Event
from paigeant.slip import RUN_ENDED, Phase, RunStatus
from paigeant.store import StepKey
from paigeant.testing import MemoryApp

ATTEMPTS = 3
UNDO_ATTEMPTS = 2
SIGNALS = ["paid", "shipped"]
WATCHED = (
    *("record_workflow_start", "claim_step", "record_step_result", "release_steps", "sweep", "sign_off"),
    *("cancel_run", "retry_run", "record_signal", "take_signal", "answer_request", "save_unit"),
)
ENDS = {f"run.{status.value}" for status in RUN_ENDED}

How = dict[str, Any]


def _steps(entries: Sequence[Mapping[str, Any]]) -> list[Step]:
    return [_step(entry) for entry in entries]


def _step(entry: Mapping[str, Any]) -> Step:
    """The step of an entry: an activity with its behaviour, or a step that waits."""
    match entry["kind"]:
        case "sleep":
            return Sleep(entry["seconds"], when=entry["when"])
        case "wait":
            limits = {name: entry[name] for name in ("timeout", "default") if name in entry}
            return WaitFor(entry["signal"], when=entry["when"], **limits)
        case kind:
            return Step(kind, when=entry["when"], args={"how": entry["how"]})


class World:
    """A run with all that is done to it, and what was seen of that."""

    def __init__(self) -> None:
        self.executed: Counter[StepKey] = Counter()
        self.failed: Counter[StepKey] = Counter()
        self.ended: list[str] = []
        self.found: list[BaseException] = []
        self.activity = ActivityRegistry()
        self.run: Run | None = None
        self.attempts = RetryPolicy(attempts=ATTEMPTS, base=1.0)
        self._register()
        self.app = MemoryApp(self.activity, observers=[self])
        self.watch = Watch(
            now=self.app.clock.now,
            grace=self.app.settings.grace,
            attempts=self._most,
            inline_bytes=self.app.settings.inline_bytes,
        )
        for name in WATCHED:
            setattr(self.app.store, name, self._watched(name))

    def _most(self, key: StepKey) -> int:
        activity = next(
            row.activity for row in self.app.store._steps[key.workflow_id].values() if row.key == key
        )
        return UNDO_ATTEMPTS if key.phase is Phase.UNDO else 1001 if "." in activity else ATTEMPTS

    def _watched(self, name: str) -> Any:
        real = getattr(self.app.store, name)

        @functools.wraps(real)
        async def call(*args: Any, **options: Any) -> Any:
            try:
                return await real(*args, **options)
            finally:
                try:
                    self.watch.look(self.app.store, name)
                except AssertionError as exc:  # the engine would take it for its own
                    self.found.append(exc)

        return call

    def observe(self, event: Event) -> None:
        """Note how the run ended, each time."""
        if event.name in ENDS:
            self.ended.append(event.name)

    # -- what steps do

    def _register(self) -> None:
        activity = self.activity

        @activity.execute(retries=self.attempts)
        async def work(ctx: StepContext, how: How) -> str:
            return await self._work(ctx, how)

        @activity.compensate("work", retries=RetryPolicy(attempts=UNDO_ATTEMPTS, base=1.0))
        async def unwork(ctx: StepContext, how: How, output: str) -> None:
            key = StepKey(ctx.workflow_id, ctx.step_id, Phase.UNDO)
            self.executed[key] += 1
            assert output == ctx.step_id
            if how["undo_fails"] < 0 or ctx.attempt <= how["undo_fails"]:
                raise RuntimeError("the undo fails")

        @activity.execute(retries=self.attempts)
        async def bare(ctx: StepContext, how: How) -> str:
            return await self._work(ctx, how)

        @activity.execute()
        async def never(ctx: StepContext) -> None:
            self.found.append(AssertionError(f"{ctx.step_id}, which a failed attempt has added, was done"))

        agent = Agent(FunctionModel(self._respond), name="plan", deps_type=StepContext)
        activity.agent(
            agent,
            prompt="{how}",
            deps=self._note,
            may_add=ItineraryPolicy(allowed=["work", "bare"], max_added=4, max_depth=2),
            retries=self.attempts,
        )

    async def _work(self, ctx: StepContext, how: How) -> str:
        self._note(ctx)
        await ctx.save_variable(f"v_{ctx.step_id}", ctx.step_id)
        key = StepKey(ctx.workflow_id, ctx.step_id)
        if not self.watch.retried and ctx.attempt != 1 + self.failed[key]:
            self.found.append(
                AssertionError(f"attempt {ctx.attempt} of {key}, which has failed {self.failed[key]} times")
            )
        last = ctx.attempt > how["fails"]
        for operation, entries in how["edits"] if last else []:
            steps = () if operation == "terminate" else _steps(entries)
            with contextlib.suppress(PolicyViolation):
                getattr(ctx, operation)(*steps)
        if not last:
            with contextlib.suppress(PolicyViolation):
                ctx.insert("never")
        if how["cancels"] and self.run is not None:
            with contextlib.suppress(InvalidTransition):
                await self.run.cancel("by a step")
        for wait in how["waits"]:
            with contextlib.suppress(WaitTimeout):
                match wait:
                    case "sleep":
                        await ctx.sleep(30)
                    case "ask":
                        await ctx.ask("go on?", timeout=120)
                    case signal:
                        await ctx.wait_for(signal, timeout=90)
        if how["doomed"]:
            raise NonRetryableError("it can't be done")
        if not last:
            self.failed[key] += 1
            raise RuntimeError("it fails")
        return ctx.step_id

    def _note(self, ctx: StepContext) -> StepContext:
        self.executed[StepKey(ctx.workflow_id, ctx.step_id)] += 1
        return ctx

    def _respond(self, messages: list[ModelMessage], _: AgentInfo) -> ModelResponse:
        how = json.loads(str(messages[0].parts[0].content))  # type: ignore[union-attr]
        turn = sum(isinstance(message, ModelResponse) for message in messages)
        if turn == len(how["asks"]):
            return ModelResponse(parts=[TextPart("planned")])
        parts: list[ModelResponsePart] = []
        for tool, entries in how["asks"][turn]:
            steps = [{"activity": entry["kind"], "arguments": {"how": entry["how"]}} for entry in entries]
            arguments = {"reason": "enough"} if tool == "finish_run" else {"steps": steps, "place": tool}
            parts.append(ToolCallPart("finish_run" if tool == "finish_run" else "add_steps", arguments))
        return ModelResponse(parts=parts)

    # -- what is done to the run

    async def play(self, workflow: Workflow, actions: Sequence[str]) -> RunStatus:
        """Have a run done while others act on it; gives how it ended."""
        async with self.app as app:
            self.run = run = await app.dispatch(workflow, {"yes": True}, workflow_id="r")
            for action in actions:
                await app.drain(advance=False)
                await self._act(run, action)
            await app.drain()
            for _ in range(40):
                if await run.status() in RUN_ENDED:
                    break
                for signal in SIGNALS:
                    await run.signal(signal, "late")
                await app.drain()
            judge_end(app.store)
            result = await run.wait(PATIENCE)
        if self.found:
            raise self.found[0]
        retries = len(self.ended) - 1
        assert self.ended[-1:] == [f"run.{result.status.value}"]
        assert retries <= actions.count("retry"), f"it has ended more than once: {self.ended}"
        for key, times in self.executed.items():
            if not retries:  # after an operator's retry it begins anew
                assert times <= 1 + self.watch.went_back.get(key, 0), f"{key} was executed {times} times"
        return result.status

    async def _act(self, run: Run, action: str) -> None:
        with contextlib.suppress(InvalidTransition):  # it has ended, or nobody waits for that
            match action:
                case "cancel":
                    await run.cancel("by somebody")
                case "retry":
                    await run.retry()
                case "answer" | "answer twice":
                    for request in await run.requests():
                        for _ in range(action.count(" ") + 1):
                            await self.app.answer(request.id, "yes")
                case "time":
                    self.app.clock.advance(45)
                case signal:
                    await run.signal(signal, 1)


# -- what may be


def _flattened(entry: dict[str, Any]) -> dict[str, Any]:
    return {**entry, **entry["limits"]}


conditions = st.sampled_from([None, None, None, "yes", "!yes", "yes && true"])


def entries(depth: int) -> st.SearchStrategy[dict[str, Any]]:
    """A step, with those that it adds, which add others down to `depth`."""
    added = st.lists(entries(depth - 1), min_size=1, max_size=2) if depth else st.just([])
    edit = st.tuples(st.sampled_from(["insert", "append", "replace", "terminate"]), added)
    how = st.fixed_dictionaries(
        {
            "fails": st.sampled_from([0] * 8 + [1, 1, 2, ATTEMPTS]),
            "undo_fails": st.sampled_from([0, 0, 0, 0, 1, -1]),
            "edits": st.lists(edit, max_size=2) if depth else st.just([]),
            "waits": st.lists(st.sampled_from(["sleep", "ask", *SIGNALS]), max_size=2),
            "cancels": st.sampled_from([False] * 15 + [True]),
            "doomed": st.just(False),
        }
    )
    work = st.fixed_dictionaries(
        {"kind": st.sampled_from(["work", "work", "work", "bare"]), "when": conditions, "how": how}
    )
    sleep = st.fixed_dictionaries(
        {"kind": st.just("sleep"), "when": conditions, "seconds": st.integers(1, 600)}
    )
    wait: st.SearchStrategy[dict[str, Any]] = st.fixed_dictionaries(
        {
            "kind": st.just("wait"),
            "when": conditions,
            "signal": st.sampled_from(SIGNALS),
            "limits": st.sampled_from(
                [{}, {}, {"timeout": 50}, *[{"timeout": 200, "default": "nobody came"}] * 2]
            ),
        }
    ).map(_flattened)
    if not depth:
        return st.one_of(work, work, sleep, wait)
    ask = st.tuples(st.sampled_from(["next", "end", "finish_run"]), st.lists(work, min_size=1, max_size=3))
    plan = st.fixed_dictionaries(
        {
            "kind": st.just("plan"),
            "when": conditions,
            "how": st.fixed_dictionaries(
                {"asks": st.lists(st.lists(ask, min_size=1, max_size=2), max_size=2)}
            ),
        }
    )
    return st.one_of(work, work, work, work, work, plan, sleep, wait)


policies = st.builds(
    ItineraryPolicy,
    allowed=st.sampled_from([None, None, ["work", "bare", "paigeant.sleep", "paigeant.wait_for", "never"]]),
    max_added=st.none() | st.integers(0, 6),
    max_total=st.just(30),
    max_depth=st.none() | st.integers(0, 2),
    may_remove=st.sampled_from([True, True, False]),
)
DOOM = {"fails": 0, "undo_fails": 0, "edits": [], "waits": [], "cancels": False, "doomed": True}
ENDS_BADLY = {"kind": "bare", "when": None, "how": DOOM}
workflows = st.builds(
    lambda entries, end, policy, deadline, stop: Workflow(
        "w", _steps([*entries, *end]), policy=policy, deadline=deadline, on_compensation_failure=stop
    ),
    # Of a list of any length Hypothesis makes mostly one or two.
    st.integers(1, 5).flatmap(lambda size: st.lists(entries(2), min_size=size, max_size=size)),
    st.sampled_from([[], [ENDS_BADLY]]),
    policies,
    st.sampled_from([None, None, None, None, 200.0]),
    st.sampled_from(["continue", "stop"]),
)
actions = st.lists(
    st.sampled_from([*SIGNALS, *SIGNALS, "answer", "answer twice", "time", "time", "retry", "cancel"]),
    max_size=6,
)


@pytest.mark.parametrize("examples", [short(60), full(5_000)])
def test_the_invariants_hold_whatever_becomes_of_a_run(examples: int) -> None:
    """I1 to I9, I11, I14, I16 and I17 hold at each moment, and the run ends."""
    ends: Counter[str] = Counter()

    @settings(max_examples=examples, phases=[Stage.explicit, Stage.generate, Stage.shrink])
    @given(workflow=workflows, acts=actions)
    def check(workflow: Workflow, acts: list[str]) -> None:
        ends[asyncio.run(World().play(workflow, acts)).value] += 1

    check()
    say(f"{examples} itineraries ended {dict(ends)}")
    assert len(ends) > 1


@pytest.mark.parametrize(
    "name",
    ["claim_without_compare", "undone_first_to_last", "woken_by_nothing", "woken_with_its_attempt_counted"],
)
def test_a_missing_safeguard_is_caught(name: str) -> None:
    """These itineraries find what is wrong with an engine that lacks one."""

    @settings(max_examples=600, phases=[Stage.generate], derandomize=True, database=None)
    @given(workflow=workflows, acts=actions)
    def check(workflow: Workflow, acts: list[str]) -> None:
        asyncio.run(World().play(workflow, acts))

    with mutated(name), pytest.raises(AssertionError):
        check()
