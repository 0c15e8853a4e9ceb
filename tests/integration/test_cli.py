"""The commands, called in this process; `test_cli_worker.py` has those that need processes of their own."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import importlib.util
import json
import re
import sqlite3
import stat
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml
from tests.commands import as_json, as_the_process_was, paigeant, refused
from tests.services import RedisServer
from typer.testing import CliRunner

from paigeant import Paigeant, PaigeantMessage, RoutingSlip, Settings, Step
from paigeant.cli import session
from paigeant.cli.program import app, exit_code
from paigeant.errors import InputInvalid, RunTimeout, StoreUnavailable, TransportUnavailable
from paigeant.extras import how_to_install
from paigeant.keys import Key
from paigeant.message import encode
from paigeant.store import DeadLetter

HANDLERS = """
from paigeant import ActivityRegistry, NonRetryableError, Step, StepContext, Workflow
activity = ActivityRegistry()

@activity.execute(retries=0)
async def reserve(sku: str, ctx: StepContext) -> dict:
    await ctx.save_variable("shelf", "B-7")
    return {"reserved": sku}

@activity.compensate("reserve")
async def release(output: dict) -> None: ...

@activity.execute(retries=0)
async def charge(card: str) -> str:
    if card == "declined":
        raise NonRetryableError("the card was declined")
    return "paid"

order = Workflow("order", ["reserve", "charge"])
pay = Workflow("pay", ["charge"])
abroad = Workflow("abroad", ["reserve", "ship_abroad"])
"""

GOOD = {"sku": "A-1", "card": "4242"}
BAD = {"sku": "A-1", "card": "declined"}


@pytest.fixture(autouse=True)
def _folder() -> Iterator[None]:
    Path("handlers.py").write_text(HANDLERS)
    with as_the_process_was():
        yield


def dispatched(workflow: str, payload: dict[str, Any], id: str) -> None:
    """Start a run and do its steps."""
    paigeant("dispatch", workflow, "-", "--handlers", "handlers.py", "--id", id, input=json.dumps(payload))
    paigeant("run", "handlers.py", "--until-idle")


async def _letter() -> None:
    async with Paigeant(Settings()) as app:
        await app.store.bury(DeadLetter("m-1", "reserve", "not_json", "not_json: nothing", b"{", 1))


@pytest.mark.parametrize("scheme", ["redis", "amqp"])
def test_what_the_store_tells_needs_no_broker(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the broker is away, all that is listed is there, and what only the store has can be changed."""
    dispatched("order", GOOD, "o-1")
    asyncio.run(_letter())
    monkeypatch.setenv("PAIGEANT_TRANSPORT_URL", f"{scheme}://localhost:1")
    monkeypatch.setenv("PAIGEANT_SIGNING", "require")  # there are no keys
    assert ids() == {"o-1"}
    assert as_json("runs", "show", "o-1")["status"] == "completed"
    assert as_json("requests", "list") == []
    assert as_json("variables", "list", "o-1") == {"shelf": "B-7"}
    assert as_json("variables", "set", "o-1", "limit", "5") == {"id": "o-1", "key": "limit", "value": 5}
    assert as_json("variables", "get", "o-1", "limit") == 5
    assert "no log lines" in paigeant("logs", "o-1").stderr
    assert as_json("dead-letters", "show", "m-1")["reason"] == "not_json"
    assert as_json("dead-letters", "delete", "m-1")["deleted"]
    assert as_json("dead-letters", "list") == []
    assert as_json("runs", "prune", "--older-than", "0s", "--yes")["runs"] == 1
    assert "there is no key ring" in refused("topics", "list")
    monkeypatch.delenv("PAIGEANT_SIGNING")
    assert "localhost:1 can't be reached" in refused("topics", "list", code=3)


# -- dispatch


def test_dispatch_prints_the_id_alone() -> None:
    """Standard output is the id and nothing else, for `ID=$(paigeant dispatch ...)`."""
    result = paigeant(
        "dispatch", "order", "-", "--handlers", "handlers.py", "--id", "o-1", input=json.dumps(GOOD)
    )
    assert result.stdout == "o-1\n"


def test_what_handlers_print_is_no_result() -> None:
    """Neither when they are loaded nor while the run is dispatched: a script reads JSON, and nothing else."""
    Path("handlers.py").write_text(
        f"""{HANDLERS}
from pydantic import BaseModel, model_validator
print("loaded")

class Order(BaseModel):
    sku: str

    @model_validator(mode="before")
    def check(data):
        print("checked")
        return data

checked = Workflow("checked", ["reserve"], input_model=Order)
"""
    )
    Path("paigeant.yaml").write_text("handlers: handlers.py\n")
    result = paigeant("dispatch", "checked", "-", "--id", "o-1", "--json", input='{"sku": "A-1"}')
    assert json.loads(result.stdout) == {"id": "o-1"}
    assert {"loaded", "checked"} <= set(result.stderr.splitlines())
    assert json.loads(paigeant("config", "check", "--json").stdout)


def test_dispatch_as_json_is_the_id() -> None:
    """--json without --wait is an object with the id."""
    given = json.dumps(GOOD)
    assert as_json("dispatch", "order", "-", "--handlers", "handlers.py", "--id", "o-1", input=given) == {
        "id": "o-1"
    }


def test_dispatching_again_gives_the_same_run() -> None:
    """The same id, workflow and input is the same run."""
    for _ in range(2):
        paigeant("dispatch", "order", "-", "--handlers", "handlers.py", "--id", "o-1", input=json.dumps(GOOD))
    assert len(as_json("runs", "list")) == 1


def test_the_same_id_with_other_input_is_refused() -> None:
    """An id belongs to one input."""
    dispatched("order", GOOD, "o-1")
    said = refused(
        "dispatch", "order", "-", "--handlers", "handlers.py", "--id", "o-1", input=json.dumps(BAD)
    )
    assert "run 'o-1' already exists with another input" in said


def test_wait_gives_the_object_of_runs_show() -> None:
    """`dispatch --wait --json` and `runs show --json` are the same object."""
    dispatched("order", GOOD, "o-1")
    waited = as_json(
        "dispatch", "order", "-", "--handlers", "handlers.py", "--id", "o-1", "--wait", input=json.dumps(GOOD)
    )
    assert waited == as_json("runs", "show", "o-1")


def test_waiting_for_a_run_that_fails_ends_with_1() -> None:
    """A run that ends otherwise than completed is exit code 1, and is printed."""
    dispatched("order", BAD, "o-1")
    given = json.dumps(BAD)
    result = paigeant(
        "dispatch",
        "order",
        "-",
        "--handlers",
        "handlers.py",
        "--id",
        "o-1",
        "--wait",
        "--json",
        input=given,
        code=1,
    )
    assert json.loads(result.stdout)["status"] == "compensated"


def test_waiting_too_long_ends_with_1_and_says_that_the_run_goes_on() -> None:
    """Without a worker the time runs out; the run is printed as it is."""
    args = (
        "dispatch",
        "order",
        "-",
        "--handlers",
        "handlers.py",
        "--id",
        "o-1",
        "--wait",
        "--timeout",
        "0.01",
        "--json",
    )
    result = paigeant(*args, input=json.dumps(GOOD), code=1)
    assert json.loads(result.stdout)["status"] == "pending"
    assert "error: run 'o-1' has not ended within 0.01 s; it goes on" in result.stderr


def test_waiting_without_a_worker_is_warned_of() -> None:
    """Who waits where nobody works is told so."""
    args = ("dispatch", "order", "-", "--handlers", "handlers.py", "--wait", "--timeout", "0.01")
    assert "no worker is running on this store" in paigeant(*args, input=json.dumps(GOOD), code=1).stderr


def test_input_may_be_left_out() -> None:
    """A workflow that needs no input is dispatched by its name alone; one that does is told what is missing."""
    Path("more.py").write_text('from paigeant import Workflow\nnothing = Workflow("nothing")\n')
    paigeant("dispatch", "nothing", "--handlers", "more.py", "--id", "n-1")
    assert as_json("runs", "show", "n-1")["input"] == {}
    assert "needs 'card', which isn't there" in refused("dispatch", "pay", "--handlers", "handlers.py")


