"""Points at which a process dies: right before or right behind what a store or a transport is asked, once for each."""

from __future__ import annotations

import functools
import os
import signal
from pathlib import Path
from typing import Any, NamedTuple

from paigeant.app import Paigeant
from paigeant.message import MessageId
from paigeant.store import StepKey

__all__ = ["Point", "die_at", "died"]


class Point(NamedTuple):
    """`when` ("before" or "after") `method` is called for this step, or its undo (`phase`)."""

    method: str
    when: str
    step: str
    phase: str = "do"

    @property
    def owner(self) -> str:
        """What has the method."""
        return "transport" if self.method in ("publish", "ack") else "store"


def die_at(app: Paigeant, points: dict[str, Point], folder: Path) -> None:
    """Have this process killed at the point of each run, by its id, unless one has been killed there before."""
    for owner, method in {(point.owner, point.method) for point in points.values()}:
        target: Any = getattr(app, owner)
        setattr(target, method, _mortal(getattr(target, method), method, points, folder))


def died(folder: Path) -> set[str]:
    """The runs at whose points a process was killed."""
    return {file.name.removeprefix("died.") for file in folder.glob("died.*")}


def _mortal(real: Any, method: str, points: dict[str, Point], folder: Path) -> Any:
    @functools.wraps(real)
    async def call(*args: Any, **options: Any) -> Any:
        run, *place = _about(method, args)

        def die(when: str) -> None:
            if points.get(run) == (method, when, *place):
                try:
                    os.close(os.open(folder / f"died.{run}", os.O_CREAT | os.O_EXCL))
                except FileExistsError:
                    return
                os.kill(os.getpid(), signal.SIGKILL)

        die("before")
        answer = await real(*args, **options)
        die("after")
        return answer

    return call


def _about(method: str, args: tuple[Any, ...]) -> tuple[str, str, str]:
    """The run, step and phase that a call is for."""
    match method:
        case "record_workflow_start":
            return args[0].id, "s0", "do"
        case "publish":
            return args[1].workflow_id, args[1].step_id, args[1].phase.value
        case "ack":
            id = MessageId.read(args[0])
            return id[:3] if id else ("", "", "")
        case _:
            key: StepKey = args[0].key
            return key.workflow_id, key.step, key.phase.value
