"""Event loops: which one the processes that Paigeant starts run in."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

__all__ = ["run"]

Result = TypeVar("Result")


def run(main: Coroutine[Any, Any, Result]) -> Result:
    """What `main` gives, run as `asyncio.run` does it, in uvloop's event loop; in asyncio's where uvloop isn't there.

    There is none for Windows and PyPy.
    """
    with asyncio.Runner(loop_factory=_factory()) as runner:
        return runner.run(main)


def _factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    try:
        import uvloop  # here, because most commands that only look at something don't need it
    except ImportError:
        return None
    return uvloop.new_event_loop
