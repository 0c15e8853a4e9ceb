"""The section of the how-to on signing, as it is printed: commands and settings, in the folder of `paigeant init`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from tests.integration import warm
from tests.integration.processes import call, shown
from tests.unit.test_docs import fences


def in_a_shell(line: str, keys: str) -> subprocess.CompletedProcess[str]:
    """What a line gave in a shell that has exported this ring."""
    exported = f"export PAIGEANT_KEYS_FILE={keys}; " if keys else ""
    return subprocess.run(exported + line, shell=True, capture_output=True, text=True, check=False)


def test_the_section_on_signing_runs_as_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every line works but the one that is said to be refused; both orders are done; the front has two keys by then."""
    program = tmp_path / "bin" / "paigeant"
    program.parent.mkdir()
    program.write_text(warm.program())
    program.chmod(0o700)
    monkeypatch.setenv("PATH", f"{program.parent}:{Path(sys.executable).parent}:/usr/bin:/bin")
    assert call("init").returncode == 0
    blocks = [block for block in fences("sh", "yaml", page="how-to.md") if block.heading == "Sign messages"]
    assert [block.language for block in blocks] == ["sh", "yaml", "sh", "sh"]
    keys, refused = "", []
    for block in blocks:
        if block.language == "yaml":
            with Path("paigeant.yaml").open("a") as settings:
                settings.write(f"\n{block.text}\n")
            continue
        for line in block.text.splitlines():
            if line.startswith("export PAIGEANT_KEYS_FILE="):
                keys = line.partition("=")[2]
                continue
            done = in_a_shell(line, keys)
            if "# refused" in line:
                refused.append(
                    (done.returncode, "may not start runs of workflow 'fulfil_order'" in done.stderr)
                )
            else:
                assert done.returncode == 0, (line, done.stderr)
    assert refused == [(2, True)]
    monkeypatch.setenv("PAIGEANT_KEYS_FILE", keys)
    for order in ("order-1", "order-2"):
        run = shown(order)
        assert (run["status"], [step["attempts"] for step in run["steps"]]) == ("completed", [1, 1, 1])
    assert call("dead-letters", "list", "--json").stdout.strip() == "[]"
