"""Sweeper: what nobody is working on is put back to work. Every worker runs one; no leader is needed."""

from __future__ import annotations

import asyncio
import logging
import math
import random
import time
from collections.abc import Callable, Collection
from itertools import islice

from paigeant import host
from paigeant.errors import PaigeantError
from paigeant.forwarder import Forwarder
from paigeant.observer import Event, Observers
from paigeant.reporter import about_run
from paigeant.store import OpenTopic, StepKey, Store, Swept, WorkerRecord
from paigeant.transport import TopicDepth

__all__ = ["Sweeper"]

log = logging.getLogger("paigeant.sweeper")

_MOST_UNSENT = 1000
"""Steps that are kept for the time when a server is back; the others wait for the store to offer them again."""


class Sweeper:
    """Frees what dead workers held, sends messages again that nobody got, ends runs that are over their deadline."""

    def __init__(
        self,
        store: Store,
        forwarder: Forwarder,
        *,
        worker: WorkerRecord,
        topics: Collection[str],
        interval: float,
        lease: float = 30.0,
        observers: Observers | None = None,
        chance: Callable[[], float] = random.random,
    ) -> None:
        self.store = store
        self.forwarder = forwarder
        self.worker = worker
        self.topics = topics
        self.interval = interval
        self.lease = lease
        self.observers = observers or Observers()
        self._chance = chance
        self._unsent: dict[StepKey, str] = {}
        self._empty: list[str] = []
        self._covered: dict[str, int] = {}
        """Topics that had a message for each waiting step when last looked at, and how many have to wait for that."""
        self._looked_at, self._pause = -math.inf, 0.0
        self._spares_until = 0.0
        self._ahead = math.inf
        """By how much the store's clock was, at most, ahead of this process's steady one when last looked at."""

    async def run(self) -> None:
        """Sweep for ever, about every `interval` seconds. A sweep that fails is logged; the next one tries again."""
        while True:
            try:
                await self.sweep()
            except PaigeantError as exc:
                log.warning("sweep failed, will be tried again: %s", exc)
            except Exception:  # without sweeps a worker leaves everybody's lost steps lying
                log.exception("sweep failed, will be tried again")
            # Jitter keeps the workers from sweeping all at the same moment.
            await asyncio.sleep(self.interval * (0.5 + self._chance()))

    async def sweep(self) -> Swept:
        """Sweep once; gives what was found."""
        # What a key with few roles signs for other topics, nobody would believe.
        topics = None if self.forwarder.envelope.serves_all else self.topics
        known = await self.store.list_workers()
        swept = await self.store.sweep(
            gone=self._gone(known), spare=await self._spared(known), empty=self._empty, topics=topics
        )
        for worker_id in swept.lost:
            self.observers.observe(Event("worker.lost", worker=worker_id))
        for workflow_id in swept.expired:
            self.observers.observe(Event("run.expired", workflow_id, at=swept.at))
        if self.observers.want("run.failed"):
            for workflow_id in swept.failed:
                error = "DeadlineExceeded: the run was not done by its deadline"
                about = await about_run(self.store, workflow_id)
                self.observers.observe(Event("run.failed", workflow_id, error=error, at=swept.at, **about))
        for key in swept.freed:
            self.observers.observe(
                Event("step.swept", key.workflow_id, step=key.step, worker=self.worker.id, at=swept.at)
            )
        # What a server's absence keeps from being sent is owed: the store takes it for sent, and offers it again only
        # after as long as it has waited.
        covered = await self._still_covered() if swept.due else ()
        unsent = await self.forwarder.send_again(swept.due, self._unsent, covered=covered)
        self._unsent = dict(islice(unsent.items(), _MOST_UNSENT))
        # Asked last, and for the next sweep: what dead workers held is freed however long a broker takes to answer.
        self._empty = await self._emptied()
        return swept

    async def _emptied(self) -> list[str]:
        """Topics of which steps wait for long and the transport has no message: what was sent is lost.

        A broker that was wiped would else be found out only when each step's next message is due, and the longer a
        step waits, the later that is. Looked at once in a grace time.
        """
        now = await self.store.now()
        if abs(now - self._looked_at) < self._pause:  # a clock that was set back mustn't keep it from looking
            return []
        self._looked_at, self._pause = now, self.store.grace * (0.75 + 0.5 * self._chance())
        self._covered = {}
        waiting = {
            topic.topic: topic
            for topic in await self.store.open_topics()
            if topic.oldest is not None and topic.oldest > self.store.grace
        }
        if not waiting:
            return []
        try:
            depths = {depth.topic: depth for depth in await self.forwarder.transport.topics(list(waiting))}
        except PaigeantError as exc:
            log.warning("can't tell which topics are empty: %s", exc)
            return []
        self._covered = {
            name: enough
            for name, topic in waiting.items()
            if name in depths and (enough := _enough(topic, depths[name])) <= depths[name].waiting
        }
        return [
            topic
            for topic in waiting
            if topic not in depths or not (depths[topic].waiting or depths[topic].taken)
        ]

    async def _still_covered(self) -> set[str]:
        """Those that are covered now: what a broker has lost since the last look is to be sent at once."""
        if not self._covered:
            return set()
        try:
            depths = await self.forwarder.transport.topics(list(self._covered))
        except PaigeantError:  # publishing will tell what is wrong
            return set()
        return {depth.topic for depth in depths if depth.waiting >= self._covered.get(depth.topic, math.inf)}

    async def _spared(self, known: Collection[WorkerRecord]) -> set[str]:
        """Workers that keep their steps though their lease be over: this one, whose next beat renews it.

        Where its own is over, what made it late (its host was suspended, or a clock was set) may have made all of
        them late: for as long as a lease then, they all have the time to beat. Its own beat may have come before this
        sweep, and no other's: so the clocks tell as well.
        """
        asked = time.monotonic()
        now, steady = await self.store.now(), time.monotonic()
        is_late = any(worker.id == self.worker.id and worker.lease_until <= now for worker in known)
        if is_late or now - steady - self._ahead > self.lease / 2:
            self._spares_until = steady + self.lease  # also where the clock is soon set right again
        self._ahead = now - asked
        return {worker.id for worker in known} if steady < self._spares_until else {self.worker.id}

    def _gone(self, known: Collection[WorkerRecord]) -> list[str]:
        """Workers of this host whose process has ended: no need to wait for their lease."""
        return [
            worker.id
            for worker in known
            if worker.host == self.worker.host
            and worker.id != self.worker.id
            and host.is_gone(worker.process)
        ]


def _enough(topic: OpenTopic, depth: TopicDepth) -> int:
    """How many messages wait where each step of a topic has one, there or in the hands of a worker.

    Who does steps has fetched about as many more: a broker that doesn't tell those would else always seem to lack some.
    """
    return max(topic.ready + topic.later - max(depth.taken, topic.running), 1)
