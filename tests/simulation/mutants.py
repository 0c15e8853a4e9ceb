"""The engine with one of its safeguards taken out, by name: each must be caught by the simulation.

The first ones are those of the design; the others are races that the simulation found in the engine while it was
written, and what shuts them out.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest import mock

from paigeant import interventions, ledger
from paigeant.executor import Executor
from paigeant.routing import route
from paigeant.slip import Phase, RunStatus, StepStatus
from paigeant.store import Swept
from paigeant.stores.memory import MemoryStore
from paigeant.sweeper import Sweeper

__all__ = ["MUTANTS", "mutated"]

Mutation = Callable[[contextlib.ExitStack], None]
MUTANTS: dict[str, Mutation] = {}

_claim, _record, _stop, _resume = ledger.claim, ledger.record, interventions.stop, interventions.resume


def mutated(name: str) -> contextlib.ExitStack:
    """A context in which the engine lacks the safeguard of this name."""
    stack = contextlib.ExitStack()
    MUTANTS[name](stack)
    return stack


def _mutant(function: Mutation) -> Mutation:
    MUTANTS[function.__name__] = function
    return function


def _patch(stack: contextlib.ExitStack, owner: Any, name: str, value: Any) -> None:
    stack.enter_context(mock.patch.object(owner, name, value))


def _run_of(key: Any) -> RunStatus:
    return RunStatus.RUNNING if key.phase is Phase.DO else RunStatus.COMPENSATING


@_mutant
def claim_without_compare(stack: contextlib.ExitStack) -> None:
    """A claim gets the step, whatever its state and its run's."""

    def claim(head: Any, request: Any, changes: Any, *, now: float) -> Any:
        if head is not None:
            head = replace(head, status=StepStatus.READY, run=_run_of(head.key), not_before=0.0)
        return _claim(head, request, changes, now=now)

    _patch(stack, ledger, "claim", claim)


@_mutant
def record_without_compare(stack: contextlib.ExitStack) -> None:
    """A result is written, whatever there is."""

    def record(head: Any, result: Any, changes: Any, **options: Any) -> Any:
        if head is not None:
            head = replace(
                head,
                status=StepStatus.RUNNING,
                run=_run_of(head.key),
                epoch=result.epoch,
                worker=result.worker,
            )
        return _record(head, result, changes, **options)

    _patch(stack, ledger, "record", record)


@_mutant
def record_without_epoch(stack: contextlib.ExitStack) -> None:
    """A result of an old claim counts like one of the newest, failures too: no fencing."""

    def record(head: Any, result: Any, changes: Any, **options: Any) -> Any:
        if head is not None and head.status in ledger.OPEN:
            head = replace(head, status=StepStatus.RUNNING, epoch=result.epoch, worker=result.worker)
        return _record(head, result, changes, **options)

    _patch(stack, ledger, "record", record)


@_mutant
def record_for_any_run(stack: contextlib.ExitStack) -> None:
    """A result counts whatever has become of its run."""

    def record(head: Any, result: Any, changes: Any, **options: Any) -> Any:
        if head is not None:
            head = replace(head, run=_run_of(head.key))
            if head.status is StepStatus.FAILED:
                head = replace(head, status=StepStatus.RUNNING)
        return _record(head, result, changes, **options)

    _patch(stack, ledger, "record", record)


@_mutant
def no_sweeper(stack: contextlib.ExitStack) -> None:
    """Nobody puts back to work what is left behind."""

    async def sweep(self: Any) -> Swept:
        return Swept()

    _patch(stack, Sweeper, "sweep", sweep)


@_mutant
def attempts_not_counted(stack: contextlib.ExitStack) -> None:
    """A claim doesn't count the attempt that it begins."""

    def claim(head: Any, request: Any, changes: Any, *, now: float) -> Any:
        answer = _claim(head, request, changes, now=now)
        for _, patch in changes.steps:
            patch.pop("attempt", None)
        return answer

    _patch(stack, ledger, "claim", claim)


@_mutant
def started_too_early(stack: contextlib.ExitStack) -> None:
    """A retry doesn't wait for its time."""

    def claim(head: Any, request: Any, changes: Any, *, now: float) -> Any:
        return _claim(None if head is None else replace(head, not_before=0.0), request, changes, now=now)

    _patch(stack, ledger, "claim", claim)


@_mutant
def acked_before_claim(stack: contextlib.ExitStack) -> None:
    """The message is acked as it comes in."""
    claim = Executor.claim

    async def ack_first(self: Executor, message: Any) -> Any:
        await self.transport.ack(message.message_id)
        return await claim(self, message)

    _patch(stack, Executor, "claim", ack_first)


@_mutant
def undone_first_to_last(stack: contextlib.ExitStack) -> None:
    """Compensation begins with what was done first."""

    def forwards(slip: Any, outcome: Any, now: float) -> Any:
        if slip.ending is None:
            slip = replace(slip, compensations=slip.compensations[::-1])
        return route(slip, outcome, now)

    stack.enter_context(mock.patch("paigeant.executor.route", forwards))


@_mutant
def cancelled_step_keeps_epoch(stack: contextlib.ExitStack) -> None:
    """A step that a cancellation ended looks as if its worker had recorded its failure."""

    def stop(*args: Any, **options: Any) -> Any:
        status = _stop(*args, **options)
        for _, patch in args[3].steps:
            patch.pop("epoch", None)
        return status

    _patch(stack, interventions, "stop", stop)


@_mutant
def commit_cut_off(stack: contextlib.ExitStack) -> None:
    """A heartbeat that finds a step recorded already cancels the task that is about to hear of it."""

    def lose(self: Any, steps: Any) -> None:
        self._recording.clear()
        real(self, steps)

    real = Executor.lose
    _patch(stack, Executor, "lose", lose)


@_mutant
def left_with_steps_in_hand(stack: contextlib.ExitStack) -> None:
    """A worker that stops gives back what it has listed, and not what was just becoming its own."""

    async def sign_off(self: Any, worker_id: str) -> None:
        self._workers.pop(worker_id, None)

    _patch(stack, MemoryStore, "sign_off", sign_off)


@_mutant
def undos_begin_again_at_zero(stack: contextlib.ExitStack) -> None:
    """After an operator's retry the epochs of undos are those of before."""

    def resume(detail: Any, changes: Any, **options: Any) -> Any:
        status = _resume(detail, changes, **options)
        changes.added[:] = [replace(row, epoch=0) for row in changes.added]
        return status

    _patch(stack, interventions, "resume", resume)


@_mutant
def parked_past_its_signal(stack: contextlib.ExitStack) -> None:
    """A step is parked although what it waits for came while it was on its way."""

    def record(head: Any, result: Any, changes: Any, **options: Any) -> Any:
        return _record(head, result, changes, **{**options, "arrived": ()})

    _patch(stack, ledger, "record", record)


@_mutant
def woken_by_nothing(stack: contextlib.ExitStack) -> None:
    """A waiting step stays so when its signal comes, or its time."""
    _patch(stack, ledger, "wake", lambda key, changes, **options: None)


@_mutant
def woken_with_its_attempt_counted(stack: contextlib.ExitStack) -> None:
    """Each time that a step is parked costs it an attempt."""

    def record(head: Any, result: Any, changes: Any, **options: Any) -> Any:
        answer = _record(head, result, changes, **options)
        if result.status is StepStatus.WAITING:
            for _, patch in changes.steps:
                patch.pop("attempt", None)
        return answer

    _patch(stack, ledger, "record", record)
