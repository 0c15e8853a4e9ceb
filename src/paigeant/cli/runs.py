"""`paigeant runs`: what runs there are, and what an operator can ask of one."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from paigeant.cli import console, session
from paigeant.cli.behalf import read_given, refuse_token
from paigeant.cli.sight import observing
from paigeant.errors import ConfigurationError, PaigeantError, nearest

if TYPE_CHECKING:
    from paigeant.settings import Settings
    from paigeant.slip import RunStatus

__all__ = ["app"]

app = typer.Typer(help="See runs, cancel, retry or signal them, delete old ones.", no_args_is_help=True)

RunId = Annotated[str, typer.Argument(help="The run's id.", metavar="ID")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def _statuses() -> list[str]:
    from paigeant.slip import RunStatus

    return [status.value for status in RunStatus]


def _status(word: str | None) -> RunStatus | None:
    from paigeant.slip import RunStatus

    if word is None:
        return None
    if word not in _statuses():
        raise ConfigurationError(f"no run has the status '{word}'; {nearest(word, _statuses())}")
    return RunStatus(word)


@app.command(
    "list",
    epilog=session.examples("paigeant runs list --status failed", "paigeant runs list --limit 5 --json"),
)
def list_(
    status: Annotated[
        str | None, typer.Option(help="Only runs in this state, such as failed.", autocompletion=_statuses)
    ] = None,
    workflow: Annotated[str | None, typer.Option(help="Only runs of this workflow.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=session.MOST, help="So many at most.", metavar="N")] = 50,
    json: AsJson = False,
) -> None:
    """List runs, the newest first."""
    wanted = _status(status)

    async def command() -> None:
        from paigeant.cli import report

        async with session.opened(session.read_settings(), sends=False) as paigeant:
            found = await paigeant.store.list_runs(status=wanted, workflow=workflow, limit=limit)
        if json:
            console.value([report.summary(run) for run in found])
        elif found:
            columns = ["id", "workflow", "status", "created", "took", "error"]
            console.out().print(console.table(columns, [report.as_row(run) for run in found], cut=["error"]))
            if len(found) == limit:
                console.note(f"[dim]the newest {limit}; --limit shows more[/]")
        else:
            console.note("no runs")

    session.wait_for(command())


@app.command(
    epilog=session.examples(
        "paigeant runs show order-42",
        "paigeant runs show order-42 --units",
        "paigeant runs show order-42 --json | jq .output",
    )
)
def show(
    id: RunId,
    units: Annotated[
        bool, typer.Option("--units", help="Also list what each step has recorded so far, unit by unit.")
    ] = False,
    json: AsJson = False,
) -> None:
    """Show a run with its steps, their attempts, times and errors, what it waits for and used, its variables."""

    async def command() -> None:
        from paigeant.cli import report
        from paigeant.slip import RunStatus

        async with session.opened(session.read_settings(), sends=False) as paigeant:
            detail = await paigeant.run(id).detail()
            requests = await paigeant.run(id).requests(only_open=False)
            now = await paigeant.store.now()
            found = None
            if units:
                found = {row.key: await paigeant.store.load_units(row.key) for row in detail.steps}
        if json:
            console.value(report.as_json(detail, requests, units=found))
            return
        console.out().print(report.as_tables(detail, requests, now=now, units=found))
        if (
            detail.run.status in (RunStatus.FAILED, RunStatus.COMPENSATION_FAILED)
            and session.is_interactive()
        ):
            console.note(
                f"\n`paigeant runs retry {id}` takes it up where it stopped", markup=False, style="dim"
            )

    session.wait_for(command())


@app.command(epilog=session.examples("paigeant runs cancel order-42 --reason 'ordered twice'"))
def cancel(
    id: RunId,
    reason: Annotated[str, typer.Option(help="Why; it becomes the run's error.")] = "cancelled",
    json: AsJson = False,
) -> None:
    """Do nothing more of a run, and undo what was done."""
    settings = session.read_settings()

    async def command() -> Any:
        with observing(settings, None, works=False) as sight:  # the run's trace has its end, if this is it
            async with session.opened(settings, observers=sight.observers) as paigeant:
                return await paigeant.run(id).cancel(reason)

    with console.only_results():
        _find_provider(settings)
        cancelled = session.wait_for(command())
    _tell(id, cancelled, json)


def _find_provider(settings: Settings) -> None:
    """Load the handlers, which may have traces go elsewhere. A run can be cancelled whether or not they load."""
    if settings.traces and settings.handlers:
        try:
            session.handlers_of(settings, ())
        except PaigeantError as exc:
            console.warn(f"{exc}; where handlers would have traces go isn't known")


@app.command(epilog=session.examples("paigeant runs retry order-42"))
def retry(id: RunId, json: AsJson = False) -> None:
    """Take a run that ended failed or compensation_failed up where it stopped, with fresh attempts."""

    async def command() -> Any:
        async with session.opened(session.read_settings()) as paigeant:
            return await paigeant.run(id).retry()

    _tell(id, session.wait_for(command()), json)


@app.command(
    context_settings={"ignore_unknown_options": True},  # so that -5 is a value
    epilog=session.examples(
        "paigeant runs signal order-42 approved true",
        "paigeant runs signal order-42 comment '\"looks good\"'",
    ),
)
def signal(
    id: RunId,
    name: Annotated[str, typer.Argument(help="The signal's name.", metavar="NAME")],
    value: Annotated[str, typer.Argument(help="Its value as JSON.", metavar="VALUE")] = "null",
    by: Annotated[
        str | None, typer.Option(help="Who sends it; default: the user at this terminal.", metavar="NAME")
    ] = None,
    json: AsJson = False,
) -> None:
    """Send a named value to a run, for a step that waits for it or will."""
    sender = session.user() if by is None else by
    found = session.json_value(value, "VALUE")

    async def command() -> Any:
        async with session.opened(session.read_settings()) as paigeant:
            run = paigeant.run(id)
            await run.signal(name, found, sender=sender)
            return await run.status()

    _tell(id, session.wait_for(command()), json)


@app.command(
    epilog=session.examples(
        "paigeant runs grant order-42 grant-7f3a",
        "get-token | paigeant runs grant order-42 -",
    ),
)
def grant(
    id: RunId,
    handle: Annotated[
        str,
        typer.Argument(
            help="The handle of the grant, or - for a token or a grant as JSON on standard input: no token here.",
            metavar="HANDLE|-",
        ),
    ],
    by: Annotated[
        str | None,
        typer.Option(help="Who hands it over; default: the user at this terminal.", metavar="NAME"),
    ] = None,
    json: AsJson = False,
) -> None:
    """Let a run that waits for a fresh grant of its person go on."""
    sender = session.user() if by is None else by
    refuse_token(handle, "on standard input: paigeant runs grant ID -")
    given = read_given("-") if handle == "-" else None

    async def command() -> Any:
        from paigeant.errors import InputInvalid
        from paigeant.identity import GrantHandle

        async with session.opened(session.read_settings()) as paigeant:
            run = paigeant.run(id)
            if given is not None:
                return await run.grant(given, sender=sender)
            known = await run.identity()
            if known is None:
                raise InputInvalid(f"run '{id}' acts for nobody, so it takes no grant")
            fresh = GrantHandle(handle, known.subject, known.issuer or "", known.scopes)
            return await run.grant(fresh, sender=sender)

    _tell(id, session.wait_for(command()), json)


@app.command(
    epilog=session.examples(
        "paigeant runs prune --older-than 30d",
        "paigeant runs prune --older-than 12h --status completed --yes",
        "paigeant runs prune --older-than 2w --dry-run --json",
    )
)
def prune(
    older_than: Annotated[
        str,
        typer.Option(
            "--older-than", help="How long ago they ended: 90s, 15m, 12h, 30d or 2w.", metavar="AGE"
        ),
    ],
    status: Annotated[
        list[str] | None,
        typer.Option(
            help="Only runs that ended so; may be given several times.", autocompletion=lambda: _ended()
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only tell how many there are.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Don't ask before they are deleted.")] = False,
    json: AsJson = False,
) -> None:
    """Delete runs that ended long ago, with their steps, variables, signals, log lines and dead letters.

    Never an open run. Log lines and dead letters as old that belong to no run go, too.
    """
    age = session.duration(older_than, "--older-than")
    statuses = [_ended_status(word) for word in status or _ended()]
    settings = session.read_settings()

    async def command() -> tuple[int, int, bool]:
        async with session.opened(settings, sends=False) as paigeant:
            before = await paigeant.store.now() - age
            found = await paigeant.store.count_ended(before=before, statuses=statuses)
            letters = await paigeant.store.count_stray_letters(before=before)
            if dry_run:
                return found, letters, False
            if not found and not letters:  # there may still be old log lines of no run
                return await paigeant.prune(older_than=age, statuses=statuses), 0, False
            if found and settings.adopt:
                console.warn(
                    "`adopt` is on: a message of a deleted run that still comes is taken for a new run"
                )
            _confirm(found, letters, older_than, yes)
            return await paigeant.prune(older_than=age, statuses=statuses), letters, True

    found, letters, deleted = session.wait_for(command())
    if json:
        console.value({"runs": found, "dead_letters": letters, "deleted": deleted})
        return
    strays = f", {_count(letters, 'dead letter')} of no run" if letters else ""
    if deleted:
        console.note(f"{_count(found, 'run')}{strays} deleted")
    else:
        console.note(
            f"{_count(found, 'run')} ended more than {older_than} ago{strays and f'{strays} as old'}"
        )


def _ended() -> list[str]:
    from paigeant.slip import RUN_ENDED, RunStatus

    return [status.value for status in RunStatus if status in RUN_ENDED]


def _ended_status(word: str) -> RunStatus:
    from paigeant.slip import RUN_ENDED

    status = _status(word)
    if status is None or status not in RUN_ENDED:
        raise ConfigurationError(
            f"a run that is {word} hasn't ended; deleted are only runs that are {', '.join(_ended())}"
        )
    return status


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _confirm(runs: int, letters: int, age: str, yes: bool) -> None:
    if yes:
        return
    whole = [f"{_count(runs, 'run')} that ended more than {age} ago"] if runs else []
    strays = [f"{_count(letters, 'dead letter')} of no run, {'as old' if runs else f'older than {age}'}"]
    what = f"this deletes {', and '.join([*whole, *(strays if letters else [])])}"
    if not sys.stdin.isatty():
        raise ConfigurationError(f"{what}; add --yes if that is meant")
    typer.confirm(f"{what}. Go on?", abort=True, err=True)


def _tell(id: str, status: RunStatus, as_json: bool) -> None:
    if as_json:
        console.value({"id": id, "status": status.value})
    else:
        console.result(f"{id} {status.value}")
