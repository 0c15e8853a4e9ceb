"""A worker at work, for as long as a test needs it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from paigeant import ActivityWorker

__all__ = ["working"]


@asynccontextmanager
async def working(worker: ActivityWorker) -> AsyncIterator[None]:
    """The worker at work."""
    task = asyncio.create_task(worker.run())
    try:
        yield
    finally:
        await worker.stop(5)
        await task
