"""The one place that reads the wall clock.

Instants are seconds since 1970 (UTC) as floats, until a surface shows them.
"""

from __future__ import annotations

import time
from datetime import UTC, datetime
from typing import Protocol

__all__ = ["Clock", "SystemClock", "as_datetime"]


class Clock(Protocol):
    """What tells the time to a store that has no clock of its own."""

    def now(self) -> float:
        """Seconds since 1970-01-01 UTC."""
        ...


class SystemClock:
    """The clock of this host. An embedded database has no other, so it is the database's clock as well."""

    def now(self) -> float:
        """Seconds since 1970-01-01 UTC."""
        return time.time()


def as_datetime(instant: float | None) -> datetime | None:
    """The aware UTC datetime of `instant`, None for None."""
    return None if instant is None else datetime.fromtimestamp(instant, UTC)
