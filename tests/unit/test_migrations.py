"""The migrations make the tables that the code uses, on files of every age."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import Connection, create_engine, inspect, text

from paigeant import migrations
from paigeant.database import current_version
from paigeant.databases.sqlite import prepare
from paigeant.errors import SchemaMismatch
from paigeant.tables import SCHEMA_VERSION, VERSION_TABLE, metadata


@pytest.fixture
def connection(tmp_path: Path):
    """A connection to an empty file."""
    engine = create_engine(f"sqlite:///{tmp_path}/x.db")
    with engine.begin() as connection:
        yield connection
    engine.dispose()


def schema(connection: Connection) -> dict[str, str]:
    """The definition of each table and index, without differences of writing."""
    rows = connection.execute(text("SELECT name, sql FROM sqlite_master WHERE sql IS NOT NULL"))
    return {name: re.sub(r"[\s\"]+", " ", sql).strip() for name, sql in rows if name != VERSION_TABLE}


def test_the_newest_migration_is_the_version_of_the_tables() -> None:
    """SCHEMA_VERSION names the last file in versions/."""
    assert migrations.newest() == SCHEMA_VERSION
    assert migrations.known()[-1] == SCHEMA_VERSION


def test_migrations_make_what_the_tables_say(connection: Connection) -> None:
    """Alembic finds no difference between a migrated database and tables.py."""
    migrations.upgrade(connection, "here")
    context = MigrationContext.configure(connection, opts={"version_table": VERSION_TABLE})
    assert compare_metadata(context, metadata) == []


def test_a_new_file_equals_a_migrated_one(connection: Connection, tmp_path: Path) -> None:
    """A file made at once and one made by migrations hold the same tables and indexes, partial ones too."""
    migrations.upgrade(connection, "here")
    engine = create_engine(f"sqlite:///{tmp_path}/new.db")
    with engine.begin() as other:
        prepare(other, tmp_path / "new.db")
        made = schema(other)
    engine.dispose()
    assert schema(connection) == made
    assert len(made) > len(metadata.tables)


def test_every_migration_can_be_taken_back(connection: Connection) -> None:
    """Down to nothing and up again gives the same tables."""
    migrations.upgrade(connection, "here")
    before = schema(connection)
    migrations.downgrade(connection, "here")
    assert set(inspect(connection).get_table_names()) == {VERSION_TABLE}
    migrations.upgrade(connection, "here")
    assert schema(connection) == before


def test_upgrading_twice_is_harmless(connection: Connection) -> None:
    """A database that is up to date stays as it is."""
    for _ in range(2):
        migrations.upgrade(connection, "here")
    assert current_version(connection) == SCHEMA_VERSION


def test_a_file_of_before_the_first_migration_is_brought_up(connection: Connection, tmp_path: Path) -> None:
    """A file that was taken back to nothing is migrated when it is opened."""
    migrations.upgrade(connection, "here")
    migrations.downgrade(connection, "here")
    prepare(connection, tmp_path / "x.db")
    assert current_version(connection) == SCHEMA_VERSION


@pytest.mark.parametrize("act", [migrations.upgrade, migrations.downgrade])
def test_newer_tables_are_refused(connection: Connection, act) -> None:
    """A database that newer code has migrated is left alone; the error names it and what to do."""
    migrations.upgrade(connection, "here")
    connection.execute(text("UPDATE paigeant_version SET version_num = '9999'"))
    with pytest.raises(SchemaMismatch, match=r"here.*9999.*newer version"):
        act(connection, "here")


def test_foreign_tables_are_refused(connection: Connection, tmp_path: Path) -> None:
    """A database with a table of somebody else's by one of our names is left alone."""
    connection.execute(text("CREATE TABLE messages (id INTEGER)"))
    with pytest.raises(SchemaMismatch, match="'messages' that Paigeant did not make"):
        prepare(connection, tmp_path / "x.db")
    assert inspect(connection).get_table_names() == ["messages"]


def test_tables_of_others_may_stand_beside_ours(connection: Connection, tmp_path: Path) -> None:
    """An application may keep its own tables in the same file."""
    connection.execute(text("CREATE TABLE customers (id INTEGER)"))
    prepare(connection, tmp_path / "x.db")
    assert "customers" in inspect(connection).get_table_names()
