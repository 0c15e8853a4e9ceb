"""Log lines in the store: the story of a run over several processes, and what becomes of steps and lines in trouble."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import logging
import os
import signal
import sqlite3
import threading
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psycopg
import pytest
from tests.commands import as_the_process_was, paigeant, refused
from tests.integration.processes import Command, call
from tests.patience import PATIENCE

from paigeant import ActivityRegistry, Paigeant, Settings, StepContext, Workflow
from paigeant.databases import open_database
from paigeant.observer import Event, LogLine
from paigeant.observers.logs import sql
from paigeant.observers.logs.sql import SqlLog, latest_lines
from paigeant.slip import RunStatus

HANDLERS = """
import contextlib
import logging
import os
import signal
import sqlite3
import time
from paigeant import ActivityRegistry, StepContext, Workflow

activity = ActivityRegistry()

@activity.execute()
async def reserve(ctx: StepContext) -> str:
    ctx.log.info("reserving")
    return "A-1"

@activity.compensate("reserve")
async def release(output: str) -> None: ...

@activity.execute(retries=1)
async def charge(ctx: StepContext) -> str:
    logging.getLogger("shop").info("charging")
    if ctx.attempt == 1:
        raise RuntimeError("busy")
    return "paid"

@activity.compensate("charge")
async def refund(output: str) -> None: ...

@activity.execute(retries=0)
async def ship() -> None:
    raise ValueError("no truck")

@activity.execute()
async def die(ctx: StepContext) -> None:
    query = "SELECT count(*) FROM workflow_logs WHERE event = 'step.completed'"
    while ctx.attempt == 1:
        with contextlib.closing(sqlite3.connect("paigeant.db")) as connection, connection:
            if connection.execute(query).fetchone()[0]:
                os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.01)

fulfil = Workflow("fulfil", ["reserve", "charge", "ship"])
mortal = Workflow("mortal", ["reserve", "die"])
"""


@pytest.fixture(autouse=True)
def _handlers() -> Iterator[None]:
    Path("handlers.py").write_text(HANDLERS)
    with as_the_process_was():
        yield


@pytest.fixture(params=["sqlite", "postgres"])
def url(request: pytest.FixtureRequest) -> str:
    """A store with the tables, which is the transport as well."""
    if request.param == "postgres":
        tables: str = request.getfixturevalue("postgres_tables")
        return tables
    return "sqlite:///paigeant.db"


def told(*args: str) -> list[dict[str, Any]]:
    """What `paigeant logs` gives as JSON."""
    done = paigeant("logs", *args, "--json")
    return [json.loads(line) for line in done.stdout.splitlines()]


def story(lines: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    """What each line says of which step, and of its undo. Which steps took a message depends on who did them."""
    return [
        (line["event"], line.get("step"), *([line["phase"]] if "phase" in line else []))
        for line in lines
        if not line["event"].startswith("delivery.")
    ]


@pytest.mark.slow
def test_lines_of_three_workers_tell_the_story_of_a_run_in_order(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever process has told them, and however late it has written them."""
    for name, value in {
        "store_url": url,
        "transport_url": url,
        "log_sql": "debug",
        "log_format": "json",
        "retry_base": "0.05",
        "handlers": "handlers.py",
    }.items():
        monkeypatch.setenv(f"PAIGEANT_{name.upper()}", value)
    with contextlib.ExitStack() as stack:
        workers = [
            stack.enter_context(Command("run", "--topics", name)) for name in ("reserve", "charge", "ship")
        ]
        for worker in workers:
            worker.until("worker.started")
        paigeant("dispatch", "fulfil", "-", "--id", "order-1", input="{}")
        # Which ends when the run has.
        followed = told("order-1", "--follow")
    assert story(followed) == [
        ("run.dispatched", None),
        ("step.started", "reserve"),
        ("reserving", "reserve"),
        ("step.completed", "reserve"),
        ("step.started", "charge"),
        ("charging", "charge"),
        ("attempt failed", "charge"),
        ("step.retrying", "charge"),
        ("step.started", "charge"),
        ("charging", "charge"),
        ("step.completed", "charge"),
        ("step.started", "ship"),
        ("attempt failed", "ship"),
        ("step.failed", "ship"),
        ("step.started", "charge", "undo"),
        ("step.compensated", "charge", "undo"),
        ("step.started", "reserve", "undo"),
        ("step.compensated", "reserve", "undo"),
        ("run.compensated", "reserve"),
    ]
    assert told("order-1") == followed
    of_steps = [line for line in followed if line.get("step")]
    assert len({line["worker"] for line in of_steps}) == 3
    assert len({(line["trace_id"], line["correlation_id"], line["workflow"]) for line in followed}) == 1
    assert [line["attempt"] for line in of_steps if line["event"] == "charging"] == [1, 2]


