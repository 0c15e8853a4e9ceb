"""The routing slip: what is left to do, what is done, how to undo it. Frozen values; every change makes a new one.

Owns the words for the states of runs and steps and the table of their transitions. What follows a step is decided in
`routing.py`; which rows change with it, in `ledger.py`.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import KW_ONLY, dataclass, field, replace
from enum import StrEnum
from functools import lru_cache
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from paigeant import condition
from paigeant.clock import is_duration
from paigeant.errors import InvalidDefinition
from paigeant.policy import ItineraryPolicy
from paigeant.retry import RetryPolicy
from paigeant.values import evolved

if TYPE_CHECKING:
    from pydantic import ConfigDict

__all__ = [
    "RUN_ENDED",
    "RUN_MOVES",
    "STEP_MOVES",
    "Compensation",
    "Executed",
    "Phase",
    "Revision",
    "RoutingSlip",
    "RunStatus",
    "Step",
    "StepStatus",
    "check_name",
    "identify",
    "is_text",
]


class RunStatus(StrEnum):
    """Where a run is."""

    PENDING = "pending"
    RUNNING = "running"
    WAITING = "waiting"
    COMPENSATING = "compensating"
    COMPLETED = "completed"
    FAILED = "failed"
    COMPENSATED = "compensated"
    COMPENSATION_FAILED = "compensation_failed"
    CANCELLED = "cancelled"


class StepStatus(StrEnum):
    """Where a step, or the undoing of one, is."""

    READY = "ready"
    RUNNING = "running"
    WAITING = "waiting"
    COMPLETED = "completed"
    SKIPPED = "skipped"
    FAILED = "failed"
    COMPENSATED = "compensated"
    COMPENSATION_FAILED = "compensation_failed"


class Phase(StrEnum):
    """Whether a step is done or undone."""

    DO = "do"
    UNDO = "undo"


RUN_ENDED = frozenset(
    {
        RunStatus.COMPLETED,
        RunStatus.FAILED,
        RunStatus.COMPENSATED,
        RunStatus.COMPENSATION_FAILED,
        RunStatus.CANCELLED,
    }
)

RUN_MOVES: dict[RunStatus, frozenset[RunStatus]] = {
    RunStatus.PENDING: frozenset(
        {RunStatus.RUNNING, RunStatus.COMPLETED, RunStatus.FAILED, RunStatus.CANCELLED}
    ),
    RunStatus.RUNNING: frozenset(
        {
            RunStatus.WAITING,
            RunStatus.COMPLETED,
            RunStatus.COMPENSATING,
            RunStatus.FAILED,
            RunStatus.CANCELLED,
        }
    ),
    RunStatus.WAITING: frozenset(
        {RunStatus.RUNNING, RunStatus.COMPENSATING, RunStatus.FAILED, RunStatus.CANCELLED}
    ),
    RunStatus.COMPENSATING: frozenset(
        {RunStatus.COMPENSATED, RunStatus.COMPENSATION_FAILED, RunStatus.CANCELLED}
    ),
    # An ended run stays ended. The two exits are an operator's `runs retry`, never the engine's.
    RunStatus.FAILED: frozenset({RunStatus.RUNNING}),
    RunStatus.COMPENSATION_FAILED: frozenset({RunStatus.COMPENSATING}),
    RunStatus.COMPLETED: frozenset(),
    RunStatus.COMPENSATED: frozenset(),
    RunStatus.CANCELLED: frozenset(),
}
"""The states that may follow each state of a run. `docs/architecture.md` draws this table; a test compares them."""

STEP_MOVES: dict[StepStatus, frozenset[StepStatus]] = {
    StepStatus.READY: frozenset(
        {
            StepStatus.RUNNING,
            StepStatus.COMPLETED,
            StepStatus.SKIPPED,
            StepStatus.COMPENSATED,
            StepStatus.FAILED,
        }
    ),
    StepStatus.RUNNING: frozenset(
        {
            StepStatus.READY,
            StepStatus.WAITING,
            StepStatus.COMPLETED,
            StepStatus.SKIPPED,
            StepStatus.FAILED,
            StepStatus.COMPENSATED,
            StepStatus.COMPENSATION_FAILED,
        }
    ),
    StepStatus.WAITING: frozenset({StepStatus.READY, StepStatus.RUNNING, StepStatus.FAILED}),
    StepStatus.COMPLETED: frozenset({StepStatus.COMPENSATED, StepStatus.COMPENSATION_FAILED}),
    StepStatus.SKIPPED: frozenset(),
    StepStatus.FAILED: frozenset({StepStatus.READY}),
    StepStatus.COMPENSATED: frozenset(),
    # An operator's `runs retry`: the undo is ready again, and what it undoes counts as done until it is undone.
    StepStatus.COMPENSATION_FAILED: frozenset({StepStatus.READY, StepStatus.COMPLETED}),
}
"""The same for steps. READY to COMPLETED, SKIPPED and COMPENSATED are a late first success after the lease was lost."""


_LONGEST_NAME = 200
_UNFIT = re.compile("[\x00-\x1f\ud800-\udfff]")


def is_text(value: str) -> bool:
    """Whether `value` can be kept and shown as a name: no control characters, no half of a surrogate pair."""
    return _UNFIT.search(value) is None


@lru_cache(maxsize=4096)  # the names in a message are those of the one before
def _is_name(value: str) -> bool:
    return bool(value.strip()) and is_text(value)


def check_name(what: str, value: object) -> None:
    """Raise InvalidDefinition unless `value` can name something: `what`, as the error says."""
    if isinstance(value, str) and len(value) <= _LONGEST_NAME and _is_name(value):
        return
    if not isinstance(value, str) or not value.strip():
        raise InvalidDefinition(f"{what} is a non-empty text, found {value!r}")
    raise InvalidDefinition(
        f"{what} has at most {_LONGEST_NAME} characters and no control characters, found {value!r}"
    )


def _are_named(args: object) -> bool:
    if type(args) is dict and not args:  # as most are
        return True
    return isinstance(args, Mapping) and all(isinstance(key, str) for key in args)


@dataclass(frozen=True, slots=True)
class Step:
    """One entry of an itinerary: an activity, and how it is to be done here.

    `id` names the step within its run; a workflow gives it one where it is empty. `args` are arguments that don't come
    from the payload. `when` is a CEL expression over the payload, evaluated where the step would run; false skips the
    step. `retries`, `timeout` (seconds, for each attempt) and `topic` override the activity's own. `depth` is set by
    the engine: how many steps added each other down to this one, 0 for a step of the workflow. `called` is what a step
    is named after that has no `id`: `called`, then `called_2`; without it that is its activity.
    """

    __pydantic_config__: ClassVar[ConfigDict] = {"extra": "forbid"}

    activity: str
    _: KW_ONLY
    id: str = ""
    args: Mapping[str, Any] = field(default_factory=dict)
    when: str | None = None
    retries: int | RetryPolicy | None = None
    timeout: float | None = None
    topic: str | None = None
    depth: int = 0
    called: str = ""

    def __post_init__(self) -> None:
        check_name("the activity of a step", self.activity)
        if self.id:
            check_name("the id of a step", self.id)
        if self.called:
            check_name("what a step is called", self.called)
        if not _are_named(self.args):
            raise InvalidDefinition(
                f"args of step '{self.activity}' are a mapping of parameter names, found {self.args!r}"
            )
        if self.when is not None:
            condition.check(self.when)
        if self.retries is not None:
            RetryPolicy.of(self.retries)
        if self.timeout is not None and not is_duration(self.timeout):
            raise InvalidDefinition(
                f"timeout of step '{self.activity}' is in seconds, above 0 and below 100 years, found {self.timeout!r}"
            )
        if self.topic is not None:
            check_name(f"the topic of step '{self.activity}'", self.topic)


@dataclass(frozen=True, slots=True)
class Executed:
    """A recorded step. `stored`: its output is too large to travel and is read from the store where it is used."""

    __pydantic_config__: ClassVar[ConfigDict] = {"extra": "forbid"}

    step_id: str
    activity: str
    status: StepStatus = StepStatus.COMPLETED
    stored: bool = False


@dataclass(frozen=True, slots=True)
class Compensation:
    """How a recorded step is undone: the activity whose compensation runs, and the topic where its workers listen.

    `args` are those that the step had: `mark_complete` hands them on.
    """

    __pydantic_config__: ClassVar[ConfigDict] = {"extra": "forbid"}

    step_id: str
    activity: str
    topic: str
    args: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Revision:
    """What a step decided about the rest of the run: the itinerary after it, and how many steps it added."""

    __pydantic_config__: ClassVar[ConfigDict] = {"extra": "forbid"}

    itinerary: tuple[Step, ...]
    added: int = 0


@dataclass(frozen=True)
class RoutingSlip:
    """A run's plan and history as it travels.

    Forward, the next step is the first of `itinerary`. Once `ending` is set the run is being undone: the next undo is
    the last of `compensations`, and `ending` tells what the run is when all is undone. `added` counts the steps that
    revisions put in, `undone` and `not_undone` the undos recorded so far, by step id. `deadline` is the instant by
    which the last step must be done. An itinerary of activities' names is one of `Step`s, and each has an id.
    """

    __pydantic_config__: ClassVar[ConfigDict] = {"extra": "forbid"}

    itinerary: tuple[Step, ...] = ()
    executed: tuple[Executed, ...] = ()
    compensations: tuple[Compensation, ...] = ()
    policy: ItineraryPolicy = ItineraryPolicy()
    on_compensation_failure: Literal["continue", "stop"] = "continue"
    added: int = 0
    ending: Literal["failed", "cancelled"] | None = None
    undone: tuple[str, ...] = ()
    not_undone: tuple[str, ...] = ()
    deadline: float | None = None

    def __post_init__(self) -> None:
        # A list could be changed by others, and would be written otherwise than what is read back.
        for name in ("itinerary", "executed", "compensations", "undone", "not_undone"):
            given = getattr(self, name)
            if type(given) is not tuple:
                object.__setattr__(self, name, tuple(given))
        # Names alone, as a workflow may have them, and steps that nobody has named yet.
        if not all(isinstance(entry, Step) and entry.id for entry in self.itinerary):
            taken = {done.step_id for done in self.executed}
            object.__setattr__(self, "itinerary", identify(self.itinerary, taken=taken))

    def next_step(self) -> Step | None:
        """The step to do next; None when nothing is left or the run is being undone."""
        return self.itinerary[0] if self.itinerary and self.ending is None else None

    def next_undo(self) -> Compensation | None:
        """The step to undo next, the last recorded first; None when nothing is left or the run goes forward."""
        return self.compensations[-1] if self.compensations and self.ending is not None else None

    @property
    def place(self) -> int:
        """That of the step to do next: how many steps have been recorded before it."""
        return len(self.executed)

    @property
    def depth(self) -> int:
        """That of the step to do next."""
        return self.itinerary[0].depth if self.itinerary else 0

    @property
    def is_done(self) -> bool:
        """Whether nothing is left to do or to undo."""
        return self.next_step() is None and self.next_undo() is None

    def mark_complete(
        self,
        step: Step | str | None = None,
        *,
        status: StepStatus = StepStatus.COMPLETED,
        compensation: Compensation | None = None,
        revision: Revision | None = None,
        stored: bool = False,
    ) -> RoutingSlip:
        """The slip after its next step was recorded: one step fewer to do, one more done, perhaps one more to undo.

        Whoever names that `step` (or its id) is told when it is another one. Raises ValueError for that, and when there
        is no next step.
        """
        due = self.next_step()
        if due is None:
            raise ValueError("there is no step left to complete")
        if step is not None and step not in (due, due.id, replace(due, id="")):
            named = step.id or step.activity if isinstance(step, Step) else step
            raise ValueError(f"the next step is '{due.id}', not '{named}'")
        done = Executed(due.id, due.activity, status, stored)
        if compensation is not None and due.args:
            compensation = replace(compensation, args=due.args)
        return evolved(
            self,
            itinerary=self.itinerary[1:] if revision is None else revision.itinerary,
            executed=(*self.executed, done),
            compensations=self.compensations if compensation is None else (*self.compensations, compensation),
            added=self.added if revision is None else self.added + revision.added,
        )

    def begin_undo(self, ending: Literal["failed", "cancelled"]) -> RoutingSlip:
        """The slip of a run that turns round: nothing more is done, what was recorded is undone."""
        return evolved(self, ending=ending)

    def mark_undone(self, *, succeeded: bool, step_id: str | None = None) -> RoutingSlip:
        """The slip after an undo was recorded, the next one or that of `step_id`. Raises ValueError for none."""
        found = [undo for undo in self.compensations if step_id is None or undo.step_id == step_id]
        if not found:
            raise ValueError("there is nothing left to undo")
        undo = found[-1]
        ids = (undo.step_id,)
        return evolved(
            self,
            compensations=tuple(entry for entry in self.compensations if entry is not undo),
            undone=self.undone + ids if succeeded else self.undone,
            not_undone=self.not_undone if succeeded else self.not_undone + ids,
        )

    def step_ids(self) -> set[str]:
        """The ids of all steps, done and to do."""
        return {done.step_id for done in self.executed} | {step.id for step in self.itinerary}

    def find(self, name: str) -> Executed | None:
        """The recorded step of this id, else the last one of this activity, else None. Skipped steps don't count."""
        by_activity: Executed | None = None
        for entry in reversed(self.executed):
            if entry.status is StepStatus.SKIPPED:
                continue
            if entry.step_id == name:
                return entry
            if by_activity is None and entry.activity == name:
                by_activity = entry
        return by_activity


