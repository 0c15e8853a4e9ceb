"""Executor: all that happens to one message, from its delivery to the record of its result and what follows.

How many at once, and when to stop, is the worker's business (`worker.py`); what follows a result is decided in
`routing.py`, which rows change in `ledger.py`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Executor as Threads
from dataclasses import dataclass, field, replace
from typing import Any

from pydantic_core import from_json

from paigeant import codec, condition, ledger
from paigeant.activity import MISSING, Activity, ActivityRegistry
from paigeant.arguments import Namespace, resolve
from paigeant.context import StepContext, deadline_of
from paigeant.errors import (
    ActivityRejected,
    NonRetryableError,
    PaigeantError,
    StoreUnavailable,
    TransportUnavailable,
)
from paigeant.forwarder import Forwarder, Letter
from paigeant.message import PaigeantMessage
from paigeant.observer import CURRENT, Event, EventName, Observers
from paigeant.retry import RetryPolicy
from paigeant.routing import Failed, Finish, Forward, Move, Outcome, Retry, Skipped, Succeeded, Undo, route
from paigeant.slip import Compensation, Phase, RunStatus, Step, StepStatus
from paigeant.store import ClaimRequest, Grant, NextStep, Recorded, Refused, StepKey, StepResult, Store
from paigeant.transport import Transport

__all__ = ["Claim", "Executor", "Limits"]

log = logging.getLogger("paigeant.executor")
step_log = logging.getLogger("paigeant.step")

_ERROR_CHARACTERS = 4000
_UNKNOWN_ACTIVITY_PAUSE = 2.0
_NO_LEASE_PAUSE = 0.1


@dataclass(frozen=True, slots=True)
class Limits:
    """What holds for steps whose activity and itinerary don't say otherwise.

    `local_steps`: how many steps of one run are done in a row before others have their turn. `inline_bytes`: outputs
    above it don't travel. `persist`: seconds for which a result that can't be recorded is kept and tried again.
    """

    retry: RetryPolicy = field(default_factory=RetryPolicy)
    timeout: float | None = None
    local_steps: int = 50
    inline_bytes: int = 65536
    persist: float = 30.0


@dataclass(frozen=True, slots=True)
class Claim:
    """A step that is this worker's: the store's grant, the message it belongs to, and its activity."""

    key: StepKey
    grant: Grant
    message: PaigeantMessage
    activity: Activity
    claimed_at: float
    local: int = 0
    bound: asyncio.Semaphore | None = None
    """The activity's own bound, taken for this step already; None where it has none, or the worker took it."""

    @property
    def work(self) -> Activity:
        """What is to be called: the activity, or its compensation."""
        if self.message.phase is Phase.DO or self.activity.compensation is None:
            return self.activity
        return self.activity.compensation

    @property
    def step(self) -> Step | None:
        """The step to do; None for an undo."""
        return self.message.routing_slip.next_step()

    @property
    def now(self) -> float:
        """The store's time by this process's steady clock."""
        return self.grant.now + time.monotonic() - self.claimed_at

    def retry(self, limits: Limits) -> RetryPolicy:
        """The step's setting over the activity's over the default."""
        own = None if self.step is None or self.step.retries is None else RetryPolicy.of(self.step.retries)
        return own or self.work.retries or limits.retry

    def timeout(self, limits: Limits) -> float | None:
        """Seconds for this attempt: by the settings, and never beyond the run's deadline."""
        own = self.step.timeout if self.step is not None else None
        timeout = own or self.work.timeout or limits.timeout
        deadline = self.message.routing_slip.deadline
        if self.step is None or deadline is None:
            return timeout  # a deadline bounds what is done, not what is undone
        left = max(deadline - self.now, 0.0)
        return left if timeout is None else min(timeout, left)


@dataclass(slots=True)
class _Produced:
    """What an attempt leaves behind besides its outcome."""

    input: bytes | None = None
    output: bytes | None = None
    error: BaseException | None = None
    context: StepContext | None = None


