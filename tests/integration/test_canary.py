"""Secrets that are sent through every path of a run: none of them is found where people and programs read of it."""

from __future__ import annotations

import contextlib
import json
import logging
import re
import signal
import sqlite3
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
from pydantic import SecretStr
from tests.commands import as_the_process_was, paigeant, refused
from tests.integration.collector import Collector
from tests.integration.processes import Command, call
from tests.integration.test_metrics import get, sample, scraped

from paigeant import Paigeant, Settings
from paigeant.observers.logs import configure
from paigeant.redaction import Redactor
from paigeant.store import DeadLetter

TOKEN = "eyJhbGciOiJFZERTQSJ9.eyJzdWIiOiJjYW5hcnkifQ.Y2FuYXJ5"
CANARIES = (
    TOKEN,
    "canary-in-url",
    "canary-by-name",
    "canary-by-type",
    "canary-in-header",
    "sk-canary0123456789abcd",
)

HANDLERS = f"""
import logging
import structlog
from pydantic import BaseModel, SecretStr
from paigeant import ActivityRegistry, StepContext, Workflow

activity = ActivityRegistry()

class Account(BaseModel):
    name: str
    key: SecretStr

@activity.execute()
async def open_account(ctx: StepContext) -> Account:
    ctx.log.warning("token {TOKEN}", extra={{"password": "canary-by-name", "typed": SecretStr("canary-by-type")}})
    logging.getLogger("shop").error("at %s", "amqp://ada:canary-in-url@host/")
    structlog.get_logger().error("sent", headers={{"authorization": "Bearer canary-in-header"}})
    return Account(name="ada", key=SecretStr("canary-by-type"))

@activity.execute(retries=1)
async def charge(ctx: StepContext) -> None:
    if ctx.attempt == 1:
        raise RuntimeError("GET https://host/?access_token=canary-by-name: Bearer canary-in-header")
    try:
        raise KeyError("no sk-canary0123456789abcd")
    except KeyError as exc:
        raise ValueError("refused {TOKEN} by postgresql://ada:canary-in-url@host/x") from exc

pay = Workflow("pay", ["open_account", "charge"])
"""


@pytest.fixture(autouse=True)
def _process_as_it_was() -> Iterator[None]:
    with as_the_process_was():
        yield


def found(place: str, text: str, canaries: Iterable[str] = CANARIES) -> list[str]:
    """The secrets that stand in a text."""
    return [f"{canary} in {place}" for canary in canaries if canary in text]


