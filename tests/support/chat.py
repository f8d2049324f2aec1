"""A conversation as a test talks in it."""

from __future__ import annotations

from typing import Any

from creditmesh.llm.v1 import conversation_service_pb2 as pb

from tests.support.mesh import Mesh


class Chat:
    """One conversation of one user."""

    def __init__(self, mesh: Mesh, user: str, **fields: Any) -> None:
        self.mesh = mesh
        self.user = user
        answer = mesh.conversations.CreateConversation(pb.CreateConversationRequest(user_id=user, **fields), timeout=10)
        self.id: str = answer.conversation.conversation_id

    @property
    def now(self) -> Any:
        request = pb.GetConversationRequest(user_id=self.user, conversation_id=self.id)
        return self.mesh.conversations.GetConversation(request, timeout=10).conversation

    def request(self, text: str = "", **fields: Any) -> pb.SendMessageRequest:
        content = [{"text": text}] if text else []
        return pb.SendMessageRequest(user_id=self.user, conversation_id=self.id, content=content, **fields)

    def stream(self, text: str = "", **fields: Any) -> Any:
        return self.mesh.conversations.SendMessage(self.request(text, **fields), timeout=20)

    def say(self, text: str = "", **fields: Any) -> tuple[Any, str, Any]:
        """Started, the whole text, finished."""
        events = list(self.stream(text, **fields))
        said = "".join(event.delta.text for event in events if event.HasField("delta"))
        return events[0].started, said, events[-1].finished

    def messages(self, *, page_size: int = 500, **fields: Any) -> list[Any]:
        request = pb.ListMessagesRequest(
            user_id=self.user, conversation_id=self.id, page_size=page_size, **fields
        )
        found: list[Any] = []
        while True:
            answer = self.mesh.conversations.ListMessages(request, timeout=10)
            found += answer.messages
            if not answer.next_page_token:
                return found
            request.page_token = answer.next_page_token

    def texts(self, **fields: Any) -> list[str]:
        return ["".join(part.text for part in each.content) for each in self.messages(**fields)]

    def update(self, *paths: str, **fields: Any) -> Any:
        request = pb.UpdateConversationRequest(
            conversation=pb.Conversation(user_id=self.user, conversation_id=self.id, **fields),
            update_mask={"paths": list(paths)},
        )
        return self.mesh.conversations.UpdateConversation(request, timeout=10).conversation

    def delete(self) -> None:
        request = pb.DeleteConversationRequest(user_id=self.user, conversation_id=self.id)
        self.mesh.conversations.DeleteConversation(request, timeout=10)

    def booked(self) -> int:
        """What the ledger says that this conversation cost."""
        return -sum(each.amount_micros for each in self.mesh.transactions(self.user) if each.conversation_id == self.id)
