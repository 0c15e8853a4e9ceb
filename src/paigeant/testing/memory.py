"""The in-memory application for tests, with a worker inside and time that passes when it is told to."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any, Self

from paigeant.activity import ActivityRegistry
from paigeant.app import Paigeant
from paigeant.errors import PaigeantError, nearest
from paigeant.ledger import NEVER
from paigeant.observer import Observer
from paigeant.settings import Settings
from paigeant.slip import StepStatus
from paigeant.store import StepRecord
from paigeant.stores.memory import MemoryStore
from paigeant.testing.authority import MemoryAuthority
from paigeant.testing.clock import ManualClock
from paigeant.transports.memory import MemoryTransport
from paigeant.waits import WAITS
from paigeant.worker import ActivityWorker
from paigeant.workflow import Workflow

__all__ = ["MemoryApp", "NotDrained"]

_A_CENTURY = 100 * 365 * 86400.0


class NotDrained(PaigeantError):
    """Something is left that nothing here will ever do, or it takes too long."""


class MemoryApp(Paigeant):
    """A `Paigeant` whose runs live in this object, with a worker for `activities` that runs while it is open.

    Nothing waits for real: a retry that lies in the future is reached when `drain()` moves `clock`, or when the test
    moves it. `authority` issues tokens and keeps grants.
    `chance` (a number from 0 to 1) places waits within their jitter; by default they are exact. What
    `settings` name are fields of `Settings`. Its URLs and routes are fixed here, and whatever the environment and
    `paigeant.yaml` say, nothing is signed, no log is kept, and lease and sweep interval are long, unless `settings` do.
    """

    store: MemoryStore
    transport: MemoryTransport
    clock: ManualClock

    def __init__(
        self,
        activities: ActivityRegistry | Iterable[ActivityRegistry] = (),
        *,
        workflows: Iterable[Workflow] = (),
        observers: Iterable[Observer] = (),
        clock: ManualClock | None = None,
        chance: Callable[[], float] = lambda: 0.0,
        authority: MemoryAuthority | None = None,
        **settings: Any,
    ) -> None:
        self.clock = clock or ManualClock()
        urls = {"transport_url": "memory://", "store_url": "memory://", "routes": {}}
        # What a deployment says of keys and logs stands in the same paigeant.yaml, and isn't there for a test.
        alone = {"signing": "off", "log_sql": "off"}
        # The worker inside is never to lose its lease because a test lets a day pass; sweeps follow the clock.
        steady = {"lease": _A_CENTURY, "sweep_interval": _A_CENTURY}
        super().__init__(
            Settings(**{**alone, **steady, **settings, **urls}),
            activities=activities,
            workflows=workflows,
            observers=observers,
            clock=self.clock,
            chance=chance,
        )
        if authority is not None:
            self.behalf = self.dispatcher.behalf = self.control.behalf = authority.behalf(self.clock)
        self._worker: ActivityWorker | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._changed = asyncio.Event()
        self._forget: list[Callable[[], None]] = []

    async def __aenter__(self) -> Self:
        await super().__aenter__()
        self._worker = self.worker()
        moved = asyncio.Event()
        self._forget = [
            self.transport.on_change(self._changed.set),
            self.clock.on_move(self.transport.wake),
            self.clock.on_move(moved.set),
        ]
        self._tasks = [
            asyncio.create_task(self._worker.run()),
            asyncio.create_task(self._follow_clock(self._worker, moved)),
        ]
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for forget in self._forget:
            forget()
        working, following = self._tasks
        following.cancel()
        if self._worker is not None and not working.done():
            await self._worker.stop(grace=0)
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await super().__aexit__(kind, error, traceback)

    async def drain(self, *, advance: bool = True, timeout: float = 30.0) -> None:
        """Wait until nothing is left to do. Steps that are due later are reached by moving the clock to them.

        So sleeps end, and waits whose time is up. Waits without a timeout are left to the test, which may answer them.
        With `advance=False` the clock stays, and it is done when nothing can be done before the clock moves. A run's
        deadline passes only when the test moves the clock beyond it.

        Raises NotDrained for a step that no activity here can do, and when it takes more than `timeout` real seconds;
        either names the step.
        """
        worker = self._open_worker()
        limit = asyncio.timeout(timeout)
        try:
            async with limit:
                while True:
                    await worker.sweeper.sweep()
                    await self._settle(worker)
                    due = self._next_due(worker) if advance else None
                    if due is None:
                        break
                    self.clock.set(due)
        except TimeoutError as exc:
            if not limit.expired():
                raise
            left = [row for status in StepStatus for row in self.store.rows(status) if status in _OPEN]
            shown = ", ".join(_shown(row) for row in left) or "nothing that is recorded"
            raise NotDrained(f"not drained within {timeout:g} s; still open: {shown}") from exc
        if advance:
            self._check_none_stuck(worker)

    # -- inside

    def _open_worker(self) -> ActivityWorker:
        if self._worker is None:
            raise NotDrained("the application is not open; use it as `async with MemoryApp(...) as app:`")
        return self._worker

    async def _follow_clock(self, worker: ActivityWorker, moved: asyncio.Event) -> None:
        while True:
            await moved.wait()
            moved.clear()
            await worker.sweeper.sweep()

    async def _settle(self, worker: ActivityWorker) -> None:
        """Wait until the worker does nothing and no message can be delivered to it."""
        working = self._tasks[0]
        while True:
            self._changed.clear()
            if working.done():
                await working  # it never ends by itself: this raises what it failed with
                raise NotDrained("the worker was stopped; nothing is done any more")
            steps = set(worker._tasks)
            if not steps and not self.transport.is_busy(worker._all_topics):
                return
            changed = asyncio.create_task(self._changed.wait())
            try:
                await asyncio.wait({changed, working, *steps}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                changed.cancel()

    def _next_due(self, worker: ActivityWorker) -> float | None:
        """When something here is due next, after now; None when nothing ever is."""
        now = self.clock.now()
        left = [*self.store.rows(StepStatus.READY), *self.store.rows(StepStatus.WAITING)]
        instants = [row.wake_at for row in left if self._can_do(worker, row) and row.wake_at < NEVER]
        delivery = self.transport.next_delivery(worker._all_topics)
        if delivery is not None:
            instants.append(delivery)
        return min((instant for instant in instants if instant > now), default=None)

    def _can_do(self, worker: ActivityWorker, row: StepRecord) -> bool:
        return row.topic in worker._all_topics and (row.activity in self.activities or row.activity in WAITS)

    def _check_none_stuck(self, worker: ActivityWorker) -> None:
        for row in self.store.rows(StepStatus.READY):
            if row.activity not in self.activities and row.activity not in WAITS:
                raise NotDrained(
                    f"{_shown(row)} can't be done here: no activity '{row.activity}' is registered; "
                    f"{nearest(row.activity, self.activities)}"
                )
            if row.topic not in worker._all_topics:
                raise NotDrained(
                    f"{_shown(row)} waits in topic '{row.topic}', where nobody listens; "
                    f"{nearest(row.topic, worker.topics)}"
                )


_OPEN = (StepStatus.READY, StepStatus.RUNNING, StepStatus.WAITING)


def _shown(row: StepRecord) -> str:
    return f"step '{row.step}' of run '{row.workflow_id}' ({row.status.value})"
