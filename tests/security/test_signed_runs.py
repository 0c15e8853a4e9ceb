"""Signed messages under real workers: what is forged never runs, and what is ours ends, whatever becomes of keys."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import gc
import json
import resource
import secrets
import sqlite3
import sys
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
from tests.chaos.sizes import full, short
from tests.observers import Seen
from tests.patience import PATIENCE
from tests.security.authority import Authority
from tests.security.forgeries import forged
from tests.security.signed import (
    RING,
    STORE,
    TRUST,
    Raw,
    message,
    paying,
    put,
    required,
    sealing,
    serving,
    trusted,
)
from tests.services import free_port

from paigeant import ActivityRegistry, Paigeant, PaigeantMessage, Step, WaitFor, Workflow, jwks, signing
from paigeant.envelope import framed
from paigeant.errors import ConfigurationError, MessageInvalid
from paigeant.keyfiles import FileKeys, write_private
from paigeant.keys import Key, KeyRing
from paigeant.signing import SignedEnvelope
from paigeant.slip import RunStatus
from paigeant.testing import ManualClock
from paigeant.transport import BODY_KEPT_BYTES
from paigeant.transports import open_transport
from paigeant.transports.memory import MemoryTransport


async def test_what_is_forged_is_kept_with_its_reason_and_never_runs(
    places: dict[str, str], ring: KeyRing
) -> None:
    """On each transport: 0 executions, a bounded dead letter each, and the good message behind them is done."""
    calls: list[Any] = []
    seen = Seen()
    cases = forged(ring.active)
    settings = required(**places)
    async with Paigeant(settings, activities=paying(calls)):
        pass  # makes the tables
    await put(places, {f"{name}/pay/do/0": wire for name, (wire, _) in cases.items()})
    async with serving(settings, paying(calls), seen) as app:
        run = await app.dispatch(Workflow("order", ["pay"]), {"sum": 1})
        assert (await run.wait(PATIENCE)).status is RunStatus.COMPLETED
        await seen.wait_for("delivery.rejected", len(cases))
        letters = await app.store.list_dead_letters(limit=1000)
    assert calls == [1]
    found = {unquote(letter.id.partition("/")[0]): letter.reason for letter in letters}
    assert found == {name: reason for name, (_, reason) in cases.items()}
    assert max(len(letter.body) for letter in letters) <= BODY_KEPT_BYTES
    told = Counter(event.more["reason"] for event in seen.events if event.name == "delivery.rejected")
    assert told == Counter(reason for _, reason in cases.values())


@pytest.mark.slow
async def test_a_message_with_any_bit_flipped_never_runs(ring: KeyRing) -> None:
    """Each bit of each byte: 0 executions, a dead letter with the reason of that place for each, and memory is flat."""
    calls: list[Any] = []
    seen = Seen()
    good = sealing(ring.active).seal(message(), "pay")
    head = good.index(b"\n")
    async with serving(
        required(transport_url="memory://", store_url="memory://"), paying(calls), seen
    ) as app:
        assert isinstance(app.transport, MemoryTransport)
        before = resident_bytes()
        for bit in range(len(good) * 8):
            changed = bytearray(good)
            changed[bit // 8] ^= 1 << bit % 8
            app.transport.put("pay", f"{bit}/pay/do/0", bytes(changed))
        await seen.wait_for("delivery.rejected", len(good) * 8)
        grown = resident_bytes() - before
        letters = await app.store.list_dead_letters(limit=len(good) * 8)
    assert calls == []
    reasons = {int(letter.id.partition("/")[0]): letter.reason for letter in letters}
    assert reasons.keys() == set(range(len(good) * 8))
    assert {reason for bit, reason in reasons.items() if bit // 8 > head} == {"bad_signature"}
    assert {reason for bit, reason in reasons.items() if bit // 8 == head} == {"bad_frame"}
    assert {reason for bit, reason in reasons.items() if bit // 8 < head} == {
        *("bad_frame", "bad_header", "bad_signature", "unknown_key", "unsigned")
    }
    assert grown < 32 * 1024 * 1024  # the letters


def resident_bytes() -> int:
    """What this process has in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


