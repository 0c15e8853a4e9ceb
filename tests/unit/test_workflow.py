"""Workflow: a named itinerary."""

from __future__ import annotations

from typing import Any

import pytest

from paigeant import ItineraryPolicy, Sleep, Step, WaitFor, Workflow
from paigeant.errors import InvalidDefinition, PolicyViolation
from paigeant.slip import identify


def test_names_and_steps_make_an_itinerary() -> None:
    """Names become steps, called like their activity; a name that occurs again is counted."""
    workflow = Workflow("w", ["a", Step("b", id="x"), "a", "a"])
    assert [(step.id, step.activity) for step in workflow.steps] == [
        ("a", "a"),
        ("x", "b"),
        ("a_2", "a"),
        ("a_3", "a"),
    ]


def test_a_given_id_goes_before_a_counted_one() -> None:
    """An id that the user gave is never taken by a step without one, wherever it stands."""
    steps = Workflow("w", ["a", "a", Step("b", id="a_2")]).steps
    assert [step.id for step in steps] == ["a", "a_3", "a_2"]


def test_waits_are_counted_like_activities() -> None:
    """A wait is called by what it waits for, in a workflow as where a step adds it: so a step may add one each time."""
    waits = [Sleep(1), WaitFor("paid"), Sleep(2), WaitFor("paid"), Sleep(3, id="rest")]
    steps = Workflow("w", waits).steps
    assert [step.id for step in steps] == ["sleep", "paid", "sleep_2", "paid_2", "rest"]
    added = identify([Sleep(1), "poll"], taken={"poll", "sleep"}, parent="poll")
    assert [step.id for step in added] == ["sleep_2", "poll.2"]
    assert {step.called for step in (*steps, *added)} == {""}


def test_a_workflow_may_have_no_steps() -> None:
    """Nothing to do is a workflow."""
    assert Workflow("w").slip(now=0.0).is_done


def test_a_slip_has_what_holds_for_the_run() -> None:
    """The deadline counts from the dispatch; policy and the rule for failed undos travel with the slip."""
    policy = ItineraryPolicy(max_added=1)
    slip = Workflow("w", ["a"], deadline=60, policy=policy, on_compensation_failure="stop").slip(now=1000.0)
    assert (slip.deadline, slip.policy, slip.on_compensation_failure) == (1060.0, policy, "stop")


def test_a_generator_of_steps_is_read_once() -> None:
    """Any iterable of steps will do."""
    assert len(Workflow("w", (name for name in "abc")).steps) == 3


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Workflow("", ["a"]), "name"),
        (lambda: Workflow(" ", ["a"]), "name"),
        (lambda: Workflow(None, ["a"]), "name"),  # type: ignore[arg-type]
        (lambda: Workflow("x" * 201, ["a"]), "name"),
        (lambda: Workflow("w\n", ["a"]), "name"),
        (lambda: Workflow("w", "abc"), "list"),
        (lambda: Workflow("w", 3), "list"),  # type: ignore[arg-type]
        (lambda: Workflow("w", [3]), "workflow 'w'.*found 3"),  # type: ignore[list-item]
        (lambda: Workflow("w", [""]), "workflow 'w'.*activity"),
        (lambda: Workflow("w", [Step("a", id="x"), Step("b", id="x")]), "'x' occurs twice"),
        (lambda: Workflow("w", ["a"], deadline=0), "deadline"),
        (lambda: Workflow("w", ["a"], deadline="soon"), "deadline"),  # type: ignore[arg-type]
        (lambda: Workflow("w", ["a"], deadline=True), "deadline"),
        (lambda: Workflow("w", ["a"], deadline=float("inf")), "deadline"),
        (lambda: Workflow("w", ["a"], deadline=float("nan")), "deadline"),
        (lambda: Workflow("w", ["a"], on_compensation_failure="retry"), "'continue' or 'stop'"),  # type: ignore[arg-type]
    ],
)
def test_a_workflow_that_can_t_work_is_refused(make: Any, said: str) -> None:
    """What can't be is an error where the workflow is defined, naming what was found."""
    with pytest.raises(InvalidDefinition, match=said):
        make()


def test_a_workflow_keeps_to_its_own_policy() -> None:
    """More steps than the policy allows are refused at once."""
    with pytest.raises(PolicyViolation, match=r"2 steps.*allows 1"):
        Workflow("w", ["a", "b"], policy=ItineraryPolicy(max_total=1))


def test_a_workflow_is_frozen() -> None:
    """A workflow that is in use can't be changed."""
    workflow = Workflow("w", ["a"])
    with pytest.raises(AttributeError):
        workflow.name = "v"  # type: ignore[misc]
