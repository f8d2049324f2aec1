"""Command line of llm_service: the server's commands, and a user's, which use the gRPC API and nothing else."""

from __future__ import annotations

import argparse

from llm_service.app import MIGRATIONS, serve
from llm_service.cli import calls, chat, keys, models, reconcile
from llm_service.config import PREFIX, load
from llm_service.storage.tables import SCHEMA
from servicekit.cli import ServiceCommands, run_client

TARGET = "127.0.0.1:50051"
TOKENSTORE = "127.0.0.1:50052"


def main() -> None:
    parser = argparse.ArgumentParser(prog="llm-service", description=__doc__)
    commands = parser.add_subparsers()
    service = ServiceCommands(
        module="llm_service", prefix=PREFIX, load=load, serve=serve, schema=SCHEMA, migrations_folder=MIGRATIONS
    )
    service.add_to(commands)
    parser.set_defaults(run=service.serve)
    keys.add_to(commands)
    calls.add_to(commands, TARGET)
    models.add_to(commands, TARGET)
    chat.add_to(commands, TARGET)
    reconcile.add_to(commands, TOKENSTORE)
    arguments = parser.parse_args()
    if hasattr(arguments, "client"):
        run_client(arguments, arguments.client)
    else:
        arguments.run(arguments)
