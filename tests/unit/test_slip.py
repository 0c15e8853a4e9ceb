"""The routing slip and its steps."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paigeant import RetryPolicy, RoutingSlip, Step
from paigeant.errors import InvalidCondition, InvalidDefinition
from paigeant.slip import (
    RUN_ENDED,
    RUN_MOVES,
    STEP_MOVES,
    Compensation,
    Executed,
    Revision,
    RunStatus,
    StepStatus,
    identify,
)

NAMES = st.text("abc_.12", min_size=1, max_size=6)


def test_the_first_step_is_next() -> None:
    """Forward, the next step is the first of the itinerary and nothing is undone."""
    slip = RoutingSlip(itinerary=identify(["a", "b"]))
    step = slip.next_step()
    assert step is not None
    assert step.id == "a"
    assert slip.next_undo() is None
    assert not slip.is_done


def test_an_empty_slip_is_done() -> None:
    """Nothing to do and nothing to undo."""
    assert RoutingSlip().is_done
    with pytest.raises(ValueError, match="no step left"):
        RoutingSlip().mark_complete()


def test_a_completed_step_moves_to_the_executed() -> None:
    """mark_complete gives a new slip; the old one stays as it was."""
    slip = RoutingSlip(itinerary=identify(["a", "b"]))
    undo = Compensation("a", "a", "topic")
    after = slip.mark_complete(compensation=undo, stored=True)
    assert [step.id for step in after.itinerary] == ["b"]
    assert after.executed == (Executed("a", "a", StepStatus.COMPLETED, stored=True),)
    assert after.compensations == (undo,)
    assert slip.executed == ()


def test_who_names_the_step_is_told_when_another_one_is_next() -> None:
    """By the step, or by its id; nothing is taken for done that isn't."""
    slip = RoutingSlip(itinerary=(Step("pay", id="first"), Step("pay", id="second")))
    first, second = slip.itinerary
    assert slip.mark_complete(first) == slip.mark_complete("first") == slip.mark_complete()
    for other in (second, "second", "pay", Step("ship")):
        with pytest.raises(ValueError, match="the next step is 'first', not"):
            slip.mark_complete(other)


def test_activity_names_are_steps() -> None:
    """A slip that is made by hand has what a workflow would have made of the same names."""
    slip = RoutingSlip(itinerary=["a", Step("b", id="x"), "a"])  # type: ignore[arg-type]
    assert slip.itinerary == identify(["a", Step("b", id="x"), "a"])
    assert slip.mark_complete().executed == (Executed("a", "a"),)
    again = RoutingSlip(itinerary=["a"], executed=(Executed("a", "a"),))  # type: ignore[arg-type]
    assert [step.id for step in again.itinerary] == ["a_2"]


def test_a_step_without_an_id_is_known_by_its_activity() -> None:
    """Also once it is done, and where another step has that id already."""
    plan = RoutingSlip(itinerary=(Step("a"), Step("b"), Step("a")))
    slip = plan.mark_complete("a")
    assert slip == plan.mark_complete(Step("a"))
    assert slip.executed == (Executed("a", "a"),)
    assert slip.find("a") == Executed("a", "a")
    assert [step.id for step in slip.itinerary] == ["b", "a_2"]


def test_a_revision_replaces_what_is_left() -> None:
    """The itinerary of a revision holds from the next step on, and what it added is counted."""
    slip = RoutingSlip(itinerary=identify(["a", "b"]), added=1)
    after = slip.mark_complete(revision=Revision(identify(["x", "y"], parent="a"), added=2))
    assert [step.id for step in after.itinerary] == ["a.1", "a.2"]
    assert after.added == 3


