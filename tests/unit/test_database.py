"""One SQLite file, shared by tasks, threads and processes."""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest
import pytest_asyncio
from sqlalchemy import text
from tests.patience import PATIENCE

from paigeant.databases.sqlite import SqliteDatabase, database_path
from paigeant.databases.sqlite import connection as module
from paigeant.errors import (
    ConfigurationError,
    PaigeantError,
    RunNotFound,
    SchemaMismatch,
    StoreUnavailable,
)
from paigeant.green import elsewhere
from paigeant.lane import Lane, Tx
from paigeant.store import StepKey
from paigeant.stores import open_store
from paigeant.testing.conformance.bench import due, run

WRITERS = """
import asyncio, sys
from sqlalchemy import text
from paigeant.databases.sqlite import SqliteDatabase

def add(tx, requests):
    for n in requests:
        tx.connection.execute(text("INSERT INTO numbers VALUES (:who, :n)"), {"who": sys.argv[2], "n": n})
    return requests

async def main():
    database = SqliteDatabase(sys.argv[1])
    await database.connect()
    for start in range(0, 200, 20):
        await asyncio.gather(*(database.write(add, n) for n in range(start, start + 20)))
    await database.close()

asyncio.run(main())
"""


@pytest_asyncio.fixture
async def database(tmp_path: Path) -> AsyncIterator[SqliteDatabase]:
    """An open database with a table `numbers`."""
    database = SqliteDatabase(f"sqlite:///{tmp_path}/x.db")
    await database.connect()
    await database.write(execute, "CREATE TABLE numbers (who TEXT, n INTEGER)")
    yield database
    await database.close()


def execute(tx: Tx, requests: Sequence[str]) -> list[int]:
    """Do each statement; gives its count of rows."""
    return [tx.connection.execute(text(request)).rowcount for request in requests]


def add(tx: Tx, requests: Sequence[int]) -> list[int]:
    """Insert numbers; a negative one is an error of the whole batch."""
    for n in requests:
        if n < 0:
            raise ValueError(f"{n} is negative")
        tx.connection.execute(text("INSERT INTO numbers VALUES ('me', :n)"), {"n": n})
    return [n * 2 for n in requests]


async def numbers(database: SqliteDatabase) -> list[int]:
    """The numbers in the table."""
    query = text("SELECT n FROM numbers ORDER BY n")
    return await database.ask(lambda connection: list(connection.execute(query).scalars()))


async def held(database: SqliteDatabase) -> threading.Event:
    """Have a transaction under way that ends when the event is set."""
    began, go = asyncio.Event(), threading.Event()
    loop = asyncio.get_running_loop()

    def hold(tx: Tx, requests: Sequence[None]) -> list[None]:
        loop.call_soon_threadsafe(began.set)
        assert elsewhere(partial(go.wait, 20))
        return [None] * len(requests)

    task = database.write(hold, None)
    await began.wait()
    task.add_done_callback(lambda done: done.result())
    return go


async def test_large_requests_share_a_transaction_with_few(database: SqliteDatabase) -> None:
    """Together they would take longer than it may, each time anew: none of them would ever be done."""
    shared: list[list[int]] = []

    def take(tx: Tx, requests: Sequence[int]) -> list[None]:
        shared.append(list(requests))
        return [None] * len(requests)

    sizes = [5, 5, 1, 1, 20, 1]
    await asyncio.gather(*(database.write(take, size, size=size * 2**20) for size in sizes))
    assert shared == [[5], [5, 1, 1], [20], [1]]


async def test_a_question_through_sqlalchemy_does_not_keep_the_event_loop(database: SqliteDatabase) -> None:
    """It may look through the whole file, so that its transaction is done in another thread."""
    own = threading.get_ident()
    assert await database.ask(lambda connection: threading.get_ident()) != own
    assert await database.write(lambda tx, requests: [threading.get_ident() for _ in requests], None) == own


@pytest.mark.parametrize(("seconds", "stays"), [(0.0, True), (0.01, False)], ids=["quick", "slow"])
async def test_a_commit_is_left_to_another_thread_while_the_disk_is_slow(seconds: float, stays: bool) -> None:
    """What the last ones took says where the next one is done."""
    stayed = await commits(module.Synced(), *[False] * 20, seconds=seconds)
    assert not stayed[0], "nothing is known of the disk yet"
    assert stayed[-1] is stays


