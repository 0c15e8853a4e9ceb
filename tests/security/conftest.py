"""Places for messages and runs, a key ring, and an authorization server that tells the time by the test's clock."""

from __future__ import annotations

import secrets
from collections.abc import Iterator

import pytest
from tests.integration.postgres_tables import database_with_tables
from tests.security.authority import Authority
from tests.security.signed import RING, STORE

from paigeant.keyfiles import write_private
from paigeant.keys import Key, KeyRing
from paigeant.testing import ManualClock


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


@pytest.fixture
def ring() -> KeyRing:
    """A key ring of one key, in the file that settings name by default."""
    made = KeyRing((Key.generate(now=1.0),))
    write_private(RING, made.as_dict())
    return made
