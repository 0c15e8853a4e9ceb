"""The ledger: rows tell the slip, and every change of a state is one that the tables of moves have."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from paigeant import RetryPolicy, RoutingSlip, codec, folding, interventions, ledger
from paigeant.errors import InvalidTransition
from paigeant.ledger import OPEN, Changes
from paigeant.routing import Failed, Finish, Park, Retry, Skipped, Succeeded, Undo, route
from paigeant.slip import (
    RUN_ENDED,
    RUN_MOVES,
    STEP_MOVES,
    Compensation,
    Phase,
    Revision,
    RunStatus,
    StepStatus,
    identify,
)
from paigeant.store import ClaimRequest, Grant, NextStep, Recorded, Request, RunRecord, StepKey, StepResult
from paigeant.stores.memory import MemoryStore
from paigeant.testing import ManualClock

INLINE = 20


class CheckedStore(MemoryStore):
    """A store that refuses any change of a state that the tables of moves don't have."""

    def _write(self, changes: Changes) -> None:
        runs = {run_id: run.status for run_id, run in self._runs.items()}
        rows = {key: row.status for steps in self._steps.values() for key, row in steps.items()}
        for key in changes.dropped:
            assert rows.pop(key) is StepStatus.COMPENSATION_FAILED
        for key, patch in changes.steps:
            step, then = rows[key], patch.get("status", rows[key])
            assert then is step or then in STEP_MOVES[step], f"{key}: {step} to {then}"
            rows[key] = then
        for row in changes.added:
            assert row.status in OPEN
        for run_id, patch in changes.runs:
            before, after = runs[run_id], patch.get("status", runs[run_id])
            assert after is before or after in RUN_MOVES[before], f"{run_id}: {before} to {after}"
            runs[run_id] = after
        super()._write(changes)


def now(coroutine: Any) -> Any:
    """What a method of the memory store gives: none of them ever waits."""
    try:
        coroutine.send(None)
    except StopIteration as stop:
        return stop.value
    raise AssertionError("it waited")


class History:
    """A run of which both the live slip and the rows are kept, the way executors and stores do."""

    def __init__(self, steps: int, rule: Any) -> None:
        self.clock = ManualClock()
        self.store = CheckedStore(clock=self.clock, inline_bytes=INLINE)
        self.slip = RoutingSlip(itinerary=identify(["s"] * steps), on_compensation_failure=rule)
        self.payload: dict[str, Any] = {"n": 1}
        record = RunRecord(
            "r", "w", RunStatus.PENDING, b'{"n":1}', "h", folding.pack_slip(self.slip), "c", "t"
        )
        now(self.store.record_workflow_start(record, self.due()))

    def due(self) -> NextStep | None:
        """What the live slip says is next."""
        step, undo = self.slip.next_step(), self.slip.next_undo()
        if step is not None:
            return NextStep(StepKey("r", step.id), step.activity, "t")
        if undo is not None:
            return NextStep(StepKey("r", undo.step_id, Phase.UNDO), undo.activity, undo.topic)
        return None

    def play(self, kind: str, undoable: bool, added: int, output: Any) -> None:
        """One attempt, or one thing that an operator does."""
        status = self.store._runs["r"].status
        if kind in ("cancel", "retry"):
            self.turn(kind, status)
        elif status not in RUN_ENDED:
            self.attempt(kind, undoable, added, output)

    def turn(self, kind: str, status: RunStatus) -> None:
        act = self.store.cancel_run("r", "stop") if kind == "cancel" else self.store.retry_run("r")
        try:
            now(act)
        except InvalidTransition:
            return
        if kind == "cancel" and status is not RunStatus.COMPENSATING:
            self.slip = self.slip.begin_undo("cancelled")
        elif status is RunStatus.FAILED:
            self.slip = replace(self.slip, ending=None)
        elif status is RunStatus.COMPENSATION_FAILED:
            detail = now(self.store.load_run("r"))
            again = [
                row for row in detail.steps if row.phase is Phase.DO and row.step in self.slip.not_undone
            ]
            undos = [*self.slip.compensations, *(Compensation(row.step, row.activity, "t") for row in again)]
            order = [done.step_id for done in self.slip.executed]
            undos.sort(key=lambda undo: order.index(undo.step_id))
            self.slip = replace(self.slip, compensations=tuple(undos), not_undone=())

    def attempt(self, kind: str, undoable: bool, added: int, output: Any) -> None:
        due = self.due()
        assert due is not None
        grant = now(self.store.claim_step(ClaimRequest(due.key, "me", 2)))
        assert isinstance(grant, Grant)
        forward = due.key.phase is Phase.DO
        text = codec.dump(output)
        revision = undo = None
        variables = {}
        if kind == "fail":
            outcome: Any = Failed("E", grant.attempt, RetryPolicy(attempts=2, base=0))
        elif kind == "skip" and forward:
            outcome = Skipped()
        else:
            if forward and undoable:
                undo = Compensation(due.key.step, due.activity, "t")
            if forward and added:
                new = identify(["a"] * added, taken=self.slip.step_ids(), parent=due.key.step)
                revision = Revision((*new, *self.slip.itinerary[1:]), added)
            if forward:
                variables = {"v": text}
            outcome = Succeeded(revision, undo, stored=forward and len(text) > INLINE)
        move = route(self.slip, outcome, self.clock.now())
        assert not isinstance(move, Park), "none of these waits"
        self.slip = move.slip
        succeeded = isinstance(outcome, Succeeded) and forward
        if succeeded:
            self.payload["v"] = output
            if not outcome.stored:
                self.payload[due.key.step] = output
        failed = isinstance(outcome, Failed)
        finish = move.run if isinstance(move, Finish) else None
        turned = RunStatus.COMPENSATING if isinstance(move, Undo) and forward else finish
        result = StepResult(
            due.key,
            "me",
            grant.epoch,
            grant.attempt,
            StepStatus.READY if isinstance(move, Retry) else move.status,
            run=turned,
            ending="failed" if forward and failed and not isinstance(move, Retry) else None,
            error="E" if failed else None,
            output=text if succeeded else None,
            revision=None if revision is None else folding.pack_revision(revision),
            undo_topic=None if undo is None else undo.topic,
            variables=variables,
            next=None if isinstance(move, (Retry, Finish)) else self.due(),
        )
        assert isinstance(now(self.store.record_step_result(result)), Recorded)

    def check(self) -> None:
        """The rows tell the live slip and payload, and the cursor is where the slip says."""
        detail = now(self.store.load_run("r", inline_bytes=INLINE))
        slip, payload = folding.fold(detail, inline_bytes=INLINE)
        assert slip == self.slip
        assert payload == self.payload
        cursors = [row.key for row in detail.steps if row.status in OPEN]
        due = self.due()
        ended = detail.run.status in RUN_ENDED
        assert cursors == ([] if ended or due is None else [due.key])


