"""Journal: a file beside the engine's own records in which every step says that it begins.

It is how the demonstration proves what it claims, without asking the engine: what began more than once stands there
more than once. Lines are only ever added, each with one write, so that a process killed in between loses none.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from paigeant.context import StepContext

__all__ = ["Entry", "Journal"]


@dataclass(frozen=True, slots=True)
class Entry:
    """A step of a run begins, in the process `pid`."""

    run: str
    step: str
    attempt: int
    pid: int


@dataclass(frozen=True, slots=True)
class Journal:
    """Writes and reads the file at `path`.

    `pace`: seconds that each step takes at least, so that a person can watch. `hold`: the step that never goes on once
    it has begun, because the process is to be killed there.
    """

    path: Path
    pace: float = 0.0
    hold: str | None = None

    def begin(self, step: StepContext) -> None:
        """Note that `step` begins; returns when it may go on. Blocks, so it is called in a thread."""
        entry = Entry(step.workflow_id, step.step_id, step.attempt, os.getpid())
        line = json.dumps(asdict(entry)) + "\n"
        file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            os.write(file, line.encode())
            os.fsync(file)
        finally:
            os.close(file)
        if step.step_id == self.hold:
            threading.Event().wait()
        time.sleep(self.pace)

    def entries(self, run: str) -> Iterator[Entry]:
        """What began in a run, in order."""
        if self.path.exists():
            for line in self.path.read_text(encoding="utf-8").splitlines():
                entry = Entry(**json.loads(line))
                if entry.run == run:
                    yield entry
