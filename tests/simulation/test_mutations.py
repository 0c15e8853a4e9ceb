"""Proof that the simulation bites: with a safeguard taken out of the engine, it finds a violation."""

from __future__ import annotations

import pytest
from tests.simulation.mutants import MUTANTS, mutated
from tests.simulation.world import play

SEEDS = 1000


@pytest.mark.parametrize("name", MUTANTS)
def test_a_missing_safeguard_is_caught(name: str) -> None:
    """Within 1,000 seeds a violation is found, by a seed that is clean for the engine as it is."""
    with mutated(name):
        caught = next((seed for seed in range(SEEDS) if play(seed) is not None), None)
    assert caught is not None, f"{SEEDS} seeds found nothing wrong with an engine that has {name}"
    assert play(caught) is None
