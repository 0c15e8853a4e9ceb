"""StepContext: what an activity may know of its step, and what it may decide about the rest of its run."""

from __future__ import annotations

import inspect
import logging
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any

from pydantic_core import from_json

from paigeant import codec
from paigeant.behalf import Acting
from paigeant.clock import as_datetime, is_duration
from paigeant.errors import InvalidDefinition, OutputInvalid, PolicyViolation, ScopeMissing
from paigeant.identity import GRANT_SIGNAL, SecurityContext, check_scopes
from paigeant.journal import Journal
from paigeant.place import Place, Unit, current_place
from paigeant.policy import ItineraryPolicy
from paigeant.secret import SecretToken
from paigeant.slip import Revision, RoutingSlip, Step, check_name, identify
from paigeant.store import REQUEST_SIGNAL, RequestKind, RunValues, StepKey

__all__ = ["StepContext", "check_signal"]

Change = Callable[[list[Step], list[Step]], list[Step]]


@dataclass(slots=True, eq=False)
class StepContext:
    """A step while it is being done. Variables and revisions take effect with the result of the attempt that made them.

    `attempt` counts from 1. `idempotency_key` is the same for all attempts of this step: hand it to outside systems, so
    that they do a thing once however often it is asked for. `deadline` is the instant by which the run must be done.
    `identity` says for whom the run acts; in an activity that names `scopes`, it is what their token said just now.
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
    _acting: Acting | None = None
    _now: Callable[[], float] = time.time
    _tell: Callable[..., None] = lambda *_, **__: None
    _begins: Callable[[], None] | None = None
    _place: Place = field(init=False)
    _policy: ItineraryPolicy = field(init=False)

    def __post_init__(self) -> None:
        self._policy = self._slip.policy
        journal = Journal(
            self._key, self._store, self.idempotency_key, is_fresh=self._is_fresh, now=self._now
        )
        self._place = Place(journal)

    # -- variables

    async def save_variable(self, key: str, value: Any) -> None:
        """Set a variable of the run, once this attempt has succeeded. Raises OutputInvalid for what isn't JSON."""
        check_name("the name of a variable", key)
        self._check_repeats("save_variable()")
        try:
            self._variables[key] = codec.dump(value)
        except codec.JsonInvalid as exc:
            raise OutputInvalid(f"variable '{key}' can't be written as JSON: {exc}") from exc

    async def load_variable(self, key: str, default: Any = None) -> Any:
        """The variable as this attempt or an earlier step left it, as JSON gives it back, or `default`."""
        if key in self._variables:
            return from_json(self._variables[key])
        return await self._place.journal.variable(key, default)

    async def once(self, name: str, function: Callable[..., Any], *args: Any) -> Any:
        """What `function(*args)` gives, recorded under `name`: a later attempt of this step gets the record instead.

        Gives the value as JSON gives it back, at the first time too. Using a name again in one attempt counts on, for
        each unit within which it is used: what goes on beside each other needs names of its own. A crash
        between the call and its record repeats the call: hand `effect_key()` to what it calls.
        """
        check_name("the name of what is done once", name)
        if not callable(function):
            if inspect.iscoroutine(function):
                function.close()  # it is never awaited: that is said here
            raise InvalidDefinition(
                f"what is done once is a function, with its arguments behind it: once({name!r}, send, order), "
                f"found what is a {type(function).__name__}"
            )

        async def produce() -> bytes:
            value = function(*args)
            if inspect.isawaitable(value):
                value = await value
            try:
                return codec.dump(value)
            except codec.JsonInvalid as exc:
                raise OutputInvalid(f"what '{name}' returned can't be written as JSON: {exc}") from exc

        place = self._here()
        done = await place.do(place.name(name), Unit(f"'{name}'"), produce)
        return from_json(done.value)

    # -- on behalf of

    async def token(self, *, audience: str, scopes: Collection[str]) -> SecretToken:
        """A fresh token for one call to `audience`, on behalf of the person for whom the run acts.

        It has `scopes`, which they must have granted (and the activity named, if it names any), and no others. Each
        time one is exchanged anew, and nothing of it is recorded. The step is left while they have no valid grant. In
        a compensation it is a token of the service itself. Raises ScopeMissing, ExchangeRefused, AuthorityUnavailable.
        """
        if self._acting is None:
            raise ScopeMissing(
                "the run acts for nobody, so there is no token; dispatch it with on_behalf_of="
            )
        # In the worker's loop, which all share that wait for one key set.
        work = self._acting.token(self._here(), audience, check_scopes(scopes))
        return await self._place.journal.at_home(work)

    # -- waits

    async def sleep(self, seconds: float) -> None:
        """Let so many seconds pass, without a worker: the step is left meanwhile, and its activity called again.

        What came before in the activity is done again then, unless it is a unit: see `once`.
        """
        if not is_duration(seconds) and seconds != 0:
            raise InvalidDefinition(
                f"a step sleeps for a number of seconds, 0 or more and below 100 years, found {seconds!r}"
            )
        place = self._here()
        await place.sleep(place.name("sleep"), seconds)

    async def wait_for(self, name: str, *, timeout: float | None = None) -> Any:
        """The value of the next signal of this name, which `Run.signal()` sends; one that came before counts, too.

        Each signal is taken by one wait, the oldest first. The step is left until it is there, as with `sleep`. Raises
        WaitTimeout when it isn't after `timeout` seconds.
        """
        check_signal(name)
        _check_timeout(timeout)
        place = self._here()
        found = await place.signal(
            place.name(f"signal {name}"), name, timeout=timeout, what=f"the signal '{name}'"
        )
        return found["value"]

    async def ask(self, question: str, *, timeout: float | None = None, about: Any = None) -> Any:
        """The answer to a question that `paigeant requests` or `Paigeant.answer()` gives; the step is left until then.

        `about` is shown along with the question. Raises WaitTimeout when nobody has answered after `timeout` seconds,
        RequestDenied when the answer is that there will be none.
        """
        return (await self._ask("question", question, timeout, about))["value"]["value"]

    async def approve(self, question: str, *, timeout: float | None = None, about: Any = None) -> bool:
        """Whether somebody approved of what is asked; like `ask`."""
        answer = await self._ask("approval", question, timeout, about)
        return bool(answer["value"]["approved"])

    async def _ask(
        self, kind: RequestKind, question: str, timeout: float | None, about: Any
    ) -> dict[str, Any]:
        if not isinstance(question, str) or not question.strip():
            raise InvalidDefinition(f"a question is a non-empty text, found {question!r}")
        _check_timeout(timeout)
        try:
            asked = codec.dump({"question": question, **({} if about is None else {"about": about})})
        except codec.JsonInvalid as exc:
            raise OutputInvalid(f"what is asked can't be written as JSON: {exc}") from exc
        return await self._here().ask(kind, codec.storable(question), asked, timeout=timeout)

    def _check_repeats(self, what: str) -> None:
        """Raise InvalidDefinition inside of a unit: a later attempt passes over it, and `what` would be lost."""
        if self._here().is_recorded:
            raise InvalidDefinition(
                f"{what} was called inside of something that is recorded (a tool of an agent, or what once() does): an "
                "attempt that finds the record doesn't do that again, and this would be lost; call it outside of "
                'that, or mark the tool with metadata={"paigeant": {"inline": True}}'
            )

    def _here(self) -> Place:
        place = current_place()
        return self._place if place is None or place.journal is not self._place.journal else place

    # -- revisions

    @property
    def remaining(self) -> tuple[Step, ...]:
        """The steps after this one, as they stand now; none in an undo."""
        if self._slip.ending is not None:
            return ()
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
        """Do nothing after this step: the run completes with it. Raises PolicyViolation."""
        self._revise((), lambda rest, new: [])
        self._inserted = 0

    @contextmanager
    def _within(self, policy: ItineraryPolicy) -> Iterator[None]:
        """Revisions inside are held against `policy` as well."""
        before = self._policy
        self._policy = before.narrowed(policy)
        try:
            yield
        finally:
            self._policy = before

    def _revise(self, steps: tuple[str | Step, ...], change: Change) -> None:
        self._check_repeats("a revision of the itinerary")
        if self._slip.ending is not None:
            raise PolicyViolation(
                f"step '{self.step_id}' is being undone: the run does nothing more that could be revised"
            )
        self._added, self._draft = self._revised(steps, change)

    def _revised(self, steps: tuple[str | Step, ...], change: Change) -> tuple[list[Step], list[Step]]:
        """All steps that this one would have added, and the itinerary that it would leave. Raises PolicyViolation."""
        taken = self._slip.step_ids() | {step.id for step in self._added}
        first = len(self._added) + 1
        new = [
            replace(step, args=_plain_args(step), depth=self._slip.depth + 1)
            for step in identify(steps, taken=taken, parent=self.step_id, first=first)
        ]
        draft = change(list(self.remaining), new)
        self._policy.check(self._slip, new, tuple(draft), before=self._added)
        return [*self._added, *new], draft

    def _revision(self) -> Revision | None:
        return None if self._draft is None else Revision(tuple(self._draft), len(self._added))


def check_signal(name: object) -> None:
    """Raise InvalidDefinition unless somebody may send signals of that name, and steps wait for them."""
    check_name("the name of a signal", name)
    if str(name).startswith(REQUEST_SIGNAL) or name == GRANT_SIGNAL:
        raise InvalidDefinition(
            f"a signal's name doesn't begin with {REQUEST_SIGNAL!r} and isn't {GRANT_SIGNAL!r}: those are answers to "
            f"requests and grants, see `Paigeant.answer` and `Run.grant`; found {name!r}"
        )


def _check_timeout(timeout: object) -> None:
    if timeout is not None and not is_duration(timeout):
        raise InvalidDefinition(f"a timeout is in seconds, above 0 and below 100 years, found {timeout!r}")


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
