"""The bell between processes that share a file."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest_asyncio
from tests.patience import PATIENCE

from paigeant.wakeup import Bell

RINGER = """
import asyncio, sys
from pathlib import Path
from paigeant.wakeup import Bell

async def main():
    bell = Bell(Path(sys.argv[1]), lambda names: None)
    bell.open()
    print("open", flush=True)
    if sys.argv[2:]:
        bell.ring(sys.argv[2:])
        bell.close()
    else:
        await asyncio.Event().wait()

asyncio.run(main())
"""


class Ear:
    """Hears a bell, and can wait for what it rings for."""

    def __init__(self, file: Path) -> None:
        self.names: asyncio.Queue[frozenset[str]] = asyncio.Queue()
        self.bell = Bell(file, self.names.put_nowait)
        self.bell.open()

    async def heard(self) -> frozenset[str]:
        return await asyncio.wait_for(self.names.get(), PATIENCE)


@pytest_asyncio.fixture
async def ear(tmp_path: Path) -> AsyncIterator[Ear]:
    """One that listens for a file of this test."""
    ear = Ear(tmp_path / "x.db")
    yield ear
    ear.bell.close()


async def ringer(file: Path, *names: str) -> asyncio.subprocess.Process:
    """Another process with the bell of `file`, which rings for `names`, or only listens."""
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-c", RINGER, str(file), *names, stdout=asyncio.subprocess.PIPE
    )
    assert child.stdout is not None
    assert await child.stdout.readline() == b"open\n"
    return child


async def test_a_ring_reaches_another_process(ear: Ear, tmp_path: Path) -> None:
    """What one process rings for another hears."""
    child = await ringer(tmp_path / "x.db", "topic a", "ended completed r")
    assert await ear.heard() == {"topic a", "ended completed r"}
    assert await child.wait() == 0


async def test_a_ring_reaches_all_others_and_not_oneself(ear: Ear, tmp_path: Path) -> None:
    """Everybody with the same file hears it; the ringer knows already."""
    first, second = Ear(tmp_path / "x.db"), Ear(tmp_path / "x.db")
    ear.bell.ring(["a"])
    assert await first.heard() == await second.heard() == {"a"}
    first.bell.ring(["b"])
    assert await ear.heard() == await second.heard() == {"b"}
    assert first.names.empty()
    first.bell.close()
    second.bell.close()


async def test_another_file_has_another_bell(ear: Ear, tmp_path: Path) -> None:
    """A ring for one file isn't heard at another."""
    other, same = Ear(tmp_path / "y.db"), Ear(tmp_path / "x.db")
    other.bell.ring(["wrong"])
    same.bell.ring(["right"])
    assert await ear.heard() == {"right"}
    other.bell.close()
    same.bell.close()


async def test_the_socket_of_a_killed_process_is_removed(ear: Ear, tmp_path: Path) -> None:
    """What a killed process left behind is cleared away by the next ring, and hinders nobody."""
    child = await ringer(tmp_path / "x.db")
    folder = ear.bell._folder
    assert len(list(folder.iterdir())) == 2
    os.kill(child.pid, signal.SIGKILL)
    await child.wait()
    ear.bell.ring(["a"])
    assert [path.name for path in folder.iterdir()] == [ear.bell._path.name]


async def test_a_long_ring_becomes_a_ring_for_anything(ear: Ear, tmp_path: Path) -> None:
    """Names that don't fit are replaced by one that has everybody look."""
    other = Ear(tmp_path / "x.db")
    other.bell.ring([f"topic {n}" for n in range(500)])
    assert await ear.heard() == {"*"}
    other.bell.close()


async def test_a_ring_never_blocks(ear: Ear, tmp_path: Path) -> None:
    """Rings that a process doesn't listen to are dropped once its buffer is full; it still hears the first ones."""
    other = Ear(tmp_path / "x.db")
    for n in range(5000):
        other.bell.ring([f"n{n}"])
    assert "n0" in await ear.heard()
    other.bell.close()


async def test_closing_leaves_nothing_behind(tmp_path: Path) -> None:
    """A closed bell is silent; closing and ringing then are harmless; the folder goes with the last one."""
    ear = Ear(tmp_path / "x.db")
    assert ear.bell.works
    ear.bell.close()
    ear.bell.close()
    ear.bell.ring(["a"])
    assert not ear.bell.works
    assert not ear.bell._folder.exists()


async def test_without_a_place_for_sockets_it_says_so(tmp_path: Path, monkeypatch) -> None:
    """Where sockets can't be made nobody hears anything, and whoever waits knows that."""
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path / "nowhere"))
    bell = Bell(tmp_path / "x.db", lambda names: None)
    bell.open()
    assert not bell.works
    bell.ring(["a"])
    bell.close()


async def test_a_folder_of_another_user_is_not_listened_in(tmp_path: Path, monkeypatch) -> None:
    """Who made it in the common folder of all users could hear which runs end, and say so of others."""
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    (tmp_path / f"paigeant-{os.getuid()}").mkdir()
    os.chown(tmp_path / f"paigeant-{os.getuid()}", 65534, 65534)  # needs root, as the tests of hosts do
    bell = Bell(tmp_path / "x.db", lambda names: None)
    bell.open()
    assert not bell.works


async def test_a_path_too_long_for_sockets_leaves_nothing_open(tmp_path: Path, monkeypatch) -> None:
    """As under a TMPDIR deep in other folders; what is left open is warned of, which is an error here."""
    deep = tmp_path / ("x" * 100)
    deep.mkdir()
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(deep))
    bell = Bell(tmp_path / "x.db", lambda names: None)
    bell.open()
    gc.collect()
    assert not bell.works


async def test_without_unix_sockets_it_says_so(tmp_path: Path, monkeypatch) -> None:
    """The same on a platform that has none."""
    monkeypatch.delattr(socket, "AF_UNIX")
    bell = Bell(tmp_path / "x.db", lambda names: None)
    bell.open()
    assert not bell.works
