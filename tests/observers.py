"""What observers are told, for tests that look at it or wait for it."""

from __future__ import annotations

import asyncio
from collections import Counter

from tests.patience import PATIENCE

from paigeant.observer import Event

__all__ = ["Seen"]


class Seen:
    """An observer that lets a test wait for what it is told; it keeps the events unless they would be too many."""

    def __init__(self, *, keeps: bool = True) -> None:
        self.events: list[Event] = []
        self._keeps = keeps
        self._told: Counter[str] = Counter()
        self._changed = asyncio.Event()

    def observe(self, event: Event) -> None:
        """Note it."""
        if self._keeps:
            self.events.append(event)
        self._told[event.name] += 1
        self._changed.set()

    def names(self, *beginnings: str) -> list[str]:
        """The names of the events, in their order; of those alone that begin so."""
        return [event.name for event in self.events if event.name.startswith(beginnings or "")]

    def named(self, name: str) -> list[Event]:
        """The events of this name."""
        return [event for event in self.events if event.name == name]

    def count(self, name: str) -> int:
        """How often `name` was told."""
        return self._told[name]

    async def wait_for(self, name: str, count: int = 1) -> None:
        """Wait until `name` was told `count` times."""
        async with asyncio.timeout(PATIENCE):
            while self.count(name) < count:
                self._changed.clear()
                await self._changed.wait()
