"""StepContext: what a step may know and decide."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from paigeant import ItineraryPolicy, RoutingSlip, Step, StepContext
from paigeant.errors import InvalidDefinition, OutputInvalid, PolicyViolation
from paigeant.slip import Executed, identify
from paigeant.store import StepKey
from paigeant.stores.memory import MemoryStore


def context(*, policy: ItineraryPolicy | None = None, store: MemoryStore | None = None) -> StepContext:
    """The context of step `a`, which `b` and `c` follow."""
    slip = RoutingSlip(
        itinerary=identify(["a", "b", "c"]),
        executed=(Executed("z", "z"),),
        policy=policy or ItineraryPolicy(),
    )
    return StepContext(
        workflow_id="r",
        workflow="w",
        step_id="a",
        activity="a",
        attempt=1,
        trace_id="t",
        correlation_id="c",
        idempotency_key="r:a",
        deadline=None,
        identity=None,
        log=logging.LoggerAdapter(logging.getLogger("test"), {}),
        _key=StepKey("r", "a"),
        _slip=slip,
        _store=store or MemoryStore(),
    )


def left(ctx: StepContext) -> list[tuple[str, str]]:
    """Id and activity of what follows."""
    return [(step.id, step.activity) for step in ctx.remaining]


def test_without_a_revision_nothing_changes() -> None:
    """The rest of the itinerary is what it was, and nothing is recorded about it."""
    ctx = context()
    assert left(ctx) == [("b", "b"), ("c", "c")]
    assert ctx._revision() is None


def test_inserted_steps_come_next_in_their_order() -> None:
    """A second insert goes behind the first."""
    ctx = context()
    ctx.insert("x", Step("y", id="mine"))
    ctx.insert("z")
    assert left(ctx) == [("a.1", "x"), ("mine", "y"), ("a.3", "z"), ("b", "b"), ("c", "c")]


def test_appended_steps_come_last() -> None:
    """At the end, behind what was appended before, whatever was inserted in between."""
    ctx = context()
    ctx.append("x")
    ctx.insert("y")
    ctx.append("z")
    assert left(ctx) == [("a.2", "y"), ("b", "b"), ("c", "c"), ("a.1", "x"), ("a.3", "z")]


def test_replaced_steps_are_all_that_is_left() -> None:
    """What was inserted before is gone; what is inserted after goes behind them, what is appended too."""
    ctx = context()
    ctx.insert("x")
    ctx.replace("y", "z")
    ctx.insert("i")
    assert left(ctx) == [("a.2", "y"), ("a.3", "z"), ("a.4", "i")]
    ctx.replace()
    assert left(ctx) == []


def test_a_terminated_run_has_nothing_left() -> None:
    """An empty revision; steps that are added after it are done all the same."""
    ctx = context()
    ctx.terminate()
    revision = ctx._revision()
    assert revision is not None
    assert revision.itinerary == ()
    ctx.append("x")
    assert left(ctx) == [("a.1", "x")]


def test_an_id_can_be_used_once_in_a_run() -> None:
    """Ids that are done, to do, added, or taken out again belong to their steps; the error changes nothing."""
    ctx = context()
    ctx.insert(Step("x", id="mine"))
    for taken in ("z", "a", "b", "mine"):
        with pytest.raises(InvalidDefinition, match=f"'{taken}' occurs twice"):
            ctx.insert(Step("x", id=taken))
    assert [step_id for step_id, _ in left(ctx)] == ["mine", "b", "c"]


def test_a_violation_changes_nothing() -> None:
    """A revision beyond the policy is refused whole; the step may go on without it."""
    ctx = context(policy=ItineraryPolicy(allowed=("x",), max_added=2))
    ctx.insert("x")
    with pytest.raises(PolicyViolation, match="'y' may not be added"):
        ctx.insert("x", "y")
    with pytest.raises(PolicyViolation, match="3 added steps"):
        ctx.append("x", "x")
    assert left(ctx) == [("a.1", "x"), ("b", "b"), ("c", "c")]
    revision = ctx._revision()
    assert revision is not None
    assert revision.added == 1


@pytest.mark.parametrize("step", [5, None, ["x"], {"activity": "x"}])
def test_what_is_no_step_can_t_be_added(step: Any) -> None:
    """The error shows what was found."""
    with pytest.raises(InvalidDefinition, match="found"):
        context().insert(step)


def test_arguments_of_added_steps_are_json() -> None:
    """They are written down when the step is added: what can't be is an error there."""
    ctx = context()
    ctx.insert(Step("x", args={"pair": (1, 2)}))
    assert ctx.remaining[0].args == {"pair": [1, 2]}
    with pytest.raises(InvalidDefinition, match="can't be written as JSON"):
        ctx.insert(Step("x", args={"bad": object()}))


async def test_a_variable_is_read_as_this_attempt_left_it() -> None:
    """What the attempt saved goes before what is recorded; nothing is recorded by saving."""
    store = MemoryStore()
    ctx = context(store=store)
    assert await ctx.load_variable("v") is None
    assert await ctx.load_variable("v", 5) == 5
    await ctx.save_variable("v", (1, 2))
    assert await ctx.load_variable("v", 5) == [1, 2]
    await ctx.save_variable("v", None)
    assert await ctx.load_variable("v", 5) is None
    assert await store.load_variable("r", "v") is None


@pytest.mark.parametrize(
    ("key", "value", "error"), [("v", object(), OutputInvalid), ("", 1, InvalidDefinition)]
)
async def test_a_variable_needs_a_name_and_a_json_value(key: str, value: Any, error: type[Exception]) -> None:
    """What can't be kept is an error where it is saved."""
    with pytest.raises(error):
        await context().save_variable(key, value)


async def test_once_takes_a_function_and_its_arguments() -> None:
    """What was called already isn't done once: it is said what to write, and nothing is left that nobody awaits."""

    async def charge() -> int:
        return 5

    for given in (charge(), 5):
        with pytest.raises(InvalidDefinition, match="its arguments behind it"):
            await context().once("charge", given)  # type: ignore[arg-type]


async def test_once_is_done_once() -> None:
    """The record of a unit is given instead of doing it again, for every later attempt of the step."""
    store = MemoryStore()
    calls: list[int] = []

    async def charge(amount: int) -> dict[str, Any]:
        calls.append(amount)
        return {"charged": (amount,)}

    first = await context(store=store).once("charge", charge, 5)
    again = await context(store=store).once("charge", charge, 7)
    assert (first, again, calls) == ({"charged": [5]}, {"charged": [5]}, [5])


async def test_a_name_that_is_used_again_counts_on() -> None:
    """In one attempt the second use of a name is another unit; a plain function will do, and None is a value."""
    store = MemoryStore()
    results = iter([None, 2, 3])
    for _ in range(2):
        ctx = context(store=store)
        assert [await ctx.once("u", lambda: next(results)) for _ in range(2)] == [None, 2]
    assert next(results) == 3


async def test_a_unit_that_fails_is_not_recorded() -> None:
    """It may be done again by the next attempt; a result that isn't JSON is an error."""
    store = MemoryStore()
    with pytest.raises(ZeroDivisionError):
        await context(store=store).once("u", lambda: 1 // 0)
    with pytest.raises(OutputInvalid, match="'u'"):
        await context(store=store).once("u", object)
    assert await context(store=store).once("u", lambda: 1) == 1
