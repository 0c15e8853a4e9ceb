"""The one place that reads the wall clock.

Instants are seconds since 1970 (UTC) as floats, until a surface shows them.
"""

from __future__ import annotations

import time
from datetime import UTC, datetime
from typing import Protocol

__all__ = ["LAST_INSTANT", "Clock", "SystemClock", "as_datetime", "is_duration"]

LAST_INSTANT = 253402300799.0
"""The last second of the year 9999: what is later is no date."""

_CENTURY = 36525 * 86400.0


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


def is_duration(value: object) -> bool:
    """Whether `value` is a time in seconds: a number above 0 and below 100 years, so that it ends at a date."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < _CENTURY


def as_datetime(instant: float | None) -> datetime | None:
    """The aware UTC datetime of `instant`, None for None."""
    return None if instant is None else datetime.fromtimestamp(instant, UTC)
