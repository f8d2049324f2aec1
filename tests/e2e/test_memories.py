"""The mesh of three over sockets: what is said is remembered, decided upon, explained, undone, erased, and paid for."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Any

import grpc
import pytest
from creditmesh.llm.v1 import llm_service_pb2
from creditmesh.memory.v1 import memory_pb2
from creditmesh.memory.v1 import memory_service_pb2 as pb

from tests.support.chat import Chat
from tests.support.errors import facts_of, reason_of, refused
from tests.support.load import wait_until
from tests.support.memories import contents, index_status, items, job_of, remember, retrieve, submit, turn
from tests.support.mesh import Mesh

CREDIT = 100_000_000
Code = grpc.StatusCode
DONE, DEAD = memory_pb2.JOB_STATE_DONE, memory_pb2.JOB_STATE_DEAD


@pytest.fixture(scope="module")
def mesh(mesh_of_three: Mesh) -> Mesh:
    return mesh_of_three


@pytest.fixture
def user(mesh: Mesh, request: pytest.FixtureRequest) -> str:
    name = f"rememberer-{abs(hash(request.node.nodeid)) % 10**12}"
    mesh.credit(name, CREDIT)
    return name


def test_a_chat_is_remembered_in_the_next_one_and_all_of_it_is_in_the_ledger(mesh: Mesh, user: str) -> None:
    first = Chat(mesh, user, title="t", use_memories=True)
    started, _, _ = first.say("I live in Lisbon and I like green tea.")
    assert started.history.memory_use == llm_service_pb2.MEMORY_USE_NONE
    wait_until(lambda: len(items(mesh, user)) == 2, what="two memories")
    assert contents(mesh, user) == ["The user lives in Lisbon", "The user likes green tea"]
    second = Chat(mesh, user, title="t", use_memories=True)
    started, _, finished = second.say("What tea should I buy in Lisbon?")
    assert started.history.memory_use == llm_service_pb2.MEMORY_USE_SHOWN
    assert set(started.history.memory_ids) == {each.item_id for each in items(mesh, user)}
    assert list(second.messages()[1].memory_ids) == list(started.history.memory_ids)
    assert finished.message_id
    mesh.wait_for_rest()
    wait_until(lambda: all(each.state == DONE for each in jobs(mesh, user)), what="the jobs' end")
    mesh.wait_for_rest()
    charged = [each for each in mesh.transactions(user) if each.call_id]
    assert sorted({each.scene for each in charged}) == ["chat", "memory.extract"]
    extracted = [each for each in charged if each.scene == "memory.extract"]
    assert sum(each.credit_micros for each in jobs(mesh, user)) == -sum(each.amount_micros for each in extracted)
    assert all(not each.conversation_id for each in extracted), "a conversation's total is that of its answers"
    assert mesh.findings(user) == []


def jobs(mesh: Mesh, user: str) -> list[Any]:
    return list(mesh.memories.ListJobs(pb.ListJobsRequest(user_id=user), timeout=10).jobs)


def test_without_memories_a_conversation_tells_nobody(mesh: Mesh, user: str) -> None:
    Chat(mesh, user, title="t").say("I live in Oslo.")
    mesh.wait_for_rest()
    assert jobs(mesh, user) == []


def test_a_contradiction_supersedes_explains_and_can_be_undone(mesh: Mesh, user: str) -> None:
    before = remember(mesh, user, "I live in Lisbon.", "m1")
    moment = memory_pb2.MemoryItem(created_at=items(mesh, user)[0].created_at).created_at
    time.sleep(0.02)
    after = remember(mesh, user, "I moved to Porto!", "m2")
    assert contents(mesh, user) == ["The user lives in Porto"]
    old = items(mesh, user, status=memory_pb2.ITEM_STATUS_SUPERSEDED)[0]
    new = items(mesh, user)[0]
    assert (old.content, old.superseded_by) == ("The user lives in Lisbon", new.item_id)
    assert old.HasField("valid_to")
    assert [each.content for each in items(mesh, user, as_of=moment)] == ["The user lives in Lisbon"]
    then = retrieve(mesh, user, "Lisbon or Porto?", as_of=moment)
    assert [each.item.content for each in then] == ["The user lives in Lisbon"]
    decision = after.decisions[0]
    assert decision.action == memory_pb2.ACTION_ADD
    assert [each.relation for each in decision.candidates] == [memory_pb2.RELATION_CONFLICT]
    assert list(decision.item_ids) == [new.item_id, old.item_id]
    assert (decision.policy, decision.prompts) == ("set/1", "extract/2 compare/2")
    why = mesh.memories.ExplainDecision(pb.ExplainDecisionRequest(user_id=user, item_id=new.item_id), timeout=10)
    assert "contradicts it" in why.explanation
    assert "The user lives in Lisbon" in why.explanation
    assert why.decision.decision_id == decision.decision_id
    assert (after.calls, before.calls) == (4, 1), "a verdict with consequences needs three that agree"
    back = mesh.memories.RestoreItem(pb.RestoreItemRequest(user_id=user, item_id=old.item_id), timeout=10).item
    assert (back.status, back.version) == (memory_pb2.ITEM_STATUS_ACTIVE, 3)
    assert contents(mesh, user) == ["The user lives in Lisbon"]
    audit = mesh.memories.ListAudit(pb.ListAuditRequest(user_id=user, page_size=100), timeout=10).entries
    assert sorted(each.operation for each in audit) == ["created", "created", "restored", "superseded", "superseded"]
    assert {each.actor for each in audit} == {"worker", "anybody"}


@pytest.mark.parametrize(("text", "reason", "leak"), [
    ("Remember that I have the key sk-abcdefghijklmnopqrstuvwx1.", "SECRET:key", "sk-abcdefghijklmnopqrstuvwx1"),
    ("I have the mail someone@example.com.", "SENSITIVE", ""),
])
def test_secrets_are_refused_and_personal_data_needs_a_yes(
    mesh: Mesh, user: str, text: str, reason: str, leak: str
) -> None:
    job = remember(mesh, user, text, "m1")
    assert [(each.action, each.reason) for each in job.decisions] == [(memory_pb2.ACTION_DROP, reason)]
    assert items(mesh, user) == []
    if leak:
        kept = mesh.rows(mesh.memory_url, "SELECT fact::text || verdicts::text FROM memory.decision")
        assert not [each for each in kept if leak in each[0]]
        return
    settings = memory_pb2.MemorySettings(
        user_id=user, memory_enabled=True, implicit_enabled=True, sensitive_enabled=True
    )
    mesh.memories.UpdateSettings(pb.UpdateSettingsRequest(settings=settings), timeout=10)
    remember(mesh, user, text, "m2")
    assert [each.sensitivity for each in items(mesh, user)] == [1]
    assert len(retrieve(mesh, user, "mail someone@example.com")) == 1
    settings.sensitive_enabled = False
    mesh.memories.UpdateSettings(pb.UpdateSettingsRequest(settings=settings), timeout=10)
    assert retrieve(mesh, user, "mail someone@example.com") == [], "honoured at reading, too"


def test_switches(mesh: Mesh, user: str) -> None:
    default = mesh.memories.GetSettings(pb.GetSettingsRequest(user_id=user), timeout=10).settings
    assert (default.memory_enabled, default.implicit_enabled, default.sensitive_enabled) == (True, True, False)
    mesh.memories.UpdateSettings(pb.UpdateSettingsRequest(settings={"user_id": user, "memory_enabled": True}), timeout=10)
    job = remember(mesh, user, "I like rain. Remember that I like snow.", "m1")
    assert [each.reason for each in job.decisions] == ["NOT_EXPLICIT", "COMPARED"]
    assert contents(mesh, user) == ["The user likes snow"]
    mesh.memories.UpdateSettings(pb.UpdateSettingsRequest(settings={"user_id": user}), timeout=10)
    assert remember(mesh, user, "Remember that I like fog.", "m2").reason == "MEMORY_OFF"
    assert retrieve(mesh, user, "snow") == []


def test_constraints_are_always_there_and_nothing_unrelated_is(mesh: Mesh, user: str) -> None:
    remember(mesh, user, "Never suggest peanuts. I like jazz music.", "m1")
    found = retrieve(mesh, user, "quarterly tax report", explain=True)
    assert [(each.item.content, each.pinned) for each in found] == [("Never suggest peanuts", True)]
    found = retrieve(mesh, user, "which jazz music should I hear?", explain=True)
    assert [each.item.content for each in found] == ["Never suggest peanuts", "The user likes jazz music"]
    assert found[1].score == pytest.approx(sum(found[1].parts.values()))
    assert set(found[1].parts) == {"similarity", "importance", "confidence", "recency", "explicit"}
    assert retrieve(mesh, user, "jazz", types=[memory_pb2.MEMORY_TYPE_FACT]) == []
    assert len(retrieve(mesh, user, "jazz music", token_budget=8)) == 1
    assert [each.pinned for each in retrieve(mesh, user, "")] == [True]


def test_items_by_hand(mesh: Mesh, user: str) -> None:
    def create(content: str, **fields: Any) -> Any:
        item = {"user_id": user, "type": "MEMORY_TYPE_FACT", "content": content}
        return mesh.memories.CreateItem(pb.CreateItemRequest(item=item, **fields), timeout=10).item

    made = create("  plays   chess ", idempotency_key="k")
    assert (made.content, made.version, made.confidence, made.is_explicit) == ("plays chess", 1, 0.95, True)
    assert create("plays chess", idempotency_key="k").item_id == made.item_id
    assert create("Plays chess.").item_id == made.item_id, "the same words are one memory"
    with refused(Code.ALREADY_EXISTS, "IDEMPOTENCY_CONFLICT"):
        create("plays go", idempotency_key="k")
    with refused(Code.FAILED_PRECONDITION, "MEMORY_CONTENT_REFUSED") as error:
        create("password: hunter2222")
    assert facts_of(error.value)["kind"] == "key"

    def update(version: int = 0, **fields: Any) -> Any:
        return mesh.memories.UpdateItem(pb.UpdateItemRequest(
            item={"user_id": user, "item_id": made.item_id, "version": version, **fields},
            update_mask={"paths": list(fields)},
        ), timeout=10).item

    changed = update(version=1, content="plays chess well", importance=0.3)
    assert (changed.content, changed.importance, changed.version) == ("plays chess well", 0.3, 2)
    with refused(Code.ABORTED, "MEMORY_VERSION_CONFLICT"):
        update(version=1, importance=0.4)
    other = create("plays go")
    with refused(Code.FAILED_PRECONDITION, "MEMORY_ITEM_NOT_CHANGEABLE"):
        update(content="PLAYS GO")
    key = {"user_id": user, "item_id": made.item_id}
    assert mesh.memories.DeleteItem(pb.DeleteItemRequest(**key), timeout=10).item.status == memory_pb2.ITEM_STATUS_DELETED
    assert mesh.memories.DeleteItem(pb.DeleteItemRequest(**key), timeout=10).item.version == 3, "idempotent"
    with refused(Code.FAILED_PRECONDITION, "MEMORY_ITEM_NOT_CHANGEABLE"):
        update(importance=0.5)
    assert retrieve(mesh, user, "chess") == []
    mesh.memories.RestoreItem(pb.RestoreItemRequest(**key), timeout=10)
    assert [each.item.item_id for each in retrieve(mesh, user, "chess")] == [made.item_id]
    for wrong in ({"user_id": "somebody", "item_id": made.item_id}, {"user_id": user, "item_id": "01900000-0000-7000-8000-00000000abcd"}):
        for method, kind in (("GetItem", pb.GetItemRequest), ("DeleteItem", pb.DeleteItemRequest),
                             ("RestoreItem", pb.RestoreItemRequest)):
            with refused(Code.NOT_FOUND, "MEMORY_ITEM_NOT_FOUND"):
                getattr(mesh.memories, method)(kind(**wrong), timeout=10)
    assert mesh.memories.GetItem(pb.GetItemRequest(user_id=user, item_id=other.item_id), timeout=10).item == other
    with refused(Code.NOT_FOUND, "MEMORY_DECISION_NOT_FOUND"):
        mesh.memories.ExplainDecision(pb.ExplainDecisionRequest(user_id=user, item_id=other.item_id), timeout=10)
    status = mesh.memories.GetIndexStatus(pb.GetIndexStatusRequest(), timeout=10)
    assert status.items == status.indexed > 0
    assert status.embedder == "hashed/1:256"


def test_a_user_is_erased_for_good(mesh: Mesh, user: str) -> None:
    mesh.credit("bystander", CREDIT)
    remember(mesh, "bystander", "I like canary-bystander.", "m1")
    remember(mesh, user, "I like canary-erase-77.", "m1")
    job = remember(mesh, user, "I dislike canary-erase-77.", "m2")
    answer = mesh.memories.EraseUser(pb.EraseUserRequest(user_id=user), timeout=10)
    assert answer.erased["item"] == 2
    assert answer.erased["model_answer"] == 5
    for (table,) in mesh.rows(
        mesh.memory_url, "SELECT table_name FROM information_schema.tables WHERE table_schema = 'memory'"
    ):
        found = mesh.rows(mesh.memory_url, f"SELECT count(*) FROM memory.{table} t WHERE t::text LIKE '%%canary-erase-77%%'")
        assert found == [(0,)], table
    assert items(mesh, user) == []
    assert contents(mesh, "bystander") == ["The user likes canary-bystander"]
    before = turn(user, "I like canary-erase-77.", "m3", occurred_at={"seconds": 1_790_000_000})
    assert submit(mesh, before) == [""], "what comes late is not remembered"
    assert jobs(mesh, user) == []
    with refused(Code.NOT_FOUND, "MEMORY_JOB_NOT_FOUND"):
        job_of(mesh, job.job_id)


def test_memory_down_is_an_answer_without(new_mesh: Callable[..., Mesh]) -> None:
    mesh = new_mesh()
    memory = mesh.start_memory()
    mesh.credit("u", CREDIT)
    chat = Chat(mesh, "u", title="t", use_memories=True)
    memory.kill()
    started, text, _ = chat.say("I live in Rome.")
    assert started.history.memory_use == llm_service_pb2.MEMORY_USE_UNAVAILABLE
    assert text
    wait_until(lambda: len([each for each in mesh.transactions("u") if each.call_id]) == 1, what="the charge")
    assert mesh.outbox_size() == 1, "the turn waits, the charge does not"
    memory.start()
    mesh.wait_for_memory()
    wait_until(lambda: contents(mesh, "u") == ["The user lives in Rome"], what="the memory")


def test_what_holds_until_some_day_is_forgotten_then(mesh: Mesh, user: str) -> None:
    job = remember(mesh, user, "I like tea until 2031-01-01. I like milk until 2001-01-01.", "m1")
    assert [each.reason for each in job.decisions] == ["COMPARED", "OVER"]
    [tea] = items(mesh, user)
    assert tea.expires_at.ToDatetime().isoformat() == "2031-01-01T00:00:00"


@pytest.mark.parametrize("seed", range(2))
def test_two_tenants_at_random_with_forged_ids_never_meet(mesh: Mesh, seed: int) -> None:
    """Beside a model of both: what one does is never seen, changed or explained by the other."""
    chance = random.Random(seed)
    users = (f"tenant-a-{seed}", f"tenant-b-{seed}")
    model: dict[str, dict[str, str]] = {user: {} for user in users}
    deleted: dict[str, dict[str, str]] = {user: {} for user in users}
    stub = mesh.memories
    for number in range(150):
        user = chance.choice(users)
        own = chance.random() < 0.6
        owner = user if own else users[user == users[0]]
        known = [*model[owner], *deleted[owner]]
        item_id = chance.choice(known) if known else "00000000-0000-7000-8000-00000000000f"
        what = chance.choice(("create", "get", "update", "delete", "restore", "explain", "audit", "retrieve", "list"))
        may = own and bool(known)
        try:
            if what == "create":
                content = f"The user likes thing number {number} of {user}"
                item = {"user_id": user, "type": "MEMORY_TYPE_PREFERENCE", "content": content,
                        "item_id": item_id, "conversation_id": owner, "job_id": item_id}
                made = stub.CreateItem(pb.CreateItemRequest(item=item), timeout=10).item
                assert made.item_id not in known, "an id is ours to give"
                model[user][made.item_id] = content
            elif what == "get":
                assert stub.GetItem(pb.GetItemRequest(user_id=user, item_id=item_id), timeout=10).item.user_id == user
                assert may
            elif what == "update":
                content = f"The user likes thing number {number} of {user}, changed"
                request = pb.UpdateItemRequest(
                    item={"user_id": user, "item_id": item_id, "content": content}, update_mask={"paths": ["content"]}
                )
                stub.UpdateItem(request, timeout=10)
                assert may
                model[user][item_id] = content
            elif what == "delete":
                stub.DeleteItem(pb.DeleteItemRequest(user_id=user, item_id=item_id), timeout=10)
                assert may
                if item_id in model[user]:
                    deleted[user][item_id] = model[user].pop(item_id)
            elif what == "restore":
                stub.RestoreItem(pb.RestoreItemRequest(user_id=user, item_id=item_id), timeout=10)
                assert may
                if item_id in deleted[user]:
                    model[user][item_id] = deleted[user].pop(item_id)
            elif what == "explain":
                stub.ExplainDecision(pb.ExplainDecisionRequest(user_id=user, item_id=item_id), timeout=10)
                raise AssertionError("what was written by hand has no decision")
            elif what == "audit":
                entries = stub.ListAudit(pb.ListAuditRequest(user_id=user, item_id=item_id), timeout=10).entries
                assert bool(entries) == may
                assert {each.item.user_id for each in entries} <= {user}
            elif what == "retrieve":
                found = retrieve(mesh, user, f"what things does {owner} like?", limit=50)
                assert {each.item.item_id for each in found} <= set(model[user])
            else:
                assert {each.item_id: each.content for each in items(mesh, user)} == model[user]
        except grpc.RpcError as error:
            assert error.code() in (Code.NOT_FOUND, Code.FAILED_PRECONDITION), error
            assert not may or item_id in deleted[user] or what == "explain", (what, error)
    for user in users:
        assert {each.item_id: each.content for each in items(mesh, user)} == model[user]
        mesh.memories.EraseUser(pb.EraseUserRequest(user_id=user), timeout=10)
        assert items(mesh, user) == []
        model[user].clear()
        for other in users:
            assert {each.item_id: each.content for each in items(mesh, other)} == model[other]


def test_another_embedder_is_filled_in_beside_the_old_one_and_serves_at_once_when_it_is_whole(new_mesh: Callable[..., Mesh]) -> None:
    mesh = new_mesh()
    memory = mesh.start_memory()
    mesh.credit("u", CREDIT)
    remember(mesh, "u", "I like tea. I live in Rome.", "m1")
    mesh.wait_for_rest()
    balance = mesh.balance("u").balance_micros

    def found() -> list[str]:
        return [each.item.content for each in retrieve(mesh, "u", "The user likes tea", limit=1)]

    def vectors() -> dict[str, int]:
        return dict(mesh.rows(mesh.memory_url, "SELECT embedder, count(*) FROM memory.embedding GROUP BY 1"))

    old, new = "hashed/1:256", "llm:embedding:1"
    memory.stop()
    memory.start(MEMORY_EMBEDDER="llm")
    mesh.wait_for_memory()
    status = index_status(mesh)
    assert (status.embedder, status.filling) == (old, new), "the old one serves while the new one is filled in"
    assert found() == ["The user likes tea"]
    item = {"user_id": "u", "type": "MEMORY_TYPE_FACT", "content": "written meanwhile"}
    mesh.memories.CreateItem(pb.CreateItemRequest(item=item), timeout=10)
    assert vectors()[old] == 3
    wait_until(lambda: index_status(mesh).embedder == new, what="the switch", seconds=30)
    assert vectors() == {old: 3, new: 3}
    mesh.wait_for_rest()
    assert mesh.balance("u").balance_micros == balance, "it is not the user who wanted that"
    assert found() == ["The user likes tea"]
    mesh.wait_for_rest()
    assert mesh.balance("u").balance_micros < balance, "a question is the user's"
    before = {each.call_id for each in mesh.transactions("u")}
    job = remember(mesh, "u", "I like canoes.", "m2")
    mesh.wait_for_rest()
    charged = [each for each in mesh.transactions("u") if each.call_id not in before]
    assert {"memory.extract", "memory.embed"} <= {each.scene for each in charged}
    assert (job.calls, job.credit_micros) == (len(charged), -sum(each.amount_micros for each in charged))
    mesh.memories.DeleteItem(pb.DeleteItemRequest(user_id="u", item_id=items(mesh, "u")[0].item_id), timeout=10)
    # Back again at once; then what no longer serves is removed, some time after.
    memory.stop()
    memory.start(MEMORY_EMBEDDER="hashed")
    mesh.wait_for_memory()
    wait_until(lambda: index_status(mesh).embedder == old, what="the way back", seconds=30)
    mesh.execute(mesh.memory_url, "UPDATE memory.embedder SET since = now() - interval '1 hour' WHERE state = 3")
    wait_until(lambda: vectors() == {old: 3}, what="the removal")  # the one that was deleted has the new one's only
    assert found() == ["The user likes tea"]


@pytest.mark.parametrize(("method", "request_"), [
    ("SubmitTurns", pb.SubmitTurnsRequest()), ("GetJob", pb.GetJobRequest(job_id="x")),
    ("Retrieve", pb.RetrieveRequest()), ("Retrieve", pb.RetrieveRequest(user_id="u", limit=51)),
    ("CreateItem", pb.CreateItemRequest(item={"user_id": "u", "content": "x"})),
    ("CreateItem", pb.CreateItemRequest(item={"user_id": "u", "type": "MEMORY_TYPE_FACT", "content": " "})),
    ("UpdateItem", pb.UpdateItemRequest(item={"user_id": "u"}, update_mask={"paths": ["status"]})),
    ("ListAudit", pb.ListAuditRequest(user_id="u", page_token="nonsense")),
    ("ReplayJob", pb.ReplayJobRequest(job_id="01900000-0000-7000-8000-000000000001", policy="best")),
    ("ExplainDecision", pb.ExplainDecisionRequest()),
])
def test_bad_input_is_refused(mesh: Mesh, method: str, request_: Any) -> None:
    with pytest.raises(grpc.RpcError) as error:
        getattr(mesh.memories, method)(request_, timeout=10)
    assert reason_of(error.value) == "INVALID_FIELD"
