"""How long to wait before trying again."""

from __future__ import annotations

import random
from dataclasses import dataclass, field


@dataclass(slots=True)
class Backoff:
    """Doubling waits with full jitter ("Exponential Backoff And Jitter", AWS Architecture Blog, 2015)."""

    first_seconds: float = 0.05
    most_seconds: float = 5.0
    attempt: int = 0
    _random: random.Random = field(default_factory=random.Random)

    def next_seconds(self) -> float:
        ceiling = min(self.most_seconds, self.first_seconds * 2 ** min(self.attempt, 30))
        self.attempt += 1
        return self._random.uniform(ceiling / 2, ceiling)

    def reset(self) -> None:
        self.attempt = 0
