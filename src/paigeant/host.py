"""Who this process is, and whether another process of this host is still there."""

from __future__ import annotations

import os
import platform
from functools import cache
from pathlib import Path

__all__ = ["host_id", "is_gone", "process_id"]


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


def _started(pid: int) -> str | None:
    """When the kernel started `pid`, in ticks since boot; None where that isn't told, or for a process that is dead."""
    try:
        # The second field is the program's name in brackets and may hold anything, so count from its end.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    # A zombie has ended; only its parent hasn't asked yet.
    return None if fields[0] in "ZX" else fields[19]
