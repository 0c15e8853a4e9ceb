"""How often a step is tried, and how long it waits in between."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from tenacity import RetryCallState, wait_exponential

from paigeant.clock import is_duration
from paigeant.counts import LARGEST_COUNT, is_count
from paigeant.errors import InvalidDefinition

if TYPE_CHECKING:
    from pydantic import ConfigDict

__all__ = ["RetryPolicy", "backoff"]


def backoff(attempt: int, *, base: float, cap: float) -> float:
    """Seconds to wait after `attempt` failed, doubling from `base`, never above `cap`.

    `attempt` counts from 1. Exact, so that tests are: `RetryPolicy` adds the jitter.
    Raises ValueError when `attempt` is below 1.
    Source: "Exponential Backoff And Jitter", AWS Architecture Blog, 2015; the curve is tenacity's.
    """
    if attempt < 1:
        raise ValueError(f"attempts count from 1, found {attempt}")
    state = RetryCallState(retry_object=None, fn=None, args=(), kwargs={})  # type: ignore[arg-type]  # only the number is read
    state.attempt_number = attempt
    return wait_exponential(multiplier=base, max=cap)(state)


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How often, and how long in between: exponential with jitter.

    `attempts` is the most there are, the first included. The wait after attempt n is `base` * 2**(n-1) seconds,
    at most `cap`, of which the share `jitter` (0 to 1) is left to chance.
    """

    __pydantic_config__: ClassVar[ConfigDict] = {"extra": "forbid"}

    attempts: int = 4
    base: float = 0.5
    cap: float = 60.0
    jitter: float = 0.5

    def __post_init__(self) -> None:
        if not is_count(self.attempts, 1):
            raise InvalidDefinition(
                f"a RetryPolicy needs attempts from 1 to {LARGEST_COUNT}, found {self.attempts!r}"
            )
        for value in (self.base, self.cap):
            if value != 0 and not is_duration(value):
                raise InvalidDefinition(
                    "base and cap are seconds, 0 or more and below 100 years; "
                    f"found base={self.base!r}, cap={self.cap!r}"
                )
        if self.jitter != 0 and not (is_duration(self.jitter) and self.jitter <= 1):
            raise InvalidDefinition(f"jitter is a share between 0 and 1, found {self.jitter!r}")

    @classmethod
    def of(cls, retries: int | RetryPolicy) -> RetryPolicy:
        """The policy that `retries` stands for: itself, or up to that many further attempts after the first."""
        if isinstance(retries, RetryPolicy):
            return retries
        if not is_count(retries, 0, LARGEST_COUNT - 1):
            raise InvalidDefinition(
                f"retries is a number from 0 to {LARGEST_COUNT - 1}, or a RetryPolicy; found {retries!r}"
            )
        return cls(attempts=retries + 1)

    def next_delay(self, attempt: int, *, chance: float) -> float:
        """Seconds to wait after `attempt` (from 1) failed; `chance` between 0 and 1 places it within the jitter."""
        exact = backoff(attempt, base=self.base, cap=self.cap)
        return exact * (1 - self.jitter * chance)
