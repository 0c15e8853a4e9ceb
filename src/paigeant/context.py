"""StepContext: what an activity may know of its step, and what it may decide about the rest of its run."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any

from pydantic_core import from_json

from paigeant import codec
from paigeant.clock import as_datetime
from paigeant.errors import InvalidDefinition, OutputInvalid
from paigeant.journal import Journal, Place, Unit, current_place
from paigeant.security import SecurityContext
from paigeant.slip import Revision, RoutingSlip, Step, check_name, identify
from paigeant.store import RunValues, StepKey

__all__ = ["StepContext"]


@dataclass(slots=True, eq=False)
class StepContext:
    """A step while it is being done. Variables and revisions take effect with the result of the attempt that made them.

    `attempt` counts from 1. `idempotency_key` is the same for all attempts of this step: hand it to outside systems, so
    that they do a thing once however often it is asked for. `deadline` is the instant by which the run must be done.
    """

    workflow_id: str
    workflow: str
    step_id: str
    activity: str
    attempt: int
    trace_id: str
    correlation_id: str
    idempotency_key: str
    deadline: datetime | None
    identity: SecurityContext | None
    log: logging.LoggerAdapter[logging.Logger]
    _key: StepKey
    _slip: RoutingSlip
    _store: RunValues
    _variables: dict[str, bytes] = field(default_factory=dict)
    _draft: list[Step] | None = None
    _added: list[Step] = field(default_factory=list)
    _inserted: int = 0
    _usage: bytes | None = None
    _is_fresh: bool = False
    _place: Place = field(init=False)

    def __post_init__(self) -> None:
        journal = Journal(self._key, self._store, self.idempotency_key, is_fresh=self._is_fresh)
        self._place = Place(journal)

    # -- variables

    async def save_variable(self, key: str, value: Any) -> None:
        """Set a variable of the run, once this attempt has succeeded. Raises OutputInvalid for what isn't JSON."""
        check_name("the name of a variable", key)
        try:
            self._variables[key] = codec.dump(value)
        except codec.JsonInvalid as exc:
            raise OutputInvalid(f"variable '{key}' can't be written as JSON: {exc}") from exc

    async def load_variable(self, key: str, default: Any = None) -> Any:
        """The variable as this attempt or an earlier step left it, as JSON gives it back, or `default`."""
        if key in self._variables:
            return from_json(self._variables[key])
        return await self._store.load_variable(self.workflow_id, key, default)

    async def once(self, name: str, function: Callable[..., Any], *args: Any) -> Any:
        """What `function(*args)` gives, recorded under `name`: a later attempt of this step gets the record instead.

        Gives the value as JSON gives it back, at the first time too. Using a name again in one attempt counts on, for
        each unit within which it is used. A crash between the call and its record repeats the call: hand
        `effect_key()` to what it calls.
        """
        check_name("the name of what is done once", name)

        async def produce() -> bytes:
            value = function(*args)
            if inspect.isawaitable(value):
                value = await value
            try:
                return codec.dump(value)
            except codec.JsonInvalid as exc:
                raise OutputInvalid(f"what '{name}' returned can't be written as JSON: {exc}") from exc

        place = current_place()
        if place is None or place.journal is not self._place.journal:
            place = self._place
        done = await place.do(place.name(name), Unit(f"'{name}'"), produce)
        return from_json(done.value)

    # -- revisions

    @property
    def remaining(self) -> tuple[Step, ...]:
        """The steps after this one, as they stand now."""
        return tuple(self._draft) if self._draft is not None else self._slip.itinerary[1:]

    def insert(self, *steps: str | Step) -> None:
        """Put `steps` right after this one, behind those that it inserted already. Raises PolicyViolation."""
        place = self._inserted
        self._revise(steps, lambda rest, new: [*rest[:place], *new, *rest[place:]])
        self._inserted += len(steps)

    def append(self, *steps: str | Step) -> None:
        """Put `steps` at the end of the itinerary. Raises PolicyViolation."""
        self._revise(steps, lambda rest, new: [*rest, *new])

    def replace(self, *steps: str | Step) -> None:
        """Do `steps` instead of all that is left. Raises PolicyViolation."""
        self._revise(steps, lambda rest, new: new)
        self._inserted = len(steps)

    def terminate(self) -> None:
        """Do nothing after this step: the run completes with it."""
        self._draft = []
        self._inserted = 0

    def _revise(
        self, steps: tuple[str | Step, ...], change: Callable[[list[Step], list[Step]], list[Step]]
    ) -> None:
        taken = self._slip.step_ids() | {step.id for step in self._added}
        first = len(self._added) + 1
        new = [
            replace(step, args=_plain_args(step))
            for step in identify(steps, taken=taken, parent=self.step_id, first=first)
        ]
        added = [*self._added, *new]
        draft = change(list(self.remaining), new)
        self._slip.policy.check(self._slip, added, tuple(draft))
        self._added, self._draft = added, draft

    def _revision(self) -> Revision | None:
        return None if self._draft is None else Revision(tuple(self._draft), len(self._added))


def _plain_args(step: Step) -> Mapping[str, Any]:
    try:
        args: Mapping[str, Any] = codec.plain(dict(step.args)) if step.args else step.args
    except codec.JsonInvalid as exc:
        raise InvalidDefinition(
            f"args of step '{step.id or step.activity}' can't be written as JSON: {exc}"
        ) from exc
    return args


def deadline_of(slip: RoutingSlip) -> datetime | None:
    """The run's deadline as a datetime."""
    return as_datetime(slip.deadline)
