"""What the command lines of the services share: starting a server, and talking to one over gRPC."""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from pathlib import Path
from typing import Any, NoReturn

import grpc.aio
from google.protobuf.json_format import MessageToJson
from google.protobuf.message import Message
from grpc_status import rpc_status
from sqlalchemy.exc import OperationalError

from servicekit.db import migrations
from servicekit.rpc.channel import open_channel
from servicekit.rpc.status import error_info_of
from servicekit.settings import ConfigurationError, database_url_of, redacted, split_address
from servicekit.telemetry import tracing
from servicekit.telemetry.logs import configure_logs
from servicekit.telemetry.metrics import serve_metrics
from servicekit.workers import is_worker, run_workers

RPC_SECONDS = 600.0
MICROS = 1_000_000


def fail(*lines: str, code: int = 1) -> NoReturn:
    for line in lines:
        print(line, file=sys.stderr)
    sys.exit(code)


class ServiceCommands:
    """The commands that start and prepare a server: serve, migrate, check-config."""

    def __init__(
        self, *, module: str, prefix: str, load: Callable[[Mapping[str, str]], Any],
        serve: Callable[[Any], Coroutine[Any, Any, None]], schema: str, migrations_folder: Path,
    ) -> None:
        self._module = module
        self._url_variable = f"{prefix}_DATABASE_URL"
        self._load = load
        self._serve = serve
        self._schema = schema
        self._folder = migrations_folder

    def add_to(self, commands: Any) -> None:
        commands.add_parser("serve", help="start the server (the default)").set_defaults(run=self.serve)
        commands.add_parser("migrate", help="bring the database schema up to date").set_defaults(run=self.migrate)
        commands.add_parser("check-config", help="check the environment and show it, secrets as stars").set_defaults(
            run=self.check_config
        )

    def settings(self) -> Any:
        try:
            return self._load(os.environ)
        except ConfigurationError as error:
            fail(*error.problems, code=2)

    def check_config(self, _arguments: argparse.Namespace) -> None:
        for name, value in redacted(self.settings()).items():
            print(f"{name} = {value}")

    def migrate(self, _arguments: argparse.Namespace) -> None:
        url = os.environ.get(self._url_variable, "")
        if not url.startswith(("postgresql://", "postgres://")):
            fail(f"{self._url_variable}: must be a postgresql:// URL", code=2)
        password_file = os.environ.get(f"{self._url_variable.removesuffix('_URL')}_PASSWORD_FILE", "")
        url = database_url_of(url, Path(password_file) if password_file else None)
        try:
            version = migrations.upgrade(url=url, schema=self._schema, folder=self._folder)
        except OperationalError as error:
            fail(f"{self._module}: the database does not take the migration: {str(error.orig).splitlines()[0]}")
        print(f"{self._module}: schema {self._schema} is at {version}")

    def serve(self, _arguments: argparse.Namespace) -> None:
        settings = self.settings()
        configure_logs(service=self._module, level=settings.log_level)
        if settings.workers > 1 and not is_worker():
            command = ["-m", self._module]
            sys.exit(run_workers(command, workers=settings.workers, metrics_listen=settings.metrics_listen))
        self._require_schema(settings.full_database_url())
        try:
            if settings.metrics_listen and not is_worker():
                serve_metrics(split_address(settings.metrics_listen))
            shut_down_traces = tracing.configure(
                service=self._module, endpoint=settings.otlp_endpoint, ratio=settings.trace_ratio
            )
            try:
                asyncio.run(self._serve(settings))
            finally:
                shut_down_traces()
        except ConfigurationError as error:
            fail(*error.problems, code=2)
        except (OSError, ValueError) as error:
            fail(f"{self._module}: {error}")

    def _require_schema(self, url: str) -> None:
        """A database that does not answer yet is waited for later; one without our schema is not worth waiting for."""
        try:
            found = migrations.current_version(url=url, schema=self._schema)
        except OperationalError:
            return
        if found != (needed := migrations.head(self._folder)):
            fail(
                f"{self._module}: schema {self._schema} is at {found or 'nothing'}, this version needs {needed}:"
                f" run python -m {self._module} migrate"
            )


def add_client_options(parser: argparse.ArgumentParser, *, target: str) -> None:
    """Options of the commands that talk to a server."""
    parser.add_argument("--target", default=target, help="host:port of the server (%(default)s)")
    parser.add_argument("--token-file", type=Path, help="file with the service token; else $CREDITMESH_TOKEN")
    parser.add_argument("--ca-file", type=Path, help="certificate authority of the server's TLS certificate")
    parser.add_argument("--json", action="store_true", help="print the answers as JSON")


class Client:
    """A channel with the token of the command line."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.metadata = self.metadata_of(arguments)
        self.channel = open_channel(arguments.target, ca_file=arguments.ca_file)
        self.timeout = RPC_SECONDS

    @staticmethod
    def metadata_of(arguments: argparse.Namespace) -> tuple[tuple[str, str], ...]:
        token = os.environ.get("CREDITMESH_TOKEN", "")
        if arguments.token_file:
            token = arguments.token_file.read_text().strip()
        return (("authorization", f"Bearer {token}"),) if token else ()


def run_client(arguments: argparse.Namespace, work: Callable[[Client, argparse.Namespace], Awaitable[None]]) -> None:
    """Runs a command against a server; a gRPC error becomes one line with its reason, exit code 1."""

    async def run() -> None:
        client = Client(arguments)
        try:
            await work(client, arguments)
        finally:
            await client.channel.close()

    try:
        asyncio.run(run())
    except grpc.aio.AioRpcError as error:
        status = rpc_status.from_call(error)
        info = error_info_of(status) if status else None
        reason = f"{error.code().name}{f' / {info.reason}' if info else ''}"
        facts = " ".join(f"{key}={value}" for key, value in info.metadata.items()) if info else ""
        fail(f"{reason}: {error.details()}{f' ({facts})' if facts else ''}")
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader has seen enough


def show_json(message: Message) -> None:
    print(MessageToJson(message, preserving_proto_field_name=True, indent=2))


def credits_text(micros: int) -> str:
    """Micro-credits as credits, exact: 1234500 is 1.2345."""
    whole, part = divmod(abs(micros), MICROS)
    text = f"{whole}.{part:06d}".rstrip("0").rstrip(".")
    return f"-{text}" if micros < 0 else text


def micros_from_text(text: str) -> int:
    """Credits as micro-credits, exact; at most six decimals. Raises argparse.ArgumentTypeError."""
    sign = -1 if text.startswith("-") else 1
    whole, _, part = text.lstrip("+-").partition(".")
    if not whole.isdigit() or (part and not part.isdigit()) or len(part) > 6:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of credits with at most six decimals")
    return sign * (int(whole) * MICROS + int(part.ljust(6, "0")))