@pytest.mark.slow
def test_a_killed_worker_takes_its_unwritten_lines_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it has told before is in the store, and whoever goes on tells the rest."""
    monkeypatch.setenv("PAIGEANT_LOG_SQL", "debug")
    paigeant("dispatch", "mortal", "-", "--id", "m", "--handlers", "handlers.py", input="{}")
    assert call("run", "handlers.py", "--until-idle").returncode == -9
    paigeant("run", "handlers.py", "--until-idle")
    assert story(told("m")) == [
        ("run.dispatched", None),
        ("step.started", "reserve"),
        ("reserving", "reserve"),
        ("step.completed", "reserve"),
        ("step.started", "die"),
        ("step.swept", "die"),
        ("step.started", "die"),
        ("step.completed", "die"),
        ("run.completed", "die"),
    ]


# -- the command


activity = ActivityRegistry()


@activity.execute(retries=0)
async def divide(by: int, ctx: StepContext) -> float:
    """A step that may fail."""
    ctx.log.warning("dividing")
    return 1 / by


share = Workflow("share", ["divide"])


def settings(url: str = "sqlite:///paigeant.db", **more: Any) -> Settings:
    """With lines in the store."""
    return Settings(store_url=url, transport_url=url, log_sql="info", **more)


@contextlib.asynccontextmanager
async def application(url: str = "sqlite:///paigeant.db", **more: Any) -> AsyncIterator[Paigeant]:
    """An application that keeps its lines."""
    async with Paigeant(settings(url, **more), activities=activity) as app:
        yield app


def made(**inputs: int) -> None:
    """An application has done these runs, and is closed again."""

    async def work() -> None:
        async with application() as app:
            await worked(app, **inputs)

    asyncio.run(work())


async def worked(app: Paigeant, **inputs: int) -> None:
    """Runs by their ids with what they divide by, once they have ended."""
    for name, by in inputs.items():
        await app.dispatch(share, {"by": by}, workflow_id=name)
    await app.worker().run(until_idle=True)


def events(lines: list[LogLine]) -> list[str]:
    """What the lines tell."""
    return [line.event for line in lines]


def test_lines_are_chosen_by_run_level_step_and_time() -> None:
    """All of these narrow what is shown; without any all lines are."""
    made(good=2, bad=0)
    good = ["run.dispatched", "dividing", "step.completed", "run.completed"]
    assert [event for event, *_ in story(told("good"))] == good
    assert [line["event"] for line in told("bad", "--level", "error")] == ["step.failed", "run.failed"]
    assert [line["event"] for line in told("good", "--step", "divide")] == good[1:]
    assert [line["event"] for line in told("good", "--limit", "2")] == good[2:]
    instant = told("good")[1]["timestamp"]
    assert [line["event"] for line in told("good", "--since", instant)] == good[1:]
    assert told("--since", "2100-01-01T00:00Z") == []
    assert {line.get("workflow_id") for line in told("--since", "1h")} == {"good", "bad", None}


def test_at_a_terminal_lines_look_like_those_of_a_worker() -> None:
    """Without what says nothing, on one line each."""
    made(good=2)
    shown = paigeant("logs", "good").stdout.splitlines()
    assert len(shown) == 4
    assert "[warning] dividing" in shown[1]
    assert "correlation_id" not in shown[1]


def test_a_text_cannot_pass_for_a_line_of_its_own() -> None:
    """Line breaks and what moves the cursor or colours a terminal are written out."""

    async def forge() -> None:
        async with application():
            logging.getLogger("paigeant.shop").warning("one\n2100-01-01 \x1b[31m[info] run.completed")

    asyncio.run(forge())
    [line] = paigeant("logs").stdout.splitlines()
    assert "one\\n2100-01-01 \\x1b[31m" in line


async def test_a_text_that_speaks_of_null_characters_is_shown(url: str) -> None:
    """Both null characters and the six characters that stand for one in JSON, behind however many backslashes."""
    spoken = ["\0", "\\u0000", "\\\\u0000", "\\\0\\u0000\0", '{"a": "\\u0000"}']
    event = Event("step.failed", "r", "w", "s", "a", 1, "t", "c", "p", error=" ".join(spoken))
    async with application(url) as app:
        assert app._logs is not None
        app._logs.observe(event)
        for text in spoken:
            app._logs.write(logging.INFO, {"event": "told", "workflow_id": "r", "text": text})
    async with application(url) as app:
        found = await app.logs("r")
    shown = [text.replace("\0", "\\0") for text in spoken]
    assert [line.fields.get("text", line.fields.get("error")) for line in found] == [" ".join(shown), *shown]


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("--level", "loud"), "no line has the level 'loud'"),
        (("--since", "soon"), "(without an offset: local time); found 'soon'"),
        (("--since", "99999999999d"), "--since is 100 years (36500d) at most"),
        (("--since", "0001-01-01T00:00+12:00"), "--since is an instant of the years 1 to 9999"),
        (("--since", "9999-12-31T23:00-12:00"), "--since is an instant of the years 1 to 9999"),
        (("--limit", "99999999999999999999"), "less than or equal to 1000000000"),
        (("nobody",), "no run 'nobody'"),
    ],
)
def test_wrong_use_is_exit_code_2(args: tuple[str, ...], said: str) -> None:
    """A level, a time or a run that there isn't."""
    made()
    assert said in refused("logs", *args)


