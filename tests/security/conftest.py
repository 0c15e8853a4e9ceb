"""An authorization server for a test, which tells the time by the test's clock."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from tests.security.authority import Authority

from paigeant.testing import ManualClock


@pytest.fixture
def authority(clock: ManualClock) -> Iterator[Authority]:
    """An authorization server of this test's own."""
    with Authority(now=clock.now) as server:
        yield server
