"""PaigeantMessage and its one wire format."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paigeant import ItineraryPolicy, PaigeantMessage, RetryPolicy, RoutingSlip, Step
from paigeant.codec import MAX_DEPTH, dump
from paigeant.errors import MessageInvalid, MessageTooLarge, UnsupportedVersion
from paigeant.message import SPEC_VERSION, MessageId, decode, encode
from paigeant.slip import Compensation, Executed, Phase, StepStatus

NAMES = st.text("abc _.é", min_size=1, max_size=5).filter(str.strip)
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**80), 2**80) | st.floats(-1e300, 1e300) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)
POLICIES = st.builds(
    RetryPolicy,
    attempts=st.integers(1, 9),
    base=st.floats(0, 1e6),
    cap=st.floats(0, 1e6),
    jitter=st.floats(0, 1),
)
STEPS = st.builds(
    Step,
    NAMES,
    id=NAMES,
    args=st.dictionaries(NAMES, PLAIN, max_size=3),
    when=st.sampled_from([None, "a > 1"]),
    retries=st.none() | st.integers(0, 5) | POLICIES,
    timeout=st.none() | st.floats(0.001, 1e9),
    topic=st.none() | NAMES,
)
SLIPS = st.builds(
    RoutingSlip,
    itinerary=st.lists(STEPS, max_size=3).map(tuple),
    executed=st.lists(
        st.builds(Executed, NAMES, NAMES, st.sampled_from(StepStatus), st.booleans()), max_size=3
    ).map(tuple),
    compensations=st.lists(st.builds(Compensation, NAMES, NAMES, NAMES), max_size=3).map(tuple),
    policy=st.builds(
        ItineraryPolicy,
        allowed=st.none() | st.lists(NAMES, max_size=2).map(tuple),
        max_added=st.none() | st.integers(0, 9),
        max_total=st.integers(1, 9),
    ),
    on_compensation_failure=st.sampled_from(["continue", "stop"]),
    added=st.integers(0, 9),
    ending=st.sampled_from([None, "failed", "cancelled"]),
    undone=st.lists(NAMES, max_size=2).map(tuple),
    not_undone=st.lists(NAMES, max_size=2).map(tuple),
    deadline=st.none() | st.floats(0, 1e10),
)
MESSAGES = st.builds(
    PaigeantMessage,
    message_id=NAMES,
    workflow_id=NAMES,
    routing_slip=SLIPS,
    payload=st.dictionaries(st.text(max_size=5), PLAIN, max_size=4),
    workflow=NAMES,
    correlation_id=NAMES,
    trace_id=NAMES,
    headers=st.dictionaries(NAMES, NAMES, max_size=2),
)


def body(**changes: Any) -> bytes:
    """A good body with some of its fields replaced, or taken out where the value is `...`."""
    fields = {
        "spec_version": SPEC_VERSION,
        "message_id": "m",
        "workflow_id": "r",
        "routing_slip": {},
        **changes,
    }
    return json.dumps({name: value for name, value in fields.items() if value is not ...}).encode()


@given(MESSAGES)
def test_a_message_comes_back_equal(message: PaigeantMessage) -> None:
    """Encoding and decoding lose nothing: no field, no digit, no key."""
    back = decode(encode(message))
    assert back == message
    assert encode(back) == encode(message)


def test_a_slip_of_lists_is_one_of_tuples() -> None:
    """However a slip was put together, it is the value that its bytes give back, and nobody can change it."""
    steps = [Step("a", id="a"), Step("b", id="b")]
    slip = RoutingSlip(steps, executed=[Executed("z", "z")], compensations=[], undone=["y"])  # type: ignore[arg-type]
    message = PaigeantMessage("m", "w", slip)
    steps.clear()
    body = encode(message)
    assert decode(body) == message
    assert encode(decode(body)) == body
    assert [step.activity for step in message.routing_slip.itinerary] == ["a", "b"]


def test_the_version_is_always_written() -> None:
    """A reader needs the version even where all else is a default."""
    message = PaigeantMessage("m", "r", RoutingSlip())
    assert json.loads(encode(message))["spec_version"] == SPEC_VERSION


def test_a_minor_version_is_read() -> None:
    """A reader takes any minor of its major."""
    assert decode(body(spec_version="1.99")).spec_version == "1.99"


@pytest.mark.parametrize("version", ["2.0", "0.9", "", "one", None, 1.0, 1, ["1.0"], ...])
def test_another_major_version_is_refused(version: Any) -> None:
    """What this code doesn't speak, or what names no version, is unsupported; the error says which it speaks."""
    with pytest.raises(UnsupportedVersion, match=SPEC_VERSION) as caught:
        decode(body(spec_version=version))
    assert caught.value.reason == "unsupported_version"


