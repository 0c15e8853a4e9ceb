"""A history of 100,000 runs is listed at once, on Postgres and on SQLite."""

from __future__ import annotations

import contextlib
import json
import sqlite3
import time
from pathlib import Path
from typing import Any

import psycopg
import pytest

from paigeant.slip import RunStatus
from paigeant.store import RunRecord
from paigeant.stores import open_store

COUNT = 100_000
LIMIT_SECONDS = 1.0

_COLUMNS = """
INSERT INTO workflow_runs
    (id, workflow, status, input, input_hash, slip, correlation_id, trace_id, headers, created_at)
SELECT {id}, 'w' || (n % 50), CASE WHEN n = 4711 THEN 'compensation_failed' ELSE 'completed' END,
    '{{"payload":"' || {text} || '"}}', 'h', '{{"itinerary":[]}}', 'c', 't', '{{}}', 1800000000 + n
FROM {numbers}
"""
_POSTGRES = (
    _COLUMNS.format(
        id="'run-' || lpad(n::text, 6, '0')",
        text="repeat('x', 500)",
        numbers=f"generate_series(0, {COUNT - 1}) n",
    )
    .replace('\'{"payload":"\' ||', '(\'{"payload":"\' ||')
    .replace("'\"}',", "'\"}')::json,")
)
_SQLITE = (
    f"WITH RECURSIVE numbers(n) AS (SELECT 0 UNION ALL SELECT n + 1 FROM numbers WHERE n < {COUNT - 1}) "
    + _COLUMNS.format(id="printf('run-%06d', n)", text="hex(zeroblob(250))", numbers="numbers")
)

LISTINGS: dict[str, dict[str, Any]] = {
    "newest": {},
    "page": {"before": (1_800_050_000.0, "run-050000")},
    "status": {"status": RunStatus.COMPLETED},
    "rare status": {"status": RunStatus.COMPENSATION_FAILED},
    "no such status": {"status": RunStatus.FAILED},
    "workflow": {"workflow": "w7"},
    "no such workflow": {"workflow": "nobody"},
    "both": {"workflow": f"w{4711 % 50}", "status": RunStatus.COMPENSATION_FAILED},
}


def _fill(url: str) -> None:
    if url.startswith("postgresql:"):
        with psycopg.connect(url) as connection:
            connection.execute(_POSTGRES.encode())
            connection.commit()
            connection.autocommit = True
            connection.execute("VACUUM ANALYZE workflow_runs")
    else:
        with contextlib.closing(sqlite3.connect(url.removeprefix("sqlite:///"))) as file, file:
            file.execute(_SQLITE)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["postgres", "sqlite"])
async def test_a_long_history_is_listed_at_once(
    request: pytest.FixtureRequest, tmp_path: Path, kind: str, record_property: Any
) -> None:
    """The newest runs, any page, those of a state or workflow, common or rare: each in well under a second."""
    url = f"sqlite:///{tmp_path}/p.db" if kind == "sqlite" else request.getfixturevalue("postgres_tables")
    store = open_store(url)
    await store.connect()
    _fill(url)
    took: dict[str, float] = {}
    found: dict[str, list[RunRecord]] = {}
    for name, asked in LISTINGS.items():
        times = []
        for _ in range(3):
            began = time.perf_counter()
            found[name] = await store.list_runs(**asked)
            times.append(time.perf_counter() - began)
        took[name] = min(times)
    await store.close()
    record_property("seconds", json.dumps(took))
    assert {name: len(runs) for name, runs in found.items()} == {
        "newest": 50,
        "page": 50,
        "status": 50,
        "rare status": 1,
        "no such status": 0,
        "workflow": 50,
        "no such workflow": 0,
        "both": 1,
    }
    assert found["newest"][0].id == "run-099999"
    assert found["page"][0].id == "run-049999"
    assert {name: seconds for name, seconds in took.items() if seconds > LIMIT_SECONDS} == {}
