"""ItineraryPolicy: what revisions may do."""

from __future__ import annotations

from typing import Any

import pytest

from paigeant import ItineraryPolicy, RoutingSlip, Step
from paigeant.errors import InvalidDefinition, PolicyViolation
from paigeant.slip import Executed, identify

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