def test_input_comes_from_a_file() -> None:
    """INPUT.json is the name of a file."""
    Path("input.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(GOOD).encode())
    paigeant("dispatch", "order", "input.json", "--handlers", "handlers.py", "--id", "o-1")
    assert as_json("runs", "show", "o-1")["input"] == GOOD


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"", "in.json is empty; expected a JSON object"),
        (b'{"a": 1,\n "b" 2}', "in.json is not JSON: Expecting ':' delimiter at line 2, column 6"),
        (b'{"a": 1, "a": 2}', "in.json is not JSON: the key 'a' occurs twice in one object"),
        (b'{"a": NaN}', "in.json is not JSON: NaN is not JSON"),
        (b'{"a": 1e999}', "in.json is not JSON: 1e999 is not a finite number"),
        (b'{"a": "\xff"}', "in.json is not JSON: byte 7 is not UTF-8"),
        (b"[1]", "the input of workflow 'order' is list [1]; expected an object"),
        (b"[" * 100000, "nested deeper than"),
        (b'{"sku": "A-1"}', "'card'"),
        (b'{"sku": 5, "card": "4"}', "'sku' of activity 'reserve' doesn't fit"),
        (b'{"a": "' + b"x" * 1048576 + b'"}', "the message has 1,048,585 bytes, the limit is 1,048,576"),
    ],
)
def test_input_that_cannot_be_is_refused(body: bytes, said: str) -> None:
    """Each says what is wrong and where, on one line, and nothing is recorded."""
    Path("in.json").write_bytes(body)
    workflow = "order"
    if said == "'card'":
        Path("handlers.py").write_text(HANDLERS.replace('["charge"]', '["charge"]'))
        workflow = "pay"
    assert said in refused("dispatch", workflow, "in.json", "--handlers", "handlers.py")
    assert as_json("runs", "list") == []


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("inptu.json", "there is no file inptu.json; did you mean 'input.json'?"),
        (".", ". is a folder"),
        ('{"a": 1}', "expected a file with the input, found JSON"),
        ("a\0b", "can't read"),
    ],
)
def test_a_file_that_cannot_be_read_is_refused(name: str, said: str) -> None:
    """Each says what was found instead of a file with the input."""
    Path("input.json").write_text("{}")
    assert said in refused("dispatch", "order", name, "--handlers", "handlers.py")


def test_an_unknown_workflow_is_answered_with_the_nearest() -> None:
    """A mistyped workflow is answered with what there is."""
    said = refused("dispatch", "ordr", "-", "--handlers", "handlers.py", input="{}")
    assert "no workflow 'ordr' is defined here; did you mean 'order'?" in said


def test_dispatch_without_handlers_says_where_to_name_them() -> None:
    """No handlers anywhere is another mistake than a wrong name."""
    assert "give --handlers handlers.py" in refused("dispatch", "order", "-", input="{}")


def test_a_workflow_in_the_file_needs_no_code() -> None:
    """`workflows:` in paigeant.yaml is enough for a dispatcher."""
    Path("paigeant.yaml").write_text("workflows:\n  remote:\n    - far_away\n")
    assert paigeant("dispatch", "remote", "-", "--id", "r-1", input="{}").stdout == "r-1\n"


def test_an_activity_that_nobody_here_knows_is_a_warning() -> None:
    """Another service may have it: the run is dispatched all the same."""
    result = paigeant("dispatch", "abroad", "-", "--handlers", "handlers.py", input=json.dumps(GOOD))
    assert "warning: workflow 'abroad': no activity 'ship_abroad' is registered here" in result.stderr


def test_strict_makes_it_an_error() -> None:
    """With --strict nothing is dispatched that this process doesn't know."""
    said = refused("dispatch", "abroad", "-", "--handlers", "handlers.py", "--strict", input=json.dumps(GOOD))
    assert "no activity 'ship_abroad' is registered here" in said


def test_a_timeout_needs_wait() -> None:
    """--timeout alone can't be meant."""
    assert "--timeout says how long to wait" in refused(
        "dispatch", "order", "-", "--timeout", "1", input="{}"
    )


# -- run


def test_run_needs_handlers() -> None:
    """Without handlers there is nothing to run."""
    assert "no handlers are named" in refused("run")


def test_handlers_come_from_the_file() -> None:
    """`handlers:` in paigeant.yaml is the default of run and dispatch."""
    Path("paigeant.yaml").write_text("handlers: handlers.py\n")
    paigeant("dispatch", "order", "-", "--id", "o-1", input=json.dumps(GOOD))
    paigeant("run", "--until-idle")
    assert as_json("runs", "show", "o-1")["status"] == "completed"


def test_run_says_what_it_serves() -> None:
    """A worker's first line names its activities, topics, transport and store, and that no message is signed."""
    lines = [
        json.loads(line)
        for line in paigeant("run", "handlers.py", "--until-idle").stderr.splitlines()
        if line[0] == "{"
    ]
    facts = {
        name: lines[0][name] for name in ("event", "activities", "topics", "transport", "store", "signing")
    }
    assert facts == {
        "event": "worker.serving",
        "activities": "charge, reserve",
        "topics": "charge, reserve",
        "transport": "sqlite:///paigeant.db",
        "store": "sqlite:///paigeant.db",
        "signing": "off: no message leaves this host",
    }


@pytest.mark.parametrize("format", ["json", "console"])
@pytest.mark.parametrize(
    ("told", "says"),
    [
        ("", "off: no message leaves this host"),
        ("off", "off: whoever can write to the transport can start any activity"),
        ("sign", "sign: deployment 'shop', key {kid} (Ed25519), for all messages"),
        ("require", "require: deployment 'shop', key {kid} (Ed25519), for all messages"),
    ],
)
def test_run_says_how_messages_are_signed(
    format: str, told: str, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before any work, as a field of its first line or as text for people: above all that nothing is signed."""
    kid = paigeant("keys", "generate").stdout.strip()
    monkeypatch.setenv("PAIGEANT_LOG_FORMAT", format)
    monkeypatch.setenv("PAIGEANT_DEPLOYMENT", "shop")
    monkeypatch.setenv("COLUMNS", "200")
    if told:
        monkeypatch.setenv("PAIGEANT_SIGNING", told)
    said = paigeant("run", "handlers.py", "--until-idle").stderr
    found = [line for line in said.splitlines() if "signing" in line]
    assert len(found) == 1
    assert says.format(kid=kid) in found[0]


def test_run_logs_to_standard_error_alone() -> None:
    """A worker has no result, so that standard output stays empty."""
    dispatched("order", GOOD, "o-1")
    assert paigeant("run", "handlers.py", "--until-idle").stdout == ""


def test_run_does_only_its_topics() -> None:
    """--topics leaves what waits elsewhere alone."""
    paigeant("dispatch", "order", "-", "--handlers", "handlers.py", "--id", "o-1", input=json.dumps(GOOD))
    paigeant("run", "handlers.py", "--topics", "charge", "--until-idle")
    assert as_json("runs", "show", "o-1")["steps"][0]["status"] == "ready"


def test_run_warns_of_unknown_activities_and_topics() -> None:
    """What another service may have, and what can only be a slip of the pen, is said before the work begins."""
    said = paigeant("run", "handlers.py", "--topics", "charge,resrve", "--until-idle").stderr
    assert "warning: workflow 'abroad': no activity 'ship_abroad'" in said
    assert "no activity here has the topic 'resrve'; did you mean 'reserve'?" in said


def test_a_strict_worker_refuses_unknown_activities() -> None:
    """With --strict it is an error."""
    assert "no activity 'ship_abroad' is registered here" in refused("run", "handlers.py", "--strict")


def test_a_worker_without_activities_is_refused() -> None:
    """Handlers that only define workflows give a worker nothing to do."""
    Path("only.py").write_text("from paigeant import Workflow\nw = Workflow('w', ['a'])\n")
    assert "only.py defines no activity" in refused("run", "only.py")


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["run", "gone.py"], "there is no file gone.py"),
        (["run", "handlers.py", "--concurrency", "0"], "Invalid value for '--concurrency'"),
        (["run", "handlers.py", "--processes", "0"], "Invalid value for '--processes'"),
        (["run", "handlers.py", "--topics", ","], "--topics names no topic"),
        (["run", "show", "o-1"], "did you mean `paigeant runs show`?"),
        (["rn"], "No such command 'rn'. Did you mean 'run', 'runs'?; see `paigeant --help`"),
        (["runs", "lst"], "No such command 'lst'"),
        (["runs", "show"], "Missing argument 'ID'; see `paigeant runs show --help`"),
        (["runs", "list", "--limit", "x"], "Invalid value for '--limit'"),
        (["runs", "list", "--limit", "0"], "Invalid value for '--limit'"),
        (["runs", "list", "--status", "complete"], "did you mean 'completed'?"),
        (["runs", "list", "--stat", "failed"], "No such option: --stat"),
    ],
)
def test_wrong_use_is_said_on_one_line(args: list[str], said: str) -> None:
    """Exit code 2, what is wrong, and where help is."""
    assert said in refused(*args)


@pytest.mark.parametrize(
    "command",
    [["runs", "list"], ["run", "handlers.py"], ["dispatch", "order", "-", "--handlers", "handlers.py"]],
)
def test_a_store_in_memory_is_refused(command: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """memory:// lives in one process, where no other command would see anything."""
    monkeypatch.setenv("PAIGEANT_STORE_URL", "memory://")
    assert "store_url is memory://, which lives in one process" in refused(*command, input="{}")


# -- errors and exit codes


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (InputInvalid("x"), 2),
        (RunTimeout("x"), 1),
        (StoreUnavailable("x"), 3),
        (TransportUnavailable("x"), 3),
    ],
)
def test_each_error_has_an_exit_code(error: Any, code: int) -> None:
    """1 the run isn't done, 2 wrong use, 3 what can't be reached."""
    assert exit_code(error) == code


