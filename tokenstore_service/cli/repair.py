"""Repairs: projections made again from the entries, messages sent again."""

from __future__ import annotations

import argparse
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psycopg
from confluent_kafka import KafkaException

from servicekit.cli import fail
from servicekit.settings import database_url_of
from tokenstore_service.storage.rebuild import rebuild as rebuild_projections
from tokenstore_service.transport.replay import replay as replay_messages


def _required(name: str) -> str:
    value = os.environ.get(name, "")
    if not value:
        fail(f"{name}: is required", code=2)
    return value


def rebuild(arguments: argparse.Namespace) -> None:
    password_file = os.environ.get("TOKENSTORE_DATABASE_PASSWORD_FILE", "")
    url = database_url_of(_required("TOKENSTORE_DATABASE_URL"), Path(password_file) if password_file else None)
    try:
        done = rebuild_projections(url, swap=arguments.swap)
    except psycopg.Error as error:
        fail(f"nothing was changed: {str(error).splitlines()[0]}")
    for line in done.differences:
        print(line)
    what = "put in place" if done.is_swapped else "compared only; --swap puts it in place"
    print(f"{done.accounts} accounts from {done.entries} entries, {len(done.differences)} differences, {what}")
    if done.differences and not done.is_swapped:
        fail("the projections are not what the entries make")


def replay(arguments: argparse.Namespace) -> None:
    if bool(arguments.topic) == arguments.dead_letters:
        fail("give --dead-letters or --topic", code=2)
    since = None
    if arguments.since:
        try:
            since = datetime.fromisoformat(arguments.since)
        except ValueError:
            fail("--since: must be a time such as 2026-01-31T12:00:00Z", code=2)
        since = since.replace(tzinfo=UTC) if since.tzinfo is None else since
    try:
        done = replay_messages(
            _required("TOKENSTORE_KAFKA_BOOTSTRAP_SERVERS"), topic=arguments.topic, since=since,
            prefix=os.environ.get("TOKENSTORE_KAFKA_TOPIC_PREFIX", ""), dry_run=arguments.dry_run,
            reason=arguments.reason,
        )
    except (KafkaException, KeyError) as error:
        fail(f"Kafka: {error}")
    print(f"{done.read} messages read, {done.sent} {'would be ' if arguments.dry_run else ''}sent again")


def add_to(commands: Any) -> None:
    command = commands.add_parser(
        "rebuild", help="make accounts, lots and sums again from the entries and compare (TOKENSTORE_DATABASE_URL)"
    )
    command.add_argument("--swap", action="store_true", help="put what was made in the place of what is there")
    command.set_defaults(run=rebuild)
    command = commands.add_parser(
        "replay", help="send Kafka messages again; what was applied is not applied twice"
    )
    command.add_argument("--dead-letters", action="store_true", help="each to the topic that it came from")
    command.add_argument("--reason", default="", help="only dead letters whose reason holds this text")
    command.add_argument("--topic", default="", help="this topic's own messages")
    command.add_argument("--since", default="", help="only messages of this time and later (ISO 8601)")
    command.add_argument("--dry-run", action="store_true")
    command.set_defaults(run=replay)
