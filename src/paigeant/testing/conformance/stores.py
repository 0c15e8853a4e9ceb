"""The promises of `Store` and `RunHistory`, as tests."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
from pydantic_core import from_json

from paigeant import folding
from paigeant.errors import InvalidTransition, RunConflict, RunNotFound
from paigeant.slip import Phase, Revision, RunStatus, Step, StepStatus
from paigeant.store import (
    ClaimRequest,
    DeadLetter,
    Grant,
    NextStep,
    Recorded,
    Refused,
    StepKey,
    StepRecord,
    Store,
)
from paigeant.testing.conformance.bench import PATIENCE, due, run
from paigeant.testing.conformance.history import HistoryConformance
from paigeant.testing.conformance.leases import LeaseConformance
from paigeant.testing.conformance.values import ValueConformance
from paigeant.testing.conformance.waits import WaitConformance

__all__ = ["StoreConformance"]


class StoreConformance(LeaseConformance, WaitConformance, ValueConformance, HistoryConformance):
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
        revision = folding.pack_revision(Revision((Step("c", id="a.1"), Step("b", id="b")), 1))
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

    async def test_a_success_stands_whose_claim_was_forgotten(self, store: Store) -> None:
        """A claim needn't be on the disk: after a crash the database may know of none, nor that the run has begun."""
        key = await self.start(store)
        forgotten = Grant(1, 1, self.clock.now())
        await self.record(store, self.ending(key, forgotten, output=b"1", next=due("b")))
        assert (await self.refused(store, key)).reason == "recorded"
        detail = await store.load_run("r")
        assert [row.status for row in detail.steps] == [StepStatus.COMPLETED, StepStatus.READY]
        assert detail.run.status is RunStatus.RUNNING
        assert detail.run.started_at == self.clock.now()

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
            await asyncio.wait_for(heard.wait(), PATIENCE)
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
        slip, payload = folding.fold(detail, inline_bytes=100)
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
