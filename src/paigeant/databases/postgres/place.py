"""How a URL names a Postgres database, and how people are told which one it is."""

from __future__ import annotations

from typing import Any

import psycopg
from psycopg.conninfo import conninfo_to_dict
from psycopg.pq import Conninfo

from paigeant.errors import ConfigurationError
from paigeant.urls import check_parameters, check_readable

__all__ = ["read", "shown"]


def read(url: str) -> dict[str, Any]:
    """What a URL says, as libpq reads it. What that itself says of a wrong one quotes parts of a password."""
    check_readable(url)
    check_parameters(url, ("ssl", *(option.keyword.decode() for option in Conninfo.get_defaults())))
    try:
        given = conninfo_to_dict(url)
        int(given.get("connect_timeout") or 0)
    except ValueError:
        raise ConfigurationError(
            "the parameter connect_timeout in a URL of Postgres is a whole number of seconds"
        ) from None
    except psycopg.ProgrammingError:
        raise ConfigurationError(
            "this is no URL of Postgres; expected "
            "postgresql://user:password@host:5432/database?parameter=value&parameter=value"
        ) from None
    return given


def shown(given: dict[str, Any]) -> str:
    """The database that was read of a URL: its name and where it is, and nothing secret."""
    defaults = {  # of the environment
        option.keyword.decode(): option.val.decode(errors="replace")
        for option in Conninfo.get_defaults()
        if option.val
    }
    given = {**defaults, **given}
    host = given.get("host") or given.get("hostaddr") or "the local socket"
    port = f":{given['port']}" if given.get("port") else ""
    return f"Postgres database '{given.get('dbname') or given.get('user') or 'postgres'}' at {host}{port}"