def test_a_run_that_turns_round_undoes_the_last_first() -> None:
    """Once it has an ending nothing more is done; undos come in the reverse order of their steps."""
    slip = RoutingSlip(itinerary=identify(["a", "b", "c"]))
    for name in ("a", "b"):
        slip = slip.mark_complete(compensation=Compensation(name, name, name))
    slip = slip.begin_undo("failed")
    assert slip.next_step() is None
    order = []
    while (undo := slip.next_undo()) is not None:
        order.append(undo.step_id)
        slip = slip.mark_undone(succeeded=undo.step_id == "b")
    assert order == ["b", "a"]
    assert (slip.undone, slip.not_undone, slip.is_done) == (("b",), ("a",), True)
    with pytest.raises(ValueError, match="nothing left to undo"):
        slip.mark_undone(succeeded=True)


def test_an_undo_can_be_named() -> None:
    """mark_undone takes out the undo it names, else the next one."""
    undos = tuple(Compensation(name, name, name) for name in "abc")
    slip = RoutingSlip(compensations=undos, ending="failed").mark_undone(succeeded=True, step_id="b")
    assert [undo.step_id for undo in slip.compensations] == ["a", "c"]
    with pytest.raises(ValueError, match="nothing left"):
        slip.mark_undone(succeeded=True, step_id="b")


def test_a_step_is_found_by_id_then_by_activity() -> None:
    """An id goes before an activity's name; of several with one activity the last counts; skipped ones don't."""
    slip = RoutingSlip(
        executed=(
            Executed("write", "first"),
            Executed("x", "write"),
            Executed("y", "draft"),
            Executed("z", "draft"),
            Executed("gone", "draft", StepStatus.SKIPPED),
        )
    )
    found = {name: slip.find(name) for name in ("write", "draft", "gone", "none")}
    assert {name: entry and entry.step_id for name, entry in found.items()} == {
        "write": "write",
        "draft": "z",
        "gone": None,
        "none": None,
    }


@given(
    steps=st.integers(0, 6),
    script=st.lists(st.tuples(st.booleans(), st.booleans(), st.integers(0, 3)), max_size=12),
)
def test_a_slip_loses_no_step(steps: int, script: list[tuple[bool, bool, int]]) -> None:
    """Whatever is done, each step is to do or done, its id occurs once, and undos only come from done steps."""
    slip = RoutingSlip(itinerary=identify(["s"] * steps))
    known = slip.step_ids()
    for undoable, revises, count in script:
        step = slip.next_step()
        if step is None:
            break
        revision = None
        if revises:
            added = identify(["t"] * count, taken=slip.step_ids(), parent=step.id)
            revision = Revision((*added, *slip.itinerary[1:]), count)
            known |= {new.id for new in added}
        undo = Compensation(step.id, step.activity, "t") if undoable else None
        slip = slip.mark_complete(compensation=undo, revision=revision)
        ids = [done.step_id for done in slip.executed] + [left.id for left in slip.itinerary]
        assert len(ids) == len(set(ids))
        assert set(ids) == slip.step_ids() == known
        order = [done.step_id for done in slip.executed]
        undos = [entry.step_id for entry in slip.compensations]
        assert undos == [name for name in order if name in undos]
    undone = slip.begin_undo("cancelled")
    expected = [entry.step_id for entry in slip.compensations][::-1]
    order = []
    while (entry := undone.next_undo()) is not None:
        order.append(entry.step_id)
        undone = undone.mark_undone(succeeded=True)
    assert order == expected == list(undone.undone)
    assert undone.is_done


@given(st.lists(st.one_of(NAMES, NAMES.map(lambda name: Step("x", id=name))), max_size=10))
def test_ids_are_unique_and_stable(entries: list[str | Step]) -> None:
    """Every step gets an id of its own, given ids are kept, and naming the same steps again gives the same ids."""
    try:
        named = identify(entries)
    except InvalidDefinition:
        given_ids = [entry.id for entry in entries if isinstance(entry, Step)]
        assert len(given_ids) != len(set(given_ids))
        return
    ids = [step.id for step in named]
    assert len(set(ids)) == len(ids) == len(entries)
    assert all(
        step.id == entry.id for step, entry in zip(named, entries, strict=True) if isinstance(entry, Step)
    )
    assert identify(entries) == identify(named) == named


