"""Schema migrations by alembic: one environment and one PostgreSQL schema for each service."""

from __future__ import annotations

from pathlib import Path

import sqlalchemy
from alembic import command, context
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, MetaData, create_engine, text

LOCK_KEY = 0x6372656469746D


def _engine(url: str, schema: str) -> sqlalchemy.Engine:
    scheme, rest = url.split("://", 1)
    del scheme
    return create_engine(
        f"postgresql+psycopg://{rest}", poolclass=sqlalchemy.pool.NullPool,
        connect_args={"options": f"-c search_path={schema}"},
    )


def _config(folder: Path) -> Config:
    config = Config()
    config.set_main_option("script_location", str(folder))
    config.set_main_option("path_separator", "os")
    return config


def upgrade(*, url: str, schema: str, folder: Path, to: str = "head") -> str:
    """Brings the schema to the newest version (or to another); two at once wait for each other. Returns the newest."""
    config = _config(folder)
    with _engine(url, schema).begin() as connection:
        connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": LOCK_KEY})
        connection.execute(text(f'CREATE SCHEMA IF NOT EXISTS "{schema}"'))
        config.attributes["connection"] = connection
        config.attributes["schema"] = schema
        command.upgrade(config, to)
    with _engine(url, schema).connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        for table in connection.scalars(text("SELECT tablename FROM pg_tables WHERE schemaname = :s"), {"s": schema}):
            connection.execute(text(f'ANALYZE "{schema}"."{table}"'))
    return head(folder)


def head(folder: Path) -> str:
    """The newest version that the code knows."""
    return ScriptDirectory.from_config(_config(folder)).get_current_head() or ""


def current(connection: Connection, schema: str) -> str | None:
    """The version that the database has."""
    return MigrationContext.configure(connection, opts={"version_table_schema": schema}).get_current_revision()


def current_version(*, url: str, schema: str) -> str | None:
    with _engine(url, schema).connect() as connection:
        return current(connection, schema)


def run_environment(metadata: MetaData) -> None:
    """What each service's migrations/env.py does."""
    config = context.config
    context.configure(
        connection=config.attributes["connection"], target_metadata=metadata,
        version_table_schema=config.attributes["schema"],
    )
    with context.begin_transaction():
        context.run_migrations()
