"""A gRPC server with what every server here has: health, reflection v1 and v1alpha, channelz, TLS, shared ports."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import grpc
from grpc_channelz.v1 import channelz_pb2_grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2, reflection_pb2_grpc

from servicekit.rpc.auth import ANY_TOKEN, OPEN
from servicekit.rpc.channelz import LiveFigures
from servicekit.rpc.grpc_call import Call
from servicekit.rpc.grpc_server import GrpcServer, listen, tls_context
from servicekit.rpc.interceptor import CallInterceptor, GuardedServer
from servicekit.settings import ServerSettings

REFLECTION_V1 = "grpc.reflection.v1.ServerReflection"
CHANNELZ = "grpc.channelz.v1.Channelz"
CHANNELZ_METHODS = (
    "GetTopChannels", "GetServers", "GetServer", "GetServerSockets", "GetChannel", "GetSubchannel", "GetSocket",
)


@dataclass(frozen=True, slots=True)
class Service:
    """A service to serve: its full name, the scope of each RPC, and how it is added to a guarded server."""

    name: str
    scopes: Mapping[str, str | None]
    add: Callable[[Any], None]


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


class HealthServicer(health.aio.HealthServicer):  # type: ignore[misc]  # untyped
    """The library's. Its watches end when the server drains, which would wait for them otherwise."""

    def __init__(self) -> None:
        super().__init__()
        self.drained = asyncio.Event()

    async def Watch(self, request: health_pb2.HealthCheckRequest, context: Call) -> None:
        watching = asyncio.create_task(super().Watch(request, context))
        drained = asyncio.create_task(self.drained.wait())
        try:
            await asyncio.wait({watching, drained}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            drained.cancel()
            watching.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await watching
        await context.write(health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.NOT_SERVING))


class HealthBoard:
    """grpc.health.v1: overall and for each service, all alike."""

    def __init__(self, service_names: Sequence[str]) -> None:
        self.servicer = HealthServicer()
        self._names = ["", *service_names]

    async def show(self, *, serving: bool) -> None:
        status = health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
        for name in self._names:
            await self.servicer.set(name, status)

    async def drain(self) -> None:
        """NOT_SERVING for good; watches are told so and end."""
        await self.show(serving=False)
        self.servicer.drained.set()


def build_server(
    *, settings: ServerSettings, services: Sequence[Service], interceptor: CallInterceptor, health_board: HealthBoard
) -> GrpcServer:
    """A server bound to settings.listen. Raises OSError when it can not be bound."""
    tls = _tls(settings)
    try:
        sockets = listen(settings.listen, share=settings.workers > 1)
    except OSError as error:
        raise OSError(f"can not listen on {settings.listen}: {error.strerror or error}") from error
    server = GrpcServer(sockets, tls=tls)
    guarded = interceptor.guard(server)
    for service in services:
        service.add(guarded)
    health_pb2_grpc.add_HealthServicer_to_server(health_board.servicer, guarded)
    names = [service.name for service in services]
    _add_reflection(guarded, [*names, health.SERVICE_NAME, reflection.SERVICE_NAME, CHANNELZ])
    channelz_pb2_grpc.add_ChannelzServicer_to_server(LiveFigures(server), guarded)
    return server


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


def _tls(settings: ServerSettings) -> ssl.SSLContext | None:
    if settings.tls_cert_file is None or settings.tls_key_file is None:
        return None
    return tls_context(settings.tls_cert_file, settings.tls_key_file, settings.tls_client_ca_file)