@pytest.mark.parametrize(("took", "stays"), [(0.0001, True), (0.001, False)], ids=["very quick", "quick"])
async def test_a_commit_that_somebody_goes_on_beside_is_left_to_another_thread_sooner(
    took: float, stays: bool
) -> None:
    """What it takes is then won, and not what the hand-over takes lost."""
    for beside, expected in ((True, stays), (False, True)):
        synced = module.Synced()
        synced._seconds = took
        assert await commits(synced, beside) == [expected]


async def test_whoever_has_a_unit_recorded_goes_on_beside_its_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So the commit is told, and those that all who asked wait for are told from it."""
    told: list[bool] = []

    def commit(_: object, driver: sqlite3.Connection, *, beside: bool) -> None:
        told.append(beside)
        driver.commit()

    monkeypatch.setattr(module.Synced, "commit", commit)
    store = open_store(f"sqlite:///{tmp_path / 'units.db'}")
    await store.connect()
    told.clear()
    await store.save_unit(StepKey("run", "step"), "unit", b"1")
    with pytest.raises(RunNotFound):
        await store.save_variable("run", "key", 1)
    await store.close()
    assert told == [True, False]


async def commits(synced: module.Synced, *beside: bool, seconds: float = 0.0) -> list[bool]:
    """Whether each of some commits was done in this thread, where the disk takes so long."""
    done_in: list[int] = []

    class Driver:
        def commit(self) -> None:
            time.sleep(seconds)  # the disk
            done_in.append(threading.get_ident())

    def commit(tx: Tx, requests: Sequence[bool]) -> list[None]:
        for is_beside in requests:
            synced.commit(cast(sqlite3.Connection, Driver()), beside=is_beside)
        return [None] * len(requests)

    @contextlib.contextmanager
    def begin(_: object, durable: bool) -> Iterator[Tx]:
        yield Tx(cast(Any, None))

    lane = Lane("lane", lambda: cast(Any, None), guard=contextlib.nullcontext(), begin=begin)
    for each in beside:
        await lane.submit(commit, each)
    await lane.stop()
    return [thread == threading.get_ident() for thread in done_in]


async def test_requests_that_meet_share_a_transaction(database: SqliteDatabase) -> None:
    """What comes in while a commit is under way becomes one transaction, with one call for each kind."""
    calls: list[int] = []

    def count(tx: Tx, requests: Sequence[int]) -> list[int]:
        calls.append(len(requests))
        return [*requests]

    go = await held(database)
    asked = asyncio.gather(*(database.write(count, n) for n in range(50)))
    await asyncio.sleep(0)
    go.set()
    assert await asked == list(range(50))
    assert calls == [50]


async def test_kinds_of_requests_come_in_one_order(database: SqliteDatabase) -> None:
    """However they come: two transactions that do two things in opposite order could wait for each other."""
    done: list[str] = []

    def first(tx: Tx, requests: Sequence[None]) -> list[None]:
        done.append("first")
        return [None] * len(requests)

    def second(tx: Tx, requests: Sequence[None]) -> list[None]:
        done.append("second")
        return [None] * len(requests)

    for handlers in ((first, second), (second, first)):
        await asyncio.gather(*(database.write(handler, None) for handler in handlers))
    assert done == ["first", "second"] * 2


async def test_one_bad_request_fails_alone(database: SqliteDatabase) -> None:
    """A request that can't be done doesn't fail those that happened to share its transaction."""
    go = await held(database)
    asked = asyncio.gather(*(database.write(add, n) for n in (1, -2, 3)), return_exceptions=True)
    await asyncio.sleep(0)
    go.set()
    first, bad, last = await asked
    assert (first, last) == (2, 6)
    assert isinstance(bad, ValueError)
    assert await numbers(database) == [1, 3]


async def test_an_error_takes_back_the_whole_transaction(database: SqliteDatabase) -> None:
    """Of a request that fails nothing is left."""

    def half(tx: Tx, requests: Sequence[int]) -> list[int]:
        add(tx, requests)
        raise RuntimeError("on the way")

    with pytest.raises(RuntimeError, match="on the way"):
        await database.write(half, 1)
    assert await numbers(database) == []


async def test_who_gave_up_leaves_the_others(database: SqliteDatabase) -> None:
    """A task that is cancelled while it waits for its commit takes nobody along."""
    go = await held(database)
    first, given_up = (database.write(add, n) for n in (1, 2))
    await asyncio.sleep(0)
    given_up.cancel()
    go.set()
    assert await first == 2


async def test_a_lazy_request_comes_soon(database: SqliteDatabase) -> None:
    """What may be lost in a crash needs no commit of its own, and is not left lying either."""
    done = asyncio.Event()
    loop = asyncio.get_running_loop()

    def note(tx: Tx, requests: Sequence[int]) -> list[int]:
        loop.call_soon_threadsafe(done.set)
        return add(tx, requests)

    database.write_lazily(note, 1)
    await asyncio.wait_for(done.wait(), PATIENCE)


async def test_a_lazy_request_is_not_forgotten_behind_a_slow_commit(database: SqliteDatabase) -> None:
    """When its time comes during another transaction, it is done after that, without waiting for a third."""
    done = asyncio.Event()
    loop = asyncio.get_running_loop()

    def note(tx: Tx, requests: Sequence[int]) -> list[int]:
        loop.call_soon_threadsafe(done.set)
        return [*requests]

    go = await held(database)
    database.write_lazily(note, 1)
    loop.call_later(0.1, go.set)  # later than the lazy request's own time
    await asyncio.wait_for(done.wait(), PATIENCE)


async def test_closing_does_what_was_asked_for(tmp_path: Path) -> None:
    """What was begun, and what was lazy, is committed before the file is closed."""
    database = SqliteDatabase(f"sqlite:///{tmp_path}/x.db")
    await database.connect()
    await database.write(execute, "CREATE TABLE numbers (who TEXT, n INTEGER)")
    writing = asyncio.gather(*(database.write(add, n) for n in range(100)))
    database.write_lazily(add, 100)
    await asyncio.sleep(0)
    await database.close()
    await writing
    await database.connect()
    assert await numbers(database) == list(range(101))
    await database.close()


async def test_a_closed_file_says_so(tmp_path: Path) -> None:
    """Every use of a file that isn't open is one clear error."""
    database = SqliteDatabase(f"sqlite:///{tmp_path}/x.db")
    for attempt in (
        lambda: database.write(add, 1),
        lambda: database.ask(lambda connection: None),
        lambda: asyncio.to_thread(database.write_now, add, 1),
    ):
        with pytest.raises(StoreUnavailable, match=r"x\.db is not open; .* `async with Paigeant"):
            await attempt()
    await database.close()


