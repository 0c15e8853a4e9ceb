"""Databases with tables, for tests of whole runs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from tests.integration.postgres_tables import database_with_tables, empty


@pytest.fixture(scope="module")
def _postgres_tables(postgres_server_url: str) -> Iterator[str]:
    with database_with_tables(postgres_server_url) as url:
        yield url


@pytest.fixture
def postgres_tables(_postgres_tables: str) -> str:
    """The url of a Postgres database with the newest tables, all empty. The tests of a module share it."""
    empty(_postgres_tables)
    return _postgres_tables
