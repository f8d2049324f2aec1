"""An OpenAI-compatible model server that behaves as the name of the model says; in a thread of its own.

`ok` answers WORDS; options are added with commas, e.g. `ok,words=200,pause=0.01,nousage`. It counts what it was asked,
by the `user` prompt, so that a test knows which calls reached a model.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections import Counter
from typing import Any

from aiohttp import web

WORDS = 8
CANARY_ANSWER = "canary-answer-9d2"


class Upstream:
    """Knows behaviours: ok, http-N, silent, silent-after-N, error-after-N, malformed-after-N, close-after-N,
    tool, filter, length, empty, ignore-max, not-json, fails-times-N and limits-times-N (then ok, by prompt),
    usage-error (usage, then an error, no word). `first` waits before the answer begins."""

    def __init__(self) -> None:
        self.requests: list[dict[str, Any]] = []
        self.reached: Counter[str] = Counter()
        self.failures: Counter[str] = Counter()
        self.open_streams = 0
        self.closed_by_client = 0
        self.port = 0
        self._runner: Any = None
        self._loop = asyncio.new_event_loop()
        self._started = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="upstream")

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def start(self) -> None:
        self._thread.start()
        assert self._started.wait(10)

    def stop(self) -> None:
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=10)
        self._loop.close()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(self._open())
        self._started.set()
        self._loop.run_forever()

    async def _open(self) -> None:
        app = web.Application(client_max_size=64 * 2**20)
        app.router.add_post("/v1/chat/completions", self._answer)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1, handler_cancellation=True)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self.port)
        await site.start()
        self.port = self._runner.addresses[0][1]

    async def _close(self) -> None:
        await self._runner.cleanup()
        await asyncio.sleep(0.1)

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.requests.append({**body, "_headers": dict(request.headers)})
        content = body["messages"][-1].get("content")
        self.reached[content if isinstance(content, str) else "?"] += 1
        behaviour, *options = str(body["model"]).split(",")
        settings = dict(option.partition("=")[::2] for option in options)
        if behaviour.startswith("http-"):
            status = int(behaviour.removeprefix("http-"))
            code = {400: settings.get("code") or "invalid_request_error"}.get(status)
            return web.json_response(
                {"error": {"message": f"secret prompt {content}", "code": code}}, status=status,
                headers={"Retry-After": "7"} if status == 429 else {},
            )
        if behaviour == "silent":
            await asyncio.sleep(3600)
        kind, _, times = behaviour.partition("-times-")
        if times:
            self.failures[str(content)] += 1
            if self.failures[str(content)] <= int(times):
                status = {"fails": 503, "limits": 429}[kind]
                return web.json_response({"error": {"code": "server_error"}}, status=status, headers={"Retry-After": "0.2"})
            behaviour = "ok"
        if "first" in settings:
            await asyncio.sleep(float(settings["first"]))
        if body.get("stream"):
            return await self._stream(request, body, behaviour, settings)
        return await self._whole(body, behaviour, settings)

    def _words(self, body: dict[str, Any], behaviour: str, settings: dict[str, str]) -> tuple[list[str], str]:
        wanted = int(settings.get("words") or WORDS)
        limit = 10**9 if behaviour == "ignore-max" else int(body.get("max_tokens") or 10**9)
        finish = {"filter": "content_filter", "length": "length", "tool": "tool_calls"}.get(behaviour, "stop")
        if behaviour == "canary":
            return [CANARY_ANSWER], "stop"
        if wanted > limit:
            wanted, finish = limit, "length"
        return [" word"] * (0 if behaviour in ("empty", "usage-error") else wanted), finish

    def _usage(self, count: int, settings: dict[str, str]) -> dict[str, Any] | None:
        if "nousage" in settings:
            return None
        return {
            "prompt_tokens": int(settings.get("prompt") or 11), "completion_tokens": int(settings.get("out") or count),
            "total_tokens": 11 + count, "prompt_tokens_details": {"cached_tokens": int(settings.get("cached") or 0)},
        }

    async def _whole(self, body: dict[str, Any], behaviour: str, settings: dict[str, str]) -> web.Response:
        if behaviour == "not-json":
            return web.Response(text="<html>oops</html>", content_type="application/json")
        await asyncio.sleep(float(settings.get("pause") or 0))
        words, finish = self._words(body, behaviour, settings)
        message: dict[str, Any] = {"role": "assistant", "content": "".join(words)}
        if behaviour == "tool":
            message = {"role": "assistant", "content": None, "tool_calls": [
                {"id": "t1", "type": "function", "function": {"name": "look", "arguments": '{"at":"sky"}'}}
            ]}
        answer = {"model": "upstream-1", "choices": [{"index": 0, "message": message, "finish_reason": finish}]}
        usage = self._usage(len(words), settings)
        return web.json_response({**answer, "usage": usage} if usage else answer)

    async def _stream(
        self, request: web.Request, body: dict[str, Any], behaviour: str, settings: dict[str, str]
    ) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        self.open_streams += 1
        try:
            await self._send_events(response, body, behaviour, settings)
        except (ConnectionError, asyncio.CancelledError):
            self.closed_by_client += 1
            raise
        finally:
            self.open_streams -= 1
        return response

    async def _send_events(
        self, response: web.StreamResponse, body: dict[str, Any], behaviour: str, settings: dict[str, str]
    ) -> None:
        async def send(event: dict[str, Any]) -> None:
            await response.write(b"data: " + json.dumps({"model": "upstream-1", **event}).encode() + b"\n\n")

        words, finish = self._words(body, behaviour, settings)
        kind, _, after = behaviour.partition("-after-")
        stop_after = int(after) if after else -1
        if behaviour == "tool":
            for piece in ({"id": "t1", "function": {"name": "look", "arguments": ""}},
                          {"function": {"arguments": '{"at":'}}, {"function": {"arguments": '"sky"}'}}):
                await send({"choices": [{"index": 0, "delta": {"tool_calls": [{"index": 0, **piece}]}}]})
            words = []
        for number, word in enumerate(words):
            if number == stop_after:
                break
            await send({"choices": [{"index": 0, "delta": {"content": word}, "finish_reason": None}]})
            await asyncio.sleep(float(settings.get("pause") or 0))
        if behaviour == "usage-error":
            await send({"choices": [], "usage": self._usage(0, settings)})
            await send({"error": {"message": "secret", "code": "server_error"}})
            return
        if stop_after >= 0:
            if kind == "silent":
                await asyncio.sleep(3600)
            if kind == "error":
                await send({"error": {"message": "secret", "code": "server_error"}})
            if kind == "malformed":
                await response.write(b"data: {not json\n\n")
            if kind == "close" and response._req is not None:
                await asyncio.sleep(0.05)  # what was sent is read before the connection goes
                response._req.transport.close()
            return
        await send({"choices": [{"index": 0, "delta": {}, "finish_reason": finish}]})
        if (usage := self._usage(len(words), settings)) is not None:
            await send({"choices": [], "usage": usage})
        await response.write(b"data: [DONE]\n\n")
