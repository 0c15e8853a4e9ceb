"""Postgres as a database of Paigeant's.

`database` keeps the contract: connections to the `place` that a URL names, each with the settings of a `session`.
Transactions go through the `pipeline`, processes wake each other by the `bell`. `trouble` says what errors mean,
`refusal` why a server lets nobody in, and `pooler` whether what stands in between will do.
"""

from __future__ import annotations

from paigeant.databases.postgres.database import PostgresDatabase

__all__ = ["PostgresDatabase"]
