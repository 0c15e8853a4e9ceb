"""Processes that are forked from one in which everything is loaded: the command line, and other programs of tests.

A command loads for half a second to two before it does anything, and tests call hundreds. Each is a process of its own
as ever, with its own arguments, environment, working directory, input and output, and it ends as a process ends. What
a new interpreter does, and what is loaded when, is for the tests that start one (`processes.PAIGEANT`).

Run as a program this is the process that forks. It ends with its standard input. Run with arguments it is a command.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

__all__ = ["Forked", "program", "run"]

ROOT = Path(__file__).parents[2]

LOADED = [
    "alembic.command",
    "paigeant.agents.activity",
    "paigeant.agents.prompt",
    "paigeant.cli.__main__",
    "paigeant.databases.postgres",
    "paigeant.databases.sqlite",
    "paigeant.demo.play",
    "paigeant.demo.screen",
    "paigeant.stores.sql",
    "paigeant.transports.postgres",
    "paigeant.transports.rabbitmq",
    "paigeant.transports.redis",
    "paigeant.transports.routed",
    "paigeant.transports.sqlite",
    "paigeant.worker",
    "pydantic_ai.models.function",
]
"""What commands and examples load."""


@cache
def place_of_forks() -> str:
    """Where this process of pytest has its commands forked: a socket."""
    from tests.services.session import session_folder  # here, for a shell's program loads nothing of ours

    place = str(session_folder() / f"forks-{os.getpid()}")
    forks = subprocess.Popen(
        [sys.executable, "-m", "tests.integration.warm"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=ROOT,
        text=True,
    )
    atexit.register(_end, forks)
    assert forks.stdin is not None
    assert forks.stdout is not None
    forks.stdin.write(f"{place}\n")
    forks.stdin.flush()
    assert forks.stdout.readline() == "ready\n"
    return place


def _end(forks: subprocess.Popen[str]) -> None:
    # Not by its stdin alone: a test may have copied the descriptors of this process.
    forks.terminate()
    forks.communicate()


def run(
    *args: str,
    environment: Mapping[str, str] | None = None,
    folder: Path | None = None,
    input: str | None = None,
) -> subprocess.CompletedProcess[str]:
    """What a command gave, once it has ended. Without `folder` it is called in this process's own."""
    with (
        tempfile.TemporaryFile("w+") as given,
        tempfile.TemporaryFile("w+") as out,
        tempfile.TemporaryFile("w+") as err,
    ):
        given.write(input or "")
        given.seek(0)
        files = [file.fileno() for file in (given, out, err)]
        with _asked(place_of_forks(), args, environment or os.environ, files, folder=folder) as connection:
            code = _answers(connection)[1]
        out.seek(0)
        err.seek(0)
        return subprocess.CompletedProcess(["paigeant", *args], code, out.read(), err.read())


def program() -> str:
    """A program for shells that is `paigeant`."""
    return f'#!/bin/sh\nexec {sys.executable} -P -S {Path(__file__).resolve()} {place_of_forks()} "$@"\n'


class Forked:
    """A process in the background, with pipes to it: what Popen is for one with an interpreter of its own.

    It is a command; or `module`, one of the tests', whose `main` finds the arguments in sys.argv. `environment` is what
    it has besides that of this process, `folder` where it is if elsewhere, `stderr` a file, None for a pipe.
    """

    def __init__(
        self,
        *args: str,
        module: str | None = None,
        environment: Mapping[str, str] | None = None,
        folder: Path | None = None,
        stderr: int | None = None,
    ) -> None:
        given, stdin = os.pipe()
        stdout, out = os.pipe()
        theirs = [given, out]
        self.stdin, self.stdout, self.stderr = os.fdopen(stdin, "w"), os.fdopen(stdout), None
        if stderr is None:
            errors, stderr = os.pipe()
            theirs.append(stderr)
            self.stderr = os.fdopen(errors)
        told = {**os.environ, **(environment or {})}
        files = [given, out, stderr]
        self._connection = _asked(place_of_forks(), args, told, files, folder=folder, module=module)
        for file in theirs:
            os.close(file)
        self._told = self._connection.makefile()
        self.pid = int(self._told.readline())
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """Its exit code, negative for a signal, or None as long as it is there."""
        if self.returncode is None and select.select([self._connection], [], [], 0)[0]:
            self.wait()
        return self.returncode

    def wait(self) -> int:
        """Its exit code, once it has ended."""
        if self.returncode is None:
            self.returncode = int(self._told.readline())
            self._told.close()
            self._connection.close()
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send it a signal, should it still be there."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Kill it."""
        self.send_signal(signal.SIGKILL)

    def close(self) -> None:
        """Wait for its end, and close the pipes."""
        self.stdin.close()
        self.wait()
        self.stdout.close()
        if self.stderr is not None:
            self.stderr.close()


