"""Configuration: all problems at once, fail closed, secrets redacted."""

from __future__ import annotations

from pathlib import Path

import pytest

import llm_service.config
import tokenstore_service.config
from servicekit.settings import ConfigurationError, redacted

GOOD = {"LLM_DATABASE_URL": "postgresql://u:pw@host/db", "LLM_AUTH": "none"}


def problems_of(**changes: str) -> list[str]:
    with pytest.raises(ConfigurationError) as caught:
        llm_service.config.load({**GOOD, **changes})
    return caught.value.problems


def test_defaults_are_those_of_the_process_interface() -> None:
    llm = llm_service.config.load(GOOD)
    assert (llm.listen, llm.metrics_listen, llm.tokenstore_target) == (
        "127.0.0.1:50051", "127.0.0.1:9091", "127.0.0.1:50052"
    )
    assert (llm.workers, llm.drain_seconds, llm.kafka_bootstrap_servers) == (1, 30.0, "")
    tokenstore = tokenstore_service.config.load({
        "TOKENSTORE_DATABASE_URL": "postgres://h/db", "TOKENSTORE_AUTH": "none"
    })
    assert (tokenstore.listen, tokenstore.metrics_listen) == ("127.0.0.1:50052", "127.0.0.1:9092")


def test_every_problem_is_told_in_one_line_each() -> None:
    problems = problems_of(LLM_LISTEN="nowhere", LLM_WORKERS="0", LLM_DATABASE_URL="mysql://x", LLM_TYPO="1")
    assert sorted(line.partition(":")[0] for line in problems) == [
        "LLM_DATABASE_URL", "LLM_LISTEN", "LLM_TYPO", "LLM_WORKERS"
    ]
    assert "LLM_TYPO: is not a known setting" in problems


def test_the_database_is_required() -> None:
    with pytest.raises(ConfigurationError) as caught:
        llm_service.config.load({"LLM_AUTH": "none"})
    assert caught.value.problems == ["LLM_DATABASE_URL: is required"]


def test_authentication_fails_closed() -> None:
    assert problems_of(LLM_AUTH="tokens") == ["LLM_AUTH_TOKENS_FILE: is required while auth is 'tokens'"]
    (line,) = problems_of(LLM_LISTEN="0.0.0.0:50051")
    assert line.startswith("LLM_AUTH: 'none' is refused")
    assert llm_service.config.load({**GOOD, "LLM_LISTEN": "[::1]:50051"}).auth == "none"


@pytest.mark.parametrize("key", ["short", "AAAA", "!!!"])
def test_a_secret_key_is_32_bytes(key: str) -> None:
    assert problems_of(LLM_SECRET_KEY=key) == ["LLM_SECRET_KEY: must be the base64 of 32 bytes"]


def test_an_empty_metrics_address_is_off_and_other_empty_values_are_not_set() -> None:
    settings = llm_service.config.load({**GOOD, "LLM_METRICS_LISTEN": "", "LLM_WORKERS": "", "LLM_SECRET_KEY": ""})
    assert (settings.metrics_listen, settings.workers, settings.secret_key) == ("", 1, None)


def test_secrets_are_never_shown() -> None:
    settings = llm_service.config.load({
        **GOOD, "LLM_SECRET_KEY": "AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8="
    })
    shown = repr(settings) + str(redacted(settings))
    assert "pw@" not in shown
    assert "AAECAwQ" not in shown


def test_an_unknown_fault_point_is_a_problem() -> None:
    assert problems_of(LLM_FAULT="nowhere")[0].startswith("LLM_FAULT:")


def test_a_password_file_completes_the_database_url(tmp_path: Path) -> None:
    file = tmp_path / "password"
    file.write_text("a/b@c\n")
    settings = llm_service.config.load({
        **GOOD, "LLM_DATABASE_URL": "postgresql://u@host:5/db?x=1", "LLM_DATABASE_PASSWORD_FILE": str(file)
    })
    assert settings.full_database_url() == "postgresql://u:a%2Fb%40c@host:5/db?x=1"
    assert "a%2Fb" not in str(redacted(settings))
