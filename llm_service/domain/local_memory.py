"""What the built-in model makes of the memory service's questions: a few rules over English sentences, no model.

It says so in its thoughts and reasons. It is there so that a mesh without a key remembers something in a demo.
"""

from __future__ import annotations

import json
import re
from typing import Any

NOTE = "built-in rules of the LOCAL model, no language model"
_PATTERNS: tuple[tuple[str, str, str], ...] = (
    # type, pattern over one sentence of the user's, what is remembered
    ("constraint", r"^(?:please )?(?:never|do not|don't) (?:ever )?(.+)$", "Never {0}"),
    ("constraint", r"^(?:please )?always (.+)$", "Always {0}"),
    ("constraint", r"^i(?:'m| am) allergic to (.+)$", "The user is allergic to {0}"),
    ("preference", r"^i (?:really )?(?:like|love|prefer|enjoy) (.+)$", "The user likes {0}"),
    ("preference", r"^my favou?rite (\w+) is (.+)$", "The user's favourite {0} is {1}"),
    ("preference", r"^i (?:hate|dislike|do not like|don't like) (.+)$", "The user dislikes {0}"),
    ("fact", r"^my name is (.+)$", "The user's name is {0}"),
    ("fact", r"^i (?:live|am living) in (.+)$", "The user lives in {0}"),
    ("fact", r"^i(?:'ve| have)? moved to (.+)$", "The user lives in {0}"),
    ("fact", r"^i work (?:as|at|for|in) (.+)$", "The user works {0}"),
    ("fact", r"^i(?:'m| am) (?:a |an )(.+)$", "The user is a {0}"),
    ("fact", r"^i have (.+)$", "The user has {0}"),
)
_UNTIL = re.compile(r"(?i)\buntil (\d{4}-\d{2}-\d{2})$")
_SINGLE_VALUED = (
    r"^the user lives in ", r"^the user's name is ", r"^the user's favourite \w+ is ", r"^the user works ",
)
_OPPOSITES = ((r"^the user likes (.+)$", r"^the user dislikes (.+)$"), (r"^always (.+)$", r"^never (.+)$"))


def answer_of(schema_name: str, data: str) -> str | None:
    """As JSON; None = it is none of the memory service's questions."""
    rule = {"memory_extract": _extract, "memory_compare": _compare}.get(schema_name)
    if rule is None:
        return None
    try:
        return json.dumps(rule(json.loads(data)), ensure_ascii=False)
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def _extract(question: Any) -> dict[str, Any]:
    facts = []
    for said in question["turn"]:
        if said["speaker"] != "user":
            continue
        for sentence in re.split(r"(?<=[.!?\n])\s+|\s+(?:and|but) (?=i |my )", said["text"], flags=re.IGNORECASE):
            asked = re.match(r"(?i)^(?:please )?remember (?:that )?", sentence)
            text = sentence[asked.end():] if asked else sentence
            text = text.strip().rstrip(".!?").strip()
            for kind, pattern, wording in _PATTERNS:
                if (found := re.match(pattern, text, flags=re.IGNORECASE)) is not None:
                    content = wording.format(*(group.strip() for group in found.groups()))
                    facts.append({
                        "type": kind, "content": content[:1000], "title": content[:64], "confidence": 0.8,
                        "importance": 0.9 if kind == "constraint" else 0.7, "sensitivity": 0, "explicit": bool(asked),
                        "valid_until": until.group(1) if (until := _UNTIL.search(text)) else None,
                    })
                    break
    return {"thoughts": NOTE, "facts": facts[:3]}


def _compare(question: Any) -> dict[str, Any]:
    new = _plain(question["new"]["content"])
    return {"verdicts": [
        {"index": each["index"], "reason": NOTE, "relation": _relation(new, _plain(each["content"])), "merged": ""}
        for each in question["known"]
    ]}


def _relation(new: str, known: str) -> str:
    if new == known:
        return "duplicate"
    for pattern in _SINGLE_VALUED:
        first, second = re.match(pattern, new), re.match(pattern, known)
        if first and second and first.group() == second.group():
            return "conflict"
    for one, other in _OPPOSITES:
        for left, right in ((one, other), (other, one)):
            first, second = re.match(left, new), re.match(right, known)
            if first and second and first.group(1) == second.group(1):
                return "conflict"
    return "unrelated"


def _plain(text: str) -> str:
    return " ".join(text.casefold().split()).rstrip(".!")
