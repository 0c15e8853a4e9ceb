"""Runs one server, and sees to it that nothing of it is left when its time is over. A program of its own, stdlib only.

    guard.py '{"owner": 123, "command": [...], "environment": {...}, "folder": "...", "user": null, "log": "...",
               "remove": "...", "network": false, "at_end": [["ip", "link", "delete", "bridge"]]}'

It prints the process id of the server and then waits for the first of these:
- the server ends by itself: the guard ends with its exit code (128 + the number of the signal that ended it);
- SIGTERM to the guard: the server's whole process tree is killed with SIGKILL;
- the owner dies, however it does: the same, and the folder `remove` is deleted.
Whatever the server has left behind is killed before the guard ends. As a "subreaper" it is the parent of every process
whose own parent has died, so that no daemon and no orphan slips away from it. Should the guard itself be killed, the
kernel kills the server.

With `network` the command has a network namespace of its own, and all processes in that are killed as well, whoever
has started them. The commands `at_end` are run last; what they say is ignored.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import pwd
import select
import shutil
import signal
import subprocess
import sys
import time
from typing import Any

__all__ = ["descendants"]

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36

LINUX = sys.platform == "linux"
_libc = ctypes.CDLL(None) if LINUX else None


def is_stopped(pid: int) -> bool:
    """Whether none of a process's threads runs: all are stopped, or have ended."""
    with contextlib.suppress(OSError):  # it has ended meanwhile
        for thread in os.listdir(f"/proc/{pid}/task"):
            with (
                contextlib.suppress(OSError),
                open(f"/proc/{pid}/task/{thread}/stat", encoding="latin-1") as file,
            ):
                if file.read().rpartition(")")[2].split()[0] not in "TtZX":
                    return False
    return True


def descendants(pid: int) -> list[int]:
    """The processes under this one, those that have already ended left out. Elsewhere than on Linux: none is found."""
    children: dict[int, list[int]] = {}
    for name in os.listdir("/proc") if LINUX else ():
        if name.isdigit():
            with contextlib.suppress(OSError), open(f"/proc/{name}/stat", encoding="latin-1") as file:
                # the name of the program stands in brackets and may hold anything, brackets too
                state, parent = file.read().rpartition(")")[2].split()[:2]
                if state not in "ZX":
                    children.setdefault(int(parent), []).append(int(name))
    found: list[int] = []
    ahead = [pid]
    while ahead:
        below = children.get(ahead.pop(), [])
        found += below
        ahead += below
    return found


def _prctl(option: int, value: int) -> None:
    if _libc is not None:
        _libc.prctl(option, value, 0, 0, 0)


def _start(told: dict[str, Any]) -> subprocess.Popen[bytes]:
    account = pwd.getpwnam(told["user"]) if told["user"] else None
    with open(told["log"], "ab", buffering=0) as log:
        return subprocess.Popen(
            told["command"],
            env=told["environment"],
            cwd=told["folder"],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            user=account and account.pw_uid,
            group=account and account.pw_gid,
            extra_groups=[] if account else None,
            # after the change of user, for that would clear it
            preexec_fn=lambda: _prctl(PR_SET_PDEATHSIG, signal.SIGKILL),
        )


def _network(pid: int | str) -> str | None:
    """The network namespace of a process, if it can be known."""
    with contextlib.suppress(OSError):
        return os.readlink(f"/proc/{pid}/ns/net")
    return None


def _kill_network(network: str) -> None:
    """Kill what runs in this network namespace, until there is nothing: it may fork in the meantime."""
    while found := [int(pid) for pid in os.listdir("/proc") if pid.isdigit() and _network(pid) == network]:
        for pid in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(-1, os.WNOHANG)
        time.sleep(0.001)


def _kill_all(server: subprocess.Popen[bytes]) -> None:
    """Until there is none: what is forked in the meantime falls to us when its parent dies."""
    while True:
        if not LINUX:
            with contextlib.suppress(OSError):
                os.killpg(server.pid, signal.SIGKILL)
        for pid in descendants(os.getpid()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            while True:
                if not os.waitpid(-1, os.WNOHANG)[0]:
                    break
            time.sleep(0.001)
            continue
        return  # no child is left, dead or alive


def _owner(pid: int) -> int | None:
    """A descriptor that can be read once this process is dead; None where there is no such thing."""
    return os.pidfd_open(pid) if hasattr(os, "pidfd_open") else None


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def main() -> int:
    told: dict[str, Any] = json.loads(sys.argv[1])
    woken, wakes = os.pipe()
    os.set_blocking(wakes, False)
    signal.set_wakeup_fd(wakes)
    asked: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: asked.append(number))
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _prctl(PR_SET_CHILD_SUBREAPER, 1)
    try:
        owner = _owner(told["owner"])
    except ProcessLookupError:
        return 1
    server = _start(told)
    code: int | None = None
    orphaned = False
    try:
        sys.stdout.write(f"{server.pid}\n")
        sys.stdout.close()
        waiting = select.poll()
        waiting.register(woken, select.POLLIN)
        if owner is not None:
            waiting.register(owner, select.POLLIN)
        while code is None and not asked and not orphaned:
            ready = {fd for fd, _ in waiting.poll(None if owner is not None else 200)}
            if woken in ready:
                os.read(woken, 4096)
            orphaned = owner in ready if owner is not None else not _is_alive(told["owner"])
            code = server.poll()
    finally:
        # ours is no namespace to clear: the command may have failed before it had its own
        network = _network(server.pid) if told.get("network") else None
        if network is not None and network != _network("self"):
            _kill_network(network)
        _kill_all(server)
        for command in told.get("at_end", ()):
            subprocess.run(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
        if orphaned and told["remove"]:
            shutil.rmtree(told["remove"], ignore_errors=True)
    if code is None:
        return 0
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main())
