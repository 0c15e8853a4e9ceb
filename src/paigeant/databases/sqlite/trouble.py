"""What can be wrong with an SQLite file: what the driver reports as errors of ours."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Callable
from pathlib import Path

from sqlalchemy.exc import DBAPIError

from paigeant.database import no_unicode
from paigeant.errors import ConfigurationError, PaigeantError, StoreDamaged, StoreUnavailable
from paigeant.lane import Blocked

__all__ = ["Guard"]


class Guard:
    """Turns what the driver reports into errors of ours, after `check`."""

    def __init__(self, path: Path, check: Callable[[], object] = bool) -> None:
        self._path = path
        self._check = check

    def __enter__(self) -> None:
        self._check()

    def __exit__(self, kind: object, exc: BaseException | None, trace: object) -> None:
        if isinstance(exc, UnicodeEncodeError):
            raise no_unicode(str(self._path)) from exc
        if isinstance(exc, (DBAPIError, sqlite3.DatabaseError)) and (ours := self._ours(exc)) is not None:
            raise ours from exc

    def _ours(self, exc: DBAPIError | sqlite3.DatabaseError) -> PaigeantError | None:
        cause = exc.orig if isinstance(exc, DBAPIError) else exc
        if "not a database" in str(cause):
            return _no_database(self._path)
        # A damaged file is plainly a DatabaseError; the other kinds below it are mistakes in a statement.
        if type(cause) is sqlite3.DatabaseError:
            return StoreDamaged(
                f"can't use {self._path}: {cause}; its disk or something else has damaged it: stop what uses it, keep "
                "a copy of it with its -wal, and put a backup in its place"
            )
        if isinstance(cause, sqlite3.OperationalError):
            is_full = getattr(cause, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL
            return (Blocked if is_full else StoreUnavailable)(f"can't use {self._path}: {cause}")
        return None


def _no_database(path: Path) -> ConfigurationError:
    """The error for a file that SQLite has said this of: so nothing here has locks on it that reading it could end."""
    start = b""
    with contextlib.suppress(OSError), path.open("rb") as file:
        start = file.read(12)
    how = "" if b"SQLite format".startswith(start) else f" (it starts with {start!r})"
    return ConfigurationError(f"{path} is not an SQLite database{how}; name another file in the URL")
