"""Performer: runs the activity of a claimed step, or its compensation. What users' code does wrong is an outcome."""

from __future__ import annotations

import asyncio
import contextvars
import logging
import os
import random
import sys
import traceback
from collections.abc import Callable, Coroutine, Generator, Mapping, MutableMapping, Sequence
from contextlib import AbstractAsyncContextManager, AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Any

from paigeant import codec, condition, folding, host
from paigeant.activity import MISSING, Activity
from paigeant.arguments import Namespace, resolve
from paigeant.behalf import Acting, Behalf
from paigeant.claim import Claim, Limits
from paigeant.clock import is_duration
from paigeant.context import StepContext, deadline_of
from paigeant.errors import (
    ActivityRejected,
    InvalidDefinition,
    NonRetryableError,
    PaigeantError,
    StoreUnavailable,
)
from paigeant.failure import failure_text, is_among
from paigeant.identity import MANDATE, Mandate
from paigeant.observer import CURRENT, STEP_IDS
from paigeant.parking import Parked as Left
from paigeant.patience import PatientValues, patiently
from paigeant.reporter import Reporter
from paigeant.routing import Failed, Outcome, Parked, Skipped, Succeeded
from paigeant.secret import OBO_TOKEN, SecretToken, masked, refuse_tokens
from paigeant.slip import Compensation, Phase, Step, StepStatus
from paigeant.store import Request, StepKey, Store
from paigeant.threads import Threads

if TYPE_CHECKING:
    from paigeant.agents.usage import Counting

__all__ = ["Attempt", "Performer"]

log = logging.getLogger("paigeant.performer")
step_log = logging.getLogger("paigeant.step")

_LONGEST_ASKED = 86_400.0
"""For a day at most an attempt waits because somebody asks for it: the longest limits are those of a day."""

_UNLIMITED = nullcontext()

_ASTRAY = RuntimeError("a process that an activity forks off can't wait in the event loop of its parent")


_OF_LOGGING = frozenset({"exc_info", "stack_info", "stacklevel", "extra"})
"""The keywords that logging takes itself."""


class _StepLog(logging.LoggerAdapter[logging.Logger]):
    """What an activity writes to: each record has the ids of its step, in threads that it has begun itself as well.

    Other keywords than logging's own are fields of the line, as with structlog: `log.info("packed", sku="A-1")`.
    """

    def process(self, msg: Any, kwargs: MutableMapping[str, Any]) -> tuple[Any, MutableMapping[str, Any]]:
        # Python's own puts the ids in the place of what the activity says besides.
        said = {name: kwargs.pop(name) for name in kwargs.keys() - _OF_LOGGING}
        # Among the ids, where they may have any name: logging refuses `extra` that is called like a part of a record.
        ids = {**(self.extra or {}), **said} if said else self.extra
        kwargs["extra"] = {STEP_IDS: ids, **(kwargs.get("extra") or {})}
        return msg, kwargs


@dataclass(slots=True)
class Attempt:
    """How an attempt ended, with what it leaves behind: its arguments, its output (both JSON), its context."""

    outcome: Outcome = field(default_factory=Skipped)
    input: bytes | None = None
    output: bytes | None = None
    context: StepContext | None = None


class _Apart:
    """What a coroutine gives, run in a copy of the context: what it sets there is seen by nobody who comes after it.

    Steps of a run that go on here are done in one task, and so in one context, and those that travel are not.
    """

    __slots__ = ("_work",)

    def __init__(self, work: Coroutine[Any, Any, Any]) -> None:
        self._work = work

    def __await__(self) -> Generator[Any, Any, Any]:
        run, process = contextvars.copy_context().run, os.getpid()
        resume: Callable[..., Any] = self._work.send
        given: Any = None
        asked: Any = None
        while True:
            try:
                asked = run(resume, given)
                host.end_fork(process, _ASTRAY)
            except StopIteration as end:
                host.end_fork(process)
                return end.value
            except BaseException as exc:
                host.end_fork(process, exc)
                asked = None  # the future that was waited for: it has the error as well
                if isinstance(exc, GeneratorExit):  # it must not pass for the end of the task around it
                    raise RuntimeError("it raised GeneratorExit by itself") from exc
                raise
            finally:
                given = None  # an error that this frame kept would keep the frame
            try:
                resume, given = self._work.send, (yield asked)
            except GeneratorExit:
                run(self._work.close)
                raise
            except BaseException as exc:  # a cancellation among others, which is for the coroutine
                resume, given = self._work.throw, exc


