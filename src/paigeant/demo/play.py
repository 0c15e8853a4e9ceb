"""The play: a run is dispatched, its worker is killed in the middle, another takes over; then what ran is counted.

The worker is a process of its own and dies by SIGKILL, which no code of it can hear. The moment is chosen by what is
recorded, not by time: two steps are done, a third has begun. That third step is told to hold there, so that however
slow or fast the machine is, the kill always cuts a step in two.
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

from paigeant.app import Paigeant, Run
from paigeant.demo import offline
from paigeant.demo.journal import Entry, Journal
from paigeant.demo.pipeline import MARK, WORKFLOW, Request, activities
from paigeant.demo.screen import Screen
from paigeant.demo.text import Document, read_document
from paigeant.demo.worker import Orders, models
from paigeant.errors import ConfigurationError, InputInvalid, PaigeantError
from paigeant.settings import Settings
from paigeant.slip import RUN_ENDED, Phase, RunStatus, StepStatus
from paigeant.store import RunDetail, StepRecord

__all__ = ["DOCUMENT", "Ending", "Plan", "play", "prepare"]

DOCUMENT = Path(__file__).with_name("document.md")
"""The document that ships with the package."""

CUT = "brief"
"""The step in whose middle the worker is killed."""

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
class Ending:
    """How it ended. `words`: of the brief. `began`: how often each step began, by the journal. `cut`: the step that was
    cut in two. `twice`: recorded steps that ran again; there must be none.
    """

    run: str
    status: RunStatus
    error: str | None
    seconds: float
    words: int
    began: Mapping[str, int]
    cut: str | None
    twice: Sequence[str]


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


async def play(plan: Plan, screen: Screen) -> Ending:
    """Do it, and show it on `screen`. The plan's paths are absolute, and its folder is the working directory.

    Raises PaigeantError when a worker doesn't start.
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
        async with _Stage(run, screen, plan, orders).open() as stage:
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

    def __init__(self, run: Run, screen: Screen, plan: Plan, orders: Orders) -> None:
        self.run = run
        self.screen = screen
        self.plan = plan
        self.orders = orders
        self.workers: list[_Worker] = []

    @contextlib.asynccontextmanager
    async def open(self) -> AsyncIterator[Self]:
        """With its first worker; when it is left, no process is."""
        try:
            await self._start(hold=CUT if self.plan.kill else None)
            yield self
        except BaseException:
            for worker in self.workers:
                await worker.kill()
            raise
        for worker in self.workers:
            if worker.process.returncode is None:
                await worker.stop()

    async def kill(self) -> str | None:
        """Kill the worker in the middle of a step and start another; gives that step, None when the run ended first."""
        first = self.workers[-1]
        journal = Journal(Path(self.orders.journal))
        while True:
            detail = await self.look()
            if detail.run.status in RUN_ENDED:
                return None
            begun = any(
                entry.step == CUT and entry.pid == first.process.pid for entry in journal.entries(self.run.id)
            )
            if begun and _status(detail, CUT) is StepStatus.RUNNING:
                break
        await self._let_see()
        await first.kill()
        self.screen.lost(first.process.pid)
        recorded = ", ".join(row.step for row in _completed(detail))
        self.screen.say(f"SIGKILL: worker {first.name} is dead, in the middle of {CUT}", style="bold red")
        self.screen.say(f"recorded by then: {recorded}")
        await self.look()
        second = await self._start(hold=None)
        while True:
            detail = await self._read()
            row = _row(detail, CUT)
            if row is not None and row.attempt > 1:
                break  # said before what it has done since is shown
            await self._show(detail)
        self.screen.say(
            f"worker {second.name} took over: {CUT} begins again, what was recorded does not",
            style="bold green",
        )
        return CUT

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
        self.screen.show(detail)
        await asyncio.sleep(_LOOK_SECONDS)

    async def _let_see(self) -> None:
        """Time for a person to see where things stand."""
        for _ in range(round(self.plan.pace / _LOOK_SECONDS)):
            await self.look()

    async def _start(self, *, hold: str | None) -> _Worker:
        name = "AB"[len(self.workers)]
        orders = Orders(self.orders.url, self.orders.journal, self.orders.pace, hold, self.orders.model)
        worker = await _Worker.start(name, orders, self.plan.folder / "demo-worker.log")
        self.workers.append(worker)
        self.screen.joined(worker.process.pid, name)
        self.screen.say(f"worker {name} started, process {worker.process.pid}")
        return worker


def _ending(detail: RunDetail, entries: Sequence[Entry], cut: str | None) -> Ending:
    began = Counter(entry.step for entry in entries)
    # What was cut in two had to begin again; everything else that was recorded may have begun once only.
    twice = [row.step for row in _completed(detail) if began[row.step] > (2 if row.step == cut else 1)]
    run = detail.run
    seconds = (run.completed_at or run.created_at) - run.created_at
    written = _row(detail, "write")
    words = from_json(written.output)["words"] if written is not None and written.output is not None else 0
    return Ending(run.id, run.status, run.error, seconds, words, began, cut, twice)


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
