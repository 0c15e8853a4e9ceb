"""A process that dies with its owner, and all its children with it: the near end of guard.py."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.patience import PATIENCE
from tests.services import guard

__all__ = ["Guarded", "NotStarted"]


class NotStarted(Exception):
    """A process could not be started; the message says why."""


class Guarded:
    """A process under a guard, running as soon as this is made; its output goes to the file `log`.

    `owner` is the process with which it has to die, by default this one; the folder `remove` is deleted then. For
    `user`, `network` and `at_end` see guard.py. Raises NotStarted.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        folder: Path,
        log: Path,
        environment: Mapping[str, str],
        user: str | None = None,
        owner: int | None = None,
        remove: Path | None = None,
        network: bool = False,
        at_end: Sequence[Sequence[str]] = (),
    ) -> None:
        told = {
            "command": list(command),
            "folder": str(folder),
            "log": str(log),
            "environment": dict(environment),
            "user": user,
            "owner": owner or os.getpid(),
            "remove": str(remove or ""),
            "network": network,
            "at_end": [list(each) for each in at_end],
        }
        self._guard = subprocess.Popen(
            # -I -S: it needs nothing but the standard library, and so is there within 20 ms
            [sys.executable, "-I", "-S", guard.__file__, json.dumps(told)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C in a terminal is for pytest, which then tells us
            text=True,
        )
        assert self._guard.stdout is not None
        assert self._guard.stderr is not None
        with self._guard.stdout as said, self._guard.stderr as errors:
            line = said.readline()
            if not line:
                trouble = errors.read()
                self.kill()
                raise NotStarted(f"{command[0]}: {trouble}")
        self.pid = int(line)
        """The first process."""

    @property
    def guard_pid(self) -> int:
        """The process that watches over it, and over all that it starts."""
        return self._guard.pid

    @property
    def is_running(self) -> bool:
        """Whether its processes are there, frozen ones too."""
        return self._guard.poll() is None

    def kill(self) -> None:
        """SIGKILL to all of its processes; when this returns they are dead."""
        self._guard.terminate()
        self._guard.wait()

    def wait(self, timeout: float) -> bool:
        """Whether it has ended by itself within so many seconds."""
        try:
            self._guard.wait(timeout)
        except subprocess.TimeoutExpired:
            return False
        return True

    def send_signal(self, number: signal.Signals) -> None:
        """Send a signal to the first process, should it still be there."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def send_signal_to_all(self, number: signal.Signals) -> None:
        """Send a signal to all of its processes."""
        for pid in guard.descendants(self.guard_pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def freeze(self) -> None:
        """SIGSTOP to all of its processes; when this returns none of them does anything any more."""
        until = time.monotonic() + PATIENCE
        self.send_signal_to_all(signal.SIGSTOP)
        while not all(
            map(guard.is_stopped, guard.descendants(self.guard_pid))
        ):  # each thread stops when it next runs
            if time.monotonic() > until:
                raise TimeoutError(f"process {self.pid} has not stopped within {PATIENCE:.0f} s")
            time.sleep(0.001)