def test_without_lines_it_says_how_to_have_them_kept() -> None:
    """An empty answer is no error, and tells of the setting."""

    async def work() -> None:
        async with Paigeant(Settings(), activities=activity) as app:
            await worked(app, good=2)

    asyncio.run(work())
    done = paigeant("logs", "good")
    assert done.stdout == ""
    assert "log_sql: info" in done.stderr


def test_memory_keeps_no_lines() -> None:
    """A store in memory has no table: that lines are to be kept there is a mistake."""
    with pytest.raises(Exception, match="log_sql is info, and store_url is memory://"):
        Paigeant(Settings(store_url="memory://", transport_url="memory://", log_sql="info"))


# -- pruning


async def test_lines_go_with_their_runs(url: str) -> None:
    """Pruning takes the lines of what it deletes, and old ones of no run; those of other runs stay."""
    async with application(url) as app:
        await worked(app, good=2, bad=0)
    async with application(url) as app:
        assert await app.prune(older_than=0, statuses=[RunStatus.COMPLETED]) == 1
        assert await app.logs("good") == []
        assert events(await app.logs("bad"))[-1] == "run.failed"
        assert [line for line in await app.logs() if "workflow_id" not in line.fields] == []


# -- trouble


@contextlib.contextmanager
def locked(url: str) -> Iterator[None]:
    """The table of lines is somebody else's, or, on SQLite where that would lock all, away."""
    if url.startswith("postgres"):
        with psycopg.connect(url) as connection:
            connection.execute("LOCK TABLE workflow_logs IN ACCESS EXCLUSIVE MODE")
            yield
        return
    with contextlib.closing(sqlite3.connect("paigeant.db", isolation_level=None)) as file:
        file.execute("ALTER TABLE workflow_logs RENAME TO elsewhere")
        yield
        file.execute("ALTER TABLE elsewhere RENAME TO workflow_logs")


async def test_no_step_waits_for_lines_that_cannot_be_written(url: str) -> None:
    """Runs end as ever; their lines come once the table can be written again."""
    async with application(url) as app:
        with locked(url):
            async with asyncio.timeout(20):
                await worked(app, **{f"r{number}": 2 for number in range(20)})
            statuses = [await app.run(f"r{number}").status() for number in range(20)]
            assert set(statuses) == {RunStatus.COMPLETED}
        await app.dispatch(share, {"by": 2}, workflow_id="last")
        async with asyncio.timeout(PATIENCE):
            while not await app.logs("last"):  # noqa: ASYNC110  # other than by reading nobody hears of lines
                await asyncio.sleep(0.02)
        done = [line for line in await app.logs() if line.event == "run.completed"]
        assert len(done) == 20


