"""Habits that matter, checked."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import jsonschema
import pytest
import yaml

from deploy.local.mesh import BANNER
from servicekit.settings import ServerSettings
from tests.contract.test_contracts import declared_services
from tokenstore_service.domain.commands import RecordStatus
from tokenstore_service.storage import book_store, tables

ROOT = Path(__file__).resolve().parent.parent.parent
SERVICES = ("llm_service", "tokenstore_service", "memory_worker")
ROOMS = ("domain", "usecases", "wire", "storage", "transport")
CODE = [
    path for folder in (*SERVICES, "servicekit", "metering") for path in sorted((ROOT / folder).rglob("*.py"))
]
README = (ROOT / "README.md").read_text()
ARCHITECTURE = (ROOT / "ARCHITECTURE.md").read_text()


def text_of(path: Path) -> str:
    return path.read_text()


def test_compose_follows_the_specification() -> None:
    """The schema is the compose specification's own (Apache-2.0), as published with its Go library."""
    compose = yaml.safe_load(text_of(ROOT / "docker-compose.yml"))
    schema = json.loads(text_of(Path(__file__).parent / "schemas" / "compose-spec.json"))
    jsonschema.validate(compose, schema)
    for service in compose["services"].values():
        for dependency in service.get("depends_on", {}):
            assert dependency in compose["services"]
        for secret in service.get("secrets", ()):
            assert secret in compose["secrets"]


@pytest.mark.parametrize("name", SERVICES)
def test_compose_sets_only_what_the_services_know(name: str) -> None:
    import importlib

    prefix = name.split("_")[0].upper()
    compose = yaml.safe_load(text_of(ROOT / "docker-compose.yml"))
    known = set(importlib.import_module(f"{name}.config").Settings.model_fields)
    environment = compose["services"][prefix.lower()]["environment"]
    assert {variable.removeprefix(f"{prefix}_").lower() for variable in environment} <= known
    assert "auth" not in environment, "a deployment asks for tokens"


@pytest.mark.parametrize("service", SERVICES)
def test_the_rooms_are_there_and_described(service: str) -> None:
    for room in ROOMS:
        assert (ROOT / service / room).is_dir()
    assert len(text_of(ROOT / service / "README.md").splitlines()) >= 10
    assert f"`{service}/`" in ARCHITECTURE


def test_every_rpc_has_an_end_to_end_test() -> None:
    tests = "\n".join(text_of(path) for folder in ("e2e", "fault", "support") for path in (ROOT / "tests" / folder).glob("*.py"))
    for service in declared_services().values():
        for method in service.methods_by_name:
            assert re.search(rf"\b{method}\b", tests), f"{service.name}.{method} has no test over a socket"


def test_every_module_is_used() -> None:
    everything = "\n".join(
        text_of(path) for folder in (*SERVICES, "servicekit", "metering", "deploy", "tests", "benchmarks")
        for path in (ROOT / folder).rglob("*.py")
    ) + text_of(ROOT / "docker-compose.yml")
    for path in CODE:
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        if path.name in ("__init__.py", "__main__.py", "env.py") or "versions" in path.parts:
            continue
        imported = rf"from {re.escape(name.rpartition('.')[0])} import [\w, ]*\b{path.stem}\b"
        assert name in everything or re.search(imported, everything), name


def test_no_content_and_no_keys_go_to_a_log() -> None:
    logged = re.compile(r"log\.(?:info|warning|error)\((?:[^()]|\([^()]*\))*\)", re.DOTALL)
    for path in CODE:
        for call in logged.findall(text_of(path)):
            assert not re.search(r"\b(prompt|messages|api_key|text|answer|content|token)\s*=", call), f"{path}: {call}"


def test_time_and_randomness_come_from_outside_the_rules() -> None:
    banned = re.compile(r"\b(datetime\.now|time\.time|uuid4|os\.environ|random\.random)\b")
    for path in CODE:
        if "domain" in path.parts or "usecases" in path.parts:
            assert not banned.search(text_of(path)), path


def test_money_is_never_a_float() -> None:
    for path in CODE:
        assert not re.search(r"(micros|pico|credits)\w*: float", text_of(path)), path


def test_every_statement_of_the_hot_path_names_the_account() -> None:
    """So that accounts can be spread over machines: docs/scaling.md lists what would change there."""
    statements = {
        name: value for name, value in vars(book_store).items()
        if name.isupper() and isinstance(value, str) and value.strip().split()[0] in ("SELECT", "UPDATE", "INSERT", "DELETE")
    }
    assert len(statements) >= 18
    outbox = {"INSERT_MESSAGES"}  # its key is the user_id
    for name, statement in statements.items():
        assert "user_id" in statement or name in outbox, name
    for table in tables.METADATA.sorted_tables:
        if "user_id" in table.columns:
            assert next(iter(table.primary_key.columns)).name == "user_id", table.name


def test_no_module_is_called_nothing() -> None:
    names = {path.stem for path in CODE} | {path.parent.name for path in CODE}
    assert not names & {"utils", "helpers", "common", "base", "manager", "managers", "misc"}


def test_the_readme_names_every_target_and_every_setting() -> None:
    targets = re.findall(r"^([a-z-]+):.*## ", text_of(ROOT / "Makefile"), re.MULTILINE)
    for target in targets:
        assert f"make {target}" in README, target
    for name in ServerSettings.model_fields:
        assert f"_{name.upper()}`" in README, name


def test_the_banner_and_the_readme_print_the_same_commands() -> None:
    commands = re.findall(r"\.venv/bin/(\S+ \S+)", BANNER)
    for command in commands:
        assert f".venv/bin/{command}" in README, command


def test_the_result_table_of_the_readme_is_the_domain() -> None:
    for status in RecordStatus:
        assert status.name in README


def test_every_row_of_the_settlement_table_names_its_test() -> None:
    tests = "\n".join(text_of(path) for folder in ("e2e", "fault") for path in (ROOT / "tests" / folder).glob("*.py"))
    named = re.findall(r"`(test_\w+)`", text_of(ROOT / "docs" / "settlement.md"))
    assert len(named) >= 29
    for name in named:
        assert f"def {name}(" in tests, name


def test_nothing_is_tracked_that_is_made() -> None:
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    assert not [name for name in tracked if name.startswith((".venv", ".run", "deploy/secrets/")) or name.endswith(".pyc")]
