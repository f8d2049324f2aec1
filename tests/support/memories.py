"""Memories as a test makes and reads them."""

from __future__ import annotations

import time
from typing import Any

from creditmesh.events.v1 import turn_completed_pb2
from creditmesh.memory.v1 import memory_pb2, memory_service_pb2

from tests.support.mesh import Mesh

ENDED = (memory_pb2.JOB_STATE_DONE, memory_pb2.JOB_STATE_DEAD)


def turn(user: str, text: str, message_id: str, **fields: Any) -> turn_completed_pb2.TurnCompleted:
    return turn_completed_pb2.TurnCompleted(
        user_id=user, conversation_id="c", message_id=message_id,
        messages=[{"role": "ROLE_USER", "text": text}, {"role": "ROLE_ASSISTANT", "text": "I see."}], **fields,
    )


def submit(mesh: Mesh, *turns: turn_completed_pb2.TurnCompleted) -> list[str]:
    request = memory_service_pb2.SubmitTurnsRequest(turns=turns)
    return [each.job_id for each in mesh.memories.SubmitTurns(request, timeout=10).results]


def job_of(mesh: Mesh, job_id: str) -> Any:
    return mesh.memories.GetJob(memory_service_pb2.GetJobRequest(job_id=job_id), timeout=10).job


def worked(mesh: Mesh, job_id: str, *, seconds: float = 40.0, until: tuple[int, ...] = ENDED) -> Any:
    """The job once it has ended, or is in one of those states."""
    give_up_at = time.monotonic() + seconds
    while time.monotonic() < give_up_at:
        job = job_of(mesh, job_id)
        if job.state in until:
            return job
        time.sleep(0.05)
    raise AssertionError(f"the job does not end: {job_of(mesh, job_id)}")


def remember(mesh: Mesh, user: str, text: str, message_id: str, **fields: Any) -> Any:
    """The job of a turn, worked."""
    return worked(mesh, submit(mesh, turn(user, text, message_id, **fields))[0])


def items(mesh: Mesh, user: str, **fields: Any) -> list[Any]:
    request = memory_service_pb2.ListItemsRequest(user_id=user, page_size=2, **fields)
    found: list[Any] = []
    while True:
        answer = mesh.memories.ListItems(request, timeout=10)
        found += answer.items
        if not answer.next_page_token:
            return found
        request.page_token = answer.next_page_token


def contents(mesh: Mesh, user: str, **fields: Any) -> list[str]:
    """Oldest first."""
    return [each.content for each in reversed(items(mesh, user, **fields))]


def index_status(mesh: Mesh, *, compare: bool = False) -> Any:
    return mesh.memories.GetIndexStatus(memory_service_pb2.GetIndexStatusRequest(compare=compare), timeout=30)


def retrieve(mesh: Mesh, user: str, query: str, **fields: Any) -> list[Any]:
    request = memory_service_pb2.RetrieveRequest(user_id=user, query=query, **fields)
    return list(mesh.memories.Retrieve(request, timeout=10).items)
