"""Commands about what is kept sealed."""

from __future__ import annotations

import argparse
import asyncio
import os
from typing import Any

from llm_service.config import Settings, load
from llm_service.domain.errors import SecretKeyMissing
from llm_service.storage.model_registry import PostgresModelRegistry
from llm_service.storage.sealed_keys import KeySealer
from llm_service.storage.tables import SCHEMA
from servicekit.cli import fail
from servicekit.db.database import Database
from servicekit.settings import ConfigurationError


async def reseal(settings: Settings) -> int:
    """Seals every model key under the newest secret key. Raises SecretKeyMissing."""
    database = Database(
        settings.full_database_url(), schema=SCHEMA, application_name="llm_service-reseal", pool_size=2
    )
    await database.open()
    try:
        return await PostgresModelRegistry(database, KeySealer(settings.sealing_keys())).reseal()
    finally:
        await database.close()


def _reseal(_arguments: argparse.Namespace) -> None:
    try:
        changed = asyncio.run(reseal(load(os.environ)))
    except ConfigurationError as error:
        fail(*error.problems, code=2)
    except SecretKeyMissing as error:
        fail(f"llm_service: {error.message}")
    print(f"{changed} keys of models sealed again under the newest secret key")


def add_to(commands: Any) -> None:
    """Adds reseal."""
    command = commands.add_parser(
        "reseal", help="seal every model key under the newest secret key (the first of LLM_SECRET_KEY or its file)"
    )
    command.set_defaults(run=_reseal)