class Executor:
    """Does the steps that messages wake. One for each worker."""

    def __init__(
        self,
        store: Store,
        transport: Transport,
        registry: ActivityRegistry,
        forwarder: Forwarder,
        *,
        worker_id: str,
        topics: Collection[str],
        limits: Limits | None = None,
        observers: Observers | None = None,
        threads: Threads | None = None,
        chance: Callable[[], float] = random.random,
    ) -> None:
        self.store = store
        self.transport = transport
        self.registry = registry
        self.forwarder = forwarder
        self.worker_id = worker_id
        self.topics = frozenset(topics)
        self.limits = limits or Limits()
        self.observers = observers or Observers()
        self.threads = threads
        self.running: dict[tuple[StepKey, int], asyncio.Task[Any]] = {}
        """The steps that this worker does now, with the task that does each. The heartbeat lists them."""
        self.stopping = False
        self.entitled: Callable[[], bool] = lambda: True
        """Whether the worker's lease holds. What it claims without one, the next sweep takes away again."""
        self._chance = chance
        self._lost: set[tuple[StepKey, int]] = set()
        self._recording: set[tuple[StepKey, int]] = set()
        self._slots: dict[str, asyncio.Semaphore] = {}

    # -- the path of a message

    async def handle(self, message: PaigeantMessage) -> None:
        """Do the step that `message` wakes, and those after it that this worker can go on with at once."""
        claim = await self.claim(message)
        while claim is not None:
            claim = await self._do(claim)

    async def _do(self, claim: Claim) -> Claim | None:
        step = (claim.key, claim.grant.epoch)
        self._register(claim)
        bound = claim.bound
        try:
            if not claim.local:
                claim = await self._accept(claim)
            outcome, produced = await self.perform(claim)
            move = route(claim.message.routing_slip, outcome, claim.now)
            following = await self.record(claim, outcome, produced, move)
        except asyncio.CancelledError:
            if step not in self._lost:
                raise  # a shutdown: the step stays listed, and the worker gives it back
            _uncancel()
            self._tell("step.lost", claim, error="its lease was lost, or its run was cancelled")
            following = None
        except Exception:
            # Nobody works on it any more; off the list, so that the heartbeat frees it.
            self.running.pop(step, None)
            raise
        finally:
            if bound is not None:
                bound.release()
            self._lost.discard(step)
            self._recording.discard(step)
        self.running.pop(step, None)
        return following

    async def claim(self, message: PaigeantMessage) -> Claim | None:
        """Lease the step and count the attempt; only then may it be acked. None when there is nothing to do here."""
        due = message.due
        if due is None:
            await self._drop(message, "ended")
            return None
        if due.activity not in self.registry:
            await self._return(message, f"no activity '{due.activity}' here", _UNKNOWN_ACTIVITY_PAUSE)
            return None
        if not self.entitled():
            await self._return(message, "this worker's lease is over", _NO_LEASE_PAUSE)
            return None
        try:
            message = await self.forwarder.payload(message)
            activity = self.registry.get(due.activity)
            key = StepKey(message.workflow_id, message.step_id, message.phase)
            claim = Claim(key, Grant(0, 0, 0.0), message, activity, time.monotonic())
            request = ClaimRequest(claim.key, self.worker_id, claim.retry(self.limits).attempts)
            answer = await self.store.claim_step(request)
        except StoreUnavailable as exc:
            await self._return(message, str(exc), 1.0)
            return None
        except PaigeantError as exc:
            await self._drop(message, str(exc))
            return None
        if isinstance(answer, Refused):
            if answer.retry_in is not None:
                await self._return(message, answer.reason, answer.retry_in)
            else:
                await self._drop(message, answer.reason)
            return None
        return replace(claim, grant=answer, claimed_at=time.monotonic())

    async def _accept(self, claim: Claim) -> Claim:
        # Ack once the claim has committed: before that a crash would lose the wake-up, after it the lease protects
        # the step. An ack that fails brings a duplicate.
        with contextlib.suppress(TransportUnavailable):
            await self.transport.ack(claim.message.message_id)
        if self.forwarder.is_for(claim.message, claim.grant.epoch):
            return claim
        # Written for an earlier claim of the step: an operator may have taken the run up again since.
        until = time.monotonic() + self.limits.persist
        while True:
            try:
                return replace(claim, message=await self.forwarder.renewed(claim.message))
            except StoreUnavailable:
                if time.monotonic() > until:
                    raise
            await asyncio.sleep(0.2 * (0.5 + self._chance()))

    async def perform(self, claim: Claim) -> tuple[Outcome, _Produced]:
        """Run the activity, or its compensation, under its timeout. What it does wrong is an outcome, not an error."""
        produced = _Produced()
        retry = claim.retry(self.limits)
        if claim.grant.exhausted:
            lost = f"WorkerLost: {claim.grant.attempt} attempts began and none came back; their workers died"
            return Failed(lost, claim.grant.attempt, retry, permanent=True), produced
        context = produced.context = self._context(claim)
        timeout = claim.timeout(self.limits)
        limit = asyncio.timeout(timeout)
        token = CURRENT.set(_ids(claim, self.worker_id))
        try:
            if not await self._is_wanted(claim):
                return Skipped(), produced
            self._tell("step.started", claim)
            async with limit:
                if timeout == 0:
                    raise TimeoutError(_timeout_text(claim, timeout))
                value = await self._call(claim, context, produced)
            produced.output = claim.work.dump(value)
            return self._succeeded(claim, context, produced.output), produced
        except asyncio.CancelledError as exc:
            if _is_cancelled():
                raise
            produced.error = exc  # the activity let a cancellation of its own escape
        except TimeoutError as exc:
            produced.error = exc
            if limit.expired():
                produced.error = TimeoutError(_timeout_text(claim, timeout))
        except (Exception, SystemExit) as exc:  # whatever a user's code raises is the outcome of the step
            produced.error = exc
        finally:
            CURRENT.reset(token)
        error = produced.error
        assert error is not None
        permanent = isinstance(error, NonRetryableError)
        if not isinstance(error, ActivityRejected):
            ids = _ids(claim, self.worker_id)  # they are no longer those of the current step
            step_log.info("attempt failed", exc_info=error, extra=ids)
        return Failed(_text(error), claim.grant.attempt, retry, permanent, self._chance()), produced

    async def record(self, claim: Claim, outcome: Outcome, produced: _Produced, move: Move) -> Claim | None:
        """Make the result and what follows durable; gives the next step's claim, if the run goes on here."""
        following = self._following(claim, produced, move)
        next_step = None if following is None else self.forwarder.next_step(claim.key.workflow_id, move.slip)
        activity = self._goes_on_here(claim, next_step)
        letter = None if activity is not None else self._letter(claim, move, following, next_step)
        result = self._result(claim, outcome, produced, move, next_step, take_next=activity is not None)
        # From here on the store decides: were this cut off while the commit is under way, a result that stands, and
        # the next step with it, would be in nobody's hands.
        self._recording.add((claim.key, claim.grant.epoch))
        # Free when last looked at, so this doesn't wait. A step that waited for it while it keeps a place of the worker
        # would wait for ever for one that has it and waits for a place.
        bound = None if activity is None else await self.slot(activity.name)
        try:
            answer = await self._persist(result, letter)
            if isinstance(answer, Refused):
                self._tell("step.lost", claim, error=answer.reason)
                return None
            self._tell_recorded(claim, result, move)
            if activity is not None and answer.grant and following is not None and next_step is not None:
                key, local = next_step.key, claim.local + 1
                taken = Claim(key, answer.grant, following, activity, time.monotonic(), local, bound)
                bound = None
                return taken
        finally:
            if bound is not None:
                bound.release()
        if letter is not None:
            # A crash before this line: the sweeper publishes.
            await self.forwarder.send(letter)
        return None

    # -- what the worker and the heartbeat ask for

    def lose(self, steps: set[tuple[StepKey, int]]) -> None:
        """The lease of these steps is lost, or their run was cancelled: stop doing them, and record nothing."""
        for step in steps:
            task = self.running.get(step)
            if task is not None and step not in self._lost and step not in self._recording:
                self._lost.add(step)
                task.cancel()

    async def slot(self, activity: str) -> asyncio.Semaphore | None:
        """The activity's own bound, taken; None when it has none."""
        bound = self._bound(activity)
        if bound is not None:
            await bound.acquire()
        return bound

    # -- inside

    def _register(self, claim: Claim) -> None:
        task = asyncio.current_task()
        assert task is not None
        self.running[(claim.key, claim.grant.epoch)] = task

    def _bound(self, activity: str) -> asyncio.Semaphore | None:
        if activity not in self.registry:
            return None
        limit = self.registry.get(activity).concurrency
        return None if limit is None else self._slots.setdefault(activity, asyncio.Semaphore(limit))

    async def _drop(self, message: PaigeantMessage, reason: str) -> None:
        """A duplicate, or a message for what is long done: ack, count, drop."""
        self._tell_delivery("delivery.duplicate", message, reason)
        with contextlib.suppress(TransportUnavailable):
            await self.transport.ack(message.message_id)

    async def _return(self, message: PaigeantMessage, reason: str, delay: float) -> None:
        self._tell_delivery("delivery.returned", message, reason)
        with contextlib.suppress(TransportUnavailable):
            await self.transport.nack(message.message_id, delay=delay)

    def _namespace(self, claim: Claim) -> Namespace:
        message = claim.message
        return Namespace(message.workflow_id, message.payload, message.routing_slip, self.store)

    async def _is_wanted(self, claim: Claim) -> bool:
        step = claim.step
        if step is None or step.when is None:
            return True
        names = condition.names(step.when)
        values = await self._namespace(claim).view(names)
        try:
            return condition.evaluate(step.when, {**claim.message.payload, **values})
        except PaigeantError as exc:
            raise ActivityRejected(str(exc)) from exc

    async def _call(self, claim: Claim, context: StepContext, produced: _Produced) -> Any:
        work = claim.work
        step = claim.step
        namespace = self._namespace(claim)
        first: Mapping[str, Any] | None = None
        if step is None:
            output = await namespace.output(claim.key.step)
            first = {} if output is MISSING else {"output": output}
        arguments, shown = await resolve(
            work, namespace, args=step.args if step is not None else {}, context=context, first=first
        )
        produced.input = codec.dump(shown)
        return await work.call(arguments, context, self.threads)

    def _context(self, claim: Claim) -> StepContext:
        message = claim.message
        key = claim.key
        undo = "" if key.phase is Phase.DO else ":undo"
        return StepContext(
            workflow_id=key.workflow_id,
            workflow=message.workflow,
            step_id=key.step,
            activity=claim.activity.name,
            attempt=claim.grant.attempt,
            trace_id=message.trace_id,
            correlation_id=message.correlation_id,
            idempotency_key=f"{key.workflow_id}:{key.step}{undo}",
            deadline=deadline_of(message.routing_slip),
            identity=None,
            log=logging.LoggerAdapter(step_log, {}),
            _key=key,
            _slip=message.routing_slip,
            _store=self.store,
        )

    def _succeeded(self, claim: Claim, context: StepContext, output: bytes) -> Succeeded:
        if claim.step is None:
            return Succeeded()
        compensation = None
        if claim.activity.compensation is not None:
            compensation = Compensation(claim.key.step, claim.activity.name, claim.activity.topic)
        return Succeeded(context._revision(), compensation, len(output) > self.limits.inline_bytes)

    def _following(self, claim: Claim, produced: _Produced, move: Move) -> PaigeantMessage | None:
        """The message for what comes next; None when the run ends."""
        message = claim.message
        if isinstance(move, Finish):
            return None
        payload = message.payload
        if isinstance(move, Forward) and move.status is StepStatus.COMPLETED and produced.output is not None:
            stored = move.slip.executed[-1].stored
            outputs = {} if stored else {claim.key.step: from_json(produced.output)}
            variables = {} if produced.context is None else produced.context._variables
            taken = [entry.step_id for entry in move.slip.executed]
            payload = ledger.merged(payload, variables, outputs, taken)
        return message.evolve(routing_slip=move.slip, payload=payload)

    def _goes_on_here(self, claim: Claim, next_step: NextStep | None) -> Activity | None:
        """The next step's activity, when this worker can do it at once: no message travels then."""
        if next_step is None or next_step.key == claim.key or self.stopping or not self.entitled():
            return None
        if claim.local + 1 >= self.limits.local_steps or next_step.topic not in self.topics:
            return None
        if next_step.activity not in self.registry:
            return None
        bound = self._bound(next_step.activity)
        return None if bound is not None and bound.locked() else self.registry.get(next_step.activity)

    def _letter(
        self, claim: Claim, move: Move, following: PaigeantMessage | None, next_step: NextStep | None
    ) -> Letter | None:
        if following is None or next_step is None:
            return None
        if isinstance(move, Retry):
            return self.forwarder.letter(
                following, next_step.topic, epoch=claim.grant.epoch, delay=move.delay
            )
        return self.forwarder.letter(following, next_step.topic, epoch=ledger.life(claim.grant.epoch))

    def _result(
        self,
        claim: Claim,
        outcome: Outcome,
        produced: _Produced,
        move: Move,
        next_step: NextStep | None,
        *,
        take_next: bool,
    ) -> StepResult:
        result = StepResult(
            key=claim.key,
            worker=self.worker_id,
            epoch=claim.grant.epoch,
            attempt=claim.grant.attempt,
            status=StepStatus.READY if isinstance(move, Retry) else move.status,
            strict=claim.activity.strict_fencing,
            error=outcome.error if isinstance(outcome, Failed) else None,
            input=produced.input,
            delay=move.delay if isinstance(move, Retry) else 0.0,
        )
        if isinstance(move, Retry):
            return result
        context = produced.context
        succeeded = isinstance(outcome, Succeeded) and context is not None
        forward = claim.key.phase is Phase.DO
        revision = outcome.revision if isinstance(outcome, Succeeded) else None
        compensation = outcome.compensation if isinstance(outcome, Succeeded) else None
        return replace(
            result,
            run=_run_status(move, forward=forward),
            ending="failed" if forward and isinstance(outcome, Failed) else None,
            run_error=f"{claim.key.step}: {outcome.error}"
            if forward and isinstance(outcome, Failed)
            else None,
            output=produced.output if succeeded and forward else None,
            revision=None if revision is None else ledger.pack_revision(revision),
            undo_topic=None if compensation is None else compensation.topic,
            usage=context._usage if context is not None else None,
            variables=context._variables if succeeded and context is not None else {},
            next=next_step,
            take_next=take_next,
        )

    async def _persist(self, result: StepResult, letter: Letter | None) -> Recorded | Refused:
        """Record the result, again and again while the store can't: it is not thrown away for a short trouble."""
        posting = None if letter is None else self.forwarder.posting(letter)
        until = time.monotonic() + self.limits.persist
        pause = 0.05
        while True:
            try:
                return await self.store.record_step_result(result, posting)
            except StoreUnavailable as exc:
                if time.monotonic() > until:
                    log.error("result of %s not recorded, the step will run again: %s", result.key, exc)
                    return Refused("unavailable")
                log.warning("result of %s not recorded yet: %s", result.key, exc)
            await asyncio.sleep(pause * (0.5 + self._chance()))
            pause = min(pause * 2, 2.0)

    # -- telling

    def _tell(self, name: EventName, claim: Claim, **more: Any) -> None:
        if self.observers:
            self.observers.observe(Event(name, **_ids(claim, self.worker_id), **more))

    def _tell_delivery(self, name: EventName, message: PaigeantMessage, reason: str) -> None:
        if self.observers:
            event = Event(
                name,
                message.workflow_id,
                message.workflow,
                message.step_id,
                trace_id=message.trace_id,
                correlation_id=message.correlation_id,
                worker=self.worker_id,
                error=reason,
            )
            self.observers.observe(event)

    def _tell_recorded(self, claim: Claim, result: StepResult, move: Move) -> None:
        if not self.observers:
            return
        seconds = time.monotonic() - claim.claimed_at
        name: EventName = "step.retrying" if isinstance(move, Retry) else _STEP_EVENTS[result.status]
        more = {"delay": move.delay} if isinstance(move, Retry) else {}
        self._tell(name, claim, seconds=seconds, error=result.error, more=more)
        if result.run is not None and result.run in _RUN_EVENTS:
            self._tell(_RUN_EVENTS[result.run], claim, error=result.run_error)