class _Time:
    """What an attempt may take."""

    __slots__ = ("_claim", "_limit", "_limits", "_seconds")

    def __init__(self, claim: Claim, limits: Limits) -> None:
        self._claim = claim
        self._limits = limits
        self._seconds: float | None = None
        self._limit: asyncio.Timeout | None = None

    def limited(self, *, begins_later: bool) -> AbstractAsyncContextManager[Any]:
        """What is done inside is cut off when the time is over.

        It begins at once, or with `begin`, see `Threads.do`. Raises TimeoutError where there is none left.
        """
        self._seconds = None if begins_later else self._left()
        if self._seconds is None and not begins_later:
            return _UNLIMITED  # most attempts may take any time, and to make a limit isn't free
        self._limit = asyncio.timeout(self._seconds)
        return self._limit

    def begin(self) -> None:
        """From now on."""
        self._seconds = self._left()
        if self._seconds is not None and self._limit is not None:
            self._limit.reschedule(asyncio.get_running_loop().time() + self._seconds)

    def is_over(self) -> bool:
        """Whether the attempt was cut off."""
        return self._limit is not None and self._limit.expired()

    def text(self) -> str:
        """What is told of that."""
        deadline = self._claim.message.routing_slip.deadline
        if self._claim.step is not None and deadline is not None and self._claim.now >= deadline:
            return "the run's deadline has passed"
        return f"the attempt took longer than {self._seconds:g} s"

    def _left(self) -> float | None:
        left = self._claim.timeout(self._limits)
        if left == 0:
            raise TimeoutError("the run's deadline has passed")
        return left


