"""Usage events, prices of units, issues, simulation, budgets: over a socket."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable
from typing import Any
from uuid import uuid4

import grpc
import grpc.aio
import pytest
from creditmesh.llm.v1 import llm_service_pb2
from creditmesh.tokenstore.v1 import (
    budget_service_pb2,
    charge_service_pb2,
    hold_service_pb2_grpc,
    ledger_service_pb2,
    pricing_service_pb2,
    transaction_pb2,
)

from tests.support.errors import facts_of, refused
from tests.support.load import wait_until
from tests.support.mesh import Mesh, generate_request, hold_request

B, C, L, P, T = (
    budget_service_pb2, charge_service_pb2, llm_service_pb2, pricing_service_pb2, ledger_service_pb2
)
MINUTE = "speech_minute"


@pytest.fixture
def user(mesh: Mesh) -> str:
    name = f"usage-{uuid4()}"
    mesh.credit(name, 10**9)
    return name


def price(mesh: Mesh, key: str, **fields: Any) -> Any:
    values = {"currency": "CNY", "credits_per_currency_unit": 100, "scene": "usage", **fields}
    request = P.CreatePriceRuleRequest(price_rule=values, idempotency_key=key)
    return mesh.prices.CreatePriceRule(request, timeout=10).price_rule


def use(mesh: Mesh, user: str, event: str, **fields: Any) -> Any:
    values = {
        "event_id": event, "user_id": user, "product_id": MINUTE, "usage_amount": "2.5", "unit_type": "minute", **fields
    }
    return mesh.charges.RecordUsage(C.RecordUsageRequest(usages=[values]), timeout=10).results[0]


def issues(mesh: Mesh, user: str, **fields: Any) -> list[Any]:
    return list(mesh.charges.ListChargeIssues(C.ListChargeIssuesRequest(user_id=user, **fields), timeout=10).issues)


def resolve(mesh: Mesh, issue: Any, action: Any, note: str = "") -> Any:
    return mesh.charges.ResolveChargeIssue(
        C.ResolveChargeIssueRequest(issue_id=issue.issue_id, action=action, note=note), timeout=10
    )


def test_usage_of_other_services_is_priced_by_unit_exactly_and_once(mesh: Mesh, user: str) -> None:
    price(mesh, "minutes", model=MINUTE, unit_prices=[{"unit_type": "minute", "price_micros": 333_333}])
    first = use(mesh, user, "u1", usage_details={"language": "de"}, request_id="r-1")
    assert (first.status, first.credit_micros) == (C.RECORD_STATUS_APPLIED, 83_333_250)
    again = use(mesh, user, "u1", usage_amount="2.50", request_id="r-1")
    assert (again.status, again.seq) == (C.RECORD_STATUS_DUPLICATE, first.seq)
    assert use(mesh, user, "u1", usage_amount="3", request_id="r-1").status == C.RECORD_STATUS_CONFLICT
    (entry, *_) = mesh.transactions(user, model=MINUTE)
    assert (entry.unit_type, entry.unit_amount, entry.details) == ("minute", "2.5", '{"language":"de"}')
    explained = mesh.ledger.ExplainCharge(T.ExplainChargeRequest(user_id=user, event_id="u1"), timeout=10)
    assert (explained.recomputed_micros, explained.agrees) == (83_333_250, True)
    assert explained.lines[0].unit_amount == "2.5"
    quoted = mesh.prices.Quote(P.QuoteRequest(model=MINUTE, unit_type="minute", unit_amount="2.5"), timeout=10)
    assert (quoted.credit_micros, quoted.unit_pico) == (83_333_250, 33_333_300_000_000)


@pytest.mark.parametrize(("wrong", "why"), [
    ({"event_id": ""}, "event_id"), ({"usage_amount": "1e3x"}, "usage_amount"), ({"usage_amount": "-1"}, "usage_amount"),
    ({"unit_type": ""}, "unit_type"), ({"user_id": "x" * 65}, "user_id"), ({"product_id": ""}, "product_id"),
    ({"usage_details": {"much": "x" * 5000}}, "usage_details"),
])
def test_usage_that_can_not_be_booked_is_kept_and_not_guessed(
    mesh: Mesh, user: str, wrong: dict[str, Any], why: str
) -> None:
    fields = {"event": f"bad-{uuid4()}", **wrong}
    fields["event"] = fields.pop("event_id", fields["event"])
    owner = fields.pop("user_id", user)
    answer = use(mesh, owner, fields.pop("event"), **fields)
    assert answer.status == C.RECORD_STATUS_REJECTED
    assert why in answer.detail
    kept = [each for each in issues(mesh, "", kind=C.CHARGE_ISSUE_KIND_UNDECODABLE, page_size=500) if why in each.detail]
    assert kept
    assert kept[0].original
    with refused(grpc.StatusCode.FAILED_PRECONDITION, "CHARGE_ISSUE_NOT_RESOLVABLE"):
        resolve(mesh, kept[0], C.CHARGE_ISSUE_ACTION_RETRY)
    assert mesh.balance(user).seq == 1


def test_unpriced_usage_is_kept_listed_and_priced_when_a_rule_matches(mesh: Mesh, user: str) -> None:
    assert use(mesh, user, "e", product_id=f"new-{user}"[:60]).status == C.RECORD_STATUS_UNPRICED
    (issue,) = issues(mesh, user)
    assert (issue.kind, issue.seq, issue.event_id) == (C.CHARGE_ISSUE_KIND_UNPRICED, 2, "e")
    assert list(issue.actions) == [C.CHARGE_ISSUE_ACTION_REPRICE, C.CHARGE_ISSUE_ACTION_DISMISS]
    with refused(grpc.StatusCode.FAILED_PRECONDITION, "NO_PRICE"):
        resolve(mesh, issue, C.CHARGE_ISSUE_ACTION_REPRICE)
    price(
        mesh, f"for-{user}", model=f"new-{user}"[:60], unit_prices=[{"unit_type": "minute", "price_micros": 1_000}],
        valid_from={"seconds": 1},
    )
    wait_until(
        lambda: mesh.prices.Quote(P.QuoteRequest(model=f"new-{user}"[:60], unit_type="minute"), timeout=5), what="rule"
    )
    done = resolve(mesh, issue, C.CHARGE_ISSUE_ACTION_REPRICE, "a rule was missing")
    assert (done.result.status, done.result.credit_micros) == (C.RECORD_STATUS_APPLIED, 250_000)
    assert (done.issue.state, done.issue.note) == (C.CHARGE_ISSUE_STATE_RESOLVED, "a rule was missing")
    assert done.issue.resolved_by
    assert issues(mesh, user) == []
    assert len(issues(mesh, user, state=C.CHARGE_ISSUE_STATE_RESOLVED)) == 1
    with refused(grpc.StatusCode.FAILED_PRECONDITION, "CHARGE_ISSUE_NOT_RESOLVABLE"):
        resolve(mesh, issue, C.CHARGE_ISSUE_ACTION_REPRICE)
    assert mesh.balance(user).balance_micros == 10**9 - 250_000
    (repriced, first, _) = mesh.transactions(user)
    assert list(repriced.flags) == [transaction_pb2.TRANSACTION_FLAG_REPRICED]
    assert first.status == transaction_pb2.TRANSACTION_STATUS_UNPRICED
    total = mesh.ledger.GetConsumption(T.GetConsumptionRequest(user_id=user), timeout=5).total
    assert (total.calls, total.credit_micros) == (1, 250_000)
    assert mesh.findings(user) == []


def test_conflicts_late_ones_and_overruns_are_listed_and_dismissed(mesh: Mesh, user: str) -> None:
    def record(event: str, call_id: str = "", output: int = 20) -> Any:
        return mesh.charges.RecordCharges(C.RecordChargesRequest(charges=[{
            "event_id": event, "user_id": user, "call_id": call_id, "provider": "LOCAL", "model": "pro",
            "usage": {"input_tokens": 10, "output_tokens": output},
        }]), timeout=10).results[0]

    record("a")
    record("a", output=21)
    for ttl, output in ((60, 5_000), (1, 10)):
        hold = hold_request(user, str(uuid4()), ttl={"seconds": ttl})
        granted = mesh.holds.OpenHolds(Mesh.open_holds_request([hold]), timeout=5).results[0].granted
        if ttl == 1:
            wait_until(lambda: mesh.balance(user).held_micros == 0, seconds=10, what="the expiry")
        record(granted.hold_id, granted.hold_id, output)
    found = issues(mesh, user)
    assert [each.kind for each in found] == [
        C.CHARGE_ISSUE_KIND_LATE, C.CHARGE_ISSUE_KIND_OVERRUN, C.CHARGE_ISSUE_KIND_CONFLICT
    ]
    for issue in found:
        assert resolve(mesh, issue, C.CHARGE_ISSUE_ACTION_DISMISS).issue.state == C.CHARGE_ISSUE_STATE_DISMISSED
    assert issues(mesh, user) == []


def test_rules_that_overlap_are_refused_and_the_other_is_named(mesh: Mesh) -> None:
    first = price(mesh, "one", model="overlap", provider="P")
    with refused(grpc.StatusCode.FAILED_PRECONDITION, "PRICE_RULE_OVERLAP") as caught:
        price(mesh, "two", model="OVERLAP", provider="p")
    assert facts_of(caught.value)["rule_id"] == first.rule_id
    price(mesh, "three", model="overlap", provider="P", priority=1)
    first.valid_to.GetCurrentTime()
    first.valid_to.seconds += 3600
    mesh.prices.UpdatePriceRule(P.UpdatePriceRuleRequest(price_rule=first, idempotency_key="four"), timeout=10)
    price(mesh, "five", model="overlap", provider="P", valid_from=first.valid_to)


def test_a_draft_is_tried_against_what_was_used(mesh: Mesh, user: str) -> None:
    for number in range(3):
        mesh.charges.RecordCharges(C.RecordChargesRequest(charges=[{
            "event_id": f"e{number}", "user_id": user, "provider": "LOCAL", "model": "pro" if number else "other",
            "usage": {"input_tokens": 1000, "output_tokens": 1000},
        }]), timeout=10)
    draft = {
        "currency": "CNY", "credits_per_currency_unit": 100, "model": "pro", "input_price_micros_per_mtok": 6_400_000,
        "output_price_micros_per_mtok": 16_000_000,
    }
    answers = list(mesh.prices.SimulatePricing(
        P.SimulatePricingRequest(price_rule=draft, user_id=user), timeout=30
    ))
    last = answers[-1]
    assert (last.done, last.charges, last.matched, last.unpriced) == (True, 3, 2, 0)
    assert last.charged_micros == 3 * 1_920_000
    assert last.simulated_micros == last.charged_micros + 2 * 320_000
    future = P.SimulatePricingRequest(price_rule=draft, user_id=user)
    getattr(future, "from").seconds = int(time.time()) + 3600
    assert list(mesh.prices.SimulatePricing(future, timeout=30))[-1].charges == 0


# Budgets


def set_budget(mesh: Mesh, user: str, micros: int, **fields: Any) -> Any:
    values = {"user_id": user, "period": B.PERIOD_DAY, "limit_micros": micros, **fields}
    return mesh.budgets.SetBudget(B.SetBudgetRequest(**values), timeout=10).budget


def open_hold(mesh: Mesh, user: str, **fields: Any) -> Any:
    hold = hold_request(user, str(uuid4()), min_output_tokens=100, ttl={"seconds": 10}, **fields)
    return mesh.holds.OpenHolds(Mesh.open_holds_request([hold]), timeout=5).results[0]


def test_a_budget_caps_a_label_and_names_itself(mesh: Mesh, user: str) -> None:
    running = open_hold(mesh, user, labels={"project": "a"}).granted
    budget = set_budget(mesh, user, 2 * 163_200, label_key="project", label_value="a")
    assert (budget.held_micros, budget.left_micros) == (163_200, 163_200), "what runs already counts"
    assert open_hold(mesh, user, labels={"project": "a"}).granted.held_micros == 163_200
    answer = open_hold(mesh, user, labels={"project": "a"}).refused
    assert (answer.reason, answer.budget.budget_id, answer.available_micros) == ("BUDGET_EXCEEDED", budget.budget_id, 0)
    assert 0 < answer.resets_at.seconds - time.time() <= 86_400
    assert open_hold(mesh, user, labels={"project": "b"}).HasField("granted")
    mesh.charges.RecordCharges(C.RecordChargesRequest(charges=[{
        "event_id": running.hold_id, "call_id": running.hold_id, "user_id": user, "provider": "LOCAL", "model": "pro",
        "usage": {"input_tokens": 10, "output_tokens": 20},
    }]), timeout=5)
    (listed,) = mesh.budgets.ListBudgets(B.ListBudgetsRequest(user_id=user), timeout=5).budgets
    assert (listed.spent_micros, listed.held_micros) == (35_200, 163_200)
    again = set_budget(mesh, user, 10**9, label_key="project", label_value="a")
    assert (again.budget_id, again.spent_micros) == (budget.budget_id, 35_200)
    assert open_hold(mesh, user, labels={"project": "a"}).HasField("granted")
    mesh.budgets.DeleteBudget(B.DeleteBudgetRequest(user_id=user, budget_id=budget.budget_id), timeout=5)
    with refused(grpc.StatusCode.NOT_FOUND, "BUDGET_NOT_FOUND"):
        mesh.budgets.DeleteBudget(B.DeleteBudgetRequest(user_id=user, budget_id=budget.budget_id), timeout=5)
    with refused(grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD"):
        set_budget(mesh, user, 1, label_key="project")


def test_a_call_above_its_budget_is_told_so(mesh: Mesh, user: str) -> None:
    set_budget(mesh, user, 5, period=B.PERIOD_TOTAL)
    with refused(grpc.StatusCode.RESOURCE_EXHAUSTED, "BUDGET_EXCEEDED") as caught:
        mesh.calls.Generate(generate_request(user, "hello"), timeout=10)
    facts = facts_of(caught.value)
    assert (facts["limit_micros"], facts["period"], facts["resets_at"]) == ("5", "TOTAL", "never")


def test_a_calls_labels_count_in_their_budget(mesh: Mesh, user: str) -> None:
    set_budget(mesh, user, 10**9, label_key="agent", label_value="x", period=B.PERIOD_MONTH)
    answer = mesh.calls.Generate(
        generate_request(user, "hello", billing={"labels": {"agent": "x"}}, max_output_tokens=20), timeout=20
    )
    wait_until(lambda: mesh.balance(user).total_consumed_micros > 0, what="the charge")
    (listed,) = mesh.budgets.ListBudgets(B.ListBudgetsRequest(user_id=user), timeout=5).budgets
    assert (listed.spent_micros, listed.held_micros) == (answer.charge.credit_micros, 0)


def test_a_thousand_parallel_holds_never_pass_a_cap(new_mesh: Callable[..., Mesh]) -> None:
    """Two replicas on one database decide together."""
    mesh = new_mesh(TOKENSTORE_WORKERS="2", TOKENSTORE_ACCESS_LOG="errors")
    mesh.tokenstore.start()
    mesh.wait_for_tokenstore()
    mesh.credit("crowd", 10**12)
    set_budget(mesh, "crowd", 163_200 * 50 + 1, period=B.PERIOD_MONTH)
    set_budget(mesh, "crowd", 163_200 * 20, label_key="key", label_value="k0")

    async def crowd() -> Counter[str]:
        outcomes: Counter[str] = Counter()
        channels = [
            grpc.aio.insecure_channel(mesh.tokenstore_address, options=[("grpc.use_local_subchannel_pool", 1)])
            for _ in range(8)
        ]

        async def one(number: int) -> None:
            stub = hold_service_pb2_grpc.HoldServiceStub(channels[number % 8])
            label = f"k{number % 2}"
            hold = hold_request("crowd", str(uuid4()), min_output_tokens=100, labels={"key": label})
            answer = await stub.OpenHolds(Mesh.open_holds_request([hold]), timeout=60)
            outcomes[f"granted {label}" if answer.results[0].HasField("granted") else "refused"] += 1

        await asyncio.gather(*[one(number) for number in range(1000)])
        for channel in channels:
            await channel.close()
        return outcomes

    outcomes = asyncio.run(crowd())
    assert outcomes["granted k0"] <= 20
    assert outcomes["granted k0"] + outcomes["granted k1"] == 50
    assert outcomes["refused"] == 950
    budgets = mesh.budgets.ListBudgets(B.ListBudgetsRequest(user_id="crowd"), timeout=5).budgets
    assert all(budget.left_micros >= 0 for budget in budgets)
    assert mesh.findings() == []


def test_after_all_of_it_the_books_are_in_order(mesh: Mesh) -> None:
    mesh.wait_for_rest()
    assert mesh.findings() == []
