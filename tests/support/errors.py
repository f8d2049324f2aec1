"""What a gRPC error says."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from servicekit.rpc.status import error_info_of


def reason_of(error: Any) -> str:
    status = rpc_status.from_call(error)
    info = error_info_of(status) if status else None
    return info.reason if info else ""


def details_of(error: Any, kind: Any) -> list[Any]:
    status = rpc_status.from_call(error)
    found = []
    for detail in status.details if status else ():
        message = kind()
        if detail.Unpack(message):
            found.append(message)
    return found


def facts_of(error: Any) -> dict[str, str]:
    """The metadata of the ErrorInfo."""
    return dict(details_of(error, error_details_pb2.ErrorInfo)[0].metadata)


def violations_of(error: Any) -> list[str]:
    return [each.field for bad in details_of(error, error_details_pb2.BadRequest) for each in bad.field_violations]


@contextmanager
def refused(code: grpc.StatusCode, reason: str) -> Iterator[Any]:
    """The body raises an RPC error with that code and reason."""
    with pytest.raises(grpc.RpcError) as caught:
        yield caught
    error: Any = caught.value
    assert (error.code(), reason_of(error)) == (code, reason), error.details()
