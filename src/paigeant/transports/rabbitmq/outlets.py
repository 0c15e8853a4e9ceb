"""Which channel a message is published on: one for all queues, and one of its own for a queue that confirms nothing.

RabbitMQ reads nothing more from a channel whose first message to a quorum queue that queue doesn't take, nor behind 32
that it hasn't taken: for a minute and more where too few replicas are there. What goes to others must not stand behind.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from paigeant.transports.rabbitmq.link import Link, Single
from paigeant.transports.rabbitmq.outlet import Outlet

__all__ = ["Outlets"]

_PROMPT_SECONDS = 1.0
"""What a queue hasn't confirmed after this time, though the broker answers, it may not confirm at all."""


class Outlets:
    """The outlets of one connection. `open` opens one; `patience` is for how long its callers wait for a confirm."""

    def __init__(self, link: Link, open: Callable[[], Awaitable[Outlet]], patience: float) -> None:
        self._link = link
        self._open = open
        self._patience = patience
        self._common = _Way(open)
        self._apart: dict[str, _Way] = {}
        self._watching: asyncio.Task[None] | None = None

    async def of(self, queue: str) -> Outlet:
        """The one to publish on. Raises what opening it does."""
        return await self._apart.get(queue, self._common).get()

    async def common(self) -> Outlet:
        """The one of all queues that confirm what they are sent. Raises what opening it does."""
        return await self._common.get()

    def watch(self) -> None:
        """Have a queue set apart that doesn't confirm what is about to be sent, or anything before it."""
        if self._watching is None or self._watching.done():
            self._watching = self._link.start(self._watch())

    def confirmed(self, queue: str, outlet: Outlet) -> None:
        """`queue` has taken a message on `outlet`: what else it is sent may go the way of all."""
        if queue in self._apart and self._apart[queue].outlet is outlet:
            del self._apart[queue]
            self._link.start(self._leave_later(outlet))

    def retire(self, outlet: Outlet | None) -> None:
        """Send nothing more on its channel, and close that when nobody waits for a confirm on it."""
        for way in (self._common, *self._apart.values()):
            if outlet is not None and way.outlet is outlet:
                way.outlet = None
                self._link.start(self._leave_later(outlet))

    async def drop(self) -> None:
        """Forget all of them; their channels end with the connection."""
        ways = (self._common, *self._apart.values())
        self._apart.clear()
        for way in ways:
            await way.drop()

    async def _watch(self) -> None:
        common = self._common
        while (outlet := common.outlet) is not None and (oldest := outlet.oldest) is not None:
            await asyncio.sleep(_PROMPT_SECONDS)
            # All may be slow. But what was asked after it, and is answered before it, isn't.
            if outlet.awaits(oldest) and await self._link.answers():
                queue = outlet.awaits(oldest)
                if queue is not None and outlet is common.outlet:
                    self._set_apart(queue, outlet)

    def _set_apart(self, queue: str, outlet: Outlet) -> None:
        if queue in self._apart:  # sent before that was known
            self.retire(outlet)
        else:
            self._apart[queue] = _Way(self._open, outlet)
            self._common.outlet = None

    async def _leave_later(self, outlet: Outlet) -> None:
        await asyncio.sleep(self._patience)
        outlet.leave()


class _Way:
    """An outlet that is opened when it is asked for, and anew when it has closed."""

    def __init__(self, open: Callable[[], Awaitable[Outlet]], outlet: Outlet | None = None) -> None:
        self.outlet = outlet
        self._make = open
        self._single = Single(self._opened)

    async def get(self) -> Outlet:
        outlet = self.outlet
        return await self._single.get() if outlet is None or outlet.is_closed else outlet

    async def drop(self) -> None:
        await self._single.cancel()
        self.outlet = None

    async def _opened(self) -> Outlet:
        self.outlet = await self._make()
        return self.outlet
