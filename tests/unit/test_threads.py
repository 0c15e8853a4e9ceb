"""Plain functions are done in threads, of which none can be interrupted."""

from __future__ import annotations

import asyncio
import threading
from contextvars import ContextVar

import pytest
from tests.patience import PATIENCE

from paigeant.threads import Threads

HERE: ContextVar[str] = ContextVar("here", default="nowhere")


async def test_functions_share_threads() -> None:
    """One after the other they are done in the same one, so that what a function keeps for its thread is there again.

    With the context variables of whoever asks.
    """
    threads = Threads(5)
    HERE.set("in a test")

    def told(self: str) -> tuple[str, str, int]:
        return self, HERE.get(), threading.get_ident()

    first, second = [await threads.do(told, self="argument") for _ in range(2)]
    assert first == second == ("argument", "in a test", first[2])
    assert first[2] != threading.get_ident()
    threads.close()


async def test_so_many_are_done_at_once() -> None:
    """The others wait for one of them to end."""
    threads, go = Threads(2), threading.Event()
    begun: list[int] = []

    def wait(number: int) -> None:
        begun.append(number)
        assert go.wait(PATIENCE)

    doing = [asyncio.create_task(threads.do(wait, number=number)) for number in range(3)]
    while len(begun) < 2:  # noqa: ASYNC110  # threads can't set an asyncio.Event
        await asyncio.sleep(0.001)
    await asyncio.sleep(0.01)
    assert sorted(begun) == [0, 1]
    go.set()
    await asyncio.gather(*doing)
    assert sorted(begun) == [0, 1, 2]
    threads.close()


async def test_a_function_that_is_given_up_keeps_no_other_from_a_thread() -> None:
    """Its own thread ends when it returns, however late that is."""
    threads, go = Threads(1), threading.Event()
    kept: list[threading.Thread] = []

    def stuck() -> None:
        kept.append(threading.current_thread())
        go.wait(PATIENCE)

    for number in range(2):
        doing = asyncio.create_task(threads.do(stuck))
        while len(kept) <= number:  # noqa: ASYNC110  # threads can't set an asyncio.Event
            await asyncio.sleep(0.001)
        doing.cancel()
        await asyncio.gather(doing, return_exceptions=True)
    assert await asyncio.wait_for(threads.do(threading.current_thread), PATIENCE) not in kept
    threads.close()
    go.set()
    for thread in kept:
        thread.join(PATIENCE)
    assert not any(thread.is_alive() for thread in kept)


async def test_what_a_function_raises_is_raised() -> None:
    """And the thread takes the next one. What a future can't tell of, in other words."""
    threads = Threads(1)

    def end(error: type[BaseException]) -> None:
        raise error

    raised: type[BaseException]
    for raised in (ValueError, SystemExit, asyncio.CancelledError):
        with pytest.raises(raised):
            await threads.do(end, error=raised)
    for raised in (StopIteration, GeneratorExit):
        with pytest.raises(RuntimeError, match=f"the function raised {raised.__name__}"):
            await threads.do(end, error=raised)
    assert await threads.do(int) == 0
    threads.close()
