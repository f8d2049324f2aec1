"""creditmesh.tokenstore.v1.RewardService."""

from __future__ import annotations

from creditmesh.tokenstore.v1 import reward_service_pb2, reward_service_pb2_grpc

from tokenstore_service.transport.books import Books, Context, actor, size_of
from tokenstore_service.usecases import reward
from tokenstore_service.wire.balances import balance_to_proto
from tokenstore_service.wire.orders import reward_rule_from_proto, reward_rule_to_proto
from tokenstore_service.wire.transactions import transaction_to_proto


class RewardServicer(reward_service_pb2_grpc.RewardServiceServicer):
    """Credit that is earned."""

    def __init__(self, books: Books) -> None:
        self._books = books

    async def SetRewardRule(
        self, request: reward_service_pb2.SetRewardRuleRequest, context: Context
    ) -> reward_service_pb2.SetRewardRuleResponse:
        draft = reward_rule_from_proto(request.reward_rule, now=self._books.clock.now())
        rule = await reward.set_reward_rule(self._books.catalog, draft, idempotency_key=request.idempotency_key)
        return reward_service_pb2.SetRewardRuleResponse(reward_rule=reward_rule_to_proto(rule))

    async def ListRewardRules(
        self, request: reward_service_pb2.ListRewardRulesRequest, context: Context
    ) -> reward_service_pb2.ListRewardRulesResponse:
        rules, token = await reward.list_reward_rules(
            self._books.catalog, request.source, page_size=size_of(request), page_token=request.page_token
        )
        return reward_service_pb2.ListRewardRulesResponse(
            reward_rules=[reward_rule_to_proto(rule) for rule in rules], next_page_token=token
        )

    async def GrantReward(
        self, request: reward_service_pb2.GrantRewardRequest, context: Context
    ) -> reward_service_pb2.GrantRewardResponse:
        booked = await reward.grant_reward(
            self._books.catalog, self._books.writer, event_id=request.event_id, user_id=request.user_id,
            source=request.source, source_ref_id=request.source_ref_id, actor=actor(),
        )
        return reward_service_pb2.GrantRewardResponse(
            transaction=transaction_to_proto(booked.entry), balance=balance_to_proto(booked.account)
        )
