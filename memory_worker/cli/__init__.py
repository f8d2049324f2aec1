"""Command line of memory_worker: the server's commands, and a user's, which use the gRPC API and nothing else."""

from __future__ import annotations

import argparse

from memory_worker.app import MIGRATIONS, serve
from memory_worker.cli import erasure, memories
from memory_worker.config import PREFIX, load
from memory_worker.storage.tables import SCHEMA
from servicekit.cli import ServiceCommands, run_client

TARGET = "127.0.0.1:50053"


def main() -> None:
    parser = argparse.ArgumentParser(prog="memory-worker", description=__doc__)
    commands = parser.add_subparsers()
    service = ServiceCommands(
        module="memory_worker", prefix=PREFIX, load=load, serve=serve, schema=SCHEMA, migrations_folder=MIGRATIONS
    )
    service.add_to(commands)
    parser.set_defaults(run=service.serve)
    memories.add_to(commands, TARGET)
    erasure.add_to(commands)
    arguments = parser.parse_args()
    if hasattr(arguments, "client"):
        run_client(arguments, arguments.client)
    else:
        arguments.run(arguments)
