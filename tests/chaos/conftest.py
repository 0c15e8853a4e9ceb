"""Places for the tests of chaos."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from tests.chaos.pace import Pace
from tests.chaos.places import NAMES, Place, Servers, open_place


@pytest.fixture(scope="session")
def servers() -> Iterator[Servers]:
    """Servers that may be killed, those of this process of pytest."""
    servers = Servers()
    yield servers
    servers.close()


@pytest.fixture
def pace() -> Pace:
    """How slow the machine is at the time of the test."""
    return Pace()


@pytest.fixture(params=NAMES)
def place(request: pytest.FixtureRequest, servers: Servers) -> Iterator[Place]:
    """A new store of Postgres with each of the transports."""
    with open_place(servers, request.param) as place:
        yield place
