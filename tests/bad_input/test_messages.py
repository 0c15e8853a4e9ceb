"""Rows in the table of messages that are no messages, under a worker that runs: it buries them and goes on."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import sqlite3
import subprocess
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tests.bad_input.bench import HANDLERS, INPUT, PAIGEANT, call, check, done
from tests.patience import PATIENCE

from paigeant import Paigeant, PaigeantMessage, RoutingSlip, Settings, Step, Workflow
from paigeant.message import encode
from paigeant.transport import BODY_KEPT_BYTES

SURFACE = "messages"


@dataclass(frozen=True)
class Body:
    """A body that a worker has to refuse, for `reason`; `says` is its detail."""

    name: str
    body: bytes | str
    reason: str
    says: str

    def __str__(self) -> str:
        return self.name


GOOD: dict[str, Any] = json.loads(
    encode(PaigeantMessage("m-1", "nobody", RoutingSlip((Step("reserve", id="reserve"),)), payload=INPUT))
)


def bad(name: str, body: bytes | str, reason: str, says: str) -> Body:
    """A body as it is."""
    return Body(name, body, reason, says)


def changed(name: str, reason: str, says: str, **fields: Any) -> Body:
    """A good message but for `fields`."""
    return Body(name, json.dumps({**GOOD, **fields}).encode(), reason, says)


def shaped(name: str, says: str, **fields: Any) -> Body:
    """A good message but for `fields`, one of which has the wrong shape."""
    return changed(name, "wrong_shape", says, **fields)


def slip(name: str, says: str, **fields: Any) -> Body:
    """A good message but for its slip."""
    return shaped(name, says, routing_slip={**GOOD["routing_slip"], **fields})


def ranged(name: str, says: str, **fields: Any) -> Body:
    """A good message but for a number of its slip."""
    fields = {"routing_slip": {**GOOD["routing_slip"], **fields}}
    return changed(name, "number_out_of_range", says, **fields)


def without(field: str) -> dict[str, Any]:
    """A good message but for a field that is not there."""
    return {name: value for name, value in GOOD.items() if name != field}


CASES = [
    bad("nothing", b"", "not_json", "Expecting value at line 1, column 1"),
    bad("no JSON", b"hello", "not_json", "Expecting value at line 1, column 1"),
    bad("cut off", json.dumps(GOOD).encode()[:-5], "not_json", "at line 1, column"),
    bad("two messages", json.dumps(GOOD).encode() * 2, "not_json", "Extra data"),
    bad("a picture", b"\x89PNG\r\n\x1a\n" + bytes(range(256)), "not_utf8", "byte 0 is not UTF-8"),
    bad("one byte wrong", json.dumps(GOOD).encode().replace(b"A-1", b"A-\xff"), "not_utf8", "is not UTF-8"),
    bad(
        "a key twice",
        b'{"spec_version": "1.0", ' + json.dumps(GOOD).encode()[1:],
        "duplicate_key",
        "'spec_version' occurs twice",
    ),
    changed("NaN", "not_a_number", "NaN is not JSON", payload={"a": float("nan")}),
    bad(
        "a number too large",
        json.dumps(GOOD).encode().replace(b'"A-1"', b"1e400"),
        "number_out_of_range",
        "1e400 is not a finite number",
    ),
    bad(
        "a number too long",
        json.dumps(GOOD).encode().replace(b'"A-1"', b"1" * 5000),
        "number_out_of_range",
        "digits",
    ),
    changed("half a surrogate pair", "lone_surrogate", "half of a surrogate pair", payload={"a": "\ud800"}),
    bad("nested too deeply", b"[" * 69 + b"]" * 69, "too_deep", "nested deeper than 68"),
    bad("nested without an end", b"[" * 500_000, "too_deep", "nested deeper than 68"),
    bad(
        "too large", b"x" * 1_048_577, "too_large", "the message has 1,048,577 bytes, the limit is 1,048,576"
    ),
    bad("a list", b"[]", "wrong_shape", "a message is an object, found list"),
    bad("null", b"null", "wrong_shape", "a message is an object, found NoneType"),
    bad(
        "no version",
        json.dumps(without("spec_version")).encode(),
        "unsupported_version",
        "spec_version is None, this worker speaks 1.0",
    ),
    changed(
        "a later version",
        "unsupported_version",
        "spec_version is '2.0', this worker speaks 1.0",
        spec_version="2.0",
    ),
    changed("a version that is a number", "unsupported_version", "spec_version is 1", spec_version=1),
    bad("no run", json.dumps(without("workflow_id")).encode(), "wrong_shape", "workflow_id: Field required"),
    bad(
        "no slip", json.dumps(without("routing_slip")).encode(), "wrong_shape", "routing_slip: Field required"
    ),
    shaped("a field that isn't known", "colour", colour="red"),
    shaped("a run that is a number", "workflow_id: Input should be a valid string", workflow_id=5),
    shaped("a payload that is a list", "payload: Input should be an object", payload=[1]),
    shaped(
        "a header that is a number",
        "headers.traceparent: Input should be a valid string",
        headers={"traceparent": 5},
    ),
    shaped("a slip that is a text", "routing_slip: Input should be", routing_slip="reserve"),
    slip("steps that are names", "routing_slip.itinerary.0: Input should be", itinerary=["reserve"]),
    slip("a step without a name", "the activity of a step is a non-empty text", itinerary=[{"activity": ""}]),
    slip(
        "a step with a field that isn't known",
        "itinerary.0.whn",
        itinerary=[{"activity": "a", "whn": "true"}],
    ),
    slip(
        "a condition that doesn't compile",
        "when='1 +' is not a CEL expression",
        itinerary=[{"activity": "a", "when": "1 +"}],
    ),
    # Each of these ends a process that reads it: the library's parser calls itself for each operator.
    *(
        slip(
            f"a condition of many {what}",
            "characters, at most 2,000 are allowed",
            itinerary=[{"activity": "a", "when": when}],
        )
        for what, when in (
            ("fields", "a" + ".a" * 50_000),
            ("indexes", "a" + "[0]" * 50_000),
            ("calls", "a" + ".f()" * 50_000),
            ("sums", "1+" * 200_000 + "1"),
        )
    ),
    slip("retries below 0", "retries is a number from 0 to", itinerary=[{"activity": "a", "retries": -1}]),
    slip(
        "too many retries", "retries is a number from 0 to", itinerary=[{"activity": "a", "retries": 2**64}]
    ),
    slip("a policy that can't be", "max_total is a number from 1 to", policy={"max_total": 0}),
    slip("a policy of too much", "max_total is a number from 1 to", policy={"max_total": 2**64}),
    slip("a timeout of ages", "below 100 years", itinerary=[{"activity": "a", "timeout": 1e300}]),
    ranged("steps added to no end", "added is 18446744073709551616", added=2**64),
    ranged("steps added below 0", "added is -1", added=-1),
    ranged("a depth without an end", "depth of a step is", itinerary=[{"activity": "a", "depth": 2**64}]),
    ranged("a deadline behind all dates", "deadline: 1e+300 is no second", deadline=1e300),
    ranged("a deadline before all dates", "deadline: -1.0 is no second", deadline=-1.0),
    slip(
        "a status that isn't known",
        "executed.0.status: Input should be",
        executed=[{"step_id": "a", "activity": "a", "status": "done"}],
    ),
    slip(
        "an ending that isn't known",
        "routing_slip.ending: Input should be 'failed' or 'cancelled'",
        ending="completed",
    ),
    bad("a body that is a text", "hello", "not_json", "Expecting value at line 1, column 1"),
]


@dataclass(frozen=True)
class System:
    """A worker process, and the folder in which it works."""

    folder: Path
    worker: subprocess.Popen[bytes]
    log: Path

    @property
    def settings(self) -> Settings:
        """Its database, from elsewhere."""
        url = f"sqlite:///{self.folder / 'paigeant.db'}"
        return Settings(store_url=url, transport_url=url)

    def put(self, message_id: str, topic: str, body: bytes | str) -> None:
        """Write a row into its table of messages, as anybody can who can write to the file."""
        row = (topic, message_id, body, 0.0, 0.0, 0.0, 0)
        columns = "topic, message_id, body, due_at, held_until, created_at, deliveries"
        with closing(sqlite3.connect(self.folder / "paigeant.db", timeout=PATIENCE)) as database, database:
            database.execute(f"INSERT INTO messages ({columns}) VALUES (?, ?, ?, ?, ?, ?, ?)", row)

    def waiting(self, message_id: str) -> int:
        """How many messages of this id are there."""
        with closing(sqlite3.connect(self.folder / "paigeant.db", timeout=PATIENCE)) as database:
            count = database.execute("SELECT count(*) FROM messages WHERE message_id = ?", (message_id,))
            found: int = count.fetchone()[0]
        return found


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    """One worker for all cases: what one of them does to it, the next would notice."""
    folder = tmp_path_factory.mktemp("system")
    (folder / "handlers.py").write_text(HANDLERS)
    log = folder / "log"
    env = {name: value for name, value in os.environ.items() if not name.upper().startswith("PAIGEANT_")}
    with log.open("wb") as stderr:
        command = [*PAIGEANT, "run", "handlers.py"]
        worker = subprocess.Popen(command, cwd=folder, stderr=stderr, stdin=subprocess.DEVNULL, env=env)
    yield System(folder, worker, log)
    worker.terminate()
    assert worker.wait(PATIENCE) == 0


async def works(system: System, run_id: str) -> None:
    """A new run is done to its end: its first message waits behind what is in the topic already."""
    order = Workflow("order", ["reserve", "ship"])
    async with Paigeant(system.settings, workflows=[order]) as app:
        run = await app.dispatch("order", INPUT, workflow_id=run_id)
        assert (await run.wait(PATIENCE)).output == "shipped A-1"


@pytest.mark.parametrize("case", CASES, ids=str)
async def test_a_body_that_is_no_message_is_buried(
    case: Body, system: System, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The letter is kept with its reason and bytes; the same worker does the run that came after it."""
    monkeypatch.chdir(system.folder)
    await works(system, f"before {case.name}".replace(" ", "-"))
    message_id = case.name.replace(" ", "-")
    system.put(message_id, "reserve", case.body)
    await works(system, f"after {case.name}".replace(" ", "-"))
    async with Paigeant(system.settings) as app:
        letter = await app.store.load_dead_letter(message_id)
    body = case.body if isinstance(case.body, bytes) else case.body.encode()
    assert letter is not None
    assert (letter.topic, letter.reason, letter.body) == ("reserve", case.reason, body[:BODY_KEPT_BYTES])
    assert case.says in letter.detail
    assert "\n" not in letter.detail
    assert (system.waiting(message_id), system.worker.poll()) == (0, None)
    assert "Traceback" not in system.log.read_text()


