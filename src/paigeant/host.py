"""Who this process is, what is forked off it, and whether another process of this host is still there."""

from __future__ import annotations

import contextlib
import os
import platform
import sys
import traceback
import weakref
from collections.abc import Callable
from functools import cache
from pathlib import Path

__all__ = ["at_fork", "end_fork", "host_id", "is_gone", "is_holder_gone", "named_holder", "process_id"]


@cache
def host_id() -> str:
    """Names this host until its next boot. Processes that can't see each other (containers) get different names."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{platform.node()}/{boot}/{os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return platform.node()


def process_id() -> str:
    """Names this process on its host for ever: a process that gets the same number later has another name."""
    pid = os.getpid()
    return f"{pid}@{_started(pid) or ''}"


def is_gone(process: str) -> bool:
    """Whether the process of this host with the given `process_id` has ended for certain."""
    number, _, started = process.partition("@")
    if not number.isdigit():
        return False
    try:
        os.kill(int(number), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass  # it is there, and belongs to another user
    if not started:
        return False
    return _started(int(number)) != started


def named_holder(token: str) -> str:
    """Names, for all hosts, who holds a message: `token` is the holder's own name within this process."""
    return f"{host_id()}|{process_id()}|{token}"


def is_holder_gone(holder: str) -> bool:
    """Whether whoever has this `named_holder` was in a process of this host that has ended for certain."""
    parts = holder.split("|", 2)
    return len(parts) == 3 and parts[0] == host_id() and is_gone(parts[1])


def at_fork(method: Callable[[], None]) -> None:
    """Have a method called first of all in each process that is forked off this one, while its object is there.

    Such a process has none of the threads of this one, but all of its locks, also those that a thread holds just then.
    """
    _AT_FORK[weakref.WeakMethod(method, _forget)] = None


def end_fork(parent: int, error: BaseException | None = None) -> None:
    """End this process as Python ends a program that raised `error`, if it is another one than `parent`: its number.

    For where a function of others returns. What that has forked off must not go on with the connections, the locks and
    the event loop of its parent, as if it were that.
    """
    if os.getpid() == parent:
        return
    code = 0 if error is None else 1
    with contextlib.suppress(BaseException):  # whatever it meets, it has to end here
        if isinstance(error, SystemExit) and isinstance(error.code, int | None):
            code = (error.code or 0) & 0xFF
        elif isinstance(error, SystemExit):
            sys.stderr.write(f"{error.code}\n")
        elif error is not None:
            traceback.print_exception(error)
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


_AT_FORK: dict[weakref.WeakMethod[Callable[[], None]], None] = {}
"""In the order in which they came. Python itself forgets nothing that is registered, and objects come and go."""


def _forget(method: weakref.WeakMethod[Callable[[], None]]) -> None:
    _AT_FORK.pop(method, None)


def _in_child() -> None:
    for known in list(_AT_FORK):
        if (method := known()) is not None:
            method()


if hasattr(os, "register_at_fork"):  # there is no forking everywhere
    os.register_at_fork(after_in_child=_in_child)


def _started(pid: int) -> str | None:
    """When the kernel started `pid`, in ticks since boot; None where that isn't told, or for a process that is dead."""
    try:
        # The second field is the program's name in brackets and may hold anything, so count from its end.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    # A zombie has ended; only its parent hasn't asked yet.
    return None if fields[0] in "ZX" else fields[19]
