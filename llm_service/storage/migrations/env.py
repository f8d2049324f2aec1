"""Run by servicekit.db.migrations, which hands over the connection."""

from llm_service.storage.tables import METADATA
from servicekit.db.migrations import run_environment

run_environment(METADATA)
