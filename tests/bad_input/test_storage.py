"""Databases that can't be used: files that are none, folders that are read-only, disks that are full."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import resource
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tests.bad_input.bench import HANDLERS, INPUT, OTHER, PAIGEANT, call, check, done, put, works_on

import paigeant.database

SURFACE = "storage"

DATABASE = Path("paigeant.db")
DISPATCH = ("dispatch", "order", "input.json", "--handlers", "handlers.py", "--id", "new", "--json")
COMMANDS = {
    "list": ("runs", "list", "--json"),
    "dispatch": DISPATCH,
    "run": ("run", "handlers.py", "--until-idle"),
    "variables": ("variables", "set", "completed", "a", "1"),
}


@dataclass(frozen=True)
class Place:
    """What stands where the database should be, and what each command says of it."""

    name: str
    arrange: Callable[[], object]
    says: tuple[str, ...]
    code: int = 2

    def __str__(self) -> str:
        return self.name


def holds(body: bytes) -> Callable[[], object]:
    """A file with this in it."""
    return lambda: DATABASE.write_bytes(body)


def does(*statements: str, anew: bool = False) -> Callable[[], object]:
    """The database after somebody else did this to it, or one that they made `anew`."""

    def arrange() -> None:
        if anew:
            DATABASE.unlink()
        with closing(sqlite3.connect(DATABASE)) as database, database:
            for statement in statements:
                database.execute(statement)

    return arrange


def cut(keep: Callable[[bytes], bytes]) -> Callable[[], object]:
    """The database with only a part of its bytes."""
    return lambda: DATABASE.write_bytes(keep(DATABASE.read_bytes()))


def instead(make: Callable[[], object]) -> Callable[[], object]:
    """Something else of this name."""

    def arrange() -> None:
        DATABASE.unlink()
        make()

    return arrange


FOREIGN = "CREATE TABLE messages (id INTEGER PRIMARY KEY, note TEXT)"

CASES = [
    Place(
        "a text",
        holds(b"milk, eggs\n"),
        ("paigeant.db is not an SQLite database", "b'milk, eggs", "another file"),
    ),
    Place(
        "a picture",
        holds(b"\x89PNG\r\n\x1a\n\x00\x00"),
        ("paigeant.db is not an SQLite database", "name another file"),
    ),
    Place("an archive", holds(b"PK\x03\x04" + bytes(5000)), ("paigeant.db is not an SQLite database",)),
    Place("nulls", holds(bytes(8192)), ("paigeant.db is not an SQLite database",)),
    Place(
        "only the beginning of a database",
        holds(b"SQLite format 3\0" + b"\xff" * 9000),
        ("paigeant.db is not an SQLite database",),
    ),
    Place(
        "half of a database",
        cut(lambda body: body[: len(body) // 2]),
        ("can't use paigeant.db", "malformed"),
        3,
    ),
    Place(
        "a damaged database",
        cut(lambda body: body[:100] + b"\xff" * (len(body) - 100)),
        ("can't use paigeant.db", "malformed"),
        3,
    ),
    Place("a folder", instead(DATABASE.mkdir), ("paigeant.db is a folder", "expected a database file")),
    Place(
        "a pipe",
        instead(lambda: os.mkfifo(DATABASE)),
        ("paigeant.db is a device or pipe", "expected a database file"),
    ),
    Place(
        "a newer schema",
        does("UPDATE alembic_version SET version_num = '9999'"),
        (
            "the tables of paigeant.db were made by another version",
            "0001",
            "'9999'",
            "Install the newer version",
        ),
    ),
    Place(
        "tables of another program",
        does(FOREIGN, "INSERT INTO messages VALUES (1, 'mine')", anew=True),
        ("paigeant.db has a table 'messages' that Paigeant did not make", "name another file"),
    ),
    Place(
        "migrations of another program",
        does(
            "CREATE TABLE alembic_version (version_num TEXT)",
            "INSERT INTO alembic_version VALUES ('a1b2c3')",
            anew=True,
        ),
        ("the tables of paigeant.db were made by another version", "a1b2c3"),
    ),
    Place(
        "a table is gone",
        does("DROP TABLE messages", "DROP TABLE workflow_runs", "DROP TABLE workflow_variables"),
        ("paigeant.db has lost its table 'messages'", "put a copy"),
    ),
]


@pytest.fixture(autouse=True)
def _input() -> None:
    put({"input.json": json.dumps(INPUT)})


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_what_is_no_database_of_ours_is_left_alone(case: Place, command: str, before: bytes) -> None:
    """Each command says the same and changes nothing; with the database back in its place, work goes on."""
    case.arrange()
    found = DATABASE.read_bytes() if DATABASE.is_file() else None
    check(call(*COMMANDS[command]), case.says, case.code)
    assert (DATABASE.read_bytes() if DATABASE.is_file() else None) == found
    if DATABASE.is_dir():
        DATABASE.rmdir()
    else:
        DATABASE.unlink()
    DATABASE.write_bytes(before)
    works_on()