async def test_another_event_loop_is_sent_to_the_one_that_opened_it(database: SqliteDatabase) -> None:
    """Before anything is done: nobody there could wait for it."""

    async def ask() -> None:
        await database.write(add, 7)

    with pytest.raises(PaigeantError, match=r"x\.db was opened in another event loop"):
        await asyncio.to_thread(asyncio.run, ask())
    assert await database.write(execute, "DELETE FROM numbers") == 0


async def test_whoever_waits_for_a_run_in_another_event_loop_is_told_so(tmp_path: Path) -> None:
    """Also where nothing would be asked, since the run was started here and hasn't ended."""
    store = open_store(f"sqlite:///{tmp_path}/x.db")
    await store.connect()
    with pytest.raises(RunNotFound):
        await store.wait_ended("other")  # from now on what is started here is known to be open
    await store.record_workflow_start(run("r"), due())
    with pytest.raises(PaigeantError, match=r"x\.db was opened in another event loop"):
        await asyncio.to_thread(lambda: asyncio.run(asyncio.wait_for(store.wait_ended("r"), PATIENCE)))
    await store.close()


async def test_its_users_are_counted(tmp_path: Path) -> None:
    """Store and transport share it: it closes with the last of them."""
    database = SqliteDatabase(f"sqlite:///{tmp_path}/x.db")
    await database.connect()
    await database.connect()
    await database.close()
    await database.write(execute, "CREATE TABLE numbers (who TEXT, n INTEGER)")
    await database.close()
    with pytest.raises(StoreUnavailable):
        await numbers(database)


async def test_a_reader_sees_one_state_beside_the_writer(database: SqliteDatabase) -> None:
    """A read doesn't wait for a transaction that is under way, and sees what was committed before."""
    await database.write(add, 1)
    go = await held(database)
    assert await asyncio.wait_for(numbers(database), PATIENCE) == [1]
    go.set()


async def test_a_thread_writes_beside_the_loop(database: SqliteDatabase) -> None:
    """write_now is a transaction of the calling thread: the heartbeat's."""
    assert await asyncio.to_thread(database.write_now, add, 4) == 8
    assert await numbers(database) == [4]


