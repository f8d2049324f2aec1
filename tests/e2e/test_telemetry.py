"""What an operator sees: one trace from the client to the ledger, metrics behind every query, and no content anywhere."""

from __future__ import annotations

import json
import re
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest
import yaml
from creditmesh.llm.v1 import model_service_pb2

from deploy.local.kafka import Kafka
from tests.support.chat import Chat
from tests.support.collector import Collector
from tests.support.load import wait_until
from tests.support.memories import contents
from tests.support.mesh import ROOT, Mesh, generate_request, stream_request
from tests.support.ports import free_port
from tests.support.upstream import CANARY_ANSWER, Upstream

OBSERVABILITY = ROOT / "deploy" / "observability"
ONLY_WITH_KAFKA = {"kafka_dead_letters_total", "kafka_consumed_total"}
OURS = ("llm_", "gen_ai_client", "outbox_", "grpc_server", "ledger_", "kafka_", "memory_")


@pytest.fixture
def collector() -> Iterator[Collector]:
    made = Collector()
    made.start()
    yield made
    made.stop()


def scrape(address: str) -> str:
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as answer:
        return answer.read().decode()  # type: ignore[no-any-return]


def sample_names(text: str) -> dict[str, set[str]]:
    """Names that a query may use, by metric, and the labels seen with them."""
    names: dict[str, set[str]] = {}
    for name, kind in re.findall(r"^# TYPE (\S+) (\S+)$", text, re.MULTILINE):
        ends = {"histogram": ("_bucket", "_sum", "_count")}.get(kind, ("",))
        for end in ends:
            names[name + end] = {"le"} if end == "_bucket" else set()
    for name, labels in re.findall(r"^([a-z_]+)\{([^}]*)\}", text, re.MULTILINE):
        names.setdefault(name, set()).update(re.findall(r"(\w+)=", labels))
    return names


def queries() -> list[str]:
    dashboard = json.loads((OBSERVABILITY / "dashboard.json").read_text())
    alerts = yaml.safe_load((OBSERVABILITY / "alerts.yaml").read_text())
    found = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    found += [rule["expr"] for group in alerts["groups"] for rule in group["rules"]]
    for group in alerts["groups"]:
        for rule in group["rules"]:
            assert set(rule["annotations"]) == {"summary", "next"}, "an alert says what to do next"
    return found


def test_every_query_of_dashboard_and_alerts_has_its_metric_and_labels(
    new_mesh: Callable[..., Mesh], upstream: Upstream
) -> None:
    llm, tokenstore, memory = (f"127.0.0.1:{free_port()}" for _ in range(3))
    mesh = new_mesh(LLM_METRICS_LISTEN=llm, TOKENSTORE_METRICS_LISTEN=tokenstore, MEMORY_METRICS_LISTEN=memory)
    mesh.start_memory()
    mesh.credit("alice", 10**9)
    mesh.register("pro", upstream.base_url, "http-503", max_retries=0, priority=0)
    mesh.register("pro", upstream.base_url, "ok,nousage,words=4,pause=0.01", priority=1, limits={"max_concurrency": 1})
    mesh.register("bad", upstream.base_url, "malformed-after-3")
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda model: list(mesh.calls.Stream(stream_request("alice", model=model), timeout=20)), ["pro"] * 3 + ["bad"]))
    mesh.calls.Generate(generate_request("alice"), timeout=20)
    mesh.wait_for_rest()
    time.sleep(1.2)  # a heartbeat shows the gauges
    text = scrape(llm) + scrape(tokenstore) + scrape(memory)
    names = sample_names(text)
    for query in queries():
        words = re.findall(r"[a-z_]+", re.sub(r'"[^"]*"', "", query))
        used = {word for word in words if word in names or word.startswith(OURS)}
        assert used, query
        for name in used - ONLY_WITH_KAFKA:
            assert name in names, f"{name} of {query} is no metric"
        wanted = set()
        for group in re.findall(r"by \(([^)]*)\)", query):
            wanted |= {label.strip() for label in group.split(",")}
        for name in used - ONLY_WITH_KAFKA:
            own = {label for inside in re.findall(name + r"\{([^}]*)\}", query) for label in re.findall(r"(\w+)\s*[=!]", inside)}
            assert (wanted | own) - {"job"} <= names[name], f"{query}: {name} has labels {names[name]}"
    assert "alice" not in text, "no user in a label"


