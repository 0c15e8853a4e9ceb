"""What a run may become: how far the steps themselves may revise its itinerary."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from paigeant.counts import LARGEST_COUNT, is_count
from paigeant.errors import InvalidDefinition, PolicyViolation, nearest

if TYPE_CHECKING:
    from pydantic import ConfigDict

    from paigeant.slip import RoutingSlip, Step

__all__ = ["MAX_TOTAL_STEPS", "ItineraryPolicy"]

MAX_TOTAL_STEPS = 256
"""Steps that a run may have in all when its policy doesn't say otherwise."""


@dataclass(frozen=True, slots=True)
class ItineraryPolicy:
    """What revisions may do, counted over the whole run whichever worker makes them. None is no limit of its own.

    `allowed`: names of the activities that may be added. `max_added`: steps added in all. `max_total`: steps of the
    run in all, done and still to do. `max_each`: how many of these may be of one and the same activity. `max_depth`:
    how many steps may have added each other down to one: 1 lets only steps of the workflow itself add any.
    `may_remove`: whether steps that are still to do may be taken out, and so the run ended early.
    """

    __pydantic_config__: ClassVar[ConfigDict] = {"extra": "forbid"}

    allowed: Sequence[str] | None = None
    max_added: int | None = None
    max_total: int = MAX_TOTAL_STEPS
    max_each: int | None = None
    max_depth: int | None = None
    may_remove: bool = True

    def __post_init__(self) -> None:
        if self.allowed is not None:
            is_list = isinstance(self.allowed, Iterable) and not isinstance(self.allowed, (str, bytes))
            allowed = tuple(self.allowed) if is_list else (None,)
            if not all(isinstance(name, str) for name in allowed):
                raise InvalidDefinition(f"allowed is a list of activity names, found {self.allowed!r}")
            object.__setattr__(self, "allowed", allowed)
        if not is_count(self.max_total, 1):
            raise InvalidDefinition(
                f"max_total is a number from 1 to {LARGEST_COUNT}, found {self.max_total!r}"
            )
        for name, least in (("max_added", 0), ("max_each", 1), ("max_depth", 0)):
            value = getattr(self, name)
            if value is not None and not is_count(value, least):
                raise InvalidDefinition(
                    f"{name} is a number from {least} to {LARGEST_COUNT}, found {value!r}"
                )
        if not isinstance(self.may_remove, bool):
            raise InvalidDefinition(f"may_remove is True or False, found {self.may_remove!r}")

    def narrowed(self, other: ItineraryPolicy) -> ItineraryPolicy:
        """The policy that allows what both this one and `other` allow."""
        mine, theirs = self.allowed, other.allowed
        both = mine if theirs is None else theirs if mine is None else tuple(x for x in mine if x in theirs)
        return ItineraryPolicy(
            allowed=both,
            max_added=_least(self.max_added, other.max_added),
            max_total=min(self.max_total, other.max_total),
            max_each=_least(self.max_each, other.max_each),
            max_depth=_least(self.max_depth, other.max_depth),
            may_remove=self.may_remove and other.may_remove,
        )

    def check(
        self,
        slip: RoutingSlip,
        added: Iterable[Step],
        remaining: tuple[Step, ...],
        *,
        before: Iterable[Step] = (),
    ) -> None:
        """Raise PolicyViolation unless `slip` may have `added` put in and go on with `remaining` after this step.

        `before`: what the same step had put in already. It counts, but its activities were allowed then.
        """
        new = list(added)
        for step in new:
            if self.allowed is not None and step.activity not in self.allowed:
                raise PolicyViolation(
                    f"activity '{step.activity}' may not be added to this run; {nearest(step.activity, self.allowed)}"
                )
            if self.max_depth is not None and step.depth > self.max_depth:
                raise PolicyViolation(
                    f"activity '{step.activity}' would be number {step.depth} of steps that added each other, "
                    f"the policy allows {self.max_depth}"
                )
        count = slip.added + len(list(before)) + len(new)
        if new and self.max_added is not None and count > self.max_added:
            raise PolicyViolation(f"this would make {count} added steps, the policy allows {self.max_added}")
        total = len(slip.executed) + 1 + len(remaining)
        if new and total > self.max_total:
            raise PolicyViolation(f"this would make {total} steps in all, the policy allows {self.max_total}")
        self._check_each(slip, new, remaining)
        left = {step.id for step in remaining}
        gone = [step.id for step in slip.itinerary[1:] if step.id not in left]
        if gone and not self.may_remove:
            raise PolicyViolation(
                f"this would take out '{gone[0]}'{f' and {len(gone) - 1} more' if gone[1:] else ''}, "
                "and the policy lets no step be taken out"
            )

    def room(self, slip: RoutingSlip, remaining: tuple[Step, ...], *, before: Iterable[Step] = ()) -> int:
        """How many more steps the step that is due on `slip` may add at most; 0 or more."""
        if self.max_depth is not None and slip.depth >= self.max_depth:
            return 0
        rooms = [self.max_total - len(slip.executed) - 1 - len(remaining)]
        if self.max_added is not None:
            rooms.append(self.max_added - slip.added - len(list(before)))
        return max(min(rooms), 0)

    def _check_each(self, slip: RoutingSlip, new: list[Step], remaining: tuple[Step, ...]) -> None:
        if self.max_each is None or not new:
            return
        there = Counter(step.activity for step in (*slip.itinerary[:1], *remaining))
        there.update(done.activity for done in slip.executed)
        for step in new:
            if there[step.activity] > self.max_each:
                raise PolicyViolation(
                    f"this would make {there[step.activity]} steps of activity '{step.activity}', "
                    f"the policy allows {self.max_each}"
                )


def _least(one: int | None, other: int | None) -> int | None:
    return other if one is None else one if other is None else min(one, other)
