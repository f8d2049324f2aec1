"""The command line's own parts: the chat, on grpcio-testing's channel, and models.yaml."""

from __future__ import annotations

import io
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import grpc_testing
import pytest
from creditmesh.common.v1 import billing_pb2
from creditmesh.llm.v1 import chat_pb2, llm_service_pb2, llm_service_pb2_grpc, model_service_pb2
from creditmesh.tokenstore.v1 import balance_service_pb2, balance_service_pb2_grpc

from llm_service.cli.chat import ChatSession
from llm_service.cli.model_file import ModelFileError, changes_between, read_model_file
from llm_service.wire.models import deployment_from_proto, deployment_to_proto

CALLS = llm_service_pb2.DESCRIPTOR.services_by_name["LLMService"]
BALANCES = balance_service_pb2.DESCRIPTOR.services_by_name["BalanceService"]


class Chat:
    """A session on a channel whose other end is the test."""

    def __init__(self) -> None:
        self.channel = grpc_testing.channel([CALLS, BALANCES], grpc_testing.strict_real_time())
        self.out = io.StringIO()
        calls: Any = llm_service_pb2_grpc.LLMServiceStub(self.channel)
        balances: Any = balance_service_pb2_grpc.BalanceServiceStub(self.channel)
        self.session = ChatSession(calls, balances, "alice", self.out)
        self._pool = ThreadPoolExecutor(1)

    def answer(self, line: str, reply: Callable[[Any, Any], None]) -> str:
        """Says a line, lets the test answer the stream, returns what was shown."""
        done = self._pool.submit(self.session.handle, line)
        _, request, stream = self.channel.take_unary_stream(CALLS.methods_by_name["Stream"])
        reply(request, stream)
        assert done.result(10)
        shown = self.out.getvalue()
        self.out.seek(0)
        self.out.truncate()
        return shown


def well(text: str) -> Callable[[Any, Any], None]:
    def reply(_request: Any, stream: Any) -> None:
        stream.send_initial_metadata(())
        stream.send_response(llm_service_pb2.StreamResponse(started={"call_id": "c"}))
        for word in text.split():
            stream.send_response(llm_service_pb2.StreamResponse(delta={"text": f"{word} "}))
        stream.send_response(llm_service_pb2.StreamResponse(finished={
            "finish_reason": chat_pb2.FINISH_REASON_STOP, "usage": {"input_tokens": 10, "output_tokens": 5},
            "charge": {"credit_micros": 1_234_500, "status": billing_pb2.CHARGE_STATUS_CHARGED},
        }))
        stream.terminate((), grpc.StatusCode.OK, "")

    return reply


def test_a_chat_streams_remembers_and_counts() -> None:
    chat = Chat()
    asked: list[Any] = []

    def reply(request: Any, stream: Any) -> None:
        asked.append(request)
        well("Hello there")(request, stream)

    shown = chat.answer("hi", reply)
    assert shown.startswith("Hello there ")
    assert "10 + 5 tokens, 1.2345 credits" in shown
    chat.session.handle("/model max")
    chat.session.handle("/system be brief")
    chat.answer("again", reply)
    assert (asked[0].model, asked[1].model) == ("", "max")
    assert [message.role for message in asked[1].messages] == [
        chat_pb2.ROLE_SYSTEM, chat_pb2.ROLE_USER, chat_pb2.ROLE_ASSISTANT, chat_pb2.ROLE_USER
    ]
    chat.session.handle("/cost")
    assert "2 answers, 30 tokens, 2.469 credits" in chat.out.getvalue()
    chat.session.handle("/new")
    assert chat.session.messages == []
    chat.session.handle("/nonsense")
    assert "there is no /nonsense" in chat.out.getvalue()
    assert not chat.session.handle("/quit")


def test_an_error_is_shown_and_what_was_not_answered_is_forgotten() -> None:
    chat = Chat()

    def refuse(_request: Any, stream: Any) -> None:
        stream.terminate((), grpc.StatusCode.RESOURCE_EXHAUSTED, "the account does not have the credit")

    shown = chat.answer("hi", refuse)
    assert "RESOURCE_EXHAUSTED: the account does not have the credit" in shown
    assert chat.session.messages == []


