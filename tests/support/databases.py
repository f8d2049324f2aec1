"""Fresh databases, copied from migrated templates in some milliseconds."""

from __future__ import annotations

import itertools

import psycopg

import llm_service.app
import llm_service.storage.tables
import memory_worker.app
import memory_worker.storage.tables
import tokenstore_service.app
import tokenstore_service.storage.tables
from deploy.local.postgres import Postgres
from servicekit.db import migrations

SCHEMAS = {
    "tokenstore": (tokenstore_service.storage.tables.SCHEMA, tokenstore_service.app.MIGRATIONS),
    "memory": (memory_worker.storage.tables.SCHEMA, memory_worker.app.MIGRATIONS),
    "llm": (llm_service.storage.tables.SCHEMA, llm_service.app.MIGRATIONS),
}


class Databases:
    """Makes databases on one server."""

    def __init__(self, postgres: Postgres) -> None:
        self.postgres = postgres
        self._numbers = itertools.count(1)
        for service, (schema, folder) in SCHEMAS.items():
            postgres.create_database(f"{service}_template")
            migrations.upgrade(url=postgres.url(f"{service}_template"), schema=schema, folder=folder)

    def make(self, service: str) -> str:
        """The URL of a fresh database of that service."""
        name = f"{service}_{next(self._numbers)}"
        with psycopg.connect(self.postgres.url("postgres"), autocommit=True) as connection:
            connection.execute(f'CREATE DATABASE "{name}" TEMPLATE "{service}_template"'.encode())
        return self.postgres.url(name)
