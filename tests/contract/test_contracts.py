"""What outside clients rely on: reasons, scopes, names, golden bytes."""

from __future__ import annotations

import hashlib
import importlib
import pkgutil
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import creditmesh
import pytest
from creditmesh.common.v1 import error_reason_pb2
from creditmesh.events.v1 import charge_requested_pb2
from google.protobuf.descriptor import ServiceDescriptor

import llm_service.domain.errors
import memory_worker.domain.errors
import tokenstore_service.domain.errors
from llm_service.domain.call import Billing, CallRecord, CallState
from llm_service.domain.chat import Message as ChatMessage
from llm_service.domain.chat import Role, TextPart
from llm_service.domain.conversation import MessageState, Place, StoredMessage, Turn
from llm_service.transport import servicers as llm_servicers
from llm_service.usecases.ports import TurnEnd
from llm_service.wire.events import TURN_COMPLETED, TURNS_TOPIC, charge_requested_to_bytes, turn_completed_to_bytes
from memory_worker.domain.job import Job, JobState
from memory_worker.transport import servicers as memory_servicers
from memory_worker.wire import turns as memory_turns
from memory_worker.wire.turns import TurnReader, turn_event_from_bytes
from metering.charge import Quote, Rates
from metering.usage import Usage
from servicekit.core.clock import SystemClock
from servicekit.core.errors import DomainError
from servicekit.rpc.auth import unknown_scopes
from servicekit.rpc.status import CODE_OF_REASON
from servicekit.rpc.validation import RequestValidator
from servicekit.sealing import Sealer
from tokenstore_service.domain.commands import RecordCharge
from tokenstore_service.transport import servicers as tokenstore_servicers
from tokenstore_service.wire.charges import CHARGES_TOPIC, command_from_record

NOW = datetime(2026, 6, 1, tzinfo=UTC)


def all_errors(kind: type[DomainError] = DomainError) -> list[type[DomainError]]:
    return [kind, *(error for child in kind.__subclasses__() for error in all_errors(child))]


def declared_services() -> dict[str, ServiceDescriptor]:
    found: dict[str, ServiceDescriptor] = {}
    for module in pkgutil.walk_packages(creditmesh.__path__, "creditmesh."):
        if module.name.endswith("_pb2"):
            services = importlib.import_module(module.name).DESCRIPTOR.services_by_name
            found.update({service.full_name: service for service in services.values()})
    return found


def served_scopes() -> dict[str, dict[str, str | None]]:
    nothing: Any = None
    served = [
        *tokenstore_servicers.services(nothing), *llm_servicers.services(*[nothing] * 8),
        *memory_servicers.services(nothing),
    ]
    return {service.name: dict(service.scopes) for service in served}


def test_reasons_of_the_contract_the_table_and_the_errors_are_the_same() -> None:
    contract = {name.removeprefix("ERROR_REASON_") for name in error_reason_pb2.ErrorReason.keys()} - {"UNSPECIFIED"}
    assert contract == set(CODE_OF_REASON)
    assert llm_service.domain.errors
    assert memory_worker.domain.errors
    assert tokenstore_service.domain.errors
    raised = {error.reason for error in all_errors() if error.__module__.split(".")[0] != "tests"}
    assert raised <= contract


def test_every_declared_rpc_is_served_and_has_a_scope() -> None:
    declared = {name: set(service.methods_by_name) for name, service in declared_services().items()}
    assert declared == {name: set(scopes) for name, scopes in served_scopes().items()}
    scopes = [scope for service in served_scopes().values() for scope in service.values()]
    assert unknown_scopes(scopes) == set()
    assert all(scopes), "no RPC of ours is open"


@pytest.mark.parametrize(("service", "names"), [
    ("llm.v1.LLMService", "Generate Stream Embed GetCall ListCalls CancelCall CountTokens"),
    ("llm.v1.ModelService",
     "RegisterModel GetModel ListModels UpdateModel DeleteModel ActivateModel DeactivateModel TestModel WatchModels"),
    ("llm.v1.ConversationService",
     "CreateConversation GetConversation ListConversations UpdateConversation DeleteConversation ListMessages"
     " SendMessage"),
    ("memory.v1.MemoryService",
     "SubmitTurns GetJob ListJobs RetryJob Retrieve ListItems GetItem CreateItem UpdateItem DeleteItem RestoreItem"
     " ListAudit ExplainDecision ReplayJob GetSettings UpdateSettings EraseUser GetIndexStatus"),
    ("tokenstore.v1.BalanceService", "GetBalance BatchGetBalances WatchBalance"),
    ("tokenstore.v1.HoldService", "OpenHolds ExtendHolds ReleaseHolds GetHold ListHolds"),
    ("tokenstore.v1.ChargeService", "RecordCharges RecordUsage ListChargeIssues ResolveChargeIssue"),
    ("tokenstore.v1.LedgerService",
     "ListTransactions GetTransaction ExportTransactions AdjustBalance ReverseTransaction GetConsumption ExplainCharge"
     " VerifyLedger GetBalanceAt"),
    ("tokenstore.v1.OrderService",
     "ListProducts CreateProduct UpdateProduct CreateOrder GetOrder ListOrders ConfirmPayment CloseOrder RefundOrder"),
    ("tokenstore.v1.PricingService", "CreatePriceRule UpdatePriceRule ListPriceRules GetPriceRule Quote SimulatePricing"),
    ("tokenstore.v1.BudgetService", "SetBudget ListBudgets DeleteBudget"),
    ("tokenstore.v1.RewardService", "SetRewardRule ListRewardRules GrantReward"),
])
def test_names_that_outside_clients_use(service: str, names: str) -> None:
    assert set(names.split()) <= set(served_scopes()[f"creditmesh.{service}"])


