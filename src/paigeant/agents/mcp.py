"""MCP servers that are lost in the middle: the call has failed, and the next one has a connection of its own.

The library tells the model of a lost connection, as if that were the tool's answer, and keeps the dead session for as
long as any run in the process holds it: a worker that always has one would never reach the server again. In a step
the outcome of such a call is unknown, so it isn't recorded: the attempt fails, and the next one connects anew. So it
is with an answer that didn't come in time, where the call may be made at most once.
"""

from __future__ import annotations

import functools
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any

from pydantic_ai import RunContext
from pydantic_ai.durable_exec._toolset import DurableMCPToolset
from pydantic_ai.tools import AgentDepsT
from pydantic_ai.toolsets import AbstractToolset

from paigeant.place import current_place

if TYPE_CHECKING:  # an extra, which is there when there is a toolset of it
    from pydantic_ai.mcp import MCPToolset

    _Base = MCPToolset[Any]
else:
    _Base = object

__all__ = ["Reconnecting"]

_CONNECTION_CLOSED, _REQUEST_TIMEOUT, _INVALID_REQUEST = -32000, -32001, -32600
_SESSION_GONE = "Session terminated"
"""What the client says where a server, begun anew, doesn't know its session: by HTTP 404."""


class Reconnecting(DurableMCPToolset[AgentDepsT]):
    """The toolset of an MCP server in steps; each run of an agent in one gets one that connects anew."""

    async def for_run(self, ctx: RunContext[AgentDepsT]) -> AbstractToolset[AgentDepsT]:
        found = await super().for_run(ctx)
        if isinstance(found, Reconnecting) and found._run_held is not None:  # it runs in a step
            found.wrapped = found._run_held.toolset = _again(found._run_held.toolset)
        return found


def _again(toolset: AbstractToolset[Any]) -> AbstractToolset[Any]:
    """The same MCP toolset, with the same state: there is one connection for all who use it."""
    if isinstance(toolset, _Session):
        return toolset
    same: AbstractToolset[Any] = object.__new__(_kind(type(toolset)))
    same.__dict__ = vars(toolset)
    return same


@functools.cache
def _kind(kind: type[Any]) -> type[Any]:
    return type(kind.__name__, (_Session, kind), {"__module__": kind.__module__})


class _Session(_Base):
    async def __aenter__(self) -> Any:
        async with self._enter_lock:
            if self._running_count and self._exit_stack is None:  # lost, and still held by somebody
                async with AsyncExitStack() as stack:
                    await stack.enter_async_context(self.client)
                    self._exit_stack = stack.pop_all()
        return await super().__aenter__()

    async def __aexit__(self, *args: Any) -> bool | None:
        held = self._running_count
        try:
            return await super().__aexit__(*args)
        except Exception:
            if not held:
                raise
            self._forget()  # it was lost: all that it answered is there
            return None

    @asynccontextmanager
    async def _connected(self) -> AsyncGenerator[None]:
        async with super()._connected():
            session = self._exit_stack
            try:
                yield
            except Exception as exc:
                code, message = _said(exc)
                if code == _REQUEST_TIMEOUT and _is_at_most_once():
                    raise TimeoutError(f"MCP server '{self.id}' hasn't answered in time: {message}") from exc
                is_gone = code == _INVALID_REQUEST and message == _SESSION_GONE
                if code != _CONNECTION_CLOSED and not is_gone and self.client.is_connected():
                    raise
                async with self._enter_lock:
                    if self._exit_stack is session:
                        self._forget()
                        with suppress(Exception):  # what is dead may not end well
                            await self.client.close()  # type: ignore[no-untyped-call]  # it is its library's
                raise ConnectionError(f"the connection to MCP server '{self.id}' was lost: {exc}") from exc

    def _forget(self) -> None:
        self._exit_stack = self._cached_tools = None


def _said(error: Exception) -> tuple[object, object]:
    """The code and the message of the protocol's error that this is, or was raised from to tell the model of it."""
    said = getattr(error.__cause__ or error, "error", None)
    return getattr(said, "code", None), getattr(said, "message", None)


def _is_at_most_once() -> bool:
    place = current_place()
    return place is not None and place.is_once
