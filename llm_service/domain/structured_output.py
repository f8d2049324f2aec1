"""Answers that must follow a JSON Schema: found in what the model said, checked, and asked for again once."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import regex
from jsonschema import exceptions, validators
from jsonschema.protocols import Validator
from referencing import Registry

from llm_service.domain.chat import JsonSchema, Message, Prompt, Role, TextPart

INSTRUCTION = (
    "Answer with one JSON value that follows this JSON Schema, and with nothing else: no introduction, no explanation,"
    " no code fence.\n"
)
REPAIR = (
    "That answer does not follow the JSON Schema (at {path}: {rule}). Answer again with the corrected JSON value,"
    " whole, and with nothing else."
)
OBJECT_INSTRUCTION = "Answer with one JSON object and with nothing else."
MOST_STARTS = 64
"""So many places where JSON may begin are tried in a chatty answer."""
MOST_CHARACTERS = 4 * 1024 * 1024
PATTERN_SECONDS = 0.1
"""A pattern of a caller's schema may take exponential time; it counts as not matched after this."""
MOST_PATH = 200
_FENCE = re.compile(r"```[A-Za-z0-9_-]*[ \t]*\r?\n?(.*?)```", re.DOTALL)


class BadSchema(Exception):
    """It is no JSON Schema."""


@dataclass(frozen=True, slots=True)
class Violation:
    """Where an answer breaks the schema, and by which of its keywords; both without the answer's own words."""

    path: str
    rule: str


@dataclass(frozen=True, slots=True)
class Checked:
    """The JSON in an answer; `violation` None = it follows the schema."""

    text: str
    violation: Violation | None


def _matches(pattern: str, instance: str) -> bool:
    try:
        return regex.search(pattern, instance, timeout=PATTERN_SECONDS) is not None
    except (regex.error, TimeoutError):
        return False


def _pattern(_validator: Any, pattern: str, instance: Any, _schema: Any) -> Iterator[exceptions.ValidationError]:
    if isinstance(instance, str) and not _matches(pattern, instance):
        yield exceptions.ValidationError("does not match the pattern")


def _pattern_properties(
    validator: Any, patterns: Any, instance: Any, _schema: Any
) -> Iterator[exceptions.ValidationError]:
    if not isinstance(instance, dict):
        return
    for pattern, subschema in patterns.items():
        for name, value in instance.items():
            if _matches(pattern, name):
                yield from validator.descend(value, subschema, path=name, schema_path=pattern)


@functools.lru_cache(maxsize=512)
def _validator_of(schema_text: str) -> Validator:
    """Raises BadSchema. References to other documents are never fetched."""
    try:
        schema = json.loads(schema_text)
        kind: Any = validators.validator_for(schema, default=validators.validator_for({}))
        kind.check_schema(schema)
        extend: Any = validators.extend
        own = extend(kind, {"pattern": _pattern, "patternProperties": _pattern_properties})
        return own(schema, registry=Registry())  # type: ignore[no-any-return]
    except (exceptions.SchemaError, ValueError, RecursionError, TypeError, regex.error) as error:
        raise BadSchema(type(error).__name__) from None


def check_schema(schema_text: str) -> None:
    """Raises BadSchema."""
    _validator_of(schema_text)


def check_answer(text: str, schema_text: str) -> Checked:
    """The first JSON in the text that follows the schema; else what is wrong with the first JSON there is."""
    validator = _validator_of(schema_text)
    first: Checked | None = None
    for found, value in _candidates(text[:MOST_CHARACTERS]):
        violation = _violation_of(validator, value)
        if violation is None:
            return Checked(found, None)
        first = first or Checked(found, violation)
    return first or Checked("", Violation("$", "no JSON in the answer"))


def _violation_of(validator: Validator, value: Any) -> Violation | None:
    try:
        errors = sorted(validator.iter_errors(value), key=exceptions.relevance, reverse=True)
    except Exception as error:  # noqa: BLE001 - an unknown reference, endless recursion: the schema's own fault
        return Violation("$", f"the schema can not be applied ({type(error).__name__})")
    if not errors:
        return None
    return Violation(str(errors[0].json_path)[:MOST_PATH], str(errors[0].validator))


def _candidates(text: str) -> Iterator[tuple[str, Any]]:
    """The whole text, what stands in code fences, then what begins at a bracket, in this order, where it is JSON."""
    decoder = json.JSONDecoder()
    for piece in (text, *(match.group(1) for match in _FENCE.finditer(text))):
        stripped = piece.strip()
        try:
            yield stripped, json.loads(stripped)
        except (ValueError, RecursionError):
            continue
    end = 0
    starts = 0
    for match in re.finditer(r"[{\[]", text):
        if match.start() < end:
            continue
        starts += 1
        if starts > MOST_STARTS:
            return
        try:
            value, end = decoder.raw_decode(text, match.start())
        except (ValueError, RecursionError):
            continue
        yield text[match.start():end], value


def instructed(prompt: Prompt, schema: JsonSchema) -> Prompt:
    """For a model server that does not hold the model to a schema."""
    return _with_instruction(replace(prompt, json_schema=None), INSTRUCTION + schema.schema)


def instructed_object(prompt: Prompt) -> Prompt:
    return _with_instruction(replace(prompt, json_object=False), OBJECT_INSTRUCTION)


def _with_instruction(prompt: Prompt, text: str) -> Prompt:
    return replace(prompt, messages=(Message(Role.SYSTEM, (TextPart(text),)), *prompt.messages))


def repair_prompt(prompt: Prompt, answer: Message, violation: Violation) -> Prompt:
    """Asks again, with the answer and what is wrong with it."""
    said = replace(answer, reasoning="", reasoning_signature="")
    if not said.parts:
        said = replace(said, parts=(TextPart("(nothing)"),))
    wanted = Message(Role.USER, (TextPart(REPAIR.format(path=violation.path, rule=violation.rule)),))
    return replace(prompt, messages=(*prompt.messages, said, wanted))
