"""What users' values are in JSON comes back from Postgres as it comes back from SQLite, and can be asked for there."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Iterator
from typing import Any

import hypothesis.strategies as st
import psycopg
import pytest
from hypothesis import HealthCheck, example, given, settings
from pydantic_core import from_json
from tests.integration.postgres_tables import database_with_tables

from paigeant import codec
from paigeant.databases.postgres import PostgresDatabase
from paigeant.slip import RunStatus, StepStatus
from paigeant.store import ClaimRequest, Grant, NextStep, StepKey, StepResult
from paigeant.stores.sql import SqlStore
from paigeant.testing.conformance.bench import run

texts = st.text(max_size=8) | st.sampled_from(
    (
        "\0",
        "\\u0000",
        "$json",
        '{"$json": "1"}',
        "3e4f",
        "-0",
        "1e5",
        "x-0.0",
        "\U0001f600",
        "\u2028",
        '"',
        "\\",
    )
)
numbers = (
    st.integers()
    | st.integers(min_value=-(2**300), max_value=2**300)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.sampled_from((-0.0, 1e22, 1e16, 1e-7, 5e-324, 1.7976931348623157e308, 2**70, 0.1, 100.0, -1e-300))
)
values = st.recursive(
    st.none() | st.booleans() | numbers | texts,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=12,
)


@pytest.fixture(scope="module")
def url(postgres_server_url: str) -> Iterator[str]:
    """A database with tables for the tests of this module."""
    with database_with_tables(postgres_server_url) as url:
        yield url


class Opened:
    """A store and its loop, for as long as the tests of this module last, and the number of the next run."""

    def __init__(self, url: str) -> None:
        self.runner = asyncio.Runner()
        self.store = SqlStore(PostgresDatabase(f"{url}?options=-csynchronous_commit%3Doff"))
        self.count = 0
        self.runner.run(self.store.connect())

    def close(self) -> None:
        """Close both."""
        self.runner.run(self.store.close())
        self.runner.close()


@pytest.fixture(scope="module")
def opened(url: str) -> Iterator[Opened]:
    """A store on it."""
    opened = Opened(url)
    yield opened
    opened.close()


def same(one: Any, other: Any) -> bool:
    """Whether two values are the same in every respect but the order of keys: 1 is not 1.0, 0.0 not -0.0."""
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(value, other[key]) for key, value in one.items())
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, float):
        return one == other and math.copysign(1, one) == math.copysign(1, other)
    return bool(one == other)


@example({"$json": "1"})
@example('{"$json": "1"}')
@example({"a": {"$json": [-0.0, 1e22, 2**70, "\0"]}})
@example({"": {"\0": "\\u0000"}, "$json": "\\"})
@settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    derandomize=True,
)
@given(value=values)
def test_values_come_back_as_they_were(opened: Opened, value: Any) -> None:
    """Variables, inputs and outputs: variables with the same value, the others byte for byte."""
    opened.runner.run(_come_back(opened, value))


async def _come_back(opened: Opened, value: Any) -> None:
    store, text = opened.store, codec.dump(value)
    opened.count += 1
    run_id = f"r{opened.count}"
    key = StepKey(run_id, "a")
    await store.record_workflow_start(run(run_id, "a", input=text), NextStep(key, "a", "a"))
    grant = await store.claim_step(ClaimRequest(key, "w", 1))
    assert isinstance(grant, Grant)
    await store.record_step_result(
        StepResult(
            key,
            "w",
            grant.epoch,
            grant.attempt,
            StepStatus.COMPLETED,
            run=RunStatus.COMPLETED,
            input=text,
            output=text,
            variables={"step's": text},
        )
    )
    await store.save_variable(run_id, "caller's", value)
    detail = await store.load_run(run_id)
    assert (detail.run.input, detail.steps[0].input, detail.steps[0].output) == (text, text, text)
    expected = from_json(text)
    assert same(from_json(detail.variables["step's"]), expected)
    assert same(await store.load_variable(run_id, "caller's"), expected)


@pytest.mark.parametrize(
    ("value", "path"),
    [
        ("a text", "value #>> '{}'"),
        ({"order": {"id": "550e8400-e29b-41d4-a716-446655443e40"}}, "value->'order'->>'id'"),
        ({"phone": "555-000", "at": "2026-01-01T00:00:00-00:00"}, "value->>'phone'"),
        ({"n": [1, 2.5, -0.05]}, "value->'n'->>2"),
    ],
)
def test_variables_can_be_asked_for(opened: Opened, url: str, value: Any, path: str) -> None:
    """Other programs find what is in a variable by the operators of JSONB, whatever its texts look like."""

    async def save() -> str:
        opened.count += 1
        run_id = f"r{opened.count}"
        await opened.store.record_workflow_start(run(run_id, "a"), NextStep(StepKey(run_id, "a"), "a", "a"))
        await opened.store.save_variable(run_id, "v", value)
        return run_id

    run_id = opened.runner.run(save())
    with psycopg.connect(url) as connection:
        query = f"SELECT {path}, value, pg_typeof(value)::text FROM workflow_variables WHERE workflow_id = %s"
        [(found, whole, kind)] = connection.execute(query.encode(), [run_id]).fetchall()
    assert (whole, kind) == (value, "jsonb")
    assert found in json.dumps(value)


def test_what_jsonb_would_change_is_kept_from_it(opened: Opened, url: str) -> None:
    """A value that JSONB can't hold stands in it as a text, under a name that says so."""

    async def save() -> None:
        await opened.store.record_workflow_start(
            run("sealed", "a"), NextStep(StepKey("sealed", "a"), "a", "a")
        )
        await opened.store.save_variable("sealed", "v", {"n": -0.0})

    opened.runner.run(save())
    with psycopg.connect(url) as connection:
        [(whole,)] = connection.execute(
            "SELECT value FROM workflow_variables WHERE workflow_id = 'sealed'"
        ).fetchall()
    assert whole == {"$json": '{"n":-0.0}'}
