"""A stand-in for a model server, as light as Python allows: a raw asyncio protocol that answers from ready bytes.

    python -m benchmarks.upstream PORT

The model's name decides: `unary`, `paced-200` (200 events, 2 ms apart, so that each arrives by itself), `chunks-200`
(each its own write, as fast as it goes), `burst-200` (all in one write).
"""

from __future__ import annotations

import asyncio
import json
import sys

ANSWER = json.dumps({
    "id": "c", "object": "chat.completion", "model": "bench",
    "choices": [{
        "index": 0, "message": {"role": "assistant", "content": "Hello there, friend."}, "finish_reason": "stop",
    }],
    "usage": {"prompt_tokens": 12, "completion_tokens": 6, "total_tokens": 18},
}).encode()
UNARY = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s" % (len(ANSWER), ANSWER)
PACE_SECONDS = 0.002
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


def framed(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


def event(document: object) -> bytes:
    return b"data: " + json.dumps(document).encode() + b"\n\n"


def events(count: int) -> list[bytes]:
    choice = {"index": 0, "delta": {"content": " word"}, "finish_reason": None}
    deltas = [event({"id": "c", "model": "bench", "choices": [choice]}) for _ in range(count)]
    end = event({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
    usage = {"prompt_tokens": 12, "completion_tokens": count, "total_tokens": 12 + count}
    return [*deltas, end + event({"choices": [], "usage": usage}) + b"data: [DONE]\n\n"]


class Answers(asyncio.Protocol):
    """One keep-alive connection, one request at a time."""

    def __init__(self) -> None:
        self._data = b""
        self._transport: asyncio.Transport | None = None
        self._ready: dict[bytes, list[bytes]] = {}

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._data += data
        while (end := self._data.find(b"\r\n\r\n")) >= 0:
            head = self._data[:end].lower()
            start = head.find(b"content-length: ") + 16
            length = int(head[start:].split(b"\r\n", 1)[0])
            if len(self._data) < end + 4 + length:
                return
            body = self._data[end + 4:end + 4 + length]
            self._data = self._data[end + 4 + length:]
            self._answer(json.loads(body)["model"])

    def _answer(self, model: str) -> None:
        assert self._transport is not None
        kind, _, count = model.partition("-")
        if kind == "unary":
            self._transport.write(UNARY)
            return
        pieces = EVENTS.setdefault(int(count), events(int(count)))
        if kind == "burst":
            self._transport.write(HEAD + framed(b"".join(pieces)) + b"0\r\n\r\n")
            return
        task = asyncio.ensure_future(self._send(pieces, pause=PACE_SECONDS if kind == "paced" else 0.0))
        TASKS.add(task)
        task.add_done_callback(TASKS.discard)

    async def _send(self, pieces: list[bytes], *, pause: float) -> None:
        """Each event in a write of its own, and the other connections in between."""
        assert self._transport is not None
        self._transport.write(HEAD)
        for piece in pieces:
            self._transport.write(framed(piece))
            await asyncio.sleep(pause)
        self._transport.write(b"0\r\n\r\n")


EVENTS: dict[int, list[bytes]] = {}
TASKS: set[asyncio.Future[None]] = set()


async def main(port: int) -> None:
    server = await asyncio.get_running_loop().create_server(Answers, "127.0.0.1", port)
    async with server:
        await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1])))
