"""`paigeant logs --follow`: which lines it begins with, and what becomes of it while the store is away."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

import pytest
from tests.integration.processes import Command
from tests.kill.sql import make_tables
from tests.services import PostgresServer

from paigeant import Paigeant, Settings


@contextmanager
def following(
    url: str, monkeypatch: pytest.MonkeyPatch, *options: str
) -> Iterator[tuple[Command, Iterator[dict[str, Any]]]]:
    """`paigeant logs --follow` of this store, and the lines that it shows."""
    monkeypatch.setenv("PAIGEANT_STORE_URL", url)
    monkeypatch.setenv("PAIGEANT_TRANSPORT_URL", url)
    with Command("logs", "--follow", "--json", *options) as command:
        assert command.process.stdout is not None
        yield command, (json.loads(line) for line in command.process.stdout)


async def keep(url: str, *events: str) -> None:
    """Have the store keep these lines."""
    async with Paigeant(Settings(store_url=url, transport_url=url, log_sql="info")) as app:
        assert app._logs is not None
        for event in events:
            app._logs.write(logging.INFO, {"event": event})


async def test_following_since_shows_nothing_older(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where there is no line yet to follow: it showed all that was ever kept."""
    url = "sqlite:///paigeant.db"
    await keep(url, "old", "old", "old")
    since = datetime.fromtimestamp(time.time(), UTC).isoformat()
    with following(url, monkeypatch, "--since", since) as (_, lines):
        await asyncio.sleep(2.0)  # it says nothing of having begun
        await keep(url, "new")
        assert next(lines)["event"] == "new"


async def test_following_goes_on_when_lines_are_pruned(monkeypatch: pytest.MonkeyPatch) -> None:
    """SQLite gives the ids of the newest lines anew once these are gone; no line is missing or told twice."""
    url = "sqlite:///paigeant.db"
    await keep(url, "one", "two", "three")
    with following(url, monkeypatch) as (_, lines):
        assert [next(lines)["event"] for _ in range(3)] == ["one", "two", "three"]
        async with Paigeant(Settings(store_url=url, transport_url=url)) as app:
            await app.prune(older_than=0)
            assert await app.logs() == []
        await keep(url, "four", "five", "six", "seven")
        assert [next(lines)["event"] for _ in range(4)] == ["four", "five", "six", "seven"]
        await keep(url, "eight")
        assert next(lines)["event"] == "eight"


async def test_following_goes_on_when_the_store_is_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """A database that is started anew ends no command that somebody looks at; no line is missing or told twice."""
    with PostgresServer() as server, server.database() as url:
        make_tables(url)
        await keep(url, "before")
        with following(url, monkeypatch) as (command, lines):
            assert next(lines)["event"] == "before"
            server.stop()
            assert command.process.stderr is not None
            assert "can't" in command.process.stderr.readline()
            server.start()
            await keep(url, "after")
            assert next(lines)["event"] == "after"
