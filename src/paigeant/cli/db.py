"""`paigeant db`: the tables of the store, and the migrations that make and change them."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from paigeant.cli import console, session
from paigeant.cli.runs import AsJson
from paigeant.errors import ConfigurationError, nearest

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from paigeant.database import Database

__all__ = ["app"]

app = typer.Typer(help="See and change the version of the database's tables.", no_args_is_help=True)


@app.command(epilog=session.examples("paigeant db current --json"))
def current(json: AsJson = False) -> None:
    """Show at which migration each database is, and which is the newest. Exit code 2 when one doesn't fit."""
    from paigeant.database import current_version
    from paigeant.migrations import known

    newest, misfits = known()[-1], 0
    for database in _databases():
        found = misfit = None
        if database.exists:  # a file that isn't there is made when it is used
            with database.as_it_is() as connection:
                found = current_version(connection)
                misfit = _misfit(database, connection, found)
        misfits += misfit is not None
        if json:
            console.line(
                {"database": database.place, "current": found, "newest": newest, "fits": misfit is None}
            )
        else:
            told = "newest" if found == newest else f"newest: {newest}"
            console.result(f"{database.place}: {found or 'none'} ({told})")
        if misfit is not None:
            console.error(misfit)
    if misfits:
        raise typer.Exit(2)


@app.command(epilog=session.examples("paigeant db upgrade"))
def upgrade(
    revision: Annotated[
        str, typer.Argument(help="How far; default: the newest.", metavar="REVISION")
    ] = "head",
    json: AsJson = False,
) -> None:
    """Make the tables, or bring those of an older version to this one. An embedded file does so by itself when used.

    On a server nothing else makes them. Where transport and store are two databases, both are brought there.
    """
    from paigeant import migrations
    from paigeant.database import current_version

    _check(revision)
    if revision == "base" or revision.startswith("-"):
        raise ConfigurationError(f"{revision} goes back; `paigeant db downgrade {revision}` does that")
    for database in _databases():
        with database.as_it_is() as connection:
            before = current_version(connection)
            if revision == "head":
                database.prepare(connection)
            else:
                migrations.upgrade(connection, database.place, revision)
            after = current_version(connection)
        _tell(database, before, after, json)


@app.command(
    context_settings={"ignore_unknown_options": True},  # so that -1 is a revision
    epilog=session.examples("paigeant db downgrade", "paigeant db downgrade base --yes"),
)
def downgrade(
    revision: Annotated[
        str,
        typer.Argument(
            help="How far; -1 is one migration back, base is before the first.", metavar="REVISION"
        ),
    ] = "-1",
    yes: Annotated[bool, typer.Option("--yes", help="Don't ask before anything is deleted.")] = False,
    json: AsJson = False,
) -> None:
    """Take the tables back to an earlier migration; before the first one there are no tables and no runs."""
    from paigeant import migrations
    from paigeant.database import current_version

    _check(revision)
    if revision == "head" or revision.startswith("+"):
        raise ConfigurationError(f"{revision} goes forward; `paigeant db upgrade {revision}` does that")
    for database in _databases():
        if not database.exists:
            raise ConfigurationError(
                f"there is no database {database.place}; `paigeant config show` tells where it is looked for"
            )
        with database.as_it_is() as connection:
            before = current_version(connection)
            if before is None:
                raise ConfigurationError(
                    f"{database.place} has no tables of Paigeant; there is nothing to take back"
                )
            _confirm(connection, _is_base(revision, before), yes)
            migrations.downgrade(connection, database.place, revision)
            after = current_version(connection)
        _tell(database, before, after, json)


def _misfit(database: Database, connection: Connection, found: str | None) -> str | None:
    """Why this version can't work with tables of the migration `found`, and what to do; None when it can."""
    from paigeant.errors import SchemaMismatch
    from paigeant.migrations import check, known

    try:
        if found is not None:
            check(database.place, found)
        if found == known()[-1]:
            database.check_whole(connection)
    except SchemaMismatch as exc:
        return str(exc)
    if found == known()[-1] or database.url.startswith("sqlite:"):  # a file is brought there when it is used
        return None
    which = "no" if found is None else "older"
    return f"{database.place} has {which} tables; `paigeant db upgrade` brings them up to date"


def _databases() -> list[Database]:
    """The databases that the settings name: the store's, and the transport's where that is another one."""
    from paigeant.databases import SCHEMES, open_database

    settings = session.read_settings()
    urls = {settings.store_url: "store_url"}
    urls.setdefault(settings.transport_url, "transport_url")
    own = [url for url in urls if url.partition("://")[0] in SCHEMES]
    if not own:
        raise ConfigurationError(
            "neither store_url nor transport_url is a database; there are no tables to see to"
        )
    for url in own:
        settings.check_encrypted(urls[url], url)
    return [open_database(url) for url in own]


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


def _confirm(connection: Connection, to_base: bool, yes: bool) -> None:
    if not to_base or yes:
        return
    held = [f"{what}: {rows}" for what, rows in _held(connection).items() if rows]
    if not held:
        return
    what = f"this deletes the tables with what is in them ({', '.join(held)})"
    if not sys.stdin.isatty():
        raise ConfigurationError(f"{what}; add --yes if that is meant")
    typer.confirm(f"{what}. Go on?", abort=True, err=True)


def _held(connection: Connection) -> dict[str, int]:
    """How many rows there are of what somebody may want to keep."""
    from sqlalchemy import func, inspect, select

    from paigeant import tables

    kinds = {
        "runs": tables.workflow_runs,
        "messages": tables.messages,
        "dead letters": tables.dead_letters,
        "log lines": tables.workflow_logs,
    }
    there = set(inspect(connection).get_table_names())
    return {
        what: connection.execute(select(func.count()).select_from(table)).scalar_one()
        for what, table in kinds.items()
        if table.name in there
    }


def _tell(database: Database, before: str | None, after: str | None, as_json: bool) -> None:
    if as_json:
        console.line({"database": database.place, "before": before, "current": after})
    elif before == after:
        console.note(f"{database.place} is at {after or 'none'} already", markup=False)
    else:
        console.note(f"{database.place}: {before or 'none'} -> {after or 'none'}", markup=False)
