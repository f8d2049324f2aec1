"""Models watched, tested, declared in a file; keys rotated; addresses that may not be asked; a chat in the terminal."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from creditmesh.llm.v1 import llm_service_pb2, model_service_pb2

from tests.support.errors import refused, violations_of
from tests.support.load import wait_until
from tests.support.mesh import ROOT, Mesh, generate_request, stream_request
from tests.support.ports import free_port
from tests.support.upstream import Upstream

Code = grpc.StatusCode
M = model_service_pb2
OLD = "AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8="
NEW = "AQECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8="


def cli(mesh: Mesh, *arguments: str, stdin: str = "", **environ: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("LLM_", "TOKENSTORE_"))}
    return subprocess.run(
        [sys.executable, "-m", "llm_service", *arguments], cwd=ROOT, env={**clean, **environ}, capture_output=True,
        text=True, timeout=60, check=False, input=stdin,
    )


def test_a_tiny_real_call_tells_how_a_model_does_and_is_charged_to_nobody(mesh: Mesh, upstream: Upstream) -> None:
    good = mesh.register("tested", upstream.base_url, "ok", api_key="sk-0123456789abcdef")
    answer = mesh.models.TestModel(M.TestModelRequest(model_id=good), timeout=20)
    assert (answer.ok, answer.upstream_model, answer.usage.output_tokens) == (True, "upstream-1", 8)
    assert answer.latency.ToTimedelta() >= answer.first_token.ToTimedelta() > answer.first_token.ToTimedelta() * 0
    for behaviour, reason, status in (("http-401", "UPSTREAM_UNAVAILABLE", 401), ("http-400", "UPSTREAM_REJECTED", 400)):
        bad = mesh.register("tested", upstream.base_url, behaviour, active=False)
        answer = mesh.models.TestModel(M.TestModelRequest(model_id=bad), timeout=20)
        assert (answer.ok, answer.error_reason, answer.http_status) == (False, reason, status)
        assert "secret" not in answer.detail
    down = mesh.register("tested", "http://127.0.0.1:9/v1", "ok", active=False)
    assert not mesh.models.TestModel(M.TestModelRequest(model_id=down), timeout=20).ok
    local = mesh.register_local("embedding")
    assert mesh.models.TestModel(M.TestModelRequest(model_id=local), timeout=20).usage.input_tokens == 1
    with refused(Code.NOT_FOUND, "MODEL_NOT_FOUND"):
        mesh.models.TestModel(M.TestModelRequest(model_id="00000000-0000-4000-8000-000000000000"), timeout=20)
    assert mesh.rows(mesh.llm_url, "SELECT 1 FROM llm.call") == []
    assert "ok: upstream-1" in cli(mesh, "test-model", good, "--target", mesh.llm_address).stdout
    failed = cli(mesh, "test-model", down, "--target", mesh.llm_address)
    assert (failed.returncode, "UPSTREAM_UNAVAILABLE" in failed.stderr) == (1, True)


def test_watchers_are_told_of_every_change(mesh: Mesh, upstream: Upstream) -> None:
    first = mesh.register("watched", upstream.base_url, "ok")
    told: list[Any] = []
    watch = mesh.models.WatchModels(M.WatchModelsRequest(alias="watched"), timeout=30)

    def read() -> None:
        try:
            told.extend(watch)
        except grpc.RpcError:
            return

    reader = threading.Thread(target=read)
    reader.start()
    wait_until(lambda: any(each.synced for each in told), what="synced")
    assert [each.model.model_id for each in told] == [first, ""]
    second = mesh.register("watched", upstream.base_url, "ok,words=2")
    mesh.register("unwatched", upstream.base_url, "ok")
    mesh.models.ActivateModel(M.ActivateModelRequest(model_id=second, exclusive=True), timeout=10)
    mesh.models.DeleteModel(M.DeleteModelRequest(model_id=first), timeout=10)
    wait_until(lambda: told[-1].deleted, what="the deletion")
    watch.cancel()
    reader.join()
    assert {each.model.alias for each in told if not each.synced} == {"watched"}
    switched = [each.model.active for each in told if each.model.model_id == first and not each.deleted]
    assert switched == [True, False], "exclusive activation takes the others out of service"
    assert [each.revision for each in told] == sorted(each.revision for each in told)


def test_a_change_reaches_the_other_replica_within_two_seconds_and_running_calls_keep_what_they_have(
    new_mesh: Callable[..., Mesh], upstream: Upstream
) -> None:
    mesh = new_mesh()
    mesh.start()
    mesh.credit("alice", 10**9)
    other_address = f"127.0.0.1:{free_port()}"
    other = type(mesh.llm)("llm", {**mesh.llm.environ, "LLM_LISTEN": other_address}, mesh.llm.log)
    other.start()
    try:
        mesh._wait_for(other, other_address)
        from creditmesh.llm.v1 import llm_service_pb2_grpc

        calls = mesh._stub(llm_service_pb2_grpc.LLMServiceStub, other_address)
        model_id = mesh.register("moved", upstream.base_url, "ok,words=30,pause=0.1")

        def is_known() -> bool:
            try:
                return bool(calls.CountTokens(_count(), timeout=5).input_tokens)
            except grpc.RpcError:
                return False

        wait_until(is_known, what="the model", seconds=2.0)
        running = calls.Stream(stream_request("alice", model="moved"), timeout=20)
        next(running)
        next(running)
        mesh.models.UpdateModel(M.UpdateModelRequest(
            model={"model_id": model_id, "upstream_model": "ok,words=2"}, update_mask={"paths": ["upstream_model"]}
        ), timeout=10)
        changed_at = time.monotonic()

        def words() -> int:
            answer = calls.Generate(generate_request("alice", model="moved", max_output_tokens=50), timeout=20)
            return int(answer.usage.output_tokens)

        while words() != 2:
            assert time.monotonic() - changed_at < 2.0
        assert list(running)[-1].finished.usage.output_tokens == 30
    finally:
        other.stop()


def _count() -> Any:
    return llm_service_pb2.CountTokensRequest(model="moved", messages=[{"role": "ROLE_USER", "content": [{"text": "a"}]}])


@pytest.mark.parametrize(("field", "values"), [
    ("model.base_url", {"base_url": "http://10.0.0.1/v1"}), ("model.base_url", {"base_url": "http://169.254.169.254/latest"}),
    ("model.base_url", {"base_url": "http://127.0.0.1/v1?a=b"}), ("model.base_url", {"base_url": ""}),
    ("model.default_params", {"provider": M.PROVIDER_LOCAL, "default_params": {"nonsense": 1}}),
    ("model.quirks.server", {"quirks": {"server": "nobody"}}), ("model.tokenizer", {"tokenizer": "nothing"}),
    ("model.max_retries", {"max_retries": 99}), ("model.limits.rpm", {"limits": {"rpm": -1}}),
])
def test_models_that_may_not_be_are_refused(mesh: Mesh, field: str, values: dict[str, Any]) -> None:
    model = {"alias": "bad", "provider": M.PROVIDER_OPENAI_CHAT, "base_url": "http://127.0.0.1:1/v1", "upstream_model": "m", **values}
    with refused(Code.INVALID_ARGUMENT, "INVALID_FIELD") as caught:
        mesh.models.RegisterModel(M.RegisterModelRequest(model=model), timeout=10)
    assert violations_of(caught.value) == [field]


def test_a_name_that_leads_inside_is_found_out_when_it_is_asked(new_mesh: Callable[..., Mesh]) -> None:
    mesh = new_mesh(LLM_UPSTREAM_REACH="public")
    mesh.start()
    mesh.credit("alice", 10**9)
    with refused(Code.INVALID_ARGUMENT, "INVALID_FIELD"):
        mesh.register("pro", "http://localhost:8080/v1", "ok")
    # The machine's own name leads to its own address; any name can.
    import socket

    mesh.register("pro", f"http://{socket.gethostname()}:8080/v1", "ok")
    with refused(Code.UNAVAILABLE, "UPSTREAM_UNAVAILABLE"):
        mesh.calls.Generate(generate_request("alice"), timeout=10)
    assert "its address may not be asked" in mesh.llm.text() or "gaierror" in mesh.llm.text()
    mesh.wait_for_rest()
    assert mesh.balance("alice").balance_micros == 10**9


def test_every_field_of_a_model_is_kept_and_can_be_changed(mesh: Mesh, upstream: Upstream) -> None:
    fields: dict[str, Any] = {
        "limits": {"max_concurrency": 5, "rpm": 6, "tpm": 7}, "capabilities": {"tools": False, "json_schema": True},
        "default_params": {"a": {"b": [1, "x", 1.5, None, True]}}, "quirks": {"server": "vllm", "drop_params": ["seed"]},
        "hedge_after": {"nanos": 500_000_000}, "max_retries": 0, "bills_failed_attempts": True, "tokenizer": "qwen",
    }
    model_id = mesh.register("full", upstream.base_url, "ok", **fields)
    kept = mesh.models.GetModel(M.GetModelRequest(model_id=model_id), timeout=10).model
    expected = M.Model(**fields)
    for name in fields:
        assert getattr(kept, name) == getattr(expected, name), name
    changes = {"limits": {"rpm": 9}, "quirks": {"server": "ollama"}, "max_retries": 3, "default_params": {}, "hedge_after": None}
    request = M.UpdateModelRequest(model={"model_id": model_id, **{k: v for k, v in changes.items() if v is not None}}, update_mask={"paths": list(changes)})
    changed = mesh.models.UpdateModel(request, timeout=10).model
    assert (changed.limits.rpm, changed.limits.tpm, changed.quirks.server, changed.max_retries) == (9, 0, "ollama", 3)
    assert not changed.HasField("hedge_after")
    assert changed.capabilities.HasField("tools")


def test_a_file_is_applied_shown_first_and_twice_is_once(mesh: Mesh, upstream: Upstream, tmp_path: Path) -> None:
    file = tmp_path / "models.yaml"
    file.write_text(f"""