@pytest.mark.parametrize(
    "changes",
    [
        {"message_id": ...},
        {"message_id": 5},
        {"workflow_id": None},
        {"routing_slip": ...},
        {"routing_slip": []},
        {"routing_slip": {"itinerary": [{}]}},
        {"routing_slip": {"itinerary": [{"activity": ""}]}},
        {"routing_slip": {"itinerary": [{"activity": "a", "when": "a >"}]}},
        {"routing_slip": {"itinerary": [{"activity": "a", "timeout": -1}]}},
        {"routing_slip": {"itinerary": [{"activity": "a", "retries": -1}]}},
        {"routing_slip": {"itinerary": [{"activity": "a", "args": {"b": 1}, "more": 2}]}},
        {"routing_slip": {"itinerary": "abc"}},
        {"routing_slip": {"ending": "completed"}},
        {"routing_slip": {"added": "1"}},
        {"routing_slip": {"added": 1.5}},
        {"routing_slip": {"executed": [{"step_id": "a", "activity": "a", "status": "great"}]}},
        {"routing_slip": {"policy": {"max_total": 0}}},
        {"payload": []},
        {"payload": None},
        {"headers": {"a": 1}},
        {"more": 1},
    ],
)
def test_a_body_of_another_shape_is_refused(changes: dict[str, Any]) -> None:
    """A missing, unknown or mistyped field is wrong_shape: nothing is guessed or converted."""
    with pytest.raises(MessageInvalid) as caught:
        decode(body(**changes))
    assert caught.value.reason == "wrong_shape"


@pytest.mark.parametrize(
    "slip",
    [
        {"added": 2**31},
        {"added": 2**64},
        {"added": -1},
        {"itinerary": [{"activity": "a", "depth": 2**64}]},
        {"deadline": 253402300800.0},
        {"deadline": 1e300},
        {"deadline": -1.0},
    ],
    ids=str,
)
def test_a_number_that_no_database_holds_is_refused(slip: dict[str, Any]) -> None:
    """Counts end at 31 bits, and instants with the year 9999."""
    with pytest.raises(MessageInvalid) as caught:
        decode(body(routing_slip=slip))
    assert caught.value.reason == "number_out_of_range"


@pytest.mark.parametrize(
    ("text", "epoch"),
    [
        ("r/s/do/0", 0),
        ("r/s/do/999999999999999999", 999999999999999999),
        ("r/s/do/1000000000000000000", None),
        ("r/s/do/" + "9" * 5000, None),
        ("r/s/do/-1", None),
        ("r/s/do/\u0663", None),
        ("r/s/do/", None),
        ("r/s/do", None),
        ("", None),
    ],
)
def test_an_id_is_read_that_was_made_here(text: str, epoch: int | None) -> None:
    """Anybody may write an id: one that isn't like ours says nothing."""
    read = MessageId.read(text)
    assert (None if read is None else read.epoch) == epoch


@pytest.mark.parametrize("text", [b"[]", b'"a"', b"1", b"null", b"true"])
def test_a_message_is_an_object(text: bytes) -> None:
    """Any other JSON value is wrong_shape."""
    with pytest.raises(MessageInvalid, match="wrong_shape"):
        decode(text)


def test_the_size_is_looked_at_first() -> None:
    """What is too large is refused unread, both ways, with the numbers."""
    message = PaigeantMessage("m", "r", RoutingSlip(), {"text": "x" * 100})
    size = len(encode(message))
    assert encode(message, limit_bytes=size) == encode(message)
    with pytest.raises(MessageTooLarge, match="the limit is"):
        encode(message, limit_bytes=size - 1)
    with pytest.raises(MessageTooLarge) as caught:
        decode(b"\xff" * 11, limit_bytes=10)
    assert (caught.value.reason, caught.value.size, caught.value.limit) == ("too_large", 11, 10)


def test_a_value_that_is_no_json_is_refused() -> None:
    """A payload that somebody built by hand from other things can't be sent."""
    with pytest.raises(MessageInvalid, match="not_json"):
        encode(PaigeantMessage("m", "r", RoutingSlip(), {"x": object()}))


def test_a_message_says_what_is_due() -> None:
    """Forward its next step, undoing its next undo, else nothing."""
    step, undo = Step("a", id="s"), Compensation("u", "b", "t")
    forward = PaigeantMessage("m", "r", RoutingSlip((step,), compensations=(undo,)))
    undoing = forward.evolve(routing_slip=forward.routing_slip.begin_undo("failed"))
    done = forward.evolve(routing_slip=RoutingSlip())
    assert [(m.due, m.step_id, m.phase) for m in (forward, undoing, done)] == [
        (step, "s", Phase.DO),
        (undo, "u", Phase.UNDO),
        (None, "", Phase.DO),
    ]


def test_the_deepest_values_travel() -> None:
    """What may be stored may also travel, wherever in a message it stands: what nobody reads would stop a run."""
    value: Any = 1
    for _ in range(MAX_DEPTH - 1):
        value = [value]
    assert dump({"x": value})  # the arguments of a step count as one value
    slip = RoutingSlip((Step("a", id="a", args={"x": value}),))
    message = PaigeantMessage("r/a/do/0", "r", slip, payload={"x": [value]})
    assert decode(encode(message)) == message
