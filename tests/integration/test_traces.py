"""Traces as a collector sees them: one for a run, whichever processes and brokers it went through, and who died."""

from __future__ import annotations

import contextlib
import json
import secrets
import signal
from collections import Counter
from pathlib import Path

import pytest
from tests.integration.collector import Collector, Received, under
from tests.integration.processes import Command, call, shown

HANDLERS = """
import asyncio, logging, pathlib
from pydantic_ai import Agent, ModelResponse, TextPart, ToolCallPart
from pydantic_ai.models.function import FunctionModel
from paigeant import ActivityRegistry, Workflow
activity = ActivityRegistry()

@activity.execute(topic="our.fetch")
async def fetch(text: str) -> str:
    return text

def say(messages, info):
    asked = sum(isinstance(message, ModelResponse) for message in messages)
    tools = ("look", "hold")
    return ModelResponse([ToolCallPart(tools[asked], {})] if asked < 2 else [TextPart("fine")])

judge = Agent(FunctionModel(say), name="judge")

@judge.tool_plain
async def look() -> str:
    return "seen"

@judge.tool_plain
async def hold() -> str:
    logging.getLogger("test").warning("holding")
    while not pathlib.Path("go").exists():
        await asyncio.sleep(0.01)
    return "held"

activity.agent(judge, prompt="Judge {fetch}", topic="partner.judge")

@activity.execute(topic="our.report")
def report(judge: str) -> str:
    return judge

judged = Workflow("judged", ["fetch", "judge", "report"])
"""


@pytest.mark.slow
def test_a_run_over_three_workers_and_two_brokers_is_one_trace(
    postgres_tables: str, redis_url: str, rabbitmq_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker is killed in the middle of an agent's step: no span hangs in the air, and none is there twice."""
    Path("handlers.py").write_text(HANDLERS)
    Path("input.json").write_text(json.dumps({"text": "canary-5c1f"}))
    with Collector() as collector:
        settings = {
            "PAIGEANT_STORE_URL": postgres_tables,
            "PAIGEANT_NAMESPACE": f"traces-{secrets.token_hex(4)}",
            "PAIGEANT_HANDLERS": "handlers.py",
            "PAIGEANT_SWEEP_INTERVAL": "0.1",
            "PAIGEANT_GRACE": "1",
            "PAIGEANT_TRACES": "true",
            "PAIGEANT_OTEL_METRICS": "true",
            "OTEL_EXPORTER_OTLP_ENDPOINT": collector.url,
            "OTEL_BSP_SCHEDULE_DELAY": "50",
            "OTEL_SERVICE_NAME": "shop",
        }
        for name, value in settings.items():
            monkeypatch.setenv(name, value)

        def at(url: str, elsewhere: dict[str, str]) -> None:
            monkeypatch.setenv("PAIGEANT_TRANSPORT_URL", url)
            monkeypatch.setenv("PAIGEANT_ROUTES", json.dumps(elsewhere))

        with contextlib.ExitStack() as stack:
            at(rabbitmq_url, {"our.*": redis_url})
            second = stack.enter_context(Command("run", "--topics", "partner.judge"))
            at(redis_url, {"partner.*": rabbitmq_url})
            first = stack.enter_context(Command("run", "--topics", "our.fetch,our.report"))
            second.until("worker.started")
            assert call("dispatch", "judged", "input.json", "--id", "t-1").returncode == 0
            second.until("holding")
            second.signal(signal.SIGKILL)
            second.end()
            Path("go").touch()
            at(rabbitmq_url, {"our.*": redis_url})
            third = stack.enter_context(Command("run", "--topics", "partner.judge"))
            first.until("run.completed")
            for worker in (first, third):
                worker.signal(signal.SIGTERM)
                assert worker.end() == 0
        run = shown("t-1")
    assert (run["status"], run["output"]) == ("completed", "fine")
    spans = collector.spans
    assert {span.trace_id for span in spans} == {run["trace_id"]}
    _is_one_tree(spans, "dispatch judged")
    [root] = [span for span in spans if not span.parent]
    assert [(span.name, span.attributes.get("paigeant.attempt")) for span in under(spans, root)] == [
        ("receive our.fetch", 1),
        ("step fetch", 1),
        ("receive partner.judge", 1),
        ("receive partner.judge", 2),
        ("step judge", 2),
        ("receive our.report", 1),
        ("step report", 1),
        ("run.completed", None),
    ]
    workers = {span.attributes["paigeant.worker"] for span in spans if "paigeant.worker" in span.attributes}
    assert len(workers) == 3
    [step] = [span for span in spans if span.name == "step judge"]
    [agent] = under(spans, step)
    assert agent.name == "invoke_agent judge"
    # What the first attempt had recorded is not told again; what the second one did is there once.
    told = Counter(span.attributes.get("gen_ai.operation.name") for span in _all_under(spans, agent))
    assert (told["chat"], told["execute_tool"]) == (1, 1)
    assert b"canary-5c1f" not in collector.bytes
    assert ({"activity": "judge", "outcome": "completed"}, 1.0) in collector.metrics["paigeant.steps"]


def test_a_run_that_is_cancelled_from_the_command_line_has_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """What no worker has begun is in its trace all the same: that it was dispatched, and that it is over."""
    Path("handlers.py").write_text(HANDLERS)
    Path("input.json").write_text('{"text": "a"}')
    with Collector() as collector:
        monkeypatch.setenv("PAIGEANT_HANDLERS", "handlers.py")
        monkeypatch.setenv("PAIGEANT_TRACES", "true")
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)
        assert call("dispatch", "judged", "input.json", "--id", "t-1").returncode == 0
        assert call("runs", "cancel", "t-1").returncode == 0
        trace_id = shown("t-1")["trace_id"]
    spans = collector.spans
    assert [(span.name, span.trace_id) for span in spans] == [
        ("dispatch judged", trace_id),
        ("run.cancelled", trace_id),
    ]
    _is_one_tree(spans, "dispatch judged")


@pytest.mark.parametrize(
    ("variable", "said", "sent"),
    [
        ("OTEL_SDK_DISABLED", "true", 0),
        ("OTEL_SDK_DISABLED", "false", 1),
        ("OTEL_TRACES_EXPORTER", "none", 0),
        ("OTEL_TRACES_EXPORTER", "otlp", 1),
    ],
)
def test_nothing_is_sent_where_the_library_is_disabled(
    variable: str, said: str, sent: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The standard variables for that hold for our own spans as well, which go around the library's provider."""
    Path("handlers.py").write_text(HANDLERS)
    Path("input.json").write_text('{"text": "a"}')
    with Collector() as collector:
        monkeypatch.setenv("PAIGEANT_TRACES", "true")
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)
        monkeypatch.setenv(variable, said)
        assert call("dispatch", "judged", "input.json", "--handlers", "handlers.py").returncode == 0
    assert len(collector.spans) == sent


def _is_one_tree(spans: list[Received], root: str) -> None:
    ids = [span.span_id for span in spans]
    assert len(ids) == len(set(ids))
    assert [span.name for span in spans if span.parent not in ids] == [root]


def _all_under(spans: list[Received], above: Received) -> list[Received]:
    below = under(spans, above)
    return below + [span for each in below for span in _all_under(spans, each)]
