"""A warmed process that forks others: a new worker is at work within milliseconds, with everything imported.

Run as a program it does what lines of JSON tell it: {"start": role, "folder": ..., "settings": {...}, "options":
{...}} forks one and answers with its process id; {"ended": true} answers with those that have ended since and how. It
opens no database, loop or thread itself, for none of these survives a fork.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.integration.warm import Forked
from tests.kill.sql import rows

__all__ = ["ASKING", "Nursery"]

ROOT = Path(__file__).parents[2]

ASKING = 0.05
"""Seconds between two questions to a database: each makes a connection, which takes more than all else in the test."""

ADAPTERS = [
    "paigeant.databases.postgres",
    "paigeant.databases.sqlite",
    "paigeant.stores.sql",
    "paigeant.transports.postgres",
    "paigeant.transports.rabbitmq",
    "paigeant.transports.redis",
    "paigeant.transports.routed",
    "paigeant.transports.sqlite",
]


class Nursery:
    """The processes of a test. Leaving the block kills those that are left.

    `settings` are what is told to all of them beside short times (`roles.TIMES`); without urls they share a file of
    SQLite in `folder`. `inside` stands before the command, for processes on another host. `roles` is the module that
    knows the roles.
    """

    def __init__(
        self,
        folder: Path,
        *,
        inside: Sequence[str] = (),
        roles: str = "tests.kill.roles",
        **settings: Any,
    ) -> None:
        self.folder = folder
        url = f"sqlite:///{folder / 'runs.db'}"
        self.settings = {"transport_url": url, "store_url": url, **settings}
        self.alive: dict[int, str] = {}
        self.ended: dict[int, int] = {}
        self._progress = (-1, 0.0)
        self._process: Forked | subprocess.Popen[str]
        if inside:
            self._process = subprocess.Popen(
                [*inside, sys.executable, "-m", "tests.kill.nursery", roles],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                cwd=ROOT,
                text=True,
            )
        else:
            self._process = Forked(roles, module="tests.kill.nursery", stderr=2)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()

    def _ask(self, **question: Any) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    @property
    def store(self) -> str:
        """The url of the store."""
        return str(self.settings["store_url"])

    def start(self, role: str, *, settings: dict[str, Any] | None = None, **options: Any) -> int:
        """A new process of this role, with `settings` of its own beside those of all; its id."""
        told = {**self.settings, **(settings or {})}
        pid: int = self._ask(start=role, folder=str(self.folder), settings=told, options=options)
        self.alive[pid] = role
        return pid

    def reap(self) -> dict[int, int]:
        """The processes that have ended since the last time, with their exit codes, negative for a signal."""
        ended = {int(pid): code for pid, code in self._ask(ended=True).items()}
        self.ended.update(ended)
        for pid in ended:
            self.alive.pop(pid)
        return ended

    def send(self, pid: int, number: signal.Signals) -> None:
        """Send a signal to one of the processes, should it still be there."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)

    def kill(self, pid: int) -> bool:
        """Kill it, and wait until it is dead. False when it had ended by itself."""
        self.send(pid, signal.SIGKILL)
        self.until(lambda: pid in self.ended)
        return self.ended[pid] == -signal.SIGKILL

    def stop(self, number: signal.Signals) -> None:
        """Send all of them the signal, and wait until they have ended."""
        for pid in self.alive:
            self.send(pid, number)
        self.until(lambda: not self.alive)

    def stalls(self, progress: int, *, seconds: float) -> None:
        """Raise AssertionError when `progress` has been the same for so many seconds."""
        if progress != self._progress[0]:
            self._progress = (progress, time.monotonic())
        elif time.monotonic() - self._progress[1] > seconds:
            self.ask_for_stacks()
            raise AssertionError(f"nothing has happened for {seconds:.0f} s; where all are: {self.stacks}")

    def until(self, done: Callable[[], object], *, seconds: float = 600.0, pause: float = 0.005) -> None:
        """Look again and again until it is done. Raises AssertionError after so many seconds.

        `pause`: seconds between two looks.
        """
        until = time.monotonic() + seconds
        while not done():
            if time.monotonic() > until:
                self.ask_for_stacks()
                raise AssertionError(f"not done after {seconds:.0f} s; where all are: {self.stacks}")
            self.reap()
            time.sleep(pause)

    def until_ended(self) -> None:
        """Wait until there are runs, and all of them have ended."""
        query = "SELECT count(*), count(completed_at) FROM workflow_runs"

        def done() -> bool:
            [(runs, ended)] = rows(self.store, query)
            return 0 < runs == ended

        self.until(done, pause=ASKING)

    def ask_for_stacks(self) -> None:
        """Have all processes write into `stacks` what their threads and tasks are at."""
        for number in (signal.SIGUSR1, signal.SIGUSR2):
            for pid in self.alive:
                self.send(pid, number)
            time.sleep(0.5)

    @property
    def errors(self) -> str:
        """What processes that were ended by an error have said."""
        return self._said("errors")

    @property
    def stacks(self) -> str:
        """What all processes have said, and where they are."""
        return "\n".join(self._said(file.name) for file in sorted(self.folder.glob("stacks.*"))) + self._said(
            "log"
        )

    def _said(self, name: str) -> str:
        file = self.folder / name
        return f"\n{name}: {file.read_text()[-6000:]}" if file.exists() else ""


def _fork(role: str, folder: str, settings: dict[str, Any], options: dict[str, Any]) -> int:
    pid = os.fork()
    if pid:
        return pid
    roles = importlib.import_module(sys.argv[1])
    code = 1
    try:
        nothing = os.open(os.devnull, os.O_RDWR)
        os.dup2(nothing, 0)
        os.dup2(nothing, 1)
        roles.play(role, Path(folder), settings, options)
        code = 0
    except BaseException:
        with (Path(folder) / "errors").open("a") as file:
            file.write(f"{role}: {traceback.format_exc()}\n")
    os._exit(code)


def _ended() -> dict[int, int]:
    ended: dict[int, int] = {}
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return ended
        if not pid:
            return ended
        ended[pid] = os.waitstatus_to_exitcode(status)


def main() -> None:
    warnings.simplefilter("ignore")
    for name in ADAPTERS:  # for the warmth
        importlib.import_module(name)
    roles = importlib.import_module(sys.argv[1])
    if hasattr(roles, "warm_up"):
        roles.warm_up()
    gc.freeze()
    assert threading.active_count() == 1, "threads don't survive a fork"
    alive: set[int] = set()
    for line in sys.stdin:
        question = json.loads(line)
        if "start" in question:
            answer: Any = _fork(
                question["start"], question["folder"], question["settings"], question["options"]
            )
            alive.add(answer)
        else:
            answer = _ended()
            alive -= set(answer)
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()
    for pid in alive:  # the test is gone
        os.kill(pid, signal.SIGKILL)


if __name__ == "__main__":
    main()
