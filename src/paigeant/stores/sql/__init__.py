"""The SQL store, one file a part of it."""

from paigeant.stores.sql.store import SqlStore

__all__ = ["SqlStore"]
