"""The store comes back as it was some time ago, as after a failover to a replica that lagged; the broker didn't."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict
from tests.chaos.places import NAMES, Place, Servers, open_place
from tests.chaos.sizes import say
from tests.kill.audit import audit
from tests.kill.loop import records_of
from tests.kill.nursery import ASKING, Nursery
from tests.kill.roles import length
from tests.kill.sql import rows

from paigeant import Paigeant, Settings

KNOWN, LATER = 40, 20
"""Runs that the older store has, and those that were dispatched after that state."""


class Past:
    """A copy of the store as it is now, which can be put in its place."""

    def __init__(self, place: Place) -> None:
        name = str(conninfo_to_dict(place.store_url)["dbname"])
        self._old, self._name, self._lost = f"{name}_old", name, f"{name}_lost"
        self._server = place.store_url.replace(f"/{name}", "/postgres", 1)
        self._do(f"CREATE DATABASE {self._old} TEMPLATE {name}")

    def return_to(self) -> None:
        """Put it in the place of what has become of the store."""
        self._do(
            f"ALTER DATABASE {self._name} RENAME TO {self._lost}",
            f"ALTER DATABASE {self._old} RENAME TO {self._name}",
            f"DROP DATABASE {self._lost}",
        )

    def _do(self, *statements: str) -> None:
        with psycopg.connect(self._server, autocommit=True) as connection:
            connection.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname LIKE %s",
                (f"{self._name}%",),
            )
            for statement in statements:
                connection.execute(statement.encode())


def work_until(nursery: Nursery, records: int) -> None:
    """Have workers go on until there are so many records, and kill them."""
    for _ in range(2):
        nursery.start("worker", pause=0.02)
    nursery.until(lambda: length(nursery.folder) >= records)
    for pid in list(nursery.alive):
        nursery.kill(pid)


def dispatch(nursery: Nursery, begin: int, end: int) -> None:
    """Dispatch these runs."""
    nursery.start("dispatcher", begin=begin, runs=end)
    nursery.until(lambda: "dispatcher" not in nursery.alive.values())


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in NAMES if name != "joined"])
def test_what_an_older_store_has_goes_on(servers: Servers, tmp_path: Path, name: str) -> None:
    """Its runs end, each step with one result, done again where that was lost; what it doesn't know is dropped."""
    with open_place(servers, name) as place, Nursery(tmp_path, local_steps=1, **place.settings) as nursery:
        dispatch(nursery, 0, KNOWN)
        work_until(nursery, records_of(KNOWN) // 3)
        past = Past(place)
        dispatch(nursery, KNOWN, KNOWN + LATER)
        work_until(nursery, records_of(KNOWN) * 2 // 3)
        killed = {pid for pid, code in nursery.ended.items() if code == -signal.SIGKILL}
        past.return_to()
        for _ in range(2):
            nursery.start("worker")
        nursery.until_ended()
        nursery.until(lambda: asyncio.run(waiting(place)) == 0, pause=ASKING)
        nursery.stop(signal.SIGTERM)
        repeats = audit(nursery, runs=range(KNOWN), killed=killed)
        assert rows(place.store_url, "SELECT count(*) FROM workflow_runs") == [(KNOWN,)]
        assert rows(place.store_url, "SELECT count(*) FROM dead_letters") == [(0,)]
    say(f"{name}: {repeats} executions repeated")


async def waiting(place: Place) -> int:
    """How many messages there are."""
    async with Paigeant(Settings(**place.settings)) as app:
        return sum(depth.waiting + depth.taken for depth in await app.transport.topics(["work", "fail"]))
