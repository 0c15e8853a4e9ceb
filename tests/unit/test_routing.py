"""route(): what follows a step."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paigeant import RetryPolicy, RoutingSlip
from paigeant.routing import (
    Failed,
    Finish,
    Forward,
    Outcome,
    Retry,
    Skipped,
    Succeeded,
    Undo,
    route,
    turn_round,
)
from paigeant.slip import RUN_ENDED, Compensation, Revision, RunStatus, StepStatus, identify

SLIP = RoutingSlip(itinerary=identify(["a", "b"]))
ONCE = RetryPolicy(attempts=1)
UNDO_A = Compensation("a", "a", "a")
SECOND = SLIP.mark_complete(compensation=UNDO_A)


def test_a_success_goes_forward() -> None:
    """The next step follows."""
    move = route(SLIP, Succeeded(), 0.0)
    assert isinstance(move, Forward)
    assert (move.step.id, move.status) == ("b", StepStatus.COMPLETED)


def test_the_last_success_completes_the_run() -> None:
    """With nothing left the run is completed."""
    move = route(SECOND, Succeeded(), 0.0)
    assert isinstance(move, Finish)
    assert (move.run, move.status) == (RunStatus.COMPLETED, StepStatus.COMPLETED)


def test_a_terminating_revision_completes_the_run() -> None:
    """A step that leaves an empty itinerary ends the run as a success."""
    move = route(SLIP, Succeeded(Revision(())), 0.0)
    assert isinstance(move, Finish)
    assert move.run is RunStatus.COMPLETED


def test_a_revision_decides_what_is_next() -> None:
    """The first step of the revised itinerary follows."""
    move = route(SLIP, Succeeded(Revision(identify(["x"], parent="a"), 1)), 0.0)
    assert isinstance(move, Forward)
    assert move.step.id == "a.1"


def test_a_skipped_step_goes_forward() -> None:
    """Skipping is a way of being done, the last one included."""
    move = route(SLIP, Skipped(), 0.0)
    assert isinstance(move, Forward)
    assert move.status is StepStatus.SKIPPED
    assert isinstance(route(move.slip, Skipped(), 0.0), Finish)


def test_a_failure_is_tried_again() -> None:
    """While there are attempts left the same step follows, after the wait of its policy."""
    policy = RetryPolicy(attempts=3, base=10, jitter=0.5)
    move = route(SLIP, Failed("E", 2, policy, chance=1.0), 0.0)
    assert move == Retry(SLIP, 10.0, "E")


def test_whoever_asks_for_it_is_left_alone_for_so_long() -> None:
    """The wait of the policy is the shortest; another one that ends behind the deadline isn't begun."""
    policy = RetryPolicy(attempts=3, base=10, cap=20, jitter=0)
    assert route(SLIP, Failed("E", 1, policy, after=90.0), 0.0) == Retry(SLIP, 90.0, "E")
    assert route(SLIP, Failed("E", 1, policy, after=5.0), 0.0) == Retry(SLIP, 10.0, "E")
    assert isinstance(route(replace(SLIP, deadline=60.0), Failed("E", 1, policy, after=90.0), 0.0), Finish)


def test_the_last_failure_ends_a_run_with_nothing_to_undo() -> None:
    """failed means that nothing had to be undone."""
    move = route(SLIP, Failed("E", 1, ONCE), 0.0)
    assert isinstance(move, Finish)
    assert (move.run, move.status, move.error) == (RunStatus.FAILED, StepStatus.FAILED, "E")


def test_a_permanent_failure_is_not_tried_again() -> None:
    """Whatever the policy says."""
    assert isinstance(route(SLIP, Failed("E", 1, RetryPolicy(attempts=9), permanent=True), 0.0), Finish)


def test_the_last_failure_undoes_what_was_recorded() -> None:
    """The last recorded step is undone first; the failing one isn't."""
    move = route(SECOND, Failed("E", 1, ONCE), 0.0)
    assert isinstance(move, Undo)
    assert (move.undo, move.status, move.error) == (UNDO_A, StepStatus.FAILED, "E")
    assert move.slip.ending == "failed"


def test_a_wait_beyond_the_deadline_is_a_failure() -> None:
    """Another attempt that could only begin after the deadline isn't made; one that fits is."""
    slip = replace(SLIP, deadline=100.0)
    policy = RetryPolicy(attempts=3, base=10, jitter=0)
    assert isinstance(route(slip, Failed("E", 1, policy), 89.0), Retry)
    assert isinstance(route(slip, Failed("E", 1, policy), 90.0), Finish)


