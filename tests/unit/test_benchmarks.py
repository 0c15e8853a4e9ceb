"""The benchmarks in their smallest form: each runs and gives its figures. No test looks at how large those are."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path

import psycopg
import pytest
from benchmarks.__main__ import NAMES, main
from benchmarks.agents import run as run_agents
from benchmarks.agents_paigeant import measure as measure_agents
from benchmarks.bench import Bench, NotMeasured
from benchmarks.drivers import run as run_drivers
from benchmarks.growth import fill
from benchmarks.peer import run as run_peer
from benchmarks.report import Figure, lines
from benchmarks.server_peers import run as run_server_peers
from benchmarks.transactions import measure as measure_transactions

from paigeant import Paigeant, Settings
from paigeant.slip import RunStatus

FIGURES = {
    "throughput": {"500 runs in flight", "50 runs in flight"},
    "latency": {"median of a run", "95 of 100 runs within"},
    "growth": {"on an empty file", "on the full file", "a step takes longer by"},
    "memory": {"peak of a worker with 100 runs queued"},
    "startup": {"import paigeant", "paigeant --help"},
    "cost": {"perform", "SQL that writes", "rows to results", "a step, by the clock"},
    "signing": {"plain: seal and open", "Ed25519: seal and open", "a signature adds to a hop"},
    "floor": {"insert and commit", "100 inserts a commit", "Paigeant over single commits"},
    "servers": {
        "rabbitmq, continued locally",
        *(f"{transport}, crossing" for transport in ("postgres", "redis", "rabbitmq")),
        *(f"{transport}, crossing, median of a run" for transport in ("postgres", "redis", "rabbitmq")),
    },
    "server_floor": {"postgres: insert and commit", "redis: XADD, XREADGROUP, XACK", "over one by one"},
    "observers": {"nothing", "all three", "traces: processor", "all three: of the throughput"},
    "logs": {"no lines", "in the store, info", "in the store, info, of the speed without"},
    "commits": {"postgres, crossing, alone: synced commits", "redis, crossing, 500 in flight: log"},
}
PEERS = {"peer": run_peer, "server_peers": run_server_peers, "drivers": run_drivers, "agents": run_agents}


@pytest.mark.parametrize("name", [name for name in NAMES if name not in PEERS])
def test_a_benchmark_runs_and_gives_its_figures(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In its smallest form it ends well, and each of its figures is a number above zero or, of growth, any number."""
    assert main([name, "--quick", "--json", "--folder", str(tmp_path)]) == 0
    figures = json.loads(capsys.readouterr().out)["figures"][name]
    values = {figure["name"]: figure["value"] for figure in figures}
    assert set(values) >= FIGURES[name]
    assert all(value > 0 for key, value in values.items() if key != "a step takes longer by")


def test_every_benchmark_is_expected_here() -> None:
    """A new benchmark gets its smoke test."""
    assert set(FIGURES) | set(PEERS) == set(NAMES)


@pytest.mark.parametrize("name", PEERS)
def test_without_its_environment_a_peer_says_what_makes_it(name: str, tmp_path: Path) -> None:
    """The peers aren't installed for tests; what is missing, and the command that brings it, are named."""
    with pytest.raises(NotMeasured, match="`make bench` makes it"):
        PEERS[name](Bench(tmp_path, quick=True), python=tmp_path / "python")


def test_an_older_environment_of_the_peers_is_told_from_a_good_one(tmp_path: Path) -> None:
    """An interpreter without the libraries that the peer needs, as ours is, is as good as none."""
    with pytest.raises(NotMeasured, match="misses libraries"):
        run_agents(Bench(tmp_path, quick=True), python=Path(sys.executable))


async def test_an_agents_requests_and_tools_are_recorded_while_it_is_measured(tmp_path: Path) -> None:
    """Each way of running it is timed as often as asked; a run leaves two model requests and two tool calls."""
    store = f"sqlite:///{tmp_path / 'agents.db'}"
    found = await measure_agents(store=store, runs=4, in_flight=2, alone=3)
    assert found["units"] == 4
    assert [len(found[name]) for name in ("plain", "inside", "whole")] == [3, 3, 3]
    assert min(*found["plain"], *found["inside"], *found["whole"], *found["many_plain"], *found["many"]) > 0


async def test_our_transaction_is_done_by_the_driver_as_it_would_be_by_us(postgres_url: str) -> None:
    """What the drivers are compared with leaves each run with one step completed in each transaction, and one open."""
    await measure_transactions(driver="psycopg", url=postgres_url, batch=3, count=2)
    with psycopg.connect(postgres_url) as connection:
        rows = connection.execute("SELECT status, count(*) FROM steps GROUP BY status").fetchall()
    assert dict(rows) == {"completed": 3 * (20 + 2), "running": 3}


def test_an_unknown_name_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    """A misspelt benchmark is a mistake that lists the known ones."""
    with pytest.raises(SystemExit) as stop:
        main(["speed"])
    assert stop.value.code == 2
    assert "throughput, latency" in capsys.readouterr().err


async def test_the_full_file_holds_runs_like_those_of_the_engine(tmp_path: Path) -> None:
    """A copied run can be loaded, is completed, and has its five recorded steps."""
    url = f"sqlite:///{tmp_path / 'full.db'}"
    await asyncio.to_thread(fill, tmp_path / "full.db", 30)
    async with Paigeant(Settings(store_url=url, transport_url=url)) as app:
        runs = await app.store.list_runs(limit=100)
        assert {run.status for run in runs} == {RunStatus.COMPLETED}
        assert len(runs) == 40
        result = await app.run(runs[-1].id).wait()
        assert result.output["n"] == 5
        assert len(result.outputs) == 5


def test_a_missed_bound_is_marked() -> None:
    """What is beyond its bound can be seen in the table."""
    good, bad = lines([Figure("fast", 4.0, "ms", most=5), Figure("slow", 6.0, "ms", most=5)])
    assert "holds" in good
    assert "MISSED" in bad