async def test_several_processes_write_to_one_file(database: SqliteDatabase) -> None:
    """Nothing is lost, nothing fails, whoever has the lock."""
    children = [
        await asyncio.create_subprocess_exec(sys.executable, "-c", WRITERS, database.url, f"child {n}")
        for n in range(3)
    ]
    for n in range(100):
        await database.write(add, n)
    assert [await child.wait() for child in children] == [0, 0, 0]
    assert len(await numbers(database)) == 3 * 200 + 100
    checked = await database.ask(lambda c: c.execute(text("PRAGMA integrity_check")).scalar())
    assert checked == "ok"


async def test_a_commit_is_heard_by_its_own_process(database: SqliteDatabase) -> None:
    """What a transaction rings for reaches those who listen here, until they stop."""
    heard: list[frozenset[str]] = []
    forget = database.on_change(heard.append)

    def ring(tx: Tx, requests: Sequence[str]) -> list[None]:
        tx.rings.update(requests)
        return [None] * len(requests)

    await database.write(ring, "topic a")
    forget()
    await database.write(ring, "topic b")
    assert heard == [frozenset({"topic a"})]


@pytest.mark.parametrize("small", ["bound", "disk"])
async def test_the_log_stays_bounded(
    database: SqliteDatabase, monkeypatch: pytest.MonkeyPatch, small: str
) -> None:
    """However much is written, the write-ahead log is put into the file now and then, before it fills the disk."""
    limit = 256 * 1024
    if small == "bound":
        monkeypatch.setattr(module, "_CHECKPOINT_BYTES", limit)
    else:
        disk = shutil.disk_usage(database.path)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: disk._replace(free=limit))
    log = f"{database.path}-wal"
    largest = 0
    for n in range(100):
        await database.write(execute, f"INSERT INTO numbers VALUES ('{'x' * 16000}', {n})")
        largest = max(largest, os.path.getsize(log))  # noqa: ASYNC240  # it is here in no time
    assert limit < largest < 4 * limit


async def test_the_file_stays_the_same_in_another_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that changes its working directory, as an activity may, opens no other file and tidies this one."""
    monkeypatch.setattr(module, "_CHECKPOINT_BYTES", 1)
    (elsewhere := tmp_path / "elsewhere").mkdir()
    database, log = SqliteDatabase("sqlite:///here.db"), tmp_path / "here.db-wal"
    await database.connect()
    try:
        await database.write(execute, "CREATE TABLE numbers (who TEXT, n INTEGER)")
        monkeypatch.chdir(elsewhere)
        await asyncio.to_thread(database.write_now, add, 0)  # by a connection that is made only now
        sizes = []
        for n in range(1, 40):
            await database.write(add, n)
            sizes.append(log.stat().st_size)
        assert await numbers(database) == list(range(40))
    finally:
        await database.close()
    assert list(elsewhere.iterdir()) == []
    assert sizes != sorted(sizes)  # it was put into the file, and began anew


OPEN_AND_CLOSE = """
import sqlite3, sys
connection = sqlite3.connect(sys.argv[1])
print(*(n for (n,) in connection.execute("SELECT n FROM numbers ORDER BY n")))
connection.close()
"""


WRITE_AND_CLOSE = """
import sqlite3, sys
connection = sqlite3.connect(sys.argv[1])
connection.execute("INSERT INTO numbers VALUES ('they', 2)")
connection.commit()
connection.close()
"""


def seen_elsewhere(path: Path) -> list[int]:
    """The numbers in the table as another program finds them, which opens the file for it and closes it."""
    command = [sys.executable, "-c", OPEN_AND_CLOSE, str(path)]
    return [int(n) for n in subprocess.run(command, capture_output=True, check=True).stdout.split()]


@pytest.mark.parametrize("how", ["connect", "as it is"])
async def test_a_file_under_two_names_in_a_process_stays_locked(
    database: SqliteDatabase, tmp_path: Path, how: str
) -> None:
    """To close any handle of a file gives up all locks of the process on it.

    Without them, who closes the file elsewhere takes itself for the last one, and removes the log that is in use.
    """
    (alias := tmp_path / "alias.db").symlink_to(database.path)
    await database.write(add, 1)
    other = SqliteDatabase(f"sqlite:///{alias}")
    if how == "connect":
        await other.connect()
    else:
        with other.as_it_is():
            pass
    try:
        assert seen_elsewhere(database.path) == [1]
        await database.write(add, 2)
        assert await numbers(database) == [1, 2]
        assert seen_elsewhere(database.path) == [1, 2]
    finally:
        await other.close()


@pytest.mark.parametrize("is_noticed", [True, False], ids=["noticed", "idle"])
@pytest.mark.parametrize("gone", [["shm"], ["wal", "shm"]], ids="+".join)
async def test_what_others_record_by_another_index_of_the_log_is_kept(
    database: SqliteDatabase, gone: list[str], is_noticed: bool
) -> None:
    """Whoever opens a file without its -shm makes a new one. A process that has the old one ends without harm."""
    await database.write(add, 1)
    await database.close()  # which puts it into the file
    await database.connect()
    for helper in gone:
        database.path.with_name(f"x.db-{helper}").unlink()
    command = [sys.executable, "-c", WRITE_AND_CLOSE, str(database.path)]
    await asyncio.to_thread(subprocess.run, command, check=True)
    if is_noticed:
        for lane in (database.write, database.read):
            with pytest.raises(StoreUnavailable, match=r"x\.db-(wal|shm) was deleted while"):
                await lane(add, 3)
    await database.close()  # SQLite would remove the log, with what it doesn't know
    assert seen_elsewhere(database.path) == [1, 2]
    with pytest.raises(StoreUnavailable, match=r"x\.db-shm was deleted while"):
        await database.connect()


async def test_another_index_of_the_log_is_noticed_from_another_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that has changed its working directory finds the file by the name that it was opened by."""
    (elsewhere := tmp_path / "elsewhere").mkdir()
    database, path = SqliteDatabase("sqlite:///here.db"), tmp_path / "here.db"
    await database.connect()
    await database.write(execute, "CREATE TABLE numbers (who TEXT, n INTEGER)")
    path.with_name("here.db-shm").unlink()
    command = [sys.executable, "-c", WRITE_AND_CLOSE, str(path)]
    await asyncio.to_thread(subprocess.run, command, check=True)
    monkeypatch.chdir(elsewhere)
    with pytest.raises(StoreUnavailable, match=r"here\.db-shm was deleted while"):
        await database.write(add, 3)
    await database.close()
    assert seen_elsewhere(path) == [2]


