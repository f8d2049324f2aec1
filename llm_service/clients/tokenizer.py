"""OpenAI's vocabularies, counted by the compiled part of bpe-openai alone.

Its Python part is left out: when imported it reads every vocabulary into dictionaries that counting does not need (a
second of every start, and 70 to 100 MB that stay), and it refuses texts of a million characters or 200 000 tokens.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
from collections.abc import Callable
from functools import cache
from typing import Any

PACKAGE = "bpe_openai"


@cache
def _compiled() -> Any:
    package = importlib.util.find_spec(PACKAGE)
    places = list(package.submodule_search_locations or ()) if package else []
    spec = importlib.machinery.PathFinder.find_spec(f"{PACKAGE}._bindings", places)
    if spec is None or spec.loader is None:
        raise ImportError(f"the compiled part of {PACKAGE} is not there")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@cache
def counter_of(encoding: str) -> Callable[[str], int]:
    """Counts tokens of texts in o200k_base, cl100k_base, ...; marks such as <|endoftext|> count as the text they are.
    Takes half a second and 40 MB when it is first asked for. Raises ValueError for an unknown name."""
    count: Callable[[str], int] = _compiled().tokenizer_for_encoding(encoding).count

    def tolerant(text: str) -> int:
        try:
            return count(text)
        except UnicodeEncodeError:  # half of a surrogate pair
            return count(text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"))

    return tolerant
