"""What a person sees: on a terminal a table that lives, anywhere else a line for each thing that happens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from rich.console import Console, Group
from rich.live import Live
from rich.padding import Padding
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from paigeant import folding
from paigeant.clock import SystemClock
from paigeant.demo.pipeline import WORKFLOW
from paigeant.slip import StepStatus
from paigeant.store import RunDetail, StepRecord

__all__ = ["Line", "Screen", "lines_of"]

_AGENTS = frozenset({"outline", "brief", "review", "shorten"})
_PLANNED = frozenset(step.id for step in WORKFLOW.steps)


@dataclass(frozen=True, slots=True)
class Line:
    """A step on the screen. `status`: that of its record, `planned` before there is one, `cut off` by a dead worker.

    `calls`: how many its agent made of its model, in all attempts.
    """

    step: str
    activity: str
    status: str
    attempts: int = 0
    seconds: float | None = None
    worker: str = ""
    calls: int = 0

    @property
    def inserted(self) -> bool:
        """Whether another step put it into the itinerary."""
        return self.step not in _PLANNED


@dataclass(slots=True)
class _Seen:
    """A worker: what it is called, and whether it is alive."""

    name: str
    alive: bool = True


def lines_of(
    detail: RunDetail, workers: dict[int, _Seen], made: Mapping[str, int], *, now: float
) -> list[Line]:
    """The steps of a run, done and to do, in their order. `made`: the model calls of each step."""
    slip, _ = folding.fold(detail, inline_bytes=0)
    lines = [_line(row, workers, made, now) for row in detail.steps]
    there = {line.step for line in lines}
    lines += [Line(step.id, step.activity, "planned") for step in slip.itinerary if step.id not in there]
    return lines


def _line(row: StepRecord, workers: dict[int, _Seen], made: Mapping[str, int], now: float) -> Line:
    seen = workers.get(_process(row.worker)) if row.worker is not None else None
    status = row.status.value
    if row.status is StepStatus.RUNNING and seen is not None and not seen.alive:
        status = "cut off"
    seconds = None
    if row.started_at is not None and row.status is not StepStatus.READY:
        seconds = max((row.completed_at or now) - row.started_at, 0.0)
    worker = "" if seen is None else seen.name
    return Line(row.step, row.activity, status, row.attempt, seconds, worker, made.get(row.step, 0))


def _process(worker: str) -> int:
    """The process of a worker, which stands in its id before the last part."""
    number = worker.rsplit("-", 2)[-2]
    return int(number) if number.isdigit() else 0


class Screen:
    """Shows a run. Use it as a context manager; what is printed after it stands below."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._live = (
            Live(console=console, auto_refresh=True, refresh_per_second=12) if console.is_terminal else None
        )
        self._workers: dict[int, _Seen] = {}
        self._lines: list[Line] = []
        self._said: list[Text] = []
        self._spinner = Spinner("dots", style="cyan")
        self._clock = SystemClock()
        self._began = self._clock.now()
        encoding = (console.encoding or "").lower()
        self._marks = _MARKS if encoding.startswith("utf") else _PLAIN_MARKS

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.update(self._picture(), refresh=True)
            self._live.stop()

    def joined(self, pid: int, name: str) -> None:
        """A worker process is there."""
        self._workers[pid] = _Seen(name)

    def lost(self, pid: int) -> None:
        """A worker process is dead."""
        self._workers[pid].alive = False

    def say(self, text: str, *, style: str = "") -> None:
        """Something happened."""
        seconds = self._clock.now() - self._began
        said = Text.assemble((f"{seconds:5.1f} s  ", "dim"), (text, style))
        self._said.append(said)
        if self._live is None:
            self.console.print(said, soft_wrap=True)
        else:
            self._live.update(self._picture())

    def show(self, detail: RunDetail, made: Mapping[str, int]) -> None:
        """How the run stands now. `made`: how many model calls each step has made."""
        before = {line.step: line for line in self._lines}
        self._lines = lines_of(detail, self._workers, made, now=self._clock.now())
        for line in self._lines:
            old = before.get(line.step)
            if old is None and before and line.inserted:
                self.say(
                    f"review revised the itinerary: {line.activity} inserted as step {line.step}",
                    style="magenta",
                )
            if self._live is None and line.attempts and (old is None or _told(old) != _told(line)):
                self.say(_sentence(line))
        if self._live is not None:
            self._live.update(self._picture())

    def _picture(self) -> Group:
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
        table.add_column("")
        table.add_column("step", min_width=8)
        table.add_column("activity", min_width=15)
        table.add_column("status", min_width=9)
        table.add_column("attempts", justify="right")
        table.add_column("model calls", justify="right")
        table.add_column("time", justify="right", min_width=6)
        table.add_column("worker", min_width=6)
        for line in self._lines:
            style = _STYLES.get(line.status, "")
            mark = (
                self._spinner
                if line.status == "running"
                else Text(self._marks.get(line.status, " "), style=style)
            )
            kind = "agent" if line.activity in _AGENTS else "function"
            table.add_row(
                mark,
                Text(line.step, style="magenta" if line.inserted else "bold" if line.attempts else "dim"),
                Text.assemble((line.activity, "" if line.attempts else "dim"), (f"  {kind}", "dim")),
                Text(line.status, style=style),
                Text(
                    str(line.attempts) if line.attempts else "",
                    style="bold yellow" if line.attempts > 1 else "",
                ),
                Text(str(line.calls) if line.calls else ""),
                Text("" if line.seconds is None else f"{line.seconds:.1f} s"),
                Text(line.worker, style=_WORKER_STYLES.get(line.worker, "")),
            )
        return Group(Padding(table, (0, 0, 1, 2)), *(Padding(said, (0, 0, 0, 2)) for said in self._said))


_STYLES = {
    "completed": "green",
    "running": "cyan",
    "ready": "yellow",
    "planned": "dim",
    "cut off": "bold red",
    "failed": "bold red",
}
_WORKER_STYLES = {"A": "blue", "B": "green"}
_MARKS = {"completed": "✔", "ready": "…", "planned": "·", "cut off": "✘", "failed": "✘"}
_PLAIN_MARKS = {"completed": "+", "ready": ".", "planned": ".", "cut off": "x", "failed": "x"}


def _told(line: Line) -> tuple[str, int]:
    return line.status, line.attempts


def _sentence(line: Line) -> str:
    """What a line says where there is no table."""
    worker = f" by worker {line.worker}" if line.worker else ""
    took = f" in {line.seconds:.1f} s" if line.status == "completed" and line.seconds is not None else ""
    return f"step {line.step}: {line.status}{took}{worker}, attempt {line.attempts}"