@pytest.mark.parametrize("is_read", [False, True], ids=["left alone", "read"])
async def test_a_deleted_log_ends_in_the_file_if_nobody_has_recorded_anything_since(
    database: SqliteDatabase, is_read: bool
) -> None:
    """What was committed isn't lost with it, also when another process has made one anew to read the file."""
    await database.close()  # which puts the table into the file
    await database.connect()
    await database.write(add, 1)
    for helper in ("wal", "shm"):
        database.path.with_name(f"x.db-{helper}").unlink()
    with pytest.raises(StoreUnavailable, match=r"x\.db-wal was deleted while"):
        await database.write(add, 2)
    assert not is_read or seen_elsewhere(database.path) == []
    await database.close()
    assert seen_elsewhere(database.path) == [1]
    await database.connect()
    assert await numbers(database) == [1]


@pytest.mark.parametrize("replaced", [False, True], ids=["deleted", "replaced"])
async def test_a_log_that_is_gone_is_not_written_to(database: SqliteDatabase, replaced: bool) -> None:
    """What is committed to it nobody else would ever see, and a crash would lose it."""
    await database.write(add, 1)
    log = database.path.with_name("x.db-wal")
    log.unlink()
    if replaced:
        log.touch()
    for lane in (database.write, database.read):
        with pytest.raises(StoreUnavailable, match=r"x\.db-wal was deleted while"):
            await lane(add, 2)
    with pytest.raises(StoreUnavailable, match=r"x\.db-wal was deleted while"):
        await asyncio.to_thread(database.write_now, add, 3)
    await database.close()  # which puts what was committed into the file
    assert seen_elsewhere(database.path) == [1]


async def test_a_file_that_cant_be_looked_at_is_an_error(database: SqliteDatabase) -> None:
    """Its folder has become a file: that may pass, as a disk comes back that was away."""
    folder = database.path.parent
    away = folder.with_name(f"{folder.name}-away")
    folder.rename(away)
    folder.touch()
    with pytest.raises(StoreUnavailable, match=r"x\.db: Not a directory"):
        await database.write(add, 1)
    folder.unlink()
    away.rename(folder)
    await database.write(add, 2)
    assert await numbers(database) == [2]


