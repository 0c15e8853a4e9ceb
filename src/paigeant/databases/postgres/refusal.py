"""Why a server lets nobody in, whatever language it speaks: the code of its error.

Before a connection stands, psycopg tells an error's text alone, and a server may speak any language. So one that isn't
understood is asked for once more, and what comes is written down by libpq, for a moment and in memory only: there may
be a password in it.
"""

from __future__ import annotations

import os
import re
import select
import time
from typing import Any

import psycopg
from psycopg import errors
from psycopg.conninfo import make_conninfo
from psycopg.pq import PGconn, PollingStatus
from psycopg.pq.abc import PGconn as Wire

__all__ = ["understood"]

_UNDERSTOOD = re.compile(
    # what a server says in English
    r"authentication failed|no pg_hba\.conf entry|is not permitted to log in|does not exist|too many |are reserved|"
    r"database system is|read-only|read-write|"
    # and libpq, whatever the server speaks
    r"Connection refused|timeout|could not translate|could not send|could not receive|No such file|nreachable|"
    r"No route to host|reset by peer|closed the connection|no password supplied|certificate|SSL|GSS|invalid |"
    r"Permission denied|standby"
)
_CODE = re.compile(rb'ErrorResponse.*? C "(\w{5})"')
_SECONDS = 5.0


def understood(error: psycopg.OperationalError, parameters: dict[str, Any]) -> psycopg.Error:
    """The `error` of a connection that was refused, of the class that is its code's, if that can be found out."""
    if _UNDERSTOOD.search(str(error)):
        return error
    try:
        code = _code(make_conninfo("", **parameters))
        return error if code is None else errors.lookup(code)(str(error))
    except (
        psycopg.Error,
        OSError,
        AttributeError,
        KeyError,
    ):  # this system or this libpq can't write it down
        return error


def _code(conninfo: str) -> str | None:
    wire = PGconn.connect_start(conninfo.encode())
    with os.fdopen(os.memfd_create("paigeant"), "rb") as told:
        wire.trace(told.fileno())
        try:
            _poll(wire)
        finally:
            wire.untrace()
            wire.finish()
        told.seek(0)
        found = _CODE.findall(told.read())
    return found[-1].decode() if found else None


def _poll(wire: Wire) -> None:
    until = time.monotonic() + _SECONDS
    status = PollingStatus.WRITING
    while status in (PollingStatus.READING, PollingStatus.WRITING) and time.monotonic() < until:
        socket = [wire.socket]
        reads = status == PollingStatus.READING
        select.select(socket if reads else [], [] if reads else socket, [], _SECONDS)
        status = PollingStatus(wire.connect_poll())
