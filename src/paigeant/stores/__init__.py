"""The stores, one file each. `open_store` gives the one that a URL names."""

from __future__ import annotations

from typing import TYPE_CHECKING

from paigeant.errors import ConfigurationError
from paigeant.urls import begin_of

if TYPE_CHECKING:
    from paigeant.clock import Clock
    from paigeant.store import Store

__all__ = ["SCHEMES", "open_store"]

SCHEMES = ("memory", "sqlite", "postgresql")


def open_store(
    url: str, *, clock: Clock | None = None, grace: float = 10.0, inline_bytes: int = 65536
) -> Store:
    """The store that `url` names, yet to be connected.

    `grace`: seconds that a message has before it is sent again. `inline_bytes`: outputs above it stay out of messages.
    Raises ConfigurationError for a URL of an unknown scheme.
    """
    scheme = url.partition("://")[0]
    if scheme == "memory":
        from paigeant.stores.memory import MemoryStore

        return MemoryStore(clock=clock, grace=grace, inline_bytes=inline_bytes)
    if scheme in SCHEMES:
        from paigeant.databases import open_database
        from paigeant.stores.sql import SqlStore

        return SqlStore(open_database(url, clock=clock), grace=grace, inline_bytes=inline_bytes)
    raise ConfigurationError(
        f"store_url begins with {begin_of(url) or 'no scheme'}, for which there is no store; expected one of "
        + ", ".join(f"{name}://" for name in SCHEMES)
    )
