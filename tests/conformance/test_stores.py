"""Our stores keep what `Store` and `RunHistory` promise."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable
from dataclasses import replace
from typing import Any

import pytest
from tests.patience import PATIENCE

from paigeant.databases.sqlite import SqliteDatabase
from paigeant.errors import RunConflict
from paigeant.lane import Lane
from paigeant.rows import detail_of
from paigeant.slip import RunStatus, StepStatus
from paigeant.store import DeadLetter, Grant, Recorded, Refused, Request, RunDetail, StepRecord, Store
from paigeant.stores.memory import MemoryStore
from paigeant.stores.sql import SqlStore, leases
from paigeant.testing.conformance import StoreConformance
from paigeant.testing.conformance.bench import due, run
from paigeant.testing.conformance.transports import message
from paigeant.transport import Posting
from paigeant.transports.sqlite import SqliteTransport


class TestMemoryStore(StoreConformance):
    shared = False
    durable = False

    def make(self) -> Store:
        return MemoryStore(clock=self.clock, grace=self.grace)


class TestSqliteStore(StoreConformance):
    def make(self) -> Store:
        return SqlStore(SqliteDatabase(f"sqlite:///{self.place}/s.db", clock=self.clock), grace=self.grace)

    async def test_another_process_ends_a_wait(self, store: Store) -> None:
        """Who waits here is woken by the commit of another process."""
        await self.start(store)
        waiting = asyncio.create_task(store.wait_ended("r"))
        await asyncio.sleep(0)
        url = f"sqlite:///{self.place}/s.db"
        child = await asyncio.create_subprocess_exec(sys.executable, "-c", _CANCEL, url)
        assert await asyncio.wait_for(waiting, PATIENCE) is RunStatus.CANCELLED
        assert await child.wait() == 0

    async def test_a_message_goes_out_with_its_result_or_not_at_all(
        self, store: Store, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """One transaction: what can't be posted isn't recorded, what is refused or known already sends nothing."""
        assert isinstance(store, SqlStore)
        transport = SqliteTransport(store.database)
        store.publish_with(transport)

        async def waiting() -> dict[str, int]:
            return {depth.topic: depth.waiting for depth in await transport.topics()}

        assert await store.record_workflow_start(run(), due(), Posting("a", "first", b"{}"))
        assert not await store.record_workflow_start(run(), due(), Posting("a", "again", b"{}"))
        with pytest.raises(RunConflict):
            await store.record_workflow_start(run(input_hash="other"), due(), Posting("a", "other", b"{}"))
        assert await waiting() == {"a": 1}
        result = self.ending(due().key, await self.claim(store, due().key), output=b"1", next=due("b"))
        with monkeypatch.context() as patch:

            def fail(*_: object) -> None:
                raise OSError("no room for it")

            patch.setattr(transport, "post", fail)
            with pytest.raises(OSError, match="no room"):
                await store.record_step_result(result, Posting("b", "lost", b"{}"))
        [row] = (await store.load_run("r")).steps
        assert (row.status, row.output) == (StepStatus.RUNNING, None)
        assert isinstance(await store.record_step_result(result, Posting("b", "next", b"{}")), Recorded)
        assert await waiting() == {"a": 1, "b": 1}
        assert isinstance(await store.record_step_result(result, Posting("b", "twice", b"{}")), Recorded)
        other = self.ending(due().key, Grant(7, 7, 0.0), output=b"2", next=due("b"))
        assert await store.record_step_result(other, Posting("b", "late", b"{}")) == Refused("recorded")
        await store.cancel_run("r", "enough")
        after = self.ending(due("b").key, Grant(1, 1, 0.0), next=due("c"))
        assert isinstance(await store.record_step_result(after, Posting("c", "after", b"{}")), Refused)
        assert await waiting() == {"a": 1, "b": 1}

    async def test_runs_that_no_sweep_can_end_keep_it_from_no_other(
        self, store: Store, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A sweep has read one late run when its time is over; those with a slip of newer code stay late for ever."""

        def slowly(*of: Any) -> RunDetail:
            self.clock.advance(2)
            return detail_of(*of)

        monkeypatch.setattr(leases, "detail_of", slowly)
        for run_id in ("a", "b", "c"):
            newer = replace(run(run_id, deadline=1.0), slip=b'{"newer":1}')
            await store.record_workflow_start(newer, due(run_id=run_id))
        await self.start(store, run_id="z", deadline=1.0)
        for _ in range(200):
            if (await store.sweep()).expired:
                break
        assert (await store.load_run("z")).run.status is RunStatus.FAILED

    async def test_large_writes_tell_their_size(self, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
        """Whatever brings many bytes, a message with what it records too: few of those share a transaction."""
        assert isinstance(store, SqlStore)
        transport = SqliteTransport(store.database)
        store.publish_with(transport)
        large = b'"' + b"x" * 100_000 + b'"'
        posting, sizes, submit = Posting("a", "m", large), list[int](), Lane.submit

        def counted(*arguments: Any, size: int = 0, **named: Any) -> asyncio.Future[Any]:
            sizes.append(size)
            return submit(*arguments, size=size, **named)

        async def size_of(write: Awaitable[object]) -> int:
            sizes.clear()
            await write
            return max(sizes)

        monkeypatch.setattr(Lane, "submit", counted)
        assert await size_of(store.record_workflow_start(run(), due(), posting)) > len(large)
        result = self.ending(due().key, await self.claim(store, due().key), output=b"1", next=due("b"))
        assert await size_of(store.record_step_result(result, posting)) > len(large)
        adopted = StepRecord(*due(run_id="adopted").key, 0, "a", "a", StepStatus.COMPLETED, output=large)
        assert await size_of(store.adopt_run(run("adopted"), [adopted], {"v": large})) > 2 * len(large)
        request = Request("q", "r", "b", "question", "q", large)
        assert await size_of(store.open_request(request)) == len(large)
        assert await size_of(store.answer_request("q", large)) == len(large)
        payload = large.decode()
        assert await size_of(transport.publish("t", message("m", text=payload))) > len(large)
        letter = DeadLetter("l", "t", "odd", "odd", large)
        assert await size_of(store.bury(letter)) == len(large)
        assert await size_of(transport._reject(letter)) == len(large)


_CANCEL = """
import asyncio, sys
from paigeant.databases.sqlite import SqliteDatabase
from paigeant.stores.sql import SqlStore

async def main():
    store = SqlStore(SqliteDatabase(sys.argv[1]))
    await store.connect()
    await store.cancel_run("r", "from afar")
    await store.close()

asyncio.run(main())
"""
