"""An MCP server, over stdio or HTTP, that ends in the middle of a call. It notes each call in the file it is given."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

from mcp.server import MCPServer

server = MCPServer("mortal")
calls = Path(sys.argv[1])


def note(call: str) -> None:
    """Note a call."""
    with calls.open("a") as file:
        file.write(f"{call}\n")


@server.tool()
def add(first: int, second: int) -> int:
    """The sum of two numbers."""
    note("add")
    return first + second


@server.tool()
def pay() -> str:
    """Ends the server the first time it is called, whichever process it is."""
    is_first = not calls.exists() or "pay" not in calls.read_text()
    note("pay")
    if is_first:
        os._exit(1)
    return "paid"


@server.tool()
async def dawdle() -> str:
    """Takes longer than anybody waits."""
    note("dawdle")
    await asyncio.sleep(3600)
    return "done"


if __name__ == "__main__":
    if len(sys.argv) == 3:
        server.run("streamable-http", host="127.0.0.1", port=int(sys.argv[2]))
    else:
        server.run()