_STEP_EVENTS: dict[StepStatus, EventName] = {
    StepStatus.COMPLETED: "step.completed",
    StepStatus.SKIPPED: "step.skipped",
    StepStatus.FAILED: "step.failed",
    StepStatus.COMPENSATED: "step.compensated",
    StepStatus.COMPENSATION_FAILED: "step.compensation_failed",
}
_RUN_EVENTS: dict[RunStatus, EventName] = {
    RunStatus.COMPLETED: "run.completed",
    RunStatus.FAILED: "run.failed",
    RunStatus.COMPENSATED: "run.compensated",
    RunStatus.COMPENSATION_FAILED: "run.compensation_failed",
    RunStatus.CANCELLED: "run.cancelled",
}


def _run_status(move: Move, *, forward: bool) -> RunStatus | None:
    match move:
        case Finish(run=run):
            return run
        case Undo() if forward:
            return RunStatus.COMPENSATING
        case _:
            return None


def _ids(claim: Claim, worker_id: str) -> dict[str, Any]:
    message = claim.message
    return {
        "workflow_id": message.workflow_id,
        "workflow": message.workflow,
        "step": claim.key.step,
        "activity": claim.activity.name,
        "attempt": claim.grant.attempt,
        "trace_id": message.trace_id,
        "correlation_id": message.correlation_id,
        "worker": worker_id,
    }


def _uncancel() -> None:
    task = asyncio.current_task()
    if task is not None:
        task.uncancel()


def _is_cancelled() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def _text(error: BaseException) -> str:
    text = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    return text if len(text) <= _ERROR_CHARACTERS else f"{text[:_ERROR_CHARACTERS]}..."


def _timeout_text(claim: Claim, timeout: float | None) -> str:
    deadline = claim.message.routing_slip.deadline
    if claim.step is not None and deadline is not None and claim.now >= deadline:
        return "the run's deadline has passed"
    return f"the attempt took longer than {timeout:g} s"
