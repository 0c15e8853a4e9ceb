"""An OpenTelemetry collector that forgets all it is sent, so that sending is measured and nothing behind it.

`python -m benchmarks.collector` prints its URL, and serves until it is stopped.
"""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
from collections.abc import Iterator

from benchmarks.bench import ROOT, environment

__all__ = ["collector"]

_ANSWER = b"HTTP/1.1 200 OK\r\nContent-Type: application/x-protobuf\r\nContent-Length: 0\r\n\r\n"
_MOST_AT_ONCE = 1 << 22
"""Bytes of a request that are read in one piece."""


@contextlib.contextmanager
def collector() -> Iterator[str]:
    """One in a process of its own; gives its URL."""
    command = [sys.executable, "-m", "benchmarks.collector"]
    with subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield process.stdout.readline().strip()
        finally:
            process.terminate()


async def _forget(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
        while True:
            head = (await reader.readuntil(b"\r\n\r\n")).lower()
            _, _, size = head.partition(b"content-length:")
            await reader.readexactly(int(size.split(b"\r\n", 1)[0]))
            writer.write(_ANSWER)
            await writer.drain()
    writer.close()


async def _serve() -> None:
    server = await asyncio.start_server(_forget, "127.0.0.1", 0, limit=_MOST_AT_ONCE)
    print(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(_serve())