def rows() -> dict[str, str]:
    """What stands in each column of the store and the queue, as a text."""
    with contextlib.closing(sqlite3.connect("paigeant.db")) as file:
        tables = [name for (name,) in file.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        return {
            f"{table}.{column}": "\n".join(
                value.decode("latin-1") if isinstance(value, bytes) else str(value)
                for (value,) in file.execute(f'SELECT "{column}" FROM "{table}"')
            )
            for table in tables
            for (_, column, *_) in file.execute(f'PRAGMA table_info("{table}")').fetchall()
        }


async def bury() -> None:
    """A message that nobody may handle, with a token in what is wrong with it and in its bytes."""
    async with Paigeant(Settings()) as app:
        body = json.dumps({"headers": {"obo_token": TOKEN}}).encode()
        await app._bury(
            DeadLetter.about("x", "charge", "invalid", f"invalid: {TOKEN} is no message", body, 1)
        )


@pytest.mark.slow
def test_no_secret_is_where_runs_are_read_about(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither in rows, lines on the terminal, in the file or in the store, dead letters, nor in what commands print."""
    Path("handlers.py").write_text(HANDLERS)
    for name, value in {"log_sql": "debug", "log_file": "paigeant.log", "retry_base": "0.01"}.items():
        monkeypatch.setenv(f"PAIGEANT_{name.upper()}", value)
    paigeant("dispatch", "pay", "-", "--handlers", "handlers.py", "--id", "p", input="{}")
    logging.getLogger().handlers.clear()
    worker = paigeant("run", "handlers.py", "--until-idle")
    import asyncio

    asyncio.run(bury())
    leaks = found("the terminal", worker.output) + found("the log file", Path("paigeant.log").read_text())
    with contextlib.closing(sqlite3.connect("paigeant.db")) as file:
        leaks += found("the database", "\n".join(file.iterdump()))
    for command in (
        *(
            ("runs", "show", "p"),
            ("runs", "show", "p", "--units"),
            ("runs", "list"),
            ("logs",),
            ("logs", "p"),
        ),
        *(
            ("dead-letters", "list"),
            ("dead-letters", "show", "x"),
            ("variables", "list", "p"),
            ("config", "show"),
        ),
    ):
        leaks += found(" ".join(command), paigeant(*command).output)
        leaks += found(f"{' '.join(command)} --json", paigeant(*command, "--json").output)
    assert leaks == []
    told = paigeant("logs", "p", "--json").stdout
    assert told.count("***") > 5  # they were on their way
    assert "KeyError" in told  # and the traceback is there, without them


@pytest.mark.parametrize("format", ["console", "json"])
def test_passwords_of_the_settings_are_in_no_line(format: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Wherever a library repeats them."""
    logging.getLogger().handlers.clear()
    redactor = Redactor(Settings(store_url="postgresql://ada:canary-in-url@host/x").urls)
    configure(format="json" if format == "json" else "console", redactor=redactor)
    logging.getLogger("driver").error(
        "login of ada with canary-in-url failed", extra={"typed": SecretStr("z")}
    )
    said = capsys.readouterr().err
    assert "with *** failed" in said
    assert found("the terminal", said) == []


def until_said(worker: Command, *words: str) -> str:
    """What the worker says until each of these has come, as often as it stands there."""
    left, said = list(words), ""
    for line in worker.lines():
        said += line
        for word in dict.fromkeys(left):
            if word in line:
                left.remove(word)
        if not left:
            return said
    raise AssertionError(f"it ended without saying {left}:\n{''.join(worker.said)}")


def garble(body: str) -> None:
    """A message that is none, in the queue."""
    with contextlib.closing(sqlite3.connect("paigeant.db")) as file, file:
        columns = "message_id, topic, body, due_at, held_until, created_at, deliveries"
        row = ("g/begin/do/7", "begin", body.encode(), 0.0, 0.0, 0.0, 0)
        file.execute(f"INSERT INTO messages ({columns}) VALUES (?, ?, ?, ?, ?, ?, ?)", row)


PAYLOAD = "canary-4111-in-the-payload"
DEEPER = "canary-4112-deeper-in-the-payload"

LEAKS = f"""
import pathlib
from opentelemetry import trace
from paigeant import ActivityRegistry, StepContext, Workflow
from pydantic import BaseModel, TypeAdapter

activity = ActivityRegistry()

class Account(BaseModel):
    id: int
    api_key: int

@activity.execute()
async def begin(ctx: StepContext) -> None:
    pass

@activity.execute(retries=0)
async def login(password: int) -> None:
    pass

@activity.execute(retries=0)
async def register(account: Account) -> None:
    pass

@activity.execute(retries=0)
def parse(password: str, account: dict[str, object]) -> None:
    with trace.get_tracer("shop").start_as_current_span("parse"):
        TypeAdapter(Account).validate_python(account)

@activity.execute(retries=0)
async def call(ctx: StepContext) -> None:
    with trace.get_tracer("shop").start_as_current_span("call", attributes={{"api_key": "canary-by-name"}}) as span:
        span.add_event("sent", {{"header": "Bearer canary-in-header", "to": "amqp://ada:canary-in-url@host/"}})
        raise RuntimeError("401 for {TOKEN}")

@activity.execute(retries=0)
async def confirm(ctx: StepContext, password: str) -> bool:
    return await ctx.approve("Go on?", about={{"order": 1}})

workflows = [Workflow(name, ["begin", name]) for name in ("login", "register", "parse", "call", "confirm")]
LOGIN, REGISTER, PARSE, CALL, CONFIRM = workflows
"""

OUR_COMMANDS = (
    *(("runs", "list"), ("logs",), ("logs", "login"), ("logs", "call"), ("requests", "list")),
    *(("dead-letters", "list"), ("topics", "list"), ("variables", "list", "confirm")),
)
"""What tells about runs, and says nothing of their payloads."""


@pytest.mark.slow
@pytest.mark.parametrize("log_format", ["json", "console"])
def test_a_canary_is_where_payloads_are_and_nowhere_else(
    log_format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real worker with all that it can be watched by; a payload stands with its run, and a token stands nowhere."""
    Path("handlers.py").write_text(LEAKS)
    payload = {"password": PAYLOAD, "account": {"id": 1, "api_key": DEEPER}}
    canaries = (*CANARIES, PAYLOAD, DEEPER)
    with Collector() as collector:
        settings = {
            "HANDLERS": "handlers.py",
            "LOG_FORMAT": log_format,
            "LOG_LEVEL": "debug",
            "LOG_SQL": "debug",
            "LOG_FILE": "paigeant.log",
            "TRACES": "true",
            "OTEL_METRICS": "true",
            "METRICS_PORT": "0",
            "SWEEP_INTERVAL": "0.1",
        }
        for name, value in settings.items():
            monkeypatch.setenv(f"PAIGEANT_{name}", value)
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)
        told = ""
        for name in ("login", "register", "parse", "call", "confirm"):
            given = call("dispatch", name, "-", "--id", name, input=json.dumps(payload))
            assert given.returncode == 0, given.stderr
            told += given.stdout + given.stderr
        garble(json.dumps({"headers": {"obo_token": TOKEN}, "payload": payload}))
        with Command("run") as worker:
            port = int(re.findall(r'port"?[=:] ?(\d+)', until_said(worker, "monitor.serving"))[-1])
            until_said(worker, *["run.failed"] * 4, "delivery.rejected", "request.opened", "step.waiting")
            status, scrape = get(port, "/metrics")
            assert status == 200
            samples = scraped(port)
            told += get(port, "/live")[1] + get(port, "/ready")[1]
            worker.signal(signal.SIGTERM)
            assert worker.end() == 0
    rest = {
        "what dispatch says": told,
        "the terminal": "".join(worker.said),
        "the log file": Path("paigeant.log").read_text(),
        "/metrics": scrape,
        "OTLP": collector.bytes.decode("latin-1"),
    }
    columns = rows()
    request_id = columns["workflow_requests.id"]
    letter_id = columns["dead_letters.id"]
    for command in (*OUR_COMMANDS, ("requests", "show", request_id)):
        for args in (command, (*command, "--json")):
            rest[" ".join(args)] = paigeant(*args).output
    leaks = [leak for place, text in rest.items() for leak in found(place, text, canaries)]
    assert leaks == []

    # Where a payload is allowed to be: with its run, with a step that got it, and in the bytes of a dead letter.
    allowed = {"workflow_runs.input", "step_executions.input", "dead_letters.body"}
    assert {place for place, text in columns.items() if found(place, text, canaries)} == allowed
    for place in allowed:
        assert found(place, columns[place], CANARIES) == []
    for name in ("login", "confirm"):
        shown = json.loads(paigeant("runs", "show", name, "--json").stdout)
        given = shown.pop("input")
        assert given == payload
        got = [step.pop("input") for step in shown["steps"]]
        assert found("runs show --json", json.dumps(shown), canaries) == []
        assert got[1] in (None, {"password": PAYLOAD})
        text = paigeant("runs", "show", name).output
        assert found("runs show", text.replace(json.dumps(payload), ""), (TOKEN,)) == []
    letter = json.loads(paigeant("dead-letters", "show", letter_id, "--json").stdout)
    assert PAYLOAD in letter.pop("body")
    assert found("dead-letters show --json", json.dumps(letter), canaries) == []

    # All of it was on its way, and is told without them.
    assert (
        "'password' of activity 'login' doesn't fit: Input should be a valid integer" in rest["the log file"]
    )
    assert "found {'id': 1, 'api_key': '***'}" in rest["the log file"]
    assert "input_value=***" in rest["the log file"]
    assert "RuntimeError: 401 for ***" in rest["OTLP"]
    assert "exception.stacktrace" in rest["OTLP"]
    assert {"step call", "call", "parse"} <= {span.name for span in collector.spans}
    assert samples[sample("paigeant_runs_ended_total", workflow="login", status="failed")] == 1
    assert any(labels.get("activity") == "call" for labels, _ in collector.metrics["paigeant.steps"])


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ('{"password": canary-4111}', "found a value of 'password'"),
        ('{"user": "ada", "password": "can\tary-4111"}', "found a value of 'password'"),
        ('{"user": ada}', "found 'ada}'"),
    ],
)
def test_an_input_that_is_no_json_quotes_no_secret(given: str, said: str) -> None:
    """What stands where it goes wrong is told, unless it has the name of a secret before it."""
    told = refused("dispatch", "w", "-", "--handlers", "handlers.py", input=given)
    assert said in told
    assert "4111" not in told


def test_an_input_in_the_place_of_a_file_is_not_repeated_with_its_secret() -> None:
    """The command that would have been right is told without it."""
    told = refused("dispatch", "w", '{"sku": "A", "password": "canary-4111"}', "--handlers", "handlers.py")
    assert """echo '{"sku": "A", "password": ***}'""" in told