def test_the_prompt_has_the_balance_or_says_that_it_is_not_known() -> None:
    chat = Chat()
    for code, shown in ((grpc.StatusCode.OK, "alice 98.5 credits (pro) > "), (grpc.StatusCode.UNAVAILABLE, "alice ? credits (pro) > ")):
        done = ThreadPoolExecutor(1).submit(chat.session.prompt)
        _, _, call = chat.channel.take_unary_unary(BALANCES.methods_by_name["GetBalance"])
        call.terminate(balance_service_pb2.GetBalanceResponse(balance={"available_micros": 98_500_000}), (), code, "")
        assert done.result(10) == shown
    chat.session.balances = None
    assert chat.session.prompt() == "alice (pro) > "


FILE = """
models:
  - alias: pro
    provider: OPENAI_CHAT
    base_url: https://api.example.org/v1
    upstream_model: big-1
    api_key: ${BIG_KEY}
    active: true
    limits: {rpm: 60}
    timeouts: {first_token: 5s}
    default_params: {frequency_penalty: 0.5}
  - {alias: pro, provider: PROVIDER_LOCAL, upstream_model: local, priority: 1, active: true}
"""
KEY = "sk-0123456789abcdef"


def registered(text: str = FILE) -> list[Any]:
    """As the server would tell them: with ids, keys masked."""
    found = []
    for number, model in enumerate(read_model_file(text, {"BIG_KEY": KEY})):
        kept = deployment_to_proto(deployment_from_proto(model))
        kept.model_id = str(number)
        found.append(kept)
    return found


def test_a_file_that_was_applied_changes_nothing() -> None:
    wanted = read_model_file(FILE, {"BIG_KEY": KEY})
    assert changes_between(wanted, [], prune=False, keys=False)[0][0].kind == "+"
    assert changes_between(wanted, registered(), prune=True, keys=False) == ([], 2)


def test_a_change_names_its_fields_and_shows_no_key() -> None:
    changed = FILE.replace("rpm: 60", "rpm: 90").replace("priority: 1", "priority: 2")
    wanted = read_model_file(changed, {"BIG_KEY": "sk-another-key-of-7777"})
    first, second = changes_between(wanted, registered(), prune=False, keys=False)[0]
    assert (first.kind, first.fields, first.model_id) == ("~", ("api_key", "limits"), "0")
    assert "sk-...cdef -> sk-...7777" in first.text()
    assert KEY not in first.text()
    assert second.fields == ("priority",)
    assert "1 -> 2" in second.text()
    (again,), unchanged = changes_between(read_model_file(FILE, {"BIG_KEY": KEY}), registered(), prune=False, keys=True)
    assert (again.fields, unchanged) == (("api_key",), 1)


def test_what_the_file_does_not_name_goes_only_when_asked() -> None:
    extra = [*registered(), model_service_pb2.Model(model_id="9", alias="max", upstream_model="x", provider=1)]
    wanted = read_model_file(FILE, {"BIG_KEY": KEY})
    (left,), _ = changes_between(wanted, extra, prune=False, keys=False)
    assert (left.kind, left.is_done) == ("?", False)
    (gone,), _ = changes_between(wanted, extra, prune=True, keys=False)
    assert (gone.kind, gone.model_id) == ("-", "9")


@pytest.mark.parametrize(("text", "problem"), [
    ("models: [", "is no YAML"), ("- a", "must be a mapping"), ("models: {}", "must be a mapping"),
    ("models: [5]", "model 1: must be a mapping"), ("models: [{alias: a}]", "needs provider"),
    ("models: [{alias: a, provider: LOCAL, upstream_model: m, colour: red}]", "has no field colour"),
    ("models: [{alias: a, provider: MOON, upstream_model: m}]", "model 1"),
    ("models: [{alias: a, provider: LOCAL, upstream_model: m, priority: high}]", "model 1"),
    ("models: [{alias: a, provider: LOCAL, upstream_model: '${NOT_SET}'}]", "${NOT_SET} is not set"),
    ("models: [{alias: a, provider: LOCAL, upstream_model: m}, {alias: a, provider: LOCAL, upstream_model: m}]", "model 2: has the alias"),
])
def test_every_mistake_in_a_file_is_told(text: str, problem: str) -> None:
    with pytest.raises(ModelFileError) as caught:
        read_model_file(text, {})
    assert problem in str(caught.value)
