"""Fixtures for all tests: a clock that stands still, and an environment without settings of the user's own."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from paigeant.testing import ManualClock


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
