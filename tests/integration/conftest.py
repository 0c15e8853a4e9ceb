"""Where the runs of a test live: databases with tables, and the settings that most tests of the engine go through."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from tests.integration.postgres_tables import database_with_tables, empty

from paigeant import Settings


@pytest.fixture(scope="module")
def _postgres_tables(postgres_server_url: str) -> Iterator[str]:
    with database_with_tables(postgres_server_url) as url:
        yield url


@pytest.fixture
def postgres_tables(_postgres_tables: str) -> str:
    """The url of a Postgres database with the newest tables, all empty. The tests of a module share it."""
    empty(_postgres_tables)
    return _postgres_tables


@pytest.fixture(
    params=["memory://", "sqlite:///p.db", "apart", "postgres"], ids=["memory", "sqlite", "apart", "postgres"]
)
def settings(request: pytest.FixtureRequest) -> Settings:
    """Settings for one file, for memory, for a transport of its own beside the file, and for one Postgres database."""
    urls = ("memory://", "sqlite:///p.db") if request.param == "apart" else (request.param,) * 2
    if request.param == "postgres":
        urls = (request.getfixturevalue("postgres_tables"),) * 2
    return Settings(transport_url=urls[0], store_url=urls[1], retry_base=0.0, sweep_interval=0.05)
