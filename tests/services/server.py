"""What all private servers have in common: a folder, a port, and how they start, stop, die and come back."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import socket
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import ClassVar, Self

from tests.patience import PATIENCE
from tests.services import guard
from tests.services.guarded import Guarded, NotStarted

__all__ = ["Server", "ServerFailed", "free_port", "temporary_folder", "wait_for_end"]

START_LIMIT = 2 * PATIENCE
"""Seconds until a server that isn't ready has failed: many times what one needs, for machines that are busy."""

STOP_LIMIT = PATIENCE

# Below the ports that systems give to outgoing connections (Linux: from 32768): one of those could take the port of a
# server while that is stopped.
PORTS = range(12_000, 32_000)


class ServerFailed(Exception):
    """A server didn't start or stop; the end of its log is in the message."""


def free_port(host: str = "127.0.0.1") -> int:
    """A port on which nobody listens now, and which no outgoing connection will be given."""
    for _ in range(1000):
        port = random.choice(PORTS)
        with contextlib.suppress(OSError), socket.socket() as one:
            one.setsockopt(
                socket.SOL_SOCKET, socket.SO_REUSEADDR, 1
            )  # as the servers do: bygones don't count
            one.bind((host, port))
            return port
    raise ServerFailed(f"found no free port on {host} between {PORTS.start} and {PORTS.stop}")


def temporary_folder(name: str, *, inside: Path | None = None) -> Path:
    """A new folder that another user may enter: what pytest's `tmp_path` forbids, and Postgres under root needs."""
    folder = Path(tempfile.mkdtemp(prefix=f"paigeant-{name}-", dir=inside))
    folder.chmod(0o755)
    return folder