RECORD = CallRecord(
    call_id=UUID("01900000-0000-7000-8000-000000000001"), billing=Billing("alice", "r1", "chat", "c1"), model="pro",
    provider="LOCAL", price_provider="LOCAL", upstream_model="local", state=CallState.SETTLED, streamed=True,
    hold_micros=1, max_output_tokens=1, quote=Quote("default", 1, Rates(input_pico=3, output_pico=5)),
    usage=Usage(input_tokens=10, cached_input_tokens=2, output_tokens=20), created_at=NOW, ended_at=NOW,
)
GOLDEN_HEX = (
    "0a2430313930303030302d303030302d373030302d383030302d30303030303030303030303112243031393030303030"
    "2d303030302d373030302d383030302d3030303030303030303030311a05616c696365220272312a046368617432054c"
    "4f43414c3a0370726f4208080a1002201440014a110a0764656661756c7410011a04080320055206088097f3d0066202"
    "6331"
)


def test_the_charge_event_keeps_its_bytes() -> None:
    """Field numbers and types of an event that may wait in an outbox across an upgrade."""
    payload = charge_requested_to_bytes(RECORD)
    expected = charge_requested_pb2.ChargeRequested(
        event_id=str(RECORD.call_id), call_id=str(RECORD.call_id), user_id="alice", request_id="r1", scene="chat",
        provider="LOCAL", model="pro", conversation_id="c1",
        usage={"input_tokens": 10, "cached_input_tokens": 2, "output_tokens": 20, "source": 1},
        quote={"price_rule_id": "default", "price_rule_version": 1, "rates": {"input_pico": 3, "output_pico": 5}},
        occurred_at=NOW,
    )
    assert payload == expected.SerializeToString()
    assert payload.hex() == GOLDEN_HEX


def test_what_llm_service_sends_tokenstore_understands() -> None:
    charge = command_from_record(
        CHARGES_TOPIC, charge_requested_to_bytes(RECORD), [("ce_type", b"credit.charge.requested")], validator=RequestValidator(),
        now=SystemClock().now(),
    )
    assert isinstance(charge, RecordCharge)
    assert (charge.event_id, charge.call_id) == (str(RECORD.call_id), RECORD.call_id)
    assert (charge.usage, charge.quote, charge.occurred_at) == (RECORD.usage, RECORD.quote, NOW)
    assert (charge.user_id, charge.request_id, charge.conversation_id) == ("alice", "r1", "c1")


GOLDEN_TURN = "be38d81d412572014badf592b0387ac3e73e306bfa751a8e92e296ff9d9791a8"


def turn_end() -> TurnEnd:
    place = Place(0, 0)
    sent = StoredMessage(
        UUID(int=2), place, ChatMessage(Role.USER, (TextPart("hi"),)), MessageState.COMPLETE, NOW, "r1"
    )
    turn = Turn("alice", UUID(int=1), UUID(int=3), (sent,), asked=(sent,), memory_ids=("m1",), remembers=True)
    return TurnEnd(turn, ChatMessage(Role.ASSISTANT, (TextPart("é" * 20_000),)), 1, "o200k")


def test_what_llm_service_says_of_a_turn_memory_worker_understands() -> None:
    payload = turn_completed_to_bytes(turn_end(), RECORD, Sealer([]))
    assert hashlib.sha256(payload).hexdigest() == GOLDEN_TURN
    event = turn_event_from_bytes(payload)
    RequestValidator().check(event)
    turn = TurnReader(Sealer([])).turn_of(event, now=SystemClock().now())
    assert (turn.user_id, turn.message_id, turn.occurred_at) == ("alice", str(UUID(int=3)), NOW)
    assert [each.role for each in turn.text.said] == [Role.USER, Role.ASSISTANT]
    assert turn.text.said[1].text == "é" * 8192, "long texts are cut between letters"
    assert turn.text.memory_ids == ("m1",)
    assert not event.sealed
    assert (memory_turns.TURNS_TOPIC, memory_turns.TURN_COMPLETED) == (TURNS_TOPIC, TURN_COMPLETED)


def test_a_sealed_turn_is_read_by_who_has_the_key_and_nobody_else() -> None:
    old, new = bytes(32), bytes([1]) * 32
    payload = turn_completed_to_bytes(turn_end(), RECORD, Sealer([new]))
    assert "ééé".encode() not in payload
    event = turn_event_from_bytes(payload)
    RequestValidator().check(event)
    now = SystemClock().now()
    reader = TurnReader(Sealer([old, new]))
    turn = reader.turn_of(event, now=now)
    assert turn.text.said == (), "it stays sealed until it is worked on"
    job = Job(
        user_id=turn.user_id, job_id=UUID(int=9), conversation_id="c", message_id=turn.message_id,
        state=JobState.RUNNING, tries=1, occurred_at=now, created_at=now, turn=turn.text,
    )
    opened = reader.opened(job)
    assert opened.turn.said[1].text == "é" * 8192
    assert opened.turn.memory_ids == ("m1",)
    with pytest.raises(memory_worker.domain.errors.TurnSealed):
        TurnReader(Sealer([old])).turn_of(event, now=now)
    event.message_id = "another"
    with pytest.raises(memory_turns.UndecodableTurn):
        reader.turn_of(event, now=now)
    with pytest.raises(memory_turns.UndecodableTurn):
        reader.opened(replace(job, user_id="mallory"))
