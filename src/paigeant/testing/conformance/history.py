"""The promises of `RunHistory`: what is pruned, listed and waited for, and dead letters."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from hashlib import sha256
from typing import Any

import pytest

from paigeant.counts import LARGEST_COUNT
from paigeant.errors import InputInvalid, RunNotFound
from paigeant.slip import RunStatus, StepStatus
from paigeant.store import DeadLetter, OpenTopic, RunRecord, StepKey, Store
from paigeant.testing.conformance.bench import PATIENCE, StoreBench, due

__all__ = ["HistoryConformance"]


class HistoryConformance(StoreBench):
    """Part of `StoreConformance`."""

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

    async def test_dead_letters_of_no_run_are_pruned_by_their_age(self, store: Store) -> None:
        """Those whose message named no run, or one that isn't here. What a run has stays with it."""
        await self.start(store, run_id="open")
        await self.completed(store, "ended")
        named = {"nobody's": None, "unknown's": "never here", "open's": "open", "ended's": "ended"}
        for letter, run in named.items():
            await store.bury(DeadLetter(letter, "a", "x", "x", b"", workflow_id=run))
        self.clock.advance(100)
        before = self.clock.now()
        await store.bury(DeadLetter("new", "a", "x", "x", b""))
        assert await store.count_stray_letters(before=before) == 2
        assert await store.prune_stray_letters(before=before, limit=1) == 1
        assert await store.prune_stray_letters(before=before, limit=1) == 1
        assert await store.prune_stray_letters(before=before, limit=1) == 0
        assert await store.count_stray_letters(before=before) == 0
        assert {letter.id for letter in await store.list_dead_letters()} == {"open's", "ended's", "new"}
        assert await store.prune_runs(before=before) == 1
        assert {letter.id for letter in await store.list_dead_letters()} == {"open's", "new"}

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

    async def test_how_old_a_run_is_counts_from_its_end(self, store: Store) -> None:
        """One that took a month and has just ended is as young as one that took a second."""
        key = await self.start(store, "a")
        grant = await self.claim(store, key)
        self.clock.advance(100)
        before = self.clock.now()
        self.clock.advance(1)
        await self.record(store, self.ending(key, grant, run=RunStatus.COMPLETED))
        self.clock.advance(100)
        assert await store.count_ended(before=before) == 0
        assert await store.prune_runs(before=before) == 0
        assert await store.prune_runs(before=self.clock.now()) == 1

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
            ended = await asyncio.wait_for(asyncio.gather(*waiting), PATIENCE)
        assert set(ended) == {RunStatus.COMPLETED}

    async def test_waiting_ends_with_a_run_without_steps(self, store: Store) -> None:
        """Waiting for what has ended already gives its state at once."""
        await self.completed(store)
        assert await asyncio.wait_for(store.wait_ended("r"), PATIENCE) is RunStatus.COMPLETED

    async def test_waiting_ends_with_a_cancel_and_with_a_deadline(self, store: Store) -> None:
        """Every way in which a run ends is heard."""
        await self.start(store, run_id="c")
        await self.start(store, run_id="d", deadline=self.clock.now() + 1)
        waiting = asyncio.gather(store.wait_ended("c"), store.wait_ended("d"))
        await asyncio.sleep(0)
        await store.cancel_run("c", "stop")
        self.clock.advance(1)
        await store.sweep()
        ended = await asyncio.wait_for(waiting, PATIENCE)
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
        assert await asyncio.wait_for(waiting, PATIENCE) is RunStatus.COMPLETED

    async def test_an_abandoned_wait_leaves_the_others(self, store: Store) -> None:
        """Who gives up waiting takes nobody along."""
        key = await self.start(store, "a")
        kept, given_up = (asyncio.create_task(store.wait_ended("r")) for _ in range(2))
        await asyncio.sleep(0)
        given_up.cancel()
        await asyncio.gather(given_up, return_exceptions=True)
        grant = await self.claim(store, key)
        await self.record(store, self.ending(key, grant, run=RunStatus.COMPLETED))
        assert await asyncio.wait_for(kept, PATIENCE) is RunStatus.COMPLETED

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

    @pytest.mark.parametrize("name", ["half \ud800", "null \0"])
    async def test_a_name_that_no_row_can_have_is_asked_for_in_vain(self, store: Store, name: str) -> None:
        """Such as one from a command line in another encoding: nothing is found, or an error of ours says why."""
        asked: list[Callable[[], Awaitable[object]]] = [
            partial(store.list_runs, workflow=name),
            partial(store.load_variable, name, "v"),
            partial(store.load_output, "r", name),
            partial(store.load_dead_letter, name),
            partial(store.delete_dead_letter, name),
            partial(store.load_request, name),
        ]
        for ask in asked:
            with suppress(InputInvalid):
                assert not await ask()

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

    async def test_a_letter_is_kept_however_long_its_id_is(self, store: Store) -> None:
        """Whoever may write to a broker chooses the ids of messages. What is kept tells them apart."""
        long = "".join(sha256(str(number).encode()).hexdigest() for number in range(500))
        letters = {DeadLetter.about(f"{long}{end}", "work", "x", "x", b"", 1) for end in "abb"}
        for letter in letters:
            await store.bury(letter)
        assert len(await store.list_dead_letters()) == 2
        for letter in letters:
            assert (await store.load_dead_letter(letter.id)) is not None

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