def _asked(
    place: str,
    args: Sequence[str],
    environment: Mapping[str, str],
    files: list[int],
    *,
    folder: Path | None = None,
    module: str | None = None,
) -> socket.socket:
    """Have a process forked, with these files as stdin, stdout and stderr. Its id and its exit code can be read."""
    where = str(folder or Path.cwd())
    told = {"args": args, "environment": dict(environment), "folder": where, "module": module}
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(place)
    socket.send_fds(connection, [b"."], files)
    connection.sendall(json.dumps(told).encode())
    connection.shutdown(socket.SHUT_WR)
    return connection


def _answers(connection: socket.socket) -> tuple[int, int]:
    """The id of the process, and its exit code once it has ended."""
    pid, code = connection.makefile().read().split()
    return int(pid), int(code)


def _fork_commands(place: str) -> None:
    """Fork a process for each connection, and tell its id and, when it has ended, its exit code."""
    import gc

    from typer.main import get_command

    from paigeant import condition
    from paigeant.cli.program import app

    for name in LOADED:
        importlib.import_module(name)
    list(get_command(app).commands.values())  # type: ignore[attr-defined]  # the program is a group
    condition.check("true")
    gc.freeze()
    assert threading.active_count() == 1, "threads don't survive a fork"
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(place)
    listener.listen()
    print("ready", flush=True)  # noqa: T201  # that is how it answers
    ended, tells = socket.socketpair()
    tells.setblocking(False)
    signal.set_wakeup_fd(tells.fileno())
    signal.signal(signal.SIGCHLD, lambda *_: None)
    running: dict[int, socket.socket] = {}
    watched: list[Any] = [listener, ended, 0]
    while 0 not in (ready := select.select(watched, [], [])[0]):
        if ended in ready:
            ended.recv(512)
            _tell_ended(running)
        if listener in ready:
            connection, _ = listener.accept()
            _, files, _, _ = socket.recv_fds(connection, 1, 3)
            told = json.loads(connection.makefile().read())
            pid = os.fork()
            if not pid:
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                signal.set_wakeup_fd(-1)
                for one in (listener, ended, tells, connection, *running.values()):
                    one.close()
                _become(files=files, **told)
            for file in files:
                os.close(file)
            running[pid] = connection
            _tell(connection, pid)


def _tell_ended(running: dict[int, socket.socket]) -> None:
    for pid in list(running):
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            with running.pop(pid) as connection:
                _tell(connection, os.waitstatus_to_exitcode(status))


def _tell(connection: socket.socket, number: int) -> None:
    with contextlib.suppress(BrokenPipeError):  # whoever asked is gone
        connection.sendall(f"{number}\n".encode())


def _become(
    args: list[str], environment: dict[str, str], folder: str, module: str | None, files: list[int]
) -> NoReturn:
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.argv = [module or "paigeant", *args]
    if module is not None:
        sys.path.insert(0, str(ROOT))
    _end_after(importlib.import_module(module or "paigeant.cli").main)


def _end_after(main: Callable[[], None]) -> NoReturn:
    """Do it, and end as an interpreter does, but for freeing one by one all objects there are: that takes 70 ms."""
    code = 0
    try:
        main()
    except SystemExit as exc:
        code = exc.code if isinstance(exc.code, int) else int(exc.code is not None)
        if isinstance(exc.code, str):
            sys.stderr.write(f"{exc.code}\n")
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]  # waits for threads
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        with _asked(sys.argv[1], sys.argv[2:], os.environ, [0, 1, 2]) as asked:
            sys.exit(_answers(asked)[1])
    sys.path.pop(0)  # this checkout, which a command doesn't find either
    _fork_commands(input())
