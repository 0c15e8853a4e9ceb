"""What a pooler between Postgres and its clients must not do: hand its connections on between transactions.

Statements are prepared once a connection and have settings of its session. On a connection that another client has had
meanwhile the name of a statement stands for that one's: what runs then is not what was meant.
"""

from __future__ import annotations

from typing import Any

import psycopg

from paigeant.errors import ConfigurationError

__all__ = ["check_pooler", "hands_on"]

_TRIES = 5


def check_pooler(parameters: dict[str, Any], place: str) -> None:
    """Raise ConfigurationError when there is such a pooler in between. Raises psycopg's errors."""
    with (
        psycopg.connect(**parameters, autocommit=True) as one,
        psycopg.connect(**parameters, autocommit=True) as other,
    ):
        for _ in range(_TRIES):  # other clients may come in between
            mine = _process(one)
            with other.transaction():
                _process(other)  # it is given what was used last, unless that still belongs to `one`
                if _process(one) != mine:
                    raise hands_on(place)


def hands_on(place: str) -> ConfigurationError:
    """The error for it."""
    return ConfigurationError(
        f"{place} is reached through a pooler that gives each transaction another connection, which would mix up "
        "prepared statements; set pool_mode = session for this database and user, or connect around the pooler"
    )


def _process(connection: psycopg.Connection[Any]) -> int:
    found = connection.execute("SELECT pg_backend_pid()").fetchone()
    assert found is not None
    return int(found[0])
