"""Conversations over the socket: pairs, branches, tools, history, totals, titles, erasure."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import grpc
import pytest
from creditmesh.llm.v1 import chat_pb2, llm_service_pb2
from creditmesh.llm.v1 import conversation_service_pb2 as pb

from tests.support.chat import Chat
from tests.support.errors import facts_of, reason_of, refused
from tests.support.load import wait_until
from tests.support.mesh import ROOT, Mesh
from tests.support.upstream import Upstream

CREDIT = 100_000_000
ANSWER = " word" * 8
Code = grpc.StatusCode


@pytest.fixture(scope="module", autouse=True)
def models(mesh: Mesh, upstream: Upstream) -> None:
    for alias, behaviour, fields in (
        ("pro", "ok", {}), ("lite", "ok,words=3", {}), ("slow", "ok,words=400,pause=0.02", {}), ("tool", "tool", {}),
        ("broken", "http-500", {}), ("cut", "close-after-3", {}),
        ("narrow", "ok", {"context_window": 400, "max_output_tokens": 64}),
    ):
        mesh.register(alias, upstream.base_url, behaviour, **{"max_output_tokens": 4096, "max_retries": 0, **fields})


@pytest.fixture
def user(mesh: Mesh, request: pytest.FixtureRequest) -> str:
    name = f"chatter-{abs(hash(request.node.nodeid)) % 10**12}"
    mesh.credit(name, CREDIT)
    return name


def at_rest(chat: Chat) -> Any:
    """The conversation once all is booked; its totals are those of the ledger."""
    chat.mesh.wait_for_rest()
    now = chat.now
    assert now.credit_micros_total == chat.booked()
    return now


def asked_of(upstream: Upstream, text: str) -> list[Any]:
    """What the model was shown, of the newest request that ends with `text`."""
    found = [body for body in upstream.requests if body["messages"][-1].get("content") == text]
    return [(each["role"], each.get("content")) for each in found[-1]["messages"]]


def test_a_message_is_one_call_one_charge_and_one_pair(mesh: Mesh, user: str) -> None:
    chat = Chat(mesh, user, model="pro", title="named", system_prompt="be kind")
    started, text, finished = chat.say("hello there", request_id="m1")
    assert text == ANSWER
    assert started.request_id == "m1"
    assert (started.history.messages, started.history.memory_use) == (0, llm_service_pb2.MEMORY_USE_UNSPECIFIED)
    sent, answer = chat.messages()
    assert [sent.role, answer.role] == [chat_pb2.ROLE_USER, chat_pb2.ROLE_ASSISTANT]
    assert chat.texts() == ["hello there", ANSWER]
    assert (sent.tokens_consumed, sent.credit_micros, sent.call_id) == (0, 0, "")
    assert answer.tokens_consumed == finished.usage.input_tokens + finished.usage.output_tokens
    assert answer.credit_micros == finished.charge.credit_micros > 0
    assert (answer.call_id, answer.message_id) == (started.call_id, finished.message_id)
    assert (sent.message_id, answer.parent_message_id) == (finished.user_message_id, sent.message_id)
    now = at_rest(chat)
    assert (now.message_count, now.tokens_total) == (2, answer.tokens_consumed)
    assert now.head_message_id == answer.message_id
    assert (now.running_call_id, now.title, now.has_title) == ("", "named", True)


def test_the_same_request_again_answers_what_is_stored_and_costs_nothing(mesh: Mesh, user: str) -> None:
    chat = Chat(mesh, user, title="t")
    first = chat.say("once", request_id="r")
    again = chat.say("once", request_id="r")
    assert again[0].replayed
    assert not first[0].replayed
    assert again[1] == first[1]
    assert (again[2].message_id, again[2].charge) == (first[2].message_id, first[2].charge)
    assert len(chat.messages()) == 2
    with refused(Code.ALREADY_EXISTS, "IDEMPOTENCY_CONFLICT"):
        chat.say("twice", request_id="r")
    assert at_rest(chat).message_count == 2


def test_the_history_goes_into_the_next_prompt(mesh: Mesh, upstream: Upstream, user: str) -> None:
    chat = Chat(mesh, user, title="t", system_prompt="be brief")
    chat.say("first words")
    started, _, _ = chat.say("history please")
    assert started.history.messages == 2
    assert asked_of(upstream, "history please") == [
        ("system", "be brief"), ("user", "first words"), ("assistant", ANSWER), ("user", "history please"),
    ]


def test_what_does_not_fit_the_window_is_left_out_oldest_first_and_told(
    mesh: Mesh, upstream: Upstream, user: str
) -> None:
    chat = Chat(mesh, user, title="t", model="narrow")
    for number in range(6):
        chat.say(f"{number} " + "lorem ipsum dolor " * 14)
    started, _, _ = chat.say("what did I say?")
    shown = asked_of(upstream, "what did I say?")
    assert started.history.dropped_messages + started.history.messages == 12
    assert started.history.dropped_messages > 0
    assert len(shown) == started.history.messages + 1
    assert shown[0][0] == "user", "a prompt does not begin with half a round"
    assert shown[-3][1].startswith("5 lorem"), "the newest are kept"
    assert len(chat.messages()) == 14, "all of it is stored"


def test_what_is_left_out_is_summarised_where_that_is_wished(mesh: Mesh, upstream: Upstream, user: str) -> None:
    chat = Chat(mesh, user, title="t", model="narrow", compact_history=True)
    for number in range(6):
        chat.say(f"{number} " + "lorem ipsum dolor " * 14)
    wait_until(lambda: chat.say("and now?")[0].history.summarised, what="a summary")
    shown = asked_of(upstream, "and now?")
    assert shown[0][0] == "system"
    assert "<summary>" in shown[0][1]
    now = at_rest(chat)
    scenes = {each.scene for each in mesh.transactions(user) if each.conversation_id == chat.id}
    assert scenes == {"chat", "chat.summary"}
    assert now.tokens_total > sum(each.tokens_consumed for each in chat.messages())


def test_a_title_is_made_once_in_the_background_and_counted(mesh: Mesh, user: str) -> None:
    chat = Chat(mesh, user)
    assert not chat.now.has_title
    chat.say("tell me of the sea")
    wait_until(lambda: chat.now.has_title, what="a title")
    assert chat.now.title == "word word word"
    chat.say("more of it")
    now = at_rest(chat)
    titles = [each for each in mesh.transactions(user) if each.scene == "chat.title"]
    assert len(titles) == 1
    tokens = titles[0].usage.input_tokens + titles[0].usage.output_tokens
    assert now.tokens_total == sum(each.tokens_consumed for each in chat.messages()) + tokens


def test_a_title_that_the_user_gives_stays(mesh: Mesh, user: str) -> None:
    chat = Chat(mesh, user)
    chat.update("title", title="mine")
    chat.say("hello")
    mesh.wait_for_rest()
    assert chat.now.title == "mine"
    assert [each.scene for each in mesh.transactions(user) if each.conversation_id] == ["chat"]


def test_two_messages_at_once_in_one_conversation(mesh: Mesh, user: str) -> None:
    chat = Chat(mesh, user, title="t", model="slow")
    running = chat.stream("first", request_id="a")
    assert next(running).HasField("started")
    with refused(Code.ABORTED, "CONVERSATION_BUSY") as error:
        chat.say("second", request_id="b")
    assert facts_of(error.value)["call_id"] == chat.now.running_call_id
    with refused(Code.ABORTED, "REQUEST_IN_FLIGHT"):
        chat.say("first", request_id="a")
    with refused(Code.ABORTED, "CONVERSATION_BUSY"):
        chat.update("head_message_id", head_message_id=chat.id)
    running.cancel()
    wait_until(lambda: not chat.now.running_call_id, what="the end of the first")
    chat.say("second", request_id="b", model="pro")
    at_rest(chat)


def test_a_client_that_leaves_keeps_what_was_delivered(mesh: Mesh, user: str) -> None:
    chat = Chat(mesh, user, title="t", model="slow")
    running = chat.stream("go on", request_id="x")
    delivered = 0
    for event in running:
        delivered += event.HasField("delta")
        if delivered == 10:
            break
    running.cancel()
    wait_until(lambda: len(chat.messages()) == 2, what="the pair")
    answer = chat.messages()[1]
    assert answer.state == pb.MESSAGE_STATE_CUT
    assert answer.finish_reason == chat_pb2.FINISH_REASON_CANCELLED
    assert 10 <= answer.content[0].text.count("word") < 400
    again = chat.say("go on", request_id="x")
    assert again[0].replayed
    assert again[1] == answer.content[0].text
    assert at_rest(chat).tokens_total == answer.tokens_consumed


def test_a_cut_stream_is_stored_as_cut(mesh: Mesh, user: str) -> None:
    chat = Chat(mesh, user, title="t", model="cut")
    _, text, finished = chat.say("go")
    assert finished.finish_reason == chat_pb2.FINISH_REASON_UPSTREAM_ERROR
    assert (chat.texts()[1], chat.messages()[1].state) == (text, pb.MESSAGE_STATE_CUT)
    at_rest(chat)


@pytest.mark.parametrize(("fields", "code", "reason"), [
    ({"model": "broken"}, Code.UNAVAILABLE, "UPSTREAM_UNAVAILABLE"),
    ({"model": "nobody"}, Code.NOT_FOUND, "MODEL_NOT_FOUND"),
])
def test_what_fails_before_its_answer_leaves_no_trace_and_can_be_tried_again(
    mesh: Mesh, user: str, fields: dict[str, str], code: grpc.StatusCode, reason: str
) -> None:
    chat = Chat(mesh, user, title="t")
    chat.say("before")
    with refused(code, reason):
        chat.say("again and again", request_id="same", **fields)
    assert not chat.now.running_call_id
    assert len(chat.messages()) == len(chat.messages(all_branches=True)) == 2
    chat.say("again and again", request_id="other")
    assert at_rest(chat).message_count == 4


def test_no_credit_no_turn(mesh: Mesh) -> None:
    chat = Chat(mesh, "penniless", title="t")
    with refused(Code.RESOURCE_EXHAUSTED, "INSUFFICIENT_CREDIT"):
        chat.say("hello", request_id="p")
    assert not chat.now.running_call_id
    assert chat.messages() == []
    mesh.credit("penniless", CREDIT)
    chat.say("hello", request_id="p")
    assert len(chat.messages()) == 2


def test_tool_rounds(mesh: Mesh, upstream: Upstream, user: str) -> None:
    tools = [chat_pb2.Tool(name="look", description="d", parameters='{"type":"object"}')]
    chat = Chat(mesh, user, title="t")
    _, _, finished = chat.say("look up", model="tool", tools=tools)
    assert finished.finish_reason == chat_pb2.FINISH_REASON_TOOL_CALLS
    asked = chat.messages()[-1]
    call_id = asked.tool_calls[0].id
    with refused(Code.FAILED_PRECONDITION, "TOOL_RESULTS_MISSING") as error:
        chat.say("never mind")
    assert facts_of(error.value)["tool_call_ids"] == call_id
    with refused(Code.INVALID_ARGUMENT, "INVALID_FIELD"):
        chat.say(tool_results=[{"tool_call_id": "other", "content": [{"text": "x"}]}])
    chat.say(tool_results=[{"tool_call_id": call_id, "content": [{"text": "blue"}]}], tools=tools)
    shown = upstream.requests[-1]["messages"]
    assert [each["role"] for each in shown] == ["user", "assistant", "tool"]
    assert json.loads(shown[1]["tool_calls"][0]["function"]["arguments"]) == {"at": "sky"}
    assert (shown[2]["tool_call_id"], shown[2]["content"]) == (call_id, "blue")
    roles = [chat_pb2.Role.Name(each.role) for each in chat.messages()]
    assert roles == ["ROLE_USER", "ROLE_ASSISTANT", "ROLE_TOOL", "ROLE_ASSISTANT"]
    with refused(Code.INVALID_ARGUMENT, "INVALID_FIELD"):
        chat.say(tool_results=[{"tool_call_id": call_id, "content": [{"text": "x"}]}])
    at_rest(chat)


def test_regenerate_and_edit_keep_the_old_branches(mesh: Mesh, upstream: Upstream, user: str) -> None:
    chat = Chat(mesh, user, title="t")
    chat.say("one")
    chat.say("two")
    old = chat.messages()
    _, _, finished = chat.say(regenerate_message_id=old[3].message_id, model="lite")
    assert finished.user_message_id == ""
    assert asked_of(upstream, "two") == [("user", "one"), ("assistant", ANSWER), ("user", "two")]
    assert chat.texts() == ["one", ANSWER, "two", " word word word"]
    assert [each.message_id for each in chat.messages(head_message_id=old[3].message_id)] == [
        each.message_id for each in old
    ]
    chat.say("another two", parent_message_id=old[1].message_id)
    assert chat.texts() == ["one", ANSWER, "another two", ANSWER]
    chat.say("another one", parent_message_id="")
    assert chat.texts() == ["another one", ANSWER]
    everything = chat.messages(all_branches=True, page_size=2)
    assert len(everything) == 9
    by_id = {each.message_id: each for each in everything}
    assert all(not each.parent_message_id or each.parent_message_id in by_id for each in everything)
    back = chat.update("head_message_id", head_message_id=old[3].message_id)
    assert back.head_message_id == old[3].message_id
    chat.say("three")
    assert chat.texts() == ["one", ANSWER, "two", ANSWER, "three", ANSWER]
    with refused(Code.INVALID_ARGUMENT, "INVALID_FIELD"):
        chat.say("x", parent_message_id=old[0].message_id)
    with refused(Code.NOT_FOUND, "MESSAGE_NOT_FOUND"):
        chat.say(regenerate_message_id=chat.id)
    now = at_rest(chat)
    assert now.message_count == 11
    assert now.tokens_total == sum(each.tokens_consumed for each in chat.messages(all_branches=True))


def test_lists_are_paged_and_searched(mesh: Mesh, user: str) -> None:
    made = [Chat(mesh, user, title=f"Chat {number} of {'Milk' if number % 2 else 'honey'}") for number in range(7)]
    made[2].say("back to this one")

    def listed(**fields: Any) -> list[str]:
        request, found = pb.ListConversationsRequest(user_id=user, page_size=3, **fields), []
        while True:
            answer = mesh.conversations.ListConversations(request, timeout=10)
            found += [each.conversation_id for each in answer.conversations]
            if not answer.next_page_token:
                return found
            request.page_token = answer.next_page_token

    ids = [chat.id for chat in made]
    assert listed() == [ids[2], *(each for each in reversed(ids) if each != ids[2])]
    assert listed(title_contains="mILK") == [ids[5], ids[3], ids[1]]
    made[0].update("status", status=pb.CONVERSATION_STATUS_ARCHIVED)
    assert listed(status=pb.CONVERSATION_STATUS_ARCHIVED) == [ids[0]]
    assert ids[0] not in listed(status=pb.CONVERSATION_STATUS_ACTIVE)
    made[0].say("hello again")
    assert listed(status=pb.CONVERSATION_STATUS_ARCHIVED) == []
    for number in range(4):
        made[0].say(f"number {number}")
    assert made[0].texts(page_size=3) == [
        text for said in ["hello again", *(f"number {n}" for n in range(4))] for text in (said, ANSWER)
    ]


def test_create_is_idempotent_and_update_changes_only_what_it_names(mesh: Mesh, user: str) -> None:
    first = Chat(mesh, user, title="t", idempotency_key="k")
    assert Chat(mesh, user, title="t", idempotency_key="k").id == first.id
    with refused(Code.ALREADY_EXISTS, "IDEMPOTENCY_CONFLICT"):
        Chat(mesh, user, title="other", idempotency_key="k")
    changed = first.update("system_prompt", "model", system_prompt="s", model="lite", title="not named")
    assert (changed.system_prompt, changed.model, changed.title) == ("s", "lite", "t")
    for paths, fields in ((["tokens_total"], {}), ([], {}), (["status"], {})):
        with refused(Code.INVALID_ARGUMENT, "INVALID_FIELD"):
            first.update(*paths, **fields)


def test_deletion_erases_the_content_and_keeps_the_books(mesh: Mesh, user: str) -> None:
    chat = Chat(mesh, user, system_prompt="canary-system-51")
    chat.say("canary-question-52", request_id="q")
    wait_until(lambda: chat.now.has_title, what="a title")
    before = at_rest(chat)
    chat.delete()
    for attempt in (lambda: chat.now, chat.messages, lambda: chat.say("more"), chat.delete):
        with refused(Code.NOT_FOUND, "CONVERSATION_NOT_FOUND"):
            attempt()
    kept = mesh.rows(mesh.llm_url, "SELECT tokens_total, credit_micros_total, title FROM llm.conversation"
                     " WHERE user_id = %s", [user])
    assert kept == [(before.tokens_total, before.credit_micros_total, "")]
    for table in ("message", "call_answer", "conversation_task"):
        assert mesh.rows(mesh.llm_url, f"SELECT count(*) FROM llm.{table} WHERE user_id = %s", [user]) == [(0,)]
    assert -sum(each.amount_micros for each in mesh.transactions(user) if each.call_id) == before.credit_micros_total


def test_reconcile_compares_the_conversations_with_the_ledger(mesh: Mesh, user: str) -> None:
    chat = Chat(mesh, user, title="t")
    chat.say("hello")
    at_rest(chat)

    def reconcile() -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "llm_service", "reconcile", user, "--target", mesh.tokenstore_address], cwd=ROOT,
            env={**os.environ, **mesh.llm.environ}, capture_output=True, text=True, timeout=60, check=False,
        )

    agreeing = reconcile()
    assert (agreeing.returncode, agreeing.stdout) == (0, "1 conversations compared with the ledger, 0 differ\n")
    mesh.execute(
        mesh.llm_url, "UPDATE llm.conversation SET credit_micros_total = credit_micros_total + 1 WHERE user_id = %s", [user]
    )
    differing = reconcile()
    assert differing.returncode == 1
    assert chat.id in differing.stdout
    assert "1 differ" in differing.stdout


def test_another_user_sees_nothing(mesh: Mesh, user: str) -> None:
    chat = Chat(mesh, user, title="t")
    chat.say("private")
    head = chat.now.head_message_id
    chat.user = "somebody-else"
    mesh.credit("somebody-else", CREDIT)
    for attempt in (
        lambda: chat.now, chat.messages, lambda: chat.say("hi"), chat.delete, lambda: chat.update("title", title="x"),
        lambda: chat.say(regenerate_message_id=head),
    ):
        with refused(Code.NOT_FOUND, "CONVERSATION_NOT_FOUND"):
            attempt()


@pytest.mark.parametrize("fields", [
    {}, {"content": [{"text": "a"}], "tool_results": [{"tool_call_id": "t", "content": [{"text": "x"}]}]},
    {"content": [{"text": "a"}], "parent_message_id": "nonsense"}, {"regenerate_message_id": "nonsense"},
    {"tool_results": [{"tool_call_id": "t", "content": []}]}, {"content": [{"text": "a"}], "conversation_id": "x"},
    {"content": [{"text": "a"}], "min_output_tokens": 5, "max_output_tokens": 4},
])
def test_bad_input_is_refused(mesh: Mesh, user: str, fields: dict[str, Any]) -> None:
    chat = Chat(mesh, user, title="t")
    request = pb.SendMessageRequest(**{"user_id": user, "conversation_id": chat.id, **fields})
    with pytest.raises(grpc.RpcError) as error:
        list(mesh.conversations.SendMessage(request, timeout=10))
    assert reason_of(error.value) == "INVALID_FIELD"
    assert chat.messages() == []
