"""An authorization server for a test, which tells the time by the test's clock; and places for messages and runs."""

from __future__ import annotations

import secrets
from collections.abc import Iterator

import pytest
from tests.integration.postgres_tables import database_with_tables
from tests.security.authority import Authority

from paigeant.testing import ManualClock

STORE = "sqlite:///runs.db"
"""A file in the folder of the test."""


@pytest.fixture(params=["sqlite", "postgres", "redis", "rabbitmq"])
def places(request: pytest.FixtureRequest) -> Iterator[dict[str, str]]:
    """Where messages and runs are, on each transport: one database for both, or a broker beside a file."""
    match request.param:
        case "sqlite":
            yield {"transport_url": STORE, "store_url": STORE}
        case "postgres":
            with database_with_tables(request.getfixturevalue("postgres_server_url")) as url:
                yield {"transport_url": url, "store_url": url}
        case kind:
            url = request.getfixturevalue(f"{kind}_url")
            yield {"transport_url": url, "store_url": STORE, "namespace": f"places-{secrets.token_hex(4)}"}


@pytest.fixture
def authority(clock: ManualClock) -> Iterator[Authority]:
    """An authorization server of this test's own."""
    with Authority(now=clock.now) as server:
        yield server
