"""A world of facts that change, a judge that errs, and what a decision policy makes of it. Pure; figures per 1 000 facts."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from uuid import UUID

from memory_worker.domain.decision import CONSEQUENTIAL, Action, Relation, Verdict, agreed, decide

USERS = 50
FACTS_OF_A_USER = 42
TOPICS = 12
CANDIDATES = 5


@dataclass
class Damage:
    """What went wrong, counts."""

    facts: int = 0
    wrong_closes: int = 0
    contradictions: int = 0
    duplicates: int = 0
    lost: int = 0

    def per_thousand(self) -> dict[str, float]:
        return {
            name: round(1000 * getattr(self, name) / max(1, self.facts), 1)
            for name in ("wrong_closes", "contradictions", "duplicates", "lost")
        }


@dataclass
class Belief:
    """An item: what it says of which topics. The value of a topic is what its newest fact says."""

    item_id: UUID
    says: dict[int, int]


def run(policy: str, flips: float, *, seed: int) -> Damage:
    """Facts (topic, value) of each user, one after the other; a true judge is flipped with probability `flips`. An error
    of the comparer (half of the flips) is UNKNOWN: `set` asks again, `legacy` takes it for unrelated. `set-3` is `set`
    where three judgements have to agree on what has consequences."""
    chance, damage = random.Random(seed), Damage()
    for user in range(USERS):
        active: list[Belief] = []
        truth: dict[int, int] = {}
        for number in range(FACTS_OF_A_USER):
            topic = chance.randrange(TOPICS)
            value = truth.get(topic, 0) if chance.random() < 0.35 else chance.randrange(5)
            truth[topic] = value
            damage.facts += 1
            _remember(policy, flips, chance, damage, active, topic, value, UUID(int=user * 10_000 + number))
        for topic, value in truth.items():
            holders = [belief for belief in active if belief.says.get(topic) == value]
            damage.lost += not holders
            damage.duplicates += max(0, len(holders) - 1)
            damage.contradictions += sum(topic in belief.says and belief.says[topic] != value for belief in active)
    return damage


def _remember(
    policy: str, flips: float, chance: random.Random, damage: Damage, active: list[Belief], topic: int, value: int,
    item_id: UUID,
) -> None:
    rules, _, needed = policy.partition("-")
    near = sorted(active, key=lambda belief: topic not in belief.says)[:CANDIDATES]
    while True:
        verdicts = []
        for rank, belief in enumerate(near):
            heard = [_judge(belief, topic, value, rank, flips, chance)]
            if needed and heard[0].relation in CONSEQUENTIAL:
                while (common := agreed([each.relation for each in heard], int(needed))) is None:
                    heard.append(_judge(belief, topic, value, rank, flips, chance))
                heard = [each for each in heard if each.relation is common] or [replace(heard[0], relation=Relation.UNKNOWN)]
            verdicts.append(heard[0])
        plan = decide(rules, verdicts)
        if plan.action is not Action.RETRY:
            break
    by_id = {belief.item_id: belief for belief in active}
    for closed in plan.superseded:
        belief = by_id[closed]
        damage.wrong_closes += topic not in belief.says or belief.says[topic] == value
        active.remove(belief)
    if plan.action is Action.ADD:
        active.append(Belief(item_id, {topic: value}))
    elif plan.action is Action.MERGE and plan.target is not None:
        by_id[plan.target].says[topic] = value


def _judge(
    belief: Belief, topic: int, value: int, rank: int, flips: float, chance: random.Random
) -> Verdict:
    relation = Relation.UNRELATED
    if topic in belief.says:
        relation = Relation.DUPLICATE if belief.says[topic] == value else Relation.CONFLICT
    if chance.random() < flips:
        wrong = [each for each in Relation if each not in (relation, Relation.UNKNOWN)]
        relation = Relation.UNKNOWN if chance.random() < 0.5 else chance.choice(wrong)
    merged = f"{belief.says} and {topic}={value}" if relation is Relation.UPDATE else ""
    return Verdict(belief.item_id, 1, 0.9 - 0.1 * rank, relation, merged)
