"""The file of an SQLite database: which one a URL names, whether it can be used, and whether it is still the same."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import sqlite3
from pathlib import Path

from paigeant.databases.sqlite.connection import counting
from paigeant.errors import ConfigurationError, StoreUnavailable

__all__ = ["OpenFile", "check_usable", "database_path"]


def database_path(url: str) -> Path:
    """The file that `sqlite:///path` names. Raises ConfigurationError for a URL without one."""
    scheme, _, rest = url.partition("://")
    path = rest.removeprefix("/")
    if scheme != "sqlite" or not path:
        raise ConfigurationError(
            f"{url!r} names no file; expected sqlite:///file.db, or sqlite:////folder/file.db for an absolute path"
        )
    if path == ":memory:":  # SQLite would give each connection a database of its own
        raise ConfigurationError(
            f"{url!r} names no file; expected sqlite:///file.db, or memory:// for what ends with the process"
        )
    if "?" in path:
        raise ConfigurationError(f"{url!r} has options behind a '?'; expected sqlite:///file.db without any")
    if "\0" in path or any(len(os.fsencode(part)) > 255 for part in Path(path).parts):
        raise ConfigurationError(f"no file can be called {path!r}; expected sqlite:///file.db")
    return Path(path)


def check_usable(path: Path) -> None:
    """Raise ConfigurationError for a file that can't be opened or made here, or not read and written by this user."""
    try:
        # Where SQLite follows a symbolic link to, and has its log.
        folder = (path.resolve() if path.is_symlink() else path).parent
    except RuntimeError as exc:
        raise ConfigurationError(f"{path} is a symbolic link that leads to itself; remove it") from exc
    if not folder.is_dir():
        raise ConfigurationError(
            f"the folder {folder} of the database {path.name} doesn't exist; make it first"
        )
    if path.exists():
        _check_is_database(path)
    elif not os.access(folder, os.W_OK):
        raise ConfigurationError(f"can't make {path}: the folder {folder.resolve()} is read-only")
    if path.exists() and not os.access(path, os.W_OK):
        raise ConfigurationError(f"{path} is read-only; Paigeant needs to write to it")
    if not os.access(folder, os.W_OK):
        raise ConfigurationError(
            f"the folder {folder.resolve()} of {path.name} is read-only; SQLite has to write files beside the database"
        )
    for helper in (f"{path.resolve()}-wal", f"{path.resolve()}-shm"):
        if _is_withheld(helper):
            raise ConfigurationError(
                f"{helper}, which belongs to {path.name}, is of another user and can't be read and written to; "
                "have all processes that use the database run as one user"
            )


def _check_is_database(path: Path) -> None:
    # Without opening it, see `_identity`. What is in it SQLite says.
    if not path.is_file():
        what = "a folder" if path.is_dir() else "a device or pipe"
        raise ConfigurationError(f"{path} is {what}; expected a database file")
    if not os.access(path, os.R_OK):
        raise ConfigurationError(f"can't read {path}: {os.strerror(errno.EACCES)}")
    if path.stat().st_nlink > 1:
        # SQLite names the log after the file: under each name there is another, and what is in one of them is lost.
        raise ConfigurationError(
            f"{path} has another name, by a hard link; remove that, SQLite would have a log for each"
        )


def _is_withheld(helper: str) -> bool:
    """Whether it is there, and this user can't read and write it."""
    # Once more: who closes the database last deletes it, and one that has just gone can't be read, either.
    return os.path.exists(helper) and not os.access(helper, os.R_OK | os.W_OK) and os.path.exists(helper)


class OpenFile:
    """The file with its log and the index of that, as they were when it was opened."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._last: sqlite3.Connection | None = None
        self._file: tuple[Path, tuple[int, int]] | None = None
        self._helpers: tuple[tuple[str, tuple[int, int]], ...] = ()

    @property
    def log(self) -> str | None:
        """Where the log is; None while the file isn't open."""
        return None if self._file is None else f"{self._file[0]}-wal"

    def check_not_left(self) -> None:
        """Raise StoreUnavailable for a file that this process has left to others, see `_leave_to_others`."""
        if self.path.exists() and _identity(self.path) in _NEVER_CLOSED:
            raise _helper_gone(f"{self.path}-shm")

    def note(self) -> None:
        """It is open: from now on it has to be the same."""
        place = self.path.resolve()
        self._file = place, _identity(place)
        if self._last is None:
            self._last = counting(place)
        helpers = [f"{place}-wal", f"{place}-shm"]
        self._helpers = tuple((helper, _identity(helper)) for helper in helpers if os.path.exists(helper))

    def check(self) -> None:
        """Raise StoreUnavailable unless it is still the same, and its log and index are."""
        # A file that was deleted can still be written to, and nobody would ever see what is written.
        if self._file is None:
            return
        place, identity = self._file
        try:
            found = _identity(place)
        except FileNotFoundError:
            raise StoreUnavailable(f"{self.path} was deleted while it was in use; put it back") from None
        except OSError as exc:  # its folder or its disk is away
            raise StoreUnavailable(f"can't use {self.path}: {exc.strerror}") from exc
        if found != identity:
            raise StoreUnavailable(
                f"{self.path} was replaced while it was in use; start again with the new one"
            )
        # Nor what is written to its log, or by another index of that: while we have the file open SQLite neither
        # removes nor makes one, and whoever finds none makes its own.
        for helper, identity in self._helpers:
            with contextlib.suppress(OSError):
                if _identity(helper) == identity:
                    continue
            self._leave_to_others()
            raise _helper_gone(helper)

    def leave(self) -> None:
        """All other connections are closed: close the last one as well."""
        self._leave_to_others()
        if self._last is not None and self._last not in _NEVER_CLOSED.values():
            self._last.close()
        self._file, self._helpers, self._last = None, (), None

    def _leave_to_others(self) -> None:
        """Keep SQLite from tidying up as our connections close, if others may have recorded by another log or index.

        By this index it would overwrite in the file what they have recorded since, and remove the log in which that is.
        If nobody has, it puts into the file what only a log holds that was deleted.
        """
        if self._file is None or self._last is None:
            return
        for helper, identity in self._helpers:
            with contextlib.suppress(OSError):
                if _identity(helper) != identity:
                    if os.path.getsize(helper):
                        _never_close(self._last, self._file[1])
                    return  # another log that is empty is of who has only read, whatever index there is


def _identity(path: Path | str) -> tuple[int, int]:
    """Which file it is, whatever its name.

    It must not be opened for that: to close it again would give up all locks that SQLite has on it in this process, and
    who closes it in another one would take away its log.
    """
    found = os.stat(path)
    return found.st_dev, found.st_ino


_NEVER_CLOSED: dict[tuple[int, int], sqlite3.Connection] = {}
"""Files of which others have another log or index of it than this process."""


def _never_close(connection: sqlite3.Connection, file: tuple[int, int]) -> None:
    if file not in _NEVER_CLOSED:
        _NEVER_CLOSED[file] = connection
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(connection))  # nor as the interpreter ends


def _helper_gone(helper: str) -> StoreUnavailable:
    return StoreUnavailable(f"{helper} was deleted while it was in use; start again")
