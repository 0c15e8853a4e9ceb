"""The promises of `Store` on who works on what: steps that are given back, leases and sweeps."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

from paigeant.slip import Phase, RunStatus, StepStatus
from paigeant.store import Grant, StepKey, Store, WorkerRecord
from paigeant.testing.conformance.bench import StoreBench, due, run

__all__ = ["LeaseConformance"]

_LEASE = 30.0
_MINE = WorkerRecord("mine", "host", "1@1")
_OTHER = WorkerRecord("other", "host", "2@2")


class LeaseConformance(StoreBench):
    """Part of `StoreConformance`."""

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

    async def test_a_spared_worker_keeps_its_steps(self, store: Store) -> None:
        """Its lease may be over, and can be renewed; whoever is gone for certain isn't spared."""
        key, other = await self.start(store), await self.start(store, run_id="o")
        for worker, step in ((_MINE, key), (_OTHER, other)):
            await asyncio.to_thread(self.beat, store, worker)
            await self.claim(store, step, worker.id)
        self.clock.advance(_LEASE)
        swept = await store.sweep(spare=["mine", "other"], gone=["other"])
        assert (swept.lost, swept.freed) == (("other",), (other,))
        assert await asyncio.to_thread(self.beat, store, running=[(key, 1)]) == (set(), set())
        swept = await store.sweep()
        assert (swept.lost, swept.freed) == ((), ())

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
