"""An MCP server over stdio with one tool. It notes each call in the file that it is started with."""

from __future__ import annotations

import os
import sys

from mcp.server import MCPServer

server = MCPServer("sums")


@server.tool()
def add(first: int, second: int) -> int:
    """The sum of two numbers."""
    with open(sys.argv[1], "a") as calls:
        calls.write(f"add {os.getppid()}\n")
    return first + second


if __name__ == "__main__":
    server.run()
