"""Executor: all that happens to one message, from its delivery to the record of its result and what follows.

How many at once, and when to stop, is the worker's business (`worker.py`); what follows a result is decided in
`routing.py`, which rows change in `ledger.py`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import random
import time
from collections.abc import Awaitable, Callable, Collection
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

from pydantic import ValidationError
from pydantic_core import from_json

from paigeant import folding, ledger
from paigeant.activity import Activity, ActivityRegistry
from paigeant.adoption import Adoption
from paigeant.behalf import Behalf
from paigeant.claim import Claim, Limits
from paigeant.errors import (
    KeysUnavailable,
    MessageInvalid,
    MessageTooLarge,
    NotAdopted,
    PaigeantError,
    RunNotFound,
    StoreUnavailable,
    TransportUnavailable,
)
from paigeant.forwarder import LONGEST_DELAY, Forwarder, Letter
from paigeant.message import PaigeantMessage
from paigeant.observer import Observers
from paigeant.patience import patiently
from paigeant.performer import Attempt, Performer
from paigeant.reporter import Reporter
from paigeant.routing import Failed, Finish, Move, Park, Retry, Succeeded, Undo, route
from paigeant.slip import Phase, RunStatus, StepStatus
from paigeant.store import ClaimRequest, Grant, NextStep, Recorded, Refused, StepKey, StepResult, Store
from paigeant.threads import Threads
from paigeant.transport import Transport

__all__ = ["Executor"]

log = logging.getLogger("paigeant.executor")
step_log = logging.getLogger("paigeant.step")

Answer = TypeVar("Answer")

_UNKNOWN_ACTIVITY_PAUSE = 2.0
_NO_LEASE_PAUSE = 0.1


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
        adopts: bool = False,
        limits: Limits | None = None,
        observers: Observers | None = None,
        threads: Threads | None = None,
        chance: Callable[[], float] = random.random,
        behalf: Behalf | None = None,
    ) -> None:
        self.store = store
        self.transport = transport
        self.registry = registry
        self.forwarder = forwarder
        self.worker_id = worker_id
        self.topics = frozenset(topics)
        self.limits = limits or Limits()
        observers = observers or Observers()
        self.reporter = Reporter(observers, worker_id)
        self.adoption = Adoption(store, forwarder, observers, worker_id) if adopts else None
        self.performer = Performer(
            store,
            self.limits,
            worker_id=worker_id,
            reporter=self.reporter,
            is_stopping=lambda: self.stopping,
            threads=threads,
            chance=chance,
            behalf=behalf,
        )
        self.running: dict[tuple[StepKey, int], asyncio.Task[Any]] = {}
        """The steps that this worker does now, with the task that does each. The heartbeat lists them."""
        self._epochs: dict[StepKey, int] = {}
        """Of the claims by which it does them."""
        self.stopping = False
        self.entitled: Callable[[], bool] = lambda: True
        """Whether the worker's lease holds. What it claims without one, the next sweep takes away again."""
        self._chance = chance
        self._has_told_of_strangers = False
        self._lost: set[tuple[StepKey, int]] = set()
        self._recording: set[tuple[StepKey, int]] = set()
        self._slots: dict[str, asyncio.Semaphore] = {}

    # -- the path of a message

    async def handle(self, message: PaigeantMessage, bound: asyncio.Semaphore | None = None) -> None:
        """Do the step that `message` wakes, and those after it that this worker can go on with at once.

        `bound` is that of the activity which is due, see `slot`; it is released when this one step is over.
        """
        claim = None
        try:
            claim = await self.claim(message)
        finally:
            if claim is None and bound is not None:
                bound.release()
        if claim is not None:
            self.reporter.tell_claimed(claim)
            claim = claim if bound is None else replace(claim, bound=bound)
        while claim is not None:
            claim = await self._do(claim)

    async def _do(self, claim: Claim) -> Claim | None:
        step = (claim.key, claim.grant.epoch)
        self._register(claim)
        bound = claim.bound
        try:
            accepted = claim if claim.local else await self._accept(claim)
            following = None if accepted is None else await self._work(accepted)
        except asyncio.CancelledError:
            if step not in self._lost:
                if not self.stopping:  # an activity has cancelled the task it runs in
                    self._unregister(step)
                raise  # a shutdown: the step stays listed, and the worker gives it back
            _uncancel()
            self.reporter.tell("step.lost", claim, error="its lease was lost, or its run was cancelled")
            following = None
        except BaseException:
            # Nobody works on it any more; off the list, so that the heartbeat frees it.
            self._unregister(step)
            raise
        finally:
            if bound is not None:
                bound.release()
            self._lost.discard(step)
            self._recording.discard(step)
        self._unregister(step)
        return following

    async def _work(self, claim: Claim) -> Claim | None:
        following: Claim | None = claim
        while following is not None and following.key == claim.key:
            attempt = await self.performer.perform(following)
            self._check_revision(following, attempt)
            move = route(following.message.routing_slip, attempt.outcome, following.now)
            following = await self.record(following, attempt, move)
        return following

    async def claim(self, message: PaigeantMessage) -> Claim | None:
        """Lease the step and count the attempt; only then may it be acked. None when there is nothing to do here."""
        due = message.due
        if due is None:
            await self._drop(message, "ended")
            return None
        activity = self._known(due.activity, message.phase)
        if activity is None:
            what = "activity" if message.phase is Phase.DO else "compensation of activity"
            await self.give_back(message, f"no {what} '{due.activity}' here", _UNKNOWN_ACTIVITY_PAUSE)
            return None
        if not self.entitled():
            await self.give_back(message, "this worker's lease is over", _NO_LEASE_PAUSE)
            return None
        try:
            key = StepKey(message.workflow_id, message.step_id, message.phase)
            message = await self._with_payload(message)
            same = message.due is not None and message.due.activity == due.activity
            if not same or not _is_about(message, key):  # the store's rows, and they have gone on since
                await self._drop(message, "recorded")
                return None
            claim = Claim(key, Grant(0, 0, 0.0), message, activity, time.monotonic())
            attempts = claim.retry(self.limits).attempts
            request = ClaimRequest(claim.key, self.worker_id, attempts, self.forwarder.place(message))
            under_way = self._epochs.get(key)
            answer = await self.store.claim_step(request)
            if self.adoption is not None and answer == Refused("unknown"):
                await self.adoption.adopt(message)
                answer = await self.store.claim_step(request)
        except (StoreUnavailable, KeysUnavailable) as exc:
            await self.give_back(message, str(exc), 1.0)
            return None
        except ValidationError:
            await self.give_back(
                message, "what the store has of its run is of newer code", _UNKNOWN_ACTIVITY_PAUSE
            )
            return None
        except NotAdopted as exc:
            await self.reject(message, str(exc))
            return None
        except PaigeantError as exc:
            if isinstance(exc, RunNotFound):
                self._tell_of_stranger(message)
            await self._drop(message, str(exc))
            return None
        if isinstance(answer, Refused):
            if answer.retry_in is not None:
                await self.give_back(message, answer.reason, answer.retry_in)
            else:
                if answer == Refused("unknown"):
                    self._tell_of_stranger(message)
                await self._drop(message, answer.reason)
            return None
        if answer.epoch == under_way or (key, answer.epoch) in self.running:
            # The database had crashed and forgotten a claim, for claims aren't synced: this is the same one again, and
            # the step is under way, or was when this was asked and may be recorded along with it.
            await self._drop(message, "taken")
            return None
        return Claim(key, answer, message, activity, time.monotonic())

    async def _with_payload(self, message: PaigeantMessage) -> PaigeantMessage:
        try:
            return await self.forwarder.payload(message)
        except RunNotFound:
            if self.adoption is None:
                raise
            self.adoption.records(message)  # raises for what lacks something that is in another store
            return message

    async def _accept(self, claim: Claim) -> Claim | None:
        # Ack once the claim has committed: before that a crash would lose the wake-up, after it the lease protects
        # the step. An ack that fails brings a duplicate.
        with contextlib.suppress(TransportUnavailable):
            await self.transport.ack(claim.message.message_id)
        if self.forwarder.is_for(claim.message, claim.grant.epoch):
            return claim
        # Written for an earlier claim of the step: an operator may have taken the run up again since.
        message = await self._patiently(
            lambda: self.forwarder.renewed(claim.message), f"message of {claim.key}"
        )
        if _is_about(message, claim.key):
            return replace(claim, message=message)
        self.reporter.tell("step.lost", claim, error="its run was cancelled, or is over its deadline")
        return None

    async def record(self, claim: Claim, attempt: Attempt, move: Move) -> Claim | None:
        """Make the result and what follows durable; gives the next step's claim, if the run goes on here.

        It is this same step's when what the attempt waits for has come meanwhile.
        """
        following = self._following(claim, attempt, move)
        next_step = None if following is None else self.forwarder.next_step(claim.key.workflow_id, move.slip)
        activity = self._goes_on_here(claim, next_step)
        letter = None if activity is not None else self._letter(claim, move, following, next_step)
        result = self._result(claim, attempt, move, next_step, take_next=activity is not None)
        # From here on the store decides: were this cut off while the commit is under way, a result that stands, and
        # the next step with it, would be in nobody's hands.
        self._recording.add((claim.key, claim.grant.epoch))
        # Free when last looked at, so this doesn't wait. A step that waited for it while it keeps a place of the worker
        # would wait for ever for one that has it and waits for a place.
        bound = await self._taken(activity)
        try:
            answer = await self._persist(result, letter)
            if isinstance(answer, Refused) and isinstance(move, Park) and answer.reason == "arrived":
                self._recording.discard((claim.key, claim.grant.epoch))
                return replace(claim, resumed=True)
            if isinstance(answer, Refused):
                self.reporter.tell("step.lost", claim, error=answer.reason)
                return None
            self.reporter.tell_recorded(claim, result, move, answer.at)
            if activity is not None and answer.grant and following is not None and next_step is not None:
                key, local = next_step.key, claim.local + 1
                taken = Claim(key, answer.grant, following, activity, time.monotonic(), local, bound=bound)
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
        return await self._taken(self.registry.find(activity))

    # -- inside

    def _register(self, claim: Claim) -> None:
        task = asyncio.current_task()
        assert task is not None
        self.running[(claim.key, claim.grant.epoch)] = task
        self._epochs[claim.key] = claim.grant.epoch

    def _unregister(self, step: tuple[StepKey, int]) -> None:
        self.running.pop(step, None)
        if self._epochs.get(step[0]) == step[1]:
            del self._epochs[step[0]]

    async def _taken(self, activity: Activity | None) -> asyncio.Semaphore | None:
        bound = self._bound(activity)
        if bound is not None:
            await bound.acquire()
        return bound

    def _bound(self, activity: Activity | None) -> asyncio.Semaphore | None:
        limit = None if activity is None else activity.concurrency
        if activity is None or limit is None:
            return None
        return self._slots.setdefault(activity.name, asyncio.Semaphore(limit))

    def _tell_of_stranger(self, message: PaigeantMessage) -> None:
        # Two stores on one broker take each other's messages, which come again only after a grace time: nothing else
        # shows why that is slow. Of runs that were pruned, or are not in a restored copy, there may be some as well.
        if not self._has_told_of_strangers:
            self._has_told_of_strangers = True
            log.warning(
                "dropped a message of run '%s', which isn't in this store; this is told once. Unless runs were "
                "pruned, or the store restored, workers of another store use this broker: give each store a "
                "`namespace` of its own, or set `adopt`",
                message.workflow_id,
            )

    async def _drop(self, message: PaigeantMessage, reason: str) -> None:
        """A duplicate, or a message for what is long done: ack, count, drop."""
        self.reporter.tell_delivery("delivery.duplicate", message, reason)
        with contextlib.suppress(TransportUnavailable):
            await self.transport.ack(message.message_id)

    async def reject(self, message: PaigeantMessage, reason: str) -> None:
        """A message that nobody here can ever handle: kept as a dead letter."""
        try:
            await self.transport.dead_letter(message.message_id, reason)
        except (TransportUnavailable, StoreUnavailable) as exc:
            await self.give_back(message, str(exc), 1.0)

    async def give_back(self, message: PaigeantMessage, reason: str, delay: float) -> None:
        """Have a message delivered again in `delay` seconds, here or elsewhere."""
        self.reporter.tell_delivery("delivery.returned", message, reason)
        with contextlib.suppress(TransportUnavailable):
            await self.transport.nack(message.message_id, delay=delay)

    def _check_revision(self, claim: Claim, attempt: Attempt) -> None:
        """An itinerary that no message can carry is the step's failure: recorded, the run could never go on."""
        outcome = attempt.outcome
        if not isinstance(outcome, Succeeded) or outcome.revision is None:
            return
        slip = claim.message.routing_slip.mark_complete(
            compensation=outcome.compensation, revision=outcome.revision
        )
        try:
            self.forwarder.check(claim.message.evolve(routing_slip=slip))
        except MessageInvalid as exc:
            error = f"{type(exc).__name__}: the itinerary that the step leaves is too much: {exc}"
            attempt.outcome = Failed(error, claim.grant.attempt, permanent=True)

    def _following(self, claim: Claim, attempt: Attempt, move: Move) -> PaigeantMessage | None:
        """The message for what comes next; None when the run ends."""
        message = claim.message
        if isinstance(move, Finish):
            return None
        payload = message.payload
        if isinstance(attempt.outcome, Succeeded):
            outputs = {}
            if attempt.output is not None and not move.slip.executed[-1].stored:
                outputs[claim.key.step] = from_json(attempt.output)
            # An undo may leave some as well, for the undos that come after it.
            variables = {} if attempt.context is None else attempt.context._variables
            # Whose outputs stand in the payload under their ids: a variable of such a name stays behind them.
            taken = [
                entry.step_id
                for entry in move.slip.executed
                if entry.status is not StepStatus.SKIPPED and not entry.stored
            ]
            payload = folding.merged(payload, variables, outputs, taken)
        acting = None if attempt.context is None else attempt.context._acting
        if acting is not None and acting.is_renewed:
            message = message.evolve(headers=acting.headers(message.headers))
        return message.evolve(routing_slip=move.slip, payload=payload)

    def _goes_on_here(self, claim: Claim, next_step: NextStep | None) -> Activity | None:
        """The next step's activity, when this worker can do it at once: no message travels then."""
        if next_step is None or next_step.key == claim.key or self.stopping or not self.entitled():
            return None
        if claim.local + 1 >= self.limits.local_steps or next_step.topic not in self.topics:
            return None
        activity = self._known(next_step.activity, next_step.key.phase)
        bound = self._bound(activity)
        return None if bound is not None and bound.locked() else activity

    def _known(self, activity: str, phase: Phase) -> Activity | None:
        """The activity, if this worker can do it, or undo it. Another version of the code may have more than this."""
        found = self.registry.find(activity)
        return None if found is None or (phase is Phase.UNDO and found.compensation is None) else found

    def _letter(
        self, claim: Claim, move: Move, following: PaigeantMessage | None, next_step: NextStep | None
    ) -> Letter | None:
        if following is None or next_step is None:
            return None
        epoch = claim.grant.epoch
        match move:
            case Retry(delay=delay):
                return self.forwarder.letter(following, next_step.topic, epoch=epoch, delay=delay)
            case Park(until=until):
                delay = math.inf if until is None else max(until - claim.now, 0.0)
                if delay > LONGEST_DELAY:
                    return None
                return self.forwarder.letter(following, next_step.topic, epoch=epoch, delay=delay)
        return self.forwarder.letter(
            following, next_step.topic, epoch=ledger.life(claim.grant.epoch), sent_from=claim.topic
        )

    def _result(
        self, claim: Claim, attempt: Attempt, move: Move, next_step: NextStep | None, *, take_next: bool
    ) -> StepResult:
        outcome, context = attempt.outcome, attempt.context
        forward = claim.key.phase is Phase.DO
        error = outcome.error if isinstance(outcome, Failed) else None
        result = partial(StepResult, claim.key, self.worker_id, claim.grant.epoch, claim.grant.attempt)
        match move:
            case Retry(delay=delay):
                return result(StepStatus.READY, delay=delay, error=error)
            case Park(waits_for=waits_for, until=until):
                return result(StepStatus.WAITING, waits_for=waits_for, until=until)
        done = outcome if isinstance(outcome, Succeeded) else Succeeded()
        succeeded = isinstance(outcome, Succeeded) and context is not None
        return result(
            move.status,
            strict=claim.activity.strict_fencing,
            run=_run_status(move, forward=forward),
            ending="failed" if forward and error is not None else None,
            run_error=f"{claim.key.step}: {error}" if forward and error is not None else None,
            error=error,
            input=attempt.input,
            output=attempt.output if forward else None,
            revision=None if done.revision is None else folding.pack_revision(done.revision),
            undo_topic=None if done.compensation is None else done.compensation.topic,
            usage=None if context is None else context._usage,
            variables=context._variables if succeeded and context is not None else {},
            next=next_step,
            take_next=take_next,
            place=claim.message.routing_slip.place,
        )

    async def _persist(self, result: StepResult, letter: Letter | None) -> Recorded | Refused:
        """Record the result, again and again while the store can't: it is not thrown away for a short trouble."""
        posting = None
        try:
            posting = None if letter is None else self.forwarder.posting(letter)
        except MessageTooLarge as exc:
            # By a lower limit than it was checked by: the step is done all the same.
            log.warning("no message can follow %s, each sweep tries again: %s", result.key, exc)
        try:
            return await self._patiently(
                lambda: self.store.record_step_result(result, posting),
                f"result of step '{result.key.step}' of run '{result.key.workflow_id}'",
            )
        except StoreUnavailable as exc:
            log.error("result of %s not recorded, the step will run again: %s", result.key, exc)
            return Refused("unavailable")

    async def _patiently(self, ask: Callable[[], Awaitable[Answer]], what: str) -> Answer:
        return await patiently(ask, what, seconds=self.limits.persist, chance=self._chance)


def _is_about(message: PaigeantMessage, key: StepKey) -> bool:
    return (message.step_id, message.phase) == (key.step, key.phase)


def _run_status(move: Move, *, forward: bool) -> RunStatus | None:
    match move:
        case Finish(run=run):
            return run
        case Undo() if forward:
            return RunStatus.COMPENSATING
        case _:
            return None


def _uncancel() -> None:
    task = asyncio.current_task()
    if task is not None:
        task.uncancel()
