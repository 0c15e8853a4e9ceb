"""Has delayed messages delivered when they are due."""

from __future__ import annotations

import asyncio
import contextlib
import logging

from paigeant.transports.redis.streams import LOOK_SECONDS, Streams
from paigeant.transports.redis.trouble import FAILURES

__all__ = ["Lookout"]

log = logging.getLogger("paigeant.transports.redis")


class Lookout:
    """Moves what is due of a topic into its stream when it is; a blocked read gets it from there.

    The end of a blocked read is no clock for that: a server that has nothing else to do is up to 0.1 s late.
    """

    def __init__(self, streams: Streams, topic: str) -> None:
        self._streams = streams
        self._topic = topic
        self._bells: list[bytes] = []
        self._rung = asyncio.Event()
        self._looking = asyncio.get_running_loop().create_task(self._look())

    def ring(self, bell: bytes) -> None:
        """Look again, for something may be due earlier than was known; and delete the entry `bell`."""
        self._bells.append(bell)
        self._rung.set()

    def stop(self) -> None:
        self._looking.cancel()

    async def _look(self) -> None:
        while True:
            self._rung.clear()
            bells, self._bells = self._bells, []
            wait = None
            try:
                wait = await self._streams.move_due(self._topic, bells)
            except Exception as exc:  # whatever it is, what is due later must come
                self._bells.extend(bells)
                if not isinstance(exc, FAILURES):  # of those the reader tells
                    log.exception("looking for due messages of %s failed", self._topic)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOOK_SECONDS if wait is None else min(wait, LOOK_SECONDS)):
                    await self._rung.wait()
