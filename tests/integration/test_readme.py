"""The quickstart of README.md, as it is printed, in an empty folder and with the package as it would be installed."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tests.integration.processes import Command

ROOT = Path(__file__).parents[2]


def quickstart() -> list[str]:
    """The shell commands of the section, in their order."""
    text = (ROOT / "README.md").read_text()
    section = text.partition("## Quickstart")[2].partition("\n## ")[0]
    blocks = re.findall(r"```sh\n(.*?)```", section, flags=re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line]


def python_blocks() -> list[str]:
    """The code of the page: the project of `paigeant init` in short, and a program that starts a run."""
    return re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)


def install(to: Path) -> dict[str, str]:
    """Put the package where `pip install .` would put it, in a folder of its own; gives the environment to use it."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-index"]
    command += ["--no-deps", "--no-build-isolation", "--no-compile", "--target", str(to), str(ROOT)]
    subprocess.run(command, check=True)
    return {**os.environ, "PYTHONPATH": str(to), "PATH": f"{to / 'bin'}{os.pathsep}{os.environ['PATH']}"}


def test_the_quickstart_runs_as_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each command does what the text says: a run that completes, and one that is undone and so ends with 1."""
    environment, installation, *rest = quickstart()
    assert environment == "python3 -m venv .venv && . .venv/bin/activate"
    assert installation == "pip install ."
    env = install(tmp_path / "installed")
    project = tmp_path / "project"
    project.mkdir()
    monkeypatch.chdir(project)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    codes = {}
    start, worker_line = rest[:2]
    codes[start] = subprocess.run(start, shell=True, check=False).returncode
    with Command(program=worker_line.split()) as worker:
        serving = worker.until("worker.started")
        for line in rest[2:]:
            codes[line] = subprocess.run(line, shell=True, check=False).returncode
        program = [sys.executable, "-c", python_blocks()[1]]
        printed = subprocess.run(program, check=True, capture_output=True, text=True).stdout
        worker.signal(signal.SIGTERM)
        assert worker.end() == 0
    failing = {line for line in rest if "0000" in line}
    assert serving["topics"] == ["charge_card", "letter", "reserve_stock"]
    assert len(failing) == 1
    assert codes == {line: int(line in failing) for line in rest if line != worker_line}
    assert printed == "completed Dear Ada, your order is on its way (receipt for 2 x A-1).\n"


def test_the_python_code_is_python() -> None:
    """The code blocks compile, top-level await aside."""
    blocks = python_blocks()
    for block in blocks:
        compile(
            "async def block() -> None:\n" + "".join(f"    {line}\n" for line in block.splitlines()),
            "README.md",
            "exec",
        )
    assert len(blocks) == 2


def test_its_links_lead_somewhere() -> None:
    """Each relative link is to a file of the repository."""
    links = re.findall(r"\]\((?!https?:)([^)#]+)", (ROOT / "README.md").read_text())
    assert [link for link in links if not (ROOT / link).exists()] == []