EVENTS = st.tuples(
    st.sampled_from(["succeed", "succeed", "fail", "fail", "skip", "retry", "cancel"]),
    st.booleans(),
    st.integers(0, 2),
    st.sampled_from([1, 12345678901234567890123]),
)


@settings(deadline=None, max_examples=300)
@given(st.integers(1, 4), st.sampled_from(["continue", "stop"]), st.lists(EVENTS, min_size=5, max_size=30))
def test_the_rows_tell_the_slip(steps: int, rule: str, events: list[tuple[str, bool, int, Any]]) -> None:
    """After any history of results, failures, cancels and retries the slip folded from the rows is the live one."""
    history = History(steps, rule)
    history.check()
    for event in events:
        history.play(*event)
        history.check()


def test_a_fold_needs_no_order_of_rows() -> None:
    """Rows are put in order by their number, however a store gives them."""
    history = History(3, "continue")
    for kind in ("succeed", "skip", "succeed"):
        history.play(kind, True, 0, 1)
    detail = now(history.store.load_run("r"))
    turned = replace(detail, steps=detail.steps[::-1])
    assert folding.fold(turned, inline_bytes=INLINE) == folding.fold(detail, inline_bytes=INLINE)


def test_an_output_above_the_limit_stays_in_the_store() -> None:
    """A large output is not in the payload, and its entry on the slip says where it is."""
    history = History(2, "continue")
    history.play("succeed", False, 0, 12345678901234567890123)
    slip, payload = folding.fold(now(history.store.load_run("r")), inline_bytes=INLINE)
    assert slip.executed[0].stored
    assert payload == {"n": 1, "v": 12345678901234567890123}


def test_an_undo_is_retried_without_what_was_undone() -> None:
    """After `runs retry` only undos that failed, and those never tried, are due again, the last step first."""
    history = History(4, "stop")
    for event in [("succeed", True)] * 3 + [("fail", False)] * 2:
        history.play(*event, 0, 1)
    history.play("succeed", False, 0, 1)
    for _ in range(2):
        history.play("fail", False, 0, 1)
    assert history.store._runs["r"].status == "compensation_failed"
    history.play("retry", False, 0, 1)
    undone = []
    while (due := history.due()) is not None:
        undone.append(due.key.step)
        history.play("succeed", False, 0, 1)
        history.check()
    assert undone == ["s_2", "s"]
    assert history.store._runs["r"].status == "compensated"


def test_a_run_that_failed_before_its_first_step_can_t_be_retried() -> None:
    """There is no step to go on with."""
    history = History(1, "continue")
    detail = now(history.store.load_run("r"))
    failed = replace(detail, run=replace(detail.run, status=RunStatus.FAILED), steps=())
    with pytest.raises(InvalidTransition, match="dispatch it again"):
        interventions.resume(failed, Changes(), now=0.0, inline_bytes=INLINE)


