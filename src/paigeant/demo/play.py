"""The play: a run is dispatched, its worker is killed in the middle, another takes over; then what ran is counted.

The worker is a process of its own and dies by SIGKILL, which no code of it can hear. The moment is chosen by what has
begun, not by time: an agent is in the middle of its step, and of a tool call. That call is told to hold there, so that
however slow or fast the machine is, the kill always cuts a step in two.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import sys
from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from pydantic_ai.models import infer_model
from pydantic_core import from_json

from paigeant.app import Paigeant
from paigeant.demo import offline
from paigeant.demo.journal import Call, Entry, Hold, Journal
from paigeant.demo.pipeline import MARK, WORKFLOW, Request, activities, readings
from paigeant.demo.screen import Screen
from paigeant.demo.text import Document, read_document
from paigeant.demo.worker import Orders, models
from paigeant.errors import ConfigurationError, InputInvalid, PaigeantError
from paigeant.run import Run
from paigeant.settings import Settings
from paigeant.slip import RUN_ENDED, Phase, RunStatus, StepStatus
from paigeant.store import RunDetail, StepKey, StepRecord
from paigeant.usage import Usage

__all__ = ["DOCUMENT", "Calls", "Cut", "Ending", "Plan", "play", "prepare"]

DOCUMENT = Path(__file__).with_name("document.md")
"""The document that ships with the package."""

_LOOK_SECONDS = 0.1
_MOST_BYTES = 2_000_000


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to be shown: a document, the folder for all files, the model's name (None: offline), the brief's length.

    `pace`: seconds that each step takes at least. `kill`: whether the worker is killed.
    """

    source: Path
    folder: Path
    model: str | None = None
    max_words: int = 200
    pace: float = 0.0
    kill: bool = True

    @property
    def target(self) -> Path:
        """The file for the brief."""
        return self.folder / "brief.md"

    @property
    def model_name(self) -> str:
        """What the model is called on the screen and in the brief."""
        return self.model or offline.NAME


@dataclass(frozen=True, slots=True)
class Calls:
    """How many calls agents made of their models and of their tools, or didn't have to make."""

    model: int
    tool: int

    def __bool__(self) -> bool:
        return self.model > 0 or self.tool > 0

    def __str__(self) -> str:
        counts = ((self.model, "model call"), (self.tool, "tool call"))
        return " and ".join(f"{count} {word}{'' if count == 1 else 's'}" for count, word in counts)


@dataclass(frozen=True, slots=True)
class Cut:
    """The step that was cut in two, the process that died there, and the calls that were recorded of it by then."""

    step: str
    pid: int
    recorded: Calls


@dataclass(frozen=True, slots=True)
class Ending:
    """How it ended. `words`: of the brief. `began`: how often each step began, by the journal. `cut`: where the worker
    was killed, if it was. `made`: all calls of the run that were really made, by the journal.

    `saved`: the calls of the step that was cut in two which the dead worker had made and nobody made again, by the
    journal; None as long as that step isn't done. `twice`: recorded steps that ran again; `again`: recorded calls that
    were made again. There must be none of either.
    """

    run: str
    status: RunStatus
    error: str | None
    seconds: float
    words: int
    began: Mapping[str, int]
    cut: Cut | None
    made: Calls
    saved: Calls | None
    twice: Sequence[str]
    again: Calls


def prepare(plan: Plan) -> Document:
    """The document, after all has been looked at that can be wrong. Raises InputInvalid, ConfigurationError."""
    document = _read(plan.source)
    try:
        plan.folder.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            if MARK not in plan.target.read_text(encoding="utf-8", errors="replace"):
                raise InputInvalid(
                    f"{plan.target} is there already and is no brief of the demonstration's; "
                    "it would be overwritten: choose another folder with --out"
                )
        probe = plan.folder / f".paigeant-{secrets.token_hex(4)}"
        probe.touch()
        probe.unlink()
    except OSError as exc:
        raise ConfigurationError(
            f"can't write into the folder {plan.folder}: {exc.strerror}; choose another with --out"
        ) from exc
    if plan.target.exists() and plan.target.samefile(plan.source):
        raise InputInvalid(f"{plan.source} is where the brief goes; choose another folder with --out")
    if plan.model is not None:
        _check_model(plan.model)
    return document


