"""Run by servicekit.db.migrations, which hands over the connection."""

from servicekit.db.migrations import run_environment
from llm_service.storage.tables import METADATA

run_environment(METADATA)
