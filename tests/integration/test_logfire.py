"""Runs that Pydantic Logfire watches, as its backend sees them: the real library, which sends to a server of ours.

It has a virtual environment of its own, for it adds itself to pytest and to pydantic wherever it is installed.
"""

from __future__ import annotations

import gzip
import json
import signal
import subprocess
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.integration.collector import Collector, Received, under
from tests.integration.processes import Command, shown
from tests.patience import PATIENCE
from tests.services.http import Incoming
from tests.unit.test_docs import fences

pytestmark = pytest.mark.slow

PYTHON = Path(__file__).parents[2] / ".venv-logfire" / "bin" / "python"
PAIGEANT = [str(PYTHON), "-P", "-m", "paigeant.cli"]
TOKEN, CANARY = "a-write-token", "canary-5c1f"

SIMPLE, SCRUBBED = (
    block.text for block in fences("text", page="how-to.md") if "logfire.configure" in block.text
)

HANDLERS = """
import asyncio, pathlib
from pydantic_ai import Agent, ModelResponse, TextPart, ToolCallPart
from pydantic_ai.models.function import FunctionModel
from paigeant import ActivityRegistry, NonRetryableError, Workflow
activity = ActivityRegistry()

@activity.execute()
async def reserve(text: str) -> str:
    with logfire.span("look into shelf {shelf}", shelf=7):
        logfire.info("found it")
    return text

@activity.compensate("reserve")
async def free(output: str) -> None:
    with logfire.span("put it back"):
        pass

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
    while not pathlib.Path("go").exists():
        await asyncio.sleep(0.01)
    return "held"

activity.agent(judge, prompt="Judge {reserve}")

@activity.execute()
def charge(text: str) -> None:
    raise NonRetryableError(f"the card {text} is declined")

judged = Workflow("judged", ["reserve", "judge"])
sold = Workflow("sold", ["reserve", "judge", "charge"])
"""


class Backend(Collector):
    """Logfire's end. It is told of spans as they begin as well, as `pending` ones, unless they have ended by then."""

    def __init__(self) -> None:
        super().__init__()
        self.pending: dict[str, Received] = {}
        """By the ids of the spans themselves."""
        self.counted: Counter[tuple[str, str]] = Counter()
        """What metrics have counted, by their names and the values of their attributes."""
        self._changed = threading.Condition()

    def serve(self, request: Incoming) -> None:
        if request.path == "/v1/info":
            request.reply(200, json.dumps({"project_name": "ours", "project_url": self.url}).encode())
            return
        assert request.headers["authorization"] == TOKEN
        with self._changed:
            self.take(request.path, gzip.decompress(request.body()))
            for name, points in self.metrics.items():
                for attributes, value in points:  # what came since the last time
                    self.counted[name, " ".join(attributes.values())] += int(value)
            self.metrics.clear()
            for span in [
                each for each in self.spans if each.attributes["logfire.span_type"] == "pending_span"
            ]:
                assert span.parent not in self.pending, f"{span.name} has begun twice"
                self.pending[span.parent] = span
                self.spans.remove(span)
            self._changed.notify_all()
        request.reply(200, kind="application/x-protobuf")

    def until(self, fits: Callable[[], object]) -> None:
        """Wait until what has come fits."""
        with self._changed:
            assert self._changed.wait_for(fits, PATIENCE), [span.name for span in self.spans]

    def whole(self, trace_id: str) -> list[Received]:
        """The spans that have ended: all are of this trace, each there once, none without the one that it is under.

        That may be a pending one.
        """
        for span in (*self.spans, *self.pending.values()):
            assert span.trace_id == trace_id, span
        ids = Counter(span.span_id for span in self.spans)
        assert set(ids.values()) == {1}
        above = [span.parent for span in self.spans]
        above += [str(span.attributes["logfire.pending_parent_id"]) for span in self.pending.values()]
        assert set(above) - set(ids) - set(self.pending) - {"0" * 16} == {""}
        return self.spans

    def never_ended(self) -> list[str]:
        """The spans that have begun and not ended."""
        ended = {span.span_id for span in self.spans}
        return [span.name for id, span in self.pending.items() if id not in ended]


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> Iterator[Backend]:
    """Where the programs of a test send what they tell Logfire, with the handlers in place."""
    if not PYTHON.exists():
        pytest.fail(f"Logfire isn't there ({PYTHON}): run `make .venv-logfire/.installed`")
    Path("handlers.py").write_text(SIMPLE + HANDLERS)
    Path("input.json").write_text(json.dumps({"text": CANARY}))
    with Backend() as backend:
        settings = {
            "PAIGEANT_HANDLERS": "handlers.py",
            "PAIGEANT_SWEEP_INTERVAL": "0.1",
            "PAIGEANT_TRACES": "true",
            "PAIGEANT_OTEL_METRICS": "true",
            "OTEL_BSP_SCHEDULE_DELAY": "50",
            "LOGFIRE_TOKEN": TOKEN,
            "LOGFIRE_BASE_URL": backend.url,
            "LOGFIRE_SEND_TO_LOGFIRE": "true",  # under pytest it doesn't by itself
        }
        for name, value in settings.items():
            monkeypatch.setenv(name, value)
        yield backend
    assert CANARY.encode() not in backend.bytes


def called(*args: str) -> Any:
    """The JSON that a command gave, and nothing else, although Logfire prints spans."""
    found = subprocess.run([*PAIGEANT, *args, "--json"], capture_output=True, text=True, check=True)
    return json.loads(found.stdout)


def dispatched(workflow: str, id: str) -> None:
    """Start a run, which a process of its own does."""
    assert called("dispatch", workflow, "input.json", "--id", id) == {"id": id}