@given(st.lists(NAMES, max_size=5), st.integers(1, 5))
def test_added_steps_are_counted_under_their_parent(names: list[str], first: int) -> None:
    """A step that step `p` adds is `p.n`, the same again when `p` is executed again."""
    added = identify(names, taken={"p", "q"}, parent="p", first=first)
    assert [step.id for step in added] == [f"p.{n}" for n in range(first, first + len(names))]
    assert identify(names, taken={"p", "q"}, parent="p", first=first) == added


def test_a_chain_of_steps_that_add_each_other_may_have_any_length() -> None:
    """Each has an id of its own that is no longer than any, the same again when the chain is made again."""

    def chain() -> list[str]:
        ids = ["poll"]
        for _ in range(1000):
            ids.append(identify(["one", "two"], taken=set(ids), parent=ids[-1])[1].id)
        return ids

    ids = chain()
    assert ids == chain()
    assert len(set(ids)) == 1001
    assert max(map(len, ids)) <= 200
    assert ids[:3] == ["poll", "poll.2", "poll.2.2"]


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"activity": ""}, InvalidDefinition),
        ({"activity": 3}, InvalidDefinition),
        ({"activity": "a\x00b"}, InvalidDefinition),
        ({"activity": "x" * 201}, InvalidDefinition),
        ({"id": 5}, InvalidDefinition),
        ({"id": "a\nb"}, InvalidDefinition),
        ({"args": [1]}, InvalidDefinition),
        ({"args": {1: 2}}, InvalidDefinition),
        ({"when": ""}, InvalidCondition),
        ({"when": "a >"}, InvalidCondition),
        ({"when": True}, InvalidCondition),
        ({"retries": -1}, InvalidDefinition),
        ({"retries": "many"}, InvalidDefinition),
        ({"timeout": 0}, InvalidDefinition),
        ({"timeout": -1}, InvalidDefinition),
        ({"timeout": True}, InvalidDefinition),
        ({"timeout": "1"}, InvalidDefinition),
        ({"timeout": float("nan")}, InvalidDefinition),
        ({"timeout": float("inf")}, InvalidDefinition),
        ({"topic": ""}, InvalidDefinition),
        ({"topic": 1}, InvalidDefinition),
    ],
)
def test_a_step_that_can_t_work_is_refused(fields: dict[str, Any], error: type[Exception]) -> None:
    """What can't be is an error where the step is written."""
    with pytest.raises(error):
        Step(**{"activity": "a", **fields})


def test_a_step_takes_its_options() -> None:
    """All options of a step are kept as they were given."""
    policy = RetryPolicy(attempts=2)
    step = Step("a", id="x", args={"n": 1}, when="n > 0", retries=policy, timeout=1.5, topic="t")
    assert (step.retries, step.timeout, step.topic, step.args) == (policy, 1.5, "t", {"n": 1})


def test_an_id_that_occurs_twice_is_refused() -> None:
    """Among given ids, and between them and what is taken."""
    with pytest.raises(InvalidDefinition, match="'x' occurs twice"):
        identify([Step("a", id="x"), Step("b", id="x")])
    with pytest.raises(InvalidDefinition, match="'x' occurs twice"):
        identify([Step("a", id="x")], taken={"x"}, parent="p")


def test_the_tables_of_moves_are_whole() -> None:
    """Every state has its row, no state leads to itself, and only two ended states have an exit."""
    assert set(RUN_MOVES) == set(RunStatus)
    assert set(STEP_MOVES) == set(StepStatus)
    assert all(state not in following for state, following in [*RUN_MOVES.items(), *STEP_MOVES.items()])
    exits = {state for state in RUN_ENDED if RUN_MOVES[state]}
    assert exits == {RunStatus.FAILED, RunStatus.COMPENSATION_FAILED}
    reachable = {state for following in RUN_MOVES.values() for state in following}
    assert reachable == set(RunStatus) - {RunStatus.PENDING}
