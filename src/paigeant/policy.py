"""What a run may become: how far the steps themselves may revise its itinerary."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from paigeant.errors import InvalidDefinition, PolicyViolation, nearest

if TYPE_CHECKING:
    from pydantic import ConfigDict

    from paigeant.slip import RoutingSlip, Step

__all__ = ["MAX_TOTAL_STEPS", "ItineraryPolicy"]

MAX_TOTAL_STEPS = 256
"""Steps that a run may have in all when its policy doesn't say otherwise."""


@dataclass(frozen=True, slots=True)
class ItineraryPolicy:
    """What revisions may do, counted over the whole run whichever worker makes them.

    `allowed`: names of the activities that may be added, None for any. `max_added`: steps added in all, None for no
    limit but the next. `max_total`: steps of the run in all, done and still to do.
    """

    __pydantic_config__: ClassVar[ConfigDict] = {"extra": "forbid"}

    allowed: tuple[str, ...] | None = None
    max_added: int | None = None
    max_total: int = MAX_TOTAL_STEPS

    def __post_init__(self) -> None:
        if self.allowed is not None:
            is_list = isinstance(self.allowed, Iterable) and not isinstance(self.allowed, (str, bytes))
            allowed = tuple(self.allowed) if is_list else (None,)
            if not all(isinstance(name, str) for name in allowed):
                raise InvalidDefinition(f"allowed is a list of activity names, found {self.allowed!r}")
            object.__setattr__(self, "allowed", allowed)
        if self.max_added is not None and not _is_count(self.max_added, 0):
            raise InvalidDefinition(f"max_added is a number of 0 or more, found {self.max_added!r}")
        if not _is_count(self.max_total, 1):
            raise InvalidDefinition(f"max_total is a number of 1 or more, found {self.max_total!r}")

    def check(self, slip: RoutingSlip, added: Iterable[Step], remaining: tuple[Step, ...]) -> None:
        """Raise PolicyViolation unless `slip` may have `added` put in and go on with `remaining` after this step."""
        new = list(added)
        for step in new:
            if self.allowed is not None and step.activity not in self.allowed:
                raise PolicyViolation(
                    f"activity '{step.activity}' may not be added to this run; {nearest(step.activity, self.allowed)}"
                )
        count = slip.added + len(new)
        if self.max_added is not None and count > self.max_added:
            raise PolicyViolation(f"this would make {count} added steps, the policy allows {self.max_added}")
        total = len(slip.executed) + 1 + len(remaining)
        if new and total > self.max_total:
            raise PolicyViolation(f"this would make {total} steps in all, the policy allows {self.max_total}")


def _is_count(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least
