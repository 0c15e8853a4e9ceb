"""The commands on what runs wait for: requests to people, signals, and times."""

from __future__ import annotations

import asyncio
import contextlib
import getpass
import json
import re
import sqlite3
from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from tests.commands import as_json, as_the_process_was, paigeant, refused
from tests.integration.test_waits import parked
from tests.integration.workers import working
from tests.patience import PATIENCE

from paigeant import Paigeant, Settings, Sleep, Workflow
from paigeant.cli import console, session
from paigeant.store import Request

HANDLERS = """
from paigeant import ActivityRegistry, Sleep, StepContext, WaitFor, Workflow
activity = ActivityRegistry()

@activity.execute(retries=0)
async def confirm(order: str, context: StepContext) -> str:
    sent = await context.approve(f"Send {order}?", about={"order": order}, timeout=7200)
    return "sent" if sent else "kept"

@activity.execute(retries=0)
async def colour(context: StepContext) -> object:
    return await context.ask("Which colour?")

send = Workflow("send", ["confirm"])
paint = Workflow("paint", ["colour"])
pay = Workflow("pay", [WaitFor("paid", timeout=7200), "colour"])
rest = Workflow("rest", [Sleep(7200)])
"""


@pytest.fixture(autouse=True)
def _handlers() -> Iterator[None]:
    Path("handlers.py").write_text(HANDLERS)
    with as_the_process_was():
        yield


def started(workflow: str, id: str, *args: str) -> None:
    """Start a run and do its steps, until it waits."""
    given = ("dispatch", workflow, "-", "--handlers", "handlers.py", "--id", id, *args)
    paigeant(*given, input='{"order": "tea"}')
    paigeant("run", "handlers.py", "--until-idle")


def worked(id: str) -> Any:
    """The run, once a worker has gone on with it."""
    paigeant("run", "handlers.py", "--until-idle")
    return as_json("runs", "show", id)


def asked(id: str) -> str:
    """The id of what the run asks."""
    [request] = as_json("requests", "list", "--run", id)
    return str(request["id"])


# -- requests


def test_open_requests_are_listed_the_oldest_first() -> None:
    """With what is asked, by which step of which run, since when and until when."""
    assert as_json("requests", "list") == []
    assert "no request is open" in paigeant("requests", "list").stderr
    started("paint", "o-1")
    started("send", "o-2")
    first, second = as_json("requests", "list")
    assert (first["workflow_id"], first["kind"], first["name"]) == ("o-1", "question", "Which colour?")
    assert (second["kind"], second["step"], second["open"]) == ("approval", "confirm", True)
    assert second["asked"] == {"question": "Send tea?", "about": {"order": "tea"}}
    assert (first["expires_at"], second["answer"], second["answered_by"]) == (None, None, None)
    said = paigeant("requests", "list").stdout
    assert re.search(rf"{second['id']} +approval +Send tea\? +o-2 +confirm +\d+ s +in \d+ min", said)
    assert [request["workflow_id"] for request in as_json("requests", "list", "--limit", "1")] == ["o-1"]


def test_a_listing_is_tidy_on_a_narrow_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """No line is longer than 80 columns, each request has one, and its id can be copied whole."""
    started("paint", "a-run-with-a-rather-long-id-of-its-own")
    started("send", "o-2")
    monkeypatch.setattr(console, "_console", lambda stream: Console(file=stream, width=80, highlight=False))
    lines = paigeant("requests", "list").stdout.splitlines()
    assert len(lines) == 3
    assert max(map(len, lines)) <= 80
    assert [line.split()[0] for line in lines[1:]] == [
        request["id"] for request in as_json("requests", "list")
    ]


def test_a_request_is_shown_whole() -> None:
    """With what goes along with the question, and its state."""
    started("send", "o-1")
    request = asked("o-1")
    said = paigeant("requests", "show", request).stdout
    for part in (request, "approval", "o-1", "Send tea?", '{"order": "tea"}', "until", "open"):
        assert part in said
    assert as_json("requests", "show", request) == as_json("requests", "list")[0]


