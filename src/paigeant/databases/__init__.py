"""The kinds of databases, one package each. `open_database` gives the one that a URL names."""

from __future__ import annotations

from typing import TYPE_CHECKING

from paigeant.errors import ConfigurationError
from paigeant.extras import how_to_install
from paigeant.urls import begin_of

if TYPE_CHECKING:
    from paigeant.clock import Clock
    from paigeant.database import Database

__all__ = ["SCHEMES", "open_database"]

SCHEMES = ("sqlite", "postgresql")


def open_database(url: str, *, clock: Clock | None = None) -> Database:
    """The database that `url` names, yet to be connected. `clock` is for tests, which set the time.

    Raises ConfigurationError for a URL of another scheme, and where the driver isn't installed.
    """
    scheme = url.partition("://")[0]
    if scheme == "sqlite":
        from paigeant.databases.sqlite import SqliteDatabase

        return SqliteDatabase(url, clock=clock)
    if scheme == "postgresql":
        try:
            from paigeant.databases.postgres import PostgresDatabase
        except ImportError as exc:
            raise ConfigurationError(
                f"postgresql:// needs a driver that is not installed; expected: {how_to_install('postgres')}"
            ) from exc
        return PostgresDatabase(url, clock=clock)
    raise ConfigurationError(
        f"{begin_of(url) or 'a text without a scheme'} names no database; expected one of sqlite://, postgresql://"
    )
