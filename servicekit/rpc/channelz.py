"""grpc.channelz.v1: figures of what is alive. Channels are gRPC's own; the server and its connections are ours."""

from __future__ import annotations

import socket
from typing import Any

import grpc
from grpc_channelz.v1 import channelz
from grpc_channelz.v1 import channelz_pb2 as messages

from servicekit.rpc.grpc_call import Call
from servicekit.rpc.grpc_server import GrpcServer

FIRST_ID = 2**40
"""Of the server, and its connections from there on: far above what gRPC gives its own."""
MOST_RESULTS = 500


class LiveFigures(channelz.aio.ChannelzServicer):  # type: ignore[misc]  # untyped
    """The library's service, with this process' server."""

    def __init__(self, server: GrpcServer) -> None:
        self._server = server

    async def GetServers(self, request: messages.GetServersRequest, context: Call) -> Any:
        servers = [self._described()] if request.start_server_id <= FIRST_ID else []
        return messages.GetServersResponse(server=servers, end=True)

    async def GetServer(self, request: messages.GetServerRequest, context: Call) -> Any:
        if request.server_id != FIRST_ID:
            await context.abort(grpc.StatusCode.NOT_FOUND, "there is no such server")
        return messages.GetServerResponse(server=self._described())

    async def GetServerSockets(self, request: messages.GetServerSocketsRequest, context: Call) -> Any:
        if request.server_id != FIRST_ID:
            await context.abort(grpc.StatusCode.NOT_FOUND, "there is no such server")
        most = min(request.max_results or MOST_RESULTS, MOST_RESULTS)
        numbers = [each for each in sorted(self._server.connections) if FIRST_ID + each >= request.start_socket_id]
        refs = [messages.SocketRef(socket_id=FIRST_ID + each, name=self._peer(each)) for each in numbers[:most]]
        return messages.GetServerSocketsResponse(socket_ref=refs, end=len(numbers) <= most)

    async def GetSocket(self, request: messages.GetSocketRequest, context: Call) -> Any:
        if request.socket_id <= FIRST_ID:
            return await super().GetSocket(request, context)
        number = request.socket_id - FIRST_ID
        connection = self._server.connections.get(number)
        if connection is None:
            await context.abort(grpc.StatusCode.NOT_FOUND, "there is no such socket")
        return messages.GetSocketResponse(socket=messages.Socket(
            ref=messages.SocketRef(socket_id=request.socket_id, name=self._peer(number)),
            data=messages.SocketData(
                streams_started=connection.streams_begun, streams_succeeded=connection.streams_answered,
                streams_failed=connection.streams_begun - connection.streams_answered - len(connection.streams),
                remote_flow_control_window={"value": connection.send_window},
            ),
            local=_address(connection.address("sockname")), remote=_address(connection.address("peername")),
        ))

    def _described(self) -> messages.Server:
        server = self._server
        listening = [each.getsockname() for each in server.sockets if each.fileno() >= 0]
        return messages.Server(
            ref=messages.ServerRef(server_id=FIRST_ID, name="creditmesh"),
            data=messages.ServerData(
                calls_started=server.calls_begun, calls_succeeded=server.calls_succeeded,
                calls_failed=server.calls_failed,
            ),
            listen_socket=[messages.SocketRef(socket_id=FIRST_ID, name=_text(each)) for each in listening],
        )

    def _peer(self, number: int) -> str:
        return _text(self._server.connections[number].address("peername"))


def _text(address: Any) -> str:
    return f"{address[0]}:{address[1]}" if isinstance(address, tuple) else str(address or "")


def _address(address: Any) -> messages.Address:
    if not isinstance(address, tuple):
        return messages.Address(other_address=messages.Address.OtherAddress(name=str(address or "")))
    family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
    packed = socket.inet_pton(family, address[0].partition("%")[0])
    return messages.Address(tcpip_address=messages.Address.TcpIpAddress(ip_address=packed, port=address[1]))
