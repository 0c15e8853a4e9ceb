"""Databases that can't be used: files that are none, folders that are read-only, disks that are full."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import resource
import shutil
import sqlite3
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import pytest
import sqlalchemy
from tests.bad_input.bench import HANDLERS, INPUT, OTHER, PAIGEANT, call, check, done, put, works_on
from tests.patience import PATIENCE

from paigeant import ActivityRegistry, Paigeant, Settings, Step, Workflow
from paigeant.databases.sqlite import connection
from paigeant.observer import Event

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
        ("can't use paigeant.db", "malformed", "put a backup in its place"),
        3,
    ),
    Place(
        "a damaged database",
        cut(lambda body: body[:100] + b"\xff" * (len(body) - 100)),
        ("can't use paigeant.db", "malformed", "put a backup in its place"),
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
        does("UPDATE paigeant_version SET version_num = '9999'"),
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


@pytest.mark.parametrize("case", [case for case in CASES if case.name != "a newer schema"], ids=str)
def test_db_commands_do_not_take_over_what_is_not_ours(case: Place) -> None:
    """`db upgrade` refuses it as well."""
    case.arrange()
    found = DATABASE.read_bytes() if DATABASE.is_file() else None
    result = call("db", "upgrade", "--json")
    check(result, ("paigeant.db",), result.exit_code)
    assert result.exit_code in (2, 3)
    assert (DATABASE.read_bytes() if DATABASE.is_file() else None) == found


def test_an_empty_file_becomes_a_database() -> None:
    """A file without a byte is a database without tables, to SQLite as to us."""
    DATABASE.write_bytes(b"")
    assert done(*DISPATCH[:-1]) == {"id": "new"}


def test_a_database_of_another_program_can_be_shared() -> None:
    """Tables of other names are left alone."""
    does("CREATE TABLE notes (text TEXT)", "INSERT INTO notes VALUES ('mine')", anew=True)()
    assert done(*DISPATCH[:-1]) == {"id": "new"}
    with closing(sqlite3.connect(DATABASE)) as database:
        assert database.execute("SELECT text FROM notes").fetchall() == [("mine",)]


# -- rights


@pytest.fixture
def folder(before: bytes, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder that everybody can see, with the database in it: root passes through rights, so root steps down."""
    with tempfile.TemporaryDirectory(prefix="paigeant-rights-") as name:
        folder = Path(name)
        folder.chmod(0o755)
        with monkeypatch.context() as patch:
            patch.chdir(folder)
            put({"paigeant.db": before, "handlers.py": HANDLERS, "input.json": json.dumps(INPUT)})
            for command in COMMANDS.values():
                call(*command)  # what a command imports is imported now: nobody may not read it
            put({"paigeant.db": before})
            yield folder
            folder.chmod(0o755)


@contextlib.contextmanager
def as_nobody() -> Iterator[None]:
    """Without the rights of root, where the tests have them."""
    if os.getuid() != 0:
        yield
        return
    os.setresuid(65534, 65534, 0)
    try:
        yield
    finally:
        os.setresuid(0, 0, 0)


@pytest.mark.parametrize("command", ["dispatch", "run"])
@pytest.mark.parametrize(
    ("leads", "says"),
    [
        ("paigeant.db", "paigeant.db is a symbolic link that leads to itself"),
        ("gone/x.db", "gone of the database"),
    ],
)
def test_a_link_that_leads_nowhere_is_told(leads: str, says: str, command: str) -> None:
    """Where the file would be is what counts, and not where the link is."""
    DATABASE.unlink()
    DATABASE.symlink_to(leads)
    check(call(*COMMANDS[command]), (says,), 2)
    DATABASE.unlink()


RIGHTS: list[tuple[str, int | None, int, tuple[str, ...]]] = [
    ("a file that may not be written", 0o444, 0o755, ("paigeant.db is read-only", "needs to write to it")),
    ("a file that may not be read", 0o000, 0o755, ("can't read paigeant.db", "Permission denied")),
    ("a folder that may not be written", None, 0o555, ("can't make paigeant.db", "is read-only")),
    (
        "a file in a folder that may not be",
        0o666,
        0o555,
        ("of paigeant.db is read-only", "SQLite has to write"),
    ),
]
"""A name, the rights to the file (None: there is none) and to its folder, and what the error says."""


