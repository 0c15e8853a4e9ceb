"""A clock that stands still until it is set."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime

__all__ = ["ManualClock"]

_START = datetime(2026, 1, 1, tzinfo=UTC)


class ManualClock:
    """A `Clock` for tests. It begins at `start`, and moves only forward."""

    def __init__(self, start: datetime = _START) -> None:
        self._now = start.timestamp()
        self._listeners: list[Callable[[], None]] = []

    def __repr__(self) -> str:
        return f"ManualClock({datetime.fromtimestamp(self._now, UTC).isoformat()})"

    def now(self) -> float:
        """Seconds since 1970-01-01 UTC."""
        return self._now

    def advance(self, seconds: float) -> None:
        """Let `seconds` pass. Raises ValueError for less than none: time doesn't run backwards."""
        if not seconds >= 0:
            raise ValueError(f"a clock moves forward, found {seconds!r} seconds")
        self._set(self._now + seconds)

    def set(self, instant: datetime | float) -> None:
        """Let time pass until `instant`: an aware datetime, or seconds since 1970. Raises ValueError for the past."""
        target = instant.timestamp() if isinstance(instant, datetime) else instant
        if not target >= self._now:
            raise ValueError(f"a clock moves forward: it is {self!r}, found {instant!r}")
        self._set(target)

    def on_move(self, heard: Callable[[], None]) -> Callable[[], None]:
        """Call `heard` after each move. Gives what ends that."""
        self._listeners.append(heard)
        return lambda: self._listeners.remove(heard)

    def _set(self, instant: float) -> None:
        self._now = instant
        for heard in tuple(self._listeners):
            heard()