def test_an_approval_is_given_by_somebody() -> None:
    """The run goes on with it; who gave it is kept, and is the user at this terminal unless another is named."""
    started("send", "o-1")
    request = asked("o-1")
    assert paigeant("requests", "approve", request).stdout == f"{request} approved by {getpass.getuser()}\n"
    assert as_json("requests", "list") == []
    run = worked("o-1")
    assert (run["status"], run["output"]) == ("completed", "sent")
    [settled] = as_json("requests", "list", "--all", "--run", "o-1")
    assert (settled["answer"], settled["answered_by"]) == ({"approved": True}, getpass.getuser())
    assert (settled["open"], run["requests"]) == (False, [settled])


def test_a_denial_has_a_reason() -> None:
    """Which is kept with it, and with who said so and when."""
    started("send", "o-1")
    request = asked("o-1")
    answered = as_json("requests", "deny", request, "--reason", "no tea left", "--by", "Ada L.")
    assert answered["answer"] == {"approved": False, "reason": "no tea left"}
    assert answered["answered_by"] == "Ada L."
    said = paigeant("requests", "show", request).stdout
    assert re.search(
        r"state +denied by Ada L\.\nanswered +\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\nanswer +\{", said
    ), said
    assert worked("o-1")["output"] == "kept"


def test_a_question_is_denied_and_can_t_be_approved_of() -> None:
    """Who asked gets the reason, as an error: there will be no answer."""
    started("paint", "o-1")
    request = asked("o-1")
    said = refused("requests", "approve", request)
    assert "is about a question, which can't be approved of" in said
    assert f"paigeant requests answer {request} VALUE" in said
    paigeant("requests", "deny", request, "--reason", "no paint left", "--by", "ada")
    assert "denied by ada" in paigeant("requests", "show", request).stdout
    run = worked("o-1")
    assert run["status"] == "failed"
    assert "RequestDenied: 'Which colour?' was denied by ada: no paint left" in run["error"]


@pytest.mark.parametrize(
    ("value", "given", "found"),
    [
        ('"red"', None, "red"),
        ("-5", None, -5),
        ("-", '{"rgb": [1, 2]}', {"rgb": [1, 2]}),
        ("null", None, None),
    ],
)
def test_a_question_is_answered_with_json(value: str, given: str | None, found: Any) -> None:
    """From the command line or from standard input."""
    started("paint", "o-1")
    paigeant("requests", "answer", asked("o-1"), value, "--by", "ada", input=given)
    assert worked("o-1")["output"] == found


def test_the_same_answer_twice_is_one_and_another_is_refused() -> None:
    """So a command that was cut off can be given again."""
    started("paint", "o-1")
    request = asked("o-1")
    paigeant("requests", "answer", request, '"red"', "--by", "ada")
    assert "answered by ada" in paigeant("requests", "answer", request, '"red"', "--by", "bob").stdout
    said = refused("requests", "answer", request, '"blue"')
    assert 'answered by ada already: "red"' in said


def test_wrong_answers_are_refused() -> None:
    """With what was found and what is expected."""
    started("send", "o-1")
    request = asked("o-1")
    assert "VALUE is not JSON" in refused("requests", "answer", request, "yes")
    assert "an approval is answered by true or false" in refused("requests", "answer", request, '"yes"')
    assert "standard input is empty" in refused("requests", "answer", request, "-", input="")
    for command in (("show", "x"), ("approve", "x"), ("deny", "x"), ("answer", "x", "1")):
        assert "no request 'x'; `paigeant requests list`" in refused("requests", *command)
    assert "no run 'nobody'" in refused("requests", "list", "--run", "nobody")
    paigeant("runs", "cancel", "o-1")
    assert "nobody waits for an answer" in refused("requests", "approve", request)
    assert "closed" in paigeant("requests", "list", "--all").stdout


