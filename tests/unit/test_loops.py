"""Processes of Paigeant's own run in uvloop's event loop, and in asyncio's where there is no uvloop."""

from __future__ import annotations

import asyncio
import gc
import subprocess
import sys

import pytest
from tests.patience import PATIENCE

from paigeant import loops


async def _loop() -> str:
    return type(asyncio.get_running_loop()).__module__


def test_uvloop_runs_what_it_is_given() -> None:
    """It is a dependency wherever the tests run."""
    assert loops.run(_loop()) == "uvloop"


def test_asyncio_does_where_uvloop_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on Windows and PyPy."""
    monkeypatch.setitem(sys.modules, "uvloop", None)
    assert loops.run(_loop()).startswith("asyncio")


def test_errors_and_interrupts_come_out() -> None:
    """As from `asyncio.run`: what it was cancels the task, and is raised."""

    async def fail() -> None:
        raise LookupError("gone")

    with pytest.raises(LookupError, match="gone"):
        loops.run(fail())
    code = "import asyncio, os, signal\nfrom paigeant import loops\n" + (
        "async def main():\n    os.kill(os.getpid(), signal.SIGINT)\n    await asyncio.sleep(60)\n"
        "try:\n    loops.run(main())\nexcept KeyboardInterrupt:\n    print('interrupted')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE, check=True
    )
    assert done.stdout == "interrupted\n"


@pytest.mark.parametrize("event_loop", ["uvloop", "asyncio"])
def test_a_task_that_exits_ends_only_itself(event_loop: loops.EventLoop) -> None:
    """Whoever awaits it hears of it; the loop goes on, with all other tasks. What `main` itself raises comes out."""

    async def leave(code: int) -> None:
        sys.exit(code)

    async def main() -> str:
        beside = asyncio.create_task(leave(3))
        with pytest.raises(SystemExit, match="4"):
            await asyncio.gather(leave(4))
        with pytest.raises(SystemExit, match="5"):
            async with asyncio.TaskGroup() as group:
                group.create_task(leave(5))
        await asyncio.wait({beside})
        return repr(beside.exception())

    assert loops.run(main(), event_loop) == "SystemExit(3)"
    with pytest.raises(SystemExit, match="6"):
        loops.run(leave(6), event_loop)


def test_what_comes_out_later_comes_out_once(caplog: pytest.LogCaptureFixture) -> None:
    """An error after a task has exited is raised, and nothing says that nobody has looked at it."""

    async def leave() -> None:
        sys.exit(3)

    async def main() -> None:
        await asyncio.wait({asyncio.create_task(leave())}, timeout=PATIENCE)
        raise LookupError("gone")

    with pytest.raises(LookupError, match="gone"):
        loops.run(main())
    gc.collect()
    assert [record.name for record in caplog.records if "gone" in str(record.exc_info)] == []


def test_the_command_line_does_not_load_it_to_say_what_it_can() -> None:
    """`paigeant --help` is to be quick."""
    code = "import sys\nfrom paigeant.cli import main\nsys.argv = ['paigeant', '--help']\n" + (
        "try:\n    main()\nexcept SystemExit:\n    print('uvloop' in sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE, check=True
    )
    assert done.stdout.splitlines()[-1] == "False"
