"""The Alembic environment: brings a database to the tables of this version of the code, and back."""

from __future__ import annotations

from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory
from alembic.util import CommandError
from sqlalchemy import Connection

from paigeant.database import current_version
from paigeant.errors import SchemaMismatch

__all__ = ["check", "downgrade", "known", "newest", "upgrade"]


def _config(connection: Connection | None = None) -> Config:
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent))
    config.attributes["connection"] = connection
    return config


def newest() -> str | None:
    """The name of the newest migration."""
    return ScriptDirectory.from_config(_config()).get_current_head()


def upgrade(connection: Connection, place: str, to: str = "head") -> None:
    """Bring the database to the migration `to`. Raises SchemaMismatch when newer code has been there."""
    _check_known(connection, place)
    try:
        command.upgrade(_config(connection), to)
    except CommandError as exc:
        raise _mismatch(place, exc) from exc


def downgrade(connection: Connection, place: str, to: str = "base") -> None:
    """Take the database back to the migration `to`. Raises SchemaMismatch when newer code has been there."""
    _check_known(connection, place)
    try:
        command.downgrade(_config(connection), to)
    except CommandError as exc:
        raise _mismatch(place, exc) from exc


def check(place: str, found: str) -> None:
    """Raise SchemaMismatch unless this version of the code knows the migration `found`."""
    if found not in known():
        raise _mismatch(place, f"can't locate revision '{found}'")


def _check_known(connection: Connection, place: str) -> None:
    # Before Alembic begins: it tells the log how it goes about it first, and only then that it can't.
    found = current_version(connection)
    if found is not None:
        check(place, found)


def _mismatch(place: str, reason: object) -> SchemaMismatch:
    return SchemaMismatch(
        f"the tables of {place} were made by another version of Paigeant than this one, which knows migrations "
        f"up to {newest()}: {reason}. Install the newer version, or name another database"
    )


def known() -> list[str]:
    """The names of the migrations, the oldest first."""
    script = ScriptDirectory.from_config(_config())
    return [revision.revision for revision in script.walk_revisions()][::-1]