async def test_a_replay_after_the_end_is_a_duplicate(places: dict[str, str], ring: KeyRing) -> None:
    """The very bytes that started a run change nothing once it has ended: one duplicate is counted, nothing else."""
    calls: list[Any] = []
    seen = Seen()
    workflow = Workflow("order", ["pay"])
    async with serving(required(**places), paying(calls), seen) as app:
        run = await app.dispatch(workflow, {"sum": 1}, workflow_id="r")
        await run.wait(PATIENCE)
        before = await run.detail()
        wire = app.forwarder.envelope.seal(message(payload={"sum": 1}), "pay")
        duplicates = seen.count("delivery.duplicate")
        await put(places, {"r/pay/do/0": wire})
        await seen.wait_for("delivery.duplicate", duplicates + 1)
        assert await run.detail() == before
        assert await app.store.list_dead_letters() == []
    assert calls == [1]


@pytest.mark.slow
@pytest.mark.parametrize("count", [short(2_000), full(100_000)])
async def test_a_flood_of_replays_starts_nothing(redis_url: str, ring: KeyRing, count: int) -> None:
    """Each copy of a message whose run has ended is a duplicate; memory is flat, and who comes behind is served."""
    calls: list[Any] = []
    seen = Seen(keeps=False)
    workflow = Workflow("order", ["pay"])
    settings = required(transport_url=redis_url, namespace=f"replays-{secrets.token_hex(4)}")
    raw = Raw()
    replaying = open_transport(redis_url, envelope=raw, namespace=settings.namespace)
    async with contextlib.AsyncExitStack() as stack:
        app = await stack.enter_async_context(serving(settings, paying(calls), seen))
        await replaying.connect()
        stack.push_async_callback(replaying.close)
        await (await app.dispatch(workflow, {"sum": 1}, workflow_id="r")).wait(PATIENCE)
        raw.wire = app.forwarder.envelope.seal(message(payload={"sum": 1}), "pay")
        before = resident_bytes()
        for _ in range(0, count, 500):
            await asyncio.gather(*(replaying.publish("pay", message()) for _ in range(500)))
        last = await app.dispatch(workflow, {"sum": 2})
        assert (await last.wait(count / 50)).status is RunStatus.COMPLETED
        await seen.wait_for("delivery.duplicate", count)
        assert resident_bytes() - before < 32 * 1024 * 1024
        assert await app.store.list_dead_letters() == []
    assert calls == [1, 2]


async def test_every_kind_of_run_ends_when_signatures_are_required(ring: KeyRing) -> None:
    """Steps that cross topics, wait for signals, fail and are undone by two workers: all of it is signed and taken."""
    undone: list[str] = []
    ours, theirs = ActivityRegistry(), ActivityRegistry()

    @ours.execute(topic="ours")
    async def reserve(sku: str) -> str:
        return sku

    @ours.compensate("reserve")
    async def release(output: str) -> None:
        undone.append(output)

    @theirs.execute(topic="theirs", retries=0)
    async def charge(reserve: str, fails: bool) -> str:
        if fails:
            raise ValueError("declined")
        return f"charged {reserve}"

    @ours.execute(topic="ours")
    async def ship(charge: str) -> str:
        return f"{charge}, shipped"

    steps: list[str | Step] = ["reserve", WaitFor("paid"), "charge", "ship"]
    known = ActivityRegistry.merged([ours, theirs])
    async with (
        serving(required(), known, topics=["ours", "paigeant.waits"]) as app,
        serving(required(), known, topics=["theirs"]),
    ):
        runs = [
            await app.dispatch(Workflow("w", steps), {"sku": f"s{n}", "fails": n % 2 == 1}) for n in range(6)
        ]
        for run in runs:
            await run.signal("paid", True)
        results = [await run.wait(PATIENCE) for run in runs]
        assert await app.store.list_dead_letters() == []
    assert [result.status for result in results] == [RunStatus.COMPLETED, RunStatus.COMPENSATED] * 3
    assert sorted(undone) == ["s1", "s3", "s5"]


