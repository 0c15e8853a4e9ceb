"""Metrics and health of real worker processes, asked for over HTTP as Prometheus and Kubernetes do."""

from __future__ import annotations

import asyncio
import signal
import socket
import sqlite3
import urllib.error
import urllib.request
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families
from tests.integration.processes import Command
from tests.patience import PATIENCE
from tests.services import free_port

from paigeant import Paigeant, Settings, Workflow
from paigeant.forwarder import message_of

HANDLERS = """
import pathlib, time
from paigeant import ActivityRegistry, StepContext, Workflow
activity = ActivityRegistry()

@activity.execute(retries=1)
async def count(ctx: StepContext, n: int) -> int:
    if n == 1 and ctx.attempt == 1:
        raise ValueError("again")
    return n

@activity.compensate("count")
async def uncount(output: int) -> None:
    pass

@activity.execute(retries=0)
async def check(n: int) -> None:
    if n == 2:
        raise ValueError("no")

@activity.execute()
async def hang(ctx: StepContext) -> None:
    ctx.log.info("hanging")
    while not pathlib.Path("go").exists():
        time.sleep(0.01)

counted = Workflow("counted", ["count", "check"])
"""

Sample = tuple[str, frozenset[tuple[str, str]]]


@pytest.fixture(autouse=True)
def _project(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("handlers.py").write_text(HANDLERS)
    Path("paigeant.yaml").write_text(
        "handlers: handlers.py\nretry_base: 0\nlease: 30\nheartbeat: 0.1\nsweep_interval: 0.1\nmetrics_port: 0\n"
    )


def get(port: int, path: str) -> tuple[int, str]:
    """The status and the text that a worker answers with."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=PATIENCE) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def is_ready(port: int) -> bool:
    """Whether a worker says that it is ready."""
    return get(port, "/ready")[0] == 200


def scraped(port: int) -> dict[Sample, float]:
    """All samples of a scrape."""
    status, text = get(port, "/metrics")
    assert status == 200
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def sample(name: str, **labels: str) -> Sample:
    """What names one sample."""
    return name, frozenset(labels.items())


def until(fits: Callable[[], bool]) -> None:
    """Ask again until it is so; the test's timeout ends what never is."""
    while not fits():
        pass


@pytest.mark.slow
def test_the_metrics_of_a_worker_are_what_its_runs_did() -> None:
    """Each delivery is counted once, by how it ended, and every attempt, retry, undo and end of a run is there."""

    async def start() -> None:
        async with Paigeant(Settings(metrics_port=None)) as app:
            for n in range(4):
                await app.dispatch(Workflow("counted", ["count", "check"]), {"n": n}, workflow_id=f"r{n}")
            await app.dispatch(Workflow("unheard of", ["count"]), {"n": 0}, workflow_id="u")

    async def send_again_and_garble() -> None:
        async with Paigeant(Settings(metrics_port=None)) as app:
            message = message_of(await app.store.load_run("r0"), inline_bytes=1000)
            await app.transport.publish("count", message.evolve(message_id="r0/count/do/0"))
        with closing(sqlite3.connect("paigeant.db")) as file, file:
            columns = "message_id, topic, body, due_at, held_until, created_at, deliveries"
            row = ("r0/check/do/7", "check", b"{}", 0.0, 0.0, 0.0, 0)
            file.execute(f"INSERT INTO messages ({columns}) VALUES (?, ?, ?, ?, ?, ?, ?)", row)

    asyncio.run(start())
    with Command("run") as worker:
        port = worker.until("monitor.serving")["port"]
        for _ in range(5):
            worker.until(lambda line: line["event"] in ("run.completed", "run.compensated"))
        asyncio.run(send_again_and_garble())
        worker.until("delivery.rejected")
        outcomes = ("claimed", "duplicate", "rejected", "returned")

        def delivered() -> dict[str, float]:
            found = scraped(port)
            return {how: found[sample("paigeant_deliveries_total", outcome=how)] for how in outcomes}

        until(lambda: delivered()["duplicate"] == 1)
        found = scraped(port)
        # Five runs begin with a message; one attempt is retried by another one.
        assert delivered() == {"claimed": 6, "duplicate": 1, "rejected": 1, "returned": 0}
        assert found[sample("paigeant_rejections_total", reason="unsupported_version")] == 1
        expected = {
            ("count", "completed"): 5,
            ("count", "retrying"): 1,
            ("count", "compensated"): 1,
            ("check", "completed"): 3,
            ("check", "failed"): 1,
        }
        steps = {
            (dict(labels)["activity"], dict(labels)["outcome"]): value
            for (name, labels), value in found.items()
            if name == "paigeant_steps_total" and value
        }
        assert steps == expected
        assert found[sample("paigeant_step_seconds_count", activity="count")] == 7
        assert found[sample("paigeant_queue_seconds_count", activity="count")] == 6
        assert found[sample("paigeant_runs_ended_total", workflow="counted", status="completed")] == 3
        assert found[sample("paigeant_runs_ended_total", workflow="counted", status="compensated")] == 1
        # What no handler names is no label: whoever writes to a broker could make up as many as they like.
        assert found[sample("paigeant_runs_ended_total", workflow="other", status="completed")] == 1
        until(lambda: scraped(port)[sample("paigeant_dead_letters")] == 1)
        assert found[sample("paigeant_worker_ready")] == 1
        assert get(port, "/live") == get(port, "/ready") == (200, "ok\n")
        assert get(port, "/elsewhere")[0] == 404
        worker.signal(signal.SIGTERM)
        assert worker.end() == 0


@pytest.mark.slow
def test_a_worker_that_hangs_says_so() -> None:
    """An event loop that is blocked for longer than the lease is no life; once it goes on, all is well again."""
    asyncio.run(_dispatch_hang())
    with Command("run", environment={"PAIGEANT_LEASE": "1.5"}) as worker:
        port = worker.until("monitor.serving")["port"]
        worker.until("hanging")
        until(lambda: get(port, "/live")[0] == 503)
        assert "event loop" in get(port, "/live")[1]
        status, text = get(port, "/ready")
        assert (status, "event loop" in text) == (503, True)
        assert scraped(port)[sample("paigeant_worker_ready")] == 0
        Path("go").touch()
        until(lambda: get(port, "/live")[0] == 200 and get(port, "/ready")[0] == 200)
        worker.signal(signal.SIGTERM)
        assert worker.end() == 0


async def _dispatch_hang() -> None:
    async with Paigeant(Settings(metrics_port=None)) as app:
        await app.dispatch(Workflow("hang", ["hang"]))


def _is_free(port: int) -> bool:
    try:
        socket.create_server(("127.0.0.1", port)).close()
    except OSError:
        return False
    return True


@pytest.mark.slow
def test_lines_and_spans_that_are_lost_are_seen() -> None:
    """A folder of logs and a collector that are away hold up no step; a metric says how much of both is lost."""
    settings = {
        "PAIGEANT_LOG_FILE": "logs/worker.log",
        "PAIGEANT_LOG_SQL": "info",
        "PAIGEANT_TRACES": "true",
        "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{free_port()}",
        "OTEL_EXPORTER_OTLP_TIMEOUT": "1",
        "OTEL_BSP_SCHEDULE_DELAY": "10",
    }
    Path("logs").mkdir()
    lines, spans = "paigeant_log_lines_lost_total", sample("paigeant_spans_lost_total")

    async def start() -> None:
        async with Paigeant(Settings(metrics_port=None)) as app:
            await app.dispatch(Workflow("counted", ["count", "check"]), {"n": 0})

    with Command("run", environment=settings) as worker:
        port = worker.until("monitor.serving")["port"]
        until(lambda: is_ready(port))
        before = scraped(port)
        assert (
            {before[sample(lines, log=log)] for log in ("stream", "file", "store")} == {before[spans]} == {0}
        )
        Path("logs").rename("away")
        asyncio.run(start())
        until(lambda: scraped(port)[sample(lines, log="file")] > 0)
        until(lambda: scraped(port)[spans] > 0)
        done = sample("paigeant_runs_ended_total", workflow="counted", status="completed")
        until(lambda: scraped(port)[done] == 1)
        after = scraped(port)
        assert {after[sample(lines, log=log)] for log in ("stream", "store")} == {0}
        Path("logs").mkdir()
        asyncio.run(start())
        until(lambda: Path("logs/worker.log").is_file())
        assert scraped(port)[sample(lines, log="file")] >= after[sample(lines, log="file")]


@pytest.mark.slow
def test_each_process_serves_at_a_port_of_its_own() -> None:
    """The first of several worker processes serves at the given port, the next one behind it."""
    first = next(port for port in iter(free_port, None) if _is_free(port + 1))
    with Command("run", "--metrics-port", str(first), "--processes", "2") as workers:
        ports = sorted(workers.until("monitor.serving")["port"] for _ in range(2))
        assert ports == [first, first + 1]
        for port in ports:
            until(partial(is_ready, port))
        workers.signal(signal.SIGTERM)
        assert workers.end() == 0


@pytest.mark.parametrize(
    ("setting", "name", "value"),
    [
        ("TRACES", "OTEL_ATTRIBUTE_COUNT_LIMIT", "many"),
        ("TRACES", "OTEL_SPAN_ATTRIBUTE_COUNT_LIMIT", "-1"),
        ("OTEL_METRICS", "OTEL_METRICS_EXEMPLAR_FILTER", "many"),
    ],
)
def test_a_variable_that_the_library_cannot_use_is_told(setting: str, name: str, value: str) -> None:
    """Some it reads when it is imported, some when it is set up. No traceback, and the code of a mistake."""
    with Command("run", environment={f"PAIGEANT_{setting}": "true", name: value}) as worker:
        assert worker.end() == 2
        said = "".join(worker.said)
    assert f"error: the setting `{setting.lower()}` can't be followed: " in said
    assert value in said
    assert "Traceback" not in said


def test_a_port_that_is_taken_is_told() -> None:
    """The worker ends with 2 and says what to change, for no new start would mend it."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with Command("run", "--metrics-port", str(port)) as worker:
            assert worker.end() == 2
        said = "".join(worker.said)
        assert f"127.0.0.1:{port}" in said
        assert "metrics_port" in said
