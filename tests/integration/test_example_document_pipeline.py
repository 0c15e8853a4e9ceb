"""examples/document_pipeline.py, in one process and as services."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.integration.processes import Command, call, shown

EXAMPLE = str(Path(__file__).parents[2] / "examples" / "document_pipeline.py")


def processed(text: str) -> Any:
    """The run of a report with this text, once two workers with an agent each have done it."""
    Path("report.json").write_text(json.dumps({"text": text, "sentences": 1}))
    with (
        Command("run", EXAMPLE, "--topics", "clean,analyse,alert") as first,
        Command("run", EXAMPLE, "--topics", "summarise,publish") as second,
    ):
        for worker in (first, second):
            worker.until("worker.started")
        call(
            *("dispatch", "document_pipeline", "report.json", "--handlers", EXAMPLE),
            *("--id", "r-1", "--wait", "--timeout", "60"),
        )
        for worker in (first, second):
            worker.signal(signal.SIGTERM)
            assert worker.end() == 0
    return shown("r-1")


@pytest.fixture(scope="module")
def page() -> str:
    """What the example prints."""
    return subprocess.run([sys.executable, EXAMPLE], capture_output=True, text=True, check=True).stdout


def test_the_example_runs_in_one_process(page: str) -> None:
    """`python examples/document_pipeline.py` prints a page with topics and a summary of the text itself."""
    title, summary, audience = page.strip().split("\n\n")
    assert title == "# bridge, bearing"
    assert summary.startswith("An inspection found a crack in the northern bearing of the bridge")
    assert summary.endswith("after a test with loaded trucks.")
    assert audience == "(for drivers)"


def test_one_worker_continues_what_another_ones_agent_began() -> None:
    """The second agent runs in another process, and has the text from the conversation of the first alone."""
    run = processed("The pump is stuck. The harbour pump will be mended by noon, and the pump tested.")
    output = {step["id"]: step["output"] for step in run["steps"]}
    assert output["summarise"] == "The harbour pump will be mended by noon, and the pump tested."


def test_nobody_is_alerted_without_need() -> None:
    """The step for urgent reports is skipped where the analysis finds none."""
    run = processed("All is quiet at the harbour.")
    assert {step["id"]: step["status"] for step in run["steps"]}["alert"] == "skipped"


def test_somebody_is_alerted_where_needed() -> None:
    """The analysis is a model with a field that the itinerary's condition reads."""
    run = processed("There is danger at the harbour.")
    assert {step["id"]: step["output"] for step in run["steps"]}["alert"] == "alerted: danger"
