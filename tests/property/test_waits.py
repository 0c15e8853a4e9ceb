"""Steps that wait, in values: when they go on, that an attempt counts once, and which answer to a request stands."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import hypothesis.strategies as st
from hypothesis import example, given

from paigeant import interventions, ledger
from paigeant.errors import InvalidTransition, RequestNotFound
from paigeant.ledger import Changes, Head
from paigeant.slip import Phase, RunStatus, StepStatus
from paigeant.store import (
    ClaimRequest,
    Grant,
    Recorded,
    Refused,
    Request,
    Signal,
    StepKey,
    StepResult,
)

KEY = StepKey("r", "s")
signals = st.lists(st.sampled_from("abcd"), max_size=3, unique=True).map(tuple)
instants = st.floats(min_value=0, max_value=1e9, allow_nan=False)
values = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.floats(-9, 9) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=2), inner, max_size=2),
    max_leaves=4,
)


def running(attempt: int, phase: Phase = Phase.DO) -> Head:
    """A step that `w` does, with this attempt."""
    run = RunStatus.RUNNING if phase is Phase.DO else RunStatus.COMPENSATING
    return Head(KEY._replace(phase=phase), 0, run, StepStatus.RUNNING, 7, attempt, "w", 0.0)


def after(head: Head, changes: Changes) -> Head:
    """The step with what was written of it and of its run."""
    steps = [patch for key, patch in changes.steps if key == head.key]
    runs = [patch for _, patch in changes.runs]
    fields = ("status", "epoch", "attempt", "worker", "not_before", "wake_at")
    for patch in steps:
        head = replace(head, **{name: value for name, value in patch.items() if name in fields})
    for patch in runs:
        head = replace(head, run=patch["status"])
    return head


def parked(head: Head, waits_for: tuple[str, ...], until: float | None, **more: Any) -> tuple[Any, Head]:
    """What the ledger says to an attempt that would wait, and the step after it."""
    changes = Changes()
    result = StepResult(head.key, "w", 7, head.attempt, StepStatus.WAITING, waits_for=waits_for, until=until)
    return ledger.record(head, result, changes, now=1.0, grace=10.0, **more), after(head, changes)


@given(waits_for=signals, arrived=st.sets(st.sampled_from("abcd")), attempt=st.integers(1, 5))
def test_a_step_is_parked_unless_something_has_come_for_it(
    waits_for: tuple[str, ...], arrived: set[str], attempt: int
) -> None:
    """Then nothing changes, and its worker goes on; else nobody has it, and its attempt isn't counted."""
    before = running(attempt)
    answer, head = parked(before, waits_for, None, arrived=arrived)
    if arrived.intersection(waits_for):
        assert (answer, head) == (Refused("arrived"), before)
    else:
        assert answer == Recorded()
        assert (head.status, head.run) == (StepStatus.WAITING, RunStatus.WAITING)
        assert (head.worker, head.attempt, head.epoch, head.wake_at) == (None, attempt - 1, 7, ledger.NEVER)


@given(
    until=instants,
    now=instants,
    attempt=st.integers(1, 5),
    bound=st.integers(1, 5),
    phase=st.sampled_from(list(Phase)),
)
@example(until=5.0, now=5.0, attempt=1, bound=1, phase=Phase.DO)
def test_a_parked_attempt_goes_on_from_its_instant(
    until: float, now: float, attempt: int, bound: int, phase: Phase
) -> None:
    """Not before; it is the same attempt, so it can never be one too many, and the run goes the way that it went."""
    _, head = parked(running(attempt, phase), (), until)
    changes = Changes()
    answer = ledger.claim(head, ClaimRequest(head.key, "other", max(bound, attempt)), changes, now=now)
    if now < until:
        assert isinstance(answer, Refused)
        assert answer.reason in ("taken", "not_due")
        assert answer.retry_in is None or answer.retry_in == until - now
        assert (changes.steps, changes.runs) == ([], [])
    else:
        assert answer == Grant(8, attempt, now, exhausted=False)
        head = after(head, changes)
        assert (head.status, head.worker, head.epoch) == (StepStatus.RUNNING, "other", 8)
        assert head.run is running(attempt, phase).run
        assert changes.steps[0][1]["waits_for"] is None


@given(until=st.none() | instants, now=instants, attempt=st.integers(1, 5))
def test_a_woken_attempt_goes_on_at_once(until: float | None, now: float, attempt: int) -> None:
    """Whatever it waited for, and however long it would have."""
    _, head = parked(running(attempt), ("a",), until)
    changes = Changes()
    ledger.wake(head.key, changes, now=now)
    head = after(head, changes)
    assert (head.status, head.wake_at, head.not_before) == (StepStatus.READY, now, now)
    grant = ledger.claim(head, ClaimRequest(head.key, "other", attempt), Changes(), now=now)
    assert grant == Grant(8, attempt, now, exhausted=False)


@given(
    attempt=st.integers(1, 5),
    status=st.sampled_from([status for status in StepStatus if status is not StepStatus.SKIPPED]),
    strict=st.booleans(),
)
def test_whoever_left_a_step_has_no_say_in_it(attempt: int, status: StepStatus, strict: bool) -> None:
    """What comes of its claim after it was parked is stale, be it the same report once more."""
    _, head = parked(running(attempt), ("a",), None)
    changes = Changes()
    late = StepResult(KEY, "w", 7, attempt, status, strict=strict, waits_for=("a",), output=b"1")
    assert ledger.record(head, late, changes, now=2.0, grace=10.0) == Refused("stale")
    assert changes == Changes()


@given(given=st.lists(values, min_size=1, max_size=6), ended=st.integers(0, 6))
def test_of_all_answers_one_stands(given: list[Any], ended: int) -> None:
    """The first, while its step waits: the same once more, however it is written, is fine, and another is refused."""
    request = Request("q", "r", "s", "question", "?", b"{}")
    first: list[Any] = []
    for number, value in enumerate(given):
        waits = number < ended
        answer = Signal(request.signal, json.dumps(first[0]).encode(), 1.0, "ada") if first else None
        request = request.with_answer(answer, 2.0, waits=waits)
        text = json.dumps(value, indent=number).encode()
        if first:
            same = (
                json.dumps(first[0], sort_keys=True) == json.dumps(value, sort_keys=True) or first[0] == value
            )
            assert _answered(request, text) == ("again" if same else "InvalidTransition")
        elif waits:
            assert _answered(request, text) == "kept"
            first.append(value)
        else:
            assert _answered(request, text) == "InvalidTransition"
    assert _answered(None, b"1") == "RequestNotFound"


@given(expires_at=instants, now=instants)
def test_nobody_answers_after_its_time(expires_at: float, now: float) -> None:
    """From the instant on at which its step goes on without an answer."""
    request = Request("q", "r", "s", "question", "?", b"{}", expires_at=expires_at)
    request = request.with_answer(None, now, waits=True)
    assert _answered(request, b"1") == ("kept" if now < expires_at else "InvalidTransition")


def _answered(request: Request | None, text: bytes) -> str:
    try:
        return "kept" if interventions.answers("q", request, text) else "again"
    except (InvalidTransition, RequestNotFound) as exc:
        return type(exc).__name__
