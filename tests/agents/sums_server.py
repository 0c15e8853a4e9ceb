"""An MCP server over stdio with one tool. It notes each call in the file that it is started with.

It is a process of its own for each client, and ends with its client. Only what is slow about its start is done once, by
a `Nursery`: the program that clients start, which loads nothing, has that fork a server onto its own stdin and stdout.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import sys
from pathlib import Path

__all__ = ["Nursery"]


class Nursery:
    """A process with everything imported that forks servers, until the process that made it has closed it or is dead.

    Make it before anything is read from stdin: the servers use the same object.
    """

    def __init__(self, place: Path) -> None:
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(place))
        listener.listen()
        watched, self._alive = os.pipe()
        self._pid = os.fork()
        if self._pid == 0:
            os.close(self._alive)
            try:
                _fork_servers(listener, watched)
            finally:
                os._exit(0)
        os.close(watched)
        listener.close()

    def leave(self) -> None:
        """Let its life not depend on this process, which was forked and is another one than its maker."""
        os.close(self._alive)

    def close(self) -> None:
        """End it, and wait until it has ended."""
        os.close(self._alive)
        os.waitpid(self._pid, 0)


def _fork_servers(listener: socket.socket, watched: int) -> None:
    from mcp.server import MCPServer  # for the warmth

    server = MCPServer("sums")

    @server.tool()
    def add(first: int, second: int) -> int:
        """The sum of two numbers."""
        with open(calls, "a") as file:
            file.write(f"add {first} {second}\n")
        return first + second

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    both: list[socket.socket | int] = [listener, watched]
    while watched not in select.select(both, [], [])[0]:
        client, _ = listener.accept()
        if os.fork():
            client.close()
            continue
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.close(watched)
        told, fds, _, _ = socket.recv_fds(client, 4096, 3)
        calls = told.decode()
        for number, fd in enumerate(fds):
            os.dup2(fd, number)
            os.close(fd)
        try:
            server.run()
        finally:
            os._exit(0)


def main() -> None:
    """Have a server forked for whoever has started this, and last as long as it does."""
    calls, nursery = sys.argv[1:]
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(nursery)
        socket.send_fds(connection, [calls.encode()], [0, 1, 2])
        connection.recv(1)


if __name__ == "__main__":
    main()
