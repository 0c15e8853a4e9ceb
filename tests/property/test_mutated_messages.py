"""Messages that were changed on the way: each is refused with a reason or read as what it says, and no worker minds.

The corpus are messages of every kind that the engine sends. A change puts something hostile in the place of any value,
drops or doubles a key, or damages the bytes.
"""

from __future__ import annotations

import asyncio
import json
import logging
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.patience import PATIENCE
from tests.security.signed import Raw

from paigeant import ActivityRegistry, ItineraryPolicy, Paigeant, PaigeantMessage, RoutingSlip, Settings, Step
from paigeant.errors import MessageInvalid
from paigeant.message import MessageId, Seal, decode, encode
from paigeant.retry import RetryPolicy
from paigeant.slip import Compensation, Executed, StepStatus
from paigeant.transports import open_transport
from paigeant.workflow import Workflow

FORWARD = RoutingSlip(
    itinerary=(
        Step("pay", id="pay", args={"n": 1}, when="n > 0", retries=RetryPolicy(3), timeout=9.0, topic="pay"),
        Step("pay", id="again", depth=1, retries=2),
    ),
    executed=(Executed("first", "pay"), Executed("second", "pay", StepStatus.SKIPPED)),
    compensations=(Compensation("first", "pay", "pay"),),
    policy=ItineraryPolicy(allowed=["pay"], max_added=3, max_each=2, max_depth=4),
    added=1,
    deadline=4e9,
)
BACK = RoutingSlip(
    executed=(Executed("first", "pay"), Executed("second", "pay", stored=True)),
    compensations=(Compensation("first", "pay", "pay"),),
    ending="failed",
    undone=("second",),
    not_undone=("third",),
)
CORPUS = [
    json.loads(encode(message))
    for message in (
        PaigeantMessage("r/pay/do/0", "r", FORWARD, {"n": 1, "first": [1, {"a": None}]}, "w", "c", "t"),
        PaigeantMessage("r/first/undo/7", "r", BACK, {"first": 1}, headers={"traceparent": "00-1-2-01"}),
        PaigeantMessage(
            "r/pay/do/0", "r", RoutingSlip((Step("pay", id="pay"),)), seal=Seal("d", "pay", 1, 2)
        ),
    )
]
HOSTILE: list[Any] = [
    *(None, True, -1, 0, 2**31, 2**53, 2**63, 2**64, 10**30, 0.5, 1e300, -1e300, 5e-324),
    *("", " ", "\0", "\n", "../..", "x" * 300, "x" * 10_000, "(", "a" + ".a" * 50_000, "1+" * 200_000 + "1"),
    *("r/pay/do/" + "9" * 40, "r/pay/do/" + "9" * 5000, "r/pay/do/\u0663", "r/pay/do/-1", "a/b/c/d/e/f"),
    *("failed", "undo", "stored", "compensated", "pay", "first"),
    *([], [[]], [None], {}, {"": 1}, {"a": {"b": [{}]}}),
]
REASONS = {
    *("not_utf8", "not_json", "duplicate_key", "not_a_number", "number_out_of_range", "lone_surrogate"),
    *("too_deep", "too_large", "unsupported_version", "wrong_shape"),
}


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where in a JSON value there is something."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, each in inner:
        yield (*path, key)
        yield from places(each, (*path, key))


def changed(message: Any, path: tuple[Any, ...], hostile: Any) -> Any:
    """`message` with `hostile` in that place; `...` drops what is there."""
    copy = json.loads(json.dumps(message))
    around = copy
    for key in path[:-1]:
        around = around[key]
    if hostile is ...:
        del around[path[-1]]
    else:
        around[path[-1]] = hostile
    return copy


def damaged(body: bytes, at: int, how: str, byte: int) -> bytes:
    """`body` with one byte changed, or a part of it cut out, doubled or put in front."""
    at %= len(body)
    match how:
        case "byte":
            return body[:at] + bytes([byte]) + body[at + 1 :]
        case "cut":
            return body[:at] + body[at + byte :]
        case "doubled":
            return body[:at] + body[at : at + byte] + body[at:]
        case _:
            return body[:at]


