"""Retention: much is deleted by many short transactions, so that workers go on meanwhile."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable

from paigeant.errors import StoreUnavailable

__all__ = ["delete_all"]

_FIRST = 10
_MOST = 500
_SECONDS = 0.5
"""What one of the transactions is to take: a database lets none take longer than some seconds."""


async def delete_all(delete: Callable[[int], Awaitable[int]]) -> int:
    """Have `delete` delete so many at most, gives how many, again until that is 0; gives how many in all.

    How long one takes nobody knows before: a run may have megabytes of outputs, or none. So it begins with few, goes on
    with as many as the last ones tell, and tries fewer where so many can't be done. Raises StoreUnavailable when not
    even one can; what was deleted so far is gone.
    """
    deleted, limit = 0, _FIRST
    while True:
        began = time.monotonic()
        try:
            found = await delete(limit)
        except StoreUnavailable:
            if limit == 1:
                raise
            limit = max(limit // 10, 1)
            continue
        if not found:
            return deleted
        deleted += found
        seconds = max(time.monotonic() - began, 0.001)
        limit = max(1, min(int(found * _SECONDS / seconds), _MOST))
