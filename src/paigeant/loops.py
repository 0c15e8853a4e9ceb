"""Event loops: which one the processes that Paigeant starts run in."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, Literal, TypeVar

__all__ = ["EventLoop", "run"]

EventLoop = Literal["uvloop", "asyncio"]

Result = TypeVar("Result")


def run(main: Coroutine[Any, Any, Result], event_loop: EventLoop = "uvloop") -> Result:
    """What `main` gives, run as `asyncio.run` does it; in asyncio's event loop also where uvloop isn't there.

    There is none for Windows and PyPy.
    """
    with asyncio.Runner(loop_factory=_uvloop() if event_loop == "uvloop" else None) as runner:
        return runner.run(main)


def _uvloop() -> Callable[[], asyncio.AbstractEventLoop] | None:
    try:
        import uvloop  # here, because most commands that only look at something don't need it
    except ImportError:
        return None
    return uvloop.new_event_loop
