"""The promises of `Store` and `RunHistory`, as tests."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from pydantic_core import from_json

from paigeant import ledger
from paigeant.errors import InputInvalid, InvalidTransition, RunConflict, RunNotFound
from paigeant.policy import LARGEST_COUNT
from paigeant.slip import Phase, Revision, RunStatus, Step, StepStatus
from paigeant.store import (
    ClaimRequest,
    DeadLetter,
    Grant,
    NextStep,
    OpenTopic,
    Recorded,
    Refused,
    RunRecord,
    StepKey,
    StepRecord,
    Store,
    WorkerRecord,
)
from paigeant.testing.conformance.bench import due, run
from paigeant.testing.conformance.waits import WaitConformance

__all__ = ["StoreConformance"]

_PATIENCE = 20.0
_LEASE = 30.0
_MINE = WorkerRecord("mine", "host", "1@1")
_OTHER = WorkerRecord("other", "host", "2@2")


class StoreConformance(WaitConformance):
    """Derive from it, give the class a name that begins with Test, and say how to make a store."""

    # -- a run starts

    async def test_a_started_run_is_there(self, store: Store) -> None:
        """A run comes back as it was recorded, with its first step ready."""
        record = run("r", deadline=2e9, headers={"traceparent": "p", "x": "ä"})
        assert await store.record_workflow_start(record, due())
        detail = await store.load_run("r")
        assert detail.run == replace(record, created_at=self.clock.now())
        [step] = detail.steps
        assert (step.key, step.activity, step.topic) == (StepKey("r", "a", Phase.DO), "a", "a")
        assert (step.status, step.epoch, step.attempt, step.seq) == (StepStatus.READY, 0, 0, 0)
        assert step.wake_at == self.clock.now() + self.grace
        assert await store.open_steps("r") == [step.key]

    async def test_starting_twice_is_one_run(self, store: Store) -> None:
        """The same id with the same input is the same run, whatever has become of it, in any process."""
        await self.completed(store)
        async with self.other(store) as other:
            assert not await other.record_workflow_start(run("r", "a"), due())
        assert await store.run_status("r") is RunStatus.COMPLETED

    async def test_an_id_belongs_to_one_input(self, store: Store) -> None:
        """The same id with another input, or another workflow, is a conflict that says so."""
        await self.start(store)
        with pytest.raises(RunConflict, match="another input"):
            await store.record_workflow_start(run("r", input_hash="other"), due())
        with pytest.raises(RunConflict, match="workflow 'w'"):
            await store.record_workflow_start(run("r", workflow="v"), due())

    async def test_starts_at_the_same_moment_agree(self, store: Store) -> None:
        """Of many that start one run at once exactly one has started it; other inputs conflict."""
        starts = [store.record_workflow_start(run("r"), due()) for _ in range(20)]
        wrong = store.record_workflow_start(run("r", input_hash="other"), due())
        *answers, conflict = await asyncio.gather(*starts, wrong, return_exceptions=True)
        assert sorted(str(answer) for answer in answers) == ["False"] * 19 + ["True"]
        assert isinstance(conflict, RunConflict)

    async def test_a_run_without_steps_is_complete(self, store: Store) -> None:
        """Nothing to do is done at once."""
        assert await store.record_workflow_start(run("r"), None)
        detail = await store.load_run("r")
        assert (detail.run.status, detail.steps) == (RunStatus.COMPLETED, ())
        assert detail.run.completed_at == self.clock.now()
        assert await store.wait_ended("r") is RunStatus.COMPLETED

    # -- claims

    async def test_a_claim_counts_before_the_code_runs(self, store: Store) -> None:
        """A granted step is running, with epoch and attempt one higher; its run is running."""
        key = await self.start(store)
        self.clock.advance(3)
        assert await self.claim(store, key) == Grant(1, 1, self.clock.now())
        detail = await store.load_run("r")
        assert (detail.run.status, detail.run.started_at) == (RunStatus.RUNNING, self.clock.now())
        [step] = detail.steps
        assert (step.status, step.worker, step.started_at) == (StepStatus.RUNNING, "mine", self.clock.now())

    async def test_epochs_rise_with_every_claim(self, store: Store) -> None:
        """A step that is claimed again has a higher epoch, whoever claims it."""
        key = await self.start(store)
        epochs = []
        for worker in ("mine", "other", "mine"):
            grant = await self.claim(store, key, worker)
            epochs.append((grant.epoch, grant.attempt))
            await self.record(store, self.ending(key, grant, StepStatus.READY, worker, error="E"))
        assert epochs == [(1, 1), (2, 2), (3, 3)]

    async def test_a_claimed_step_is_taken(self, store: Store) -> None:
        """Nobody gets a step that a worker has, not even that worker."""
        key = await self.start(store)
        await self.claim(store, key)
        assert (await self.refused(store, key)).reason == "taken"
        assert (await self.refused(store, key, "mine")).reason == "taken"

    async def test_of_many_claims_one_is_granted(self, store: Store) -> None:
        """However many ask at the same moment, from however many processes, one gets the step."""
        key = await self.start(store)
        async with self.other(store) as other:
            asked = [
                each.claim_step(ClaimRequest(key, f"w{n}", 9)) for n, each in enumerate([store, other] * 10)
            ]
            answers = await asyncio.gather(*asked)
        assert sum(isinstance(answer, Grant) for answer in answers) == 1
        assert {answer.reason for answer in answers if isinstance(answer, Refused)} == {"taken"}

    async def test_an_unknown_step_is_refused(self, store: Store) -> None:
        """A step that isn't there, not yet, or of no run, can't be claimed."""
        key = await self.start(store)
        assert (await self.refused(store, StepKey("nobody", "a"))).reason == "unknown"
        assert (await self.refused(store, key._replace(step="b"))).reason == "unknown"
        assert (await self.refused(store, key._replace(phase=Phase.UNDO))).reason == "unknown"

    async def test_a_recorded_step_is_not_claimed_again(self, store: Store) -> None:
        """What is recorded is never done again, while the run goes on."""
        key = await self.start(store)
        await self.record(store, self.ending(key, await self.claim(store, key), next=due("b")))
        assert (await self.refused(store, key)).reason == "recorded"

    async def test_a_step_of_an_ended_run_is_not_claimed(self, store: Store) -> None:
        """A run that has ended, or is being undone, does nothing more."""
        await store.cancel_run((await self.start(store, run_id="c")).workflow_id, "stop")
        assert (await self.refused(store, StepKey("c", "a"))).reason == "ended"
        await self.undoing(store)
        assert (await self.refused(store, StepKey("r", "b"))).reason == "ended"

    async def test_a_waiting_attempt_is_not_due(self, store: Store) -> None:
        """Nothing starts before its not_before; who asks is told how long that is."""
        key = await self.start(store)
        grant = await self.claim(store, key)
        await self.record(store, self.ending(key, grant, StepStatus.READY, delay=60.0, error="E: try again"))
        [step] = (await store.load_run("r")).steps
        assert (step.not_before, step.error) == (self.clock.now() + 60, "E: try again")
        self.clock.advance(20)
        assert await self.refused(store, key) == Refused("not_due", retry_in=40.0)
        self.clock.advance(40)
        assert (await self.claim(store, key)).attempt == 2

    async def test_used_up_attempts_are_granted_only_to_be_recorded(self, store: Store) -> None:
        """After the last attempt a claim counts none and says that it is exhausted."""
        key = await self.start(store)
        for _ in range(2):
            grant = await self.claim(store, key, attempts=2)
            await self.record(store, self.ending(key, grant, StepStatus.READY, error="E"))
        grant = await self.claim(store, key, attempts=2)
        assert (grant.epoch, grant.attempt, grant.exhausted) == (3, 2, True)

    # -- results

    async def test_a_result_is_recorded_whole(self, store: Store) -> None:
        """Input, output, revision, usage, variables, and the step that follows: one transaction."""
        key = await self.start(store)
        grant = await self.claim(store, key)
        self.clock.advance(2)
        revision = ledger.pack_revision(Revision((Step("c", id="a.1"), Step("b", id="b")), 1))
        result = self.ending(
            key,
            grant,
            input=b'{"n":1}',
            output=b'{"deep":[1,2.50,"\xc3\xa4"]}',
            revision=revision,
            undo_topic="undo-here",
            usage=b'{"tokens":3}',
            variables={"v": b"1"},
            next=NextStep(StepKey("r", "a.1"), "c", "topic of c"),
        )
        assert await self.record(store, result) == Recorded()
        detail = await store.load_run("r")
        done, following = detail.steps
        assert (done.status, done.attempt, done.completed_at) == (StepStatus.COMPLETED, 1, self.clock.now())
        assert (done.input, done.output) == (result.input, result.output)
        assert (done.revision, done.undo_topic, done.usage) == (revision, "undo-here", result.usage)
        assert (following.key, following.seq, following.topic) == (StepKey("r", "a.1"), 1, "topic of c")
        assert (following.status, following.epoch) == (StepStatus.READY, 0)
        assert detail.variables == {"v": b"1"}
        assert await store.load_output("r", "a") == result.output

    async def test_a_skipped_step_had_no_attempt(self, store: Store) -> None:
        """A step whose condition was false counts none, though it was claimed to find that out."""
        key = await self.start(store)
        grant = await self.claim(store, key)
        await self.record(store, self.ending(key, grant, StepStatus.SKIPPED, next=due("b")))
        done = (await store.load_run("r")).steps[0]
        assert (done.status, done.attempt, done.output) == (StepStatus.SKIPPED, 0, None)

    async def test_the_last_result_ends_the_run(self, store: Store) -> None:
        """The state that a result gives its run is durable with it."""
        await self.completed(store)
        detail = await store.load_run("r")
        assert (detail.run.status, detail.run.completed_at) == (RunStatus.COMPLETED, self.clock.now())
        assert await store.open_steps("r") == []

    async def test_the_worker_can_take_the_next_step_along(self, store: Store) -> None:
        """`take_next` claims what follows in the same transaction."""
        key = await self.start(store)
        grant = await self.claim(store, key)
        result = self.ending(key, grant, next=due("b"), take_next=True)
        assert await self.record(store, result) == Recorded(Grant(1, 1, self.clock.now()))
        assert (await self.refused(store, StepKey("r", "b"))).reason == "taken"
        following = (await store.load_run("r")).steps[1]
        assert (following.status, following.worker, following.attempt) == (StepStatus.RUNNING, "mine", 1)
        assert following.started_at == self.clock.now()

    async def test_the_same_commit_again_stands(self, store: Store) -> None:
        """A worker that doesn't know whether its commit arrived may repeat it: it hears the same."""
        key = await self.start(store)
        result = self.ending(key, await self.claim(store, key), output=b"1", next=due("b"), take_next=True)
        first = await self.record(store, result)
        assert await self.record(store, result) == first
        assert len((await store.load_run("r")).steps) == 2

    async def test_a_result_stands_once(self, store: Store) -> None:
        """A step has one immutable result: another attempt's comes too late, success or failure."""
        key = await self.start(store)
        stale = await self.claim(store, key)
        await store.sweep()
        fresh = await self.claim(store, key, "other")
        await self.record(store, self.ending(key, fresh, worker="other", output=b"2", next=due("b")))
        for late in (StepStatus.COMPLETED, StepStatus.FAILED):
            answer = await store.record_step_result(self.ending(key, stale, late, output=b"1"))
            assert answer == Refused("recorded")
        assert await store.load_output("r", "a") == b"2"

    async def test_a_late_first_success_stands(self, store: Store) -> None:
        """A worker that lost its lease and still succeeds first is believed, and fences off who came after it."""
        key = await self.start(store)
        stale = await self.claim(store, key)
        await store.sweep()
        fresh = await self.claim(store, key, "other")
        await self.record(store, self.ending(key, stale, output=b"1", next=due("b")))
        answer = await store.record_step_result(self.ending(key, fresh, worker="other", output=b"2"))
        assert answer == Refused("recorded")
        assert await store.load_output("r", "a") == b"1"

    async def test_a_late_success_stands_before_the_next_claim(self, store: Store) -> None:
        """The same when nobody has claimed the freed step yet."""
        key = await self.start(store)
        stale = await self.claim(store, key)
        await store.sweep()
        await self.record(store, self.ending(key, stale, output=b"1", next=due("b")))
        assert (await self.refused(store, key)).reason == "recorded"

    async def test_strict_fencing_refuses_a_late_success(self, store: Store) -> None:
        """A step that asks for it takes only the result of whoever holds it."""
        key = await self.start(store)
        stale = await self.claim(store, key)
        await store.sweep()
        late = self.ending(key, stale, strict=True, output=b"1", next=due("b"))
        assert await store.record_step_result(late) == Refused("stale")
        fresh = await self.claim(store, key, "other")
        assert await store.record_step_result(late) == Refused("stale")
        await self.record(store, self.ending(key, fresh, worker="other", strict=True, next=due("b")))

    async def test_a_stale_failure_never_takes_effect(self, store: Store) -> None:
        """Who lost its lease can neither fail the step nor put it off."""
        key = await self.start(store)
        stale = await self.claim(store, key)
        await store.sweep()
        await self.claim(store, key, "other")
        for status in (StepStatus.FAILED, StepStatus.READY):
            late = self.ending(key, stale, status, error="E", delay=60.0, run=RunStatus.FAILED)
            assert await store.record_step_result(late) == Refused("stale")
        detail = await store.load_run("r")
        assert (detail.run.status, detail.steps[0].status) == (RunStatus.RUNNING, StepStatus.RUNNING)

    async def test_nothing_is_recorded_after_the_run_left_running(self, store: Store) -> None:
        """A result that comes after a cancel changes nothing, variables neither."""
        key = await self.start(store)
        grant = await self.claim(store, key)
        await store.cancel_run("r", "stop")
        result = self.ending(key, grant, output=b"1", variables={"v": b"1"}, next=due("b"))
        assert isinstance(await store.record_step_result(result), Refused)
        detail = await store.load_run("r")
        assert (len(detail.steps), detail.variables) == (1, {})
        assert detail.steps[0].status is StepStatus.FAILED

    async def test_a_result_for_an_unknown_step_is_refused(self, store: Store) -> None:
        """There is nothing to record for what isn't there."""
        result = self.ending(StepKey("nobody", "a"), Grant(1, 1, 0.0))
        assert await store.record_step_result(result) == Refused("unknown")

    async def test_variables_come_with_the_attempt_that_succeeded(self, store: Store) -> None:
        """The value of a later step replaces an earlier one's."""
        key = await self.start(store)
        await self.record(
            store, self.ending(key, await self.claim(store, key), variables={"v": b"1"}, next=due("b"))
        )
        assert await store.load_variable("r", "v") == 1
        key = StepKey("r", "b")
        done = self.ending(
            key, await self.claim(store, key), variables={"v": b"2", "w": b"null"}, run=RunStatus.COMPLETED
        )
        await self.record(store, done)
        assert await store.list_variables("r") == {"v": 2, "w": None}

    async def test_many_at_once_don_t_mix(self, store: Store) -> None:
        """Runs whose starts, claims and results share transactions each get their own."""
        count = 120
        ids = [f"r{n}" for n in range(count)]
        await asyncio.gather(*(self.start(store, "a", run_id=run_id) for run_id in ids))
        keys = [StepKey(run_id, "a") for run_id in ids]
        grants = await asyncio.gather(*(self.claim(store, key) for key in keys))
        results = [
            self.ending(key, grant, output=b"%d" % n, variables={"n": b"%d" % n}, run=RunStatus.COMPLETED)
            for n, (key, grant) in enumerate(zip(keys, grants, strict=True))
        ]
        await asyncio.gather(*(self.record(store, result) for result in results))
        for n, run_id in enumerate(ids):
            assert await store.load_output(run_id, "a") == b"%d" % n
            assert await store.list_variables(run_id) == {"n": n}

    # -- undoing

    async def test_a_failed_run_is_undone(self, store: Store) -> None:
        """An undo is a row of its own that is claimed and recorded like a step; it settles the step it undoes."""
        key = await self.undoing(store)
        grant = await self.claim(store, key)
        assert (grant.epoch, grant.attempt) == (1, 1)
        assert await store.run_status("r") is RunStatus.COMPENSATING
        await self.record(store, self.ending(key, grant, StepStatus.COMPENSATED, run=RunStatus.COMPENSATED))
        detail = await store.load_run("r")
        states = [(row.step, row.phase, row.status) for row in detail.steps]
        assert states == [
            ("a", Phase.DO, StepStatus.COMPENSATED),
            ("b", Phase.DO, StepStatus.FAILED),
            ("a", Phase.UNDO, StepStatus.COMPENSATED),
        ]
        assert (detail.run.status, detail.run.error) == (RunStatus.COMPENSATED, "b: E: no")
        assert await store.load_output("r", "a") == b'"a"'

    async def test_each_undo_is_recorded_once(self, store: Store) -> None:
        """A second worker's undo of the same step comes too late."""
        key = await self.undoing(store)
        stale = await self.claim(store, key)
        await store.sweep()
        fresh = await self.claim(store, key, "other")
        ended = {"run": RunStatus.COMPENSATED}
        await self.record(store, self.ending(key, fresh, StepStatus.COMPENSATED, "other", **ended))
        late = self.ending(key, stale, StepStatus.COMPENSATED, **ended)
        assert await store.record_step_result(late) == Refused("recorded")

    # -- giving back

    async def test_a_released_step_keeps_its_attempts(self, store: Store) -> None:
        """What a shutdown cut short is ready again for anybody, and doesn't count."""
        key = await self.start(store)
        grant = await self.claim(store, key)
        assert await store.release_steps("mine", [(key, grant.epoch)]) == [key]
        [step] = (await store.load_run("r")).steps
        assert (step.status, step.attempt, step.worker) == (StepStatus.READY, 0, None)
        assert await self.claim(store, key, "other") == Grant(2, 1, self.clock.now())

    async def test_only_the_holder_releases_a_step(self, store: Store) -> None:
        """Another worker's release, or one of an older claim, changes nothing; doing it twice neither."""
        key = await self.start(store)
        grant = await self.claim(store, key)
        assert await store.release_steps("other", [(key, grant.epoch)]) == []
        assert await store.release_steps("mine", [(key, grant.epoch + 1), (StepKey("nobody", "a"), 1)]) == []
        assert await store.release_steps("mine", [(key, grant.epoch)]) == [key]
        assert await store.release_steps("mine", [(key, grant.epoch)]) == []
        assert await store.release_steps("mine", []) == []

    # -- leases

    def beat(self, store: Store, worker: WorkerRecord = _MINE, **fields: Any) -> tuple[set[Any], set[Any]]:
        """Hold the worker's lease."""
        return store.beat(worker, **{"lease": _LEASE, "running": (), **fields})

    async def test_a_beat_signs_on_and_renews(self, store: Store) -> None:
        """A worker is listed with the end of its lease, counted from its last beat by the store's time."""
        await asyncio.to_thread(self.beat, store)
        self.clock.advance(20)
        await asyncio.to_thread(self.beat, store)
        [worker] = await store.list_workers()
        assert worker == replace(_MINE, lease_until=self.clock.now() + _LEASE)

    async def test_a_beat_tells_what_was_lost(self, store: Store) -> None:
        """Steps that a worker runs but no longer holds, by cancel or by a newer claim, are told."""
        kept, cancelled, retaken = [await self.start(store, run_id=name) for name in ("k", "c", "t")]
        running = {(key, (await self.claim(store, key)).epoch) for key in (kept, cancelled, retaken)}
        await store.cancel_run("c", "stop")
        await store.release_steps("mine", [(retaken, 1)])
        await self.claim(store, retaken, "other")
        lost, unlisted = await asyncio.to_thread(self.beat, store, running=running)
        assert (lost, unlisted) == ({(cancelled, 1), (retaken, 1)}, set())

    async def test_a_beat_tells_what_is_not_listed(self, store: Store) -> None:
        """Steps that are the worker's but aren't on its list are told; it may not know of them."""
        key = await self.start(store)
        await self.claim(store, key)
        assert await asyncio.to_thread(self.beat, store) == (set(), {(key, 1)})
        assert (await self.refused(store, key)).reason == "taken"

    async def test_a_beat_frees_what_was_forgotten(self, store: Store) -> None:
        """What the worker says it has forgotten is free at once and due for a message; what it never held stays."""
        key, other = await self.start(store), await self.start(store, run_id="o")
        await self.claim(store, key)
        await self.claim(store, other, "other")
        forgotten = {(key, 1), (other, 1), (StepKey("nobody", "a"), 1)}
        assert await asyncio.to_thread(self.beat, store, forgotten=forgotten) == (set(), set())
        await asyncio.to_thread(self.beat, store, _OTHER, running=[(other, 1)])
        assert key in (await store.sweep()).due
        assert (await self.claim(store, key, "other")).epoch == 2
        assert (await self.refused(store, other)).reason == "taken"

    async def test_what_an_empty_topic_has_lost_is_sent_once_more(self, store: Store) -> None:
        """Of a topic without messages a step that waits for long is due at once, though only once in a grace time."""
        key = await self.start(store)
        [topic] = [each.topic for each in await store.open_topics()]
        for _ in range(2):
            self.clock.advance(store.grace)
            assert (await store.sweep()).due == (key,)
        assert (await store.sweep(empty=[topic])).due == ()
        self.clock.advance(store.grace)
        assert (await store.sweep()).due == ()
        assert (await store.sweep(empty=["other"])).due == ()
        assert (await store.sweep(empty=[topic, "other"])).due == (key,)
        assert (await store.sweep(empty=[topic])).due == ()

    async def test_a_lease_protects_its_steps(self, store: Store) -> None:
        """While a worker beats, a sweep takes nothing from it, however long a step lasts."""
        key = await self.start(store)
        await asyncio.to_thread(self.beat, store)
        await self.claim(store, key)
        for _ in range(5):
            self.clock.advance(_LEASE - 1)
            await asyncio.to_thread(self.beat, store, running=[(key, 1)])
            swept = await store.sweep()
            assert (swept.lost, swept.freed) == ((), ())
        assert (await self.refused(store, key)).reason == "taken"

    async def test_a_lease_that_is_over_frees_its_steps(self, store: Store) -> None:
        """A worker that fell silent is struck off; its steps are ready, due at once, their attempts counted."""
        key = await self.start(store)
        await asyncio.to_thread(self.beat, store)
        await self.claim(store, key)
        self.clock.advance(_LEASE)
        swept = await store.sweep()
        assert (swept.lost, swept.freed, swept.due) == (("mine",), (key,), (key,))
        assert await store.list_workers() == []
        assert await self.claim(store, key, "other") == Grant(2, 2, self.clock.now())

    async def test_a_worker_known_to_be_gone_needs_no_wait(self, store: Store) -> None:
        """A sweep frees at once what belongs to workers whose process has ended; the others keep theirs."""
        key, other = await self.start(store), await self.start(store, run_id="o")
        for worker, step in ((_MINE, key), (_OTHER, other)):
            await asyncio.to_thread(self.beat, store, worker)
            await self.claim(store, step, worker.id)
        swept = await store.sweep(gone=["mine", "unknown"])
        assert (swept.lost, swept.freed) == (("mine",), (key,))
        assert (await self.refused(store, other)).reason == "taken"

    async def test_a_worker_that_signed_off_leaves_its_steps(self, store: Store) -> None:
        """What a worker still held when it signed off is given back, uncounted, and due. Twice is harmless."""
        key = await self.start(store)
        await asyncio.to_thread(self.beat, store)
        await self.claim(store, key)
        await store.sign_off("mine")
        await store.sign_off("mine")
        assert await store.list_workers() == []
        assert (await store.sweep()).due == (key,)
        assert await self.claim(store, key, "other") == Grant(2, 1, self.clock.now())

    # -- sweeps

    async def test_a_ready_step_is_due_after_the_grace_time(self, store: Store) -> None:
        """A step whose message may be lost is found once it has waited too long, and again a grace time after."""
        key = await self.start(store)
        self.clock.advance(self.grace - 1)
        assert (await store.sweep()).due == ()
        self.clock.advance(1)
        assert (await store.sweep()).due == (key,)
        assert (await store.sweep()).due == ()
        self.clock.advance(self.grace)
        assert (await store.sweep()).due == (key,)

    async def found_after(self, store: Store, graces: int) -> list[int]:
        """After how many grace times from now a sweep finds a step that nobody claims."""
        found = []
        for passed in range(1, graces + 1):
            self.clock.advance(self.grace)
            if (await store.sweep()).due:
                found.append(passed)
        return found

    async def test_a_backlog_is_sent_again_ever_more_seldom(self, store: Store) -> None:
        """The gaps double, up to thirty grace times: a long backlog doesn't fill a broker with repeats of itself."""
        await self.start(store)
        assert await self.found_after(store, 100) == [1, 2, 4, 8, 16, 32, 62, 92]

    async def test_a_step_that_is_ready_anew_is_sent_soon_again(self, store: Store) -> None:
        """However old its row is: the gaps count from when an attempt ended, was given back or was lost."""
        key = await self.start(store)
        await self.found_after(store, 40)
        grant = await self.claim(store, key)
        await self.record(store, self.ending(key, grant, StepStatus.READY, delay=self.grace, error="E"))
        assert await self.found_after(store, 10) == [2, 3, 5, 9]
        grant = await self.claim(store, key)
        await store.release_steps("mine", [(key, grant.epoch)])
        assert await self.found_after(store, 10) == [1, 2, 4, 8]
        await self.claim(store, key, "nobody-beats")
        assert key in (await store.sweep()).due
        assert await self.found_after(store, 10) == [1, 2, 4, 8]

    async def test_what_a_lost_worker_may_have_fetched_is_sent_again_at_once(self, store: Store) -> None:
        """However long a step has waited: its message may have been with the worker that is gone."""
        key = await self.start(store)
        assert await self.found_after(store, 10) == [1, 2, 4, 8]
        fresh = await self.start(store, run_id="fresh")
        await asyncio.to_thread(self.beat, store, lease=1.0)
        assert (await store.sweep()).due == ()
        self.clock.advance(1.0)
        swept = await store.sweep()
        assert (swept.lost, swept.due) == (
            ("mine",),
            (key,),
        )  # not that of which the message is just on its way
        assert await store.open_steps(fresh.workflow_id) == [fresh]
        assert (await store.sweep()).due == ()

    async def test_a_waiting_attempt_is_due_after_its_time(self, store: Store) -> None:
        """The grace time of another attempt counts from its not_before."""
        key = await self.start(store)
        grant = await self.claim(store, key)
        await self.record(store, self.ending(key, grant, StepStatus.READY, delay=60.0, error="E"))
        self.clock.advance(60 + self.grace - 1)
        assert (await store.sweep()).due == ()
        self.clock.advance(1)
        assert (await store.sweep()).due == (key,)

    async def test_one_of_many_sweeps_sends_a_message(self, store: Store) -> None:
        """Workers that sweep at the same moment don't all send the same message."""
        key = await self.start(store)
        self.clock.advance(self.grace)
        async with self.other(store) as other:
            swept = await asyncio.gather(*(each.sweep() for each in [store, other] * 4))
        assert [due for one in swept for due in one.due] == [key]

    async def test_a_sweep_takes_a_bounded_number(self, store: Store) -> None:
        """No more than `limit` steps at once; the next sweep finds the rest."""
        keys = {await self.start(store, run_id=f"r{n}") for n in range(5)}
        self.clock.advance(self.grace)
        first, second = await store.sweep(limit=3), await store.sweep(limit=3)
        assert (len(first.due), len(second.due)) == (3, 2)
        assert {*first.due, *second.due} == keys

    async def test_a_run_over_its_deadline_fails(self, store: Store) -> None:
        """At its deadline a run fails like one whose step failed; what was running is lost."""
        key = await self.start(store, deadline=self.clock.now() + 60)
        await asyncio.to_thread(self.beat, store, lease=1e6)
        await self.claim(store, key)
        self.clock.advance(59)
        assert (await store.sweep()).expired == ()
        self.clock.advance(1)
        assert (await store.sweep()).expired == ("r",)
        assert (await store.sweep()).expired == ()
        detail = await store.load_run("r")
        assert detail.run.status is RunStatus.FAILED
        assert "DeadlineExceeded" in str(detail.run.error)
        lost, _ = await asyncio.to_thread(self.beat, store, running=[(key, 1)])
        assert lost == {(key, 1)}

    async def test_a_late_run_is_undone(self, store: Store) -> None:
        """A run with recorded steps that is over its deadline undoes them, and is late only once."""
        key = await self.start(store, deadline=self.clock.now() + 60)
        done = self.ending(key, await self.claim(store, key), undo_topic="a", next=due("b"))
        await self.record(store, done)
        self.clock.advance(60)
        assert (await store.sweep()).expired == ("r",)
        assert await store.run_status("r") is RunStatus.COMPENSATING
        assert await store.open_steps("r") == [StepKey("r", "a", Phase.UNDO)]
        self.clock.advance(60)
        assert (await store.sweep()).expired == ()

    async def test_a_run_that_can_t_be_read_hinders_no_sweep(self, store: Store) -> None:
        """A run over its deadline whose slip newer code has written is left to that; the others are ended."""
        deadline = self.clock.now() + 60
        for run_id, slip in (("newer", b'{"more":1}'), ("odd", b'{"itinerary":[{"activity":""}]}')):
            await store.record_workflow_start(
                replace(run(run_id, deadline=deadline), slip=slip), due("a", run_id)
            )
        await self.start(store, deadline=deadline)
        self.clock.advance(60)
        swept = await store.sweep()
        assert (swept.expired, len(swept.due)) == (("r",), 2)

    async def test_an_ended_run_has_no_deadline(self, store: Store) -> None:
        """A run that ended in time is left alone."""
        key = await self.start(store, "a", deadline=self.clock.now() + 60)
        await self.record(store, self.ending(key, await self.claim(store, key), run=RunStatus.COMPLETED))
        self.clock.advance(61)
        assert (await store.sweep()).expired == ()
        assert await store.run_status("r") is RunStatus.COMPLETED

    # -- operators

    async def test_cancelling_ends_a_run_with_nothing_to_undo(self, store: Store) -> None:
        """A run that has recorded nothing is cancelled at once, its open step failed."""
        await self.start(store)
        assert await store.cancel_run("r", "not wanted") is RunStatus.CANCELLED
        detail = await store.load_run("r")
        assert (detail.run.status, detail.run.error) == (RunStatus.CANCELLED, "not wanted")
        assert (detail.steps[0].status, detail.steps[0].error) == (StepStatus.FAILED, "not wanted")

    async def test_cancelling_undoes_what_was_recorded(self, store: Store) -> None:
        """A run with recorded steps is being undone first; cancelling again changes nothing."""
        key = await self.start(store)
        done = self.ending(key, await self.claim(store, key), undo_topic="a", next=due("b"))
        await self.record(store, done)
        for _ in range(2):
            assert await store.cancel_run("r", "stop") is RunStatus.COMPENSATING
        undo = StepKey("r", "a", Phase.UNDO)
        assert await store.open_steps("r") == [undo]
        ended = self.ending(
            undo, await self.claim(store, undo), StepStatus.COMPENSATED, run=RunStatus.CANCELLED
        )
        await self.record(store, ended)
        assert await store.run_status("r") is RunStatus.CANCELLED

    async def test_an_ended_run_can_t_be_cancelled(self, store: Store) -> None:
        """What has ended stays ended, and no run at all is an error of its own."""
        await self.completed(store)
        with pytest.raises(InvalidTransition, match="completed"):
            await store.cancel_run("r", "stop")
        with pytest.raises(RunNotFound, match="nobody"):
            await store.cancel_run("nobody", "stop")

    async def test_a_failed_run_can_be_retried(self, store: Store) -> None:
        """It goes on at the step that failed, with fresh attempts, a new epoch and without its deadline."""
        key = await self.failed(store)
        self.clock.advance(5)
        assert await store.retry_run("r") is RunStatus.RUNNING
        assert await store.open_steps("r") == [key]
        detail = await store.load_run("r")
        assert (detail.run.ending, detail.run.error, detail.run.completed_at) == (None, None, None)
        grant = await self.claim(store, key)
        assert (grant.epoch, grant.attempt) == (3, 1)
        await self.record(store, self.ending(key, grant, output=b"1", run=RunStatus.COMPLETED))
        assert await store.run_status("r") is RunStatus.COMPLETED

    async def test_a_retried_run_has_no_deadline(self, store: Store) -> None:
        """The deadline has had its say: a run that it ended can be done after it."""
        key = await self.start(store, deadline=self.clock.now() + 60)
        self.clock.advance(60)
        assert (await store.sweep()).expired == ("r",)
        await store.retry_run("r")
        assert (await store.sweep()).expired == ()
        assert (await self.claim(store, key)).attempt == 1

    async def test_undos_that_failed_can_be_retried(self, store: Store) -> None:
        """A run that could not be undone goes on undoing what is left, with fresh attempts."""
        key = await self.undoing(store)
        failed = self.ending(
            key,
            await self.claim(store, key),
            StepStatus.COMPENSATION_FAILED,
            error="E: stuck",
            run=RunStatus.COMPENSATION_FAILED,
        )
        await self.record(store, failed)
        detail = await store.load_run("r")
        assert detail.steps[0].status is StepStatus.COMPENSATION_FAILED
        assert await store.retry_run("r") is RunStatus.COMPENSATING
        assert await store.open_steps("r") == [key]
        grant = await self.claim(store, key)
        assert grant.attempt == 1
        done = self.ending(key, grant, StepStatus.COMPENSATED, run=RunStatus.COMPENSATED)
        await self.record(store, done)
        detail = await store.load_run("r")
        assert detail.run.status is RunStatus.COMPENSATED
        assert detail.steps[0].status is StepStatus.COMPENSATED

    @pytest.mark.parametrize("state", ["running", "completed", "cancelled"])
    async def test_other_runs_can_t_be_retried(self, store: Store, state: str) -> None:
        """Only what ended badly is taken up again; the error says in which state the run is."""
        if state == "completed":
            await self.completed(store)
        else:
            await self.claim(store, await self.start(store))
        if state == "cancelled":
            await store.cancel_run("r", "stop")
        with pytest.raises(InvalidTransition, match=state):
            await store.retry_run("r")

    async def test_retrying_no_run_is_an_error(self, store: Store) -> None:
        """There is nothing to retry for an id that no run has."""
        with pytest.raises(RunNotFound, match="nobody"):
            await store.retry_run("nobody")

    async def test_turning_a_run_is_heard(self, store: Store) -> None:
        """Who asked hears of a cancel, of any process where one hears it, until it stops listening."""
        heard = asyncio.Event()
        forget = store.on_turn(heard.set)
        await self.start(store)
        async with self.other(store) as other:
            await other.cancel_run("r", "stop")
            await asyncio.wait_for(heard.wait(), _PATIENCE)
        heard.clear()
        forget()
        await self.start(store, run_id="s")
        await store.cancel_run("s", "stop")
        assert not heard.is_set()

    async def test_open_steps_are_found_by_topic(self, store: Store) -> None:
        """has_open tells of steps that wait or are being done, in the topics that were asked for."""
        assert not await store.has_open(["a"])
        key = await self.start(store, "a")
        assert await store.has_open(["x", "a"])
        assert not await store.has_open(["x"])
        grant = await self.claim(store, key)
        assert await store.has_open(["a"])
        await self.record(store, self.ending(key, grant, run=RunStatus.COMPLETED))
        assert not await store.has_open(["a"])

    # -- values of a run

    @pytest.mark.parametrize(
        "value",
        [
            None,
            0,
            "",
            False,
            [],
            {},
            2**70,
            -(2**63) - 1,
            0.1,
            1e308,
            "ä\u2028\U0001f600",
            {"a": [{"": None}]},
        ],
    )
    async def test_a_variable_comes_back(self, store: Store, value: Any) -> None:
        """Any JSON value is a value; None, 0, "" and False as well as numbers of any size."""
        await self.start(store)
        await store.save_variable("r", "v", value)
        found = await store.load_variable("r", "v", "missing")
        assert (found, type(found)) == (value, type(value))

    async def test_a_variable_can_be_replaced(self, store: Store) -> None:
        """The last value counts, in every process."""
        await self.start(store)
        await store.save_variable("r", "v", 1)
        async with self.other(store) as other:
            await other.save_variable("r", "v", 2)
        assert await store.list_variables("r") == {"v": 2}

    async def test_a_missing_variable_is_the_default(self, store: Store) -> None:
        """What was never saved, or belongs to another run, is the caller's default."""
        await self.start(store)
        assert await store.load_variable("r", "v") is None
        assert await store.load_variable("nobody", "v", 7) == 7

    async def test_a_variable_needs_a_run_and_a_json_value(self, store: Store) -> None:
        """Saving for no run, or what JSON can't hold, is an error."""
        await self.start(store)
        with pytest.raises(RunNotFound):
            await store.save_variable("nobody", "v", 1)
        with pytest.raises(InputInvalid, match="'v'"):
            await store.save_variable("r", "v", object())

    async def test_the_first_value_of_a_unit_stands(self, store: Store) -> None:
        """A unit of work has one value, for each step, phase and name."""
        key = await self.start(store)
        assert await store.load_unit(key, "u") is None
        assert await store.save_unit(key, "u", b"1") == b"1"
        async with self.other(store) as other:
            assert await other.save_unit(key, "u", b"2") == b"1"
        assert await store.load_unit(key, "u") == b"1"
        assert await store.save_unit(key._replace(phase=Phase.UNDO), "u", b"3") == b"3"
        assert await store.save_unit(key, "v", b"null") == b"null"
        assert await store.load_unit(key, "v") == b"null"

    async def test_all_units_of_a_step_are_read_at_once(self, store: Store) -> None:
        """They come by name, and none of another step, phase or run is among them."""
        key = await self.start(store)
        assert await store.load_units(key) == {}
        for name, value in (("u", b"1"), ("ü ", b'{"a": [1.0, 1e22]}'), ("u#2", b"null")):
            await store.save_unit(key, name, value)
        await store.save_unit(key._replace(phase=Phase.UNDO), "undo", b"1")
        await store.save_unit(key._replace(step="other"), "other", b"1")
        async with self.other(store) as other:
            assert await other.load_units(key) == {"u": b"1", "ü ": b'{"a": [1.0, 1e22]}', "u#2": b"null"}

    async def test_units_saved_at_once_agree(self, store: Store) -> None:
        """All who save one unit at the same moment get the same value."""
        key = await self.start(store)
        answers = await asyncio.gather(*(store.save_unit(key, "u", b"%d" % n) for n in range(10)))
        assert len(set(answers)) == 1

    async def test_signals_are_kept_in_order(self, store: Store) -> None:
        """Each signal is kept with its time, equal ones too."""
        await self.start(store)
        await store.record_signal("r", "go", b"1")
        self.clock.advance(1)
        await store.record_signal("r", "go", b"1")
        await store.record_signal("r", "stop", b"null")
        signals = (await store.load_run("r")).signals
        assert [(signal.name, signal.value) for signal in signals] == [
            ("go", b"1"),
            ("go", b"1"),
            ("stop", b"null"),
        ]
        assert signals[1].created_at - signals[0].created_at == 1

    async def test_an_ended_run_takes_no_signals(self, store: Store) -> None:
        """Signals are for open runs that exist."""
        await self.completed(store)
        with pytest.raises(InvalidTransition, match="completed"):
            await store.record_signal("r", "go", b"1")
        with pytest.raises(RunNotFound):
            await store.record_signal("nobody", "go", b"1")

    async def test_no_output_is_none(self, store: Store) -> None:
        """A step without a recorded output, or that isn't there, has None."""
        await self.start(store)
        assert await store.load_output("r", "a") is None
        assert await store.load_output("nobody", "a") is None

    # -- runs that began elsewhere

    async def adopt(self, store: Store, run_id: str = "r") -> bool:
        """A run whose step `a` is recorded elsewhere, and whose step `b` is ready after its second claim."""
        rows = (
            StepRecord(
                *StepKey(run_id, "a"),
                seq=0,
                activity="a",
                topic="a",
                status=StepStatus.COMPLETED,
                output=b'"done"',
                undo_topic="undo-a",
            ),
            StepRecord(
                *StepKey(run_id, "b"), seq=1, activity="b", topic="b-topic", status=StepStatus.READY, epoch=2
            ),
        )
        record = run(run_id, status=RunStatus.RUNNING, input=b'{"n":1}')
        return await store.adopt_run(record, rows, {"v": b'{"k":[1]}'})

    async def test_an_adopted_run_goes_on_here(self, store: Store) -> None:
        """What was done elsewhere stands as recorded now; the step that is due is claimed and recorded as always."""
        self.clock.advance(100)
        assert await self.adopt(store)
        async with self.other(store) as other:
            detail = await other.load_run("r")
        done, ready = detail.steps
        now = self.clock.now()
        assert (detail.run.status, detail.run.created_at, detail.run.started_at) == (
            RunStatus.RUNNING,
            now,
            now,
        )
        assert (done.status, done.output, done.undo_topic) == (StepStatus.COMPLETED, b'"done"', "undo-a")
        assert (done.created_at, done.completed_at, ready.wake_at) == (now, now, now + self.grace)
        assert {name: from_json(value) for name, value in detail.variables.items()} == {"v": {"k": [1]}}
        slip, payload = ledger.fold(detail, inline_bytes=100)
        assert (slip.next_step(), payload) == (Step("b", id="b"), {"n": 1, "v": {"k": [1]}, "a": "done"})
        assert [undo.topic for undo in slip.compensations] == ["undo-a"]
        grant = await self.claim(store, StepKey("r", "b"))
        assert (grant.epoch, grant.attempt) == (3, 1)
        await self.record(store, self.ending(ready.key, grant, output=b"1", run=RunStatus.COMPLETED))
        assert await store.run_status("r") is RunStatus.COMPLETED

    async def test_a_known_run_is_not_adopted(self, store: Store) -> None:
        """Whatever the message says of a run that this store has, its rows stay as they are."""
        await self.completed(store)
        before = await store.load_run("r")
        async with self.other(store) as other:
            assert not await self.adopt(other)
        assert await store.load_run("r") == before

    async def test_of_many_that_adopt_a_run_one_does(self, store: Store) -> None:
        """Two messages of one run come to two workers at the same moment."""
        async with self.other(store) as other:
            found = await asyncio.gather(*(self.adopt(each) for each in [store, other] * 4))
        assert sorted(found) == [False] * 7 + [True]

    # -- pruning

    async def test_pruning_deletes_what_ended_long_ago(self, store: Store) -> None:
        """Runs that ended before the instant go with all that is theirs; later ones and open ones stay whole."""
        key = await self.completed(store, "old")
        await store.save_variable("old", "v", 1)
        await store.save_unit(key, "unit", b"1")
        await store.bury(DeadLetter("old-letter", "a", "x", "x", b"", workflow_id="old"))
        await store.bury(DeadLetter("nobody's", "a", "x", "x", b""))
        await self.start(store, run_id="open")
        await store.record_signal("open", "s", b"1")
        kept = [await store.load_run("open")]
        self.clock.advance(100)
        before = self.clock.now()
        await self.completed(store, "new")
        kept.append(await store.load_run("new"))
        self.clock.advance(100)
        assert await store.count_ended(before=before) == 1
        assert await store.prune_runs(before=before) == 1
        assert await store.prune_runs(before=before) == 0
        assert await store.count_ended(before=before) == 0
        with pytest.raises(RunNotFound):
            await store.load_run("old")
        assert await store.load_unit(key, "unit") is None
        assert await store.load_output(*key[:2]) is None
        assert [letter.id for letter in await store.list_dead_letters()] == ["nobody's"]
        assert [await store.load_run("open"), await store.load_run("new")] == kept

    async def test_what_was_pruned_may_be_dispatched_again(self, store: Store) -> None:
        """Nothing of the old run is left in the way of a new one of its id."""
        key = await self.completed(store)
        await store.save_unit(key, "unit", b"1")
        self.clock.advance(1)
        assert await store.prune_runs(before=self.clock.now()) == 1
        assert await self.completed(store) == key
        assert await store.load_unit(key, "unit") is None

    async def test_pruning_is_bounded_and_oldest_first(self, store: Store) -> None:
        """At most `limit` runs in one transaction."""
        for number in range(5):
            await self.completed(store, f"r{number}")
            self.clock.advance(1)
        assert await store.prune_runs(before=self.clock.now(), limit=3) == 3
        assert [found.id for found in await store.list_runs()] == ["r4", "r3"]
        assert await store.prune_runs(before=self.clock.now(), limit=3) == 2

    async def test_pruning_takes_only_states_that_were_asked_for(self, store: Store) -> None:
        """And never an open run, also when its state is among them."""
        await self.completed(store, "good")
        await self.failed(store, "bad")
        await self.start(store, run_id="open")
        self.clock.advance(1)
        states = [RunStatus.FAILED, RunStatus.PENDING, RunStatus.RUNNING]
        assert await store.count_ended(before=self.clock.now(), statuses=states) == 1
        assert await store.prune_runs(before=self.clock.now(), statuses=states) == 1
        assert {found.id for found in await store.list_runs()} == {"good", "open"}

    async def test_a_run_that_was_taken_up_again_is_not_pruned(self, store: Store) -> None:
        """Nor does it count as ended when it ended before."""
        await self.failed(store)
        self.clock.advance(100)
        await store.retry_run("r")
        self.clock.advance(100)
        assert await store.prune_runs(before=self.clock.now()) == 0
        assert await store.run_status("r") is RunStatus.RUNNING

    # -- history

    async def test_no_topic_is_open_where_no_step_is(self, store: Store) -> None:
        """A run that has ended leaves nothing in its topics."""
        await self.completed(store)
        assert await store.open_topics() == []

    async def test_open_topics_tell_the_backlog(self, store: Store) -> None:
        """By topic: steps that are ready, those whose time is yet to come, those that run, and the longest wait."""
        for number in range(3):
            await self.start(store, "work", run_id=f"r{number}")
            self.clock.advance(10)
        await self.start(store, "also", run_id="s")
        await self.claim(store, StepKey("r0", "work"))
        grant = await self.claim(store, StepKey("s", "also"))
        again = self.ending(StepKey("s", "also"), grant, StepStatus.READY, delay=100.0, error="E")
        await self.record(store, again)
        async with self.other(store) as other:
            assert await other.open_topics() == [
                OpenTopic("also", 0, 1, 0, None),
                OpenTopic("work", 2, 0, 1, 20.0),
            ]
        self.clock.advance(130)
        also, work = await store.open_topics()
        assert (also.ready, also.later, also.oldest) == (1, 0, 30.0), "the wait counts from its time"
        assert work.oldest == 150.0

    async def test_a_step_given_back_has_waited_since_then(self, store: Store) -> None:
        """How long it ran before is no time in which it waited for a worker."""
        key = await self.start(store)
        grant = await self.claim(store, key)
        self.clock.advance(1000)
        await store.release_steps("mine", [(key, grant.epoch)])
        self.clock.advance(5)
        assert await store.open_topics() == [OpenTopic("a", 1, 0, 0, 5.0)]

    async def test_waiting_ends_with_the_run(self, store: Store) -> None:
        """Who waits is woken by the commit that ends the run, several at once, from any process."""
        key = await self.start(store, "a")
        async with self.other(store) as other:
            waiting = [asyncio.create_task(each.wait_ended("r")) for each in (store, store, other)]
            await asyncio.sleep(0)
            grant = await self.claim(store, key)
            await self.record(store, self.ending(key, grant, run=RunStatus.COMPLETED))
            ended = await asyncio.wait_for(asyncio.gather(*waiting), _PATIENCE)
        assert set(ended) == {RunStatus.COMPLETED}

    async def test_waiting_ends_with_a_run_without_steps(self, store: Store) -> None:
        """Waiting for what has ended already gives its state at once."""
        await self.completed(store)
        assert await asyncio.wait_for(store.wait_ended("r"), _PATIENCE) is RunStatus.COMPLETED

    async def test_waiting_ends_with_a_cancel_and_with_a_deadline(self, store: Store) -> None:
        """Every way in which a run ends is heard."""
        await self.start(store, run_id="c")
        await self.start(store, run_id="d", deadline=self.clock.now() + 1)
        waiting = asyncio.gather(store.wait_ended("c"), store.wait_ended("d"))
        await asyncio.sleep(0)
        await store.cancel_run("c", "stop")
        self.clock.advance(1)
        await store.sweep()
        ended = await asyncio.wait_for(waiting, _PATIENCE)
        assert list(ended) == [RunStatus.CANCELLED, RunStatus.FAILED]

    async def test_waiting_for_no_run_is_an_error(self, store: Store) -> None:
        """There is nothing to wait for, look at, or load for an id that no run has."""
        calls: list[Callable[[str], Any]] = [
            store.wait_ended,
            store.run_status,
            store.load_run,
            store.list_variables,
        ]
        for call in calls:
            with pytest.raises(RunNotFound, match="nobody"):
                await call("nobody")

    async def test_a_retried_run_is_waited_for_again(self, store: Store) -> None:
        """After a retry waiting means waiting for the new end."""
        key = await self.failed(store)
        assert await store.wait_ended("r") is RunStatus.FAILED
        await store.retry_run("r")
        waiting = asyncio.create_task(store.wait_ended("r"))
        await asyncio.sleep(0)
        grant = await self.claim(store, key)
        await self.record(store, self.ending(key, grant, run=RunStatus.COMPLETED))
        assert await asyncio.wait_for(waiting, _PATIENCE) is RunStatus.COMPLETED

    async def test_an_abandoned_wait_leaves_the_others(self, store: Store) -> None:
        """Who gives up waiting takes nobody along."""
        key = await self.start(store, "a")
        kept, given_up = (asyncio.create_task(store.wait_ended("r")) for _ in range(2))
        await asyncio.sleep(0)
        given_up.cancel()
        await asyncio.gather(given_up, return_exceptions=True)
        grant = await self.claim(store, key)
        await self.record(store, self.ending(key, grant, run=RunStatus.COMPLETED))
        assert await asyncio.wait_for(kept, _PATIENCE) is RunStatus.COMPLETED

    async def test_large_outputs_can_be_left_out(self, store: Store) -> None:
        """A reader that gives a limit gets outputs up to it; the others are told as stored."""
        key = await self.start(store)
        output = b'"%s"' % ("ä" * 20).encode()
        await self.record(store, self.ending(key, await self.claim(store, key), output=output, next=due("b")))
        within = await store.load_run("r", inline_bytes=len(output))
        beyond = await store.load_run("r", inline_bytes=len(output) - 1)
        assert (within.steps[0].output, within.stored) == (output, frozenset())
        assert (beyond.steps[0].output, beyond.stored) == (None, frozenset({"a"}))

    async def test_runs_are_listed_newest_first(self, store: Store) -> None:
        """Page by page, each run once, without input and slip."""
        for n in range(7):
            await self.start(store, run_id=f"r{n}")
            if n % 2:
                self.clock.advance(1)
        pages: list[list[RunRecord]] = []
        before = None
        while page := await store.list_runs(limit=3, before=before):
            pages.append(page)
            before = (page[-1].created_at, page[-1].id)
        assert [len(page) for page in pages] == [3, 3, 1]
        assert [record.id for page in pages for record in page] == [f"r{n}" for n in reversed(range(7))]
        assert {(record.input, record.slip) for page in pages for record in page} == {(b"", b"")}

    async def test_runs_are_listed_by_state_and_workflow(self, store: Store) -> None:
        """Both filters hold together."""
        await self.start(store, run_id="open")
        await self.completed(store, run_id="done")
        await self.start(store, run_id="v", workflow="v")
        assert [record.id for record in await store.list_runs(status=RunStatus.COMPLETED)] == ["done"]
        assert [record.id for record in await store.list_runs(workflow="v")] == ["v"]
        assert await store.list_runs(status=RunStatus.COMPLETED, workflow="v") == []

    # -- dead letters

    async def test_dead_letters_are_kept(self, store: Store) -> None:
        """A letter comes back whole, with its bytes; listings leave them out, newest first."""
        letter = DeadLetter("l1", "work", "not_json", "it is no JSON", b"\x00\xff", 2, "r", "a")
        await store.bury(letter)
        self.clock.advance(1)
        await store.bury(DeadLetter("l2", "work", "too_deep", "", b"x"))
        found = await store.load_dead_letter("l1")
        assert found == replace(letter, created_at=self.clock.now() - 1)
        listed = await store.list_dead_letters()
        assert [(each.id, each.body) for each in listed] == [("l2", b""), ("l1", b"")]
        assert [each.id for each in await store.list_dead_letters(limit=1)] == ["l2"]

    async def test_the_first_letter_of_an_id_stands(self, store: Store) -> None:
        """Burying twice is harmless."""
        await store.bury(DeadLetter("l", "work", "first", "", b"1"))
        await store.bury(DeadLetter("l", "work", "second", "", b"2"))
        [letter] = await store.list_dead_letters()
        assert letter.reason == "first"

    async def test_a_dead_letter_may_be_called_anything(self, store: Store) -> None:
        """Whoever writes to a broker chooses the id: a null character or half a surrogate pair loses no letter."""
        for name in ("nul\0", "half\ud800", "\U0001f600"):
            await store.bury(DeadLetter(name, f"topic {name}", "not_json", f"about {name}", b"bytes", 1))
        assert len(await store.list_dead_letters()) == await store.count_dead_letters() == 3

    async def test_a_dead_letter_may_have_any_count_of_attempts(self, store: Store) -> None:
        """Whoever writes to a broker chooses that, too: what no store can hold is kept as the nearest that all can."""
        for name, told in (("huge", 10**18), ("below zero", -5), ("true", 3)):
            await store.bury(DeadLetter.about(name, "work", "not_json", "", b"bytes", told))
        found = {letter.id: letter.attempts for letter in await store.list_dead_letters()}
        assert found == {"huge": LARGEST_COUNT, "below zero": 0, "true": 3}

    async def test_a_dead_letter_can_be_forgotten(self, store: Store) -> None:
        """Deleting says whether there was one."""
        await store.bury(DeadLetter("l", "work", "reason", "", b"1"))
        assert await store.delete_dead_letter("l")
        assert not await store.delete_dead_letter("l")
        assert await store.load_dead_letter("l") is None

    # -- opening and closing

    async def test_opening_and_closing_twice_is_harmless(self, store: Store) -> None:
        """A second connect or close changes nothing, and a closed store can be opened again."""
        await store.connect()
        await self.start(store)
        await store.close()
        await store.close()
        await store.connect()
        await self.start(store, run_id="again")
        assert await store.run_status("again") is RunStatus.PENDING

    async def test_what_was_recorded_outlives_its_store(self, store: Store) -> None:
        """Runs, results, variables and dead letters are there for the next process, where the store is durable."""
        if not self.durable:
            return
        await self.completed(store)
        await store.save_variable("r", "v", 1)
        await store.bury(DeadLetter("l", "work", "reason", "", b"1"))
        await store.close()
        async with self.other(store) as other:
            assert await other.load_output("r", "a") == b"1"
            assert await other.load_variable("r", "v") == 1
            assert await other.load_dead_letter("l") is not None

    async def test_time_is_the_store_s(self, store: Store) -> None:
        """now() is what claims and results are stamped with."""
        assert await store.now() == self.clock.now()
        self.clock.advance(7)
        assert await store.now() == self.clock.now()
