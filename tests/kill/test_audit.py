"""The audit of the kill tests finds what it is there to find."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import ExitStack

import pytest
from tests.kill.audit import audit, stragglers
from tests.kill.nursery import Nursery
from tests.kill.roles import BEGAN, diary
from tests.kill.sql import make_tables, write
from tests.services import new_database, shared_url

RUNS = range(20, 30)  # r23 fails and is undone

TABLES = ["workflow_runs", "step_executions"]
FORGERIES = {
    "lost": "UPDATE workflow_runs SET completed_at = NULL WHERE id = 'r21'",
    "ended wrongly": "UPDATE workflow_runs SET status = 'failed' WHERE id = 'r21'",
    "not undone": "UPDATE workflow_runs SET status = 'completed' WHERE id = 'r23'",
    "a run is missing": "DELETE FROM workflow_runs WHERE id = 'r29'",
    "a result is missing": "DELETE FROM step_executions WHERE workflow_id = 'r21' AND step = 's1'",
    "a result too many": "UPDATE step_executions SET step = 's7' WHERE workflow_id = 'r21' AND step = 's1'",
    "an undo is missing": "DELETE FROM step_executions WHERE workflow_id = 'r23' AND phase = 'undo' AND step = 's0'",
    "undone too much": "UPDATE step_executions SET phase = 'undo' WHERE workflow_id = 'r21' AND step = 's0'",
    "undone in another order": "UPDATE step_executions SET seq = 99 - seq WHERE workflow_id = 'r23' AND phase = 'undo'",
    "done in another order": "UPDATE step_executions SET seq = 100 - seq WHERE workflow_id = 'r21'",
    "begun too early": "UPDATE step_executions SET started_at = 0 WHERE workflow_id = 'r21' AND step = 's1'",
    "another's result": "UPDATE step_executions SET output = '\"1.1\"' WHERE workflow_id = 'r21' AND step = 's1'",
    "still running": "UPDATE step_executions SET status = 'running' WHERE workflow_id = 'r21' AND step = 's1'",
}


@pytest.fixture(scope="module", params=["sqlite", "postgres"])
def done(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nursery]:
    """Ten runs, done without any fault."""
    folder = tmp_path_factory.mktemp("done")
    with ExitStack() as stack:
        settings = {}
        if request.param == "postgres":
            url = stack.enter_context(new_database(shared_url("postgres")))
            make_tables(url)
            settings = {"store_url": url, "transport_url": url}
        nursery = stack.enter_context(Nursery(folder, **settings))
        nursery.start("dispatcher", begin=RUNS[0], runs=RUNS[-1] + 1)
        nursery.until(lambda: not nursery.alive)
        nursery.start("worker")
        nursery.until_ended()
        nursery.stop(signal.SIGTERM)
        for table in TABLES:
            write(nursery.store, f"CREATE TABLE saved_{table} AS SELECT * FROM {table}")
        yield nursery


@pytest.fixture
def restored(done: Nursery) -> Iterator[Nursery]:
    """The same, for a test that changes the rows."""
    yield done
    for table in TABLES:
        write(done.store, f"DELETE FROM {table}")
        write(done.store, f"INSERT INTO {table} SELECT * FROM saved_{table}")


def test_nothing_is_wrong(done: Nursery) -> None:
    """Ten runs without a fault pass the audit, without a repeat."""
    assert audit(done, runs=RUNS) == 0


@pytest.mark.parametrize("forgery", FORGERIES)
def test_forged_rows_are_found(restored: Nursery, forgery: str) -> None:
    """Each change of the rows that no fault may cause is found, and of no other run is anything said."""
    write(restored.store, FORGERIES[forgery])
    with pytest.raises(AssertionError, match=r"'r21'|'r23'|'all'|^r21"):
        audit(restored, runs=RUNS)


def test_a_run_that_goes_on_late_is_found(restored: Nursery) -> None:
    """Of several runs in flight the one that rested after a fault, and for how long; the others went on in time."""
    write(restored.store, "UPDATE workflow_runs SET created_at = 1000, completed_at = 1100")
    write(restored.store, "UPDATE step_executions SET started_at = 1001, completed_at = 1012")
    write(restored.store, "UPDATE step_executions SET completed_at = 1017 WHERE workflow_id = 'r24'")
    assert stragglers(restored, [1010.0], within=5.0) == {"r24": 7.0}
    assert stragglers(restored, [1010.0, 1000.5, 1200.0], within=1.0)["r24"] == 7.0
    assert stragglers(restored, [1010.0], within=7.0) == {}


def test_a_run_that_is_hit_again_and_again_has_gone_on(restored: Nursery) -> None:
    """Of a step whose worker was killed the row keeps nothing: that it had begun in time is in the diary."""
    began = next(entry for entry in diary(restored.folder) if entry.run == 24 and entry.what == BEGAN)
    fault = began.at - 3.0
    write(
        restored.store, f"UPDATE workflow_runs SET created_at = {fault - 1.0}, completed_at = {fault + 9.0}"
    )
    write(
        restored.store, f"UPDATE step_executions SET started_at = {fault - 1.0}, completed_at = {fault + 8.0}"
    )
    assert stragglers(restored, [fault], within=5.0)["r24"] == pytest.approx(8.0)
    assert "r24" not in stragglers(restored, [fault], within=5.0, killed={began.process})
    assert "r24" in stragglers(restored, [fault], within=2.0, killed={began.process})


def test_an_execution_that_nothing_explains_is_found(done: Nursery) -> None:
    """A second execution of a step passes when its process was killed, and else doesn't."""
    file = done.folder / "diary"
    before = file.read_bytes()
    size = len(before) // len(diary(done.folder))
    place = next(place for place, entry in enumerate(diary(done.folder)) if entry.what == BEGAN)
    process = diary(done.folder)[place].process
    file.write_bytes(before + before[place * size : (place + 1) * size])
    try:
        assert audit(done, runs=RUNS, killed={process}) == 1
        with pytest.raises(AssertionError, match="was done by"):
            audit(done, runs=RUNS)
    finally:
        file.write_bytes(before)
