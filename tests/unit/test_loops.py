"""Processes of Paigeant's own run in uvloop's event loop, and in asyncio's where there is no uvloop."""

from __future__ import annotations

import asyncio
import subprocess
import sys

import pytest

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
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout == "interrupted\n"


def test_the_command_line_does_not_load_it_to_say_what_it_can() -> None:
    """`paigeant --help` is to be quick."""
    code = "import sys\nfrom paigeant.cli import main\nsys.argv = ['paigeant', '--help']\n" + (
        "try:\n    main()\nexcept SystemExit:\n    print('uvloop' in sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.splitlines()[-1] == "False"
