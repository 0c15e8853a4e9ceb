"""How long whole processes take to start: the command line, the imports, and Python alone.

`import paigeant` loads each public name only when it is used, so the import of the names counts too.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence

from benchmarks.bench import ROOT, Bench, environment
from benchmarks.report import Figure, of

__all__ = ["run"]


def run(bench: Bench) -> list[Figure]:
    """Seconds from the start of a process to its end, the four kinds in turn."""
    rounds = [
        (
            _seconds(["-c", "pass"]),
            _seconds(["-c", "import paigeant"]),
            _seconds(["-c", "from paigeant import ActivityRegistry, Paigeant, Settings, Workflow"]),
            _seconds(["-m", "paigeant.cli", "--help"]),
        )
        for _ in range(bench.many(15, 2))
    ]
    bare, imported, used, helped = zip(*rounds, strict=True)
    return [
        of("python -c pass", bare, "s"),
        of("import paigeant", imported, "s", most=0.15),
        of("import what an application uses", used, "s"),
        of("paigeant --help", helped, "s", most=0.4),
        of("import over bare", [own / floor for floor, own, *_ in rounds], "times"),
        of("--help over bare", [own / floor for floor, *_, own in rounds], "times"),
    ]


def _seconds(arguments: Sequence[str]) -> float:
    began = time.perf_counter()
    command = [sys.executable, *arguments]
    subprocess.run(command, cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - began
