"""Service tokens: known, expired, scoped, reloaded."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest

from servicekit.core.clock import ManualClock
from servicekit.core.errors import PermissionDenied, Unauthenticated
from servicekit.rpc.auth import SCOPES, NoAuthentication, TokenFile, parse_tokens


def entry(token: str, **fields: object) -> dict[str, object]:
    return {"name": token, "sha256": hashlib.sha256(token.encode()).hexdigest(), "scopes": ["llm.call"], **fields}


def write(path: Path, *entries: dict[str, object]) -> None:
    path.write_text(json.dumps({"tokens": list(entries)}))
    os.utime(path, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns + 10**9))


@pytest.fixture
def tokens(tmp_path: Path) -> tuple[TokenFile, Path, ManualClock]:
    path, clock = tmp_path / "tokens.json", ManualClock()
    write(path, entry("good"), entry("old", expires_at="2025-01-01T00:00:00Z"))
    return TokenFile(path, clock=clock), path, clock


def test_a_known_token_has_its_name_and_scopes(tokens: tuple[TokenFile, Path, ManualClock]) -> None:
    principal = tokens[0].authenticate("Bearer good")
    assert (principal.name, principal.scopes) == ("good", {"llm.call"})
    principal.require("llm.call")
    with pytest.raises(PermissionDenied, match=r"models\.admin"):
        principal.require("models.admin")


@pytest.mark.parametrize("header", [None, "", "Bearer", "Bearer ", "Basic good", "Bearer bad", "good", "Bearer old"])
def test_anything_else_is_not_authenticated(tokens: tuple[TokenFile, Path, ManualClock], header: str | None) -> None:
    with pytest.raises(Unauthenticated):
        tokens[0].authenticate(header)


def test_a_changed_file_counts_within_a_second(tokens: tuple[TokenFile, Path, ManualClock]) -> None:
    registry, path, clock = tokens
    write(path, entry("new"))
    clock.advance(seconds=1.1)
    assert registry.authenticate("Bearer new").name == "new"
    with pytest.raises(Unauthenticated):
        registry.authenticate("Bearer good")


def test_a_damaged_file_changes_nothing(tokens: tuple[TokenFile, Path, ManualClock]) -> None:
    registry, path, clock = tokens
    for damage in ("{", '{"tokens": {}}', '{"tokens": [{"name": "x"}]}', "[]"):
        path.write_text(damage)
        clock.advance(seconds=1.1)
        assert registry.authenticate("Bearer good").name == "good"


@pytest.mark.parametrize("damage", [
    "{}", "[]", '{"tokens": [1]}', json.dumps({"tokens": [entry("x", scopes=["everything"])]}),
    json.dumps({"tokens": [entry("x", sha256="abcd")]}),
    json.dumps({"tokens": [entry("x", expires_at="2027-01-01T00:00:00")]}),
])
def test_a_damaged_file_is_refused_at_the_start(damage: str) -> None:
    with pytest.raises(ValueError):
        parse_tokens(damage)


def test_without_authentication_everybody_may_do_everything() -> None:
    assert NoAuthentication().authenticate(None).scopes == SCOPES
