"""Postgres as a database of Paigeant's.

`database` keeps the contract. Its transactions go through the `pipeline`, its processes wake each other by the `bell`.
`session` has the settings of its connections. `pooler` says whether a pooler in between will do, `refusal` why a server
lets nobody in.
"""

from __future__ import annotations

from paigeant.databases.postgres.database import PostgresDatabase

__all__ = ["PostgresDatabase"]
