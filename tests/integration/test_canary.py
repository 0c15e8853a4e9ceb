"""Secrets that are sent through every path of a run: none of them is found where people and programs read of it."""

from __future__ import annotations

import contextlib
import json
import logging
import sqlite3
from pathlib import Path

import pytest
from pydantic import SecretStr
from tests.integration.test_cli import _process_as_it_was, paigeant

from paigeant import Paigeant, Settings
from paigeant.observers.logs import configure
from paigeant.redaction import Redactor
from paigeant.store import DeadLetter

__all__ = ["_process_as_it_was"]

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


def found(place: str, text: str) -> list[str]:
    """The secrets that stand in a text."""
    return [f"{canary} in {place}" for canary in CANARIES if canary in text]


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
