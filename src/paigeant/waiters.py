"""Those who wait for runs to end, woken by commits of any process, and by a look of their own now and then."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection

from paigeant.database import ENDED
from paigeant.errors import PaigeantError, RunNotFound, StoreUnavailable
from paigeant.slip import RUN_ENDED, RunStatus

__all__ = ["Waiters", "ended"]

log = logging.getLogger("paigeant.store")

_LOOK_AGAIN_SECONDS = 2.0
_LOOK_OFTEN_SECONDS = 0.05
_MOST_REMEMBERED = 100_000

_ENDED = frozenset(status.value for status in RUN_ENDED)

Look = Callable[[Collection[str]], Awaitable[dict[str, RunStatus]]]
"""Gives the states of those of the runs that exist."""


def ended(workflow_id: str, status: RunStatus) -> str:
    """What a commit rings for that ends a run."""
    return f"{ENDED}{status.value} {workflow_id}"


class Waiters:
    """Those who wait for runs to end: woken by commits of any process, and by a look now and then.

    `hear` has the ends that others record come to `heard`, and gives what ends that.
    """

    def __init__(
        self, look: Look, *, hears_others: Callable[[], bool], hear: Callable[[], Callable[[], None]]
    ) -> None:
        self._look = look
        self._hears_others = hears_others
        self._hear = hear
        self._leave: Callable[[], None] | None = None
        self._futures: dict[str, set[asyncio.Future[RunStatus]]] = {}
        self._known: set[asyncio.Future[RunStatus]] = set()
        """Of those who know that their run is there."""
        self._looking: asyncio.Task[None] | None = None
        self._open: set[str] = set()

    def attend(self) -> None:
        """Hear of ends from now on. Most processes never wait for any, and need not be woken by all there are."""
        if self._leave is None:
            self._leave = self._hear()

    def started(self, workflow_id: str) -> None:
        """A run was started by this process: until its end is heard there is no need to look whether it has ended."""
        if self._leave is None:  # nobody has waited here yet, so it wouldn't be heard
            return
        if len(self._open) >= _MOST_REMEMBERED:
            self._open.clear()
        self._open.add(workflow_id)

    async def wait(self, workflow_id: str) -> RunStatus:
        future: asyncio.Future[RunStatus] = asyncio.get_running_loop().create_future()
        # Listen first, then look: an end in between is heard.
        self.attend()
        self._futures.setdefault(workflow_id, set()).add(future)
        if self._looking is None or self._looking.done():
            self._looking = asyncio.create_task(self._look_again())
        try:
            if workflow_id not in self._open:
                status = (await self._look([workflow_id])).get(workflow_id)
                if status is None:
                    raise RunNotFound(workflow_id)
                if status in RUN_ENDED:
                    return status
            self._known.add(future)
            return await future
        finally:
            if future.done() and not future.cancelled():
                future.exception()  # or it is logged as nobody's, where a look has told first that the run has ended
            self._known.discard(future)
            futures = self._futures.get(workflow_id, set())
            futures.discard(future)
            if not futures:
                self._futures.pop(workflow_id, None)

    def heard(self, names: frozenset[str]) -> None:
        if "*" in names or ENDED in names:  # what has ended before isn't known
            self._open.clear()
            if self._looking is not None:
                self._looking.cancel()
                self._looking = asyncio.create_task(self._look_again(at_once=True))
        for name in names:
            if not name.startswith(ENDED):
                continue
            status, _, run_id = name.removeprefix(ENDED).partition(" ")
            if status in _ENDED:
                self._end(run_id, RunStatus(status))

    def close(self) -> None:
        """Nobody will tell any more: those who still wait are told that."""
        if self._leave is not None:
            self._leave()
            self._leave = None
        self._open.clear()  # what ends until it is opened again isn't heard
        if self._looking is not None:
            self._looking.cancel()
        for futures in self._futures.values():
            for future in futures:
                if not future.done():
                    future.set_exception(StoreUnavailable("the store was closed while a run was waited for"))

    def _end(self, workflow_id: str, status: RunStatus) -> None:
        self._open.discard(workflow_id)
        for future in self._futures.get(workflow_id, ()):
            if not future.done():
                future.set_result(status)

    def _lose(self, workflow_id: str, known: Collection[asyncio.Future[RunStatus]]) -> None:
        self._open.discard(workflow_id)
        for future in self._futures.get(workflow_id, set()).intersection(known):
            if not future.done():
                future.set_exception(RunNotFound(workflow_id))

    async def _look_again(self, at_once: bool = False) -> None:
        pause = _LOOK_AGAIN_SECONDS if self._hears_others() else _LOOK_OFTEN_SECONDS
        while self._futures:
            if not at_once:
                await asyncio.sleep(pause)
            at_once = False
            # Who comes to know of a run only now may wait for one that began after what this look finds.
            waited_for, known = list(self._futures), self._known.copy()
            try:
                found = await self._look(waited_for)
            except PaigeantError as exc:
                log.warning("can't see which runs have ended, will look again: %s", exc)
                continue
            for run_id in waited_for:
                if run_id not in found:  # it was deleted, or the store is an older one by now
                    self._lose(run_id, known)
                elif found[run_id] in RUN_ENDED:
                    self._end(run_id, found[run_id])