def test_a_damaged_database_is_out_of_reach() -> None:
    """Exit code 3: neither the command nor the settings are wrong."""
    dispatched("order", GOOD, "o-1")
    body = Path("paigeant.db").read_bytes()
    Path("paigeant.db").write_bytes(body[:100] + b"\xff" * (len(body) - 100))
    said = refused("runs", "list", code=3)
    assert "can't use paigeant.db: database disk image is malformed" in said
    assert "put a backup in its place" in said


def test_a_file_that_is_no_database_is_refused() -> None:
    """What isn't a database is left as it is."""
    Path("paigeant.db").write_text("shopping list")
    assert "paigeant.db is not an SQLite database" in refused("runs", "list")


def test_nothing_is_made_by_looking() -> None:
    """Listing in a folder without a database makes none."""
    assert as_json("runs", "list") == []
    assert not Path("paigeant.db").exists()


# -- runs


def test_runs_show_has_what_a_script_needs() -> None:
    """The object of a run has the fields that are promised, and its times are ISO 8601 in UTC."""
    dispatched("order", GOOD, "o-1")
    run = as_json("runs", "show", "o-1")
    steps = run.pop("steps")
    times = [steps[0].pop(name) for name in ("started_at", "completed_at")]
    assert {
        name: run[name] for name in ("id", "workflow", "status", "input", "output", "error", "variables")
    } == {
        "id": "o-1",
        "workflow": "order",
        "status": "completed",
        "input": GOOD,
        "output": "paid",
        "error": None,
        "variables": {"shelf": "B-7"},
    }
    assert len(run["trace_id"]) == 32
    assert {name: steps[0][name] for name in ("id", "activity", "status", "attempts", "output", "error")} == {
        "id": "reserve",
        "activity": "reserve",
        "status": "completed",
        "attempts": 1,
        "output": {"reserved": "A-1"},
        "error": None,
    }
    assert [time[10] + time[-1] for time in times] == ["TZ", "TZ"]


def test_runs_show_has_undos_apart() -> None:
    """A step that was undone says so, and its undo stands in `compensations`."""
    dispatched("order", BAD, "o-1")
    run = as_json("runs", "show", "o-1")
    assert [(step["id"], step["status"]) for step in run["steps"]] == [
        ("reserve", "compensated"),
        ("charge", "failed"),
    ]
    assert [(undo["id"], undo["status"]) for undo in run["compensations"]] == [("reserve", "compensated")]


def test_runs_show_for_people_tells_all_steps() -> None:
    """Each step has a row, also those still to come."""
    paigeant("dispatch", "order", "-", "--handlers", "handlers.py", "--id", "o-1", input=json.dumps(GOOD))
    rows = [line.split()[:3] for line in paigeant("runs", "show", "o-1").stdout.splitlines() if line]
    assert ["reserve", "reserve", "ready"] in rows
    assert ["charge", "charge", "to"] in rows


def test_an_unknown_run_is_refused() -> None:
    """An id that isn't there is exit code 2."""
    dispatched("order", GOOD, "o-1")
    assert "no run 'o-2' in this store" in refused("runs", "show", "o-2")


def test_runs_list_is_filtered() -> None:
    """By status, workflow and number; the newest first."""
    dispatched("order", GOOD, "o-1")
    dispatched("order", BAD, "o-2")
    dispatched("pay", GOOD, "p-1")
    listed = {
        "all": [run["id"] for run in as_json("runs", "list")],
        "completed": [run["id"] for run in as_json("runs", "list", "--status", "completed")],
        "order": [run["id"] for run in as_json("runs", "list", "--workflow", "order")],
        "one": [run["id"] for run in as_json("runs", "list", "--limit", "1")],
    }
    assert listed == {
        "all": ["p-1", "o-2", "o-1"],
        "completed": ["p-1", "o-1"],
        "order": ["o-2", "o-1"],
        "one": ["p-1"],
    }


def test_markup_in_values_is_shown_as_it_is() -> None:
    """An id with brackets in it is an id, not a style."""
    dispatched("order", GOOD, "[red]o-1[/red]")
    assert "[red]o-1[/red]" in paigeant("runs", "list").stdout
    assert "[red]o-1[/red]" in paigeant("runs", "show", "[red]o-1[/red]").stdout


def test_a_run_is_cancelled() -> None:
    """Cancelling prints the state from then on; what was done is undone by a worker."""
    paigeant("dispatch", "order", "-", "--handlers", "handlers.py", "--id", "o-1", input=json.dumps(GOOD))
    assert as_json("runs", "cancel", "o-1", "--reason", "ordered twice") == {
        "id": "o-1",
        "status": "cancelled",
    }
    assert as_json("runs", "show", "o-1")["error"] == "ordered twice"


