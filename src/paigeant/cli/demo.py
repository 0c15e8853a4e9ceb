"""`paigeant demo`: a document becomes a brief while its worker is killed. What it does is in `paigeant.demo`."""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from paigeant import loops

if TYPE_CHECKING:
    from rich.console import Console

    from paigeant.demo.play import Ending, Plan
    from paigeant.demo.text import Document

__all__ = ["demo", "register"]

_PACE = 0.9
"""Seconds that a step takes at least where somebody watches."""

_EPILOG = """[bold]Examples[/]

  paigeant demo

  paigeant demo notes.md --out /tmp/demo --words 120

  OPENAI_API_KEY=... paigeant demo report.txt --model openai:gpt-5-mini"""


def register(app: typer.Typer) -> None:
    """Put the command into the program."""
    app.command(epilog=_EPILOG)(demo)


def demo(
    file: Annotated[
        Path | None,
        typer.Argument(
            metavar="FILE", help="A text or Markdown file. One ships with Paigeant.", show_default=False
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="PROVIDER:NAME",
            help="A model of pydantic-ai's, its key in the environment. Without it an offline model that quotes.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        Path, typer.Option(metavar="DIR", help="Where the brief, the database and the logs go.")
    ] = Path(),
    words: Annotated[
        int, typer.Option(min=20, help="The most words that the brief may have.", metavar="N")
    ] = 200,
    kill: Annotated[
        bool, typer.Option("--kill/--no-kill", help="Whether the worker is killed in the middle.")
    ] = True,
    pace: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=60,
            metavar="SECONDS",
            help=f"What each step takes at least, to be watched: {_PACE} on a terminal, else 0.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Watch a workflow of agents survive the death of its worker.

    A document is read, outlined, made into a brief, reviewed, shortened, written.
    The worker process that does it is killed with SIGKILL in the middle of an agent's work.
    Another one takes over. Nothing that was recorded is repeated, no model call either.
    """
    from rich.console import Console

    from paigeant.demo.play import DOCUMENT, Plan, play, prepare
    from paigeant.demo.screen import Screen

    with contextlib.suppress(AttributeError):
        sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]  # a document may hold any character
    console = Console(highlight=False)
    if pace is None:
        pace = _PACE if console.is_terminal else 0.0
    plan = Plan(file or DOCUMENT, out, model=model, max_words=words, pace=pace, kill=kill)
    document = prepare(plan)
    plan = replace(plan, source=plan.source.resolve(), folder=plan.folder.resolve())
    _begin(console, plan, document)
    # From within the folder, as a person looks further afterwards: with the settings that hold there, too.
    with contextlib.chdir(plan.folder), Screen(console) as screen:
        ending = loops.run(play(plan, document, screen))
    _end(console, plan, document, ending)
    if ending.status != "completed" or ending.twice or ending.again:
        raise typer.Exit(1)


def _begin(console: Console, plan: Plan, document: Document) -> None:
    kill = ", and its worker is killed in the middle" if plan.kill else ""
    console.print(f"\n  [bold]Paigeant[/]: a document becomes a brief{kill}\n")
    offline = "ours, offline and without a key: it picks the most telling sentences"
    facts = {
        "document": f"{plan.source.name}, {document.words:,} words in {len(document.sections)} sections",
        "brief": f"at most {plan.max_words} words",
        "model": plan.model or offline,
    }
    _facts(console, facts)
    console.print()


def _end(console: Console, plan: Plan, document: Document, ending: Ending) -> None:
    done = ending.status == "completed"
    facts = {"run": f"{ending.run}, {ending.status.value} in {ending.seconds:.1f} s"}
    if done:
        facts["brief"] = f"{plan.target}, {ending.words:,} words of {document.words:,}"
    else:
        facts["error"] = ending.error or "none was told"
    cut = None if ending.cut is None else ending.cut.step
    facts["began"] = ", ".join(
        f"{step} {count}" + (" (cut off)" if step == cut else "") for step, count in ending.began.items()
    )
    facts["made"] = f"{ending.made} in all"
    if ending.saved is not None:
        facts["saved"] = f"{ending.saved}, answered from the record"
    console.print()
    _facts(console, facts)
    console.print()
    _none_of(console, "recorded steps that ran twice", len(ending.twice), ", ".join(ending.twice))
    if ending.saved is not None:
        count = ending.again.model + ending.again.tool
        _none_of(console, "recorded calls that were made again", count, f"{ending.again} of {cut}")
    console.print("\n  look further:")
    program = _program(plan.folder)
    commands = [
        f"cd {shlex.quote(str(plan.folder))}",
        *(["cat brief.md"] if done else []),
        f"{program} runs show {ending.run}",
        f"{program} runs list",
    ]
    for command in commands:
        console.print(f"    {command}", style="cyan", markup=False, soft_wrap=True)


def _none_of(console: Console, what: str, count: int, which: str) -> None:
    """Say that there is none, as there should be, or how many and which."""
    style = "bold red" if count else "bold green"
    console.print(f"  {what}: [{style}]{count}{f': {which}' if count else ''}[/]")


def _facts(console: Console, facts: Mapping[str, str]) -> None:
    from rich.text import Text

    width = max(map(len, facts))
    for name, value in facts.items():
        console.print(Text.assemble((f"  {name:<{width}}  ", "dim"), value), soft_wrap=True)


def _program(folder: Path) -> str:
    """How this program is called from `folder`: by its name where the shell would find it, else by its path."""
    called = Path(sys.argv[0])
    if called.name != "paigeant" or not called.exists():
        return f"{shlex.quote(sys.executable)} -m paigeant.cli"
    found = shutil.which("paigeant")
    if found is not None and Path(found).samefile(called):
        return "paigeant"
    return shlex.quote(os.path.relpath(called.absolute(), folder))
