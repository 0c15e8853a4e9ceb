"""Processes that do all that can be done to a few runs in Postgres at the same time, and what must hold afterwards.

    python -m tests.integration.postgres_hammer URL NAME RUNS [no-locks]

Each process tells what it was granted and what it recorded; `faults` holds all of that against the rows.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

from tests.patience import PATIENCE
from tests.property.attempts import ATTEMPTS, INLINE, Held, attempted

from paigeant import folding, heads, ledger
from paigeant.databases.postgres import PostgresDatabase
from paigeant.errors import InvalidTransition, StoreUnavailable
from paigeant.lane import Tx
from paigeant.slip import RUN_ENDED, Phase, RoutingSlip, RunStatus, Step, StepStatus
from paigeant.store import (
    ClaimRequest,
    DeadLetter,
    Grant,
    NextStep,
    Recorded,
    Request,
    RunDetail,
    RunRecord,
    StepKey,
    StepResult,
    WorkerRecord,
)
from paigeant.stores.sql import SqlStore
from paigeant.transport import Posting

TASKS = 8
TOGETHER = 3
"""On so many runs all fall at once; when one has ended, on the next."""

LIMIT_SECONDS = FINISH_SECONDS = PATIENCE
"""For the runs, and to end what was begun."""

STEPS = ("s0", "s1", "s2")
SUCCEEDED = (StepStatus.COMPLETED, StepStatus.SKIPPED, StepStatus.COMPENSATED)


class Slow(SqlStore):
    """A store that takes its time between what it has read and what it writes, so that others may come in between."""

    def write(self, tx: Tx, changes: ledger.Changes, postings: Sequence[Posting] = ()) -> None:
        time.sleep(random.random() * 0.006)
        super().write(tx, changes, postings)


class Hammer:
    """One process: several tasks, one store, one worker a task."""

    def __init__(self, url: str, name: str) -> None:
        self.store = Slow(PostgresDatabase(url), grace=0.0, inline_bytes=INLINE)
        self.name = name
        self.chance = random.Random(name)
        self.first = 0
        self.held: list[Held] = []
        self.results: dict[tuple[StepKey, int, str], StepResult] = {}
        self.facts: list[tuple[str, ...]] = []

    async def run(self, runs: int) -> None:
        """Hammer on so many runs, then bring all that was begun to its end."""
        await settled(self.store.connect)
        await asyncio.gather(*(self._task(f"{self.name}-{number}", runs) for number in range(TASKS)))
        await self._finish()
        await self.store.close()

    def tell(self, *fact: object) -> None:
        """What has happened, for the audit."""
        self.facts.append(tuple(map(str, fact)))

    async def _task(self, worker: str, runs: int) -> None:
        until = time.monotonic() + LIMIT_SECONDS
        acts = [self._claim] * 6 + [self._record] * 8 + [self._release, self._beat, self._sweep, self._cancel]
        acts += [self._retry, self._start, self._value]
        acts += [self._unit, self._signal, self._request, self._bury, self._sign_off]
        while self.first < runs and time.monotonic() < until:
            run = f"run-{self.first + self.chance.randrange(TOGETHER):05}"
            await self.chance.choice(acts)(worker, run)

    async def _detail(self, run: str) -> RunDetail | None:
        """The run, which is started if it isn't there; None, and on to the next ones, once it has ended."""
        if run not in await settled(lambda: self.store.statuses([run])):
            await self._start("", run)
        detail = await settled(lambda: self.store.load_run(run, inline_bytes=INLINE))
        if detail.run.status in RUN_ENDED:
            if run == f"run-{self.first:05}" and self.chance.random() < 0.3:
                self.first += 1
            return None
        return detail

    async def _start(self, _: str, run: str) -> None:
        slip = RoutingSlip(itinerary=tuple(Step(f"a{name}", id=name) for name in STEPS))
        record = RunRecord(run, "w", RunStatus.PENDING, b"{}", "hash", folding.pack_slip(slip), run, "trace")
        first = NextStep(StepKey(run, STEPS[0]), "a", "t")
        if await settled(lambda: self.store.record_workflow_start(record, first)):
            self.tell("started", run)

    async def _claim(self, worker: str, run: str) -> None:
        detail = await self._detail(run)
        if detail is None:
            return
        for row in detail.steps:
            if row.status in ledger.OPEN:
                # An answer that was lost may have been a grant: then nobody has it until a sweep frees the step.
                request = ClaimRequest(row.key, worker, ATTEMPTS, self.chance.choice((row.seq, None)))
                answer = await tried(lambda: self.store.claim_step(request))  # noqa: B023
                if isinstance(answer, Grant):
                    self.tell("granted", *row.key, answer.epoch, worker)
                    self._hold(worker, row.key, answer, detail)

    def _hold(self, worker: str, key: StepKey, grant: Grant, detail: RunDetail) -> None:
        slip, _ = folding.fold(detail, inline_bytes=INLINE)
        due = slip.next_step() if key.phase is Phase.DO else slip.next_undo()
        name = None if due is None else due.id if isinstance(due, Step) else due.step_id
        if name == key.step:  # else the run has gone on since it was read: the claim is left to a sweep
            self.held.append(Held(worker, key, grant, slip))

    async def _record(self, _: str, __: str) -> None:
        if not self.held:
            return
        held = self.chance.choice(self.held[-6:])
        if self.chance.random() < 0.8:
            self.held.remove(held)
        claim = (held.key, held.grant.epoch, held.worker)
        result = self.results.get(claim)
        if result is None:  # else it is asked again
            end = self.chance.choice(("done", "done", "done", "done", "skipped", "failed", "hopeless"))
            on, strict = self.chance.random() < 0.3, self.chance.random() < 0.3
            result = replace(attempted(held, end, 0.0, on=on, strict=strict), delay=0.0)
            self.results[claim] = result
        answer = await settled(lambda: self.store.record_step_result(result))
        if not isinstance(answer, Recorded):
            return
        self.tell("recorded", *held.key, held.grant.epoch, held.worker, result.status, result.run)
        if answer.grant is not None and result.next is not None:
            self.tell("taken", *result.next.key, answer.grant.epoch, held.worker)
            detail = await settled(lambda: self.store.load_run(held.key.workflow_id, inline_bytes=INLINE))
            self._hold(held.worker, result.next.key, answer.grant, detail)

    async def _release(self, worker: str, _: str) -> None:
        mine = [held for held in self.held if held.worker == worker][:3]
        await settled(
            lambda: self.store.release_steps(worker, [(held.key, held.grant.epoch) for held in mine])
        )

    async def _beat(self, worker: str, _: str) -> None:
        mine = {(held.key, held.grant.epoch) for held in self.held if held.worker == worker}
        forgotten = mine if self.chance.random() < 0.2 else set()
        record = WorkerRecord(worker, "host", "process")
        await settled(
            lambda: asyncio.to_thread(
                self.store.beat, record, lease=0.3, running=mine - forgotten, forgotten=forgotten
            )
        )

    async def _sweep(self, worker: str, _: str) -> None:
        gone = [worker] if self.chance.random() < 0.2 else []
        await settled(lambda: self.store.sweep(gone=gone))

    async def _cancel(self, _: str, run: str) -> None:
        if self.chance.random() < 0.2:
            await self._turn("cancelled", run, lambda: self.store.cancel_run(run, "stop"))

    async def _retry(self, _: str, run: str) -> None:
        await self._turn("retried", run, lambda: self.store.retry_run(run))

    async def _turn(self, what: str, run: str, ask: Callable[[], Awaitable[RunStatus]]) -> None:
        if await self._detail(run) is None and what != "retried":
            return
        try:
            self.tell(what, run, await ask())
        except InvalidTransition:
            pass
        except StoreUnavailable:
            self.tell("unknown", run)  # it may have been done

    async def _value(self, worker: str, run: str) -> None:
        if await self._detail(run) is not None:
            await settled(lambda: self.store.save_variable(run, "last", worker))

    async def _unit(self, worker: str, run: str) -> None:
        key, name = StepKey(run, self.chance.choice(STEPS)), self.chance.choice("ab")
        value = await settled(lambda: self.store.save_unit(key, name, json.dumps(worker).encode()))
        self.tell("unit", run, key.step, name, value)

    async def _signal(self, worker: str, run: str) -> None:
        if await self._detail(run) is not None:
            with contextlib.suppress(InvalidTransition):  # it has ended meanwhile
                await settled(lambda: self.store.record_signal(run, "ping", b"1", sender=worker))

    async def _request(self, _: str, run: str) -> None:
        if await self._detail(run) is not None:
            request = Request(f"{run}-{self.chance.choice('ab')}", run, "s0", "question", "Which?", b"{}")
            await settled(lambda: self.store.open_request(request))

    async def _bury(self, worker: str, run: str) -> None:
        letter = DeadLetter(f"{run}-{self.chance.choice('ab')}", "t", "unreadable", worker, b"")
        await settled(lambda: self.store.bury(letter))

    async def _sign_off(self, worker: str, _: str) -> None:
        if self.chance.random() < 0.2:
            await settled(lambda: self.store.sign_off(worker))

    async def _finish(self) -> None:
        """Play the worker of whatever is still open, until all runs have ended, or can't."""
        worker, until = f"{self.name}-end", time.monotonic() + FINISH_SECONDS
        while time.monotonic() < until and (left := await self._open_runs()):
            await settled(self.store.sweep)
            await settled(self.store.sweep)
            for run in left:
                await self._claim(worker, run)
            self.held = [held for held in self.held if held.worker == worker]
            while self.held:
                await self._record(worker, "")

    async def _open_runs(self) -> list[str]:
        found = []
        for status in set(RunStatus) - RUN_ENDED:
            found += await settled(lambda: self.store.list_runs(status=status))  # noqa: B023
        return [record.id for record in found]