def test_a_run_is_cancelled_whether_or_not_its_handlers_load(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are loaded for where they would have traces go, and not where there are none."""
    for id in ("o-1", "o-2"):
        paigeant("dispatch", "order", "-", "--handlers", "handlers.py", "--id", id, input=json.dumps(GOOD))
    Path("broken.py").write_text("raise RuntimeError('not on this machine')")
    monkeypatch.setenv("PAIGEANT_HANDLERS", "broken.py")
    result = paigeant("runs", "cancel", "o-1", "--json")
    assert (json.loads(result.stdout)["status"], result.stderr) == ("cancelled", "")
    monkeypatch.setenv("PAIGEANT_TRACES", "true")
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "none")
    result = paigeant("runs", "cancel", "o-2", "--json")
    assert json.loads(result.stdout)["status"] == "cancelled"
    assert "not on this machine; where handlers would have traces go isn't known" in result.stderr


def test_an_ended_run_cannot_be_cancelled() -> None:
    """What has ended stays ended."""
    dispatched("order", GOOD, "o-1")
    assert "only an open run can be cancelled" in refused("runs", "cancel", "o-1")


def test_a_failed_run_is_taken_up_again() -> None:
    """After `runs retry` a worker goes on where the run stopped."""
    dispatched("pay", BAD, "p-1")
    assert as_json("runs", "retry", "p-1") == {"id": "p-1", "status": "running"}
    Path("handlers.py").write_text(HANDLERS.replace('== "declined"', '== "stolen"'))
    sys.modules.pop("handlers", None)
    paigeant("run", "handlers.py", "--until-idle")
    assert as_json("runs", "show", "p-1")["output"] == "paid"


def test_a_completed_run_cannot_be_retried() -> None:
    """Only what failed can be taken up again."""
    dispatched("pay", GOOD, "p-1")
    assert "only failed and compensation_failed runs can be retried" in refused("runs", "retry", "p-1")


def test_a_signal_is_kept_with_the_run() -> None:
    """Name and value of a signal are recorded, negative numbers included."""
    paigeant("dispatch", "order", "-", "--handlers", "handlers.py", "--id", "o-1", input=json.dumps(GOOD))
    paigeant("runs", "signal", "o-1", "approved", "true")
    paigeant("runs", "signal", "o-1", "correction", "-5")
    found = [(signal["name"], signal["value"]) for signal in as_json("runs", "show", "o-1")["signals"]]
    assert found == [("approved", True), ("correction", -5)]


def test_a_signal_that_is_not_json_is_refused() -> None:
    """A bare word is answered with how to write a text."""
    said = refused("runs", "signal", "o-1", "comment", "hello")
    assert "VALUE is not JSON" in said
    assert "'\"hello\"'" in said


# -- variables


def age(id: str, seconds: float) -> None:
    """Have the run be created and ended so many seconds earlier."""
    with contextlib.closing(sqlite3.connect("paigeant.db")) as connection, connection:
        connection.execute(
            "UPDATE workflow_runs SET created_at = created_at - ?, completed_at = completed_at - ? WHERE id = ?",
            (seconds, seconds, id),
        )


def ids() -> set[str]:
    """The runs that there are."""
    return {run["id"] for run in as_json("runs", "list")}


def test_old_runs_are_pruned() -> None:
    """Those that ended longer ago than that are deleted; younger ones and open ones stay."""
    dispatched("order", GOOD, "old")
    dispatched("order", GOOD, "young")
    paigeant("dispatch", "order", "-", "--handlers", "handlers.py", "--id", "open", input=json.dumps(GOOD))
    for id in ("old", "open"):
        age(id, 31 * 86400)
    dry = as_json("runs", "prune", "--older-than", "30d", "--dry-run")
    assert (dry, ids()) == ({"runs": 1, "dead_letters": 0, "deleted": False}, {"old", "young", "open"})
    done = as_json("runs", "prune", "--older-than", "30d", "--yes")
    assert done == {"runs": 1, "dead_letters": 0, "deleted": True}
    assert ids() == {"young", "open"}
    assert "0 runs ended" in paigeant("runs", "prune", "--older-than", "30d", "--yes").stderr
    assert "1 run deleted" in paigeant("runs", "prune", "--older-than", "0s", "--yes").stderr
    assert ids() == {"open"}


def test_pruning_may_be_limited_to_a_status() -> None:
    """Failures are often kept for longer."""
    dispatched("pay", GOOD, "good")
    dispatched("pay", BAD, "bad")
    paigeant("runs", "prune", "--older-than", "0s", "--status", "completed", "--status", "cancelled", "--yes")
    assert ids() == {"bad"}


def test_old_dead_letters_of_no_run_are_pruned() -> None:
    """They are counted and asked about like runs; younger ones, and those of runs, stay."""

    async def bury() -> None:
        async with Paigeant(Settings()) as app:
            old = await app.store.now() - 31 * 86400
            for id, run, at in (
                ("m-1", None, old),
                ("m-2", "gone", old),
                ("m-3", None, 0),
                ("m-4", "good", old),
            ):
                letter = DeadLetter(
                    id, "reserve", "not_json", "not_json: x", b"", workflow_id=run, created_at=at
                )
                await app.store.bury(letter)

    dispatched("pay", GOOD, "good")
    asyncio.run(bury())
    month = ("runs", "prune", "--older-than", "30d")
    assert as_json(*month, "--dry-run") == {"runs": 0, "dead_letters": 2, "deleted": False}
    assert (
        "0 runs ended more than 30d ago, 2 dead letters of no run as old"
        in paigeant(*month, "--dry-run").stderr
    )
    said = refused(*month)
    assert said == "this deletes 2 dead letters of no run, older than 30d; add --yes if that is meant"
    assert "0 runs, 2 dead letters of no run deleted" in paigeant(*month, "--yes").stderr
    assert {letter["id"] for letter in as_json("dead-letters", "list")} == {"m-3", "m-4"}
    said = refused("runs", "prune", "--older-than", "0s")
    assert said.startswith(
        "this deletes 1 run that ended more than 0s ago, and 1 dead letter of no run, as old;"
    )
    paigeant("runs", "prune", "--older-than", "0s", "--yes")
    assert as_json("dead-letters", "list") == []


def test_nothing_is_pruned_unasked() -> None:
    """Where nobody can be asked, --yes has to say that it is meant."""
    dispatched("pay", GOOD, "good")
    said = refused("runs", "prune", "--older-than", "0s")
    assert said == "this deletes 1 run that ended more than 0s ago; add --yes if that is meant"
    assert ids() == {"good"}


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--older-than", "30"], "a number with s, m, h, d or w behind it"),
        (["--older-than", "a week"], "found 'a week'"),
        (["--older-than", "-5d"], "found '-5d'"),
        (["--older-than", "5d", "--status", "running"], "a run that is running hasn't ended"),
        (["--older-than", "5d", "--status", "faild"], "did you mean 'failed'?"),
        ([], "--older-than"),
    ],
)
def test_an_age_that_is_none_is_refused(args: list[str], said: str) -> None:
    """And so is a state in which no run ends."""
    assert said in refused("runs", "prune", *args)


@pytest.mark.parametrize(
    ("age", "seconds"), [("90s", 90), ("15m", 900), ("1.5h", 5400), ("30d", 2592000), ("2w", 1209600)]
)
def test_an_age_has_a_unit(age: str, seconds: float) -> None:
    """Seconds, minutes, hours, days, weeks."""
    assert session.duration(age, "--older-than") == seconds


def test_variables_are_listed_read_and_set() -> None:
    """What was set is what is read; texts are printed as they are, all else as JSON."""
    dispatched("order", GOOD, "o-1")
    paigeant("variables", "set", "o-1", "limit", "-250")
    paigeant("variables", "set", "o-1", "who", '"Ada"')
    assert as_json("variables", "list", "o-1") == {"shelf": "B-7", "limit": -250, "who": "Ada"}
    assert paigeant("variables", "get", "o-1", "who").stdout == "Ada\n"
    assert paigeant("variables", "get", "o-1", "limit").stdout == "-250\n"
    assert as_json("variables", "get", "o-1", "who") == "Ada"
    assert "shelf" in paigeant("variables", "list", "o-1").stdout


def test_an_unknown_variable_is_answered_with_the_nearest() -> None:
    """A mistyped name is answered with what there is."""
    dispatched("order", GOOD, "o-1")
    assert "no variable 'shlf'; did you mean 'shelf'?" in refused("variables", "get", "o-1", "shlf")


@pytest.mark.parametrize("args", [["list", "o-9"], ["get", "o-9", "k"], ["set", "o-9", "k", "1"]])
def test_variables_of_an_unknown_run_are_refused(args: list[str]) -> None:
    """A variable belongs to a run that is there."""
    dispatched("order", GOOD, "o-1")
    assert "no run 'o-9'" in refused("variables", *args)


# -- topics


def test_topics_tell_what_waits() -> None:
    """A dispatched step waits in the topic of its activity."""
    assert as_json("topics", "list") == []
    paigeant("dispatch", "order", "-", "--handlers", "handlers.py", input=json.dumps(GOOD))
    (topic,) = as_json("topics", "list")
    assert (topic["topic"], topic["waiting"], topic["taken"]) == ("reserve", 1, 0)
    assert (topic["ready"], topic["later"], topic["running"]) == (1, 0, 0)
    assert 0 <= topic["oldest_ready"] < 60
    assert 0 <= topic["oldest"] < 60
    assert "reserve" in paigeant("topics", "list").stdout


def test_a_broker_is_asked_although_there_is_no_store_yet(
    monkeypatch: pytest.MonkeyPatch, redis_url: str
) -> None:
    """Where nobody has made the file of the store, messages may wait all the same; and one that is away is told."""
    monkeypatch.setenv("PAIGEANT_TRANSPORT_URL", redis_url)
    monkeypatch.setenv("PAIGEANT_NAMESPACE", f"n-{uuid.uuid4().hex}")

    async def publish() -> None:
        async with Paigeant(Settings(store_url="memory://")) as app:
            message = PaigeantMessage("m-1", "r", RoutingSlip(itinerary=(Step("reserve"),)))
            await app.transport.publish("reserve", message)

    asyncio.run(publish())
    (topic,) = as_json("topics", "list")
    assert (topic["topic"], topic["waiting"]) == ("reserve", 1)
    monkeypatch.setenv("PAIGEANT_TRANSPORT_URL", "redis://localhost:1")
    assert "localhost:1 can't be reached" in refused("topics", "list", code=3)
    assert not Path("paigeant.db").exists()


def test_a_topic_is_told_of_although_its_message_is_lost() -> None:
    """The store knows what waits where, whatever the transport still has."""
    paigeant("dispatch", "order", "-", "--handlers", "handlers.py", input=json.dumps(GOOD))
    with contextlib.closing(sqlite3.connect("paigeant.db")) as connection, connection:
        connection.execute("DELETE FROM messages")
    (topic,) = as_json("topics", "list")
    assert (topic["topic"], topic["waiting"], topic["oldest"], topic["ready"]) == ("reserve", 0, None, 1)


def test_a_topic_is_told_of_although_the_store_has_no_step_in_it() -> None:
    """A message without a step here, such as a late repeat, is counted all the same."""

    async def publish() -> None:
        async with Paigeant() as app:
            message = PaigeantMessage("m-1", "r", RoutingSlip(itinerary=(Step("reserve", id="reserve"),)))
            await app.transport.publish("elsewhere", message)

    asyncio.run(publish())
    (topic,) = as_json("topics", "list")
    assert (topic["topic"], topic["waiting"], topic["ready"], topic["oldest_ready"]) == (
        "elsewhere",
        1,
        0,
        None,
    )


# -- dead letters


def bury(id: str, body: bytes) -> None:
    """Put a dead letter into the store."""

    async def command() -> None:
        async with Paigeant() as app:
            await app.store.bury(DeadLetter(id, "reserve", "not_json", "not_json: nothing", body, 1))

    asyncio.run(command())


def message(workflow_id: str) -> bytes:
    """The message that wakes the first step of a run."""
    slip = RoutingSlip(itinerary=(Step("reserve", id="reserve"),))
    return encode(PaigeantMessage("m-1", workflow_id, slip))


def test_dead_letters_are_listed_and_shown() -> None:
    """The listing has reason and topic, the letter itself its body too."""
    bury("m-1", b"not [json]")
    (letter,) = as_json("dead-letters", "list")
    assert (letter["id"], letter["topic"], letter["reason"]) == ("m-1", "reserve", "not_json")
    assert as_json("dead-letters", "show", "m-1")["body"] == "not [json]"
    assert "not [json]" in paigeant("dead-letters", "show", "m-1").stdout
    assert "m-1" in paigeant("dead-letters", "list").stdout


def test_a_body_that_is_no_text_is_shown_all_the_same() -> None:
    """Bytes that aren't UTF-8 come as base64 in JSON, and escaped for people."""
    bury("m-1", b"\xff\x00")
    assert as_json("dead-letters", "show", "m-1")["body_base64"] == "/wA="
    assert "\\xff" in paigeant("dead-letters", "show", "m-1").stdout


def test_requeueing_sends_the_message_again_and_forgets_the_letter() -> None:
    """A run whose message was lost goes on; the message is the store's, so that it is sent once."""
    paigeant("dispatch", "order", "-", "--handlers", "handlers.py", "--id", "o-1", input=json.dumps(GOOD))
    with contextlib.closing(sqlite3.connect("paigeant.db")) as connection, connection:
        connection.execute("DELETE FROM messages")
    bury("m-1", message("o-1"))
    assert as_json("dead-letters", "requeue", "m-1")["workflow_id"] == "o-1"
    assert (as_json("dead-letters", "list"), as_json("topics", "list")[0]["waiting"]) == ([], 1)


def test_a_letter_whose_run_went_on_is_not_requeued() -> None:
    """There is nothing to send for a step that is recorded; the letter stays."""
    dispatched("order", GOOD, "o-1")
    bury("m-1", message("o-1"))
    assert "doesn't wait any more (the run is completed)" in refused("dead-letters", "requeue", "m-1")
    assert len(as_json("dead-letters", "list")) == 1


def test_a_letter_of_an_unknown_run_is_not_requeued() -> None:
    """A message of another store belongs to no run here."""
    bury("m-1", message("elsewhere"))
    assert "no run 'elsewhere'" in refused("dead-letters", "requeue", "m-1")


def test_a_letter_without_a_message_cannot_be_requeued() -> None:
    """What is no message now won't be one when it is sent again."""
    bury("m-1", b"not json")
    assert "its body is no message" in refused("dead-letters", "requeue", "m-1")


def test_a_letter_is_deleted() -> None:
    """Once deleted it is unknown."""
    bury("m-1", b"x")
    paigeant("dead-letters", "delete", "m-1")
    for command in ("show", "requeue", "delete"):
        assert "there is no dead letter 'm-1'" in refused("dead-letters", command, "m-1")


# -- db


def test_an_upgrade_makes_the_tables() -> None:
    """`db upgrade` brings a database to the newest version, and a second time changes nothing."""
    newest = as_json("db", "current")["newest"]
    assert as_json("db", "current")["current"] is None
    assert as_json("db", "upgrade")["current"] == newest
    assert as_json("db", "upgrade") == {"database": "paigeant.db", "before": newest, "current": newest}
    assert paigeant("db", "current").stdout == f"paigeant.db: {newest} (newest)\n"


def test_of_two_databases_each_is_told_on_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """As JSON they can be read one by one; those of a run's log are told like that, too."""
    monkeypatch.setenv("PAIGEANT_TRANSPORT_URL", "sqlite:///messages.db")
    for command in ("upgrade", "current", "downgrade"):
        lines = paigeant("db", command, "--json").stdout.splitlines()
        assert [json.loads(line)["database"] for line in lines] == ["paigeant.db", "messages.db"]


def test_a_downgrade_takes_the_tables_away() -> None:
    """Before the first migration there are no tables; using the file again makes them."""
    paigeant("db", "upgrade")
    assert as_json("db", "downgrade", "base")["current"] is None
    dispatched("order", GOOD, "o-1")
    assert as_json("runs", "show", "o-1")["status"] == "completed"


def test_a_downgrade_does_not_delete_runs_unasked() -> None:
    """Without --yes a script can't lose its runs."""
    dispatched("order", GOOD, "o-1")
    assert "deletes the tables with what is in them (runs: 1); add --yes" in refused(
        "db", "downgrade", "base"
    )
    assert len(as_json("runs", "list")) == 1
    paigeant("db", "downgrade", "base", "--yes")
    assert as_json("runs", "list") == []


@pytest.mark.parametrize(
    ("row", "held"),
    [
        ("messages VALUES (1, 'm', 't', x'', 0, 0, 0, 0, NULL)", "messages: 1"),
        ("dead_letters VALUES ('d', 't', 'r', '', x'', 1, NULL, NULL, 0)", "dead letters: 1"),
        ("workflow_logs VALUES (1, 0, 20, 'e', NULL, NULL, '{}')", "log lines: 1"),
    ],
)
def test_a_downgrade_deletes_nothing_else_unasked(row: str, held: str) -> None:
    """A database without runs may be that of a transport, or have what nobody has looked at yet."""
    paigeant("db", "upgrade")
    with contextlib.closing(sqlite3.connect("paigeant.db")) as connection, connection:
        connection.execute(f"INSERT INTO {row}")
    assert f"what is in them ({held}); add --yes" in refused("db", "downgrade", "base")
    paigeant("db", "downgrade", "base", "--yes")


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["upgrade", "0999"], "no migration is called '0999'"),
        (["downgrade", "x"], "no migration is called 'x'"),
        (["downgrade", "-99"], "-99 goes beyond the first migration"),
        (["upgrade", "base"], "base goes back; `paigeant db downgrade base` does that"),
        (["downgrade", "head"], "head goes forward; `paigeant db upgrade head` does that"),
    ],
)
def test_a_migration_that_is_not_there_is_refused(args: list[str], said: str) -> None:
    """A mistyped migration is answered with what there is, one in the other direction with the command for it."""
    paigeant("db", "upgrade")
    assert said in refused("db", *args)


