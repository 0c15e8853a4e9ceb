"""Workers that are started before their servers: they wait, say what for, and go to work when it is there."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.integration.processes import Command, call, shown
from tests.integration.test_metrics import get
from tests.kill.sql import make_tables
from tests.services import PostgresServer, RabbitServer, RedisServer, Server

from paigeant.cli.opening import pause_after

HANDLERS = """
from paigeant import ActivityRegistry, Workflow
activity = ActivityRegistry()

@activity.execute()
async def greet() -> str:
    return "hello"

greeting = Workflow("greeting", ["greet"])
"""

BROKERS: dict[str, Callable[[], Server]] = {"redis": RedisServer, "rabbitmq": RabbitServer}


@pytest.fixture(autouse=True)
def _project(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("handlers.py").write_text(HANDLERS)
    Path("paigeant.yaml").write_text("handlers: handlers.py\nmetrics_port: 0\n")
    Path("in.json").write_text("{}")


def told(monkeypatch: pytest.MonkeyPatch, **settings: object) -> None:
    """Have the commands of this test use these settings."""
    for name, value in settings.items():
        monkeypatch.setenv(f"PAIGEANT_{name.upper()}", str(value))


def waits(worker: Command, error: str, where: str) -> int:
    """The port of a worker that waits, is alive and not ready, and has named the server that is missing."""
    port = int(worker.until("monitor.serving")["port"])
    line = worker.until("worker.waiting")
    assert (line["level"], where in line["error"]) == ("warning", True), line
    assert get(port, "/live") == (200, "ok\n")
    assert get(port, "/ready") == (503, f"the worker waits for its servers: {error}\n")
    assert "paigeant_worker_ready 0.0" in get(port, "/metrics")[1]
    return port


def works(worker: Command, port: int) -> None:
    """It becomes ready, and does a run."""
    assert worker.until("worker.connected")["tries"] >= 2
    worker.until("worker.started")
    assert call("dispatch", "greeting", "in.json", "--id", "g-1").returncode == 0
    worker.until("run.completed")
    assert get(port, "/ready") == (200, "ok\n")
    worker.signal(signal.SIGTERM)
    assert worker.end() == 0
    assert shown("g-1")["output"] == "hello"


@pytest.mark.parametrize("name", BROKERS)
def test_a_worker_waits_for_its_broker(
    postgres_store_url: str, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Started before its broker it is alive and not ready; a dispatch fails at once; when it is there, all goes on."""
    with BROKERS[name]() as broker:
        broker.stop()
        told(monkeypatch, store_url=postgres_store_url, transport_url=broker.url, signing="off")
        with Command("run") as worker:
            port = waits(worker, "TransportUnavailable", f":{broker.port} can't be reached")
            assert call("dispatch", "greeting", "in.json").returncode == 3
            broker.start()
            works(worker, port)


