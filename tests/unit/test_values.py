"""Values that are made in passing are dataclasses, and copies of frozen ones have all but what was changed."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, dataclass, field, replace

import pytest

from paigeant import RoutingSlip
from paigeant.message import PaigeantMessage
from paigeant.values import evolved, value


@value
class _Mark:
    """A value with a field that doesn't count."""

    name: str
    seen: float = field(default=0.0, compare=False)


@dataclass(frozen=True)
class _Plan:
    """A frozen one."""

    steps: tuple[str, ...]
    done: int = 0


def test_values_are_compared_hashed_and_replaced_by_their_fields() -> None:
    """As those of any dataclass."""
    assert _Mark("a", 1.0) == _Mark("a", 2.0) != _Mark("b", 1.0)
    assert len({_Mark("a", 1.0), _Mark("a", 2.0), _Mark("b")}) == 2
    assert replace(_Mark("a", 1.0), name="b").seen == 1.0
    with pytest.raises(AttributeError):
        _Mark("a").other = 1  # type: ignore[attr-defined]


def test_an_evolved_value_has_the_changes_and_leaves_the_first_alone() -> None:
    """Only what is named differs."""
    plan = _Plan(("a", "b"))
    assert evolved(plan, done=1) == _Plan(("a", "b"), 1)
    assert plan == _Plan(("a", "b"))


def test_a_field_that_is_not_there_is_refused() -> None:
    """A misspelt one would be lost without a word."""
    with pytest.raises(TypeError, match="_Plan has no doen, what"):
        evolved(_Plan(()), doen=1, what=2)


def test_what_users_hold_cannot_be_changed() -> None:
    """Slips and messages stay frozen, also those that were evolved."""
    slip = RoutingSlip().begin_undo("failed")
    message = PaigeantMessage("m", "r", slip).evolve(workflow="w")
    with pytest.raises(FrozenInstanceError):
        slip.added = 1  # type: ignore[misc]
    with pytest.raises(FrozenInstanceError):
        message.payload = {}  # type: ignore[misc]
