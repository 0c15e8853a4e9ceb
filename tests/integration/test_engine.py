"""Whole runs through Paigeant: dispatched, worked on, broken, put right. On memory, one SQLite file, and Postgres."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterable
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any
from uuid import UUID, uuid4

import pytest
from pydantic import BaseModel, ConfigDict, Field
from tests.patience import PATIENCE

from paigeant import (
    ActivityRegistry,
    ActivityWorker,
    ItineraryPolicy,
    NonRetryableError,
    Paigeant,
    RetryPolicy,
    Run,
    Settings,
    Step,
    StepContext,
    Workflow,
)
from paigeant.clock import LAST_INSTANT
from paigeant.errors import (
    ArgumentError,
    InputInvalid,
    InvalidTransition,
    MessageTooLarge,
    RunConflict,
    RunNotFound,
    RunTimeout,
    UnknownActivity,
    UnknownWorkflow,
)
from paigeant.observer import Around, Event, Work
from paigeant.slip import Phase, StepStatus
from paigeant.store import ClaimRequest, Grant, StepKey, StepResult
from paigeant.testing import ManualClock

AT_ONCE = RetryPolicy(attempts=3, base=0)


TENANT: ContextVar[str] = ContextVar("tenant", default="nobody")


class Seen:
    """An observer that keeps what it was told, and lets a test wait for it."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self._changed = asyncio.Event()

    def observe(self, event: Event) -> None:
        self.events.append(event)
        self._changed.set()

    def names(self, *wanted: str) -> list[str]:
        """The names of the events, of those wanted."""
        return [event.name for event in self.events if not wanted or event.name in wanted]

    async def wait_for(self, name: str, count: int = 1) -> None:
        """Wait until `name` was told `count` times."""
        async with asyncio.timeout(PATIENCE):
            while self.names(name).count(name) < count:
                self._changed.clear()
                await self._changed.wait()


@pytest.fixture(params=["memory://", "sqlite:///p.db", "postgres"], ids=["memory", "sqlite", "postgres"])
def url(request: pytest.FixtureRequest) -> str:
    """Where the runs of a test live: transport and store alike."""
    return str(request.getfixturevalue("postgres_tables") if request.param == "postgres" else request.param)


@pytest.fixture(
    params=["memory://", "sqlite:///p.db", "apart", "postgres"], ids=["memory", "sqlite", "apart", "postgres"]
)
def settings(request: pytest.FixtureRequest) -> Settings:
    """Settings for one file, for memory, for a transport of its own beside the file, and for one Postgres database."""
    urls = ("memory://", "sqlite:///p.db") if request.param == "apart" else (request.param,) * 2
    if request.param == "postgres":
        urls = (request.getfixturevalue("postgres_tables"),) * 2
    return Settings(transport_url=urls[0], store_url=urls[1], retry_base=0.0, sweep_interval=0.05)


@contextlib.asynccontextmanager
async def working(
    settings: Settings,
    activity: ActivityRegistry,
    *,
    workers: int = 1,
    observers: Iterable[Any] = (),
    clock: ManualClock | None = None,
    **options: Any,
) -> AsyncIterator[Paigeant]:
    """An open application with workers for `activity`, which are stopped at the end."""
    async with Paigeant(settings, activities=activity, observers=observers, clock=clock) as app:
        running = [app.worker(**options) for _ in range(workers)]
        tasks = [asyncio.create_task(worker.run()) for worker in running]
        try:
            yield app
        finally:
            for worker in running:
                await worker.stop(grace=PATIENCE)
            await asyncio.gather(*tasks)


async def states(run: Run) -> list[tuple[str, str, str]]:
    """Step, phase and state of each row, in their order."""
    return [(row.step, row.phase.value, row.status.value) for row in (await run.detail()).steps]


async def attempts(run: Run) -> dict[str, int]:
    """The attempts that each step took."""
    return {row.step: row.attempt for row in (await run.detail()).steps if row.phase is Phase.DO}


# -- going forward


async def test_what_an_activity_does_to_its_arguments_is_its_own_affair(settings: Settings) -> None:
    """Further attempts and later steps get the values of the run as they are recorded, wherever they are done."""
    activity = ActivityRegistry()

    @activity.execute(retries=AT_ONCE)
    async def take(order: Any, ctx: StepContext) -> int:
        order["items"].pop()
        if ctx.attempt < 3:
            raise ValueError("once more")
        return len(order["items"])

    @activity.execute()
    def count(**values: Any) -> int:
        return len(values["order"]["items"])

    async with working(settings, activity) as app:
        run = await app.dispatch(Workflow("w", ["take", "count"]), {"order": {"items": [1, 2, 3]}})
        result = await run.wait(timeout=PATIENCE)
    assert result.outputs == {"take": 2, "count": 3}


async def test_a_run_is_done_step_by_step(settings: Settings) -> None:
    """Inputs and outputs of earlier steps reach later ones; the result has the last output and all by step."""
    activity = ActivityRegistry()

    @activity.execute()
    async def double(n: int) -> int:
        return n * 2

    @activity.execute()
    def add(double: int, n: int, more: int = 1) -> int:
        return double + n + more

    async with working(settings, activity) as app:
        workflow = Workflow(
            "w", ["double", "add", Step("add", args={"double": 100}), Step("double", args={"n": 0})]
        )
        result = await (await app.dispatch(workflow, {"n": 5})).wait(PATIENCE)
    assert (result.status, result.output, result.error) == ("completed", 0, None)
    assert result.outputs == {"double": 10, "add": 16, "add_2": 106, "double_2": 0}


class Order(BaseModel):
    sku: str
    price: Decimal
    at: datetime


@dataclass
class Receipt:
    order: Order
    raw: bytes
    ratio: float


async def test_values_keep_their_types_between_steps(settings: Settings) -> None:
    """Models, dataclasses, decimals, bytes, aware datetimes and infinities arrive as they were."""
    activity = ActivityRegistry()
    made = Receipt(
        Order(sku="A", price=Decimal("0.10"), at=datetime(2026, 1, 1, tzinfo=UTC)), b"\x00\xff", float("inf")
    )
    arrived: list[Receipt] = []

    @activity.execute()
    async def make() -> Receipt:
        return made

    @activity.execute()
    async def take(make: Receipt, big: int) -> int:
        arrived.append(make)
        return big

    async with working(settings, activity, concurrency=1) as app:
        workflow = Workflow("w", ["make", "take"])
        result = await (await app.dispatch(workflow, {"big": 2**100})).wait(PATIENCE)
    assert arrived == [made]
    assert result.output == 2**100


async def test_a_workflow_without_steps_completes_at_once(settings: Settings) -> None:
    """Without any worker."""
    async with Paigeant(settings) as app:
        result = await (await app.dispatch(Workflow("w"))).wait(PATIENCE)
    assert (result.status, result.outputs) == ("completed", {})


async def test_many_runs_at_once(settings: Settings) -> None:
    """Hundreds of runs with several workers: each gets its own result, no step is done twice."""
    activity = ActivityRegistry()
    done: list[tuple[str, str]] = []

    @activity.execute()
    async def one(n: int, ctx: StepContext) -> int:
        done.append((ctx.workflow_id, ctx.step_id))
        return n + 1

    @activity.execute()
    async def two(one: int, ctx: StepContext) -> int:
        done.append((ctx.workflow_id, ctx.step_id))
        return one * 2

    async with working(settings, activity, workers=3, concurrency=20) as app:
        workflow = Workflow("w", ["one", "two"])
        runs = await asyncio.gather(*(app.dispatch(workflow, {"n": n}) for n in range(200)))
        results = await asyncio.gather(*(run.wait(PATIENCE) for run in runs))
    assert [result.output for result in results] == [(n + 1) * 2 for n in range(200)]
    assert len(done) == len(set(done)) == 400


async def test_a_false_condition_skips_a_step(settings: Settings) -> None:
    """A step whose `when` is false isn't done; conditions see inputs, earlier outputs, null for what was skipped."""
    activity = ActivityRegistry()

    @activity.execute()
    async def check(quantity: int) -> dict[str, bool]:
        return {"large": quantity > 10}

    @activity.execute()
    async def letter() -> str:
        return "sent"

    workflow = Workflow(
        "w",
        [
            "check",
            Step("letter", id="big", when="check.large"),
            Step("letter", id="any", when="quantity > 1"),
            Step("letter", id="after", when="big == null && any == 'sent'"),
            Step("letter", id="never", when="big != null && big == 'sent'"),
        ],
    )
    async with working(settings, activity) as app:
        run = await app.dispatch(workflow, {"quantity": 2})
        result = await run.wait(PATIENCE)
        assert await states(run) == [
            ("check", "do", "completed"),
            ("big", "do", "skipped"),
            ("any", "do", "completed"),
            ("after", "do", "completed"),
            ("never", "do", "skipped"),
        ]
        assert await attempts(run) == {"check": 1, "big": 0, "any": 1, "after": 1, "never": 0}
    assert result.outputs == {"check": {"large": False}, "any": "sent", "after": "sent"}


