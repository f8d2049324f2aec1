"""The RPCs: convert in, call the use case, convert out."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any
from uuid import UUID

import grpc.aio
from creditmesh.llm.v1 import (
    llm_service_pb2,
    llm_service_pb2_grpc,
    model_service_pb2,
    model_service_pb2_grpc,
    user_policy_service_pb2,
    user_policy_service_pb2_grpc,
)

from llm_service.domain.call import CallState
from llm_service.domain.chat import Delta, Prompt
from llm_service.transport.conversation_servicer import conversation_service
from llm_service.usecases import read_calls
from llm_service.usecases.call_events import CallRequest, Started
from llm_service.usecases.manage_conversations import Conversations
from llm_service.usecases.manage_models import ModelAdministration
from llm_service.usecases.ports import CallJournal, ModelDirectory, TokenCounter, UserPolicy, UserPolicyStore
from llm_service.usecases.run_call import CallRunner
from llm_service.usecases.running_calls import RunningCalls
from llm_service.usecases.send_message import MessageSender
from llm_service.wire.calls import (
    call_request_from_proto,
    call_to_proto,
    embed_request_from_proto,
    embedded_to_proto,
    finished_to_proto,
    generated_to_proto,
    started_to_proto,
)
from llm_service.wire.chat import AnyCallRequest, delta_to_proto, messages_from_proto
from llm_service.wire.models import (
    deployment_from_proto,
    deployment_to_proto,
    model_change_to_proto,
    tested_to_proto,
    update_from_proto,
)
from llm_service.wire.user_policies import policy_from_proto, policy_to_proto
from servicekit.core.clock import Clock
from servicekit.core.errors import InvalidField
from servicekit.core.ids import IdSource
from servicekit.core.page_token import decode_page_token, encode_page_token
from servicekit.rpc.call_info import CallInfo, current_call
from servicekit.rpc.server import Service
from servicekit.rpc.validation import RequestValidator

Context = grpc.aio.ServicerContext[Any, Any]
PACKAGE = "creditmesh.llm.v1"
DEFAULT_PAGE_SIZE = 50


@dataclass(frozen=True, slots=True)
class Calls:
    """What the call servicer works with."""

    runner: CallRunner
    journal: CallJournal
    running: RunningCalls
    models: ModelDirectory
    tokens: TokenCounter
    ids: IdSource


class LLMServicer(llm_service_pb2_grpc.LLMServiceServicer):
    """creditmesh.llm.v1.LLMService."""

    def __init__(self, calls: Calls) -> None:
        self._calls = calls

    async def Generate(
        self, request: llm_service_pb2.GenerateRequest, context: Context
    ) -> llm_service_pb2.GenerateResponse:
        return generated_to_proto(await self._calls.runner.generate(self._call_request(request)))

    async def Stream(
        self, request: llm_service_pb2.StreamRequest, context: Context
    ) -> AsyncIterator[llm_service_pb2.StreamResponse]:
        async with aclosing(self._calls.runner.stream(self._call_request(request))) as events:  # type: ignore[type-var]  # it is a generator
            async for event in events:
                if isinstance(event, Delta):
                    yield delta_to_proto(event)
                elif isinstance(event, Started):
                    yield started_to_proto(event)
                else:
                    yield finished_to_proto(event)

    async def Embed(self, request: llm_service_pb2.EmbedRequest, context: Context) -> llm_service_pb2.EmbedResponse:
        call = _admitted(request)
        asked = embed_request_from_proto(
            request, deadline_seconds=call.deadline, traceparent=call.traceparent, ids=self._calls.ids
        )
        return embedded_to_proto(await self._calls.runner.generate(asked))

    def _call_request(self, request: AnyCallRequest) -> CallRequest:
        call = _admitted(request)
        return call_request_from_proto(
            request, deadline_seconds=call.deadline, traceparent=call.traceparent, ids=self._calls.ids
        )

    async def GetCall(
        self, request: llm_service_pb2.GetCallRequest, context: Context
    ) -> llm_service_pb2.GetCallResponse:
        record = await read_calls.get_call(
            self._calls.journal, self._calls.running, call_id=UUID(request.call_id) if request.call_id else None,
            user_id=request.user_id, request_id=request.request_id,
        )
        return llm_service_pb2.GetCallResponse(call=call_to_proto(record))

    async def ListCalls(
        self, request: llm_service_pb2.ListCallsRequest, context: Context
    ) -> llm_service_pb2.ListCallsResponse:
        records, token = await read_calls.list_calls(
            self._calls.journal, request.user_id, conversation_id=request.conversation_id,
            state=CallState(request.state) if request.state else None,
            page_size=request.page_size or DEFAULT_PAGE_SIZE, page_token=request.page_token,
        )
        return llm_service_pb2.ListCallsResponse(
            calls=[call_to_proto(record) for record in records], next_page_token=token
        )

    async def CancelCall(
        self, request: llm_service_pb2.CancelCallRequest, context: Context
    ) -> llm_service_pb2.CancelCallResponse:
        await read_calls.cancel_call(
            self._calls.journal, self._calls.running, call_id=UUID(request.call_id), user_id=request.user_id
        )
        return llm_service_pb2.CancelCallResponse()

    async def CountTokens(
        self, request: llm_service_pb2.CountTokensRequest, context: Context
    ) -> llm_service_pb2.CountTokensResponse:
        prompt = Prompt(messages_from_proto(request.messages))
        count = await read_calls.count_tokens(self._calls.models, self._calls.tokens, request.model, prompt)
        return llm_service_pb2.CountTokensResponse(
            input_tokens=count.input_tokens, upper_bound_tokens=count.upper_bound_tokens, tokenizer=count.tokenizer
        )


class ModelServicer(model_service_pb2_grpc.ModelServiceServicer):
    """creditmesh.llm.v1.ModelService."""

    def __init__(self, models: ModelAdministration, validator: RequestValidator) -> None:
        self._models = models
        self._validator = validator

    async def RegisterModel(
        self, request: model_service_pb2.RegisterModelRequest, context: Context
    ) -> model_service_pb2.RegisterModelResponse:
        draft = deployment_from_proto(request.model)
        added = await self._models.register(draft, idempotency_key=request.idempotency_key)
        return model_service_pb2.RegisterModelResponse(model=deployment_to_proto(added))

    async def GetModel(
        self, request: model_service_pb2.GetModelRequest, context: Context
    ) -> model_service_pb2.GetModelResponse:
        return model_service_pb2.GetModelResponse(model=deployment_to_proto(await self._models.get(request.model_id)))

    async def ListModels(
        self, request: model_service_pb2.ListModelsRequest, context: Context
    ) -> model_service_pb2.ListModelsResponse:
        models, token = await self._models.list_models(
            alias=request.alias, page_size=request.page_size or DEFAULT_PAGE_SIZE, page_token=request.page_token
        )
        return model_service_pb2.ListModelsResponse(
            models=[deployment_to_proto(each) for each in models], next_page_token=token
        )

    async def UpdateModel(
        self, request: model_service_pb2.UpdateModelRequest, context: Context
    ) -> model_service_pb2.UpdateModelResponse:
        change = update_from_proto(request.model, request.update_mask.paths, check=self._validator.check)
        changed = await self._models.change(_uuid_of(request.model.model_id), change)
        return model_service_pb2.UpdateModelResponse(model=deployment_to_proto(changed))

    async def DeleteModel(
        self, request: model_service_pb2.DeleteModelRequest, context: Context
    ) -> model_service_pb2.DeleteModelResponse:
        await self._models.delete(request.model_id)
        return model_service_pb2.DeleteModelResponse()

    async def ActivateModel(
        self, request: model_service_pb2.ActivateModelRequest, context: Context
    ) -> model_service_pb2.ActivateModelResponse:
        changed = await self._models.change(
            request.model_id, lambda model: replace(model, active=True), exclusive=request.exclusive
        )
        return model_service_pb2.ActivateModelResponse(model=deployment_to_proto(changed))

    async def DeactivateModel(
        self, request: model_service_pb2.DeactivateModelRequest, context: Context
    ) -> model_service_pb2.DeactivateModelResponse:
        changed = await self._models.change(request.model_id, lambda model: replace(model, active=False))
        return model_service_pb2.DeactivateModelResponse(model=deployment_to_proto(changed))

    async def TestModel(
        self, request: model_service_pb2.TestModelRequest, context: Context
    ) -> model_service_pb2.TestModelResponse:
        return tested_to_proto(await self._models.test(request.model_id))

    async def WatchModels(
        self, request: model_service_pb2.WatchModelsRequest, context: Context
    ) -> AsyncIterator[model_service_pb2.WatchModelsResponse]:
        async with aclosing(self._models.watch(request.alias)) as changes:  # type: ignore[type-var]  # it is a generator
            async for change in changes:
                yield model_change_to_proto(change)


class UserPolicyServicer(user_policy_service_pb2_grpc.UserPolicyServiceServicer):
    """creditmesh.llm.v1.UserPolicyService."""

    def __init__(self, policies: UserPolicyStore, clock: Clock) -> None:
        self._policies = policies
        self._clock = clock

    async def SetUserPolicy(
        self, request: user_policy_service_pb2.SetUserPolicyRequest, context: Context
    ) -> user_policy_service_pb2.SetUserPolicyResponse:
        policy = policy_from_proto(request.policy, now=self._clock.now())
        await self._policies.set_policy(policy)
        return user_policy_service_pb2.SetUserPolicyResponse(policy=policy_to_proto(policy))

    async def GetUserPolicy(
        self, request: user_policy_service_pb2.GetUserPolicyRequest, context: Context
    ) -> user_policy_service_pb2.GetUserPolicyResponse:
        policy = await self._policies.get_policy(request.user_id) or UserPolicy(request.user_id)
        return user_policy_service_pb2.GetUserPolicyResponse(policy=policy_to_proto(policy))

    async def ListUserPolicies(
        self, request: user_policy_service_pb2.ListUserPoliciesRequest, context: Context
    ) -> user_policy_service_pb2.ListUserPoliciesResponse:
        question = ("user-policies",)
        key = decode_page_token(request.page_token, question=question, types=(str,))
        size = request.page_size or DEFAULT_PAGE_SIZE
        found = await self._policies.list_policies(after=str(key[0]) if key else "", limit=size + 1)
        token = encode_page_token([found[size - 1].user_id], question=question) if len(found) > size else ""
        return user_policy_service_pb2.ListUserPoliciesResponse(
            policies=[policy_to_proto(each) for each in found[:size]], next_page_token=token
        )

    async def DeleteUserPolicy(
        self, request: user_policy_service_pb2.DeleteUserPolicyRequest, context: Context
    ) -> user_policy_service_pb2.DeleteUserPolicyResponse:
        await self._policies.delete_policy(request.user_id)
        return user_policy_service_pb2.DeleteUserPolicyResponse()


def _admitted(request: AnyCallRequest | llm_service_pb2.EmbedRequest) -> CallInfo:
    call = current_call()
    if request.billing.skip_charge:
        call.principal.require("billing.skip")
    return call


def _uuid_of(model_id: str) -> str:
    try:
        return str(UUID(model_id))
    except ValueError:
        raise InvalidField.of("model.model_id", "must be a UUID") from None


def services(
    calls: Calls, models: ModelAdministration, policies: UserPolicyStore, conversations: Conversations,
    sender: MessageSender, validator: RequestValidator, clock: Clock, ids: IdSource,
) -> list[Service]:
    """What this server serves, with the scope of each RPC."""
    return [
        Service(
            f"{PACKAGE}.LLMService",
            dict.fromkeys(
                ("Generate", "Stream", "Embed", "GetCall", "ListCalls", "CancelCall", "CountTokens"), "llm.call"
            ),
            lambda server: llm_service_pb2_grpc.add_LLMServiceServicer_to_server(LLMServicer(calls), server),
        ),
        Service(
            f"{PACKAGE}.ModelService",
            dict.fromkeys(
                (
                    "RegisterModel", "GetModel", "ListModels", "UpdateModel", "DeleteModel", "ActivateModel",
                    "DeactivateModel", "TestModel", "WatchModels",
                ),
                "models.admin",
            ),
            lambda server: model_service_pb2_grpc.add_ModelServiceServicer_to_server(
                ModelServicer(models, validator), server
            ),
        ),
        Service(
            f"{PACKAGE}.UserPolicyService",
            dict.fromkeys(("SetUserPolicy", "GetUserPolicy", "ListUserPolicies", "DeleteUserPolicy"), "models.admin"),
            lambda server: user_policy_service_pb2_grpc.add_UserPolicyServiceServicer_to_server(
                UserPolicyServicer(policies, clock), server
            ),
        ),
        conversation_service(conversations, sender, ids),
    ]
