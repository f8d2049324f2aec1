"""Input tokens of images and sound, by the formulas that the providers publish.

Sources: OpenAI, "Images and vision", section "Calculating costs" (tiles of 512 pixels, patches of 32, the table of
base and tile tokens); OpenAI, "Audio", 1 token for 100 ms of the user's sound; Anthropic, "Vision", tokens = width x
height / 750 after fitting the long edge into 1 568 pixels, at most about 1 600.
"""

from __future__ import annotations

import math
import re

AUDIO_TOKENS_PER_SECOND = 10
MOST_PATCHES = 1536
CLAUDE_LONG_EDGE = 1568
CLAUDE_MOST = 1600

# Model name, base tokens, tokens a tile.
_TILES = (
    (re.compile(r"gpt-4o-mini"), 2833, 5667),
    (re.compile(r"gpt-5(?!-mini|-nano)"), 70, 140),
    (re.compile(r"(^|/)o[13](?!-mini)"), 75, 150),
)
_DEFAULT_TILES = (85, 170)
# Model name, tokens a patch.
_PATCHES = (
    (re.compile(r"gpt-4\.1-mini|gpt-5-mini"), 1.62),
    (re.compile(r"gpt-4\.1-nano|gpt-5-nano"), 2.46),
    (re.compile(r"o4-mini"), 1.72),
)


def image_tokens(width: int, height: int, *, family: str, upstream_model: str, detail: str) -> int:
    """Pixels; 0 x 0 = not known, then the most that the formula can give."""
    name = upstream_model.lower()
    if family == "claude":
        return _claude(width, height)
    for pattern, factor in _PATCHES:
        if pattern.search(name):
            return math.ceil(_patches(width, height) * factor)
    base, tile = next(((base, tile) for pattern, base, tile in _TILES if pattern.search(name)), _DEFAULT_TILES)
    return base if detail == "low" else base + tile * _tiles(width, height)


def _claude(width: int, height: int) -> int:
    if not width or not height:
        return CLAUDE_MOST
    scale = min(1.0, CLAUDE_LONG_EDGE / max(width, height))
    return min(CLAUDE_MOST, max(1, math.ceil(width * scale * height * scale / 750)))


def _patches(width: int, height: int) -> int:
    if not width or not height:
        return MOST_PATCHES
    return min(MOST_PATCHES, math.ceil(width / 32) * math.ceil(height / 32))


def _tiles(width: int, height: int) -> int:
    """Fitted into 2 048 x 2 048, then the short side to 768."""
    if not width or not height:
        return 8
    fit = min(1.0, 2048 / max(width, height))
    width, height = round(width * fit), round(height * fit)
    shrink = min(1.0, 768 / max(1, min(width, height)))
    return math.ceil(max(1, round(width * shrink)) / 512) * math.ceil(max(1, round(height * shrink)) / 512)


def audio_tokens(seconds: float) -> int:
    return max(1, math.ceil(seconds * AUDIO_TOKENS_PER_SECOND))
