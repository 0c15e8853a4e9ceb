"""Heartbeat: holds a worker's lease, from a thread, so that no activity can hold it up.

It stops beating when the event loop hasn't answered for long: a worker that hangs must not keep its steps.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Collection
from typing import Any

from paigeant.errors import PaigeantError
from paigeant.store import StepKey, Store, WorkerRecord

__all__ = ["Heartbeat"]

log = logging.getLogger("paigeant.heartbeat")

Steps = Collection[tuple[StepKey, int]]


class Heartbeat:
    """Beats every `interval` seconds for a lease of `lease` seconds; tells `lose` which steps were lost."""

    def __init__(
        self,
        store: Store,
        worker: WorkerRecord,
        *,
        lease: float,
        interval: float,
        running: Callable[[], Steps],
        lose: Callable[[set[tuple[StepKey, int]]], None],
    ) -> None:
        self.store = store
        self.worker = worker
        self.lease = lease
        self.interval = interval
        self._running = running
        self._lose = lose
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._stop = threading.Event()
        self._wake = threading.Event()
        self._asked: float | None = None
        self._heard = 0.0
        self._until = 0.0
        self._unlisted: dict[tuple[StepKey, int], float] = {}

    async def start(self) -> None:
        """Sign on: once this returns, the worker has a lease."""
        self._loop = asyncio.get_running_loop()
        await asyncio.to_thread(self._beat_once, frozenset())
        self._thread = threading.Thread(target=self._run, name="paigeant-heartbeat", daemon=True)
        self._thread.start()

    async def stop(self) -> None:
        """Beat no more. Stopping twice is harmless."""
        self._stop.set()
        self._wake.set()
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join)
            self._thread = None

    def holds(self) -> bool:
        """Whether the lease holds, by this process's steady clock. When it doesn't, a beat is due at once.

        A process that was stopped for longer than its lease finds out by this before its next beat.
        """
        if time.monotonic() < self._until:
            return True
        self.soon()
        return False

    def troubles(self) -> list[str]:
        """Why the process had better be ended: its event loop hangs, or nothing beats any more. Any thread may ask."""
        thread = self._thread
        if thread is None or not thread.is_alive():
            has_begun = thread is not None or self._stop.is_set()
            return ["the heartbeat has ended" if has_begun else "the heartbeat hasn't begun yet"]
        self._ask_loop()  # the thread may be waiting for a store that is away, and ask nobody meanwhile
        silent = self._silence()
        return [f"the event loop hasn't answered for {silent:.0f} s"] if silent > self.lease else []

    def soon(self) -> None:
        """Beat at once: a run was cancelled, perhaps one that this worker works on."""
        self._wake.set()

    def _run(self) -> None:
        while not self._stop.is_set():
            self._wake.wait(self.interval)
            self._wake.clear()
            if self._stop.is_set():
                return
            try:
                if not self._ask_loop():
                    return  # nobody is left to do what is kept by it
                silent = self._silence()
                if silent > self.lease:
                    log.error("the event loop has been blocked for %.0f s: the lease is not renewed", silent)
                    continue
                self._beat_once(frozenset(self._running()))
            except PaigeantError as exc:
                log.warning("heartbeat failed, will be tried again: %s", exc)
            except Exception:
                # The thread must outlive whatever one beat meets, or the worker loses all it does.
                log.exception("heartbeat failed, will be tried again")

    def _beat_once(self, running: Steps) -> None:
        # What is the worker's in the store but not on its list has been forgotten, unless the answer to its claim is
        # still on the way: so not by two beats in quick succession, nor before the loop has answered a question
        # asked since. Nor was what it has done and recorded meanwhile, so it is asked for once more.
        now = time.monotonic()
        missing = {
            step
            for step, seen in self._unlisted.items()
            if now - seen >= self.interval / 2 and self._heard > seen and step not in running
        }
        lost, unlisted = self.store.beat(self.worker, lease=self.lease, running=running)
        self._until = now + self.lease
        forgotten = (missing & unlisted).difference(self._running())
        if forgotten:
            self.store.beat(self.worker, lease=self.lease, running=running, forgotten=forgotten)
            log.warning("gave back %d steps that this worker had claimed and forgotten", len(forgotten))
        now = time.monotonic()
        self._unlisted = {step: self._unlisted.get(step, now) for step in unlisted - forgotten}
        if lost:
            self._call(self._lose, lost)

    def _ask_loop(self) -> bool:
        """Have the loop answer; False where it is closed, as by a Ctrl-C that nothing has stopped."""
        now = time.monotonic()
        if self._asked is None:
            self._asked = now
        return self._call(self._answer, now)

    def _silence(self) -> float:
        """For how many seconds the loop has owed an answer. Nobody has asked it while a beat took its time."""
        asked = self._asked
        return 0.0 if asked is None else time.monotonic() - asked

    def _call(self, call: Callable[[Any], object], given: Any) -> bool:
        try:
            if self._loop is not None:
                self._loop.call_soon_threadsafe(call, given)
        except RuntimeError:
            return False
        return True

    def _answer(self, asked: float) -> None:
        self._asked = None
        self._heard = asked
