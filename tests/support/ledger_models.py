"""Models with a ledger whose acknowledgements get lost, come late, or come twice; answers are a matter of rules."""

from __future__ import annotations

import json
import random
from collections import Counter
from dataclasses import replace

from memory_worker.usecases.extraction import EXTRACT_SCENE
from memory_worker.usecases.ports import ModelAnswer, ModelCallFailed, ModelQuestion


class LedgerModels:
    """Implements Models as llm_service does: a request_id is answered once and charged once, whatever is heard of it."""

    def __init__(self, *, seed: int, lost: float, late: float, doubled: float) -> None:
        self._chance = random.Random(seed)
        self._lost, self._late, self._doubled = lost, late, doubled
        self._answers: dict[str, ModelAnswer] = {}
        self._events: list[tuple[str, str, int]] = []
        self.ledger: dict[str, tuple[str, int]] = {}
        self.asked: Counter[str] = Counter()

    async def ask(self, question: ModelQuestion) -> ModelAnswer:
        self.asked[question.request_id] += 1
        answer = self._answers.get(question.request_id)
        if answer is None:
            credit = self._chance.randrange(1, 1000)
            answer = ModelAnswer(_text_of(question), credit * 3, credit, f"call-{len(self._answers)}")
            self._answers[question.request_id] = answer
            event = (answer.call_id, question.user_id, credit)
            self._events += [event] * (1 + (self._chance.random() < self._doubled))
            if self._chance.random() >= self._late:
                self.settle()
        if self._chance.random() < self._lost:
            raise ModelCallFailed("TRANSIENT", "UNAVAILABLE")
        return answer

    async def cost(self, user_id: str, request_id: str) -> ModelAnswer | None:
        found = self._answers.get(request_id)
        return found and replace(found, text="")

    def settle(self) -> None:
        """What is on its way reaches the ledger, which knows a call by its identity."""
        self._chance.shuffle(self._events)
        for call_id, user_id, credit in self._events:
            self.ledger.setdefault(call_id, (user_id, credit))
        self._events.clear()


def _text_of(question: ModelQuestion) -> str:
    data = json.loads(question.data)
    if question.scene == EXTRACT_SCENE:
        said = " ".join(each["text"] for each in data["turn"] if each["speaker"] == "user")
        return json.dumps({"thoughts": "", "facts": [
            {"type": "fact", "content": part.strip(), "title": "", "confidence": 0.9, "importance": 0.5,
             "sensitivity": 0, "explicit": True, "valid_until": None} for part in said.split(".") if part.strip()
        ]})
    new = data["new"]["content"]
    return json.dumps({"verdicts": [
        {"index": number, "reason": "", "relation": _relation(new, each["content"]), "merged": ""}
        for number, each in enumerate(data["known"])
    ]})


def _relation(new: str, known: str) -> str:
    """"Key: value" sentences: of the same key another value is a conflict."""
    return "conflict" if new.split(":")[0] == known.split(":")[0] and new != known else "unrelated"
