"""The rows of an adopted run say what its message said."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paigeant import ActivityRegistry, RoutingSlip, folding, ledger
from paigeant.adoption import Adoption
from paigeant.errors import NotAdopted
from paigeant.forwarder import Forwarder
from paigeant.identity import MANDATE
from paigeant.message import JUST_BEGUN, PaigeantMessage
from paigeant.observer import Observers
from paigeant.slip import Compensation, Phase, RunStatus, StepStatus, identify
from paigeant.store import RunDetail
from paigeant.stores.memory import MemoryStore
from paigeant.transports.memory import MemoryTransport


def adoption() -> Adoption:
    """One on nothing."""
    store = MemoryStore()
    return Adoption(store, Forwarder(store, MemoryTransport(), ActivityRegistry()), Observers(), "worker")


@st.composite
def messages(draw: st.DrawFn) -> PaigeantMessage:
    """A message from somewhere in a run: steps are done, skipped, revised, then perhaps some of them undone."""
    slip = RoutingSlip(itinerary=identify(["s"] * draw(st.integers(1, 5))), added=draw(st.integers(0, 3)))
    payload: dict[str, Any] = draw(st.dictionaries(st.sampled_from(["x", "y"]), st.integers() | st.text()))
    for _ in range(draw(st.integers(0, len(slip.itinerary) - 1))):
        step = slip.itinerary[0]
        skipped = draw(st.booleans())
        undo = (
            Compensation(step.id, step.activity, "undo-topic")
            if not skipped and draw(st.booleans())
            else None
        )
        status = StepStatus.SKIPPED if skipped else StepStatus.COMPLETED
        slip = slip.mark_complete(status=status, compensation=undo)
        if not skipped:
            payload[step.id] = draw(st.none() | st.lists(st.integers()))
    turned: bool = draw(st.booleans())
    if slip.compensations and turned:
        slip = slip.begin_undo(draw(st.sampled_from(["failed", "cancelled"])))
        for _ in range(draw(st.integers(0, len(slip.compensations) - 1))):
            slip = slip.mark_undone(succeeded=draw(st.booleans()))
    epoch = draw(st.integers(0, 3))
    return PaigeantMessage(f"r/x/do/{epoch}", "r", slip, payload, "w", "c", "t", {"a": "b"})


@given(message=messages())
def test_folded_rows_are_the_message_again(message: PaigeantMessage) -> None:
    """Slip and payload come back whole, so that the run can go on from the rows alone; one row is open."""
    run, rows, variables = adoption().records(message)
    rows = tuple(ledger.adopted(row, now=5.0, grace=1.0) for row in rows)
    slip, payload = folding.fold(RunDetail(run, rows, variables), inline_bytes=10_000)
    assert (slip, payload) == (message.routing_slip, message.payload)
    assert [row.seq for row in rows] == list(range(len(rows)))
    assert len({row.key for row in rows}) == len(rows)
    open_rows = [row for row in rows if row.status in ledger.OPEN]
    assert open_rows == [rows[-1]]
    assert (rows[-1].step, rows[-1].phase) == (message.step_id, message.phase)
    assert f"/{rows[-1].epoch}" == message.message_id[-2:]
    forward = message.phase is Phase.DO
    assert run.status is (RunStatus.RUNNING if forward else RunStatus.COMPENSATING)


def test_no_token_is_kept() -> None:
    """Headers that are of one message, or secret, don't get into the rows of the run."""
    headers = {"a": "b", "obo_token": "t", "jws_signature": "s", "paigeant-payload": "x", JUST_BEGUN: "said"}
    slip = RoutingSlip(itinerary=identify(["s"]))
    run, _, _ = adoption().records(PaigeantMessage("m", "r", slip, headers=headers))
    assert run.headers == {"a": "b"}


def test_for_whom_a_run_acts_is_read_before_it_is_adopted() -> None:
    """With a header that says nothing in its row, neither could the run go on nor anybody look at it."""
    slip = RoutingSlip(itinerary=identify(["s"]))
    message = PaigeantMessage("m", "r", slip, headers={MANDATE: '{"sub": "ann"}'})
    with pytest.raises(NotAdopted, match="for whom it acts can't be read"):
        adoption().records(message)