@pytest.mark.parametrize("command", ["dispatch", "run"])
@pytest.mark.parametrize(("name", "file", "around", "says"), RIGHTS, ids=[name for name, *_ in RIGHTS])
def test_what_may_not_be_written_is_told(
    name: str,
    file: int | None,
    around: int,
    says: tuple[str, ...],
    command: str,
    folder: Path,
    before: bytes,
) -> None:
    """The line names the file or folder, the exit code is 2, and with the rights back work goes on."""
    if file is None:
        DATABASE.unlink()
    else:
        DATABASE.chmod(file)
    folder.chmod(around)
    with as_nobody():
        result = call(*COMMANDS[command])
    check(result, says, 2)
    folder.chmod(0o755)
    if DATABASE.exists():
        DATABASE.chmod(0o644)
    assert not DATABASE.exists() or DATABASE.read_bytes() == before
    DATABASE.write_bytes(before)
    works_on()


@pytest.mark.parametrize("helper", ["paigeant.db-wal", "paigeant.db-shm"])
@pytest.mark.parametrize("command", ["dispatch", "run"])
def test_a_log_of_another_user_is_told(command: str, helper: str, folder: Path) -> None:
    """Who may write to the file may not be let at what another user's process has beside it, also after a crash."""
    folder.chmod(0o777)
    DATABASE.chmod(0o666)
    with closing(sqlite3.connect(DATABASE)) as other:
        other.execute("SELECT * FROM workflow_runs").fetchall()
        for name in ("paigeant.db-wal", "paigeant.db-shm"):
            Path(name).chmod(0o444 if name == helper else 0o666)
        with as_nobody():
            result = call(*COMMANDS[command])
        check(result, (f"{helper}, which belongs to paigeant.db, is of another user", "run as one user"), 2)
    works_on()


READ_ONLY = """
set -e
mount --make-rprivate /
mount -t tmpfs none /mnt
mkdir /mnt/data /mnt/app
mount -t tmpfs none /mnt/app
cp handlers.py input.json /mnt/app
cd /mnt/app
export PAIGEANT_STORE_URL=sqlite:////mnt/data/x.db PAIGEANT_TRANSPORT_URL=sqlite:////mnt/data/x.db
mount -o remount,ro /mnt/app
for folder in /tmp /var/tmp; do mount -t tmpfs -o ro none $folder; done
"$@" dispatch order input.json --id run-1 --handlers handlers.py
"$@" run handlers.py --until-idle
"$@" runs show run-1 --json
"""


def test_where_only_the_folder_of_the_database_can_be_written_all_goes_on() -> None:
    """As in a container with a read-only root and a volume: without a place for temporary files there is no bell."""
    # To mount something needs root, as do the hosts of other tests.
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", READ_ONLY, "sh", *PAIGEANT],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert '"status": "completed"' in done.stdout


# -- others at the same file


