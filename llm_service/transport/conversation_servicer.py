"""creditmesh.llm.v1.ConversationService: convert in, call the use case, convert out."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any
from uuid import UUID

import grpc.aio
from creditmesh.llm.v1 import conversation_service_pb2, conversation_service_pb2_grpc

from llm_service.domain.conversation import ConversationStatus
from llm_service.usecases.manage_conversations import Conversations
from llm_service.usecases.send_message import MessageSender
from llm_service.wire.conversations import (
    changes_from_proto,
    conversation_to_proto,
    draft_from_proto,
    send_request_from_proto,
    stored_message_to_proto,
    turn_event_to_proto,
)
from servicekit.core.errors import InvalidField
from servicekit.core.ids import IdSource
from servicekit.rpc.call_info import current_call
from servicekit.rpc.server import Service

Context = grpc.aio.ServicerContext[Any, Any]
DEFAULT_PAGE_SIZE = 50


class ConversationServicer(conversation_service_pb2_grpc.ConversationServiceServicer):
    """Thin."""

    def __init__(self, conversations: Conversations, sender: MessageSender, ids: IdSource) -> None:
        self._conversations = conversations
        self._sender = sender
        self._ids = ids

    async def CreateConversation(
        self, request: conversation_service_pb2.CreateConversationRequest, context: Context
    ) -> conversation_service_pb2.CreateConversationResponse:
        made = await self._conversations.create(draft_from_proto(request), idempotency_key=request.idempotency_key)
        return conversation_service_pb2.CreateConversationResponse(conversation=conversation_to_proto(made))

    async def GetConversation(
        self, request: conversation_service_pb2.GetConversationRequest, context: Context
    ) -> conversation_service_pb2.GetConversationResponse:
        found = await self._conversations.get(request.user_id, UUID(request.conversation_id))
        return conversation_service_pb2.GetConversationResponse(conversation=conversation_to_proto(found))

    async def ListConversations(
        self, request: conversation_service_pb2.ListConversationsRequest, context: Context
    ) -> conversation_service_pb2.ListConversationsResponse:
        found, token = await self._conversations.list_conversations(
            request.user_id, title_contains=request.title_contains,
            status=ConversationStatus(request.status) if request.status else None,
            page_size=request.page_size or DEFAULT_PAGE_SIZE, page_token=request.page_token,
        )
        return conversation_service_pb2.ListConversationsResponse(
            conversations=[conversation_to_proto(each) for each in found], next_page_token=token
        )

    async def UpdateConversation(
        self, request: conversation_service_pb2.UpdateConversationRequest, context: Context
    ) -> conversation_service_pb2.UpdateConversationResponse:
        conversation = request.conversation
        if not conversation.user_id:
            raise InvalidField.of("conversation.user_id", "must not be empty")
        try:
            conversation_id = UUID(conversation.conversation_id)
        except ValueError:
            raise InvalidField.of("conversation.conversation_id", "must be a UUID") from None
        changes = changes_from_proto(conversation, request.update_mask.paths)
        changed = await self._conversations.update(conversation.user_id, conversation_id, changes)
        return conversation_service_pb2.UpdateConversationResponse(conversation=conversation_to_proto(changed))

    async def DeleteConversation(
        self, request: conversation_service_pb2.DeleteConversationRequest, context: Context
    ) -> conversation_service_pb2.DeleteConversationResponse:
        await self._conversations.delete(request.user_id, UUID(request.conversation_id))
        return conversation_service_pb2.DeleteConversationResponse()

    async def ListMessages(
        self, request: conversation_service_pb2.ListMessagesRequest, context: Context
    ) -> conversation_service_pb2.ListMessagesResponse:
        conversation_id, size = UUID(request.conversation_id), request.page_size or DEFAULT_PAGE_SIZE
        if request.all_branches:
            found, token = await self._conversations.list_all_messages(
                request.user_id, conversation_id, page_size=size, page_token=request.page_token
            )
        else:
            found, token = await self._conversations.list_messages(
                request.user_id, conversation_id, page_size=size, page_token=request.page_token,
                head=UUID(request.head_message_id) if request.head_message_id else None,
            )
        return conversation_service_pb2.ListMessagesResponse(
            messages=[stored_message_to_proto(each, str(conversation_id)) for each in found], next_page_token=token
        )

    async def SendMessage(
        self, request: conversation_service_pb2.SendMessageRequest, context: Context
    ) -> AsyncIterator[conversation_service_pb2.SendMessageResponse]:
        call = current_call()
        asked = send_request_from_proto(
            request, deadline_seconds=call.deadline, traceparent=call.traceparent, ids=self._ids
        )
        async with aclosing(self._sender.send(asked)) as events:  # type: ignore[type-var]  # it is a generator
            async for event in events:
                yield turn_event_to_proto(event)


def conversation_service(conversations: Conversations, sender: MessageSender, ids: IdSource) -> Service:
    """What is served, with the scope of each RPC."""
    return Service(
        "creditmesh.llm.v1.ConversationService",
        dict.fromkeys(
            (
                "CreateConversation", "GetConversation", "ListConversations", "UpdateConversation",
                "DeleteConversation", "ListMessages", "SendMessage",
            ),
            "llm.call",
        ),
        lambda server: conversation_service_pb2_grpc.add_ConversationServiceServicer_to_server(
            ConversationServicer(conversations, sender, ids), server
        ),
    )
