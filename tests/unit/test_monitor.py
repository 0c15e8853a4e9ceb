"""What a monitor makes of the rows of a store."""

from __future__ import annotations

import pytest

from paigeant import ActivityRegistry
from paigeant.monitor import _of_store
from paigeant.store import WorkerRecord
from paigeant.testing import MemoryApp

LEASE = 10.0


@pytest.mark.parametrize(
    ("beaten", "expected"),
    [((), 0.0), ((0.0,), 0.0), ((LEASE,), 0.0), ((LEASE + 3,), 3.0), ((LEASE + 3, LEASE + 8, 1.0), 8.0)],
    ids=["no worker", "one at work", "just over", "one over", "two over and one at work"],
)
async def test_the_lease_that_ended_first_counts(beaten: tuple[float, ...], expected: float) -> None:
    """`expired_lease` is how long ago it ended, of workers that have beaten so many seconds ago; 0 while all hold."""
    async with MemoryApp(ActivityRegistry()) as app:
        begun = app.clock.now()
        for ago in sorted(beaten, reverse=True):
            app.clock.set(begun + 100 - ago)
            app.store.beat(WorkerRecord(f"beat {ago} s ago", "host", "1"), lease=LEASE, running=())
        app.clock.set(begun + 100)
        assert (await _of_store(app.store)).expired_lease == pytest.approx(expected)
