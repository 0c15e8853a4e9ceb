"""What happens in more than one suite, on SQLite and with servers."""

from __future__ import annotations

import signal
from collections.abc import Callable
from typing import Any

from tests.kill.audit import audit, begun
from tests.kill.nursery import Nursery
from tests.kill.roles import LOST, diary
from tests.kill.sql import rows

__all__ = ["has", "stop_a_worker_for_longer_than_its_lease"]

_STEPS = "SELECT * FROM step_executions ORDER BY workflow_id, seq"
_RUNS = "SELECT * FROM workflow_runs ORDER BY id"


def has(nursery: Nursery, **wanted: Any) -> bool:
    """Whether the diary has such a record."""
    return any(
        all(getattr(entry, name) == value for name, value in wanted.items())
        for entry in diary(nursery.folder)
    )


def stop_a_worker_for_longer_than_its_lease(nursery: Nursery, freeze: Callable[[int], None]) -> None:
    """A worker is stopped with `freeze` for longer than its lease while it does ten steps, then goes on.

    By then another has done them: no row changes any more.
    """
    runs = range(20, 30)
    nursery.start("dispatcher", begin=20, runs=30)
    nursery.until(lambda: "dispatcher" not in nursery.alive.values())
    asleep = nursery.start("worker", slow=("s0", False, 12.0))
    nursery.until(lambda: sum(begun(nursery.folder).values()) == len(runs))
    freeze(asleep)
    nursery.start("worker")
    nursery.until_ended()
    before = rows(nursery.store, _STEPS), rows(nursery.store, _RUNS)
    nursery.send(asleep, signal.SIGCONT)
    nursery.until(lambda: has(nursery, process=asleep, what=LOST))
    nursery.stop(signal.SIGTERM)
    assert set(nursery.ended.values()) == {0}
    assert (rows(nursery.store, _STEPS), rows(nursery.store, _RUNS)) == before
    assert audit(nursery, runs=runs, killed={asleep}) >= len(runs)
