"""A synchronous client: python sync_client.py HOST:PORT USER"""

from __future__ import annotations

import os
import sys
import uuid
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "gen"))

import grpc
from creditmesh.llm.v1 import chat_pb2, llm_service_pb2, llm_service_pb2_grpc
from google.rpc import error_details_pb2
from grpc_status import rpc_status


def main(address: str, user: str) -> None:
    token = os.environ.get("CREDITMESH_TOKEN")
    metadata = [("authorization", f"Bearer {token}")] if token else []
    with grpc.insecure_channel(address) as channel:
        stub = llm_service_pb2_grpc.LLMServiceStub(channel)
        hello = [{"role": chat_pb2.ROLE_USER, "content": [{"text": "Hello, what are you?"}]}]
        request = llm_service_pb2.StreamRequest(
            billing={"user_id": user, "request_id": str(uuid.uuid4())}, messages=hello, max_output_tokens=200
        )
        call_id = ""
        for event in stub.Stream(request, metadata=metadata, timeout=60):
            if event.HasField("started"):
                call_id = event.started.call_id
            elif event.HasField("delta"):
                print(event.delta.text, end="", flush=True)
            else:
                print(f"\ncharged {event.finished.charge.credit_micros} micro-credits")
        schema = '{"type":"object","properties":{"city":{"type":"string"}},"required":["city"]}'
        answer = stub.Generate(llm_service_pb2.GenerateRequest(
            billing={"user_id": user}, messages=hello,
            response_format={"json_schema": {"name": "city", "schema": schema, "strict": True}},
        ), metadata=metadata, timeout=60)
        print("json:", answer.outputs[0].message.content[0].text)
        call = stub.GetCall(llm_service_pb2.GetCallRequest(call_id=call_id), metadata=metadata, timeout=10).call
        print("state:", llm_service_pb2.DESCRIPTOR.package, call.state, "attempts:", len(call.attempts))
        try:
            stub.Generate(llm_service_pb2.GenerateRequest(billing={"user_id": user}, model="no-such-model", messages=hello), timeout=10, metadata=metadata)
        except grpc.RpcError as error:
            info = error_details_pb2.ErrorInfo()
            rpc_status.from_call(error).details[0].Unpack(info)
            print("reason:", info.reason)


if __name__ == "__main__":
    main(*sys.argv[1:3])