async def test_a_condition_that_can_t_be_computed_fails_the_step(settings: Settings) -> None:
    """At its first attempt, with an error that names what is missing."""
    activity = ActivityRegistry()
    activity.execute(name="a")(lambda: 1)
    activity.execute(name="large")(lambda: "x" * 1000)
    settings = settings.model_copy(update={"inline_bytes": 100})
    async with working(settings, activity) as app:
        run = await app.dispatch(Workflow("w", ["large", Step("a", when="nothing > 1")]), {"n": 1})
        result = await run.wait(PATIENCE)
        assert await attempts(run) == {"large": 1, "a": 1}
    assert result.status == "failed"
    assert "names 'nothing'; there is large, n" in str(result.error)


# -- failing


async def test_a_failure_is_tried_again(settings: Settings) -> None:
    """With its attempts counted; what failed before leaves its error only until the step succeeds."""
    activity = ActivityRegistry()

    @activity.execute(retries=AT_ONCE)
    async def flaky(ctx: StepContext) -> int:
        if ctx.attempt < 3:
            raise RuntimeError(f"attempt {ctx.attempt}")
        return ctx.attempt

    async with working(settings, activity) as app:
        run = await app.dispatch(Workflow("w", ["flaky"]))
        result = await run.wait(PATIENCE)
        [row] = (await run.detail()).steps
    assert (result.output, row.attempt, row.error) == (3, 3, None)


async def test_a_wait_between_attempts_is_recorded(settings: Settings) -> None:
    """The step is ready, its not_before is when the next attempt may begin, and its error why."""
    activity = ActivityRegistry()

    @activity.execute(retries=RetryPolicy(attempts=2, base=500, cap=1000, jitter=0))
    async def fail() -> None:
        raise RuntimeError("not now")

    seen = Seen()
    async with working(settings, activity, observers=[seen]) as app:
        before = time.time()
        run = await app.dispatch(Workflow("w", ["fail"]))
        await seen.wait_for("step.retrying")
        [row] = (await run.detail()).steps
        assert (row.status, row.attempt, row.error) == ("ready", 1, "RuntimeError: not now")
        assert before + 500 <= row.not_before <= time.time() + 500
        assert await run.status() == "running"


async def test_the_last_failure_fails_the_run(settings: Settings) -> None:
    """failed: nothing had to be undone. The error has the step, the type and the text."""
    activity = ActivityRegistry()

    @activity.execute(retries=1)
    async def fail() -> None:
        raise KeyError("missing")

    async with working(settings, activity) as app:
        run = await app.dispatch(Workflow("w", [Step("fail", id="f"), "fail"]))
        result = await run.wait(PATIENCE)
        assert await states(run) == [("f", "do", "failed")]
        assert await attempts(run) == {"f": 2}
    assert (result.status, result.output) == ("failed", None)
    assert result.error == "f: KeyError: 'missing'"


@pytest.mark.parametrize(
    "raised",
    [
        NonRetryableError("no use"),
        ArgumentError("wrong"),
        ExceptionGroup(
            "of tasks", [ValueError("passes"), ExceptionGroup("in it", [NonRetryableError("no")])]
        ),
    ],
    ids=["said", "found", "in a group"],
)
async def test_some_failures_are_not_tried_again(settings: Settings, raised: Exception) -> None:
    """What no further attempt can help with fails the step at once."""
    activity = ActivityRegistry()

    @activity.execute(retries=5)
    async def fail() -> None:
        raise raised

    async with working(settings, activity) as app:
        run = await app.dispatch(Workflow("w", ["fail"]))
        assert (await run.wait(PATIENCE)).status == "failed"
        assert await attempts(run) == {"fail": 1}


@pytest.mark.parametrize(
    ("output", "said"),
    [(object(), "can't be written as JSON"), ("x", "isn't what its annotation says")],
    ids=["any", "typed"],
)
async def test_an_output_that_can_t_be_written_fails_the_step(
    settings: Settings, output: Any, said: str
) -> None:
    """For good: another attempt would return the like."""
    activity = ActivityRegistry()

    def give() -> Any:
        return output

    if output == "x":
        give.__annotations__["return"] = int
    activity.execute(retries=5)(give)
    async with working(settings, activity) as app:
        run = await app.dispatch(Workflow("w", ["give"]))
        result = await run.wait(PATIENCE)
        assert await attempts(run) == {"give": 1}
    assert said in str(result.error)


