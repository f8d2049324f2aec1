"""An asyncio client, two calls at once: python async_client.py HOST:PORT USER"""

from __future__ import annotations

import asyncio
import os
import sys
import uuid
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "gen"))

import grpc.aio
from creditmesh.llm.v1 import chat_pb2, llm_service_pb2, llm_service_pb2_grpc


async def ask(stub: llm_service_pb2_grpc.LLMServiceStub, user: str, text: str) -> tuple[str, int]:
    token = os.environ.get("CREDITMESH_TOKEN")
    request = llm_service_pb2.StreamRequest(
        billing={"user_id": user, "request_id": str(uuid.uuid4())}, max_output_tokens=200,
        messages=[{"role": chat_pb2.ROLE_USER, "content": [{"text": text}]}],
    )
    words, charged = [], 0
    async for event in stub.Stream(request, timeout=60, metadata=[("authorization", f"Bearer {token}")] if token else None):
        if event.HasField("delta"):
            words.append(event.delta.text)
        elif event.HasField("finished"):
            charged = event.finished.charge.credit_micros
    return "".join(words), charged


async def main(address: str, user: str) -> None:
    async with grpc.aio.insecure_channel(address) as channel:
        stub = llm_service_pb2_grpc.LLMServiceStub(channel)
        for text, charged in await asyncio.gather(ask(stub, user, "one"), ask(stub, user, "two")):
            print(f"{text}\ncharged {charged} micro-credits")


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:3]))
