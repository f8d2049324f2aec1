"""Run by servicekit.db.migrations, which hands over the connection."""

from memory_worker.storage.tables import METADATA
from servicekit.db.migrations import run_environment

run_environment(METADATA)