async def test_an_output_that_is_too_large_fails_the_step(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For good, too; so does what `once` gives, and a variable is refused."""
    monkeypatch.setattr("paigeant.codec.LARGEST_BYTES", 1000)
    activity = ActivityRegistry()

    @activity.execute(retries=5)
    def give() -> str:
        return "x" * 1000

    @activity.execute(retries=5)
    async def once(ctx: StepContext) -> None:
        async def large() -> str:
            return "x" * 1000

        await ctx.once("large", large)

    async with working(settings, activity) as app:
        for name in ("give", "once"):
            run = await app.dispatch(Workflow("w", [name]))
            result = await run.wait(PATIENCE)
            assert await attempts(run) == {name: 1}
            assert "1,002 bytes as JSON, at most 1,000 are recorded" in str(result.error)
            with pytest.raises(InputInvalid, match="1,002 bytes"):
                await app.store.save_variable(run.id, "large", "x" * 1000)


async def test_a_missing_argument_fails_a_later_step(settings: Settings) -> None:
    """For good, with the list of what was there."""
    activity = ActivityRegistry()
    activity.execute(name="first")(lambda: 1)

    @activity.execute(retries=5)
    async def second(sku: str) -> None: ...

    async with working(settings, activity) as app:
        run = await app.dispatch(Workflow("w", ["first", "second"]), {"n": 1})
        result = await run.wait(PATIENCE)
        assert await attempts(run) == {"first": 1, "second": 1}
    assert "'second' needs 'sku'" in str(result.error)
    assert "there is: first, n" in str(result.error)


async def test_an_attempt_has_its_time(settings: Settings) -> None:
    """Each attempt that takes longer is a failure; the step's timeout goes before the activity's."""
    activity = ActivityRegistry()

    @activity.execute(timeout=1000.0, retries=AT_ONCE)
    async def slow(ctx: StepContext) -> str:
        if ctx.attempt == 1:
            await asyncio.Event().wait()
        return "done"

    async with working(settings, activity) as app:
        run = await app.dispatch(Workflow("w", [Step("slow", timeout=0.01)]))
        result = await run.wait(PATIENCE)
        assert await attempts(run) == {"slow": 2}
    assert result.output == "done"


async def test_a_timeout_says_how_long_it_was(settings: Settings) -> None:
    """The error has the seconds."""
    activity = ActivityRegistry()

    @activity.execute(timeout=0.01, retries=0)
    async def slow() -> None:
        await asyncio.Event().wait()

    async with working(settings, activity) as app:
        result = await (await app.dispatch(Workflow("w", ["slow"]))).wait(PATIENCE)
    assert result.error == "slow: TimeoutError: the attempt took longer than 0.01 s"


async def test_a_timeout_is_told_also_where_the_activity_makes_another_error_of_it(
    settings: Settings,
) -> None:
    """As task groups within `except*` do, and clients that tell a broken connection."""
    activity = ActivityRegistry()

    @activity.execute(retries=0, timeout=0.05)
    async def late() -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError as exc:
            raise ConnectionError("broken") from exc

    async with working(settings, activity) as app:
        result = await (await app.dispatch(Workflow("w", ["late"]))).wait(PATIENCE)
    assert result.error == "late: ConnectionError: broken; the attempt took longer than 0.05 s"


async def test_a_timeout_of_the_activity_s_own_is_its_own(settings: Settings) -> None:
    """A TimeoutError that the activity raises isn't taken for the step's."""
    activity = ActivityRegistry()

    @activity.execute(timeout=1000.0, retries=0)
    async def ask() -> None:
        raise TimeoutError("the bank did not answer")

    async with working(settings, activity) as app:
        result = await (await app.dispatch(Workflow("w", ["ask"]))).wait(PATIENCE)
    assert result.error == "ask: TimeoutError: the bank did not answer"


async def test_a_run_has_its_deadline(settings: Settings, clock: ManualClock) -> None:
    """A run that isn't done by then fails while its step is still under way, and what was done is undone."""
    activity = ActivityRegistry()
    began = asyncio.Event()
    ended: list[str] = []

    activity.execute(name="first")(lambda: 1)
    activity.compensate("first")(lambda: ended.append("undone"))

    @activity.execute(retries=50)
    async def slow() -> None:
        began.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.append("interrupted")

    settings = settings.model_copy(update={"lease": 1000.0, "heartbeat": 0.05})
    async with working(settings, activity, clock=clock) as app:
        run = await app.dispatch(Workflow("w", ["first", "slow"], deadline=60))
        await asyncio.wait_for(began.wait(), PATIENCE)
        clock.advance(60)
        result = await run.wait(PATIENCE)
    assert result.status == "compensated"
    assert "deadline" in str(result.error)
    assert sorted(ended) == ["interrupted", "undone"]


async def test_a_deadline_is_a_date(settings: Settings) -> None:
    """Also that of a run that is to start when somebody says so, at the last date that there is."""
    async with Paigeant(settings) as app:
        never = datetime.max.replace(tzinfo=UTC)
        run = await app.dispatch(Workflow("w", ["a"], deadline=60), start_at=never)
        assert (await run.detail()).run.deadline == LAST_INSTANT


class Unspeakable(Exception):
    """An error whose text can't be had."""

    def __str__(self) -> str:
        raise SystemExit(3)


def nested(depth: int) -> Exception:
    """Groups within groups, as recursion through task groups leaves them."""
    error = Exception("the innermost")
    for _ in range(depth):
        error = ExceptionGroup("nested", [error])
    return error


@pytest.mark.parametrize(
    "raised",
    [SystemExit(3), asyncio.CancelledError("mine"), GeneratorExit(), Unspeakable(), nested(2000)],
    ids=["exit", "cancelled", "generator exit", "without a text", "nested groups"],
)
async def test_whatever_an_activity_raises_is_its_failure(settings: Settings, raised: Any) -> None:
    """What escapes from user code, an exit or a cancellation too, ends the step, not the worker."""
    activity = ActivityRegistry()

    @activity.execute(retries=0)
    async def odd() -> None:
        raise raised

    activity.execute(name="fine")(lambda: "fine")
    async with working(settings, activity) as app:
        result = await (await app.dispatch(Workflow("w", ["odd"]))).wait(PATIENCE)
        assert result.status == "failed"
        assert type(raised).__name__ in str(result.error)
        assert (await (await app.dispatch(Workflow("v", ["fine"]))).wait(PATIENCE)).output == "fine"


# -- revising the itinerary


def revising() -> ActivityRegistry:
    """Activities that note their step ids; `plan` revises the itinerary as its arguments say."""
    activity = ActivityRegistry()

    @activity.execute(retries=AT_ONCE)
    async def plan(ctx: StepContext, how: str, fails: int = 0, adds: list[str] | None = None) -> str:
        steps = adds or ["note"]
        if how == "terminate":
            ctx.terminate()
        else:
            getattr(ctx, how)(*steps)
        await ctx.save_variable("tried", ctx.attempt)
        if ctx.attempt <= fails:
            raise RuntimeError("after all")
        return ctx.step_id

    @activity.execute()
    async def note(ctx: StepContext) -> str:
        return ctx.step_id

    return activity


@pytest.mark.parametrize(
    ("how", "order"),
    [
        ("insert", ["plan", "plan.1", "note"]),
        ("append", ["plan", "note", "plan.1"]),
        ("replace", ["plan", "plan.1"]),
        ("terminate", ["plan"]),
    ],
)
async def test_a_step_may_revise_what_is_left(settings: Settings, how: str, order: list[str]) -> None:
    """By inserting, appending, replacing and terminating; an early end is a success."""
    async with working(settings, revising()) as app:
        run = await app.dispatch(Workflow("w", ["plan", "note"]), {"how": how})
        result = await run.wait(PATIENCE)
        assert [step for step, _, _ in await states(run)] == order
    assert result.status == "completed"
    assert result.outputs == {step: step for step in order}


async def test_an_attempt_that_fails_leaves_no_revision(settings: Settings) -> None:
    """The steps of the attempt that succeeded are added once, with the same ids as ever; so are its variables."""
    async with working(settings, revising()) as app:
        run = await app.dispatch(
            Workflow("w", ["plan"]), {"how": "insert", "fails": 2, "adds": ["note", "note"]}
        )
        result = await run.wait(PATIENCE)
        assert list(result.outputs) == ["plan", "plan.1", "plan.2"]
        assert await app.store.list_variables(run.id) == {"tried": 3}


async def test_a_step_that_was_added_may_add_steps(settings: Settings) -> None:
    """Their ids tell who added whom."""
    async with working(settings, revising()) as app:
        workflow = Workflow("w", [Step("plan", args={"how": "insert", "adds": ["plan"]})])
        run = await app.dispatch(workflow, {"how": "append"})
        result = await run.wait(PATIENCE)
    assert list(result.outputs) == ["plan", "plan.1", "plan.1.1"]


@pytest.mark.parametrize(
    ("policy", "said"),
    [
        (ItineraryPolicy(allowed=("plan",)), "'note' may not be added"),
        (ItineraryPolicy(max_added=1), "2 added steps"),
        (ItineraryPolicy(max_total=2), "3 steps in all"),
    ],
)
async def test_a_revision_keeps_to_the_policy(settings: Settings, policy: ItineraryPolicy, said: str) -> None:
    """A step that goes beyond it fails for good, and nothing is added."""
    async with working(settings, revising()) as app:
        run = await app.dispatch(
            Workflow("w", ["plan"], policy=policy), {"how": "insert", "adds": ["note", "note"]}
        )
        result = await run.wait(PATIENCE)
        assert await states(run) == [("plan", "do", "failed")]
        assert await attempts(run) == {"plan": 1}
    assert said in str(result.error)


async def test_the_policy_counts_over_the_whole_run(settings: Settings) -> None:
    """Steps that an earlier step added count for a later one, whichever worker does it."""
    async with working(settings, revising(), workers=2) as app:
        workflow = Workflow("w", ["plan", Step("plan", id="again")], policy=ItineraryPolicy(max_added=1))
        result = await (await app.dispatch(workflow, {"how": "append"})).wait(PATIENCE)
    assert result.status == "failed"
    assert "2 added steps" in str(result.error)


# -- undoing


class Shop:
    """Activities that can be undone, and the order of what was undone."""

    def __init__(self, *stuck: str, retries: int = 0) -> None:
        self.activity = ActivityRegistry()
        self.stuck = set(stuck)
        self.undone: list[tuple[str, Any]] = []
        for name in ("a", "b", "c"):
            self.activity.execute(name=name)(lambda name=name: {"did": name})
            self.activity.compensate(name, retries=RetryPolicy(attempts=retries + 1, base=0))(
                self._undo(name)
            )

        @self.activity.execute(retries=0)
        async def fail() -> None:
            raise RuntimeError("no")

    def _undo(self, name: str) -> Any:
        async def undo(output: dict[str, str], ctx: StepContext) -> None:
            if name in self.stuck:
                raise RuntimeError(f"{name} is stuck")
            self.undone.append((ctx.step_id, output))

        return undo


async def test_a_failed_run_is_undone_backwards(settings: Settings) -> None:
    """Last recorded step first, each with what it returned; the failing step and steps without an undo aren't."""
    shop = Shop()
    shop.activity.execute(name="plain")(lambda: 1)
    workflow = Workflow("w", ["a", "plain", Step("b", when="false"), Step("a", id="x"), "c", "fail", "b"])
    async with working(settings, shop.activity) as app:
        run = await app.dispatch(workflow)
        result = await run.wait(PATIENCE)
        shown = await states(run)
    assert result.status == "compensated"
    assert result.error == "fail: RuntimeError: no"
    assert shop.undone == [("c", {"did": "c"}), ("x", {"did": "a"}), ("a", {"did": "a"})]
    assert shown == [
        ("a", "do", "compensated"),
        ("plain", "do", "completed"),
        ("b", "do", "skipped"),
        ("x", "do", "compensated"),
        ("c", "do", "compensated"),
        ("fail", "do", "failed"),
        ("c", "undo", "compensated"),
        ("x", "undo", "compensated"),
        ("a", "undo", "compensated"),
    ]


async def test_an_undo_is_retried_by_its_own_settings(settings: Settings) -> None:
    """Not by those of the step that it undoes."""
    activity = ActivityRegistry()
    tried: list[tuple[int, str]] = []

    activity.execute(name="a", retries=0)(lambda: 1)

    @activity.compensate("a", retries=AT_ONCE)
    async def undo(ctx: StepContext) -> None:
        tried.append((ctx.attempt, ctx.idempotency_key))
        if ctx.attempt < 3:
            raise RuntimeError("not yet")

    @activity.execute(retries=0)
    async def fail() -> None:
        raise RuntimeError("no")

    async with working(settings, activity) as app:
        result = await (await app.dispatch(Workflow("w", ["a", "fail"]), workflow_id="r")).wait(PATIENCE)
    assert result.status == "compensated"
    assert tried == [(1, "r:a:undo"), (2, "r:a:undo"), (3, "r:a:undo")]


@pytest.mark.parametrize("gives", ["what is no JSON", "a coroutine", "a generator"])
async def test_what_an_undo_gives_goes_nowhere(settings: Settings, gives: str) -> None:
    """So it may be anything, as the answer of a client; but for what has still to be run: nothing is undone yet."""
    activity = ActivityRegistry()

    activity.execute(name="a")(lambda: 1)

    async def later() -> None: ...

    @activity.compensate("a", retries=0)
    async def undo() -> Any:
        return {"a coroutine": later, "a generator": lambda: (each for each in [1])}.get(gives, object)()

    @activity.execute(retries=0)
    async def fail() -> None:
        raise RuntimeError("no")

    async with working(settings, activity) as app:
        run = await app.dispatch(Workflow("w", ["a", "fail"]))
        status = (await run.wait(PATIENCE)).status
        error = (await run.detail()).steps[-1].error or ""
    if gives == "what is no JSON":
        assert (status, error) == ("compensated", "")
    else:
        assert status == "compensation_failed"
        assert error.startswith("OutputInvalid: activity 'a' returned")


@pytest.mark.parametrize("revise", ["insert", "append", "replace", "terminate"])
async def test_an_undo_can_revise_nothing(settings: Settings, revise: str) -> None:
    """A run that is undone does nothing more: an undo that adds steps fails, since they would never be done."""
    activity = ActivityRegistry()

    @activity.execute()
    async def work() -> None:
        pass

    @activity.compensate("work")
    async def undo(ctx: StepContext) -> None:
        assert ctx.remaining == ()
        getattr(ctx, revise)(*([] if revise == "terminate" else ["work"]))

    @activity.execute()
    async def fail() -> None:
        raise NonRetryableError("no")

    async with working(settings, activity) as app:
        run = await app.dispatch(Workflow("w", ["work", "fail", "work"]))
        assert (await run.wait(PATIENCE)).status == "compensation_failed"
        error = (await run.detail()).steps[-1].error
    said = "step 'work' is being undone: the run does nothing more that could be revised"
    assert error == f"PolicyViolation: {said}"


@pytest.mark.parametrize(("rule", "undone"), [("continue", ["c", "a"]), ("stop", ["c"])])
async def test_an_undo_that_fails_for_good(settings: Settings, rule: Any, undone: list[str]) -> None:
    """The others are undone or not, as the workflow says; a retry goes on with what is left."""
    shop = Shop("b")
    workflow = Workflow("w", ["a", "b", "c", "fail"], on_compensation_failure=rule)
    async with working(settings, shop.activity) as app:
        run = await app.dispatch(workflow)
        assert (await run.wait(PATIENCE)).status == "compensation_failed"
        assert [step for step, _ in shop.undone] == undone
        shop.stuck.clear()
        assert await run.retry() == "compensating"
        result = await run.wait(PATIENCE)
    assert result.status == "compensated"
    assert result.error is not None, "it was undone for the same reason as before"
    assert result.error.startswith("fail: ")
    assert [step for step, _ in shop.undone] == ["c", "a", "b"] if rule == "continue" else ["c", "b", "a"]


async def test_a_failed_run_can_be_taken_up(settings: Settings) -> None:
    """From the step that failed, with fresh attempts; what was recorded isn't done again."""
    activity = ActivityRegistry()
    broken = True
    done: list[str] = []

    @activity.execute()
    async def first() -> int:
        done.append("first")
        return 1

    @activity.execute(retries=AT_ONCE)
    async def second(first: int, ctx: StepContext) -> int:
        done.append(f"second {ctx.attempt}")
        if broken:
            raise RuntimeError("no")
        return first + 1

    async with working(settings, activity) as app:
        run = await app.dispatch(Workflow("w", ["first", "second"]))
        assert (await run.wait(PATIENCE)).status == "failed"
        broken = False
        assert await run.retry() == "running"
        assert (await run.wait(PATIENCE)).output == 2
    assert done == ["first", "second 1", "second 2", "second 3", "second 1"]


# -- cancelling


async def test_a_running_step_is_cancelled(settings: Settings) -> None:
    """Cancelling a run interrupts its step, undoes what was done, and leaves the worker fit for others."""
    shop = Shop()
    began, interrupted = asyncio.Event(), asyncio.Event()

    @shop.activity.execute()
    async def slow() -> None:
        began.set()
        try:
            await asyncio.Event().wait()
        finally:
            interrupted.set()

    async with working(settings, shop.activity) as app:
        run = await app.dispatch(Workflow("w", ["a", "slow", "b"]))
        await asyncio.wait_for(began.wait(), PATIENCE)
        assert await run.cancel("not wanted") == "compensating"
        result = await run.wait(PATIENCE)
        await asyncio.wait_for(interrupted.wait(), PATIENCE)
        assert (result.status, result.error) == ("cancelled", "not wanted")
        assert await states(run) == [
            ("a", "do", "compensated"),
            ("slow", "do", "failed"),
            ("a", "undo", "compensated"),
        ]
        assert (await (await app.dispatch(Workflow("v", ["b"]))).wait(PATIENCE)).status == "completed"
    assert [step for step, _ in shop.undone] == ["a"]


async def test_a_cancelled_run_takes_no_result(settings: Settings) -> None:
    """A step that doesn't let itself be interrupted may finish: what it returns comes too late."""
    activity = ActivityRegistry()
    began, go = asyncio.Event(), asyncio.Event()
    seen = Seen()

    @activity.execute()
    async def stubborn() -> str:
        began.set()
        while not go.is_set():
            with contextlib.suppress(asyncio.CancelledError):
                await go.wait()
        return "too late"

    async with working(settings, activity, observers=[seen]) as app:
        run = await app.dispatch(Workflow("w", ["stubborn"]))
        await asyncio.wait_for(began.wait(), PATIENCE)
        assert await run.cancel() == "cancelled"
        go.set()
        await seen.wait_for("step.lost")
        result = await run.wait(PATIENCE)
    assert (result.status, result.outputs) == ("cancelled", {})


async def test_a_run_can_be_cancelled_before_anybody_works_on_it(settings: Settings) -> None:
    """It is cancelled at once; asked again it says that it has ended."""
    async with Paigeant(settings) as app:
        run = await app.dispatch(Workflow("w", ["a"]))
        assert await run.cancel() == "cancelled"
        with pytest.raises(InvalidTransition, match="cancelled"):
            await run.cancel()
        assert (await run.wait(PATIENCE)).status == "cancelled"


# -- what is too large


async def test_a_large_output_stays_in_the_store(settings: Settings) -> None:
    """It is fetched where it is used: by a step, by a condition's neighbour, by an undo, and by the result."""
    activity = ActivityRegistry()
    undone: list[int] = []

    @activity.execute()
    async def make(size: int) -> str:
        return "x" * size

    @activity.compensate("make")
    async def unmake(output: str) -> None:
        undone.append(len(output))

    @activity.execute()
    async def measure(make: str) -> int:
        return len(make)

    @activity.execute(retries=0)
    async def fail(measure: int) -> None:
        raise RuntimeError("no")

    settings = settings.model_copy(update={"inline_bytes": 1000, "max_message_bytes": 4096})
    async with working(settings, activity, workers=2) as app:
        for size in (999, 1001, 100_000):
            workflow = Workflow("w", ["make", "measure", Step("measure", id="n", when="make != ''"), "fail"])
            result = await (await app.dispatch(workflow, {"size": size})).wait(PATIENCE)
            assert result.status == "compensated"
            assert len(result.outputs["make"]) == size
            assert (result.outputs["measure"], result.outputs["n"]) == (size, size)
    assert undone == [999, 1001, 100_000]


async def test_many_small_outputs_may_outgrow_a_message(settings: Settings) -> None:
    """When the payload as a whole is too large to travel it is read from the store."""
    activity = ActivityRegistry()

    @activity.execute()
    async def make() -> str:
        return "x" * 900

    @activity.execute()
    async def count(**rest: Any) -> int:
        return sum(len(value) for value in rest.values())

    settings = settings.model_copy(update={"inline_bytes": 1000, "max_message_bytes": 4096, "local_steps": 1})
    async with working(settings, activity, workers=2) as app:
        run = await app.dispatch(Workflow("w", [*["make"] * 8, "count"]))
        assert (await run.wait(PATIENCE)).output == 8 * 900


async def test_what_is_dispatched_can_travel_to_the_end(settings: Settings) -> None:
    """What is done takes more room in a slip than what is to do: a dispatch that leaves too little is refused."""
    activity = ActivityRegistry()
    done: Counter[tuple[str, str]] = Counter()

    def register(name: str) -> None:
        @activity.execute(name, topic=f"{name}-{'t' * 100}")
        async def work(ctx: StepContext) -> None:
            done[ctx.workflow_id, ctx.step_id] += 1
            if name == "last":
                raise NonRetryableError("turn round")

        @activity.compensate(name)
        async def undo() -> None: ...

    names = [*(f"step-{number}" for number in range(6)), "last"]
    for name in names:
        register(name)
    workflow = Workflow("w", names)
    settings = settings.model_copy(update={"max_message_bytes": 4096, "local_steps": 1})
    async with working(settings, activity, workers=2) as app:
        fits, too_large = 0, 4096
        while too_large - fits > 1:
            size = (fits + too_large) // 2
            try:
                await app.dispatch(workflow, headers={"x": "h" * size}, workflow_id=f"r{size}")
                fits = size
            except MessageTooLarge:
                too_large = size
        assert fits > 1024  # no more is kept free than is needed
        assert (await app.run(f"r{fits}").wait(PATIENCE)).status == "compensated"
    assert set(done.values()) == {1}


async def test_a_step_is_done_once_also_where_no_message_can_follow(
    settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    """A worker with a lower limit than the dispatcher's records what it did; with a higher one the run goes on."""
    activity = ActivityRegistry()
    done: list[str] = []

    @activity.execute()
    async def first() -> None:
        done.append("first")
        envelope.limit_bytes = 100

    @activity.execute()
    async def second() -> None:
        done.append("second")

    settings = settings.model_copy(update={"grace": 0.1, "local_steps": 1})
    async with working(settings, activity) as app:
        envelope = app.worker().executor.forwarder.envelope
        run = await app.dispatch(Workflow("w", ["first", "second"]))
        async with asyncio.timeout(PATIENCE):
            while "too_large" not in caplog.text:  # noqa: ASYNC110  # nothing else tells
                await asyncio.sleep(0.01)
        envelope.limit_bytes = 8192
        assert (await run.wait(PATIENCE)).status == "completed"
    assert done == ["first", "second"]


async def test_a_step_is_told_to_be_lost_for_its_last_attempt(settings: Settings) -> None:
    """Those before it may have failed by themselves: nobody is to look for workers that all died."""
    activity = ActivityRegistry()

    @activity.execute(retries=1)
    async def work() -> None:
        raise AssertionError("there is no attempt left")

    key = StepKey("r", "work")
    async with Paigeant(settings, activities=activity) as app:
        run = await app.dispatch(Workflow("w", ["work"]), workflow_id="r")
        first = await app.store.claim_step(ClaimRequest(key, "lost", 2))
        assert isinstance(first, Grant)
        failed = StepResult(key, "lost", first.epoch, first.attempt, StepStatus.READY, error="ValueError: no")
        await app.store.record_step_result(failed)
        await app.store.claim_step(ClaimRequest(key, "lost", 2))
        worker = app.worker()
        working = asyncio.create_task(worker.run())
        result = await run.wait(PATIENCE)
        await worker.stop()
        await working
    assert (
        result.error == "work: WorkerLost: attempt 2 was the last one, and didn't come back: its worker died"
    )


# -- variables, units, keys


async def test_variables_reach_later_steps(settings: Settings) -> None:
    """As arguments and through the context; an output goes before a variable of its name."""
    activity = ActivityRegistry()

    @activity.execute()
    async def save(ctx: StepContext) -> str:
        await ctx.save_variable("colour", "red")
        await ctx.save_variable("save", "hidden")
        return "output"

    @activity.execute()
    async def load(colour: str, save: str, ctx: StepContext) -> list[Any]:
        return [colour, save, await ctx.load_variable("colour"), await ctx.load_variable("none", 0)]

    async with working(settings, activity) as app:
        result = await (await app.dispatch(Workflow("w", ["save", "load"]), {"colour": "blue"})).wait(
            PATIENCE
        )
    assert result.output == ["red", "output", "red", 0]


@pytest.mark.parametrize("local_steps", [1, 50], ids=["by message", "at once"])
async def test_variables_of_an_undo_reach_later_undos(settings: Settings, local_steps: int) -> None:
    """Like those of a step: as arguments and through the context; those of an attempt that fails don't."""
    activity = ActivityRegistry()
    seen: list[Any] = []

    activity.execute(name="pay")(lambda: 1)
    activity.execute(name="ship")(lambda: 2)

    @activity.compensate("ship", retries=AT_ONCE)
    async def take_back(ctx: StepContext) -> None:
        await ctx.save_variable("refund", ctx.attempt)
        if ctx.attempt == 1:
            raise RuntimeError("not yet")

    @activity.compensate("pay")
    async def pay_back(output: int, refund: int, ctx: StepContext) -> None:
        seen.extend([output, refund, await ctx.load_variable("refund")])

    @activity.execute(retries=0)
    async def fail() -> None:
        raise RuntimeError("no")

    settings = settings.model_copy(update={"local_steps": local_steps})
    async with working(settings, activity) as app:
        result = await (await app.dispatch(Workflow("w", ["pay", "ship", "fail"]))).wait(PATIENCE)
    assert (result.status, seen) == ("compensated", [1, 2, 2])


async def test_a_plain_function_may_ask_its_context_in_an_event_loop_of_its_own(settings: Settings) -> None:
    """As what `agent.run_sync` calls does: variables and units come from the worker's loop all the same."""
    activity = ActivityRegistry()

    @activity.execute()
    async def save(ctx: StepContext) -> None:
        await ctx.save_variable("colour", "red")

    @activity.execute(retries=0)
    def load(ctx: StepContext) -> list[Any]:
        async def look() -> list[Any]:
            return [await ctx.load_variable("colour"), await ctx.once("five", lambda: 5)]

        return asyncio.run(look())

    async with working(settings, activity) as app:
        result = await (await app.dispatch(Workflow("w", ["save", "load"]))).wait(PATIENCE)
    assert (result.output, result.error) == (["red", 5], None)


async def test_once_is_done_once_over_all_attempts(settings: Settings) -> None:
    """A unit of work that was recorded isn't repeated when its step is; the key for outside systems is the same."""
    activity = ActivityRegistry()
    charged: list[str] = []
    keys: set[str] = set()

    @activity.execute(retries=AT_ONCE)
    async def pay(ctx: StepContext) -> str:
        keys.add(ctx.idempotency_key)

        async def charge() -> str:
            charged.append("5")
            return f"receipt {len(charged)}"

        receipt = await ctx.once("charge", charge)
        if ctx.attempt < 3:
            raise RuntimeError("after the charge")
        return str(receipt)

    async with working(settings, activity) as app:
        result = await (await app.dispatch(Workflow("w", ["pay"]), workflow_id="r")).wait(PATIENCE)
    assert (result.output, charged, keys) == ("receipt 1", ["5"], {"r:pay"})


async def test_no_two_steps_of_a_run_have_one_key(settings: Settings) -> None:
    """Also where one is called like the undo of another: whoever is asked for both would take them for one."""
    activity = ActivityRegistry()
    keys: list[str] = []

    @activity.execute(name="pay")
    async def pay(ctx: StepContext) -> None:
        keys.append(ctx.idempotency_key)

    @activity.compensate("pay")
    async def pay_back(ctx: StepContext) -> None:
        keys.append(ctx.idempotency_key)

    @activity.execute(retries=0)
    async def fail() -> None:
        raise RuntimeError("no")

    names = ["pay", "pay:undo", "pay%3Aundo"]
    workflow = Workflow("w", [*(Step("pay", id=name) for name in names), "fail"])
    async with working(settings, activity) as app:
        await (await app.dispatch(workflow, workflow_id="r")).wait(PATIENCE)
    assert keys[0] == "r:pay"
    assert len(set(keys)) == len(keys) == 2 * len(names)


async def test_the_context_tells_where_it_is(settings: Settings) -> None:
    """Run, workflow, step, activity, attempt, ids, and the deadline as an aware datetime."""
    activity = ActivityRegistry()

    @activity.execute()
    def tell(ctx: StepContext) -> list[Any]:
        aware = ctx.deadline is not None and ctx.deadline.tzinfo is not None
        return [
            ctx.workflow_id,
            ctx.workflow,
            ctx.step_id,
            ctx.activity,
            ctx.attempt,
            ctx.correlation_id,
            aware,
        ]

    async with working(settings, activity) as app:
        workflow = Workflow("w", [Step("tell", id="t")], deadline=60)
        run = await app.dispatch(workflow, workflow_id="r", correlation_id="order 7")
        assert (await run.wait(PATIENCE)).output == ["r", "w", "t", "tell", 1, "order 7", True]


async def test_what_a_step_sets_in_its_context_ends_with_it(settings: Settings) -> None:
    """A context variable is the attempt's own: no step, attempt or undo behind it finds what another one set."""
    activity = ActivityRegistry()
    found: list[str] = []

    async def set_it() -> None:
        found.append(TENANT.get())
        TENANT.set("somebody")
        await asyncio.sleep(0)
        found.append(TENANT.get())

    @activity.execute()
    async def first() -> None:
        await set_it()

    @activity.compensate("first")
    async def undo() -> None:
        await set_it()

    @activity.execute()
    def second() -> None:
        asyncio.run(set_it())

    @activity.execute(retries=RetryPolicy(attempts=2, base=0))
    async def third() -> None:
        await set_it()
        raise RuntimeError("for good")

    async with working(settings, activity) as app:
        result = await (await app.dispatch(Workflow("w", ["first", "second", "third"]))).wait(PATIENCE)
    assert (result.status, found) == ("compensated", ["nobody", "somebody"] * 5)


# -- bounds


async def test_an_activity_s_own_bound_holds(settings: Settings) -> None:
    """No more of it at once than it allows, while other activities go on beside it."""
    activity = ActivityRegistry()
    at_once = {"narrow": 0, "wide": 0}
    most = dict(at_once)
    full = asyncio.Event()

    async def enter(name: str) -> None:
        at_once[name] += 1
        most[name] = max(most[name], at_once[name])
        if at_once["wide"] == 10:
            full.set()
        await full.wait()
        await asyncio.sleep(0)
        at_once[name] -= 1

    @activity.execute(concurrency=2)
    async def narrow() -> None:
        await enter("narrow")

    @activity.execute()
    async def wide() -> None:
        await enter("wide")

    async with working(settings, activity, concurrency=20) as app:
        workflows = [Workflow("w", ["narrow", "narrow"])] * 10 + [Workflow("v", ["wide", "narrow"])] * 10
        runs = [await app.dispatch(workflow) for workflow in workflows]
        results = await asyncio.gather(*(run.wait(PATIENCE) for run in runs))
    assert {result.status for result in results} == {"completed"}
    assert most == {"narrow": 2, "wide": 10}


async def test_a_worker_does_no_more_than_its_bound(settings: Settings) -> None:
    """Over all activities."""
    activity = ActivityRegistry()
    now = most = 0

    @activity.execute()
    async def work() -> None:
        nonlocal now, most
        now += 1
        most = max(most, now)
        await asyncio.sleep(0.001)
        now -= 1

    async with working(settings, activity, concurrency=3) as app:
        runs = [await app.dispatch(Workflow("w", ["work", "work"])) for _ in range(20)]
        await asyncio.gather(*(run.wait(PATIENCE) for run in runs))
    assert most == 3


# -- stopping


async def test_a_stop_lets_steps_finish(settings: Settings) -> None:
    """Within the grace time what is under way is done and recorded; nothing more is begun."""
    activity = ActivityRegistry()
    began, go = asyncio.Event(), asyncio.Event()
    done: list[str] = []

    @activity.execute()
    async def slow(ctx: StepContext) -> str:
        began.set()
        await go.wait()
        done.append(ctx.step_id)
        return "done"

    async with Paigeant(settings, activities=activity) as app:
        worker = app.worker()
        working = asyncio.create_task(worker.run())
        run = await app.dispatch(Workflow("w", [Step("slow", id="x"), Step("slow", id="y")]))
        await asyncio.wait_for(began.wait(), PATIENCE)
        stopping = asyncio.create_task(worker.stop(grace=PATIENCE))
        await asyncio.sleep(0)
        go.set()
        await stopping
        await working
        assert done == ["x"]
        assert await states(run) == [("x", "do", "completed"), ("y", "do", "ready")]
        second = app.worker()
        working = asyncio.create_task(second.run())
        assert (await run.wait(PATIENCE)).status == "completed"
        await second.stop()
        await working


async def test_a_stop_ends_what_has_lost_its_cancel(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A library beneath may swallow a cancel, and its loop go on: it is cancelled until it has ended."""
    lost: list[str] = []

    async def forgetful() -> None:
        while len(lost) < 2:
            try:
                await asyncio.get_running_loop().create_future()
            except asyncio.CancelledError:
                lost.append("a cancel")
        await asyncio.get_running_loop().create_future()

    async with Paigeant(settings, activities=ActivityRegistry()) as app:
        worker = app.worker()
        monkeypatch.setattr(worker.sweeper, "run", forgetful)
        working = asyncio.create_task(worker.run())
        await asyncio.sleep(0)
        async with asyncio.timeout(PATIENCE):
            await worker.stop()
            await working
    assert len(lost) == 2


async def test_a_stop_gives_back_what_it_cuts_short(settings: Settings) -> None:
    """After the grace time a step is interrupted: it is free at once and its attempt doesn't count."""
    activity = ActivityRegistry()
    began = asyncio.Event()
    tried: list[int] = []

    @activity.execute(retries=0)
    async def slow(ctx: StepContext) -> str:
        tried.append(ctx.attempt)
        began.set()
        if len(tried) == 1:
            await asyncio.Event().wait()
        return "done"

    async with Paigeant(settings, activities=activity) as app:
        first = app.worker()
        working = asyncio.create_task(first.run())
        run = await app.dispatch(Workflow("w", ["slow"]))
        await asyncio.wait_for(began.wait(), PATIENCE)
        await first.stop(grace=0)
        await working
        [row] = (await run.detail()).steps
        assert (row.status, row.attempt, row.worker) == ("ready", 0, None)
        second = app.worker()
        working = asyncio.create_task(second.run())
        assert (await run.wait(PATIENCE)).output == "done"
        await second.stop()
        await second.stop()
        await working
    assert tried == [1, 1]


async def test_a_worker_may_stop_when_idle(settings: Settings) -> None:
    """Until idle means until no step waits in its topics: retries are waited for, others' steps aren't."""
    activity = ActivityRegistry()

    @activity.execute(retries=RetryPolicy(attempts=2, base=0.05))
    async def flaky(ctx: StepContext) -> None:
        if ctx.attempt == 1:
            raise RuntimeError("once")

    async with Paigeant(settings, activities=activity) as app:
        run = await app.dispatch(Workflow("w", ["flaky"]))
        other = await app.dispatch(Workflow("v", ["elsewhere"]))
        await asyncio.wait_for(app.worker().run(until_idle=True), PATIENCE)
        assert (await run.status(), await other.status()) == ("completed", "pending")


# -- who does what


async def test_a_step_of_others_is_left_to_them(settings: Settings) -> None:
    """A step whose activity nobody here knows waits for a worker that does."""
    mine, others = ActivityRegistry(), ActivityRegistry()
    mine.execute(name="a")(lambda: "mine")
    others.execute(name="b")(lambda a: f"{a} and theirs")
    seen = Seen()
    async with Paigeant(settings, activities=mine, observers=[seen]) as app:
        worker = app.worker(mine)
        tasks = [asyncio.create_task(worker.run())]
        run = await app.dispatch(Workflow("w", ["a", "b"]))
        await seen.wait_for("step.completed")
        assert (await states(run))[-1] == ("b", "do", "ready")
        other = app.worker(others)
        tasks.append(asyncio.create_task(other.run()))
        assert (await run.wait(PATIENCE)).output == "mine and theirs"
        await worker.stop()
        await other.stop()
        await asyncio.gather(*tasks)


async def test_steps_go_to_their_topics(settings: Settings) -> None:
    """The step's topic goes before the activity's; a worker can be limited to some topics."""
    activity = ActivityRegistry()
    done: list[tuple[str, str]] = []

    @activity.execute(topic="slow-lane")
    async def work(ctx: StepContext) -> None:
        done.append((ctx.step_id, "done"))

    async with Paigeant(settings, activities=activity) as app:
        run = await app.dispatch(Workflow("w", ["work", Step("work", id="urgent", topic="fast-lane")]))
        for topic, state in (("slow-lane", "running"), ("fast-lane", "completed")):
            await asyncio.wait_for(app.worker(topics=[topic]).run(until_idle=True), PATIENCE)
            assert await run.status() == state
    assert done == [("work", "done"), ("urgent", "done")]


async def test_an_undo_has_the_args_of_its_step(settings: Settings) -> None:
    """They stand above the payload there, too, in a message that is made from the rows as well."""
    activity = ActivityRegistry()
    log: list[tuple[str, str]] = []
    works = False

    @activity.execute()
    async def reserve(warehouse: str) -> None:
        log.append(("in", warehouse))

    @activity.compensate("reserve", retries=0)
    async def release(warehouse: str, why: str = "") -> None:
        if not works:
            raise ConnectionError("down")
        log.append((f"out {why}".strip(), warehouse))

    @activity.execute()
    async def fail() -> None:
        raise NonRetryableError("no")

    steps = [
        Step("reserve"),
        Step("reserve", id="b", args={"warehouse": "B", "why": "moved"}),
        Step("reserve", id="c", args={"warehouse": "C"}),
        Step("fail"),
    ]
    async with working(settings, activity) as app:
        run = await app.dispatch(Workflow("w", steps), {"warehouse": "A"})
        assert (await run.wait(PATIENCE)).status == "compensation_failed"
        works = True
        await run.retry()  # its message is made from the rows
        assert (await run.wait(PATIENCE)).status == "compensated"
    assert log == [("in", "A"), ("in", "B"), ("in", "C"), ("out", "C"), ("out moved", "B"), ("out", "A")]


async def test_what_was_done_in_a_topic_is_undone_there(settings: Settings) -> None:
    """A step that has a topic of its own is undone by those who serve that, whether or not anybody serves its
    activity's."""
    activity = ActivityRegistry()
    undone: list[str] = []

    @activity.execute()
    async def book(ctx: StepContext) -> str:
        return ctx.step_id

    @activity.compensate("book")
    async def cancel(output: str) -> None:
        undone.append(output)

    @activity.execute()
    async def fail() -> None:
        raise NonRetryableError("no")

    steps = [
        Step("book", id="here"),
        Step("book", id="there", topic="partner"),
        Step("fail", topic="partner"),
    ]
    async with Paigeant(settings, activities=activity) as app:
        run = await app.dispatch(Workflow("w", steps))
        for topic, seen in (("book", []), ("partner", ["there"]), ("book", ["there", "here"])):
            await asyncio.wait_for(app.worker(topics=[topic]).run(until_idle=True), PATIENCE)
            assert undone == seen
        assert await run.status() == "compensated"


# -- dispatching


async def test_the_same_id_is_the_same_run(settings: Settings) -> None:
    """With the same input in any order of keys; with another it is a conflict."""
    activity = ActivityRegistry()
    done: list[int] = []

    @activity.execute()
    async def work(n: int) -> None:
        done.append(n)

    workflow = Workflow("w", ["work"])
    async with working(settings, activity) as app:
        run = await app.dispatch(workflow, {"n": 1, "m": 2}, workflow_id="r")
        await run.wait(PATIENCE)
        again = await app.dispatch(workflow, {"m": 2, "n": 1}, workflow_id="r")
        assert (await again.wait(PATIENCE)).status == "completed"
        with pytest.raises(RunConflict, match="another input"):
            await app.dispatch(workflow, {"n": 2, "m": 2}, workflow_id="r")
        with pytest.raises(RunConflict, match="workflow 'w'"):
            await app.dispatch(Workflow("v", ["work"]), {"n": 1, "m": 2}, workflow_id="r")
    assert done == [1]


class Noted(BaseModel):
    n: int
    note: UUID = Field(default_factory=uuid4)


async def test_what_a_model_adds_makes_no_other_input(settings: Settings) -> None:
    """A dispatch that is repeated finds its run, though the model of the input would add something else this time."""
    activity = ActivityRegistry()

    @activity.execute()
    async def show(note: UUID) -> UUID:
        return note

    workflow = Workflow("w", ["show"], input_model=Noted)
    async with working(settings, activity) as app:
        run = await app.dispatch(workflow, {"n": 1}, workflow_id="r")
        note = (await run.wait(PATIENCE)).output
        again = await app.dispatch(workflow, {"n": 1}, workflow_id="r")
        assert (await again.wait(PATIENCE)).output == note
        written_out = await app.dispatch(workflow, Noted(n=1, note=UUID(note)), workflow_id="r")
        assert (await written_out.wait(PATIENCE)).output == note
        for other in ({"n": 2}, Noted(n=1)):
            with pytest.raises(RunConflict, match="another input"):
                await app.dispatch(workflow, other, workflow_id="r")


class Wanted(BaseModel):
    sku: str
    quantity: int = 1


async def test_an_input_is_checked_against_its_model(settings: Settings) -> None:
    """What doesn't fit is refused at dispatch with the field's name; what fits arrives with its defaults."""
    activity = ActivityRegistry()

    @activity.execute()
    async def show(sku: str, quantity: int) -> str:
        return f"{quantity} {sku}"

    workflow = Workflow("w", ["show"], input_model=Wanted)
    async with working(settings, activity) as app:
        for given in ({"sku": "A"}, Wanted(sku="A")):
            assert (await (await app.dispatch(workflow, given)).wait(PATIENCE)).output == "1 A"
        with pytest.raises(InputInvalid, match=r"'w' doesn't fit: quantity"):
            await app.dispatch(workflow, {"sku": "A", "quantity": "many"})
        assert len(await app.store.list_runs()) == 2


class Parcel(BaseModel):
    model_config = ConfigDict(extra="forbid")

    parcel_id: int = Field(alias="parcelId")
    net_weight: float = Field(validation_alias="net", serialization_alias="netWeight")


async def test_a_model_with_aliases_arrives_as_it_was(settings: Settings) -> None:
    """An input may have either names of a model's fields, or be one; outputs come back, to undos too."""
    activity = ActivityRegistry()
    arrived: list[Parcel] = []

    @activity.execute()
    async def pack(parcel_id: int, net_weight: float) -> Parcel:
        return Parcel(parcelId=parcel_id, net=net_weight)

    @activity.compensate("pack")
    async def unpack(output: Parcel) -> None:
        arrived.append(output)

    @activity.execute()
    async def weigh(pack: Parcel) -> None:
        arrived.append(pack)
        raise NonRetryableError("too heavy")

    parcel = Parcel(parcelId=7, net=0.5)
    workflow = Workflow("w", ["pack", "weigh"], input_model=Parcel)
    async with working(settings, activity) as app:
        for given in ({"parcelId": 7, "net": 0.5}, {"parcel_id": 7, "net_weight": 0.5}, parcel):
            run = await app.dispatch(workflow, given)
            assert (await run.wait(PATIENCE)).status == "compensated"
    assert arrived == [parcel] * 6


def _cycle() -> dict[str, Any]:
    value: dict[str, Any] = {}
    value["again"] = value
    return value


@pytest.mark.parametrize(
    ("given", "options", "error", "said"),
    [
        ([1], {}, InputInvalid, "expected an object"),
        ("text", {}, InputInvalid, "expected an object"),
        ({"x": object()}, {}, InputInvalid, "can't be written as JSON"),
        (_cycle(), {}, InputInvalid, "contains itself"),
        ({"n": 1}, {"workflow_id": ""}, InputInvalid, "1 to 200 characters"),
        ({"n": 1}, {"workflow_id": "a b"}, InputInvalid, "no blanks"),
        ({"n": 1}, {"workflow_id": 5}, InputInvalid, "1 to 200 characters"),
        ({}, {}, ArgumentError, "needs 'n'"),
        ({"n": "many"}, {}, ArgumentError, "'n' of activity 'work' doesn't fit"),
    ],
)
async def test_a_dispatch_that_can_t_work_is_refused(
    settings: Settings, given: Any, options: dict[str, Any], error: type[Exception], said: str
) -> None:
    """With a clear error, and no run."""
    activity = ActivityRegistry()

    @activity.execute()
    async def work(n: int) -> None: ...

    async with Paigeant(settings, activities=activity) as app:
        with pytest.raises(error, match=said):
            await app.dispatch(Workflow("w", ["work"]), given, **options)
        assert await app.store.list_runs() == []


async def test_args_that_nobody_takes_are_refused(settings: Settings) -> None:
    """A mistyped name in a step's args is an error, not the default instead; `**rest` takes all, others may be known
    elsewhere."""
    activity = ActivityRegistry()

    @activity.execute()
    async def charge(amount: int = 1) -> int:
        return amount

    @activity.execute()
    async def show(**rest: Any) -> dict[str, Any]:
        return rest

    wrong = Workflow("w", ["charge", Step("charge", args={"amuont": 5})])
    right = Workflow("w", [Step("charge", args={"amount": 5}), Step("show", args={"any": 1})])
    elsewhere = Workflow("w", ["charge", Step("theirs", args={"any": 1})])
    async with working(settings, activity) as app:
        with pytest.raises(
            ArgumentError, match=r"'charge_2' .* 'amuont', which .* doesn't take; did you mean 'amount'"
        ):
            await app.dispatch(wrong)
        assert await app.store.list_runs() == []
        result = await (await app.dispatch(right)).wait(PATIENCE)
        assert result.outputs == {"charge": 5, "show": {"charge": 5, "any": 1}}
        await app.dispatch(elsewhere)


async def test_unknown_names_are_answered_with_the_nearest(settings: Settings) -> None:
    """A workflow that isn't there, and, when strict, an activity that isn't."""
    activity = ActivityRegistry()
    activity.execute(name="work")(lambda: 1)
    strict = settings.model_copy(update={"strict": True})
    async with Paigeant(strict, activities=activity, workflows=[Workflow("fulfil", ["wrok"])]) as app:
        with pytest.raises(UnknownWorkflow, match="did you mean 'fulfil'"):
            await app.dispatch("fulfill")
        with pytest.raises(UnknownActivity, match="did you mean 'work'"):
            await app.dispatch("fulfil")


async def test_a_name_where_no_workflow_is_known_is_told_how_to_be_one(settings: Settings) -> None:
    """Whoever has one and dispatches it by its name forgot to say so, or needs no name."""
    async with Paigeant(settings) as app:
        with pytest.raises(UnknownWorkflow, match=r"dispatch the Workflow itself, or .*workflows="):
            await app.dispatch("fulfil", {})


async def test_asking_about_no_run_is_an_error(settings: Settings) -> None:
    """Whatever is asked."""
    async with Paigeant(settings) as app:
        run = app.run("nobody")
        for ask in (run.status, run.wait, run.detail, run.cancel, run.retry, lambda: run.signal("go")):
            with pytest.raises(RunNotFound, match="nobody"):
                await ask()


async def test_waiting_has_an_end(settings: Settings) -> None:
    """Who waits too long gets an error that says the run goes on."""
    async with Paigeant(settings) as app:
        run = await app.dispatch(Workflow("w", ["a"]), workflow_id="r")
        with pytest.raises(RunTimeout, match=r"'r' has not ended within 0\.01 s; it goes on"):
            await run.wait(0.01)
        assert await run.status() == "pending"


# -- what happens is told


async def test_what_happens_is_told_in_order(settings: Settings) -> None:
    """Each event once, with its ids."""
    shop = Shop()
    seen = Seen()
    async with working(settings, shop.activity, observers=[seen]) as app:
        run = await app.dispatch(Workflow("w", ["a", "fail"]), workflow_id="r")
        await run.wait(PATIENCE)
        await seen.wait_for("run.compensated")
    told = [event for event in seen.events if event.workflow_id]
    assert [(event.name, event.step) for event in told if not event.name.startswith("delivery.")] == [
        ("run.dispatched", ""),
        ("step.started", "a"),
        ("step.completed", "a"),
        ("step.started", "fail"),
        ("step.failed", "fail"),
        ("step.started", "a"),
        ("step.compensated", "a"),
        ("run.compensated", "a"),
    ]
    assert {event.workflow_id for event in told} == {"r"}
    assert seen.names("worker.started", "worker.stopping", "worker.stopped") == [
        "worker.started",
        "worker.stopping",
        "worker.stopped",
    ]


@pytest.mark.parametrize(
    "raised", [RuntimeError("observer"), asyncio.CancelledError()], ids=["error", "cancelled"]
)
async def test_an_observer_can_t_disturb(settings: Settings, raised: BaseException) -> None:
    """What an observer raises goes no further, be it that it looks at a task which was cancelled."""

    class Broken:
        def observe(self, event: Event) -> None:
            raise raised

        def around(self, work: Work) -> Around:
            raise raised

    activity = ActivityRegistry()
    activity.execute(name="a")(lambda: 1)
    async with working(settings, activity, observers=[Broken()]) as app:
        assert (await (await app.dispatch(Workflow("w", ["a"]))).wait(PATIENCE)).output == 1


async def test_bodies_on_the_wire_are_what_the_store_says(url: str) -> None:
    """Every message that is published equals the one folded from the rows: losing it loses nothing."""
    from paigeant.forwarder import message_of

    settings = Settings(
        transport_url="memory://", store_url=url, local_steps=1, inline_bytes=100, retry_base=0.0
    )
    activity = ActivityRegistry()

    @activity.execute(retries=AT_ONCE)
    async def work(n: int, ctx: StepContext) -> str:
        if ctx.attempt == 1 and n % 2:
            raise RuntimeError("first")
        await ctx.save_variable("v", n)
        await ctx.save_variable("skipped", f"by {ctx.step_id}")  # a step of this name is skipped
        await ctx.save_variable("a", f"by {ctx.step_id}")  # a step of this name has an output
        if not ctx.step_id.startswith("a."):
            ctx.insert("other")
        return "x" * n

    activity.compensate("work")(lambda: None)
    activity.execute(name="other")(lambda: {"deep": [1, 2.5]})

    @activity.execute(retries=0)
    async def fail() -> None:
        raise RuntimeError("no")

    async with working(settings, activity) as app:
        compared: list[tuple[Any, Any]] = []
        publish = app.transport.publish

        async def watch(topic: str, message: Any, *, delay: float = 0) -> None:
            detail = await app.store.load_run(message.workflow_id, inline_bytes=100)
            told = message_of(detail, inline_bytes=100).evolve(message_id=message.message_id)
            compared.append((message, told))
            await publish(topic, message, delay=delay)

        app.transport.publish = watch  # type: ignore[method-assign]
        steps: list[str | Step] = [
            Step("work", id="a"),
            Step("other", id="skipped", when="false"),
            Step("work", id="b"),
            "fail",
        ]
        for n in (1, 2, 200):
            run = await app.dispatch(Workflow("w", steps), {"n": n, "a": "an input of a step's name"})
            assert (await run.wait(PATIENCE)).status == "compensated"
    assert len(compared) > 20
    for sent, told in compared:
        assert sent == told


async def test_a_result_is_plain_json(settings: Settings) -> None:
    """What wait() gives can be written as JSON by anybody."""
    activity = ActivityRegistry()

    @activity.execute()
    async def make() -> Order:
        return Order(sku="A", price=Decimal("1.10"), at=datetime(2026, 1, 1, tzinfo=UTC))

    async with working(settings, activity) as app:
        result = await (await app.dispatch(Workflow("w", ["make"]))).wait(PATIENCE)
    assert json.loads(json.dumps(result.output)) == {
        "sku": "A",
        "price": "1.10",
        "at": "2026-01-01T00:00:00Z",
    }


async def test_a_signal_is_kept(settings: Settings) -> None:
    """For the run it was sent to, while that is open."""
    async with Paigeant(settings) as app:
        run = await app.dispatch(Workflow("w", ["a"]))
        await run.signal("approved", {"by": "me"})
        [signal] = (await run.detail()).signals
        assert (signal.name, json.loads(signal.value)) == ("approved", {"by": "me"})
        with pytest.raises(InputInvalid, match="JSON"):
            await run.signal("bad", object())


def test_a_worker_that_can_t_work_is_refused(settings: Settings) -> None:
    """Before it takes anything."""
    from paigeant.errors import InvalidDefinition

    for concurrency in (0, -1, True, 1.5, "2"):
        with pytest.raises(InvalidDefinition, match="concurrency"):
            Paigeant(settings).worker(ActivityRegistry(), concurrency=concurrency)  # type: ignore[arg-type]
    assert isinstance(Paigeant(settings).worker(ActivityRegistry()), ActivityWorker)
