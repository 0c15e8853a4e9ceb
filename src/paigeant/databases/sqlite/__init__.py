"""SQLite as a database of Paigeant's.

`database` keeps the contract. `connection` says how connections are made and how their transactions begin and end,
`file` whether a file can be used and is still the one that was opened, `schema` whether its tables are those of this
version, and `trouble` what errors mean.
"""

from __future__ import annotations

from paigeant.databases.sqlite.database import SqliteDatabase
from paigeant.databases.sqlite.file import database_path
from paigeant.databases.sqlite.schema import prepare

__all__ = ["SqliteDatabase", "database_path", "prepare"]