async def settled(ask: Callable[[], Awaitable[Any]]) -> Any:
    """The answer, asked for again while it can't be had, as a worker does."""
    while True:
        try:
            return await ask()
        except StoreUnavailable:
            await asyncio.sleep(0.02)


async def tried(ask: Callable[[], Awaitable[Any]]) -> Any:
    """The answer, or None."""
    try:
        return await ask()
    except StoreUnavailable:
        return None


class _NoLock:
    """What stands in for the statements that lock."""

    def each(self, _: Tx, ids: Sequence[str]) -> None:
        """Lock nothing."""

    def rows(self, _: Tx, ids: Sequence[str]) -> list[tuple[str]]:
        """As if all were free."""
        return [(run_id,) for run_id in ids]


def without_locks() -> None:
    """Make this process one that forgets to lock runs, so that the audit can show what it is worth."""
    vars(heads).update(_LOCK=_NoLock(), _LOCK_FREE=_NoLock())


# -- the audit


def faults(details: Iterable[RunDetail], facts: Iterable[tuple[str, ...]]) -> list[str]:
    """What is not as it has to be, of these runs and of what was told about them."""
    found = []
    told: dict[str, list[tuple[str, ...]]] = {}
    for fact in facts:
        told.setdefault(fact[1], []).append(fact)
    for detail in details:
        found += [f"{detail.run.id}: {fault}" for fault in _faults(detail, told.get(detail.run.id, []))]
    return found


