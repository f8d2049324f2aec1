"""The bare grpc.aio server that everything is compared with: a unary echo and a stream of N small messages.

    python -m benchmarks.echo PORT
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from typing import Any

import grpc
import grpc.aio
from creditmesh.llm.v1 import llm_service_pb2 as messages

ANSWER = messages.GenerateResponse(call_id="x" * 36, model="bench")
CHUNK = messages.StreamResponse(delta=messages.Delta(text=" word"))
CHUNKS = 200


async def echo(request: Any, context: Any) -> Any:
    return ANSWER


async def stream(request: Any, context: Any) -> AsyncIterator[Any]:
    for _ in range(CHUNKS):
        yield CHUNK


async def main(port: int) -> None:
    server = grpc.aio.server()
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("bench.Echo", {
        "Unary": grpc.unary_unary_rpc_method_handler(
            echo, request_deserializer=messages.GenerateRequest.FromString,
            response_serializer=messages.GenerateResponse.SerializeToString,
        ),
        "Stream": grpc.unary_stream_rpc_method_handler(
            stream, request_deserializer=messages.StreamRequest.FromString,
            response_serializer=messages.StreamResponse.SerializeToString,
        ),
    }),))
    server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    await server.wait_for_termination()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1])))