class Performer:
    """Performs claims, one call for each attempt, and tells the `reporter` what happens in it.

    `is_stopping`: whether the worker puts its work away, so that a Ctrl-C is meant for it and not for an activity.
    """

    def __init__(
        self,
        store: Store,
        limits: Limits,
        *,
        worker_id: str,
        reporter: Reporter,
        is_stopping: Callable[[], bool] = lambda: False,
        threads: Threads | None = None,
        chance: Callable[[], float] = random.random,
        behalf: Behalf | None = None,
    ) -> None:
        self.store = store
        self.behalf = behalf or Behalf()
        self.values = PatientValues(store, seconds=limits.persist, chance=chance, opened=self._opened)
        self.limits = limits
        self.worker_id = worker_id
        self.threads = threads
        self.reporter = reporter
        self._is_stopping = is_stopping
        self._chance = chance

    async def perform(self, claim: Claim) -> Attempt:
        """Run the activity, or its compensation, under its timeout. What it does wrong is an outcome, not an error."""
        counting = _counting()
        with counting or _UNLIMITED:
            attempt = await self._perform(claim)
        context, is_counted = attempt.context, counting is not None
        counting = counting or _counting()  # what has loaded agents only now is counted by its records
        if context is not None and counting is not None and not isinstance(attempt.outcome, Parked):
            is_fresh = context._is_fresh and is_counted
            try:
                context._usage = await counting.total(self.values, claim.key, is_fresh=is_fresh)
            except Exception:  # counting never fails a step
                log.exception("what %s has used can't be counted", claim.key)
        return attempt

    async def _perform(self, claim: Claim) -> Attempt:
        attempt = Attempt()
        ids = claim.ids(self.worker_id)
        context = attempt.context = self._context(claim, ids)
        try:
            return await self._perform_in(context, claim, attempt, ids)
        finally:
            context._place.journal.leave()

    async def _perform_in(
        self, context: StepContext, claim: Claim, attempt: Attempt, ids: Mapping[str, Any]
    ) -> Attempt:
        if claim.grant.exhausted:
            attempt.outcome = await self._lost(claim, context)
            return attempt
        time = _Time(claim, self.limits)
        token = CURRENT.set(ids)
        try:
            attempt.outcome = await self._outcome(context, claim, attempt, time)
            return attempt
        except asyncio.CancelledError as exc:
            if _is_cancelled():
                raise
            error: BaseException = exc  # the activity let a cancellation of its own escape
        except TimeoutError as exc:
            error = TimeoutError(time.text()) if time.is_over() else exc
        except GeneratorExit:
            raise  # this coroutine is being closed, and may not wait for anything any more
        except BaseException as exc:  # whatever a user's code raises is the outcome of the step
            if self._is_stopping() and _is_interrupt(exc):
                raise KeyboardInterrupt from None  # Ctrl-C for the second time, while the activity was computing
            error = exc
        finally:
            CURRENT.reset(token)
        try:
            parking = context._place.journal.parking
            if parking.is_parked and not time.is_over():
                attempt.outcome = Parked(parking.waits_for, parking.until)
                return attempt
            if self._is_stopping() and _is_cancelled():
                raise asyncio.CancelledError from error  # a library may put it in words of its own
            # Who is cut off may put that in words of its own, as `except*` does.
            is_cut_off = time.is_over() and not isinstance(error, TimeoutError)
            late = time.text() if is_cut_off else ""
            attempt.outcome = await self._failed(context, claim, error, ids, late)
        finally:
            # This frame is part of its traceback: in a circle they would keep all that the activity had in its hands.
            del error
        return attempt

    async def _outcome(self, context: StepContext, claim: Claim, attempt: Attempt, time: _Time) -> Outcome:
        """What the attempt comes to unless it raises; its input and output are put into `attempt`."""
        step, work = claim.step, claim.work
        if step is not None and step.when is not None and not await self._is_wanted(step.when, claim):
            return Skipped()
        acting = None
        if work.scopes or step is None or MANDATE in claim.message.headers:
            acting = context._acting = self._acting(claim, context)
            context._place.journal.secrets = acting.secrets
        context._begins = time.begin
        # Of more functions than there are threads the last ones would have no time left when they get one.
        async with time.limited(begins_later=work.is_plain):
            with context._place.entered(), _replays():
                if acting is not None and work.scopes:
                    context.identity = await acting.require(context._place) or context.identity
                with self.reporter.begin(claim):
                    value = await self._call(step, work, claim, context, attempt)
        parking = context._place.journal.parking
        if parking.is_parked:  # the activity has caught it, but what it waits for isn't there
            return Parked(parking.waits_for, parking.until)
        output = b""
        if step is None:  # what an undo gives is recorded nowhere
            work.check_done(value)
        else:
            output = work.dump(value)
        if acting is not None:
            _check_tokenless(context, output, acting.secrets)
        attempt.output = output or None
        return self._succeeded(claim, context, output)

    async def _failed(
        self, context: StepContext, claim: Claim, error: BaseException, ids: Mapping[str, Any], late: str
    ) -> Failed:
        final = await _given_up(context, error)
        permanent = bool(final) or is_among(error, (NonRetryableError, InvalidDefinition))
        secrets = () if context._acting is None else tuple(context._acting.secrets)
        if not isinstance(error, ActivityRejected):
            _log_failure(error, ids, secrets)  # they are no longer those of the current step
        text = "; ".join(filter(None, (failure_text(error, secrets), late, final)))
        retry = claim.retry(self.limits)
        return Failed(text, claim.grant.attempt, retry, permanent, self._chance(), _asked_for(error))

    async def _lost(self, claim: Claim, context: StepContext) -> Outcome:
        """What becomes of a step whose attempts are used up: it fails, or waits for who decides on lost outcomes."""
        # Those before it may have failed by themselves, and told so.
        lost = f"WorkerLost: attempt {claim.grant.attempt} was the last one, and didn't come back: its worker died"
        parking = context._place.journal.parking
        try:
            await context._place.decide_lost()
        except Left:
            return Parked(parking.waits_for, parking.until)
        except StoreUnavailable:
            raise
        except Exception as exc:  # OutcomeUnknown, or what nobody foresaw: the step has to end
            lost = f"{failure_text(exc)}; {lost}"
        return Failed(lost, claim.grant.attempt, claim.retry(self.limits), permanent=True)

    def _namespace(self, claim: Claim) -> Namespace:
        message = claim.message
        return Namespace(message.workflow_id, message.payload, message.routing_slip, self.values)

    async def _is_wanted(self, when: str, claim: Claim) -> bool:
        message = claim.message
        namespace = self._namespace(claim)
        values = await namespace.view(condition.names(when))
        done = message.routing_slip.executed
        # Else nobody could ask what a step gave that a condition of its own may have skipped.
        skipped = {entry.step_id: None for entry in done if entry.status is StepStatus.SKIPPED}
        try:
            known = {**skipped, **message.payload, **values}
            return condition.evaluate(when, known, besides=namespace.names)
        except PaigeantError as exc:
            raise ActivityRejected(str(exc)) from exc

    async def _call(
        self, step: Step | None, work: Activity, claim: Claim, context: StepContext, attempt: Attempt
    ) -> Any:
        namespace = self._namespace(claim)
        first: Mapping[str, Any] | None = None
        due = claim.message.due
        assert due is not None, "what was claimed is due"
        if step is None:
            output = await namespace.output(claim.key.step)
            first = {} if output is MISSING else {"output": output}
        arguments, shown = await resolve(work, namespace, args=due.args, context=context, first=first)
        attempt.input = codec.dump(shown)
        return await _Apart(work.call(arguments, context, self.threads))

    def _context(self, claim: Claim, ids: Mapping[str, Any]) -> StepContext:
        message = claim.message
        key = claim.key
        context = StepContext(
            workflow_id=key.workflow_id,
            workflow=message.workflow,
            step_id=key.step,
            activity=claim.activity.name,
            attempt=claim.grant.attempt,
            trace_id=message.trace_id,
            correlation_id=message.correlation_id,
            idempotency_key=_effect_key(key),
            deadline=deadline_of(message.routing_slip),
            identity=None,
            log=_StepLog(step_log, ids),
            _key=key,
            _slip=message.routing_slip,
            _store=self.values,
            _is_fresh=claim.grant.epoch == 1 and not claim.resumed,
            _now=lambda: claim.now,
            _tell=self.reporter.tell_here,
        )
        context._place.journal.open()
        return context

    def _acting(self, claim: Claim, context: StepContext) -> Acting:
        """For whom the attempt acts. Most steps act for nobody, and don't come here."""
        message = claim.message

        async def reload() -> Mapping[str, str]:
            async def ask() -> Mapping[str, str]:
                return (await self.store.load_run(message.workflow_id, inline_bytes=0)).run.headers

            return await patiently(
                ask,
                f"headers of run '{message.workflow_id}'",
                seconds=self.limits.persist,
                chance=self._chance,
            )

        mandate = Mandate.read(message.headers)
        token = message.headers.get(OBO_TOKEN)
        context.identity = None if mandate is None else mandate.identity
        return Acting(
            self.behalf,
            message.workflow_id,
            mandate,
            reload,
            allowed=claim.work.scopes,
            is_undo=message.phase is Phase.UNDO,
            _token=None if token is None else SecretToken(token),
        )

    def _opened(self, request: Request) -> None:
        more = {"request": request.id, "kind": request.kind, "name": request.name}
        self.reporter.tell_here("request.opened", more=more)

    def _succeeded(self, claim: Claim, context: StepContext, output: bytes) -> Succeeded:
        if claim.step is None:
            return Succeeded()
        compensation = None
        if claim.activity.compensation is not None:
            compensation = Compensation(claim.key.step, claim.activity.name, claim.topic)
        return Succeeded(context._revision(), compensation, len(output) > self.limits.inline_bytes)


