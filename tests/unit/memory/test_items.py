"""One normaliser, detectors, ranking, back-off."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memory_worker.domain.detectors import DEFAULTS, Finding, Treatment, check, policy_from_text
from memory_worker.domain.item import (
    MOST_CONTENT,
    MOST_TITLE,
    Item,
    ItemStatus,
    MemoryType,
    digest_of,
    expiry_of,
    normalised,
    one_line,
    title_of,
)
from memory_worker.domain.job import LONGEST_WAIT, MOST_TRIES, Job, JobState, call_key, wait_after
from memory_worker.domain.ranking import MOST_PINNED, WEIGHTS, Ranked, choose, rank, tokens_of
from memory_worker.storage.item_rows import fact_from_json, fact_to_json
from memory_worker.usecases.extraction import facts_in
from memory_worker.usecases.memory_ports import UserSettings
from memory_worker.usecases.ports import Policy

NOW = datetime(2026, 11, 21, tzinfo=UTC)


def item(number: int = 1, **fields: object) -> Item:
    made = Item(
        user_id="u", item_id=UUID(int=number), type=MemoryType.FACT, title="t", content=f"content {number}",
        confidence=0.9, importance=0.5, sensitivity=0, is_explicit=False, status=ItemStatus.ACTIVE, version=1,
        valid_from=NOW, valid_to=None, expires_at=None, created_at=NOW, updated_at=NOW,
    )
    return replace(made, **fields)  # type: ignore[arg-type]


@pytest.mark.parametrize("wording", [
    "likes tea", "  Likes   TEA. ", "likes\ttea!", "\uff4c\uff49\uff4b\uff45\uff53 tea", "likes\u200b tea;", "LIKES TEA\n",
])
def test_wordings_of_one_thing_have_one_digest(wording: str) -> None:
    assert digest_of(MemoryType.FACT, wording) == digest_of(MemoryType.FACT, "likes tea")
    assert digest_of(MemoryType.PREFERENCE, wording) != digest_of(MemoryType.FACT, "likes tea")


@given(st.text(max_size=3000))
def test_the_normaliser_is_stable_and_bounded(text: str) -> None:
    once = normalised(text)
    assert len(once) <= 3 * MOST_CONTENT
    assert digest_of(MemoryType.FACT, one_line(text, MOST_CONTENT)) == digest_of(MemoryType.FACT, text)
    assert "\n" not in one_line(text, 100)
    assert len(title_of("", text)) <= MOST_TITLE


def test_facts_are_forgotten_and_the_rest_is_not() -> None:
    assert expiry_of(MemoryType.FACT, NOW) == NOW + timedelta(days=180)
    assert expiry_of(MemoryType.CONSTRAINT, NOW) is None


@pytest.mark.parametrize(("said", "kept"), [
    (None, None), ("", None), ("next week", None), (7, None), ("2027-05-01", datetime(2027, 5, 1, tzinfo=UTC)),
    ("2027-05-01T02:00:00+02:00", datetime(2027, 5, 1, tzinfo=UTC)), ("9999-12-31T23:59:59-14:00", None),
])
def test_how_long_something_holds_is_what_was_said(said: Any, kept: datetime | None) -> None:
    document = {"facts": [{"type": "preference", "content": "likes tea", "confidence": 1, "valid_until": said}]}
    [(fact, objection)] = facts_in(
        json.dumps(document), settings=UserSettings("u"), policy=Policy(), shown=(), said_at=NOW
    )
    assert (fact.valid_until, objection) == (kept, "")
    assert fact.expiry(NOW) == kept
    assert fact_from_json(fact_to_json(fact)) == fact


def test_what_was_over_when_it_was_said_is_dropped_and_a_fact_never_outlives_its_time() -> None:
    document = {"facts": [
        {"type": "fact", "content": "was in Rome", "confidence": 1, "valid_until": "2001-01-01"},
        {"type": "fact", "content": "is in Oslo", "confidence": 1, "valid_until": (NOW + timedelta(days=2)).isoformat()},
        {"type": "fact", "content": "has a cat", "confidence": 1, "valid_until": "2999-01-01"},
    ]}
    found = facts_in(json.dumps(document), settings=UserSettings("u"), policy=Policy(), shown=(), said_at=NOW)
    assert [objection for _, objection in found] == ["OVER", "", ""]
    assert found[1][0].expiry(NOW) == NOW + timedelta(days=2)
    assert found[2][0].expiry(NOW) == NOW + timedelta(days=180)


@pytest.mark.parametrize(("text", "finding"), [
    ("my key is sk-abcdefghijklmnopqrstuvwx", Finding.KEY), ("AKIAIOSFODNN7EXAMPLE", Finding.KEY),
    ("token eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0.abc", Finding.KEY), ("Password: hunter22", Finding.KEY),
    ("-----BEGIN RSA PRIVATE KEY-----", Finding.KEY), ("密码是 abcd1234", Finding.KEY),
    ("card 4111 1111 1111 1111 ok", Finding.CARD), ("5500-0000-0000-0004", Finding.CARD),
    ("pay to DE89 3704 0044 0532 0130 00", Finding.IBAN), ("write to a.b+c@example.co.uk", Finding.EMAIL),
    ("call +49 30 1234567", Finding.PHONE),
])
def test_secrets_and_personal_data_are_found(text: str, finding: Finding) -> None:
    masked = check(text, dict.fromkeys(Finding, Treatment.MASK))
    assert f"[{finding}]" in masked.text
    assert check(text, {**dict.fromkeys(Finding, Treatment.MASK), finding: Treatment.REFUSE}).refused is finding
    stored = check(text, dict.fromkeys(Finding, Treatment.STORE))
    assert (stored.text, stored.personal) == (text, True)


@pytest.mark.parametrize("text", [
    "order 4111 1111 1111 1112", "the year 2026, room 1234567", "XX99 ABCD EFGH IJKL MNOP", "I like secret gardens",
    "version 1.2.3", "a@b", "skating in Berlin", "0000 0000 0000 0000", "12:30 to 13:45",
])
def test_what_only_looks_alike_is_left(text: str) -> None:
    assert check(text, dict.fromkeys(Finding, Treatment.REFUSE)).text == text


def test_policies_as_text() -> None:
    assert policy_from_text("") == DEFAULTS
    assert policy_from_text("email=refuse, card=store")[Finding.EMAIL] is Treatment.REFUSE
    for wrong in ("email", "email=keep", "name=mask"):
        with pytest.raises(ValueError):
            policy_from_text(wrong)


@given(st.text(max_size=200))
def test_a_check_never_fails(text: str) -> None:
    assert check(text) == check(text)


def test_a_score_is_the_sum_of_its_parts_and_at_most_one() -> None:
    assert sum(WEIGHTS.values()) == pytest.approx(1)
    best = rank(item(importance=1.0, confidence=1.0, is_explicit=True), 1.0, now=NOW)
    assert best.score == pytest.approx(1)
    assert best.score == pytest.approx(sum(best.parts.values()))
    older = rank(item(updated_at=NOW - timedelta(days=30)), 0.5, now=NOW)
    assert older.parts["recency"] == pytest.approx(WEIGHTS["recency"] / 2)
    assert rank(item(), -0.4, now=NOW).parts["similarity"] == 0


def test_constraints_are_pinned_outside_the_limit_and_no_wording_comes_twice() -> None:
    pinned = [Ranked(item(n, type=MemoryType.CONSTRAINT), 0.1, {}, pinned=True) for n in range(1, 4)]
    found = [Ranked(item(n), 1 - n / 100, {}) for n in range(3, 30)]
    chosen = choose(pinned, found, limit=5, token_budget=0)
    assert [each.pinned for each in chosen] == [True] * 3 + [False] * 4, "a type fills 0.8 of the limit at most"
    assert len({each.item.content for each in chosen}) == len(chosen)
    assert [each.item.item_id.int for each in chosen[3:]] == [4, 5, 6, 7]
    many = [Ranked(item(n, type=MemoryType.CONSTRAINT), 0.1, {}, pinned=True) for n in range(50)]
    assert len(choose(many, [], limit=1, token_budget=0)) == MOST_PINNED


def test_a_token_budget_holds() -> None:
    found = [Ranked(item(n, content=f"{n} " + "x" * 89), 0.5, {}) for n in range(10)]
    chosen = choose([], found, limit=10, token_budget=70)
    assert sum(tokens_of(each.item) for each in chosen) <= 70
    assert len(chosen) == 2
    assert choose([], [], limit=5, token_budget=0) == []


def test_tries_wait_longer_and_go_on_for_hours() -> None:
    waits = [wait_after(tries, draw=1.0) for tries in range(1, MOST_TRIES + 1)]
    assert waits == sorted(waits)
    assert waits[-1] == LONGEST_WAIT
    assert sum(waits, timedelta()) > timedelta(hours=6)
    assert wait_after(3, draw=0.0) == waits[2] / 2


def test_a_call_has_the_identity_of_its_question() -> None:
    job = Job("u", UUID(int=1), "c", "m", JobState.QUEUED, 0, NOW, NOW)
    key = call_key(job, "compare", "fact", [("item", 1)], "compare/1", "alias")
    assert key == call_key(replace(job, tries=5), "compare", "fact", [("item", 1)], "compare/1", "alias")
    assert len(key) <= 128
    others = [
        call_key(job, "compare", "fact", [("item", 2)], "compare/1", "alias"), call_key(job, "extract", "x"),
        call_key(replace(job, job_id=UUID(int=2)), "compare", "fact", [("item", 1)], "compare/1", "alias"),
        call_key(replace(job, generation=1), "compare", "fact", [("item", 1)], "compare/1", "alias"),
    ]
    assert key not in others
