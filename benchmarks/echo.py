"""The bare grpc.aio server that everything is compared with: a unary echo, a stream of N small messages, and a gateway
that only asks the model server, with aiohttp: no limits, no holds, no ledger.

    python -m benchmarks.echo PORT UPSTREAM_PORT
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import grpc
import grpc.aio
from creditmesh.llm.v1 import chat_pb2
from creditmesh.llm.v1 import llm_service_pb2 as messages

ANSWER = messages.GenerateResponse(call_id="x" * 36, model="bench")
CHUNK = messages.StreamResponse(delta=messages.Delta(text=" word"))
CHUNKS = 200


async def echo(request: Any, context: Any) -> Any:
    return ANSWER


async def stream(request: Any, context: Any) -> AsyncIterator[Any]:
    for _ in range(CHUNKS):
        yield CHUNK


class Gateway:
    """As short as it can be."""

    def __init__(self, upstream_port: int) -> None:
        self._url = f"http://127.0.0.1:{upstream_port}/v1/chat/completions"
        self._session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0))

    async def generate(self, request: Any, context: Any) -> Any:
        body = {
            "model": request.model, "max_tokens": request.max_output_tokens,
            "messages": [{"role": "user", "content": each.content[0].text} for each in request.messages],
        }
        async with self._session.post(self._url, json=body) as response:
            text = (await response.json())["choices"][0]["message"]["content"]
        message = chat_pb2.Message(role=chat_pb2.ROLE_ASSISTANT, content=[chat_pb2.Content(text=text)])
        return messages.GenerateResponse(model=request.model, outputs=[messages.Output(message=message)])


async def main(port: int, upstream_port: int) -> None:
    server = grpc.aio.server()
    gateway = Gateway(upstream_port)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("bench.Echo", {
        "Unary": grpc.unary_unary_rpc_method_handler(
            echo, request_deserializer=messages.GenerateRequest.FromString,
            response_serializer=messages.GenerateResponse.SerializeToString,
        ),
        "Gateway": grpc.unary_unary_rpc_method_handler(
            gateway.generate, request_deserializer=messages.GenerateRequest.FromString,
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
    asyncio.run(main(int(sys.argv[1]), int(sys.argv[2])))