async def test_a_checkpoint_that_fails_leaves_nobody_waiting(database: SqliteDatabase) -> None:
    """On a full disk it does; who waits for the lock afterwards still doesn't keep the event loop."""
    await database.write(add, 1)

    def checkpointed(tx: Tx, requests: Sequence[None]) -> list[Any]:
        driver = module.driver_of(tx.connection)
        driver.commit()
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (database.path.stat().st_size, hard))
        try:
            with pytest.raises(sqlite3.OperationalError, match=r"full|I/O"):
                module.checkpoint(driver)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        [found] = driver.execute("PRAGMA busy_timeout").fetchone()
        driver.execute("BEGIN")
        return [found]

    assert await database.write(checkpointed, None) == 0


async def test_a_full_disk_is_an_error_that_passes(database: SqliteDatabase) -> None:
    """When the file can't grow the transaction fails whole; once there is room again, the same one works."""
    await filled(database)
    full = await asyncio.gather(*(database.write(add, n) for n in range(5000)), return_exceptions=True)
    assert {str(found) for found in full if isinstance(found, StoreUnavailable)} == {
        f"can't use {database.path}: database or disk is full"
    }
    kept = await numbers(database)
    await database.write(pragma, "max_page_count=100000")
    await database.write(add, 6000)
    assert await numbers(database) == [*kept, 6000]


async def test_what_the_disk_has_no_room_for_keeps_nothing_else_from_being_written(
    database: SqliteDatabase,
) -> None:
    """A large result that shares its transaction with small ones fails alone."""
    await filled(database)
    large = database.write(execute, f"INSERT INTO numbers VALUES ('{'x' * 500_000}', 1)")
    refused, *done = await asyncio.gather(
        large, *(database.write(add, n) for n in range(5)), return_exceptions=True
    )
    assert isinstance(refused, StoreUnavailable)
    assert await numbers(database) == [0, 1, 2, 3, 4]
    assert done == [2 * n for n in range(5)]


async def filled(database: SqliteDatabase) -> None:
    """Have its file grow no more."""
    pages = await database.write(pragma, "page_count")
    await database.write(pragma, f"max_page_count={pages}")


def pragma(tx: Tx, requests: Sequence[str]) -> list[Any]:
    """The value of each pragma."""
    return [tx.connection.exec_driver_sql(f"PRAGMA {request}").scalar() for request in requests]


