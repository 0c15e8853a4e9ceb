"""RetryPolicy and its backoff."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paigeant import RetryPolicy
from paigeant.errors import InvalidDefinition
from paigeant.retry import backoff


def test_the_wait_doubles_up_to_the_cap() -> None:
    """Waits are base, 2 base, 4 base ..., never above the cap."""
    assert [backoff(n, base=0.5, cap=3.0) for n in range(1, 6)] == [0.5, 1.0, 2.0, 3.0, 3.0]


def test_a_huge_attempt_waits_the_cap() -> None:
    """However often it failed, the wait is a number."""
    assert backoff(100_000, base=0.5, cap=60.0) == 60.0


def test_attempts_count_from_one() -> None:
    """There is no attempt 0."""
    with pytest.raises(ValueError, match="from 1"):
        backoff(0, base=1, cap=1)


def test_retries_are_further_attempts() -> None:
    """retries=n means up to n attempts after the first."""
    assert RetryPolicy.of(3).attempts == 4
    assert RetryPolicy.of(0).attempts == 1
    policy = RetryPolicy(attempts=9)
    assert RetryPolicy.of(policy) is policy


@given(
    attempt=st.integers(1, 200),
    base=st.floats(0, 1e6),
    cap=st.floats(0, 1e6),
    jitter=st.floats(0, 1),
    chance=st.floats(0, 1),
)
def test_a_wait_is_within_its_jitter(
    attempt: int, base: float, cap: float, jitter: float, chance: float
) -> None:
    """Chance takes away at most the share `jitter` of the exact wait."""
    exact = backoff(attempt, base=base, cap=cap)
    delay = RetryPolicy(base=base, cap=cap, jitter=jitter).next_delay(attempt, chance=chance)
    assert 0 <= exact * (1 - jitter) * (1 - 1e-9) <= delay <= exact <= cap


@pytest.mark.parametrize(
    "fields",
    [
        {"attempts": 0},
        {"attempts": True},
        {"attempts": 1.5},
        {"attempts": "3"},
        {"attempts": 2**31},
        {"base": -1},
        {"base": "1"},
        {"base": float("nan")},
        {"cap": -0.1},
        {"cap": float("inf")},
        {"cap": None},
        {"cap": 36525 * 86400.0},
        {"base": True},
        {"jitter": 1.1},
        {"jitter": -0.1},
        {"jitter": float("nan")},
        {"jitter": "half"},
    ],
)
def test_a_policy_that_can_t_work_is_refused(fields: dict[str, Any]) -> None:
    """What isn't a number in range is an error where it is written, not at the first failure."""
    with pytest.raises(InvalidDefinition, match=next(iter(fields))):
        RetryPolicy(**fields)


@pytest.mark.parametrize("retries", [-1, True, 1.0, "2", None, 2**31 - 1])
def test_retries_that_are_no_number_are_refused(retries: Any) -> None:
    """retries is a number of 0 or more that any database holds, or a policy."""
    with pytest.raises(InvalidDefinition, match="retries"):
        RetryPolicy.of(retries)