def _faults(detail: RunDetail, facts: list[tuple[str, ...]]) -> Iterable[str]:
    run, steps = detail.run, detail.steps
    if run.status not in RUN_ENDED or run.completed_at is None:
        yield f"has not ended but is {run.status}"
    if any(row.status in ledger.OPEN for row in steps):
        yield "has ended with an open step"
    if [fact for fact in facts if fact[0] == "started"] != [("started", run.id)]:
        yield "was not started exactly once"
    seqs = [row.seq for row in steps]
    if len(set(seqs)) != len(seqs):
        yield f"two steps have one place: {seqs}"
    units = {fact[2:] for fact in facts if fact[0] == "unit"}
    if len({unit[:2] for unit in units}) != len(units):
        yield f"a unit has two values: {sorted(units)}"
    yield from _grants(facts)
    yield from _results(detail, facts)
    yield from _undone(detail, in_order=("retried", run.id, RunStatus.COMPENSATING) not in facts)
    ends = {fact for fact in facts if fact[0] == "recorded" and fact[7] in RUN_ENDED}
    cancels = [fact for fact in facts if fact[0] == "cancelled" and fact[2] in RUN_ENDED]
    retries = [fact for fact in facts if fact[0] == "retried"]
    if not any(fact[0] == "unknown" for fact in facts) and len(ends) + len(cancels) != 1 + len(retries):
        yield f"ended {len(ends)} and {len(cancels)} times, taken up again {len(retries)} times"


