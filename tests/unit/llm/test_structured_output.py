"""JSON found in what models say, and held to a schema."""

from __future__ import annotations

import json
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_service.domain.chat import JsonSchema, Message, Prompt, Role, TextPart
from llm_service.domain.structured_output import (
    BadSchema,
    Violation,
    check_answer,
    check_schema,
    instructed,
    repair_prompt,
)

SCHEMA = json.dumps({
    "type": "object", "properties": {"name": {"type": "string"}, "tags": {"type": "array", "items": {"type": "integer"}}},
    "required": ["name"], "additionalProperties": False,
})
GOOD = '{"name": "a{b}", "tags": [1, 2]}'


@pytest.mark.parametrize("text", [
    GOOD, f"  {GOOD}\n", f"```json\n{GOOD}\n```", f"```{GOOD}```", f"```json {GOOD} ```",
    f"Sure! Here is what you asked for:\n\n```json\n{GOOD}\n```\nHope it helps {{}}", f"The answer is {GOOD}. Bye.",
    f"First {{\"wrong\": true}}, I mean {GOOD}", f"[1, 2] and then {GOOD}", f"a {{ brace, then {GOOD}",
    f"```python\nprint({{}})\n```\n{GOOD}",
])
def test_json_is_found_in_chatty_answers(text: str) -> None:
    checked = check_answer(text, SCHEMA)
    assert checked.violation is None
    assert json.loads(checked.text) == json.loads(GOOD)


@pytest.mark.parametrize(("text", "path", "rule"), [
    ("no json at all", "$", "no JSON in the answer"), ("", "$", "no JSON in the answer"), ("{}", "$", "required"),
    ('{"name": 5}', "$.name", "type"), ('{"name": "a", "tags": [1, "x"]}', "$.tags[1]", "type"),
    ('{"name": "a", "more": 1}', "$", "additionalProperties"), ("[]", "$", "type"), ('{"name": "cut', "$", "no JSON in the answer"),
])
def test_what_is_wrong_is_told_without_the_answers_words(text: str, path: str, rule: str) -> None:
    assert check_answer(text, SCHEMA).violation == Violation(path, rule)


@given(st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=20,
), st.text(alphabet=st.characters(exclude_characters="{}[]`")), st.text())
def test_any_json_is_found_behind_any_words(value: object, before: str, after: str) -> None:
    if not isinstance(value, dict | list):
        value = [value]
    checked = check_answer(f"{before} {json.dumps(value)} {after}", "{}")
    assert checked.violation is None


@given(st.text())
def test_no_answer_breaks_the_search(text: str) -> None:
    check_answer(text, SCHEMA)


@pytest.mark.parametrize("schema", ["5", "not json", '{"type": "nonsense"}', '{"properties": 5}', '{"pattern": 5}', "[" * 100_000])
def test_what_is_no_schema_is_refused(schema: str) -> None:
    with pytest.raises(BadSchema):
        check_schema(schema)


@pytest.mark.parametrize("text", ["{" * 100_000, "[" * 100_000, '{"a":' * 50_000, "{ " * 500_000])
def test_hostile_nesting_takes_no_time(text: str) -> None:
    began = time.process_time()
    assert check_answer(text, SCHEMA).violation is not None
    assert time.process_time() - began < 5.0


def test_a_pattern_that_explodes_is_no_match_and_takes_no_time() -> None:
    schema = json.dumps({"type": "string", "pattern": "^(a+)+$"})
    began = time.process_time()
    assert check_answer(json.dumps("a" * 40 + "!"), schema).violation == Violation("$", "pattern")
    assert time.process_time() - began < 2.0
    assert check_answer('"aaa"', schema).violation is None
    names = json.dumps({"patternProperties": {"^x": {"type": "integer"}}})
    assert check_answer('{"x1": "no"}', names).violation == Violation("$.x1", "type")


def test_other_documents_are_never_fetched() -> None:
    schema = json.dumps({"$ref": "http://127.0.0.1:1/schema.json"})
    violation = check_answer("{}", schema).violation
    assert violation is not None
    assert "can not be applied" in violation.rule


def test_what_is_instructed_and_what_is_asked_again() -> None:
    prompt = Prompt((Message(Role.USER, (TextPart("go"),)),), json_schema=JsonSchema("s", SCHEMA, strict=True))
    assert prompt.json_schema is not None
    told = instructed(prompt, prompt.json_schema)
    assert told.json_schema is None
    assert SCHEMA in told.messages[0].parts[0].text  # type: ignore[union-attr]
    answer = Message(Role.ASSISTANT, (TextPart("{}"),), reasoning="hm", reasoning_signature="s")
    again = repair_prompt(prompt, answer, Violation("$", "required"))
    assert again.messages[1] == Message(Role.ASSISTANT, (TextPart("{}"),))
    assert "at $: required" in again.messages[2].parts[0].text  # type: ignore[union-attr]
    assert repair_prompt(prompt, Message(Role.ASSISTANT), Violation("$", "x")).messages[1].parts