def identify(
    steps: Iterable[str | Step], *, taken: Collection[str] = (), parent: str | None = None, first: int = 1
) -> tuple[Step, ...]:
    """`steps` with an id each, none of them in `taken`.

    Without `parent` a step is called like its activity, and `name_2`, `name_3` where that is taken. Steps that step
    `parent` adds are `parent.1`, `parent.2`, counted from `first`: the same again when the step is executed again.
    Where that gets too long a digest stands for a part of it. What says how it is called is called so with a parent,
    too.
    Raises InvalidDefinition for what is no step and for an id that occurs twice.
    """
    entries = [Step(entry) if isinstance(entry, str) else entry for entry in steps]
    for entry in entries:
        if not isinstance(entry, Step):
            # Of a function, or of an agent.
            called = getattr(entry, "__name__", None) or getattr(entry, "name", None)
            hint = f"; write the name of its activity: {called!r}" if isinstance(called, str) else ""
            raise InvalidDefinition(
                f"an itinerary holds activity names and Steps, found {entry!r} of type {type(entry).__name__}{hint}"
            )
    used = set(taken)
    for entry in entries:
        if entry.id and entry.id in used:
            raise InvalidDefinition(f"step id '{entry.id}' occurs twice; give each step its own id")
        if entry.id:
            used.add(entry.id)
    named: list[Step] = []
    for number, entry in enumerate(entries, first):
        if entry.id:
            named.append(replace(entry, called="") if entry.called else entry)
            continue
        called = entry.called or (entry.activity if parent is None else "")
        step_id = called or _added(str(parent), number)
        count = 2
        while called and step_id in used:
            step_id, count = f"{called}_{count}", count + 1
        if step_id in used:
            raise InvalidDefinition(f"step id '{step_id}' occurs twice; give each step its own id")
        used.add(step_id)
        named.append(replace(entry, id=step_id, called=""))
    return tuple(named)


def _added(parent: str, number: int) -> str:
    """The id of the so manieth step that `parent` adds. How long a chain may get is for policies to say."""
    step_id = f"{parent}.{number}"
    if len(step_id) <= _LONGEST_NAME:
        return step_id
    digest = hashlib.sha256(parent.encode()).hexdigest()[:16]
    return f"{parent[: _LONGEST_NAME // 2]}~{digest}.{number}"