def wait_for_end(pid: int, *, seconds: float = STOP_LIMIT) -> bool:
    """Whether the process, any process, has ended within so many seconds."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        try:
            os.kill(pid, 0)
            state = Path(f"/proc/{pid}/stat").read_text(encoding="latin-1").rpartition(")")[2].split()[0]
        except ProcessLookupError:
            return True
        except FileNotFoundError:
            state = "?"
            if guard.LINUX:
                return True
        if state in "ZX":
            return True
        time.sleep(0.005)
    return False


class Server(ABC):
    """A server of one's own: in a temporary folder, on a free port that it keeps, from the installed program.

        with RedisServer() as server:          # started, and ready to be used
            ...                                # server.url, server.host, server.port
            server.kill()                      # SIGKILL of all its processes, and not before they are dead it returns
            server.start()                     # ready again, with the same data on the same port
            server.restart()                   # an orderly stop, then a start
            server.freeze(); server.thaw()     # SIGSTOP and SIGCONT to all its processes

    Leaving the block kills it and deletes the folder. All methods block; in a coroutine that must go on meanwhile say
    `await asyncio.to_thread(server.restart)`. Should the process that made it die, even by SIGKILL, then the server is
    killed at once.

    `host` is the address on which it listens and that stands in its url: that of a bridge, for clients in network
    namespaces (tests/services/hosts.py). `lines` are added to its configuration file, each overriding what stands
    before it. `owner` is the process with which it has to die; by default this one.
    """

    name: ClassVar[str]

    def __init__(
        self,
        *,
        host: str = "127.0.0.1",
        port: int | None = None,
        lines: Sequence[str] = (),
        folder: Path | None = None,
        owner: int | None = None,
    ) -> None:
        self.host = host
        self.port = port or free_port(host)
        self.lines = tuple(lines)
        self.folder = folder or temporary_folder(self.name)
        self.log = self.folder / "server.log"
        self.owner = owner or os.getpid()
        self.remove = self.folder
        """What to delete when the owner dies."""
        self._process: Guarded | None = None
        self._prepared = False

    # --- what a kind of server says of itself ---

    @property
    @abstractmethod
    def url(self) -> str:
        """Where it is, as the settings of Paigeant want it."""

    @abstractmethod
    def _prepare(self) -> None:
        """Make what it needs in its folder before its first start."""

    @abstractmethod
    def _command(self) -> list[str]: ...

    @abstractmethod
    def _is_ready(self) -> bool:
        """Whether a client could use it now. An OSError says no, too."""

    def _environment(self) -> Mapping[str, str]:
        return {"PATH": os.environ.get("PATH", os.defpath), "HOME": str(self.folder), "LANG": "C.UTF-8"}

    def _user(self) -> str | None:
        """Who runs it, where that isn't us."""
        return None

    def _ask_to_stop(self) -> None:
        self.send_signal(signal.SIGTERM)

    # --- what all do alike ---

    @property
    def is_running(self) -> bool:
        """Whether its processes are there, frozen ones too."""
        return self._process is not None and self._process.is_running

    @property
    def pid(self) -> int | None:
        """The server's first process, while it runs."""
        return self._process.pid if self._process else None

    @property
    def guard_pid(self) -> int | None:
        """The process that watches over it, while it runs: the parent of all of its processes."""
        return self._process.guard_pid if self._process else None

    def start(self) -> None:
        """Start it and return when it is ready. Raises ServerFailed with the end of its log when it doesn't get so."""
        if self.is_running:
            raise ServerFailed(f"{self.name} on port {self.port} is running already")
        if not self._prepared:
            self._prepare()
            self._prepared = True
        self._process = self._launch()
        until = time.monotonic() + START_LIMIT
        while not self._answers():
            if not self.is_running:
                self._process = None
                raise ServerFailed(f"{self.name} has ended instead of starting; it said:\n{self._said()}")
            if time.monotonic() > until:
                self.kill()
                raise ServerFailed(
                    f"{self.name} is not ready after {START_LIMIT:.0f} s; it said:\n{self._said()}"
                )
            time.sleep(0.01)

    def stop(self) -> None:
        """Stop it in an orderly way; nothing happens when it doesn't run. Raises ServerFailed when it goes on."""
        if self.is_running:
            self._ask_to_stop()
            self._wait_for_stop()

    def kill(self) -> None:
        """SIGKILL to all of its processes; when this returns they are dead. Nothing happens when it doesn't run."""
        if self._process is not None:
            self._process.kill()
            self._process = None

    def restart(self) -> None:
        """Stop it in an orderly way and start it again."""
        self.stop()
        self.start()

    def freeze(self) -> None:
        """Stop the clock for all of its processes (SIGSTOP): connections stay open, and nothing answers any more."""
        if self._process is not None:
            self._process.freeze()

    def thaw(self) -> None:
        """Let all of its processes go on."""
        if self._process is not None:
            self._process.send_signal_to_all(signal.SIGCONT)

    def send_signal(self, number: signal.Signals) -> None:
        """Send a signal to the server's first process."""
        if self._process is not None:
            self._process.send_signal(number)

    def close(self) -> None:
        """Kill it and delete its folder."""
        self.kill()
        shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self) -> Self:
        try:
            if not self.is_running:
                self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({self.host}:{self.port}, {'running' if self.is_running else 'stopped'})"
        )

    def _launch(self) -> Guarded:
        try:
            return Guarded(
                self._command(),
                folder=self.folder,
                log=self.log,
                environment=self._environment(),
                user=self._user(),
                owner=self.owner,
                remove=self.remove,
            )
        except NotStarted as error:
            raise ServerFailed(f"{self.name} could not be started: {error}") from error

    def _answers(self) -> bool:
        try:
            return self._is_ready()
        except OSError:
            return False

    def _wait_for_stop(self) -> None:
        assert self._process is not None
        if not self._process.wait(STOP_LIMIT):
            said = self._said()
            self.kill()
            raise ServerFailed(f"{self.name} did not stop within {STOP_LIMIT:.0f} s; it said:\n{said}")
        self._process = None

    def _said(self, lines: int = 50) -> str:
        """The end of its log."""
        text = self.log.read_text(errors="replace") if self.log.exists() else ""
        return "\n".join(text.splitlines()[-lines:]) or "nothing"
