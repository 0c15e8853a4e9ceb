"""Two sizes of each test: a short form for every day, and the full one, which `make chaos` runs."""

from __future__ import annotations

import sys
from typing import Any

import pytest

__all__ = ["full", "say", "short"]


def short(*sizes: Any) -> Any:
    """What a test does each time."""
    return pytest.param(*sizes, id="short")


def full(*sizes: Any) -> Any:
    """What it does when told to do all."""
    marks = [pytest.mark.chaos, pytest.mark.slow, pytest.mark.timeout(3600)]
    return pytest.param(*sizes, id="full", marks=marks)


def say(text: str) -> None:
    """Tell what was measured (pytest -s shows it)."""
    sys.stdout.write(f"\n{text}\n")
