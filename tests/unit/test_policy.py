"""ItineraryPolicy: what revisions may do."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paigeant import ItineraryPolicy, PaigeantMessage, RoutingSlip, Step
from paigeant.definitions import workflow_from
from paigeant.errors import InvalidDefinition, PolicyViolation
from paigeant.message import decode, encode
from paigeant.slip import Executed, Revision, identify

SLIP = RoutingSlip(itinerary=identify(["a", "b", "c"]), executed=(Executed("z", "z"),), added=2)


def check(policy: ItineraryPolicy, *added: str, remaining: int | None = None) -> None:
    """Ask `policy` whether step `a` may add these steps to the two that are left."""
    new = identify(added, parent="a")
    rest = (*SLIP.itinerary[1:], *new)
    policy.check(SLIP, new, rest if remaining is None else rest[:remaining])


def test_any_activity_may_be_added_by_default() -> None:
    """Without limits only the number of steps counts."""
    check(ItineraryPolicy(), "x", "y")


def test_other_activities_may_not_be_added() -> None:
    """The error names the activity and what is allowed."""
    policy = ItineraryPolicy(allowed=(name for name in ["shorten"]))  # type: ignore[arg-type]  # any iterable
    check(policy, "shorten")
    with pytest.raises(PolicyViolation, match=r"'shortn'.*did you mean 'shorten'"):
        check(policy, "shortn")


def test_added_steps_count_over_the_whole_run() -> None:
    """Steps that were added earlier count against max_added."""
    check(ItineraryPolicy(max_added=3), "x")
    with pytest.raises(PolicyViolation, match="4 added steps, the policy allows 3"):
        check(ItineraryPolicy(max_added=3), "x", "y")


def test_all_steps_count_against_the_total() -> None:
    """Steps that are done, the one that adds, and what is left count; what was taken out doesn't."""
    check(ItineraryPolicy(max_total=5), "x")
    with pytest.raises(PolicyViolation, match="6 steps in all, the policy allows 5"):
        check(ItineraryPolicy(max_total=5), "x", "y")
    check(ItineraryPolicy(max_total=5), "x", "y", remaining=3)


def test_taking_steps_out_is_always_allowed() -> None:
    """A run that is over its total already may still become shorter."""
    check(ItineraryPolicy(max_total=1))


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"allowed": "shorten"}, "allowed"),
        ({"allowed": [1]}, "allowed"),
        ({"allowed": 3}, "allowed"),
        ({"max_added": -1}, "max_added"),
        ({"max_added": "many"}, "max_added"),
        ({"max_total": 0}, "max_total"),
        ({"max_total": "all"}, "max_total"),
        ({"max_total": None}, "max_total"),
        ({"max_total": True}, "max_total"),
        ({"max_each": 0}, "max_each"),
        ({"max_each": 1.5}, "max_each"),
        ({"max_depth": -1}, "max_depth"),
        ({"max_depth": False}, "max_depth"),
        ({"may_remove": None}, "may_remove"),
    ],
)
def test_a_policy_that_can_t_work_is_refused(fields: dict[str, Any], named: str) -> None:
    """What is no list of names, or no number in range, is an error that names the field."""
    with pytest.raises(InvalidDefinition, match=named):
        ItineraryPolicy(**fields)


def test_steps_are_counted_not_named() -> None:
    """The same activity may be added any number of times."""
    check(ItineraryPolicy(allowed=("x",)), "x", "x", "x")
    assert Step("x") == Step("x")


def test_steps_of_one_activity_are_counted() -> None:
    """Done, under way and still to do; others may still be added when one of them is at its limit."""
    check(ItineraryPolicy(max_each=2), "z", "a", "b", "x")
    for name in ("z", "a", "b"):
        with pytest.raises(PolicyViolation, match=f"2 steps of activity '{name}', the policy allows 1"):
            check(ItineraryPolicy(max_each=1), "x", name)
    check(ItineraryPolicy(max_each=1), "x", "y")


def test_steps_that_added_each_other_are_counted() -> None:
    """A depth of 0 lets no step add any, one of 1 only those of the workflow."""
    added = [replace(step, depth=3) for step in identify(["x"], parent="a")]
    rest = (*SLIP.itinerary[1:], *added)
    ItineraryPolicy(max_depth=3).check(SLIP, added, rest)
    with pytest.raises(PolicyViolation, match="number 3 of steps that added each other, the policy allows 2"):
        ItineraryPolicy(max_depth=2).check(SLIP, added, rest)


def test_what_was_planned_can_be_kept() -> None:
    """With `may_remove=False` a revision leaves what was there; its own steps it may take out again."""
    policy = ItineraryPolicy(may_remove=False)
    policy.check(SLIP, (), SLIP.itinerary[1:], before=identify(["x"], parent="a"))
    with pytest.raises(PolicyViolation, match="take out 'b' and 1 more"):
        policy.check(SLIP, (), ())
    with pytest.raises(PolicyViolation, match="take out 'c',"):
        policy.check(SLIP, (), SLIP.itinerary[1:2])


