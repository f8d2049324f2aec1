"""What outside scripts rely on: commands, exit codes, health, reflection, authentication, TLS, metrics, reload."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from creditmesh.llm.v1 import chat_pb2, llm_service_pb2, llm_service_pb2_grpc, model_service_pb2
from creditmesh.tokenstore.v1 import balance_service_pb2, balance_service_pb2_grpc, ledger_service_pb2
from google.protobuf.field_mask_pb2 import FieldMask
from grpc_channelz.v1 import channelz_pb2, channelz_pb2_grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from tests.support.certificates import Certificates
from tests.support.databases import Databases
from tests.support.errors import refused
from tests.support.load import wait_until
from tests.support.mesh import ROOT, Mesh, generate_request, stream_request
from tests.support.ports import free_port
from tests.support.upstream import Upstream

BIN = Path(sys.executable).parent
SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
Code = grpc.StatusCode


def run_module(module: str, *arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("LLM_", "TOKENSTORE_"))}
    return subprocess.run(
        [sys.executable, "-m", module, *arguments], cwd=ROOT, env={**clean, **environ}, capture_output=True,
        text=True, timeout=60, check=False,
    )


@pytest.mark.parametrize("module", ["llm_service", "tokenstore_service"])
def test_bad_configuration_is_one_line_a_problem_and_exit_code_2(module: str) -> None:
    prefix = module.split("_")[0].upper()
    done = run_module(module, **{f"{prefix}_LISTEN": "x", f"{prefix}_NONSENSE": "1", f"{prefix}_AUTH": "none"})
    assert done.returncode == 2
    assert sorted(line.partition(":")[0] for line in done.stderr.splitlines()) == [
        f"{prefix}_DATABASE_URL", f"{prefix}_LISTEN", f"{prefix}_NONSENSE"
    ]


@pytest.mark.parametrize("module", ["llm_service", "tokenstore_service"])
def test_migrate_makes_the_schema_and_serve_asks_for_it(module: str, databases: Databases) -> None:
    prefix = module.split("_")[0].upper()
    name = f"empty_{prefix.lower()}_{time.monotonic_ns()}"
    databases.postgres.create_database(name)
    environ = {f"{prefix}_DATABASE_URL": databases.postgres.url(name)}
    unmigrated = run_module(module, **environ, **{f"{prefix}_AUTH": "none"})
    assert unmigrated.returncode == 1
    assert f"run python -m {module} migrate" in unmigrated.stderr
    for _ in range(2):
        assert run_module(module, "migrate", **environ).returncode == 0


def test_a_taken_port_is_one_clear_line(mesh: Mesh) -> None:
    done = run_module("tokenstore_service", **{
        name: value for name, value in mesh.tokenstore.environ.items() if name.startswith("TOKENSTORE_")
    })
    assert done.returncode == 1
    assert f"can not listen on {mesh.tokenstore_address}" in done.stderr.splitlines()[-1]


def test_check_config_shows_everything_but_secrets(mesh: Mesh) -> None:
    done = run_module("llm_service", "check-config", LLM_DATABASE_URL="postgresql://u:secret@h/d", LLM_AUTH="none")
    assert done.returncode == 0
    assert "listen = 127.0.0.1:50051" in done.stdout
    assert "secret@" not in done.stdout


@pytest.mark.parametrize("which", ["llm", "tokenstore"])
def test_health_reflection_and_channelz(mesh: Mesh, which: str) -> None:
    address = getattr(mesh, f"{which}_address")
    with grpc.insecure_channel(address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        expected = {"llm": "creditmesh.llm.v1.LLMService", "tokenstore": "creditmesh.tokenstore.v1.LedgerService"}[which]
        for service in ("", expected):
            assert health.Check(health_pb2.HealthCheckRequest(service=service), timeout=5).status == SERVING
        request = reflection_pb2.ServerReflectionRequest(list_services="")
        (alpha,) = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(iter([request]), timeout=5)
        v1_method = channel.stream_stream(
            "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
            request_serializer=reflection_pb2.ServerReflectionRequest.SerializeToString,
            response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
        )
        (v1,) = v1_method(iter([request]), timeout=5)
        for answer in (alpha, v1):
            assert expected in {service.name for service in answer.list_services_response.service}
        live = channelz_pb2_grpc.ChannelzStub(channel)
        (server,) = live.GetServers(channelz_pb2.GetServersRequest(), timeout=5).server
        assert live.GetServer(channelz_pb2.GetServerRequest(server_id=server.ref.server_id), timeout=5).server.ref == server.ref
        assert server.listen_socket[0].name == address
        assert server.data.calls_succeeded >= 4
        sockets = live.GetServerSockets(channelz_pb2.GetServerSocketsRequest(server_id=server.ref.server_id), timeout=5)
        mine = live.GetSocket(channelz_pb2.GetSocketRequest(socket_id=sockets.socket_ref[-1].socket_id), timeout=5).socket
        assert mine.data.streams_started >= mine.data.streams_succeeded > 0
        assert mine.local.tcpip_address.port == int(address.rpartition(":")[2])
        channels = live.GetTopChannels(channelz_pb2.GetTopChannelsRequest(), timeout=5)
        assert channels is not None
        for lookup in (
            lambda: live.GetServer(channelz_pb2.GetServerRequest(server_id=7), timeout=5),
            lambda: live.GetServerSockets(channelz_pb2.GetServerSocketsRequest(server_id=7), timeout=5),
            lambda: live.GetSocket(channelz_pb2.GetSocketRequest(socket_id=server.ref.server_id + 10**6), timeout=5),
            lambda: live.GetSocket(channelz_pb2.GetSocketRequest(socket_id=10**9), timeout=5),
        ):
            with pytest.raises(grpc.RpcError) as caught:
                lookup()
            assert caught.value.code() is grpc.StatusCode.NOT_FOUND


def test_health_follows_the_dependencies(new_mesh: Callable[..., Mesh]) -> None:
    mesh = new_mesh()
    mesh.start()
    with grpc.insecure_channel(mesh.llm_address) as channel:
        health = health_pb2_grpc.HealthStub(channel)

        def status() -> Any:
            return health.Check(health_pb2.HealthCheckRequest(), timeout=5).status

        watch = health.Watch(health_pb2.HealthCheckRequest(service="creditmesh.llm.v1.LLMService"), timeout=60)
        assert next(watch).status == SERVING
        mesh.tokenstore.kill()
        assert next(watch).status == NOT_SERVING
        assert status() == NOT_SERVING
        mesh.tokenstore.start()
        assert next(watch).status == SERVING
        mesh.llm.signal(signal.SIGTERM)
        assert {each.status for each in watch} == {NOT_SERVING}
        assert mesh.llm.wait() == 0


def test_sigterm_turns_health_and_exits_zero_within_the_drain(
    new_mesh: Callable[..., Mesh], upstream: Upstream
) -> None:
    mesh = new_mesh(LLM_DRAIN_SECONDS="1")
    mesh.start()
    mesh.register("slow", upstream.base_url, "ok,words=400,pause=0.05")
    mesh.credit("alice", 10**9)
    stream = mesh.calls.Stream(stream_request("alice", model="slow"), timeout=60)
    next(stream)
    next(stream)
    asked_at = time.monotonic()
    assert mesh.llm.stop() == 0
    assert time.monotonic() - asked_at < 10
    mesh.llm.start()
    mesh.wait_until_serving()
    mesh.wait_for_rest()
    (entry,) = [entry for entry in mesh.transactions("alice") if entry.call_id]
    assert 0 < entry.usage.output_tokens < 400


def write_tokens(path: Path, **scopes: list[str]) -> None:
    path.write_text(json.dumps({"tokens": [
        {"name": name, "sha256": hashlib.sha256(name.encode()).hexdigest(), "scopes": granted}
        for name, granted in scopes.items()
    ]}))


def bearer(token: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {token}"),)


def test_tokens_scopes_and_their_reload(new_mesh: Callable[..., Mesh], tmp_path: Path) -> None:
    tokens, own = tmp_path / "tokens.json", tmp_path / "own"
    write_tokens(
        tokens, llm=["holds.write", "charges.write", "balance.read"], backend=["llm.call"],
        finance=["ledger.read", "ledger.adjust"],
    )
    own.write_text("llm\n")
    mesh = new_mesh(
        LLM_AUTH="tokens", TOKENSTORE_AUTH="tokens", LLM_AUTH_TOKENS_FILE=str(tokens),
        TOKENSTORE_AUTH_TOKENS_FILE=str(tokens), LLM_TOKENSTORE_TOKEN_FILE=str(own),
        TOKENSTORE_REFLECTION_OPEN="false",
    )
    mesh.start()
    adjust = ledger_service_pb2.AdjustBalanceRequest(
        user_id="alice", amount_micros=10**9, reason="x", reference="x", idempotency_key="k"
    )
    with refused(Code.UNAUTHENTICATED, "UNAUTHENTICATED"):
        mesh.ledger.AdjustBalance(adjust, timeout=5)
    with refused(Code.UNAUTHENTICATED, "UNAUTHENTICATED"):
        mesh.ledger.AdjustBalance(adjust, timeout=5, metadata=bearer("wrong"))
    with refused(Code.PERMISSION_DENIED, "PERMISSION_DENIED"):
        mesh.ledger.AdjustBalance(adjust, timeout=5, metadata=bearer("backend"))
    mesh.ledger.AdjustBalance(adjust, timeout=5, metadata=bearer("finance"))
    answer = mesh.calls.Generate(generate_request("alice"), timeout=10, metadata=bearer("backend"))
    assert answer.charge.credit_micros > 0
    with refused(Code.PERMISSION_DENIED, "PERMISSION_DENIED"):
        mesh.calls.Generate(
            generate_request("alice", billing={"skip_charge": True}), timeout=10, metadata=bearer("backend")
        )
    with refused(Code.UNAUTHENTICATED, "UNAUTHENTICATED"):
        channel = grpc.insecure_channel(mesh.tokenstore_address)
        list(reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(
            iter([reflection_pb2.ServerReflectionRequest(list_services="")]), timeout=5
        ))
    channel.close()
    write_tokens(tokens, llm=["holds.write", "charges.write", "balance.read"], newcomer=["llm.call"])

    def newcomer_may_call() -> bool:
        try:
            mesh.calls.Generate(generate_request("alice"), timeout=10, metadata=bearer("newcomer"))
        except grpc.RpcError:
            return False
        return True

    wait_until(newcomer_may_call, seconds=5, what="the new token")
    with refused(Code.UNAUTHENTICATED, "UNAUTHENTICATED"):
        mesh.calls.Generate(generate_request("alice"), timeout=10, metadata=bearer("backend"))
    assert "Bearer" not in mesh.llm.text() + mesh.tokenstore.text()


def test_tls_and_mutual_tls(new_mesh: Callable[..., Mesh], tmp_path: Path) -> None:
    certificates = Certificates(tmp_path)
    mesh = new_mesh(
        TOKENSTORE_TLS_CERT_FILE=str(certificates.cert), TOKENSTORE_TLS_KEY_FILE=str(certificates.key),
        TOKENSTORE_TLS_CLIENT_CA_FILE=str(certificates.ca), LLM_TOKENSTORE_TLS_CA_FILE=str(certificates.ca),
        LLM_TOKENSTORE_TLS_CERT_FILE=str(certificates.cert), LLM_TOKENSTORE_TLS_KEY_FILE=str(certificates.key),
        LLM_TLS_CERT_FILE=str(certificates.cert), LLM_TLS_KEY_FILE=str(certificates.key),
    )
    mesh.tokenstore.start()
    mesh.llm.start()
    ca, cert, key = (path.read_bytes() for path in (certificates.ca, certificates.cert, certificates.key))
    with grpc.secure_channel(mesh.llm_address, grpc.ssl_channel_credentials(ca)) as channel:
        health: Any = health_pb2_grpc.HealthStub(channel)

        def is_serving() -> bool:
            try:
                return bool(health.Check(health_pb2.HealthCheckRequest(), timeout=2).status == SERVING)
            except grpc.RpcError:
                return False

        wait_until(is_serving, what="llm_service over TLS, with TokenStore over mutual TLS")
        stub: Any = llm_service_pb2_grpc.LLMServiceStub(channel)
        with refused(Code.RESOURCE_EXHAUSTED, "INSUFFICIENT_CREDIT"):
            stub.Generate(generate_request("alice"), timeout=10)
    request = balance_service_pb2.GetBalanceRequest(user_id="alice")
    with grpc.secure_channel(mesh.tokenstore_address, grpc.ssl_channel_credentials(ca)) as channel:
        stub = balance_service_pb2_grpc.BalanceServiceStub(channel)
        with pytest.raises(grpc.RpcError):
            stub.GetBalance(request, timeout=2)
    with grpc.secure_channel(mesh.tokenstore_address, grpc.ssl_channel_credentials(ca, key, cert)) as channel:
        stub = balance_service_pb2_grpc.BalanceServiceStub(channel)
        assert stub.GetBalance(request, timeout=5).balance.balance_micros == 0


def test_metrics_are_served(new_mesh: Callable[..., Mesh]) -> None:
    ports = {name: free_port() for name in ("LLM", "TOKENSTORE")}
    mesh = new_mesh(
        LLM_METRICS_LISTEN=f"127.0.0.1:{ports['LLM']}", TOKENSTORE_METRICS_LISTEN=f"127.0.0.1:{ports['TOKENSTORE']}",
        TOKENSTORE_WORKERS="2",
    )
    mesh.start()
    mesh.credit("alice", 10**9)
    mesh.calls.Generate(generate_request("alice"), timeout=10)
    mesh.wait_for_rest()

    def text_of(name: str) -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{ports[name]}/metrics", timeout=5) as answer:
            text: str = answer.read().decode()
            return text

    llm = text_of("LLM")
    assert 'grpc_server_handled_total{code="OK",method="/creditmesh.llm.v1.LLMService/Generate"} 1.0' in llm
    assert "outbox_published_total 1.0" in llm
    tokenstore = text_of("TOKENSTORE")
    assert 'method="/creditmesh.tokenstore.v1.ChargeService/RecordCharges"' in tokenstore
    assert "alice" not in llm + tokenstore


def test_models_are_registered_changed_and_reloaded_with_their_keys_sealed(
    new_mesh: Callable[..., Mesh], upstream: Upstream
) -> None:
    mesh = new_mesh()
    mesh.start()
    mesh.credit("alice", 10**9)
    key = "sk-0123456789abcdefwxyz"
    model_id = mesh.register("pro", upstream.base_url, "ok,words=3", api_key=key)
    listed = mesh.models.ListModels(model_service_pb2.ListModelsRequest(), timeout=5).models
    assert [(each.model_id, each.api_key) for each in listed] == [(model_id, "sk-...wxyz")]
    answer = mesh.calls.Generate(generate_request("alice", "with a key"), timeout=10)
    assert answer.usage.output_tokens == 3
    asked = next(each for each in upstream.requests if each["messages"][-1]["content"] == "with a key")
    assert asked["_headers"]["Authorization"] == f"Bearer {key}"
    rows = mesh.rows(mesh.llm_url, "SELECT model::text FROM llm.model AS model")
    assert key not in str(rows)
    assert key not in mesh.llm.text()

    mesh.models.UpdateModel(model_service_pb2.UpdateModelRequest(
        model={"model_id": model_id, "upstream_model": "ok,words=5"}, update_mask=FieldMask(paths=["upstream_model"])
    ), timeout=5)
    assert mesh.calls.Generate(generate_request("alice"), timeout=10).usage.output_tokens == 5
    got = mesh.models.GetModel(model_service_pb2.GetModelRequest(model_id=model_id), timeout=5).model
    assert (got.api_key, got.alias) == ("sk-...wxyz", "pro")

    second = mesh.register("pro", upstream.base_url, "ok,words=9", priority=5)
    mesh.models.ActivateModel(
        model_service_pb2.ActivateModelRequest(model_id=second, exclusive=True), timeout=5
    )
    assert mesh.calls.Generate(generate_request("alice"), timeout=10).usage.output_tokens == 9
    mesh.models.DeactivateModel(model_service_pb2.DeactivateModelRequest(model_id=second), timeout=5)
    with refused(Code.FAILED_PRECONDITION, "MODEL_NOT_READY"):
        mesh.calls.Generate(generate_request("alice"), timeout=10)
    for each in (model_id, second):
        mesh.models.DeleteModel(model_service_pb2.DeleteModelRequest(model_id=each), timeout=5)
    with refused(Code.NOT_FOUND, "MODEL_NOT_FOUND"):
        mesh.models.GetModel(model_service_pb2.GetModelRequest(model_id=second), timeout=5)
    answer = mesh.calls.Generate(generate_request("alice"), timeout=10)
    assert answer.upstream_model == "local", "with nothing registered the built-in model serves again"


def test_a_call_is_cancelled_from_any_replica(new_mesh: Callable[..., Mesh], upstream: Upstream) -> None:
    """Each cancellation comes over a connection of its own, so that some reach the process that does not run the call."""
    mesh = new_mesh(LLM_WORKERS="2")
    mesh.start()
    mesh.register("slow", upstream.base_url, "ok,words=2000,pause=0.02")
    wait_until(lambda: mesh.llm.text().count('"models":1') == 2, what="the model in both processes")
    mesh.credit("alice", 10**12)
    journalled = "SELECT 1 FROM llm.call WHERE call_id = %s"
    for _ in range(6):
        stream = mesh.calls.Stream(stream_request("alice", model="slow"), timeout=60)
        call_id = next(stream).started.call_id
        wait_until(lambda call_id=call_id: mesh.rows(mesh.llm_url, journalled, (call_id,)), what="the call's record")
        with grpc.insecure_channel(mesh.llm_address, options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
            stub: Any = llm_service_pb2_grpc.LLMServiceStub(channel)
            stub.CancelCall(llm_service_pb2.CancelCallRequest(call_id=call_id, user_id="alice"), timeout=5)
        asked_at = time.monotonic()
        finished = list(stream)[-1].finished
        assert finished.finish_reason == chat_pb2.FINISH_REASON_CANCELLED
        assert time.monotonic() - asked_at < 3
    mesh.wait_for_rest()
    assert mesh.findings() == []


def test_tokens_are_counted_without_a_call(mesh: Mesh) -> None:
    request = llm_service_pb2.CountTokensRequest(messages=[{"role": "ROLE_USER", "content": [{"text": "hello world"}]}])
    answer = mesh.calls.CountTokens(request, timeout=5)
    assert answer.input_tokens == 9
    assert answer.upper_bound_tokens >= answer.input_tokens


@pytest.fixture
def cli(mesh: Mesh) -> Callable[..., str]:
    def run(program: str, *arguments: str, fails: bool = False) -> str:
        target = mesh.llm_address if program == "llm-service" else mesh.tokenstore_address
        done = subprocess.run(
            [BIN / program, *arguments, "--target", target], capture_output=True, text=True, timeout=60, check=False
        )
        assert (done.returncode != 0) == fails, done.stderr
        return done.stderr if fails else done.stdout

    return run


def test_the_command_lines_do_what_make_run_prints(cli: Callable[..., str], upstream: Upstream) -> None:
    assert "cli-user: 100 credits" in cli("tokenstore-service", "credit", "cli-user", "100")
    streamed = cli("llm-service", "stream", "cli-user", "Hello, what are you?")
    assert "by LOCAL" in streamed
    assert "finished: STOP" in streamed
    assert "charge:" in streamed
    assert "adjustment" in cli("tokenstore-service", "transactions", "cli-user")
    assert "agrees" in cli("tokenstore-service", "explain", "cli-user")
    assert "0 findings" in cli("tokenstore-service", "verify")
    assert "cli-user" in cli("tokenstore-service", "balance", "cli-user")
    assert "SETTLED" in cli("llm-service", "calls", "cli-user")
    registered = json.loads(cli(
        "llm-service", "register-model", "--alias", "cli", "--base-url", upstream.base_url, "--upstream-model", "ok",
        "--key", "sk-0123456789abcdef",
    ))
    assert registered["model"]["api_key"] == "sk-...cdef"
    assert " word" * 8 in cli("llm-service", "generate", "cli-user", "hi", "--model", "cli")
    assert "sk-...cdef" in cli("llm-service", "models")
    cli("llm-service", "delete-model", registered["model"]["model_id"])
    error = cli("llm-service", "stream", "poor-user", "hi", fails=True)
    assert error.startswith("RESOURCE_EXHAUSTED / INSUFFICIENT_CREDIT")
