"""How slow the machine is at the time of a test: what a bound of time allows for work there depends on it."""

from __future__ import annotations

import time

__all__ = ["Pace"]

_USUAL_SECONDS = 0.22
"""What the piece of work takes on a machine like the one on which the bounds were set, when nobody else uses it."""


class Pace:
    """Looks how slow the machine is, when it is made and whenever it is told to."""

    def __init__(self) -> None:
        self.slowness = 1.0
        """How many times longer than usual work took when that was worst; never less than once."""
        self.look()

    def look(self) -> None:
        """Look now: in the middle of what is bounded, and behind it."""
        began = time.perf_counter()
        for _ in range(8_000_000):
            pass
        self.slowness = max(self.slowness, (time.perf_counter() - began) / _USUAL_SECONDS)

    def seconds(self, usual: float) -> float:
        """For how long what takes no longer than `usual` on that machine may take on this one."""
        self.look()
        return usual * self.slowness
