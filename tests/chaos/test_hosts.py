"""Two hosts with addresses of their own, a worker on each, and a cable that is pulled and plugged in again."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.chaos.pace import Pace
from tests.chaos.places import NAMES, Servers, bound, open_place
from tests.chaos.sizes import full, say, short
from tests.kill.audit import audit, open_runs, recoveries, usual_wait
from tests.kill.loop import records_of
from tests.kill.nursery import ASKING, Nursery
from tests.kill.roles import length
from tests.kill.sql import rows
from tests.patience import PATIENCE
from tests.services.hosts import Network

OVER_THE_NETWORK: dict[str, Any] = {"signing": "off", "allow_plaintext": True}
"""What has to be said where messages leave the host and nobody signs or encrypts them."""


@pytest.fixture(scope="module")
def network() -> Iterator[Network]:
    """Two hosts; making them needs root, and says so where that is missing."""
    with Network("a", "b") as network:
        yield network


@pytest.fixture(scope="module")
def reachable(network: Network) -> Iterator[Servers]:
    """Servers at an address that both hosts reach."""
    servers = Servers(host=network.address)
    yield servers
    servers.close()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("runs", "seconds"), [short(150, 4.0), full(4_000, 30.0)])
def test_a_host_is_cut_off(
    network: Network, reachable: Servers, pace: Pace, tmp_path: Path, name: str, runs: int, seconds: float
) -> None:
    """One host is cut off from all servers for longer than a lease: the other does its steps, and none is lost.

    Within lease + sweep + 5 s every run that was in flight goes on, and the worker that was cut off takes part again.
    """
    with (
        open_place(reachable, name) as place,
        Nursery(
            tmp_path, inside=network["a"].inside, local_steps=1, **OVER_THE_NETWORK, **place.settings
        ) as a,
        Nursery(
            tmp_path, inside=network["b"].inside, local_steps=1, **OVER_THE_NETWORK, **place.settings
        ) as b,
    ):
        workers = [nursery.start("worker", pause=0.02) for nursery in (a, b)]
        hosts = "SELECT DISTINCT host FROM workers"
        a.until(lambda: len(rows(a.store, hosts)) == 2, pause=ASKING)
        b.start("dispatcher", runs=runs, flight=40)
        b.until(lambda: length(tmp_path) >= records_of(runs) // 3)
        network["a"].partition()
        cut = time.time()
        try:
            b.until(lambda: time.time() > cut + seconds)
        finally:
            network["a"].heal()
        healed = time.time()
        mine = f"SELECT count(*) FROM step_executions WHERE started_at > {healed} AND worker LIKE 'a-{workers[0]}-%'"
        # It is given work until it takes part again.
        extra = runs
        while rows(b.store, mine) == [(0,)]:
            assert time.time() < healed + PATIENCE, f"the worker that was cut off does nothing: {a.stacks}"
            b.until(lambda: "dispatcher" not in b.alive.values())
            extra += 20
            b.start("dispatcher", runs=extra, flight=40)
        b.until(lambda: "dispatcher" not in b.alive.values())
        assert not open_runs(b.store)
        for nursery in (a, b):
            nursery.stop(signal.SIGTERM)
            assert set(nursery.ended.values()) == {0}, nursery.errors
        repeats = audit(b, runs=range(extra))
        waits, usual = recoveries(b, [cut]), usual_wait(b, cut)
        [(first,)] = rows(b.store, mine.replace("count(*)", "min(started_at)"))
    say(
        f"{name}: {seconds:.0f} s cut off, {extra} runs, {repeats} repeats; the other host went on within "
        f"{waits[0]:.1f} s, this one {first - healed:.1f} s after the cable was back"
    )
    assert waits[0] < bound(pace) + usual
    assert first - healed < bound(pace) + usual
