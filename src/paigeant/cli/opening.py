"""How a worker opens a store and transport that may not be there yet: it tells so, and tries until they are."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from typing import TYPE_CHECKING

from paigeant.errors import StoreDamaged, StoreUnavailable, TransportUnavailable

if TYPE_CHECKING:
    from collections.abc import Callable

    from paigeant.app import Paigeant

__all__ = ["AWAY", "open_unless", "pause_after"]

log = logging.getLogger("paigeant.worker")

AWAY = (StoreUnavailable, TransportUnavailable)
"""What waiting may mend. Settings that can't work and tables that don't fit are other errors, and told at once."""

_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 0.5, 5.0


def pause_after(tries: int, *, chance: float) -> float:
    """Seconds until the next try: doubling up to 5, less up to a half, so that workers don't come all at once."""
    longest = min(_PAUSE_SECONDS * 2.0 ** min(tries - 1, 10), _LONGEST_PAUSE_SECONDS)
    return longest * (1 - 0.5 * chance)


async def open_unless(
    stopped: asyncio.Event, app: Paigeant, *, seconds: float | None, waits: Callable[[str | None], None]
) -> bool:
    """Open `app`, whose servers may be away for so many seconds, None: for ever. False when it was `stopped` before.

    `waits` is told what for: the kind of error, once there is one, and None at the end. Raises what opening raises: at
    once where waiting mends nothing, and when the time is up.
    """
    opening = asyncio.create_task(_open(app, seconds, waits))
    stopping = asyncio.create_task(stopped.wait())
    await asyncio.wait({opening, stopping}, return_when=asyncio.FIRST_COMPLETED)
    for task in (opening, stopping):
        task.cancel()
    await asyncio.wait({opening, stopping})
    if opening.cancelled():
        return False
    opening.result()
    return True


async def _open(app: Paigeant, seconds: float | None, waits: Callable[[str | None], None]) -> None:
    began, tries = time.monotonic(), 0
    waits("it opens them")
    while True:
        try:
            await app.__aenter__()
        except StoreDamaged:
            raise
        except AWAY as exc:
            tries += 1
            pause = pause_after(tries, chance=random.random())
            if seconds is not None and time.monotonic() + pause - began > seconds:
                raise
            waits(type(exc).__name__)
            log.warning("worker.waiting", extra={"error": str(exc), "again_in": round(pause, 1)})
            await asyncio.sleep(pause)
            continue
        waits(None)
        if tries:
            log.info("worker.connected", extra={"tries": tries + 1})
        return