@given(st.integers(1, 3), st.lists(st.sampled_from(["fail", "lose", "release", "sign off"]), max_size=12))
def test_an_attempt_that_ran_counts_whatever_follows(attempts: int, ends: list[str]) -> None:
    """Failed and lost ones count and no other, also where what would record that all are used up is given back."""
    store = CheckedStore(clock=ManualClock())
    run = RunRecord("r", "w", RunStatus.PENDING, b"{}", "h", b"{}", "c", "t")
    key = StepKey("r", "s")
    now(store.record_workflow_start(run, NextStep(key, "s", "t")))
    spent = 0
    for end in ends:
        grant = now(store.claim_step(ClaimRequest(key, "me", attempts)))
        exhausted = spent == attempts
        assert (grant.attempt, grant.exhausted) == (spent + (not exhausted), exhausted)
        if end == "release":
            now(store.release_steps("me", [(key, grant.epoch)]))
        elif end == "sign off":
            now(store.sign_off("me"))
        else:
            spent = grant.attempt
            if end == "lose":
                now(store.sweep())
            else:
                result = StepResult(key, "me", grant.epoch, grant.attempt, StepStatus.READY)
                now(store.record_step_result(result))


@given(
    due_at=st.floats(0, 1e6),
    graces=st.lists(st.floats(1.0, 40.0), min_size=1, max_size=8),
    later=st.floats(0, 100),
    grace=st.sampled_from([0.5, 1.0, 10.0]),
)
def test_when_a_step_was_sent_last_follows_from_when_it_is_sent_next(
    due_at: float, graces: list[float], later: float, grace: float
) -> None:
    """It may be sent before its time a grace time after it was sent last, and no sooner."""
    sent = due_at
    for gap in graces:
        sent += gap * grace
    changes = Changes()
    ledger.postpone(StepKey("r", "s"), changes, now=sent, due_at=due_at, grace=grace)
    wake_at = changes.steps[0][1]["wake_at"]
    now = sent + later * grace
    assume(abs(later - 1) > 1e-6 and now < wake_at)
    assert ledger.is_resendable(wake_at=wake_at, due_at=due_at, now=now, grace=grace) == (later >= 1)


@settings(max_examples=30)
@given(due_at=st.floats(0, 1e6), grace=st.sampled_from([0.5, 1.0, 10.0]), late=st.floats(0, 25))
def test_where_no_message_lacks_a_step_is_sent_ever_more_seldom(
    due_at: float, grace: float, late: float
) -> None:
    """Some twenty times in ten thousand grace times, each not much later than when it is twice as old as the last."""
    now, sent = due_at + grace, []
    while now < due_at + 1e4 * grace:
        now += late * grace  # a sweep isn't always there at once
        if ledger.is_due_once_more(due_at=due_at, now=now, grace=grace):
            sent.append((now - due_at) / grace)
        changes = Changes()
        ledger.postpone(StepKey("r", "s"), changes, now=now, due_at=due_at, grace=grace)
        now = changes.steps[0][1]["wake_at"]
    assert len(sent) < 30
    assert all(after <= 2 * before + 60 for before, after in itertools.pairwise(sent))


def test_only_what_was_denied_is_done_anew() -> None:
    """A question whose text begins with all of another one's, and goes on with a mark, is another question."""
    denied = codec.dump({"value": {"denied": "no"}, "by": "", "at": 1.0})
    given = codec.dump({"value": {"value": 1}, "by": "", "at": 1.0})
    mine = {
        "question Delete it": denied,
        "question Delete it!token": b'"a"',
        "question Delete it!until": b"5.0",
        "pay!begun": b"{}",
        "pay!begun!decision": codec.dump({"value": {"approved": False}, "by": "", "at": 1.0}),
        "pay!begun!decision!token": b'"b"',
    }
    others = {
        "question Delete it! Really?": given,
        "question Delete it! Really?!token": b'"c"',
        "question Delete itself": given,
    }
    assert set(interventions.done_anew({**mine, **others})) == mine.keys() - {"pay!begun"}


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [
        (b'{"a": 1, "b": 2}', b'{"b":2,"a":1}', True),
        (b"true", b"1", False),
        (b"1", b"1.0", False),
        (b'{"a": [true]}', b'{"a": [1]}', False),
        (b"1e2", b"100.0", True),
    ],
)
def test_an_answer_is_the_same_as_json(first: bytes, second: bytes, same: bool) -> None:
    """What an answer says decides, not how it is written: true is no 1."""
    request = Request("q", "r", "s", "question", "Which?", b"{}", answer=first)
    if same:
        assert not interventions.answers("q", request, second)
    else:
        with pytest.raises(InvalidTransition, match="has been answered already"):
            interventions.answers("q", request, second)
