"""What the tables of bad input have in common: a folder in which work was done before, and what holds after a mistake.

Whatever is tried there: standard error says on one line what was found and what to do, there is no traceback, standard
output is empty or JSON, and the runs that were there are as they were.
"""

from __future__ import annotations

import json
import sqlite3
import sys
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from typer.testing import CliRunner, Result

from paigeant.cli.program import app

HANDLERS = """
from paigeant import ActivityRegistry, Workflow
activity = ActivityRegistry()

@activity.execute(retries=0)
async def reserve(sku: str, quantity: int = 1) -> dict:
    return {"sku": sku, "quantity": quantity}

@activity.compensate("reserve")
async def release(output: dict) -> None: ...

@activity.execute(retries=0)
async def ship(reserve: dict) -> str:
    return "shipped " + reserve["sku"]

order = Workflow("order", ["reserve", "ship"])
"""
"""The handlers of the folder. A case may replace them."""

INPUT = {"sku": "A-1", "quantity": 2}
PAIGEANT = [sys.executable, "-P", "-m", "paigeant.cli"]
"""The command line as a process of its own."""

KEPT = (
    "workflow_runs",
    "step_executions",
    "workflow_variables",
    "workflow_signals",
    "messages",
    "dead_letters",
)
OTHER = "other"
"""The id of a run that was dispatched before, and that can go on after."""


@dataclass(frozen=True)
class Case:
    """A command that can't be carried out.

    `name`: what is wrong about it. `says`: what the line on standard error holds. `files` (None: it is not there),
    `env` and `input` are what the command finds. `stands` looks at the folder afterwards.
    """

    name: str
    does: tuple[str, ...]
    says: tuple[str, ...]
    code: int = 2
    files: Mapping[str, str | bytes | None] = field(default_factory=dict)
    env: Mapping[str, str] = field(default_factory=dict)
    input: str | bytes | None = None
    warns: bool = False
    """Whether it is done all the same, with a warning."""

    def __str__(self) -> str:
        return self.name


def put(files: Mapping[str, str | bytes | None]) -> None:
    """Write files into the working directory, or take them away."""
    for name, text in files.items():
        path = Path(name)
        if text is None:
            path.unlink()
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode() if isinstance(text, str) else text)


def rows(path: str = "paigeant.db") -> dict[str, list[tuple[Any, ...]]]:
    """All that is recorded, table by table."""
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as database:
        return {table: database.execute(f"SELECT * FROM {table} ORDER BY 1, 2").fetchall() for table in KEPT}


def call(*args: str, input: str | bytes | None = None, traceback_in_logs: bool = False) -> Result:
    """What a command gave. It says no traceback, unless as a field of a log line on a user's own exception."""
    result = CliRunner().invoke(app, list(args), input=input)
    said = [
        line
        for line in (result.stdout + result.stderr).splitlines()
        if not (traceback_in_logs and line.startswith("{") and json.loads(line)["event"] == "attempt failed")
    ]
    assert [line for line in said if "Traceback" in line] == []
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def done(*args: str, input: str | bytes | None = None) -> Any:
    """The JSON that a command gave, which worked."""
    result = call(*args, "--json", input=input)
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def complaints(result: Result, label: str = "error") -> list[str]:
    """The lines on standard error with which a command was refused or warned of."""
    return [line for line in result.stderr.splitlines() if line.startswith(f"{label}: ")]


def check(result: Result, says: tuple[str, ...], code: int, *, label: str = "error") -> None:
    """The command ended with `code`, said all of `says` on one line, and left standard output to JSON alone."""
    assert result.exit_code == code, (result.exit_code, result.output)
    lines = complaints(result, label)
    assert any(all(part in line for part in says) for line in lines), "\n".join(lines) or result.output
    if label == "error":
        assert len(lines) == 1, lines
        # What stands on other lines are hints and warnings, each on a line of its own.
        assert len(result.stderr.strip().splitlines()) <= 3, result.stderr
        if result.stdout.strip():
            json.loads(result.stdout)


def works_on() -> None:
    """The run that was dispatched before is done to its end, and so is a new one."""
    put({"handlers.py": HANDLERS})
    done_by = ["dispatch", "order", "-", "--handlers", "handlers.py", "--id", "new"]
    assert done(*done_by, input=json.dumps(INPUT)) == {"id": "new"}
    assert call("run", "handlers.py", "--until-idle").exit_code == 0
    found = {run: done("runs", "show", run) for run in (OTHER, "new")}
    assert {run: shown["output"] for run, shown in found.items()} == {
        OTHER: "shipped A-1",
        "new": "shipped A-1",
    }
