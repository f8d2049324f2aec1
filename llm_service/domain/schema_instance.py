"""A value that follows a JSON Schema, made up without a model: what the built-in model answers a schema with."""

from __future__ import annotations

import json
from typing import Any

MOST_DEPTH = 12


def instance_of(schema_text: str, words: str) -> str:
    """As JSON; `words` fills texts. Follows the usual keywords; what can not be met is left as it is."""
    schema = json.loads(schema_text)
    return json.dumps(_instance(schema, schema, words, 0), ensure_ascii=False)


def _instance(schema: Any, root: Any, words: str, depth: int) -> Any:
    if not isinstance(schema, dict) or depth > MOST_DEPTH:
        return None
    if "$ref" in schema:
        return _instance(_resolved(schema["$ref"], root), root, words, depth + 1)
    for keyword in ("const", "default"):
        if keyword in schema:
            return schema[keyword]
    if schema.get("enum"):
        return schema["enum"][0]
    for keyword in ("anyOf", "oneOf"):
        if schema.get(keyword):
            return _instance(schema[keyword][0], root, words, depth + 1)
    if schema.get("allOf"):
        merged: dict[str, Any] = {key: value for key, value in schema.items() if key != "allOf"}
        for part in schema["allOf"]:
            part = _resolved(part["$ref"], root) if "$ref" in part else part
            merged = {
                **merged, **part, "properties": {**merged.get("properties", {}), **part.get("properties", {})},
                "required": [*merged.get("required", []), *part.get("required", [])],
            }
        return _instance(merged, root, words, depth + 1)
    kind = schema.get("type")
    if isinstance(kind, list):
        kind = kind[0]
    if kind is None:
        kind = "object" if "properties" in schema else "array" if "items" in schema else "string"
    return _of_kind(kind, schema, root, words, depth)


def _of_kind(kind: str, schema: dict[str, Any], root: Any, words: str, depth: int) -> Any:
    match kind:
        case "object":
            wanted = schema.get("required", []) if depth > MOST_DEPTH // 2 else schema.get("properties", {})
            return {
                name: _instance(schema.get("properties", {}).get(name, {}), root, words, depth + 1)
                for name in [*wanted, *(each for each in schema.get("required", []) if each not in wanted)]
            }
        case "array":
            count = max(schema.get("minItems", 0), min(1, schema.get("maxItems", 1)))
            return [_instance(schema.get("items", {}), root, words, depth + 1) for _ in range(count)]
        case "integer" | "number":
            return _number(schema, is_whole=kind == "integer")
        case "boolean":
            return True
        case "null":
            return None
        case _:
            return _text(schema, words)


def _number(schema: dict[str, Any], *, is_whole: bool) -> Any:
    low = schema.get("minimum", schema.get("exclusiveMinimum", 0) + (1 if "exclusiveMinimum" in schema else 0))
    value = max(low, 1) if schema.get("maximum", low + 1) >= 1 else low
    value = min(value, schema.get("maximum", value))
    if multiple := schema.get("multipleOf"):
        value = -(-value // multiple) * multiple
    return int(value) if is_whole else value


def _text(schema: dict[str, Any], words: str) -> str:
    known = {
        "date": "2026-01-01", "date-time": "2026-01-01T00:00:00Z", "time": "00:00:00Z", "email": "a@example.org",
        "uri": "https://example.org/", "uuid": "00000000-0000-4000-8000-000000000000", "ipv4": "192.0.2.1",
    }
    text = known.get(schema.get("format", ""), words or "local")
    least, most = schema.get("minLength", 0), schema.get("maxLength", 200)
    return str((text + "." * max(0, least - len(text)))[:most])


def _resolved(reference: str, root: Any) -> Any:
    target = root
    for step in reference.removeprefix("#").strip("/").split("/"):
        if step:
            target = target.get(step.replace("~1", "/").replace("~0", "~"), {}) if isinstance(target, dict) else {}
    return target