def test_nothing_is_taken_back_where_nothing_is() -> None:
    """No database, and a database without our tables, have nothing to downgrade."""
    assert "there is no database paigeant.db" in refused("db", "downgrade")
    sqlite3.connect("paigeant.db").close()
    Path("paigeant.db").write_bytes(b"")
    assert "has no tables of Paigeant" in refused("db", "downgrade")


# -- config


def test_config_show_hides_passwords(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is printed may be pasted into a ticket."""
    monkeypatch.setenv("PAIGEANT_TRANSPORT_URL", "redis://ada:canary@localhost")
    monkeypatch.setenv("PAIGEANT_CLIENT_SECRET", "canary as well")
    for shown in (paigeant("config", "show").stdout, json.dumps(as_json("config", "show"))):
        assert "redis://ada:***@localhost" in shown
        assert "canary" not in shown


def test_config_show_tells_where_a_value_comes_from(monkeypatch: pytest.MonkeyPatch) -> None:
    """Environment, file or default."""
    monkeypatch.setenv("PAIGEANT_RETRIES", "7")
    Path("paigeant.yaml").write_text("lease: 60\n")
    rows = {line.split()[0]: line.split()[1:3] for line in paigeant("config", "show").stdout.splitlines()}
    assert (rows["retries"], rows["lease"], rows["grace"]) == (
        ["7", "environment"],
        ["60.0", "paigeant.yaml"],
        ["10.0", "default"],
    )


def test_config_check_passes_what_works() -> None:
    """Handlers, store and transport are each said to be well; nothing is made by checking."""
    Path("paigeant.yaml").write_text("handlers: handlers.py\n")
    assert {part["part"]: part["ok"] for part in as_json("config", "check")} == {
        "handlers": True,
        "store": True,
        "transport": True,
        "signing": True,
    }
    assert not Path("paigeant.db").exists()
    paigeant("db", "upgrade")
    assert "reachable" in paigeant("config", "check").stdout


def test_config_check_says_what_is_wrong() -> None:
    """Each trouble is told with its part, and the exit code is 2."""
    Path("paigeant.yaml").write_text("handlers: gone.py\nstore_url: sqlite:///no/such/folder/x.db\n")
    found = {part["part"]: part["message"] for part in as_json("config", "check", code=2) if not part["ok"]}
    assert "there is no file gone.py" in found["handlers"]
    assert "the folder no/such/folder of the database x.db doesn't exist" in found["store"]


def checked(code: int) -> dict[str, tuple[bool, str]]:
    """What `config check` said of each part."""
    return {part["part"]: (part["ok"], part["message"]) for part in as_json("config", "check", code=code)}


def test_config_check_looks_at_each_part_alone() -> None:
    """What can't be reached hides nothing of the others; each says what to do, and none a password."""
    Path("paigeant.yaml").write_text(
        "handlers: handlers.py\n"
        "transport_url: amqp://ann:s3cret-pw@127.0.0.1:1/\n"
        "routes:\n"
        "  partner.*: redis://:s3cret-pw@127.0.0.1:1/0\n"
        "  files: sqlite:///other.db\n"
        "  wrong: sqlite:///no/such/folder.db\n"
        "  reports: amqp://ann:s3cret-pw@127.0.0.1:1/\n"
    )
    found = checked(2)
    assert [part for part, (ok, _) in found.items() if not ok] == [
        "transport",
        "route partner.*",
        "route wrong",
        "route reports",
    ]
    assert "can't be reached" in found["transport"][1]
    assert "transport_url" in found["transport"][1]
    assert "amqp://ann:***@127.0.0.1:1/" in found["transport"][1]
    assert "can't be reached" in found["route partner.*"][1]
    assert "make it first" in found["route wrong"][1]
    assert "start it, or correct routes" in found["route reports"][1]
    assert found["store"] == (True, "sqlite:///paigeant.db: it is made when it is first used")
    assert found["route files"] == (True, "sqlite:///other.db: it is made when it is first used")
    assert "s3cret" not in str(found) + paigeant("config", "check", code=2).output
    assert {path.name for path in Path().iterdir()} == {"handlers.py", "paigeant.yaml"}, (
        "looking makes nothing"
    )


@pytest.mark.parametrize(
    "command", [("generate",), ("trust", "jwks.json", "--amend"), ("rotate",), ("list",)]
)
def test_a_key_file_of_an_impossible_name_is_a_mistake(command: tuple[str, ...]) -> None:
    """And no server that is away, which code 3 would say."""
    Path("jwks.json").write_text(json.dumps({"keys": [Key.generate(now=1.0).public]}))
    assert "File name too long" in refused("keys", *command, "--file", "a" * 300)


def test_config_check_says_of_a_key_that_it_may_sign_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """As when it isn't in the trust file: the worker would start, and whatever is to be sent stand still."""
    paigeant("keys", "generate")
    Path("paigeant-trust.json").write_text('{"version": 1, "keys": []}')
    monkeypatch.setenv("PAIGEANT_SIGNING", "require")
    monkeypatch.setenv("PAIGEANT_TRUST_FILE", "paigeant-trust.json")
    is_good, said = checked(code=2)["signing"]
    assert not is_good
    assert "for nothing: it has no role, or doesn't hold now; so nothing can be sent" in said
    Path("jwks.json").write_text(paigeant("keys", "export-jwks").stdout)
    paigeant("keys", "trust", "jwks.json", "--run", "*")
    assert checked(code=0)["signing"][0]


def test_config_check_ends_with_3_when_nothing_else_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """Servers that can't be reached may come up later; a script can wait for them."""
    monkeypatch.setenv("PAIGEANT_TRANSPORT_URL", "redis://127.0.0.1:1")
    assert [part for part, (ok, _) in checked(3).items() if not ok] == ["transport"]
    monkeypatch.setenv("PAIGEANT_STORE_URL", "redis://127.0.0.1:1")
    assert "there is no store; expected one of" in checked(2)["store"][1]


def test_config_check_says_when_a_broker_is_full() -> None:
    """One that is there and takes no messages isn't called reachable: what is wrong and what to do is said."""
    with RedisServer(lines=["maxmemory-policy noeviction"]) as server:
        Path("paigeant.yaml").write_text(f"transport_url: {server.url}\n")
        assert checked(0)["transport"] == (True, f"{server.url}: reachable")
        subprocess.run(
            ["redis-cli", "-p", str(server.port), "CONFIG", "SET", "maxmemory", "1"],
            check=True,
            capture_output=True,
        )
        ok, text = checked(3)["transport"]
        assert not ok
        assert "has no memory left: raise its maxmemory, or let workers catch up" in text


def test_config_check_refuses_a_place_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """A place in memory is refused for each part by itself."""
    monkeypatch.setenv("PAIGEANT_STORE_URL", "memory://")
    found = checked(2)
    assert not found["store"][0]
    assert "lives in one process" in found["store"][1]
    assert found["transport"][0]


@pytest.mark.parametrize(
    ("url", "library", "extra"),
    [
        ("redis://host", "redis", "redis"),
        ("rediss://host", "redis", "redis"),
        ("amqp://host", "aio_pika", "rabbitmq"),
        ("amqps://host", "aio_pika", "rabbitmq"),
        ("postgresql://host/db", "psycopg", "postgres"),
    ],
)
def test_a_missing_library_is_named_with_what_installs_it(
    url: str, library: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The drivers are extras; the error has the command to copy."""
    for name in [name for name in sys.modules if name.partition(".")[0] == library]:
        monkeypatch.delitem(sys.modules, name)
    adapters = ("paigeant.transports.", "paigeant.databases.")
    for name in [name for name in sys.modules if name.startswith(adapters)]:
        # Another import puts the new module into its package, too, where later tests would find it.
        package, _, own = name.rpartition(".")
        if package in sys.modules:  # it isn't where its import broke off, as in another of these tests
            monkeypatch.setattr(sys.modules[package], own, sys.modules[name])
    for name in [name for name in sys.modules if name.startswith(adapters)]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, library, None)
    monkeypatch.setenv("PAIGEANT_TRANSPORT_URL", url.replace("host", "localhost"))
    assert how_to_install(extra) in checked(2)["transport"][1]
    assert how_to_install(extra) in refused("dispatch", "pay", "-", "--handlers", "handlers.py", input="{}")


@pytest.mark.parametrize(
    ("setting", "value", "library", "extra"),
    [
        ("traces", "true", "opentelemetry.sdk", "otel"),
        ("otel_metrics", "true", "opentelemetry.sdk", "otel"),
        ("metrics_port", "0", "prometheus_client", "metrics"),
    ],
)
def test_config_check_names_what_traces_and_metrics_lack(
    setting: str, value: str, library: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker with these settings wouldn't start without their extras; checking says so as well."""
    monkeypatch.setenv(f"PAIGEANT_{setting.upper()}", value)
    assert checked(0)[setting] == (True, f"{library} is installed")
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: find_spec(name) if name != library else None
    )
    ok, said = checked(2)[setting]
    assert (ok, how_to_install(extra) in said) == (False, True)


def test_an_unknown_setting_is_refused_by_every_command() -> None:
    """A mistyped key in the file is answered with the nearest one."""
    Path("paigeant.yaml").write_text("concurency: 5\n")
    assert "did you mean 'concurrency'?" in refused("runs", "list")


# -- keys


def test_keys_are_made_rotated_and_listed() -> None:
    """The newest key is active, the old one is still there, and no private part is printed."""
    first = paigeant("keys", "generate").stdout.strip()
    second = paigeant("keys", "rotate").stdout.strip()
    listed = as_json("keys", "list")
    assert [(key["kid"], key["active"]) for key in listed] == [(second, True), (first, False)]
    assert {name for key in listed for name in key["public"]} == {"alg", "kty", "crv", "x", "kid"}
    assert first in paigeant("keys", "list").stdout


def test_a_key_ring_is_its_owners_alone() -> None:
    """The file can be read by nobody else from the beginning, and is refused when it can."""
    paigeant("keys", "generate", "--file", "ring.json")
    assert stat.S_IMODE(Path("ring.json").stat().st_mode) == 0o600
    Path("ring.json").chmod(0o640)
    assert "others can read ring.json (mode 0640), expected 0600; do: chmod 0600" in refused(
        "keys", "list", "--file", "ring.json"
    )


def test_a_key_ring_is_never_overwritten() -> None:
    """Making a ring where one is changes nothing."""
    paigeant("keys", "generate")
    before = Path("paigeant-keys.json").read_bytes()
    assert "is there already" in refused("keys", "generate")
    assert Path("paigeant-keys.json").read_bytes() == before


@pytest.mark.parametrize("command", ["list", "rotate"])
def test_a_key_ring_that_is_none_is_refused(command: str) -> None:
    """Neither a missing file nor another one is a ring."""
    assert "`paigeant keys generate` makes one" in refused("keys", command)
    Path("paigeant-keys.json").write_text('{"version": 1}')
    Path("paigeant-keys.json").chmod(0o600)
    assert "a key ring is" in refused("keys", command)


@pytest.mark.parametrize("algorithm", ["Ed25519", "ES256", "RS256"])
def test_a_key_has_the_algorithm_that_was_asked_for(algorithm: str) -> None:
    """Each kind is made, and its public part says nothing private."""
    made = as_json("keys", "generate", "--algorithm", algorithm.lower())
    assert made["algorithm"] == algorithm
    assert not {"d", "p", "q"} & made["public"].keys()


def test_an_unknown_algorithm_is_refused() -> None:
    """No secret is shared between parties, so there is no HMAC."""
    assert "there is no algorithm 'HS256' here" in refused("keys", "generate", "--algorithm", "HS256")
    assert not Path("paigeant-keys.json").exists()


def test_keys_from_the_environment_sign_and_verify(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the content of the file in PAIGEANT_SIGNING_KEYS a run is signed, taken and done, without a file."""
    kid = paigeant("keys", "generate").stdout.strip()
    ring = Path("paigeant-keys.json").read_text()
    Path("paigeant-keys.json").unlink()
    monkeypatch.setenv("PAIGEANT_SIGNING", "require")
    monkeypatch.setenv("PAIGEANT_SIGNING_KEYS", ring)
    paigeant("dispatch", "order", "-", "--handlers", "handlers.py", "--id", "o-1", input=json.dumps(GOOD))
    with contextlib.closing(sqlite3.connect("paigeant.db")) as database, database:
        ((wire,),) = database.execute("SELECT body FROM messages").fetchall()
    protected = json.loads(wire.split(b"\n", 1)[0])["jws_signature"].partition("..")[0]
    assert json.loads(base64.urlsafe_b64decode(protected + "=="))["kid"] == kid
    said = paigeant("run", "handlers.py", "--until-idle").stderr
    assert f"key {kid}" in said
    assert as_json("runs", "show", "o-1")["status"] == "completed"
    private = json.loads(ring)["keys"][0]["jwk"]["d"]
    told = said + paigeant("config", "show").output + paigeant("config", "check").output
    assert private not in told
    assert not Path("paigeant-keys.json").exists()


@pytest.mark.parametrize("command", ["run", "dispatch", "config"])
def test_keys_in_the_environment_that_are_none_are_refused(
    command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each command that would sign says what it found and expects, and prints nothing of them."""
    paigeant("keys", "generate")
    ring = Path("paigeant-keys.json").read_text()
    monkeypatch.setenv("PAIGEANT_SIGNING", "require")
    monkeypatch.setenv("PAIGEANT_SIGNING_KEYS", ring.replace('"version": 1', '"version": 7'))
    if command == "config":
        said = checked(2)["signing"][1]
    else:
        arguments = ["handlers.py"] if command == "run" else ["order", "-", "--handlers", "handlers.py"]
        said = refused(command, *arguments, input=json.dumps(GOOD))
    assert said.startswith('signing_keys is no key ring: a key ring is {"version": 1, "keys": [...]}')
    assert "`paigeant keys generate` has made" in said
    assert json.loads(ring)["keys"][0]["jwk"]["d"] not in said


def test_a_revoked_key_is_exported_no_more() -> None:
    """It stays in the ring, as revoked, and the one before is active again; an unknown id is refused."""
    first = paigeant("keys", "generate").stdout.strip()
    second = paigeant("keys", "rotate").stdout.strip()
    assert as_json("keys", "revoke", second) == {"kid": second, "revoked": True}
    listed = {key["kid"]: (key["active"], key["revoked_at"] is None) for key in as_json("keys", "list")}
    assert listed == {first: (True, True), second: (False, False)}
    exported = json.loads(paigeant("keys", "export-jwks").stdout)
    assert [key["kid"] for key in exported["keys"]] == [first]
    assert "nobody" in refused("keys", "revoke", "nobody")


def test_others_keys_are_trusted_for_what_is_said_and_revoked() -> None:
    """What `export-jwks` prints is what `trust` reads; the trust file has no private part, and roles are needed."""
    kid = paigeant("keys", "generate").stdout.strip()
    Path("front.json").write_text(paigeant("keys", "export-jwks").stdout)
    assert "say --dispatch WORKFLOW" in refused("keys", "trust", "front.json")
    paigeant("keys", "trust", "front.json", "--dispatch", "order*", "--name", "front")
    [entry] = json.loads(Path("paigeant-trust.json").read_text())["keys"]
    assert (entry["name"], entry["dispatch"], entry["run"], entry["amend"]) == (
        "front",
        ["order*"],
        [],
        False,
    )
    assert "d" not in entry["jwk"]
    paigeant("keys", "revoke", kid, "--trust", "paigeant-trust.json")
    [entry] = json.loads(Path("paigeant-trust.json").read_text())["keys"]
    assert entry["revoked_at"] > 0


def test_a_revoked_key_that_is_trusted_anew_stays_revoked() -> None:
    """Its roles change; how long it holds, whose it is and that it is revoked doesn't, and that is told."""
    kid = paigeant("keys", "generate").stdout.strip()
    Path("front.json").write_text(paigeant("keys", "export-jwks").stdout)
    paigeant("keys", "trust", "front.json", "--dispatch", "order*", "--name", "front")
    [entry] = json.loads(Path("paigeant-trust.json").read_text())["keys"]
    # As it may be written by hand: null says that it isn't.
    value = {"version": 1, "keys": [{**entry, "not_after": 9e9, "revoked_at": None}]}
    Path("paigeant-trust.json").write_text(json.dumps(value))
    paigeant("keys", "revoke", kid, "--trust", "paigeant-trust.json")
    told = paigeant("keys", "trust", "front.json", "--run", "pay")
    assert f"{kid} is revoked in paigeant-trust.json, and stays so" in told.stderr
    [entry] = json.loads(Path("paigeant-trust.json").read_text())["keys"]
    assert (entry["name"], entry["dispatch"], entry["run"], entry["not_after"]) == ("front", [], ["pay"], 9e9)
    assert entry["revoked_at"] > 0


def test_no_trust_file_is_written_that_cannot_be_read() -> None:
    """A name that is no text leaves the file as it was, or away."""
    paigeant("keys", "generate")
    Path("front.json").write_text(paigeant("keys", "export-jwks").stdout)
    command = ("keys", "trust", "front.json", "--amend", "--name")
    assert "stays as it was" in refused(*command, "\udcff")
    assert not Path("paigeant-trust.json").exists()
    paigeant(*command, "front")
    before = Path("paigeant-trust.json").read_bytes()
    assert "stays as it was" in refused(*command, "\udcff")
    assert Path("paigeant-trust.json").read_bytes() == before


@pytest.mark.parametrize(
    "url", ["postgresql://ann:s3cret@db.invalid/x", "postgresql:///x?hostaddr=192.0.2.9"]
)
@pytest.mark.parametrize(
    ("setting", "command"),
    [
        (setting, command)
        for setting in ("store_url", "transport_url")
        for command in (
            ("db", "upgrade"),
            ("db", "current"),
            ("runs" if setting == "store_url" else "topics", "list"),
            ("run", "handlers.py"),
            ("dispatch", "order", "-", "--handlers", "handlers.py"),
        )
    ],
)
def test_no_command_speaks_plain_text_to_a_database_elsewhere(
    setting: str, url: str, command: tuple[str, ...]
) -> None:
    """Whatever would connect there is refused before it does, with what to write instead and without the password."""
    Path("paigeant.yaml").write_text(f"{setting}: {url}\nsigning: off\n")
    Path("paigeant.db").touch()  # so that a command has something to read
    said = refused(*command, input="{}")
    assert said.startswith(f"{setting} is postgresql://")
    assert "in plain text; use sslmode=verify-full in its parameters; or set `allow_plaintext: true`" in said
    assert "s3cret" not in said
    part = setting.removesuffix("_url")
    assert "would travel in plain text" in checked(2)[part][1]


@pytest.mark.parametrize(
    ("told", "says"),
    [
        ("", "`signing` isn't set"),
        ("signing: off\n", "would travel in plain text"),
        ("signing: require\nallow_plaintext: true\n", "there is no key ring paigeant-keys.json"),
    ],
    ids=["nothing said", "no TLS", "no key"],
)
def test_config_check_refuses_plain_text_to_another_host(told: str, says: str) -> None:
    """What has to be decided on before messages leave this host is told, with what to set."""
    Path("paigeant.yaml").write_text(f"transport_url: redis://broker.invalid/0\n{told}")
    assert says in checked(2)["signing"][1]


def test_config_check_tells_how_messages_are_signed() -> None:
    """Deployment, key and roles are named."""
    kid = paigeant("keys", "generate").stdout.strip()
    Path("paigeant.yaml").write_text("signing: require\ndeployment: shop\n")
    ok, text = checked(0)["signing"]
    assert ok
    assert text == f"require: deployment 'shop', key {kid} (Ed25519), for all messages"


def test_a_folder_that_is_not_there_takes_no_keys() -> None:
    """Where nothing can be written is said with the reason."""
    assert "can't write no/keys.json: No such file or directory" in refused(
        "keys", "generate", "--file", "no/keys.json"
    )


# -- init, help, version


def test_init_writes_three_files_and_says_how_to_go_on() -> None:
    """The next two commands are told, with the folder to go to first."""
    said = paigeant("init", "shop").stderr
    assert sorted(path.name for path in Path("shop").iterdir()) == [
        "handlers.py",
        "input.json",
        "paigeant.yaml",
    ]
    assert [line.strip() for line in said.splitlines() if line.startswith("  ")] == [
        "cd shop",
        "paigeant run",
        "paigeant dispatch fulfil_order input.json --wait",
    ]


def test_what_init_writes_is_as_ruff_wants_it() -> None:
    """With the settings that it has by itself, as in the new project."""
    paigeant("init", "shop")
    for command in (["check"], ["format", "--check"]):
        line = [sys.executable, "-m", "ruff", *command, "--isolated", "--no-cache", "shop"]
        done = subprocess.run(line, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout


def test_init_writes_the_servers_for_local_work() -> None:
    """One template for every project and for this repository itself; the next commands start them first."""
    said = paigeant("init", "shop", "--with-services").stderr
    written = Path("shop/docker-compose.yml").read_text()
    assert written == (Path(__file__).parents[2] / "docker-compose.yml").read_text()
    assert [line.strip() for line in said.splitlines() if line.startswith("  ")] == [
        "cd shop",
        "docker compose up --detach --wait",
        "paigeant db upgrade",
        "paigeant run",
        "paigeant dispatch fulfil_order input.json --wait",
    ]
    assert "shop/docker-compose.yml are there already" in refused("init", "shop", "--with-services")


def test_init_adds_the_servers_to_a_project_that_is_there() -> None:
    """Its files stay as they are; what names the servers in its settings is told, and works as it stands there."""
    paigeant("init", "shop")
    before = Path("shop/paigeant.yaml").read_text()
    said = paigeant("init", "shop", "--with-services").stderr
    assert Path("shop/docker-compose.yml").exists()
    assert Path("shop/paigeant.yaml").read_text() == before
    told = [line.strip() for line in said.splitlines() if line.startswith("  ")]
    assert told[2:] == ["cd shop", "docker compose up --detach --wait", "paigeant db upgrade"]
    urls = yaml.safe_load("\n".join(told[:2]))
    assert {name: urlsplit(url).scheme for name, url in urls.items()} == {
        "store_url": "postgresql",
        "transport_url": "postgresql",
    }


SERVERS = {"postgres": ("postgresql", 5432), "redis": ("redis", 6379), "rabbitmq": ("amqp", 5672)}


def test_settings_fit_the_servers_for_local_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each URL, also those that are commented out, names a server of the file by its port and account."""
    paigeant("init", "shop", "--with-services")
    monkeypatch.chdir("shop")
    services = yaml.safe_load(Path("docker-compose.yml").read_text())["services"]
    found = re.findall(r"^(?:# )?\w+_url: (\w+://.*)$", Path("paigeant.yaml").read_text(), flags=re.MULTILINE)
    urls = {urlsplit(url).scheme: urlsplit(url) for url in found if not url.startswith("sqlite:")}
    assert set(urls) == {scheme for scheme, _ in SERVERS.values()}
    for name, (scheme, port) in SERVERS.items():
        url, account = urls[scheme], services[name].get("environment", {})
        assert (url.hostname, url.port) == ("127.0.0.1", port)
        assert [url.username, url.password] == ([*account.values()][:2] or [None, None])
    assert urls["postgresql"].path.strip("/") == services["postgres"]["environment"]["POSTGRES_DB"]
    assert Settings().store_url == Settings().transport_url == urls["postgresql"].geturl()


def test_servers_for_local_work_keep_what_they_have_to() -> None:
    """They are reached from this machine alone, tell when they are ready, and their data outlives them."""
    paigeant("init", "shop", "--with-services")
    compose = yaml.safe_load(Path("shop/docker-compose.yml").read_text())
    assert set(compose) == {"name", "services", "volumes"}
    assert set(compose["services"]) == set(compose["volumes"]) == set(SERVERS)
    for name, service in compose["services"].items():
        assert set(service) <= {
            "image", "environment", "ports", "volumes", "healthcheck", "command", "hostname", "shm_size",
        }  # fmt: skip
        assert re.fullmatch(r"[a-z]+:\d+(-management)?", service["image"])
        ports = [port.rsplit(":", 2) for port in service["ports"]]
        assert all(host == "127.0.0.1" and outside == inside for host, outside, inside in ports)
        assert ports[0][1] == str(SERVERS[name][1])
        [(volume, path)] = [volume.split(":") for volume in service["volumes"]]
        assert (volume, path[0]) == (name, "/")
        assert service["healthcheck"]["test"][0] == "CMD"
        assert set(service["healthcheck"]) == {"test", "interval", "timeout", "retries"}
    command = compose["services"]["redis"]["command"]
    options = dict(zip(command[1::2], command[2::2], strict=True))
    assert (options["--maxmemory-policy"], options["--appendonly"]) == ("noeviction", "yes")


def test_init_never_overwrites() -> None:
    """One file that is there already is enough to write none."""
    assert "handlers.py is there already, and nothing was written" in refused("init")
    assert Path("handlers.py").read_text() == HANDLERS
    assert not Path("input.json").exists()


def test_init_says_when_it_cannot_write() -> None:
    """A file where a folder should be is told of."""
    Path("taken").write_text("")
    assert "taken is no folder; name one" in refused("init", "taken")


def test_version_is_printed() -> None:
    """One line, for reports of bugs."""
    assert paigeant("--version").stdout.startswith("paigeant 0.")


def commands() -> list[tuple[str, ...]]:
    """All commands, by the words that call them."""
    from typer.main import get_command

    found: list[tuple[str, ...]] = []
    for name, command in get_command(app).commands.items():  # type: ignore[attr-defined]  # the program is a group
        inner = getattr(command, "commands", None)
        found += [(name,)] if inner is None else [(name, each) for each in inner]
    return found


def test_the_commands_are_those_of_the_design() -> None:
    """Exactly these names: scripts call them."""
    assert {" ".join(words) for words in commands()} == {
        "init", "run", "dispatch", "logs", "demo",
        "runs list", "runs show", "runs cancel", "runs retry", "runs signal", "runs grant", "runs prune",
        "requests list", "requests show", "requests approve", "requests deny", "requests answer",
        "variables list", "variables get", "variables set", "topics list",
        "dead-letters list", "dead-letters show", "dead-letters requeue", "dead-letters delete",
        "db upgrade", "db downgrade", "db current", "config show", "config check",
        "keys generate", "keys rotate", "keys revoke", "keys list", "keys export-jwks", "keys trust",
    }  # fmt: skip


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_every_help_has_an_example(words: tuple[str, ...]) -> None:
    """What a command looks like in use stands at the end of its help."""
    said = paigeant(*words, "--help").stdout
    assert f"paigeant {' '.join(words)}" in said.partition("Examples")[2]


@pytest.mark.parametrize("words", [(), ("runs",), *commands()], ids=" ".join)
def test_a_help_shows_what_options_take(words: tuple[str, ...]) -> None:
    """A flag takes nothing, and so has no type behind it that would have to be given; no other has Python's name."""
    options = paigeant(*words, "--help").stdout.partition("Options")[2].partition("Examples")[0]
    assert "--help" in options
    assert "<" not in options.replace("<=", "")


@pytest.mark.parametrize(
    "group", ["runs", "requests", "variables", "topics", "dead-letters", "db", "config", "keys"]
)
def test_a_group_alone_shows_its_help(group: str) -> None:
    """Calling a group without a command tells which there are, once."""
    assert CliRunner().invoke(app, [group]).stdout.count("Usage:") == 1


def test_a_dispatch_that_reaches_no_broker_says_that_nothing_was_recorded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whoever gets exit code 3 knows whether to look for a run, and finds none."""
    monkeypatch.setenv("PAIGEANT_TRANSPORT_URL", "redis://127.0.0.1:1")
    args = ("dispatch", "order", "-", "--handlers", "handlers.py")
    assert "Nothing was recorded, so no run was started" in refused(*args, input=json.dumps(GOOD), code=3)
    monkeypatch.delenv("PAIGEANT_TRANSPORT_URL")
    assert as_json("runs", "list") == []


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"{'a': 1}", """found "'a': 1}", expected a JSON object such as {"""),
        (b'{"a": ', "found its end, expected a JSON object such as {"),
        (b"sku: A-1", "found 'sku: A-1', expected"),
    ],
)
def test_what_is_no_json_is_shown_with_an_example(body: bytes, said: str) -> None:
    """The message has what stands at the place where it goes wrong, and how it is meant."""
    Path("in.json").write_bytes(body)
    assert said in refused("dispatch", "order", "in.json", "--handlers", "handlers.py")


def test_current_says_which_database_and_whether_it_fits() -> None:
    """A file that isn't there fits, for it is made; one of newer code doesn't, which is exit code 2."""
    from paigeant.tables import SCHEMA_VERSION

    assert as_json("db", "current")["fits"]
    paigeant("db", "upgrade")
    with contextlib.closing(sqlite3.connect("paigeant.db")) as connection, connection:
        connection.execute("UPDATE paigeant_version SET version_num = '9999'")
    connection.close()
    result = paigeant("db", "current", code=2)
    assert result.stdout == f"paigeant.db: 9999 (newest: {SCHEMA_VERSION})\n"
    assert "error: the tables of paigeant.db were made by another version" in result.stderr