def test_a_worker_waits_for_its_database(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same for Postgres, which is store and transport here."""
    with PostgresServer() as server, server.database() as url:
        make_tables(url)
        server.stop()
        told(monkeypatch, store_url=url, transport_url=url)
        with Command("run") as worker:
            port = waits(worker, "StoreUnavailable", f":{server.port}")
            server.start()
            works(worker, port)


def test_several_processes_wait(postgres_store_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With --processes each of them waits; the parent ends none."""
    with RedisServer() as broker:
        broker.stop()
        told(monkeypatch, store_url=postgres_store_url, transport_url=broker.url)
        with Command("run", "--processes", "2") as parent:
            for _ in range(2):
                parent.until("process.started")
            parent.until("worker.waiting")
            broker.start()
            for _ in range(2):
                parent.until("worker.started")
            parent.signal(signal.SIGTERM)
            assert parent.end() == 0
    assert not [line for line in parent.said if "process.ended" in line]


@pytest.mark.parametrize("args", [("run",), ("run", "--processes", "2")])
def test_a_signal_ends_one_that_waits(
    postgres_store_url: str, monkeypatch: pytest.MonkeyPatch, args: tuple[str, ...]
) -> None:
    """Ctrl-C while it waits: it ends with 0, and has begun nothing."""
    with RedisServer() as broker:
        broker.stop()
        told(monkeypatch, store_url=postgres_store_url, transport_url=broker.url)
        with Command(*args) as worker:
            worker.until("worker.waiting")
            worker.signal(signal.SIGTERM)
            assert worker.end() == 0
    assert not [line for line in worker.said if '"worker.started"' in line]


@pytest.mark.parametrize("args", [("run",), ("run", "--processes", "2")])
@pytest.mark.parametrize("seconds", [0, 3])
def test_waiting_may_be_bounded(
    postgres_store_url: str, monkeypatch: pytest.MonkeyPatch, args: tuple[str, ...], seconds: int
) -> None:
    """`start_timeout`: it ends with 3 when the time is up, and says what was missing."""
    with RedisServer() as broker:
        broker.stop()
        told(
            monkeypatch,
            store_url=postgres_store_url,
            transport_url=broker.url,
            start_timeout=seconds,
        )
        done = call(*args)
    assert done.returncode == 3
    assert f"error: redis at 127.0.0.1:{broker.port} can't be reached" in done.stderr
    assert ("worker.waiting" in done.stderr) == (seconds > 0)


@pytest.mark.parametrize("args", [("run", "--until-idle"), ("run", "--until-idle", "--processes", "2")])
@pytest.mark.parametrize("setting", ["store_url", "transport_url"])
def test_one_that_is_to_end_does_not_wait(
    monkeypatch: pytest.MonkeyPatch, args: tuple[str, ...], setting: str
) -> None:
    """With --until-idle somebody waits for the worker: it ends with 3 at once, unless `start_timeout` says more."""
    told(monkeypatch, **{setting: "postgresql://localhost:1/x"})
    done = call(*args)
    assert (done.returncode, "worker.waiting" in done.stderr) == (3, False), done.stderr
    assert "error: can't use Postgres database 'x' at localhost:1" in done.stderr
    told(monkeypatch, start_timeout=3)
    done = call(*args)
    assert (done.returncode, "worker.waiting" in done.stderr) == (3, True), done.stderr


@pytest.mark.parametrize("args", [("run",), ("run", "--processes", "2")])
@pytest.mark.parametrize("wrong", ["password", "database", "schema", "scheme"])
def test_what_waiting_can_not_mend_ends_it_at_once(
    postgres_url: str, redis_url: str, monkeypatch: pytest.MonkeyPatch, args: tuple[str, ...], wrong: str
) -> None:
    """A wrong password or URL, a database that nobody made and tables that don't fit are told at once, with code 2."""
    if wrong != "schema":
        make_tables(postgres_url)
    urls = {
        "password": redis_url.replace("redis://", "redis://:nobodys@"),
        "database": postgres_url + "-that-nobody-made",
        "scheme": "http://127.0.0.1:1/",
    }
    told(monkeypatch, store_url=postgres_url, transport_url=urls.get(wrong, postgres_url))
    done = call(*args)
    assert (done.returncode, "worker.waiting" in done.stderr) == (2, False), done.stderr
    assert "error: " in done.stderr


@pytest.mark.parametrize("log_format", ["json", "console"])
def test_the_log_says_why_a_worker_has_ended(
    postgres_url: str, monkeypatch: pytest.MonkeyPatch, log_format: str
) -> None:
    """What the command prints at its end is no line of a log, and of a log file it is no part at all."""
    told(monkeypatch, store_url=postgres_url, transport_url=postgres_url)
    told(monkeypatch, log_format=log_format, log_file="worker.log")
    assert call("run").returncode == 2
    *_, last = map(json.loads, Path("worker.log").read_text().splitlines())
    assert (last["event"], last["level"], "exception" in last) == ("worker.ended", "error", False)
    assert "paigeant db upgrade" in last["error"]


def test_pauses_grow_up_to_five_seconds() -> None:
    """Tries become rarer, and those of several workers don't fall together."""
    assert [pause_after(tries, chance=0.0) for tries in (1, 2, 3, 4, 5, 10_000)] == [0.5, 1, 2, 4, 5, 5]
    assert pause_after(1, chance=1.0) == 0.25