def test_a_deadline_does_not_bound_undoing() -> None:
    """A run that is late must still be put right: its undos are tried again as often as ever."""
    slip = replace(SECOND, deadline=1.0).begin_undo("failed")
    assert isinstance(route(slip, Failed("E", 1, RetryPolicy(attempts=2)), 1000.0), Retry)


@pytest.mark.parametrize(
    ("ending", "state"), [("failed", RunStatus.COMPENSATED), ("cancelled", RunStatus.CANCELLED)]
)
def test_the_last_undo_ends_the_run(ending, state) -> None:
    """All undone is compensated, or cancelled where that was what was asked for."""
    move = route(SECOND.begin_undo(ending), Succeeded(), 0.0)
    assert isinstance(move, Finish)
    assert (move.run, move.status) == (state, StepStatus.COMPENSATED)


def three(rule) -> RoutingSlip:
    """A run with two steps to undo, under `rule` for undos that fail."""
    slip = RoutingSlip(itinerary=identify("abc"), on_compensation_failure=rule)
    for name in "ab":
        slip = slip.mark_complete(compensation=Compensation(name, name, name))
    return slip.begin_undo("failed")


def test_an_undo_that_fails_for_good_leaves_the_others() -> None:
    """By default the rest is undone all the same, and the run ends compensation_failed."""
    move = route(three("continue"), Failed("E", 1, ONCE), 0.0)
    assert isinstance(move, Undo)
    assert (move.undo.step_id, move.status) == ("a", StepStatus.COMPENSATION_FAILED)
    move = route(move.slip, Succeeded(), 0.0)
    assert isinstance(move, Finish)
    assert move.run is RunStatus.COMPENSATION_FAILED


def test_an_undo_that_fails_for_good_may_stop_the_undoing() -> None:
    """Under `stop` nothing more is undone; what is left stays on the slip."""
    move = route(three("stop"), Failed("E", 1, ONCE), 0.0)
    assert isinstance(move, Finish)
    assert (move.run, move.status) == (RunStatus.COMPENSATION_FAILED, StepStatus.COMPENSATION_FAILED)
    assert [undo.step_id for undo in move.slip.compensations] == ["a"]


def test_a_cancelled_run_whose_undo_fails_says_so() -> None:
    """compensation_failed goes before cancelled: somebody has to look at it."""
    move = route(SECOND.begin_undo("cancelled"), Failed("E", 1, ONCE), 0.0)
    assert isinstance(move, Finish)
    assert move.run is RunStatus.COMPENSATION_FAILED


def test_turning_round_before_the_first_result() -> None:
    """With nothing recorded a run ends at once as what was asked for."""
    for ending in (RunStatus.FAILED, RunStatus.CANCELLED):
        move = turn_round(SLIP, ending)
        assert isinstance(move, Finish)
        assert move.run is ending


OUTCOMES = st.one_of(
    st.builds(Succeeded, compensation=st.sampled_from([None, UNDO_A])),
    st.just(Skipped()),
    st.builds(
        Failed,
        error=st.just("E"),
        attempt=st.integers(1, 3),
        retry=st.builds(RetryPolicy, attempts=st.integers(1, 3)),
        permanent=st.booleans(),
        chance=st.floats(0, 1),
    ),
)


@given(
    st.lists(OUTCOMES, min_size=1, max_size=40),
    st.integers(1, 6),
    st.sampled_from(["continue", "stop"]),
    st.data(),
)
def test_every_run_comes_to_one_end(outcomes: list[Outcome], steps: int, rule, data) -> None:
    """Whatever happens, moves lead on to exactly one end, and only what was recorded is undone, backwards."""
    slip = RoutingSlip(itinerary=identify(["s"] * steps), on_compensation_failure=rule)
    recorded: list[str] = []
    undone: list[str] = []
    for outcome in outcomes:
        due = slip.next_step()
        if isinstance(outcome, Succeeded) and due is not None and outcome.compensation is not None:
            outcome = replace(outcome, compensation=Compensation(due.id, due.activity, "t"))
        if slip.ending is not None and isinstance(outcome, Skipped):
            continue  # an undo has no condition
        undo = slip.next_undo()
        move = route(slip, outcome, 0.0)
        if isinstance(outcome, Succeeded) and due is not None and outcome.compensation is not None:
            recorded.append(due.id)
        if undo is not None and not isinstance(move, Retry):
            undone.append(undo.step_id)
        slip = move.slip
        if isinstance(move, Finish):
            assert move.run in RUN_ENDED
            assert (move.run is RunStatus.COMPLETED) == (slip.ending is None)
            if rule == "continue" or not slip.not_undone:
                assert slip.is_done
            break
        assert not slip.is_done
    assert undone == recorded[::-1][: len(undone)]