async def test_steps_that_go_on_locally_sign_nothing(ring: KeyRing, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run of three steps that one worker does in a row has one message, the first."""
    sealed: list[str] = []
    seal = SignedEnvelope.seal

    def counted(self: SignedEnvelope, message: PaigeantMessage, topic: str) -> bytes:
        sealed.append(topic)
        return seal(self, message, topic)

    monkeypatch.setattr(SignedEnvelope, "seal", counted)
    calls: list[Any] = []
    async with serving(required(grace=30.0), paying(calls)) as app:
        run = await app.dispatch(Workflow("order", ["pay"] * 3), {"sum": 1})
        assert (await run.wait(PATIENCE)).status is RunStatus.COMPLETED
    assert len(calls) == 3
    assert sealed == ["pay"]


async def test_what_expires_in_a_table_is_sent_anew(ring: KeyRing) -> None:
    """A message that lay too long in the store's own table becomes a dead letter, and its run ends all the same."""
    calls: list[Any] = []
    seen = Seen()
    async with Paigeant(required(), activities=paying(calls)) as app:
        run = await app.dispatch(Workflow("order", ["pay"]), {"sum": 1}, workflow_id="r")
    old = sealing(ring.active, clock=lambda: time.time() - 9000, lifetime=60.0)
    with closing(sqlite3.connect("runs.db")) as database, database:
        wire = old.seal(message(payload={"sum": 1}), "pay")
        assert database.execute("UPDATE messages SET body = ?", (wire,)).rowcount == 1
    async with serving(required(), paying(calls), seen) as app:
        assert (await app.run(run.id).wait(PATIENCE)).status is RunStatus.COMPLETED
        assert [letter.reason for letter in await app.store.list_dead_letters()] == ["expired"]
    assert calls == [1]


async def test_a_revoked_key_counts_for_nothing_at_once(ring: KeyRing) -> None:
    """What it signed before waits in the topic; none of it runs."""
    calls: list[Any] = []
    seen = Seen()
    wires = {f"{n}/pay/do/0": sealing(ring.active).seal(message(), "pay") for n in range(20)}
    new = ring.rotate(Key.generate(now=time.time())).revoke(ring.active.kid, now=time.time())
    write_private(RING, new.as_dict())
    async with Paigeant(required()):
        pass
    await put({"transport_url": STORE}, wires)
    async with serving(required(), paying(calls), seen) as app:
        await seen.wait_for("delivery.rejected", 20)
        assert {letter.reason for letter in await app.store.list_dead_letters()} == {"revoked_key"}
    assert calls == []


@pytest.mark.parametrize(
    "roles",
    [{"dispatch": ["parcel"]}, {"run": ["refund", "pay.*"]}, {}],
    ids=["another workflow", "other topics", "nothing"],
)
async def test_a_valid_key_of_the_wrong_role_starts_nothing(ring: KeyRing, roles: dict[str, Any]) -> None:
    """Its messages are refused with a reason of their own, and its process is told before a run is recorded."""
    theirs = Key.generate(now=2.0)
    trusted((ring.active, {"run": ["pay"], "dispatch": ["order"]}), (theirs, roles))
    calls: list[Any] = []
    seen = Seen()
    settings = required(trust_file=str(TRUST))
    async with Paigeant(settings):
        pass
    await put({"transport_url": STORE}, {"r/pay/do/0": sealing(theirs).seal(message(), "pay")})
    async with serving(settings, paying(calls), seen) as app:
        await seen.wait_for("delivery.rejected", 1)
        assert [letter.reason for letter in await app.store.list_dead_letters()] == ["wrong_role"]
    write_private(Path("theirs.json"), KeyRing((theirs,)).as_dict())
    async with Paigeant(settings.model_copy(update={"keys_file": "theirs.json"})) as app:
        with pytest.raises(ConfigurationError, match="may not start runs of workflow 'order'"):
            await app.dispatch(Workflow("order", ["pay"]), {"sum": 1}, workflow_id="r")
        assert await app.store.list_runs() == []
    assert calls == []


async def test_workers_with_few_roles_do_a_run_together(ring: KeyRing) -> None:
    """A front that may only dispatch and two workers of one topic each: the run ends, and nothing is refused.

    Neither sweeps for the other: what it would sign for the other's topic nobody would take.
    """
    front, first, second = ring.active, Key.generate(now=2.0), Key.generate(now=3.0)
    trusted((front, {"dispatch": ["order"]}), (first, {"run": ["first"]}), (second, {"run": ["second"]}))
    for name, key in (("first", first), ("second", second)):
        write_private(Path(f"{name}.json"), KeyRing((key,)).as_dict())
    one, two = ActivityRegistry(), ActivityRegistry()

    @one.execute(topic="first")
    async def take(n: int) -> int:
        return n + 1

    @two.execute(topic="second")
    async def give(take: int) -> int:
        return take * 2

    told = required(trust_file=str(TRUST))
    async with (
        Paigeant(told, activities=[one, two]) as app,
        serving(required(trust_file=str(TRUST), keys_file="first.json"), one) as theirs,
    ):
        # Without the topic of the second step at hand, the first worker would send it to one named like the activity.
        theirs.activities.adopt(two)
        runs = [await app.dispatch(Workflow("order", ["take", "give"]), {"n": n}) for n in range(10)]
        async with serving(required(trust_file=str(TRUST), keys_file="second.json"), two):
            ends = [await run.wait(PATIENCE) for run in runs]
        assert [end.output for end in ends] == [2 * (n + 1) for n in range(10)]
        assert await app.store.list_dead_letters() == []


@pytest.mark.parametrize(
    ("roles", "may"),
    [
        ({"dispatch": ["order"]}, True),
        ({"amend": True}, True),
        ({"dispatch": ["parcel"]}, False),
        ({"run": ["pay"]}, False),
        ({"dispatch": ["parcel"], "run": ["*"]}, False),
    ],
    ids=["may start it", "an operator", "starts others", "does its steps", "does all steps"],
)
async def test_only_who_may_start_a_run_has_it_adopted(
    ring: KeyRing, roles: dict[str, Any], may: bool
) -> None:
    """A run that the store has never seen is taken over from a key that may dispatch its workflow, from no other."""
    theirs = Key.generate(now=2.0)
    trusted((ring.active, {"run": ["pay"]}), (theirs, roles))
    calls: list[Any] = []
    seen = Seen()
    settings = required(trust_file=str(TRUST), adopt=True)
    async with Paigeant(settings):
        pass
    await put({"transport_url": STORE}, {"r/pay/do/0": sealing(theirs).seal(message(), "pay")})
    async with serving(settings, paying(calls), seen):
        await seen.wait_for("run.completed" if may else "delivery.rejected", 1)
    assert calls == ([5] if may else [])


@pytest.mark.parametrize("begun", [False, True], ids=["the first step", "a later step"])
async def test_who_may_start_runs_says_nothing_of_those_that_are_there(ring: KeyRing, begun: bool) -> None:
    """That its message is the first of a run of its workflow is its word: what is done is what the store has."""
    theirs = Key.generate(now=2.0)
    own = {"run": ["*"], "dispatch": ["payroll"]}
    trusted((ring.active, own), (theirs, {"dispatch": ["order"]}))
    calls: list[Any] = []
    activity = paying(calls)

    @activity.execute(retries=0)
    async def reserve() -> None:
        pass

    settings = required(trust_file=str(TRUST), adopt=True)
    steps = ["reserve", "pay"] if begun else ["pay"]
    async with Paigeant(settings) as app:
        await app.dispatch(Workflow("payroll", steps), {"sum": 1}, workflow_id="r")
    if begun:
        async with serving(
            settings.model_copy(update={"local_steps": 1}), activity, topics=["reserve"]
        ) as app:
            await until(lambda: _waits_for_pay())
    wire = sealing(theirs).seal(message(payload={"sum": 666}), "pay")
    with closing(sqlite3.connect("runs.db")) as database, database:
        assert database.execute("UPDATE messages SET body = ? WHERE topic = 'pay'", (wire,)).rowcount == 1
    async with serving(settings, activity) as app:
        assert (await app.run("r").wait(PATIENCE)).status is RunStatus.COMPLETED
    assert calls == [1]


def _waits_for_pay() -> bool:
    with closing(sqlite3.connect("runs.db")) as database:
        return bool(database.execute("SELECT 1 FROM messages WHERE topic = 'pay'").fetchone())


async def test_without_a_key_a_worker_still_records_what_it_does(ring: KeyRing) -> None:
    """All keys of the ring are revoked while a step runs: its result stands, and it is not done again."""
    calls: list[Any] = []
    gate, begun = asyncio.Event(), asyncio.Event()
    activity = ActivityRegistry()

    @activity.execute(topic="a", retries=0)
    async def one() -> int:
        calls.append(1)
        begun.set()
        await gate.wait()
        return 1

    @activity.execute(topic="b")
    async def two() -> int:
        return 2

    seen = Seen()
    async with serving(required(), activity, seen, topics=["a"]) as app:
        await app.dispatch(Workflow("order", ["one", "two"]), workflow_id="r")
        await begun.wait()
        write_private(RING, ring.revoke(ring.active.kid, now=1.0).as_dict())
        await until(lambda: not app.forwarder.envelope.serves_all)  # the file is looked at once a second
        gate.set()
        await seen.wait_for("step.completed", 1)
    assert calls == [1]
    write_private(RING, replace(ring).as_dict())
    async with serving(required(), activity) as app:
        assert (await app.run("r").wait(PATIENCE)).output == 2
    assert calls == [1]


async def test_unknown_keys_are_asked_for_once_a_minute(ring: KeyRing, authority: Authority) -> None:
    """10,000 messages, each of a key of its own, cost the server of the key set one request; all are refused."""
    value = {"version": 1, "keys": [], "jwks": {"url": authority.jwks_url, "run": ["*"]}}
    write_private(TRUST, value, mode=0o644)
    envelope = sealing(ring.active)
    reader = replaced(envelope, FileKeys.of(RING, TRUST))
    wire = envelope.seal(message(), "pay")
    kid = ring.active.kid
    reasons: Counter[str] = Counter()
    for number in range(10_000):
        reasons[await refusal(reader, renamed(wire, kid, f"{number:0>{len(kid)}}"))] += 1
    assert reasons == {"unknown_key": 10_000}
    assert len(authority.asked("/jwks")) == 1


async def test_a_flood_of_unknown_keys_while_the_key_set_is_away(
    ring: KeyRing, authority: Authority, clock: ManualClock
) -> None:
    """10,000 messages of random keys in five minutes: five requests, no memory, and the key that is known goes on."""
    theirs = Key.generate(now=2.0)
    authority.body = json.dumps({"keys": [theirs.public]}).encode()
    published = {"url": authority.jwks_url, "run": ["*"], "dispatch": ["*"]}
    write_private(TRUST, {"version": 1, "keys": [], "jwks": published}, mode=0o644)
    keys = FileKeys.of(RING, TRUST)
    keys._jwks = jwks.Jwks(authority.jwks_url, clock=clock)  # the same, by a clock that a test can set
    reader = replaced(sealing(theirs), keys)
    good = sealing(theirs).seal(message(), "pay")
    await reader.open("pay", good)
    authority.status = 500
    clock.advance(jwks.FRESH_SECONDS)
    assert await refusal(reader, renamed(good, theirs.kid, secrets.token_urlsafe(32))) == "unknown_key"
    reasons: Counter[str] = Counter()
    gc.collect()
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    for number in range(10_000):
        if number % 2000 == 0:
            assert (await reader.open("pay", good)).workflow_id == "r"
            clock.advance(jwks.REFRESH_SECONDS)
        reasons[await refusal(reader, renamed(good, theirs.kid, secrets.token_urlsafe(32)))] += 1
    gc.collect()
    grown = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    assert reasons == {"unknown_key": 10_000}
    assert len(authority.asked("/jwks")) == 1 + 1 + 5
    assert grown < 800_000, "the ids alone have 920,000 bytes"
    clock.advance(jwks.STALE_SECONDS)
    assert await refusal(reader, good) == "keys_unavailable"


async def test_keys_that_cannot_be_fetched_close_the_door(ring: KeyRing) -> None:
    """Keys of the trust file go on; of those that only the set has, none is believed, and no subscription ends."""
    url = f"http://127.0.0.1:{free_port()}/jwks"
    known = {"jwk": ring.active.public, "run": ["*"], "dispatch": ["*"]}
    write_private(TRUST, {"version": 1, "keys": [known], "jwks": {"url": url, "run": ["*"]}}, mode=0o644)
    calls: list[Any] = []
    seen = Seen()
    settings = required(trust_file=str(TRUST))
    async with Paigeant(settings):
        pass
    foreign = sealing(Key.generate(now=2.0)).seal(message(), "pay")
    await put({"transport_url": STORE}, {"x/pay/do/0": foreign})
    async with serving(settings, paying(calls), seen) as app:
        await seen.wait_for("delivery.rejected", 1)
        assert [letter.reason for letter in await app.store.list_dead_letters()] == ["keys_unavailable"]
        run = await app.dispatch(Workflow("order", ["pay"]), {"sum": 1})
        assert (await run.wait(PATIENCE)).status is RunStatus.COMPLETED
    assert calls == [1]


@pytest.fixture
def canary() -> Iterator[Path]:
    """A file that a module makes when it is imported."""
    Path("canary_module.py").write_text("open('canary', 'w').close()\n")
    made = Path("canary")
    yield made
    assert not made.exists()


async def test_a_message_that_names_classes_imports_nothing(ring: KeyRing, canary: Path) -> None:
    """Rightly signed or not: names of modules and classes are unknown fields or plain values, and nothing is loaded."""
    good = json.loads(sealing(ring.active).seal(message(), "pay").split(b"\n", 1)[1])
    evil = {"py/object": "canary_module.Canary", "module": "canary_module", "type": "subprocess.Popen"}
    envelope = sealing(ring.active)
    key = ring.active
    bodies = {
        "top": {**good, **evil},
        "slip": {**good, "routing_slip": {**good["routing_slip"], "class": "canary_module.Canary"}},
        "activity": {**good, "routing_slip": {"itinerary": [{"activity": "canary_module:run", "id": "pay"}]}},
    }
    for name, body in bodies.items():
        wire = framed(text := json.dumps(body).encode(), signature=signing._sign(key, text))
        if name == "activity":
            assert (
                await envelope.open("pay", wire)
            ).due is not None  # a name like any other, that nobody serves
        else:
            assert await refusal(envelope, wire) == "wrong_shape"
    assert "canary_module" not in sys.modules


def replaced(envelope: SignedEnvelope, keys: FileKeys) -> SignedEnvelope:
    """One like `envelope` with other keys."""
    return SignedEnvelope(
        keys, deployment=envelope.deployment, requires=True, lifetime=envelope.lifetime, clock=time.time
    )


def renamed(wire: bytes, kid: str, other: str) -> bytes:
    """The message as if it was signed with another key."""
    line, body = wire.split(b"\n", 1)
    protected, _, signature = json.loads(line)["jws_signature"].partition("..")
    header = base64.urlsafe_b64decode(protected + "=" * (-len(protected) % 4)).decode().replace(kid, other)
    text = base64.urlsafe_b64encode(header.encode()).rstrip(b"=").decode()
    return (
        json.dumps({"jws_signature": f"{text}..{signature}"}, separators=(",", ":")).encode() + b"\n" + body
    )


async def refusal(envelope: SignedEnvelope, wire: bytes) -> str:
    """Why it is refused."""
    with pytest.raises(MessageInvalid) as found:
        await envelope.open("pay", wire)
    return found.value.reason


async def until(holds: Callable[[], bool]) -> None:
    """Ask until `holds` does: nobody tells of a change in a file."""
    async with asyncio.timeout(PATIENCE):
        for _ in iter(holds, True):
            await asyncio.sleep(0.05)
