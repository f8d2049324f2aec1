"""Families of tokenizers: which one a model has, and how many tokens a text is there.

o200k and cl100k are counted exactly. The others are estimated from the exact o200k count and from how many digits and
letters of some scripts the text has. The weights come from 3 280 texts (English, code, JSON, Chinese, emoji, Russian,
Japanese, Arabic, hexadecimal, base64, numbers, and mixtures) counted with real tokenizers of these families: Claude's
published one (that of its second generation), DeepSeek V3, Qwen, Mistral's Tekken. ESTIMATE is the median regression,
UPPER the regression at a quantile above 0.999, both linear. There was no tokenizer of Llama and Gemini to be had
offline: theirs are the weights of the nearest vocabulary, with more room.
"""

from __future__ import annotations

import functools
import math
import re
from dataclasses import dataclass

O200K = "o200k"
CL100K = "cl100k"
TOKENS_PER_MESSAGE = 4
"""What a message weighs in a prompt beside its text."""
EXACT = {O200K: "o200k_base", CL100K: "cl100k_base"}

_DIGITS = re.compile("[0-9]")
_CJK = re.compile("[\u2e80-\u9fff\uac00-\ud7af\uf900-\ufaff\U00020000-\U0003ffff]")
_GREEK_CYRILLIC = re.compile("[\u0370-\u052f]")
_PICTURES = re.compile("[\u2000-\u2bff\ufe00-\ufe0f\U0001f000-\U0001faff]")
_OTHERS = re.compile("[\u0530-\u1fff\ua000-\uabff\ufb50-\ufdff]")


@dataclass(frozen=True, slots=True)
class Weights:
    """Tokens for each o200k token, and more for each character of a kind, and for each text."""

    token: float
    digit: float = 0.0
    cjk: float = 0.0
    cyrillic: float = 0.0
    picture: float = 0.0
    other: float = 0.0
    text: float = 0.0

    def of(self, o200k: int, text: str) -> int:
        total = self.token * o200k + self.text
        if self.digit:
            total += self.digit * len(_DIGITS.findall(text))
        if not text.isascii():
            total += (
                self.cjk * len(_CJK.findall(text)) + self.cyrillic * len(_GREEK_CYRILLIC.findall(text))
                + self.picture * len(_PICTURES.findall(text)) + self.other * len(_OTHERS.findall(text))
            )
        return max(0, math.ceil(total))


ESTIMATE: dict[str, Weights] = {
    "claude": Weights(1.034, -0.027, 0.212, 0.264, 0.605, 0.837),
    "deepseek": Weights(1.016, -0.008, -0.180, 0.066, -0.073, 0.096),
    "qwen": Weights(0.995, 0.593, -0.130, 0.082, -0.406, 0.088),
    "mistral": Weights(1.000, 0.600, 0.157, 0.090, 1.709, 0.013),
    "llama": Weights(1.000, 0.000, 0.200, 0.150, 0.700, 0.500),
    "gemini": Weights(1.000, 0.500, 0.000, 0.100, 0.300, 0.100),
}
UPPER: dict[str, Weights] = {
    "claude": Weights(1.38, 0.0, 0.300, 0.180, 0.300, 0.750, 1.0),
    "deepseek": Weights(1.27, 0.0, 0.0, 0.0, 0.0, 0.020, 1.0),
    "qwen": Weights(1.08, 0.600, 0.0, 0.080, 0.320, 0.110, 1.0),
    "mistral": Weights(1.30, 0.480, 0.102, 0.030, 2.380, 0.0, 1.0),
    "llama": Weights(1.10, 0.0, 0.600, 0.200, 1.150, 0.650, 2.0),
    "gemini": Weights(1.30, 0.600, 0.200, 0.200, 1.200, 0.650, 3.0),
}
FAMILIES = (*EXACT, *ESTIMATE)

_NAMES = (
    (re.compile(r"claude"), "claude"),
    (re.compile(r"deepseek"), "deepseek"),
    (re.compile(r"qwen|qwq"), "qwen"),
    (re.compile(r"mistral|mixtral|codestral|ministral|devstral|magistral"), "mistral"),
    (re.compile(r"llama"), "llama"),
    (re.compile(r"gemini|gemma"), "gemini"),
    (re.compile(r"gpt-4o|gpt-4\.|gpt-5|chatgpt|(^|/)o[1-9]|gpt-oss"), O200K),
    (re.compile(r"gpt-4|gpt-3\.5|text-embedding"), CL100K),
)


@functools.lru_cache(maxsize=1024)
def family_of(upstream_model: str, chosen: str = "") -> str:
    """`chosen` when it is given, else by the model's name; o200k when the name says nothing."""
    if chosen:
        return chosen
    name = upstream_model.lower()
    return next((family for pattern, family in _NAMES if pattern.search(name)), O200K)


def tokenizer_name(family: str) -> str:
    """As CountTokens tells it."""
    return EXACT.get(family) or f"{family} (estimated)"
