"""The transports, one file each. `open_transport` gives the one that a URL names."""

from __future__ import annotations

from typing import TYPE_CHECKING

from paigeant.errors import ConfigurationError

if TYPE_CHECKING:
    from paigeant.clock import Clock
    from paigeant.database import Database
    from paigeant.transport import Transport

__all__ = ["SCHEMES", "open_transport"]

SCHEMES = ("memory", "sqlite", "postgresql", "redis", "rediss")


def open_transport(
    url: str, *, database: Database | None = None, clock: Clock | None = None, limit_bytes: int | None = None
) -> Transport:
    """The transport that `url` names, yet to be connected. `database`: the open file to share with a store.

    `limit_bytes` bounds the size of a message. Raises ConfigurationError for a URL of an unknown scheme.
    """
    from paigeant.message import DEFAULT_LIMIT_BYTES

    limit = limit_bytes or DEFAULT_LIMIT_BYTES
    scheme = url.partition("://")[0]
    if scheme == "memory":
        from paigeant.transports.memory import MemoryTransport

        return MemoryTransport(clock=clock, limit_bytes=limit)
    if scheme == "sqlite":
        from paigeant.databases import open_database
        from paigeant.transports.sqlite import SqliteTransport

        return SqliteTransport(database or open_database(url, clock=clock), limit_bytes=limit)
    if scheme == "postgresql":
        from paigeant.databases import open_database
        from paigeant.transports.postgres import PostgresTransport

        return PostgresTransport(database or open_database(url), limit_bytes=limit)
    if scheme in ("redis", "rediss"):
        try:
            from paigeant.transports.redis import RedisStreamTransport
        except ModuleNotFoundError as exc:
            raise ConfigurationError(
                f"{scheme}:// needs the package '{exc.name}': pip install 'paigeant[redis]'"
            ) from exc
        return RedisStreamTransport(url, limit_bytes=limit)
    raise ConfigurationError(
        f"transport_url begins with {scheme}://, for which there is no transport; expected one of "
        + ", ".join(f"{name}://" for name in SCHEMES)
    )