async def play(plan: Plan, document: Document, screen: Screen) -> Ending:
    """Do it with the plan's document, and show it on `screen`.

    The plan's paths are absolute, and its folder is the working directory. Raises PaigeantError when a worker
    doesn't start.
    """
    url = "sqlite:///paigeant.db"
    journal = Journal(plan.folder / "demo-journal.jsonl")
    orders = Orders(url, str(journal.path), plan.pace, None, plan.model)
    known = activities(models(plan.model), journal)
    async with Paigeant(Settings(transport_url=url, store_url=url), activities=known) as app:
        request = Request(
            path=str(plan.source),
            target=str(plan.target),
            max_words=plan.max_words,
            model=plan.model_name,
        )
        run = await app.dispatch(WORKFLOW, request, workflow_id=f"demo-{secrets.token_hex(3)}")
        screen.say(f"run {run.id} dispatched: {' → '.join(step.id for step in WORKFLOW.steps)}")
        # Past the middle of the agent's reading: it has asked its model and called its tool several times by then.
        hold = Hold(readings(document) // 2 + 1, before="brief") if plan.kill else None
        async with _Stage(app, run, screen, plan, orders).open(hold) as stage:
            cut = await stage.kill() if plan.kill else None
            detail = await stage.finish()
    return _ending(detail, list(journal.entries(run.id)), cut)


class _Worker:
    """A worker process. `name` is what it is called on the screen."""

    def __init__(self, name: str, process: asyncio.subprocess.Process, log: Path) -> None:
        self.name = name
        self.process = process
        self.log = log
        self.killed = False

    @classmethod
    async def start(cls, name: str, orders: Orders, log: Path) -> Self:
        """A new process of this Python, whose end of standard input is its sign to stop."""
        with log.open("ab") as output:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-P",  # files in the working directory are no modules of ours
                "-m",
                "paigeant.demo.worker",
                orders.packed(),
                stdin=asyncio.subprocess.PIPE,
                stdout=output,
                stderr=output,
                start_new_session=True,  # Ctrl-C in the terminal is for us; we tell the workers
            )
        return cls(name, process, log)

    def check(self) -> None:
        """Raise when the process has ended by itself."""
        if self.process.returncode is not None and not self.killed:
            lines = self.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
            raise PaigeantError(
                f"worker {self.name} ended by itself with exit code {self.process.returncode}: "
                f"{lines[-1] if lines else 'it said nothing'}; all that it said is in {self.log}"
            )

    async def kill(self) -> None:
        """SIGKILL: no code of the process runs after this."""
        self.killed = True
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()
        await self.process.wait()

    async def stop(self) -> None:
        """Have it put away what it does, and end."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            async with asyncio.timeout(10):
                await self.process.wait()
        except TimeoutError:
            await self.kill()


class _Stage:
    """The run with its workers, looked at again and again."""

    def __init__(self, app: Paigeant, run: Run, screen: Screen, plan: Plan, orders: Orders) -> None:
        self.app = app
        self.run = run
        self.screen = screen
        self.plan = plan
        self.orders = orders
        self.journal = Journal(Path(orders.journal))
        self.workers: list[_Worker] = []

    @contextlib.asynccontextmanager
    async def open(self, hold: Hold | None) -> AsyncIterator[Self]:
        """With its first worker, which goes no further than `hold`; when it is left, no process is."""
        try:
            await self._start(hold=hold)
            yield self
        except BaseException:
            for worker in self.workers:
                await worker.kill()
            raise
        for worker in self.workers:
            if worker.process.returncode is None:
                await worker.stop()

    async def kill(self) -> Cut | None:
        """Kill the worker where it holds and start another; gives what was cut, None when the run ended first."""
        first = self.workers[-1]
        held = await self._held(first)
        if held is None:
            self.screen.say("the run ended before there was anything to cut in two")
            return None
        await self._let_see()
        await first.kill()
        self.screen.lost(first.process.pid)
        units = await self.app.store.load_units(StepKey(self.run.id, held.step))
        used = Usage.of_units(units.values())
        cut = Cut(held.step, held.pid, Calls(used.requests, used.tool_calls))
        steps = ", ".join(row.step for row in _completed(await self._read()))
        where = f"in the middle of {cut.step}" + (f", in a {held.call} call" if held.call else "")
        inside = f"; of {cut.step} {cut.recorded}" if cut.recorded else ""
        self.screen.say(f"SIGKILL: worker {first.name} is dead, {where}", style="bold red")
        self.screen.say(f"recorded by then: {steps}{inside}")
        await self.look()
        second = await self._start(hold=None)
        while True:
            detail = await self._read()
            row = _row(detail, cut.step)
            if row is not None and row.attempt > 1:
                break  # said before what it has done since is shown
            await self._show(detail)
        onward = "goes on behind these calls" if cut.recorded else "begins again, what was recorded does not"
        self.screen.say(f"worker {second.name} took over: {cut.step} {onward}", style="bold green")
        return cut

    async def _held(self, worker: _Worker) -> Entry | None:
        """Where the worker holds, once it does; None when the run ended first."""
        while True:
            detail = await self.look()
            if detail.run.status in RUN_ENDED:
                return None
            for entry in self.journal.entries(self.run.id):
                here = entry.held and entry.pid == worker.process.pid
                if here and _status(detail, entry.step) is StepStatus.RUNNING:
                    return entry

    async def finish(self) -> RunDetail:
        """The run, once it has ended."""
        while True:
            detail = await self.look()
            if detail.run.status in RUN_ENDED:
                return detail

    async def look(self) -> RunDetail:
        """The run as it is now, shown; a moment passes."""
        detail = await self._read()
        await self._show(detail)
        return detail

    async def _read(self) -> RunDetail:
        self.workers[-1].check()
        return await self.run.detail()

    async def _show(self, detail: RunDetail) -> None:
        made = Counter(entry.step for entry in self.journal.entries(self.run.id) if entry.call == "model")
        self.screen.show(detail, made)
        await asyncio.sleep(_LOOK_SECONDS)

    async def _let_see(self) -> None:
        """Time for a person to see where things stand."""
        for _ in range(round(self.plan.pace / _LOOK_SECONDS)):
            await self.look()

    async def _start(self, *, hold: Hold | None) -> _Worker:
        name = "AB"[len(self.workers)]
        orders = Orders(self.orders.url, self.orders.journal, self.orders.pace, hold, self.orders.model)
        worker = await _Worker.start(name, orders, self.plan.folder / "demo-worker.log")
        self.workers.append(worker)
        self.screen.joined(worker.process.pid, name)
        self.screen.say(f"worker {name} started, process {worker.process.pid}")
        return worker


def _ending(detail: RunDetail, entries: Sequence[Entry], cut: Cut | None) -> Ending:
    began = Counter(entry.step for entry in entries if entry.call is None)
    step = None if cut is None else cut.step
    # What was cut in two had to begin again; everything else that was recorded may have begun once only.
    twice = [row.step for row in _completed(detail) if began[row.step] > (2 if row.step == step else 1)]
    saved = None
    if cut is not None and _status(detail, cut.step) is StepStatus.COMPLETED:
        saved = Calls(_saved(entries, cut, "model"), _saved(entries, cut, "tool"))
    again = Calls(0, 0)
    if cut is not None and saved is not None:
        recorded = cut.recorded
        again = Calls(max(recorded.model - saved.model, 0), max(recorded.tool - saved.tool, 0))
    run = detail.run
    seconds = (run.completed_at or run.created_at) - run.created_at
    written = _row(detail, "write")
    words = from_json(written.output)["words"] if written is not None and written.output is not None else 0
    made = Counter(entry.call for entry in entries)
    calls = Calls(made["model"], made["tool"])
    return Ending(run.id, run.status, run.error, seconds, words, began, cut, calls, saved, twice, again)


def _saved(entries: Sequence[Entry], cut: Cut, call: Call) -> int:
    """How many calls of this kind the dead process made within the step, and no other process made again."""
    here = [entry for entry in entries if entry.step == cut.step and entry.call == call]
    dead = {entry.key for entry in here if entry.pid == cut.pid}
    return len(dead - {entry.key for entry in here if entry.pid != cut.pid})


def _completed(detail: RunDetail) -> list[StepRecord]:
    return [row for row in detail.steps if row.phase is Phase.DO and row.status is StepStatus.COMPLETED]


def _row(detail: RunDetail, step: str) -> StepRecord | None:
    return next((row for row in detail.steps if row.step == step), None)


def _status(detail: RunDetail, step: str) -> StepStatus | None:
    row = _row(detail, step)
    return None if row is None else row.status


def _read(source: Path) -> Document:
    try:
        size = source.stat().st_size
        if source.is_dir():
            raise InputInvalid(f"{source} is a folder; expected a text or Markdown file")
        if size > _MOST_BYTES:
            raise InputInvalid(f"{source} has {size:,} bytes; expected a text of at most {_MOST_BYTES:,}")
        text = source.read_bytes().decode("utf-8-sig")
    except OSError as exc:
        raise InputInvalid(f"can't read {source}: {exc.strerror}; expected a text or Markdown file") from exc
    except UnicodeDecodeError as exc:
        raise InputInvalid(
            f"{source} is not a text in UTF-8 (byte {exc.start} is none); expected a text or Markdown file"
        ) from exc
    if "\x00" in text:
        raise InputInvalid(f"{source} is a binary file; expected a text or Markdown file")
    document = read_document(text, name=source.stem)
    if not document.sections:
        raise InputInvalid(f"{source} holds no sentences to make a brief of")
    return document


def _check_model(name: str) -> None:
    try:
        infer_model(name)
    except (
        Exception
    ) as exc:  # an unknown name, a missing package, a missing key: each provider has errors of its own
        raise ConfigurationError(f"--model {name}: {' '.join(str(exc).split())}") from exc