async def test_what_cannot_be_written_is_bounded_and_counted(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The oldest lines are lost, and how many that were is a line of its own."""
    monkeypatch.setattr(sql, "_CLOSE_SECONDS", PATIENCE)  # for 10,000 lines, one transaction after the other
    async with Paigeant(Settings(store_url=url, transport_url=url)):
        pass
    database = open_database(url)
    await database.connect()
    sink = SqlLog(database, level="info")
    for number in range(10_500):
        sink.write(logging.INFO, {"event": "told", "number": number})
    assert (len(sink._lines), sink.lost) == (10_000, 500)
    sink.start()
    await asyncio.to_thread(sink.stop)
    lines = await latest_lines(database, limit=20_000)
    await database.close()
    assert [line.fields["number"] for line in lines if line.event == "told"] == list(range(500, 10_500))
    assert [line.fields for line in lines if line.event == "log.lost"] == [{"lines": 500}]
    assert sink.lost == 500  # a counter never falls


async def test_lines_that_the_end_does_not_wait_for_are_told(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Also those that a database which hangs has been given and doesn't take."""
    monkeypatch.setattr(sql, "_CLOSE_SECONDS", 0.1)
    goes_on = threading.Event()
    database = open_database("sqlite:///unopened.db")
    monkeypatch.setattr(database, "write_beside", lambda *_: goes_on.wait(PATIENCE))
    monkeypatch.setattr(database, "close_beside", lambda: None)
    sink = SqlLog(database, level="info")
    for number in range(3):
        sink.write(logging.INFO, {"event": "told", "number": number})
    sink.start()
    thread = sink._thread
    assert thread is not None
    await asyncio.to_thread(sink.stop)
    assert "3 log lines could not be written" in caplog.text
    goes_on.set()
    thread.join()
    assert sink._on_the_way == 0


async def test_large_lines_are_bounded_by_their_bytes() -> None:
    """A few lines of megabytes are as much as many small ones."""
    sink = SqlLog(open_database("sqlite:///unopened.db"), level="info")
    for _ in range(100):
        sink.write(logging.INFO, {"event": "told", "text": "x" * 1_000_000})
    assert sink._bytes <= 8 * 1024 * 1024
    assert sink.lost == 100 - len(sink._lines)


def test_a_process_that_was_forked_off_leaves_the_store_alone() -> None:
    """The connection and its thread are its parent's: it takes no lines, and waits for no lock to leave them out."""
    sink = SqlLog(open_database("sqlite:///unopened.db"), level="info")
    sink.write(logging.INFO, {"event": "told"})
    is_held, may_go = threading.Event(), threading.Event()

    def hold() -> None:
        with sink._lock:
            is_held.set()
            may_go.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    is_held.wait()
    child = os.fork()
    if not child:
        signal.alarm(10)
        sink.write(logging.INFO, {"event": "told"})
        os._exit(len(sink._lines))
    may_go.set()
    thread.join()
    assert os.waitpid(child, 0) == (child, 0)
    assert len(sink._lines) == 1


def test_what_the_garbage_collector_finds_may_be_told_while_a_line_is_taken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As asyncio tells of a task that failed unseen: in the thread that takes a line, which waited for itself."""
    database = open_database("sqlite:///unopened.db")
    sink = SqlLog(database, level="info")

    class Found:
        def __init__(self) -> None:
            self.itself = self

        def __del__(self) -> None:
            sink.write(logging.ERROR, {"event": "found"})

    def collect_at_the_worst_moment() -> None:
        gc.collect()

    Found()
    monkeypatch.setattr(database, "instant", collect_at_the_worst_moment)
    thread = threading.Thread(target=sink.write, args=(logging.INFO, {"event": "told"}), daemon=True)
    thread.start()
    thread.join(PATIENCE)
    assert not thread.is_alive()
    assert [line.event for line in sink._lines] == ["found", "told"]
    assert sink._bytes == sum(sql._weight(line.fields) for line in sink._lines)


async def test_lines_stand_in_the_order_in_which_they_were_told() -> None:
    """What a process tells next is not before what it has told, even when it tells of a later instant in between."""
    async with application() as app:
        sink = app._logs
        assert sink is not None
        for number in range(50):
            sink.write(logging.INFO, {"event": "told", "workflow_id": "r", "number": number})
    async with application() as app:
        found = await app.logs("r")
    assert [line.fields["number"] for line in found] == list(range(50))
    assert datetime.fromtimestamp(found[0].at, UTC).year >= 2024