def read(body: bytes) -> PaigeantMessage | str:
    """The message in `body`, or the reason why there is none."""
    try:
        return decode(body)
    except MessageInvalid as exc:
        return exc.reason


def mutations() -> st.SearchStrategy[bytes]:
    """Bodies that were changed in one to three places."""

    @st.composite
    def drawn(draw: st.DrawFn) -> bytes:
        message = draw(st.sampled_from(CORPUS))
        for _ in range(draw(st.integers(0, 2))):
            path = draw(st.sampled_from(list(places(message))))
            message = changed(message, path, draw(st.sampled_from([..., *HOSTILE])))
        body = json.dumps(message).encode()
        if draw(st.booleans()):
            how = draw(st.sampled_from(["byte", "cut", "doubled", "short"]))
            body = damaged(body, draw(st.integers(0, 10**6)), how, draw(st.integers(0, 255)))
        return body

    return drawn()


@given(mutations())
def test_a_changed_body_is_read_or_refused(body: bytes) -> None:
    """What is read can be written again and is the same; what isn't has one of the documented reasons."""
    message = read(body)
    if isinstance(message, str):
        assert message in REASONS
        return
    assert decode(encode(message)) == message
    known = MessageId.read(message.message_id)
    assert known is None or known.epoch < 10**18


@pytest.mark.parametrize("place", range(len(CORPUS)), ids=["forward", "back", "sealed"])
def test_each_value_is_guarded(place: int) -> None:
    """Everything hostile in every place of a message: read or refused, and never the end of the process."""
    for path in places(CORPUS[place]):
        for hostile in (..., *HOSTILE):
            message = read(json.dumps(changed(CORPUS[place], path, hostile)).encode())
            assert isinstance(message, PaigeantMessage) or message in REASONS


@pytest.mark.parametrize(
    ("adopt", "place"),
    [(False, "sqlite"), (True, "sqlite"), (True, "postgres")],
    ids=["knows its runs", "adopts", "adopts on postgres"],
)
async def test_a_worker_minds_no_changed_message(
    adopt: bool, place: str, tmp_path: Path, postgres_store_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Hundreds of them in its topic, most of which can be read: nothing goes unhandled, and a good run ends."""
    activity = ActivityRegistry()

    @activity.execute(retries=0)
    async def pay(n: int = 0) -> int:
        return n

    @activity.compensate("pay")
    async def refund() -> None:
        pass

    url = postgres_store_url if place == "postgres" else f"sqlite:///{tmp_path / 'runs.db'}"
    chance = random.Random(7)
    times = {"lease": 2.0, "heartbeat": 0.5, "sweep_interval": 0.2}
    settings = Settings(store_url=url, transport_url=url, adopt=adopt, **times)
    caplog.set_level(logging.ERROR)
    async with Paigeant(settings, activities=activity) as app:
        raw: Any = Raw()
        transport = open_transport(url, envelope=raw)
        await transport.connect()
        number = 0
        for message in CORPUS[:2]:
            for path in places(message):
                for hostile in chance.sample([..., *HOSTILE], 8):
                    other = {
                        **message,
                        "workflow_id": f"r{number}",
                        "message_id": f"r{number}/pay/do/{number}",
                    }
                    raw.wire = json.dumps(changed(other, path, hostile)).encode()
                    sent = PaigeantMessage(f"m{number}", "r", FORWARD)
                    await transport.publish("pay", sent)
                    number += 1
        worker = app.worker()
        working = asyncio.create_task(worker.run())
        run = await app.dispatch(Workflow("good", ["pay"]), {"n": 5}, workflow_id="good")
        assert (await run.wait(PATIENCE)).output == 5
        await worker.stop()
        await working
        await transport.close()
        runs = await app.store.list_runs(limit=1000)
        letters = await app.store.list_dead_letters(limit=1000)
    assert number > 300
    # Many are read in spite of the change: where runs are adopted each of these is one.
    assert len(runs) > 50 if adopt else [run.id for run in runs] == ["good"]
    assert len(letters) > 50
    assert "could not be handled" not in caplog.text
