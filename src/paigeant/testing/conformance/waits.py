"""The promises of `Store` on what waits: steps that are parked, signals that somebody takes, requests to people."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from typing import Any

import pytest
from pydantic_core import from_json

from paigeant import ledger
from paigeant.errors import InvalidTransition, RequestNotFound, RunNotFound
from paigeant.identity import GRANT_SIGNAL
from paigeant.slip import RunStatus, StepStatus
from paigeant.store import (
    ClaimRequest,
    Grant,
    NextStep,
    Refused,
    Request,
    StepKey,
    StepRecord,
    Store,
    WorkerRecord,
)
from paigeant.testing.conformance.bench import StoreBench, due, run

__all__ = ["WaitConformance"]


def request(request_id: str = "q", run_id: str = "r", **fields: Any) -> Request:
    """A question of step `a` of a run."""
    return Request(request_id, run_id, "a", "question", "Which?", b'{"question":"Which?"}', **fields)


class WaitConformance(StoreBench):
    """Part of `StoreConformance`."""

    async def parked(
        self, store: Store, *signals: str, until: float | None = None, run_id: str = "r", **fields: Any
    ) -> StepKey:
        """A run whose step `a` waits for one of the signals, or until an instant."""
        key = await self.start(store, run_id=run_id, **fields)
        grant = await self.claim(store, key)
        await self.record(store, self.ending(key, grant, StepStatus.WAITING, waits_for=signals, until=until))
        return key

    async def row(self, store: Store, key: StepKey) -> StepRecord:
        """The row of a step."""
        return next(row for row in (await store.load_run(key.workflow_id)).steps if row.key == key)

    # -- parking

    async def test_a_parked_step_is_nobodys(self, store: Store) -> None:
        """Its row says what it waits for, its run waits, and the attempt isn't counted: it goes on later."""
        key = await self.parked(store, "paid", "sent", until=self.clock.now() + 60)
        async with self.other(store) as other:
            row = await self.row(other, key)
            assert (row.status, row.worker, row.epoch, row.attempt) == (StepStatus.WAITING, None, 1, 0)
            assert from_json(row.waits_for or b"") == ["paid", "sent"]
            assert row.wake_at == self.clock.now() + 60
            assert await other.run_status("r") is RunStatus.WAITING
            assert await other.open_steps("r") == []

    async def test_a_parked_step_is_left_alone(self, store: Store) -> None:
        """Messages that come for it start nothing, and what its worker did before it left it is stale."""
        key = await self.parked(store, "paid")
        assert (await self.refused(store, key)).reason == "taken"
        await store.sign_off("mine")
        assert await store.release_steps("mine", [(key, 1)]) == []
        late = self.ending(key, Grant(1, 1, self.clock.now()), StepStatus.FAILED, error="E")
        assert await store.record_step_result(late) == Refused("stale")
        assert (await self.row(store, key)).status is StepStatus.WAITING

    async def test_a_parked_attempt_goes_on_when_it_is_due(self, store: Store) -> None:
        """With a new epoch and the same number. A message that comes a moment early is told when to come again."""
        key = await self.parked(store, until=self.clock.now() + 60)
        self.clock.advance(58)
        assert (await self.refused(store, key)).reason == "taken"
        self.clock.advance(1.5)
        assert await self.refused(store, key) == Refused("not_due", retry_in=0.5)
        self.clock.advance(0.5)
        grant = await self.claim(store, key, "other", attempts=1)
        assert (grant.epoch, grant.attempt, grant.exhausted) == (2, 1, False)
        row = await self.row(store, key)
        assert (row.status, row.waits_for, row.worker) == (StepStatus.RUNNING, None, "other")
        assert await store.run_status("r") is RunStatus.RUNNING

    async def test_of_many_that_wake_a_step_one_goes_on(self, store: Store) -> None:
        """However many messages come when it is due, in however many processes."""
        key = await self.parked(store, until=self.clock.now() + 60)
        self.clock.advance(60)
        async with self.other(store) as other:
            asked = [
                each.claim_step(ClaimRequest(key, f"w{n}", 9)) for n, each in enumerate([store, other] * 5)
            ]
            answers = await asyncio.gather(*asked)
        assert sum(isinstance(answer, Grant) for answer in answers) == 1

    async def test_a_signal_makes_the_step_ready_that_waits_for_it(self, store: Store) -> None:
        """At once, for anybody; another one leaves it alone."""
        key = await self.parked(store, "paid", "sent")
        await store.record_signal("r", "other", b"1")
        assert (await self.row(store, key)).status is StepStatus.WAITING
        self.clock.advance(5)
        async with self.other(store) as other:
            await other.record_signal("r", "sent", b"1")
        row = await self.row(store, key)
        assert (row.status, row.waits_for, row.attempt) == (StepStatus.READY, None, 0)
        assert (row.not_before, row.wake_at) == (self.clock.now(), self.clock.now())
        assert await store.open_steps("r") == [key]
        assert (await self.claim(store, key)).attempt == 1

    async def test_what_came_meanwhile_keeps_a_step_from_being_parked(self, store: Store) -> None:
        """It would never be woken: its worker is told, and has it still."""
        key = await self.start(store)
        grant = await self.claim(store, key)
        await store.record_signal("r", "paid", b"1")
        parked = self.ending(key, grant, StepStatus.WAITING, waits_for=("paid", "sent"))
        assert await store.record_step_result(parked) == Refused("arrived")
        row = await self.row(store, key)
        assert (row.status, row.worker) == (StepStatus.RUNNING, "mine")
        await store.take_signal(key, "unit", "paid")
        await self.record(store, parked)
        assert (await self.row(store, key)).status is StepStatus.WAITING

    async def test_a_step_is_parked_by_who_has_it(self, store: Store) -> None:
        """Not by a claim that was lost, and not once its run is cancelled."""
        key = await self.start(store)
        old = await self.claim(store, key)
        await store.release_steps("mine", [(key, 1)])
        grant = await self.claim(store, key, "other")
        assert await store.record_step_result(
            self.ending(key, old, StepStatus.WAITING, waits_for=("paid",))
        ) == Refused("stale")
        await store.cancel_run("r", "stop")
        parked = self.ending(key, grant, StepStatus.WAITING, "other", waits_for=("paid",))
        answer = await store.record_step_result(parked)
        assert isinstance(answer, Refused)
        assert await store.run_status("r") is RunStatus.CANCELLED

    async def test_what_starts_later_without_a_message_is_sent_when_it_may_start(self, store: Store) -> None:
        """No grace time later: no message of it is under way."""
        start = self.clock.now() + 3600
        for run_id, is_sent in (("r", True), ("s", False)):
            first = NextStep(StepKey(run_id, "a"), "a", "a", start, is_sent)
            await store.record_workflow_start(run(run_id, "a"), first)
        self.clock.set(start - 1)
        assert (await store.sweep()).due == ()
        self.clock.set(start)
        assert (await store.sweep()).due == (StepKey("s", "a"),)

    async def test_a_sweep_wakes_what_is_due(self, store: Store) -> None:
        """Sleepers and those whose time is up, and sends a message for them; not a moment earlier."""
        until = self.clock.now() + 3600
        sleeping = await self.parked(store, until=until)
        waiting = await self.parked(store, "paid", until=until, run_id="s")
        self.clock.set(until - 0.25)
        assert (await store.sweep()).due == ()
        assert (await self.row(store, sleeping)).status is StepStatus.WAITING
        self.clock.set(until)
        assert set((await store.sweep()).due) == {sleeping, waiting}
        for key in (sleeping, waiting):
            row = await self.row(store, key)
            assert (row.status, row.waits_for) == (StepStatus.READY, None)
        assert (await self.claim(store, sleeping)).attempt == 1

    async def test_a_wait_without_an_end_is_never_woken(self, store: Store) -> None:
        """However long it takes."""
        key = await self.parked(store, "paid")
        self.clock.advance(50 * 365 * 86400.0)
        assert (await store.sweep()).due == ()
        row = await self.row(store, key)
        assert (row.status, row.wake_at) == (StepStatus.WAITING, ledger.NEVER)

    async def test_a_worker_that_is_lost_has_no_parked_steps(self, store: Store) -> None:
        """They were nobody's."""
        store.beat(WorkerRecord("mine", "host", "1@1"), lease=30.0, running=())
        await self.parked(store, "paid")
        swept = await store.sweep(gone=["mine"])
        assert (swept.lost, swept.freed, swept.due) == (("mine",), (), ())

    async def test_an_undo_may_wait_too(self, store: Store) -> None:
        """Its run goes on being undone."""
        key = await self.undoing(store)
        grant = await self.claim(store, key)
        await self.record(store, self.ending(key, grant, StepStatus.WAITING, waits_for=("back",)))
        assert await store.run_status("r") is RunStatus.COMPENSATING
        await store.record_signal("r", "back", b"1")
        assert await store.open_steps("r") == [key]
        grant = await self.claim(store, key)
        done = self.ending(key, grant, StepStatus.COMPENSATED, run=RunStatus.COMPENSATED)
        await self.record(store, done)
        assert await store.run_status("r") is RunStatus.COMPENSATED

    async def test_a_waiting_run_is_cancelled(self, store: Store) -> None:
        """And ends at once where nothing is to be undone."""
        key = await self.parked(store, "paid")
        assert await store.cancel_run("r", "no more") is RunStatus.CANCELLED
        assert (await self.row(store, key)).status is StepStatus.FAILED
        with pytest.raises(InvalidTransition, match="takes no signals"):
            await store.record_signal("r", "paid", b"1")
        assert (await self.refused(store, key)).reason == "ended"

    async def test_a_deadline_ends_a_run_that_waits(self, store: Store) -> None:
        """The sweep finds it, and an operator may take it up again: the step begins its wait anew."""
        key = await self.parked(store, "paid", deadline=self.clock.now() + 60)
        self.clock.advance(61)
        assert (await store.sweep()).expired == ("r",)
        assert await store.run_status("r") is RunStatus.FAILED
        await store.retry_run("r")
        assert (await self.claim(store, key)).attempt == 1

    async def test_what_waits_for_others_is_not_open_work(self, store: Store) -> None:
        """Who works until nothing is left waits for what goes on by itself, and for nobody outside."""
        await self.parked(store, "paid", until=self.clock.now() + 60)
        assert not await store.has_open(["a"])
        await self.parked(store, until=self.clock.now() + 60, run_id="s")
        assert await store.has_open(["a"])

    async def test_a_run_may_begin_later(self, store: Store) -> None:
        """Its first step isn't due before, and is looked at then."""
        begins = self.clock.now() + 600
        record = replace(due(), not_before=begins)
        assert await store.record_workflow_start(run(), record)
        key = StepKey("r", "a")
        assert await self.refused(store, key) == Refused("not_due", retry_in=600.0)
        assert (await self.row(store, key)).wake_at == begins + self.grace
        self.clock.set(begins)
        assert (await self.claim(store, key)).attempt == 1

    # -- grants

    async def test_a_grant_handle_wakes_and_is_kept(self, store: Store) -> None:
        """The run's headers name it from then on, the step that waits for one is ready, a signal tells who gave it."""
        key = await self.parked(store, GRANT_SIGNAL)
        named = {"traceparent": "p", "paigeant-mandate": '{"handle": "ä"}'}
        async with self.other(store) as other:
            assert await other.record_grant("r", headers=named, sender="Ada") == [key]
        row = await self.row(store, key)
        assert (row.status, row.wake_at) == (StepStatus.READY, self.clock.now())
        detail = await store.load_run("r")
        assert detail.run.headers == named
        assert [(one.name, one.value, one.sender) for one in detail.signals] == [
            (GRANT_SIGNAL, b"null", "Ada")
        ]

    async def test_a_grant_handle_may_come_before_it_is_needed(self, store: Store) -> None:
        """It is kept for a step that will wait for one: that isn't parked."""
        key = await self.start(store)
        grant = await self.claim(store, key)
        assert await store.record_grant("r", headers={"a": "b"}) == []
        leaving = self.ending(key, grant, StepStatus.WAITING, waits_for=(GRANT_SIGNAL,))
        assert await store.record_step_result(leaving) == Refused("arrived")

    async def test_a_token_wakes_and_is_not_recorded(self, store: Store) -> None:
        """The step is ready, and left for the grace time to the message that brings the token; nothing tells of it."""
        key = await self.parked(store, GRANT_SIGNAL)
        before = await store.load_run("r")
        assert await store.record_grant("r") == [key]
        row = await self.row(store, key)
        assert (row.status, row.wake_at) == (StepStatus.READY, self.clock.now() + self.grace)
        detail = await store.load_run("r")
        assert (detail.run.headers, detail.signals) == (before.run.headers, ())

    async def test_a_token_needs_somebody_who_waits_for_it(self, store: Store) -> None:
        """It can't be kept; nor does it go to a step that waits for something else, or to a run that has ended."""
        await self.parked(store, "paid")
        with pytest.raises(InvalidTransition, match="waits for a grant"):
            await store.record_grant("r")
        await store.cancel_run("r", "stop")
        with pytest.raises(InvalidTransition, match="has ended"):
            await store.record_grant("r", headers={})
        with pytest.raises(RunNotFound):
            await store.record_grant("nobody", headers={})

    # -- taking signals

    async def test_signals_are_taken_once_the_oldest_first(self, store: Store) -> None:
        """Each by one unit, whose record it is from then on; who took it stands in the run."""
        key = await self.start(store)
        await store.record_signal("r", "paid", b'{"n": 1.0}', sender="Ada \xc3\xa4")
        self.clock.advance(1)
        await store.record_signal("r", "other", b"0")
        await store.record_signal("r", "paid", b"2")
        first = await store.take_signal(key, "u1", "paid")
        async with self.other(store) as other:
            assert await other.take_signal(key, "u1", "paid") == first
            second = await other.take_signal(key, "u2", "paid")
            assert await other.take_signal(key, "u3", "paid") is None
            assert await other.load_units(key) == {"u1": first, "u2": second}
        assert first is not None
        assert from_json(first) == {"value": {"n": 1.0}, "by": "Ada \xc3\xa4", "at": self.clock.now() - 1}
        assert from_json(second or b"") == {"value": 2, "by": "", "at": self.clock.now()}
        assert b'"value":{"n": 1.0}' in first, "JSON stays as it was written"
        taken = [(found.name, found.taken_by) for found in (await store.load_run("r")).signals]
        assert taken == [("paid", "a"), ("other", None), ("paid", "a")]

    async def test_a_recorded_unit_takes_nothing(self, store: Store) -> None:
        """What stands stands: a wait whose time was up stays so, and the signal is there for the next."""
        key = await self.start(store)
        await store.save_unit(key, "u1", b"null")
        await store.record_signal("r", "paid", b"1")
        assert await store.take_signal(key, "u1", "paid") == b"null"
        assert from_json(await store.take_signal(key, "u2", "paid") or b"")["value"] == 1

    async def test_a_retry_has_what_was_denied_done_anew(self, store: Store) -> None:
        """Waits that were over without an answer, with all that belongs to them, and what held an answer."""
        stays = {
            "u": b"1",
            "u#2": b"null",  # a value like any other
            "told": b"null",
            "told!until": b"5",
            "told!told": b"true",
            "held": b"2",
            "held!refused": b"true",
            "allowed!begun!decision": b'{"value":{"approved":true},"by":"ada"}',
            "allowed!begun!decision!token": b'"t1"',
            "no answer": b'{"value":{"approved":false},"by":"ada"}',  # that is one: it was asked whether to go on
            "no answer!token": b'"t2"',
        }
        goes = {
            "over": b"null",
            "over!until": b"5",
            "denied": b'{"value":{"denied":"no"},"by":"ada"}',
            "denied!token": b'"t3"',
            "lost!begun!decision": b'{"value":{"approved":false},"by":"ada"}',
            "lost!begun!decision!token": b'"t4"',
            "held!held": b"true",
        }
        keys = [await self.start(store, run_id=run_id) for run_id in ("r", "s")]
        for key in keys:
            for name, value in {**stays, **goes}.items():
                await store.save_unit(key, name, value)
        ended = {"run": RunStatus.FAILED, "ending": "failed", "run_error": "a: E: no"}
        grant = await self.claim(store, keys[0])
        await self.record(store, self.ending(keys[0], grant, StepStatus.FAILED, error="E: no", **ended))
        await store.retry_run("r")
        async with self.other(store) as other:
            assert await other.load_units(keys[0]) == stays
            assert await other.load_units(keys[1]) == {**stays, **goes}
            assert await other.save_unit(keys[0], "over", b"1") == b"1"

    async def test_a_signal_or_else_is_recorded_in_one_go(self, store: Store) -> None:
        """Whoever's time is up takes what came in the last moment; else that nothing came is what stands."""
        key = await self.start(store)
        await store.record_signal("r", "paid", b"1")
        taken = await store.take_signal(key, "u1", "paid", otherwise=b"null")
        assert from_json(taken or b"")["value"] == 1
        assert await store.take_signal(key, "u2", "paid", otherwise=b"null") == b"null"
        await store.record_signal("r", "paid", b"2")
        async with self.other(store) as other:
            assert await other.take_signal(key, "u2", "paid", otherwise=b"7") == b"null"
        assert await store.load_units(key) == {"u1": taken, "u2": b"null"}

    async def test_a_run_takes_its_own_signals(self, store: Store) -> None:
        """Not those of others, of whatever name."""
        key = await self.start(store)
        await self.start(store, run_id="s")
        await store.record_signal("s", "paid", b"1")
        assert await store.take_signal(key, "u", "paid") is None

    async def test_of_many_that_take_one_signal_one_gets_it(self, store: Store) -> None:
        """Whoever is first, in whichever process."""
        key = await self.start(store)
        await store.record_signal("r", "paid", b"1")
        async with self.other(store) as other:
            asked = [each.take_signal(key, f"u{n}", "paid") for n, each in enumerate([store, other] * 5)]
            answers = await asyncio.gather(*asked)
        assert sum(answer is not None for answer in answers) == 1

    async def test_a_signal_and_a_step_that_leaves_don_t_miss_each_other(self, store: Store) -> None:
        """At the same moment, in two processes: either the step hears that it has come, or it is woken by it."""
        keys = [await self.start(store, run_id=f"r{n}") for n in range(10)]
        grants = [await self.claim(store, key) for key in keys]
        async with self.other(store) as other:
            parking = [
                store.record_step_result(self.ending(key, grant, StepStatus.WAITING, waits_for=("paid",)))
                for key, grant in zip(keys, grants, strict=True)
            ]
            sending = [other.record_signal(key.workflow_id, "paid", b"1") for key in keys]
            answers = await asyncio.gather(
                *(each for pair in zip(parking, sending, strict=True) for each in pair)
            )
        for key, answer in zip(keys, answers[::2], strict=True):
            status = (await self.row(store, key)).status
            assert status is (StepStatus.RUNNING if answer == Refused("arrived") else StepStatus.READY)

    # -- requests

    async def test_a_request_is_kept_once(self, store: Store) -> None:
        """As it was asked first, by the store's time; it is open, and new the first time only."""
        await self.start(store)
        asked = request(expires_at=self.clock.now() + 60)
        assert await store.open_request(asked)
        kept = replace(asked, created_at=self.clock.now())
        self.clock.advance(1)
        async with self.other(store) as other:
            assert not await other.open_request(replace(asked, name="Other?", asked=b"{}"))
            assert await other.load_request("q") == kept
            assert await other.list_requests() == [kept]
        assert await store.load_request("nobody's") is None

    async def test_requests_are_listed_the_oldest_first(self, store: Store) -> None:
        """Of all runs or of one, so many at most, and by default those that are open."""
        for number, run_id in enumerate(("r", "s", "r")):
            if number < 2:
                await self.start(store, run_id=run_id)
            await store.open_request(request(f"q{number}", run_id))
            self.clock.advance(1)
        await store.answer_request("q1", b"1")

        async def ids(**fields: Any) -> list[str]:
            return [found.id for found in await store.list_requests(**fields)]

        assert await ids() == ["q0", "q2"]
        assert await ids(only_open=False) == ["q0", "q1", "q2"]
        assert await ids(only_open=False, limit=2) == ["q0", "q1"]
        assert await ids(limit=1) == ["q0"]
        assert await ids(workflow_id="s") == []
        assert await ids(workflow_id="s", only_open=False) == ["q1"]
        assert await ids(workflow_id="nobody", only_open=False) == []

    async def test_an_answer_is_a_signal_that_wakes_who_asked(self, store: Store) -> None:
        """It is kept with who gave it, and taken like any other."""
        asked = request()
        key = await self.parked(store, asked.signal)
        await store.open_request(asked)
        self.clock.advance(5)
        async with self.other(store) as other:
            answered = await other.answer_request("q", b'{"n": 1.0}', sender="ada")
        assert (answered.answer, answered.answered_by) == (b'{"n": 1.0}', "ada")
        assert (answered.answered_at, answered.is_open) == (self.clock.now(), False)
        assert await store.load_request("q") == answered
        assert (await self.row(store, key)).status is StepStatus.READY
        taken = from_json(await store.take_signal(key, "u", asked.signal) or b"")
        assert taken == {"value": {"n": 1.0}, "by": "ada", "at": self.clock.now()}
        assert await store.load_request("q") == answered, "taking it changes nothing of it"

    async def test_the_first_answer_stands(self, store: Store) -> None:
        """The same one again changes nothing, whoever gives it; another one is refused, and says who was first."""
        await self.start(store)
        await store.open_request(request())
        first = await store.answer_request("q", b'{"a":1,"b":2}', sender="ada")
        self.clock.advance(1)
        assert await store.answer_request("q", b'{"b": 2, "a": 1}', sender="bob") == first
        with pytest.raises(InvalidTransition, match="answered by ada already"):
            await store.answer_request("q", b"3", sender="bob")
        assert len((await store.load_run("r")).signals) == 1

    async def test_of_many_answers_at_once_one_stands(self, store: Store) -> None:
        """And all others hear of it."""
        await self.start(store)
        await store.open_request(request())
        async with self.other(store) as other:
            giving = [
                each.answer_request("q", json.dumps(n).encode()) for n, each in enumerate([store, other] * 5)
            ]
            answers = await asyncio.gather(*giving, return_exceptions=True)
        given = [answer for answer in answers if isinstance(answer, Request)]
        assert len(given) == 1
        assert sum(isinstance(answer, InvalidTransition) for answer in answers) == 9
        assert len((await store.load_run("r")).signals) == 1

    async def test_nobody_answers_what_nobody_waits_for(self, store: Store) -> None:
        """What is unknown, whose time is up, or whose run has ended. What is being undone may still ask."""
        with pytest.raises(RequestNotFound, match="nobody's"):
            await store.answer_request("nobody's", b"1")
        await self.start(store)
        await store.open_request(request(expires_at=self.clock.now() + 60))
        await self.undoing(store, "s")
        await store.open_request(request("undo", "s"))
        self.clock.advance(60)
        assert [found.id for found in await store.list_requests()] == ["undo"]
        with pytest.raises(InvalidTransition, match="time is up"):
            await store.answer_request("q", b"1")
        assert (await store.answer_request("undo", b"1")).answer == b"1"
        await store.cancel_run("r", "stop")
        await store.open_request(request("late"))
        with pytest.raises(InvalidTransition, match="its step has ended"):
            await store.answer_request("late", b"1")

    async def test_requests_go_with_their_run(self, store: Store) -> None:
        """When it is deleted, and no others."""
        key = await self.completed(store)
        await store.open_request(request())
        await self.start(store, run_id="s")
        await store.open_request(request("other", "s"))
        self.clock.advance(100)
        assert await store.prune_runs(before=self.clock.now()) == 1
        assert await store.load_request("q") is None
        assert [found.id for found in await store.list_requests(only_open=False)] == ["other"]
        assert await store.take_signal(key, "u", "paid") is None