def test_what_the_same_step_added_before_counts() -> None:
    """Against the numbers, not against the names: it was allowed then."""
    before = identify(["other"], parent="a")
    new = identify(["x"], parent="a", first=2)
    rest = (*SLIP.itinerary[1:], *before, *new)
    ItineraryPolicy(allowed=("x",), max_added=4).check(SLIP, new, rest, before=before)
    with pytest.raises(PolicyViolation, match="4 added steps, the policy allows 3"):
        ItineraryPolicy(max_added=3).check(SLIP, new, rest, before=before)


def test_a_policy_crosses_the_wire_and_comes_from_a_file() -> None:
    """All of its limits."""
    limits = {
        "allowed": ["x"],
        "max_added": 2,
        "max_total": 9,
        "max_each": 3,
        "max_depth": 1,
        "may_remove": False,
    }
    policy = ItineraryPolicy(**limits)  # type: ignore[arg-type]
    assert workflow_from("w", {"steps": ["a"], "policy": limits}).policy == policy
    slip = RoutingSlip((Step("a", id="a", depth=2),), policy=policy)
    message = PaigeantMessage("r/a/do/0", "r", slip)
    assert decode(encode(message)) == message


NAMES = ("a", "b", "c")
counts = st.none() | st.integers(1, 6)
policies = st.builds(
    ItineraryPolicy,
    allowed=st.none() | st.lists(st.sampled_from(NAMES), unique=True),
    max_added=st.none() | st.integers(0, 6),
    max_total=st.integers(1, 12),
    max_each=counts,
    max_depth=st.none() | st.integers(0, 3),
    may_remove=st.booleans(),
)
activities = st.lists(st.sampled_from(NAMES), max_size=5)


@st.composite
def slips(draw: st.DrawFn) -> RoutingSlip:
    """Any slip with a step to do."""
    itinerary = identify([draw(st.sampled_from(NAMES)), *draw(activities)])
    done = tuple(Executed(f"{name}{n}", name) for n, name in enumerate(draw(activities)))
    first = replace(itinerary[0], depth=draw(st.integers(0, 3)))
    return RoutingSlip((first, *itinerary[1:]), done, added=draw(st.integers(0, 6)))


def added_to(slip: RoutingSlip, names: list[str]) -> tuple[Step, ...]:
    """What the step that is due would add."""
    new = identify(names, parent=slip.itinerary[0].id)
    return tuple(replace(step, depth=slip.depth + 1) for step in new)


def allows(policy: ItineraryPolicy, slip: RoutingSlip, new: tuple[Step, ...], rest: tuple[Step, ...]) -> bool:
    """Whether the policy lets these steps in and goes on with that."""
    try:
        policy.check(slip, new, rest)
    except PolicyViolation:
        return False
    return True


@given(policies, policies, slips(), activities, st.integers(0, 6))
def test_a_narrowed_policy_allows_what_both_allow(
    one: ItineraryPolicy, other: ItineraryPolicy, slip: RoutingSlip, names: list[str], kept: int
) -> None:
    """No more, no less, and whichever comes first."""
    new = added_to(slip, names)
    rest = (*slip.itinerary[1:][:kept], *new)
    both = allows(one, slip, new, rest) and allows(other, slip, new, rest)
    assert allows(one.narrowed(other), slip, new, rest) is both
    assert allows(other.narrowed(one), slip, new, rest) is both


@given(policies, slips())
def test_room_is_what_may_still_be_added(policy: ItineraryPolicy, slip: RoutingSlip) -> None:
    """As far as numbers go: so many more steps are allowed, and one more isn't."""
    policy = replace(policy, allowed=None, max_each=None)
    room = policy.room(slip, slip.itinerary[1:])
    for count, expected in ((room, True), (room + 1, False)):
        new = added_to(slip, ["x"] * count)
        assert allows(policy, slip, new, (*slip.itinerary[1:], *new)) is expected


@given(policies, activities, st.data())
def test_no_run_grows_beyond_its_policy(
    policy: ItineraryPolicy, names: list[str], data: st.DataObject
) -> None:
    """Whatever its steps ask for, one after the other: every limit holds for the run as a whole, and it ends."""
    slip = RoutingSlip(identify(["a", *names]), policy=policy)
    workflow = {name: ["a", *names].count(name) for name in NAMES}
    began = len(slip.itinerary)
    while slip.next_step() is not None:
        new = added_to(slip, data.draw(activities))
        rest = slip.itinerary[1:]
        wish = data.draw(st.sampled_from([(*new, *rest), (*rest, *new), new, ()]))
        put_in = new if wish else ()
        granted = allows(policy, slip, put_in, wish)
        slip = slip.mark_complete(revision=Revision(wish, len(put_in)) if granted else None)
    done = slip.executed
    assert len(done) <= max(policy.max_total, began)
    assert slip.added <= (policy.max_added if policy.max_added is not None else slip.added)
    if policy.max_each is not None:
        for name in NAMES:
            assert [entry.activity for entry in done].count(name) <= max(policy.max_each, workflow[name])
    if policy.max_depth is not None:
        assert all(entry.step_id.count(".") <= policy.max_depth for entry in done)
    if not policy.may_remove:
        assert {step.id for step in identify(["a", *names])} <= {entry.step_id for entry in done}
