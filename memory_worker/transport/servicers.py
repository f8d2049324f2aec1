"""creditmesh.memory.v1.MemoryService: convert in, call the use case, convert out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from uuid import UUID

import grpc.aio
from creditmesh.memory.v1 import memory_service_pb2 as pb
from creditmesh.memory.v1 import memory_service_pb2_grpc

from memory_worker.domain.errors import ItemNotFound
from memory_worker.domain.item import ItemStatus, MemoryType
from memory_worker.domain.job import JobState
from memory_worker.usecases.embedding import Embedders
from memory_worker.usecases.manage_items import ItemKeeper
from memory_worker.usecases.memory_ports import DecisionStore, IndexAway, ItemStore, Upkeep
from memory_worker.usecases.ports import JobQueue
from memory_worker.usecases.replay_jobs import JobReplayer
from memory_worker.usecases.retrieve import Query, Retriever
from memory_worker.usecases.vector_index import IndexKeeper
from memory_worker.wire.memories import (
    audit_to_proto,
    changes_from_proto,
    decision_to_proto,
    item_to_proto,
    job_to_proto,
    replayed_to_proto,
    retrieved_to_proto,
    settings_from_proto,
    settings_to_proto,
)
from memory_worker.wire.turns import TurnReader, UndecodableTurn
from servicekit.core.clock import Clock
from servicekit.core.errors import DependencyUnavailable, InvalidField
from servicekit.core.ids import IdSource
from servicekit.core.page_token import decode_page_token, decode_time_token, encode_page_token
from servicekit.rpc.call_info import current_call
from servicekit.rpc.server import Service
from servicekit.rpc.times import timestamp_from_proto, timestamp_to_proto

Context = grpc.aio.ServicerContext[Any, Any]
DEFAULT_PAGE_SIZE = 50


@dataclass(frozen=True, slots=True)
class MemoryParts:
    """What the servicer works with."""

    jobs: JobQueue
    turns: TurnReader
    items: ItemStore
    decisions: DecisionStore
    upkeep: Upkeep
    embedders: Embedders
    index: IndexKeeper | None
    keeper: ItemKeeper
    replayer: JobReplayer
    retriever: Retriever
    wake: Callable[[], None]
    clock: Clock
    ids: IdSource


class MemoryServicer(memory_service_pb2_grpc.MemoryServiceServicer):
    """Thin."""

    def __init__(self, parts: MemoryParts) -> None:
        self._parts = parts

    # Jobs

    async def SubmitTurns(self, request: pb.SubmitTurnsRequest, context: Context) -> pb.SubmitTurnsResponse:
        now = self._parts.clock.now()
        try:
            turns = [self._parts.turns.turn_of(each, now=now) for each in request.turns]
        except UndecodableTurn as error:
            raise InvalidField.of("turns", str(error)) from None
        results = await self._parts.jobs.submit(turns)
        self._parts.wake()
        return pb.SubmitTurnsResponse(results=[
            pb.SubmittedTurn(job_id=str(job_id or ""), duplicate=known) for job_id, known in results
        ])

    async def GetJob(self, request: pb.GetJobRequest, context: Context) -> pb.GetJobResponse:
        job = await self._parts.keeper.job(UUID(request.job_id), request.user_id)
        decisions = await self._parts.decisions.decisions_of(job.user_id, job.job_id)
        return pb.GetJobResponse(job=job_to_proto(job, decisions))

    async def ListJobs(self, request: pb.ListJobsRequest, context: Context) -> pb.ListJobsResponse:
        question = ("jobs", request.user_id, request.state)
        before, size = _before(request.page_token, question), request.page_size or DEFAULT_PAGE_SIZE
        found = await self._parts.jobs.list_jobs(
            request.user_id, state=JobState(request.state) if request.state else None, before=before, limit=size + 1
        )
        token = encode_page_token([str(found[size - 1].job_id)], question=question) if len(found) > size else ""
        return pb.ListJobsResponse(jobs=[job_to_proto(each) for each in found[:size]], next_page_token=token)

    async def RetryJob(self, request: pb.RetryJobRequest, context: Context) -> pb.RetryJobResponse:
        job = await self._parts.keeper.retry(UUID(request.job_id))
        self._parts.wake()
        return pb.RetryJobResponse(job=job_to_proto(job))

    async def ReplayJob(self, request: pb.ReplayJobRequest, context: Context) -> pb.ReplayJobResponse:
        turn = None
        if request.HasField("turn"):
            try:
                turn = self._parts.turns.turn_of(request.turn, now=self._parts.clock.now())
            except UndecodableTurn as error:
                raise InvalidField.of("turn", str(error)) from None
        replay = await self._parts.replayer.replay(
            UUID(request.job_id), policy=request.policy, judge_again=request.judge_again, turn=turn,
            billed_to=request.billed_to,
        )
        return pb.ReplayJobResponse(
            decisions=[replayed_to_proto(each) for each in replay.decisions], prompts=replay.prompts,
            calls=replay.calls, tokens=replay.tokens, credit_micros=replay.credit_micros,
        )

    # Items

    async def Retrieve(self, request: pb.RetrieveRequest, context: Context) -> pb.RetrieveResponse:
        found = await self._parts.retriever.retrieve(Query(
            request.user_id, request.query, tuple(MemoryType(each) for each in request.types), request.limit,
            request.token_budget,
            timestamp_from_proto(request.as_of, field="as_of") if request.HasField("as_of") else None,
            request_id=f"memory:retrieve:{self._parts.ids.new_id()}",
        ))
        return pb.RetrieveResponse(
            items=[retrieved_to_proto(each, explain=request.explain) for each in found.items], degraded=found.degraded
        )

    async def ListItems(self, request: pb.ListItemsRequest, context: Context) -> pb.ListItemsResponse:
        moment = timestamp_from_proto(request.as_of, field="as_of") if request.HasField("as_of") else None
        question = ("items", request.user_id, request.status, request.type, moment)
        before, size = _before(request.page_token, question), request.page_size or DEFAULT_PAGE_SIZE
        kind = MemoryType(request.type) if request.type else None
        if moment is not None:
            found = await self._parts.items.items_as_of(
                request.user_id, moment, kind=kind, before=before, limit=size + 1
            )
        else:
            found = await self._parts.items.items(
                request.user_id, status=ItemStatus(request.status or ItemStatus.ACTIVE), kind=kind, before=before,
                limit=size + 1,
            )
        token = encode_page_token([str(found[size - 1].item_id)], question=question) if len(found) > size else ""
        return pb.ListItemsResponse(items=[item_to_proto(each) for each in found[:size]], next_page_token=token)

    async def GetItem(self, request: pb.GetItemRequest, context: Context) -> pb.GetItemResponse:
        moment = timestamp_from_proto(request.as_of, field="as_of") if request.HasField("as_of") else None
        found = await self._parts.items.item(request.user_id, UUID(request.item_id), as_of=moment)
        if found is None:
            raise ItemNotFound("there is no such memory")
        return pb.GetItemResponse(item=item_to_proto(found))

    async def CreateItem(self, request: pb.CreateItemRequest, context: Context) -> pb.CreateItemResponse:
        item = request.item
        if not 0 < len(item.user_id) <= 64 or not item.user_id.isprintable():
            raise InvalidField.of("item.user_id", "must have 1 to 64 printable characters")
        if not item.type:
            raise InvalidField.of("item.type", "must be given")
        made = await self._parts.keeper.create(
            item.user_id, MemoryType(item.type), item.content, title=item.title, confidence=item.confidence,
            importance=item.importance, sensitivity=item.sensitivity, actor=current_call().principal.name,
            idempotency_key=request.idempotency_key,
        )
        return pb.CreateItemResponse(item=item_to_proto(made))

    async def UpdateItem(self, request: pb.UpdateItemRequest, context: Context) -> pb.UpdateItemResponse:
        item = request.item
        changes = changes_from_proto(item, request.update_mask.paths)
        changed = await self._parts.keeper.update(
            item.user_id, _uuid_of(item.item_id, "item.item_id"), changes, version=item.version or None,
            actor=current_call().principal.name,
        )
        return pb.UpdateItemResponse(item=item_to_proto(changed))

    async def DeleteItem(self, request: pb.DeleteItemRequest, context: Context) -> pb.DeleteItemResponse:
        deleted = await self._parts.keeper.delete(
            request.user_id, UUID(request.item_id), actor=current_call().principal.name
        )
        return pb.DeleteItemResponse(item=item_to_proto(deleted))

    async def RestoreItem(self, request: pb.RestoreItemRequest, context: Context) -> pb.RestoreItemResponse:
        restored = await self._parts.items.restore(
            request.user_id, UUID(request.item_id), actor=current_call().principal.name
        )
        return pb.RestoreItemResponse(item=item_to_proto(restored))

    async def ListAudit(self, request: pb.ListAuditRequest, context: Context) -> pb.ListAuditResponse:
        question = ("audit", request.user_id, request.item_id)
        key = decode_time_token(request.page_token, question=question)
        before = None
        if key is not None:
            item_id, _, version = key[1].partition("/")
            before = (key[0], _uuid_of(item_id, "page_token"), int(version or 0))
        size = request.page_size or DEFAULT_PAGE_SIZE
        found = await self._parts.items.audit(
            request.user_id, item_id=UUID(request.item_id) if request.item_id else None, before=before, limit=size + 1
        )
        token = ""
        if len(found) > size:
            last = found[size - 1]
            token = encode_page_token(
                [last.at.isoformat(), f"{last.item.item_id}/{last.item.version}"], question=question
            )
        return pb.ListAuditResponse(entries=[audit_to_proto(each) for each in found[:size]], next_page_token=token)

    async def ExplainDecision(
        self, request: pb.ExplainDecisionRequest, context: Context
    ) -> pb.ExplainDecisionResponse:
        decision, text = await self._parts.keeper.explain(
            request.user_id, decision_id=UUID(request.decision_id) if request.decision_id else None,
            item_id=UUID(request.item_id) if request.item_id else None,
        )
        return pb.ExplainDecisionResponse(decision=decision_to_proto(decision, request.user_id), explanation=text)

    # Users

    async def GetSettings(self, request: pb.GetSettingsRequest, context: Context) -> pb.GetSettingsResponse:
        return pb.GetSettingsResponse(settings=settings_to_proto(await self._parts.items.settings(request.user_id)))

    async def UpdateSettings(self, request: pb.UpdateSettingsRequest, context: Context) -> pb.UpdateSettingsResponse:
        settings = settings_from_proto(request.settings)
        await self._parts.items.set_settings(settings)
        return pb.UpdateSettingsResponse(settings=settings_to_proto(settings))

    async def EraseUser(self, request: pb.EraseUserRequest, context: Context) -> pb.EraseUserResponse:
        erased = await self._parts.items.erase(request.user_id)
        index = self._parts.index
        return pb.EraseUserResponse(
            erased=erased, erased_at=timestamp_to_proto(self._parts.clock.now()),
            index_pending=index is not None and not await index.forget(request.user_id),
        )

    async def GetIndexStatus(self, request: pb.GetIndexStatusRequest, context: Context) -> pb.GetIndexStatusResponse:
        embedders, index = self._parts.embedders, self._parts.index
        if request.compare and index is not None:
            try:
                await index.compare()
            except IndexAway as away:
                raise DependencyUnavailable(f"the vector database ({away})") from away
        status = await self._parts.upkeep.index_status(embedders.serving.name)
        filling, drift = embedders.filling, index.drift if index is not None else None
        answer = pb.GetIndexStatusResponse(
            items=status.items, indexed=status.indexed, embedder=embedders.serving.name,
            filling=filling.name if filling is not None else "", waiting=status.waiting,
            index=pb.VECTOR_INDEX_PGVECTOR if index is None else pb.VECTOR_INDEX_MILVUS,
        )
        if drift is not None:
            answer.drift.CopyFrom(pb.IndexDrift(
                missing=drift.missing, stale=drift.stale, orphaned=drift.orphaned,
                compared_at=timestamp_to_proto(drift.at),
            ))
        return answer


def _before(token: str, question: tuple[object, ...]) -> UUID | None:
    key = decode_page_token(token, question=question, types=(str,))
    return _uuid_of(str(key[0]), "page_token") if key else None


def _uuid_of(text: str, field: str) -> UUID:
    try:
        return UUID(text)
    except ValueError:
        raise InvalidField.of(field, "must be a UUID") from None


READ = (
    "GetJob", "ListJobs", "Retrieve", "ListItems", "GetItem", "ListAudit", "ExplainDecision", "GetSettings",
)
WRITE = (
    "SubmitTurns", "RetryJob", "ReplayJob", "CreateItem", "UpdateItem", "DeleteItem", "RestoreItem", "UpdateSettings",
)
ADMIN = ("EraseUser", "GetIndexStatus")


def services(parts: MemoryParts) -> list[Service]:
    """What this server serves, with the scope of each RPC."""
    return [Service(
        "creditmesh.memory.v1.MemoryService",
        {
            **dict.fromkeys(READ, "memory.read"), **dict.fromkeys(WRITE, "memory.write"),
            **dict.fromkeys(ADMIN, "memory.admin"),
        },
        lambda server: memory_service_pb2_grpc.add_MemoryServiceServicer_to_server(MemoryServicer(parts), server),
    )]
