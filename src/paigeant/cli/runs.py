"""`paigeant runs`: what runs there are, and what an operator can ask of one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from paigeant.cli import console, session
from paigeant.errors import ConfigurationError, nearest

if TYPE_CHECKING:
    from paigeant.slip import RunStatus

__all__ = ["app"]

app = typer.Typer(help="See runs, and cancel, retry or signal them.", no_args_is_help=True)

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
    limit: Annotated[int, typer.Option(min=1, help="So many at most.")] = 50,
    json: AsJson = False,
) -> None:
    """List runs, the newest first."""
    wanted = _status(status)

    async def command() -> None:
        from paigeant.cli import report

        async with session.opened(session.read_settings()) as paigeant:
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
    epilog=session.examples("paigeant runs show order-42", "paigeant runs show order-42 --json | jq .output")
)
def show(id: RunId, json: AsJson = False) -> None:
    """Show a run with its steps, their attempts, times and errors, and its variables."""

    async def command() -> None:
        from paigeant.cli import report
        from paigeant.slip import RunStatus

        async with session.opened(session.read_settings()) as paigeant:
            detail = await paigeant.run(id).detail()
            now = await paigeant.store.now()
        if json:
            console.value(report.as_json(detail))
            return
        console.out().print(report.as_tables(detail, now=now))
        if (
            detail.run.status in (RunStatus.FAILED, RunStatus.COMPENSATION_FAILED)
            and session.is_interactive()
        ):
            console.note(f"\n[dim]`paigeant runs retry {id}` takes it up where it stopped[/]")

    session.wait_for(command())


@app.command(epilog=session.examples("paigeant runs cancel order-42 --reason 'ordered twice'"))
def cancel(
    id: RunId,
    reason: Annotated[str, typer.Option(help="Why; it becomes the run's error.")] = "cancelled",
    json: AsJson = False,
) -> None:
    """Do nothing more of a run, and undo what was done."""

    async def command() -> Any:
        async with session.opened(session.read_settings()) as paigeant:
            return await paigeant.run(id).cancel(reason)

    _tell(id, session.wait_for(command()), json)


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
    value: Annotated[str, typer.Argument(help="Its value as JSON.", metavar="[VALUE]")] = "null",
    json: AsJson = False,
) -> None:
    """Send a named value to a run."""
    found = session.json_value(value, "VALUE")

    async def command() -> Any:
        async with session.opened(session.read_settings()) as paigeant:
            run = paigeant.run(id)
            await run.signal(name, found)
            return await run.status()

    _tell(id, session.wait_for(command()), json)


def _tell(id: str, status: RunStatus, as_json: bool) -> None:
    if as_json:
        console.value({"id": id, "status": status.value})
    else:
        console.result(f"{id} {status.value}")