def _effect_key(key: StepKey) -> str:
    """The key of a step's effects, or of its undo's: no other step of the run has it, whatever the two are called."""
    step = key.step.replace("%", "%25").replace(":", "%3A")
    return f"{key.workflow_id}:{step}{'' if key.phase is Phase.DO else ':undo'}"


def _counting() -> Counting | None:
    """Counts what agents use; None where nothing has loaded their library."""
    if "pydantic_ai" not in sys.modules:
        return None
    from paigeant.agents.usage import Counting

    return Counting()


def _replays() -> AbstractContextManager[None]:
    """Traces and metrics leave out what comes from the record. Whoever has agents has loaded their library already."""
    if "pydantic_ai" not in sys.modules:
        return _UNLIMITED
    from paigeant.agents.durability import replay_scope

    return replay_scope()


def _is_interrupt(error: BaseException) -> bool:
    """Whether it is of Ctrl-C. That of an agent's tool is told as an error."""
    return isinstance(error.__cause__ if isinstance(error, RuntimeError) else error, KeyboardInterrupt)


async def _given_up(context: StepContext, error: BaseException) -> str:
    """Have what the attempt gave up on done anew; gives why no further attempt is to be made by itself, if so."""
    try:
        return await context._place.journal.failed(error)
    except StoreUnavailable:
        return ""  # the next attempt gives up in the same way, and says so again


