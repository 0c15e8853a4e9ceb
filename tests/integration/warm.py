"""The command line as processes that are forked from one in which everything is loaded.

A command loads for half a second to two before it does anything, and tests call hundreds. Each is a process of its own
as ever, with its own arguments, environment, working directory, input and output, and it ends as a process ends. What
a new interpreter does, and what is loaded when, is for the tests that start one (`processes.PAIGEANT`).

Run as a program this is the process that forks. It ends with its standard input. Run with arguments it is a command.
"""

from __future__ import annotations

import atexit
import json
import os
import socket
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

__all__ = ["program", "run"]

LOADED = [
    "alembic.command",
    "paigeant.agents.activity",
    "paigeant.agents.prompt",
    "paigeant.cli.__main__",
    "paigeant.cli.program",
    "paigeant.databases.postgres",
    "paigeant.databases.sqlite",
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
        cwd=Path(__file__).parents[2],
        text=True,
    )
    atexit.register(forks.communicate)
    assert forks.stdin is not None
    assert forks.stdout is not None
    forks.stdin.write(f"{place}\n")
    forks.stdin.flush()
    assert forks.stdout.readline() == "ready\n"
    return place


def run(
    *args: str, environment: dict[str, str] | None = None, input: str | None = None
) -> subprocess.CompletedProcess[str]:
    """What a command gave, once it has ended."""
    with (
        tempfile.TemporaryFile("w+") as given,
        tempfile.TemporaryFile("w+") as out,
        tempfile.TemporaryFile("w+") as err,
    ):
        given.write(input or "")
        given.seek(0)
        files = [file.fileno() for file in (given, out, err)]
        code = command(place_of_forks(), list(args), dict(environment or os.environ), files)
        out.seek(0)
        err.seek(0)
        return subprocess.CompletedProcess(["paigeant", *args], code, out.read(), err.read())


def program() -> str:
    """A program for shells that is `paigeant`."""
    return f'#!/bin/sh\nexec {sys.executable} -P -S {Path(__file__).resolve()} {place_of_forks()} "$@"\n'


def command(place: str, args: list[str], environment: dict[str, str], files: list[int]) -> int:
    """Have a command forked, with these files as stdin, stdout and stderr, and wait for its exit code."""
    told = json.dumps({"args": args, "environment": environment, "folder": str(Path.cwd())}).encode()
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(place)
        socket.send_fds(connection, [b"."], files)
        connection.sendall(told)
        connection.shutdown(socket.SHUT_WR)
        return int(connection.makefile().read())


def _fork_commands(place: str) -> None:
    """Fork a process for each connection, which waits for the command and tells its exit code."""
    import gc
    import importlib
    import select
    import signal
    import threading

    from paigeant import condition

    for name in LOADED:
        importlib.import_module(name)
    condition.check("true")
    gc.freeze()
    assert threading.active_count() == 1, "threads don't survive a fork"
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(place)
    listener.listen()
    print("ready", flush=True)  # noqa: T201  # that is how it answers
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    both: list[socket.socket | int] = [listener, 0]
    while 0 not in select.select(both, [], [])[0]:
        connection, _ = listener.accept()
        if os.fork():
            connection.close()
            continue
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        listener.close()
        _, files, _, _ = socket.recv_fds(connection, 1, 3)
        told = json.loads(connection.makefile().read())
        pid = os.fork()
        if not pid:
            connection.close()
            _become(told["args"], told["environment"], told["folder"], files)
            return
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        connection.sendall(str(code).encode())
        os._exit(0)


def _become(args: list[str], environment: dict[str, str], folder: str, files: list[int]) -> None:
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.argv = ["paigeant", *args]
    from paigeant.cli import main

    main()


if __name__ == "__main__":
    if len(sys.argv) > 1:
        sys.exit(command(sys.argv[1], sys.argv[2:], dict(os.environ), [0, 1, 2]))
    sys.path.pop(0)  # this checkout, which a command doesn't find either
    _fork_commands(input())
