"""A bell between the processes that share one database file: a commit of one wakes the others at once.

Each process listens on a datagram socket in a folder that belongs to the file. A lost ring only costs time, since
whoever waits for one also looks by itself now and then.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import secrets
import socket
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

__all__ = ["Bell"]

_ANYTHING = "*"
_LONGEST_BYTES = 1024


class Bell:
    """Rings for every other process that has the same file open. `heard` gets what the others rang for.

    `works` is False where the platform has no such sockets, or no place for them; then nobody hears anything.
    """

    def __init__(self, file: Path, heard: Callable[[frozenset[str]], None]) -> None:
        self._heard = heard
        self._file = file
        self._folder = self._path = Path()
        self._socket: socket.socket | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._others: list[str] = []
        self._seen = -1.0

    @property
    def works(self) -> bool:
        """Whether rings arrive."""
        return self._socket is not None

    def open(self) -> None:
        """Listen from now on, in the running event loop."""
        if not hasattr(socket, "AF_UNIX"):
            return
        with contextlib.ExitStack() as undo:
            try:
                self._make_folder()
                listener = undo.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
                listener.setblocking(False)
                listener.bind(str(self._path))
            except OSError:
                return  # no place for sockets: whoever waits looks by itself, more often
            undo.pop_all()
        self._socket = listener
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(listener, self._receive)

    def close(self) -> None:
        """Listen no more."""
        if self._socket is None or self._loop is None:
            return
        self._loop.remove_reader(self._socket)
        self._socket.close()
        self._socket = None
        with contextlib.suppress(OSError):
            self._path.unlink()
            self._folder.rmdir()  # the last one to leave; it stays while there are others

    def ring(self, names: Iterable[str]) -> None:
        """Tell the others that something of each of `names` has happened. Safe from any thread; never blocks."""
        sender = self._socket
        if sender is None:
            return
        body = "\n".join(names).encode()
        if len(body) > _LONGEST_BYTES:
            body = _ANYTHING.encode()
        for path in self._listeners():
            try:
                sender.sendto(body, path)
            except (ConnectionRefusedError, FileNotFoundError):
                with contextlib.suppress(OSError):
                    os.unlink(path)  # its process was killed
            except OSError:
                pass  # its buffer is full of rings that it has yet to hear

    def _make_folder(self) -> None:
        user = os.getuid()
        # A socket's path may have at most some 100 characters, so the folder can't lie beside the file.
        name = hashlib.sha256(os.fsencode(self._file.resolve())).hexdigest()[:16]
        own = Path(tempfile.gettempdir()) / f"paigeant-{user}"
        own.mkdir(mode=0o700, exist_ok=True)
        if own.lstat().st_uid != user:
            raise PermissionError(f"{own} is another user's, who could hear and ring")
        self._folder = own / name
        self._folder.mkdir(mode=0o700, exist_ok=True)
        self._path = self._folder / f"{os.getpid()}-{secrets.token_hex(3)}"

    def _listeners(self) -> list[str]:
        try:
            changed = self._folder.stat().st_mtime_ns
            if changed != self._seen:
                own = str(self._path)
                paths = (entry.path for entry in os.scandir(self._folder))
                self._others = [path for path in paths if path != own]
                self._seen = changed
        except OSError:
            return []
        return self._others

    def _receive(self) -> None:
        names: set[str] = set()
        while self._socket is not None:
            try:
                names.update(self._socket.recv(4096).decode(errors="replace").split("\n"))
            except OSError:
                break
        if names:
            self._heard(frozenset(names))
