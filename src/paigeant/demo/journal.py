"""Journal: a file beside the engine's own records in which every step says that it begins, and every call in a step.

It is how the demonstration proves what it claims, without asking the engine: what began more than once stands there
more than once. Lines are only ever added, each with one write, so that a process killed in between loses none.
"""

from __future__ import annotations

import asyncio
import json
import os
import threading
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from pydantic_ai import ModelMessage, ModelResponse
from pydantic_ai.models import Model, ModelRequestParameters
from pydantic_ai.models.wrapper import WrapperModel
from pydantic_ai.settings import ModelSettings

from paigeant.errors import OutsideStep
from paigeant.place import current_place

__all__ = ["Call", "Entry", "Hold", "Journal", "Watched"]

Call = Literal["model", "tool"]

_SHARES: dict[Call | None, float] = {None: 1.0, "model": 0.0, "tool": 0.12}
"""How much of a journal's pace each thing takes: a model call is watched with the tool call that it leads to."""


@dataclass(frozen=True, slots=True)
class Entry:
    """Something begins in the process `pid`: a step of a run or, with `call`, a call of a model or a tool within it.

    `key` tells what begins, and is the same whenever that begins again. `held`: it goes no further.
    """

    run: str
    step: str
    pid: int
    call: Call | None
    key: str
    held: bool = False


@dataclass(frozen=True, slots=True)
class Hold:
    """Where a process goes no further, since it is to be killed there: within its tool call of that number (from 1).

    A model may make fewer. So it doesn't go into the step `before` either.
    """

    call: int
    before: str


@dataclass(frozen=True, slots=True)
class Journal:
    """Writes and reads the file at `path`. `pace`: seconds that a step takes at least, so that a person can watch."""

    path: Path
    pace: float = 0.0
    hold: Hold | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)

    async def begin(self, call: Call | None = None) -> None:
        """Note that the step in which this is begins, or a call within it; returns when it may go on."""
        entry = await asyncio.to_thread(self._note, call)
        if entry.held:
            await asyncio.Event().wait()
        await asyncio.sleep(self.pace * _SHARES[call])

    def entries(self, run: str) -> Iterator[Entry]:
        """What began in a run, in order."""
        if self.path.exists():
            for line in self.path.read_text(encoding="utf-8").splitlines():
                found = json.loads(line)
                if found["run"] == run:
                    yield Entry(**found)

    def _note(self, call: Call | None) -> Entry:
        place = current_place()
        if place is None:
            raise OutsideStep("the journal of the demonstration is for what happens in steps")
        key = place.journal.key
        with self._lock:  # tools that are called in parallel have numbers of their own
            held = self._is_held(key.workflow_id, key.step, call)
            entry = Entry(key.workflow_id, key.step, os.getpid(), call, place.effect_key, held)
            line = json.dumps(asdict(entry)) + "\n"
            file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            try:
                os.write(file, line.encode())
                os.fsync(file)
            finally:
                os.close(file)
        return entry

    def _is_held(self, run: str, step: str, call: Call | None) -> bool:
        if self.hold is None:
            return False
        if call != "tool":
            return call is None and step == self.hold.before
        mine = [entry for entry in self.entries(run) if entry.pid == os.getpid() and entry.call == "tool"]
        return len(mine) + 1 == self.hold.call


class Watched(WrapperModel):
    """A model each of whose calls stands in the journal: those that are really made, and none from a record."""

    def __init__(self, wrapped: Model | str, journal: Journal) -> None:
        super().__init__(wrapped)
        self.journal = journal

    async def request(
        self,
        messages: list[ModelMessage],
        model_settings: ModelSettings | None,
        model_request_parameters: ModelRequestParameters,
    ) -> ModelResponse:
        await self.journal.begin("model")
        return await super().request(messages, model_settings, model_request_parameters)