def _grants(facts: list[tuple[str, ...]]) -> Iterable[str]:
    """Epochs rise: no claim is given twice. One that came with a result is told again when that is asked again."""
    claimed = Counter(fact[2:5] for fact in facts if fact[0] == "granted")
    yield from (f"{claim} was granted {count} times" for claim, count in claimed.items() if count > 1)
    taken = {fact[2:] for fact in facts if fact[0] == "taken"}
    for claim, count in Counter(fact[:3] for fact in taken).items():
        if count > 1 or claim in claimed:
            yield f"{claim} was given to several"


def _results(detail: RunDetail, facts: list[tuple[str, ...]]) -> Iterable[str]:
    """Each step has one result, and it is the one that was said to be recorded."""
    successes: dict[tuple[str, ...], set[tuple[str, ...]]] = {}
    for fact in facts:
        if fact[0] == "recorded" and fact[6] in SUCCEEDED:
            successes.setdefault(fact[2:4], set()).add(fact[4:7])
    for key, results in successes.items():
        if len(results) > 1:
            yield f"{key} was recorded by several: {sorted(results)}"
    before: StepStatus | None = StepStatus.COMPLETED
    for row in sorted(detail.steps, key=lambda row: row.seq):
        key = (row.step, str(row.phase))
        if row.phase is Phase.DO:
            if before not in (*SUCCEEDED, StepStatus.COMPENSATION_FAILED):
                yield f"{key} follows a step that is {before}"
            before = row.status
        if row.status in SUCCEEDED and key not in successes:
            yield f"{key} is {row.status}, but nobody recorded it"
        if row.status is StepStatus.FAILED and key in successes:
            yield f"{key} was recorded and is {row.status}"
        if row.output is not None:
            said = json.loads(row.output)
            if {said} != {f"{row.step}#{epoch}." for epoch, _, _ in successes.get(key, ())}:
                yield f"{key} has the output {said}, recorded were {successes.get(key)}"


def _undone(detail: RunDetail, *, in_order: bool) -> Iterable[str]:
    """What was to be undone was undone once, the last first; what failed and was taken up again came later."""
    rows_ = sorted(detail.steps, key=lambda row: row.seq)
    to_undo = [row.step for row in rows_ if row.phase is Phase.DO and row.undo_topic is not None]
    undone = [row.step for row in rows_ if row.phase is Phase.UNDO]
    expected = to_undo[::-1] if detail.run.status is not RunStatus.COMPLETED else []
    if undone != expected and (in_order or sorted(undone) != sorted(expected)):
        yield f"ended {detail.run.status}; undone were {undone}, expected {expected}"
    states = {row.status for row in rows_ if row.phase is Phase.UNDO}
    if detail.run.status in (RunStatus.COMPENSATED, RunStatus.CANCELLED) and states - {
        StepStatus.COMPENSATED
    }:
        yield f"ended {detail.run.status} with undos that are {states}"


def main() -> None:
    """Hammer as the command line says, and print what was granted and recorded."""
    url, name, runs, *more = sys.argv[1:]
    if more == ["no-locks"]:
        without_locks()
    hammer = Hammer(url, name)
    asyncio.run(hammer.run(int(runs)))
    sys.stdout.write(json.dumps(hammer.facts))


if __name__ == "__main__":
    main()
