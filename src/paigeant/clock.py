"""The one place that reads the wall clock.

Instants are seconds since 1970 (UTC) as floats, until a surface shows them.
"""

from __future__ import annotations

import math
import time
from datetime import UTC, datetime
from typing import Protocol

__all__ = ["Clock", "SystemClock", "as_datetime", "is_duration"]


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
    """Whether `value` is a time in seconds: a finite number above 0. JSON can't hold an infinite one."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < math.inf


def as_datetime(instant: float | None) -> datetime | None:
    """The aware UTC datetime of `instant`, None for None."""
    return None if instant is None else datetime.fromtimestamp(instant, UTC)