def test_a_file_that_others_lock_is_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who can't get at the file within the time for that is told so, and can try again later."""
    monkeypatch.setattr(connection, "_BUSY_SECONDS", 0.1)
    other = sqlite3.connect(DATABASE, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    check(call(*DISPATCH), ("can't use paigeant.db", "database is locked"), 3)
    other.execute("ROLLBACK")
    other.close()
    works_on()


def test_processes_that_make_the_file_at_the_same_moment_make_one() -> None:
    """Each finds the tables whole, and no run is lost."""
    DATABASE.unlink()
    command = [*PAIGEANT, "dispatch", "order", "input.json", "--handlers", "handlers.py"]
    made = [
        subprocess.Popen([*command, "--id", f"run-{number}"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for number in range(4)
    ]
    said = [process.communicate() for process in made]
    assert [process.returncode for process in made] == [0] * 4, said
    assert {run["id"] for run in done("runs", "list")} == {f"run-{number}" for number in range(4)}


# -- under a running worker

SLOW = """
import asyncio, pathlib
from paigeant import ActivityRegistry, Workflow
activity = ActivityRegistry()
beside = pathlib.Path(%r)

@activity.execute(retries=0)
async def fill(number: int) -> str:
    (beside / f"begun-{number}").touch()
    while not (beside / "go").exists():
        await asyncio.sleep(0.01)
    with (beside / "done").open("a") as file:
        file.write(f"{number}\\n")
    return str(number) * 60_000

@activity.execute()
async def end(fill: str) -> int:
    return len(fill)

big = Workflow("big", ["fill", "end"])
"""


class Worker:
    """A worker process on files that may vanish or fill up. Its log and its signs are kept elsewhere."""

    def __init__(self, folder: Path, beside: Path) -> None:
        self.beside = beside
        (folder / "slow.py").write_text(SLOW % str(beside))
        settings = "sweep_interval: 0.2\nheartbeat: 0.2\n"
        (folder / "paigeant.yaml").write_text(settings)
        with (beside / "log").open("wb") as log:
            command = [*PAIGEANT, "run", str(folder / "slow.py")]
            self.process = subprocess.Popen(command, cwd=folder, stderr=log, stdin=subprocess.DEVNULL)

    def until(self, holds: Callable[[], object]) -> None:
        """Wait until something holds; the worker has to live meanwhile."""
        until = time.monotonic() + PATIENCE
        while not holds():
            assert self.process.poll() is None, self.log()
            assert time.monotonic() < until, self.log()
            time.sleep(0.01)

    def log(self) -> str:
        """What it has written so far."""
        return (self.beside / "log").read_text()

    def stop(self) -> None:
        """Stop it as an operator does. It ends well."""
        self.process.terminate()
        assert self.process.wait(PATIENCE) == 0, self.log()


def can_mount() -> bool:
    """Whether these tests may make a small disk of their own."""
    if os.getuid() != 0 or shutil.which("mount") is None:
        return False
    with tempfile.TemporaryDirectory() as name:
        made = subprocess.run(["mount", "-t", "tmpfs", "none", name], capture_output=True, check=False)
        if made.returncode == 0:
            subprocess.run(["umount", name], check=True)
        return made.returncode == 0


class SmallDisk:
    """A disk of 3 MiB."""

    def __init__(self, folder: Path) -> None:
        self.ballast = folder / "ballast"
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "none", str(folder)], check=True)

    def fill(self, worker: int) -> None:
        """Leave no byte free."""
        with self.ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while file.write(bytes(4096)):
                pass

    def free(self, worker: int) -> None:
        """Make room again."""
        self.ballast.unlink()


class SmallFiles:
    """No disk of our own: a bound on the size of what the worker writes, which the system enforces as well."""

    def __init__(self, folder: Path) -> None:
        self.log = folder / "paigeant.db-wal"

    def fill(self, worker: int) -> None:
        """Let the worker's files grow no more."""
        _, most = resource.prlimit(worker, resource.RLIMIT_FSIZE)
        resource.prlimit(worker, resource.RLIMIT_FSIZE, (self.log.stat().st_size, most))

    def free(self, worker: int) -> None:
        """Let them grow."""
        _, most = resource.prlimit(worker, resource.RLIMIT_FSIZE)
        resource.prlimit(worker, resource.RLIMIT_FSIZE, (most, most))


DISKS: dict[str, type[SmallDisk] | type[SmallFiles]] = {
    "small files": SmallFiles,
    **({"small disk": SmallDisk} if can_mount() else {}),
}


@pytest.fixture
def apart(tmp_path: Path) -> Iterator[Path]:
    """A folder that a disk can be mounted on."""
    path = tmp_path / "apart"
    path.mkdir()
    yield path
    if os.path.ismount(path):
        subprocess.run(["umount", "-l", str(path)], check=True)


@pytest.mark.parametrize("disk", DISKS)
def test_results_outlive_a_disk_that_is_full(
    disk: str, apart: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was done while nothing could be written is recorded once there is room: no step is done again."""
    made = DISKS[disk](apart)
    worker = Worker(apart, tmp_path)
    monkeypatch.chdir(apart)
    runs = [str(number) for number in range(4)]
    worker.until(lambda: "worker.started" in worker.log())
    for run in runs:
        body = json.dumps({"number": run})
        done("dispatch", "big", "-", "--handlers", "slow.py", "--id", run, input=body)
    worker.until(lambda: all((tmp_path / f"begun-{run}").exists() for run in runs))
    made.fill(worker.process.pid)
    (tmp_path / "go").touch()
    worker.until(lambda: "has to wait" in worker.log())
    if disk == "small disk":
        body = json.dumps({"number": 9})
        late = call("dispatch", "big", "-", "--handlers", "slow.py", "--id", "late", "--json", input=body)
        check(late, ("can't use paigeant.db", "database or disk is full"), 3)
    made.free(worker.process.pid)
    for run in runs:
        body = json.dumps({"number": run})
        args = ("dispatch", "big", "-", "--handlers", "slow.py", "--id", run, "--wait", "--timeout", "60")
        assert done(*args, input=body)["output"] == 60_000
    assert sorted((tmp_path / "done").read_text().split()) == runs
    assert [run["id"] for run in done("runs", "list")][::-1] == runs
    worker.stop()
    assert "Traceback" not in worker.log()


def test_a_full_database_takes_no_run() -> None:
    """A dispatch that finds no room is refused whole; with room again it is taken."""
    bounded: list[sqlite3.Connection] = []

    def bound(connection: sqlite3.Connection, _: object) -> None:
        pages = connection.execute("PRAGMA page_count").fetchone()[0]
        connection.execute(f"PRAGMA max_page_count={pages}")
        bounded.append(connection)

    put({"input.json": json.dumps({"sku": "x" * 900_000})})
    sqlalchemy.event.listen(sqlalchemy.Engine, "connect", bound)
    try:
        check(call(*DISPATCH), ("can't use paigeant.db", "database or disk is full"), 3)
    finally:
        sqlalchemy.event.remove(sqlalchemy.Engine, "connect", bound)
    assert bounded
    assert {run["id"] for run in done("runs", "list")} == {"completed", "failed", OTHER}
    put({"input.json": json.dumps(INPUT)})
    works_on()


@pytest.mark.parametrize("replaced", [False, True], ids=["deleted", "replaced"])
def test_a_file_that_vanishes_under_a_worker_is_told(
    replaced: bool, apart: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worker says so and writes nothing into the void; with the file back in its place it goes on."""
    worker = Worker(apart, tmp_path)
    monkeypatch.chdir(apart)
    (tmp_path / "go").touch()
    worker.until(lambda: "worker.started" in worker.log())
    body = json.dumps({"number": 1})
    args = ("dispatch", "big", "-", "--handlers", "slow.py", "--wait", "--timeout", "60", "--id")
    assert done(*args, "one", input=body)["output"] == 60_000
    aside = tmp_path / "aside"
    aside.mkdir()
    for file in apart.glob("paigeant.db*"):
        file.rename(aside / file.name)
    if replaced:
        assert call("db", "upgrade").exit_code == 0
    word = "replaced" if replaced else "deleted"
    worker.until(lambda: f"paigeant.db was {word} while it was in use" in worker.log())
    for file in apart.glob("paigeant.db*"):
        file.unlink()
    for file in aside.iterdir():
        file.rename(apart / file.name)
    body = json.dumps({"number": 2})
    assert done(*args, "two", input=body)["output"] == 60_000
    assert done("runs", "show", "one")["output"] == 60_000
    worker.stop()
    assert "Traceback" not in worker.log()


class Told(logging.Handler):
    """Set once something is told: an event to an observer, or a line to the log."""

    def __init__(self, *words: str) -> None:
        super().__init__()
        self._words = words
        self._found = {word: asyncio.Event() for word in words}

    def observe(self, event: Event) -> None:
        """Look at an event."""
        self._look(event.name)

    def emit(self, record: logging.LogRecord) -> None:
        """Look at a line."""
        self._look(record.getMessage())

    def _look(self, text: str) -> None:
        for word in self._words:
            if word in text:
                self._found[word].set()

    async def of(self, word: str) -> None:
        """Wait until it is told."""
        async with asyncio.timeout(PATIENCE):
            await self._found[word].wait()


async def test_a_worker_that_ends_when_idle_waits_for_its_file() -> None:
    """While it can't tell whether work is left it goes on looking, and ends once it is told that none is."""
    activity = ActivityRegistry()

    @activity.execute()
    async def known() -> None: ...

    # A step in a topic of the worker that it can't do: there is work left until the run is cancelled.
    stuck = Workflow("stuck", [Step("unknown", topic="known")])
    told = Told("worker.started", "can't tell whether work is left")
    logging.getLogger("paigeant.worker").addHandler(told)
    try:
        async with Paigeant(Settings(), activities=activity, observers=[told]) as app:
            run = await app.dispatch(stuck, {}, workflow_id="new")
            working = asyncio.create_task(app.worker().run(until_idle=True))
            await told.of("worker.started")
            os.rename(DATABASE, "aside.db")
            await told.of("can't tell whether work is left")
            assert not working.done()
            os.rename("aside.db", DATABASE)
            await run.cancel()
            await working
    finally:
        logging.getLogger("paigeant.worker").removeHandler(told)
