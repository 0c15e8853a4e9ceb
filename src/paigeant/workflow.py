"""Workflow: a named itinerary with what holds for each of its runs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from paigeant.clock import is_duration
from paigeant.errors import InvalidDefinition, PolicyViolation
from paigeant.policy import ItineraryPolicy
from paigeant.slip import RoutingSlip, Step, identify, is_text

__all__ = ["Workflow"]


@dataclass(frozen=True, slots=True, init=False)
class Workflow:
    """A named itinerary, the same for all runs until their steps revise it.

    `steps` are activity names or `Step`s; none at all makes a run that completes at once. `input_model` is a pydantic
    model, dataclass or other type that the input of a run must fit. `deadline` is the time in seconds that a run may
    take from its dispatch until its last result. `policy` bounds what steps may add. `on_compensation_failure` says
    what happens when an undo fails for good: go on with the others, or stop there; either way the run ends
    `compensation_failed` and can be taken up again with `Run.retry()`.
    """

    name: str
    steps: tuple[Step, ...]
    input_model: Any
    deadline: float | None
    policy: ItineraryPolicy
    on_compensation_failure: Literal["continue", "stop"]
    description: str

    def __init__(
        self,
        name: str,
        steps: Iterable[str | Step] = (),
        *,
        input_model: Any = None,
        deadline: float | None = None,
        policy: ItineraryPolicy | None = None,
        on_compensation_failure: Literal["continue", "stop"] = "continue",
        description: str = "",
    ) -> None:
        if not isinstance(name, str) or not name.strip() or len(name) > 200 or not is_text(name):
            raise InvalidDefinition(
                "a workflow needs a name of 1 to 200 characters without control characters, "
                f"found {name!r}: Workflow('name', ['activity', ...])"
            )
        if isinstance(steps, (str, bytes)) or not isinstance(steps, Iterable):
            raise InvalidDefinition(f"steps of workflow '{name}' are a list, found {steps!r}")
        if deadline is not None and not is_duration(deadline):
            raise InvalidDefinition(
                f"deadline of workflow '{name}' is in seconds, above 0 and below 100 years, found {deadline!r}"
            )
        if on_compensation_failure not in ("continue", "stop"):
            raise InvalidDefinition(
                f"on_compensation_failure of workflow '{name}' is 'continue' or 'stop', "
                f"found {on_compensation_failure!r}"
            )
        try:
            named = identify(steps)
        except InvalidDefinition as exc:
            raise type(exc)(f"workflow '{name}': {exc}") from exc
        policy = policy or ItineraryPolicy()
        if len(named) > policy.max_total:
            raise PolicyViolation(
                f"workflow '{name}' has {len(named)} steps, its policy allows {policy.max_total} in all"
            )
        for attribute, value in (
            ("name", name),
            ("steps", named),
            ("input_model", input_model),
            ("deadline", None if deadline is None else float(deadline)),
            ("policy", policy),
            ("on_compensation_failure", on_compensation_failure),
            ("description", description),
        ):
            object.__setattr__(self, attribute, value)

    def slip(self, *, now: float) -> RoutingSlip:
        """A new slip with all still to do, for a run that is dispatched at `now`."""
        return RoutingSlip(
            itinerary=self.steps,
            policy=self.policy,
            on_compensation_failure=self.on_compensation_failure,
            deadline=None if self.deadline is None else now + self.deadline,
        )