def test_what_is_asked_is_text_and_no_markup() -> None:
    """A run can't colour, hide or break what an operator sees."""

    async def keep() -> None:
        url = "sqlite:///paigeant.db"
        async with Paigeant(Settings(store_url=url, transport_url=url)) as app:
            await app.store.open_request(
                Request("q-1", "o-1", "colour", "external", "[red]sly[/]\nline", b'{"tool": "[bold]"}')
            )

    started("paint", "o-1")
    asyncio.run(keep())
    said = paigeant("requests", "list").stdout
    assert '[red]sly[/] line {"tool": "[bold]"}' in said
    assert '{"tool": "[bold]"}' in paigeant("requests", "show", "q-1").stdout


def test_a_user_without_a_name_is_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a container a user may have a number alone."""

    def nameless() -> str:
        raise KeyError("getpwuid(): uid not found: 12345")

    monkeypatch.setattr(getpass, "getuser", nameless)
    assert session.user() == ""


# -- runs that wait


def test_a_waiting_run_shows_what_it_waits_for() -> None:
    """The signal and its time, the question and the request's id; nothing of it once the run has ended."""
    started("pay", "o-1")
    said = paigeant("runs", "show", "o-1").stdout
    assert re.search(r"waits for +signal 'paid', until \d{4}-", said)
    assert re.search(r"paid +paigeant\.wait_for +waiting", said)
    paigeant("runs", "signal", "o-1", "paid", '{"amount": 7}', "--by", "the bank")
    paigeant("runs", "signal", "o-1", "other", "--by", "")
    run = worked("o-1")
    assert run["status"] == "waiting"
    request = asked("o-1")
    said = paigeant("runs", "show", "o-1").stdout
    assert re.search(r"waits for +an answer to 'Which colour\?' *\n", said)
    assert re.search(rf"{request} +Which colour\? +open", said)
    assert re.search(r'paid +{"amount": 7} +the bank +paid', said)
    assert re.search(r"other +null +not taken", said)
    paigeant("requests", "answer", request, '"red"', "--by", "ada")
    run = worked("o-1")
    said = paigeant("runs", "show", "o-1").stdout
    assert "waits for" not in said
    assert re.search(rf"{request} +Which colour\? +answered by ada", said)


def test_a_waiting_run_as_json() -> None:
    """What the steps wait for, until when, and the signals with who sent and who took them."""
    started("pay", "o-1")
    [step] = as_json("runs", "show", "o-1")["steps"]
    assert (step["status"], step["waits_for"], step["worker"]) == ("waiting", ["paid"], None)
    assert datetime.fromisoformat(step["wakes_at"]) > datetime.now().astimezone()
    paigeant("runs", "signal", "o-1", "paid", "7")
    run = worked("o-1")
    [signal] = run["signals"]
    assert (signal["sender"], signal["taken_by"]) == (getpass.getuser(), "paid")
    first, second = run["steps"]
    assert (first["waits_for"], first["wakes_at"], first["output"]) == ([], None, 7)
    assert (second["waits_for"], second["wakes_at"]) == ([f"paigeant.request/{asked('o-1')}"], None)


def test_a_run_that_sleeps_shows_until_when() -> None:
    """No worker waits for it, and neither does this test."""

    async def work() -> None:
        url = "sqlite:///paigeant.db"
        async with Paigeant(Settings(store_url=url, transport_url=url)) as app, working(app.worker()):
            await parked(await app.dispatch(Workflow("rest", [Sleep(7200)]), workflow_id="o-1"))

    asyncio.run(work())
    assert re.search(r"waits for +until \d{4}-", paigeant("runs", "show", "o-1").stdout)
    [step] = as_json("runs", "show", "o-1")["steps"]
    assert (step["status"], step["waits_for"]) == ("waiting", [])
    assert datetime.fromisoformat(step["wakes_at"]) > datetime.now().astimezone()


