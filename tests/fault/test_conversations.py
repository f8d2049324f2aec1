"""kill -9 of llm_service at each step of a message: one pair, one charge, totals that are the ledger's."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import Any

import grpc
import pytest
from creditmesh.llm.v1 import conversation_service_pb2 as pb

from servicekit.core.faults import FaultPoint
from tests.support.chat import Chat
from tests.support.errors import reason_of
from tests.support.load import wait_until
from tests.support.mesh import Mesh
from tests.support.upstream import Upstream

STEPS = {
    "turn": f"{FaultPoint.AFTER_TURN_BEGUN}:1", "before-hold": f"{FaultPoint.BEFORE_HOLD}:1",
    "after-hold": f"{FaultPoint.AFTER_HOLD}:1", "stream": f"{FaultPoint.MID_STREAM}:60",
    "before-settle": f"{FaultPoint.BEFORE_SETTLE}:1", "after-settle": f"{FaultPoint.AFTER_SETTLE}:1",
    "title-hold": f"{FaultPoint.AFTER_HOLD}:2", "title-settle": f"{FaultPoint.BEFORE_SETTLE}:2",
    "title-settled": f"{FaultPoint.AFTER_SETTLE}:2",
}
TRY_AGAIN = {"REQUEST_IN_FLIGHT", "CONVERSATION_BUSY", "DEPENDENCY_UNAVAILABLE", ""}


def restarted(mesh: Mesh, fault: str = "") -> None:
    mesh.llm.start(LLM_FAULT=fault)
    mesh.wait_until_serving()


def said_at_last(chat: Chat, text: str, request_id: str) -> tuple[Any, str, Any]:
    """As a client would: the same request again until it is answered."""
    give_up_at = time.monotonic() + 60
    while True:
        try:
            return chat.say(text, request_id=request_id)
        except grpc.RpcError as error:
            assert reason_of(error) in TRY_AGAIN, error
            assert time.monotonic() < give_up_at, error
            time.sleep(0.3)


@pytest.fixture
def mesh(new_mesh: Callable[..., Mesh], upstream: Upstream) -> Mesh:
    made = new_mesh(LLM_QUEUE_SECONDS="0")
    made.start()
    made.register("pro", upstream.base_url, "ok,words=150,pause=0.01", max_output_tokens=1000)
    made.register("lite", upstream.base_url, "ok,words=3", max_output_tokens=100)
    return made


@pytest.mark.timeout(500)
def test_a_message_survives_the_death_of_its_server_at_every_step(mesh: Mesh) -> None:
    chats: dict[str, Chat] = {}
    for step in STEPS:
        mesh.credit(step, 10**9)
        chats[step] = Chat(mesh, step, title="" if step.startswith("title") else "given")
    for step, fault in STEPS.items():
        mesh.llm.kill()
        restarted(mesh, fault)
        with contextlib.suppress(grpc.RpcError):
            chats[step].say("hello", request_id="m1")
        assert mesh.llm.wait() == -9, f"{step} was not reached"
        restarted(mesh)
    for step, chat in chats.items():
        _, text, finished = said_at_last(chat, "hello", "m1")
        sent, answer = chat.messages()
        assert (sent.content[0].text, answer.content[0].text) == ("hello", text), step
        assert finished.message_id == answer.message_id, step
        assert chat.texts(all_branches=True) == ["hello", text], step
        is_cut = step in ("stream", "before-settle")  # by the sweeper, from what the heartbeats kept
        assert answer.state == (pb.MESSAGE_STATE_CUT if is_cut else pb.MESSAGE_STATE_COMPLETE), step
        assert text.count("word") >= (20 if is_cut else 150), "what was delivered is kept, to the last heartbeat"
        wait_until(lambda chat=chat: chat.now.has_title, what=f"a title after {step}", seconds=60)
    mesh.wait_for_rest()
    for step, chat in chats.items():
        now, entries = chat.now, [each for each in mesh.transactions(step) if each.conversation_id]
        scenes = ["chat", "chat.title"] if step.startswith("title") else ["chat"]
        assert sorted(each.scene for each in entries) == scenes, step
        assert now.credit_micros_total == chat.booked() > 0, step
        assert now.tokens_total == sum(each.usage.input_tokens + each.usage.output_tokens for each in entries), step
        assert (now.message_count, now.running_call_id) == (2, ""), step
        assert mesh.rows(
            mesh.llm_url, "SELECT tokens_total, credit_micros_total FROM llm.user_total WHERE user_id = %s", [step]
        ) == [(now.tokens_total, now.credit_micros_total)]
    assert mesh.findings() == []


def test_another_message_can_be_sent_once_the_dead_one_is_settled(mesh: Mesh) -> None:
    """Without the client that sent the first ever coming back."""
    mesh.credit("gone", 10**9)
    chat = Chat(mesh, "gone", title="t")
    chat.say("one")
    mesh.llm.kill()
    restarted(mesh, STEPS["after-hold"])
    with contextlib.suppress(grpc.RpcError):
        chat.say("lost", request_id="lost")
    assert mesh.llm.wait() == -9
    restarted(mesh)
    said_at_last(chat, "two", "two")
    answer = " word" * 150
    assert chat.texts() == ["one", answer, "two", answer]
    mesh.wait_for_rest()
    assert chat.now.credit_micros_total == chat.booked()