models:
  - {{alias: filed, provider: OPENAI_CHAT, base_url: "{upstream.base_url}", upstream_model: "ok", api_key: "${{K}}", active: true, limits: {{rpm: 100}}}}
  - {{alias: filed, provider: LOCAL, upstream_model: local, active: true, priority: 5, default_params: {{words: 3}}}}
""")
    at = ("--target", mesh.llm_address)
    missing = cli(mesh, "apply", str(file), *at)
    assert (missing.returncode, "${K} is not set" in missing.stderr) == (2, True)
    dry = cli(mesh, "apply", str(file), "--dry-run", *at, K="sk-0123456789abcdef")
    assert dry.returncode == 0, dry.stderr
    assert dry.stdout.count("+ filed") == 2
    assert "would change 2" in dry.stdout
    assert not mesh.models.ListModels(M.ListModelsRequest(alias="filed"), timeout=10).models
    done = cli(mesh, "apply", str(file), *at, K="sk-0123456789abcdef")
    assert "changed 2, 0 as they should be" in done.stdout
    assert "changed 0, 2 as they should be" in cli(mesh, "apply", str(file), *at, K="sk-0123456789abcdef").stdout
    file.write_text(file.read_text().replace("rpm: 100", "rpm: 200"))
    again = cli(mesh, "apply", str(file), *at, K="sk-0123456789abcdef")
    assert "changed 1, 1 as they should be" in again.stdout
    assert "'rpm': 200" in again.stdout
    shown = cli(mesh, "models", *at).stdout
    assert shown.count("filed") == 2
    assert "sk-0123456789abcdef" not in done.stdout + again.stdout + shown + mesh.llm.text()


def test_keys_are_sealed_again_under_a_new_secret_and_the_old_one_can_go(
    new_mesh: Callable[..., Mesh], upstream: Upstream
) -> None:
    mesh = new_mesh(LLM_SECRET_KEY=OLD)
    mesh.start()
    mesh.credit("alice", 10**9)
    mesh.register("pro", upstream.base_url, "ok", api_key="sk-rotate-me-12345678")
    mesh.llm.stop()
    service = {name: value for name, value in mesh.llm.environ.items() if name.startswith("LLM_")}
    before = mesh.rows(mesh.llm_url, "SELECT sealed_key FROM llm.model")
    refused_run = cli(mesh, "reseal", **{**service, "LLM_SECRET_KEY": NEW})
    assert (refused_run.returncode, "another secret key" in refused_run.stderr) == (1, True)
    assert mesh.rows(mesh.llm_url, "SELECT sealed_key FROM llm.model") == before
    both = {**service, "LLM_SECRET_KEY": f"{NEW},{OLD}"}
    assert "1 keys" in cli(mesh, "reseal", **both).stdout
    assert "0 keys" in cli(mesh, "reseal", **both).stdout
    mesh.llm.environ["LLM_SECRET_KEY"] = NEW
    mesh.llm.start()
    mesh.wait_until_serving()
    mesh.calls.Generate(generate_request("alice"), timeout=20)
    assert upstream.requests[-1]["_headers"]["Authorization"] == "Bearer sk-rotate-me-12345678"


def test_a_chat_in_the_terminal(mesh: Mesh) -> None:
    mesh.register_local("pro")
    mesh.credit("alice", 5_000_000)
    done = cli(
        mesh, "chat", "alice", "--target", mesh.llm_address, "--tokenstore", mesh.tokenstore_address,
        stdin="hello\n/cost\n/model nobody\nhello\n/quit\n",
    )
    assert done.returncode == 0, done.stderr
    assert "alice 5 credits (pro) > " in done.stdout
    assert "built-in LOCAL model" in done.stdout
    assert "1 answers" in done.stdout
    assert "MODEL_NOT_FOUND" in done.stdout
    vectors = mesh.register_local("embedding")
    assert vectors
    assert "256 dimensions" in cli(mesh, "embed", "alice", "green tea", "--target", mesh.llm_address).stdout