def _asked_for(error: BaseException) -> float:
    """How many seconds somebody who is overloaded asks to be left alone, as the `retry_after` of an error says.

    Of a group it is the least: somebody may be asked then.
    """
    try:
        if isinstance(error, BaseExceptionGroup):
            return min(map(_asked_for, error.exceptions))
        asked = getattr(error, "retry_after", None)
    except Exception:  # the user's code again; or groups within groups, more than can be gone through
        return 0.0
    if not isinstance(asked, (int, float)) or not is_duration(asked):
        return 0.0
    return min(float(asked), _LONGEST_ASKED)


def _is_cancelled() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def _check_tokenless(context: StepContext, output: bytes, secrets: Sequence[SecretToken]) -> None:
    """Raise OutputInvalid when something that the attempt leaves to be recorded holds a token."""
    if not secrets:
        return
    refuse_tokens("the output", output, secrets)
    for name, value in context._variables.items():
        refuse_tokens("the name of a variable", name.encode(), secrets)
        refuse_tokens(f"variable '{name}'", value, secrets)
    revision = context._revision()
    if revision is not None:
        refuse_tokens("the itinerary that the step leaves", folding.pack_revision(revision), secrets)


def _log_failure(error: BaseException, ids: Mapping[str, Any], secrets: Sequence[SecretToken]) -> None:
    told = (type(error), error, _from_the_activity(error))
    if secrets:
        text = "".join(traceback.format_exception(*told))
        shown = masked(text, secrets)
        if shown != text:
            step_log.info("attempt failed, with a token in its error\n%s", shown, extra={STEP_IDS: ids})
            return
    step_log.info("attempt failed", exc_info=told, extra={STEP_IDS: ids})


_BEFORE_ACTIVITIES = frozenset({"paigeant", "concurrent"})
"""Packages whose functions call an activity, from a thread of its own where it is a plain function."""


def _from_the_activity(error: BaseException) -> TracebackType | None:
    """The traceback from the user's code on, as the way there is always the same; all of it where no such code is."""
    found = error.__traceback__
    while found is not None and _package(found) in _BEFORE_ACTIVITIES:
        found = found.tb_next
    return found or error.__traceback__


def _package(of: TracebackType) -> str:
    return str(of.tb_frame.f_globals.get("__name__", "")).partition(".")[0]
