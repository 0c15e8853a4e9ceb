"""examples/approval, by the commands that its README.md prints, and with a denial in the place of the approval."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.integration import warm
from tests.integration.processes import call, shown

EXAMPLE = Path(__file__).parents[2] / "examples" / "approval"


def commands() -> list[str]:
    """The shell commands of the page, in their order."""
    blocks = re.findall(r"```sh\n(.*?)```", (EXAMPLE / "README.md").read_text(), flags=re.DOTALL)
    return [line for block in blocks for line in block.splitlines()]


@pytest.fixture(autouse=True)
def _in_a_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The example as it is, with `paigeant` as a program that a shell finds."""
    shutil.copytree(EXAMPLE, tmp_path / "approval", ignore=shutil.ignore_patterns("*.db*", "__pycache__"))
    monkeypatch.chdir(tmp_path / "approval")
    program = tmp_path / "bin" / "paigeant"
    program.parent.mkdir()
    program.write_text(warm.program())
    program.chmod(0o755)
    monkeypatch.setenv(
        "PATH", f"{program.parent}{os.pathsep}{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    )
    monkeypatch.delenv("COMPLAINT_MODEL", raising=False)


def asked() -> Any:
    """What is asked for now; one thing."""
    [request] = json.loads(call("requests", "list", "--json").stdout)
    return request


def give(line: str) -> str:
    """What a command of the page prints, with the id of the request that is open where it says ID."""
    if re.search(r"\bID\b", line):
        line = re.sub(r"\bID\b", asked()["id"], line)
    done = subprocess.run(line, shell=True, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
    return done.stdout


def until_it_waits() -> None:
    """Start the run, and let a worker do what it can."""
    for line in commands()[:2]:
        give(line)


def test_the_commands_of_the_page_run_as_printed() -> None:
    """Each one ends well, and the last two show a run that is done and one refund."""
    printed = {line: give(line) for line in commands()}
    assert "refund" in printed["paigeant requests list"]
    assert "completed" in printed["paigeant runs show case-1"]
    assert re.fullmatch(r"A-17 2400 case-1:clerk:\w+\n", printed["cat refunds.txt"])


def test_the_worker_has_ended_while_the_run_waits() -> None:
    """What came before is recorded, the tool has not been called, and the request says what it would be called with."""
    until_it_waits()
    assert shown("case-1")["status"] == "waiting"
    request = asked()
    assert (request["kind"], request["name"], request["workflow_id"]) == ("approval", "refund", "case-1")
    assert request["asked"]["arguments"] == {"order": "A-17", "cents": 2400}
    assert not Path("refunds.txt").exists()


def test_nothing_before_the_approval_is_done_again() -> None:
    """Both attempts together asked the model three times and called two tools, each once."""
    for line in commands():
        give(line)
    run = shown("case-1")
    assert run["output"] == "We are sorry. 24.00 for order A-17 are on their way back."
    assert (run["usage"]["requests"], run["usage"]["tool_calls"]) == (3, 2)


def test_a_denial_is_told_to_the_model() -> None:
    """The tool is not called, and the reason stands in the answer."""
    until_it_waits()
    [denial] = re.findall(r"`(paigeant requests deny .*?)`", (EXAMPLE / "README.md").read_text())
    give(denial)
    give("paigeant run handlers.py --until-idle")
    run = shown("case-1")
    assert run["status"] == "completed"
    assert run["output"] == "We are sorry that we can't pay you back. the lid is in the box"
    assert not Path("refunds.txt").exists()