def test_one_trace_leads_from_the_client_to_the_ledger(
    new_mesh: Callable[..., Mesh], upstream: Upstream, collector: Collector, kafka: Kafka
) -> None:
    mesh = new_mesh(
        LLM_OTLP_ENDPOINT=collector.endpoint, TOKENSTORE_OTLP_ENDPOINT=collector.endpoint,
        LLM_KAFKA_BOOTSTRAP_SERVERS=kafka.bootstrap_servers, TOKENSTORE_KAFKA_BOOTSTRAP_SERVERS=kafka.bootstrap_servers,
        LLM_KAFKA_TOPIC_PREFIX="traced-", TOKENSTORE_KAFKA_TOPIC_PREFIX="traced-",
    )
    mesh.start()
    mesh.credit("alice", 10**9)
    mesh.register("pro", upstream.base_url, "http-503", max_retries=0)
    mesh.register("pro", upstream.base_url, "ok", priority=1)
    trace_id, parent = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
    metadata = (("traceparent", f"00-{trace_id}-{parent}-01"),)
    list(mesh.calls.Stream(stream_request("alice"), timeout=20, metadata=metadata))
    list(mesh.calls.Stream(stream_request("alice"), timeout=20, metadata=(("traceparent", f"00-{trace_id[::-1]}-{parent}-00"),)))
    mesh.wait_for_rest()
    mesh.stop()
    spans = collector.spans(trace_id)
    names = sorted(f"{service} {span.name}" for service, span in spans)
    assert names == sorted([
        "llm_service creditmesh.llm.v1.LLMService/Stream", "llm_service chat http-503", "llm_service chat ok",
        "llm_service creditmesh.tokenstore.v1.HoldService/OpenHolds",
        "tokenstore_service creditmesh.tokenstore.v1.HoldService/OpenHolds",
        "tokenstore_service apply credit.charge.requested",
    ])
    known = {span.span_id.hex() for _, span in spans} | {parent}
    assert all(span.parent_span_id.hex() in known for _, span in spans), "one tree"
    asked = next(span for _, span in spans if span.name == "chat ok")
    attributes = {each.key: each.value for each in asked.attributes}
    assert attributes["gen_ai.operation.name"].string_value == "chat"
    assert attributes["gen_ai.usage.output_tokens"].int_value == 8
    failed = next(span for _, span in spans if span.name == "chat http-503")
    assert {each.key: each.value.string_value for each in failed.attributes}["error.type"] == "UPSTREAM_UNAVAILABLE"
    assert collector.spans(trace_id[::-1]) == [], "a trace that its client does not record is not recorded here"


def test_the_trace_goes_on_through_the_memory_worker_and_no_log_has_what_was_said(
    new_mesh: Callable[..., Mesh], collector: Collector
) -> None:
    mesh = new_mesh(**{f"{service}_OTLP_ENDPOINT": collector.endpoint for service in ("LLM", "TOKENSTORE", "MEMORY")})
    mesh.start_memory()
    mesh.credit("alice", 10**9)
    trace_id, canary = "5bf92f3577b34da6a3ce929d0e0e4737", "canary-tea-91"
    metadata = (("traceparent", f"00-{trace_id}-00f067aa0ba902b7-01"),)
    chat = Chat(mesh, "alice", title="t", use_memories=True)
    list(mesh.conversations.SendMessage(chat.request(f"I like {canary}."), timeout=20, metadata=metadata))
    wait_until(lambda: contents(mesh, "alice") == [f"The user likes {canary}"], what="the memory")
    mesh.wait_for_rest()
    mesh.stop()
    names = {f"{service} {span.name}" for service, span in collector.spans(trace_id)}
    assert names >= {
        "llm_service creditmesh.llm.v1.ConversationService/SendMessage",
        "memory_worker creditmesh.memory.v1.MemoryService/Retrieve",
        "llm_service creditmesh.llm.v1.LLMService/Generate", "tokenstore_service apply credit.charge.requested",
    }, names
    assert mesh.memory is not None
    assert canary not in mesh.llm.text() + mesh.tokenstore.text() + mesh.memory.text()
    assert not any(canary in str(span) for _, span in collector.spans(trace_id))


