"""llm_service over gRPC: answers that follow a schema, and vectors; each paid by the user, under its own request_id."""

from __future__ import annotations

from collections.abc import Sequence

import grpc
import grpc.aio
from creditmesh.common.v1 import billing_pb2
from creditmesh.llm.v1 import call_pb2, chat_pb2, llm_service_pb2, llm_service_pb2_grpc
from grpc_status import rpc_status

from memory_worker.usecases.memory_ports import Embedded, Floors
from memory_worker.usecases.ports import ModelAnswer, ModelCallFailed, ModelQuestion
from servicekit.rpc.channel import TokenMetadata
from servicekit.rpc.status import error_info_of
from servicekit.telemetry import tracing

SECONDS = 120.0
COST_SECONDS = 10.0
EMBED_SCENE = "memory.embed"
MOST_OUTPUT_TOKENS = 1500
_NO_CREDIT = frozenset({"INSUFFICIENT_CREDIT", "BUDGET_EXCEEDED"})
_GONE = frozenset({"REQUEST_FINISHED"})
_PERMANENT = frozenset({"UPSTREAM_REJECTED", "CONTEXT_TOO_LONG", "INVALID_FIELD", "IDEMPOTENCY_CONFLICT",
                        "PERMISSION_DENIED", "UNAUTHENTICATED"})


def failure_of(error: grpc.aio.AioRpcError) -> ModelCallFailed:
    """What an error means for a job. What we do not know may pass."""
    status = rpc_status.from_call(error)
    info = error_info_of(status) if status else None
    reason = info.reason if info else error.code().name
    for kind, reasons in (("NO_CREDIT", _NO_CREDIT), ("GONE", _GONE), ("PERMANENT", _PERMANENT)):
        if reason in reasons:
            return ModelCallFailed(kind, reason)
    return ModelCallFailed("TRANSIENT", reason)


class GrpcModels:
    """Implements Models."""

    def __init__(self, channel: grpc.aio.Channel, token: TokenMetadata) -> None:
        self._stub = llm_service_pb2_grpc.LLMServiceStub(channel)
        self._token = token

    async def ask(self, question: ModelQuestion) -> ModelAnswer:
        request = llm_service_pb2.GenerateRequest(
            billing=billing_pb2.BillingContext(
                user_id=question.user_id, request_id=question.request_id, scene=question.scene
            ),
            model=question.alias, max_output_tokens=MOST_OUTPUT_TOKENS, temperature=0.0,
            messages=[
                chat_pb2.Message(role=chat_pb2.ROLE_SYSTEM, content=[chat_pb2.Content(text=question.instructions)]),
                chat_pb2.Message(role=chat_pb2.ROLE_USER, content=[chat_pb2.Content(text=question.data)]),
            ],
            response_format=chat_pb2.ResponseFormat(json_schema=chat_pb2.JsonSchemaFormat(
                name=question.schema_name, schema=question.schema, strict=True
            )),
        )
        try:
            metadata = (*self._token(), *tracing.metadata_of(question.traceparent))
            answer = await self._stub.Generate(request, timeout=SECONDS, metadata=metadata)
        except grpc.aio.AioRpcError as error:
            raise failure_of(error) from error
        text = "".join(
            part.text for output in answer.outputs if output.finish_reason == chat_pb2.FINISH_REASON_STOP
            for part in output.message.content
        )
        usage = answer.usage
        return ModelAnswer(text, usage.input_tokens + usage.output_tokens, answer.charge.credit_micros, answer.call_id)

    async def cost(self, user_id: str, request_id: str) -> ModelAnswer | None:
        request = llm_service_pb2.GetCallRequest(user_id=user_id, request_id=request_id)
        try:
            call = (await self._stub.GetCall(request, timeout=COST_SECONDS, metadata=self._token())).call
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.NOT_FOUND:
                return None
            raise failure_of(error) from error
        if call.state == call_pb2.CALL_STATE_RUNNING:
            raise ModelCallFailed("TRANSIENT", "CALL_RUNNING")
        tokens = call.usage.input_tokens + call.usage.output_tokens if call.HasField("charge") else 0
        return ModelAnswer("", tokens, call.charge.credit_micros, call.call_id)


class LlmEmbedder:
    """Implements Embedder by an alias. The vectors of one alias count as alike. For another model, give it another
    alias (MEMORY_EMBEDDING_ALIAS): the old one serves until all items have the new one's vectors. When it can only be
    put behind the same alias, change MEMORY_EMBEDDING_VERSION, and similarity is blind until then."""

    def __init__(self, channel: grpc.aio.Channel, token: TokenMetadata, *, alias: str, version: str) -> None:
        self._stub = llm_service_pb2_grpc.LLMServiceStub(channel)
        self._token = token
        self._alias = alias
        self.name = f"llm:{alias}:{version}"
        self.charges = True
        self.floors = Floors(recall=0.3, retrieve=0.25)

    async def embed(
        self, user_id: str, texts: Sequence[str], *, request_id: str, skip_charge: bool = False
    ) -> Embedded:
        request = llm_service_pb2.EmbedRequest(
            billing=billing_pb2.BillingContext(
                user_id=user_id, request_id=request_id, scene=EMBED_SCENE, skip_charge=skip_charge
            ),
            model=self._alias, inputs=texts,
        )
        try:
            answer = await self._stub.Embed(request, timeout=SECONDS, metadata=self._token())
        except grpc.aio.AioRpcError as error:
            raise failure_of(error) from error
        made = [tuple(each.values) for each in sorted(answer.embeddings, key=lambda each: each.index)]
        return Embedded(made, answer.usage.input_tokens, answer.charge.credit_micros, answer.call_id)