def worker(*topics: str) -> Command:
    """A worker in a process of its own."""
    return Command("run", *(("--topics", ",".join(topics)) if topics else ()), program=PAIGEANT)


def stop(worker: Command) -> None:
    """Stop it as operators do."""
    worker.signal(signal.SIGTERM)
    assert worker.end() == 0


def below(spans: list[Received], above: Received) -> list[str]:
    """The names of the spans right under another one."""
    return [span.name for span in under(spans, above)]


def test_a_run_of_three_processes_is_one_trace_at_logfire(backend: Backend) -> None:
    """With its compensation and its end; agents' spans and Logfire's own are under their steps; metrics come, too."""
    Path("go").touch()
    with worker("reserve") as first, worker("judge", "charge") as second:
        dispatched("sold", "t-1")
        first.until("run.compensated")
        stop(first)
        stop(second)
    run = shown("t-1")
    assert run["status"] == "compensated"
    spans = backend.whole(run["trace_id"])
    assert backend.never_ended() == []
    [root] = [span for span in spans if not span.parent]
    assert root.name == "dispatch sold"
    assert [(span.name, span.is_error) for span in under(spans, root) if "receive" not in span.name] == [
        ("step reserve", False),
        ("step judge", False),
        ("step charge", True),
        ("undo reserve", False),
        ("run.compensated", True),
    ]
    named = {span.name: span for span in spans}
    assert below(spans, named["step reserve"]) == ["look into shelf {shelf}"]
    assert below(spans, named["look into shelf {shelf}"]) == ["found it"]
    assert below(spans, named["undo reserve"]) == ["put it back"]
    assert below(spans, named["step judge"]) == ["invoke_agent judge"]
    chat = "chat function:say:"
    tools = ["execute_tool look", "execute_tool hold"]
    assert below(spans, named["invoke_agent judge"]) == [chat, tools[0], chat, tools[1], chat]
    assert backend.counted["paigeant.steps", "judge completed"] == 1
    assert backend.counted["paigeant.steps", "charge failed"] == 1
    assert backend.counted["paigeant.runs_ended", "sold compensated"] == 1
    asked = [count for (name, values), count in backend.counted.items() if _counts_input(name, values)]
    assert asked == [3]


def _counts_input(name: str, values: str) -> bool:
    return name == "gen_ai.client.token.usage" and values.endswith(" input")


def test_a_killed_worker_leaves_what_it_had_begun_pending(backend: Backend) -> None:
    """Another one goes on in the same trace, where nothing that is replayed is told again, not even as pending."""
    dispatched("judged", "t-1")
    with worker() as first:
        backend.until(lambda: "execute_tool hold" in backend.never_ended())
        first.signal(signal.SIGKILL)
        first.end()
    lost = {"step judge", "invoke_agent judge", "execute_tool hold"}
    assert set(backend.never_ended()) - lost == set()
    Path("go").touch()
    with worker() as second:
        second.until("run.completed")
        stop(second)
    run = shown("t-1")
    assert (run["status"], run["output"]) == ("completed", "fine")
    spans = backend.whole(run["trace_id"])
    assert sorted(backend.never_ended()) == sorted(lost)
    told = Counter(span.name for span in spans)
    chat = "chat function:say:"
    assert (told[chat], told["execute_tool look"], told["execute_tool hold"]) == (3, 1, 1)
    [step] = [span for span in spans if span.name == "step judge"]
    assert step.attributes["paigeant.attempt"] == 2
    [agent] = under(spans, step)
    assert below(spans, agent) == ["execute_tool hold", chat]
    for span in (agent, step):  # where Logfire adds up what was used below
        [used] = json.loads(span.attributes["logfire.metrics"])["gen_ai.client.token.usage"]["details"][:1]
        assert used["total"] > 0


def test_a_span_around_the_dispatch_is_above_the_run(backend: Backend) -> None:
    """In a program of one's own, which has the observer from its application."""
    Path("go").touch()
    Path("program.py").write_text(
        """
import asyncio
from handlers import activity, judged, logfire
from paigeant import Paigeant
from paigeant.observers.traces import TraceObserver

async def main():
    async with Paigeant(activities=activity, observers=[TraceObserver()]) as app:
        with logfire.span("take an order"):
            await app.dispatch(judged, {"text": "a"}, workflow_id="t-1")
        await app.worker().run(until_idle=True)

asyncio.run(main())
"""
    )
    subprocess.run([PYTHON, "program.py"], check=True, capture_output=True)
    run = shown("t-1")
    assert run["status"] == "completed"
    spans = backend.whole(run["trace_id"])
    assert backend.never_ended() == []
    [root] = [span for span in spans if not span.parent]
    assert root.name == "take an order"
    assert below(spans, root) == ["dispatch judged"]


def test_a_run_that_nobody_began_has_its_end(backend: Backend) -> None:
    """The command that cancels it finds Logfire in the handlers as well."""
    dispatched("judged", "t-1")
    assert called("runs", "cancel", "t-1")["status"] == "cancelled"
    spans = backend.whole(shown("t-1")["trace_id"])
    [root] = [span for span in spans if not span.parent]
    assert below(spans, root) == ["run.cancelled"]


@pytest.mark.parametrize(
    ("block", "told"),
    [(SIMPLE, "[Scrubbed due to 'session']"), (SCRUBBED, "session-1")],
    ids=["by default", "told"],
)
def test_ids_are_scrubbed_unless_logfire_is_told(block: str, told: str, backend: Backend) -> None:
    """It looks for words of secrets in whatever attributes say."""
    Path("handlers.py").write_text(block + HANDLERS)
    dispatched("judged", "session-1")
    [root] = backend.spans
    assert root.attributes["paigeant.workflow_id"] == told
