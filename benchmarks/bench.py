"""Bench: where a benchmark works, how much it does, and how it starts processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["ROOT", "Bench", "NotMeasured", "environment"]

ROOT = Path(__file__).resolve().parents[1]


class NotMeasured(Exception):
    """A benchmark can't do its work here; its message says why and what to do."""


@dataclass(frozen=True, slots=True)
class Bench:
    """`folder` holds the database files: it should be on the disk whose speed matters, not in memory."""

    folder: Path
    quick: bool = False
    conditions: dict[str, str] = field(default_factory=dict)
    """How the servers that were measured were set."""

    def many(self, full: int, quick: int) -> int:
        """How many, in the full form or in the smallest one that gives figures."""
        return quick if self.quick else full

    @contextmanager
    def file(self, name: str = "chain.db") -> Iterator[Path]:
        """A place for a database file, removed afterwards."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self.folder, prefix="file-") as folder:
            yield Path(folder).resolve() / name

    def fresh(
        self,
        module: str,
        *,
        python: str = sys.executable,
        settings: Mapping[str, str] | None = None,
        **arguments: Any,
    ) -> Any:
        """What `module` prints as JSON when it is started in a process of its own with these arguments.

        `settings` are more variables of its environment.
        """
        command = [python, "-m", module, json.dumps(arguments)]
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=environment(**(settings or {})),
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(f"{module} ended with {done.returncode}:\n{done.stderr[-4000:]}")
        return json.loads(done.stdout.splitlines()[-1])


def environment(**more: str) -> dict[str, str]:
    """The environment for a process, without Paigeant settings of the user's own."""
    own = {name: value for name, value in os.environ.items() if not name.upper().startswith("PAIGEANT_")}
    return {**own, **more}
