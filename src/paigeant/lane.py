"""Lane: one thread with one connection, through which the transactions of many tasks pass, shared by whoever meets.

A transaction is one hop to the thread, however many statements it has. Requests that come while one is under way
gather and become the next: one statement for each kind of request, one fsync for all (group commit).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import queue
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, TypeVar

from sqlalchemy import Connection, Engine

from paigeant.clock import Clock
from paigeant.errors import StoreUnavailable

__all__ = ["Handler", "Lane", "Tx"]

log = logging.getLogger("paigeant.lane")

Result = TypeVar("Result")

_BATCH = 1000
"""Requests in one transaction at the most: it bounds how long others wait for the database."""

_LAZY_SECONDS = 0.02


class Tx:
    """A transaction in progress: its connection, its instant, and what others shall hear once it is committed."""

    __slots__ = ("connection", "now", "rings")

    def __init__(self, connection: Connection, now: float) -> None:
        self.connection = connection
        self.now = now
        self.rings: set[str] = set()


Handler = Callable[[Tx, Sequence[Any]], Sequence[Any]]
"""Does the requests of one kind within a transaction and gives a result for each, in their order."""

Begin = Callable[[Connection], AbstractContextManager[None]]
"""A transaction on a connection, committed at the end of the block."""


class _Op:
    __slots__ = ("durable", "future", "handler", "request")

    def __init__(
        self, handler: Handler, request: Any, future: asyncio.Future[Any] | None, durable: bool
    ) -> None:
        self.handler = handler
        self.request = request
        self.future = future
        self.durable = durable


class Lane:
    """Runs transactions of `engine` one by one. `guard` turns the driver's errors into ours, `begin` begins one.

    `begins` is called in the thread before each transaction and told whether it must be durable; `committed` after each
    that rang for something; `tidy` when the results are on their way. `heard` is called in the event loop.
    """

    def __init__(
        self,
        name: str,
        engine: Engine,
        clock: Clock,
        *,
        guard: Callable[[], AbstractContextManager[None]],
        begin: Begin,
        begins: Callable[[Connection, bool], None] = lambda _, __: None,
        committed: Callable[[set[str]], None] = lambda _: None,
        heard: Callable[[frozenset[str]], None] = lambda _: None,
        tidy: Callable[[Connection], None] = lambda _: None,
    ) -> None:
        self._engine = engine
        self._clock = clock
        self._guard = guard
        self._begin = begin
        self._begins = begins
        self._after_commit = committed
        self._heard = heard
        self._tidy = tidy
        self._waiting: list[_Op] = []
        self._lazy: list[_Op] = []
        self._idle = asyncio.Event()
        self._idle.set()
        self._stopped = False
        self._loop = asyncio.get_running_loop()
        self._batches: queue.SimpleQueue[list[_Op] | None] = queue.SimpleQueue()
        self._connection: Connection | None = None
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def submit(self, handler: Handler, request: Any, *, durable: bool = True) -> asyncio.Future[Any]:
        """Have `request` done; the future has its result once its transaction is committed."""
        future: asyncio.Future[Any] = self._loop.create_future()
        if self._stopped:
            future.set_exception(StoreUnavailable("the database is closed"))
            return future
        self._waiting.append(_Op(handler, request, future, durable))
        if self._idle.is_set() and len(self._waiting) == 1:
            # Not at once: what other tasks ask for in this turn of the loop shares the transaction.
            self._loop.call_soon(self._next_if_idle)
        return future

    def submit_lazily(self, handler: Handler, request: Any) -> None:
        """Have `request` done along with the next transaction, or soon. For what may be lost in a crash."""
        if self._stopped:
            return
        self._lazy.append(_Op(handler, request, None, False))
        if len(self._lazy) == 1:
            self._loop.call_later(_LAZY_SECONDS, self._next_if_idle)

    async def stop(self) -> None:
        """Finish what was asked for, and end the thread."""
        while self._waiting or self._lazy or not self._idle.is_set():
            self._next_if_idle()
            await self._idle.wait()
        self._stopped = True
        self._batches.put(None)
        await asyncio.to_thread(self._thread.join)

    # -- in the event loop

    def _next_if_idle(self) -> None:
        if self._idle.is_set() and (self._waiting or self._lazy):
            self._next()

    def _next(self) -> None:
        batch = self._lazy + self._waiting[:_BATCH]
        del self._waiting[:_BATCH]
        self._lazy = []
        self._idle.clear()
        self._batches.put(batch)

    def _done(self, batch: list[_Op], results: list[Any], rings: set[str]) -> None:
        for op, result in zip(batch, results, strict=True):
            if op.future is None or op.future.done():
                continue
            if isinstance(result, BaseException):
                op.future.set_exception(result)
            else:
                op.future.set_result(result)
        if self._waiting:
            self._next()
        else:
            self._idle.set()
            if self._lazy:  # their time may have come while this one was under way
                self._loop.call_later(_LAZY_SECONDS, self._next_if_idle)
        if rings:
            self._heard(frozenset(rings))

    # -- in the thread

    def _run(self) -> None:
        while (batch := self._batches.get()) is not None:
            results, rings = self._transact_all(batch)
            try:
                if rings:
                    self._after_commit(rings)
            except Exception:  # whatever it meets, those who wait must get their results
                log.exception("others were not told of a commit")
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                self._loop.call_soon_threadsafe(self._done, batch, results, rings)
            try:
                if self._connection is not None:
                    self._tidy(self._connection)
            except Exception:  # without this thread nobody would ever get an answer again
                log.exception("tidying up after a commit failed")
        if self._connection is not None:
            self._connection.close()

    def _transact_all(self, batch: list[_Op]) -> tuple[list[Any], set[str]]:
        try:
            return self._transact(batch)
        except StoreUnavailable as exc:
            return [exc] * len(batch), set()
        except BaseException as exc:
            if len(batch) == 1:
                return [exc], set()
        # One request that can't be done must not fail those that happened to share its transaction.
        results: list[Any] = []
        rings: set[str] = set()
        for op in batch:
            try:
                result, rung = self._transact([op])
            except BaseException as exc:
                result, rung = [exc], set()
            results += result
            rings |= rung
        return results, rings

    def _transact(self, batch: Sequence[_Op]) -> tuple[list[Any], set[str]]:
        with self._guard():
            if self._connection is None:
                self._connection = self._engine.connect()
            self._begins(self._connection, any(op.durable for op in batch))
            requests = [(op.handler, op.request) for op in batch]
            return transact(self._connection, self._clock, requests, begin=self._begin)


def transact(
    connection: Connection, clock: Clock, requests: Sequence[tuple[Handler, Any]], *, begin: Begin
) -> tuple[list[Any], set[str]]:
    """Do `requests` in one transaction, those of a kind together; gives their results and what they rang for."""
    kinds: dict[Handler, list[int]] = {}
    for place, (handler, _) in enumerate(requests):
        kinds.setdefault(handler, []).append(place)
    results: list[Any] = [None] * len(requests)
    with begin(connection):
        tx = Tx(connection, clock.now())
        for handler, places in kinds.items():
            answers = handler(tx, [requests[place][1] for place in places])
            for place, answer in zip(places, answers, strict=True):
                results[place] = answer
    return results, tx.rings
