"""Thousands of seeds of a small world that goes wrong in every way that it can, and is right in the end."""

from __future__ import annotations

import os

import pytest
from tests.chaos.sizes import full, short
from tests.simulation.world import play

SEEDS = int(os.environ.get("SIMULATION_SEEDS", "5000"))
CHUNKS = 20


@pytest.mark.parametrize("chunk", range(CHUNKS))
@pytest.mark.parametrize("seeds", [short(SEEDS), full(10 * SEEDS)])
def test_no_invariant_is_violated(chunk: int, seeds: int) -> None:
    """Whatever crashes, freezes, gets lost, comes twice or late: I1 to I19 hold at each moment, and all runs end.

    SIMULATION_SEEDS sets how many seeds all chunks play together; the full form has ten times as many.
    """
    for seed in range(chunk, seeds, CHUNKS):
        violation = play(seed)
        if violation is not None:
            pytest.fail(
                f"seed {seed}: {violation}\nsee all of it: python -m tests.simulation {seed}", pytrace=False
            )


def test_a_seed_plays_the_same_each_time() -> None:
    """Two plays of a seed agree in every line of their traces, so that a failing one can be looked into."""
    for seed in (7, 11, 872):
        first: list[str] = []
        second: list[str] = []
        play(seed, trace=first.append)
        play(seed, trace=second.append)
        assert first == second
        assert len(first) > 50
