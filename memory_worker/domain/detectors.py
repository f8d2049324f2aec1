"""Secrets and personal data in what is to be remembered, found by their form, before anything is stored or logged."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum


class Finding(StrEnum):
    """What was found."""

    KEY = "key"
    CARD = "card"
    IBAN = "iban"
    EMAIL = "email"
    PHONE = "phone"


class Treatment(StrEnum):
    """What is done about it: `store` it and call the memory personal, `mask` it, or `refuse` the memory."""

    STORE = "store"
    MASK = "mask"
    REFUSE = "refuse"


DEFAULTS: Mapping[Finding, Treatment] = {
    Finding.KEY: Treatment.REFUSE, Finding.CARD: Treatment.MASK, Finding.IBAN: Treatment.MASK,
    Finding.EMAIL: Treatment.STORE, Finding.PHONE: Treatment.STORE,
}


def _is_card(text: str) -> bool:
    """The Luhn check (ISO/IEC 7812-1) over 13 to 19 digits."""
    digits = [int(letter) for letter in text if letter.isdigit()]
    if not 13 <= len(digits) <= 19 or len(set(digits)) == 1:
        return False
    doubled = [digit if index % 2 == 0 else digit * 2 - 9 * (digit > 4) for index, digit in enumerate(digits[::-1])]
    return sum(doubled) % 10 == 0


def _is_iban(text: str) -> bool:
    """The check digits of ISO 13616: the rearranged number is 1 modulo 97."""
    letters = "".join(text.split()).upper()
    if not 15 <= len(letters) <= 34:
        return False
    return int("".join(str(int(letter, 36)) for letter in letters[4:] + letters[:4])) % 97 == 1


def _is_phone(text: str) -> bool:
    return 8 <= sum(letter.isdigit() for letter in text) <= 15


def _always(_text: str) -> bool:
    return True


# Prefixes as their issuers publish them; a JSON Web Token; a PEM block; "password is ..." in words.
_KEYS = (
    r"\b(?:sk|pk|rk)[-_][A-Za-z0-9_-]{16,}", r"\b(?:ghp|gho|ghs|ghu|github_pat)_[A-Za-z0-9_]{20,}",
    r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b", r"\bxox[abprs]-[A-Za-z0-9-]{10,}", r"\bAIza[A-Za-z0-9_-]{30,}",
    r"\beyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]*", r"-----BEGIN [A-Z ]*PRIVATE KEY-----",
    r"(?i:\b(?:password|passwort|passphrase|api[ _-]?key|secret)\b\s*(?:is|ist|=|:)\s*\S{4,})",
    "(?:\u5bc6\u7801|\u53e3\u4ee4)\\s*(?:\u662f|[:=\uff1a])\\s*\\S{4,}",
)
_RULES: tuple[tuple[Finding, re.Pattern[str], Callable[[str], bool]], ...] = (
    (Finding.KEY, re.compile("|".join(_KEYS)), _always),
    (Finding.EMAIL, re.compile(r"[A-Za-z0-9._%+-]{1,64}@[A-Za-z0-9-]{1,63}(?:\.[A-Za-z0-9-]{1,63}){1,8}"), _always),
    (Finding.IBAN, re.compile(r"\b[A-Z]{2}[0-9]{2}(?: ?[A-Z0-9]){11,30}\b", re.IGNORECASE), _is_iban),
    (Finding.CARD, re.compile(r"(?<![0-9])[0-9](?:[ -]?[0-9]){12,18}(?![0-9])"), _is_card),
    (Finding.PHONE, re.compile(r"(?<![0-9A-Za-z])(?:\+|00)[0-9](?:[ ()/-]{0,2}[0-9]){7,14}(?![0-9])"), _is_phone),
)


@dataclass(frozen=True, slots=True)
class Checked:
    """Text after its check, masked where that is policy; `refused` forbids it, `personal` raises its sensitivity."""

    text: str
    refused: Finding | None = None
    personal: bool = False


def check(text: str, policy: Mapping[Finding, Treatment] = DEFAULTS) -> Checked:
    """Looks for every class; what is masked is replaced by its name, e.g. [card]."""
    personal = False
    for finding, pattern, is_one in _RULES:
        treatment = policy.get(finding, Treatment.REFUSE)
        found = [match for match in pattern.finditer(text) if is_one(match.group())]
        if not found:
            continue
        if treatment is Treatment.REFUSE:
            return Checked("", refused=finding)
        if treatment is Treatment.STORE:
            personal = True
            continue
        for match in reversed(found):
            text = f"{text[:match.start()]}[{finding}]{text[match.end():]}"
    return Checked(text, personal=personal)


def policy_from_text(text: str) -> dict[Finding, Treatment]:
    """`card=refuse,email=mask` on top of the defaults. Raises ValueError."""
    policy = dict(DEFAULTS)
    for pair in filter(None, (part.strip() for part in text.split(","))):
        name, _, treatment = pair.partition("=")
        policy[Finding(name.strip())] = Treatment(treatment.strip())
    return policy
