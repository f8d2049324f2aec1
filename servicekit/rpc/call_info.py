"""What the interceptor knows of the running RPC, for the servicer to read."""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass

from servicekit.rpc.auth import Principal
from servicekit.telemetry.tracing import Span


@dataclass(frozen=True, slots=True)
class CallInfo:
    """One RPC. `deadline` is on the clock's monotonic scale, None without one."""

    method: str
    request_id: str
    principal: Principal
    deadline: float | None
    started: float
    traceparent: str = ""
    """W3C Trace Context for what this RPC asks others for; empty = not traced."""
    span: Span | None = None


_current: ContextVar[CallInfo] = ContextVar("call_info")

current_call = _current.get
set_current_call = _current.set
