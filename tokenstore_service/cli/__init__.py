"""Command line of tokenstore_service: the server's commands, an operator's, and repairs."""

from __future__ import annotations

import argparse
import functools

from servicekit.cli import ServiceCommands, add_client_options, run_client
from tokenstore_service.app import MIGRATIONS, serve
from tokenstore_service.cli import books, exports, prices, repair
from tokenstore_service.config import PREFIX, load
from tokenstore_service.storage.tables import SCHEMA

TARGET = "127.0.0.1:50052"


def main() -> None:
    parser = argparse.ArgumentParser(prog="tokenstore-service", description=__doc__)
    commands = parser.add_subparsers()
    service = ServiceCommands(
        module="tokenstore_service", prefix=PREFIX, load=load, serve=serve, schema=SCHEMA, migrations_folder=MIGRATIONS
    )
    service.add_to(commands)
    parser.set_defaults(run=service.serve)
    add_client = functools.partial(add_client_options, target=TARGET)
    books.add_to(commands, add_client)
    exports.add_to(commands, add_client)
    prices.add_to(commands, add_client)
    repair.add_to(commands)
    arguments = parser.parse_args()
    if hasattr(arguments, "client"):
        run_client(arguments, arguments.client)
    else:
        arguments.run(arguments)
