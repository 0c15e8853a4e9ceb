"""Fixtures for all tests: a clock that stands still, servers, and an environment without settings of the user's own."""

from __future__ import annotations

import compileall
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from tests.services import new_database, shared_url
from tests.services.session import begin_session, end_session, is_session_owner
from tests.services.shared import stop_shared

from paigeant.databases import open_database
from paigeant.testing import ManualClock

ROOT = Path(__file__).parents[1]

# How long an example takes says more of the machine, which others use too, than of the code.
settings.register_profile("paigeant", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("paigeant")


def pytest_configure(config: pytest.Config) -> None:
    """Begin the time of the shared servers, in the process that outlives all others of this run."""
    if not hasattr(config, "workerinput"):
        _compile()
        begin_session()
    sys.dont_write_bytecode = False  # what pytest makes of the tests is kept for its next run


def pytest_collection_finish() -> None:
    """From here on nothing is compiled but the handlers that tests write, and may write anew within a second."""
    sys.dont_write_bytecode = True


def pytest_unconfigure(config: pytest.Config) -> None:
    """Stop the shared servers."""
    if is_session_owner():
        stop_shared()
        end_session()


def _compile() -> None:
    """Have hundreds of processes find our modules compiled, whether or not this environment keeps what is compiled."""
    for folder in ("src", "tests", "benchmarks"):
        compileall.compile_dir(ROOT / folder, quiet=2)
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # No test writes into the checkout, and none reads the settings of whoever runs it.
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.upper().startswith("PAIGEANT_")]:
        monkeypatch.delenv(name)


@pytest.fixture
def clock() -> ManualClock:
    """A clock that a test sets."""
    return ManualClock()


@pytest.fixture(scope="session")
def postgres_server_url() -> str:
    """A Postgres server that all tests share; its user may make databases."""
    return shared_url("postgres")


@pytest.fixture
def postgres_url(postgres_server_url: str) -> Iterator[str]:
    """A new, empty database for this test."""
    with new_database(postgres_server_url) as url:
        yield url


@pytest.fixture(scope="session")
def redis_url() -> str:
    """A Redis server that all tests share: use keys of your own, and flush nothing."""
    return shared_url("redis")


@pytest.fixture(scope="session")
def rabbitmq_url() -> str:
    """A RabbitMQ server that all tests share: use queues of your own, and delete no others."""
    return shared_url("rabbitmq")


@pytest.fixture
def postgres_store_url(postgres_url: str) -> str:
    """A new database with the tables, as `paigeant db upgrade` makes them."""
    database = open_database(postgres_url)
    with database.as_it_is() as connection:
        database.prepare(connection)
    return postgres_url
