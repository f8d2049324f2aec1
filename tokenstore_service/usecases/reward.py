"""Rewards: rules, and what events earn."""

from __future__ import annotations

from dataclasses import replace

from servicekit.core.errors import IdempotencyConflict
from servicekit.core.page_token import decode_page_token, encode_page_token
from tokenstore_service.domain.commands import Booked, GrantReward
from tokenstore_service.domain.errors import RewardRuleNotFound
from tokenstore_service.domain.reward import RewardRule
from tokenstore_service.usecases.ports import Catalog
from tokenstore_service.usecases.write_books import BookWriter


async def set_reward_rule(catalog: Catalog, draft: RewardRule, *, idempotency_key: str) -> RewardRule:
    """The next version. Raises IdempotencyConflict."""
    stored = await catalog.add_reward_rule(draft, idempotency_key=idempotency_key)
    if replace(draft, version=stored.version, created_at=stored.created_at) != stored:
        raise IdempotencyConflict("the idempotency key was used for another rule", source=stored.source)
    return stored


async def list_reward_rules(
    catalog: Catalog, source: str, *, page_size: int, page_token: str
) -> tuple[list[RewardRule], str]:
    """The newest of each source; of one source all versions, newest first."""
    question = ("rewards", source)
    key = decode_page_token(page_token, question=question, types=(str, int))
    after = (str(key[0]), int(key[1])) if key else None
    found = await catalog.reward_rules(source, after=after, limit=page_size + 1)
    if len(found) <= page_size:
        return found, ""
    last = found[page_size - 1]
    return found[:page_size], encode_page_token([last.source, last.version], question=question)


async def reward_command(
    catalog: Catalog, *, event_id: str, user_id: str, source: str, source_ref_id: str, actor: str
) -> GrantReward:
    """Raises RewardRuleNotFound."""
    rule = await catalog.reward_rule(source)
    if rule is None:
        raise RewardRuleNotFound("there is no reward for this source", source=source)
    return GrantReward(user_id=user_id, event_id=event_id, rule=rule, source_ref_id=source_ref_id, actor=actor)


async def grant_reward(
    catalog: Catalog, writer: BookWriter, *, event_id: str, user_id: str, source: str, source_ref_id: str, actor: str
) -> Booked:
    """Raises RewardRuleNotFound, IdempotencyConflict."""
    command = await reward_command(
        catalog, event_id=event_id, user_id=user_id, source=source, source_ref_id=source_ref_id, actor=actor
    )
    return await writer.apply(command, Booked)
