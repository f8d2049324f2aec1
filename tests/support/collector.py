"""An OpenTelemetry collector that keeps what it is sent."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """Serves OTLP traces over gRPC on a port of its own."""

    def __init__(self) -> None:
        self.requests: list[Any] = []
        self._server = grpc.server(ThreadPoolExecutor(4))
        trace_service_pb2_grpc.add_TraceServiceServicer_to_server(self, self._server)
        self.port = self._server.add_insecure_port("127.0.0.1:0")

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        self._server.start()

    def stop(self) -> None:
        self._server.stop(None).wait()

    def Export(self, request: Any, context: Any) -> Any:
        self.requests.append(request)
        return trace_service_pb2.ExportTraceServiceResponse()

    def spans(self, trace_id: str) -> list[tuple[str, Any]]:
        """Service and span of a trace."""
        found = []
        for request in list(self.requests):
            for resource in request.resource_spans:
                service = next(each.value.string_value for each in resource.resource.attributes if each.key == "service.name")
                found += [(service, span) for scope in resource.scope_spans for span in scope.spans if span.trace_id.hex() == trace_id]
        return found
