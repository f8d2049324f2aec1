"""A gRPC server with what every server here has: health, reflection v1 and v1alpha, channelz, TLS, shared ports."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import grpc
import grpc.aio
from grpc_channelz.v1 import channelz, channelz_pb2_grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2, reflection_pb2_grpc

from servicekit.rpc.accepting import AcceptingServer
from servicekit.rpc.auth import ANY_TOKEN, OPEN
from servicekit.rpc.interceptor import CallInterceptor, GuardedServer
from servicekit.settings import ServerSettings

REFLECTION_V1 = "grpc.reflection.v1.ServerReflection"
CHANNELZ = "grpc.channelz.v1.Channelz"
CHANNELZ_METHODS = (
    "GetTopChannels", "GetServers", "GetServer", "GetServerSockets", "GetChannel", "GetSubchannel", "GetSocket",
)
MOST_MESSAGE_BYTES = 32 * 1024 * 1024
KEEPALIVE_MILLISECONDS = 30_000
MOST_PENDING_CALLS = 50_000


@dataclass(frozen=True, slots=True)
class Service:
    """A service to serve: its full name, the scope of each RPC, how it is added to a guarded server, and the RPCs that
    many call at once."""

    name: str
    scopes: Mapping[str, str | None]
    add: Callable[[Any], None]
    busy: Sequence[str] = ()


def kit_scopes(*, reflection_open: bool) -> dict[str, str | None]:
    """Scopes of the services that every server has."""
    reflection_scope = OPEN if reflection_open else ANY_TOKEN
    scopes: dict[str, str | None] = {f"/{CHANNELZ}/{method}": ANY_TOKEN for method in CHANNELZ_METHODS}
    for name in (reflection.SERVICE_NAME, REFLECTION_V1):
        scopes[f"/{name}/ServerReflectionInfo"] = reflection_scope
    for method in ("Check", "Watch", "List"):
        scopes[f"/{health.SERVICE_NAME}/{method}"] = OPEN
    return scopes


def all_scopes(services: Sequence[Service], *, reflection_open: bool) -> dict[str, str | None]:
    """Full method name to scope, for everything a server serves."""
    scopes = kit_scopes(reflection_open=reflection_open)
    for service in services:
        scopes.update({f"/{service.name}/{method}": scope for method, scope in service.scopes.items()})
    return scopes


class HealthBoard:
    """grpc.health.v1: overall and for each service, all alike."""

    def __init__(self, service_names: Sequence[str]) -> None:
        self.servicer = health.aio.HealthServicer()
        self._names = ["", *service_names]

    async def show(self, *, serving: bool) -> None:
        status = health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
        for name in self._names:
            await self.servicer.set(name, status)


def build_server(
    *, settings: ServerSettings, services: Sequence[Service], interceptor: CallInterceptor, health_board: HealthBoard
) -> AcceptingServer:
    """A server bound to settings.listen. Raises OSError when the port is taken."""
    server = grpc.aio.server(
        options=[
            ("grpc.so_reuseport", 1 if settings.workers > 1 else 0),
            ("grpc.max_receive_message_length", MOST_MESSAGE_BYTES),
            ("grpc.max_send_message_length", MOST_MESSAGE_BYTES),
            # gRPC would drop calls at random, as CANCELLED, once 1000 wait to be taken up; a burst waits instead.
            ("grpc.server.max_pending_requests", MOST_PENDING_CALLS),
            ("grpc.server.max_pending_requests_hard_limit", 2 * MOST_PENDING_CALLS),
            ("grpc.server_max_unrequested_time_in_server", 120),
            ("grpc.keepalive_time_ms", KEEPALIVE_MILLISECONDS),
            ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
            ("grpc.keepalive_permit_without_calls", 1),
        ],
    )
    busy = [f"/{service.name}/{method}" for service in services for method in service.busy]
    guarded = interceptor.guard(server, busy=busy)
    for service in services:
        service.add(guarded)
    health_pb2_grpc.add_HealthServicer_to_server(health_board.servicer, guarded)
    names = [service.name for service in services]
    _add_reflection(guarded, [*names, health.SERVICE_NAME, reflection.SERVICE_NAME, CHANNELZ])
    channelz_pb2_grpc.add_ChannelzServicer_to_server(channelz.aio.ChannelzServicer(), guarded)
    try:
        credentials = _credentials(settings)
        if credentials is None:
            server.add_insecure_port(settings.listen)
        else:
            server.add_secure_port(settings.listen, credentials)
    except RuntimeError as error:
        raise OSError(f"can not listen on {settings.listen}: the port is taken or the address is not here") from error
    return AcceptingServer(server, guarded.busy_handlers)


def _add_reflection(server: GuardedServer, names: Sequence[str]) -> None:
    """v1alpha by the library; v1 has the same messages under another service name."""
    servicer = reflection.aio.ReflectionServicer(names)
    reflection_pb2_grpc.add_ServerReflectionServicer_to_server(servicer, server)
    handler = grpc.stream_stream_rpc_method_handler(
        servicer.ServerReflectionInfo,
        request_deserializer=reflection_pb2.ServerReflectionRequest.FromString,
        response_serializer=reflection_pb2.ServerReflectionResponse.SerializeToString,
    )
    server.add_registered_method_handlers(REFLECTION_V1, {"ServerReflectionInfo": handler})


def _credentials(settings: ServerSettings) -> grpc.ServerCredentials | None:
    if settings.tls_cert_file is None or settings.tls_key_file is None:
        return None
    client_ca = settings.tls_client_ca_file.read_bytes() if settings.tls_client_ca_file else None
    return grpc.ssl_server_credentials(
        [(settings.tls_key_file.read_bytes(), settings.tls_cert_file.read_bytes())],
        root_certificates=client_ca, require_client_auth=client_ca is not None,
    )
