"""Private Redis servers."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from pathlib import Path

from tests.services.programs import program
from tests.services.server import Server

__all__ = ["RedisServer"]


class RedisServer(Server):
    """A Redis; `lines` are lines of redis.conf: `["maxmemory 20mb", "maxmemory-policy noeviction"]`.

    It keeps its data over a stop, and over a kill all that it has acknowledged (an append-only file, written before
    the answer, synced each second). With `appendonly=False` it forgets everything, as Debian's own does when killed.
    """

    name = "redis"

    def __init__(
        self,
        *,
        host: str = "127.0.0.1",
        port: int | None = None,
        appendonly: bool = True,
        lines: Sequence[str] = (),
        folder: Path | None = None,
        owner: int | None = None,
    ) -> None:
        super().__init__(host=host, port=port, lines=lines, folder=folder, owner=owner)
        self.appendonly = appendonly

    @property
    def url(self) -> str:
        return f"redis://{self.host}:{self.port}/0"

    def _prepare(self) -> None:
        lines = [
            f"bind {self.host}",
            f"port {self.port}",
            "protected-mode no",
            f"dir {self.folder}",
            'save ""',
            f"appendonly {'yes' if self.appendonly else 'no'}",
            *self.lines,
        ]
        (self.folder / "redis.conf").write_text("\n".join(lines) + "\n")

    def _command(self) -> list[str]:
        return [str(program("redis-server")), str(self.folder / "redis.conf")]

    def _is_ready(self) -> bool:
        with socket.create_connection((self.host, self.port), timeout=30.0) as one:
            one.sendall(b"PING\r\n")  # while it loads its file the answer is -LOADING
            return one.recv(100).startswith((b"+PONG", b"-NOAUTH"))