async def test_a_locked_file_is_an_error(database: SqliteDatabase, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody who holds the lock for ever is reported, not waited for."""
    monkeypatch.setattr(module, "_BUSY_SECONDS", 0.05)
    other = sqlite3.connect(database.path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(StoreUnavailable, match="locked"):
        await database.write(add, 1)
    other.rollback()
    other.close()
    assert await database.write(add, 1) == 2


@pytest.mark.parametrize(
    ("url", "path"),
    [
        ("sqlite:///a.db", "a.db"),
        ("sqlite:///folder/a.db", "folder/a.db"),
        ("sqlite:////var/a.db", "/var/a.db"),
    ],
)
def test_a_url_names_a_file(url: str, path: str) -> None:
    """Three slashes for a relative path, four for an absolute one."""
    assert database_path(url) == Path(path)


@pytest.mark.parametrize(
    "url",
    [
        "sqlite://",
        "sqlite:///",
        "sqlite:///:memory:",
        "sqlite:///a.db?mode=ro",
        "sqlite://x",
        "postgresql://x/y",
        "a.db",
        "",
    ],
)
def test_a_url_without_a_file_is_refused(url: str) -> None:
    """The error shows how it is written."""
    if url == "sqlite://x":
        assert database_path(url) == Path("x")
        return
    with pytest.raises(ConfigurationError, match=r"sqlite:///file\.db"):
        database_path(url)


async def refused(path: Path, error: type[Exception], said: str) -> None:
    """Opening `path` gives the error, twice, and changes nothing."""
    database = SqliteDatabase(f"sqlite:///{path}")
    for _ in range(2):
        with pytest.raises(error, match=said):
            await database.connect()


async def test_a_file_that_is_no_database_is_left_alone(tmp_path: Path) -> None:
    """Text, and a file that only begins like a database."""
    path = tmp_path / "notes.txt"
    path.write_text("Dear diary, today I was nearly overwritten.")
    await refused(path, ConfigurationError, "is not an SQLite database")
    assert path.read_text().startswith("Dear diary")
    path.write_bytes(b"SQLite format 3\0" + b"x" * 5000)
    await refused(path, (ConfigurationError, StoreUnavailable), "notes.txt")  # type: ignore[arg-type]


async def test_an_empty_file_becomes_a_database(tmp_path: Path) -> None:
    """A file of no bytes is as good as none."""
    path = tmp_path / "x.db"
    path.touch()
    database = SqliteDatabase(f"sqlite:///{path}")
    await database.connect()
    await database.close()
    assert path.stat().st_size > 0


async def test_a_log_that_has_just_gone_is_no_other_users(
    database: SqliteDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who closes a file last deletes its log, also in the moment in which somebody else looks at it."""
    await database.close()
    log = database.path.with_name("x.db-wal")
    log.touch()

    def look(path: str, mode: int) -> bool:
        if path == str(log):
            log.unlink(missing_ok=True)
        return access(path, mode)

    access = os.access
    monkeypatch.setattr(os, "access", look)
    await database.connect()


async def test_a_folder_is_no_database(tmp_path: Path) -> None:
    """Nor is a file in a folder that doesn't exist."""
    await refused(tmp_path, ConfigurationError, "is a folder")
    await refused(tmp_path / "no" / "x.db", ConfigurationError, "doesn't exist")


async def test_a_file_of_two_hard_links_is_refused(tmp_path: Path) -> None:
    """Who opens it by the other name has a log of its own: what is in one of the two is lost, without an error."""
    path = tmp_path / "x.db"
    path.touch()
    (alias := tmp_path / "alias.db").hardlink_to(path)
    await refused(path, ConfigurationError, r"x\.db has another name")
    await refused(alias, ConfigurationError, r"alias\.db has another name")
    alias.unlink()
    database = SqliteDatabase(f"sqlite:///{path}")
    await database.connect()
    await database.close()


async def test_a_newer_file_is_left_alone(tmp_path: Path) -> None:
    """A file that newer code has made is refused, with what to do."""
    path = tmp_path / "x.db"
    database = SqliteDatabase(f"sqlite:///{path}")
    await database.connect()
    await database.write(execute, "UPDATE paigeant_version SET version_num = '9999'")
    await database.close()
    await refused(path, SchemaMismatch, "newer version")


AS_NOBODY = """
import asyncio, os, sys
from paigeant.databases.sqlite import SqliteDatabase
from paigeant.errors import PaigeantError

database = SqliteDatabase(sys.argv[1])
if os.getuid() == 0:  # root may do anything
    os.setgid(65534)
    os.setuid(65534)
try:
    asyncio.run(database.connect())
except PaigeantError as exc:
    print(f"{type(exc).__name__}: {exc}")
"""


@pytest.mark.parametrize(("mode", "said"), [(0o555, "is read-only"), (0o755, "is read-only")])
def test_what_is_read_only_is_a_clear_error(mode: int, said: str) -> None:
    """A folder in which no file can be made, and a file that can't be written to."""
    folder = Path(tempfile.mkdtemp())  # others can't look into this test's own
    try:
        path = folder / "x.db"
        if mode == 0o755:
            sqlite3.connect(path).close()
            path.chmod(0o444)
        folder.chmod(mode)
        command = [sys.executable, "-c", AS_NOBODY, f"sqlite:///{path}"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    finally:
        folder.chmod(0o755)
        shutil.rmtree(folder)
    assert done.stdout.startswith("ConfigurationError: ")
    assert said in done.stdout
    assert done.stdout.count("\n") == 1


async def test_several_threads_write_beside_the_loop(database: SqliteDatabase) -> None:
    """Each worker's heartbeat has a thread of its own: their transactions don't get into each other."""
    await asyncio.gather(*(asyncio.to_thread(database.write_now, add, n) for n in range(100)))
    assert await numbers(database) == list(range(100))


async def test_who_opens_a_new_file_waits_for_another_that_makes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SQLite turns away at once who switches a file to its log while another process writes the first tables."""
    path = tmp_path / "new.db"
    other = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    other.execute("BEGIN IMMEDIATE")
    waited: list[float] = []

    def pause(seconds: float) -> None:
        waited.append(seconds)
        if other.in_transaction:
            other.execute("ROLLBACK")

    monkeypatch.setattr(module, "pause", pause)
    database = SqliteDatabase(f"sqlite:///{path}")
    await database.connect()
    await database.close()
    other.close()
    assert waited