def everything_in(mesh: Mesh) -> str:
    """Every row of both databases as text."""
    rows = []
    for url, schema in ((mesh.llm_url, "llm"), (mesh.tokenstore_url, "tokenstore")):
        for (table,) in mesh.rows(url, "SELECT table_name FROM information_schema.tables WHERE table_schema = %s", (schema,)):
            rows += [str(row) for row in mesh.rows(url, f"SELECT t::text FROM {schema}.{table} AS t")]
    return "\n".join(rows)


def test_no_prompt_no_answer_and_no_key_is_ever_written_down(
    new_mesh: Callable[..., Mesh], upstream: Upstream, collector: Collector
) -> None:
    llm = f"127.0.0.1:{free_port()}"
    mesh = new_mesh(LLM_METRICS_LISTEN=llm, LLM_OTLP_ENDPOINT=collector.endpoint, TOKENSTORE_OTLP_ENDPOINT=collector.endpoint, LLM_LOG_LEVEL="debug")
    mesh.start()
    mesh.credit("alice", 10**9)
    prompt, answer, key, tool = "canary-prompt-7c1", CANARY_ANSWER, "sk-canary-key-4e3-000000", "canary-tool-5f4"
    for alias, behaviour in (("pro", "canary"), ("ok", "ok"), ("e500", "http-500"), ("e400", "http-400"), ("cut", "error-after-3"), ("bad", "malformed-after-2"), ("odd", "not-json")):
        mesh.register(alias, upstream.base_url, behaviour, api_key=key)
    told = []
    schema = {"response_format": {"json_schema": {"name": "s", "schema": '{"type":"object","required":["x"]}'}}}
    tools = [{"name": "look", "description": tool, "parameters": '{"type":"object"}'}]
    for fields in (
        {}, {"model": "ok"}, {"model": "e500"}, {"model": "e400"}, {"model": "cut"}, {"model": "bad"}, {"model": "odd"}, schema,
        {"request_id": "kept"}, {"tools": tools}, {"messages": [{"role": "ROLE_TOOL", "content": [{"text": prompt}]}]},
        {"model": prompt}, {"response_format": {"json_schema": {"name": "s", "schema": prompt}}},
    ):
        for call, kind in ((mesh.calls.Generate, generate_request), (mesh.calls.Stream, stream_request)):
            try:
                done: Any = call(kind("alice", **({"text": prompt} | fields)), timeout=20)
                if kind is stream_request:
                    list(done)
            except grpc.RpcError as error:
                if fields.get("model") != prompt:  # an unknown alias is told back to who sent it
                    told.append(str(error))
    told.append(str(mesh.models.ListModels(model_service_pb2.ListModelsRequest(), timeout=10)))
    mesh.wait_for_rest()
    told += [scrape(llm), everything_in(mesh)]
    mesh.stop()
    told += [mesh.llm.text(), mesh.tokenstore.text(), *(str(request) for request in collector.requests)]
    assert len(collector.requests) > 0
    for canary in (prompt, answer, key, tool):
        for text in told:
            found = text.find(canary)
            assert found < 0, text[max(0, found - 200):found + 100]