def test_a_step_that_nobody_takes_shows_which_worker_it_waits_for() -> None:
    """Also an undo whose code is gone: its run stays `compensating` until a worker has that again."""
    code = """
from paigeant import ActivityRegistry, Workflow
activity = ActivityRegistry()

@activity.execute(topic="cards")
async def charge() -> None: ...

@activity.compensate("charge")
async def refund() -> None: ...

@activity.execute()
async def ship() -> None: ...

w = Workflow("w", ["charge", "ship"])
"""
    Path("code.py").write_text(code)
    paigeant("dispatch", "w", "-", "--handlers", "code.py", "--id", "o-1", input="{}")
    said = paigeant("runs", "show", "o-1").stdout
    assert re.search(r"waits for +a worker in topic 'cards' that has activity 'charge', for \d+ s", said)
    paigeant("run", "code.py", "--topics", "cards", "--until-idle")
    paigeant("runs", "cancel", "o-1")
    said = " ".join(paigeant("runs", "show", "o-1").stdout.split())
    assert "compensating" in said
    assert "waits for a worker in topic 'cards' that has the compensation of 'charge', for " in said
    paigeant("run", "code.py", "--until-idle")
    assert "waits for" not in paigeant("runs", "show", "o-1").stdout


def test_a_worker_does_not_warn_of_steps_that_wait() -> None:
    """It can do them all."""
    assert "warning" not in paigeant("run", "handlers.py", "--until-idle", "--strict").stderr


# -- when a run starts, and by when it must have ended


@pytest.mark.parametrize("at", ["in 2h", "ISO 8601"])
def test_a_run_starts_later(at: str) -> None:
    """In a while, or at an instant with a zone; its step isn't due before."""
    due = datetime.now().astimezone() + timedelta(hours=2)
    when = at if at.startswith("in") else due.isoformat()
    paigeant(
        "dispatch", "paint", "-", "--handlers", "handlers.py", "--start-at", when, "--id", "o-1", input="{}"
    )
    assert as_json("runs", "show", "o-1")["status"] == "pending"
    with contextlib.closing(sqlite3.connect("paigeant.db")) as rows:
        [(not_before,)] = rows.execute("select not_before from step_executions").fetchall()
    assert not_before == pytest.approx(due.timestamp(), abs=PATIENCE)


def test_a_deadline_is_kept_with_the_run() -> None:
    """Counted from its start."""
    started("paint", "o-1", "--start-at", "in 0s", "--deadline", "90m")
    run = as_json("runs", "show", "o-1")
    left = datetime.fromisoformat(run["deadline"]) - datetime.fromisoformat(run["created_at"])
    assert left.total_seconds() == pytest.approx(5400, abs=PATIENCE)


@pytest.mark.parametrize(
    ("option", "given", "said"),
    [
        ("--start-at", "tomorrow", "found 'tomorrow'"),
        ("--start-at", "2027-01-01T08:00:00", "an instant with a time zone"),
        ("--start-at", "in a while", "--start-at after 'in' is a number"),
        ("--start-at", "in 99999999999w", "--start-at after 'in' is 100 years (36500d) at most"),
        ("--deadline", "10", "--deadline is a number with s, m, h, d or w"),
        ("--deadline", "0s", "a deadline is in seconds, above 0 and below 100 years"),
    ],
)
def test_times_that_are_none_are_refused(option: str, given: str, said: str) -> None:
    """And nothing is started."""
    call = ("dispatch", "paint", "-", "--handlers", "handlers.py", option, given)
    assert said in refused(*call, input="{}")
    assert as_json("runs", "list") == []


# -- workflows in the file


def test_steps_that_wait_stand_in_the_file() -> None:
    """Short where there is nothing else to say of them."""
    workflow = [
        {"sleep": 0.01},
        {"wait_for": "paid"},
        {"wait_for": "go", "timeout": 0.01, "default": 3},
        "colour",
    ]
    Path("paigeant.yaml").write_text(json.dumps({"handlers": "handlers.py", "workflows": {"w": workflow}}))
    paigeant("dispatch", "w", "-", "--id", "o-1", input="{}")
    paigeant("runs", "signal", "o-1", "paid", "7")
    run = worked("o-1")
    assert [(step["id"], step["output"]) for step in run["steps"][:3]] == [
        ("sleep", None),
        ("paid", 7),
        ("go", 3),
    ]
    assert paigeant("config", "check").exit_code == 0
