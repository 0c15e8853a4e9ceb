"""`paigeant db`: the tables of the store, and the migrations that make and change them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from paigeant.cli import console, session
from paigeant.cli.runs import AsJson
from paigeant.errors import ConfigurationError, nearest

__all__ = ["app"]

app = typer.Typer(help="See and change the version of the database's tables.", no_args_is_help=True)


@app.command(epilog=session.examples("paigeant db current --json"))
def current(json: AsJson = False) -> None:
    """Show at which migration the database is, and which is the newest."""
    from paigeant.database import as_it_is, current_version
    from paigeant.migrations import known

    path = _path()
    found = None
    if path.exists():
        with as_it_is(path) as connection:
            found = current_version(connection)
    newest = known()[-1]
    if json:
        console.value({"database": str(path), "current": found, "newest": newest})
    else:
        console.result(f"{found or 'none'}{' (newest)' if found == newest else f' (newest: {newest})'}")


@app.command(epilog=session.examples("paigeant db upgrade"))
def upgrade(
    revision: Annotated[
        str, typer.Argument(help="How far; default: the newest.", metavar="[REVISION]")
    ] = "head",
    json: AsJson = False,
) -> None:
    """Make the tables, or bring those of an older version to this one. An embedded file does so by itself when used."""
    from paigeant import migrations
    from paigeant.database import as_it_is, current_version, prepare

    _check(revision)
    path = _path()
    with as_it_is(path) as connection:
        before = current_version(connection)
        if revision == "head":
            prepare(connection, path)
        else:
            migrations.upgrade(connection, str(path), revision)
        after = current_version(connection)
    _tell(path, before, after, json)


@app.command(
    context_settings={"ignore_unknown_options": True},  # so that -1 is a revision
    epilog=session.examples("paigeant db downgrade", "paigeant db downgrade base --yes"),
)
def downgrade(
    revision: Annotated[
        str,
        typer.Argument(
            help="How far; -1 is one migration back, base is before the first.", metavar="[REVISION]"
        ),
    ] = "-1",
    yes: Annotated[bool, typer.Option("--yes", help="Don't ask before runs are deleted.")] = False,
    json: AsJson = False,
) -> None:
    """Take the tables back to an earlier migration; before the first one there are no tables and no runs."""
    from paigeant import migrations
    from paigeant.database import as_it_is, current_version

    _check(revision)
    path = _path()
    if not path.exists():
        raise ConfigurationError(
            f"there is no database {path}; `paigeant config show` tells where it is looked for"
        )
    with as_it_is(path) as connection:
        before = current_version(connection)
        if before is None:
            raise ConfigurationError(f"{path} has no tables of Paigeant; there is nothing to take back")
        _confirm(connection, _is_base(revision, before), yes)
        migrations.downgrade(connection, str(path), revision)
        after = current_version(connection)
    _tell(path, before, after, json)


def _path() -> Path:
    from paigeant.database import database_path

    return database_path(session.read_settings().store_url)


def _check(revision: str) -> None:
    from paigeant.migrations import known

    names = known()
    relative = revision[:1] in "+-" and revision[1:].isdigit()
    if not relative and revision not in {*names, "head", "base"}:
        raise ConfigurationError(
            f"no migration is called '{revision}'; {nearest(revision, [*names, 'head', 'base'])}"
        )


def _is_base(revision: str, before: str) -> bool:
    from paigeant.migrations import known

    names = known()
    back = int(revision[1:]) if revision[:1] == "-" else 0
    if back > (names.index(before) + 1 if before in names else len(names)):
        raise ConfigurationError(f"{revision} goes beyond the first migration; expected at most base")
    return revision == "base" or (back > 0 and before in names and back == names.index(before) + 1)


def _confirm(connection: Any, to_base: bool, yes: bool) -> None:
    from sqlalchemy import func, select

    from paigeant.tables import workflow_runs

    runs = connection.execute(select(func.count()).select_from(workflow_runs)).scalar()
    if not to_base or yes or not runs:
        return
    what = f"this deletes the tables with all {runs} recorded runs"
    if not sys.stdin.isatty():
        raise ConfigurationError(f"{what}; add --yes if that is meant")
    typer.confirm(f"{what}. Go on?", abort=True, err=True)


def _tell(path: Path, before: str | None, after: str | None, as_json: bool) -> None:
    if as_json:
        console.value({"database": str(path), "before": before, "current": after})
    elif before == after:
        console.note(f"{path} is at {after or 'none'} already", markup=False)
    else:
        console.note(f"{path}: {before or 'none'} -> {after or 'none'}", markup=False)
