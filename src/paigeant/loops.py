"""Event loops: which one the processes that Paigeant starts run in."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import Any, Literal, TypeVar

__all__ = ["EventLoop", "run"]

EventLoop = Literal["uvloop", "asyncio"]

Result = TypeVar("Result")

_CANCEL_SECONDS = 1.0
"""How long tasks that were cancelled may take to put themselves away."""

log = logging.getLogger("paigeant.loops")


def run(
    main: Coroutine[Any, Any, Result],
    event_loop: EventLoop = "uvloop",
    *,
    leave: Callable[[int], None] = lambda _: None,
) -> Result:
    """What `main` gives, run as `asyncio.run` does it; in asyncio's event loop also where uvloop isn't there.

    There is none for Windows and PyPy. Only `main` may end all by SystemExit: another task that does, like one which an
    activity has begun, ends itself alone. `leave` is told how many tasks that `main` has left behind take no notice of
    being cancelled. It may end the process: they, and what is still done in threads, are waited for after that.
    """
    with asyncio.Runner(loop_factory=_uvloop() if event_loop == "uvloop" else None) as runner:
        result = _finished(runner, runner.get_loop().create_task(main))
        leave(runner.run(_cancelled()))
        return result


def _finished(runner: asyncio.Runner, task: asyncio.Task[Result]) -> Result:
    while True:
        try:
            return runner.run(_result(task))
        except SystemExit as exc:
            # It stops the loop, whoever raises it, and with it the work of all others; but the loop can go on.
            if task.done():
                return task.result()
            log.error("a task called sys.exit(%r): it has ended, and nothing else", exc.code)


async def _cancelled() -> int:
    """How many tasks are left that take no notice of being cancelled."""
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    return len((await asyncio.wait(tasks, timeout=_CANCEL_SECONDS))[1]) if tasks else 0


async def _result(task: asyncio.Task[Result]) -> Result:
    # Where the loop was stopped meanwhile, another one of these has the result.
    if (me := asyncio.current_task()) is not None:
        me.add_done_callback(_retrieved)
    return await task


def _retrieved(task: asyncio.Task[Any]) -> None:
    if not task.cancelled():
        task.exception()


def _uvloop() -> Callable[[], asyncio.AbstractEventLoop] | None:
    try:
        import uvloop  # here, because most commands that only look at something don't need it
    except ImportError:
        return None
    return uvloop.new_event_loop
