"""Those who wait for runs to end, woken by commits of any process, and by a look of their own now and then."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection

from paigeant.errors import PaigeantError, RunNotFound
from paigeant.slip import RUN_ENDED, RunStatus

__all__ = ["Waiters", "ended"]

log = logging.getLogger("paigeant.store")

_LOOK_AGAIN_SECONDS = 2.0
_LOOK_OFTEN_SECONDS = 0.05

Look = Callable[[Collection[str]], Awaitable[dict[str, RunStatus]]]
"""Gives the states of those of the runs that exist."""


def ended(workflow_id: str, status: RunStatus) -> str:
    """What a commit rings for that ends a run."""
    return f"ended {status.value} {workflow_id}"


class Waiters:
    """Those who wait for runs to end: woken by commits of any process, and by a look now and then."""

    def __init__(self, look: Look, *, hears_others: Callable[[], bool]) -> None:
        self._look = look
        self._hears_others = hears_others
        self._futures: dict[str, set[asyncio.Future[RunStatus]]] = {}
        self._looking: asyncio.Task[None] | None = None

    async def wait(self, workflow_id: str) -> RunStatus:
        future: asyncio.Future[RunStatus] = asyncio.get_running_loop().create_future()
        # Listen first, then look: an end in between is heard.
        self._futures.setdefault(workflow_id, set()).add(future)
        try:
            status = (await self._look([workflow_id])).get(workflow_id)
            if status is None:
                raise RunNotFound(workflow_id)
            if status in RUN_ENDED:
                return status
            if self._looking is None or self._looking.done():
                self._looking = asyncio.create_task(self._look_again())
            return await future
        finally:
            futures = self._futures.get(workflow_id, set())
            futures.discard(future)
            if not futures:
                self._futures.pop(workflow_id, None)

    def heard(self, names: frozenset[str]) -> None:
        if "*" in names and self._looking is not None:
            self._looking.cancel()
            self._looking = asyncio.create_task(self._look_again(at_once=True))
        for name in names:
            kind, _, rest = name.partition(" ")
            if kind == "ended":
                status, _, run_id = rest.partition(" ")
                self._end(run_id, RunStatus(status))

    def close(self) -> None:
        if self._looking is not None:
            self._looking.cancel()

    def _end(self, workflow_id: str, status: RunStatus) -> None:
        for future in self._futures.get(workflow_id, ()):
            if not future.done():
                future.set_result(status)

    async def _look_again(self, at_once: bool = False) -> None:
        pause = _LOOK_AGAIN_SECONDS if self._hears_others() else _LOOK_OFTEN_SECONDS
        while self._futures:
            if not at_once:
                await asyncio.sleep(pause)
            at_once = False
            try:
                found = await self._look(list(self._futures))
            except PaigeantError as exc:
                log.warning("can't see which runs have ended, will look again: %s", exc)
                continue
            for run_id, status in found.items():
                if status in RUN_ENDED:
                    self._end(run_id, status)
