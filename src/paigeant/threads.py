"""Threads: where plain functions are done, of which none can be interrupted."""

from __future__ import annotations

import asyncio
import contextvars
import functools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from paigeant import host

__all__ = ["THREAD_NAME", "Threads"]

THREAD_NAME = "paigeant-step"
"""What the names of these threads begin with."""


class Threads:
    """Does up to `most` functions at once, each in a thread that others have had before.

    A function that is given up before it returns, as at a timeout, takes its thread along: whoever comes next gets
    another one, and doesn't wait for it.
    """

    def __init__(self, most: int) -> None:
        self._places = asyncio.Semaphore(most)
        self._idle: list[ThreadPoolExecutor] = []
        """Of one thread each: of several, a pool can't give up one."""

    async def do(
        self, function: Callable[..., Any], begins: Callable[[], None] | None = None, /, **arguments: Any
    ) -> Any:
        """What `function(**arguments)` gives, done with this task's context: logs and traces know the step there.

        `begins` is called when it gets a thread, which others may have had to give back before.
        """
        async with self._places:
            if begins is not None:
                begins()
            call = functools.partial(contextvars.copy_context().run, _done, function, **arguments)
            thread = self._idle.pop() if self._idle else ThreadPoolExecutor(1, THREAD_NAME)
            doing = asyncio.get_running_loop().run_in_executor(thread, call)
            try:
                return await doing
            finally:
                if doing.cancelled():
                    thread.shutdown(wait=False, cancel_futures=True)
                else:
                    self._idle.append(thread)
                del (
                    doing
                )  # it has the error, whose traceback has this frame: a circle with all that the function had

    def close(self) -> None:
        """End the threads that are idle; the others end with what they do."""
        while self._idle:
            self._idle.pop().shutdown(wait=False)


def _done(function: Callable[..., Any], /, **arguments: Any) -> Any:
    process = os.getpid()
    try:
        value = function(**arguments)
    except BaseException as exc:
        host.end_fork(process, exc)
        if not isinstance(exc, (StopIteration, GeneratorExit)):
            raise
        # No future takes the first, so that whoever waits would wait for ever. By the other, thrown into whoever waits,
        # it would seem to be closed.
        raise RuntimeError(f"the function raised {type(exc).__name__}") from exc
    host.end_fork(process)
    return value
