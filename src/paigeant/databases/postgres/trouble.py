"""What can be wrong at a server or with a database, and what to do about it: psycopg's errors as ours."""

from __future__ import annotations

import re
from collections.abc import Callable

import psycopg
from psycopg import errors
from sqlalchemy.exc import DBAPIError

from paigeant.database import no_unicode
from paigeant.databases.postgres.pooler import hands_on
from paigeant.errors import ConfigurationError, InputInvalid, PaigeantError, SchemaMismatch, StoreUnavailable
from paigeant.heads import MISJUDGED
from paigeant.lane import Blocked, Contended, Misjudged

__all__ = ["Guard", "meaning", "reason_of", "tellable", "unavailable", "writes_otherwise"]

_UNUSABLE = re.compile(r"invalid \w+ value|invalid port number|certificate file \S+ does not exist")
"""What libpq says, before or without asking a server, of a parameter's value."""

_ROW = re.compile(r" (?:DETAIL: Failing row contains|CONTEXT: ).*")
"""Where the server quotes a row that it refuses, and so what runs are made of."""


class Guard:
    """Turns the driver's errors into `ours`."""

    def __init__(self, place: str, ours: Callable[[psycopg.Error | DBAPIError], Exception]) -> None:
        self._place = place
        self._ours = ours

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, exc: BaseException | None, trace: object) -> None:
        if isinstance(exc, UnicodeEncodeError):
            raise no_unicode(self._place) from exc
        if isinstance(exc, (psycopg.Error, DBAPIError)) and (ours := self._ours(exc)) is not exc:
            raise ours from tellable(exc)


def meaning(exc: psycopg.Error | DBAPIError, place: str) -> Exception:
    """What an error of the driver on the database at `place` means: one of ours, or itself where it is our mistake."""
    reason = reason_of(exc)
    match exc.orig if isinstance(exc, DBAPIError) else exc:
        case errors.SerializationFailure() | errors.DeadlockDetected() | errors.UniqueViolation():
            return Contended(reason)
        case errors.InvalidTextRepresentation() if MISJUDGED in reason:  # see `heads.foreseen_heads`
            return Misjudged(reason)
        case errors.LockNotAvailable():
            return Blocked(f"{place}: somebody keeps a row for too long: {reason}")
        case errors.QueryCanceled():
            return Blocked(f"{place} gave up a statement: {reason}")
        case errors.DiskFull():
            return Blocked(f"{place}: {reason}")
        case errors.UndefinedTable() | errors.UndefinedColumn():
            return SchemaMismatch(
                f"{place} doesn't have the tables of this version: {reason}; `paigeant db upgrade` makes them"
            )
        case errors.ReadOnlySqlTransaction():
            return StoreUnavailable(
                f"{place} only lets itself be read: {reason}; expected the primary, with "
                "default_transaction_read_only = off"
            )
        case errors.InsufficientPrivilege() if "for schema" in reason:
            return ConfigurationError(
                f"{place}: {reason}; GRANT the user USAGE on it, and CREATE for `paigeant db upgrade`: since "
                "version 15 not everybody may make tables in the schema public"
            )
        case errors.InsufficientPrivilege():
            return ConfigurationError(f"{place}: {reason}; grant the user what it needs")
        case errors.ForeignKeyViolation():  # our tables have none
            return ConfigurationError(
                f"{place}: {reason}; let that constraint be ON DELETE CASCADE or SET NULL, or drop it"
            )
        case psycopg.IntegrityError():  # nor such a rule
            return ConfigurationError(
                f"{place}: {reason}; let that constraint take all that runs are made of, or drop it"
            )
        case errors.TooManyConnections():
            return _no_room(place, reason)
        case errors.InvalidPassword() | errors.InvalidAuthorizationSpecification():
            return _not_let_in(place, reason)
        case errors.DuplicatePreparedStatement() | errors.InvalidSqlStatementName():
            return hands_on(place)
        case errors.InvalidCatalogName():
            return ConfigurationError(f"{place}: {reason}; make it with `createdb`, or name another")
        case errors.ProgramLimitExceeded() | psycopg.DataError():
            return InputInvalid(f"{place} can't hold that: {reason}")
        case errors.InvalidSchemaName():
            return ConfigurationError(
                f"{place}: {reason}; make the schema of its search_path with CREATE SCHEMA"
            )
        # Internal errors are trouble of the server's as well: a session that was ended, a file that can't be read.
        case psycopg.OperationalError() | psycopg.InterfaceError() | psycopg.InternalError():
            return unavailable(place, reason)
        case _:
            return exc


def unavailable(place: str, reason: str) -> PaigeantError:
    """The error for a server that can't be used, or that has let nobody in, for that `reason`."""
    # Before a connection stands, the server's answer is a text alone.
    for sign in (
        "password authentication failed",
        "no password supplied",
        "no pg_hba.conf entry",
        "is not permitted to log in",
    ):
        if sign in reason:
            return _not_let_in(place, reason)
    if _UNUSABLE.search(reason):
        return ConfigurationError(f"the url of {place} has a parameter that can't be used: {reason}")
    if "does not exist" in reason and "database" in reason:
        return ConfigurationError(f"{place}: {reason}; make it with `createdb`, or name another")
    for sign in ("too many connections", "too many clients", "connection slots are reserved"):
        if sign in reason:
            return _no_room(place, reason)
    if "role" in reason and "does not exist" in reason:
        return ConfigurationError(f"{place}: {reason}; name another user, or make this one")
    # It asks so for each host; we do at the end.
    reason = re.sub(r" Is the server running [^?]*\?", "", reason)
    return StoreUnavailable(f"can't use {place}: {reason}; {_hint(reason)}")


def _not_let_in(place: str, reason: str) -> ConfigurationError:
    return ConfigurationError(
        f"{place} doesn't let the user in: {reason}; correct the user and password in the URL (or PGPASSWORD, or "
        "~/.pgpass), or what pg_hba.conf and the role allow"
    )


def _hint(reason: str) -> str:
    """What to do about a server that can't be used."""
    if "does not support SSL" in reason:
        return "have it speak TLS (ssl = on in postgresql.conf), or ask for none where it is on this host (sslmode)"
    if "certificate" in reason:
        return "check its certificate, and name the authority that signed it with sslrootcert=/path"
    return "is the server running, and reachable from here?"


def _no_room(place: str, reason: str) -> StoreUnavailable:
    return StoreUnavailable(
        f"{place} has no room for another connection: {reason}; each process takes four or five: "
        "raise max_connections, or the CONNECTION LIMIT of the user or database, or start fewer"
    )


def writes_otherwise(place: str, encoding: str) -> ConfigurationError:
    """The error for a database that can't hold every text."""
    return ConfigurationError(
        f"{place} keeps texts as {encoding}; expected a database made with ENCODING 'UTF8'"
    )


def _said(exc: psycopg.Error | DBAPIError) -> str:
    return " ".join(str(exc.orig if isinstance(exc, DBAPIError) else exc).split())


def reason_of(exc: psycopg.Error | DBAPIError) -> str:
    """What the driver says, in one line and without what a row has in it."""
    said = _ROW.sub("", _said(exc))
    return re.sub(r" LINE \d+: .*? \^(?= |$)", "", said)  # the place in a statement of ours


def tellable(exc: psycopg.Error | DBAPIError) -> Exception | None:
    """What an error of ours is raised from; None for one with a row in it, which a traceback would show."""
    return None if _ROW.search(_said(exc)) else exc