@pytest.mark.parametrize(
    ("name", "body"),
    [
        ("words", b"hello"),
        ("picture", b"\x89PNG\r\n\x1a\n"),
        ("later", json.dumps({**GOOD, "spec_version": "2.0"}).encode()),
    ],
)
async def test_a_buried_letter_is_shown_and_stays_buried(
    name: str, body: bytes, system: System, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`dead-letters show` gives its bytes; sending it again is refused with what to do; then it can be deleted."""
    monkeypatch.chdir(system.folder)
    system.put(name, "reserve", body)
    await works(system, f"after-{name}")
    shown = await asyncio.to_thread(done, "dead-letters", "show", name)
    assert (shown["body"].encode() if "body" in shown else base64.b64decode(shown["body_base64"])) == body
    again = await asyncio.to_thread(call, "dead-letters", "requeue", name, "--json")
    check(
        again,
        (f"'{name}' can't be sent again", "its body is no message", f"`paigeant dead-letters delete {name}`"),
        2,
    )
    assert await asyncio.to_thread(done, "dead-letters", "delete", name) == {"id": name, "deleted": True}


LOST: dict[str, dict[str, Any]] = {
    "of a run that isn't there": {},
    "of a step that isn't there": {
        "workflow_id": "done",
        "routing_slip": {"itinerary": [{"activity": "ship", "id": "x"}]},
    },
    "of a step that is done": {"workflow_id": "done"},
    "of no step": {"routing_slip": {}},
    "of a claim without an end": {"message_id": "nobody/reserve/do/" + "9" * 5000},
    "of an activity that isn't there": {
        "routing_slip": {"itinerary": [{"activity": "dance", "id": "dance"}]}
    },
    "of an undo that isn't there": {
        "workflow_id": "done",
        "routing_slip": {
            "ending": "failed",
            "compensations": [{"step_id": "a", "activity": "reserve", "topic": "reserve"}],
        },
    },
}
"""Messages in the right shape that wake nothing here."""


@pytest.mark.parametrize("name", LOST)
async def test_a_message_that_wakes_nothing_does_nothing(
    name: str, system: System, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No letter is written and no step is done for it: the store says what there is to do."""
    monkeypatch.chdir(system.folder)
    async with Paigeant(system.settings) as app:
        if not any(run.id == "done" for run in await app.store.list_runs(limit=1000)):
            await works(system, "done")
        before = await app.store.load_run("done")
        message_id = name.replace(" ", "-")
        system.put(
            message_id, "reserve", json.dumps({**GOOD, "message_id": message_id, **LOST[name]}).encode()
        )
        await works(system, f"after-{message_id}")
        assert await app.store.load_dead_letter(message_id) is None
        assert await app.store.load_run("done") == before
        assert all(run.id != "nobody" for run in await app.store.list_runs(limit=1000))
    assert system.worker.poll() is None
    assert "Traceback" not in system.log.read_text()
