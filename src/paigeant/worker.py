"""ActivityWorker: how many steps at once, which topics, and how to stop."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import platform
import random
import secrets
import time
from collections.abc import Callable, Collection

from paigeant import host
from paigeant.activity import ActivityRegistry
from paigeant.behalf import Behalf
from paigeant.claim import Limits
from paigeant.errors import (
    InvalidDefinition,
    InvalidTransition,
    PaigeantError,
    StoreUnavailable,
    TransportUnavailable,
)
from paigeant.executor import Executor
from paigeant.forwarder import Forwarder
from paigeant.heartbeat import Heartbeat
from paigeant.message import PaigeantMessage
from paigeant.observer import Event, Observers
from paigeant.store import Store, WorkerRecord
from paigeant.sweeper import Sweeper
from paigeant.threads import Threads
from paigeant.transport import Transport
from paigeant.waits import WAITS

__all__ = ["ActivityWorker"]

log = logging.getLogger("paigeant.worker")

_MOST_AHEAD = 500
_MOST_THREADS = 64
"""So many plain functions are done at once."""
_MOST_FAILURES = 3
"""So often a message is tried that ends in an error which nobody foresaw; then it is kept as a dead letter."""

_FAILURES_KEPT = 1000
_FAILURE_PAUSE = 1.0
_UNSERVED_SECONDS = 5.0
"""How long a topic is said not to be received from after that has failed: until long after it was tried again."""

_IDLE_LOOK_SECONDS = 0.05
_CANCEL_SECONDS = 5.0
"""How long a shutdown waits for steps that it has cancelled."""
_CANCEL_AGAIN_SECONDS = 1.0
"""How long what was cancelled may take to put itself away before it is cancelled once more."""


class ActivityWorker:
    """Does the steps of the activities in `registry`, up to `concurrency` of them at once.

    `topics` limits it to some of their topics. `adopts`: it takes over runs that its store has never seen. `lease` is
    how long its steps are safe from others should it fall silent, `heartbeat` how often it renews that,
    `sweep_interval` how often it looks for what others left behind; all in seconds.
    """

    def __init__(
        self,
        store: Store,
        transport: Transport,
        registry: ActivityRegistry,
        forwarder: Forwarder,
        *,
        concurrency: int = 100,
        topics: Collection[str] | None = None,
        adopts: bool = False,
        lease: float = 30.0,
        heartbeat: float = 5.0,
        sweep_interval: float = 1.0,
        shutdown_grace: float = 30.0,
        limits: Limits | None = None,
        observers: Observers | None = None,
        chance: Callable[[], float] = random.random,
        behalf: Behalf | None = None,
    ) -> None:
        if isinstance(concurrency, bool) or not isinstance(concurrency, int) or concurrency < 1:
            raise InvalidDefinition(f"concurrency is a number of 1 or more, found {concurrency!r}")
        if isinstance(topics, str):
            raise InvalidDefinition(f"topics are a list of names, found {topics!r}")
        registry.check()
        known = ActivityRegistry.merged([registry, WAITS])
        self.id = f"{platform.node()}-{os.getpid()}-{secrets.token_hex(3)}"
        self.store = store
        self.transport = transport
        self.concurrency = concurrency
        self.topics = sorted(_topics(registry) if topics is None else topics)
        # Steps that only wait are everybody's.
        self._all_topics = sorted({*self.topics, *(WAITS.get(name).topic for name in WAITS)})
        self.shutdown_grace = shutdown_grace
        self.observers = observers or Observers()
        self._threads = Threads(min(concurrency, _MOST_THREADS))
        self.executor = Executor(
            store,
            transport,
            known,
            forwarder,
            worker_id=self.id,
            topics=self._all_topics,
            adopts=adopts,
            limits=limits,
            observers=self.observers,
            threads=self._threads,
            chance=chance,
            behalf=behalf,
        )
        record = WorkerRecord(self.id, host.host_id(), host.process_id())
        self.forwarder = forwarder
        self.heartbeat = Heartbeat(
            store,
            record,
            lease=lease,
            interval=heartbeat,
            running=lambda: list(self.executor.running),
            lose=self.executor.lose,
        )
        self.executor.entitled = lambda: self.heartbeat.holds()
        self.sweeper = Sweeper(
            store,
            forwarder,
            worker=record,
            topics=self._all_topics,
            interval=sweep_interval,
            lease=lease,
            observers=self.observers,
            chance=chance,
        )
        self._slots = asyncio.Semaphore(concurrency)
        self._tasks: set[asyncio.Task[None]] = set()
        self._failures: dict[str, int] = {}
        """How often messages, by their ids, could not be handled."""
        self._unserved: dict[str, tuple[float, str]] = {}
        """When, by the steady clock, and why a topic could not be received from, until it can be again."""
        self._wanted = asyncio.Event()
        self._stopped = asyncio.Event()
        self._began = False
        self._grace: float | None = None
        self._hurry = asyncio.Event()

    async def run(self, *, until_idle: bool = False) -> None:
        """Work until `stop` is called, or, `until_idle`, no step waits in its topics; then put everything away.

        A worker runs once; raises InvalidTransition the second time.
        """
        if self._began:
            raise InvalidTransition(f"worker {self.id} has run already; make another one")
        self._began = True
        if self._wanted.is_set():  # stopped before it began
            self._stopped.set()
            return
        try:
            await self.heartbeat.start()
        except BaseException:
            self._stopped.set()  # there is nothing to put away, and whoever stops it need not wait
            raise
        self.observers.observe(Event("worker.started", worker=self.id, more={"topics": self.topics}))
        # What follows its end, the last first, and each of it whatever becomes of the others: whoever waits for the end
        # must not wait for ever, also where this is cancelled once more meanwhile.
        async with contextlib.AsyncExitStack() as end:
            end.callback(self._tell_stopped)
            end.push_async_callback(self._put_away)
            end.callback(self.store.on_turn(self.heartbeat.soon))
            background = [asyncio.create_task(self.sweeper.run())]
            end.push_async_callback(_cancel, background)
            end.callback(self._cancel_running)
            end.push_async_callback(self._finish_running)
            consumers = [asyncio.create_task(self._consume(topic)) for topic in self._all_topics]
            end.push_async_callback(_cancel, consumers)
            end.callback(self._take_no_more)
            if until_idle:
                background.append(asyncio.create_task(self._stop_when_idle()))
            await self._wanted.wait()

    async def stop(self, grace: float | None = None) -> None:
        """Take nothing more; let running steps finish within `grace` seconds, cancel the rest and give them back.

        Returns once `run` has put everything away, and at once where it hasn't begun: then it will do nothing. Called
        again it waits for the same, with another grace where one is given.
        """
        if self.is_running and not self._wanted.is_set():
            self.observers.observe(Event("worker.stopping", worker=self.id))
        if grace is not None:
            self._grace = grace
        self._wanted.set()
        self._hurry.set()
        if self._began:
            await self._stopped.wait()

    @property
    def is_running(self) -> bool:
        """Whether `run` has begun, and hasn't put everything away yet."""
        return self._began and not self._stopped.is_set()

    def idleness(self) -> list[str]:
        """Why this worker takes no messages now; empty when it does. Any thread may ask."""
        if not self._began:
            return ["the worker hasn't begun yet"]
        if self._wanted.is_set():
            return ["the worker stops"]
        if not self.heartbeat.holds():
            return ["the worker's lease is over: the store wasn't reached in time"]
        now = time.monotonic()
        return [
            f"nothing is received from {topic}: {why}"
            for topic, (at, why) in list(self._unserved.items())
            if now - at < _UNSERVED_SECONDS
        ]

    # -- taking

    async def _consume(self, topic: str) -> None:
        prefetch = min(self.concurrency, _MOST_AHEAD)
        while True:
            try:
                async with contextlib.aclosing(
                    self.transport.subscribe(topic, prefetch=prefetch)
                ) as messages:  # type: ignore[type-var]  # an async generator in every adapter
                    async for message in messages:
                        self._unserved.pop(topic, None)
                        await self._take(message)
            except PaigeantError as exc:
                log.warning("can't receive from %s, will try again: %s", topic, exc)
                self._unserved[topic] = time.monotonic(), str(exc)
            except Exception as exc:  # whatever ends a subscription, the topic must not be left unserved
                log.exception("the subscription to %s has ended, will try again", topic)
                self._unserved[topic] = time.monotonic(), type(exc).__name__
            await asyncio.sleep(random.uniform(0.5, 1.5))

    async def _take(self, message: PaigeantMessage) -> None:
        due = message.due
        # The activity's own bound first: waiting for it must not take up a place that others could use.
        bound = None
        try:
            bound = None if due is None else await self.executor.slot(due.activity)
            await self._slots.acquire()
        except asyncio.CancelledError:
            if bound is not None:
                bound.release()
            with contextlib.suppress(TransportUnavailable):  # it comes back by itself; this must end here
                await self.transport.nack(message.message_id)
            self.executor.reporter.tell_delivery("delivery.returned", message, "the worker stops")
            raise
        task = asyncio.create_task(self._handle(message, bound))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _handle(self, message: PaigeantMessage, bound: asyncio.Semaphore | None) -> None:
        try:
            await self.executor.handle(message, bound)
        except (
            Exception
        ) as exc:  # one bad message must not stop the others; the sweeper takes care of its step
            log.exception("message %s could not be handled", message.message_id[:200])
            try:
                await self._count_failure(message, exc)
            except Exception:  # then it comes again when its time is over
                log.exception("message %s can't be put away either", message.message_id[:200])
        finally:
            self._slots.release()

    async def _count_failure(self, message: PaigeantMessage, error: Exception) -> None:
        """Have a message that can't be handled come again, and end as a dead letter where that doesn't help."""
        reason = f"{type(error).__name__}: {error}"[:1000]
        failures = self._failures.pop(message.message_id, 0) + 1
        if failures >= _MOST_FAILURES:
            await self.executor.reject(
                message, f"unhandled: it failed {failures} times, at last with {reason}"
            )
            return
        self._failures[message.message_id] = failures  # the newest last
        if len(self._failures) > _FAILURES_KEPT:
            del self._failures[next(iter(self._failures))]
        await self.executor.give_back(message, reason, _FAILURE_PAUSE)

    # -- stopping

    async def _stop_when_idle(self) -> None:
        while True:
            await asyncio.sleep(_IDLE_LOOK_SECONDS)
            if self.executor.running or self._tasks:
                continue
            try:
                is_idle = not await self.store.has_open(self._all_topics)
            except StoreUnavailable as exc:
                log.warning("can't tell whether work is left, will look again: %s", exc)
                await asyncio.sleep(1.0)
                continue
            if is_idle:
                self._grace = 0.0
                self._wanted.set()
                return

    def _take_no_more(self) -> None:
        self.executor.stopping = True

    def _tell_stopped(self) -> None:
        self._stopped.set()
        self.observers.observe(Event("worker.stopped", worker=self.id))

    def _cancel_running(self) -> None:
        for task in self._tasks:
            task.cancel()

    async def _finish_running(self) -> None:
        began = time.monotonic()
        while self._tasks:
            self._hurry.clear()
            grace = self.shutdown_grace if self._grace is None else self._grace
            left = began + grace - time.monotonic()
            if left <= 0:
                break
            hurry = asyncio.create_task(self._hurry.wait())
            await asyncio.wait({*self._tasks, hurry}, timeout=left, return_when=asyncio.FIRST_COMPLETED)
            await _cancel([hurry])
        self._cancel_running()
        if self._tasks:
            # An activity may take no notice of it. Its step is given back all the same.
            await asyncio.wait(self._tasks, timeout=_CANCEL_SECONDS)
        if self._tasks:
            log.error("%d steps go on although they were cancelled: they are given back", len(self._tasks))

    async def _put_away(self) -> None:
        await self.heartbeat.stop()
        try:
            # A shutdown is not a failure: what was cut short is free for others now, with its attempts uncounted.
            running = list(self.executor.running)
            if running:
                released = await self.store.release_steps(self.id, running)
                for key in released:
                    event = Event("step.released", key.workflow_id, step=key.step, worker=self.id)
                    self.observers.observe(event)
                await self.forwarder.send_again(released)
            await self.store.sign_off(self.id)
        except PaigeantError as exc:
            log.warning("could not sign off, others will find out: %s", exc)
        self._threads.close()


def _topics(registry: ActivityRegistry) -> set[str]:
    # Also those called like the activities: a dispatcher without code can't know an activity's own topic.
    return {registry.get(name).topic for name in registry} | set(registry)


async def _cancel(tasks: Collection[asyncio.Task[None] | asyncio.Task[bool]]) -> None:
    """Cancel them until they have ended: a library beneath may lose a cancel, as `asyncio.wait_for` of Python 3.11
    does when what it waits for ends at that very moment, and the worker would never stop."""
    left = {task for task in tasks if not task.done()}
    while left:
        for task in left:
            task.cancel()
        _, left = await asyncio.wait(left, timeout=_CANCEL_AGAIN_SECONDS)
    await asyncio.gather(*tasks, return_exceptions=True)
